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

__all__ = ["CollectorPace", "collector_at_rest"]

_OBJECTS: Final = 10
"""About so many objects come and go with each job that runs."""
_MANY: Final = 500
"""With fewer workers than that, the collector is left alone."""


@contextlib.contextmanager
def collector_at_rest(*, ages: bool = False) -> Iterator[None]:
    """Do without the garbage collector meanwhile, unless the program does without it anyway.

    It looks for garbage after so many new objects; among those that all stay, that takes longer than making them.

    Args:
        ages: whether all objects are old afterwards, so that the next passes over the young do not meet them. They are
            not counted as such, which may put off the next full pass: for what happens rarely.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if ages and not gc.get_freeze_count():  # else the program has frozen objects of its own, and they stay so
            gc.freeze()
            gc.unfreeze()
        gc.enable()


class CollectorPace:
    """Has the garbage collector look less often while one engine has very many workers.

    The thresholds are the process's; they are what they were when no engine needs others, unless somebody else has
    changed them meanwhile.
    """

    def suit(self, workers: int) -> None:
        """Take note of how many workers the engine has."""
        if workers >= _MANY:
            with _lock:
                _wanted[self] = max(_wanted.get(self, 0), workers * _OBJECTS)
                _set_thresholds()

    def drop(self) -> None:
        """The engine has ended."""
        with _lock:
            if _wanted.pop(self, None) is not None:
                _set_thresholds()


_lock: Final = threading.Lock()
_wanted: Final[dict[CollectorPace, int]] = {}
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
