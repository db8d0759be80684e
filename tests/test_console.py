"""What stands between a script and its user: bars, streams that cannot take what is printed, the start of a process."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import PATIENCE, ROOT

from cvae import console
from cvae.console import command, complain, say, silence
from cvae.errors import DataError, DiskError

BAR = """
import time
from cvae import console
console.BAR_AFTER_S, console.LINE_EVERY_S = SECONDS
with console.silence(SILENT), console.Bar("pictures", 4000, "img") as bar:
    for i in range(40):
        time.sleep(0.01)
        bar.update(100)
        bar.set_postfix_str("loss 1.25", refresh=False)
"""


def seen(after: tuple[float, float], silent: bool = False, on_terminal: bool = True) -> str:
    """Return what is on standard error; after: seconds to the bar on a terminal, and between lines elsewhere."""
    words = [sys.executable, "-c", BAR.replace("SECONDS", str(after)).replace("SILENT", str(silent))]
    if not on_terminal:
        return subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=True).stderr
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    output = b""
    with subprocess.Popen(words, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        try:
            while chunk := os.read(ours, 1 << 16):
                output += chunk
        except OSError:  # what Linux says where the other end is closed
            os.close(ours)
    assert process.returncode == 0
    return output.decode()


def test_bar_on_a_terminal() -> None:
    """It comes after a while, has rate and time left, and is gone at the end."""
    *shown, cleared, rest = seen((0.1, 1e9)).split("\r")[1:]
    assert (cleared.strip(), rest) == ("", "")
    assert len(shown) >= 2
    line = r"pictures: +\d+%\|.+\| \S+k?/4\.00k \[00:00<00:00, \d\S+img/s, loss 1\.25\]"
    assert all(re.fullmatch(line, each) for each in shown), shown
    assert int(re.findall(r"\d+", shown[0])[0]) >= 10  # percent: it came late


def test_lines_elsewhere() -> None:
    """None of what is quiet."""
    lines = seen((1e9, 0.1), on_terminal=False).splitlines()
    assert 1 <= len(lines) < 40  # updates
    line = r"pictures: [\d.]+k? of 4\.00k img, \d\S+img/s, 00:00 left, loss 1\.25"
    assert all(re.fullmatch(line, each) for each in lines), lines
    assert seen((0, 0), silent=True, on_terminal=False) == ""


def test_streams_that_cannot_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full one is an expected failure, one without its reader none; complaints never fail; nor does None."""

    class Failing(io.StringIO):
        number = errno.ENOSPC

        def write(self, text: str) -> int:
            raise OSError(self.number, os.strerror(self.number))

    monkeypatch.setattr(sys, "stdout", Failing())
    monkeypatch.setattr(sys, "stderr", Failing())
    with pytest.raises(DiskError, match="standard output: cannot be written"):
        say("line")
    complain("line")
    monkeypatch.setattr(Failing, "number", errno.EPIPE)
    say("line")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command("train.py")(lambda argv: say("line") or 0)([]) == 0


def test_output_is_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given UTF-8, as whoever reads a file of it expects."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert command("eval.py")(lambda argv: say("−1 ± 2 → ŷ é") or 0)([]) == 0
    assert stream.buffer.getvalue() == "−1 ± 2 → ŷ é\n".encode()


def fail(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.png: is damaged"), 3, "a.png: is damaged"),
        (MemoryError(), 2, "the memory does not suffice (MemoryError): "),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 2, "the memory does not suffice ("),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), 2, "the memory does not suffice ("),
    ],
    ids=repr,
)
def test_failures_in_one_line(error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("eval.py")(lambda argv: fail(error))([]) == code
    assert re.fullmatch(rf"eval\.py: {re.escape(line)}[^\n]*\n", capsys.readouterr().err)


def test_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        command("eval.py")(lambda argv: fail(RuntimeError("shapes")))([])


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with silence(), console.Bar("pictures", 4000, "img") as bar:
        say("nothing")
        assert bar.disable
    say("something")
    assert capsys.readouterr().out == "something\n"


# Before PyTorch is loaded


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="nothing tells what else runs")
def test_threads_sleep_at_once_beside_other_programs() -> None:
    """Chosen before PyTorch is loaded, and never against what the user has set."""
    show = "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    words = [sys.executable, "-c", f"import os, sys, cvae.console; cvae.console.before_torch(); {show}"]
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}

    def chosen(**environment: str) -> str:
        return subprocess.check_output(words, cwd=ROOT, env=kept | environment, text=True).strip()

    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range((os.cpu_count() or 1) + 1)]
    try:
        assert chosen() == "0 False"
        assert chosen(GOMP_SPINCOUNT="77") == "77 False"
        assert chosen(OMP_WAIT_POLICY="ACTIVE") == "None False"
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("running", "cores", "usable", "others"),
    [("1", 2, 2, False), ("2", 2, 2, True), ("5", 8, 4, False), ("6", 8, 4, True), ("x", 1, 1, False)],
)
def test_idle_processors_are_counted(
    monkeypatch: pytest.MonkeyPatch, running: str, cores: int, usable: int, others: bool
) -> None:
    """running: All programs, this one among them; usable: The processors that this one may use."""
    monkeypatch.setattr(Path, "read_text", lambda self: f"0.10 0.20 0.30 {running}/99 1234")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert console.others_want_the_processors() is others
