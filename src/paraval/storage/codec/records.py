"""Records as bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec

from paraval.errors import CorruptStoreError
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
from paraval.storage.records import JobRecord

__all__ = ["decode_record", "decode_records", "encode_each_record", "encode_record", "encode_records"]

_RECORD_VERSION: Final = b"\x01"


def encode_record(record: JobRecord) -> bytes:
    """Write a whole record as bytes.

    Raises:
        UnstorableError: there is something in it that cannot be kept; the message gives the way to it.
    """
    looked_at = _looked_at(record)
    try:
        return _RECORD_VERSION + encoder.encode(looked_at)
    except UNSEEN:
        return _RECORD_VERSION + encoder.encode(_made_plain(record))


def encode_records(records: Sequence[JobRecord], numbers: Sequence[int] = ()) -> bytes:
    """Write several at once, with a number for each, or with none: at a fifth of the cost.

    Raises:
        UnstorableError: as above.
    """
    are_seen = len(records) > 1 and _are_as_submitted(records)  # a look at one costs less
    looked_at = records if are_seen else [_looked_at(record) for record in records]
    try:
        return encoder.encode((numbers, looked_at))
    except UNSEEN:
        return encoder.encode((numbers, [_made_plain(record) for record in records]))


def encode_each_record(records: Sequence[JobRecord]) -> list[bytes]:
    """Write several as :func:`encode_record` writes each.

    Raises:
        UnstorableError: as above.
    """
    if _are_as_submitted(records):
        try:
            return [_RECORD_VERSION + encoder.encode(record) for record in records]
        except UNSEEN:
            pass
    return [encode_record(record) for record in records]


def _are_as_submitted(records: Sequence[JobRecord]) -> bool:
    """Whether all are jobs as they are submitted, with plain values: seen at once, at a fraction of the cost."""
    return (
        all(map(_is_as_submitted, records))
        and _are_headed_well(records)
        and are_flat(record.args[0] for record in records if record.args)
        and are_flat(record.metadata for record in records)
    )


def _looked_at(record: JobRecord) -> JobRecord:
    """Give a record that the encoder knows how to write, unless there is one of the UNSEEN in it."""
    # A job that is submitted has arguments and one note: it is not looked at part by part.
    if _is_as_submitted(record) and type(record.metadata) is dict and _is_headed_well(_head_of(record)):
        known_plain = record.args is not None and is_plain(record.args[0]) and is_plain(record.metadata)
    else:
        refuse_odd(record, _RECORD_KINDS)
        known_plain = record.error is None and is_plain(_parts_of(record))
    return record if known_plain else _made_plain(record)


def _is_as_submitted(record: JobRecord) -> bool:
    return (
        record.kwargs is None
        and record.out is None
        and record.error is None
        and record.objectives is None
        and record.extra is None
        and type(args := record.args) is tuple
        and len(args) == 1
    )


def _are_headed_well(records: Sequence[JobRecord]) -> bool:
    """Whether the other parts of records as they are submitted are of their kinds; they are mostly the same for all."""
    try:
        heads = set(map(_head_of, records))
    except TypeError:  # one has no hash
        return False
    return all(map(_is_headed_well, heads))


def _is_headed_well(head: tuple[Any, ...]) -> bool:
    return tuple(map(type, head)) in _KINDS_OF_HEAD and head[0] in STATUSES


def _made_plain(record: JobRecord) -> JobRecord:
    record = msgspec.structs.replace(record)
    if record.error is not None:
        record.error = encode_error(record.error)  # type: ignore[assignment] # the form that is stored
    for name in _PARTS:
        if (value := getattr(record, name)) is not None:
            setattr(record, name, Plain(CALLED[name]).of(value))
    return record


def decode_record(data: bytes | bytearray) -> JobRecord:
    """Read what :func:`encode_record` wrote; fields that a later release has added are left out.

    Raises:
        CorruptStoreError: it wrote nothing like this, or a later release wrote it in another form.
    """
    if data[:1] != _RECORD_VERSION:
        raise CorruptStoreError(
            f"a record begins with {bytes(data[:8])!r}, and not with {_RECORD_VERSION!r} as this release of paraval "
            "writes it: it is damaged, or a later release wrote it, which can then read it"
        )
    return _record_of(decoded(_record_decoder, data[1:]))


def decode_records(data: bytes | bytearray) -> tuple[list[int], list[JobRecord]]:
    """Read what :func:`encode_records` wrote: the numbers, and the records.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    numbers, stored = decoded(_records_decoder, data)
    if numbers:
        refuse_unless_as_many(numbers, stored)
    return numbers, [_record_of(one) for one in stored]


def _record_of(stored: _StoredRecord) -> JobRecord:
    refuse_unless(dict, stored.kwargs, stored.metadata, stored.extra)
    refuse_unless(str, stored.function, stored.owner)
    record = JobRecord(*msgspec.structs.astuple(stored))
    if stored.error is not None:
        record.error = decode_error(stored.error)
    return record


class _StoredRecord(msgspec.Struct, gc=False):
    """A :class:`JobRecord` as it is read: what may be written as an extension type is looked at once it is read."""

    id: str = ""
    status: int = 0
    args: tuple[Any, ...] | None = None
    kwargs: Any = None
    out: Any = None
    error: Any = None
    metadata: Any = None
    budgets: list[Any] | None = None
    objectives: list[Any] | None = None
    function: Any = None
    owner: Any = None
    attempts: int = 0
    is_private: bool = False
    extra: Any = None
    revision: int = 0


_RECORD_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "status": (int,),
    "args": (tuple, list, NONE),
    "kwargs": (Mapping, NONE),
    "error": (JobError, NONE),
    "metadata": (Mapping, NONE),
    "budgets": (list, NONE),
    "objectives": (list, NONE),
    "function": (str, NONE),
    "owner": (str, NONE),
    "attempts": (int,),
    "is_private": (bool,),
    "extra": (Mapping, NONE),
}
_head_of: Final = attrgetter("status", "function", "owner", "attempts", "is_private", "budgets")
_KINDS_OF_HEAD: Final = frozenset(
    (int, function, owner, int, bool, NONE) for function in (str, NONE) for owner in (str, NONE)
)
_PARTS: Final = [
    name for name in CALLED if name in JobRecord.__struct_fields__ and name not in {"attempts", "is_private"}
]
_parts_of: Final[Callable[[JobRecord], tuple[Any, ...]]] = attrgetter(*_PARTS)

_record_decoder: Final = msgspec.msgpack.Decoder(_StoredRecord, ext_hook=read_ext)
_records_decoder: Final = msgspec.msgpack.Decoder(tuple[list[int], list[_StoredRecord]], ext_hook=read_ext)
