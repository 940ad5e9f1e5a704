"""The memory channel between submit and the workers.

It is our own because anyio's takes a turn of the loop at each receive, which would double the cost of a job that comes
alone, and because jobs can come back: a worker that was killed or is stuck in a long job gives the others up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import repeat, starmap

from paraval.job import Job
from paraval.loops import Loop

__all__ = ["JobQueue"]


class JobQueue:
    """Workers pull from here, in the order of submission. On the engine's loop only.

    Attributes:
        idle: how many workers wait for a job; those that were woken and have not pulled it yet are among them.
        on_surplus: called when jobs came that no idle worker will take.
        on_lack: called when a worker finds no job; it may put some.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._jobs: deque[Job] = deque()
        # A dict is an ordered set with cheap removal. The number: whether who waits is idle no more when it is called.
        self._waiting: dict[Callable[[], object], int] = {}
        self.idle = 0
        self.on_surplus: Callable[[], object] | None = None
        self.on_lack: Callable[[], object] | None = None

    def __len__(self) -> int:
        """Count the jobs that wait; cancelled ones that nobody pulled yet included."""
        return len(self._jobs)

    def put(self, jobs: Iterable[Job]) -> None:
        """Append jobs."""
        self._jobs.extend(jobs)
        self._wake()

    def put_back(self, jobs: list[Job]) -> None:
        """Put jobs that were pulled ahead of the others, in their order."""
        self._jobs.extendleft(reversed(jobs))
        self._wake()

    async def pull(self) -> Job:
        """Wait for the next job. Cancelled, it loses none."""
        self.idle += 1
        try:
            while not self._jobs:
                if self.on_lack is not None:
                    self.on_lack()
                    if self._jobs:
                        break
                turn = self._loop.event()
                self._waiting[turn.set] = 0
                try:
                    await turn.wait()
                except BaseException:
                    self.give_up_turn(turn.set)
                    raise
        finally:
            self.idle -= 1
        return self._jobs.popleft()

    def call_in_turn(self, callback: Callable[[], object]) -> None:
        """Have it called, once, when there is a job; it may pull it at once, from within :meth:`put`."""
        self.idle += 1
        self._waiting[callback] = 1

    def give_up_turn(self, callback: Callable[[], object]) -> None:
        """Have it not called, if it was not called already."""
        is_idle = self._waiting.pop(callback, None)
        if is_idle is None:
            self._wake()  # it was our turn: it is another's now
        else:
            self.idle -= is_idle

    def pull_many(self, most: int) -> list[Job]:
        """Give the next jobs, at most so many; [] when none waits."""
        jobs = self._jobs
        return list(starmap(jobs.popleft, repeat((), min(most, len(jobs)))))

    def pull_nowait(self) -> Job | None:
        """Give the next job, or None when none waits."""
        return self._jobs.popleft() if self._jobs else None

    def pull_now(self) -> Job | None:
        """Give the next job, or one that others give back for a worker that finds none; or None."""
        if self._jobs or self.on_lack is None:
            return self.pull_nowait()
        self.idle += 1
        try:
            self.on_lack()
        finally:
            self.idle -= 1
        return self.pull_nowait()

    def _wake(self) -> None:
        # A worker that is woken and finds nothing, as a busy one was quicker, waits again.
        for _ in range(min(len(self._jobs), len(self._waiting))):
            if not (self._jobs and self._waiting):  # who was called took several; or what was finalized has put some
                break
            callback, is_idle = self._waiting.popitem()
            self.idle -= is_idle
            callback()
        if len(self._jobs) > self.idle and self.on_surplus is not None:
            self.on_surplus()
