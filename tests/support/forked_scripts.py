"""Scripts in forked children of one process, which has imported PyTorch for all of them: their `main` as it is.

A line of JSON on stdin, as `trainings.fork` writes it, asks for a script in as many children at once as there are
environments; one on stdout tells of each its exit code (negative: a signal), its output and, if it was watched, the
moments at which it was about to change the disk, as "function call file". It may kill itself, with SIGKILL, at one of
them, by number. file_size: the largest that it may write, in bytes; memory: so much more than it has now.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.fx.experimental.symbolic_shapes  # noqa: E402  # what a training would import, once for all children

import eval as evaluation  # noqa: E402
import train  # noqa: E402

MAIN = {"train.py": train.main, "eval.py": evaluation.main}
PATIENCE = 300  # seconds after which a child hangs, and is ended by SIGALRM
CALLS = {"write", "flush", "replace", "rename", "truncate", "unlink", "mkdir"}
OURS = str(ROOT / "cvae")


class Moments:
    """A profiler that sees the calls which change the disk, and ends the process just before one of them."""

    def __init__(self, kill_at: int | None):
        self.kill_at = kill_at
        self.seen: list[str] = []

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        code = frame.f_code
        if (
            event != "c_call"
            or function.__name__ not in CALLS
            or not (code.co_filename.startswith(OURS) or "pathlib" in code.co_filename)
        ):
            return
        if isinstance(function.__self__, str):
            return  # its replace
        path = frame.f_locals.get("path", frame.f_locals.get("self"))
        if function.__name__ == "unlink" and isinstance(path, Path) and not path.exists():
            return  # it changes nothing
        call = f"{code.co_name} {function.__name__}" + (f" {path.name}" if isinstance(path, Path) else "")
        if self.seen[-1:] != [call] or call != "_add flush":  # of an epoch's many events the first one will do
            if len(self.seen) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append(call)


class Child:
    """A script under way."""

    def __init__(self, asked: dict[str, Any], environment: dict[str, str]):
        self.files = {name: tempfile.TemporaryFile("w+") for name in ("out", "err", "moments")}  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self.files["out"].fileno(), 1)
            os.dup2(self.files["err"].fileno(), 2)
            signal.alarm(PATIENCE)
            os.chdir(asked["cwd"])
            os.environ.update(environment)
            if asked["file_size"] is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_size"],) * 2)
            if asked["memory"] is not None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + asked["memory"],) * 2)
            self.run(asked)

    def run(self, asked: dict[str, Any]) -> None:
        """In the child: run the script, and end."""
        sys.argv, sys.stdout = [asked["script"], *asked["argv"]], sys.__stdout__
        moments = Moments(asked["kill_at"])
        sys.setprofile(moments if asked["watched"] or asked["kill_at"] is not None else None)
        try:
            code = MAIN[asked["script"]](asked["argv"])
        except SystemExit as end:
            code = end.code
        finally:
            sys.setprofile(None)
        json.dump(moments.seen, self.files["moments"])
        for stream in (self.files["moments"], sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    def result(self) -> dict[str, Any]:
        """What became of it."""
        _, status = os.waitpid(self.pid, 0)
        left = {}
        for name, file in self.files.items():
            file.seek(0)
            left[name] = file.read()
            file.close()
        return {"code": os.waitstatus_to_exitcode(status), **left, "moments": json.loads(left["moments"] or "[]")}


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread may be lost in a fork
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        children = [Child(asked, environment) for environment in asked["environments"]]
        print(json.dumps([child.result() for child in children]), file=answers, flush=True)
