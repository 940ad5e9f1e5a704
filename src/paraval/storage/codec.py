"""How values and records are written at rest: MessagePack, never pickle, so that reading them cannot run anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from paraval.errors import CorruptStoreError
from paraval.outcome import JobError
from paraval.storage.base import UnstorableError
from paraval.storage.plain import Plain, are_flat, encoder, is_plain, read_ext, sorting_encoder
from paraval.storage.records import JobChange, JobRecord

__all__ = [
    "decode",
    "decode_change",
    "decode_changes",
    "decode_ends",
    "decode_error",
    "decode_record",
    "decode_records",
    "encode",
    "encode_change",
    "encode_changes",
    "encode_each_change",
    "encode_each_record",
    "encode_ends",
    "encode_error",
    "encode_record",
    "encode_records",
    "key_of",
]

_RECORD_VERSION: Final = b"\x01"
_UNSEEN: Final = (OverflowError, UnicodeEncodeError, TypeError)
"""What the encoder raises at what a quick look does not see: an int of more than 64 bits or half a character, which are
written as extension types; UNSET, which is plain as a field of a struct, but not deeper."""


def encode(value: Any, what: str) -> bytes:
    """Write a value as bytes.

    None, bool, int of any size, float (NaN and infinities too), str, bytes, list, dict (with any keys that can be kept)
    and datetime come back as they are. So that nobody's result is lost over a detail, a tuple comes back as a list, a
    set as a sorted list, a bytearray as bytes, an Enum as its value, a path, a Decimal or a UUID as its text, a date or
    time in ISO form, a timedelta in seconds, a dataclass or msgspec Struct as a dict, a NumPy scalar or array as
    numbers.

    Args:
        value: what to write.
        what: what it is, for the message, as ``"output"``.

    Raises:
        UnstorableError: there is something else in it; the message gives the way to it.
    """
    if is_plain(value):
        try:
            return encoder.encode(value)
        except _UNSEEN:
            pass
    return encoder.encode(Plain(what).of(value))


def decode(data: bytes | bytearray) -> Any:
    """Read what :func:`encode` wrote.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    return _decoded(_decoder, data)


def encode_record(record: JobRecord) -> bytes:
    """Write a whole record as bytes.

    Raises:
        UnstorableError: there is something in it that cannot be kept; the message gives the way to it.
    """
    looked_at = _looked_at(record)
    try:
        return _RECORD_VERSION + encoder.encode(looked_at)
    except _UNSEEN:
        return _RECORD_VERSION + encoder.encode(_made_plain(record))


def encode_records(records: Sequence[JobRecord], numbers: Sequence[int] = ()) -> bytes:
    """Write several at once, with a number for each, or with none: at a fifth of the cost.

    Raises:
        UnstorableError: as above.
    """
    looked_at = records if _are_as_submitted(records) else [_looked_at(record) for record in records]
    try:
        return encoder.encode((numbers, looked_at))
    except _UNSEEN:
        return encoder.encode((numbers, [_made_plain(record) for record in records]))


def encode_each_record(records: Sequence[JobRecord]) -> list[bytes]:
    """Write several as :func:`encode_record` writes each.

    Raises:
        UnstorableError: as above.
    """
    if _are_as_submitted(records):
        try:
            return [_RECORD_VERSION + encoder.encode(record) for record in records]
        except _UNSEEN:
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
    """Give a record that the encoder knows how to write, unless there is one of the _UNSEEN in it."""
    # A job that is submitted has arguments and one note: it is not looked at part by part.
    if _is_as_submitted(record) and type(record.metadata) is dict and _is_headed_well(_head_of(record)):
        known_plain = record.args is not None and is_plain(record.args[0]) and is_plain(record.metadata)
    else:
        _refuse_odd(record, _RECORD_KINDS)
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
    return tuple(map(type, head)) in _KINDS_OF_HEAD and head[0] in _STATUSES


def _made_plain(record: JobRecord) -> JobRecord:
    record = msgspec.structs.replace(record)
    if record.error is not None:
        record.error = encode_error(record.error)  # type: ignore[assignment] # the form that is stored
    for name in _PARTS:
        if (value := getattr(record, name)) is not None:
            setattr(record, name, Plain(_CALLED[name]).of(value))
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
    return _record_of(_decoded(_record_decoder, data[1:]))


def decode_records(data: bytes | bytearray) -> tuple[list[int], list[JobRecord]]:
    """Read what :func:`encode_records` wrote: the numbers, and the records.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    numbers, stored = _decoded(_records_decoder, data)
    if numbers:
        _refuse_unless_as_many(numbers, stored)
    return numbers, [_record_of(one) for one in stored]


def _record_of(stored: _StoredRecord) -> JobRecord:
    _refuse_unless(dict, stored.kwargs, stored.metadata, stored.extra)
    _refuse_unless(str, stored.function, stored.owner)
    record = JobRecord(*msgspec.structs.astuple(stored))
    if stored.error is not None:
        record.error = decode_error(stored.error)
    return record


def encode_change(change: JobChange) -> bytes:
    """Write what a change sets as bytes: all of it but ``id`` and ``by``, which say where and on what condition.

    Raises:
        UnstorableError: there is something in it that cannot be kept; the message gives the way to it.
    """
    stored = _stored(change)
    if is_plain(stored):
        try:
            return encoder.encode(stored)
        except _UNSEEN:
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
    except _UNSEEN:
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
    if not are_flat(notes):
        notes = [one if is_plain(one) else _plain("metadata", one) for one in notes]
    try:
        return encoder.encode((numbers, statuses, outs, notes))
    except _UNSEEN:
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
        except _UNSEEN:
            pass
    return [encode_change(change) for change in changes]


def _end(change: JobChange) -> dict[str, Any]:
    return {"status": change.status, "out": change.out, "error": None, "metadata": change.metadata}


def _says_ended_well(change: JobChange) -> bool:
    return (
        change.error is None
        and type(change.status) is int
        and change.status in _STATUSES
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
    _refuse_odd(change, _CHANGE_KINDS)
    stored = {name: value for name, absent in _ABSENT.items() if (value := getattr(change, name)) is not absent}
    if type(change.error) is JobError:
        stored["error"] = encode_error(change.error)
    return stored


def _plain_parts(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(name, value) for name, value in stored.items()}


def _plain(name: str, value: Any) -> Any:
    return Plain(_CALLED[name]).of(value)


def decode_change(data: bytes | bytearray) -> JobChange:
    """Read what :func:`encode_change` wrote; fields that a later release has added are left out.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    return _change_of(_decoded(_change_decoder, data))


def decode_changes(data: bytes | bytearray) -> tuple[list[int], list[JobChange]]:
    """Read what :func:`encode_changes` wrote: the numbers, and the changes.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    numbers, stored = _decoded(_changes_decoder, data)
    _refuse_unless_as_many(numbers, stored)
    return numbers, [_change_of(one) for one in stored]


def decode_ends(data: bytes | bytearray) -> tuple[list[int], list[JobChange]]:
    """Read what :func:`encode_ends` wrote: the numbers, and the changes.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    numbers, statuses, outs, notes = _decoded(_ends_decoder, data)
    _refuse_unless_as_many(numbers, statuses, outs, notes)
    _refuse_unless(dict, *notes)
    return numbers, [
        JobChange("", status=status, out=out, error=None, metadata=metadata)
        for status, out, metadata in zip(statuses, outs, notes, strict=True)
    ]


def _change_of(stored: _StoredChange) -> JobChange:
    _refuse_unless(dict, stored.kwargs, stored.metadata, stored.extra)
    change = JobChange("", *msgspec.structs.astuple(stored))
    if stored.error is not UNSET and stored.error is not None:
        change.error = decode_error(stored.error)
    return change


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


def key_of(function: str | None, args: Mapping[str, Any]) -> bytes:
    """Give the key under which a configuration of a run-function is recognised again.

    Two keys are equal when the configurations are, whether or not they have been stored and read since: the order of
    keys means nothing, nor does list or tuple, Python's number or NumPy's, Enum or its value. 1, 1.0 and True differ:
    to a run-function they may mean different things, and a result that is wrongly taken over does more harm than a job
    that is run again.

    Raises:
        UnstorableError: there is something in the configuration that cannot be stored, so it has no key.
    """
    try:
        if is_plain(args):
            return sorting_encoder.encode((function, args))
    except _UNSEEN:
        pass  # and the encoder sorts no keys but str
    plain = Plain("configuration", canonical=True)
    return sorting_encoder.encode((plain.of(function), plain.of(args)))


def _refuse_odd(value: JobRecord | JobChange, kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Raise if a part is of a kind that could be written, and not be read as what it is."""
    for name, kind in kinds.items():
        part = getattr(value, name)
        is_right = isinstance(part, kind) and not (isinstance(part, bool) and bool not in kind)
        if name == "status" and type(part) is not UnsetType:
            is_right = is_right and part in _STATUSES
        if name == "intermediate" and part is not None:
            is_right = is_right and len(part) == 2  # noqa: PLR2004 - a budget and an objective
        if not is_right:
            names = " or ".join(_KINDS_CALLED.get(one, one.__name__) for one in kind if one is not UnsetType)
            raise UnstorableError(
                f"the {_CALLED[name]} of a job cannot be stored: it should be {names}, not {part!r:.80}"
            )


_NONE: Final = type(None)
_KINDS_CALLED: Final = {_NONE: "None", Mapping: "dict"}
_STATUSES: Final = range(-(2**31), 2**31)
_CHANGE_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "status": (int, UnsetType),
    "args": (tuple, list, _NONE, UnsetType),
    "kwargs": (Mapping, _NONE, UnsetType),
    "error": (JobError, _NONE, UnsetType),
    "metadata": (Mapping, _NONE),
    "intermediate": (tuple, list, _NONE),
    "extra": (Mapping, _NONE),
}
_RECORD_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "status": (int,),
    "args": (tuple, list, _NONE),
    "kwargs": (Mapping, _NONE),
    "error": (JobError, _NONE),
    "metadata": (Mapping, _NONE),
    "budgets": (list, _NONE),
    "objectives": (list, _NONE),
    "function": (str, _NONE),
    "owner": (str, _NONE),
    "attempts": (int,),
    "is_private": (bool,),
    "extra": (Mapping, _NONE),
}
_head_of: Final = attrgetter("status", "function", "owner", "attempts", "is_private", "budgets")
_KINDS_OF_HEAD: Final = frozenset(
    (int, function, owner, int, bool, _NONE) for function in (str, _NONE) for owner in (str, _NONE)
)


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


_CALLED: Final = {
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
_PARTS: Final = [
    name for name in _CALLED if name in JobRecord.__struct_fields__ and name not in {"attempts", "is_private"}
]
_parts_of: Final[Callable[[JobRecord], tuple[Any, ...]]] = attrgetter(*_PARTS)


def _refuse_unless_as_many(numbers: list[int], *columns: list[Any]) -> None:
    for column in columns:
        if len(column) != len(numbers):
            raise CorruptStoreError(f"stored bytes hold {len(column)} values for {len(numbers)} jobs")


def _refuse_unless(kind: type, *values: Any) -> None:
    for value in values:
        if value is not None and value is not UNSET and type(value) is not kind:
            raise CorruptStoreError(f"stored bytes hold {value!r:.80} in place of {kind.__name__}")


def _decoded(decoder: msgspec.msgpack.Decoder[Any], data: bytes | bytearray) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, MemoryError) as exc:
        # Damaged data may hold anything: what is no value for its type, a million brackets, a list of four billion.
        raise CorruptStoreError(f"stored bytes cannot be read ({exc}): {bytes(memoryview(data)[:32])!r}…") from exc


_decoder: Final = msgspec.msgpack.Decoder(ext_hook=read_ext)
_change_decoder: Final = msgspec.msgpack.Decoder(_StoredChange, ext_hook=read_ext)
_changes_decoder: Final = msgspec.msgpack.Decoder(tuple[list[int], list[_StoredChange]], ext_hook=read_ext)
_ends_decoder: Final = msgspec.msgpack.Decoder(tuple[list[int], list[int], list[Any], list[Any]], ext_hook=read_ext)
_record_decoder: Final = msgspec.msgpack.Decoder(_StoredRecord, ext_hook=read_ext)
_records_decoder: Final = msgspec.msgpack.Decoder(tuple[list[int], list[_StoredRecord]], ext_hook=read_ext)
