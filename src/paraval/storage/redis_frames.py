"""How :class:`~paraval.storage.RedisStorage` writes down what happens to a job.

Each event is a frame: its kind (one byte), how many bytes follow (four), and those. A job is all its frames, in order:
first its record as it was inserted, then the changes of it.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from msgspec import UNSET

from paraval.errors import CorruptStoreError
from paraval.storage.codec import decode, decode_error, decode_record, encode, encode_error, encode_record
from paraval.storage.records import JobChange, JobRecord, adopt
from paraval.storage.redis_scripts import HEAD

__all__ = ["frame_of_adoption", "frame_of_change", "frame_of_record", "record_of"]

_RECORD, _CHANGE, _ADOPTION = b"R", b"C", b"A"
_HEAD: Final = struct.Struct(">cI")
_head: Final = _HEAD.pack


def frame_of_record(record: JobRecord) -> bytes:
    """Write down that a job was made."""
    data = encode_record(record)
    return _head(_RECORD, len(data)) + data


def frame_of_change(change: JobChange) -> bytes:
    """Write down that a job was changed."""
    stored: dict[str, Any] = {}
    if change.status is not UNSET:
        stored["status"] = change.status
    if change.args is not UNSET:
        stored["args"] = change.args
    if change.kwargs is not UNSET:
        stored["kwargs"] = change.kwargs
    if change.out is not UNSET:
        stored["out"] = change.out
    if change.error is not UNSET:
        stored["error"] = None if change.error is None else encode_error(change.error)
    if change.metadata is not None:
        stored["metadata"] = change.metadata
    if change.intermediate is not None:
        stored["intermediate"] = change.intermediate
    if change.extra is not None:
        stored["extra"] = change.extra
    data = encode(stored, "change of a job")
    return _head(_CHANGE, len(data)) + data


def frame_of_adoption(owner: str) -> bytes:
    """Write down that a job was adopted."""
    data = encode(owner, "owner")
    return _head(_ADOPTION, len(data)) + data


def record_of(job_id: str, value: bytes | list[bytes]) -> JobRecord:
    """Make a record of what happened to a job.

    Args:
        job_id: the job.
        value: its value on the server; and the parts of it that were written before.

    Raises:
        CorruptStoreError: this is not what was written.
    """
    try:
        value, *parts = [value] if isinstance(value, bytes) else value
        high, low, _, owner = HEAD.unpack_from(value)
        record = _replay(b"".join([*parts, value[HEAD.size + owner :]]))
    except (CorruptStoreError, struct.error, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptStoreError(f"the record of job {job_id!r} is damaged: {exc}") from exc
    record.id, record.revision = job_id, high << 32 | low
    return record


def _replay(frames: bytes) -> JobRecord:
    record, at = None, 0
    while at < len(frames):
        kind, size = _HEAD.unpack_from(frames, at)
        at += _HEAD.size + size
        if at > len(frames):
            raise CorruptStoreError("its end is missing")
        data = frames[at - size : at]
        if record is None and kind == _RECORD:
            record = decode_record(data)
        elif record is not None and kind == _CHANGE:
            _change_of(decode(data)).apply_to(record)
        elif record is not None and kind == _ADOPTION:
            adopt(record, decode(data))
        else:
            raise CorruptStoreError(f"it has {kind!r} where a change should be")
    if record is None:
        raise CorruptStoreError("it is empty")
    return record


def _change_of(stored: dict[str, Any]) -> JobChange:
    if stored.get("args") is not None:
        stored["args"] = tuple(stored["args"])
    if stored.get("error") is not None:
        stored["error"] = decode_error(stored["error"])
    return JobChange("", **stored)
