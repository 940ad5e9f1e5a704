"""The storage in a SQLite file."""

from __future__ import annotations

import copy
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from paraval.errors import BadValueError, CorruptStoreError, StorageError, WrongTypeError
from paraval.storage.base import Storage, UnknownIdError, UnstorableError
from paraval.storage.records import JobChange, JobRecord, adopt
from paraval.storage.sqlite import entries, rows, values
from paraval.storage.sqlite.database import ClosedError, Database, TakenError
from paraval.storage.sqlite.entries import DamageError, Draft, History
from paraval.storage.sqlite.owners import note_adopted, owned_by_others
from paraval.storage.sqlite.rows import Found, Search
from paraval.storage.sqlite.sharing import close_database, drop_database, open_database

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
        self._lost: dict[str, TakenError] = {}
        self._store_id: bytes | None = None
        self._database: Database | None = None
        self._use(open_database(self._path, timeout, may_create=True))

    def __repr__(self) -> str:
        return f"SqliteStorage({str(self._path)!r})"

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # whoever gets it shall find what is there
        return {"path": self._path, "timeout": self._timeout, "store_id": self._store_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path, self._timeout, self._store_id = state["path"], state["timeout"], state["store_id"]
        self._lost = {}
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
            close_database(database)

    def _opened(self) -> Database:
        database = self._database
        if database is None:
            with _using:
                database = self._database or self._use(open_database(self._path, self._timeout, may_create=False))
        return database

    def _use(self, database: Database) -> Database:
        if self._store_id not in {None, database.store_id}:
            close_database(database)
            raise StorageError(f"the store {str(self._path)!r} was replaced by another one since it was opened first")
        self._store_id = database.store_id
        database.lost.update(self._lost)  # of those that it used before
        self._database, self._lost = database, database.lost
        self._finalizer = weakref.finalize(self, drop_database, database)
        return database

    # -- searches ------------------------------------------------------------------------------------------------------

    def new_search(self) -> str:
        token = os.urandom(8)
        add, is_there = partial(rows.add_search, token=token), partial(rows.was_added, token=token)
        return str(self._write(add, is_there))

    def search_ids(self) -> list[str]:
        return self._read(rows.search_ids)

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        if type(key) is not str:  # SQLite would make one of it
            raise UnstorableError(f"the key of a value of a search should be a str, not {key!r:.80}")
        data = values.sealed(value, "value", values.place_of(search_id, key))

        def call(connection: sqlite3.Connection) -> None:
            values.keep_value(connection, Search.look_up(connection, search_id), key, data)

        def is_there(connection: sqlite3.Connection, _: None) -> bool:
            return values.find_value(connection, Search.look_up(connection, search_id), key) == data

        self._write(call, is_there)

    def get_value(self, search_id: str, key: str) -> Any:
        def call(connection: sqlite3.Connection) -> bytes | None:
            return values.find_value(connection, Search.look_up(connection, search_id), key)

        found = self._read(call)
        if found is None:
            raise UnknownIdError(f"no value {key!r} in search {search_id!r}")
        try:
            return values.unsealed(found, values.place_of(search_id, key))
        except DamageError as exc:
            raise self._damaged(f"the value {key!r} of search {search_id!r} cannot be read: {exc}") from exc

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        new = _New(search_id, records)
        new.number(records, self._write(new.add, new.is_there))

    def insert_soon(self, search_id: str, records: Sequence[JobRecord]) -> None:
        """Number new jobs and add them; they are committed with the next change, or by :meth:`flush`.

        Until then this process has the right to write the file, and others wait.
        """
        new = _New(search_id, records)
        if new.size > _LARGE:
            new.number(records, self._write(new.add, new.is_there))
            return

        path = self._path  # and not the storage itself, which may be dropped before

        def add(database: Database) -> Search:
            def again(before: Search) -> Callable[[sqlite3.Connection], object]:
                def call(connection: sqlite3.Connection) -> None:
                    if Search.look_up(connection, search_id).next_job == before.next_job:
                        new.add(connection)
                    elif not new.is_there(connection, before):
                        job_ids = [rows.job_id(before, before.size + index) for index in range(new.count)]
                        error = _taken(path, job_ids)
                        database.lost.update(dict.fromkeys(job_ids, error))
                        raise error

                return call

            return database.write_soon(new.add, again, new.is_there)

        new.number(records, self._do(add))

    def flush(self) -> None:
        database = self._database
        if database is not None:
            database.flush()

    def update(self, changes: Sequence[JobChange]) -> None:
        groups = _grouped(changes)

        def call(connection: sqlite3.Connection) -> _Written:
            if self._lost:
                self._refuse_lost(changes)
            searches = {group.search: Search.look_up(connection, str(group.search)) for group in groups}
            for group in groups:
                group.check(searches[group.search])
            written = []
            for group in groups:
                before, drafts = searches[group.search], group.drafts_for(connection, searches[group.search])
                searches[group.search] = rows.change_jobs(connection, before, drafts)
                written.append((before, drafts))
            return written

        if groups:
            self._write(call, _is_written)

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        wanted = [rows.numbers_of(job_id) for job_id in job_ids]

        def call(connection: sqlite3.Connection) -> dict[tuple[int, int], JobRecord]:
            return {key: record for _, some in _find(connection, wanted) for key, record in some.items()}

        found = self._read(call)
        if len(found) < len(wanted):  # who asks twice gets two
            return [copy.deepcopy(found[key]) for key in wanted]
        return [found[key] for key in wanted]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        # In several steps, so that others get their turns. What is read is of the moment of the last step, as entries
        # are never changed.
        since = max(since, 0)
        entries: list[Found] = []
        limit = _FIRST_STEP
        while True:
            last = entries[-1].revision if entries else since
            search, some, sums = self._read(partial(_entries_since, search_id, last, limit, since == 0))
            entries += some
            if len(some) < limit:
                break
            limit *= 2
        last = entries[-1].revision if entries else since
        if last < search.revision or (entries and last > search.revision):
            raise self._damaged(f"the last of the changes of search {search_id!r} is {search.revision}, and not {last}")
        try:
            history = self._replayed(search, entries, since)
        except DamageError as exc:
            raise self._damaged(f"search {search_id!r} cannot be read: {exc}") from exc
        if since == 0:
            if len(history.records) != search.size:
                found = len(history.records)
                raise self._damaged(f"of the {search.size} jobs of search {search_id!r}, {found} are there")
            if history.sums != sums:
                raise self._damaged(f"search {search_id!r} lacks changes, or its indexes do")
        for number, record in history.records.items():
            record.id = rows.job_id(search, number)
        return [record for record in history.records.values() if record.revision > since], search.revision

    def _replayed(self, search: Search, entries: list[Found], since: int) -> History:
        history = _replayed(entries, since)
        if history.unknown:  # they are older
            older = self._read(lambda connection: rows.entries_of(connection, search, list(history.unknown)))
            history = _replayed(entries, since, [one for one in older if one.revision <= since], history.unknown)
        if history.unknown:
            raise DamageError(f"it lacks what {len(history.unknown)} jobs were before")
        return history

    # -- leases --------------------------------------------------------------------------------------------------------

    def renew(self, owner: str, seconds: float) -> None:
        def call(connection: sqlite3.Connection) -> dict[str, values.Lease]:
            known = values.read_leases(connection)
            leases = {one: lease for one, lease in known.items() if one != owner and values.is_running(lease)}
            if seconds > 0:
                leases[owner] = values.lease_for(seconds)
            values.write_leases(connection, leases)
            return leases

        self._write(call, lambda connection, leases: values.read_leases(connection) == leases)

    def owners(self) -> set[str]:
        leases = self._read(values.read_leases)
        return {owner for owner, lease in leases.items() if values.is_running(lease)}

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        wanted = {rows.numbers_of(job_id): (job_id, revision) for job_id, revision in revisions.items()}

        def call(connection: sqlite3.Connection) -> tuple[_Written, set[str]]:
            written, adopted = [], set()
            for search, found in _find(connection, list(wanted)):
                numbers, records = [], []
                for key, record in found.items():
                    job_id, revision = wanted[key]
                    if record.revision == revision:
                        adopted.add(job_id)
                        adopt(record, owner)
                        record.id, record.revision = "", 0
                        numbers.append(key[1])
                        records.append(record)
                if numbers:
                    written.append((search, drafts := entries.adoptions(numbers, records)))
                    rows.change_jobs(connection, search, drafts)
                    note_adopted(connection, search, numbers, owner)
            return written, adopted

        return self._write(call, lambda connection, result: _is_written(connection, result[0]))[1]

    # ------------------------------------------------------------------------------------------------------------------

    def _read(self, call: Callable[[sqlite3.Connection], T]) -> T:
        return self._do(lambda database: database.read(call))

    def _write(
        self,
        call: Callable[[sqlite3.Connection], T],
        is_there: Callable[[sqlite3.Connection, T], bool] | None = None,
    ) -> T:
        return self._do(lambda database: database.write(call, is_there))

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
            if change.id in self._lost:
                raise TakenError(str(self._lost[change.id]))

    def _damaged(self, how: str) -> CorruptStoreError:
        return CorruptStoreError(f"the store {str(self._path)!r} is damaged: {how}; take a copy of it from before")


def _taken(path: Path, job_ids: Sequence[str]) -> TakenError:
    first, last = job_ids[0], job_ids[-1]
    which = f"job {first}" if first == last else f"jobs {first} to {last}"
    return TakenError(
        f"{which} could not be saved when the store {str(path)!r} failed, and by now another program has jobs of these "
        "numbers in it: submit anew what you had submitted"
    )


_Written = list[tuple[Search, list[Draft]]]
"""Where searches went on before, and what was written there."""


def _is_written(connection: sqlite3.Connection, written: _Written) -> bool:
    return all(rows.are_there(connection, before, drafts) for before, drafts in written)


class _New:
    """New jobs of a search, ready to be written.

    Attributes:
        count: how many they are.
        size: how many bytes.
    """

    __slots__ = ("_groups", "_search_id", "count", "size")

    def __init__(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self._search_id = search_id
        self._groups = [(owner, entries.new_jobs(list(some))) for owner, some in groupby(records, attrgetter("owner"))]
        self.count = len(records)
        self.size = sum(len(draft.payload) for _, drafts in self._groups for draft in drafts)

    def add(self, connection: sqlite3.Connection) -> Search:
        """Write them; give where the search went on before."""
        before = search = Search.look_up(connection, self._search_id)
        for owner, drafts in self._groups:
            search = rows.add_jobs(connection, search, owner, drafts)
        return before

    def is_there(self, connection: sqlite3.Connection, before: Search) -> bool:
        """Whether they have been written where the search went on before: a commit that failed may have succeeded."""
        return rows.are_there(connection, before, [draft for _, drafts in self._groups for draft in drafts])

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

    __slots__ = ("_by", "_changes", "_drafts", "_numbers", "search")

    def __init__(self, search: int, numbers: list[int], changes: Sequence[JobChange]) -> None:
        self.search = search
        self._by = changes[0].by
        self._numbers = numbers
        self._changes = changes
        self._drafts = entries.changes(numbers, changes)

    def check(self, search: Search) -> None:
        """Raise if there is no such job; the jobs of a search are numbered without a gap."""
        last = max(self._numbers)
        if last >= search.size:
            raise UnknownIdError(f"no job {rows.job_id(search, last)!r} in this storage")

    def drafts_for(self, connection: sqlite3.Connection, search: Search) -> list[Draft]:
        """Give what is to be written; what others own by now is left out."""
        drafts, by = self._drafts, self._by
        if by is not None and (others := owned_by_others(connection, search, self._numbers, by)):
            for _, found in _find(connection, [(self.search, number) for number in others]):
                for record in found.values():
                    if record.owner == by:
                        raise DamageError(f"job {record.id!r} is noted as another's, and is {by!r}'s")
            some = [
                (number, change)
                for number, change in zip(self._numbers, self._changes, strict=True)
                if number not in others
            ]
            drafts = entries.changes([number for number, _ in some], [change for _, change in some])
        return drafts


def _grouped(changes: Sequence[JobChange]) -> list[_Changes]:
    if not changes:
        return []
    if len({change.by for change in changes}) == 1:  # mostly
        of_one = rows.numbers_in_one_search([change.id for change in changes])
        if of_one is not None:
            return [_Changes(*of_one, changes)]
    keys = [rows.numbers_of(change.id) for change in changes]
    groups = []
    start = 0
    for (search, _), group in groupby(zip(keys, changes, strict=True), lambda one: (one[0][0], one[1].by)):
        end = start + sum(1 for _ in group)
        groups.append(_Changes(search, [number for _, number in keys[start:end]], changes[start:end]))
        start = end
    return groups


def _find(
    connection: sqlite3.Connection, wanted: Sequence[tuple[int, int]]
) -> Iterator[tuple[Search, dict[tuple[int, int], JobRecord]]]:
    """Give the records of these jobs, all of them, by their numbers, in this order; one search after the other."""
    by_search: dict[int, dict[int, None]] = {}  # a dict is an ordered set
    for search_number, number in wanted:
        by_search.setdefault(search_number, {})[number] = None
    for search_number, numbers in by_search.items():
        try:
            search = Search.look_up(connection, str(search_number))
        except UnknownIdError:
            raise UnknownIdError(f"no job '{search_number}.{min(numbers)}' in this storage") from None
        if max(numbers) >= search.size:
            raise UnknownIdError(f"no job {rows.job_id(search, max(numbers))!r} in this storage")
        history = History()
        for one in rows.entries_of(connection, search, list(numbers)):
            history.take(*one, numbers)
        found = {}
        for number in numbers:
            record = history.records.get(number)
            if record is None:
                raise DamageError(f"job {rows.job_id(search, number)!r} is missing, though there are later ones")
            record.id = rows.job_id(search, number)
            found[search_number, number] = record
        yield search, found


def _entries_since(
    search_id: str, since: int, limit: int, takes_all: bool, connection: sqlite3.Connection
) -> tuple[Search, list[Found], tuple[int, ...]]:
    search = Search.look_up(connection, search_id)
    found = rows.entries_since(connection, search, since, limit)
    is_last = takes_all and len(found) < limit
    return search, found, rows.index_sums(connection, search) if is_last else ()


def _replayed(
    found: Sequence[Found], since: int, older: Sequence[Found] = (), of_older: Container[int] = ()
) -> History:
    """Go through all entries after a revision; of older ones, through what they say of some jobs."""
    history = History()
    for one in older:
        history.take(*one, of_older)
    last = since
    for one in found:
        before = one.revision - history.take(*one)
        if before > last or (last > since and before != last):
            raise DamageError(f"its changes {last + 1} to {before} are missing")
        last = one.revision
    return history


_FIRST_STEP: Final = 100
_LARGE: Final = 4_000_000
"""Bytes of new jobs that are written at once, as SQLite could not keep them in memory until later."""
_using: Final = threading.Lock()
"""Held while a storage takes up a database or lets go of it."""
os.register_at_fork(before=_using.acquire, after_in_parent=_using.release, after_in_child=_using.release)
