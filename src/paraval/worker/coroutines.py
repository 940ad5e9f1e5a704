"""Coroutines of jobs, run one after the other on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any, Final

__all__ = ["CoroutineRunner"]


_TURNS: Final = 100
"""How often the end of what is left may be interrupted, by each task of many, say."""


class CoroutineRunner:
    """Runs coroutines on an event loop that lasts from one to the next; what one leaves there does not strike the next.

    For one thread, which makes all calls but :meth:`cancel`.
    """

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._pid = os.getpid()
        self._task: asyncio.Task[Any] | None = None

    def run(self, coroutine: Any, is_cancelled: Callable[[], bool]) -> Any:
        """Run a coroutine to its end, and end the tasks that it left, as ``asyncio.run`` does.

        Args:
            coroutine: anything that can be awaited.
            is_cancelled: whether it was asked to stop before there was a task to tell.

        Raises:
            BaseException: what the coroutine raises; SystemExit also from a task that it started.
        """

        async def watched() -> Any:
            self._task = task = asyncio.current_task()
            if task is not None and is_cancelled():
                task.cancel()
            try:
                return await coroutine
            finally:
                self._task = None

        try:
            return self._complete(watched())
        finally:
            self._task = None
            if os.getpid() == self._pid:  # a process that the job forked came back too: the tasks are not its own
                self._end_what_is_left()

    def cancel(self) -> None:
        """Cancel the coroutine that runs, if one does; from any thread, and from a signal handler."""
        task = self._task
        if task is not None:
            self._runner.get_loop().call_soon_threadsafe(task.cancel)

    def remove_signal_handler(self, number: int) -> None:
        """Forget the handler that a coroutine gave to the loop, if it did."""
        self._runner.get_loop().remove_signal_handler(number)

    def close(self) -> None:
        """Close the loop."""
        self._runner.close()

    def _complete(self, coroutine: Any) -> Any:
        loop = self._runner.get_loop()
        task = loop.create_task(coroutine)
        task.add_done_callback(lambda _: loop.stop())
        try:
            while not task.done():  # an earlier coroutine may have left something that stops the loop
                loop.run_forever()
        except BaseException:
            if task.done() and not task.cancelled():
                task.exception()  # it is raised here: asyncio need not complain that nobody took it
            raise
        return task.result()

    def _end_what_is_left(self) -> None:
        loop = self._runner.get_loop()
        for _ in range(_TURNS):
            left = asyncio.all_tasks(loop)
            if not left:
                return
            for task in left:
                task.cancel()
            try:
                self._complete(asyncio.wait(left))
            except (SystemExit, KeyboardInterrupt):  # it ended that task, and shall end no more
                continue
        # Something raises it each time that the loop runs: a reader, say. No coroutine would come to its end there.
        self._runner = asyncio.Runner()
        with contextlib.suppress(Exception):
            loop.close()
