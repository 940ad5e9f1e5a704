"""Jobs as coroutines on the engine's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from types import coroutine as coroutine_from_generator
from typing import Any, ClassVar, Final

import anyio
import anyio.lowlevel

from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, failure_of, outcome_of
from paraval.ctrl_c import spared_ctrl_c
from paraval.errors import BadValueError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.job import Job
from paraval.loops import Loop
from paraval.outcome import Outcome, returned

try:
    # Private to anyio: which scope a task is in. Its public means only tell by raising when it is too late: at the end
    # of the task, which takes the task group along. A test fails should it ever mean something else.
    from anyio._backends._asyncio import _task_states
except ImportError:  # then what a job leaves open is not seen
    _task_states: Any = {}  # type: ignore[no-redef] # the other branch of the same definition

__all__ = ["SerialEvaluator"]


_TURN_S: Final = 0.005
"""Jobs that never wait let the loop's other tasks run this often."""


class AsyncioSlot(Slot):
    """Awaits run-functions in the worker's own task: a job costs no task and no cancel scope of its own.

    What a job leaves behind in that task must strike no other. After each job, a cancel scope that is still open (an
    unfinished generator may hold one, and its deadline would cancel whatever runs here later) is left for it, and a
    cancellation that it asked for itself is taken.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec

    async def run(self, batch: Batch) -> None:
        task = asyncio.current_task()
        state = None if task is None else _task_states.get(task)
        innermost = None if state is None else state.cancel_scope
        spec, turn = self._spec, batch.created
        job = batch.take()
        while job is not None:
            try:
                function: Any = job.run_function
                coroutine = function(job.create_running_job(spec.stopper), **spec.kwargs)
                context = copy_context()  # the context variables that it sets are nobody else's
                try:
                    awaited = context.run(coroutine.send, None)
                except StopIteration as stop:
                    outcome = returned(stop.value)
                else:
                    outcome = returned(await _in_context(context, coroutine, awaited))
            except BaseException as exc:  # noqa: BLE001 - failure_of raises on what is not the job's own
                if isinstance(exc, asyncio.CancelledError):  # a scope that it left open is not above it
                    _leave_scopes(state, innermost)
                outcome = failure_of(exc, spec)
            if state is not None and state.cancel_scope is not innermost:
                _leave_scopes(state, innermost)
            batch.finish(job, outcome)
            now: float | None = batch.last_end
            if batch.last_end - turn > _TURN_S:  # the deadlines' turn, and everybody else's
                turn, now = batch.last_end, None
                await anyio.lowlevel.checkpoint()
            if task is not None and task.cancelling():
                now = None
                await self._take_cancellation(task)
            job = batch.take(now)

    async def _take_cancellation(self, task: asyncio.Task[Any]) -> None:
        """Take a cancellation that a job made of the task it ran in, unless there is one from above too."""
        if anyio.current_effective_deadline() == -math.inf or self._spec.home_is_ending():
            return
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        while task.cancelling():
            task.uncancel()


def _leave_scopes(state: Any, innermost: Any) -> None:
    """Leave the scopes that a job left open in its task, up to the one that it began in."""
    while state is not None and state.cancel_scope is not innermost and state.cancel_scope is not None:
        state.cancel_scope.__exit__(None, None, None)


class TrioSlot(Slot):
    """Awaits run-functions in a task for each batch: trio does not allow to leave a scope that a job left open.

    What a job leaves behind must strike no other. Where a job has left a scope open in the task, or has cancelled the
    task's own surroundings, those after it get a task in new ones.
    """

    def __init__(self, spec: RunSpec) -> None:
        import trio  # here: it is an extra, and it is imported already when it runs

        self._spec = spec
        self._main = spared_ctrl_c(self._run_all, Loop.running())
        self._open_nursery = trio.open_nursery
        self._current_task = trio.lowlevel.current_task
        self._cancelled = trio.Cancelled

    async def run(self, batch: Batch) -> None:
        while batch.waiting:
            struck: list[BaseException] = []
            with contextlib.suppress(Exception):  # jobs are caught; trio complains of what a job left open
                async with self._open_nursery() as nursery:
                    nursery.start_soon(self._main, batch, struck)
            job = batch.current
            if job is None and not batch.waiting:
                # The turns of other tasks before the first job and after the last say nothing of how long jobs take.
                batch.created += self._spec.clock() - batch.last_end
                return
            batch.was_cut = True
            await anyio.lowlevel.checkpoint_if_cancelled()  # out here, all that cancels comes from above
            if job is not None:
                batch.finish(job, _struck_by_itself(struck.pop(), self._spec))

    async def _run_all(self, batch: Batch, struck: list[BaseException]) -> None:
        """Run jobs, at least one, until there are none left or those that are left need another task.

        Args:
            batch: where they are from.
            struck: gets the cancellation that ended the last one, which is not finished: whose it was is seen outside.
        """
        task: Any = self._current_task()
        # Private to trio: which scope a task is in. Its public means do not tell. Without it, each job gets a task.
        scope = getattr(task, "_cancel_status", None)
        batch.created = turn = self._spec.clock()
        while (job := batch.take()) is not None:
            outcome = await self._outcome_of(job, struck)
            if outcome is None:
                break
            batch.finish(job, outcome)
            if scope is None or task._cancel_status is not scope or scope.effectively_cancelled:
                break
            if batch.last_end - turn > _TURN_S:
                turn = batch.last_end
                await anyio.lowlevel.checkpoint()
        if len(task.parent_nursery.child_tasks) > 1:  # a job has put others here, for which the worker would wait
            task.parent_nursery.cancel_scope.cancel()

    async def _outcome_of(self, job: Job, struck: list[BaseException]) -> Outcome | None:
        spec = self._spec
        try:
            function: Any = job.run_function
            coroutine = function(job.create_running_job(spec.stopper), **spec.kwargs)
            context = copy_context()
            try:
                awaited = context.run(coroutine.send, None)
            except StopIteration as stop:
                return returned(stop.value)
            return returned(await _in_context(context, coroutine, awaited))
        except BaseException as exc:  # noqa: BLE001 - failure_of raises on what is not the job's own
            if not self._is_cancellation(exc):
                return failure_of(exc, spec)
            struck.append(exc)
            return None

    def _is_cancellation(self, exc: BaseException) -> bool:
        if isinstance(exc, BaseExceptionGroup):  # trio's nurseries wrap it
            return exc.split(self._cancelled)[1] is None
        return isinstance(exc, self._cancelled)


def _struck_by_itself(exc: BaseException, spec: RunSpec) -> Outcome:
    outcome = outcome_of(exc, spec)
    if outcome.error is None:
        return outcome
    message = "the job cancelled itself: its task's surroundings, or a cancel scope that it had opened and not left"
    return outcome._replace(error=outcome.error._replace(message=message))


@coroutine_from_generator
def _in_context(context: Context, coroutine: Coroutine[Any, Any, Any], awaited: Any) -> Generator[Any, Any, Any]:
    """Await the rest of a coroutine in a context of its own. One that never waits has no rest, and costs no more.

    Args:
        context: where it has begun.
        coroutine: it has begun, and waits.
        awaited: for this.
    """
    step: Callable[..., Any]
    while True:
        try:
            argument = yield awaited
            step = coroutine.send
        except GeneratorExit:
            context.run(coroutine.close)
            raise
        except BaseException as exc:  # noqa: BLE001 - it is the coroutine's to handle
            step, argument = coroutine.throw, exc
        try:
            awaited = context.run(step, argument)
        except StopIteration as stop:
            return stop.value


class SerialBackend(Backend):
    """One slot for all workers: it holds nothing of any of them."""

    cancellation: ClassVar[Cancellation] = "cancel"
    is_on_home_loop: ClassVar[bool] = True

    def __init__(self) -> None:
        self._loop: Loop | None = None
        self._slot: Slot | None = None

    def slot(self, spec: RunSpec) -> Slot:
        loop = Loop.running()
        if self._slot is None or self._loop is not loop:  # a new engine may be at home elsewhere
            self._loop, self._slot = loop, AsyncioSlot(spec) if loop.is_asyncio else TrioSlot(spec)
        return self._slot


class SerialEvaluator(Evaluator):
    """Runs ``async`` run-functions as coroutines, up to ``num_workers`` at a time, on one event loop.

    For run-functions that wait: on a network, a subprocess, a device. A job that is cancelled or times out gets a
    cancellation at its next ``await``; one that blocks the loop cannot be stopped, and blocks the others too.
    With ``async with`` that loop is the caller's own, so run-functions can share its connections.

    See :class:`~paraval.Evaluator` for the arguments.

    Raises:
        ValueError: ``run_function`` is not a coroutine function.
    """

    cancellation: ClassVar[Cancellation] = "cancel"
    parallel: ClassVar[str] = "coroutines"

    def _make_backend(self) -> Backend:
        if not is_async(self.run_function):
            raise BadValueError(
                f"SerialEvaluator needs an 'async def' run-function and {describe(self.run_function)} is none: "
                "use ThreadPoolEvaluator (method 'thread') for it"
            )
        return SerialBackend()
