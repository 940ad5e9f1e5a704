"""The fields of records and changes: of which kinds they are, how errors are written, what a message calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import UNSET, UnsetType

from paraval.errors import CorruptStoreError
from paraval.outcome import JobError
from paraval.storage.base import UnstorableError
from paraval.storage.records import JobChange, JobRecord

__all__ = [
    "CALLED",
    "NONE",
    "STATUSES",
    "decode_error",
    "encode_error",
    "refuse_odd",
    "refuse_unless",
    "refuse_unless_as_many",
]


def encode_error(error: JobError) -> dict[str, Any]:
    """Give an error the form that is stored: a dict of what is not at its default."""
    stored = {name: value for name, value in error._asdict().items() if value != error._field_defaults.get(name)}
    if error.history:
        stored["history"] = [encode_error(earlier) for earlier in error.history]
    return stored


def decode_error(stored: Any) -> JobError:
    """Read what :func:`encode_error` gave; fields that a later release has added are left out.

    Raises:
        CorruptStoreError: it gave nothing like this.
    """
    try:
        values = {name: stored[name] for name in JobError._fields if name in stored}
        if "history" in values:
            values["history"] = tuple(decode_error(earlier) for earlier in values["history"])
        return JobError(**values)
    except (TypeError, AttributeError) as exc:
        raise CorruptStoreError(f"an error of a job is stored as {stored!r:.80}, which is none") from exc


def refuse_odd(value: JobRecord | JobChange, kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Raise if a part is of a kind that could be written, and not be read as what it is."""
    for name, kind in kinds.items():
        part = getattr(value, name)
        is_right = isinstance(part, kind) and not (isinstance(part, bool) and bool not in kind)
        if name == "status" and type(part) is not UnsetType:
            is_right = is_right and part in STATUSES
        if name == "intermediate" and part is not None:
            is_right = is_right and len(part) == 2  # noqa: PLR2004 - a budget and an objective
        if not is_right:
            names = " or ".join(_KINDS_CALLED.get(one, one.__name__) for one in kind if one is not UnsetType)
            raise UnstorableError(
                f"the {CALLED[name]} of a job cannot be stored: it should be {names}, not {part!r:.80}"
            )


def refuse_unless_as_many(numbers: list[int], *columns: list[Any]) -> None:
    """Raise unless what was read has one value for each job."""
    for column in columns:
        if len(column) != len(numbers):
            raise CorruptStoreError(f"stored bytes hold {len(column)} values for {len(numbers)} jobs")


def refuse_unless(kind: type, *values: Any) -> None:
    """Raise unless what was read is of this kind, or is not there."""
    for value in values:
        if value is not None and value is not UNSET and type(value) is not kind:
            raise CorruptStoreError(f"stored bytes hold {value!r:.80} in place of {kind.__name__}")


NONE: Final = type(None)
_KINDS_CALLED: Final = {NONE: "None", Mapping: "dict"}
STATUSES: Final = range(-(2**31), 2**31)

CALLED: Final = {
    "status": "status",
    "args": "argument",
    "kwargs": "keyword argument",
    "out": "output",
    "error": "error",
    "metadata": "metadata",
    "budgets": "budget",
    "objectives": "intermediate objective",
    "intermediate": "intermediate result",
    "attempts": "number of attempts",
    "is_private": "mark of privacy",
    "function": "name of the run-function",
    "owner": "owner",
    "extra": "extra value",
}
"""What the fields are called in a message that may hold anything."""
