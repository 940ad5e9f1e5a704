"""The memory channel between submit and the workers.

It is our own because anyio's takes a turn of the loop at each receive, which would double the cost of a job that comes
alone, and because jobs can come back: a worker that was killed or is stuck in a long job gives the others up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from paraval.job import Job
from paraval.loops import Loop

__all__ = ["JobQueue"]


class JobQueue:
    """Workers pull from here, in the order of submission. On the engine's loop only."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._jobs: deque[Job] = deque()
        self._waiting: dict[Callable[[], object], None] = {}  # a dict is an ordered set with cheap removal

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
        while not self._jobs:
            turn = self._loop.event()
            self._waiting[turn.set] = None
            try:
                await turn.wait()
            except BaseException:
                self.give_up_turn(turn.set)
                raise
        return self._jobs.popleft()

    def call_in_turn(self, callback: Callable[[], object]) -> None:
        """Have it called, once, when there is a job; it may pull it at once, from within :meth:`put`."""
        self._waiting[callback] = None

    def give_up_turn(self, callback: Callable[[], object]) -> bool:
        """Have it not called; False when it was called already."""
        if callback not in self._waiting:
            self._wake()  # it was our turn: it is another's now
            return False
        del self._waiting[callback]
        return True

    def pull_many(self, most: int) -> list[Job]:
        """Give the next jobs, at most so many; [] when none waits."""
        jobs = self._jobs
        return [jobs.popleft() for _ in range(min(most, len(jobs)))]

    def pull_nowait(self) -> Job | None:
        """Give the next job, or None when none waits."""
        return self._jobs.popleft() if self._jobs else None

    def _wake(self) -> None:
        # A worker that is woken and finds nothing, as a busy one was quicker, waits again.
        for _ in range(min(len(self._jobs), len(self._waiting))):
            if not self._jobs:  # who was called took several
                break
            callback, _nothing = self._waiting.popitem()
            callback()
