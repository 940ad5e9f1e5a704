"""Calling callbacks so that none of them can do harm."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import anyio

from paraval.loops import Loop

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
                if isinstance(exc, KeyboardInterrupt) and _may_be_ctrl_c():
                    raise  # it is the user at the keyboard
                self.errors += 1
                _logger.exception("%s.%s raised; no job is lost by it", type(callback).__name__, method)


def _may_be_ctrl_c() -> bool:
    """Whether Ctrl-C can have raised a KeyboardInterrupt here; else whatever was called here raised it by itself.

    On trio, what runs in a task of the engine's is spared Ctrl-C (see ``ctrl_c.py``); and as that is a system task,
    anything but a cancellation that leaves it ends all that runs on the loop.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        loop = Loop.running()
    except anyio.NoEventLoopError:
        return True
    if loop.is_asyncio:
        return True
    import trio  # here: it is an extra, and it is imported already when it runs

    return not trio.lowlevel.currently_ki_protected()
