"""What can happen to a job, and what a run-function may return.

An *outcome* is how a backend tells the engine what became of one job: a value, or a :class:`JobError`. The run-function
standards (which values are objectives) are written here once. A child process imports this module, so it is light: no
anyio, no NumPy, no msgspec.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Final, NamedTuple

from paraval.errors import BadValueError, WrongTypeError

__all__ = [
    "FAILURE",
    "JobError",
    "Objective",
    "Outcome",
    "all_returned",
    "error_from_exception",
    "is_failure",
    "returned",
    "standardize",
]

FAILURE: Final = "F"
"""The objective of a failed evaluation; a reason may follow: ``"F_out_of_memory"``."""

Objective = float | str | tuple[float | str, ...] | list[float | str]
"""One objective, a failure (a string, which by convention starts with ``"F"``), or several objectives."""


class JobError(NamedTuple):
    """Why a job failed; ``job.error``. Only data: it crosses processes and is stored as it is.

    Attributes:
        kind: ``"exception"`` (the run-function raised, or returned what no standard allows), ``"timeout"``,
            ``"cancelled"``, ``"worker_died"`` or ``"memory_limit_exceeded"``.
        message: what happened, for people: one line, or what the run-function's exception says, which may be several.
        type: name of the exception's class; None when there was none.
        traceback: the traceback as text; None when there was none.
        exit_code: of the worker that died.
        signal: number of the signal that ended the worker.
        host: name of the host where the job ran.
        pid: process that ran it.
        attempts: how often the job was started.
        history: the errors of the attempts before the last.
    """

    kind: str
    message: str
    type: str | None = None
    traceback: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    host: str | None = None
    pid: int | None = None
    attempts: int = 1
    history: tuple[JobError, ...] = ()

    @property
    def reason(self) -> str:
        """The failure as an objective names it: ``"F_ValueError"``, ``"F_timeout"`` and so on."""
        return f"{FAILURE}_{self.type if self.kind == 'exception' and self.type else self.kind}"

    @property
    def summary(self) -> str:
        """One line: the type or kind, then the message."""
        head = self.type or self.kind
        return " ".join([f"{head}:", *self.message.split()]) if self.message.strip() else head


class Outcome(NamedTuple):
    """What became of one attempt at a job.

    Attributes:
        value: what the run-function returned; None when it failed.
        error: None when it returned.
        cancelled: the job was stopped on request (a timeout, a cancellation), so it ends ``CANCELLED``.
        may_retry: what it raised is among the types that ``retry_on`` names.
    """

    value: Any = None
    error: JobError | None = None
    cancelled: bool = False
    may_retry: bool = False


def returned(value: Any) -> Outcome:
    """Make the outcome of a job that returned: ``Outcome(value)``, at half its cost."""
    return _new_tuple(Outcome, (value, None, False, False))


def all_returned(values: Sequence[Any]) -> list[Outcome]:
    """Make the outcomes of several such jobs."""
    return [_new_tuple(Outcome, (value, None, False, False)) for value in values]


_new_tuple: Final = tuple.__new__


def error_from_exception(exc: BaseException) -> JobError:
    """Describe an exception as data. It never raises, whatever the exception's own methods do.

    One that comes from another process, where more was known of it, brings its description along.
    """
    try:
        known = vars(exc).get("_job_error")
    except BaseException:  # noqa: BLE001 - likewise
        known = None
    if type(known) is JobError:
        return known
    try:
        message = "".join([str(exc)])  # exactly a str: one of a subclass might not cross to another process
    except BaseException:  # noqa: BLE001 - a broken __str__ must not cost the job its record
        message = "<the exception's own __str__ failed>"
    import traceback  # here: a worker process that sees no failure need not import it

    try:
        text = "".join(traceback.format_exception(exc))
    except BaseException:  # noqa: BLE001 - likewise for a broken __repr__ or __cause__
        text = None
    try:
        name = "".join([type(exc).__name__])  # noqa: FLY002 - exactly a str, as above
    except BaseException:  # noqa: BLE001 - a metaclass may do anything
        name = "Exception"
    return JobError(
        kind="exception",
        message=message,
        type=name,
        traceback=text,
        host=_HOST,
        pid=os.getpid(),
    )


_HOST: Final = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def is_failure(objective: object) -> bool:
    """Tell whether an objective says that the evaluation failed (for several objectives: any of them).

    Every string does, be it ``"F_reason"``, as the standard writes it, or ``"diverged"``: it is no number that could be
    compared with others.
    """
    if type(objective) is float:  # by far the most frequent
        return False
    if isinstance(objective, tuple | list):
        return any(isinstance(item, str) for item in objective)
    return isinstance(objective, str)


def standardize(output: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring what a run-function returned to the standard form.

    Allowed are a number (bool and NumPy scalars count), a string that says why the evaluation failed (``"F_reason"``),
    a tuple or list of these (several objectives), a dict with ``"objective"`` and maybe ``"metadata"``, and
    ``{"output": …, "metadata": …}`` around any of them (what ``profile`` returns). Strings are kept as they are.

    Args:
        output: what the run-function returned. It is not changed.

    Returns:
        The output as a dict with at least ``"objective"``, and the metadata. NaN and infinities become ``"F"``.

    Raises:
        TypeError: a type that is no objective (None, bytes, complex, an array, …), or metadata that is no dict.
        ValueError: a dict without ``"objective"``, or no objective at all.
    """
    if type(output) is float:  # by far the most frequent
        return {"objective": output if math.isfinite(output) else FAILURE}, {}
    metadata: dict[str, Any] = {}
    if isinstance(output, dict) and "output" in output and "objective" not in output:
        metadata.update(_metadata(output.get("metadata")))
        output = output["output"]
    if not isinstance(output, dict):
        return {"objective": _objective(output)}, metadata
    if "objective" not in output:
        raise BadValueError(
            f"the run-function returned a dict without the key 'objective' (its keys are {sorted(map(str, output))})"
        )
    metadata.update(_metadata(output.get("metadata")))
    standard = {key: value for key, value in output.items() if key != "metadata"}
    standard["objective"] = _objective(output["objective"])
    return standard, metadata


def _metadata(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise WrongTypeError(f"the run-function's 'metadata' must be a dict, not {type(value).__name__}")
    return dict(value)


def _objective(value: Any) -> Objective:
    if isinstance(value, tuple | list):
        if not value:
            raise BadValueError(f"the run-function returned an empty {type(value).__name__} where objectives belong")
        items = [_scalar(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return _scalar(value)


def _scalar(value: Any) -> float | str:
    if type(value) is float:
        return value if math.isfinite(value) else FAILURE
    if isinstance(value, str):
        return str(value)
    if type(value).__module__ == "numpy" and not hasattr(value, "__len__") and hasattr(value, "item"):
        value = value.item()  # a NumPy scalar; numpy.bool is not a numbers.Number
    if not isinstance(value, Real) and not _is_decimal(value):
        raise WrongTypeError(
            f"the run-function returned {type(value).__name__} where an objective belongs: "
            "return a number, a string 'F…', a tuple of numbers, or a dict with 'objective'"
        )
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an int or a fraction beyond the range of floats; a decimal's signalling NaN
        return FAILURE
    return number if math.isfinite(number) else FAILURE


def _is_decimal(value: object) -> bool:
    return type(value).__module__ in {"decimal", "_decimal"} and type(value).__name__ == "Decimal"
