"""What a storage already knows of a configuration: for ``resume`` and ``reuse``.

*Resume* goes on with a search: the k-th submission of a configuration meets the k-th record of it. *Reuse* answers a
configuration from any search of the storage, or joins one that is in flight.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from paraval.engine.owners import living_owners
from paraval.engine.settling import OUT_OF_BUDGET
from paraval.job import HPOJob, Job, JobStatus
from paraval.outcome import JobError, Outcome, is_failure
from paraval.storage import JobRecord, Storage, UnstorableError
from paraval.storage.codec import key_of

__all__ = ["Known", "Recall", "ended_too_often", "final_outcome"]


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


class Recall:
    """Looks configurations up. Usable from any thread.

    Args:
        storage: where to look.
        search_id: the search that is gone on with.
        function: the name of the run-function: results of another answer nothing.
        owner: the evaluator that asks.
        resume: go on with the search.
        reuse: answer from, and join, what any search of the storage has.
        max_attempts: how often a job may be run again that was running when its driver ended.
    """

    def __init__(
        self,
        storage: Storage,
        search_id: str,
        function: str,
        owner: str,
        *,
        resume: bool,
        reuse: bool,
        max_attempts: int,
    ) -> None:
        self._storage = storage
        self._function = function
        self._owner = owner
        self._reuse = reuse
        self._max_attempts = max_attempts
        self._lock = threading.Lock()
        self._left: dict[tuple[bytes, bool], deque[JobRecord]] = {}
        self._answers = _Answers(storage, function) if reuse else None
        if resume:
            records, _ = storage.scan(search_id)
            for record in sorted(records, key=lambda record: int(record.id.rpartition(".")[2])):
                key = _key(record.function, _args_of(record)) if record.function == function else None
                if key is not None:
                    self._left.setdefault((key, record.is_private), deque()).append(record)

    def look_up(
        self, configurations: Sequence[Mapping[str, Any]], job_class: type[Job], *, is_private: bool
    ) -> list[Known]:
        """Say of each configuration what is known. Open jobs of drivers that are gone are adopted.

        When nothing comes of it, be it that this raises, the records are given back with :meth:`give_back`.
        """
        with self._lock:
            found = [self._resumed(configuration, is_private=is_private) for configuration in configurations]
        try:
            with self._lock:
                return self._completed(found, configurations, job_class)
        except BaseException:
            self.give_back([known or _NOTHING for known in found], is_private=is_private)
            raise

    def give_back(self, found: Sequence[Known], *, is_private: bool) -> None:
        """Have the records that were found be met by the next submissions: these came to nothing."""
        with self._lock:
            for known in reversed(found):
                record = known.record
                key = None if record is None else _key(record.function, _args_of(record))
                if record is not None and key is not None:
                    self._left.setdefault((key, is_private), deque()).appendleft(record)

    def _completed(
        self, found: list[Known | None], configurations: Sequence[Mapping[str, Any]], job_class: type[Job]
    ) -> list[Known]:
        self._adopt([known.record for known in found if known is not None and known.outcome is None], found)
        if self._answers is None:
            return [known or _NOTHING for known in found]
        self._answers.update(objectives=issubclass(job_class, HPOJob))
        twins: dict[bytes, int] = {}
        return [
            known or self._answers.answer(configuration, twins, index)
            for index, (known, configuration) in enumerate(zip(found, configurations, strict=True))
        ]

    def _resumed(self, configuration: Mapping[str, Any], *, is_private: bool) -> Known | None:
        key = _key(self._function, configuration) if self._left else None
        records = None if key is None else self._left.get((key, is_private))
        if not records:
            return None
        record = records.popleft()
        return Known(record, final_outcome(record), record.id, record)

    def _adopt(self, records: list[JobRecord | None], found: list[Known | None]) -> None:
        """Take the open jobs over whose driver is gone; those whose driver is not are followed."""
        wanted = {record.id: record for record in records if record is not None}
        if not wanted:
            return
        # As they are now: they were read when the evaluator was made.
        wanted = {record.id: record for record in self._storage.get(wanted)}
        living = living_owners(self._storage) - {self._owner}
        orphans = {
            record.id: record.revision
            for record in wanted.values()
            if record.owner not in living and final_outcome(record) is None
        }
        adopted = self._storage.adopt(orphans, self._owner) if orphans else set()
        for index, known in enumerate(found):
            if known is None or known.record is None or known.record.id not in wanted:
                continue
            record = wanted[known.record.id]
            if record.id in adopted:
                found[index] = Known(record, ended_too_often(record, self._max_attempts))
            else:
                found[index] = Known(record, final_outcome(record), record.id, record)


class _Answers:
    """Results and jobs in flight of all searches, by configuration; kept up to date by scanning what has changed."""

    def __init__(self, storage: Storage, function: str) -> None:
        self._storage = storage
        self._function = function
        self._revisions: dict[str, int] = {}
        self._done: dict[bytes, str] = {}
        self._open: dict[bytes, str] = {}

    def update(self, *, objectives: bool) -> None:
        """Take in what is new; ``objectives``: whether an output may say itself that it is a failure."""
        for search_id in self._storage.search_ids():
            records, self._revisions[search_id] = self._storage.scan(search_id, self._revisions.get(search_id, 0))
            for record in records:
                key = _key(record.function, _args_of(record)) if record.function == self._function else None
                if key is not None:
                    self._note(key, record, has_failed=objectives and is_failure(record.out))

    def _note(self, key: bytes, record: JobRecord, *, has_failed: bool) -> None:
        if record.status == JobStatus.DONE.value and record.error is None and not has_failed:
            self._done.setdefault(key, record.id)
            self._open.pop(key, None)
        elif not JobStatus(record.status).is_terminal:
            self._open.setdefault(key, record.id)
        elif self._open.get(key) == record.id:
            del self._open[key]

    def answer(self, configuration: Mapping[str, Any], twins: dict[bytes, int], index: int) -> Known:
        key = _key(self._function, configuration)
        if key is None:
            return _NOTHING
        if key in self._done:
            (record,) = self._storage.get([self._done[key]])
            return Known(outcome=record.outcome, source=record.id, noted=record)
        if key in self._open:
            return Known(source=self._open[key])
        if key in twins:
            return Known(twin=twins[key])
        twins[key] = index
        return _NOTHING


_NOTHING: Final = Known()


def ended_too_often(record: JobRecord, most: int) -> Outcome | None:
    """Give the end of a job that was adopted, as its drivers ended while it ran; None while it may be run again.

    Args:
        record: as it was before.
        most: how often it may be run again.
    """
    attempts = record.attempts + (record.status == JobStatus.RUNNING.value)
    if attempts <= most:
        return None
    message = f"its driver ended {attempts} times while it ran, and max_attempts is {most}"
    return Outcome(error=JobError("worker_died", message, attempts=attempts))


def final_outcome(record: JobRecord) -> Outcome | None:
    """Give what became of a job; None when nothing has, or when it was stopped only because its evaluator ended."""
    if not JobStatus(record.status).is_terminal:
        return None
    if record.status == JobStatus.CANCELLED.value and record.error is not None:
        kind, message = record.error.kind, record.error.message
        if kind == "cancelled" or message.startswith(OUT_OF_BUDGET.message):
            return None
    return record.outcome


def _args_of(record: JobRecord) -> Mapping[str, Any]:
    args = record.args[0] if record.args else None
    return args if isinstance(args, Mapping) else {}


def _key(function: str | None, configuration: Mapping[str, Any]) -> bytes | None:
    try:
        return key_of(function, configuration)
    except UnstorableError:  # only a store in memory can hold it, and it is like no other
        return None
