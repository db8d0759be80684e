"""A training, resumed, begun anew and evaluated, without what only POSIX systems have, and as strict as Windows is."""

import json
import sys
from pathlib import Path

from support.inprocess import TINY, make_tiny_data
from support.trainings import ROOT, epochs_logged, finish, start

ELSEWHERE = """
import builtins, fcntl, io, json, os, signal, sys

import_, open_, get_flags, denied = builtins.__import__, io.open, fcntl.fcntl, set()

def our_import(name, globals=None, *more):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if importer in ("cvae", "train", "eval") and name in {"fcntl", "posix", "pwd", "resource", "termios", "tty"}:
        raise ImportError(f"No module named {name!r}")
    return import_(name, globals, *more)

def our_open(file, *arguments, **more):
    if str(file).startswith(("/proc", "/sys")):
        denied.add(str(file))
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return open_(file, *arguments, **more)

def refuse_open_files(*paths, **_):
    for descriptor in os.listdir("/proc/self/fd"):
        path = os.path.realpath(f"/proc/self/fd/{descriptor}")
        if any(f"{path}/".startswith(f"{os.path.realpath(each)}/") for each in paths):
            raise PermissionError(13, "The process cannot access the file because it is being used", path)

def refuse_folders(path, *_, **__):
    if os.path.isdir(path):
        denied.add("a folder")
        raise PermissionError(13, "Permission denied", path)

def refuse_replacing(source, target):
    refuse_open_files(source, target)
    if os.path.lexists(target):
        raise FileExistsError(17, "File exists", target)

def refuse_unwritable(descriptor):
    if not get_flags(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
        raise OSError(9, "Bad file descriptor")

def strict(module, name, refuse):
    call = getattr(module, name)
    setattr(module, name, lambda *arguments, **more: (refuse(*arguments, **more), call(*arguments, **more))[1])

builtins.__import__, builtins.open, io.open = our_import, our_open, our_open
for name in ("replace", "unlink", "remove", "rmdir"):
    strict(os, name, refuse_open_files)
strict(os, "open", refuse_folders)
strict(os, "rename", refuse_replacing)
strict(os, "fsync", refuse_unwritable)
for name in ("sched_getaffinity", "sched_setaffinity", "getloadavg", "statvfs", "sync"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "pthread_sigmask", "setitimer"):
    delattr(signal, name)

sys.path.insert(0, sys.argv[1])
from cvae.console import before_torch
before_torch()
import eval, train
codes = [{"train": train, "eval": eval}[script].main(words) for script, words in json.loads(sys.argv[2])]
print(json.dumps([codes, sorted(denied)]))
"""


def test_without_what_only_posix_systems_have(tmp_path: Path) -> None:
    data = str(make_tiny_data(tmp_path / "data"))
    words = ["--data", data, *TINY]
    calls = [
        ("train", [*words, "--name", "a b"]),
        ("train", ["--resume", "runs/a b", "--epochs", "3"]),
        ("eval", ["--samples", "3", "--device", "cpu", "--figure", "figure.png"]),
        ("train", [*words, "--name", "c", "--init", "runs/a b"]),
        ("train", [*words, "--name", "a b", "--overwrite", "--init", "runs/c"]),
        ("train", [*words, "--name", "a b"]),
    ]
    code, out, err = finish(start([sys.executable, "-c", ELSEWHERE, ROOT, json.dumps(calls)], tmp_path))
    assert code == 0, err
    codes, denied = json.loads(out.splitlines()[-1])
    assert codes == [0, 0, 0, 0, 0, 2], err
    assert err == "train.py: runs/a b exists already: --resume 'runs/a b' goes on with it, --overwrite starts it anew\n"
    assert epochs_logged(tmp_path / "runs/a b") == [("baseline", 1), ("cvae", 1), ("cvae", 2)]
    assert (tmp_path / "figure.png").exists()
    assert "/proc/cpuinfo" in denied
