"""The future bridge: calls in an executor as something that tasks of an event loop can wait for.

Also the executor behind the calls: when it is made, when it has to be replaced, and when it ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, Final

import anyio
import anyio.to_thread

from paraval.loops import Loop

__all__ = ["Call", "Pool", "SharedPool"]

_QUICK_S: Final = 0.005
"""After a submit that took longer, the next is made in a thread."""
_CLOSE_S: Final = 0.4


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
        loop = Loop.running()
        self._ended = loop.event()
        future.add_done_callback(lambda _future: loop.call_soon(self._ended.set))

    async def wait(self) -> None:
        """Wait until the call has ended, in whatever way."""
        await self._ended.wait()

    @property
    def failure(self) -> BaseException | None:
        """What is raised instead of a result, once the call has ended."""
        try:
            return self.future.exception(timeout=0)
        except BaseException as exc:  # noqa: BLE001 - it was cancelled
            return exc


class Pool:
    """An executor, and the calls of ours that are in it.

    Args:
        executor: the executor.
        is_ours: whether it is to be shut down when nobody needs it any more.

    Attributes:
        failure: why it takes no calls any more; None: it does.
    """

    def __init__(self, executor: Executor, *, is_ours: bool) -> None:
        self.executor = executor
        self.failure: BaseException | None = None
        # A cancelled future can make a breaking ProcessPoolExecutor forget the others (CPython before 3.12.1).
        self.cancels_futures = not isinstance(executor, ProcessPoolExecutor)
        self._is_ours = is_ours
        self._calls: set[Call] = set()
        self._is_slow = True  # the first submit may start processes

    async def submit(self, function: Callable[..., Any], *args: Any) -> Call:
        """Submit a call; whatever the executor raises is raised."""
        if self._is_slow:
            future, seconds = await anyio.to_thread.run_sync(self._submit, function, args)
        else:
            future, seconds = self._submit(function, args)
        self._is_slow = seconds > _QUICK_S
        call = Call(future)
        if self._calls:
            call.alone = False
            for other in self._calls:
                other.alone = False
        self._calls.add(call)
        return call

    def _submit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Future[Any], float]:
        began = time.monotonic()
        return self.executor.submit(function, *args), time.monotonic() - began

    def forget(self, call: Call) -> None:
        """Take note that a call has ended."""
        self._calls.discard(call)

    @property
    def exit_codes(self) -> list[int] | None:
        """The exit codes of its processes that have ended; None where that cannot be seen."""
        processes = getattr(self.executor, "_processes", None)
        if not isinstance(processes, dict):
            return None
        codes = [getattr(process, "exitcode", None) for process in list(processes.values())]
        return [code for code in codes if code is not None]

    async def close(self) -> None:
        """Shut it down, if it is ours, within a fraction of a second. Processes that still run a call are killed."""
        if not self._is_ours:
            return
        self._is_ours = False
        processes = getattr(self.executor, "_processes", None)
        if self._calls and isinstance(processes, dict):
            for process in list(processes.values()):
                with contextlib.suppress(Exception):  # it has ended
                    process.kill()
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_S):
            await anyio.to_thread.run_sync(self._shut_down, abandon_on_cancel=True)

    def _shut_down(self) -> None:
        try:
            self.executor.shutdown(wait=True, cancel_futures=True)
        except TypeError:  # an executor of somebody's own, from before there was cancel_futures
            self.executor.shutdown(wait=True)


class SharedPool:
    """The pool of all slots of one engine. On the engine's loop only.

    Args:
        make: gives a pool, or raises why there is none. Called in a thread.
        replaces: whether another can be had when one is broken.

    Attributes:
        suspects: ids of jobs that were in a pool when it broke and have not been run to their end since.
    """

    def __init__(self, make: Callable[[], Pool], *, replaces: bool) -> None:
        self.loop = Loop.running()
        self.replaces = replaces
        self.suspects: set[str] = set()
        self._make = make
        self._users = 0
        self._pool: Pool | None = None
        self._making = anyio.Lock()

    @property
    def is_in_use(self) -> bool:
        """Whether a slot of the running loop uses it."""
        return self._users > 0 and self.loop is Loop.running()

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
        return await anyio.to_thread.run_sync(self._make)
