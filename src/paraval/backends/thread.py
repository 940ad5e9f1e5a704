"""Jobs in threads of this process."""

from __future__ import annotations

import inspect
import os
import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, ClassVar

import anyio

from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, WorkerDiedError, outcome_of
from paraval.evaluator import Evaluator
from paraval.job import Job, JobStatus
from paraval.loops import Loop
from paraval.outcome import JobError, Outcome, returned
from paraval.worker.coroutines import CoroutineRunner
from paraval.worker.main import exit_fork

__all__ = ["ThreadPoolEvaluator"]


class ThreadSlot(Slot):
    """One thread, which lives as long as the slot.

    A thread cannot be killed: a job that goes on after it was asked to stop is left behind, and the slot is not used
    again until that call has really returned.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._loop = Loop.running()
        self._returned = self._loop.event()
        self._returned.set()
        self._inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._thread: _JobThread | None = None
        self._ended: Callable[[], object] = _nobody

    async def run(self, batch: Batch) -> None:
        if self._thread is None:
            thread = _JobThread(self._spec, self._inbox, self._hand_back)
            try:
                thread.start()
            except RuntimeError as exc:  # the system has no more; the next batch tries anew
                batch.take_all()  # it never got to them
                raise WorkerDiedError(JobError("worker_died", f"no thread could be started: {exc}")) from exc
            self._thread = thread
        self.begin(batch, _nobody, _nobody)
        try:
            await self._returned.wait()
        except BaseException:
            await self.stop()
            raise

    @property
    def is_prompt(self) -> bool:
        return self._thread is not None

    def begin(self, batch: Batch, ended: Callable[[], object], needs_task: Callable[[], object]) -> bool:  # noqa: ARG002 - it never does
        self._returned = self._loop.event()
        self._ended = ended
        self._inbox.put(batch)
        return True

    async def stop(self) -> None:
        if self._thread is not None:
            self._thread.cancel_coroutine()
        with anyio.CancelScope(shield=True), anyio.move_on_after(self._spec.patience):
            await self._returned.wait()

    async def recover(self) -> None:
        await self._returned.wait()

    async def close(self) -> None:
        self._inbox.put(None)

    def _hand_back(self) -> None:
        """Say, from the thread, that the batch is through. A loop that is gone has nobody waiting."""
        self._loop.call_soon(self._has_returned)

    def _has_returned(self) -> None:
        self._returned.set()
        ended, self._ended = self._ended, _nobody
        ended()


class _JobThread(threading.Thread):
    """Runs batches until it gets None. A daemon: a job that never returns must not keep the program from ending."""

    def __init__(self, spec: RunSpec, inbox: queue.SimpleQueue[Batch | None], hand_back: Any) -> None:
        super().__init__(name="paraval-job", daemon=True)
        self._spec = spec
        self._inbox = inbox
        self._hand_back = hand_back
        self._runner: CoroutineRunner | None = None
        self._process = _process

    def run(self) -> None:
        try:
            while (batch := self._inbox.get()) is not None:
                job = batch.take()
                while job is not None:
                    batch.finish(job, self._outcome_of(job))
                    job = batch.take(batch.last_end)
                self._hand_back()
                del batch, job  # an idle thread must not keep the last job alive
        finally:
            if self._runner is not None:
                self._runner.close()

    def cancel_coroutine(self) -> None:
        """Cancel the current job if it is a coroutine. Called from the engine's loop."""
        if self._runner is not None:
            self._runner.cancel()

    def _outcome_of(self, job: Job) -> Outcome:
        spec = self._spec
        try:
            outcome = returned(copy_context().run(self._call, job))  # its context variables are nobody else's
        except BaseException as exc:  # noqa: BLE001 - whatever a job raises, SystemExit too, is its own failure
            if _process is not self._process:
                exit_fork(exc)
            return outcome_of(exc, spec)
        if _process is not self._process:
            exit_fork(None)  # the job forked, and its child came back too, to a thread without a program around it
        return outcome

    def _call(self, job: Job) -> Any:
        function: Any = job.run_function
        value = function(job.create_running_job(self._spec.stopper), **self._spec.kwargs)
        return self._complete(value, job) if inspect.iscoroutine(value) else value

    def _complete(self, coroutine: Any, job: Job) -> Any:
        """Run a coroutine to its end on this thread's own loop."""
        if self._runner is None:
            self._runner = CoroutineRunner()
        return self._runner.run(coroutine, lambda: job._status is JobStatus.CANCELLING)


_process = object()
"""Of this process, and another one in a fork. To ask the system costs a tenth of what a tiny job does."""


def _note_fork() -> None:
    global _process  # noqa: PLW0603 - there is one for each process
    _process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _nobody() -> None:
    """The task that waits for the batch hears of its end in another way."""


class ThreadBackend(Backend):
    """A thread for each slot."""

    cancellation: ClassVar[Cancellation] = "cooperative"

    def slot(self, spec: RunSpec) -> Slot:
        return ThreadSlot(spec)


class ThreadPoolEvaluator(Evaluator):
    """Runs run-functions in ``num_workers`` threads of this process.

    For run-functions that release the GIL (NumPy, scikit-learn, I/O). An ``async`` run-function runs on an event loop
    of its thread. Cancellation is cooperative: ``job.stopped()`` turns true (a coroutine is cancelled); a job that goes
    on is given up after ``kill_grace`` seconds, and its thread is not used again until the call has really returned.

    See :class:`~paraval.Evaluator` for the arguments.
    """

    cancellation: ClassVar[Cancellation] = "cooperative"
    parallel: ClassVar[str] = "threads"

    def _make_backend(self) -> Backend:
        return ThreadBackend()
