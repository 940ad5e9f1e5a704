"""Ctrl-C is for the program's main task, never for a task of the engine's or for a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paraval.loops import Loop

__all__ = ["spared_ctrl_c"]


def spared_ctrl_c(function: Callable[..., Any], loop: Loop) -> Callable[..., Any]:
    """Give the function such that no KeyboardInterrupt is raised in it, nor in what it calls or awaits.

    asyncio sees to that by itself: it cancels the main task. trio raises where the program is at that moment.
    """
    if loop.is_asyncio:
        return function
    import trio  # here: it is an extra, and it is imported already when it runs

    spared: Callable[..., Any] = trio.lowlevel.enable_ki_protection(function)
    return spared
