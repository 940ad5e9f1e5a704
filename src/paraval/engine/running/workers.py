"""The table of workers: they are hired as jobs wait for them, up to ``num_workers``, and stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from paraval.ctrl_c import spared_ctrl_c
from paraval.engine.collector import OBJECTS, CollectorPace, collector_at_rest
from paraval.engine.running.dispatch import Dispatch
from paraval.engine.running.watch import Watch
from paraval.engine.running.worker import Worker
from paraval.loops import Loop

if TYPE_CHECKING:
    from paraval.engine.engine import EngineSettings

__all__ = ["Workers"]

_HIRE_AT_ONCE: Final = 64


class Workers:
    """All workers of one engine. On the engine's loop."""

    def __init__(self, settings: EngineSettings, dispatch: Dispatch, watch: Watch, loop: Loop) -> None:
        self._settings = settings
        self._dispatch = dispatch
        self._queue = dispatch.queue
        self._queue.on_surplus = self._want_more
        self._watch = watch
        self._loop = loop
        self._work = spared_ctrl_c(Worker.work, loop)
        self._workers: set[Worker] = set()
        self._pace = CollectorPace()
        self._wanted = loop.event()

    def __iter__(self) -> Iterator[Worker]:
        """Go through those that there are at this moment; from any thread."""
        return iter(list(self._workers))

    async def hire(self, group: TaskGroup) -> None:
        """Start the workers that are missing."""
        self._wanted = self._loop.event()
        scope = type(anyio.CancelScope())  # the loop's own: each is made without a look at which loop it is
        missing = self._missing
        with collector_at_rest(missing * OBJECTS) if missing > _HIRE_AT_ONCE else contextlib.nullcontext():
            while self._missing > 0:
                for _ in range(min(self._missing, _HIRE_AT_ONCE)):
                    worker = Worker(
                        self._settings, self._dispatch, self._watch, self._loop, scope, self._workers.discard
                    )
                    self._workers.add(worker)
                    group.start_soon(self._work, worker, name="paraval worker")
                self._pace.suit(len(self._workers))
                await anyio.lowlevel.checkpoint()  # the first may begin while the next are started

    async def until_wanted(self) -> None:
        """Wait until workers may be missing again."""
        await self._wanted.wait()

    def look_up(self) -> None:
        """Have :meth:`until_wanted` return."""
        self._wanted.set()

    def ended(self) -> None:
        """Undo what the workers needed of the process; there are none any more."""
        self._pace.drop()

    @property
    def _missing(self) -> int:
        """How many more workers there should be: up to one for each job that no idle worker will take."""
        return min(len(self._queue) - self._queue.idle, self._settings.num_workers - len(self._workers))

    def _want_more(self) -> None:
        if self._missing > 0:
            self._wanted.set()
