"""Waiting for a file that somebody else has locked."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from paraval.errors import StorageError

__all__ = ["LockedError", "until_free"]

T = TypeVar("T")

_LONGEST_PAUSE_S: Final = 0.005
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class LockedError(StorageError):
    """Somebody else had the file locked for longer than we wait."""


def until_free(call: Callable[[], T], path: Path, patience_s: float) -> T:
    """Call again and again while the file is locked by somebody else; for calls that change nothing when they fail.

    Raises:
        LockedError: it was locked for ``patience_s`` seconds.
        sqlite3.Error: whatever else went wrong.
    """
    deadline = time.monotonic() + patience_s
    pause = 0.0001
    while True:
        try:
            return call()
        except sqlite3.Error as exc:
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in _BUSY:
                raise
            if time.monotonic() >= deadline:
                raise LockedError(
                    f"the store {str(path)!r} was locked by another program for {patience_s:g} s; "
                    "let that program end, or give SqliteStorage a longer timeout"
                ) from exc
        # Short and uneven pauses: whoever writes one thing after the other leaves only short gaps, one of which we
        # must meet. SQLite's own pauses, of up to 100 ms, starve; and Ctrl-C does not end them.
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _LONGEST_PAUSE_S)
