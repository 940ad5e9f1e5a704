"""Jobs on their way through one worker: what lies between the engine and a slot."""

from __future__ import annotations

import contextlib
import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from paraval.job import Job, JobStatus
from paraval.outcome import Outcome, all_returned, returned

__all__ = ["Batch", "Ended", "Returned"]

Ended = tuple[Job, Outcome, float]
"""A job, what became of it, and when, in seconds on the evaluator's clock."""


class Returned(NamedTuple):
    """Several jobs, in their order, all of which returned: what became of them, in columns."""

    jobs: Sequence[Job]
    ids: Sequence[str]
    values: Sequence[Any]
    starts: Sequence[float]
    ends: Sequence[float]

    def longest_s(self) -> float:
        """Say how many seconds the longest of them took."""
        return max(end - start for start, end in zip(self.starts, self.ends, strict=True))

    def each(self) -> Iterator[Ended]:
        """Say it of one after the other."""
        for job, value, started, finished in zip(self.jobs, self.values, self.starts, self.ends, strict=True):
            if job._status is not _CANCELLED:  # else it was given up
                job._started = started
            yield job, returned(value), finished


# Enum's own look-up of a member costs more than anything else that is done with it here.
_READY: Final = JobStatus.READY
_RUNNING: Final = JobStatus.RUNNING
_CANCELLED: Final = JobStatus.CANCELLED


class Batch:
    """Jobs that one worker runs one after the other.

    The slot takes jobs and finishes them, maybe in another thread; the engine, on its loop, collects what is finished
    and may reclaim what was not taken. Each of these is a single operation on a list, so no lock is needed.

    A slot whose worker is in this process takes one job at a time. One that sends jobs elsewhere takes them all, and
    gives back those that its worker will not get to soon.

    Args:
        jobs: in their order; the list is the batch's own from now on.
        clock: seconds since the evaluator was created.
        report: called by slots that take all, on the engine's loop, when something is to be collected.
        in_order: whether jobs are to be sent one by one, so that it is always known which one runs. (Only for slots of
            a backend that :attr:`~Backend.is_far`; likewise all that follow.)
        hold_s: for how many seconds a worker elsewhere may keep those that it has not started.
        pace_s: how many seconds each takes at least, going by those before; 0 if that is not known.
        more: gives, for this batch, at most so many more jobs, in place of a next batch; None: there will be none.

    Attributes:
        current: the job that is known to run.
        noted: the last one that was stored as running (the engine's own note).
        last_end: when the last of its jobs was finished on the clock; at first, when it was made.
        hurry: when its run is cancelled, kill at once: the job to stop is not known to be the one that runs.
        waits_for_worker: its worker is being set up, so no job's time has begun; or what it sent is being taken in, so
            it is not known yet which jobs have ended in time.
        shortest_s: how many seconds the shortest job since the last :meth:`lap` took, where a worker tells; infinity
            before one has ended.
        is_overdue: a job of it seemed to run for too long when it was looked at last (the engine's own note).
        has_waited: its slot has waited for it, so all other tasks have had their turns.
        was_cut: some of its jobs went elsewhere, so its time says nothing about them.
    """

    __slots__ = (
        "_clock",
        "_finished",
        "_lap",
        "_more",
        "_returned",
        "_sent",
        "_size",
        "_todo",
        "created",
        "current",
        "has_waited",
        "hold_s",
        "hurry",
        "in_order",
        "is_overdue",
        "last_end",
        "noted",
        "pace_s",
        "report",
        "shortest_s",
        "waits_for_worker",
        "was_cut",
    )

    def __init__(
        self,
        jobs: list[Job],
        clock: Callable[[], float],
        report: Callable[[], object],
        *,
        in_order: bool = False,
        hold_s: float = 0.0,
        pace_s: float = 0.0,
        more: Callable[[Batch, int], Sequence[Job]] | None = None,
    ) -> None:
        self.in_order = in_order
        self.hold_s = hold_s
        self.pace_s = pace_s
        self._more = more
        self._size = len(jobs)
        jobs.reverse()
        self._todo = jobs  # the next one is at the end
        self._finished: list[Ended | Returned] = []
        self._returned: list[Job] | None = None
        self._sent: dict[str, Job] | None = None
        self._clock = clock
        self.report = report
        self.created = self.last_end = clock()
        self._lap = (0, self.created)
        self.current: Job | None = None
        self.noted: Job | None = None
        self.hurry = False
        self.waits_for_worker = False
        self.shortest_s = math.inf
        self.is_overdue = False
        self.has_waited = False
        self.was_cut = False

    # -- the slot's side -----------------------------------------------------------------------------------------------

    def take(self, now: float | None = None) -> Job | None:
        """Start the next job; None when there is none left. ``now``: what the clock shows, if that is known."""
        if not self._todo:  # a raised exception costs more than this look
            return None
        try:
            job = self._todo.pop()
        except IndexError:
            return None
        if job._status is _CANCELLED:  # it was given up by another thread, as the engine's loop hangs
            return self.take(now)
        job._started = self._clock() if now is None else now
        job._status = _RUNNING
        self.current = job
        return job

    def finish(self, job: Job, outcome: Outcome) -> None:
        """Hand in the outcome of a job that was taken."""
        self.last_end = now = self._clock()
        self._finished.append((job, outcome, now))
        self.current = None

    def take_all(self, most: int | None = None) -> dict[str, Job]:
        """Start all jobs (at most ``most``), to be run in their order somewhere else.

        Returns:
            The jobs that are not finished, by their ids: it shrinks as they are.
        """
        jobs = self._todo[::-1][:most]
        del self._todo[len(self._todo) - len(jobs) :]
        if _CANCELLED in [job._status for job in jobs]:  # settled while the slot was not ready for them
            jobs = [job for job in jobs if job._status is not _CANCELLED]
        now = self._clock()
        for job in jobs:
            job._started = now
            job._status = _RUNNING
        self._sent = dict(zip([job.id for job in jobs], jobs, strict=True))
        if len(jobs) == 1:
            self.current = jobs[0]
        return self._sent

    @property
    def may_have_more(self) -> bool:
        """Whether it is worth while to :meth:`ask_for_more`."""
        return self._more is not None

    def ask_for_more(self, most: int) -> Sequence[Job]:
        """Give at most so many more jobs for the worker to have ahead, each for :meth:`take_more` or :meth:`refuse`."""
        return () if self._more is None else self._more(self, most)

    def take_more(self, jobs: Sequence[Job]) -> None:
        """Say that the worker will find these when it is through with the others of :meth:`take_all`."""
        self._size += len(jobs)
        if self._sent is not None:
            self._sent.update(zip([job.id for job in jobs], jobs, strict=True))

    def go_on(self, jobs: Sequence[Job]) -> None:
        """Say that the worker is at these jobs of :meth:`take_more` now, being through with those before."""
        self.created = now = self.last_end
        sent = self._sent or {}
        for job in jobs:
            if job._status is _READY and job.id in sent:  # else it has ended, and waits for its next attempt
                job._started, job._status = now, _RUNNING
        self.current = jobs[0] if len(jobs) == 1 and jobs[0].id in sent else None

    def refuse(self, jobs: Sequence[Job]) -> None:
        """Give back jobs that were not taken after all; there shall be no more of them."""
        self._more = None
        self._returned = [*(self._returned or ()), *jobs]
        self.report()

    def wait_for_worker(self) -> None:
        """Say that the worker is being set up: no job's time has begun."""
        self.waits_for_worker = True

    def worker_is_ready(self) -> None:
        """Say that the worker is set up: the time of its jobs begins now."""
        self.waits_for_worker = False
        self.created = self._clock()
        self._lap = (self._lap[0], self.created)
        if self.current is not None:
            self.current._started = self.created

    @contextlib.contextmanager
    def taking_in(self) -> Iterator[None]:
        """Say that what the worker sent takes a while to be taken in: no job's time is up before that."""
        self.waits_for_worker = True
        try:
            yield
        finally:
            self.waits_for_worker = False

    def finish_sent(self, job: Job, outcome: Outcome, started: float, finished: float) -> None:
        """Hand in the outcome of a job of :meth:`take_all`, with the times that the worker took."""
        if self._sent is None or self._sent.pop(job.id, None) is None:
            return
        if job._status is not _CANCELLED:
            job._started = started
        self.last_end = finished
        self.shortest_s = min(self.shortest_s, finished - started)
        self._finished.append((job, outcome, finished))
        if self.current is job:
            self.current = None

    def finish_all(
        self, jobs: Sequence[Job], outcomes: Sequence[Outcome], starts: Sequence[float], ends: Sequence[float]
    ) -> None:
        """Hand in the outcomes of several jobs, in their order; as :meth:`finish_sent` for each."""
        sent = self._sent
        if sent is None or not jobs:
            return
        late = []
        for job, started in zip(jobs, starts, strict=True):
            if sent.pop(job.id, None) is None:
                late.append(job)
            elif job._status is not _CANCELLED:  # else it was given up
                job._started = started
        ended = zip(jobs, outcomes, ends, strict=True)
        self._finished += [one for one in ended if one[0] not in late] if late else ended
        self.last_end = ends[-1]
        self.shortest_s = min(self.shortest_s, *map(operator.sub, ends, starts))
        if self.current is not None and self.current.id not in sent:
            self.current = None

    def finish_returned(
        self, jobs: Sequence[Job], values: Sequence[Any], starts: Sequence[float], ends: Sequence[float]
    ) -> None:
        """Do the same for jobs that all returned, at a fraction of the cost."""
        sent = self._sent or {}
        ids = [job.id for job in jobs]
        if list(sent) == ids:  # all that it had
            sent.clear()
        elif all(map(sent.__contains__, ids)):
            deque(map(sent.pop, ids), maxlen=0)  # a loop would cost twice as much
        else:  # one was settled meanwhile
            self.finish_all(jobs, all_returned(values), starts, ends)
            return
        self._finished.append(Returned(jobs, ids, values, starts, ends))
        self.last_end = ends[-1]
        shortest_s = min(map(operator.sub, ends, starts))
        self.shortest_s = min(self.shortest_s, shortest_s)
        if self.current is not None and self.current.id not in sent:
            self.current = None

    def seconds_left(self) -> float:
        """Say for how long the worker will have other jobs of :meth:`take_all` than the one that it is at, at least."""
        return self.pace_s * (self.stock - 1)

    def find(self, job_id: str) -> Job | None:
        """Give the job of :meth:`take_all` that has this id, unless it is finished."""
        return (self._sent or {}).get(job_id)

    @property
    def stock(self) -> int:
        """How many jobs of :meth:`take_all` and :meth:`take_more` are not finished."""
        return len(self._sent or ())

    def give_back(self, jobs: Sequence[Job], current: Job | None, started: float | None) -> None:
        """Say which jobs of :meth:`take_all` the worker has not started, and which one keeps it busy since when."""
        self.was_cut = True
        self._return(jobs)
        self.current = None
        if current is not None and current.id in (self._sent or ()):
            self.current = current
            current._started = started

    def leave_out(self, jobs: Sequence[Job]) -> None:
        """Say which jobs of :meth:`take_all` were never started, as the others had taken long enough.

        Unlike :meth:`give_back`, what the batch took is then the time of those that it ran.
        """
        self._size -= self._return(jobs)
        if not self._size:
            self.was_cut = True

    def return_ahead(self, jobs: Sequence[Job]) -> None:
        """Say which jobs of :meth:`take_more` were taken back from the worker, which has not begun them."""
        self._size -= self._return(jobs)

    def _return(self, jobs: Sequence[Job]) -> int:
        sent = self._sent or {}
        jobs = [job for job in jobs if sent.pop(job.id, None) is not None]
        for job in jobs:
            if job._status is not _CANCELLED:  # else it was given up meanwhile
                job._started, job._status = None, _READY
            if job is self.current:  # it was thought to have begun, as the one before it had ended
                self.current = None
        self._returned = [*(self._returned or ()), *jobs]
        return len(jobs)

    # -- the engine's side ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._size

    @property
    def only(self) -> Job | None:
        """The one job, if it is the only one, was not taken, and there will be no more."""
        return self._todo[0] if len(self._todo) == 1 and self._more is None else None

    @property
    def waiting(self) -> int:
        """How many jobs were not taken."""
        return len(self._todo)

    @property
    def in_hand(self) -> list[Job]:
        """The jobs that were taken and are not finished."""
        if self._sent is not None:
            return list(self._sent.values())
        current = self.current
        return [] if current is None else [current]

    def lap(self, least: int = 1, least_s: float = 0.0) -> tuple[int, float, float] | None:
        """Measure the jobs that have ended since the last lap, if they are so many, or have taken so many seconds.

        Returns:
            How many they are, how many seconds they took together, and the shortest of them; None when they are too
            few, or say nothing.
        """
        before, begin = self._lap
        ended = self._size - len(self._todo) - len(self._sent or ()) - before
        seconds = self.last_end - begin
        if not ended or (ended < least and seconds < least_s):
            return None
        self._lap = (before + ended, self.last_end)
        shortest_s, self.shortest_s = self.shortest_s, math.inf
        was_cut, self.was_cut = self.was_cut, False
        return None if was_cut else (ended, seconds, shortest_s)

    def outcome(self) -> Outcome | None:
        """Take the outcome of the only job; None if it has not ended."""
        for ended in self.collect():
            if not isinstance(ended, Returned):
                return ended[1]
        return None

    def collect(self) -> list[Ended | Returned]:
        """Take the outcomes that were handed in since the last call."""
        count = len(self._finished)  # the slot may append one more at this moment; that one stays
        ended = self._finished[:count]
        del self._finished[:count]
        return ended

    def reclaim(self) -> list[Job]:
        """Take back the jobs that were not taken, or were given back, in their order."""
        jobs: list[Job] = []
        try:
            while self._todo:  # from the far end, as the slot may take from the near end at the same moment
                self.was_cut = True
                jobs.append(self._todo.pop(0))
        except IndexError:
            pass
        jobs.reverse()
        returned, self._returned = self._returned, None
        return jobs if returned is None else returned + jobs

    def withdraw(self, job: Job) -> bool:
        """Take back one job; False when it was taken already."""
        try:
            self._todo.remove(job)
        except (ValueError, IndexError, RuntimeError):  # not there, or the slot took one meanwhile
            return False
        return True
