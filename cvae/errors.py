"""What can go wrong, one class per exit code, each raised with one line that says what is wrong and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class CvaeError(Exception):
    """An expected failure: the scripts print its message as one line and exit with `exit_code`."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int = 1) -> None:
        cls.exit_code = exit_code

    def __init__(self, message: str = ""):
        super().__init__(printable(message))  # the names of files may hold anything


class PeerLost(CvaeError):
    """Another of the processes that train together is gone, or they could not meet."""


class UsageError(CvaeError, exit_code=2):
    """The request cannot be served as it was made: a flag, a device, a folder that is taken, too little memory."""


class DataError(CvaeError, exit_code=3):
    """A file that was to be read (data, checkpoint, settings) is missing, damaged or not what it should be."""


class NonFiniteError(CvaeError, exit_code=4):
    """Training produces NaN or infinity step after step; the weights never took them."""


class DiskError(CvaeError, exit_code=5):
    """A file could not be written; what stood there before is intact."""


class Interrupted(CvaeError):
    """Ctrl-C (exit 130) or SIGTERM (exit 143); a training leaves at the end of a step."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_text(word: str) -> bool:
    """Return whether a word from the command line or the disk is text in UTF-8, which alone can be written anywhere."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def printable(text: str) -> str:
    """Return text with control characters, and all else that no terminal can show, as escapes: `\\n` for instance."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def telling_of_memory() -> Iterator[None]:
    """Raise UsageError, in one line, where memory does not suffice, the machine's or the GPU's."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = f"the memory does not suffice ({first_line(error)[:200]})"
        raise UsageError(f"{problem}: smaller batches and networks, and fewer samples, need less") from None


@contextmanager
def taken_for_damage(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raise DataError, the problem and its kind, for these errors of a reader; ours, and too little memory, pass."""
    try:
        yield
    except kinds as error:
        if isinstance(error, CvaeError) or is_out_of_memory(error):
            raise
        raise DataError(f"{problem} ({getattr(error, 'strerror', None) or type(error).__name__})") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, as Python and PyTorch raise it, says that memory does not suffice."""
    signs = ("MemoryError", "out of memory", "t allocate memory", "bad_alloc", "STATUS_ALLOC_FAILED")  # can't, cannot
    return not isinstance(error, CvaeError) and any(sign in f"{type(error).__name__}: {error}" for sign in signs)
