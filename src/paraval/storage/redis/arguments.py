"""Arguments of the scripts of :class:`~paraval.storage.RedisStorage`: many jobs in few of them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from paraval.storage.base import UnknownIdError
from paraval.storage.redis.scripts import NUMBER_SIZE

__all__ = ["Groups", "as_bytes", "as_text", "in_log", "joined", "mark", "once", "packed", "placed", "split"]


class Groups:
    """What is to be done to jobs.

    Attributes:
        by_search: for each search the numbers of the jobs, the conditions, and the frames.
        size: of all frames, in bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self.by_search: dict[str, tuple[list[str], list[str | int], list[bytes]]] = {}

    def add(self, job_id: str, condition: str | int, frame: bytes) -> None:
        """Add what is to be done to one job, if the condition is met."""
        search_id, number = split(job_id)
        group = self.by_search.get(search_id)
        if group is None:
            group = self.by_search[search_id] = ([], [], [])
        group[0].append(number)
        group[1].append(condition)
        group[2].append(frame)
        self.size += len(frame)


def split(job_id: str) -> tuple[str, str]:
    """Give the search and the number of a job.

    Raises:
        UnknownIdError: it is the id of none.
    """
    search_id, dot, number = job_id.rpartition(".")
    if not dot:
        raise UnknownIdError(f"{job_id!r} is no job id: it should look like '0.12' (search, dot, number)")
    if not (number.isdecimal() and number.isascii() and (number[0] != "0" or number == "0") and len(number) < _LONG):
        raise UnknownIdError(f"no job {job_id!r} in this storage")
    return search_id, number


def mark(owner: str | None) -> str:
    """Give an owner as the server compares it; nobody is the empty text."""
    return "" if owner is None else f"={owner}"


def once(items: list[Any]) -> list[Any]:
    """Give what is the same for all only once."""
    return items[:1] if items and items.count(items[0]) == len(items) else items


def packed(items: Sequence[str | int]) -> bytes:
    """Give a list as ``cmsgpack`` of the server's Lua reads it. It knows text, but no bytes."""
    try:
        return _encoder.encode(items)
    except UnicodeEncodeError:  # half a character; the name of nothing that is there
        return _encoder.encode([item if isinstance(item, int) else as_text(as_bytes(item)) for item in items])


def in_log(numbers: Sequence[str]) -> bytes:
    """Give the numbers of jobs as they are in the log."""
    return b"".join([int(number).to_bytes(NUMBER_SIZE) for number in numbers])


def joined(frames: list[bytes]) -> tuple[bytes, bytes]:
    """Give the lengths of frames, packed, and all of them in one piece."""
    return _encoder.encode([*map(len, frames)]), b"".join(frames)


def placed(frames: list[bytes]) -> tuple[bytes, bytes]:
    """Give where the first of frames begins and each ends, and all of them in one piece."""
    ends = [0, *itertools.accumulate(map(len, frames))]
    return struct.pack(f">{len(ends)}I", *ends), b"".join(frames)


def as_bytes(text: str) -> bytes:
    """Give a name as it is written."""
    return text.encode(errors="backslashreplace")


def as_text(stored: bytes) -> str:
    """Give a name as it was given."""
    return stored.decode(errors="backslashreplace")


_LONG: Final = 15
"""Digits that a number of Lua's does not hold."""
_encoder: Final = msgspec.msgpack.Encoder()
