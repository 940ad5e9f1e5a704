"""A storage in this process's memory: the default."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.records import JobChange, JobRecord, adopt

__all__ = ["MemoryStorage"]


_MANY: Final = 1024


class _Search:
    """One search.

    ``notes`` is metadata that others than the job's evaluator have stored. They are kept apart, as the dict in the
    record is the job's own.

    Which records have changed since when is known from a log of them, in two parts: ``_recent``, where each place is
    one revision, and ``_settled``, where each record is there once, with the revisions beside it. When the first has
    grown long it is merged into the second.
    """

    __slots__ = (
        "_most_recent",
        "_recent",
        "_settled",
        "_settled_at",
        "next_number",
        "notes",
        "records",
        "revision",
        "values",
    )

    def __init__(self) -> None:
        self.next_number = 0
        self.revision = 0
        self.records: dict[str, JobRecord] = {}
        self.notes: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._settled: list[JobRecord] = []
        self._settled_at: list[int] = []
        self._recent: list[JobRecord] = []
        self._most_recent = _MANY

    def apply(self, changes: Sequence[JobChange], records: Sequence[JobRecord]) -> None:
        """Apply each change to its record, but for those that another owner wants."""
        revision, notes, recent = self.revision, self.notes, self._recent
        try:
            for change, record in zip(changes, records, strict=True):
                by = change.by
                if by is not None and by != record.owner:
                    continue
                metadata = change.metadata
                if metadata is None or (metadata is record.metadata and not notes):  # nearly always
                    change.apply_to(record)
                else:
                    self.note(metadata, change, record)
                revision += 1
                record.revision = revision
                recent.append(record)
        finally:  # a change that cannot be applied, as its metadata is no dict, does not hide those before it
            self.revision = revision
            if len(recent) > self._most_recent:
                self._merge()

    def note(self, metadata: dict[str, Any], change: JobChange, record: JobRecord) -> None:
        """Apply a change that has metadata."""
        if metadata is record.metadata:  # it may have changed: what is in it now is newer than the notes
            notes = self.notes.get(record.id, {})
            for key in metadata.keys() & notes.keys():
                del notes[key]
        elif record.metadata is not None:
            self.notes.setdefault(record.id, {}).update(metadata)
            change = msgspec.structs.replace(change, metadata=None)
        change.apply_to(record)

    def copy(self, record: JobRecord) -> JobRecord:
        """Give a record as it is now, to whoever may change what they get."""
        copied = msgspec.structs.replace(record)
        if record.metadata is not None:
            copied.metadata = {**record.metadata, **self.notes.get(record.id, {})}
        if record.budgets is not None and record.objectives is not None:
            copied.budgets, copied.objectives = list(record.budgets), list(record.objectives)
        return copied

    def add(self, search_id: str, records: Sequence[JobRecord]) -> None:
        """Number new records, and add them."""
        kept, number, revision = self.records, self.next_number, self.revision
        for record in records:
            revision += 1
            record.id, record.revision = f"{search_id}.{number}", revision
            number += 1
            kept[record.id] = record
        self.next_number, self.revision = number, revision
        self._recent += records
        self._most_recent = 4 * number + _MANY  # so that merging costs little for each change

    def touch(self, record: JobRecord) -> None:
        """Note that a record has changed."""
        self.revision = record.revision = self.revision + 1
        self._recent.append(record)

    def _merge(self) -> None:
        self._settled = self.changed_since(0)
        self._settled_at = [record.revision for record in self._settled]
        self._recent = []

    def changed_since(self, revision: int) -> list[JobRecord]:
        """Give the records that have changed after a revision, in the order of their last changes."""
        before = self.revision - len(self._recent)
        log = self._recent[max(0, revision - before) :]
        if revision < before:
            log = self._settled[bisect.bisect_right(self._settled_at, revision) :] + log
        last = {record.id: record for record in reversed(log)}
        return list(last.values())[::-1]


class MemoryStorage(Storage):
    """Keeps everything in the memory of this process; evaluators of the same process may share it.

    What it is given is kept by reference, and what it gives is a copy of the record around the same objects. So what a
    job notes in its metadata is in the record at once; but what is stored as metadata does not show in the job.
    """

    by_reference = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: dict[str, _Search] = {}
        self._leases: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The copy in another process would be a different store under the same name: it starts empty, as a lock
        # cannot be sent and records must not silently diverge.
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc] # the state is empty: a copy is a new store

    def new_search(self) -> str:
        with self._lock:
            search_id = str(len(self._searches))
            self._searches[search_id] = _Search()
            return search_id

    def search_ids(self) -> list[str]:
        with self._lock:
            return list(self._searches)

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        with self._lock:
            self._search(search_id).add(search_id, records)

    def update(self, changes: Sequence[JobChange]) -> None:
        if not changes:
            return
        with self._lock:
            if len(changes) == 1:  # what is made for many costs a job that comes alone twice as much
                search, record = self._find(changes[0].id)
                search.apply(changes, (record,))
                return
            search = self._search_of(changes[0].id)
            known = search.records
            records = [known.get(change.id) for change in changes]
            if all(records):  # all of one search, as nearly always
                search.apply(changes, cast("list[JobRecord]", records))
                return
            found = [self._find(change.id) for change in changes]
            for change, (search, record) in zip(changes, found, strict=True):
                search.apply((change,), (record,))

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        with self._lock:
            return [search.copy(record) for search, record in map(self._find, job_ids)]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            search = self._search(search_id)
            return [search.copy(record) for record in search.changed_since(since)], search.revision

    def renew(self, owner: str, seconds: float) -> None:
        with self._lock:
            self._leases[owner] = time.monotonic() + seconds

    def owners(self) -> set[str]:
        with self._lock:
            now = time.monotonic()
            self._leases = {owner: end for owner, end in self._leases.items() if end > now}
            return set(self._leases)

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        with self._lock:
            found = [(*self._find(job_id), revision) for job_id, revision in revisions.items()]
            adopted = [(search, record) for search, record, revision in found if record.revision == revision]
            for search, record in adopted:
                adopt(record, owner)
                search.touch(record)
            return {record.id for _, record in adopted}

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        with self._lock:
            self._search(search_id).values[key] = value

    def get_value(self, search_id: str, key: str) -> Any:
        with self._lock:
            values = self._search(search_id).values
            if key not in values:
                raise UnknownIdError(f"no value {key!r} in search {search_id!r}")
            return values[key]

    def _search(self, search_id: str) -> _Search:
        search = self._searches.get(search_id)
        if search is None:
            raise UnknownIdError(f"no search {search_id!r} in this storage; it has {list(self._searches) or 'none'}")
        return search

    def _search_of(self, job_id: str) -> _Search:
        search_id, dot, _ = job_id.rpartition(".")
        if not dot:
            raise UnknownIdError(f"{job_id!r} is no job id: it should look like '0.12' (search, dot, number)")
        return self._search(search_id)

    def _find(self, job_id: str) -> tuple[_Search, JobRecord]:
        search = self._search_of(job_id)
        record = search.records.get(job_id)
        if record is None:
            raise UnknownIdError(f"no job {job_id!r} in this storage")
        return search, record
