"""One database for a file in this process, however many storages use it; and what happens at a fork."""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Final

from paraval.errors import ParavalError
from paraval.storage.sqlite.database import Database, ReplacedError
from paraval.storage.sqlite.opening import locate, look

__all__ = ["close_database", "drop_database", "open_database"]

_HURRY_S: Final = 1.0
"""How long a fork waits for a file that is locked."""


def open_database(path: Path, patience_s: float, *, may_create: bool) -> Database:
    """Give the database of the file at this path, connected; :func:`close_database` it once for each call of this.

    Raises:
        StorageError: as :func:`~paraval.storage.sqlite.opening.locate` and ``connect``.
    """
    while True:
        with _registry_lock:
            _close_dropped()
            was_there = look(path) is not None
            found = locate(path, may_create=may_create)
            identity = (found.st_dev, found.st_ino)
            if identity in _registry and was_there:
                database = _registry[identity]
                database.users += 1
            else:  # who is registered as a file that is new had one that was removed, and closed while forking, say
                database = _registry[identity] = Database(path, identity, patience_s, may_create=may_create)
        try:
            database.connect()
        except BaseException as exc:
            close_database(database)
            if not isinstance(exc, ReplacedError):
                raise
            _forget(database)  # likewise, and another program has made the new one
            continue
        return database


def _forget(database: Database) -> None:
    """Have the next who opens the file get another database; whoever uses this one will find that its file is gone."""
    with _registry_lock:
        if _registry.get(database.identity) is database:
            del _registry[database.identity]


def close_database(database: Database) -> None:
    """Close the file, if nobody else in this process uses it.

    Raises:
        StorageError: what was given out before it was written could not be written.
    """
    failure = None
    try:
        database.flush()
    except ParavalError as exc:
        failure = exc
    with _registry_lock:
        if not _is_last_user(database):
            return
    database.end(failure)


def drop_database(database: Database) -> None:
    """Close the file likewise, now or later: the garbage collector may call this anywhere, and must not wait."""
    _dropped.append(database)
    if _registry_lock.acquire(blocking=False):
        try:
            _close_dropped()
        finally:
            _registry_lock.release()


_registry: Final[dict[tuple[int, int], Database]] = {}
"""The files that are open in this process, by device and inode.

Two connections of one process to a file would be as good as two processes; but the locks of POSIX are a process's, and
lost when any descriptor of the file is closed.
"""
_registry_lock: Final = threading.Lock()
"""Nobody who holds it waits for the lock of a database, but for :func:`_before_fork`; so nobody who holds the lock of a
database, in which the garbage collector may call anything, waits for it."""
_dropped: Final[deque[Database]] = deque()


def _close_dropped() -> None:
    while _dropped:
        database = _dropped.popleft()
        if _is_last_user(database):
            database.end_now()


def _is_last_user(database: Database) -> bool:
    database.users -= 1
    if database.users == 0 and _registry.get(database.identity) is database:
        del _registry[database.identity]
    return database.users == 0


# A child must not use what SQLite holds of its parent's files: neither the connection, nor the notes in the memory of
# the process about the locks it has, as a child inherits no locks. So nothing is open while a process forks.


def _before_fork() -> None:
    _registry_lock.acquire()
    for database in _registry.values():
        database.suspend(_HURRY_S)


def _after_fork() -> None:
    for database in _registry.values():
        database.resume(is_child=False)
    _registry_lock.release()


def _after_fork_in_child() -> None:
    for database in _registry.values():
        database.resume(is_child=True)
    _registry_lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
