"""A call of a storage, and its reply, as bytes that cross to another process: MessagePack, never pickle.

A call is ``[method, arguments]``; a reply is ``[None, result]``, or the name of an exception and its message. Records,
changes and values are in it as bytes, each written by the codec on its own, which tells what cannot cross.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from paraval.errors import (
    BadValueError,
    CorruptStoreError,
    ParavalError,
    StorageError,
    UsageError,
    WrongStoreError,
    WrongTypeError,
)
from paraval.storage.base import Storage, UnknownIdError, UnstorableError
from paraval.storage.codec import decode, decode_change, decode_record, encode, encode_change, encode_record
from paraval.storage.records import JobChange

__all__ = ["answer", "request", "result"]

_METHODS: Final = frozenset({*Storage.__abstractmethods__, "is_connected"})
_EXCEPTIONS: Final[dict[str, type[ParavalError]]] = {
    cls.__name__: cls
    for cls in (
        BadValueError,
        CorruptStoreError,
        StorageError,
        UnknownIdError,
        UnstorableError,
        UsageError,
        WrongStoreError,
        WrongTypeError,
    )
}


def request(method: str, args: tuple[Any, ...]) -> bytes:
    """Write a call.

    Raises:
        UnstorableError: there is something in the arguments that cannot cross.
    """
    return encode([method, _PACK.get(method, list)(args)], "call of the storage")


def answer(storage: Storage, request: bytes) -> bytes:
    """Make a call, and write what came of it; what it raises, too."""
    try:
        return encode([None, _called(storage, request)], "result")
    except Exception as exc:  # noqa: BLE001 - it is raised again where it belongs
        return encode([type(exc).__name__, str(exc)], "error")


def result(method: str, reply: bytes) -> Any:
    """Read what came of a call.

    Raises:
        ParavalError: what the call raised; StorageError where that is of no type of ours.
    """
    error, value = decode(reply)
    if error is None:
        return _UNPACK_RESULT.get(method, _as_it_is)(value)
    if error in _EXCEPTIONS:
        raise _EXCEPTIONS[error](value)
    raise StorageError(f"in the process that holds the storage, {method} raised {error}: {value}")


def _called(storage: Storage, request: bytes) -> Any:
    method, packed = decode(request)
    if method not in _METHODS:
        raise UsageError(f"a storage that is called from another process has no method {method!r}")
    args = _UNPACK.get(method, _as_it_is)(packed)
    value = getattr(storage, method)(*args)
    if method == "insert":
        return [record.id for record in args[1]]
    return _PACK_RESULT.get(method, _as_it_is)(value)


def _pack_change(change: JobChange) -> list[Any]:
    return [change.id, change.by, encode_change(change)]


def _unpack_change(packed: list[Any]) -> JobChange:
    job_id, by, data = packed
    change = decode_change(data)
    change.id, change.by = job_id, by
    return change


def _as_it_is(value: Any) -> Any:
    return value


_Translation = dict[str, Callable[[Any], Any]]
_PACK: Final[_Translation] = {
    "insert": lambda args: [args[0], [encode_record(record) for record in args[1]]],
    "update": lambda args: [[_pack_change(change) for change in args[0]]],
    "put_value": lambda args: [args[0], args[1], encode(args[2], "value of the search")],
}
_UNPACK: Final[_Translation] = {
    "insert": lambda args: [args[0], [decode_record(data) for data in args[1]]],
    "update": lambda args: [[_unpack_change(packed) for packed in args[0]]],
    "put_value": lambda args: [args[0], args[1], decode(args[2])],
}
_PACK_RESULT: Final[_Translation] = {
    "get": lambda records: [encode_record(record) for record in records],
    "scan": lambda found: [[encode_record(record) for record in found[0]], found[1]],
    "get_value": lambda value: encode(value, "value of the search"),
    "owners": sorted,
    "adopt": sorted,
}
_UNPACK_RESULT: Final[_Translation] = {
    "get": lambda records: [decode_record(data) for data in records],
    "scan": lambda found: ([decode_record(data) for data in found[0]], found[1]),
    "get_value": decode,
}
