"""Arguments on their way to a worker and results on their way back, pickled so that the event loop need not wait.

What is small is pickled at once. What is large is left to a thread, and there done in pieces, as the interpreter's lock
is not given up within one.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import anyio

from paraval.job import Job
from paraval.loops import call_in_thread
from paraval.outcome import JobError, Outcome, returned
from paraval.worker.frames import Sealed
from paraval.worker.pickling import (
    PicklingFailed,
    PiecewisePickler,
    TooLargeError,
    are_plain_dicts,
    is_plain,
    loads_in_pieces,
)

__all__ = [
    "LARGE",
    "Packer",
    "Parcel",
    "are_values",
    "is_large",
    "load",
    "outcome_of_worker",
    "outcomes_of_worker",
    "unpack",
    "unpack_frame",
    "unpicklable",
]

LARGE: Final = 1 << 18
"""So many bytes take some 5 ms, if they are small objects."""
_NAME: Final = "the arguments"
_WRAPPED: Final = frozenset({Sealed, Outcome})


class Parcel(NamedTuple):
    """Jobs as they are sent.

    Attributes:
        ids: of the jobs.
        args: the arguments of each, sealed unless they are plain.
        failures: the jobs that cannot be sent, and why.
        is_large: whether it takes a while to copy this.
    """

    ids: list[str]
    args: list[Any]
    failures: Sequence[tuple[Job, PicklingFailed]] = ()
    is_large: bool = False


class Packer:
    """Makes jobs ready to be sent; for one task at a time."""

    def __init__(self) -> None:
        self._pickler = PiecewisePickler()

    def pack_soon(self, jobs: Sequence[Job], most: int) -> Parcel | None:
        """Give jobs as they are sent, if all can be, and if they take no more than about so many bytes."""
        all_args: list[Any] = [job.args for job in jobs]
        if not are_plain_dicts(all_args):  # else, as a rule, there is nothing to do
            for place, args in enumerate(all_args):
                if not is_plain(args):
                    try:
                        all_args[place] = sealed = Sealed(self._pickler.dumps(args, _NAME, most))
                    except (TooLargeError, PicklingFailed):
                        return None
                    most -= len(sealed.data)
        return Parcel([job.id for job in jobs], all_args)

    async def pack(self, jobs: Sequence[Job]) -> Parcel:
        """Give jobs as they are sent."""
        if len(jobs) == 1 and is_plain(jobs[0].args):
            return Parcel([jobs[0].id], [jobs[0].args])
        all_args: list[Any] = [job.args for job in jobs]
        if are_plain_dicts(all_args):  # as a rule
            return Parcel([job.id for job in jobs], all_args)
        failures: list[tuple[Job, PicklingFailed]] = []
        parcel = Parcel([], [], failures)
        room = LARGE
        for place, (job, args) in enumerate(zip(jobs, all_args, strict=True)):
            packed = args
            if not is_plain(args):
                try:
                    packed = Sealed(self._pickler.dumps(args, _NAME, room))
                    room -= len(packed.data)
                except TooLargeError:
                    rest = await call_in_thread(_pack_slowly, jobs[place:], abandon_on_cancel=True)
                    return Parcel(
                        parcel.ids + rest.ids, parcel.args + rest.args, [*failures, *rest.failures], is_large=True
                    )
                except PicklingFailed as exc:
                    failures.append((job, exc))
                    continue
            parcel.ids.append(job.id)
            parcel.args.append(packed)
        return parcel


def _pack_slowly(jobs: Sequence[Job]) -> Parcel:
    pickler = PiecewisePickler()  # another, as a thread that is left behind may go on with it
    failures: list[tuple[Job, PicklingFailed]] = []
    parcel = Parcel([], [], failures)
    for job in jobs:
        try:
            sealed = Sealed(pickler.dumps(job.args, _NAME))
        except PicklingFailed as exc:
            failures.append((job, exc))
            continue
        parcel.ids.append(job.id)
        parcel.args.append(sealed)
    return parcel


def unpicklable(exc: PicklingFailed) -> JobError:
    """Say that something cannot be sent."""
    return JobError("exception", str(exc), type="PicklingError")


def is_large(value: Any) -> bool:
    """Whether a result is to be had from :func:`unpack`, and not from :func:`outcome_of_worker`."""
    return type(value) is Sealed and len(value.data) >= LARGE


def load(data: bytes) -> Any:
    """Unpickle what our own worker has sent; in pieces, if it is large."""
    return pickle.loads(data) if len(data) < LARGE else loads_in_pieces(data)  # noqa: S301 - see above


async def unpack(value: Any) -> Outcome:
    """Make the outcome of a large result, which came alone."""
    with anyio.CancelScope(shield=True):  # the job has ended, and shall be seen to have
        outcome = await call_in_thread(outcome_of_worker, None, value)
    return outcome  # noqa: RET504 - to mypy, the scope may swallow what is raised in it


async def unpack_frame(data: memoryview) -> tuple[Any, ...]:
    """Unpickle a large frame, and the results in it: each value is its outcome."""
    with anyio.CancelScope(shield=True):  # likewise
        frame = await call_in_thread(_unpack_frame_slowly, data)
    return frame  # noqa: RET504 - likewise


def _unpack_frame_slowly(data: memoryview) -> tuple[Any, ...]:
    frame: tuple[Any, ...] = loads_in_pieces(data)
    if frame[0] != "done":
        return frame
    *fields, errors, values = frame
    return (*fields, {}, outcomes_of_worker(errors, values))


def are_values(errors: Mapping[int, tuple[Any, ...]], values: Sequence[Any]) -> bool:
    """Whether what a worker sent of several jobs is what they returned, as it is."""
    return not errors and _WRAPPED.isdisjoint(map(type, values))


def outcomes_of_worker(errors: Mapping[int, tuple[Any, ...]], values: Sequence[Any]) -> list[Outcome]:
    """Make the outcomes of what a worker sent of several jobs: the errors by their places, and the values."""
    return [outcome_of_worker(errors.get(place), value) for place, value in enumerate(values)]


def outcome_of_worker(error: tuple[Any, ...] | None, value: Any) -> Outcome:
    """Make an outcome of what a worker sent: the fields of an error and whether to try again, or a value."""
    if error is not None:
        *fields, may_retry = error
        return Outcome(error=JobError(*fields), may_retry=may_retry)
    if type(value) is Outcome:
        return value
    if type(value) is not Sealed:
        return returned(value)
    try:
        return Outcome(load(value.data))
    except BaseException as exc:  # noqa: BLE001 - it may need what only the worker has imported, or do anything
        message = f"the result cannot be unpickled: {type(exc).__name__}: {exc}"
        return Outcome(error=JobError("exception", message, type="UnpicklingError"))
