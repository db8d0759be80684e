"""The machine's memory: how much of it is left, and how glibc keeps what is freed."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

MMAP_THRESHOLD = 32 << 20  # the largest that glibc takes; whole data sets stay outside the heap
CONTROL_GROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By version: where they are, the files with a group's limit and usage, and the reclaimable part in `memory.stat`."""


def keep_freed_memory(keep: bool) -> None:
    """Have glibc keep freed memory instead of giving it back: each step needs it again, and new pages cost faults.

    Nor are small freed blocks kept apart ("fast bins"), which each allocation of a tensor would merge again.
    False: give it back, and have the thresholds at which glibc's own adaptation to large blocks ends.
    """
    try:
        c = ctypes.CDLL(None)
        mallopt, malloc_trim = c.mallopt, c.malloc_trim
    except (OSError, AttributeError, TypeError):
        return  # another C library: as it is
    m_mxfast, m_trim_threshold, m_mmap_threshold = 1, -1, -3
    mallopt(m_mmap_threshold, MMAP_THRESHOLD)
    mallopt(m_trim_threshold, 1 << 30 if keep else 2 * MMAP_THRESHOLD)
    mallopt(m_mxfast, 0 if keep else 128)  # in bytes; 128 is glibc's own
    if not keep:
        malloc_trim(0)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs can still take here, within the limits of the container or job; None where nothing tells.

    Linux does: in /proc/meminfo, and by the control groups (of version 2 or 1) that this process is in.
    """
    found = list(_left_in_groups(root))
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    return max(0, min(found)) if found else None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left in each control group with a limit, from this process's to the outermost one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        kinds, _, path = line.partition(":")[2].partition(":")
        if kinds and "memory" not in kinds.split(","):
            continue
        place, limit, usage, reclaimable = CONTROL_GROUPS[1 if kinds else 2]
        outermost = root / place
        group = outermost / path.lstrip("/")
        for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(outermost))]:
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
                yield left + sum(int(line.split()[1]) for line in lines if line.split()[:1] == [reclaimable])
            except (OSError, ValueError, IndexError):
                continue  # without a limit, or outside what a container shows
