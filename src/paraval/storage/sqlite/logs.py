"""What the row of a job holds: a log of frames, the first with the record as it was made, then one for each change.

A change is appended without a look at what is there, so that it costs no reading; whoever reads a job goes through its
log. A frame has a checksum, into which goes the id of its row: SQLite itself does not notice when bits of a file flip.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, Final
from zlib import crc32

from paraval.errors import CorruptStoreError
from paraval.storage.codec import decode, decode_change, decode_record, encode
from paraval.storage.records import JobRecord

__all__ = ["DamageError", "frame", "frames", "read_log", "sealed", "unsealed"]

_HEAD: Final = struct.Struct(">II")  # the length of what follows, and its checksum
_pack: Final = _HEAD.pack


class DamageError(CorruptStoreError):
    """Something is not as it was written; who raises it does not know in which file."""


def frame(data: bytes, row: int) -> bytes:
    """Give the frame around encoded bytes that belongs into this row."""
    return _pack(len(data), crc32(data, row & 0xFFFFFFFF)) + data


def frames(datas: Iterable[bytes], rows: Iterable[int]) -> list[bytes]:
    """Give the frames around encoded bytes that belong into these rows."""
    return [
        _pack(len(data), crc32(data, row & 0xFFFFFFFF)) + data  # as frame() does
        for data, row in zip(datas, rows, strict=False)
    ]


def read_log(log: bytes, row: int) -> JobRecord:
    """Give the record that a log amounts to.

    Raises:
        DamageError: it is not as it was written.
    """
    datas = _unframed(log, row)
    if not datas:
        raise DamageError("it has no record")
    try:
        record = decode_record(datas[0])
        for data in datas[1:]:
            decode_change(data).apply_to(record)
    except CorruptStoreError as exc:
        raise DamageError(str(exc)) from exc
    return record


def sealed(value: Any, what: str) -> bytes:
    """Write a value that is not a job's, with a checksum.

    Raises:
        UnstorableError: there is something in it that cannot be kept.
    """
    return frame(encode(value, what), 0)


def unsealed(data: bytes) -> Any:
    """Read what :func:`sealed` gave.

    Raises:
        DamageError: it is not as it was written.
    """
    datas = _unframed(data, 0)
    if len(datas) != 1:
        raise DamageError("it is not one value")
    try:
        return decode(datas[0])
    except CorruptStoreError as exc:
        raise DamageError(str(exc)) from exc


def _unframed(log: bytes, row: int) -> list[bytes]:
    if type(log) is not bytes:  # a column of SQLite may hold anything
        raise DamageError(f"it is {log!r:.80}")
    found = []
    seed = row & 0xFFFFFFFF
    start, end = 0, len(log)
    while start < end:
        if end - start < _HEAD.size:
            raise DamageError("it is cut short")
        length, checksum = _HEAD.unpack_from(log, start)
        start += _HEAD.size
        data = log[start : start + length]
        if len(data) < length or crc32(data, seed) != checksum:
            raise DamageError("its checksum is wrong")
        found.append(data)
        start += length
    return found
