"""A training, resumed, begun anew and evaluated, without what only POSIX systems have, and as strict as Windows is."""

import json
import sys
from pathlib import Path

from support.inprocess import TINY, make_tiny_data
from support.trainings import ROOT, epochs_logged, finish, start

ELSEWHERE = """
import builtins, ctypes, errno, fcntl, io, json, os, signal, sys

POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
get_flags, import_, open_, files = fcntl.fcntl, builtins.__import__, io.open, "/proc/self/fd"
denied = []

def is_ours(name):
    return name in ("train", "eval") or name.split(".")[0] == "cvae"

def our_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name in POSIX and is_ours(importer):
        denied.append((importer, name))
        raise ImportError(f"No module named {name!r}")
    return import_(name, globals, locals, fromlist, level)

def our_open(file, *arguments, **more):
    if str(file).startswith(("/proc", "/sys")):
        denied.append(("open", str(file)))
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
    return open_(file, *arguments, **more)

def refuse_open_files(*paths):
    real = {os.path.realpath(path) for path in paths}
    for descriptor in os.listdir(files):
        try:
            path = os.readlink(f"{files}/{descriptor}")
        except OSError:
            continue
        if any(path == each or path.startswith(each + "/") for each in real):
            raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used", path)

def strict(call, change):
    def strict_call(*arguments, **more):
        change(*arguments, **more)
        return call(*arguments, **more)
    return strict_call

def no_folders(path, *_, **__):
    if os.path.isdir(path):
        denied.append(("os.open", "a folder"))
        raise PermissionError(errno.EACCES, "Permission denied", path)

def nothing_there(source, target, **_):
    refuse_open_files(source, target)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "File exists", target)

def writable(descriptor):
    if not get_flags(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.EBADF, "Bad file descriptor")

def no_program(name, *_, **__):
    if name is None:
        denied.append(("CDLL", None))
        raise TypeError("bad argument type for built-in operation")

builtins.__import__, builtins.open, io.open = our_import, our_open, our_open
os.open = strict(os.open, no_folders)
os.replace = strict(os.replace, lambda source, target: refuse_open_files(source, target))
os.rename = strict(os.rename, nothing_there)
for name in ("unlink", "remove", "rmdir"):
    setattr(os, name, strict(getattr(os, name), lambda path, **_: refuse_open_files(path)))
os.fsync = strict(os.fsync, writable)
ctypes.CDLL.__init__ = strict(ctypes.CDLL.__init__, lambda self, name, *_, **__: no_program(name))
for name in ("sched_getaffinity", "sched_setaffinity", "getloadavg", "statvfs", "sync"):
    delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "pthread_sigmask", "setitimer"):
    delattr(signal, name)

sys.path.insert(0, sys.argv[1])
from cvae.console import before_torch
before_torch()
import eval as evaluation
import train
for script, words in json.loads(sys.argv[2]):
    code = {"train": train, "eval": evaluation}[script].main(words)
    print(f"-- {script} {code}", flush=True)
print(json.dumps(sorted({(str(asker), str(name)) for asker, name in denied})))
"""
"""The scripts, one after the other, on a system like that; at the end, what they asked for in vain."""


def test_what_only_posix_systems_have(tmp_path: Path) -> None:
    data = str(make_tiny_data(tmp_path / "data"))
    words = ["--data", data, *TINY, "--runs", "runs"]
    calls = [
        ("train", [*words, "--name", "a b"]),
        ("train", ["--resume", "runs/a b", "--epochs", "3"]),
        ("eval", ["--runs", "runs", "--samples", "3", "--device", "cpu", "--figure", "figure.png"]),
        ("train", [*words, "--name", "c", "--init", "runs/a b"]),
        ("train", [*words, "--name", "a b", "--overwrite", "--init", "runs/c"]),
        ("train", [*words, "--name", "a b"]),
    ]
    code, out, err = finish(start([sys.executable, "-c", ELSEWHERE, ROOT, json.dumps(calls)], tmp_path))
    assert code == 0, err
    ends = [line for line in out.splitlines() if line.startswith("-- ")]
    assert ends == ["-- train 0", "-- train 0", "-- eval 0", "-- train 0", "-- train 0", "-- train 2"], err
    held = "train.py: runs/a b exists already: --resume 'runs/a b' goes on with it, --overwrite starts it anew\n"
    assert err == held
    assert epochs_logged(tmp_path / "runs/a b") == [("baseline", 1), ("cvae", 1), ("cvae", 2)]
    assert (tmp_path / "figure.png").exists()

    denied = {tuple(each) for each in json.loads(out.splitlines()[-1])}
    asked = {("os.open", "a folder"), ("CDLL", "None"), ("open", "/proc/cpuinfo"), ("open", "/proc/meminfo")}
    assert asked <= denied
    assert not [name for asker, name in denied if asker.startswith(("cvae", "train", "eval"))]
