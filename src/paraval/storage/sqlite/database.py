"""One file as this process has it open: a single connection, and whose turn it is."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from paraval.errors import CorruptStoreError, ParavalError, StorageError
from paraval.storage.sqlite.failures import SQLITE_ERRORS, explained, leaves_doubt
from paraval.storage.sqlite.opening import connect, look
from paraval.storage.sqlite.waiting import LockedError, until_free

__all__ = ["ClosedError", "Database", "ReplacedError", "TakenError"]

T = TypeVar("T")
_Call = Callable[[sqlite3.Connection], T]
_Check = Callable[[sqlite3.Connection, T], bool]
_logger = logging.getLogger("paraval")

_SHY_S: Final = 1.0
"""For so long after another program wrote, no transaction is left open."""
_GRIP: Final = "SELECT name FROM sqlite_master"
"""Of which there are several, so that the statement is not over after the first."""


class ClosedError(StorageError):
    """Nobody uses this database any more, so nothing was done; there may be a new one of the same file."""


class ReplacedError(StorageError):
    """Another store is where this one was."""


class TakenError(StorageError):
    """What was given out before it was written cannot be written any more: it is another's by now."""


class _Write(Generic[T]):
    """A change that waits for its turn; ``is_over`` once it is committed or has failed."""

    __slots__ = ("_call", "_error", "_is_there", "_result", "is_over")

    def __init__(self, call: _Call[T], is_there: _Check[T] | None) -> None:
        self._call = call
        self._is_there = is_there
        self.is_over = False

    def run(self, connection: sqlite3.Connection) -> None:
        self._result = self._call(connection)

    def is_there(self, connection: sqlite3.Connection) -> bool:
        """Whether what was run is in the file after all; False if nobody can say."""
        return self._is_there is not None and self._is_there(connection, self._result)

    def fail(self, error: Exception) -> None:
        self._error = error
        self.is_over = True

    def result(self) -> T:
        if hasattr(self, "_error"):
            raise self._error
        return self._result


class Database:
    """A store's file, opened once in this process however many storages use it; sharing.py sees to that.

    Group commit: whoever writes puts the change into a queue and then takes the lock; whoever gets the lock makes all
    changes in the queue, in one transaction. So many writers share a commit, and a lone one pays for no other thread: a
    writer thread of our own would add two switches of threads to each change, and buy nothing.

    Promises: the transaction of a :meth:`write_soon` is left open. While it is, nobody else can write, so what the call
    has given (numbers of jobs) is certain; whatever comes next commits it. Should the transaction be lost (a full disk,
    say), each promise is kept in the next one, before anything else is written; so nothing that builds on it is
    committed without it.

    The grip: between such transactions, which come by the thousand, the right to read the file is kept. Where it is let
    go, SQLite closes the journal, then opens it anew and syncs its folder, a quarter of what a commit costs. Meanwhile
    others can read, and begin to write; as soon as one has begun, or at a :meth:`flush`, the grip is loosened.

    Args:
        path: of the file.
        identity: its device and inode, by which it is known that no other has taken its place.
        patience_s: seconds to wait for another program that has it locked.
        may_create: whether an empty file is to become a store.

    Attributes:
        identity: as above.
        store_id: what the store is known by, once it was open.
        users: how many storages use it. Once there is none it does nothing any more, as there may be another database
            of the same file.
        lost: what was given out in this process, was never written, and is another's by now. No more than that, and
            nothing of it can ever be forgotten: whoever was given it may come back to it.
    """

    def __init__(self, path: Path, identity: tuple[int, int], patience_s: float, *, may_create: bool) -> None:
        self.users = 1
        self.store_id: bytes | None = None
        self._may_create = may_create
        self.lost: dict[str, TakenError] = {}
        self._path = path
        self.identity = identity
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._queue: deque[_Write[Any]] = deque()
        self._promises: list[_Call[object]] = []
        """How to do again, in this order, what was given out and may not be committed. All of it is in the transaction
        that is open; where none is, it has to be done again."""
        self._grip: sqlite3.Cursor | None = None
        """A statement that has not come to its end."""
        self._writes_ahead = False
        self._met = -_SHY_S
        """When another program was last met that wrote."""
        self._connection: sqlite3.Connection | None = None

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
        """Call with a connection; all that is read with it is of one moment, and durable.

        Raises:
            StorageError: it could not be read.
        """
        with self._lock:
            self._keep_promises()
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

    def write(self, call: _Call[T], is_there: _Check[T] | None = None) -> T:
        """Call with a connection that is in a transaction; return once all that was written with it is on the disk.

        It may be called twice: what was in the same transaction as a call that failed is rolled back and done again.

        Args:
            call: writes.
            is_there: takes a connection and what ``call`` gave, and says whether what it wrote is in the file. A commit
                that failed may have succeeded: where the disk fails in its last step, the file is as it should be.
                None: it is taken to have failed, which does no harm.

        Raises:
            StorageError: it could not be written, and nothing of it was.
        """
        write = _Write(call, is_there)
        try:
            self._queue.append(write)  # after which Ctrl-C may come
            with self._lock:
                if not write.is_over:
                    self._write_queue()
        except BaseException:
            with contextlib.suppress(ValueError, IndexError):  # it is over; the queue was changed meanwhile
                self._queue.remove(write)  # who was interrupted does not want it any more
            raise
        return write.result()

    def write_soon(self, call: _Call[T], again: Callable[[T], _Call[object]], is_there: _Check[T] | None = None) -> T:
        """Call with a connection that is in a transaction; it is committed with what comes next, or by :meth:`flush`.

        Whoever calls this calls :meth:`flush` a moment later, when nothing else has come, as others wait meanwhile.
        It is written at once where another program writes the file too, which is not to be kept waiting.

        Args:
            call: as for :meth:`write`.
            again: takes what the call gave, and gives a call that does the same with that result unless it is done.
                It is made in a later transaction if this one is lost, or may be; it raises TakenError, having
                written nothing, if it cannot.
            is_there: as for :meth:`write`.

        Raises:
            StorageError: it could not be written, and nothing of it was.
        """
        with self._lock:
            if not self._is_shy():
                result = self._promise(call, again)
                if self._is_shy():
                    with contextlib.suppress(StorageError):  # it is tried again before anything else
                        self._keep_promises()
                return result
        return self.write(call, is_there)

    def flush(self) -> None:
        """Commit what :meth:`write_soon` left, and keep nobody waiting.

        Raises:
            StorageError: it could not be written. It is tried again before anything else is written or read.
        """
        if self._promises or self._grip is not None:
            with self._lock:
                try:
                    self._keep_promises()
                finally:
                    self._loosen()

    # -- for sharing.py ------------------------------------------------------------------------------------------------

    def end(self, failure: ParavalError | None) -> None:
        """Close the file, as nobody uses it any more.

        Args:
            failure: of a :meth:`flush`; it is raised if what failed is still to be done.

        Raises:
            StorageError: a promise could not be kept.
        """
        with self._lock:
            try:
                if failure is not None and self._promises:
                    raise failure
                self._keep_promises()  # a thread may have been about to make one
            finally:
                self._disconnect()
                self._promises.clear()

    def end_now(self) -> None:
        """Do likewise, without waiting for anybody, where nobody is left who could be told of a failure."""
        if self._lock.acquire(blocking=False):  # nobody is left who could hold it
            self._keep_promises_or_say_so(0.0)
            self._disconnect()
            self._lock.release()

    def suspend(self, patience_s: float) -> None:
        """Close the file until :meth:`resume`; others wait meanwhile."""
        self._lock.acquire()
        self._keep_promises_or_say_so(patience_s)
        self._disconnect()

    def resume(self, *, is_child: bool) -> None:
        """Go on after :meth:`suspend`, maybe as the child of who did."""
        if is_child:
            self._queue.clear()  # of threads that the child does not have
            self._promises.clear()  # which its parent keeps
        self._lock.release()

    # -- with the lock held --------------------------------------------------------------------------------------------

    def _promise(self, call: _Call[T], again: Callable[[T], _Call[object]]) -> T:
        connection = self._connected()
        self._look()
        begun, is_whole = -1, False
        try:
            self._begin(connection, self._patience_s)
            begun = connection.total_changes
            result = call(connection)
            self._promises.append(again(result))
            is_whole = True
        except SQLITE_ERRORS as exc:
            begun = -1
            raise self._explained(exc) from exc
        finally:
            if not is_whole:
                self._undo(connection, begun)
        return result

    def _is_shy(self) -> bool:
        return time.monotonic() - self._met < _SHY_S

    def _keep_promises(self) -> None:
        if self._promises:
            try:
                self._transact([])
            except SQLITE_ERRORS as exc:
                raise self._explained(exc) from exc

    def _keep_promises_or_say_so(self, patience_s: float) -> None:
        try:
            if self._promises:
                self._transact([], patience_s)
        except (*SQLITE_ERRORS, ParavalError) as exc:
            _logger.error("jobs that were submitted are not saved yet: %s: %s", type(exc).__name__, exc)  # noqa: TRY400

    def _begin(self, connection: sqlite3.Connection, patience_s: float) -> None:
        """Begin a transaction in which all is done that was promised, or go on with the one that is open."""
        if connection.in_transaction:
            return
        tries = 0

        def begin() -> None:
            nonlocal tries
            tries += 1
            if tries > 1:
                self._loosen()
            connection.execute("BEGIN IMMEDIATE")

        try:
            until_free(begin, self._path, patience_s)
        finally:
            if tries > 1:
                self._met = time.monotonic()
        for promise in list(self._promises):
            try:
                promise(connection)
            except TakenError as exc:  # whoever goes on with what was promised is told
                self._promises.remove(promise)
                _logger.error("%s", exc)  # noqa: TRY400 - it says it all

    def _write_queue(self) -> None:
        writes: list[_Write[Any]] = []
        try:
            while self._queue:
                writes.append(self._queue.popleft())
            self._write_all(writes)
            if self._promises and self._connection is not None and self._connection.in_transaction:
                with contextlib.suppress(StorageError):  # then it is tried again before anything else
                    self._keep_promises()  # what was asked for has failed, and must not keep others waiting
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

    def _transact(self, writes: list[_Write[Any]], patience_s: float | None = None) -> None:
        patience_s = self._patience_s if patience_s is None else patience_s
        connection = self._connected()
        self._look()  # what is written into a file that was removed is lost
        begun, is_committing = -1, False
        try:
            self._begin(connection, patience_s)
            begun = connection.total_changes
            for write in writes:
                write.run(connection)
            is_committing = True
            until_free(lambda: connection.execute("COMMIT"), self._path, patience_s)
        except SQLITE_ERRORS as exc:
            begun, may_be_there, is_committing = -1, is_committing, False
            if not may_be_there or isinstance(exc, LockedError) or not self._are_there(writes):
                raise
            for write in writes:  # the promises stay, and are looked at when they are kept
                write.is_over = True
        finally:
            # Ctrl-C may come between the end of the commit and the next line: then it is committed nevertheless.
            if is_committing and not connection.in_transaction:
                is_one_of_many = bool(self._promises and writes)
                self._promises.clear()
                for write in writes:
                    write.is_over = True
                if not is_one_of_many:
                    self._loosen()
                elif self._grip is None and not self._writes_ahead:
                    self._grip = connection.execute(_GRIP)
            else:
                self._undo(connection, begun)

    def _are_there(self, writes: list[_Write[Any]]) -> bool:
        """Look, with a new connection, whether what failed to be committed is in the file after all."""
        self._disconnect()
        try:
            connection = self._connected()
            connection.execute("BEGIN")
            return bool(writes) and all(write.is_there(connection) for write in writes)
        except (*SQLITE_ERRORS, ParavalError):
            return False
        finally:
            if self._connection is not None:
                self._end(self._connection)

    def _undo(self, connection: sqlite3.Connection, begun: int) -> None:
        """Undo what was written since ``begun``; if that is nothing, what was promised before may stay in its place."""
        if connection is not self._connection:
            return  # it was closed, which has done so
        if not self._promises or connection.total_changes != begun:
            self._end(connection)

    def _end(self, connection: sqlite3.Connection) -> None:
        """End a transaction that is not over."""
        self._loosen()
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()  # which rolls back as well

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            if self.users == 0:
                raise ClosedError(f"the store {str(self._path)!r} is closed")
            self._look()
            connection = connect(self._path, self._patience_s, may_create=self.store_id is None and self._may_create)
            try:
                self._look()  # nobody has put another there meanwhile
                self._recognise(connection)
                ask = partial(connection.execute, "PRAGMA journal_mode")
                self._writes_ahead = until_free(ask, self._path, self._patience_s).fetchall() == [("wal",)]
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _recognise(self, connection: sqlite3.Connection) -> None:
        """Raise if it is another store than before: a file that was removed may leave its inode to another."""
        ask = partial(connection.execute, "SELECT id FROM store")
        try:
            found = until_free(lambda: ask().fetchall(), self._path, self._patience_s)
        except SQLITE_ERRORS as exc:
            raise explained(exc, self._path) from exc
        if len(found) != 1 or type(found[0][0]) is not bytes:
            raise CorruptStoreError(
                f"the store {str(self._path)!r} is damaged: it lacks what it is known by; take a copy of it from before"
            )
        if self.store_id is None:
            (self.store_id,) = found[0]
        elif (self.store_id,) != found[0]:
            raise ReplacedError(f"the store {str(self._path)!r} was replaced by another one while it was in use")

    def _loosen(self) -> None:
        grip, self._grip = self._grip, None
        if grip is not None:
            grip.close()

    def _disconnect(self) -> None:
        self._loosen()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _look(self) -> None:
        """Raise if the file is not where it was."""
        found = look(self._path)
        if found is None:
            raise StorageError(f"the store {str(self._path)!r} is gone: there is no such file any more")
        if (found.st_dev, found.st_ino) != self.identity:
            raise StorageError(f"the store {str(self._path)!r} was replaced by another file while it was in use")

    def _explained(self, exc: Exception) -> ParavalError:
        if leaves_doubt(exc):
            self._disconnect()
            try:
                self._look()
            except StorageError as better:
                return better
        return explained(exc, self._path)
