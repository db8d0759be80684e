"""Progress bars: on a terminal, which is a real one here, and elsewhere."""

import os
import re
import subprocess
import sys

import pytest
from support.scripts import PATIENCE, ROOT

WORK = """
import time
from cvae import console
console.BAR_AFTER_S, console.LINE_EVERY_S = SECONDS
with console.Bar("pictures", 4000, "img", SHOWN) as bar:
    for i in range(40):
        time.sleep(0.02)
        bar.update(100)
        bar.set_postfix_str("loss 1.25", refresh=False)
"""
SECONDS = 0.8  # that it takes


def worked(after: tuple[float, float], show: bool = True, on_terminal: bool = True) -> str:
    """What is seen on standard error of something with a bar.

    after: seconds until the bar comes where there is a terminal, and between lines elsewhere.
    """
    words = [sys.executable, "-c", WORK.replace("SECONDS", str(after)).replace("SHOWN", str(show))]
    if not on_terminal:
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert ended.stdout == ""
        return ended.stderr
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(words, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while chunk := _read(ours):
            seen += chunk
    os.close(ours)
    assert process.returncode == 0
    return seen.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # what Linux says where the other end is closed
        return b""


def test_bar_on_a_terminal() -> None:
    """It comes after a while, has rate and time left, and is gone at the end."""
    seen = worked((SECONDS / 4, 1e9))
    *shown, cleared, rest = seen.split("\r")[1:]
    assert (cleared.strip(), rest) == ("", "")
    assert len(shown) >= 2
    assert all(
        re.fullmatch(r"pictures: +\d+%\|.+\| \S+k?/4\.00k \[00:00<00:00, \d\S+img/s, loss 1\.25\]", line)
        for line in shown
    )
    assert int(re.findall(r"\d+", shown[0])[0]) >= 10  # percent: it came late


def test_lines_elsewhere() -> None:
    seen = worked((1e9, SECONDS / 4), on_terminal=False)
    lines = seen.splitlines()
    assert 1 <= len(lines) <= 4
    words = r"pictures: [\d.]+k? of 4\.00k img, \d\S+img/s, 00:00 left, loss 1\.25"
    assert all(re.fullmatch(words, line) for line in lines), seen
    assert "\r" not in seen


@pytest.mark.parametrize("on_terminal", [True, False])
def test_nothing_is_said_of_what_is_quick_or_quiet(on_terminal: bool) -> None:
    assert worked((1e9, 1e9), on_terminal=on_terminal) == ""
    assert worked((0, 0), show=False, on_terminal=on_terminal) == ""
