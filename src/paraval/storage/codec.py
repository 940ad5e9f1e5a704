"""How values and records are written at rest: MessagePack, never pickle, so that reading them cannot run anything.

What MessagePack does not know of is written as one of its extension types; their codes are below, and never change.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from operator import attrgetter
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.msgpack import Ext

from paraval.errors import CorruptStoreError
from paraval.outcome import JobError
from paraval.storage.base import UnstorableError
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

_BIG_INT, _ODD_TEXT, _DATETIME, _ODD_DICT = 1, 2, 3, 4
_RECORD_VERSION: Final = b"\x01"
_MAX_DEPTH: Final = 100

_KEPT: Final = (
    "a store keeps None, bool, int, float, str, bytes, lists, dicts, datetimes and NumPy arrays; "
    "give it the numbers or the text that matter, or write the object to a file and give the path"
)


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
        if _is_plain(value):
            return _encoder.encode(value)
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # an int of more than 64 bits or half a character, which are written as extension types; or UNSET
    return _encoder.encode(_Plain(what).of(value))


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
    stored = _StoredRecord(*msgspec.structs.astuple(record))
    if record.error is not None:
        stored.error = encode_error(record.error)
    # A job that is submitted has nothing but arguments: it is not looked at part by part.
    is_plain = (
        record.kwargs is None
        and record.out is None
        and record.error is None
        and record.metadata is None
        and record.objectives is None
        and record.extra is None
        and _is_plain(record.args)
    )
    return _RECORD_VERSION + _encode_struct(stored, _RECORD_PARTS, is_plain=is_plain)


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
    record = JobRecord(*msgspec.structs.astuple(stored))
    if stored.args is not None:
        record.args = tuple(stored.args)
    if stored.error is not None:
        record.error = decode_error(stored.error)
    return record


def encode_change(change: JobChange) -> bytes:
    """Write what a change sets as bytes: all of it but ``id`` and ``by``, which say where and on what condition.

    Raises:
        UnstorableError: there is something in it that cannot be kept; the message gives the way to it.
    """
    out, error, metadata = change.out, change.error, change.metadata
    stored = _StoredChange(
        change.status, change.args, change.kwargs, out, error, metadata, change.intermediate, change.extra
    )
    if type(error) is JobError:
        stored.error = encode_error(error)
    # A job that has ended has an output and metadata: it is not looked at part by part.
    is_plain = (
        change.args is UNSET
        and change.kwargs is UNSET
        and type(error) is not JobError
        and change.intermediate is None
        and change.extra is None
        and (metadata is None or _is_plain(metadata))
        and _is_plain(out)
    )
    return _encode_struct(stored, _CHANGE_PARTS, is_plain=is_plain)


def decode_change(data: bytes | bytearray) -> JobChange:
    """Read what :func:`encode_change` wrote; fields that a later release has added are left out.

    Raises:
        CorruptStoreError: it wrote nothing like this.
    """
    stored = _decoded(_change_decoder, data)
    change = JobChange("", *msgspec.structs.astuple(stored))
    if change.args is not UNSET and change.args is not None:
        change.args = tuple(change.args)
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
        if _is_plain(args):
            return _sorting_encoder.encode((function, args))
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # as above; and the encoder sorts no keys but str
    plain = _Plain("configuration", canonical=True)
    return _sorting_encoder.encode((plain.of(function), plain.of(args)))


class _StoredRecord(msgspec.Struct, omit_defaults=True, gc=False):
    """The form of a :class:`JobRecord` at rest: the same fields in the same order, with looser types."""

    id: str = ""
    status: int = 0
    args: Any = None
    kwargs: Any = None
    out: Any = None
    error: Any = None
    metadata: Any = None
    budgets: Any = None
    objectives: Any = None
    function: Any = None
    owner: Any = None
    attempts: int = 0
    is_private: bool = False
    extra: Any = None
    revision: int = 0


class _StoredChange(msgspec.Struct, omit_defaults=True, gc=False):
    """The form of a :class:`JobChange` at rest: the same fields in the same order, with looser types."""

    status: int | UnsetType = UNSET
    args: Any = UNSET
    kwargs: Any = UNSET
    out: Any = UNSET
    error: Any = UNSET
    metadata: Any = None
    intermediate: Any = None
    extra: Any = None


class _Parts:
    """The fields of a struct that may hold anything, and what they are called in a message."""

    def __init__(self, called: Mapping[str, str]) -> None:
        self.called = called
        self.of: Callable[[msgspec.Struct], tuple[Any, ...]] = attrgetter(*called)


_CHANGE_PARTS: Final = _Parts(
    {
        "args": "argument",
        "kwargs": "keyword argument",
        "out": "output",
        "error": "error",
        "metadata": "metadata",
        "intermediate": "intermediate result",
        "extra": "extra value",
    }
)
_RECORD_PARTS: Final = _Parts(
    {
        "args": "argument",
        "kwargs": "keyword argument",
        "out": "output",
        "error": "error",
        "metadata": "metadata",
        "budgets": "budget",
        "objectives": "intermediate objective",
        "function": "name of the run-function",
        "owner": "owner",
        "extra": "extra value",
    }
)


def _encode_struct(stored: msgspec.Struct, parts: _Parts, *, is_plain: bool) -> bytes:
    """Write a struct some of whose fields may hold anything; ``is_plain`` if they are known not to."""
    try:
        if is_plain or _is_plain(parts.of(stored)):
            return _encoder.encode(stored)
    except (OverflowError, UnicodeEncodeError, TypeError):
        pass  # as above; and UNSET is plain as a field of the struct, but not deeper
    for name, what in parts.called.items():
        if (value := getattr(stored, name)) is not UNSET:
            setattr(stored, name, _Plain(what).of(value))
    return _encoder.encode(stored)


_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes, UnsetType})


def _is_plain(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """Whether a value is made of what MessagePack knows, with scalars as keys. It is asked for every value."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) not in _SCALARS or (
                type(item) not in _SCALARS and (not depth or not _is_plain(item, depth - 1))
            ):
                return False
        return True
    if kind is list or kind is tuple:
        for item in value:  # noqa: SIM110 - a generator would cost twice as much
            if type(item) not in _SCALARS and (not depth or not _is_plain(item, depth - 1)):
                return False
        return True
    return kind in _SCALARS


_Place = tuple["_Place | None", str, Any]
"""Where a part of a value is: in what, how that is written, and the key, index or name."""


class _Plain:
    """Makes values plain, so that they can be written.

    Args:
        what: what the value is, for the message.
        canonical: whether equal dicts are to be written as equal bytes, whatever the order of their keys.
    """

    def __init__(self, what: str, *, canonical: bool = False) -> None:
        self._what = what
        self._canonical = canonical
        self._encode = (_sorting_encoder if canonical else _encoder).encode

    def of(self, value: Any) -> Any:
        """Give the plain form of a value.

        Raises:
            UnstorableError: it has none.
        """
        try:
            return self._plain(value, None, _MAX_DEPTH)
        except UnstorableError:
            raise
        except Exception as exc:  # what a property, a __getitem__ or a tolist of someone else's raises
            raise UnstorableError(
                f"the {self._what} cannot be stored: reading it raised {type(exc).__name__}: "
                f"{' '.join(str(exc).split())}"
            ) from exc

    def _plain(self, value: Any, place: _Place | None, depth: int) -> Any:  # noqa: C901, PLR0911, PLR0912 - a case for each kind
        match value:
            case None | bool() | float() if type(value) in _SCALARS:
                return value
            case Enum():
                return self._plain(value.value, (place, ".{}", "value"), depth)
            case int():
                return _plain_int(value)
            case float():
                return float(value)
            case str():
                return _plain_text(value)
            case bytes() | bytearray() | memoryview():
                return bytes(value)
            case datetime() if value == value:  # noqa: PLR0124 - which a NaT of pandas is not
                return Ext(_DATETIME, datetime.isoformat(value).encode())
            case date() | time():
                return value.isoformat()
            case timedelta():
                return value.total_seconds()
            case Decimal() | UUID():
                return str(value)
            case os.PathLike():
                return self._plain(os.fspath(value), place, depth)
        if depth == 0:
            raise UnstorableError(
                f"the {self._what} cannot be stored: it contains itself, or is nested deeper than {_MAX_DEPTH} levels"
            )
        match value:
            case list() | tuple():
                return [self._plain(item, (place, "[{}]", index), depth - 1) for index, item in enumerate(value)]
            case Mapping():
                return self._plain_dict(value, place, depth - 1)
            case AbstractSet():
                return sorted(
                    (self._plain(item, (place, "[{!r}]", item), depth - 1) for item in value), key=self._encode
                )
            case msgspec.Struct():
                return self._plain_fields(value, value.__struct_fields__, place, depth - 1)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._plain_fields(value, [field.name for field in dataclasses.fields(value)], place, depth - 1)
        if hasattr(value, "dtype") and callable(to_list := getattr(value, "tolist", None)):
            listed = to_list()
            if getattr(value.dtype, "kind", "") in "biuf" and _is_plain(listed):
                return listed
            # A number of more than 64 bits (np.longdouble) gives itself.
            return float(listed) if type(listed) is type(value) else self._plain(listed, place, depth - 1)
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        raise UnstorableError(f"the {self._what} cannot be stored: {_written(place)} is a {name}; {_KEPT}")

    def _plain_fields(self, value: Any, names: Iterable[str], place: _Place | None, depth: int) -> dict[str, Any]:
        return {name: self._plain(getattr(value, name), (place, ".{}", name), depth) for name in names}

    def _plain_dict(self, value: Mapping[Any, Any], place: _Place | None, depth: int) -> dict[Any, Any] | Ext:
        pairs = []
        for key, item in value.items():
            there = (place, "[{!r}]", key)
            pairs.append((self._plain(key, (there, " (its {})", "key"), depth), self._plain(item, there, depth)))
        if all(type(key) in _SCALARS for key, _ in pairs):
            plain = dict(pairs)
            if len(plain) == len(pairs) and not (self._canonical and any(type(key) is not str for key in plain)):
                return plain
        encoded = {self._encode(key) for key, _ in pairs}
        if len(encoded) < len(pairs) or any(type(key) is dict for key, _ in pairs):
            raise UnstorableError(
                f"the {self._what} cannot be stored: keys of {_written(place)} that differ here would be the same in "
                "the store, or be dicts there; take numbers or texts for keys"
            )
        if self._canonical:
            pairs.sort(key=lambda pair: self._encode(pair[0]))
        return Ext(_ODD_DICT, self._encode(pairs))


def _written(place: _Place | None) -> str:
    if place is None:
        return "value"
    holder, form, key = place
    return _written(holder) + form.format(key)


def _plain_int(value: int) -> int | Ext:
    value = int(value)
    if -(2**63) <= value < 2**64:
        return value
    return Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _plain_text(value: str) -> str | Ext:
    value = str.__str__(value)  # exactly a str, though it may be an instance of a subclass
    try:
        value.encode()
    except UnicodeEncodeError:  # as in a file name that was no UTF-8
        return Ext(_ODD_TEXT, value.encode("utf-8", "surrogatepass"))
    return value


def _read_ext(code: int, data: memoryview) -> Any:
    if code == _BIG_INT:
        return int.from_bytes(data, "big", signed=True)
    if code == _ODD_TEXT:
        return bytes(data).decode("utf-8", "surrogatepass")
    if code == _DATETIME:
        return datetime.fromisoformat(bytes(data).decode())
    if code == _ODD_DICT:
        return {_hashable(key): value for key, value in _decoder.decode(data)}
    raise ValueError(f"extension type {code} is none of paraval's")


def _hashable(key: Any) -> Any:
    return tuple(_hashable(item) for item in key) if isinstance(key, list) else key


def _decoded(decoder: msgspec.msgpack.Decoder[Any], data: bytes | bytearray) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, MemoryError) as exc:
        # Damaged data may hold anything: what is no value for its type, a million brackets, a list of four billion.
        raise CorruptStoreError(f"stored bytes cannot be read ({exc}): {bytes(memoryview(data)[:32])!r}…") from exc


_encoder: Final = msgspec.msgpack.Encoder()
_sorting_encoder: Final = msgspec.msgpack.Encoder(order="sorted")
_decoder: Final = msgspec.msgpack.Decoder(ext_hook=_read_ext)
_change_decoder: Final = msgspec.msgpack.Decoder(_StoredChange, ext_hook=_read_ext)
_record_decoder: Final = msgspec.msgpack.Decoder(_StoredRecord, ext_hook=_read_ext)
