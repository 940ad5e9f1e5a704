"""One search of a memory storage: its records, and which have changed since when."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from paraval.errors import BadValueError
from paraval.storage.memory.entries import Ended, Submitted
from paraval.storage.records import JobChange, JobEnds, JobRecord, NewJobs

__all__ = ["Search"]

_MANY = 1024
_ENOUGH: Final = 5
"""With fewer jobs, what they would share takes more memory than it spares."""


class Search:
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
        self._entries: list[JobRecord | Submitted | Ended] = []  # by their numbers
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
            entries = [Submitted(first, ids, jobs, revision)] * count
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
        if not isinstance(entry, Submitted) or not entry.has(ends, first, at, count):
            return False
        ids, place = ends.ids[at : at + count], slice(first, first + count)
        ended = [Ended(entry, first, ends, at, self.revision)] * count
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
        if not isinstance(entry, Submitted) or entry.jobs.owner != ends.by:
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
