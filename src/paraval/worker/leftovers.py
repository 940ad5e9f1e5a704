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
from _signal import pthread_sigmask, sigpending  # type: ignore[import-not-found]
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
        # Before the program brings any: what is registered first is called last, and multiprocessing's own lets its
        # locks go at the end of the process, for which it starts another tracker if there is none.
        atexit.register(functools.partial(_kill_resource_tracker, os.getpid()))

    def begin(self, *, is_captured: bool) -> None:
        """Note how things are: the set-up is over.

        Args:
            is_captured: whether standard output and error are pipes that nobody else writes to.
        """
        self.streams.note(are_own=is_captured)
        for timer in _TIMERS:  # one of the set-up is for all jobs
            left, interval = signal.getitimer(timer)
            is_by_the_clock = timer == signal.ITIMER_REAL and not interval
            self._until[timer] = 0.0 if not left else monotonic() + left if is_by_the_clock else math.inf
        self._mask = pthread_sigmask(signal.SIG_BLOCK, ())

    def stop_alarm(self) -> None:
        """Switch off the timer that a job sets to be interrupted in time."""
        if monotonic() > self._until[signal.ITIMER_REAL]:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def undo(self) -> None:
        """Between messages: open what is closed, switch off what is set, block no signals any more."""
        self.streams.restore()
        now = monotonic()
        for timer, until in self._until.items():
            if now > until:
                signal.setitimer(timer, 0.0)
        blocked = pthread_sigmask(signal.SIG_BLOCK, ())
        if blocked != self._mask:
            for number in sigpending() & (blocked - self._mask):  # they were for a job that has ended
                if hasattr(signal, "sigtimedwait"):  # macOS has none
                    signal.sigtimedwait((number,), 0)
            pthread_sigmask(signal.SIG_SETMASK, self._mask)


def _kill_resource_tracker(pid: int) -> None:
    """End multiprocessing's own, if a job has had it started, before it takes notice that the worker ends.

    It would remove the shared memory that jobs have made and forgotten; but up to Python 3.12 also what they have only
    attached to, such as the driver's. (multiprocessing's workers share the driver's tracker.)
    """
    tracker: Any = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    number = getattr(tracker, "_pid", None)
    if os.getpid() == pid and number is not None:  # else it is another process's
        with contextlib.suppress(OSError):
            os.kill(number, signal.SIGKILL)
