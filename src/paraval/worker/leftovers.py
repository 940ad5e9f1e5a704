"""What a job may leave behind in its worker that would hit another one, which knows nothing of it: it is undone."""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
import signal
import sys

# The one in signal makes enums of what it gives; typeshed leaves the C module out.
from _signal import pthread_sigmask  # type: ignore[import-not-found]
from time import monotonic  # by its name, as a job may put another in its place there
from typing import Any, Final

from paraval.worker.output import StandardStreams

__all__ = ["Leftovers"]

_TIMERS: Final = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Leftovers:
    """Knows how things were after the set-up, and makes them so again.

    Attributes:
        streams: standard output and error.
    """

    def __init__(self) -> None:
        self.streams = StandardStreams()
        self._until = dict.fromkeys(_TIMERS, math.inf)
        self._mask: set[int] = set()

    def begin(self, *, is_captured: bool) -> None:
        """Note how things are: the set-up is over.

        Args:
            is_captured: whether standard output and error are pipes that nobody else writes to.
        """
        self.streams.note(are_own=is_captured)
        for timer in _TIMERS:  # one of the set-up is for all jobs
            left, interval = signal.getitimer(timer)
            self._until[timer] = math.inf if interval else monotonic() + left if left else 0.0
        self._mask = pthread_sigmask(signal.SIG_BLOCK, ())
        atexit.register(functools.partial(_end_resource_tracker, os.getpid()))  # first, so that it runs last

    def stop_alarm(self) -> None:
        """Switch off the timer that a job sets to be interrupted in time."""
        if monotonic() > self._until[signal.ITIMER_REAL]:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def undo(self) -> None:
        """Between messages: open what is closed, switch off what is set, let through the signals that are held."""
        self.streams.restore()
        now = monotonic()
        for timer, until in self._until.items():
            if now > until:
                signal.setitimer(timer, 0.0)
        pthread_sigmask(signal.SIG_SETMASK, self._mask)


def _end_resource_tracker(pid: int) -> None:
    """Give multiprocessing's own, if a job has had it started, the time to remove what the jobs have not removed.

    It does that at its end, but is of the worker's process group, which ends with the worker.
    """
    tracker: Any = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    if os.getpid() == pid and getattr(tracker, "_pid", None) is not None:  # else it is another process's
        with contextlib.suppress(Exception):  # it is not part of what multiprocessing promises to have
            tracker._stop()
