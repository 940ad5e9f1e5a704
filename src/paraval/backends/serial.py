"""Jobs as coroutines on the engine's own loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, ClassVar

import anyio

from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, WorkerDiedError, failure_of
from paraval.errors import BadValueError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.job import Job
from paraval.loops import Loop
from paraval.outcome import Outcome

__all__ = ["SerialEvaluator"]


class SerialSlot(Slot):
    """Runs each batch in a task of its own.

    What a job leaves behind in its task (a cancel scope that an unfinished generator holds, a pending cancellation,
    context variables) ends with that task. The tiny jobs of a batch share one; a cancellation that one of them seems to
    have made may come from another, so that job is run again, alone.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self.loop = Loop.running()

    async def run(self, batch: Batch) -> None:
        if not self.loop.is_asyncio:
            with contextlib.suppress(Exception):  # jobs are caught; trio complains of a scope that a job left open
                async with anyio.create_task_group() as group:
                    group.start_soon(self._run_all, batch, anyio.CancelScope())
            return
        # The loop's own task, as anyio's costs several times as much.
        scope = anyio.CancelScope()
        task = asyncio.get_running_loop().create_task(self._run_all(batch, scope))
        ended = self.loop.event()
        task.add_done_callback(lambda _task: ended.set())
        try:
            await ended.wait()
        except BaseException:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await ended.wait()
            raise
        if task.cancelled():
            self._take_cancelled(task, batch)

    def _take_cancelled(self, task: asyncio.Task[None], batch: Batch) -> None:
        """The task was cancelled, and not by us: by a job in it, unless the whole loop is being shut down."""
        try:
            task.result()
        except asyncio.CancelledError as exc:
            outcome = failure_of(exc, self._spec)
            if outcome.error is not None and len(batch) > 1:
                raise WorkerDiedError(outcome.error, alone=False) from exc
            if batch.current is not None:
                batch.finish(batch.current, outcome)

    async def _run_all(self, batch: Batch, scope: anyio.CancelScope) -> None:
        with scope:
            while (job := batch.take()) is not None:
                batch.finish(job, await self._outcome_of(job))

    async def _outcome_of(self, job: Job) -> Outcome:
        spec = self._spec
        try:
            function: Any = job.run_function
            return Outcome(await function(job.create_running_job(spec.stopper), **spec.kwargs))
        except BaseException as exc:
            if self.loop.is_asyncio and isinstance(exc, asyncio.CancelledError):
                raise  # whose it is, is seen from outside
            return failure_of(exc, spec)


class SerialBackend(Backend):
    """One slot for all workers: it holds nothing of any of them."""

    cancellation: ClassVar[Cancellation] = "cancel"

    def __init__(self) -> None:
        self._slot: SerialSlot | None = None

    def slot(self, spec: RunSpec) -> Slot:
        if self._slot is None or self._slot.loop is not Loop.running():  # a new engine may be at home elsewhere
            self._slot = SerialSlot(spec)
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
