"""What becomes of jobs when they are gathered: each is stamped and counted once, and the storage and callbacks hear."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import anyio

from paraval.engine.ledger import Ledger
from paraval.engine.notify import Notifier
from paraval.job import Job
from paraval.loops import call_in_common_thread
from paraval.storage import JobChange
from paraval.storage.writer import Writer
from paraval.submission import Submission, submissions_of

__all__ = ["Gathered"]


class Gathered:
    """The jobs of one evaluator that were gathered. Usable from any thread.

    Args:
        ledger: where they come from.
        notifier: tells the callbacks.
        writer: notes when they were gathered; None: the storage has that by reference.
        owner: of the jobs.
        clock: seconds since the evaluator was created.

    Attributes:
        ids: of all that are not private, and of those of others.
        undumped: those that were not written to a file yet.
        restored: ids of those that had ended before, under another driver.
        count: how many, private ones too.
    """

    def __init__(
        self, ledger: Ledger, notifier: Notifier, writer: Writer | None, owner: str, clock: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._notifier = notifier
        self._writer = writer
        self._owner = owner
        self._clock = clock
        self._counting = threading.Lock()
        self.ids: list[str] = []
        self.undumped: list[Job] = []
        self.restored: set[str] = set()
        self.count = 0

    def add(self, jobs: list[Job], *, are_private: bool = False) -> None:
        """Note jobs that were taken from the mailbox, or are private ones that have ended."""
        self._tell(self.stamp(jobs, are_private=are_private))

    async def add_async(self, jobs: list[Job], *, are_private: bool = False) -> None:
        """Do the same; a callback, which may write to a disk, does not block the loop."""
        fresh = self.stamp(jobs, are_private=are_private)
        if not self._notifier.callbacks:
            self._tell(fresh)
            return
        try:
            with anyio.CancelScope(shield=True):
                await call_in_common_thread(self._tell, fresh)
        except BaseException:  # asyncio's own task.cancel() goes through any shield; the thread goes on
            self._ledger.put_back(jobs)
            raise

    def stamp(self, jobs: list[Job], *, are_private: bool = False) -> list[Job]:
        """Note the time; give the jobs that are gathered for the first time (a close may have shown some already)."""
        now = self._clock()
        fresh = list(jobs) if len(jobs) > 1 and self._stamp_together(jobs, now) else self._stamp_each(jobs, now)
        with self._counting:
            self.count += len(fresh)
        if not are_private:  # of a service that evaluates for months, nothing must stay
            self.ids += [job.id for job in fresh]
            self.undumped += fresh
        return fresh

    @staticmethod
    def _stamp_together(jobs: list[Job], now: float) -> bool:
        """Stamp jobs that are all that were submitted with them; False, and nothing is stamped, if not so."""
        whole: list[Submission] = []
        for submission in submissions_of(jobs):
            if submission is None or submission.is_apart or submission.is_renoted:
                return False
            if submission.notes.gathered is not None:
                return False
            whole.append(submission)
        if sum(len(submission.ids) for submission in whole) != len(jobs):
            return False
        for submission in whole:
            submission.notes.note_gathered(now)
        return True

    def _stamp_each(self, jobs: list[Job], now: float) -> list[Job]:
        fresh = [job for job in jobs if job._gathered_at is None]
        for job in fresh:
            job._gathered = now
            if job.restored:
                self.restored.add(job.id)  # they are as many as the records that others have made
            else:
                job.metadata["timestamp_gather"] = now
        for submission in submissions_of(fresh):
            if submission is not None:
                submission.is_apart = True
        return fresh

    def _tell(self, fresh: list[Job]) -> None:
        if self._writer is not None:
            self._writer.put_later_made(functools.partial(_notes_of, fresh, self._owner))
        if self._notifier.callbacks:
            self._notifier.call("on_gather", fresh, [])


def _notes_of(gathered: list[Job], owner: str) -> list[JobChange]:
    return [
        JobChange(job.id, metadata={"timestamp_gather": job._gathered_at}, by=owner)
        for job in gathered
        if not job.restored
    ]
