"""What a backend is to the engine: slots that run batches of jobs.

A backend adapts something that can run a function (a coroutine, a thread, a process, a foreign future) to one
awaitable, :meth:`Slot.run`. Everything else, that is queueing, deadlines, settling, belongs to the engine.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import anyio

from paraval.job import Job, JobStatus
from paraval.outcome import Outcome, error_from_exception

__all__ = ["Backend", "Batch", "Cancellation", "Ended", "RunSpec", "Slot", "failure_of"]

Cancellation = Literal["cancel", "kill", "cooperative"]
"""What a backend can do to a running job: cancel its coroutine, kill it, or only ask it to stop."""


Ended = tuple[Job, Outcome, float]
"""A job, what became of it, and when, in seconds on the evaluator's clock."""


class RunSpec:
    """What is the same for every job of an evaluator, read anew for each job.

    Attributes:
        kwargs: static keyword arguments of the run-function.
        stopper: copied for each job; or None.
        clock: seconds since the evaluator was created.
        kill_grace: seconds between asking a job to stop and the strongest means.
        budget_end: when everything must have ended, on the clock.
    """

    __slots__ = ("budget_end", "clock", "kill_grace", "kwargs", "stopper")

    def __init__(self, kwargs: dict[str, Any], clock: Callable[[], float], kill_grace: float) -> None:
        self.kwargs = kwargs
        self.stopper: Any = None
        self.clock = clock
        self.kill_grace = kill_grace
        self.budget_end = math.inf


class Batch:
    """Jobs that one worker runs one after the other.

    The slot takes jobs and finishes them, maybe in another thread; the engine, on its loop, collects what is finished
    and may reclaim what was not started. Each of these is a single operation on a deque, so no lock is needed.

    Attributes:
        current: the job that was taken and is not finished.
        was_reclaimed: some of its jobs may have gone elsewhere, so its time says nothing about them.
    """

    __slots__ = ("_clock", "_finished", "_size", "_todo", "created", "current", "was_reclaimed")

    def __init__(self, jobs: list[Job], clock: Callable[[], float]) -> None:
        self._size = len(jobs)
        jobs.reverse()
        self._todo = jobs  # the next one is at the end
        self._finished: list[Ended] = []
        self._clock = clock
        self.created = clock()
        self.current: Job | None = None
        self.was_reclaimed = False

    # -- the slot's side -----------------------------------------------------------------------------------------------

    def take(self) -> Job | None:
        """Start the next job; None when there is none left."""
        try:
            job = self._todo.pop()
        except IndexError:
            return None
        job._started = self._clock()
        job._status = JobStatus.RUNNING
        self.current = job
        return job

    def finish(self, job: Job, outcome: Outcome) -> None:
        """Hand in the outcome of a job that was taken."""
        self._finished.append((job, outcome, self._clock()))
        self.current = None

    # -- the engine's side ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    @property
    def waiting(self) -> int:
        """How many jobs were not started."""
        return len(self._todo)

    def collect(self) -> list[Ended]:
        """Take the outcomes that were handed in since the last call."""
        count = len(self._finished)  # the slot may append one more at this moment; that one stays
        ended = self._finished[:count]
        del self._finished[:count]
        return ended

    def reclaim(self) -> list[Job]:
        """Take back the jobs that were not started, in their order."""
        jobs: list[Job] = []
        self.was_reclaimed = True
        try:
            while True:  # from the far end, as the slot may take from the near end at the same moment
                jobs.append(self._todo.pop(0))
        except IndexError:
            jobs.reverse()
            return jobs

    def withdraw(self, job: Job) -> bool:
        """Take back one job; False when it was started already."""
        try:
            self._todo.remove(job)
        except (ValueError, IndexError, RuntimeError):  # not there, or the slot took one meanwhile
            return False
        return True


def failure_of(exc: BaseException) -> Outcome:
    """Turn what a call on the engine's loop raised, be it SystemExit, into its outcome. To be called in its handler.

    A cancellation that comes from above is raised on. One that the run-function made up itself (it awaited a task that
    was cancelled) is its failure.
    """
    if isinstance(exc, GeneratorExit):
        raise exc
    if isinstance(exc, anyio.get_cancelled_exc_class()) and anyio.current_effective_deadline() == -math.inf:
        raise exc
    return Outcome(error=error_from_exception(exc))


class Slot(abc.ABC):
    """One worker's place to run jobs. Made, used and closed on the engine's loop."""

    @abc.abstractmethod
    async def run(self, batch: Batch) -> None:
        """Run jobs until ``batch.take()`` gives None.

        When it is cancelled, the current job shall stop: it is asked (its status is ``CANCELLING``), after
        ``kill_grace`` seconds the strongest means follow, and the cancellation goes on up. Any other exception says
        that the slot, not the job, failed.
        """

    async def recover(self) -> None:  # noqa: B027 - most slots need nothing here
        """After a cancelled ``run``: return when the slot can run jobs again."""

    def close(self) -> None:  # noqa: B027 - likewise
        """Give up what the slot holds; without waiting."""


class Backend(abc.ABC):
    """Makes slots."""

    cancellation: ClassVar[Cancellation]

    @abc.abstractmethod
    def slot(self, spec: RunSpec) -> Slot:
        """Make a slot. It may start what it needs when the first batch comes."""
