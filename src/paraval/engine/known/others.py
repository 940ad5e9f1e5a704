"""The jobs that other evaluators on the same search have finished."""

from __future__ import annotations

import threading
from typing import Final

from paraval.engine.reasons import SURPLUS
from paraval.job import Job, JobContext, JobStatus
from paraval.storage import JobRecord, Storage

__all__ = ["Others"]

_TERMINAL: Final = frozenset(status.value for status in JobStatus if status.is_terminal)


class Others:
    """Gives each of them once, at a cost in proportion to what is new. Usable from any thread.

    Args:
        storage: where they are recorded.
        search_id: the search.
        owner: whose jobs are not others'.
    """

    def __init__(self, storage: Storage, search_id: str, owner: str) -> None:
        self._storage = storage
        self._search_id = search_id
        self._owner = owner
        self._lock = threading.Lock()
        self._revision = 0
        self._seen: set[tuple[str, bool]] = set()

    def gather(self, job_class: type[Job], context: JobContext, known: set[str]) -> list[Job]:
        """Make jobs of what others have finished since the last call.

        Args:
            job_class: what to make.
            context: what surrounds them.
            known: ids of jobs that were had in another way: they are left out.
        """
        with self._lock:
            records, revision = self._storage.scan(self._search_id, self._revision)
            news = [record for record in records if self._is_news(record) and record.id not in known]
            jobs = [self._job(record, job_class, context) for record in news]
            # Not before: what raises is to be met again.
            self._revision = revision
            self._seen.update(map(_seen, news))  # a record may change again: a note in the metadata, say
        return jobs

    def _is_news(self, record: JobRecord) -> bool:
        is_mine = record.owner == self._owner or record.is_private or record.error == SURPLUS
        return not is_mine and record.status in _TERMINAL and _seen(record) not in self._seen

    def _job(self, record: JobRecord, job_class: type[Job], context: JobContext) -> Job:
        job = job_class(record.id, dict(record.configuration), None, self._storage)
        job.context = context
        job.metadata.update(record.metadata or {})
        # As an outcome, since an output that is none for this class of jobs must not hide the other jobs.
        job.settle(record.outcome_for(job_class))
        return job


def _seen(record: JobRecord) -> tuple[str, bool]:
    """What is given once: a job, and once more when it has been run after it was stopped with its evaluator."""
    return record.id, record.status == JobStatus.DONE.value
