"""Between the queue and the workers: jobs go out in batches, and those that did not end come back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from paraval.backends.base import Batch, WorkerDiedError
from paraval.engine.recorder import Recorder
from paraval.engine.running.attempts import Attempts
from paraval.engine.running.batching import BatchSizer
from paraval.engine.running.deadlines import Deadlines
from paraval.engine.running.queue import JobQueue
from paraval.engine.running.settling import Settling
from paraval.job import Job, JobStatus
from paraval.loops import Loop
from paraval.outcome import JobError, Outcome, error_from_exception

if TYPE_CHECKING:
    from paraval.engine.engine import EngineSettings
    from paraval.engine.running.worker import Worker

__all__ = ["Dispatch", "unfinished"]

_READY: Final = JobStatus.READY
_LIMIT_S: Final = 1.0
"""Where jobs may run for no longer than this, it shall be known soon which one does."""
_LAP: Final = 4
_LAP_S: Final = 0.050


class Dispatch:
    """What the workers of one engine share. On the engine's loop.

    Attributes:
        queue: where the workers pull from.
        settling: where jobs end.
        last_turn: when a worker last let the loop's other tasks run, on the clock.
    """

    def __init__(self, settings: EngineSettings, recorder: Recorder, deadlines: Deadlines, loop: Loop) -> None:
        self._settings = settings
        self._clock = settings.spec.clock
        self._ledger = settings.ledger
        self._recorder = recorder
        self._deadlines = deadlines
        self._loop = loop
        self._sizer = BatchSizer(
            settings.batching,
            settings.num_workers,
            settings.backend.batch_limit,
            is_far=settings.backend.is_far and (settings.job_timeout or math.inf) > _LIMIT_S,
            may_be_long=not settings.ledger.counts_pending,  # one that is sent ahead is not pending
        )
        self._attempts = Attempts(settings.max_attempts)
        self.queue = JobQueue(loop)
        if self._sizer.is_far:
            self.queue.on_lack = self._share
        # Those that may have jobs ahead, and since when they have not begun any of them; in the order of these times.
        self._stocked: dict[Worker, float] = {}
        self.settling = Settling(
            recorder, self._attempts, self._try_again, self._clock, loop, job_timeout=settings.job_timeout
        )
        self.last_turn = 0.0

    # -- out -----------------------------------------------------------------------------------------------------------

    async def mark(self, job: Job) -> None:
        """Have it stored that a job that a driver left runs, before it does: it may be what ended that driver."""
        job._is_adopted = False
        stored = self._loop.event()
        if not self._recorder.mark(job, lambda: self._loop.call_soon(stored.set)):
            await stored.wait()

    def batch_for(self, worker: Worker, first: Job) -> Batch | None:
        """Make a batch of a job that was pulled and, where jobs are tiny, of some that wait behind it.

        Returns:
            None when none of them is to run: they were cancelled while they waited, or the storage has failed.
        """
        if self._stocked:
            self._take_from_the_slow()
        sizer = self._sizer
        alone = self._settings.execute is not None or first._is_adopted or self._attempts.is_suspect(first)
        in_order = sizer.in_order and not alone
        size = 1 if alone or in_order else sizer.next_size(len(self.queue) + 1)
        jobs = _ready([first, *self._pull_like(size - 1)]) if size > 1 else [first] if first._status is _READY else []
        if not jobs or not self._note_start(worker, jobs):
            return None
        # What idle workers are about to pull is no more for this one; and to be told of more costs a lone job much.
        has_more = sizer.sends_ahead and not alone and len(self.queue) > self.queue.idle
        batch = Batch(
            jobs,
            self._clock,
            worker.progress,
            in_order=in_order,
            hold_s=sizer.hold_s,
            pace_s=sizer.pace_s,
            more=functools.partial(self._stock_up, worker) if has_more else None,
        )
        batch.noted = jobs[0] if len(jobs) == 1 else None
        return batch

    def _pull_like(self, most: int) -> list[Job]:
        """Pull jobs that need not be run alone."""
        jobs = self.queue.pull_many(most)
        if self._attempts or self._settings.resumes:
            is_suspect = self._attempts.is_suspect
            alone = next((it for it, job in enumerate(jobs) if job._is_adopted or is_suspect(job)), None)
            if alone is not None:
                self.queue.put_back(jobs[alone:])
                del jobs[alone:]
        return jobs

    def _stock_up(self, worker: Worker, batch: Batch, most: int) -> Sequence[Job]:
        """Give a worker more jobs while it is at others, at most so many."""
        self._learn(batch)
        self._stocked.pop(worker, None)
        self._take_from_the_slow()
        jobs = self._more_for(worker, batch, most)
        if jobs or batch.stock > 1:
            self._stocked[worker] = self._clock()
        return jobs

    def _more_for(self, worker: Worker, batch: Batch, most: int) -> Sequence[Job]:
        sizer = self._sizer
        if not self.queue or not sizer.sends_ahead or sizer.in_order != batch.in_order or worker.scope.cancel_called:
            return ()
        count = min(most, sizer.next_stock(batch.stock, len(self.queue)))
        jobs = _ready(self._pull_like(count)) if count > 0 else []
        if not jobs:
            return ()
        batch.pace_s = sizer.pace_s
        self._hand_to(worker, jobs)
        return jobs

    def _take_from_the_slow(self) -> None:
        """Have workers give back what they have ahead and do not begin, as they are at a job that takes long."""
        while self._stocked:
            worker, since = next(iter(self._stocked.items()))
            if self._clock() - since < self._sizer.patience_s:
                return
            del self._stocked[worker]
            worker.hold_up()

    def _share(self) -> None:
        """For a worker that finds no job: have others give back what they have ahead."""
        while self._stocked and not self.queue:
            worker, _ = self._stocked.popitem()
            worker.hold_up()

    def _hand_to(self, worker: Worker, jobs: Sequence[Job]) -> None:
        self._ledger.started(len(jobs))
        for job in jobs:
            job._holder = worker

    def _note_start(self, worker: Worker, jobs: list[Job]) -> bool:
        self._hand_to(worker, jobs)
        # The tiny jobs of a batch are spared the write, unless one turns out not to be tiny.
        if len(jobs) > 1 or self._recorder.note_running(jobs[0]):
            return True
        for job in jobs:  # they do not run: they wait for the end, which settles them
            job._holder = None
        self._ledger.started(-len(jobs))
        return False

    # -- back ----------------------------------------------------------------------------------------------------------

    def progress(self, batch: Batch) -> None:
        """Take what a batch that runs has to hand in: jobs that ended, jobs for other workers."""
        self.settling.settle(batch.collect())
        self._give_back(batch.reclaim())
        current = batch.current
        if current is not None and current is not batch.noted:  # it was sent ahead, or was thought to be tiny
            batch.noted = current
            self._recorder.note_running(current)

    def put_away(self, batch: Batch) -> None:
        """Take back what a batch that is through has left, and learn from it. Its outcomes are still to collect."""
        if batch.in_hand:  # the slot says it is through, and is not: nobody else knows that it has them
            self.blame(batch, unfinished())
            return
        self._give_back(batch.reclaim())
        now = self._clock()
        if batch.has_waited:
            self.last_turn = now
        if self._sizer.is_far:
            self._learn(batch)
        elif not batch.was_cut:
            self._sizer.learn(len(batch), now - batch.created)

    def _learn(self, batch: Batch) -> None:
        """Learn from the jobs that a worker far away has ended lately, by its clock; from one alone if it is long."""
        lap = batch.lap(_LAP, _LAP_S) if batch.in_order else batch.lap()
        if lap is not None:
            self._sizer.learn(*lap)

    def take_back(self, batch: Batch) -> None:
        """Take back, from a batch that goes on or will, the jobs that its worker has not begun."""
        self._give_back(batch.reclaim())

    def blame(self, batch: Batch, failure: Exception) -> None:
        """After the death of a worker: its only job is to blame. Of several, any may be: each is run alone.

        Args:
            batch: put away by this.
            failure: what the slot raised. Any but a WorkerDiedError says that the slot itself failed.
        """
        if isinstance(failure, WorkerDiedError):
            error, alone = failure.error, failure.alone
        else:
            error, alone = error_from_exception(failure)._replace(kind="worker_died"), True
            if not batch.in_hand:  # before it took any: with none to blame, it would fail for ever
                batch.take_all(1)
        batch.was_cut = True
        self.settling.settle(batch.collect())
        jobs = batch.in_hand
        if jobs and alone and (len(jobs) == 1 or batch.in_order):
            self.settling.settle([(jobs[0], Outcome(error=error, may_retry=True), self._clock())])
            self._give_back(jobs[1:])  # which it had not begun
        else:
            self._attempts.suspect(jobs)
            self._give_back(jobs)
        self._give_back(batch.reclaim())

    def break_off(self, batch: Batch) -> None:
        """After an interrupted batch: settle what was to be stopped, take the others back."""
        settling, now = self.settling, self._clock()
        settling.settle(batch.collect())
        in_hand, reasons = batch.in_hand, settling.reasons
        stopped = [(job, Outcome(error=reasons[job.id], cancelled=True), now) for job in in_hand if job.id in reasons]
        others = [job for job in in_hand if job.id not in reasons]
        if self._settings.backend.cancellation == "cooperative":
            for job, _, _ in stopped:  # a call that nothing can end goes on, and keeps its slot
                settling.give_up(job, now)
        settling.settle(stopped)
        self._attempts.suspect(others)  # the worker was killed, and not for what is known of them
        self._give_back(batch.reclaim() + others)

    def _give_back(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        settling = self.settling
        jobs = [job for job in jobs if job.id in settling.open]  # the others were settled meanwhile: given up, say
        if not jobs:
            return
        self._ledger.started(-len(jobs))
        for job in jobs:
            job._holder, job._started, job._status = None, None, JobStatus.READY
        reasons, now = settling.reasons, self._clock()
        stopped = [job for job in jobs if job.id in reasons]  # given back by a worker that was being stopped
        if stopped:
            jobs = [job for job in jobs if job.id not in reasons]
            settling.settle([(job, Outcome(error=reasons[job.id], cancelled=True), now) for job in stopped])
        if not self._recorder.closing:  # else they were settled, or will be
            self.queue.put_back(jobs)

    # -- once more -----------------------------------------------------------------------------------------------------

    def _try_again(self, job: Job, pause: float) -> None:
        job._started, job._status = None, JobStatus.READY
        self._ledger.started(-1)  # from now on it waits, first for its time and then for a worker
        self._deadlines.add(self._clock() + pause, lambda _now: self._requeue(job))

    def _requeue(self, job: Job) -> None:
        if job.id in self.settling.open and job._holder is None:
            self.queue.put_back([job])


def _ready(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job._status is _READY]  # the others were cancelled while they waited


def unfinished() -> WorkerDiedError:
    """Make the error for a job that its slot has left unfinished, without a word."""
    return WorkerDiedError(JobError("worker_died", "the worker went on without having finished the job"))
