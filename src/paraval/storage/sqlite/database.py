"""One file as this process has it open: a single connection, whose turn it is, and what happens at a fork."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from paraval.errors import ParavalError, StorageError
from paraval.storage.sqlite.failures import SQLITE_ERRORS, explained, leaves_doubt
from paraval.storage.sqlite.opening import connect, locate, look
from paraval.storage.sqlite.waiting import LockedError, until_free

__all__ = ["ClosedError", "Database"]

T = TypeVar("T")
_Call = Callable[[sqlite3.Connection], T]


class ClosedError(StorageError):
    """Nobody uses this database any more, so nothing was done; there may be a new one of the same file."""


class _Write(Generic[T]):
    """A change that waits for its turn; ``is_over`` once it is committed or has failed."""

    __slots__ = ("_call", "_error", "_result", "is_over")

    def __init__(self, call: _Call[T]) -> None:
        self._call = call
        self.is_over = False

    def run(self, connection: sqlite3.Connection) -> None:
        self._result = self._call(connection)

    def fail(self, error: Exception) -> None:
        self._error = error
        self.is_over = True

    def result(self) -> T:
        if hasattr(self, "_error"):
            raise self._error
        return self._result


class Database:
    """A store's file, opened once in this process however many storages use it.

    Group commit: whoever writes puts the change into a queue and then takes the lock; whoever gets the lock makes all
    changes in the queue, in one transaction. So many writers share a commit, and a lone one pays for no other thread: a
    writer thread of our own would add two switches of threads to each change, and buy nothing.

    Use :meth:`open`.
    """

    def __init__(self, path: Path, identity: tuple[int, int], patience_s: float) -> None:
        self._path = path
        self._identity = identity
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._queue: deque[_Write[Any]] = deque()
        self._connection: sqlite3.Connection | None = None
        self._users = 1

    @classmethod
    def open(cls, path: Path, patience_s: float, *, may_create: bool) -> Database:
        """Give the database of the file at this path, connected; :meth:`close` it once for each call of this.

        Raises:
            StorageError: as :func:`~paraval.storage.sqlite.opening.locate` and ``connect``.
        """
        with _registry_lock:
            _close_dropped()
            found = locate(path, may_create=may_create)
            identity = (found.st_dev, found.st_ino)
            if identity in _registry:
                database = _registry[identity]
                database._users += 1
            else:
                database = _registry[identity] = cls(path, identity, patience_s)
        try:
            database.connect()
        except BaseException:
            database.close()
            raise
        return database

    def close(self) -> None:
        """Close the file, if nobody else in this process uses it."""
        with _registry_lock:
            if not self._is_last_user():
                return
        with self._lock:
            self._disconnect()

    def drop(self) -> None:
        """Close the file likewise, now or later: the garbage collector may call this anywhere, and must not wait."""
        _dropped.append(self)
        if _registry_lock.acquire(blocking=False):
            try:
                _close_dropped()
            finally:
                _registry_lock.release()

    @property
    def is_connected(self) -> bool:
        """Whether the file is open just now."""
        return self._connection is not None

    def connect(self) -> None:
        """Open the file, if it is not.

        Raises:
            StorageError: it is another file by now, or cannot be opened.
        """
        with self._lock:
            self._connected()

    def read(self, call: _Call[T]) -> T:
        """Call with a connection; all that is read with it is of one moment.

        Raises:
            StorageError: it could not be read.
        """
        with self._lock:
            connection = self._connected()

            def whole() -> T:
                try:
                    connection.execute("BEGIN")
                    return call(connection)
                finally:
                    self._end(connection)

            try:
                return until_free(whole, self._path, self._patience_s)
            except SQLITE_ERRORS as exc:
                raise self._explained(exc) from exc

    def write(self, call: _Call[T]) -> T:
        """Call with a connection that is in a transaction; return once all that was written with it is on the disk.

        It may be called twice: what was in the same transaction as a call that failed is rolled back and done again.

        Raises:
            StorageError: it could not be written, and nothing of it was.
        """
        write = _Write(call)
        self._queue.append(write)
        try:
            with self._lock:
                if not write.is_over:
                    self._write_queue()
        except BaseException:
            with contextlib.suppress(ValueError, IndexError):  # it is over; the queue was changed meanwhile
                self._queue.remove(write)  # who was interrupted does not want it any more
            raise
        return write.result()

    # -- with the lock held --------------------------------------------------------------------------------------------

    def _write_queue(self) -> None:
        writes: list[_Write[Any]] = []
        try:
            while self._queue:
                writes.append(self._queue.popleft())
            self._write_all(writes)
        except BaseException:  # an interrupt, in the thread whose turn it was: the others are none the worse
            self._queue.extendleft(write for write in reversed(writes) if not write.is_over)
            raise

    def _write_all(self, writes: list[_Write[Any]]) -> None:
        try:
            self._transact(writes)
        except Exception as exc:  # noqa: BLE001 - whatever a call raises is for whom it was made
            error = self._explained(exc) if isinstance(exc, SQLITE_ERRORS) else exc
            if len(writes) == 1 or isinstance(exc, LockedError):
                for write in writes:
                    write.fail(error)
            else:  # one of them is to blame
                for write in writes:
                    self._write_all([write])

    def _transact(self, writes: list[_Write[Any]]) -> None:
        connection = self._connected()
        self._look()  # what is written into a file that was removed is lost
        is_committing = False
        try:
            until_free(lambda: connection.execute("BEGIN IMMEDIATE"), self._path, self._patience_s)
            for write in writes:
                write.run(connection)
            is_committing = True
            until_free(lambda: connection.execute("COMMIT"), self._path, self._patience_s)
        except SQLITE_ERRORS:
            is_committing = False
            raise
        finally:
            # Ctrl-C may come between the end of the commit and the next line: then it is committed nevertheless.
            if is_committing and not connection.in_transaction:
                for write in writes:
                    write.is_over = True
            self._end(connection)

    def _end(self, connection: sqlite3.Connection) -> None:
        """End a transaction that is not over."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()  # which rolls back as well

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._users == 0:
                raise ClosedError(f"the store {str(self._path)!r} is closed")
            self._look()
            connection = connect(self._path, self._patience_s)
            try:
                self._look()  # nobody has put another there meanwhile
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _look(self) -> None:
        """Raise if the file is not where it was."""
        found = look(self._path)
        if found is None:
            raise StorageError(f"the store {str(self._path)!r} is gone: there is no such file any more")
        if (found.st_dev, found.st_ino) != self._identity:
            raise StorageError(f"the store {str(self._path)!r} was replaced by another file while it was in use")

    def _explained(self, exc: Exception) -> ParavalError:
        if leaves_doubt(exc):
            self._disconnect()
            try:
                self._look()
            except StorageError as better:
                return better
        return explained(exc, self._path)

    # -- with the lock of the registry held ----------------------------------------------------------------------------

    def _is_last_user(self) -> bool:
        self._users -= 1
        if self._users == 0:
            del _registry[self._identity]
        return self._users == 0


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
        if database._is_last_user() and database._lock.acquire(blocking=False):  # nobody is left who could hold it
            database._disconnect()
            database._lock.release()


# A child must not use what SQLite holds of its parent's files: neither the connection, nor the notes in the memory of
# the process about the locks it has, as a child inherits no locks. So nothing is open while a process forks.


def _before_fork() -> None:
    _registry_lock.acquire()
    for database in _registry.values():
        database._lock.acquire()
        database._disconnect()


def _after_fork() -> None:
    for database in _registry.values():
        database._lock.release()
    _registry_lock.release()


def _after_fork_in_child() -> None:
    for database in _registry.values():
        database._queue.clear()  # of threads that the child does not have
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
