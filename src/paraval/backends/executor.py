"""Jobs in any ``concurrent.futures.Executor``."""

from __future__ import annotations

import logging
import operator
import os
import pickle
import queue
import time
import uuid
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ClassVar, Final

import anyio

from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, WorkerDiedError
from paraval.backends.futures import (
    Call,
    CallLostError,
    ExecutorSlot,
    Pool,
    RefusedError,
    SharedPool,
    close_before_pools_wait,
)
from paraval.backends.packing import Packer, is_large, outcome_of_worker, unpack, unpicklable
from paraval.backends.thread import _JobThread
from paraval.errors import BadValueError, WrongTypeError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.job import JobStatus
from paraval.loops import call_in_thread
from paraval.outcome import JobError, Outcome, error_from_exception
from paraval.worker.board import Board
from paraval.worker.frames import Sealed
from paraval.worker.pickling import PicklingFailed, dumps, dumps_together
from paraval.worker.remote import Done, Program, Report, run_jobs

__all__ = ["ExecutorEvaluator"]

_logger = logging.getLogger("paraval")

_MOST_AT_ONCE: Final = 64
_SMALL: Final = 1 << 14
"""A program of so many bytes goes along with every call; a larger one only to where it is not known."""
_SUPERVISION_S: Final = 0.5
_UNKNOWN: Final = 255
"""The exit code of a process whose own cannot be had any more: multiprocessing's fork server tells it once, and two
threads asked; or the server has died. (Or the job has ended its process with this very code.) None may come of that,
too."""
_EXCUSES: Final = 2
"""How often a job is run again though it was alone when its process died, as it may not be to blame."""
_LOOK_S: Final = 0.05
"""How often to look whether a call has begun, where the time of a job is limited."""


class ExecutorEvaluator(Evaluator):
    """Runs run-functions in an executor of yours: any ``concurrent.futures.Executor``, or a factory of one.

    For pools that a program has anyway, and for those of other libraries (``client.get_executor()`` of dask). In a
    ``ThreadPoolExecutor`` run-functions are called as they are; to any other executor they are sent, by value if need
    be, so that lambdas and closures work. A stopper there sees its own job only. What a job there stores
    (``job.record()``) is stored at once where every process of this machine can use the storage (SQLite, Redis, shared
    memory), else with its outcome. An ``async`` run-function runs on an event loop of the worker.

    Cancellation is cooperative: ``job.stopped()`` turns true (in other processes: those of this machine), a coroutine
    is cancelled; a job that goes on is given up after ``kill_grace`` seconds, and its slot is not used again until the
    call has really returned.

    A pool of processes breaks as a whole when one of them dies. With a factory it is replaced, and the jobs that were
    in it are run again, each in an executor of its own: so only the job fails that is to blame. Without a factory they
    all fail, and so does every later job. A pool from a factory starts all its processes with its first job.

    How a process died (``exit_code``, ``signal`` and ``pid`` of ``job.error``) is known where the job was alone in a
    ``ProcessPoolExecutor`` of Python's own, as it is in the end with a factory; of other executors only that the call
    was lost.

    What a pool's own ``initializer`` sets in a module is there for the run-function. What it sets in ``__main__`` is
    not: a function from there goes by value, with globals of its own, which only its keyword arguments share.

    Such a pool should start its processes by ``"spawn"`` or ``"forkserver"`` (its ``mp_context``): a fork of a program
    that has threads, as any with an evaluator, may hang now and then.

    See :class:`~paraval.Evaluator` for the other arguments; ``num_workers`` is how many calls are in the executor at a
    time, so it should not exceed the executor's own number of workers.

    Args:
        executor: an executor, which the evaluator never shuts down; or a function without arguments that makes one,
            which is shut down at ``close``.

    Raises:
        TypeError: ``executor`` is neither, or the factory makes something else.
        ValueError: the factory failed, or the run-function cannot be sent; the message names the object inside it.
    """

    cancellation: ClassVar[Cancellation] = "cooperative"
    parallel: ClassVar[str] = "calls in an executor"
    several_hosts: ClassVar[bool] = True

    def __init__(
        self,
        run_function: Callable[..., Any],
        *args: Any,
        executor: Executor | Callable[[], Executor] | None = None,
        **kwargs: Any,
    ) -> None:
        self._executor = executor
        super().__init__(run_function, *args, **kwargs)

    def _make_backend(self) -> Backend:
        return ExecutorBackend(self._executor, self._spec, self._job_timeout)


close_before_pools_wait(ExecutorEvaluator)


class ExecutorBackend(Backend):
    """Slots that share an executor.

    Args:
        executor: as the evaluator's.
        spec: its run-function is refused when it must be sent and cannot be.
        job_timeout: of the evaluator. With it jobs travel one by one, so that it is known which one takes long.
    """

    cancellation: ClassVar[Cancellation] = "cooperative"

    def __init__(self, executor: object, spec: RunSpec, job_timeout: float | None) -> None:
        self.job_timeout = job_timeout
        self._factory: Callable[[], Executor] | None = None
        if isinstance(executor, Executor):
            self._next: Executor | None = executor
        elif callable(executor):
            self._factory = lambda: _made_by(executor)
            self._next = self._factory()
        else:
            raise WrongTypeError(
                "executor must be a concurrent.futures.Executor, or a function without arguments that makes one, "
                f"not {executor!r}"
            )
        self._is_local = _is_local(self._next)
        self.batch_limit = None if self._is_local else _MOST_AT_ONCE if job_timeout is None else 1
        self._shared: SharedPool | None = None
        self._program: tuple[str, Program] | None = None
        self._program_of: list[Any] = []
        self._has_told_lack = False
        if not self._is_local:
            try:
                self.program(spec)
            except PicklingFailed as exc:
                what = describe(spec.function)
                raise BadValueError(f"the run-function {what} cannot be sent to the executor: {exc}") from exc

    def slot(self, spec: RunSpec) -> Slot:
        if self._shared is None or not self._shared.is_in_use:
            self._shared = SharedPool(self._make_pool, replaces=self._factory is not None)
        if self._is_local:
            return LocalSlot(spec, self._shared)
        return RemoteSlot(spec, self._shared, self)

    async def supervise(self) -> None:
        while True:
            await anyio.sleep(_SUPERVISION_S)
            for pool in list(self._shared.pools) if self._shared is not None else ():
                pool.look_after()

    def _make_pool(self) -> Pool:
        executor = self._next
        if self._factory is not None:
            self._next = None
            executor = self._factory() if executor is None else executor
        return Pool(_checked(executor, "executor"), is_ours=self._factory is not None)

    def board(self) -> Board:
        """Make a board for a slot; say it once, when workers cannot open it."""
        board = Board()
        if board.lack is not None and not self._has_told_lack:
            self._has_told_lack = True
            _logger.warning("jobs in the executor cannot be asked to stop: no shared file: %s", board.lack)
        return board

    def program(self, spec: RunSpec) -> tuple[str, Program]:
        """Give what is the same for all calls, and the token that names it.

        Raises:
            PicklingFailed: it cannot be sent.
        """
        # By identity: arrays have no plain equality, and what is changed in place would have to be pickled to be seen.
        now = [spec.stopper, *spec.kwargs, *spec.kwargs.values()]
        same = len(now) == len(self._program_of) and all(map(operator.is_, now, self._program_of))
        if self._program is None or not same:
            program = Program(
                parts=dumps_together(
                    {
                        "the run-function": spec.function,
                        "run_function_kwargs": spec.kwargs,
                        "the stopper": spec.stopper,
                    }
                ),
                is_async=is_async(spec.function),
                retry_on=dumps(spec.retry_on, "retry_on"),
                storage=dumps(spec.storage, "the storage") if spec.storage.can_travel else None,
                driver=os.getpid(),
                origin=spec.origin,
                kill_grace=spec.kill_grace,
            )
            self._program_of = now
            self._program = uuid.uuid4().hex, program
        return self._program


def _made_by(factory: Callable[[], object]) -> Executor:
    try:
        made = factory()
    except (Exception, SystemExit) as exc:
        raise BadValueError(
            f"the factory of executors {describe(factory)} failed: {type(exc).__name__}: {exc}"
        ) from exc
    return _checked(made, f"what the factory {describe(factory)} makes")


def _checked(value: object, what: str) -> Executor:
    if not isinstance(value, Executor):
        raise WrongTypeError(f"{what} must be a concurrent.futures.Executor, not {value!r}")
    return value


def _not_a_report(result: object) -> JobError:
    what = "None" if result is None else f"an object of type {type(result).__name__}"
    return JobError(
        "worker_died", f"the executor gave back {what} where the jobs' report should be: it must run what it is given"
    )


def _is_local(executor: Executor) -> bool:
    """Whether calls share the objects of this interpreter, as far as can be known."""
    in_interpreters = getattr(futures, "InterpreterPoolExecutor", ())  # Python 3.14; it is a ThreadPoolExecutor
    return isinstance(executor, ThreadPoolExecutor) and not isinstance(executor, in_interpreters)


class LocalSlot(ExecutorSlot):
    """Runs batches in a thread of the executor, where a job is the very object that the engine has."""

    def __init__(self, spec: RunSpec, shared: SharedPool) -> None:
        super().__init__(spec, shared)
        self._num_lost = 0

    async def run(self, batch: Batch) -> None:
        inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        inbox.put(batch)
        inbox.put(None)
        runner = _JobThread(self._spec, inbox, lambda: None)  # not to be started: a thread of the executor runs it
        try:
            pool, call = await self._submit(runner.run)
            try:
                await call.wait()
            except BaseException:
                self._left = pool, call
                if not call.future.cancel():  # else it had not begun
                    runner.cancel_coroutine()
                    with anyio.CancelScope(shield=True), anyio.move_on_after(self._spec.patience):
                        await call.wait()
                raise
            result = await self._result(pool, call)
            self._num_lost = 0
            if batch.waiting:
                self._fail_all(batch, _not_a_report(result))
        except RefusedError as exc:
            self._fail_all(batch, exc.error)
        except WorkerDiedError as exc:
            self._num_lost += 1
            if isinstance(exc, CallLostError) and self._shared.replaces and self._num_lost <= _EXCUSES:
                raise  # it never got to them, and maybe the next executor does
            batch.take_all()
            # No job ends a thread: the executor's own initializer failed, and would for each job that came alone.
            raise WorkerDiedError(exc.error) from exc.__cause__


class RemoteSlot(ExecutorSlot):
    """Sends batches to where the objects of this process are not known.

    Jobs that were in an executor when it broke are suspect. Each of them is then run in an executor that nobody else
    uses, which shows whose fault it was, and holds up no other slot.
    """

    def __init__(self, spec: RunSpec, shared: SharedPool, backend: ExecutorBackend) -> None:
        super().__init__(spec, shared)
        self._backend = backend
        self._packer = Packer()
        self._board = backend.board()
        self._board_is_seen = False
        self._submitted = 0.0
        self._num_calls = 0
        self._own: Pool | None = None
        self._wants_own = False
        self._known: str | None = None

    async def run(self, batch: Batch) -> None:
        sent = batch.take_all()
        job_ids, all_args, failures, _ = await self._packer.pack(list(sent.values()))
        jobs = list(zip(job_ids, all_args, strict=True))
        now = self._spec.clock()
        for job, reason in failures:
            batch.finish_sent(job, Outcome(error=unpicklable(reason)), now, now)
        if not sent:
            return
        suspects = self._shared.suspects
        self._wants_own = not suspects.keys().isdisjoint(sent)
        job_ids = list(sent)
        try:
            await self._take(batch, await self._report(batch, jobs))
        except RefusedError as exc:
            self._fail_all(batch, exc.error)
        except PicklingFailed as exc:  # static arguments that were changed since the evaluator was made
            self._fail_all(batch, unpicklable(exc))
        except WorkerDiedError as exc:
            is_excused = self._suspect(job_ids, exc)
            raise WorkerDiedError(exc.error, alone=exc.alone and not is_excused) from exc.__cause__
        for job_id in job_ids:
            suspects.pop(job_id, None)

    def _suspect(self, job_ids: list[str], death: WorkerDiedError) -> bool:
        """Take note of jobs whose process died; tell whether even one that was alone there has another chance."""
        suspects, error = self._shared.suspects, death.error
        times = {job_id: suspects.get(job_id, 0) for job_id in job_ids}
        # Without a pid it was no process of ours; without a board nobody can say.
        had_begun = self._board.current is not None or error.pid is None or self._board.lack is not None
        is_lost = isinstance(death, CallLostError) and self._shared.replaces
        is_unknown = error.pid is not None and error.signal is None and error.exit_code in {None, _UNKNOWN}
        may_be_innocent = is_lost or is_unknown or not had_begun
        is_excused = may_be_innocent and max(times.values()) < _EXCUSES
        for job_id in job_ids:
            suspects[job_id] = times[job_id] + is_excused
        return is_excused

    async def recover(self) -> None:
        if self._own is not None:
            await self._drop_own()  # whatever runs in there, nobody else is hurt
        await super().recover()
        self._board.clear()

    async def close(self) -> None:
        if self._left is None:
            self._board.close()
        else:  # the call shall find it when its turn comes, and run nothing
            self._left[1].future.add_done_callback(lambda _future: self._board.close())
        await self._drop_own()
        await super().close()

    async def _pool(self) -> Pool:
        if self._own is not None and (self._own.failure is not None or not self._wants_own):
            await self._drop_own()
        if not self._wants_own:
            return await super()._pool()
        if self._own is None:
            self._own = await self._shared.new()
        return self._own

    async def _drop_own(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            await own.close()

    # -- the call ------------------------------------------------------------------------------------------------------

    async def _report(self, batch: Batch, jobs: list[tuple[str, Any]]) -> Report:
        """Have jobs run."""
        token, program = self._backend.program(self._spec)
        is_small = sum(len(part) for part in program if isinstance(part, bytes)) <= _SMALL
        for along in (program if is_small or self._known != token else None, program):
            report = await self._call(batch, token, along, jobs)
            if report is not None:
                self._known = token
                return report
        raise RefusedError(JobError("worker_died", "the executor dropped what it was sent"))

    async def _call(
        self, batch: Batch, token: str, program: Program | None, jobs: list[tuple[str, Any]]
    ) -> Report | None:
        self._board.clear()
        self._submitted = time.monotonic()
        self._num_calls += 1
        pool, call = await self._submit(run_jobs, token, program, jobs, self._board.address, self._num_calls)
        try:
            await self._wait(batch, pool, call)
        except BaseException:
            self._left = pool, call
            with anyio.CancelScope(shield=True):
                await self._stop(batch, jobs, pool, call)
            raise
        report = await self._result(pool, call)
        if report is None or isinstance(report, Report):
            return report
        raise RefusedError(_not_a_report(report))

    async def _wait(self, batch: Batch, pool: Pool, call: Call) -> None:
        """Wait for the end. Where the time of a job is limited, none passes before it has begun."""
        if self._backend.job_timeout is not None:
            batch.wait_for_worker()
            while not self._has_begun(pool, call):
                with anyio.move_on_after(_LOOK_S):
                    await call.wait()
                    return
            batch.worker_is_ready()
        await call.wait()

    def _has_begun(self, pool: Pool, call: Call) -> bool:
        if self._board.current is not None:
            self._board_is_seen = True
            return True
        # A worker on another machine cannot say so: then what the executor says must do, which is less exact.
        is_silent = self._board.lack is not None or not (self._board_is_seen or pool.is_of_processes)
        return is_silent and call.future.running()

    async def _stop(self, batch: Batch, jobs: list[tuple[str, Any]], pool: Pool, call: Call) -> None:
        """Ask a call to end, and wait for that: at the longest for the grace. It hands in what it has done by then."""
        self._board.hold()
        place = self._board.current
        if place is not None:
            job = next((job for job in batch.in_hand if job.id == jobs[place][0]), None)
            if job is not None and job._status is JobStatus.CANCELLING:  # else another is meant, which never begins now
                self._board.stop(place)
        if self._has_begun(pool, call):
            with anyio.move_on_after(self._spec.patience):
                await call.wait()
        elif not pool.is_of_processes:
            call.future.cancel()  # where that does nothing, it runs no job when its turn comes
        if call.future.done() and call.failure is None and isinstance(report := call.future.result(), Report):
            for done in report.done:
                await self._hand_in(batch, done, 0.0)

    # -- what goes there, and what comes back --------------------------------------------------------------------------

    async def _take(self, batch: Batch, report: Report) -> None:
        if report.broken is not None:
            error = JobError(*report.broken)
            message = f"the run-function could not be loaded by the executor: {error.message}"
            self._fail_all(batch, error._replace(message=message))
            return
        # The clocks of two machines have nothing to do with one another; but what came back has ended by now.
        now = time.monotonic()
        is_same_clock = all(self._submitted <= done.started <= done.finished <= now for done in report.done)
        shift = 0.0 if is_same_clock else now - report.done[-1].finished
        for done in report.done:
            await self._hand_in(batch, done, shift)
        batch.leave_out([job for job_id in report.left if (job := batch.find(job_id)) is not None])
        # How long the trip takes says nothing about the jobs; a long one is the more reason to send several at once.
        batch.created = self._spec.clock() - sum(done.finished - done.started for done in report.done)

    async def _hand_in(self, batch: Batch, done: Done, shift: float) -> None:
        job = batch.find(done.job_id)
        if job is None:
            return
        if is_large(done.value):
            with batch.taking_in():
                outcome = await unpack(done.value)
        else:
            outcome = outcome_of_worker(done.error, done.value)
        if done.notes is not None:
            outcome = await self._store(done.notes, outcome)
        shift -= self._spec.origin
        batch.finish_sent(job, outcome, done.started + shift, done.finished + shift)

    async def _store(self, notes: Sealed, outcome: Outcome) -> Outcome:
        """Put what a job stored where it belongs."""
        storage = self._spec.storage

        def store() -> None:
            changes, values = pickle.loads(notes.data)  # noqa: S301 - from our own worker
            storage.update(changes)
            for value in values:
                storage.put_value(*value)

        try:
            if storage.by_reference:
                store()
            else:
                await call_in_thread(store)
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            return Outcome(error=error_from_exception(exc)) if outcome.error is None else outcome
        return outcome
