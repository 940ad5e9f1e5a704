"""Whether what a storage gives back is what it was given."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from paraval.storage import JobRecord

__all__ = ["fields", "same"]


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of equal types, all the way down.

    NaN is equal to NaN, and 0.0 not to -0.0. A tuple may come back as a list, as there are none in many formats.
    """
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (
            math.isnan(one) and math.isnan(other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def fields(record: JobRecord) -> dict[str, Any]:
    """Give what was stored in a record: all but its revision, which is the storage's own."""
    found = msgspec.structs.asdict(record)
    del found["revision"]
    return found
