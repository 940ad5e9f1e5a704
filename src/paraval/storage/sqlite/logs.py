"""What the row of a job holds: a log of frames, the first with the record as it was made, then one for each change.

A change is appended without a look at what is there, so that it costs no reading; whoever reads a job goes through its
log. A frame has a checksum, into which goes the id of its row: SQLite itself does not notice when bits of a file flip.
"""

from __future__ import annotations

import struct
from typing import Any, Final
from zlib import crc32

from paraval.errors import CorruptStoreError
from paraval.storage.codec import decode, decode_change, decode_record, encode
from paraval.storage.records import JobRecord

__all__ = ["DamageError", "frame", "read_log", "sealed", "unsealed"]

_HEAD: Final = struct.Struct(">II")  # the length of what follows, and its checksum


class DamageError(CorruptStoreError):
    """Something is not as it was written; who raises it does not know in which file."""


def frame(data: bytes, row: int) -> bytes:
    """Give the frame around encoded bytes that belongs into this row."""
    return _HEAD.pack(len(data), crc32(data, row & 0xFFFFFFFF)) + data


def read_log(log: bytes, row: int) -> JobRecord:
    """Give the record that a log amounts to.

    Raises:
        DamageError: it is not as it was written.
    """
    frames = _frames(log, row)
    if not frames:
        raise DamageError("it has no record")
    try:
        record = decode_record(frames[0])
        for data in frames[1:]:
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
    frames = _frames(data, 0)
    if len(frames) != 1:
        raise DamageError("it is not one value")
    try:
        return decode(frames[0])
    except CorruptStoreError as exc:
        raise DamageError(str(exc)) from exc


def _frames(log: bytes, row: int) -> list[bytes]:
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
