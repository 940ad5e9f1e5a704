"""What is run. Worker processes import it, so it imports nothing that takes time."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["never_end", "noop", "noop_async", "sleep", "spin", "spin_for"]


def noop(job: Any) -> float:  # noqa: ARG001 - the work is to do nothing
    """Do nothing; for threads and processes."""
    return 1.0


async def noop_async(job: Any) -> float:  # noqa: ARG001 - likewise
    """Do nothing; for coroutines."""
    return 1.0


def spin(job: Any) -> float:
    """Use a CPU for so many seconds of wall time."""
    spin_for(job["seconds"])
    return 1.0


def spin_for(seconds: float) -> None:
    """Use a CPU for so many seconds of wall time."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def sleep(job: Any) -> float:
    """Sleep for so many seconds, if any."""
    if job.get("seconds"):
        time.sleep(job["seconds"])
    return 1.0


def never_end(job: Any) -> None:
    """Go on whoever asks to stop."""
    while True:
        if job["how"] == "sleep":
            time.sleep(60)
        elif job["how"] == "lock":
            _sleep_with_the_lock(60_000_000)


def _sleep_with_the_lock(microseconds: int) -> None:
    import ctypes

    ctypes.PyDLL(None).usleep(microseconds)
