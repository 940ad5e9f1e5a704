"""What a storage has of a configuration in any of its searches: for ``reuse``."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from paraval.job import Job, JobStatus
from paraval.outcome import Outcome, is_failure
from paraval.storage import JobRecord, Storage, UnstorableError
from paraval.storage.codec import key_of

__all__ = ["NOTHING", "Answers", "Known", "key_for"]

_LOOKS_AT: Final = 8
"""So many searches in which nothing happens are looked at in each update."""


class Known(NamedTuple):
    """What is known of one configuration that was submitted.

    Attributes:
        record: the record that stands for it already; None: it needs one.
        outcome: what became of it, or None: it is to be run.
        source: the job that the outcome is of, or will be: this very one where a record stands for it.
        noted: the record of the outcome, for what was noted beside it.
        twin: index, among the configurations of the same submission, of the one that it is the same as.
    """

    record: JobRecord | None = None
    outcome: Outcome | None = None
    source: str | None = None
    noted: JobRecord | None = None
    twin: int | None = None


NOTHING: Final = Known()


class Answers:
    """Results and jobs in flight of all searches, by configuration; kept up to date by scanning what has changed.

    There may be thousands of searches, and something happens in few of them. An update looks at the evaluator's own, at
    new ones, at those that had changed the last time, and at a few of the others in turn. So what is new in a search
    where nothing had happened for a while is found a little later. A job that is known to be open is never taken for
    what it was then: whoever joins it looks at its record.
    """

    def __init__(self, storage: Storage, search_id: str, function: str) -> None:
        self._storage = storage
        self._search_id = search_id
        self._function = function
        self._revisions: dict[str, int] = {}
        self._busy: dict[str, None] = {}
        self._quiet: deque[str] = deque()
        self._done: dict[bytes, str] = {}
        self._open: dict[bytes, str] = {}

    def update(self, *, objectives: bool) -> None:
        """Take in what is new; ``objectives``: whether an output may say itself that it is a failure."""
        for search_id in self._storage.search_ids():
            if search_id not in self._revisions:
                self._revisions[search_id] = 0
                self._busy[search_id] = None
        for _ in range(min(_LOOKS_AT, len(self._quiet))):
            if self._scan(self._quiet[0], objectives=objectives):
                self._busy[self._quiet.popleft()] = None
            else:
                self._quiet.rotate(-1)
        for search_id in list(self._busy):
            if not self._scan(search_id, objectives=objectives) and search_id != self._search_id:
                del self._busy[search_id]
                self._quiet.append(search_id)

    def _scan(self, search_id: str, *, objectives: bool) -> bool:
        """Take in what is new in a search; tell whether anything is."""
        records, revision = self._storage.scan(search_id, self._revisions[search_id])
        for record in records:
            key = key_for(record.function, record.configuration) if record.function == self._function else None
            if key is not None:
                self._note(key, record, has_failed=objectives and is_failure(record.out))
        self._revisions[search_id] = revision
        return bool(records)

    def _note(self, key: bytes, record: JobRecord, *, has_failed: bool) -> None:
        if record.status == JobStatus.DONE.value and record.error is None and not has_failed:
            self._done.setdefault(key, record.id)
            self._open.pop(key, None)
        elif not JobStatus(record.status).is_terminal:
            self._open.setdefault(key, record.id)
        elif self._open.get(key) == record.id:
            del self._open[key]

    def answer(
        self, configuration: Mapping[str, Any], job_class: type[Job], twins: dict[bytes, int], index: int
    ) -> Known:
        """Say what is known of a configuration: the index-th of a submission with these twins."""
        key = key_for(self._function, configuration)
        if key is None:
            return NOTHING
        if key in self._done:
            (record,) = self._storage.get([self._done[key]])
            return Known(outcome=record.outcome_for(job_class), source=record.id, noted=record)
        if key in self._open:
            return Known(source=self._open[key])
        if key in twins:
            return Known(twin=twins[key])
        twins[key] = index
        return NOTHING


def key_for(function: str | None, configuration: Mapping[str, Any]) -> bytes | None:
    """Give what is the same for the same configuration of the same function; None where it is like no other."""
    try:
        return key_of(function, configuration)
    except UnstorableError:  # only a store in memory can hold it, and it is like no other
        return None
