"""Changes as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from paraval.outcome import JobError
from paraval.storage.codec.fields import (
    CALLED,
    NONE,
    STATUSES,
    decode_error,
    encode_error,
    refuse_odd,
    refuse_unless,
    refuse_unless_as_many,
)
from paraval.storage.codec.plain import Plain, are_flat, encoder, is_plain, read_ext
from paraval.storage.codec.values import UNSEEN, decoded
from paraval.storage.records import JobChange

__all__ = [
    "decode_change",
    "decode_changes",
    "decode_ends",
    "encode_change",
    "encode_changes",
    "encode_each_change",
    "encode_ends",
]


def encode_change(change: JobChange) -> bytes:
    """Write what a change sets as bytes: all of it but ``id`` and ``by``, which say where and on what condition.

    Raises:
        UnstorableError: there is something in it that cannot be kept; the message gives the way to it.
    """
    stored = _stored(change)
    if is_plain(stored):
        try:
            return encoder.encode(stored)
        except UNSEEN:
            pass
    return encoder.encode(_plain_parts(stored))


def encode_changes(changes: Sequence[JobChange], numbers: Sequence[int]) -> bytes:
    """Write several at once, with a number for each.

    Raises:
        UnstorableError: as above.
    """
    stored = [_stored(change) for change in changes]
    looked_at = [one if is_plain(one) else _plain_parts(one) for one in stored]
    try:
        return encoder.encode((numbers, looked_at))
    except UNSEEN:
        return encoder.encode((numbers, [_plain_parts(one) for one in stored]))


def encode_ends(changes: Sequence[JobChange], numbers: Sequence[int]) -> bytes | None:
    """Write of several jobs that they have ended well, which most changes say; None if one says anything else.

    Raises:
        UnstorableError: as above.
    """
    if not all(map(_says_ended_well, changes)):
        return None
    statuses = [change.status for change in changes]
    outs: list[Any] = [change.out for change in changes]
    if set(map(type, outs)) != {float}:
        outs = [out if is_plain(out) else _plain("out", out) for out in outs]
    notes: list[Any] = [change.metadata for change in changes]
    if len(notes) == 1 or not are_flat(notes):
        notes = [one if is_plain(one) else _plain("metadata", one) for one in notes]
    try:
        return encoder.encode((numbers, statuses, outs, notes))
    except UNSEEN:
        outs = [_plain("out", change.out) for change in changes]
        notes = [_plain("metadata", change.metadata) for change in changes]
        return encoder.encode((numbers, statuses, outs, notes))


def encode_each_change(changes: Sequence[JobChange]) -> list[bytes]:
    """Write several as :func:`encode_change` writes each.

    Raises:
        UnstorableError: as above.
    """
    if (
        all(map(_says_ended_well, changes))
        and {type(change.out) for change in changes} == {float}
        and are_flat(change.metadata for change in changes)
    ):
        try:
            return [encoder.encode(_end(change)) for change in changes]
        except UNSEEN:
            pass
    return [encode_change(change) for change in changes]


def _end(change: JobChange) -> dict[str, Any]:
    return {"status": change.status, "out": change.out, "error": None, "metadata": change.metadata}


def _says_ended_well(change: JobChange) -> bool:
    return (
        change.error is None
        and type(change.status) is int
        and change.status in STATUSES
        and change.out is not UNSET
        and type(change.metadata) is dict
        and change.args is UNSET
        and change.kwargs is UNSET
        and change.intermediate is None
        and change.extra is None
    )


def _stored(change: JobChange) -> dict[str, Any]:
    if _says_ended_well(change):  # most do: as below
        return _end(change)
    refuse_odd(change, _CHANGE_KINDS)
    stored = {name: value for name, absent in _ABSENT.items() if (value := getattr(change, name)) is not absent}
    if type(change.error) is JobError:
        stored["error"] = encode_error(change.error)
    return stored


def _plain_parts(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(name, value) for name, value in stored.items()}


def _plain(name: str, value: Any) -> Any:
    return Plain(CALLED[name]).of(value)


def decode_change(data: bytes | bytearray) -> JobChange:
    """Read what :func:`encode_change` wrote; fields that a later release has added are left out.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    return _change_of(decoded(_change_decoder, data))


def decode_changes(data: bytes | bytearray) -> tuple[list[int], list[JobChange]]:
    """Read what :func:`encode_changes` wrote: the numbers, and the changes.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    numbers, stored = decoded(_changes_decoder, data)
    refuse_unless_as_many(numbers, stored)
    return numbers, [_change_of(one) for one in stored]


def decode_ends(data: bytes | bytearray) -> tuple[list[int], list[JobChange]]:
    """Read what :func:`encode_ends` wrote: the numbers, and the changes.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    numbers, statuses, outs, notes = decoded(_ends_decoder, data)
    refuse_unless_as_many(numbers, statuses, outs, notes)
    refuse_unless(dict, *notes)
    return numbers, [
        JobChange("", status=status, out=out, error=None, metadata=metadata)
        for status, out, metadata in zip(statuses, outs, notes, strict=True)
    ]


def _change_of(stored: _StoredChange) -> JobChange:
    refuse_unless(dict, stored.kwargs, stored.metadata, stored.extra)
    change = JobChange("", *msgspec.structs.astuple(stored))
    if stored.error is not UNSET and stored.error is not None:
        change.error = decode_error(stored.error)
    return change


class _StoredChange(msgspec.Struct, gc=False):
    """A :class:`JobChange` as it is read: likewise."""

    status: int | UnsetType = UNSET
    args: tuple[Any, ...] | UnsetType | None = UNSET
    kwargs: Any = UNSET
    out: Any = UNSET
    error: Any = UNSET
    metadata: Any = None
    intermediate: tuple[Any, Any] | None = None
    extra: Any = None


_CHANGE_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "status": (int, UnsetType),
    "args": (tuple, list, NONE, UnsetType),
    "kwargs": (Mapping, NONE, UnsetType),
    "error": (JobError, NONE, UnsetType),
    "metadata": (Mapping, NONE),
    "intermediate": (tuple, list, NONE),
    "extra": (Mapping, NONE),
}
_ABSENT: Final[dict[str, Any]] = {
    "status": UNSET,
    "args": UNSET,
    "kwargs": UNSET,
    "out": UNSET,
    "error": UNSET,
    "metadata": None,
    "intermediate": None,
    "extra": None,
}
"""The fields of a change that are stored, and what they are where they say nothing."""

_change_decoder: Final = msgspec.msgpack.Decoder(_StoredChange, ext_hook=read_ext)
_changes_decoder: Final = msgspec.msgpack.Decoder(tuple[list[int], list[_StoredChange]], ext_hook=read_ext)
_ends_decoder: Final = msgspec.msgpack.Decoder(tuple[list[int], list[int], list[Any], list[Any]], ext_hook=read_ext)
