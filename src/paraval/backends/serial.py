"""Jobs as coroutines on the engine's own loop."""

from __future__ import annotations

from typing import Any, ClassVar

from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, failure_of
from paraval.errors import BadValueError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.outcome import Outcome

__all__ = ["SerialEvaluator"]


class SerialSlot(Slot):
    """Awaits the run-function in the worker's own task: a job costs no task and no cancel scope of its own."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec

    async def run(self, batch: Batch) -> None:
        spec = self._spec
        while (job := batch.take()) is not None:
            try:
                function: Any = job.run_function
                outcome = Outcome(await function(job.create_running_job(spec.stopper), **spec.kwargs))
            except BaseException as exc:  # noqa: BLE001 - failure_of raises on what is not the job's own
                outcome = failure_of(exc, spec)
            batch.finish(job, outcome)


class SerialBackend(Backend):
    """One slot for all workers: it holds nothing of any of them."""

    cancellation: ClassVar[Cancellation] = "cancel"

    def __init__(self) -> None:
        self._slot: SerialSlot | None = None

    def slot(self, spec: RunSpec) -> Slot:
        if self._slot is None:
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
