"""Jobs on their way to the engine."""

from __future__ import annotations

__all__ = ["Handover"]


class Handover:
    """Who comes first has the jobs: the engine, or whoever calls them off. From any two threads, without a lock.

    An interrupted submit (Ctrl-C may come between any two calls) cannot know how far it has come, but for this.

    Args:
        closes: see below.

    Attributes:
        closes: how often the evaluator may have been closed for the engine to have them; None: however often. Once it
            was given them: how often it was.
    """

    def __init__(self, closes: int | None = None) -> None:
        self.closes = closes
        self._free = [None]  # to take an item from a list is one operation of the interpreter
        self._is_off = False

    def take(self) -> bool:
        """For the engine: whether the jobs are its own from now on."""
        try:
            self._free.pop()
        except IndexError:
            return False
        return True

    def call_off(self) -> bool:
        """For whoever submits them: whether the engine will never have them."""
        self._is_off = self._is_off or self.take()
        return self._is_off
