"""The future bridge: calls in an executor as something that tasks of an event loop can wait for.

Also the executor behind the calls: when it is made, when it has to be replaced, and when it ends.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from signal import Signals
from typing import Any, Final

import anyio
import anyio.to_thread

from paraval.backends.base import Batch, RunSpec, Slot, WorkerDiedError
from paraval.errors import ParavalError
from paraval.evaluator import Evaluator, _alive, _warn_unclosed
from paraval.loops import Loop
from paraval.outcome import JobError, Outcome

__all__ = ["Call", "ExecutorSlot", "Pool", "RefusedError", "SharedPool", "close_before_pools_wait"]

_QUICK_S: Final = 0.005
"""After a submit that took longer, the next is made in a thread."""
_CLOSE_S: Final = 0.4
_CODES_S: Final = 0.2
"""How long after a break to wait for the exit code of the process that died."""
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

    def __init__(self, future: Future[Any]) -> None:
        self.future = future
        self.alone = True
        self._given_up: BaseException | None = None
        loop = Loop.running()
        self._ended = loop.event()
        future.add_done_callback(lambda _future: loop.call_soon(self._ended.set))

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
        self._calls: set[Call] = set()
        self._dead: set[int] = set()
        self._killed: set[int] = set()
        self._is_slow = True  # the first submit may start processes

    async def submit(self, function: Callable[..., Any], *args: Any) -> Call:
        """Submit a call; whatever the executor raises is raised."""
        if self._is_slow:
            future = await anyio.to_thread.run_sync(self._submit_slowly, function, args)
        else:
            future = self._submit(function, args)
        call = Call(future)
        if self._calls:
            call.alone = False
            for other in self._calls:
                other.alone = False
        self._calls.add(call)
        return call

    def _submit_slowly(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Future[Any]:
        # One at a time: of two pools that fork at once, one process may inherit what tells of the other's end.
        with _forking if self.is_of_processes else contextlib.nullcontext():
            return self._submit(function, args)

    def _submit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Future[Any]:
        began = time.monotonic()
        future = self._executor.submit(function, *args)
        # One that has ended already may have been made in there, which must not be on the loop's thread.
        self._is_slow = time.monotonic() - began > _QUICK_S or future.done()
        return future

    def fail(self, failure: BaseException) -> None:
        """Take note that it takes no calls any more."""
        self.failure = failure
        if isinstance(failure, BrokenExecutor):
            # The executor does so itself, but not with one that was being started just then, and waits for that one.
            self._kill_processes()

    def _kill_processes(self) -> None:
        for process in self._processes():
            with contextlib.suppress(Exception):  # it has not begun
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
        dead = {process.pid for process in self._processes() if _is_dead(process)}
        if self._dead & dead:  # since the last look, and the calls are there still
            for call in self._calls:
                call.give_up(BrokenExecutor("a process of the executor has ended"))
        self._dead = dead

    async def cause_of_death(self) -> JobError | None:
        """Say how a process of a broken executor died, where that can be seen."""
        give_up = time.monotonic() + _CODES_S
        # When one process dies, a pool of Python's ends the others by SIGTERM.
        while (codes := self._exit_codes()) is not None and all(code == -Signals.SIGTERM for code in codes):
            if time.monotonic() > give_up:
                break
            await anyio.sleep(0.01)
        code = min(codes or [], key=lambda code: code == -Signals.SIGTERM, default=None)
        if code is None:
            return None
        if code >= 0:
            message = f"a process of the executor ended with exit code {code} while it ran the job"
            return JobError("worker_died", message, exit_code=code)
        try:
            name = Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return JobError(
            "worker_died", f"a process of the executor was killed by {name} while it ran the job", signal=-code
        )

    def _exit_codes(self) -> list[int] | None:
        processes = self._processes()
        codes = [_returncode(process) for process in processes if process.pid not in self._killed]
        return [code for code in codes if code is not None] if processes else None

    def _processes(self) -> list[Any]:
        """Give its processes, where it is one of Python's own."""
        processes = getattr(self._executor, "_processes", None)
        return list(processes.values()) if isinstance(processes, dict) else []

    async def close(self) -> None:
        """Shut it down, if it is ours, within a fraction of a second. Processes that may run a call are killed."""
        if not self._is_ours:
            return
        self._is_ours = False
        if self._calls or self.failure is not None:
            self._kill_processes()
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_S):
            await anyio.to_thread.run_sync(self._shut_down, abandon_on_cancel=True)

    def _shut_down(self) -> None:
        try:
            self._executor.shutdown(wait=True, cancel_futures=True)
        except TypeError:  # an executor of somebody's own, from before there was cancel_futures
            self._executor.shutdown(wait=True)


# The executor waits for its processes itself, in a thread of its own. What looks at them beside it must not take the
# exit code away from it, as Process.exitcode does: the processes of a fork server tell it once.


def _returncode(process: Any) -> int | None:
    code: int | None = getattr(getattr(process, "_popen", None), "returncode", None)
    return code


def _is_dead(process: Any) -> bool:
    if _returncode(process) is not None:
        return True
    pid = getattr(process, "pid", None)
    if pid is None:  # it has not begun
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # the fork server's child, not ours
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False


class SharedPool:
    """The pool of all slots of one engine. On the engine's loop only.

    Args:
        make: gives a pool, or raises why there is none. Called in a thread.
        replaces: whether another can be had when one is broken.

    Attributes:
        suspects: ids of jobs that were in a pool when it broke and have not been run to their end since.
        pools: every pool that is in use.
    """

    def __init__(self, make: Callable[[], Pool], *, replaces: bool) -> None:
        self.replaces = replaces
        self.suspects: set[str] = set()
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._loop = Loop.running()
        self._make = make
        self._users = 0
        self._pool: Pool | None = None
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
        if not self._users and self._pool is not None:
            pool, self._pool = self._pool, None
            await pool.close()

    async def current(self) -> Pool:
        """Give the pool; a new one when there is none, or it is broken and can be replaced."""
        async with self._making:
            if self._pool is not None and self._pool.failure is not None and self.replaces:
                broken, self._pool = self._pool, None
                await broken.close()
            if self._pool is None:
                self._pool = await self.new()
            return self._pool

    async def new(self) -> Pool:
        """Make another pool, for one slot alone."""
        pool = await anyio.to_thread.run_sync(self._make)
        self.pools.add(pool)
        return pool


class RefusedError(Exception):
    """There is no executor that takes the call."""


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
        for _ in range(2 if self._shared.replaces else 1):
            try:
                pool = await self._pool()
            except ParavalError as exc:
                raise RefusedError(str(exc)) from exc
            failure = pool.failure
            if failure is None:
                try:
                    return pool, await pool.submit(function, *args)
                except Exception as exc:  # noqa: BLE001 - it is broken, or shut down, or somebody's own
                    failure = exc
                    if self._shared.replaces or isinstance(exc, BrokenExecutor):
                        pool.fail(exc)
        reason = f"the executor takes no job ({type(failure).__name__}: {failure})"
        raise RefusedError(reason if self._shared.replaces else f"{reason}: {_ADVICE}") from failure

    async def _result(self, pool: Pool, call: Call) -> Any:
        """Give what an ended call returned.

        Raises:
            WorkerDiedError: the executor lost it.
            RefusedError: likewise, and there will not be another.
        """
        pool.forget(call)
        failure = call.failure
        if failure is None:
            return call.future.result()
        if not isinstance(failure, BrokenExecutor):
            error = JobError("worker_died", f"the executor lost the job: {type(failure).__name__}: {failure}")
            raise WorkerDiedError(error) from failure
        error = JobError("worker_died", f"the executor broke while it had the job: {failure}")
        if call.alone:
            error = await pool.cause_of_death() or error
        pool.fail(failure)
        if not self._shared.replaces:
            raise RefusedError(f"{error.message}: {_ADVICE}") from failure
        raise WorkerDiedError(error, alone=call.alone) from failure

    def _fail_all(self, batch: Batch, error: JobError) -> None:
        """Settle all jobs of a batch that are left."""
        now = self._spec.clock()
        for job in batch.in_hand or list(batch.take_all().values()):
            batch.finish_sent(job, Outcome(error=error), now, now)
