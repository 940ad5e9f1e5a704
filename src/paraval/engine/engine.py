"""The engine: a task group whose workers pull jobs from a memory channel and run them on the backend's slots.

It lives on one event loop, from :meth:`Engine.run`'s start to its end, and knows no backend by name. Whatever happens
to a job becomes an outcome, and every outcome goes to :class:`~paraval.engine.running.settling.Settling`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from paraval.backends.base import Backend, RunSpec
from paraval.ctrl_c import spared_ctrl_c
from paraval.engine.handover import Handover
from paraval.engine.ledger import Ledger
from paraval.engine.notify import Notifier
from paraval.engine.reasons import OUT_OF_BUDGET
from paraval.engine.recorder import Recorder
from paraval.engine.running.batching import Batching
from paraval.engine.running.deadlines import Deadlines
from paraval.engine.running.dispatch import Dispatch
from paraval.engine.running.following import Following
from paraval.engine.running.watch import MARGIN_S, Watch
from paraval.engine.running.workers import Workers
from paraval.errors import EvaluatorClosedError, UsageError
from paraval.job import Job, JobStatus
from paraval.loops import Doorbell, Loop
from paraval.outcome import JobError, Outcome
from paraval.storage import Storage
from paraval.storage.writer import Writer

__all__ = ["Engine", "EngineSettings"]

_TURN_S: Final = 0.005
_PAUSE_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is made of; the evaluator's own settings, and what outlives the engine.

    Attributes:
        owner: whose jobs they are.
        writer: the way to a storage that may be slow, or None.
        resumes: whether there may be jobs that a driver which is gone has left.
        execute: runs one job in place of the slot (an overridden ``Evaluator.execute``), or None.
    """

    backend: Backend
    spec: RunSpec
    ledger: Ledger
    notifier: Notifier
    storage: Storage
    writer: Writer | None
    owner: str
    num_workers: int
    job_timeout: float | None
    batching: Batching
    max_attempts: int
    resumes: bool
    execute: Callable[[Job], Awaitable[Job]] | None

    def prepare(self, jobs: int) -> None:
        """Begin what may begin before the loop has started: so many jobs will follow."""
        self.backend.prepare(self.spec, min(jobs, self.num_workers))


class Engine:
    """Runs jobs, on the loop that is its home. It can be made in any thread.

    ``submit``, ``cancel``, ``budget_changed`` and ``stop`` may be called from any thread.
    """

    def __init__(self, settings: EngineSettings, loop: Loop) -> None:
        self._settings = settings
        self._spec = settings.spec
        self._clock = settings.spec.clock
        self._ledger = settings.ledger
        self._doorbell = Doorbell(loop, self._broken)
        self._deadlines = Deadlines(self._clock, loop)
        self._recorder = Recorder(settings.storage, settings.writer, settings.owner, settings.notifier, settings.ledger)
        self._dispatch = Dispatch(settings, self._recorder, self._deadlines, loop)
        self._settling = self._dispatch.settling
        self._watch = Watch(settings, self._dispatch, self._deadlines)
        self._workers = Workers(settings, self._dispatch, self._watch, loop)
        self._following = Following(
            self._settling,
            self._dispatch.queue.put,
            self._recorder.fail,
            settings.storage,
            settings.owner,
            self._clock,
            loop,
            max_attempts=settings.max_attempts,
        )
        self._stopping = False
        self.ended = False

    # -- from any thread -----------------------------------------------------------------------------------------------

    @property
    def loop(self) -> Loop:
        """The loop it lives on."""
        return self._doorbell.loop

    def submit(
        self,
        jobs: Sequence[Job],
        outcomes: Mapping[str, Outcome],
        sources: Mapping[str, str],
        handover: Handover,
    ) -> None:
        """Queue jobs that the ledger expects.

        Args:
            jobs: in their order.
            outcomes: of the jobs that have ended already, by their ids.
            sources: the jobs that some of them follow, in place of being run.
            handover: by which they may be called off until they are here.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        if self.loop.is_here and self.loop.is_running:
            self._admit(jobs, outcomes, sources, handover)
        else:
            self._doorbell.ring(self._admit, jobs, outcomes, sources, handover)

    def cancel(self, job: Job, message: str) -> None:
        """Stop one job, wherever it is."""
        self._doorbell.ring(self._cancel, job, JobError("cancelled", message))

    def budget_changed(self) -> None:
        """Look at the spec's ``budget_end`` anew."""
        self._doorbell.ring(self._watch_budget)

    def stop(self) -> None:
        """Stop every job, then end."""
        self._doorbell.ring(self._begin_stop)

    def check(self) -> None:
        """Raise EvaluatorClosedError when the loop has gone without a word."""
        if not self.ended and not self.loop.is_running:
            raise EvaluatorClosedError("the event loop that runs the jobs was stopped under the evaluator")

    def running(self) -> tuple[int, float]:
        """Count the jobs that run now, and the seconds they have run so far."""
        now = self._clock()
        current = [worker.batch.current for worker in self._workers if worker.batch is not None]
        starts = [job._started for job in current if job is not None and job._started is not None]
        return len(starts), sum(now - start for start in starts)

    def give_up(self, *, closing: bool = True) -> None:
        """Settle what is left, from another thread, when the loop does not answer any more."""
        self._recorder.closing = closing  # else the jobs go to whoever gathers
        self._settling.settle_all(
            self._settling.open, JobError("cancelled", "the evaluator was closed; the job did not stop")
        )

    @property
    def given_back(self) -> list[Job]:
        """The jobs that were cancelled by the stop."""
        return self._recorder.given_back

    async def execute_on_slot(self, job: Job) -> Job:
        """Run a job that a worker has taken on that worker's slot; for an overridden ``Evaluator.execute``."""
        held = self._settling.open.get(job.id)
        worker = None if held is None else held._holder
        if worker is None:
            raise UsageError(f"no worker has job {job.id}: execute() is for the job that it was called with")
        return await worker.execute_on_slot(job)

    # -- the life of the engine ----------------------------------------------------------------------------------------

    async def run(self, started: Callable[[], object]) -> None:
        """Work until :meth:`stop`; ``started()`` is called when submissions are welcome."""
        try:
            if self.loop.is_asyncio and (task := asyncio.current_task()) is not None:
                self._spec.home_is_ending = lambda: task.cancelling() > 0
            async with anyio.create_task_group() as group:
                for function, name in (
                    (self._deadlines.watch, "paraval deadlines"),
                    (self._settings.backend.supervise, "paraval supervisor"),
                    (self._following.watch, "paraval following"),
                ):
                    group.start_soon(spared_ctrl_c(function, self.loop), name=name)
                self._watch_budget()
                started()
                while not self._stopping:
                    await self._workers.hire(group)
                    if not self._stopping:
                        await self._workers.until_wanted()
                await self._wind_up()
                group.cancel_scope.cancel()
        except BaseException as exc:
            if not self._recorder.closing:
                error = EvaluatorClosedError("the event loop or the task that runs the jobs ended under the evaluator")
                error.__cause__ = exc
                self._ledger.fail(error, lasting=False)  # what it left is settled below
            raise
        finally:
            self.end()

    def end(self) -> None:
        """Settle what is left, and be at an end: after :meth:`run`, or if that was never begun. Idempotent."""
        if self.ended:
            return
        self._doorbell.close()
        self._settling.settle_all(self._settling.open, JobError("cancelled", "the evaluator's event loop ended"))
        self._recorder.last_try()
        self._workers.ended()
        self.ended = True
        self._ledger.look_again()

    async def _wind_up(self) -> None:
        self._recorder.closing = True
        reason = JobError("cancelled", "the evaluator was closed")
        self._stop_everything(reason)
        with anyio.move_on_after(self._spec.kill_grace + MARGIN_S):
            if self._settling.open:
                await self._settling.all_settled.wait()
        self._settling.settle_all(self._settling.open, reason)
        await self._recorder.drained()

    # -- admitting -----------------------------------------------------------------------------------------------------

    def _admit(
        self,
        jobs: Sequence[Job],
        outcomes: Mapping[str, Outcome],
        sources: Mapping[str, str],
        handover: Handover,
    ) -> None:
        if not handover.take():  # whoever submits them was interrupted
            return
        self._settling.open.update(zip([job.id for job in jobs], jobs, strict=True))
        if outcomes or sources:
            now = self._clock()
            self._settling.settle([(job, outcomes[job.id], now) for job in jobs if job.id in outcomes])
            for job in jobs:
                if job.id in sources:
                    self._following.add(job, sources[job.id])
            jobs = [job for job in jobs if job.id not in outcomes and job.id not in sources]
        if self._clock() >= self._spec.budget_end:
            self._settling.settle_all([job.id for job in jobs], OUT_OF_BUDGET)
            return
        self._dispatch.queue.put(jobs)

    def _begin_stop(self) -> None:
        self._stopping = True
        self._workers.look_up()

    # -- time and cancellation -----------------------------------------------------------------------------------------

    def _watch_budget(self) -> None:
        if self._spec.budget_end < math.inf:
            self._deadlines.add(self._spec.budget_end, self._check_budget)

    def _check_budget(self, now: float) -> None:
        if now >= self._spec.budget_end:  # else it was moved, and another check comes
            self._stop_everything(OUT_OF_BUDGET)

    def _stop_everything(self, reason: JobError) -> None:
        settling = self._settling
        for worker in self._workers:
            # What a worker has not begun ends here: given back to the queue, another might begin it at once.
            waiting = [] if worker.batch is None else worker.batch.reclaim()
            self._ledger.started(-len(waiting))
            for job in waiting:
                job._holder = None
        for worker in self._workers:
            worker.hold_up()
        reasons = settling.reasons
        waiting = [job for job in settling.open.values() if job._holder is None and job.id not in reasons]
        for job in waiting:
            settling.reasons[job.id] = reason
            job._status = JobStatus.CANCELLING  # no worker takes it any more
        for worker in self._workers:
            for job in () if worker.batch is None else worker.batch.in_hand:
                self._watch.interrupt(worker, job, reason)
        if self._settings.notifier.callbacks:  # which may take long: what was interrupted shall be told first
            self._deadlines.add(self._clock() + _PAUSE_S, lambda _now: self._end_waiting(deque(waiting), reason))
        else:
            settling.settle_all([job.id for job in waiting], reason)
        if settling.open.keys() - settling.reasons.keys():  # a thread was taking one this very moment
            self._deadlines.add(self._clock() + 0.01, lambda now: self._stop_the_rest(reason, now))

    def _end_waiting(self, jobs: deque[Job], reason: JobError) -> None:
        """Settle jobs that nobody has begun, in turns with what stops those that run; but for a close all at once."""
        end = self._clock() + _TURN_S
        while jobs and self._clock() < end:
            count = len(jobs) if self._recorder.closing else 1
            self._settling.settle_all([jobs.popleft().id for _ in range(count)], reason)
        if jobs:
            self._deadlines.add(self._clock() + _PAUSE_S, lambda _now: self._end_waiting(jobs, reason))

    def _stop_the_rest(self, reason: JobError, now: float) -> None:
        if self._stopping or now >= self._spec.budget_end:
            self._stop_everything(reason)

    def _cancel(self, job: Job, reason: JobError, patience: int = 200) -> None:
        if job.id not in self._settling.open:
            return
        worker, is_sure = job._holder, True
        if worker is not None:
            is_sure = worker.hold_up()
            if job.id not in self._settling.open:
                return
            worker = job._holder  # none, if it was sent ahead
        batch = None if worker is None else worker.batch
        if worker is None or batch is None:
            self._settling.settle_all([job.id], reason)
        elif batch.withdraw(job):
            self._ledger.started(-1)
            self._settling.settle_all([job.id], reason)
        elif batch.current is job and is_sure:
            self._watch.interrupt(worker, job, reason)
        elif patience or job not in batch.in_hand:
            # It is being taken or was finished this very moment; or it was sent ahead, and the worker will soon say
            # that it runs, or give it back.
            self._deadlines.add(self._clock() + 0.001, lambda _now: self._cancel(job, reason, max(0, patience - 1)))
        else:
            batch.hurry = True
            self._watch.interrupt(worker, job, reason)

    def _broken(self, exc: BaseException) -> None:
        """A call from another thread failed: that is a defect of ours, and whoever waits must hear of it."""
        error = EvaluatorClosedError(f"the engine failed: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        self._ledger.fail(error)
        self._begin_stop()
