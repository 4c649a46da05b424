"""The one error that a user's input can cause. The command line prints it without a traceback and exits with 2."""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable, Sequence
from itertools import islice

from dro_rl.shown import visible


class InputError(ValueError):
    """Something a user wrote is wrong: a recipe key, a line of a question file, a model folder. Its text is one line.

    Args:
        place: where it is wrong: a key, a file with its line, a folder.
        value: what stands there, as the user would recognise it.
        rule: what must hold.
        fix: what to do.
    """

    status = 2
    """The exit status of a command that ends in it."""

    def __init__(self, place: str, value: object, rule: str, fix: str) -> None:
        self.place, self.value, self.rule, self.fix = place, value, rule, fix
        super().__init__(visible(f"{place}: {shorten(value)}: {rule}. {fix}"))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, Phrase, str, str]]:
        """As it travels from another process."""
        return type(self), (self.place, Phrase(shorten(self.value)), self.rule, self.fix)


class LackError(InputError):
    """The input may be right, and the machine lacks something for it: a package, memory, room on the disk."""

    status = 3


def shorten(value: object, limit: int = 120) -> str:
    """`repr(value)`, or the text itself for a string that is already a phrase, cut to `limit` characters.

    Takes no longer for a value of any size or depth.
    """
    text = value if isinstance(value, Phrase) else _Short().repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Short(reprlib.Repr):
    """The beginning of a value's `repr`."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12

    def repr_str(self, value: str, level: int) -> str:
        return repr(value[:200])

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 4096 else f"a number of {value.bit_length():,} bits"

    def repr_instance(self, value: object, level: int) -> str:
        try:
            return repr(value)
        except Exception:
            return f"a {type(value).__name__}"


class Phrase(str):
    """A value that describes what was found ("nothing", "2 of 5 lines") and is printed without quotes."""


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "Correct it.") -> str:
    """A fix: the nearest of the names that there are, or something else where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Did you mean {close[0]}?" if close else otherwise


def closest(name: str, known: Iterable[str]) -> str:
    """Some of the names that there are, the nearest first where one is near, of so many as can be compared at once."""
    some = list(islice(known, 5000))
    return ", ".join(map(repr, difflib.get_close_matches(name, some, 3, 0.4) or some[:3]))


def some(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, the first of them and how many more where they are many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def from_system(error: BaseException) -> InputError | None:
    """What the system says of a named file or folder, as a user's to correct; None for an error of another kind."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return None
    kind = LackError if is_full_disk(error) else InputError
    return kind(
        shorten(Phrase(error.filename)),
        Phrase(error.strerror),
        "a file or folder of that name can be read or written",
        "Check the path, its permissions and the disk.",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, torch's error of its own, or the words that its allocators have for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def as_size(count: float) -> str:
    """Bytes as people say them."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:,.{int(len(units) < 4)}f} {units[0]}"


def is_full_disk(error: BaseException) -> bool:
    """Whether a write found no room: as the system says it, as safetensors repeats it, as torch's archive writer fails.

    `torch.save` has no words for it. Its writer finds that less was written than it gave, or its stream fails.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    signs = ("No space left on device", "PytorchStreamWriter", "unexpected pos", "iostream error")
    return any(sign in str(error) for sign in signs)
