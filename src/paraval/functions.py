"""Questions about a run-function."""

from __future__ import annotations

import functools
import inspect
from typing import Any

__all__ = ["describe", "is_async", "name_of"]


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


def name_of(function: Any) -> str:
    """Name it for storages: without its module, which is another one when the same script is imported."""
    function = _inner(function)
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _inner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function
