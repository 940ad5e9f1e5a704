"""Callbacks: what an evaluator tells about its jobs while it runs.

The evaluator calls ``on_launch`` in the thread that submits, ``on_done`` in the thread of its event loop as soon as a
job has ended (before ``gather`` shows it), and the other methods in the thread that gathers or closes. A callback that
raises is logged and counted by the evaluator; it costs no job. Those made here may be called from several threads.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import operator
import os
import reprlib
import threading
import weakref
from collections.abc import Callable
from numbers import Real
from typing import Any

from paraval.errors import BadValueError, MissingExtraError
from paraval.job import Job

__all__ = ["CSVLoggerCallback", "Callback", "LoggerCallback", "SearchEarlyStopping", "TqdmCallback"]


class Callback:
    """What an evaluator calls. Every method does nothing here: override those you need."""

    def on_launch(self, job: Job) -> None:
        """React to a job that was submitted."""

    def on_done(self, job: Job) -> None:
        """React to a job of this evaluator that has ended: with a result, with a failure, or cancelled."""

    def on_done_other(self, job: Job) -> None:
        """React to a job that another evaluator of the same search finished."""

    def on_gather(self, local_jobs: list[Job], other_jobs: list[Job]) -> None:
        """React to a gather.

        Args:
            local_jobs: the jobs of this evaluator that it returns.
            other_jobs: the jobs of other evaluators of the same search that it found done.
        """

    def on_close(self) -> None:
        """React to the end of the evaluator."""


class LoggerCallback(Callback):
    """Prints one line for each job that has ended.

    It shows the largest objective so far; with several objectives the hypervolume of the non-dominated results (above
    the worst value seen of each objective), or, where the extra ``moo`` is not installed, how many they are. A failure
    shows its reason and its message, a plain :class:`Job` its output.
    """

    def __init__(self) -> None:
        self._best = _Best()
        self._done = 0
        self._lock = threading.Lock()

    def on_done(self, job: Job) -> None:
        """Print the line of a job of this evaluator."""
        with self._lock:
            self._done += 1
            _say(f"[{self._done:05d}] -- {self._describe(job)}")

    def on_done_other(self, job: Job) -> None:
        """Print the line of a job of another evaluator."""
        self.on_done(job)

    def _describe(self, job: Job) -> str:
        objective = getattr(job, "objective", None)
        values = _numbers(objective)
        if values is not None:
            self._best.observe(values)
            last = tuple(round(value, 5) for value in values) if len(values) > 1 else f"{values[0]:.5f}"
            return f"{self._best.name}: {self._best.text} -- Last Objective: {last}"
        if job.error is not None:
            message = " ".join(job.error.message.split())
            return f"Last Failure: {job.error.reason}{' -- ' if message else ''}{message}"
        if objective is not None:
            return f"Last Failure: {objective}"
        return f"Last Output: {reprlib.repr(job.output)}"


class TqdmCallback(Callback):
    """Shows a progress bar: the jobs that have ended, the best objective, the failures.

    Args:
        description: shown before the bar.

    Raises:
        MissingExtraError: tqdm is not installed; the extra ``progress`` brings it.
    """

    def __init__(self, description: str | None = None) -> None:
        if not _is_installed("tqdm"):
            raise MissingExtraError("TqdmCallback needs tqdm, which is not installed: pip install 'paraval[progress]'")
        self._description = description
        self._best = _Best()
        self._failures = 0
        self._total: int | None = None
        self._bar: Any = None
        self._lock = threading.Lock()

    def set_max_evals(self, max_evals: int | None) -> None:
        """Set how many jobs make the bar full (None or a number below 1: unknown), and begin a new bar."""
        with self._lock:
            self._total = max_evals if max_evals is not None and max_evals > 0 else None
            self._close_bar()

    def on_done(self, job: Job) -> None:
        """Move the bar on by a job of this evaluator."""
        with self._lock:
            self._failures += job.failed
            values = _numbers(getattr(job, "objective", None))
            if values is not None:
                self._best.observe(values)
            if self._bar is None:
                tqdm = importlib.import_module("tqdm.auto").tqdm
                self._bar = tqdm(total=self._total, desc=self._description)
            best = {self._best.key: self._best.text} if self._best.front else {}
            self._bar.set_postfix(best | {"failures": self._failures}, refresh=False)  # update draws it, not too often
            self._bar.update(1)
            if self._bar.n == self._total:
                self._close_bar()

    def on_done_other(self, job: Job) -> None:
        """Move the bar on by a job of another evaluator."""
        self.on_done(job)

    def on_close(self) -> None:
        """Draw the bar for the last time; a later job begins a new one."""
        with self._lock:
            self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SearchEarlyStopping(Callback):
    """Stops a search that does not improve any more: the search looks at ``search_stopped`` after each gather.

    Failures do not improve it. Cancelled jobs and those without an objective (a plain :class:`Job`) do not count. With
    several objectives, an evaluation improves the search when no earlier one is at least as good in all of them.

    Args:
        patience: after how many evaluations in a row without an improvement the search stops; the first does not count.
        objective_func: called with each job; returns what is to be maximised in the place of the job's objective (None:
            the job does not count).
        threshold: the search does not stop before the best is above it. With several objectives and no
            ``objective_func`` it is compared with their hypervolume, which needs the extra ``moo``.
        verbose: print what improves and why it stops.

    Attributes:
        search_stopped: whether the search should stop.

    Raises:
        BadValueError: ``patience`` is less than 1.
    """

    def __init__(
        self,
        patience: int = 10,
        objective_func: Callable[[Any], Any] | None = None,
        threshold: float | None = None,
        verbose: bool = True,
    ) -> None:
        if patience < 1:
            raise BadValueError(f"patience must be at least 1, not {patience!r}")
        self.search_stopped = False
        self._patience = patience
        self._objective_func = objective_func
        self._threshold = threshold
        self._verbose = verbose
        self._best = _Best()
        self._first = True
        self._not_improving = 0
        self._lock = threading.Lock()

    def on_done(self, job: Job) -> None:
        """Judge a job of this evaluator."""
        if job.error is not None and job.error.kind == "cancelled":
            return
        objective = getattr(job, "objective", None) if self._objective_func is None else self._objective_func(job)
        if objective is None:
            return
        with self._lock:
            self._judge(_numbers(objective))

    def on_done_other(self, job: Job) -> None:
        """Judge a job of another evaluator."""
        self.on_done(job)

    def _judge(self, values: tuple[float, ...] | None) -> None:
        first, self._first = self._first, False
        before = self._best.text
        if values is not None and self._best.observe(values):
            self._not_improving = 0
            if self._verbose and not first:
                _say(f"Objective has improved from {before} -> {self._best.text}")
            return
        if first:
            return
        self._not_improving += 1
        if self.search_stopped or self._not_improving < self._patience:
            return
        if self._threshold is None or (self._best.front and self._best.scalar > self._threshold):
            self.search_stopped = True
            if self._verbose:
                _say(f"Stopping the search because it did not improve for the last {self._not_improving} evaluations!")


class CSVLoggerCallback(Callback):
    """Writes the jobs to a CSV file: those of each gather when it returns, and what nobody gathered at the close.

    The columns, and what holds for the file on disk, are told at :class:`paraval.csvlog.CSVLog`. It may serve several
    evaluators, one after the other or at a time: each job that they run is one row. (A job of another evaluator on the
    same search is one row for each that finds it with ``gather_other_jobs_done``.)

    Args:
        path: where to write; its directory must exist. A file that is there already is kept under another name.

    Attributes:
        path: where the rows go, absolute.

    Raises:
        CSVPathError: (a ValueError and an OSError) no file can be written there.
    """

    def __init__(self, path: str | os.PathLike[str] = "results.csv") -> None:
        from paraval.csvlog import CSVLog  # whoever writes no CSV need not import what it takes

        self._log = CSVLog(path)
        self.path = self._log.path
        self._ungathered: dict[int, Job] = {}
        self._written_early: weakref.WeakValueDictionary[int, Job] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    @property
    def kept_as(self) -> str | None:
        """The name that a file found at the path was given; None if there was none, or no row has been written yet."""
        return self._log.kept_as

    def on_done(self, job: Job) -> None:
        """Remember a job in case nobody gathers it. It is not written here: the event loop must not wait for a disk."""
        with self._lock:
            self._ungathered[id(job)] = job

    def on_gather(self, local_jobs: list[Job], other_jobs: list[Job]) -> None:
        """Write the gathered jobs, and what an earlier write had to leave; on return they are on disk.

        Raises:
            CSVError: they are not; they are kept for the next write.
        """
        with self._lock:
            early = self._written_early
            jobs = [job for job in (*local_jobs, *other_jobs) if early.get(id(job)) is not job]
            self._log.add(jobs)  # before they are forgotten here: a Ctrl-C between the two must not lose them
            for job in jobs:
                self._ungathered.pop(id(job), None)
        self._log.write()

    def on_done_other(self, job: Job) -> None:
        """Remember a job of another evaluator likewise."""
        self.on_done(job)

    def on_close(self) -> None:
        """Write all that is left.

        Raises:
            CSVError: it could not be written; it is kept for the next write.
        """
        with self._lock:
            # Some may be gathered later: those of another evaluator, which goes on.
            self._log.add(self._ungathered.values())
            self._written_early.update(self._ungathered)
            self._ungathered = {}
        self._log.close()


class _Best:
    """The best of the objectives seen, all of them maximised: with one, the largest; with several, the front.

    Attributes:
        front: the results that no other result dominates.
    """

    def __init__(self) -> None:
        self.front: list[tuple[float, ...]] = []
        self._worst: tuple[float, ...] = ()
        self._volume: float | None = None

    def observe(self, values: tuple[float, ...]) -> bool:
        """Take a result; tell whether it improves: no earlier one is at least as good in every objective."""
        if not self.front:
            self._worst = values
        elif len(values) != len(self._worst):
            return False  # as many objectives as the first had, or there is no comparing
        worst = tuple(map(min, self._worst, values))
        if worst != self._worst:
            self._worst, self._volume = worst, None
        if any(_covers(other, values) for other in self.front):
            return False
        self.front = [other for other in self.front if not _covers(values, other)]
        self.front.append(values)
        self._volume = None
        return True

    @property
    def scalar(self) -> float:
        """The largest objective; with several, the hypervolume between the front and the worst value of each.

        Raises:
            MissingExtraError: there are several, and moocore is not installed.
        """
        if not self.front:
            return -math.inf
        if len(self._worst) == 1:
            return self.front[0][0]
        if not _is_installed("moocore"):
            raise MissingExtraError("the hypervolume needs moocore, which is not installed: pip install 'paraval[moo]'")
        if self._volume is None:
            moocore = importlib.import_module("moocore")
            self._volume = float(moocore.hypervolume(self.front, ref=self._worst, maximise=True))
        return self._volume

    @property
    def text(self) -> str:
        """The scalar; without moocore and with several objectives, the size of the front."""
        return f"{len(self.front)} non-dominated" if self._no_scalar() else f"{self.scalar:.5f}"

    @property
    def name(self) -> str:
        """What ``text`` shows, for a line."""
        return "Front" if self._no_scalar() else "HVI Objective" if len(self._worst) > 1 else "Maximum Objective"

    @property
    def key(self) -> str:
        """What ``text`` shows, for a progress bar."""
        return "front" if self._no_scalar() else "hvi" if len(self._worst) > 1 else "objective"

    def _no_scalar(self) -> bool:
        return len(self._worst) > 1 and not _is_installed("moocore")


def _covers(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether ``one`` is at least as good in every objective."""
    return all(map(operator.ge, one, other))


def _numbers(objective: Any) -> tuple[float, ...] | None:
    """Give the objectives as numbers; None for a failure and for what is no objective."""
    values = tuple(objective) if isinstance(objective, tuple | list) else (objective,)
    if not values or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
        return None
    return tuple(map(float, values))


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - printing is what these callbacks are for; flushed, or a log file lags behind
