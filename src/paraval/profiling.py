"""The decorator ``profile``: when a run-function ran, how much memory it took, and a limit to that.

Time is measured where the function is called. Memory belongs to a process: where the job has one of its own (a worker
process, which its parent watches), it is measured there; anywhere else the call moves to a fresh worker process.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple, ParamSpec, Self, overload

from paraval import memory
from paraval.errors import BadValueError, WrongTypeError
from paraval.functions import describe, is_async
from paraval.job import RunningJob
from paraval.memory import MemoryLimit, PeakMemory
from paraval.worker.pickling import PicklingFailed, dumps

__all__ = ["Profile", "for_evaluator", "profile", "settings_of", "wrap"]

P = ParamSpec("P")


# -- the decorator -----------------------------------------------------------------------------------------------------


@overload
def profile(
    function: Callable[P, Any],
    /,
    *,
    memory: bool = ...,
    memory_limit: float | None = ...,
    memory_tracing_interval: float = ...,
    raise_exception: bool = ...,
    register: bool = ...,
) -> Callable[P, Any]: ...


@overload
def profile(
    *,
    memory: bool = ...,
    memory_limit: float | None = ...,
    memory_tracing_interval: float = ...,
    raise_exception: bool = ...,
    register: bool = ...,
) -> Callable[[Callable[P, Any]], Callable[P, Any]]: ...


def profile(
    function: Callable[..., Any] | None = None,
    /,
    *,
    memory: bool = False,
    memory_limit: float | None = -1,
    memory_tracing_interval: float = 0.1,
    raise_exception: bool = False,
    register: bool = True,  # noqa: ARG001 - part of the reference system's signature
) -> Any:
    """Measure a run-function, plain or ``async``: when it ran and, if asked, how much memory it took.

    Usable as ``@profile``, as ``@profile(memory=True)`` and as ``profile(function, memory=True)``. The function then
    returns ``{"output": …, "metadata": …}``, which jobs take apart. The metadata are ``timestamp_start`` and
    ``timestamp_end``, in seconds on the clock of the evaluator (``timestamp_submit`` and ``timestamp_gather`` are on it
    too), or of ``time.monotonic()`` where the function is called by hand; and ``memory``, where it was asked for.

    Where memory is measured or limited, the function runs in a process of its own. In the workers of the process
    evaluator it has one anyway; elsewhere (serial, thread, by hand) each call starts one, which takes about 0.1 s, and
    what the function changes in its surroundings stays there.

    Args:
        function: the run-function.
        memory: measure the peak of the resident memory, in bytes: that of the whole process, the interpreter included,
            and of its children.
        memory_limit: in bytes. When the process and its children hold more at a look, they are killed and
            ``"F_memory_limit_exceeded"`` is the output. None or a negative number: no limit.
        memory_tracing_interval: seconds between two looks. What grows faster is seen late.
        raise_exception: over the limit, raise MemoryError instead.
        register: without effect; there for programs written for the reference system.

    Raises:
        TypeError: an argument has no sensible type.
        ValueError: an argument has no sensible value.
    """
    if isinstance(memory_tracing_interval, bool) or not isinstance(memory_tracing_interval, Real):
        raise WrongTypeError(f"memory_tracing_interval must be a number of seconds, not {memory_tracing_interval!r}")
    if not 0 < memory_tracing_interval < math.inf:
        raise BadValueError(f"memory_tracing_interval must be positive, not {memory_tracing_interval!r}")
    interval = float(memory_tracing_interval)
    limit = None
    if memory_limit is not None:
        if isinstance(memory_limit, bool) or not isinstance(memory_limit, Real):
            raise WrongTypeError(f"memory_limit must be a number of bytes, not {memory_limit!r}")
        if memory_limit > 0:
            limit = MemoryLimit(float(memory_limit), interval, "raise" if raise_exception else "return")
    settings = Profile(memory=memory, limit=limit, interval=interval)
    if function is None:
        return functools.partial(wrap, settings=settings)
    if not callable(function):
        raise WrongTypeError(f"profile takes a run-function and keyword arguments, not {function!r}")
    return wrap(function, settings)


class Profile(NamedTuple):
    """What is measured.

    Attributes:
        memory: whether the peak of the memory is.
        limit: or None.
        interval: seconds between two looks at the memory.
        report: give metadata beside the output; else only the output.
    """

    memory: bool = False
    limit: MemoryLimit | None = None
    interval: float = 0.1
    report: bool = True


def settings_of(function: Any) -> Profile | None:
    """Give what a decorated function measures, also behind ``functools.partial``; None: it is not decorated."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "_paraval_profile", None)


def wrap(function: Callable[..., Any], settings: Profile) -> Callable[..., Any]:
    """Decorate a function. The result keeps its name, its place, and whether it is ``async``."""
    wrapper: Any
    if is_async(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            job = _running_job(args, kwargs)
            here = _AsyncHere(wrapper, settings, job)
            if not _needs_child(settings, job):
                return await here(*args, **kwargs)
            from paraval.isolated import call_async

            return await call_async(here, args, kwargs, job, settings.limit)
    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            job = _running_job(args, kwargs)
            here = _Here(wrapper, settings, job)
            if not _needs_child(settings, job):
                return here(*args, **kwargs)
            from paraval.isolated import call

            return call(here, args, kwargs, job, settings.limit)

    wrapper._paraval_profile = settings
    wrapper._paraval_has_own_process = settings.memory or settings.limit is not None
    return wrapper  # type: ignore[no-any-return] # a function that mypy cannot give an attribute


def _running_job(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RunningJob | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, RunningJob)), None)


def _needs_child(settings: Profile, job: RunningJob | None) -> bool:
    """Whether the process this is in will not do: it is shared, or nobody watches it as closely as was asked for."""
    if not settings.memory and settings.limit is None:
        return False
    watched = None if job is None else job.context.memory_limit
    return watched is None or (settings.limit is not None and watched > settings.limit.bytes)


# -- measuring where it is called --------------------------------------------------------------------------------------


class _Here:
    """Calls a profiled function in the process in which this is called, to which it may be sent."""

    def __init__(self, wrapper: Any, settings: Profile, job: RunningJob | None) -> None:
        self.__module__ = wrapper.__module__
        self.__qualname__ = wrapper.__qualname__
        self._wrapper = wrapper
        self._settings = settings
        self._origin = 0.0 if job is None else job.context.origin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Measurement(self._settings, self._origin) as measured:
            output = self._wrapper.__wrapped__(*args, **kwargs)
        return measured.report(output)


class _AsyncHere(_Here):
    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Measurement(self._settings, self._origin) as measured:
            output = await self._wrapper.__wrapped__(*args, **kwargs)
        return measured.report(output)


class _Measurement:
    """What happens within a ``with`` block."""

    def __init__(self, settings: Profile, origin: float) -> None:
        self._settings = settings
        self._origin = origin
        self._peak = PeakMemory(settings.interval) if settings.memory else None

    def __enter__(self) -> Self:
        if self._peak is not None:
            self._peak.__enter__()
        self._start = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end = time.monotonic()
        if self._peak is not None:
            self._peak.__exit__()

    def report(self, output: Any) -> Any:
        if not self._settings.report:
            return output
        metadata: dict[str, Any] = {
            "timestamp_start": self._start - self._origin,
            "timestamp_end": self._end - self._origin,
        }
        if self._peak is not None:
            metadata["memory"] = self._peak.bytes
        # Decorated twice, or by its author and by the evaluator: one report, as jobs take one apart.
        if isinstance(output, dict) and output.keys() == {"output", "metadata"}:
            inner = output["metadata"]
            if isinstance(inner, Mapping):
                return {"output": output["output"], "metadata": {**inner, **metadata}}
        return {"output": output, "metadata": metadata}


# -- the evaluators' arguments of the same names -----------------------------------------------------------------------


def for_evaluator(
    function: Callable[..., Any], memory_limit: float | None, *, profile: bool, watches_memory: bool
) -> tuple[Callable[..., Any], MemoryLimit | None]:
    """Decorate a run-function with what an evaluator was asked for and its backend does not do itself.

    Args:
        function: the run-function, which may be decorated already.
        memory_limit: in bytes, or None.
        profile: measure time and memory.
        watches_memory: whether the backend watches the memory of its worker processes.

    Returns:
        The run-function to use, and the limit that holds for its jobs: the lower of what was asked for and what the
        function is decorated with.

    Raises:
        ValueError: the limit makes no sense, or the function cannot be given a process of its own.
    """
    limits = []
    if memory_limit is not None:
        limits.append(MemoryLimit(memory.limit_in_bytes("memory_limit", memory_limit)))
    decorated = settings_of(function) or Profile(report=False)
    if decorated.limit is not None:
        limits.append(decorated.limit)
    limit = min(limits, default=None)
    if profile or limits:
        memory.require()
    profile = profile and not (decorated.memory and decorated.report)
    if not profile and (watches_memory or memory_limit is None):
        return function, limit
    wrapped = wrap(function, Profile(memory=profile, limit=None if watches_memory else limit, report=profile))
    try:
        dumps(wrapped, "the run-function")
    except PicklingFailed as exc:
        raise BadValueError(f"{describe(function)} cannot be given a process of its own: {exc}") from exc
    return wrapped, limit
