"""How values and records are written at rest: MessagePack, never pickle, so that reading them cannot run anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from paraval.errors import CorruptStoreError
from paraval.outcome import JobError
from paraval.storage.plain import Plain, encoder, is_plain, read_ext, sorting_encoder
from paraval.storage.records import JobChange, JobRecord

__all__ = [
    "decode",
    "decode_change",
    "decode_error",
    "decode_record",
    "encode",
    "encode_change",
    "encode_error",
    "encode_record",
    "key_of",
]

_RECORD_VERSION: Final = b"\x01"


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
    try:
        if is_plain(value):
            return encoder.encode(value)
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # an int of more than 64 bits or half a character, which are written as extension types; or UNSET
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
    if record.error is not None:
        record = msgspec.structs.replace(record)
        record.error = encode_error(record.error)  # type: ignore[assignment,arg-type] # the form that is stored
    # A job that is submitted has arguments and one note: it is not looked at part by part.
    known_plain = (
        record.kwargs is None
        and record.out is None
        and record.error is None
        and record.objectives is None
        and record.extra is None
        and type(args := record.args) is tuple
        and len(args) == 1
        and is_plain(args[0])
        and is_plain(record.metadata)
    )
    try:
        if known_plain or is_plain(_parts_of(record)):
            return _RECORD_VERSION + encoder.encode(record)
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # as above; and UNSET is plain as a field of the struct, but not deeper
    record = msgspec.structs.replace(record)
    for name in _PARTS:
        if (value := getattr(record, name)) is not None:
            setattr(record, name, Plain(_CALLED[name]).of(value))
    return _RECORD_VERSION + encoder.encode(record)


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
    stored = _decoded(_record_decoder, data[1:])
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
    if (quickly := _encode_end(change)) is not None:
        return quickly
    stored = {name: value for name, absent in _ABSENT.items() if (value := getattr(change, name)) is not absent}
    if type(change.error) is JobError:
        stored["error"] = encode_error(change.error)
    try:
        if is_plain(stored):
            return encoder.encode(stored)
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # as above
    return encoder.encode({name: Plain(_CALLED[name]).of(value) for name, value in stored.items()})


def _encode_end(change: JobChange) -> bytes | None:
    """Write that a job has ended well, which most changes say; None if that is not what this one says."""
    status, out, metadata = change.status, change.out, change.metadata
    if (
        change.error is None
        and status is not UNSET
        and out is not UNSET
        and change.args is UNSET
        and change.kwargs is UNSET
        and change.intermediate is None
        and change.extra is None
        and type(metadata) is dict
        and is_plain(metadata)
        and (type(out) is float or is_plain(out))
    ):
        try:
            return encoder.encode({"status": status, "out": out, "error": None, "metadata": metadata})
        except (OverflowError, UnicodeEncodeError, TypeError):
            pass  # as above
    return None


def decode_change(data: bytes | bytearray) -> JobChange:
    """Read what :func:`encode_change` wrote; fields that a later release has added are left out.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    stored = _decoded(_change_decoder, data)
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
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # as above; and the encoder sorts no keys but str
    plain = Plain("configuration", canonical=True)
    return sorting_encoder.encode((plain.of(function), plain.of(args)))


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
_PARTS: Final = [name for name in _CALLED if name in JobRecord.__struct_fields__]
_parts_of: Final[Callable[[JobRecord], tuple[Any, ...]]] = attrgetter(*_PARTS)


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
_record_decoder: Final = msgspec.msgpack.Decoder(_StoredRecord, ext_hook=read_ext)
