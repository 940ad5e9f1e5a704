"""The future bridge: calls in an executor as something that tasks of an event loop can wait for.

Also the executor behind the calls: when it is made, when it has to be replaced, and when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from signal import Signals
from typing import Any, Final

import anyio

from paraval.backends.base import Batch, RunSpec, Slot, WorkerDiedError
from paraval.errors import ParavalError
from paraval.evaluator import Evaluator, _alive, _warn_unclosed
from paraval.loops import Loop, call_in_thread
from paraval.outcome import JobError, Outcome

__all__ = ["Call", "CallLostError", "ExecutorSlot", "Pool", "RefusedError", "SharedPool", "close_before_pools_wait"]

_logger = logging.getLogger("paraval")

_QUICK_S: Final = 0.005
"""After a submit that took longer, the next is made in a thread."""
_CLOSE_S: Final = 0.4
_EXECUTORS: Final = 10
"""How many executors may refuse a call, as a job of another slot broke each of them, before it is given up."""
_CODES_S: Final = 2.0
"""How long after a break to wait, at most, for the exit code of the process that died."""
_ADVICE: Final = "pass a factory, as in executor=lambda: ProcessPoolExecutor(), to have a broken one replaced"

_forking = threading.Lock()


def close_before_pools_wait(cls: type[Evaluator]) -> None:
    """Have the evaluators of a class that were left open closed at the program's end before their pools wait for it.

    Pools wait for the calls that are in them when the main thread has ended, before anything that ``atexit`` knows. To
    be called when the pools have registered for that: the last to register is the first to be called.
    """

    def close() -> None:
        for evaluator in list(_alive):
            if isinstance(evaluator, cls) and evaluator._life.is_open_in_thread:
                try:
                    _warn_unclosed(evaluator)  # where warnings are errors, it raises
                finally:
                    evaluator._spec.kill_grace = min(evaluator._spec.kill_grace, 1.0)
                    evaluator.close()

    threading._register_atexit(close)  # type: ignore[attr-defined] # as concurrent.futures does, which it is about


class Call:
    """A call in an executor, awaited on the loop where this is made.

    The callback of a future runs in whatever thread ends the future. For one that has ended already, or is cancelled
    here, that is the loop's own thread, where waiting for the loop would never end: so the callback only leaves word.

    Attributes:
        future: what the executor gave.
        alone: no other call of ours was in the executor at any time while this one was.
    """

    future: Future[Any]

    def __init__(self) -> None:
        self.alone = True
        self._given_up: BaseException | None = None
        self._loop = Loop.running()
        self._ended = self._loop.event()

    def follow(self, future: Future[Any]) -> None:
        """Take what the executor gave."""
        self.future = future
        future.add_done_callback(lambda _future: self._loop.call_soon(self._ended.set))

    async def wait(self) -> None:
        """Wait until the call has ended, in whatever way."""
        await self._ended.wait()

    @property
    def failure(self) -> BaseException | None:
        """What is raised instead of a result, once the call has ended."""
        if self._given_up is not None and not self.future.done():
            return self._given_up
        try:
            return self.future.exception(timeout=0)
        except BaseException as exc:  # noqa: BLE001 - it was cancelled
            return exc

    def give_up(self, reason: BaseException) -> None:
        """Have it end though its future does not."""
        self._given_up = reason
        self._ended.set()


class Pool:
    """An executor, and the calls of ours that are in it.

    Args:
        executor: the executor.
        is_ours: whether it is to be shut down when nobody needs it any more.

    Attributes:
        failure: why it takes no calls any more; None: it does.
        is_of_processes: its workers are processes of this machine. (Such a pool must not have a future cancelled: when
            it breaks then, it may forget the others, in Python before 3.12.1.)
    """

    def __init__(self, executor: Executor, *, is_ours: bool) -> None:
        self.failure: BaseException | None = None
        self.is_of_processes = isinstance(executor, ProcessPoolExecutor)
        self._executor = executor
        self._is_ours = is_ours
        self._processes: list[Any] = []
        self._calls: set[Call] = set()
        self._dead: set[int] = set()
        self._killed: set[int] = set()
        self._is_slow = True  # the first submit may start processes

    async def submit(self, function: Callable[..., Any], *args: Any) -> Call:
        """Submit a call.

        Raises:
            _NotTakenError: from whatever the executor raised.
        """
        call = Call()
        if self._calls:
            call.alone = False
            for other in self._calls:
                other.alone = False
        self._calls.add(call)
        try:
            if self._is_slow:
                call.follow(await call_in_thread(self._submit_slowly, function, args))
            else:
                call.follow(self._submit(function, args))
        except BaseException:
            self._calls.discard(call)
            raise
        return call

    def start_all_processes_at_once(self) -> None:
        """Have all its processes started with the first call, if it is ours, and not with the calls that need them.

        A ``ProcessPoolExecutor`` that starts a process at the moment when it breaks may forget calls, leave the process
        behind, or hand closed pipes to multiprocessing's fork server, which dies of it and takes other pools along.
        (One that replaces its processes after some calls has to start them later, too.)
        """
        if self._is_ours and getattr(self._executor, "_max_tasks_per_child", 0) is None:
            vars(self._executor)["_safe_to_dynamically_spawn_children"] = False

    def _submit_slowly(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Future[Any]:
        # One at a time: of two pools that fork at once, one process may inherit what tells of the other's end.
        with _forking if self.is_of_processes else contextlib.nullcontext():
            return self._submit(function, args)

    def _submit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Future[Any]:
        began = time.monotonic()
        try:
            future = self._executor.submit(function, *args)
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C, which comes here by chance
            # Even a SystemExit is this call's failure: it must not end the loop.
            raise _NotTakenError from exc
        if not hasattr(future, "add_done_callback"):  # not by its type: somebody's own may have another
            raise _NotTakenError from TypeError(f"its submit() must give a Future, not {type(future).__name__}")
        # One that has ended already may have been made in there, which must not be on the loop's thread.
        self._is_slow = time.monotonic() - began > _QUICK_S or future.done()
        return future

    @property
    def is_broken(self) -> bool:
        """Whether its calls are lost; one that was shut down takes no calls either, and still runs those it has."""
        return isinstance(self.failure, BrokenExecutor)

    @property
    def is_empty(self) -> bool:
        """Whether no call of ours is in it."""
        return not self._calls

    def fail(self, failure: BaseException) -> None:
        """Take note that it takes no calls any more."""
        self.failure = failure
        if self.is_broken:
            # The executor does so itself, but not with one that was being started just then, and waits for that one.
            self._kill_processes()

    def _kill_processes(self) -> None:
        for process in self._look_up_processes():
            if not _is_dead(process):
                self._killed.add(process.pid)
                process.kill()

    def forget(self, call: Call) -> None:
        """Take note that a call has ended."""
        self._calls.discard(call)

    def look_after(self) -> None:
        """See to it, when called now and then, that no call waits for ever for a process that is dead.

        The executor notices as a rule. Not so where a fork has inherited what would tell it.
        """
        dead = {process.pid for process in self._look_up_processes() if _is_dead(process)}
        if self._dead & dead:  # since the last look, and the calls are there still
            for call in self._calls:
                call.give_up(BrokenExecutor("a process of the executor has ended"))
        self._dead = dead

    async def cause_of_death(self) -> JobError | None:
        """Say how a process of a broken executor died, where that can be known."""
        give_up = time.monotonic() + _CODES_S
        processes = [process for process in self._look_up_processes() if process.pid not in self._killed]
        while True:
            ended = [process for process in processes if _returncode(process) is not None]
            # When one process dies, the executor ends the others by SIGTERM.
            guilty = next((process for process in ended if _returncode(process) != -Signals.SIGTERM), None)
            if guilty is not None or len(ended) == len(processes):
                break
            if time.monotonic() > give_up:  # the executor does not know of it: it cannot mind any more
                guilty = next((process for process in processes if _is_dead(process)), None)
                break
            await anyio.sleep(0.01)
        guilty = guilty or next(iter(ended), None)
        return None if guilty is None else _how_it_died(guilty)

    def _look_up_processes(self) -> list[Any]:
        """Give its processes, where it is one of Python's own; those that it had, if it was shut down."""
        processes = getattr(self._executor, "_processes", None) if self.is_of_processes else None
        if processes is not None:
            self._processes = list(processes.values())
        return self._processes

    async def close(self) -> None:
        """Shut it down, if it is ours, within a fraction of a second. Processes that may run a call are killed."""
        if not self._is_ours:
            return
        self._is_ours = False
        self._look_up_processes()
        if self._calls or self.is_broken:
            self._kill_processes()
        if self._is_shut_down:
            return
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_S):
            await call_in_thread(self._shut_down, abandon_on_cancel=True)

    @property
    def _is_shut_down(self) -> bool:
        """Whether somebody else shut it down. Of two that wait for its end, one would close the other's pipes."""
        executor: Any = self._executor if self.is_of_processes else None
        return bool(getattr(executor, "_shutdown_thread", False)) and not getattr(executor, "_broken", False)

    def _shut_down(self) -> None:
        try:
            try:
                self._executor.shutdown(wait=True, cancel_futures=True)
            except TypeError:  # an executor of somebody's own, from before there was cancel_futures
                self._executor.shutdown(wait=True)
        except BaseException:  # even a SystemExit: no job has anything to do with it
            _logger.warning("the shutdown of the executor %r failed", type(self._executor).__name__, exc_info=True)


# The executor waits for its processes itself, in a thread of its own. What looks at them beside it must not take the
# exit code away from it, as Process.exitcode does: the processes of a fork server tell it once.


def _returncode(process: Any) -> int | None:
    code: int | None = process._popen.returncode
    return code


def _is_dead(process: Any) -> bool:
    if _returncode(process) is not None:
        return True
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):  # it is the fork server's child, not ours
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    try:
        os.kill(process.pid, 0)
    except OSError:  # there is none, or it is somebody else's by now
        return True
    return False


def _how_it_died(process: Any) -> JobError:
    code: int | None = process.exitcode
    number = -code if code is not None and code < 0 else None
    if code is None:
        how = "ended"
    elif number is None:
        how = f"ended with exit code {code}"
    else:
        try:
            how = f"was killed by {Signals(number).name}"
        except ValueError:
            how = f"was killed by signal {number}"
    return JobError(
        "worker_died",
        f"a process of the executor {how} while it ran the job",
        exit_code=code if number is None else None,
        signal=number,
        host=os.uname().nodename,
        pid=process.pid,
    )


class _NotTakenError(Exception):
    """An executor raised its cause in place of taking a call."""


class SharedPool:
    """The pool of all slots of one engine. On the engine's loop only.

    Args:
        make: gives a pool, or raises why there is none. Called in a thread.
        replaces: whether another can be had when one is broken.

    Attributes:
        suspects: ids of jobs that were in a pool when it broke, and have not been run to their end since; and how often
            each was excused when it was alone there.
        pools: every pool that is in use.
    """

    def __init__(self, make: Callable[[], Pool], *, replaces: bool) -> None:
        self.replaces = replaces
        self.suspects: dict[str, int] = {}
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._loop = Loop.running()
        self._make = make
        self._users = 0
        self._pool: Pool | None = None
        self._retired: set[Pool] = set()
        self._making = anyio.Lock()

    @property
    def is_in_use(self) -> bool:
        """Whether a slot of the running loop uses it."""
        return self._users > 0 and self._loop is Loop.running()

    def join(self) -> None:
        """Say that one more slot uses it."""
        self._users += 1

    async def leave(self) -> None:
        """Say that a slot uses it no more; the last one closes it."""
        self._users -= 1
        if not self._users:
            pools, self._retired = self._retired, set()
            if self._pool is not None:
                pools.add(self._pool)
                self._pool = None
            for pool in pools:
                await pool.close()

    async def current(self) -> Pool:
        """Give the pool; a new one when there is none, or it is broken and can be replaced."""
        async with self._making:
            if self._pool is not None and self._pool.failure is not None and self.replaces:
                self._retired.add(self._pool)
                self._pool = None
            for pool in [pool for pool in self._retired if pool.is_broken or pool.is_empty]:
                self._retired.discard(pool)  # the others were shut down by somebody, and still run what they have
                await pool.close()
            if self._pool is None:
                self._pool = await self.new()
                self._pool.start_all_processes_at_once()
            return self._pool

    async def new(self) -> Pool:
        """Make another pool, for one slot alone."""
        pool = await call_in_thread(self._make)
        self.pools.add(pool)
        return pool


class RefusedError(Exception):
    """There is no executor that takes the call.

    Attributes:
        error: why, as the error of the jobs that it would have run.
    """

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


class CallLostError(WorkerDiedError):
    """The executor lost a call though it is not broken: it was shut down under it, say.

    What a job raises never ends a call, so none of its jobs is to blame yet, where they can be run in a new executor.
    """


class ExecutorSlot(Slot):
    """A place for one call at a time in an executor that is shared."""

    def __init__(self, spec: RunSpec, shared: SharedPool) -> None:
        self._spec = spec
        self._shared = shared
        self._left: tuple[Pool, Call] | None = None
        shared.join()

    async def recover(self) -> None:
        """Wait for a call that was given up."""
        if self._left is not None:
            pool, call = self._left
            await call.wait()
            pool.forget(call)
            self._left = None

    async def close(self) -> None:
        """Use the executor no more."""
        await self._shared.leave()

    async def _pool(self) -> Pool:
        return await self._shared.current()

    async def _submit(self, function: Callable[..., Any], *args: Any) -> tuple[Pool, Call]:
        """Submit a call; if need be, to a new executor.

        Raises:
            RefusedError: there is none that takes it.
        """
        failure: BaseException | None = None
        for _ in range(_EXECUTORS if self._shared.replaces else 1):
            try:
                pool = await self._pool()
            except ParavalError as exc:
                raise RefusedError(JobError("worker_died", str(exc))) from exc
            failure = pool.failure
            if failure is None:
                try:
                    return pool, await pool.submit(function, *args)
                except _NotTakenError as exc:  # it is broken, or shut down, or somebody's own
                    failure = exc.__cause__ or exc
                    if self._shared.replaces or isinstance(failure, BrokenExecutor):
                        pool.fail(failure)
        reason = f"the executor takes no job ({type(failure).__name__}: {failure})"
        raise RefusedError(self._advised(JobError("worker_died", reason))) from failure

    async def _result(self, pool: Pool, call: Call) -> Any:
        """Give what an ended call returned.

        Raises:
            WorkerDiedError: the executor broke.
            CallLostError: the executor lost it in another way.
            RefusedError: the executor broke, and there will not be another.
        """
        pool.forget(call)
        failure = call.failure
        if failure is None:
            return call.future.result()
        if not isinstance(failure, BrokenExecutor):
            error = JobError("worker_died", f"the executor lost the job: {type(failure).__name__}: {failure}")
            raise CallLostError(error) from failure
        pool.failure = failure  # at once, so that nobody else enters while this one waits
        error = JobError("worker_died", f"the executor broke while it had the job: {failure}")
        if call.alone:
            error = await pool.cause_of_death() or error
        pool.fail(failure)
        if not self._shared.replaces:
            raise RefusedError(self._advised(error)) from failure
        raise WorkerDiedError(error, alone=call.alone) from failure

    def _advised(self, error: JobError) -> JobError:
        return error if self._shared.replaces else error._replace(message=f"{error.message}: {_ADVICE}")

    def _fail_all(self, batch: Batch, error: JobError) -> None:
        """Settle all jobs of a batch that are left."""
        now = self._spec.clock()
        for job in batch.in_hand or list(batch.take_all().values()):
            batch.finish_sent(job, Outcome(error=error), now, now)
