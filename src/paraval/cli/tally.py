"""What a sweep has come to so far: the counts, the reasons of the failures, the best configurations."""

from __future__ import annotations

import bisect
import time
from typing import Any, Final, NamedTuple

from paraval.job import HPOJob, JobStatus
from paraval.outcome import is_failure

__all__ = ["Candidate", "Reason", "Tally"]

TOP: Final = 5
"""How many of the best configurations are kept, for one objective."""

FRONT_LIMIT: Final = 200
"""How many non-dominated configurations are kept, for several objectives. A bound on the time that each job costs."""


class Candidate(NamedTuple):
    """A configuration that was evaluated successfully."""

    objectives: tuple[float, ...]
    job_id: str
    configuration: dict[str, Any]


class Reason:
    """Why some jobs failed: how many, and what the first of them said."""

    def __init__(self, job: HPOJob) -> None:
        self.count = 0
        self.job_id = job.id
        self.example = "" if job.error is None else job.error.summary


class Tally:
    """Counts finished jobs. It keeps no job, so its size does not grow with the sweep.

    Args:
        total: how many configurations there are.
        job_timeout: seconds per job, if any: a job that ran for so long has failed; one that was stopped earlier, as
            the budget of the sweep ran out or on Ctrl-C, was cancelled.

    Attributes:
        succeeded: jobs with an objective.
        failed: jobs without.
        cancelled: jobs that were stopped while they ran, other than by their own timeout.
        stopped: jobs that were stopped while they ran, for whatever reason.
        restored: jobs among all these that were taken from the storage, as they had ended there.
        stopping: whether the sweep is being ended early; set by whoever ends it.
        reasons: the failures, by what their objective says (``"F_ValueError"``).
        best: the best five, best first; empty when there are several objectives.
        front: with several objectives, the configurations that no other one dominates.
    """

    def __init__(self, total: int, job_timeout: float | None = None) -> None:
        self.total = total
        self.succeeded = 0
        self.failed = 0
        self.cancelled = 0
        self.stopped = 0
        self.restored = 0
        self.stopping = False
        self.reasons: dict[str, Reason] = {}
        self.best: list[Candidate] = []
        self.front: list[Candidate] = []
        self.front_is_partial = False
        self._job_timeout = job_timeout
        self._begin = time.monotonic()

    @property
    def finished(self) -> int:
        """How many jobs have ended, in whatever way."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def unfinished(self) -> int:
        """How many configurations were not started, or had not ended when the sweep did."""
        return self.total - self.finished

    @property
    def elapsed(self) -> float:
        """Seconds since the sweep began."""
        return time.monotonic() - self._begin

    @property
    def rate(self) -> float:
        """Jobs per second, on average since the sweep began; those taken from the storage took no time."""
        return (self.finished - self.restored) / max(self.elapsed, 1e-9)

    def add(self, job: HPOJob) -> None:
        """Count a job that has ended."""
        if job.restored:
            self.restored += 1
        elif job.status is JobStatus.CANCELLED:
            self.stopped += 1
        if self._was_cancelled(job):
            self.cancelled += 1
        elif job.failed:
            self.failed += 1
            self.reasons.setdefault(_reason(job), Reason(job)).count += 1
        else:
            self.succeeded += 1
            self._rank(job)

    def abandon(self, count: int) -> None:
        """Count jobs that were told to stop and do not."""
        self.cancelled += count
        self.stopped += count

    def _was_cancelled(self, job: HPOJob) -> bool:
        if job.status is not JobStatus.CANCELLED:
            return False
        if job.restored:
            return False  # a search is gone on with, so what the end of a sweep had cancelled is not taken as it was
        # Both budgets say "timeout": the job's own, which is its failure, and the one of the sweep.
        ran = job.timing.ran
        own = job.error is not None and job.error.kind == "timeout" and self._job_timeout is not None
        return not (own and ran is not None and ran >= (self._job_timeout or 0.0))

    def _rank(self, job: HPOJob) -> None:
        objective = job.objective
        if isinstance(objective, float):
            candidate = Candidate((objective,), job.id, job.args)
            # Stable: of two that are equally good, the one that ended first stays ahead.
            bisect.insort_right(self.best, candidate, key=lambda other: -other.objectives[0])
            del self.best[TOP:]
        elif isinstance(objective, tuple | list):
            self._add_to_front(Candidate(tuple(map(float, objective)), job.id, job.args))

    def _add_to_front(self, candidate: Candidate) -> None:
        point = candidate.objectives
        if any(len(other.objectives) != len(point) or _dominates(other.objectives, point) for other in self.front):
            return
        self.front = [other for other in self.front if not _dominates(point, other.objectives)]
        if len(self.front) < FRONT_LIMIT:
            self.front.append(candidate)
        else:
            self.front_is_partial = True


def _reason(job: HPOJob) -> str:
    if job.error is not None:
        return job.error.reason
    objective = job.objective
    if isinstance(objective, tuple | list):
        objective = next(item for item in objective if is_failure(item))
    return str(objective) or "''"


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether it is at least as good everywhere and better somewhere (objectives are maximised)."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
