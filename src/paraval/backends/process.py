"""Jobs in worker processes of this machine, which can be killed one by one."""

from __future__ import annotations

import contextlib
import errno
import math
import operator
import os
import pickle
import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ClassVar, Final

import anyio
from anyio.abc import TaskGroup

from paraval import WORKING_FOLDER, checks
from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, WorkerDiedError
from paraval.backends.channel import Frame
from paraval.backends.child import WorkerProcess
from paraval.backends.packing import Packer, outcome_of_worker, unpack_frame, unpicklable
from paraval.backends.storage_call import StorageCall
from paraval.errors import BadValueError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.job import Job, JobStatus
from paraval.loops import call_in_thread
from paraval.memory import MemoryLimit, WatchedProcess, supervise
from paraval.outcome import JobError, Outcome, returned
from paraval.worker.main import Sealed, Setup
from paraval.worker.pickling import PicklingFailed, PiecewisePickler, dumps, dumps_together

__all__ = ["ProcessPoolEvaluator"]

_REST_S: Final = 0.010
_LIGHT: Final = 8_000
"""Bytes: of frames that are no larger, a socket takes as many as come in that time."""
_CAPTURED: Final = 1 << 16
_SUPERVISION_S: Final = 0.25
_PASSING: Final = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""Reasons for which the system cannot start a process now, and may be able to a moment later."""
_PAUSES_S: Final = (0.05, 0.1, 0.25, 0.5)
"""How long that moment may be, each time."""
_OF_JOBS: Final = frozenset({"done", "back"})
_WRAPPED: Final = frozenset({Sealed, Outcome})


class ProcessSlot(Slot):
    """One worker process at a time, on a socket pair of its own; a new one when that one died or was killed."""

    def __init__(self, spec: RunSpec, backend: ProcessBackend) -> None:
        self._spec = spec
        self._backend = backend
        self._packer = Packer()
        self._process: WorkerProcess | None = None
        self._call: StorageCall | None = None
        self._sent: dict[str, Job] = {}
        self._cannot_be_set_up = False

    async def run(self, batch: Batch) -> None:
        while batch.waiting:
            try:
                setup = self._backend.setup(self._spec)
            except PicklingFailed as exc:  # static arguments that were changed since the evaluator was made
                self._fail(batch, batch.take_all(), Outcome(error=unpicklable(exc)))
                return
            process = self._process
            if process is None or not self._can_go_on(process, setup):
                await self._let_go()
                process = None
            # Before a worker is there: where none can be started, these jobs end, or they would be tried for ever.
            sent = batch.take_all(self._backend.jobs_left(process))
            if process is None:
                batch.wait_for_worker()
                try:
                    process = await self._start_worker(setup)
                except Exception as exc:  # noqa: BLE001 - whatever keeps a program from being started
                    message = f"a worker process could not be started: {type(exc).__name__}: {exc}"
                    error = JobError("worker_died", message, host=os.uname().nodename)
                    self._fail(batch, sent, Outcome(error=error, may_retry=True))
                    continue
            await self._run_on(process, batch, sent)

    def _can_go_on(self, process: WorkerProcess, setup: bytes) -> bool:
        """Whether the worker is there and can take the next jobs."""
        # One that died while it had nothing to do is replaced in silence: no job is to blame.
        if process.setup is not setup or process.is_broken or process.is_gone:
            return False
        limit = self._backend.memory_limit
        return limit is None or process.look_at_memory() <= limit.bytes  # else earlier jobs have filled it

    async def _start_worker(self, setup: bytes) -> WorkerProcess:
        for pause in _PAUSES_S:
            try:
                process = self._backend.start_worker(setup)
                break
            except OSError as exc:
                if exc.errno not in _PASSING:
                    raise
            await anyio.sleep(pause)
        else:
            process = self._backend.start_worker(setup)
        self._process = process
        self._call = None  # one that is under way was of a worker that is gone
        self._cannot_be_set_up = False
        return process

    async def _run_on(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        count = len(sent)
        self._sent = sent
        frame = await self._encode(batch, sent)
        process.output()  # what was printed between jobs belongs to none
        try:
            if sent:
                await process.send(frame)
                if self._backend.memory_limit is not None:
                    process.watch_memory(self._backend.memory_limit.bytes)
            while sent:
                if self._rest(process, batch):
                    await self._leave_alone(process, batch, sent)
                else:
                    await self._receive(process, batch, sent)
                batch.has_waited = True
                if sent:
                    batch.report()
            process.memory = None
        except OSError as exc:  # the end of the file, or a broken pipe: the worker is gone
            with anyio.CancelScope(shield=True):
                self._forget()
                error = await process.post_mortem()
                self._attach_output(process, sent.values())
            if process.memory is None or not self._settle_excess(process.memory, batch, sent, count, error):
                raise WorkerDiedError(error) from exc
        except BaseException:
            with anyio.CancelScope(shield=True):
                self._forget()
                await self._stop(process, batch, sent)
            raise
        process.jobs_done += count
        if self._backend.jobs_left(process) == 0 or self._cannot_be_set_up:
            await self._let_go()

    async def _leave_alone(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Look now and then what the worker has reported, for as long as it has enough to do."""
        with process.resting():
            while rest := self._rest(process, batch):
                await process.rest(rest)
                before = len(sent)
                self._look(process, batch, sent)
                if len(sent) < before and sent:
                    batch.report()

    def _rest(self, process: WorkerProcess, batch: Batch) -> float:
        """Give the seconds for which the worker can be left alone: 0 if it may want something.

        Where all processors are busy, to wake up for each job of some milliseconds costs more than all the rest: what
        the interpreter needs is in no cache by then. All workers' rests end at the same moments, and none is so long
        that anybody would notice.
        """
        if batch.seconds_left() < _REST_S or batch.waits_for_worker:
            return 0.0
        if process.makes_calls or process.largest > _LIGHT or process.wants_to_be_heard:
            return 0.0
        now = self._spec.clock()
        return (now // _REST_S + 1) * _REST_S - now

    def _settle_excess(
        self, memory: WatchedProcess, batch: Batch, sent: dict[str, Job], count: int, error: JobError
    ) -> bool:
        """Settle the job whose worker was killed for its memory; False when it was not killed for that.

        Raises:
            WorkerDiedError: jobs that the worker had run before may have left it there; what is left is run again.
        """
        size, limit, now = memory.exceeded, self._backend.memory_limit, self._spec.clock()
        if size is None or limit is None:
            return False
        if count > 1 or memory.is_suspect_only:
            raise WorkerDiedError(error, alone=False)
        for job in list(sent.values()):
            started = now if job._started is None else job._started
            job.metadata["memory"] = size
            batch.finish_sent(job, limit.outcome(size, started, now, error.pid), started, now)
        return True

    def catch_up(self, batch: Batch) -> None:
        process = self._process
        if process is not None and process.is_resting:
            self._look(process, batch, self._sent)

    def _look(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        for frame in process.look(_OF_JOBS):
            self._take(process, batch, sent, frame)

    async def recover(self) -> None:
        """Wait for the call that a killed job was in the middle of, so that no more than one is under way."""
        if self._call is not None:
            await self._call.end()

    async def close(self) -> None:
        await self._let_go()

    async def _let_go(self) -> None:
        process = self._process
        if process is not None:
            self._forget()
            with anyio.CancelScope(shield=True):
                await process.retire()

    def _forget(self) -> None:
        if self._process is not None:
            self._backend.workers.discard(self._process)
            self._process = None

    @staticmethod
    def _attach_output(process: WorkerProcess, jobs: Iterable[Job]) -> None:
        output = process.output()
        if output is None:
            return
        for job in jobs:
            job.stdout, job.stderr = output
            job.metadata["stdout"], job.metadata["stderr"] = output

    async def _encode(self, batch: Batch, sent: dict[str, Job]) -> bytes:
        parcel = await self._packer.pack(list(sent.values()))
        for job, reason in parcel.failures:
            self._fail(batch, {job.id: job}, Outcome(error=unpicklable(reason)))
        frame = ("jobs", parcel.items, batch.in_order, batch.hold_s)
        if parcel.is_large:
            return await call_in_thread(PiecewisePickler().dumps, frame, "the jobs", abandon_on_cancel=True)
        return pickle.dumps(frame, 5)

    def _fail(self, batch: Batch, jobs: dict[str, Job], outcome: Outcome) -> None:
        now = self._spec.clock()
        for job in list(jobs.values()):
            batch.finish_sent(job, outcome, now, now)

    async def _receive(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Wait for what the worker has to say; reply when it calls the storage."""
        if self._call is None:
            for frame in await process.receive():
                if frame[0] == "large":
                    with batch.taking_in():
                        frame = await unpack_frame(frame[1])  # noqa: PLW2901 - it is the same one
                self._take(process, batch, sent, frame)
        if self._call is not None:
            reply = await self._call.reply()
            self._call = None
            await process.send(reply)

    def _take(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job], frame: Frame) -> None:
        match frame[0]:
            case "done":
                finish, is_captured = batch.finish_sent, self._backend.is_captured
                for job_id, started, finished, error, value in frame[1]:
                    job = sent.get(job_id)
                    if job is not None:
                        if is_captured:
                            self._attach_output(process, (job,))
                        is_plain_result = error is None and type(value) not in _WRAPPED
                        outcome = returned(value) if is_plain_result else outcome_of_worker(error, value)
                        finish(job, outcome, started, finished)
            case "back":
                job_ids, current, started = frame[1:]
                if current in sent or not sent.keys().isdisjoint(job_ids):  # else it is late, and means jobs before
                    batch.give_back(job_ids, current, started)
            case "call":
                process.makes_calls = True
                self._call = StorageCall(self._spec.storage, self._backend.start_soon, *frame[1:])
            case "ready":
                process.base = frame[1]
                batch.worker_is_ready()
            case "broken":
                self._cannot_be_set_up = True
                error = JobError(*frame[1])
                error = error._replace(message=f"the worker could not be set up: {error.message}")
                self._attach_output(process, sent.values())
                self._fail(batch, sent, Outcome(error=error))

    async def _stop(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Ask the worker to stop, and kill it: at the latest after the grace."""
        self._look(process, batch, sent)  # what has ended before it is asked to stop counts
        to_stop = sent
        if batch.in_order:  # another may have begun meanwhile: what it does when it is asked to stop must not count
            to_stop = {job_id: job for job_id, job in sent.items() if job._status is JobStatus.CANCELLING}
        if batch.hurry or (batch.in_order and batch.current not in to_stop.values()):
            await process.kill()  # the job to stop is not known to be the one that runs: asking could hit another
            return
        try:
            process.ask_to_stop()
            with contextlib.suppress(Exception), anyio.move_on_after(self._spec.kill_grace):
                while not sent.keys().isdisjoint(to_stop):
                    await self._receive(process, batch, to_stop)
        finally:
            await process.kill()
        self._attach_output(process, sent.values())


class ProcessBackend(Backend):
    """A worker process for each slot."""

    cancellation: ClassVar[Cancellation] = "kill"

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_jobs_per_worker: int | None,
        initializer: Callable[[], object] | None,
        capture: int | None,
        memory_limit: MemoryLimit | None = None,
    ) -> None:
        self.memory_limit = memory_limit
        self.workers: set[WorkerProcess] = set()
        self._prepared: list[WorkerProcess] = []
        self._group: TaskGroup | None = None
        self.max_jobs_per_worker = max_jobs_per_worker
        self._capture = capture
        self.is_captured = capture is not None
        self.batch_limit = None if capture is None else 1  # whose output is it, else?
        self.is_far = memory_limit is None  # whose memory is it, else?
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
        worker = self._prepared.pop() if is_there else WorkerProcess(setup, self._capture)
        self.workers.add(worker)
        return worker

    def prepare(self, spec: RunSpec, workers: int) -> None:
        # A worker starts as slowly as an event loop. Where the system refuses, the slots will hear of it.
        with contextlib.suppress(OSError, PicklingFailed):
            while len(self._prepared) < min(workers, os.cpu_count() or 1):
                self._prepared.append(WorkerProcess(self.setup(spec), self._capture))

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
            argv=list(sys.argv),
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
        )
        backend.check(self._spec)
        return backend
