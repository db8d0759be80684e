"""How threads wait is chosen before PyTorch is loaded, and never against what the user has set."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.scripts import ROOT

from cvae import console

SHOW = """
import os, sys
sys.path.insert(0, sys.argv[1])
from cvae.console import before_torch
before_torch()
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def chosen(**environment: str) -> str:
    """What a fresh process chooses, and whether PyTorch was loaded by then."""
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", SHOW, str(ROOT)]
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.process
@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="nothing tells what else runs")
def test_threads_sleep_at_once_beside_other_programs() -> None:
    with busy_processes((os.cpu_count() or 1) + 1):
        assert chosen() == "0 False"
        assert chosen(GOMP_SPINCOUNT="77") == "77 False"
        assert chosen(OMP_WAIT_POLICY="ACTIVE") == "None False"


@pytest.mark.parametrize(
    ("running", "cores", "usable", "others"),
    [(1, 2, 2, False), (2, 2, 2, True), (5, 8, 4, False), (6, 8, 4, True), (1, 1, 1, False), (3, 1, 1, True)],
)
def test_what_is_left_idle_counts(
    monkeypatch: pytest.MonkeyPatch, running: int, cores: int, usable: int, others: bool
) -> None:
    """running: all programs, this one among them; usable: the processors that this one may use."""
    monkeypatch.setattr(console.Path, "read_text", lambda self: f"0.10 0.20 0.30 {running}/99 1234")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert console.others_want_the_processors() is others


@pytest.mark.parametrize("text", ["", "nonsense", "0.1 0.2 0.3 x/y 4"])
def test_where_nothing_tells_it_is_alone(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(console.Path, "read_text", lambda self: text)
    assert not console.others_want_the_processors()
