"""What users pass in, looked at once: each function gives the value back, or raises one clear error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from paraval.errors import BadValueError, WrongTypeError
from paraval.functions import describe, is_async
from paraval.job import Job

__all__ = [
    "Args",
    "a_list",
    "callbacks",
    "capture",
    "configuration",
    "configurations",
    "count",
    "exception_types",
    "flag",
    "function_or_none",
    "int_or_none",
    "job_class",
    "keywords",
    "positive_int",
    "seconds",
]

Args = Mapping[str, Any]
"""The arguments of one job."""


def configurations(args_list: object) -> list[Args]:
    """Take the argument of ``submit``: an iterable of dicts."""
    if type(args_list) is list:  # as nearly always, and the other questions cost much for a job that comes alone
        taken = args_list.copy()
    elif isinstance(args_list, Mapping):
        raise WrongTypeError("submit takes a list of dicts, one for each job: put the dict in a list")
    elif isinstance(args_list, str | bytes) or not isinstance(args_list, Iterable):
        raise WrongTypeError(f"submit takes a list of dicts, one for each job, not {type(args_list).__name__}")
    else:
        taken = list(args_list)
    for index, args in enumerate(taken):
        if type(args) is not dict and not isinstance(args, Mapping):  # the first question is much the cheaper
            raise WrongTypeError(f"item {index} of the list must be a dict of arguments, not {type(args).__name__}")
    return taken


def configuration(args: object) -> Args:
    """Take the argument of ``evaluate``: a dict."""
    if not isinstance(args, Mapping):
        raise WrongTypeError(f"evaluate takes a dict of arguments, not {type(args).__name__}")
    return args


def a_list(name: str, value: object) -> list[Any]:
    """Take a list or tuple, or None for an empty one; give a new list."""
    if value is not None and not isinstance(value, list | tuple):
        raise WrongTypeError(f"{name} must be a list, not {value!r}")
    return list(value or ())


def callbacks(value: object) -> list[Any]:
    """Take a list of callbacks, or None; give a new list. What has the methods of one is one."""
    taken = a_list("callbacks", value)
    for callback in taken:
        methods = [getattr(callback, name, None) for name in _HEARD]
        if isinstance(callback, type) or not any(map(callable, methods)):
            raise WrongTypeError(f"a callback is an object with methods like on_done, not {callback!r}")
        if any(map(inspect.iscoroutinefunction, methods)):
            raise WrongTypeError(f"the methods of a callback are plain functions, and {callback!r} has an 'async def'")
    return taken


_HEARD = ("on_launch", "on_done", "on_done_other", "on_gather", "on_close")


def int_or_none(name: str, value: object) -> int | None:
    """Take an int or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise WrongTypeError(f"{name} must be an int or None, not {value!r}")
    return int(value)


def keywords(name: str, value: object) -> dict[str, Any]:
    """Take keyword arguments as a dict, or None for none; give a new dict."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise WrongTypeError(f"{name} must be a dict of keyword arguments, not {value!r}")
    return dict(value)


def positive_int(name: str, value: object) -> int:
    """Take a count of something."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise BadValueError(f"{name} must be a positive int, not {value!r}")
    return int(value)


def count(name: str, value: object) -> int:
    """Take a number of things, which may be none."""
    if type(value) is int and value >= 0:  # at a part of the cost
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise BadValueError(f"{name} must be a non-negative int, not {value!r}")
    return int(value)


def seconds(name: str, value: object, *, or_zero: bool) -> float:
    """Take a duration; NaN and infinity are none."""
    sign = "non-negative" if or_zero else "positive"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongTypeError(f"{name} must be a {sign} number of seconds, not {value!r}")
    try:
        duration = float(value)
    except OverflowError:
        duration = math.inf
    if not 0 <= duration < math.inf or (duration == 0 and not or_zero):
        raise BadValueError(f"{name} must be a {sign} number of seconds, not {value!r}")
    return duration


def capture(name: str, value: object, *, default: int) -> int | None:
    """Take True, False or a number of bytes; give the number, or None."""
    if isinstance(value, bool):
        return default if value else None
    if not isinstance(value, Integral) or value < 1:
        raise BadValueError(f"{name} must be True, False or a positive number of bytes, not {value!r}")
    return int(value)


def function_or_none(name: str, value: object) -> Any:
    """Take a plain function, or anything else that can be called and does it at once; or None."""
    if value is not None and not callable(value):
        raise WrongTypeError(f"{name} must be callable, not {value!r}")
    if is_async(value):
        raise WrongTypeError(f"{name} must be a plain function: nobody awaits what {describe(value)} gives")
    return value


def flag(name: str, value: object) -> bool:
    """Take True or False (those of NumPy, too)."""
    if value is True or value is False or type(value).__name__ in {"bool", "bool_"}:
        return bool(value)
    raise WrongTypeError(f"{name} must be True or False, not {value!r}")


def exception_types(name: str, value: object) -> tuple[type[BaseException], ...]:
    """Take exception types, one or a tuple, as ``except`` does."""
    types = value if isinstance(value, tuple | list) else (value,)
    for item in types:
        if not isinstance(item, type) or not issubclass(item, BaseException):
            raise WrongTypeError(f"{name} must be an exception type or a tuple of them, not {value!r}")
    return tuple(types)


def job_class(value: object) -> type[Job]:
    """Take a class of jobs."""
    if not isinstance(value, type) or not issubclass(value, Job):
        raise WrongTypeError(f"job_class must be Job, HPOJob or a subclass of one, not {value!r}")
    return value
