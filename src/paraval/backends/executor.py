"""Jobs in any ``concurrent.futures.Executor``."""

from __future__ import annotations

import pickle
import queue
import time
import uuid
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor
from signal import Signals
from typing import Any, ClassVar, Final

import anyio
import anyio.to_thread

from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, WorkerDiedError
from paraval.backends.futures import Call, Pool, SharedPool
from paraval.backends.process import _outcome
from paraval.backends.thread import _JobThread
from paraval.errors import BadValueError, WrongTypeError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.job import Job
from paraval.outcome import JobError, Outcome, error_from_exception
from paraval.worker.board import Board
from paraval.worker.main import Sealed
from paraval.worker.pickling import PicklingFailed, dumps, is_plain
from paraval.worker.remote import Done, Program, Report, run_jobs

__all__ = ["ExecutorEvaluator"]

_MOST_AT_ONCE: Final = 64
_SMALL: Final = 1 << 14
"""A program of so many bytes goes along with every call; a larger one only to where it is not known."""
_LOOK_S: Final = 0.05
"""How often to look whether a call has begun, where the time of a job is limited."""
_CODES_S: Final = 0.2
"""How long after a break to wait for the exit code of the process that died."""

_PASS_A_FACTORY: Final = "pass a factory, as in executor=lambda: ProcessPoolExecutor(), to have a broken one replaced"


class ExecutorEvaluator(Evaluator):
    """Runs run-functions in an executor of yours: any ``concurrent.futures.Executor``, or a factory of one.

    For pools that a program has anyway, and for those of other libraries (``client.get_executor()`` of dask). In a
    ``ThreadPoolExecutor`` run-functions are called as they are; to any other executor they are sent, by value if need be,
    so that lambdas and closures work. What a job there stores (``job.record()``) arrives with its outcome, and a stopper
    sees its own job only. An ``async`` run-function runs on an event loop of the worker.

    Cancellation is cooperative: ``job.stopped()`` turns true (in another process: of this machine), a coroutine is
    cancelled; a job that goes on is given up after ``kill_grace`` seconds, and its slot is not used again until the call
    has really returned.

    A pool of processes breaks as a whole when one of them dies. With a factory it is replaced, and the jobs that were in
    it are run again, each in an executor of its own: so only the job fails that is to blame. Without a factory they all
    fail, and so does every later job.

    See :class:`~paraval.Evaluator` for the other arguments; ``num_workers`` is how many calls are in the executor at a
    time, so it should not exceed the executor's own number of workers.

    Args:
        executor: an executor, which the evaluator never shuts down; or a function without arguments that makes one, which
            is shut down at ``close``.

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


class ExecutorBackend(Backend):
    """Slots that share an executor.

    Args:
        executor: as the evaluator's.
        spec: its run-function is refused when it must be sent and cannot be.
        job_timeout: of the evaluator. With it jobs travel one by one, as a call does not tell which job is current.
    """

    cancellation: ClassVar[Cancellation] = "cooperative"

    def __init__(self, executor: object, spec: RunSpec, job_timeout: float | None) -> None:
        self.job_timeout = job_timeout
        self._factory: Callable[[], Executor] | None = None
        if isinstance(executor, Executor):
            self._first: Executor | None = executor
        elif callable(executor):
            self._factory = lambda: _made_by(executor)
            self._first = self._factory()
        else:
            raise WrongTypeError(
                "executor must be a concurrent.futures.Executor, or a function without arguments that makes one, "
                f"not {executor!r}"
            )
        self._is_local = _is_local(self._first)
        self.batch_limit = None if self._is_local else _MOST_AT_ONCE if job_timeout is None else 1
        self._shared: SharedPool | None = None
        self._program: tuple[Any, str, Program] | None = None
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

    def _make_pool(self) -> Pool:
        if self._factory is None:
            assert self._first is not None
            return Pool(self._first, is_ours=False)
        first, self._first = self._first, None
        return Pool(self._factory() if first is None else first, is_ours=True)

    def program(self, spec: RunSpec) -> tuple[str, Program]:
        """Give what is the same for all calls, and the token that names it.

        Raises:
            PicklingFailed: it cannot be sent.
        """
        key = (spec.stopper, dict(spec.kwargs))
        if self._program is None or self._program[0] != key:
            function = dumps((spec.function, spec.kwargs, spec.stopper), "the run-function")
            retry_on = dumps(spec.retry_on, "retry_on") if spec.retry_on else None
            self._program = key, uuid.uuid4().hex, Program(function, is_async(spec.function), retry_on)
        return self._program[1:]


def _made_by(factory: Callable[[], object]) -> Executor:
    try:
        made = factory()
    except Exception as exc:
        raise BadValueError(
            f"the factory of executors {describe(factory)} failed: {type(exc).__name__}: {exc}"
        ) from exc
    if not isinstance(made, Executor):
        raise WrongTypeError(
            f"the factory of executors {describe(factory)} must make a concurrent.futures.Executor, not {made!r}"
        )
    return made


def _is_local(executor: Executor) -> bool:
    """Whether calls share the objects of this interpreter, as far as can be known."""
    in_interpreters = getattr(futures, "InterpreterPoolExecutor", ())  # Python 3.14; it is a ThreadPoolExecutor
    return isinstance(executor, ThreadPoolExecutor) and not isinstance(executor, in_interpreters)


class _RefusedError(Exception):
    """There is no executor that takes the call."""


class ExecutorSlot(Slot):
    """A place for one call at a time."""

    def __init__(self, spec: RunSpec, shared: SharedPool) -> None:
        self._spec = spec
        self._shared = shared
        self._left: tuple[Pool, Call] | None = None
        shared.join()

    async def recover(self) -> None:
        if self._left is not None:
            pool, call = self._left
            await call.wait()
            pool.forget(call)
            self._left = None

    async def close(self) -> None:
        await self._shared.leave()

    async def _submit(self, function: Callable[..., Any], *args: Any) -> tuple[Pool, Call]:
        """Submit a call; if need be, to a new executor.

        Raises:
            _RefusedError: there is none that takes it.
        """
        failure: BaseException | None = None
        for _ in range(2 if self._shared.replaces else 1):
            try:
                pool = await self._pool()
            except (BadValueError, WrongTypeError) as exc:
                raise _RefusedError(str(exc)) from exc
            failure = pool.failure
            if failure is None:
                try:
                    return pool, await pool.submit(function, *args)
                except Exception as exc:  # noqa: BLE001 - it is broken, or shut down, or somebody's own
                    failure = exc
                    if self._shared.replaces or isinstance(exc, BrokenExecutor):
                        pool.failure = exc
        reason = f"the executor takes no job ({type(failure).__name__}: {failure})"
        raise _RefusedError(reason if self._shared.replaces else f"{reason}: {_PASS_A_FACTORY}") from failure

    async def _pool(self) -> Pool:
        return await self._shared.current()

    async def _ended(self, pool: Pool, call: Call) -> Any:
        """Give what an ended call returned.

        Raises:
            WorkerDiedError: the executor lost it.
            _RefusedError: likewise, and there will not be another.
        """
        pool.forget(call)
        failure = call.failure
        if failure is None:
            return call.future.result()
        if not isinstance(failure, BrokenExecutor):
            lost = JobError("worker_died", f"the executor lost the job: {type(failure).__name__}: {failure}")
            raise WorkerDiedError(lost) from failure
        pool.failure = failure
        if not self._shared.replaces:
            raise _RefusedError(f"the executor broke while it had the job ({failure}): {_PASS_A_FACTORY}") from failure
        raise WorkerDiedError(await _cause_of_death(pool, failure), alone=call.alone) from failure

    def _fail_all(self, batch: Batch, exc: _RefusedError) -> None:
        now = self._spec.clock()
        for job in batch.in_hand or list(batch.take_all().values()):
            batch.finish_sent(job, Outcome(error=JobError("worker_died", str(exc))), now, now)


async def _cause_of_death(pool: Pool, failure: BaseException) -> JobError:
    """Say how a process of an executor died. It ends the others by SIGTERM then."""
    codes = pool.exit_codes
    give_up = time.monotonic() + _CODES_S
    while codes is not None and all(code == -Signals.SIGTERM for code in codes) and time.monotonic() < give_up:
        await anyio.sleep(0.01)
        codes = pool.exit_codes
    code = min(codes or [], key=lambda code: code == -Signals.SIGTERM, default=None)
    if code is None:
        return JobError("worker_died", f"the executor broke while it ran the job: {failure}")
    if code >= 0:
        how = f"ended with exit code {code}"
        return JobError("worker_died", f"a process of the executor {how} while it ran the job", exit_code=code)
    name = Signals(-code).name if -code in set(Signals) else f"signal {-code}"
    return JobError("worker_died", f"a process of the executor was killed by {name} while it ran the job", signal=-code)


class LocalSlot(ExecutorSlot):
    """Runs batches in a thread of the executor, where a job is the very object that the engine has."""

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
                if call.future.cancel():  # it had not begun
                    pool.forget(call)
                    raise
                runner.cancel_coroutine()
                self._left = pool, call
                with anyio.CancelScope(shield=True), anyio.move_on_after(self._spec.kill_grace):
                    await call.wait()
                raise
            await self._ended(pool, call)
        except _RefusedError as exc:
            self._fail_all(batch, exc)
        except WorkerDiedError:
            batch.take_all()  # it never got to them: the executor's own initializer failed, say
            raise


class RemoteSlot(ExecutorSlot):
    """Sends batches to where the objects of this process are not known.

    Jobs that were in an executor when it broke are suspect. Each of them is then run in an executor that nobody else
    uses, which shows whose fault it was, and holds the other slots up for nothing.
    """

    def __init__(self, spec: RunSpec, shared: SharedPool, backend: ExecutorBackend) -> None:
        super().__init__(spec, shared)
        self._backend = backend
        self._board = Board()
        self._own: Pool | None = None
        self._wants_own = False
        self._known: str | None = None

    async def run(self, batch: Batch) -> None:
        sent = batch.take_all()
        jobs = self._seal(batch, sent)
        if not sent:
            return
        suspects = self._shared.suspects
        self._wants_own = not suspects.isdisjoint(sent)
        job_ids = list(sent)
        try:
            await self._take(batch, sent, await self._report(batch, jobs))
        except _RefusedError as exc:
            self._fail_all(batch, exc)
        except WorkerDiedError:
            suspects.update(job_ids)
            raise
        suspects.difference_update(job_ids)

    async def recover(self) -> None:
        if self._own is not None:
            await self._drop_own()  # whatever runs in there, nobody else is hurt
        await super().recover()
        self._board.clear()

    async def close(self) -> None:
        self._board.close()
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

    async def _report(self, batch: Batch, jobs: list[tuple[str, Any]]) -> Report:
        """Have jobs run."""
        token, program = self._backend.program(self._spec)
        is_known = self._known == token and len(program.function) > _SMALL
        report = await self._call(batch, token, None if is_known else program, jobs)
        if report is None:
            report = await self._call(batch, token, program, jobs)
            assert report is not None
        self._known = token
        return report

    async def _call(
        self, batch: Batch, token: str, program: Program | None, jobs: list[tuple[str, Any]]
    ) -> Report | None:
        self._board.clear()
        pool, call = await self._submit(run_jobs, token, program, jobs, self._board.path)
        try:
            await self._wait(batch, call)
        except BaseException:
            self._left = pool, call
            with anyio.CancelScope(shield=True):
                await self._stop(batch, pool, call)
            raise
        report: Report | None = await self._ended(pool, call)
        return report

    async def _wait(self, batch: Batch, call: Call) -> None:
        """Wait for the end. Where the time of a job is limited, none passes before it has begun."""
        limit = self._backend.job_timeout
        job = batch.current
        while limit is not None and job is not None and not self._board.started:
            with anyio.move_on_after(min(_LOOK_S, limit / 4)):
                await call.wait()
                return
            if not call.future.running() or self._board.started:
                job._started = self._spec.clock()
        await call.wait()

    async def _stop(self, batch: Batch, pool: Pool, call: Call) -> None:
        """Ask a call to end, and wait for that: at the longest for the grace. It hands in what it has done by then."""
        self._board.stop()
        if pool.cancels_futures:
            call.future.cancel()
        # One that has not begun runs nothing when its turn comes: there is nothing to wait for.
        if call.future.running() or self._board.started:
            with anyio.move_on_after(self._spec.kill_grace):
                await call.wait()
        if call.future.done() and call.failure is None and isinstance(report := call.future.result(), Report):
            for done in report.done:
                await self._hand_in(batch, done, 0.0)

    def _seal(self, batch: Batch, sent: dict[str, Job]) -> list[tuple[str, Any]]:
        items: list[tuple[str, Any]] = []
        for job in list(sent.values()):
            try:
                args = job.args if is_plain(job.args) else Sealed(dumps(job.args, "the arguments"))
            except PicklingFailed as exc:
                now = self._spec.clock()
                batch.finish_sent(job, Outcome(error=JobError("exception", str(exc), type="PicklingError")), now, now)
            else:
                items.append((job.id, args))
        return items

    async def _take(self, batch: Batch, sent: dict[str, Job], report: Report) -> None:
        if report.broken is not None:
            error = JobError(*report.broken)
            error = error._replace(message=f"the run-function could not be loaded by the executor: {error.message}")
            now = self._spec.clock()
            for job in list(sent.values()):
                batch.finish_sent(job, Outcome(error=error), now, now)
            return
        # The clocks of two machines have nothing to do with one another: what came back has ended by now.
        now = time.monotonic()
        is_ours = all(
            done.finished <= now and done.started >= batch.created + self._spec.origin for done in report.done
        )
        shift = 0.0 if is_ours or not report.done else now - report.done[-1].finished
        for done in report.done:
            await self._hand_in(batch, done, shift)
        batch.leave_out(report.left)

    async def _hand_in(self, batch: Batch, done: Done, shift: float) -> None:
        job = next((job for job in batch.in_hand if job.id == done.job_id), None)
        if job is None:
            return
        outcome = _outcome(done.error, done.value)
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
                await anyio.to_thread.run_sync(store)
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            return Outcome(error=error_from_exception(exc)) if outcome.error is None else outcome
        return outcome
