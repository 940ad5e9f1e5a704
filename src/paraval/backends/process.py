"""Jobs in worker processes of this machine, which can be killed one by one."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import pickle
import sys
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Final

import anyio
from anyio.abc import TaskGroup

from paraval import WORKING_FOLDER, checks
from paraval.backends.base import Backend, Cancellation, RunSpec, Slot
from paraval.backends.child import WorkerProcess
from paraval.backends.process_slot import ProcessSlot
from paraval.backends.tray import Tray
from paraval.errors import BadValueError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.memory import MemoryLimit, WatchedProcess, supervise
from paraval.worker.frames import Setup
from paraval.worker.pickling import PicklingFailed, dumps, dumps_together

__all__ = ["ProcessPoolEvaluator"]

_CAPTURED: Final = 1 << 16
_SUPERVISION_S: Final = 0.25


class ProcessBackend(Backend):
    """A worker process for each slot.

    Args:
        function: the run-function.
        max_jobs_per_worker: a worker is replaced after so many jobs; None: never.
        initializer: called in each new worker; or None.
        capture: how many bytes to keep of what a job prints; None: none, it goes where ours goes.
        memory_limit: what a job may hold; or None.
        num_workers: how many slots there may be, to which jobs are sent ahead; None: jobs come one by one.
        has_limit: whether jobs may run for some time only.
    """

    cancellation: ClassVar[Cancellation] = "kill"

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_jobs_per_worker: int | None,
        initializer: Callable[[], object] | None,
        capture: int | None,
        memory_limit: MemoryLimit | None = None,
        num_workers: int | None = None,
        has_limit: bool = False,
    ) -> None:
        self.memory_limit = memory_limit
        self.workers: set[WorkerProcess] = set()
        self._prepared: list[WorkerProcess] = []
        self._group: TaskGroup | None = None
        self.max_jobs_per_worker = max_jobs_per_worker
        self._capture = capture
        self.is_captured = capture is not None
        self.batch_limit = None if capture is None else 1  # whose output is it, else?
        is_plain = memory_limit is None and capture is None  # whose memory is it, else?
        has_files = num_workers is not None and Tray.can_be_had_by(num_workers)
        self.is_far = is_plain and has_files
        # Of jobs that come alone it is known which one runs. (A board is a file, too.)
        self.has_boards = has_limit and has_files and self.batch_limit is None
        self._function = function
        self._is_async = is_async(function)
        self._initializer = initializer
        try:
            dumps(initializer, "initializer")
        except PicklingFailed as exc:
            raise BadValueError(f"the initializer cannot be sent to a worker process: {exc}") from exc
        self._setup: bytes | None = None
        self._setup_of: list[Any] = []

    def slot(self, spec: RunSpec) -> Slot:
        return ProcessSlot(spec, self)

    def jobs_left(self, process: WorkerProcess | None) -> int | None:
        """Count the jobs that a worker may still run, or a new one may (``None``); None: any number."""
        if self.max_jobs_per_worker is None:
            return None
        return self.max_jobs_per_worker - (0 if process is None else process.jobs_done)

    def start_worker(self, setup: bytes) -> WorkerProcess:
        """Start a worker process.

        Raises:
            OSError: it cannot be started.
        """
        is_there = self._prepared and self._prepared[-1].setup is setup
        worker = self._prepared.pop() if is_there else self._new_worker(setup)
        self.workers.add(worker)
        return worker

    def _new_worker(self, setup: bytes) -> WorkerProcess:
        return WorkerProcess(setup, self._capture, has_tray=self.is_far, has_board=self.has_boards)

    def prepare(self, spec: RunSpec, workers: int) -> None:
        # A worker starts as slowly as an event loop. Where the system refuses, the slots will hear of it.
        with contextlib.suppress(OSError, PicklingFailed):
            while len(self._prepared) < min(workers, os.cpu_count() or 1):
                self._prepared.append(self._new_worker(self.setup(spec)))

    async def supervise(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                if self.memory_limit is not None:
                    group.start_soon(supervise, self._watched, self.memory_limit.interval)
                while True:
                    await anyio.sleep(_SUPERVISION_S)
                    for worker in self.workers:
                        if worker.is_gone:
                            worker.notice_the_end()
        finally:
            with anyio.CancelScope(shield=True):
                while self._prepared:
                    await self._prepared.pop().kill()

    def start_soon(self, function: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Start a task that may outlast what a slot does, and ends with the engine."""
        if self._group is None:
            raise RuntimeError("the backend is not supervised")
        self._group.start_soon(function)

    def _watched(self) -> list[WatchedProcess]:
        return [worker.memory for worker in self.workers if worker.memory is not None]

    def setup(self, spec: RunSpec) -> bytes:
        """Give the first frame for a worker: the same object for as long as nothing in it has changed."""
        # By identity: arrays have no plain equality, and what is changed in place would have to be pickled to be seen.
        now = [spec.stopper, *spec.kwargs, *spec.kwargs.values()] if spec.kwargs else [spec.stopper]
        same = len(now) == len(self._setup_of) and all(map(operator.is_, now, self._setup_of))
        if self._setup is None or not same:
            made = self._make_setup(spec)
            self._setup_of = now
            if made != self._setup:
                self._setup = made
        return self._setup

    def check(self, spec: RunSpec) -> None:
        """Refuse a run-function that cannot be sent.

        Raises:
            ValueError: naming the object inside it that is to blame.
        """
        try:
            self.setup(spec)
        except PicklingFailed as exc:
            raise BadValueError(
                f"the run-function {describe(self._function)} cannot be sent to a worker process: {exc}"
            ) from exc

    def _make_setup(self, spec: RunSpec) -> bytes:
        retry_on = dumps(spec.retry_on, "retry_on") if spec.retry_on else None
        program = dumps_together(
            {
                "the run-function": self._function,
                "run_function_kwargs": spec.kwargs,
                "the stopper": spec.stopper,
                "the initializer": self._initializer,
            }
        )
        setup = Setup(
            path=[entry or WORKING_FOLDER for entry in sys.path],
            argv=list(getattr(sys, "argv", ())),  # a program around the interpreter may have none
            program=program,
            origin=spec.origin,
            is_async=self._is_async,
            retry_on=retry_on,
            is_captured=self._capture is not None,
            kill_grace=spec.kill_grace,
            memory_limit=math.inf if self.memory_limit is None else self.memory_limit.bytes,
        )
        return pickle.dumps(("setup", setup), 5)


class ProcessPoolEvaluator(Evaluator):
    """Runs run-functions in ``num_workers`` processes of this machine; a job that must stop is killed, alone.

    For run-functions that compute. Functions defined in ``__main__``, lambdas and closures work, without any
    ``if __name__ == "__main__"``; an ``async`` run-function runs on an event loop of the worker. A worker that dies
    takes its own job only, and is replaced. No worker outlives the program, however that ends.

    See :class:`~paraval.Evaluator` for the other arguments.

    Args:
        max_jobs_per_worker: a worker is replaced after so many jobs; None: never.
        initializer: called without arguments in each new worker, before its first job.
        capture_output: keep the tail of what a job prints, also below Python and when it crashes, on ``job.stdout``
            and ``job.stderr`` and in the metadata: 64 KiB of each (True), or so many bytes.

    Raises:
        ValueError: the run-function cannot be sent to another process; the message names the object inside it.
    """

    cancellation: ClassVar[Cancellation] = "kill"
    watches_memory: ClassVar[bool] = True
    parallel: ClassVar[str] = "processes"
    _backend_class: ClassVar[type[ProcessBackend]] = ProcessBackend

    def __init__(
        self,
        run_function: Callable[..., Any],
        *args: Any,
        max_jobs_per_worker: int | None = None,
        initializer: Callable[[], object] | None = None,
        capture_output: bool | int = False,
        **kwargs: Any,
    ) -> None:
        self._capture = checks.capture("capture_output", capture_output, default=_CAPTURED)
        if max_jobs_per_worker is not None:
            checks.positive_int("max_jobs_per_worker", max_jobs_per_worker)
        self._max_jobs_per_worker = max_jobs_per_worker
        self._initializer = checks.function_or_none("initializer", initializer)
        super().__init__(run_function, *args, **kwargs)

    def _make_backend(self) -> Backend:
        backend = self._backend_class(
            self.run_function,
            max_jobs_per_worker=self._max_jobs_per_worker,
            initializer=self._initializer,
            capture=self._capture,
            memory_limit=self._memory_limit,
            num_workers=self.num_workers,
            has_limit=self._job_timeout is not None and self._batching is not False,
        )
        backend.check(self._spec)
        return backend
