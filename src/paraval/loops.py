"""Reaching an event loop from another thread, and a thread from an event loop, on asyncio and trio alike.

anyio's own way (a portal) costs over 100 µs a call; this is one call of the loop's native function, and calls that come
before the loop has woken share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar, current_token

from paraval.errors import EvaluatorClosedError

__all__ = ["Doorbell", "Event", "Loop", "call_in_common_thread", "call_in_thread", "to_the_end"]

_logger = logging.getLogger("paraval")

T = TypeVar("T")

_Call = tuple[Callable[..., Any], tuple[Any, ...]]


async def call_in_thread(function: Callable[..., T], *args: Any, abandon_on_cancel: bool = False) -> T:
    """Call a function in a thread, at once.

    anyio's default limiter is the program's, whose threads may all wait for what this call brings about. So it is not
    asked; how many such calls there are at a time must be bounded by something else, as by the number of workers.

    Args:
        function: what to call.
        *args: its arguments.
        abandon_on_cancel: whether a cancellation leaves the call alone, rather than wait for it.
    """
    # Made here, as one that is made outside a loop would belong to the first loop that it meets.
    limiter = anyio.CapacityLimiter(1)
    return await anyio.to_thread.run_sync(function, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter)


async def call_in_common_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in one of up to 40 threads that are for such calls alone.

    anyio's default limiter is the program's, whose threads may all wait for what this call brings about.
    """
    limiter = _common.get(None)
    if limiter is None:
        _common.set(limiter := anyio.CapacityLimiter(40))
    return await anyio.to_thread.run_sync(function, *args, limiter=limiter)


async def to_the_end(function: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await a call to its end, whatever cancels the caller; the cancellation goes on up after that.

    anyio's shield keeps out what its scopes cancel. asyncio's own ``task.cancel()``, which is how ``asyncio.timeout``,
    a Ctrl-C and a loop's end come, goes through any shield: there the call has a task of its own, which only the end of
    the loop cancels.
    """
    cancellation: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        if not Loop.running().is_asyncio:
            return await function()
        task = asyncio.ensure_future(function())
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as exc:
                cancellation = exc
    if cancellation is None:
        return task.result()
    if not task.cancelled() and (failure := task.exception()) is not None:
        raise cancellation from failure
    raise cancellation


_common: Final[RunVar[anyio.CapacityLimiter | None]] = RunVar("paraval_common_threads")


class Event(Protocol):
    """What tasks of one loop wait for."""

    def set(self) -> object:
        """Let everyone through. To be called on the loop."""

    def is_set(self) -> bool:
        """Whether waiting is over."""

    async def wait(self) -> object:
        """Wait until it is set."""


class _Turn:
    """An event for one waiter at a time: a future and a flag, where ``asyncio.Event`` has a deque and a mixin."""

    __slots__ = ("_future", "_is_set", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_set = False
        self._future: asyncio.Future[None] | None = None

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        future = self._future
        if future is not None and not future.done():  # done: its waiter was cancelled
            try:
                future.set_result(None)
            except RuntimeError:  # the loop is closed: it will never run who waits
                if not self._loop.is_closed():
                    raise

    async def wait(self) -> None:
        if not self._is_set:
            self._future = future = self._loop.create_future()
            await future


class Loop:
    """A running event loop, as another thread sees it; made by :meth:`running`."""

    __slots__ = ("_calls", "_native", "_rung", "_schedule", "is_asyncio", "thread_id")

    def __init__(self, native: Any, *, is_asyncio: bool) -> None:
        self._native = native
        self.is_asyncio = is_asyncio
        self._schedule: Callable[..., Any] = native.call_soon_threadsafe if is_asyncio else native.run_sync_soon
        self._calls: deque[_Call] = deque()
        self._rung = False
        self.thread_id = threading.get_ident()

    @classmethod
    def running(cls) -> Loop:
        """Give the loop that runs in this thread: always the same object while it is the same loop."""
        token = current_token()
        last: Loop | None = getattr(_here, "loop", None)
        if last is None or last._native is not token.native_token:
            last = _here.loop = cls(token.native_token, is_asyncio="asyncio" in token.backend_class.__module__)
        return last

    def call_soon(self, function: Callable[..., Any], *args: Any) -> bool:
        """Call the function on the loop, soon, in the order of the calls; False when the loop is gone."""
        # Append first, look second: _answer lowers the flag before it empties the deque, so whoever sees the flag up
        # has appended in time, and whoever sees it down rings. Two rings at once are harmless.
        self._calls.append((function, args))
        if not self._rung:
            self._rung = True
            try:
                self._schedule(self._answer)
            except RuntimeError:  # asyncio: the loop is closed; trio: RunFinishedError
                self._rung = False  # so that the next one hears of it too
                return False
            except BaseException:  # Ctrl-C: it may not have rung, and others rely on it who have seen the flag
                self._rung = False
                with contextlib.suppress(RuntimeError):
                    self._schedule(self._answer)
                raise
        return True

    def _answer(self) -> None:
        self._rung = False
        calls = self._calls
        while calls:
            function, args = calls.popleft()
            try:
                function(*args)
            except Exception:  # no loop has anyone to raise it to, and trio would even crash
                _logger.exception("a call to the event loop failed: %r", function)

    def event(self) -> Event:
        """Make an event of this loop, for one waiter at a time. It costs a fraction of what anyio's does."""
        if self.is_asyncio:
            return _Turn(self._native)
        import trio  # here: it is an extra, and it is imported already when it runs

        return trio.Event()

    async def sleep(self, seconds: float) -> None:
        """Wait for so long. It costs a fraction of what anyio's way does."""
        if self.is_asyncio:
            await asyncio.sleep(seconds)
        else:
            await anyio.sleep(seconds)

    @property
    def is_running(self) -> bool:
        """False when the loop was closed, or stopped in a way that only asyncio allows."""
        return bool(self._native.is_running()) if self.is_asyncio else True

    @property
    def is_closed(self) -> bool:
        """Whether the loop will never run again, as far as it can be known (trio's loops are not dropped midway)."""
        return bool(self._native.is_closed()) if self.is_asyncio else False

    @property
    def is_here(self) -> bool:
        """Whether this thread is the one that runs the loop."""
        return threading.get_ident() == self.thread_id


_here = threading.local()


class Doorbell:
    """Calls from any thread, carried out in order on one loop, until it is closed.

    Args:
        loop: where they are carried out.
        on_error: told when a call raises.
    """

    __slots__ = ("_calls", "_closed", "_on_error", "loop")

    def __init__(self, loop: Loop, on_error: Callable[[BaseException], object]) -> None:
        self._on_error = on_error
        self.loop = loop
        self._closed = False
        self._calls: deque[_Call] = deque()

    def ring(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the function called on the loop.

        Raises:
            EvaluatorClosedError: the loop is gone, or the doorbell is closed.
        """
        call = (function, args)
        self._calls.append(call)  # before the look at _closed: close() carries out what it finds
        if self._closed or not self.loop.call_soon(self._answer):
            try:
                self._calls.remove(call)
            except ValueError:  # close() still carried it out
                return
            raise EvaluatorClosedError("the event loop that runs the jobs is gone: it was closed or has ended")

    def close(self) -> None:
        """Carry out what was asked so far; refuse what comes later. To be called on the loop."""
        self._closed = True
        self._answer()

    def _answer(self) -> None:
        calls = self._calls
        while calls:
            function, args = calls.popleft()
            try:
                function(*args)
            except Exception as exc:  # noqa: BLE001 - whoever waits for the outcome must hear of it
                self._on_error(exc)
