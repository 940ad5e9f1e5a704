"""Opening a file as a store: what is at the path, and how SQLite is to write it."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from paraval.errors import CorruptStoreError, StorageError, WrongStoreError
from paraval.storage.sqlite import layout
from paraval.storage.sqlite.failures import SQLITE_ERRORS, explained
from paraval.storage.sqlite.filesystem import network_file_system
from paraval.storage.sqlite.waiting import LockedError, until_free

__all__ = ["connect", "has_sound_wal", "locate", "look"]

_SETTINGS: Final = (
    "synchronous = FULL",
    "fullfsync = ON",  # where fsync alone does not reach the disk (macOS)
    "temp_store = MEMORY",
    "cache_size = -16000",  # KiB; a large batch then need not be written out half-way
    "journal_size_limit = 4194304",
    "trusted_schema = OFF",
    "cell_size_check = ON",
)
_HANDOVER_S: Final = 1.0
"""How long a program that writes ahead may take to end."""


def locate(path: Path, *, may_create: bool) -> os.stat_result:
    """Look at what is at a path, without opening it; where there is nothing, put an empty file that only we may read.

    An existing file is not opened: closing it would drop the locks that SQLite holds on it for this process.

    Raises:
        WrongStoreError: there is something, and it is no file, or a file of several names.
        CorruptStoreError: there is an empty file, and a journal that says it was a store.
        StorageError: there is nothing and ``may_create`` is false, or its folder is missing.
    """
    found = look(path)
    if found is None:
        if may_create:
            return _create(path)
        raise StorageError(f"the store {str(path)!r} is gone: there is no such file any more")
    if stat.S_ISLNK(found.st_mode):
        raise WrongStoreError(
            f"{str(path)!r} is a symbolic link; a store is opened by its own path ({os.path.realpath(path)!r}), as its "
            "journal lies beside it"
        )
    if stat.S_ISDIR(found.st_mode):
        raise WrongStoreError(
            f"{str(path)!r} is a folder; give the path of a file in it, as {str(path / 'campaign.db')!r}"
        )
    if not stat.S_ISREG(found.st_mode):
        raise WrongStoreError(f"{str(path)!r} is no regular file, so it cannot be a store; give the path of a file")
    if found.st_nlink > 1:
        raise WrongStoreError(
            f"{str(path)!r} has {found.st_nlink} names (hard links); a store has one, as its journal lies beside it: "
            "put a copy of the file in the place of this one, or remove its other names"
        )
    if found.st_size == 1:  # which SQLite takes for none
        raise WrongStoreError(f"{str(path)!r} is no SQLite database, but a file of one byte; give the path of a store")
    if found.st_size == 0:
        _refuse_if_emptied(path)
    return found


def look(path: Path) -> os.stat_result | None:
    """Give what is at a path; None if there is nothing.

    Raises:
        StorageError: nobody can say.
    """
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StorageError(f"the store {str(path)!r} cannot be reached: {exc.strerror}") from exc


def connect(path: Path, patience_s: float, *, may_create: bool) -> sqlite3.Connection:
    """Open the store at a path that :func:`locate` has looked at, making (if it may) or migrating its layout.

    Raises:
        WrongStoreError: it is no database, or that of another program, or of a later release of paraval.
        CorruptStoreError: it is damaged.
        StorageError: it cannot be opened for another reason, or was locked for ``patience_s`` seconds.
    """
    try:
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",
            uri=True,
            timeout=0,  # until_free waits
            isolation_level=None,
            check_same_thread=False,
            cached_statements=32,
        )
    except sqlite3.Error as exc:
        raise explained(exc, path) from exc

    def ask(statement: str, patience_s: float = patience_s) -> list[Any]:
        return until_free(lambda: connection.execute(statement).fetchall(), path, patience_s)

    try:
        for setting in _SETTINGS:
            ask(f"PRAGMA {setting}")
        _refuse_if_too_old(ask)
        _refuse_if_remote(ask, path)
        is_new = layout.prepare(ask, path, may_create=may_create)
        _choose_journal(ask, path, is_new=is_new)
    except BaseException as exc:
        connection.close()
        if isinstance(exc, SQLITE_ERRORS):
            raise _told_from_file(exc, path) from exc
        raise
    return connection


def _refuse_if_too_old(ask: Callable[..., list[Any]]) -> None:
    """Raise if this SQLite cannot do what is asked of it in rows.py."""
    try:
        ask("SELECT count(*) FROM json_each('[1]')")
        is_able = sqlite3.sqlite_version_info >= (3, 24)
    except sqlite3.OperationalError as exc:
        if "no such" not in str(exc):
            raise
        is_able = False
    if not is_able:
        raise StorageError(
            f"the SQLite of this Python, {sqlite3.sqlite_version}, cannot hold a store: that takes 3.38, or 3.24 with "
            "its JSON functions"
        )


def _refuse_if_remote(ask: Callable[..., list[Any]], path: Path) -> None:
    """Raise if SQLite would write ahead where that cannot work."""
    would_write_ahead = ask("PRAGMA journal_mode") == [("wal",)] or path.stat().st_size == 0
    if has_sound_wal(sqlite3.sqlite_version_info) and would_write_ahead and (kind := network_file_system(path)):
        raise StorageError(
            f"the store {str(path)!r} is on a network file system ({kind}), where SQLite cannot write ahead (WAL): put "
            "it on a disk of this machine, or use RedisStorage between machines"
        )


def has_sound_wal(version: tuple[int, ...]) -> bool:
    """Whether this version of SQLite is free of the bug that can damage a file in WAL mode when several write it."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def _create(path: Path) -> os.stat_result:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:  # somebody was faster
        return locate(path, may_create=False)
    except FileNotFoundError:
        raise StorageError(
            f"there is no folder {str(path.parent)!r} for the store {path.name!r}; make it first"
        ) from None
    except OSError as exc:
        raise StorageError(f"the store {str(path)!r} cannot be made: {exc.strerror}") from exc
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask; SQLite gives the files beside it the same mode
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)  # nobody has opened it yet, so there are no locks to drop


def _refuse_if_emptied(path: Path) -> None:
    """Raise if an empty file was a store once: then its journal, which outlives each commit, is not blank."""
    for ending, says_so in (("-journal", lambda head: head and not any(head)), ("-wal", bool)):
        try:
            with path.with_name(f"{path.name}{ending}").open("rb") as file:  # not locked, so closing drops no locks
                head = file.read(28)
        except OSError:
            continue
        if says_so(head):
            raise CorruptStoreError(
                f"the store {str(path)!r} is empty, but {path.name}{ending} says that it was not: it was cut. Take a "
                "copy of it from before; to start anew, remove both"
            )


def _choose_journal(ask: Callable[..., list[Any]], path: Path, *, is_new: bool) -> None:
    """Have SQLite write ahead where it can be trusted with that, and keep a rollback journal elsewhere.

    The mode is one of the file, for everybody who has it open: so a file keeps the mode it was made with, but for one
    that was made to be written ahead and is opened by a SQLite that must not.

    A rollback journal persists: its header is overwritten, which takes one sync less than making a file anew each time.
    In this mode, unlike in SQLite's default, ``synchronous=FULL`` makes a commit last through a loss of power.
    """
    ((mode,),) = ask("PRAGMA journal_mode")
    if has_sound_wal(sqlite3.sqlite_version_info) and (is_new or mode == "wal"):
        ask("PRAGMA journal_mode = WAL")
    elif mode == "wal":
        try:
            ask("PRAGMA journal_mode = PERSIST", _HANDOVER_S)
        except LockedError as exc:
            raise StorageError(
                f"the store {str(path)!r} is in use by a program whose SQLite writes ahead (WAL); that of this program "
                f"({sqlite3.sqlite_version}) could damage it then: let the other end, or give both the same SQLite"
            ) from exc
    else:
        ask("PRAGMA journal_mode = PERSIST")


def _told_from_file(exc: Exception, path: Path) -> Exception:
    """Explain a failure to open; if it is no database, by how the file begins."""
    if getattr(exc, "sqlite_errorcode", None) != sqlite3.SQLITE_NOTADB:
        return explained(exc, path)
    try:
        with path.open("rb") as file:  # it is no database, so nobody has locks on it to be dropped
            begin = f"it begins with {file.read(16)!r}"
    except OSError:
        begin = "it cannot be read"
    return WrongStoreError(
        f"{str(path)!r} is no SQLite database, or was damaged from its first bytes on ({begin}); give the path of a "
        "store, or one where there is nothing yet"
    )
