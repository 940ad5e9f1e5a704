"""What went wrong in SQLite, in the words of paraval: the one table that maps its errors to ours."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from paraval.errors import CorruptStoreError, ParavalError, StorageError, WrongStoreError
from paraval.storage.base import UnstorableError

__all__ = ["SQLITE_ERRORS", "explained", "leaves_doubt"]

_MESSAGES: Final[dict[int, tuple[type[ParavalError], str]]] = {
    sqlite3.SQLITE_FULL: (StorageError, "there is no room for more; make some, then go on: nothing stored is lost"),
    sqlite3.SQLITE_READONLY: (
        StorageError,
        "it cannot be written; see who may write it, its folder, and whether it was moved",
    ),
    sqlite3.SQLITE_PERM: (StorageError, "it may not be opened; see who may read and write it and its folder"),
    sqlite3.SQLITE_AUTH: (StorageError, "it may not be opened; see who may read and write it and its folder"),
    sqlite3.SQLITE_CANTOPEN: (StorageError, "it, or a file beside it, cannot be opened; see who may write its folder"),
    sqlite3.SQLITE_IOERR: (StorageError, "reading or writing it failed; the disk or its connection may be failing"),
    sqlite3.SQLITE_CORRUPT: (
        CorruptStoreError,
        "it is damaged; take a copy of it from before, and keep this one for repair",
    ),
    sqlite3.SQLITE_NOTADB: (WrongStoreError, "it is no SQLite database, or was damaged from its first bytes on"),
    sqlite3.SQLITE_TOOBIG: (
        UnstorableError,
        "a value is larger than what SQLite keeps, 1 GB; store it in a file of its own",
    ),
}


SQLITE_ERRORS: Final = (sqlite3.Error, UnicodeError)
"""What the methods of a connection raise: its own errors, and what becomes of texts that are none, on both ways."""
_DOUBTFUL: Final = {
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
}


def explained(exc: Exception, path: Path) -> ParavalError:
    """Give the error to raise for one of ``SQLITE_ERRORS``, which becomes its cause."""
    code = getattr(exc, "sqlite_errorcode", None)
    kind, message = _MESSAGES.get(code & 0xFF if code is not None else -1, (StorageError, "SQLite failed"))
    if code == sqlite3.SQLITE_ERROR and "no such" in str(exc):
        kind, message = CorruptStoreError, "a part of its layout is missing; take a copy of it from before"
    elif isinstance(exc, UnicodeEncodeError):
        kind, message = UnstorableError, "an owner or a key has half a character in it; give it whole ones"
    elif isinstance(exc, UnicodeError) or (code is None and "decode" in str(exc)):
        kind, message = CorruptStoreError, "it is damaged: a text in it is none; take a copy of it from before"
    name = getattr(exc, "sqlite_errorname", type(exc).__name__)
    error = kind(f"the store {str(path)!r}: {message} ({name}: {' '.join(str(exc).split())})")
    error.__cause__ = exc
    return error


def leaves_doubt(exc: Exception) -> bool:
    """Whether a connection on which this happened should be opened anew before it is used again."""
    code = getattr(exc, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _DOUBTFUL
