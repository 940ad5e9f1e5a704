"""A storage in this process's memory: the default."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from paraval.job import Job
from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.records import JobChange, JobRecord, adopt, record_of

__all__ = ["MemoryStorage"]


_MANY: Final = 1024


class _Search:
    """One search.

    An entry is a job itself, for as long as nobody but its evaluator has changed anything of it, or else a record.

    ``notes`` is metadata that others than the job's evaluator have stored. They are kept apart, as the dict in the
    record is the job's own.

    Which entries have changed since when is known from a log of them, in two parts: ``_recent``, where each place is
    one revision, and ``_settled``, where each entry is there once, with the revisions beside it. When the first has
    grown long it is merged into the second.
    """

    __slots__ = (
        "_recent",
        "_settled",
        "_settled_at",
        "entries",
        "has_records",
        "next_number",
        "notes",
        "revision",
        "values",
    )

    def __init__(self) -> None:
        self.next_number = 0
        self.revision = 0
        self.entries: dict[str, Job | JobRecord] = {}
        self.has_records = False
        self.notes: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._settled: list[str] = []
        self._settled_at: list[int] = []
        self._recent: list[Job | JobRecord] = []

    def record(self, job_id: str) -> JobRecord | None:
        """Give a record that is to be changed; the job itself is no entry any more."""
        entry = self.entries.get(job_id)
        if isinstance(entry, Job):
            self.entries[job_id] = entry = record_of(entry)
            self.has_records = True
        return entry

    def apply(self, changes: Sequence[JobChange], records: Sequence[JobRecord]) -> None:
        """Apply each change to its record, but for those that another owner wants."""
        revision, notes, changed = self.revision, self.notes, []
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
                changed.append(record)
        finally:  # a change that cannot be applied, as its metadata is no dict, does not hide those before it
            self.log(changed)

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

    def copy(self, job_id: str) -> JobRecord | None:
        """Give a record as it is now, to whoever may change what they get."""
        record = self.entries.get(job_id)
        if record is None:
            return None
        copied = record_of(record) if isinstance(record, Job) else msgspec.structs.replace(record)
        if record.metadata is not None:
            copied.metadata = {**record.metadata, **self.notes.get(record.id, {})}
        if copied.budgets is not None and copied.objectives is not None:
            copied.budgets, copied.objectives = list(copied.budgets), list(copied.objectives)
        return copied

    def log(self, changed: Sequence[Job | JobRecord]) -> None:
        """Note that entries have changed, the next revisions being theirs."""
        self.revision += len(changed)
        self._recent += changed
        if len(self._recent) > 4 * len(self.entries) + _MANY:  # so that merging costs little for each change
            self._settled = self.changed_since(0)
            self._settled_at = [_revision(self.entries[job_id]) for job_id in self._settled]
            self._recent = []

    def changed_since(self, revision: int) -> list[str]:
        """Give the ids of the jobs that have changed after a revision, in the order of their last changes."""
        before = self.revision - len(self._recent)
        log = [entry.id for entry in self._recent[max(0, revision - before) :]]
        if revision < before:
            log = self._settled[bisect.bisect_right(self._settled_at, revision) :] + log
        return list(dict.fromkeys(reversed(log)))[::-1]


def _revision(entry: Job | JobRecord) -> int:
    return entry._revision if isinstance(entry, Job) else entry.revision


class MemoryStorage(Storage):
    """Keeps everything in the memory of this process; evaluators of the same process may share it.

    What it is given is kept by reference, and what it gives is a copy of the record around the same objects. So what a
    job notes in its metadata is in the record at once; but what is stored as metadata does not show in the job.

    The jobs of an evaluator are their own records until somebody else stores something of them: with tiny jobs, making
    records that nobody reads would be a good part of all there is to do.
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
            search = self._search(search_id)
            kept, number, revision = search.entries, search.next_number, search.revision
            for record in records:
                revision += 1
                record.id, record.revision = f"{search_id}.{number}", revision
                number += 1
                kept[record.id] = record
            search.next_number = number
            search.has_records = True
            search.log(records)

    def update(self, changes: Sequence[JobChange]) -> None:
        if not changes:
            return
        with self._lock:
            search = self._search_of(changes[0].id)
            records = [search.record(change.id) for change in changes]
            if all(records):  # all of one search, as nearly always
                search.apply(changes, cast("list[JobRecord]", records))
                return
            found = [self._find(change.id) for change in changes]
            for change, (search, record) in zip(changes, found, strict=True):
                search.apply((change,), (record,))

    @property
    def keeps_jobs(self) -> bool:
        return type(self) is MemoryStorage  # what is derived from it shall see each insert and each update

    def number(self, search_id: str, count: int) -> list[str]:
        with self._lock:
            search = self._search(search_id)
            first = search.next_number
            search.next_number += count
        return [f"{search_id}.{number}" for number in range(first, first + count)]

    def keep(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            search = self._search_of(jobs[0].id)
            entries = search.entries
            for revision, job in enumerate(jobs, search.revision + 1):
                entries[job.id] = job
                job._revision = revision
            search.log(jobs)

    def note(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            search = self._search_of(jobs[0].id)
            entries = search.entries
            kept = [job for job in jobs if entries.get(job.id) is job] if search.has_records else jobs
            for revision, job in enumerate(kept, search.revision + 1):
                job._revision = revision
            search.log(kept)
        if len(kept) < len(jobs):  # records were made of the others meanwhile
            others = [job for job in jobs if entries.get(job.id) is not job]
            self.update([JobChange.of(job, job.context.owner) for job in others])

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        with self._lock:
            return [self._copy(job_id) for job_id in job_ids]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            search = self._search(search_id)
            return [self._copy(job_id) for job_id in search.changed_since(since)], search.revision

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
                record.revision = search.revision + 1
                search.log((record,))
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
        return search, _known(job_id, search.record(job_id))

    def _copy(self, job_id: str) -> JobRecord:
        return _known(job_id, self._search_of(job_id).copy(job_id))


def _known(job_id: str, record: JobRecord | None) -> JobRecord:
    if record is None:
        raise UnknownIdError(f"no job {job_id!r} in this storage")
    return record
