"""The workers: each pulls jobs from the queue and has its slot run them, one batch after the other."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from paraval.backends.base import Batch, RunSpec, Slot, WorkerDiedError, failure_of
from paraval.engine.attempts import Attempts
from paraval.engine.batching import STALL_S, BatchSizer
from paraval.engine.collector import CollectorPace, collector_at_rest
from paraval.engine.deadlines import Deadlines
from paraval.engine.queue import JobQueue
from paraval.engine.recorder import Recorder
from paraval.engine.settling import Settling, out_of_time
from paraval.errors import UsageError
from paraval.job import Job, JobStatus
from paraval.loops import Event, Loop
from paraval.outcome import JobError, Outcome, error_from_exception

if TYPE_CHECKING:
    from paraval.engine.engine import EngineSettings

__all__ = ["MARGIN_S", "Worker", "Workers"]

_READY: Final = JobStatus.READY
MARGIN_S: Final = 0.4
"""How long after the grace a job may take to be seen ended before it is given up."""
_HIRE_AT_ONCE: Final = 64
_LIMIT_S: Final = 1.0
"""Where jobs may run for no longer than this, it shall be known soon which one does."""
_YIELD_S: Final = 0.001
"""Workers whose jobs never wait let the loop's other tasks run this often."""


class Worker:
    """One worker: its slot, what it runs, and the scope that interrupts it."""

    __slots__ = ("batch", "failure", "handed", "needed", "next_turn", "report", "scope", "slot", "through", "watched")

    # Slot and scope are made by the worker's own task: where the worker is hired there may be no task.
    slot: Slot
    scope: anyio.CancelScope
    # These by a worker that stands by.
    needed: Event
    next_turn: Callable[[], object]
    through: Callable[[], object]
    failure: BaseException | None

    def __init__(self, report: Callable[[Worker], object]) -> None:
        self.batch: Batch | None = None
        self.handed: Job | None = None
        self.report = functools.partial(report, self)
        self.watched = False


class Workers:
    """All workers of one engine. On the engine's loop.

    Attributes:
        queue: where they pull from.
    """

    def __init__(self, settings: EngineSettings, recorder: Recorder, deadlines: Deadlines, loop: Loop) -> None:
        self._settings = settings
        self._spec = settings.spec
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
        )
        self._attempts = Attempts(settings.max_attempts)
        self.queue = JobQueue(loop)
        self.settling = Settling(
            recorder, self._attempts, self._try_again, self._clock, loop, job_timeout=settings.job_timeout
        )
        # Ctrl-C is for the main task, not for a job. asyncio sees to that by itself.
        self._main = self._work if loop.is_asyncio else _protected_from_ctrl_c(self._work)
        self._scope: type[anyio.CancelScope] = anyio.CancelScope
        self._workers: set[Worker] = set()
        self._pace = CollectorPace()
        self._idle = 0
        self._last_turn = 0.0
        self._wanted = loop.event()

    def __iter__(self) -> Iterator[Worker]:
        """Go through those that there are at this moment; from any thread."""
        return iter(list(self._workers))

    # -- hiring --------------------------------------------------------------------------------------------------------

    def put(self, jobs: Sequence[Job]) -> None:
        """Queue jobs."""
        self.queue.put(jobs)
        self._want_more()

    def look_up(self) -> None:
        """Have :meth:`hire` return."""
        self._wanted.set()

    async def hire(self, group: TaskGroup) -> None:
        """Start the workers that are missing, then wait until some may be again."""
        self._wanted = self._loop.event()
        self._scope = type(anyio.CancelScope())  # the loop's own: each is made without a look at which loop it is
        with collector_at_rest(ages=True) if self._missing > _HIRE_AT_ONCE else contextlib.nullcontext():
            while self._missing > 0:
                for _ in range(min(self._missing, _HIRE_AT_ONCE)):
                    worker = Worker(self.progress)
                    self._workers.add(worker)
                    group.start_soon(self._main, worker, name="paraval worker")
                self._pace.suit(len(self._workers))
                await anyio.lowlevel.checkpoint()  # the first may begin while the next are started

    def ended(self) -> None:
        """Undo what the workers needed of the process; there are none any more."""
        self._pace.drop()

    async def until_wanted(self) -> None:
        """Wait until workers may be missing again."""
        await self._wanted.wait()

    @property
    def _missing(self) -> int:
        """How many more workers there should be: up to one for each job that no idle worker will take."""
        return min(len(self.queue) - self._idle, self._settings.num_workers - len(self._workers))

    def _want_more(self) -> None:
        if self._missing > 0:
            self._wanted.set()

    async def execute_on_slot(self, job: Job) -> Job:
        """Run a job that a worker has taken on that worker's slot; for an overridden ``Evaluator.execute``."""
        worker = self.settling.holders[job.id]
        if worker.batch is None:
            raise UsageError(f"job {job.id} has been taken from its worker")
        part = _Part(job, worker.batch, self._clock, worker.report)
        await worker.slot.run(part)
        for _, outcome, _ in part.collect():
            job.settle(outcome)
        return job

    # -- working -------------------------------------------------------------------------------------------------------

    async def _work(self, worker: Worker) -> None:
        worker.slot = self._settings.backend.slot(self._spec)
        try:
            while True:
                # One scope serves many jobs: an interruption ends it, and the worker goes on with a new one.
                with self._scope() as worker.scope:
                    await self._pull_and_run(worker)
                self._clean_up(worker, self._stop_reason(worker))
                await worker.slot.recover()
        finally:
            self._workers.discard(worker)
            self._clean_up(worker, JobError("cancelled", "the evaluator's event loop ended"))
            with anyio.CancelScope(shield=True):
                await worker.slot.close()

    async def _pull_and_run(self, worker: Worker) -> None:
        queue, clock, slot, execute = self.queue, self._clock, worker.slot, self._settings.execute
        # The scope is looked at before each pull: a cancellation that came too late for a job must not meet the next.
        while not worker.scope.cancel_called:
            if queue and clock() - self._last_turn > _YIELD_S:
                # Jobs that never wait would keep the loop from all others. One worker in a millisecond is enough.
                self._last_turn = clock()
                await anyio.lowlevel.checkpoint()
            if slot.is_prompt and execute is None and worker.handed is None:
                await self._stand_by(worker)
                continue
            job, worker.handed = worker.handed or queue.pull_nowait(), None
            if job is None:
                self._idle += 1
                try:
                    job = await queue.pull()
                finally:
                    self._idle -= 1
                self._last_turn = clock()
            if job._is_adopted:
                await self._mark(job)
            batch = self._begin_batch(worker, job)
            if batch is None:
                continue
            try:
                await (slot.run(batch) if execute is None else _execute_one(execute, batch, self._spec))
            except WorkerDiedError as exc:
                self._blame(batch, exc.error, alone=exc.alone)
            except Exception as exc:  # noqa: BLE001 - the slot itself failed
                if not batch.in_hand:  # before it took any: with none to blame, it would fail for ever
                    batch.take_all(1)
                self._blame(batch, error_from_exception(exc)._replace(kind="worker_died"))
            self._put_away(worker, batch)
            self.settling.settle(batch.collect())
            del job, batch  # an idle worker must not keep the last job alive

    async def _stand_by(self, worker: Worker) -> None:
        """Sleep while the worker's batches begin and end in calls to the loop, until it is interrupted."""
        worker.needed = self._loop.event()
        worker.failure = None
        worker.next_turn = functools.partial(self._take_turn, worker)
        worker.through = functools.partial(self._batch_through, worker)
        try:
            self._begin_next(worker)
            await worker.needed.wait()
        except BaseException:
            if worker.batch is not None:
                await worker.slot.stop()
            elif self.queue.give_up_turn(worker.next_turn):
                self._idle -= 1
            raise
        if worker.failure is not None:
            raise worker.failure

    def _take_turn(self, worker: Worker) -> None:
        """Called by the queue when there is a job for a worker that stands by."""
        self._idle -= 1
        self._begin_next(worker)

    def _batch_through(self, worker: Worker) -> None:
        """Called by the slot of a worker that stands by."""
        batch = worker.batch
        if batch is None or worker.scope.cancel_called:
            return  # its task sees to that
        try:
            self._put_away(worker, batch)
            self._begin_next(worker)
            self.settling.settle(batch.collect())  # last: whoever it wakes finds this thread at rest
        except BaseException as exc:  # noqa: BLE001 - a defect of ours, which no caller would take: the task raises it
            worker.failure = exc
            worker.needed.set()

    def _begin_next(self, worker: Worker) -> None:
        while (job := self.queue.pull_nowait()) is not None:
            if job._is_adopted:
                worker.handed = job  # it takes a task
                worker.needed.set()
                return
            batch = self._begin_batch(worker, job)
            if batch is not None:
                worker.slot.begin(batch, worker.through)
                return
        self._idle += 1
        self.queue.call_in_turn(worker.next_turn)

    def _begin_batch(self, worker: Worker, first: Job) -> Batch | None:
        jobs, sizer = self._fill(first), self._sizer
        in_order = sizer.in_order and len(jobs) > 1
        if not jobs or not self._note_start(worker, jobs, may_be_tiny=not in_order):
            return None
        worker.batch = batch = Batch(jobs, self._clock, worker.report, in_order=in_order, hold_s=sizer.hold_s)
        self._watch(worker, batch)
        return batch

    def _put_away(self, worker: Worker, batch: Batch) -> None:
        worker.batch = None
        self._return_to_queue(batch.reclaim())
        if not batch.was_cut:
            self._sizer.learn(len(batch), self._clock() - batch.created)

    def progress(self, worker: Worker) -> None:
        """Take what a batch has to hand in before its end."""
        batch = worker.batch
        if batch is not None:
            self.settling.settle(batch.collect())
            self._return_to_queue(batch.reclaim())
            if batch.current is not None and len(batch) > 1:
                self._recorder.note_running(batch.current)  # it was thought to be tiny

    def _blame(self, batch: Batch, error: JobError, *, alone: bool = True) -> None:
        """After the death of a worker: its only job is to blame. Of several, any may be: each is run alone."""
        batch.was_cut = True
        self.settling.settle(batch.collect())
        jobs = batch.in_hand
        if jobs and alone and (len(jobs) == 1 or batch.in_order):
            self.settling.settle([(jobs[0], Outcome(error=error, may_retry=True), self._clock())])
            self._return_to_queue(jobs[1:])  # which it had not begun
        else:
            self._attempts.suspect(jobs)
            self._return_to_queue(jobs)

    def _fill(self, first: Job) -> list[Job]:
        size = self._sizer.next_size(len(self.queue) + 1) if self._settings.execute is None else 1
        jobs = [first] if size == 1 or self._attempts.is_suspect(first) else [first, *self.queue.pull_many(size - 1)]
        if self._attempts or self._settings.resumes:
            is_suspect = self._attempts.is_suspect
            alone = next((it for it, job in enumerate(jobs) if it and (job._is_adopted or is_suspect(job))), None)
            if alone is not None:
                self.queue.put_back(jobs[alone:])
                del jobs[alone:]
        return [job for job in jobs if job._status is _READY]  # the others were cancelled while they waited

    async def _mark(self, job: Job) -> None:
        """Have it stored that a job that a driver left runs, before it does: it may be what ended that driver."""
        job._is_adopted = False
        stored = self._loop.event()
        if not self._recorder.mark(job, lambda: self._loop.call_soon(stored.set)):
            await stored.wait()

    def _note_start(self, worker: Worker, jobs: list[Job], *, may_be_tiny: bool) -> bool:
        self._ledger.started(len(jobs))
        holders = self.settling.holders
        for job in jobs:
            holders[job.id] = worker
        # The tiny jobs of a batch are spared the write, unless one turns out not to be tiny.
        if (len(jobs) > 1 and may_be_tiny) or self._recorder.note_running(jobs[0]):
            return True
        for job in jobs:  # they do not run: they wait for the end, which settles them
            self.settling.holders.pop(job.id, None)
        self._ledger.started(-len(jobs))
        return False

    def _clean_up(self, worker: Worker, reason: JobError) -> None:
        """After an interrupted batch: settle its current job, give the others back."""
        batch, worker.batch = worker.batch, None
        if batch is None:
            return
        self.settling.settle(batch.collect())
        in_hand = batch.in_hand
        stopped = [job for job in in_hand if job.id in self.settling.reasons]
        if self._settings.backend.cancellation == "cooperative":
            for job in stopped:  # a call that nothing can end goes on, and keeps its slot
                self.settling.give_up(job, self._clock())
        self.settling.settle([(job, Outcome(error=reason, cancelled=True), self._clock()) for job in stopped])
        others = [job for job in in_hand if job.id not in self.settling.reasons and job not in stopped]
        self._attempts.suspect(others)  # the worker was killed, and not for what is known of them
        self._return_to_queue(batch.reclaim() + others)

    def _return_to_queue(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.id in self.settling.open]  # the others were settled meanwhile: given up, say
        if jobs:
            self._ledger.started(-len(jobs))
            for job in jobs:
                self.settling.holders.pop(job.id, None)
                job._started, job._status = None, JobStatus.READY
            if self._recorder.closing:  # they were settled, or will be
                return
            reasons = self.settling.reasons
            stopped = [job for job in jobs if job.id in reasons]  # given back by a worker that was being stopped
            if stopped:
                jobs = [job for job in jobs if job.id not in reasons]
                now = self._clock()
                self.settling.settle([(it, Outcome(error=reasons[it.id], cancelled=True), now) for it in stopped])
            self.queue.put_back(jobs)

    # -- looking after them --------------------------------------------------------------------------------------------

    def _watch(self, worker: Worker, batch: Batch) -> None:
        """Keep an eye on a batch: one check for each worker at a time, however many batches it runs."""
        if worker.watched or ((len(batch) == 1 or batch.in_order) and self._settings.job_timeout is None):
            return
        due = self._next_check(batch)
        if due is not None:
            worker.watched = True
            self._deadlines.add(due, lambda now: self._check(worker, now))

    def _check(self, worker: Worker, now: float) -> float | None:
        batch = worker.batch
        if batch is None:
            worker.watched = False
            return None
        if now - batch.created >= STALL_S:
            self.settling.settle(batch.collect())
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
            self.interrupt(worker, job, out_of_time(limit))
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

    def interrupt(self, worker: Worker, job: Job, reason: JobError) -> None:
        """Make a running job stop; it is settled when it has, or when it would not."""
        settling = self.settling
        if job.id in settling.reasons:
            return
        settling.reasons[job.id] = reason
        job._status = JobStatus.CANCELLING
        if worker.batch is not None:
            self._return_to_queue(worker.batch.reclaim())  # or a thread that stops in time would go on with them
        worker.scope.cancel()
        due = self._clock() + self._spec.kill_grace + MARGIN_S
        self._deadlines.add(due, lambda now: settling.give_up(job, now))

    def _stop_reason(self, worker: Worker) -> JobError:
        job = worker.batch.current if worker.batch is not None else None
        default = JobError("cancelled", "the job was cancelled")
        return default if job is None else self.settling.reasons.get(job.id, default)

    def _try_again(self, job: Job, pause: float) -> None:
        job._started, job._status = None, JobStatus.READY
        self._ledger.started(-1)  # from now on it waits, first for its time and then for a worker
        self._deadlines.add(self._clock() + pause, lambda _now: self._requeue(job))

    def _requeue(self, job: Job) -> None:
        if job.id in self.settling.open and job.id not in self.settling.holders:
            self.queue.put_back([job])
            self._want_more()


class _Part(Batch):
    """One job of a batch, run on its slot on behalf of an overridden ``execute``.

    That the worker is being set up holds for the batch that the engine watches.
    """

    __slots__ = ("_whole",)

    def __init__(self, job: Job, whole: Batch, clock: Callable[[], float], report: Callable[[], object]) -> None:
        super().__init__([job], clock, report)
        self._whole = whole

    def wait_for_worker(self) -> None:
        self._whole.wait_for_worker()

    def worker_is_ready(self) -> None:
        super().worker_is_ready()
        self._whole.worker_is_ready()


async def _execute_one(execute: Callable[[Job], Awaitable[Job]], batch: Batch, spec: RunSpec) -> None:
    job = batch.take()
    if job is None:
        return
    try:
        returned = await execute(job)
        outcome = Outcome(job if returned is None and job.output is not None else returned)  # it forgot its return
    except WorkerDiedError:
        raise  # the worker's end, not a failure of what overrides execute
    except BaseException as exc:  # noqa: BLE001 - an overridden execute is user code
        outcome = failure_of(exc, spec)
    batch.finish(job, outcome)


def _protected_from_ctrl_c(function: Callable[..., Any]) -> Callable[..., Any]:
    import trio  # here: it is an extra, and it is imported already when it runs

    protected: Callable[..., Any] = trio.lowlevel.enable_ki_protection(function)
    return protected
