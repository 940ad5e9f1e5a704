"""The storage in a SQLite file."""

from __future__ import annotations

import itertools
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from msgspec import UNSET

from paraval.errors import BadValueError, CorruptStoreError, WrongTypeError
from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.codec import encode_change, encode_record
from paraval.storage.records import JobChange, JobRecord, adopt
from paraval.storage.sqlite import rows
from paraval.storage.sqlite.database import ClosedError, Database, TakenError
from paraval.storage.sqlite.logs import DamageError, frames, read_log, sealed, unsealed
from paraval.storage.sqlite.rows import BITS, LONG, Row, Search, job_id, revision_of, row_id

__all__ = ["SqliteStorage"]

T = TypeVar("T")


class SqliteStorage(Storage):
    """Keeps everything in one SQLite file; what it has acknowledged survives the end of the process and of power.

    Any number of threads, and of processes of one machine, may use a file at the same time; it must not be on a network
    file system. Several storages of a process on one file share a connection.

    Args:
        path: of the file; where there is none, it is made, readable by its owner only. Its folder must be there.
        timeout: seconds to wait for another program that has the file locked.

    Raises:
        WrongStoreError: what is at the path is something else, or a store of a later release.
        CorruptStoreError: it is a store, and damaged.
        StorageError: it cannot be opened for another reason.
    """

    can_travel = True

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 30.0) -> None:
        if not isinstance(path, str | os.PathLike):
            raise WrongTypeError(f"a SqliteStorage needs the path of a file, not {path!r}")
        text = os.fsdecode(path)
        if not text or "\0" in text or text == ":memory:":
            raise BadValueError(f"a SqliteStorage needs the path of a file, not {text!r}; MemoryStorage needs none")
        if not isinstance(timeout, int | float) or not timeout >= 0:
            raise BadValueError(f"timeout should be a number of seconds, 0 or more, not {timeout!r}")
        folder, name = os.path.split(text)
        self._path = Path(os.path.realpath(folder), name)
        self._timeout = timeout
        self._lost: list[tuple[range, TakenError]] = []
        self._database: Database | None = None
        self._use(Database.open(self._path, timeout, may_create=True))

    def __repr__(self) -> str:
        return f"SqliteStorage({str(self._path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # whoever gets it shall find what is there
        return {"path": self._path, "timeout": self._timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path, self._timeout = state["path"], state["timeout"]
        self._lost = []
        self._database = None

    # -- connection ----------------------------------------------------------------------------------------------------

    def connect(self) -> Self:
        """Open the file, if it is not open; it must be there.

        Raises:
            StorageError: as for the class.
        """
        self._opened().connect()
        return self

    def is_connected(self) -> bool:
        database = self._database
        return database is not None and database.is_connected

    def close(self) -> None:
        """Close the file, unless another storage of this process uses it. What is asked next opens it again."""
        with _using:
            database, self._database = self._database, None
            if database is not None:
                self._finalizer.detach()
        if database is not None:
            database.close()

    def _opened(self) -> Database:
        database = self._database
        if database is None:
            with _using:
                database = self._database or self._use(Database.open(self._path, self._timeout, may_create=False))
        return database

    def _use(self, database: Database) -> Database:
        self._database = database
        self._finalizer = weakref.finalize(self, database.drop)
        return database

    # -- searches ------------------------------------------------------------------------------------------------------

    def new_search(self) -> str:
        return str(self._write(lambda connection: connection.execute(_NEW_SEARCH).lastrowid))

    def search_ids(self) -> list[str]:
        return self._read(rows.search_ids)

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        data = sealed(value, "value")

        def call(connection: sqlite3.Connection) -> None:
            search = Search.look_up(connection, search_id)
            connection.execute("REPLACE INTO search_values VALUES (?, ?, ?)", (search.number, key, data))

        self._write(call)

    def get_value(self, search_id: str, key: str) -> Any:
        def call(connection: sqlite3.Connection) -> list[tuple[bytes]]:
            place = (Search.look_up(connection, search_id).number, key)
            return connection.execute("SELECT value FROM search_values WHERE search = ? AND key = ?", place).fetchall()

        found = self._read(call)
        if not found:
            raise UnknownIdError(f"no value {key!r} in search {search_id!r}")
        try:
            return unsealed(found[0][0])
        except DamageError as exc:
            raise self._damaged(f"the value {key!r} of search {search_id!r} cannot be read: {exc}") from exc

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        new = _New(search_id, records)
        new.number(records, self._write(new.add))

    def insert_soon(self, search_id: str, records: Sequence[JobRecord]) -> None:
        """Number new jobs and add them; they are committed with the next change, or by :meth:`flush`.

        Until then this process has the right to write the file, and others wait.
        """
        new = _New(search_id, records)
        if new.size > _LARGE:
            new.number(records, self._write(new.add))
            return

        path, lost = self._path, self._lost  # and not the storage itself, which may be dropped before

        def again(before: Search) -> Callable[[sqlite3.Connection], object]:
            def call(connection: sqlite3.Connection) -> None:
                if Search.look_up(connection, search_id).next_row == before.next_row:
                    new.add(connection)
                elif not new.is_there(connection, before):
                    first, end = before.next_row, before.next_row + new.count
                    lost.append((range(first, end), error := _taken(path, first, end - 1)))
                    raise error

            return call

        new.number(records, self._do(lambda database: database.write_soon(new.add, again)))

    def flush(self) -> None:
        database = self._database
        if database is not None:
            database.flush()

    def update(self, changes: Sequence[JobChange]) -> None:
        groups = _grouped(changes)

        def call(connection: sqlite3.Connection) -> None:
            if self._lost:
                self._refuse_lost(changes)
            searches = {group.search: Search.look_up(connection, str(group.search)) for group in groups}
            for group in groups:
                group.check(searches[group.search])
            for group in groups:
                searches[group.search] = group.write(connection, searches[group.search])

        if groups:
            self._write(call)

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        wanted = [row_id(job_id) for job_id in job_ids]

        def call(connection: sqlite3.Connection) -> dict[int, Row]:
            return _find(connection, wanted)

        found = self._read(call)
        return [self._record(found[row]) for row in wanted]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        # In several steps, so that others get their turns. A row that changes meanwhile moves to the end, which is read
        # in the last step: so what is found is the state at that step.
        found: dict[int, Row] = {}
        position, limit = since, _FIRST_STEP
        while True:
            search, some = self._read(partial(_changed, search_id, position, limit))
            for row in some:
                found.pop(row.id, None)
                found[row.id] = row
            if len(some) < limit:
                break
            position, limit = revision_of(some[-1].changed), 2 * limit
        if since <= 0 and len(found) != search.size:
            raise self._damaged(f"of the {search.size} jobs of search {search_id!r}, {len(found)} are there")
        return [self._record(row) for row in found.values()], search.revision

    # -- leases: by the clock of the host, which is one for all who can share a file -----------------------------------

    def renew(self, owner: str, seconds: float) -> None:
        def call(connection: sqlite3.Connection) -> None:
            now = time.time()
            connection.execute("DELETE FROM leases WHERE owner = ? OR ends <= ?", (owner, now))
            if seconds > 0:
                connection.execute("INSERT INTO leases VALUES (?, ?)", (owner, now + seconds))

        self._write(call)

    def owners(self) -> set[str]:
        def call(connection: sqlite3.Connection) -> set[str]:
            found = connection.execute("SELECT owner FROM leases WHERE ends > ?", (time.time(),))
            return {rows.checked(owner, str) for (owner,) in found}

        return self._read(call)

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        wanted = {row_id(job_id): revision for job_id, revision in revisions.items()}

        def call(connection: sqlite3.Connection) -> set[str]:
            found = _find(connection, list(wanted))
            unchanged = [found[row] for row, revision in wanted.items() if revision_of(found[row].changed) == revision]
            for number, group in groupby(unchanged, lambda row: row.id >> BITS):
                places, encoded = [], []
                for row in group:
                    record = self._record(row)
                    adopt(record, owner)
                    record.id, record.revision = "", 0
                    places.append(row.id)
                    encoded.append(encode_record(record))
                search = Search.look_up(connection, str(number))
                rows.replace(connection, search, owner, places, frames(encoded, places))
            return {job_id(row.id) for row in unchanged}

        return self._write(call)

    # ------------------------------------------------------------------------------------------------------------------

    def _read(self, call: Callable[[sqlite3.Connection], T]) -> T:
        return self._do(lambda database: database.read(call))

    def _write(self, call: Callable[[sqlite3.Connection], T]) -> T:
        return self._do(lambda database: database.write(call))

    def _do(self, call: Callable[[Database], T]) -> T:
        while True:
            database = self._opened()
            try:
                return call(database)
            except ClosedError:  # by another thread, before this one got its turn
                with _using:
                    if self._database is database:
                        self._database = None
            except DamageError as exc:
                raise self._damaged(str(exc)) from exc

    def _refuse_lost(self, changes: Sequence[JobChange]) -> None:
        """Raise if a change is of a job that was given a number and never saved: the job of this number is another."""
        for change in changes:
            row = row_id(change.id)
            for lost, error in self._lost:
                if row in lost:
                    raise TakenError(str(error))

    def _damaged(self, how: str) -> CorruptStoreError:
        return CorruptStoreError(f"the store {str(self._path)!r} is damaged: {how}; take a copy of it from before")

    def _record(self, row: Row) -> JobRecord:
        name = job_id(row.id)
        try:
            record = read_log(row.log, row.id)
        except DamageError as exc:
            raise self._damaged(f"job {name!r} cannot be read: {exc}") from exc
        if record.owner != row.owner:
            raise self._damaged(f"job {name!r} belongs to {row.owner!r}, but in its log to {record.owner!r}")
        record.id, record.revision = name, revision_of(row.changed)
        return record


def _taken(path: Path, first: int, last: int) -> TakenError:
    which = f"job {job_id(first)}" if first == last else f"jobs {job_id(first)} to {job_id(last)}"
    return TakenError(
        f"{which} could not be saved when the store {str(path)!r} failed, and by now another program has jobs of these "
        "numbers in it: submit anew what you had submitted"
    )


class _New:
    """New jobs of a search, ready to be written.

    Attributes:
        count: how many they are.
        size: how many bytes.
    """

    __slots__ = ("_encoded", "_owners", "_search_id", "count", "size")

    def __init__(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self._search_id = search_id
        self._encoded = [encode_record(record) for record in records]
        self._owners = [
            (owner, sum(1 for _ in group)) for owner, group in groupby([record.owner for record in records])
        ]
        self.count = len(records)
        self.size = sum(map(len, self._encoded))

    def add(self, connection: sqlite3.Connection) -> Search:
        """Write them; give where the search went on before."""
        before = search = Search.look_up(connection, self._search_id)
        for owner, count in self._owners:
            start = search.next_row - before.next_row
            logs = frames(self._encoded[start : start + count], itertools.count(search.next_row))
            search = rows.insert(connection, search, owner, logs)
        return before

    def is_there(self, connection: sqlite3.Connection, before: Search) -> bool:
        """Whether they have been written where the search went on before: a commit that failed may have succeeded."""
        places = list(range(before.next_row, before.next_row + self.count))
        found = rows.rows_by_id(connection, places)
        logs = frames(self._encoded, places)
        return all(row in found and found[row].log.startswith(log) for row, log in zip(places, logs, strict=True))

    def number(self, records: Sequence[JobRecord], before: Search) -> None:
        """Give the records the ids and revisions that they have then."""
        number, revision = before.size, before.revision
        for record in records:
            revision += 1
            record.id, record.revision = f"{self._search_id}.{number}", revision
            number += 1


class _Changes:
    """Changes of jobs of one search, under one condition, as they come one after the other.

    Attributes:
        search: the number of the search.
    """

    __slots__ = ("_by", "_grown", "_logs", "_rows", "search")

    def __init__(self, rows: list[int], changes: Sequence[JobChange]) -> None:
        self.search = rows[0] >> BITS
        self._by = changes[0].by
        self._rows = rows
        encoded = [encode_change(change) for change in changes]
        self._logs = frames(encoded, rows)
        self._grown: list[int] = []  # rows whose logs may become long: by a note, of which there may be many
        if max(map(len, encoded)) > LONG or UNSET in [change.status for change in changes]:
            self._grown = [
                row
                for row, change, data in zip(rows, changes, encoded, strict=True)
                if change.status is UNSET or len(data) > LONG
            ]

    def check(self, search: Search) -> None:
        """Raise if there is no such job; the jobs of a search are numbered without a gap."""
        last = max(self._rows)
        if last >= search.next_row:
            raise UnknownIdError(f"no job {job_id(last)!r} in this storage")

    def write(self, connection: sqlite3.Connection, search: Search) -> Search:
        search = rows.append(connection, search, self._by, self._rows, self._logs)
        rows.put_aside(connection, self._grown)
        return search


def _grouped(changes: Sequence[JobChange]) -> list[_Changes]:
    if not changes:
        return []
    places = rows.row_ids([change.id for change in changes])
    if min(places) >> BITS == max(places) >> BITS and len({change.by for change in changes}) == 1:
        return [_Changes(places, changes)]
    groups = []
    start = 0
    for _, group in groupby(zip(places, changes, strict=True), lambda one: (one[0] >> BITS, one[1].by)):
        end = start + sum(1 for _ in group)
        groups.append(_Changes(places[start:end], changes[start:end]))
        start = end
    return groups


def _find(connection: sqlite3.Connection, wanted: Sequence[int]) -> dict[int, Row]:
    """Give these rows, all of them."""
    found = rows.rows_by_id(connection, wanted)
    for row in wanted:
        if row not in found:
            if row < Search.look_up(connection, str(row >> BITS)).next_row:
                raise DamageError(f"job {job_id(row)!r} is missing, though there are later ones")
            raise UnknownIdError(f"no job {job_id(row)!r} in this storage")
    return found


def _changed(search_id: str, since: int, limit: int, connection: sqlite3.Connection) -> tuple[Search, list[Row]]:
    search = Search.look_up(connection, search_id)
    return search, rows.rows_by_change(connection, search, since, limit)


_NEW_SEARCH: Final = "INSERT INTO searches SELECT ifnull(max(id) + 1, 0) FROM searches"
_FIRST_STEP: Final = 1000
_LARGE: Final = 4_000_000
"""Bytes of new jobs that are written at once, as SQLite could not keep them in memory until later."""
_using: Final = threading.Lock()
"""Held while a storage takes up a database or lets go of it."""
os.register_at_fork(before=_using.acquire, after_in_parent=_using.release, after_in_child=_using.release)
