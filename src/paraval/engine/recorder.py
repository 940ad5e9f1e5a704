"""The last steps of a settled job: its record goes to the storage, callbacks hear of it, the ledger gets it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from paraval.backends.base import Returned
from paraval.engine.ledger import Ledger
from paraval.engine.notify import Notifier
from paraval.errors import StorageError
from paraval.job import Job, JobStatus
from paraval.loops import Loop
from paraval.outcome import JobError, Outcome, error_from_exception
from paraval.storage import JobChange, JobRecord, Storage, UnstorableError
from paraval.storage.records import JobEnds
from paraval.storage.writer import RobbedError, Writer
from paraval.submission import submissions_of

__all__ = ["Recorder"]

_logger = logging.getLogger("paraval")

# Enum's own look-up of a member costs more than anything else that is done with it here.
_RUNNING: Final = JobStatus.RUNNING.value
_DONE: Final = JobStatus.DONE.value
_CANCELLED: Final = JobStatus.CANCELLED


class Recorder:
    """Shows nothing as done that is not saved.

    With a storage that answers at once, all of it is done where a job is settled; with any other, in the thread of the
    writer, when the record has been written.

    Args:
        storage: where the records are.
        writer: the way to a storage that may be slow; None: it is called directly.
        owner: whose jobs they are; a job that was given to another is that one's to record.

    Attributes:
        closing: whether the evaluator is being closed: jobs that are cancelled then go to whoever closes it.
        given_back: those jobs.
    """

    def __init__(self, storage: Storage, writer: Writer | None, owner: str, notifier: Notifier, ledger: Ledger) -> None:
        self._storage = storage
        self._writer = writer
        self._owner = owner
        self._notifier = notifier
        self._ledger = ledger
        self._unsaved: list[list[Job]] = []
        self._gives_up = False
        self.closing = False
        self.given_back: list[Job] = []

    def note_running(self, job: Job) -> bool:
        """Store that a job runs; False when the storage failed, so that it must not."""
        change = JobChange(job.id, status=_RUNNING, by=self._owner)
        if self._writer is not None:
            self._writer.put_later(change)
            return True
        try:
            self._storage.update([change])
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            self.fail(exc)
            return False
        return True

    def mark(self, job: Job, marked: Callable[[], object]) -> bool:
        """Store that a job runs, before it does: it may end this program, as it may have ended another.

        Returns:
            Whether it is stored; else ``marked()`` is called, in any thread, when it is.
        """
        change = JobChange(job.id, status=_RUNNING, by=self._owner)
        if self._writer is None:
            return True  # what is in memory ends with the program

        def written(failure: Exception | None) -> None:
            if failure is not None:
                self.fail(failure)
            marked()

        self._writer.put([change], written)
        return False

    def record(self, jobs: list[Job]) -> None:
        """Store the end of jobs, and hand them over."""
        if self._writer is not None:
            self._writer.put(self._changes(jobs), functools.partial(self._written, jobs))
            return
        try:
            if len(jobs) == 1:  # what is made for many costs a job that comes alone twice as much
                self._storage.update(self._changes(jobs))
            else:
                self._storage.end_jobs(self._ends(jobs))
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            self._written(jobs, exc)
        else:
            self._hand_over(jobs)

    def record_returned(self, group: Returned) -> None:
        """Do so for jobs of the plain class that have returned what they have as their output."""
        jobs, ids = group.jobs, group.ids
        if self._writer is not None or self._notifier.callbacks:
            self.record(list(jobs))
            return
        ends = JobEnds(ids, [_DONE] * len(ids), group.values, [None] * len(ids), self._metadata_of(jobs), self._owner)
        try:
            self._storage.end_jobs(ends)
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            self._written(list(jobs), exc)
        else:
            self._ledger.deliver_returned(group)

    def _changes(self, jobs: list[Job]) -> list[JobChange]:
        owner = self._owner
        return [
            # Enum.value would be a detour.
            JobChange(
                job.id,
                status=job._status._value_,
                out=job.output if type(job) is Job else _out(job),  # asking it would be another detour
                error=job.error,
                metadata=job.metadata,
                by=owner,
            )
            for job in jobs
        ]

    def _ends(self, jobs: list[Job]) -> JobEnds:
        return JobEnds(
            [job.id for job in jobs],
            [job._status._value_ for job in jobs],
            [job.output if type(job) is Job else _out(job) for job in jobs],  # asking it would be another detour
            [job.error for job in jobs],
            self._metadata_of(jobs),
            self._owner,
        )

    def _metadata_of(self, jobs: Sequence[Job]) -> list[dict[str, Any]] | None:
        """Give the metadata of jobs; None if the storage has it, in the dicts that they were submitted with."""
        if self._storage.keeps_dicts:
            submissions = submissions_of(jobs)
            if not any(submission is None or submission.is_renoted for submission in submissions):
                return None
        return [job.metadata for job in jobs]

    async def drained(self) -> None:
        """Wait until all that was to be recorded so far is recorded, or cannot be."""
        if self._writer is not None:
            loop = Loop.running()
            event = loop.event()
            self._writer.put((), lambda _failure: loop.call_soon(event.set))
            await event.wait()

    def last_try(self) -> None:
        """At the end of the engine: try once more to store what the storage had refused."""
        self._gives_up = True
        unsaved, self._unsaved = self._unsaved, []
        for jobs in unsaved:
            self.record(jobs)

    def _written(self, jobs: list[Job], failure: Exception | None) -> None:
        if failure is None:
            self._hand_over(jobs)
        elif isinstance(failure, RobbedError):
            for job in jobs:
                if job.id in failure.records:
                    _give_up(job, failure.records[job.id])
            self._hand_over(jobs)
        elif isinstance(failure, UnstorableError):
            self._record_failure(jobs, failure)
        elif self._gives_up:
            _logger.error("never saved: %s", ", ".join(job.id for job in jobs))
            self._ledger.deliver(jobs, mail=False)
        else:
            self._unsaved.append(jobs)
            self.fail(failure)

    def _record_failure(self, jobs: list[Job], failure: UnstorableError) -> None:
        """Record a job whose output cannot be stored as failed by that; of several, one or more are."""
        if len(jobs) > 1:
            for job in jobs:
                self.record([job])
            return
        (job,) = jobs
        if job.error is not None:  # so it is the metadata
            job.metadata = {key: job.metadata[key] for key in ("timestamp_submit",) if key in job.metadata}
        job.set_error(error_from_exception(failure)._replace(type="TypeError", traceback=""))
        self.record(jobs)

    def _hand_over(self, jobs: list[Job]) -> None:
        stopped = [job for job in jobs if job._status is _CANCELLED] if self.closing else []
        if stopped:  # before callbacks, which may take longer than whoever closes waits
            self.given_back += [job for job in stopped if not self._ledger.is_private(job)]
        if self._notifier.callbacks:
            for job in jobs:
                self._notifier.call("on_done", job)
        if stopped:
            self._ledger.deliver(stopped, mail=False)
            jobs = [job for job in jobs if job._status is not _CANCELLED]
        self._ledger.deliver(jobs)

    def fail(self, exc: Exception) -> None:
        """Stop: the storage has failed, and whoever waits hears of it."""
        _logger.error("the storage failed, so no result can be acknowledged", exc_info=exc)
        error = StorageError(f"the storage failed, so no result can be acknowledged: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        self._ledger.fail(error)


def _out(job: Job) -> Any:
    try:
        return job.stored_output
    except Exception:  # noqa: BLE001 - a subclass's is user code; the job has failed by that already
        return None


def _give_up(job: Job, record: JobRecord) -> None:
    """Have a job show its record, which another driver writes: this one was taken to be gone."""
    job.error, job.output = None, None
    if JobStatus(record.status).is_terminal:
        job.settle(record.outcome_for(type(job)))
        job.restored = True
    else:
        message = "another driver has taken the job over, as this one could not say that it lives; it has the result"
        job.settle(Outcome(error=JobError("cancelled", message), cancelled=True))
