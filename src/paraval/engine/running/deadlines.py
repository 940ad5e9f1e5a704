"""One task that watches the time for all workers."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import anyio

from paraval.loops import Loop

__all__ = ["Deadlines"]

Check = Callable[[float], float | None]


class Deadlines:
    """Calls checks when they are due. On the engine's loop.

    A check is called with the time, and gives the time when it wants to be called again, or None. Nothing is cancelled
    here: a check whose worker has moved on simply gives None.

    Args:
        clock: seconds, monotonic.
        loop: on which it watches.
    """

    def __init__(self, clock: Callable[[], float], loop: Loop) -> None:
        self._clock = clock
        self._loop = loop
        self._heap: list[tuple[float, int, Check]] = []
        self._order = itertools.count()
        self._sleeping_until = -math.inf
        self._earlier = loop.event()

    def add(self, due: float, check: Check) -> None:
        """Have the check called when the clock shows ``due``."""
        heapq.heappush(self._heap, (due, next(self._order), check))
        if due < self._sleeping_until:
            self._earlier.set()

    async def watch(self) -> None:
        """Call what is due, for ever."""
        heap = self._heap
        while True:
            now = self._clock()
            while heap and heap[0][0] <= now:
                check = heapq.heappop(heap)[2]
                again = check(now)
                if again is not None:
                    self.add(again, check)
            self._earlier = self._loop.event()
            self._sleeping_until = heap[0][0] if heap else math.inf
            with anyio.move_on_after(self._sleeping_until - now):
                await self._earlier.wait()
            self._sleeping_until = -math.inf
