"""Reaching an event loop from another thread, on asyncio and trio alike.

anyio's own way (a portal) costs over 100 µs a call; this is one call of the loop's native function.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from anyio.lowlevel import current_token

from paraval.errors import EvaluatorClosedError

__all__ = ["Doorbell", "Loop"]


class Loop:
    """A running event loop, as another thread sees it."""

    __slots__ = ("_native", "_schedule", "is_asyncio", "thread_id")

    def __init__(self, native: Any, *, is_asyncio: bool) -> None:
        self._native = native
        self.is_asyncio = is_asyncio
        self._schedule: Callable[..., Any] = native.call_soon_threadsafe if is_asyncio else native.run_sync_soon
        self.thread_id = threading.get_ident()

    @classmethod
    def running(cls) -> Loop:
        """Give the loop that runs in this thread."""
        token = current_token()
        return cls(token.native_token, is_asyncio="asyncio" in token.backend_class.__module__)

    def call_soon(self, function: Callable[..., Any], *args: Any) -> bool:
        """Call the function on the loop, soon; False when the loop is gone."""
        try:
            self._schedule(function, *args)
        except RuntimeError:  # asyncio: the loop is closed; trio: RunFinishedError
            return False
        return True

    @property
    def is_running(self) -> bool:
        """False when the loop was closed, or stopped in a way that only asyncio allows."""
        return bool(self._native.is_running()) if self.is_asyncio else True

    @property
    def is_here(self) -> bool:
        """Whether this thread is the one that runs the loop."""
        return threading.get_ident() == self.thread_id


class Doorbell:
    """Calls from any thread, carried out in order on one loop; many calls may share one wake-up of the loop.

    Args:
        on_error: told when a call raises.
    """

    __slots__ = ("_calls", "_closed", "_on_error", "_rung", "loop")

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        self._on_error = on_error
        self.loop = Loop.running()
        self._closed = False
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._rung = False

    def ring(self, function: Callable[..., Any], *args: Any) -> None:
        """Have the function called on the loop.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        # Append first, look second: _answer lowers the flag before it empties the deque, so whoever sees the flag up
        # has appended in time, and whoever sees it down rings. Two rings at once are harmless.
        call = (function, args)
        self._calls.append(call)
        if self._closed:
            self._take_back(call)
        elif not self._rung:
            self._rung = True
            if not self.loop.call_soon(self._answer):
                self._take_back(call)

    def close(self) -> None:
        """Carry out what was asked so far; refuse what comes later. On the loop."""
        self._closed = True
        self._answer()

    def _take_back(self, call: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        try:
            self._calls.remove(call)
        except ValueError:  # close() still carried it out
            return
        raise EvaluatorClosedError("the event loop that runs the jobs is gone: it was closed or has ended")

    def _answer(self) -> None:
        self._rung = False
        calls = self._calls
        while calls:
            function, args = calls.popleft()
            try:
                function(*args)
            except Exception as exc:  # noqa: BLE001 - no loop has anyone to raise it to; trio would even crash
                self._on_error(exc)
