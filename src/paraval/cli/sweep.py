"""Running a sweep: submit everything, write every finished job down at once, and stop in time when asked.

The main thread takes events from a queue: finished jobs from a thread that gathers, and signals from their handlers. No
exception is ever raised out of a signal handler, so no signal can strike between a job's end and its row on disk.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from paraval.cli.configs import Configs
from paraval.cli.progress import Progress
from paraval.cli.tally import Tally
from paraval.csvlog import CSVError, CSVLog
from paraval.errors import ParavalError
from paraval.job import HPOJob, Job

if TYPE_CHECKING:
    from paraval.evaluator import Evaluator

__all__ = ["Ending", "run_sweep"]

STOP_WITHIN: Final = 2.0
"""Seconds that closing the evaluator may take. With the summary, a sweep ends within 3 s of Ctrl-C."""


class Ending(NamedTuple):
    """How a sweep ended.

    Attributes:
        wall_time: seconds from the first submit to the end.
        utilisation: share of the workers' time in which they ran jobs.
        signal: the signal that stopped it, if one did.
        error: what stopped it otherwise, in one line; None when it came to its end.
        closed: False when something would not stop in time: only ``os._exit`` gets past it.
    """

    wall_time: float
    utilisation: float
    signal: signal.Signals | None
    error: str | None
    closed: bool


def run_sweep(
    evaluator: Evaluator,
    configs: Configs,
    log: CSVLog,
    tally: Tally,
    progress: Progress,
    *,
    on_signal: Callable[[], object],
) -> Ending:
    """Evaluate all configurations, and close the evaluator.

    Args:
        evaluator: as yet unused; its ``timeout`` may be set.
        configs: what to evaluate.
        log: gets every job soon after it ended. When it cannot be written, the sweep stops, as results that cannot be
            kept are not worth computing; what is missing is tried once more at the end.
        tally: counts every job that has ended.
        progress: shows it.
        on_signal: called, by the handler, when a signal says that the sweep is to end.
    """
    return _Sweep(evaluator, log, tally, progress, on_signal).run(configs)


class _Gathered(NamedTuple):
    """All jobs have been gathered, or no more can be."""

    error: ParavalError | None


class _Closed(NamedTuple):
    """The evaluator is closed; these jobs it had to cancel."""

    cancelled: list[Job]
    error: ParavalError | None = None


_Event = list[Job] | signal.Signals | _Gathered | _Closed


class _Sweep:
    def __init__(
        self, evaluator: Evaluator, log: CSVLog, tally: Tally, progress: Progress, on_signal: Callable[[], object]
    ) -> None:
        self._evaluator = evaluator
        self._log = log
        self._tally = tally
        self._progress = progress
        self._on_signal = on_signal
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._unwritten: list[Job] = []
        self._signal: signal.Signals | None = None
        self._error: str | None = None
        self._write_error: str | None = None
        self._all_gathered = False
        self._closed = False
        self._give_up = float("inf")

    def run(self, configs: Configs) -> Ending:
        with self._signals():
            self._submit(configs)
            _in_background("paraval-gather", self._gather)
            while not self._all_gathered and not self._stopping:
                self._take_events()
            wall_time = self._tally.elapsed
            utilisation = self._evaluator.statistics().utilisation
            self._stop()
            while not (self._all_gathered and self._closed) and time.monotonic() < self._give_up:
                self._take_events()
            if not self._closed:
                # What still runs will not stop, and how it would have ended will never be known: no row, but counted.
                self._tally.abandon(self._evaluator.statistics().running)
            self._save_the_rest()
            self._progress.finish(self._tally, self._evaluator.time_left)
        return Ending(wall_time, utilisation, self._signal, self._write_error or self._error, self._closed)

    def _submit(self, configs: Configs) -> None:
        # Not in the gathering thread: a submit after close() would open the evaluator again.
        try:
            self._evaluator.submit(configs)
        except ParavalError as exc:  # of the storage
            self._error = str(exc)
            self._stop()

    @property
    def _stopping(self) -> bool:
        return self._give_up < float("inf")

    def _stop(self) -> None:
        if not self._stopping:
            self._tally.stopping = True
            self._give_up = time.monotonic() + STOP_WITHIN
            _in_background("paraval-close", self._close)

    # -- in threads of their own, so that nothing can keep the main thread from its events -----------------------------

    def _gather(self) -> None:
        error: ParavalError | None = None
        try:
            while jobs := self._evaluator.gather("BATCH", 1):
                self._events.put(jobs)
        except ParavalError as exc:
            error = exc
        self._events.put(_Gathered(error))

    def _close(self) -> None:
        try:
            closed = _Closed(self._evaluator.close())
        except ParavalError as exc:
            closed = _Closed([], exc)
        self._events.put(closed)

    # -- in the main thread --------------------------------------------------------------------------------------------

    def _take_events(self) -> None:
        """Wait for the next event, and take all that are there: many short jobs share one write."""
        try:
            self._take(self._events.get(timeout=self._progress.interval))
            while True:
                self._take(self._events.get_nowait())
        except queue.Empty:
            pass
        self._save()
        self._progress.update(self._tally, self._evaluator.time_left)

    def _take(self, event: _Event) -> None:
        if isinstance(event, _Gathered):
            self._all_gathered = True
            if event.error is not None and not self._stopping:
                self._error = str(event.error)
        elif isinstance(event, _Closed):
            self._closed = True
            self._record(event.cancelled)
            if event.error is not None:
                self._error = self._error or str(event.error)
        elif isinstance(event, signal.Signals):
            self._signal = event
            self._progress.say("stopping: finished jobs are in the output; once more ends it at once")
            self._stop()
        else:
            self._record(event)

    def _record(self, jobs: list[Job]) -> None:
        for job in jobs:
            # What never ran has no result: it gets no row, and the summary counts it as not started.
            if job.timing.started is not None or job.restored:
                self._unwritten.append(job)
                self._tally.add(cast("HPOJob", job))  # the evaluator was made with this class of jobs

    def _save(self) -> None:
        if not self._unwritten or self._write_error is not None:
            return
        jobs, self._unwritten = self._unwritten, []
        try:
            self._log.write(jobs)
        except CSVError as exc:  # the log keeps the rows
            self._write_error = str(exc)
            self._stop()

    def _save_the_rest(self) -> None:
        try:
            self._log.add(self._unwritten)
            self._log.close()  # not after a write, which may fail: it is to be closed all the same
        except CSVError as exc:
            self._write_error = str(exc)
        else:
            if self._write_error is not None:
                self._write_error += " (the last try, after the sweep was stopped for it, was successful)"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into events; a second one ends the process at once."""
        seen: list[int] = []

        def handle(number: int, _frame: object) -> None:
            if seen:
                self._progress.restore_terminal()
                os._exit(128 + number)  # nothing less is "at once": run-functions and exit handlers could hold it up
            seen.append(number)
            self._on_signal()
            self._events.put(signal.Signals(number))  # SimpleQueue.put may be called from a signal handler

        # Also where they came ignored, as to a process in a script's background: there, too, they are meant.
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _in_background(name: str, function: Callable[[], object]) -> None:
    # A daemon: it may wait for a job that never ends, and must not keep the program from ending.
    threading.Thread(target=function, name=name, daemon=True).start()
