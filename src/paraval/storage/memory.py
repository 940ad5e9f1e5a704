"""A storage in this process's memory: the default."""

from __future__ import annotations

import bisect
import operator
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from paraval.errors import BadValueError
from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.records import JobChange, JobEnds, JobRecord, NewJobs, adopt
from paraval.submission import Notes

__all__ = ["MemoryStorage"]


_MANY = 1024
_ENOUGH: Final = 5
"""With fewer jobs, what they would share takes more memory than it spares."""


class _Submitted:
    """Jobs that nothing has happened to since they were submitted together.

    Args:
        first: the number of the first of them.
        ids: of all.
        jobs: what they are.
        before: the revision before that of the first.
    """

    __slots__ = ("first", "ids", "jobs", "revision")

    def __init__(self, first: int, ids: list[str], jobs: NewJobs, before: int) -> None:
        self.first = first
        self.ids = ids
        self.jobs = jobs
        self.revision = before + 1

    def id_of(self, number: int) -> str:
        """Give the id of a job."""
        return self.ids[number - self.first]

    def revision_of(self, number: int) -> int:
        """Give the revision of a job."""
        return self.revision + number - self.first

    def record_of(self, number: int, *, as_copy: bool = False) -> JobRecord:
        """Make the record of a job; a copy has its metadata in a dict of its own."""
        at = number - self.first
        args, all_metadata, function, owner, is_private = self.jobs
        if not as_copy:
            metadata = all_metadata[at]
        elif isinstance(all_metadata, Notes):  # which need not keep one for that
            metadata = all_metadata.copy_of(at)
        else:
            metadata = dict(all_metadata[at])
        return JobRecord(
            self.ids[at],
            args=(args[at],),
            metadata=metadata,
            function=function,
            owner=owner,
            is_private=is_private,
            revision=self.revision + at,
        )

    def has(self, ends: JobEnds, first: int, at: int, count: int) -> bool:
        """Whether so many of these ends, from a place on, are of its jobs from a number on, and are all there is."""
        mine, metadata = first - self.first, ends.metadata
        if self.jobs.owner != ends.by or self.ids[mine : mine + count] != ends.ids[at : at + count]:
            return False
        if metadata is None:
            return True
        return all(map(operator.is_, metadata[at : at + count], self.jobs.metadata[mine : mine + count]))

    def came_with(self, metadata: dict[str, Any], number: int) -> bool:
        """Whether a job came with this very dict."""
        return self.jobs.metadata[number - self.first] is metadata


class _Ended:
    """Jobs that were submitted together and have ended together, and nothing else has happened to them.

    Args:
        submitted: what is known of them otherwise.
        first: the number of the first of them.
        ends: how they ended, maybe with others.
        at: the place of the first of them there.
        before: the revision before that of the first.
    """

    __slots__ = ("ends", "offset", "revision", "submitted")

    def __init__(self, submitted: _Submitted, first: int, ends: JobEnds, at: int, before: int) -> None:
        self.submitted = submitted
        self.ends = ends
        self.offset = at - first
        self.revision = before + 1 - first

    def id_of(self, number: int) -> str:
        """Give the id of a job."""
        return self.ends.ids[number + self.offset]

    def revision_of(self, number: int) -> int:
        """Give the revision of a job."""
        return self.revision + number

    def record_of(self, number: int, *, as_copy: bool = False) -> JobRecord:
        """Make the record of a job, likewise."""
        record = self.submitted.record_of(number, as_copy=as_copy)
        at, ends = number + self.offset, self.ends
        record.status, record.out, record.error = ends.statuses[at], ends.outs[at], ends.errors[at]
        record.revision = self.revision + number
        return record


class _Search:
    """One search.

    Jobs that are submitted together, and end together, have no records of their own: their entries are what they have
    in common, and the columns that they came in. A record is made when somebody asks for it, or changes it.

    ``notes`` is metadata that others than the job's evaluator have stored. They are kept apart, as the dict in the
    record is the job's own.

    Which records have changed since when is known from a log of their ids, in two parts: ``_recent``, where each place
    is one revision, and ``_settled``, where each is there once, with the revisions beside it. When the first has grown
    long it is merged into the second.
    """

    __slots__ = (
        "_before",
        "_entries",
        "_most_recent",
        "_recent",
        "_settled",
        "_settled_at",
        "notes",
        "values",
    )

    def __init__(self) -> None:
        self.notes: dict[str, dict[str, Any]] = {}
        self.values: dict[str, Any] = {}
        self._entries: list[JobRecord | _Submitted | _Ended] = []  # by their numbers
        self._settled: list[str] = []
        self._settled_at: list[int] = []
        self._before = 0  # the revision after which the recent ones begin
        self._recent: list[str] = []
        self._most_recent = _MANY

    @property
    def revision(self) -> int:
        """How often anything has changed."""
        return self._before + len(self._recent)

    # -- one by one ----------------------------------------------------------------------------------------------------

    def record(self, job_id: str) -> JobRecord | None:
        """Give the record of a job, to be changed; None if there is no such job."""
        number = self._number_of(job_id)
        if number is None:
            return None
        while not isinstance(entry := self._entries[number], JobRecord):
            record = entry.record_of(number)
            if self._entries[number] is entry:  # else a finalizer was here
                self._entries[number] = record
        return entry

    def copy(self, job_id: str) -> JobRecord | None:
        """Give the record of a job as it is now, to whoever may change what they get; None if there is no such job."""
        number = self._number_of(job_id)
        if number is None:
            return None
        entry = self._entries[number]
        if not isinstance(entry, JobRecord):
            return entry.record_of(number, as_copy=True)  # of which nobody has stored metadata
        copied = msgspec.structs.replace(entry)
        if copied.metadata is not None:
            copied.metadata = {**copied.metadata, **self.notes.get(job_id, {})}
        if copied.budgets is not None and copied.objectives is not None:
            copied.budgets, copied.objectives = list(copied.budgets), list(copied.objectives)
        return copied

    def _number_of(self, job_id: str) -> int | None:
        """Give the number of a job; None if there is no such job."""
        try:
            number = _number_of(job_id)
            # "0.-1" and "0.007" are of none.
            return number if number >= 0 and self._id_of(number) == job_id else None
        except (ValueError, IndexError):
            return None

    def _id_of(self, number: int) -> str:
        entry = self._entries[number]
        return entry.id if isinstance(entry, JobRecord) else entry.id_of(number)

    def apply(self, changes: Sequence[JobChange], records: Sequence[JobRecord]) -> None:
        """Apply each change to its record, but for those that another owner wants."""
        notes = self.notes
        for change, record in zip(changes, records, strict=True):
            by = change.by
            if by is not None and by != record.owner:
                continue
            metadata = change.metadata
            if metadata is None or (metadata is record.metadata and not notes):  # nearly always
                change.apply_to(record)
            else:
                self.note(metadata, change, record)
            self.touch(record)

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

    def touch(self, record: JobRecord) -> None:
        """Note that a record has changed."""
        recent = self._recent
        recent.append(record.id)
        record.revision = self._before + len(recent)
        if len(recent) > self._most_recent:
            self._merge()

    def add(self, search_id: str, records: Sequence[JobRecord]) -> None:
        """Number new records, and add them."""
        entries = self._entries
        self._make_room(len(records))
        for record in records:
            record.id = f"{search_id}.{len(entries)}"
            entries.append(record)
            self.touch(record)

    # -- many at once --------------------------------------------------------------------------------------------------

    def add_jobs(self, search_id: str, jobs: NewJobs) -> list[str]:
        """Number new jobs, and add them."""
        count = len(jobs.args)
        if count < _ENOUGH:
            records = jobs.records()
            self.add(search_id, records)
            return [record.id for record in records]
        self._make_room(count)
        while True:
            first, revision = len(self._entries), self.revision
            ids = [f"{search_id}.{number}" for number in range(first, first + count)]
            entries = [_Submitted(first, ids, jobs, revision)] * count
            # Nothing is made by this look, as a finalizer might come after it; if one was here before, once more.
            if len(self._entries) == first and self.revision == revision:
                self._entries += entries
                self._recent += ids
                return ids

    def end_jobs(self, ends: JobEnds) -> bool:
        """End jobs; False, and nothing is changed, if they are not all of this search.

        Raises:
            ValueError: the columns are not of one length.
        """
        count = len(ends.ids)
        if {count} != {len(column) for column in ends[:5] if column is not None}:
            raise BadValueError("the columns of JobEnds must be of one length")
        first = self._number_of(ends.ids[0])
        if first is not None and self._end_together(first, ends, 0, count):  # as a rule
            return True
        numbers = list(map(self._number_of, ends.ids))
        if None in numbers:
            return False
        at = 0
        while at < count:
            run = self._run(cast("list[int]", numbers), ends, at)
            if not run or not self._end_together(cast("int", numbers[at]), ends, at, run):
                run = 1
                self._end(ends, at)
            at += run
        return True

    def _end_together(self, first: int, ends: JobEnds, at: int, count: int) -> bool:
        """End so many jobs, of those from a place on; False, and nothing is changed, if they are not of one entry."""
        entry = self._entries[first]
        if not isinstance(entry, _Submitted) or not entry.has(ends, first, at, count):
            return False
        ids, place = ends.ids[at : at + count], slice(first, first + count)
        ended = [_Ended(entry, first, ends, at, self.revision)] * count
        # Looked at when all is made, a slice too, as a finalizer may have been here: then one by one.
        if self._entries[place].count(entry) < count or ended[0].revision_of(first) <= self.revision:
            return False
        self._entries[place] = ended
        self._recent += ids
        return True

    def _run(self, numbers: Sequence[int], ends: JobEnds, at: int) -> int:
        """Count how many jobs from a place on can be ended together."""
        first, metadata = numbers[at], ends.metadata
        entry = self._entries[first]
        if not isinstance(entry, _Submitted) or entry.jobs.owner != ends.by:
            return 0
        count = 0
        for number in numbers[at:]:
            if number != first + count or self._entries[number] is not entry:
                break
            if metadata is not None and not entry.came_with(metadata[at + count], number):
                break
            count += 1
        return count

    def _end(self, ends: JobEnds, at: int) -> None:
        job_id = ends.ids[at]
        record = cast("JobRecord", self.record(job_id))
        change = JobChange(
            job_id,
            status=ends.statuses[at],
            out=ends.outs[at],
            error=ends.errors[at],
            metadata=record.metadata if ends.metadata is None else ends.metadata[at],
            by=ends.by,
        )
        self.apply((change,), (record,))

    # -- the log -------------------------------------------------------------------------------------------------------

    def _make_room(self, more: int) -> None:
        self._most_recent = 4 * (len(self._entries) + more) + _MANY  # so that merging costs little for each change

    def _merge(self) -> None:
        while True:
            revision, recent = self.revision, list[str]()
            settled = self.changed_since(0)
            settled_at = list(map(self._revision_of, settled))
            if self.revision == revision:  # else a finalizer was here, and what it changed would be missing
                break
        self._settled, self._settled_at = settled, settled_at
        self._before, self._recent = revision, recent

    def _revision_of(self, job_id: str) -> int:
        number = _number_of(job_id)
        entry = self._entries[number]
        return entry.revision if isinstance(entry, JobRecord) else entry.revision_of(number)

    def changed_since(self, revision: int) -> list[str]:
        """Give the ids of the jobs that have changed after a revision, in the order of their last changes."""
        log = self._recent[max(0, revision - self._before) :]
        if revision < self._before:
            log = self._settled[bisect.bisect_right(self._settled_at, revision) :] + log
        log.reverse()
        return list(dict.fromkeys(log))[::-1]


def _number_of(job_id: str) -> int:
    return int(job_id.rpartition(".")[2])


class MemoryStorage(Storage):
    """Keeps everything in the memory of this process; evaluators of the same process may share it.

    What it is given is kept by reference, and what it gives is a copy of the record around the same objects. So what a
    job notes in its metadata is in the record at once; but what is stored as metadata does not show in the job.
    """

    by_reference = True

    def __init__(self) -> None:
        self._lock = threading.RLock()  # what the collector finalizes in the middle of a call may use the storage
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
            first = changes[0]
            search = self._search_of(first.id)
            if len(changes) == 1:  # what is made for many costs a job that comes alone twice as much
                record = search.record(first.id)
                if record is None:
                    raise _unknown(first.id)
                search.apply(changes, (record,))
                return
            records = [search.record(change.id) for change in changes]
            if all(records):  # all of one search, as nearly always
                search.apply(changes, cast("list[JobRecord]", records))
                return
            found = [self._find(change.id) for change in changes]
            for change, (search, record) in zip(changes, found, strict=True):
                search.apply((change,), (record,))

    # Both go past insert and update: not where somebody has put something else in their places.

    def insert_jobs(self, search_id: str, jobs: NewJobs) -> list[str]:
        if not self._has_its_own_ways:
            return super().insert_jobs(search_id, jobs)
        with self._lock:
            return self._search(search_id).add_jobs(search_id, jobs)

    def end_jobs(self, ends: JobEnds) -> None:
        if self._has_its_own_ways and ends.ids:
            with self._lock:
                if self._search_of(ends.ids[0]).end_jobs(ends):
                    return
        if ends.metadata is None:
            with self._lock:
                ends = ends._replace(metadata=[self._find(job_id)[1].metadata or {} for job_id in ends.ids])
        super().end_jobs(ends)

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        with self._lock:
            return [self._copy(job_id) for job_id in job_ids]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            search = self._search(search_id)
            revision = search.revision  # before, so that what a finalizer changes meanwhile is given next time
            copies = map(search.copy, search.changed_since(since))
            return cast("list[JobRecord]", list(copies)), revision

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

    @property
    def keeps_dicts(self) -> bool:  # type: ignore[override] # what is derived from this may be another kind of store
        """Whether it does; not where somebody has put something else in the places of insert and update."""
        return self._has_its_own_ways

    @property
    def _has_its_own_ways(self) -> bool:
        return (getattr(self.insert, "__func__", None), getattr(self.update, "__func__", None)) == _OWN_WAYS

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
        record = search.record(job_id)
        if record is None:
            raise _unknown(job_id)
        return search, record

    def _copy(self, job_id: str) -> JobRecord:
        copied = self._search_of(job_id).copy(job_id)
        if copied is None:
            raise _unknown(job_id)
        return copied


_OWN_WAYS: Final = (MemoryStorage.insert, MemoryStorage.update)


def _unknown(job_id: str) -> UnknownIdError:
    return UnknownIdError(f"no job {job_id!r} in this storage")
