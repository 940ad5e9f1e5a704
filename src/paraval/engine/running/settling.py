"""The one place where a job ends: it gets its outcome, once, and goes to the recorder.

Here is also what is known of each job until then: that it is open, and why it is being stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Final

from paraval.backends.base import Ended, Returned
from paraval.engine.reasons import out_of_time
from paraval.engine.recorder import Recorder
from paraval.engine.running.attempts import Attempts
from paraval.job import Job, JobStatus, taken_apart
from paraval.loops import Loop
from paraval.outcome import JobError, Outcome, returned

__all__ = ["Settling"]

_DONE: Final = JobStatus.DONE


class Settling:
    """The table of open jobs, and their ends. On the engine's loop, but for :meth:`settle_all` of a loop that hangs.

    Args:
        recorder: what comes after.
        attempts: whether a failed job has another attempt.
        try_again: told of a job and the seconds after which its next attempt may begin.
        clock: seconds since the evaluator was created.
        loop: the engine's.
        job_timeout: seconds that one job may run.

    Attributes:
        open: every job that is not settled. Whoever pops a job from here settles it: so each is settled once.
        reasons: why the job is being stopped.
        stopped_at: since when, where it runs.
        all_settled: set when no job is open and the evaluator is being closed.
        on_settled: told of each job that ends, and how, while somebody follows one.
    """

    def __init__(
        self,
        recorder: Recorder,
        attempts: Attempts,
        try_again: Callable[[Job, float], object],
        clock: Callable[[], float],
        loop: Loop,
        *,
        job_timeout: float | None = None,
    ) -> None:
        self._limit = job_timeout
        self._recorder = recorder
        self._attempts = attempts
        self._try_again = try_again
        self._clock = clock
        self.open: dict[str, Job] = {}
        self.reasons: dict[str, JobError] = {}
        self.stopped_at: dict[str, float] = {}
        self.all_settled = loop.event()
        self.on_settled: Callable[[Job, Outcome], object] | None = None

    def settle(self, reports: Sequence[Ended | Returned]) -> None:
        """Give each job its one terminal record: on the job, in the storage, then to whoever waits for it."""
        jobs: list[Job] = []
        told: list[tuple[Job, Outcome]] = []
        if Returned not in map(type, reports):
            self._settle_each(reports, jobs, told)  # type: ignore[arg-type] # none of them is a group
        elif not self._settle_returned(reports, jobs):
            self._settle_each(_one_by_one(reports), jobs, told)
        if jobs:
            self._recorder.record(jobs)
        for job, outcome in told:
            if self.on_settled is not None:
                self.on_settled(job, outcome)
        if self._recorder.closing and not self.open:
            self.all_settled.set()

    def _settle_each(self, ended: Iterable[Ended], jobs: list[Job], told: list[tuple[Job, Outcome]]) -> None:
        open_, reasons, attempts = self.open, self.reasons, self._attempts
        has_limit = self._limit is not None
        for job, reported, finished in ended:
            job_id, error = job.id, reported[1]
            if reasons and job_id in reasons:
                self._look_whether_it_was_late(job, finished)
            if error is not None and reported.may_retry and self._has_another(job, error):
                continue
            if open_.pop(job_id, None) is None:
                continue  # settled already: it was given up, and came back after all
            holder, job._holder = job._holder, None
            job._finished = finished
            if holder is not None and job._started is None:
                job._started = finished  # it was sent ahead, and nobody has said whether it began
            outcome = self._final(job, reported, finished) if reasons or attempts or has_limit else reported
            job.settle(outcome)
            jobs.append(job)
            if self.on_settled is not None:
                told.append((job, outcome))

    def _settle_returned(self, reports: Sequence[Ended | Returned], jobs: list[Job]) -> bool:
        """Settle jobs that all returned, where that is all there is to it: at a fraction of the cost of each alone."""
        groups = [report for report in reports if isinstance(report, Returned)]
        if len(groups) < len(reports) or self.reasons or self._attempts or self.on_settled is not None:
            return False
        limit = self._limit
        if limit is not None and max(group.longest_s() for group in groups) > limit:
            return False
        for group in groups:
            still_open = list(map(self.open.pop, group.ids, repeat(None)))
            has_dicts = any(issubclass(kind, dict) for kind in set(map(type, group.values)))
            if set(map(type, still_open)) == {Job} and not has_dicts:  # as a rule
                for job, value, started, finished in zip(
                    group.jobs, group.values, group.starts, group.ends, strict=True
                ):
                    job._holder = None
                    job._started = started
                    job._finished = finished
                    job.output = value
                    job._status = _DONE
                self._recorder.record_returned(group)
                continue
            for maybe, value, started, finished in zip(still_open, group.values, group.starts, group.ends, strict=True):
                if maybe is not None:  # else it is settled already
                    maybe._holder, maybe._started, maybe._finished = None, started, finished
                    maybe.settle(returned(value))
                    jobs.append(maybe)
        return True

    def _look_whether_it_was_late(self, job: Job, finished: float) -> None:
        """Forget why a job is being stopped, if it had ended before, in time: the driver was busy, and heard late."""
        asked = self.stopped_at.pop(job.id, None)
        limit = self._limit
        if asked is None or limit is None or self.reasons[job.id] != out_of_time(limit):
            return
        if job._started is not None and finished < asked and finished - job._started <= limit:
            del self.reasons[job.id]

    def _final(self, job: Job, outcome: Outcome, finished: float) -> Outcome:
        limit = self._limit
        if limit is not None and outcome.error is None and finished - (job._started or finished) > limit:
            # It returned before anybody could look at the time: a coroutine that blocked the loop did.
            self.reasons.setdefault(job.id, out_of_time(limit))
        reason = self.reasons.pop(job.id, None)
        return self._attempts.conclude(job, outcome if reason is None else _stopped(job, outcome, reason))

    def settle_all(self, job_ids: Iterable[str], reason: JobError) -> None:
        """Settle jobs, those of them that are open, as stopped."""
        now = self._clock()
        jobs = [self.open[job_id] for job_id in list(job_ids) if job_id in self.open]
        self.settle([(job, Outcome(error=reason, cancelled=True), now) for job in jobs])

    def give_up(self, job: Job, now: float) -> None:
        """Settle a job that was to stop and would not; nothing happens if it did after all."""
        reason = self.reasons.get(job.id)
        if reason is not None:
            self.reasons[job.id] = reason = reason._replace(message=f"{reason.message}; it did not stop")
            self.settle([(job, Outcome(error=reason, cancelled=True), now)])

    def _has_another(self, job: Job, error: JobError) -> bool:
        """Have a failed job run once more, if it has an attempt left."""
        if self._recorder.closing or job.id in self.reasons or job.id not in self.open:
            return False
        pause = self._attempts.another(job, error)
        if pause is None:
            return False
        job._holder = None
        self._try_again(job, pause)
        return True


def _one_by_one(reports: Sequence[Ended | Returned]) -> Iterator[Ended]:
    for report in reports:
        if isinstance(report, Returned):
            yield from report.each()
        else:
            yield report


def _stopped(job: Job, outcome: Outcome, reason: JobError) -> Outcome:
    """Turn what a job gave after it was asked to stop into its outcome: it was stopped, whatever it returned."""
    if outcome.error is None and outcome.value is not None and outcome.value is not job:
        job.metadata["returned"], metadata = taken_apart(outcome.value)
        job.metadata.update(metadata)
    return Outcome(error=reason, cancelled=True)
