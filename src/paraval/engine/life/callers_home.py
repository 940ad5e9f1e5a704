"""The loop of an ``async with`` block as the home of engines."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Final

import anyio

from paraval.engine.engine import Engine
from paraval.errors import EvaluatorClosedError
from paraval.loops import Loop

__all__ = ["CallersHome"]

_logger = logging.getLogger("paraval")
_NAME: Final = "paraval engine"


class CallersHome:
    """A task on the caller's loop, which runs one engine after the other.

    It is nobody's child: a task group of the block's own would have to be left in the task that entered it, and before
    all that was entered earlier, but fixtures, start-up hooks and exit stacks do not always do so. Nor does a
    cancellation from outside reach it: that ends the block, whose end closes the engine, with the grace of its jobs.
    """

    def __init__(self) -> None:
        self.loop = Loop.running()
        self._engines: deque[Engine] = deque()
        self._wanted = self.loop.event()
        self._is_left = False
        self._ended = self.loop.event()
        self._task = _start(self._keep, self.loop)

    @property
    def is_gone(self) -> bool:
        """Whether no engine can run here any more."""
        return self._ended.is_set() or self.loop.is_closed

    def run(self, engine: Engine) -> None:
        """Run an engine, after those that are here; from any thread, from inside a task or not.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        self._engines.append(engine)
        if not self.loop.call_soon(self._want):
            raise EvaluatorClosedError("the event loop that runs the jobs is gone: it was closed or has ended")

    async def leave(self) -> None:
        """Wait until the last engine, which is stopped, has ended. On another loop: do not wait."""
        self._is_left = True
        if Loop.running() is not self.loop:
            self.loop.call_soon(self._want)
            return
        self._want()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()

    def _want(self) -> None:
        self._wanted.set()  # the event of that moment: the keeper makes a new one for each wait

    async def _keep(self) -> None:
        try:
            while True:
                self._wanted = self.loop.event()
                while self._engines:
                    await self._run(self._engines.popleft())
                if self._is_left:
                    return
                await self._wanted.wait()
        finally:
            self._ended.set()

    async def _run(self, engine: Engine) -> None:
        try:
            await engine.run(_do_nothing)
        except Exception:  # as in a thread of its own, nobody is above it; the ledger has told who waits
            _logger.exception("the evaluator's engine ended with an error")


def _start(function: Callable[[], Coroutine[Any, Any, None]], loop: Loop) -> Any:
    if loop.is_asyncio:
        return asyncio.get_running_loop().create_task(function(), name=_NAME)
    import trio  # here: it is an extra, and it is imported already when it runs

    return trio.lowlevel.spawn_system_task(function, name=_NAME, context=copy_context())


def _do_nothing() -> None:
    pass
