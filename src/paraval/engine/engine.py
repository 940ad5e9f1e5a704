"""The engine: a task group whose workers pull jobs from a memory channel and run them on the backend's slots.

It lives on one event loop, from :meth:`Engine.run`'s start to its end, and knows no backend by name. Whatever happens
to a job becomes an outcome, and every outcome is settled in :meth:`Engine._settle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from paraval.backends.base import Backend, Batch, Ended, RunSpec, Slot, WorkerDiedError, failure_of
from paraval.engine.batching import STALL_S, Batching, BatchSizer
from paraval.engine.deadlines import Deadlines
from paraval.engine.ledger import Ledger
from paraval.engine.notify import Notifier
from paraval.engine.queue import JobQueue
from paraval.engine.recorder import Recorder
from paraval.errors import EvaluatorClosedError
from paraval.job import Job, JobStatus
from paraval.loops import Doorbell, Loop
from paraval.outcome import JobError, Outcome, error_from_exception
from paraval.storage import Storage

__all__ = ["Engine", "EngineSettings"]

_MARGIN_S: Final = 0.4
"""How long after the grace a job may take to be seen ended before it is given up."""
_BACK_OFF_S: Final = 0.1
_BACK_OFF_MOST_S: Final = 30.0
_HIRE_AT_ONCE: Final = 64
_YIELD_S: Final = 0.001
"""Workers whose jobs never wait let the loop's other tasks run this often."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is made of; the evaluator's own settings, and what outlives the engine.

    Attributes:
        execute: runs one job in place of the slot (an overridden ``Evaluator.execute``), or None.
    """

    backend: Backend
    spec: RunSpec
    ledger: Ledger
    notifier: Notifier
    storage: Storage
    num_workers: int
    job_timeout: float | None
    batching: Batching
    max_attempts: int
    execute: Callable[[Job], Awaitable[Job]] | None


class _Worker:
    """One worker: its slot, what it runs, and the scope that interrupts it."""

    __slots__ = ("batch", "report", "scope", "slot", "watched")

    # Slot and scope are made by the worker's own task: where the worker is hired there may be no task.
    slot: Slot
    scope: anyio.CancelScope

    def __init__(self, report: Callable[[_Worker], object]) -> None:
        self.batch: Batch | None = None
        self.report = functools.partial(report, self)
        self.watched = False


class Engine:
    """Runs jobs, on the loop that is its home. It can be made in any thread.

    ``submit``, ``cancel``, ``budget_changed`` and ``stop`` may be called from any thread.
    """

    def __init__(self, settings: EngineSettings, loop: Loop) -> None:
        self._settings = settings
        self._spec = settings.spec
        self._clock = settings.spec.clock
        self._ledger = settings.ledger
        self._deadlines = Deadlines(self._clock, loop)
        self._sizer = BatchSizer(settings.batching, settings.num_workers, settings.backend.batch_limit)
        self._doorbell = Doorbell(loop, self._broken)
        self._queue = JobQueue(loop)
        # Ctrl-C is for the main task, not for a job. asyncio sees to that by itself.
        self._worker_main = self._work if self.loop.is_asyncio else _protected_from_ctrl_c(self._work)
        self._workers: set[_Worker] = set()
        self._idle = 0
        self._last_turn = 0.0
        # Every job that is not settled. Whoever pops a job from here settles it: so each is settled once.
        self._open: dict[str, Job] = {}
        self._holders: dict[str, _Worker] = {}
        self._reasons: dict[str, JobError] = {}
        self._history: dict[str, list[JobError]] = {}
        # Jobs whose worker died while it had several: each is run alone now, so that blame is exact.
        self._suspects: set[str] = set()
        self._recorder = Recorder(settings.storage, settings.notifier, settings.ledger)
        self._attention = self.loop.event()
        self._stopping = False
        self._all_settled = self.loop.event()
        self.ended = False

    # -- from any thread -----------------------------------------------------------------------------------------------

    @property
    def loop(self) -> Loop:
        """The loop it lives on."""
        return self._doorbell.loop

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs that the ledger expects.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        if self.loop.is_here and self.loop.is_running:
            self._admit(jobs)
        else:
            self._doorbell.ring(self._admit, jobs)

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
        current = [worker.batch.current for worker in list(self._workers) if worker.batch is not None]
        starts = [job._started for job in current if job is not None and job._started is not None]
        return len(starts), sum(now - start for start in starts)

    def give_up(self, *, closing: bool = True) -> None:
        """Settle what is left, from another thread, when the loop does not answer any more."""
        self._recorder.closing = closing  # else the jobs go to whoever gathers
        self._settle_all(self._open, JobError("cancelled", "the evaluator was closed; the job did not stop"))

    @property
    def given_back(self) -> list[Job]:
        """The jobs that were cancelled by the stop."""
        return self._recorder.given_back

    # -- the life of the engine ----------------------------------------------------------------------------------------

    async def run(self, started: Callable[[], object]) -> None:
        """Work until :meth:`stop`; ``started()`` is called when submissions are welcome."""
        try:
            if self.loop.is_asyncio and (task := asyncio.current_task()) is not None:
                self._spec.home_is_ending = lambda: task.cancelling() > 0
            async with anyio.create_task_group() as group:
                group.start_soon(self._deadlines.watch, name="paraval deadlines")
                group.start_soon(self._settings.backend.supervise, name="paraval supervisor")
                self._watch_budget()
                started()
                while not self._stopping:
                    await self._hire(group)
                await self._wind_up()
                group.cancel_scope.cancel()
        except BaseException as exc:
            if not self._recorder.closing:
                error = EvaluatorClosedError("the event loop or the task that runs the jobs ended under the evaluator")
                error.__cause__ = exc
                self._ledger.fail(error, lasting=False)  # what it left is settled below
            raise
        finally:
            self._doorbell.close()
            self._settle_all(self._open, JobError("cancelled", "the evaluator's event loop ended"))
            self._recorder.last_try()
            self.ended = True
            self._ledger.look_again()

    async def _wind_up(self) -> None:
        self._recorder.closing = True
        reason = JobError("cancelled", "the evaluator was closed")
        self._stop_everything(reason)
        with anyio.move_on_after(self._spec.kill_grace + _MARGIN_S):
            if self._open:
                await self._all_settled.wait()
        self._settle_all(self._open, reason)

    # -- admitting -----------------------------------------------------------------------------------------------------

    def _admit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._open[job.id] = job
        if self._clock() >= self._spec.budget_end:
            self._settle_all([job.id for job in jobs], _OUT_OF_BUDGET)
            return
        self._queue.put(jobs)
        if self._missing_workers:
            self._attention.set()

    @property
    def _missing_workers(self) -> int:
        """How many more workers there should be: up to one for each job that no idle worker will take."""
        return min(len(self._queue) - self._idle, self._settings.num_workers - len(self._workers))

    async def _hire(self, group: TaskGroup) -> None:
        """Start the workers that are missing, then wait until some may be again."""
        self._attention = self.loop.event()
        with _collector_at_rest() if self._missing_workers > _HIRE_AT_ONCE else contextlib.nullcontext():
            while self._missing_workers > 0:
                for _ in range(min(self._missing_workers, _HIRE_AT_ONCE)):
                    worker = _Worker(self._progress)
                    self._workers.add(worker)
                    group.start_soon(self._worker_main, worker, name="paraval worker")
                await anyio.lowlevel.checkpoint()  # the first may begin while the next are started
        if not self._stopping:
            await self._attention.wait()

    def _begin_stop(self) -> None:
        self._stopping = True
        self._attention.set()

    async def execute_on_slot(self, job: Job) -> Job:
        """Run a job that a worker has taken on that worker's slot; for an overridden ``Evaluator.execute``."""
        worker = self._holders[job.id]
        inner = Batch([job], self._clock, worker.report)
        await worker.slot.run(inner)
        for _, outcome, _ in inner.collect():
            job.settle(outcome)
        return job

    # -- the workers ---------------------------------------------------------------------------------------------------

    async def _work(self, worker: _Worker) -> None:
        worker.slot = self._settings.backend.slot(self._spec)
        try:
            while True:
                # One scope serves many jobs: an interruption ends it, and the worker goes on with a new one.
                with anyio.CancelScope() as worker.scope:
                    await self._pull_and_run(worker)
                self._clean_up(worker, self._stop_reason(worker))
                await worker.slot.recover()
        finally:
            self._workers.discard(worker)
            self._clean_up(worker, JobError("cancelled", "the evaluator's event loop ended"))
            with anyio.CancelScope(shield=True):
                await worker.slot.close()

    async def _pull_and_run(self, worker: _Worker) -> None:
        queue, clock, slot, execute = self._queue, self._clock, worker.slot, self._settings.execute
        # The scope is looked at before each pull: a cancellation that came too late for a job must not meet the next.
        while not worker.scope.cancel_called:
            if queue and clock() - self._last_turn > _YIELD_S:
                # Jobs that never wait would keep the loop from all others. One worker in a millisecond is enough.
                self._last_turn = clock()
                await anyio.lowlevel.checkpoint()
            job = queue.pull_nowait()
            if job is None:
                self._idle += 1
                try:
                    job = await queue.pull()
                finally:
                    self._idle -= 1
                self._last_turn = clock()
            batch = self._begin_batch(worker, job)
            if batch is None:
                continue
            try:
                await (slot.run(batch) if execute is None else _execute_one(execute, batch, self._spec))
            except WorkerDiedError as exc:
                self._blame(batch, exc.error, alone=exc.alone)
            except Exception as exc:  # noqa: BLE001 - the slot itself failed
                self._blame(batch, error_from_exception(exc)._replace(kind="worker_died"))
            self._end_batch(worker, batch)

    def _begin_batch(self, worker: _Worker, first: Job) -> Batch | None:
        jobs = self._fill(first)
        if not jobs or not self._note_start(worker, jobs):
            return None
        worker.batch = batch = Batch(jobs, self._clock, worker.report)
        self._watch(worker, batch)
        return batch

    def _end_batch(self, worker: _Worker, batch: Batch) -> None:
        worker.batch = None
        self._settle(batch.collect())
        self._return_to_queue(batch.reclaim())
        if not batch.was_cut:
            self._sizer.learn(len(batch), self._clock() - batch.created)

    def _progress(self, worker: _Worker) -> None:
        """Take what a batch has to hand in before its end."""
        batch = worker.batch
        if batch is not None:
            self._settle(batch.collect())
            self._return_to_queue(batch.reclaim())
            if batch.current is not None and len(batch) > 1:
                self._recorder.note_running(batch.current)  # it was thought to be tiny

    def _blame(self, batch: Batch, error: JobError, *, alone: bool = True) -> None:
        """After the death of a worker: its only job is to blame. Of several, any may be: each is run alone."""
        batch.was_cut = True
        self._settle(batch.collect())
        jobs = batch.in_hand
        if len(jobs) == 1 and alone:
            self._settle([(jobs[0], Outcome(error=error, may_retry=True), self._clock())])
        else:
            self._suspects.update(job.id for job in jobs)
            self._return_to_queue(jobs)

    def _fill(self, first: Job) -> list[Job]:
        size = self._sizer.next_size(len(self._queue) + 1) if self._settings.execute is None else 1
        jobs = [first]
        if self._suspects and first.id in self._suspects:
            size = 1
        while len(jobs) < size and (job := self._queue.pull_nowait()) is not None:
            if self._suspects and job.id in self._suspects:
                self._queue.put_back([job])
                break
            jobs.append(job)
        return [job for job in jobs if job._status is JobStatus.READY]  # the others were cancelled while they waited

    def _note_start(self, worker: _Worker, jobs: list[Job]) -> bool:
        self._ledger.started(len(jobs))
        for job in jobs:
            self._holders[job.id] = worker
        # The tiny jobs of a batch are spared the write, unless one turns out not to be tiny.
        if len(jobs) > 1 or self._recorder.note_running(jobs[0]):
            return True
        self._holders.pop(jobs[0].id, None)  # it does not run: it waits for the end, which settles it
        self._ledger.started(-1)
        return False

    def _clean_up(self, worker: _Worker, reason: JobError) -> None:
        """After an interrupted batch: settle its current job, give the others back."""
        batch, worker.batch = worker.batch, None
        if batch is None:
            return
        self._settle(batch.collect())
        in_hand = batch.in_hand
        stopped = [job for job in in_hand if job.id in self._reasons]
        if self._settings.backend.cancellation == "cooperative":
            for job in stopped:  # a call that nothing can end goes on, and keeps its slot
                self._give_up_on(job, self._clock())
        self._settle([(job, Outcome(error=reason, cancelled=True), self._clock()) for job in stopped])
        others = [job for job in in_hand if job.id not in self._reasons and job not in stopped]
        self._suspects.update(job.id for job in others)  # the worker was killed, and not for what is known of them
        self._return_to_queue(batch.reclaim() + others)

    def _return_to_queue(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.id in self._open]  # the others were settled meanwhile: given up, say
        if jobs:
            self._ledger.started(-len(jobs))
            for job in jobs:
                self._holders.pop(job.id, None)
                job._started, job._status = None, JobStatus.READY
            if not self._recorder.closing:  # else they were settled, or will be
                self._queue.put_back(jobs)

    # -- time and cancellation -----------------------------------------------------------------------------------------

    def _watch(self, worker: _Worker, batch: Batch) -> None:
        """Keep an eye on a batch: one check for each worker at a time, however many batches it runs."""
        if worker.watched or (len(batch) == 1 and self._settings.job_timeout is None):
            return
        due = self._next_check(batch)
        if due is not None:
            worker.watched = True
            self._deadlines.add(due, lambda now: self._check(worker, now))

    def _check(self, worker: _Worker, now: float) -> float | None:
        batch = worker.batch
        if batch is None:
            worker.watched = False
            return None
        if now - batch.created >= STALL_S:
            self._settle(batch.collect())
            self._return_to_queue(batch.reclaim())
            if batch.current is not None and len(batch) > 1:
                self._recorder.note_running(batch.current)
        if batch.waits_for_worker:
            return now + STALL_S
        job, limit = batch.current, self._settings.job_timeout
        if job is None and limit is not None and batch.in_hand and now - batch.created >= limit + STALL_S:
            # One of several jobs holds its worker in such a grip that it cannot even say which. Each is run alone then.
            batch.hurry = True
            worker.watched = False
            worker.scope.cancel()
            return None
        if job is not None and limit is not None and job._started is not None and now - job._started >= limit:
            self._interrupt(worker, job, JobError("timeout", f"the job ran longer than job_timeout={limit:g} s"))
            worker.watched = False
            return None
        due = self._next_check(batch)
        if due is None:
            worker.watched = False
            return None
        return max(due, now + 0.001)

    def _next_check(self, batch: Batch) -> float | None:
        limit = self._settings.job_timeout
        due = batch.created + STALL_S if batch.waiting or batch.waits_for_worker else math.inf
        if limit is not None:
            job = batch.current
            start = job._started if job is not None else None
            due = min(due, (batch.created if start is None else start) + limit)
        return None if due == math.inf else due

    def _watch_budget(self) -> None:
        if self._spec.budget_end < math.inf:
            self._deadlines.add(self._spec.budget_end, self._check_budget)

    def _check_budget(self, now: float) -> None:
        if now >= self._spec.budget_end:  # else it was moved, and another check comes
            self._stop_everything(_OUT_OF_BUDGET)

    def _stop_everything(self, reason: JobError) -> None:
        for worker in list(self._workers):
            self._progress(worker)
        self._settle_all([key for key in self._open if key not in self._holders], reason)
        for worker in list(self._workers):
            for job in () if worker.batch is None else worker.batch.in_hand:
                self._interrupt(worker, job, reason)

    def _cancel(self, job: Job, reason: JobError, patience: int = 50) -> None:
        if job.id not in self._open:
            return
        worker = self._holders.get(job.id)
        batch = None if worker is None else worker.batch
        if worker is None or batch is None:
            self._settle_all([job.id], reason)
        elif batch.withdraw(job):
            self._ledger.started(-1)
            self._settle_all([job.id], reason)
        elif batch.current is job:
            self._interrupt(worker, job, reason)
        elif patience or job not in batch.in_hand:
            # It is being taken or was finished this very moment; or it was sent ahead, and the worker will soon say
            # that it runs, or give it back.
            self._deadlines.add(self._clock() + 0.001, lambda _now: self._cancel(job, reason, max(0, patience - 1)))
        else:
            batch.hurry = True
            self._interrupt(worker, job, reason)

    def _interrupt(self, worker: _Worker, job: Job, reason: JobError) -> None:
        """Make a running job stop; it is settled when it has, or when it would not."""
        if job.id in self._reasons:
            return
        self._reasons[job.id] = reason
        job._status = JobStatus.CANCELLING
        if worker.batch is not None:
            self._return_to_queue(worker.batch.reclaim())  # or a thread that stops in time would go on with them
        worker.scope.cancel()
        due = self._clock() + self._spec.kill_grace + _MARGIN_S
        self._deadlines.add(due, lambda now: self._give_up_on(job, now))

    def _give_up_on(self, job: Job, now: float) -> None:
        """Settle a job that was to stop and would not; nothing happens if it did after all."""
        reason = self._reasons.get(job.id)
        if reason is not None:
            self._reasons[job.id] = reason = reason._replace(message=f"{reason.message}; it did not stop")
            self._settle([(job, Outcome(error=reason, cancelled=True), now)])

    def _stop_reason(self, worker: _Worker) -> JobError:
        job = worker.batch.current if worker.batch is not None else None
        default = JobError("cancelled", "the job was cancelled")
        return default if job is None else self._reasons.get(job.id, default)

    # -- settling ------------------------------------------------------------------------------------------------------

    def _settle_all(self, job_ids: Iterable[str], reason: JobError) -> None:
        now = self._clock()
        jobs = [self._open[job_id] for job_id in list(job_ids) if job_id in self._open]
        self._settle([(job, Outcome(error=reason, cancelled=True), now) for job in jobs])

    def _settle(self, ended: Sequence[Ended]) -> None:
        """Give each job its one terminal record: on the job, in the storage, then to whoever waits for it."""
        jobs: list[Job] = []
        for job, reported, finished in ended:
            if reported.may_retry and reported.error is not None and self._try_again(job, reported.error):
                continue
            if self._open.pop(job.id, None) is None:
                continue  # settled already: it was given up, and came back after all
            self._holders.pop(job.id, None)
            reason = self._reasons.pop(job.id, None) if self._reasons else None
            job._finished = finished
            outcome = reported if reason is None else _stopped(job, reported, reason)
            if self._history or self._suspects:
                outcome = self._with_history(job, outcome)
            job.settle(outcome)
            jobs.append(job)
        if jobs:
            self._recorder.record(jobs)
        if self._recorder.closing and not self._open:
            self._all_settled.set()

    def _try_again(self, job: Job, error: JobError) -> bool:
        """Queue a failed job once more, if it has an attempt left; after a while that doubles with each attempt."""
        past = self._history.get(job.id, [])
        spent = len(past) + 1 >= self._settings.max_attempts
        if spent or self._recorder.closing or job.id in self._reasons or job.id not in self._open:
            return False
        self._history[job.id] = [*past, error]
        self._holders.pop(job.id, None)
        self._suspects.add(job.id)
        job._started, job._status = None, JobStatus.READY
        # Full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        pause = random.uniform(0, min(_BACK_OFF_MOST_S, _BACK_OFF_S * 2 ** len(past)))
        self._deadlines.add(self._clock() + pause, lambda _now: self._requeue(job))
        return True

    def _requeue(self, job: Job) -> None:
        if job.id in self._open and job.id not in self._holders:
            self._ledger.started(-1)
            self._queue.put_back([job])
            if self._missing_workers:
                self._attention.set()

    def _with_history(self, job: Job, outcome: Outcome) -> Outcome:
        self._suspects.discard(job.id)
        past = self._history.pop(job.id, None)
        if past is None or outcome.error is None:
            return outcome
        return outcome._replace(error=outcome.error._replace(attempts=len(past) + 1, history=tuple(past)))

    def _broken(self, exc: BaseException) -> None:
        """A call from another thread failed: that is a defect of ours, and whoever waits must hear of it."""
        error = EvaluatorClosedError(f"the engine failed: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        self._ledger.fail(error)
        self._begin_stop()


_OUT_OF_BUDGET: Final = JobError("timeout", "the evaluator's timeout ran out")


def _stopped(job: Job, outcome: Outcome, reason: JobError) -> Outcome:
    """Turn what a job gave after it was asked to stop into its outcome: it was stopped, whatever it returned."""
    if outcome.error is None and outcome.value is not None and outcome.value is not job:
        job.metadata["returned"] = outcome.value
    return Outcome(error=reason, cancelled=True)


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Do without the garbage collector while thousands of workers start.

    Each is some forty objects that stay; looking for garbage among them again and again takes longer than making them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _execute_one(execute: Callable[[Job], Awaitable[Job]], batch: Batch, spec: RunSpec) -> None:
    job = batch.take()
    if job is None:
        return
    try:
        outcome = Outcome(await execute(job))
    except WorkerDiedError:
        raise  # the worker's end, not a failure of what overrides execute
    except BaseException as exc:  # noqa: BLE001 - an overridden execute is user code
        outcome = failure_of(exc, spec)
    batch.finish(job, outcome)


def _protected_from_ctrl_c(function: Callable[..., Any]) -> Callable[..., Any]:
    import trio  # here: it is an extra, and it is imported already when it runs

    protected: Callable[..., Any] = trio.lowlevel.enable_ki_protection(function)
    return protected
