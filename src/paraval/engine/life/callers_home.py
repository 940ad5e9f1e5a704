"""The loop of an ``async with`` block as the home of engines."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Final

import anyio

from paraval.engine.engine import Engine
from paraval.errors import EvaluatorClosedError
from paraval.loops import Event, Loop

__all__ = ["CallersHome"]

_logger = logging.getLogger("paraval")
_NAME: Final = "paraval engine"


class CallersHome:
    """A task on the caller's loop for each engine, of which there is one at a time, unless one would not end.

    These tasks are nobody's children: a task group of the block's own would have to be left in the task that entered
    it, and before all that was entered earlier, but fixtures, start-up hooks and exit stacks do not always do so. Nor
    does a cancellation from outside reach them: that ends the block, whose end closes the engine, with the grace of its
    jobs.
    """

    def __init__(self) -> None:
        self.loop = Loop.running()
        self._context = copy_context()
        self._tasks: set[object] = set()  # an asyncio loop itself would not keep them from being collected
        self._at_work = 0
        self._at_rest: Event | None = None
        self._left = self.loop.event()
        self._is_over = False
        if not self.loop.is_asyncio:
            self._start(self._watch_the_loop, lambda: None)

    @property
    def is_gone(self) -> bool:
        """Whether no engine can run here any more."""
        return self._is_over or self.loop.is_closed

    def run(self, engine: Engine) -> None:
        """Run an engine; from any thread, from inside a task or not.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        if not self.loop.call_soon(self._begin, engine):
            raise EvaluatorClosedError("the event loop that runs the jobs is gone: it was closed or has ended")

    async def leave(self, patience: float) -> None:
        """Wait until the engine, which is stopped, has ended; at most so many seconds. On another loop: do not wait."""
        if Loop.running() is not self.loop:
            self.drop()
            return
        self._left.set()
        with anyio.move_on_after(patience, shield=True):
            while self._at_work:
                self._at_rest = self.loop.event()
                await self._at_rest.wait()

    def drop(self) -> None:
        """Leave without waiting; from any thread."""
        self.loop.call_soon(self._left.set)

    def _begin(self, engine: Engine) -> None:
        self._at_work += 1
        self._start(functools.partial(_run, engine), functools.partial(self._end, engine))

    def _end(self, engine: Engine) -> None:
        engine.end()  # its task may have been cancelled before it began
        self._at_work -= 1
        if self._at_rest is not None:
            self._at_rest.set()

    def _start(self, function: Callable[[], Coroutine[Any, Any, None]], ended: Callable[[], object]) -> None:
        """Start a task that is nobody's child; ``ended()`` is called however it ends."""
        context = self._context.copy()
        if self.loop.is_asyncio:
            task = asyncio.get_running_loop().create_task(function(), name=_NAME, context=context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _task: ended())
            return
        import trio  # here: it is an extra, and it is imported already when it runs

        async def whole() -> None:
            try:
                await function()
            except trio.Cancelled:
                raise
            except BaseException:  # whatever else left a system task would end the program
                _logger.exception("the evaluator's engine ended with an error")
            finally:
                ended()

        trio.lowlevel.spawn_system_task(whole, name=_NAME, context=context)

    async def _watch_the_loop(self) -> None:
        """Notice the end of trio's loop, where this is cancelled."""
        try:
            await self._left.wait()
        finally:
            self._is_over = True


async def _run(engine: Engine) -> None:
    try:
        await engine.run(_do_nothing)
    except Exception:  # as in a thread of its own, nobody is above it; the ledger has told who waits
        _logger.exception("the evaluator's engine ended with an error")


def _do_nothing() -> None:
    pass
