"""Calling callbacks so that none of them can do harm."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paraval.callback import Callback

__all__ = ["Notifier"]

_logger = logging.getLogger("paraval")


class Notifier:
    """Calls a method of every callback; one that raises is logged and counted, and costs no job.

    Attributes:
        callbacks: may be changed at any time.
        errors: how often a callback raised.
    """

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks
        self.errors = 0

    def call(self, method: str, *args: Any) -> None:
        """Call ``callback.method(*args)`` for every callback."""
        for callback in list(self.callbacks):  # one may remove itself
            try:
                function = getattr(callback, method, None)
                if function is not None:
                    function(*args)
            except BaseException as exc:
                if isinstance(exc, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise  # it is the user at the keyboard
                self.errors += 1
                _logger.exception("%s.%s raised; no job is lost by it", type(callback).__name__, method)
