"""Where thousands of objects are made that stay, the garbage collector does better to wait.

Ten thousand jobs that run at a time are half a million objects. A collector that looks after each 700 new ones, and
thoroughly whenever a quarter is new, then takes as long as all the rest; and it stops the loop, for 0.3 s a pass.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Final

__all__ = ["OBJECTS", "CollectorPace", "collector_at_rest", "those_that_stayed_may_go"]

OBJECTS: Final = 10
"""About so many objects come and go with each job that runs."""
_MANY: Final = 500
"""With fewer workers than that, the collector is left alone."""
_MOST_AGED: Final = 100_000
"""So many objects may grow old between two full passes without being counted: some 100 MB, if they are jobs."""


@contextlib.contextmanager
def collector_at_rest(objects: int) -> Iterator[None]:
    """Do without the garbage collector while objects are made that stay, unless the program does without it anyway.

    It looks for garbage after so many new objects; among those that all stay, that takes longer than making them. For
    the same reason they are old at once, so that the next passes over the young do not meet them. Such objects are not
    counted, which puts off the next full pass: so that it comes, there are only so many of them before it.

    Args:
        objects: about how many are made.
    """
    if not gc.isenabled():
        yield
        return
    ages = _may_age(objects)
    if ages:
        gc.collect(1)  # what is garbage already does not grow old with them
    gc.disable()
    try:
        yield
    finally:
        if ages and not gc.get_freeze_count():  # else somebody has frozen objects meanwhile, and they stay so
            gc.freeze()
            gc.unfreeze()
        gc.enable()


def _may_age(objects: int) -> bool:
    global _aged, _full_passes  # noqa: PLW0603 - the collector belongs to the process, and so does what is known of it
    if gc.get_freeze_count():  # likewise
        return False
    # Without a lock, as a finalizer may come here; what two threads make of it differs by little.
    full_passes = gc.get_stats()[-1]["collections"]
    if full_passes != _full_passes:
        _full_passes, _aged = full_passes, 0
    _aged += objects
    return _aged <= _MOST_AGED


def those_that_stayed_may_go() -> None:
    """Say that objects which were made at rest may be garbage soon: all are counted now, until the next full pass."""
    global _aged  # noqa: PLW0603 - as above
    if _aged:
        _aged = _MOST_AGED


class CollectorPace:
    """Has the garbage collector look less often while one engine has very many workers.

    The thresholds are the process's; they are what they were when no engine needs others, unless somebody else has
    changed them meanwhile.
    """

    def suit(self, workers: int) -> None:
        """Take note of how many workers the engine has."""
        if workers >= _MANY:
            with _lock:
                _wanted[self] = max(_wanted.get(self, 0), workers * OBJECTS)
                _set_thresholds()

    def drop(self) -> None:
        """The engine has ended."""
        with _lock:
            if _wanted.pop(self, None) is not None:
                _set_thresholds()


_lock: Final = threading.Lock()
_wanted: Final[dict[CollectorPace, int]] = {}
_aged = _full_passes = 0
_usual: tuple[int, int, int] | None = None
_ours: tuple[int, int, int] | None = None


def _set_thresholds() -> None:
    global _usual, _ours  # noqa: PLW0603 - the setting belongs to the process, and so does what is known of it
    now = gc.get_threshold()
    if now != _ours:  # nothing was changed yet, or somebody else did since
        _usual = now
    if _usual is None or _usual[0] == 0:  # the program collects when it wants to
        return
    _ours = (max(_usual[0], *_wanted.values()), *_usual[1:]) if _wanted else None
    gc.set_threshold(*(_ours or _usual))
