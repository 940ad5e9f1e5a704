"""The plain form of values: what MessagePack knows, and extension types for what it does not.

The codes of the extension types never change: they are in stores.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import chain
from typing import Any, Final
from uuid import UUID

import msgspec
from msgspec import UnsetType
from msgspec.msgpack import Ext

from paraval.storage.base import UnstorableError

__all__ = ["Plain", "are_flat", "encoder", "is_plain", "read_ext", "sorting_encoder"]

encoder: Final = msgspec.msgpack.Encoder()
sorting_encoder: Final = msgspec.msgpack.Encoder(order="sorted")
"""It writes equal dicts as equal bytes; keys must be str."""

_BIG_INT, _ODD_TEXT, _DATETIME, _ODD_DICT = 1, 2, 3, 4
_MAX_DEPTH: Final = 100
_KEPT: Final = (
    "a store keeps None, bool, int, float, str, bytes, lists, dicts, datetimes and NumPy arrays; "
    "give it the numbers or the text that matter, or write the object to a file and give the path"
)
_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes, UnsetType})


def is_plain(value: Any, depth: int = _MAX_DEPTH) -> bool:
    """Whether a value is made of what MessagePack knows, with scalars as keys. It is asked for every value."""
    kind = type(value)
    try:
        if kind is dict:
            for key, item in value.items():
                if type(key) not in _SCALARS or (
                    type(item) not in _SCALARS and (not depth or not is_plain(item, depth - 1))
                ):
                    return False
            return True
        if kind is list or kind is tuple:
            for item in value:
                if type(item) not in _SCALARS and (not depth or not is_plain(item, depth - 1)):
                    return False
            return True
        return kind in _SCALARS  # noqa: TRY300 - it is this that may raise, too
    except Exception:  # noqa: BLE001 - a type that has no hash, as its metaclass wants it
        return False


def are_flat(dicts: Iterable[Any]) -> bool:
    """Whether all are dicts of scalars, which is seen at a third of the cost of :func:`is_plain` for each."""
    dicts = list(dicts)
    if set(map(type, dicts)) != {dict}:
        return False
    keys, items = map(type, chain.from_iterable(dicts)), map(type, chain.from_iterable(map(dict.values, dicts)))
    try:
        return _SCALARS.issuperset(keys) and _SCALARS.issuperset(items)
    except Exception:  # noqa: BLE001 - as in is_plain
        return False


_Place = tuple["_Place | None", str, Any]
"""Where a part of a value is: in what, how that is written, and the key, index or name."""


class Plain:
    """Makes values plain, so that they can be written.

    Args:
        what: what the value is, for the message.
        canonical: whether equal dicts are to be written as equal bytes, whatever the order of their keys.
    """

    def __init__(self, what: str, *, canonical: bool = False) -> None:
        self._what = what
        self._canonical = canonical
        self._encode = (sorting_encoder if canonical else encoder).encode

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
            if getattr(value.dtype, "kind", "") in "biuf" and is_plain(listed):
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
        if not _can_be_keys([self._encode(key) for key, _ in pairs]):
            raise UnstorableError(
                f"the {self._what} cannot be stored: keys of {_written(place)} that differ here would be the same in "
                "the store, or could be none there; take numbers or texts for keys"
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


def read_ext(code: int, data: memoryview) -> Any:
    """Read an extension type.

    Raises:
        ValueError, TypeError: it is none of ours, or damaged.
    """
    if code == _BIG_INT:
        return int.from_bytes(data, "big", signed=True)
    if code == _ODD_TEXT:
        return bytes(data).decode("utf-8", "surrogatepass")
    if code == _DATETIME:
        return datetime.fromisoformat(bytes(data).decode())
    if code == _ODD_DICT:
        return {_hashable(key): value for key, value in _pairs_decoder.decode(data)}
    raise ValueError(f"extension type {code} is none of paraval's")


def _hashable(key: Any) -> Any:
    return tuple(_hashable(item) for item in key) if isinstance(key, list) else key


def _can_be_keys(encoded: list[bytes]) -> bool:
    """Whether they are keys, each another, when they are read."""
    try:
        return len({_hashable(_pairs_decoder.decode(key)) for key in encoded}) == len(encoded)
    except TypeError:
        return False


_pairs_decoder: Final = msgspec.msgpack.Decoder(ext_hook=read_ext)
