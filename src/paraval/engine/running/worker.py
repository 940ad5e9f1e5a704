"""One worker: it pulls jobs from the queue and has its slot run them, one batch after the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from paraval.backends.base import Batch, RunSpec, Slot, WorkerDiedError, failure_of
from paraval.engine.running.dispatch import Dispatch, unfinished
from paraval.engine.running.watch import Watch
from paraval.errors import UsageError
from paraval.job import Job
from paraval.loops import Event, Loop
from paraval.outcome import Outcome

if TYPE_CHECKING:
    from paraval.engine.engine import EngineSettings

__all__ = ["Worker"]

_TURN_S: Final = 0.001
"""Workers whose jobs never wait let the loop's other tasks run this often."""


class Worker:
    """A task of the engine's, and a slot of the backend's.

    What there is to do between two batches is done in one of two ways, as the slot allows. In most cases the task does
    it: it pulls a job, begins a batch, awaits ``slot.run`` and puts the batch away. Where the slot is *prompt* (it only
    passes a batch on to its thread, and calls when that is through), the task *stands by*: it sleeps, and those calls
    put one batch away and begin the next.

    Args:
        settings: of the engine.
        dispatch: where jobs come from, and go.
        watch: told of each batch.
        loop: the engine's.
        scope: makes a cancel scope of that loop.
        left: told when its work has ended.

    Attributes:
        batch: what it runs.
        scope: the one that interrupts what it runs.
        is_watched: whether a check is due (the watch's own note).
    """

    __slots__ = (
        "_dispatch",
        "_failure",
        "_handed",
        "_left",
        "_loop",
        "_needed",
        "_new_scope",
        "_settings",
        "_slot",
        "_watch",
        "batch",
        "is_watched",
        "scope",
    )

    # Slot and scope are made by the worker's own task: where the worker is hired there may be no task.
    _slot: Slot
    scope: anyio.CancelScope
    # While it stands by: what wakes its task, and the error for which it was woken.
    _needed: Event
    _failure: BaseException | None

    def __init__(
        self,
        settings: EngineSettings,
        dispatch: Dispatch,
        watch: Watch,
        loop: Loop,
        scope: Callable[[], anyio.CancelScope],
        left: Callable[[Worker], object],
    ) -> None:
        self._settings = settings
        self._dispatch = dispatch
        self._watch = watch
        self._loop = loop
        self._new_scope = scope
        self._left = left
        self._handed: Job | None = None
        self.batch: Batch | None = None
        self.is_watched = False

    async def work(self) -> None:
        """Work until the engine's task group is cancelled."""
        self._slot = self._settings.backend.slot(self._settings.spec)
        try:
            while True:
                # One scope serves many jobs: an interruption ends it, and the worker goes on with a new one.
                with self._new_scope() as self.scope:
                    await self._run_batches()
                self._break_off()
                await self._slot.recover()
        finally:
            self._left(self)
            self._break_off()
            with anyio.CancelScope(shield=True):
                await self._slot.close()

    def progress(self) -> None:
        """Take what its batch has to hand in before its end."""
        if self.batch is not None:
            self._slot.catch_up(self.batch)
            self._dispatch.progress(self.batch)

    def hold_up(self) -> bool:
        """Take back what its worker has ahead, and in what it has said; False where it will say more in a moment."""
        batch = self.batch
        if batch is None:
            return True
        is_sure = self._slot.take_back(batch)
        self.progress()
        return is_sure

    def pin_down(self, latest: float) -> float | None:
        """Find out which job runs, where its worker cannot say it; see :meth:`~paraval.backends.base.Slot.pin_down`."""
        return None if self.batch is None else self._slot.pin_down(self.batch, latest)

    async def execute_on_slot(self, job: Job) -> Job:
        """Run a job that it has taken on its slot; for an overridden ``Evaluator.execute``."""
        if self.batch is None:
            raise UsageError(f"job {job.id} has been taken from its worker")
        part = _Part(job, self.batch, self._settings.spec.clock, self.progress)
        await self._slot.run(part)
        if part.in_hand:
            raise unfinished()
        outcome = part.outcome()
        if outcome is not None:
            job.settle(outcome)
        return job

    def _begin(self, first: Job) -> Batch | None:
        self.batch = batch = self._dispatch.batch_for(self, first)
        if batch is not None:
            self._watch.begin(self, batch)
        return batch

    def _break_off(self) -> None:
        batch, self.batch = self.batch, None
        if batch is not None:
            self._dispatch.break_off(batch)

    # -- in its task ---------------------------------------------------------------------------------------------------

    async def _run_batches(self) -> None:
        dispatch, slot, execute, spec = self._dispatch, self._slot, self._settings.execute, self._settings.spec
        queue, clock = dispatch.queue, spec.clock
        # The scope is looked at before each pull: a cancellation that came too late for a job must not meet the next.
        while not self.scope.cancel_called:
            if queue and clock() - dispatch.last_turn > _TURN_S:
                # Jobs that never wait would keep the loop from all others. One worker in a millisecond is enough.
                dispatch.last_turn = clock()
                await anyio.lowlevel.checkpoint()
            if slot.is_prompt and execute is None and self._handed is None:
                await self._stand_by()
                batch = self.batch  # which needs this task
            else:
                job, self._handed = self._handed, None
                if job is None:  # not by its truth, which a class of the user's may have made its own
                    job = queue.pull_nowait()
                if job is None:
                    job = await queue.pull()
                    dispatch.last_turn = clock()
                if job._is_adopted:
                    await dispatch.mark(job)
                batch = self._begin(job)
                del job
            if batch is None:
                continue
            try:
                await (slot.run(batch) if execute is None else _execute_one(execute, batch, spec))
            except Exception as exc:  # noqa: BLE001 - the worker died, or the slot itself failed
                self.batch = None
                dispatch.blame(batch, exc)
            else:
                self.batch = None
                dispatch.put_away(batch)
            dispatch.settling.settle(batch.collect())
            del batch  # an idle worker must not keep the last job alive

    # -- standing by ---------------------------------------------------------------------------------------------------

    async def _stand_by(self) -> None:
        """Sleep while batches begin and end in calls to the loop, until it is interrupted or a batch takes a task."""
        self._needed = self._loop.event()
        self._failure = None
        try:
            self._begin_next()
            await self._needed.wait()
        except BaseException:
            if self.batch is not None:
                await self._slot.stop()
            else:
                self._dispatch.queue.give_up_turn(self._begin_next)
            raise
        if self._failure is not None:
            raise self._failure

    def _begin_next(self) -> None:
        """Begin a batch, or have the queue call this again when there is a job."""
        queue = self._dispatch.queue
        while (job := queue.pull_now()) is not None:
            if job._is_adopted:
                self._handed = job  # its mark is to be waited for
                self._needed.set()
                return
            batch = self._begin(job)
            if batch is not None:
                if not self._slot.begin(batch, self._batch_through, self._needed.set):
                    self._needed.set()
                return
        queue.call_in_turn(self._begin_next)

    def _batch_through(self) -> None:
        """Called by the slot."""
        batch = self.batch
        if batch is None or self.scope.cancel_called:
            return  # the task sees to that
        try:
            self.batch = None
            self._dispatch.put_away(batch)
            self._begin_next()
            self._dispatch.settling.settle(batch.collect())  # last: whoever it wakes finds this thread at rest
        except BaseException as exc:  # noqa: BLE001 - a defect of ours, which no caller would take: the task raises it
            self._failure = exc
            self._needed.set()


# -- for an overridden Evaluator.execute -------------------------------------------------------------------------------


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
