"""How :class:`~paraval.storage.RedisStorage` writes down what happens to a job.

Each event is a frame: its kind (one byte), how many bytes follow (four), those, and their check sum (CRC-32). A job is
all its frames in order: first its record as it was inserted, then the changes of it. The server writes its revision
(six bytes) behind each change.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

from paraval.errors import CorruptStoreError
from paraval.storage.codec import decode, decode_change, decode_record, encode, encode_each_change, encode_each_record
from paraval.storage.records import JobChange, JobRecord, adopt
from paraval.storage.redis.scripts import HEAD, NUMBER_SIZE

__all__ = ["frame_of_adoption", "frames_of_changes", "frames_of_records", "record_of"]

_RECORD, _CHANGE, _ADOPTION = b"R", b"C", b"A"
_HEAD: Final = struct.Struct(">cI")
_TAIL: Final = struct.Struct(">I")


def frames_of_records(records: Sequence[JobRecord]) -> list[bytes]:
    """Write down that jobs were made."""
    return [_frame(_RECORD, data) for data in encode_each_record(records)]


def frames_of_changes(changes: Sequence[JobChange]) -> list[bytes]:
    """Write down that jobs were changed."""
    return [_frame(_CHANGE, data) for data in encode_each_change(changes)]


def frame_of_adoption(owner: str) -> bytes:
    """Write down that a job was adopted."""
    return _frame(_ADOPTION, encode(owner, "owner"))


def _frame(kind: bytes, data: bytes) -> bytes:
    return _HEAD.pack(kind, len(data)) + data + _TAIL.pack(zlib.crc32(data))


def record_of(job_id: str, revision: int, pieces: list[bytes]) -> JobRecord:
    """Make a record of what happened to a job.

    Args:
        job_id: the job.
        revision: of its last change.
        pieces: the job as it was inserted; if it has changed, the parts of its changes and what followed them.

    Raises:
        CorruptStoreError: this is not what was written.
    """
    try:
        inserted, *changes = pieces
        if changes:
            _, owner = HEAD.unpack_from(changes[-1])
            changes[-1] = changes[-1][HEAD.size + owner :]
        record = _replay(b"".join([inserted, bytes(NUMBER_SIZE), *changes]))
    except (CorruptStoreError, struct.error, ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise CorruptStoreError(f"the record of job {job_id!r} is damaged: {exc}") from exc
    record.id, record.revision = job_id, revision
    return record


def _replay(frames: bytes) -> JobRecord:
    record, at = None, 0
    while at < len(frames):
        kind, size = _HEAD.unpack_from(frames, at)
        at += _HEAD.size
        data = frames[at : at + size]
        at += size
        if (zlib.crc32(data),) != _TAIL.unpack_from(frames, at):
            raise CorruptStoreError("a check sum is wrong")
        at += _TAIL.size + NUMBER_SIZE
        if record is None and kind == _RECORD:
            record = decode_record(data)
        elif record is not None and kind == _CHANGE:
            decode_change(data).apply_to(record)
        elif record is not None and kind == _ADOPTION:
            adopt(record, decode(data))
        else:
            raise CorruptStoreError(f"it has {kind!r} where a change should be")
    if record is None or at > len(frames):
        raise CorruptStoreError("its end is missing")
    return record
