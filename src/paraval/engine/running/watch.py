"""Looking after the batches that run: jobs that take too long are stopped, and hold up no other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from paraval.backends.base import Batch
from paraval.engine.reasons import out_of_time
from paraval.engine.running.batching import STALL_S
from paraval.engine.running.deadlines import Deadlines
from paraval.engine.running.dispatch import Dispatch
from paraval.job import Job, JobStatus
from paraval.outcome import JobError

if TYPE_CHECKING:
    from paraval.engine.engine import EngineSettings
    from paraval.engine.running.worker import Worker

__all__ = ["MARGIN_S", "Watch"]

MARGIN_S: Final = 0.4
"""How long after the grace a job may take to be seen ended before it is given up."""


_DOUBT_S: Final = 0.2


class Watch:
    """Over all workers of one engine. On the engine's loop.

    Args:
        settings: the time that a job may take.
        dispatch: where jobs go that a stalled batch has not begun.
        deadlines: calls it when there is something to look at.
    """

    def __init__(self, settings: EngineSettings, dispatch: Dispatch, deadlines: Deadlines) -> None:
        self._limit = settings.job_timeout
        self._spec = settings.spec
        self._clock = settings.spec.clock
        self._dispatch = dispatch
        self._settling = dispatch.settling
        self._deadlines = deadlines

    def begin(self, worker: Worker, batch: Batch) -> None:
        """Keep an eye on a batch: one check for each worker at a time, however many batches it runs."""
        if worker.is_watched or (self._limit is None and (batch.in_order or len(batch) == 1)):
            return
        due = self._next_check(batch)
        if due is not None:
            worker.is_watched = True
            self._deadlines.add(due, lambda now: self._check(worker, now))

    def interrupt(self, worker: Worker, job: Job, reason: JobError) -> None:
        """Make a running job stop; it is settled when it has, or when it would not."""
        settling = self._settling
        if job.id in settling.reasons or job.id not in settling.open:
            return
        settling.reasons[job.id] = reason
        settling.stopped_at[job.id] = self._clock()
        job._status = JobStatus.CANCELLING
        if worker.batch is not None:
            self._dispatch.take_back(worker.batch)  # or a thread that stops in time would go on with them
        worker.scope.cancel()
        due = self._clock() + self._spec.kill_grace + MARGIN_S
        self._deadlines.add(due, lambda now: settling.give_up(job, now))

    def _check(self, worker: Worker, now: float) -> float | None:
        """Look at what the worker runs now; give the time of the next look, None when none is needed."""
        again = None if worker.batch is None else self._look(worker, worker.batch, now)
        worker.is_watched = again is not None
        return again

    def _look(self, worker: Worker, batch: Batch, now: float) -> float | None:
        if now - batch.created >= STALL_S:
            self._dispatch.progress(batch)
        if batch.waits_for_worker:
            return now + STALL_S
        if not self._is_overdue(batch, now):
            batch.is_overdue = False
            due = self._next_check(batch)
            return None if due is None else max(due, now + 0.001)
        if not batch.is_overdue:
            # This loop may have been kept from its work: what the worker has said lately is to be taken in first.
            batch.is_overdue = True
            return now + 0.001
        job = batch.current
        return self._pin_down(worker, batch, now) if job is None else self._strike(worker, batch, job, now)

    def _is_overdue(self, batch: Batch, now: float) -> bool:
        """Whether the job that runs has had its time; where it is not known which one does, whether one may have."""
        if self._limit is None or not batch.in_hand:
            return False
        job = batch.current
        start = batch.created if job is None else job._started
        return start is not None and now - start >= self._limit

    def _pin_down(self, worker: Worker, batch: Batch, now: float) -> float | None:
        """Find out which of several jobs holds its worker in such a grip that it cannot even say which, and stop it."""
        limit = self._limit or 0.0
        began = worker.pin_down(now - limit)
        if began is not None and began >= now - limit:
            return max(began + limit, now + 0.001)
        self._dispatch.progress(batch)
        if batch.current is not None:
            return self._strike(worker, batch, batch.current, now)
        if now - batch.created < limit + STALL_S:
            return now + 0.001
        batch.hurry = True  # each is run alone then
        worker.scope.cancel()
        return None

    def _strike(self, worker: Worker, batch: Batch, job: Job, now: float) -> float | None:
        """Stop a job that has had its time, unless it has ended after all."""
        limit = self._limit or 0.0
        is_sure = worker.hold_up()
        if job.id not in self._settling.open or batch.current is not job:
            return now + 0.001  # it has just ended
        if not is_sure and now - (job._started or now) < limit + _DOUBT_S:
            return now + 0.001  # it has, and that is on its way
        if not is_sure:
            batch.hurry = True
        self.interrupt(worker, job, out_of_time(limit))
        return None

    def _next_check(self, batch: Batch) -> float | None:
        limit = self._limit
        due = batch.created + STALL_S if batch.waiting or batch.waits_for_worker else math.inf
        if limit is not None:
            job = batch.current
            start = job._started if job is not None else None
            due = min(due, (batch.created if start is None else start) + limit)
        return None if due == math.inf else due
