"""How often a job may be run, and which jobs are run alone so that blame is exact."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

from paraval.job import Job
from paraval.outcome import JobError, Outcome

__all__ = ["Attempts"]

_BACK_OFF_S: Final = 0.1
_BACK_OFF_MOST_S: Final = 30.0


class Attempts:
    """What is remembered of jobs that failed and have another attempt, and of jobs that a worker died under.

    Args:
        most: how often a job may be run.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._history: dict[str, list[JobError]] = {}
        # Jobs whose worker died while it had several: each is run alone now.
        self._suspects: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is anything to conclude: nearly never."""
        return bool(self._suspects or self._history)

    def suspect(self, jobs: Iterable[Job]) -> None:
        """Have jobs run alone from now on."""
        self._suspects.update(job.id for job in jobs)

    def is_suspect(self, job: Job) -> bool:
        """Whether the job is to be run alone."""
        return bool(self._suspects) and job.id in self._suspects

    def another(self, job: Job, error: JobError) -> float | None:
        """Count a failed attempt; give the seconds to wait before the next, or None when there is none left."""
        past = self._history.get(job.id, [])
        if len(past) + 1 >= self._most:
            return None
        self._history[job.id] = [*past, error]
        self._suspects.add(job.id)
        # Full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        return random.uniform(0, min(_BACK_OFF_MOST_S, _BACK_OFF_S * 2 ** len(past)))

    def conclude(self, job: Job, outcome: Outcome) -> Outcome:
        """Forget a job that is settled; give its outcome with the attempts that went before."""
        self._suspects.discard(job.id)
        past = self._history.pop(job.id, None)
        if past is None or outcome.error is None:
            return outcome
        return outcome._replace(error=outcome.error._replace(attempts=len(past) + 1, history=tuple(past)))
