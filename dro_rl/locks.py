"""Who owns a place: one process at a time, by a lock, and one piece of work for good, by a record of what it is."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dro_rl.errors import InputError, Phrase
from dro_rl.files import written_whole
from dro_rl.rows.small import read_object

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""In a folder that one process at a time works in."""


@contextmanager
def owned(lock: Path, place: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Own what a lock file stands for while the block runs. A process that is killed leaves nothing that blocks.

    A folder that was made for the lock alone goes with it: work that is refused leaves nothing.

    Args:
        lock: a file that is made for this; its folder too.
        place: what errors call it.
        waiting: what is done between two tries while another process owns it; None: that is an error.

    Raises:
        InputError: another process owns it, or the file cannot be written.
    """
    said, made = False, not lock.parent.exists()
    while (file := _locked(lock, place)) is None:
        owner = lock.read_text() if lock.exists() else "another process"
        if waiting is None:
            raise InputError(
                place,
                Phrase(f"{lock.parent} is in use by {owner}"),
                "one process at a time works there",
                "Wait for it, or use another.",
            )
        if not said:
            logger.info(f"{lock.parent}: waiting for {owner}")
            said = True
        waiting()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # children that were forked meanwhile hold the file too
        file.close()
        if made:
            with suppress(OSError):  # there is work in it
                lock.parent.rmdir()


def owner_of(lock: Path) -> str | None:
    """Who works where a lock file stands, in words; None where nobody does."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.read_text() if lock.exists() else None
    except FileNotFoundError:
        return None
    return None


def _locked(lock: Path, place: str) -> IO[str] | None:
    """The lock file, opened and locked; None where another process has it."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = lock.open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
            file.close()  # the owner before has removed it
    except OSError as error:
        raise InputError(
            place,
            str(lock.parent),
            f"files can be written and locked there ({error.strerror})",
            "Use another.",
        ) from None


def claim(record: Path, facts: Mapping[str, Any], differs: Callable[[str, Any, Any], InputError]) -> bool:
    """Take the folder of `record` for a piece of work, or go on with the same work. Call it while owning the folder.

    Args:
        record: a JSON file that says what the work is, written whole before anything else of it.
        facts: what the work is.
        differs: the error for a key in which the work that was begun there is another: key, what was, what is wanted.

    Returns:
        Whether the work was begun before.

    Raises:
        InputError: the folder holds other work, or something else.
    """
    wanted = json.loads(json.dumps(facts))
    if record.is_file():
        before = read_object(record, "a record of what was begun", "Delete the folder to begin anew.")
        for key, value in wanted.items():
            if before.get(key) != value:
                raise differs(key, before.get(key), value)
        return True
    refuse_foreign(record.parent, str(record.parent), "what was begun there")
    with written_whole(record) as beside:
        beside.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return False


def refuse_foreign(folder: Path, place: str, work: str) -> None:
    """Refuse a folder with files in it for work that has a folder of its own. Hidden files are no matter."""
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        found = Phrase("holds something else") if place == str(folder) else str(folder)
        raise InputError(
            place, found, f"this is a folder of its own, which is empty or holds {work}", "Use another folder."
        )
