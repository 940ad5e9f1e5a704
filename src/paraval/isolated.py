"""A call in a worker process of its own, as if it were made here.

It returns what the function returns, raises what it raises, and the running job among its arguments works as ever.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paraval.errors import BadValueError, ParavalError
from paraval.functions import describe, is_async
from paraval.job import Job, JobContext, JobStatus, RunningJob
from paraval.memory import MemoryLimit, require
from paraval.outcome import JobError, Outcome, error_from_exception
from paraval.worker.pickling import PicklingFailed, dumps

if TYPE_CHECKING:
    import anyio

__all__ = ["ChildFailedError", "call", "call_async"]

_LOOK_S: Final = 0.05
"""How often to look whether the call shall stop."""


class ChildFailedError(ParavalError, RuntimeError):
    """The process of a call failed, or the function raised what cannot be brought here.

    Attributes:
        error: what happened, as a job's error.
    """

    def __init__(self, error: JobError) -> None:
        super().__init__(error.summary)
        self.error = self._job_error = error


def call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    job: RunningJob | None,
    limit: MemoryLimit | None,
) -> Any:
    """Call a function in a process of its own, and wait for it; in any thread.

    Args:
        function: plain or ``async``; it and its arguments must be picklable, by value if need be.
        args: its arguments.
        kwargs: likewise.
        job: the running job that is among the arguments, if any. When it is asked to stop, the child is asked too, and
            killed after the evaluator's ``kill_grace``.
        limit: kills the child when it takes more memory.

    Raises:
        ChildFailedError: the child died, or raised what cannot be sent.
        MemoryError: the limit was exceeded and asks for this.
        ValueError: the function cannot be sent.
    """
    import anyio

    stop = threading.Event()
    ended = threading.Event()
    results: list[Outcome | BaseException] = []

    def run() -> None:
        try:
            results.append(anyio.run(_run, function, args, kwargs, job, limit, stop))
        except BaseException as exc:  # noqa: BLE001 - it is raised below, in the caller's thread
            results.append(exc)
        ended.set()

    # In a thread, as this one may run an event loop already. A daemon: at the program's end the child ends by itself.
    thread = threading.Thread(target=run, name="paraval-isolated", daemon=True)
    thread.start()
    try:
        ended.wait()
    finally:
        stop.set()  # after Ctrl-C, the call must end too
        thread.join()
    result = results[0]
    if isinstance(result, BaseException):
        raise result
    return _delivered(result)


async def call_async(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    job: RunningJob | None,
    limit: MemoryLimit | None,
) -> Any:
    """Do as :func:`call` does, on asyncio or trio. Cancelled, it stops the child, and waits for that."""
    return _delivered(await _run(function, args, kwargs, job, limit))


async def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    job: RunningJob | None,
    limit: MemoryLimit | None,
    stop: threading.Event | None = None,
) -> Outcome:
    import anyio

    from paraval.backends.base import Batch, RunSpec, WorkerDiedError
    from paraval.backends.process import ProcessBackend
    from paraval.backends.process_slot import ProcessSlot
    from paraval.storage import NullStorage

    if limit is not None:
        require()
    sent_call = (_AsyncCall if is_async(function) else _Call)(function, args, kwargs, job)
    context = JobContext() if job is None else job.context
    spec = RunSpec(
        sent_call,
        {},
        origin=context.origin,
        kill_grace=context.kill_grace,
        storage=NullStorage() if job is None else job.storage,
    )
    spec.stopper = _without_job(None if job is None else job.stopper)
    backend = ProcessBackend(sent_call, max_jobs_per_worker=None, initializer=None, capture=None, memory_limit=limit)
    try:
        backend.setup(spec)
    except PicklingFailed as exc:
        raise BadValueError(f"{describe(function)} cannot be called in a process of its own: {exc}") from exc
    slot = ProcessSlot(spec, backend)
    sent_job = Job("0.0", {}) if job is None else Job(str(job.id), dict(job.parameters))
    batch = Batch([sent_job], spec.clock, lambda: None)
    async with anyio.create_task_group() as group:
        group.start_soon(backend.supervise)
        group.start_soon(_cancel_when_stopped, group.cancel_scope, job, stop)
        try:
            await slot.run(batch)
        except WorkerDiedError as exc:
            batch.finish_sent(sent_job, Outcome(error=exc.error), 0, 0)
        group.cancel_scope.cancel()
    with anyio.CancelScope(shield=True):
        await slot.close()
    return batch.outcome() or Outcome(error=JobError("cancelled", "the job was asked to stop"))


async def _cancel_when_stopped(scope: anyio.CancelScope, job: RunningJob | None, stop: threading.Event | None) -> None:
    """Look after calls that nobody can cancel, as they block a thread."""
    import anyio

    while stop is not None:
        if stop.is_set() or (job is not None and job._live is not None and job._live._status is JobStatus.CANCELLING):
            scope.cancel()
        await anyio.sleep(_LOOK_S)


# -- what is sent ------------------------------------------------------------------------------------------------------


class _TheJob:
    """Stands for the running job among the arguments: the child has one of its own."""


class _Raised(NamedTuple):
    """What a function raised: the exception, if it can be sent, and as data."""

    pickled: bytes | None
    error: JobError


class _Call:
    """The run-function of the child."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], job: RunningJob | None
    ) -> None:
        self._function: Any = function
        self._args = [_TheJob if value is job and job is not None else value for value in args]
        self._kwargs = {key: _TheJob if value is job and job is not None else value for key, value in kwargs.items()}

    def __call__(self, job: RunningJob) -> Any:
        try:
            return self._begin(job)
        except BaseException as exc:  # noqa: BLE001 - whatever it raises is raised where it was called
            return _packed(exc)

    def _begin(self, job: RunningJob) -> Any:
        args = [job if value is _TheJob else value for value in self._args]
        kwargs = {key: job if value is _TheJob else value for key, value in self._kwargs.items()}
        return self._function(*args, **kwargs)


class _AsyncCall(_Call):
    async def __call__(self, job: RunningJob) -> Any:
        import asyncio

        try:
            return await self._begin(job)
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001 - likewise
            return _packed(exc)


def _without_job(stopper: Any) -> Any:
    if stopper is None:
        return None
    stopper = copy.copy(stopper)
    stopper.job = None  # it leads to the storage and all that; the child gives the stopper its own
    return stopper


def _packed(exc: BaseException) -> _Raised:
    # As it is; or, if its __init__ wants other arguments than it keeps, without calling that.
    for value in (exc, (type(exc), exc.args, vars(exc))):
        try:
            pickled = dumps(value, "the exception")
            _unpickled(pickled)
        except Exception:  # noqa: BLE001, S112 - it stays as data
            continue
        return _Raised(pickled, error_from_exception(exc))
    return _Raised(None, error_from_exception(exc))


def _unpickled(pickled: bytes) -> BaseException:
    value = pickle.loads(pickled)  # noqa: S301 - our own, or from our own child
    exc: BaseException = _rebuilt(*value) if isinstance(value, tuple) else value
    return exc


def _rebuilt(cls: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    exc = cls.__new__(cls, *args)
    exc.args = args
    exc.__dict__.update(attributes)
    return exc


def _delivered(outcome: Outcome) -> Any:
    """Return or raise what the child did."""
    if outcome.error is None:
        if type(outcome.value) is _Raised:
            raise _unpacked(outcome.value)
        return outcome.value
    if outcome.error.type == "MemoryError":
        raise _marked(MemoryError(outcome.error.message), outcome.error)
    raise ChildFailedError(outcome.error)


def _unpacked(raised: _Raised) -> BaseException:
    exc: BaseException = ChildFailedError(raised.error)
    if raised.pickled is not None:
        try:
            exc = _marked(_unpickled(raised.pickled), raised.error)
        except Exception:  # noqa: BLE001 - it needs what only the child has
            exc = ChildFailedError(raised.error)
    exc.add_note(f"in process {raised.error.pid}:\n{raised.error.traceback or ''}")
    return exc


def _marked(exc: Any, error: JobError) -> BaseException:
    """Note on an exception what is known of it, so that the job's error tells where it was raised."""
    exc._job_error = error
    marked: BaseException = exc
    return marked
