"""What a storage already knows of a configuration: for ``resume`` and ``reuse``.

*Resume* goes on with a search: the k-th submission of a configuration meets the k-th record of it, whoever has made
that, and when. *Reuse* answers a configuration from any search of the storage, or joins one that is in flight.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from paraval.engine.known.answers import NOTHING, Answers, Known, key_for
from paraval.engine.known.owners import living_owners
from paraval.engine.reasons import OUT_OF_BUDGET, SURPLUS
from paraval.job import HPOJob, Job, JobStatus
from paraval.outcome import JobError, Outcome
from paraval.storage import JobChange, JobRecord, Storage

__all__ = ["Known", "Recall", "ended_too_often", "final_outcome", "number_of"]


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
        self._search_id = search_id
        self._function = function
        self._owner = owner
        self._resumes = resume
        self._max_attempts = max_attempts
        self._lock = threading.Lock()
        self._left: dict[tuple[bytes, bool], deque[JobRecord]] = {}
        self._revision = 0
        self._next = 0
        """Of the jobs of the search, the number of the first that was not looked at yet."""
        self._answers = Answers(storage, search_id, function) if reuse else None
        if resume:
            self._read()

    def look_up(
        self,
        configurations: Sequence[Mapping[str, Any]],
        job_class: type[Job],
        taken: list[JobRecord],
        *,
        is_private: bool,
    ) -> list[Known]:
        """Say of each configuration what is known. Open jobs of drivers that are gone are adopted.

        The records that the next submissions do not meet any more are added to ``taken``: where nothing comes of this
        one, they are to be given back with :meth:`give_back`. Where this raises, they are already.
        """
        try:
            with self._lock:
                if self._resumes:
                    self._read()
                found = [
                    self._resumed(configuration, job_class, taken, is_private=is_private)
                    for configuration in configurations
                ]
                return self._completed(found, configurations, job_class)
        except BaseException:
            self.give_back(taken, is_private=is_private)
            raise

    def meet_rivals(
        self,
        job_ids: Sequence[str],
        configurations: Sequence[Mapping[str, Any]],
        job_class: type[Job],
        taken: list[JobRecord],
        *,
        is_private: bool,
    ) -> list[Known | int]:
        """Look whether others have recorded the same between :meth:`look_up` and the insertion of records.

        What is recorded has a number, and the lower one comes first: so of two drivers that submit the same at the same
        moment, both see that it is the one's job, and that the other's record is the next of its configuration.

        Args:
            job_ids: of the new records, in the order of their numbers.
            configurations: theirs.
            job_class: of the jobs.
            taken: as of :meth:`look_up`.
            is_private: whether they are.

        Returns:
            For each configuration, what is known of it, or which of the new records stands for it.
        """
        met: list[Known | int] = list(range(len(job_ids)))
        if not self._resumes or not job_ids:
            return met
        before = len(taken)
        try:
            with self._lock:
                first = number_of(job_ids[0])
                if first == self._next:  # nobody came since the last look
                    self._next = first + len(job_ids)
                elif first > self._next:
                    self._read()
                if not self._left:
                    return met
                keys = [key_for(self._function, configuration) for configuration in configurations]
                for key in keys:
                    self._take(key, first, taken, is_private=is_private)
                rivals = taken[before:]
                if rivals:
                    found: list[Known | None] = [Known(record) for record in rivals]
                    self._adopt(rivals, found, job_class)
                    surplus = _arranged(met, keys, found)
                    self._set_aside([job_ids[index] for index in surplus], is_private=is_private)
                return met
        except BaseException:
            self.give_back(taken, before, is_private=is_private)
            raise

    def _take(self, key: bytes | None, before: float, taken: list[JobRecord], *, is_private: bool) -> JobRecord | None:
        """Take the next record of a configuration, if its number is lower than this one."""
        place = None if key is None else (key, is_private)
        records = None if place is None else self._left.get(place)
        if place is None or not records or number_of(records[0].id) >= before:
            return None
        record = records[0]
        taken.append(record)  # first, as Ctrl-C may come after it
        records.popleft()
        if not records:
            del self._left[place]
        return record

    def _set_aside(self, job_ids: list[str], *, is_private: bool) -> None:
        """Have new records that stand for nothing be met by the next submissions of their configurations, here too."""
        cancelled = JobStatus.CANCELLED.value
        self._storage.update([JobChange(it, status=cancelled, error=SURPLUS, by=self._owner) for it in job_ids])
        for record in self._storage.get(job_ids):
            self._give_back(record, is_private=is_private)

    def _read(self) -> None:
        """Take in the records that were made since the last time, but for those that were made here."""
        records, revision = self._storage.scan(self._search_id, self._revision)
        for record in sorted(records, key=lambda record: number_of(record.id)):
            number = number_of(record.id)
            if number < self._next:
                continue  # it has only changed: what is open is read again when it is met
            key = key_for(record.function, record.configuration) if record.function == self._function else None
            if key is not None and record.owner != self._owner:
                place = self._left.setdefault((key, record.is_private), deque())
                self._next = number + 1  # Ctrl-C cannot come between this and the next line
                place.append(record)
            self._next = number + 1
        self._revision = revision

    def give_back(self, taken: list[JobRecord], since: int = 0, *, is_private: bool) -> None:
        """Have records, from a place on, be met by the next submissions: this one came to nothing."""
        with self._lock:
            while len(taken) > since:
                self._give_back(taken[-1], is_private=is_private)
                taken.pop()

    def _give_back(self, record: JobRecord, *, is_private: bool) -> None:
        key = key_for(record.function, record.configuration)
        if key is not None:
            records = self._left.setdefault((key, is_private), deque())
            number = number_of(record.id)
            before = sum(number_of(other.id) < number for other in records)
            if before == len(records) or records[before].id != record.id:  # else the taking was interrupted
                records.insert(before, record)

    def _completed(
        self, found: list[Known | None], configurations: Sequence[Mapping[str, Any]], job_class: type[Job]
    ) -> list[Known]:
        self._adopt([known.record for known in found if known is not None and known.outcome is None], found, job_class)
        if self._answers is None:
            return [known or NOTHING for known in found]
        self._answers.update(objectives=issubclass(job_class, HPOJob))
        twins: dict[bytes, int] = {}
        return [
            known or self._answers.answer(configuration, job_class, twins, index)
            for index, (known, configuration) in enumerate(zip(found, configurations, strict=True))
        ]

    def _resumed(
        self, configuration: Mapping[str, Any], job_class: type[Job], taken: list[JobRecord], *, is_private: bool
    ) -> Known | None:
        key = key_for(self._function, configuration) if self._left else None
        record = self._take(key, math.inf, taken, is_private=is_private)
        return None if record is None else Known(record, final_outcome(record, job_class), record.id, record)

    def _adopt(self, records: Sequence[JobRecord | None], found: list[Known | None], job_class: type[Job]) -> None:
        """Take the open jobs over whose driver is gone; those whose driver is not are followed."""
        wanted = {record.id: record for record in records if record is not None}
        if not wanted:
            return
        # As they are now: they may have been read long ago.
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
                found[index] = Known(record, final_outcome(record, job_class), record.id, record)


def _arranged(met: list[Known | int], keys: Sequence[bytes | None], rivals: Sequence[Known | None]) -> list[int]:
    """Give each configuration the record of the lowest number that is left of its own; give the records left over."""
    pools: dict[bytes | None, deque[Known | int]] = {}
    for known in rivals:
        if known is not None and known.record is not None:
            pools.setdefault(key_for(known.record.function, known.record.configuration), deque()).append(known)
    for index, key in enumerate(keys):
        if key in pools:
            pools[key].append(index)
    for index, key in enumerate(keys):
        if key in pools:
            met[index] = pools[key].popleft()
    return [it for pool in pools.values() for it in pool if isinstance(it, int)]


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


def final_outcome(record: JobRecord, job_class: type[Job] = Job) -> Outcome | None:
    """Give what became of a job, for one of this class.

    Returns:
        None when nothing has become of it, or when it was stopped only because its evaluator ended.
    """
    if not JobStatus(record.status).is_terminal:
        return None
    if record.status == JobStatus.CANCELLED.value and record.error is not None:
        kind, message = record.error.kind, record.error.message
        if kind == "cancelled" or message.startswith(OUT_OF_BUDGET.message):
            return None
    return record.outcome_for(job_class)


def number_of(job_id: str) -> int:
    """Give the number of a job in its search."""
    return int(job_id.rpartition(".")[2])
