"""Questions about a run-function."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from typing import Any

__all__ = ["describe", "has_own_process", "is_async", "name_of"]


def is_async(function: Any) -> bool:
    """Tell whether a call gives a coroutine: ``async def``, a partial of one, an object with an async ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function):
        return True
    call = getattr(type(function), "__call__", None)  # noqa: B004 - the method is wanted, not whether there is one
    return not inspect.isclass(function) and inspect.iscoroutinefunction(call)


def describe(function: Any) -> str:
    """Name it for people: ``module.name``, or its repr."""
    function = _inner(function)
    name = getattr(function, "__qualname__", None)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module and name else repr(function)


def has_own_process(function: Any) -> bool:
    """Whether its calls have a process of their own where their surroundings share one; ``profile`` says so."""
    return bool(getattr(_inner(function), "_paraval_has_own_process", False))


def name_of(function: Any) -> str:
    """Name it for storages: the same in each program that has it, and whether its script is run or imported."""
    function = _inner(function)
    named = function if getattr(function, "__qualname__", None) else type(function)
    module = str(getattr(named, "__module__", None))
    if module in {"__main__", "__mp_main__"}:  # the latter in a process that multiprocessing has started
        script = getattr(sys.modules[module], "__file__", None)
        module = module if script is None else script.rpartition(os.sep)[2].removesuffix(".py")
    return f"{module.rpartition('.')[2]}.{named.__qualname__}"


def _inner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function
