"""Trainings in forked children of one process, which has imported PyTorch for all of them: `train.main` as it is.

Each may kill itself, with SIGKILL, at one exact moment. The moments are those at which the training is about to change
something on the disk, counted from its start. A line of JSON on stdin asks for a training,

    {"argv": ["--name", "a"], "kill_at": 17}

(null: at none), and a line of JSON on stdout tells what became of it: its exit code (negative: the signal that ended
it), what it printed, and the moments it came to, each as "function call file".
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.fx.experimental.symbolic_shapes  # noqa: E402  # what a training would import, once for all children

import train  # noqa: E402

CALLS = {"write", "replace", "rename", "truncate", "unlink", "mkdir"}
OURS = str(ROOT / "cvae")


class Moments:
    """A profiler that sees the calls which change the disk, and ends the process just before one of them."""

    def __init__(self, kill_at: int | None):
        self.kill_at = kill_at
        self.seen: list[str] = []
        self._pieces = 0

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_qualname == "SummaryWriter.flush":
            self.note("flush events")
        if event != "c_call" or not (code.co_filename.startswith(OURS) or "pathlib" in code.co_filename):
            return
        call = f"{code.co_name} {function.__name__}"
        if function.__name__ not in CALLS and call != "sync_folder fsync":
            return
        if isinstance(function.__self__, str):
            return  # its replace
        # A checkpoint is written in dozens of pieces, of which the twentieth will do.
        self._pieces = self._pieces + 1 if call == "write write" else 0
        if self._pieces in (0, 20):
            path = frame.f_locals.get("path", frame.f_locals.get("self"))
            self.note(f"{call} {path.name}" if isinstance(path, Path) else call)

    def note(self, moment: str) -> None:
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(moment)


def training(argv: list[str], kill_at: int | None, previous: int) -> dict[str, Any]:
    """Run one in a child. previous: the process id of the child before."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            if str(os.getpid()) <= str(previous):
                time.sleep(1.1)  # event files are named after second and process, and are read in the order of names
            moments = Moments(kill_at)
            sys.setprofile(moments)
            try:
                code = train.main(argv)
            except SystemExit as end:
                code = end.code
            finally:
                sys.setprofile(None)
            json.dump(moments.seen, report)
            report.flush()
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        output.seek(0)
        report.seek(0)
        return {"code": code, "output": output.read(), "moments": json.loads(report.read() or "[]"), "pid": child}


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread may be lost in a fork
    answers, sys.stdout = sys.stdout, sys.stderr
    pid = 0
    for line in sys.stdin:
        result = training(**json.loads(line), previous=pid)
        pid = result.pop("pid")
        print(json.dumps(result), file=answers, flush=True)
