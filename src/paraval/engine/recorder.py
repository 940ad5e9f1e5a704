"""The last steps of a settled job: its record goes to the storage, callbacks hear of it, the ledger gets it."""

from __future__ import annotations

import logging

from paraval.engine.ledger import Ledger
from paraval.engine.notify import Notifier
from paraval.errors import StorageError
from paraval.job import Job, JobStatus
from paraval.storage import JobChange, Storage

__all__ = ["Recorder"]

_logger = logging.getLogger("paraval")


class Recorder:
    """Shows nothing as done that is not saved.

    Attributes:
        closing: whether the evaluator is being closed: jobs that are cancelled then go to whoever closes it.
        given_back: those jobs.
    """

    def __init__(self, storage: Storage, notifier: Notifier, ledger: Ledger) -> None:
        self._storage = storage
        self._notifier = notifier
        self._ledger = ledger
        self._unsaved: list[list[Job]] = []
        self.closing = False
        self.given_back: list[Job] = []

    def note_running(self, job: Job) -> bool:
        """Store that a job runs; False when the storage failed, so that it must not."""
        try:
            self._storage.update([JobChange(job.id, status=JobStatus.RUNNING.value)])
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            self._fail(exc)
            return False
        return True

    def record(self, jobs: list[Job]) -> None:
        """Store the end of jobs, and hand them over."""
        try:
            self._storage.update(
                [
                    JobChange(
                        job.id, status=job._status.value, out=job.stored_output, error=job.error, metadata=job.metadata
                    )
                    for job in jobs
                ]
            )
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            self._unsaved.append(jobs)
            self._fail(exc)
            return
        if self._notifier.callbacks:
            for job in jobs:
                self._notifier.call("on_done", job)
        if self.closing:
            stopped = [job for job in jobs if job._status is JobStatus.CANCELLED]
            self.given_back += [job for job in stopped if not self._ledger.is_private(job)]
            self._ledger.deliver(stopped, mail=False)
            jobs = [job for job in jobs if job._status is not JobStatus.CANCELLED]
        self._ledger.deliver(jobs)

    def last_try(self) -> None:
        """At the end of the engine: try once more to store what the storage had refused."""
        unsaved, self._unsaved = self._unsaved, []
        for jobs in unsaved:
            self.record(jobs)
        for jobs in self._unsaved:
            _logger.error("never saved: %s", ", ".join(job.id for job in jobs))
            self._ledger.deliver(jobs, mail=False)

    def _fail(self, exc: Exception) -> None:
        _logger.error("the storage failed, so no result can be acknowledged", exc_info=exc)
        error = StorageError(f"the storage failed, so no result can be acknowledged: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        self._ledger.fail(error)
