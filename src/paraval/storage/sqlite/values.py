"""What is kept beside the jobs: values of searches, and the leases of drivers. Each has a checksum."""

from __future__ import annotations

import functools
import sqlite3
import struct
import time
import uuid
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from paraval.errors import CorruptStoreError
from paraval.storage.codec import decode, encode
from paraval.storage.sqlite.entries import DamageError
from paraval.storage.sqlite.rows import Search

__all__ = [
    "NO_LEASES",
    "find_value",
    "is_running",
    "keep_value",
    "lease_for",
    "place_of",
    "read_leases",
    "sealed",
    "unsealed",
    "write_leases",
]


# -- values of searches ------------------------------------------------------------------------------------------------


def keep_value(connection: sqlite3.Connection, search: Search, key: str, data: bytes) -> None:
    """Keep what :func:`sealed` gave for this place; it takes the place of what was there.

    Raises:
        DamageError: what was there is not as it was written.
    """
    before = _data_at(connection, search, key)
    more = _seal_at(search.number, key, data) - (0 if before is None else _seal_at(search.number, key, before))
    connection.execute("REPLACE INTO search_values VALUES (?, ?, ?)", (search.number, key, data))
    connection.execute("UPDATE sums SET adopted = adopted + ? WHERE jobs = ?", (more, search.end))


def find_value(connection: sqlite3.Connection, search: Search, key: str) -> bytes | None:
    """Give what is kept at a place; None if there never was anything.

    Raises:
        DamageError: there is nothing, and something of the search's values is not as it was written.
    """
    data: bytes | None = _data_at(connection, search, key)
    if data is None:  # which is rare: it may be here under another name
        found = connection.execute(
            "SELECT key, typeof(value), substr(value, 1, ?) FROM search_values WHERE search = ?",
            (_HEAD.size, search.number),
        )
        total = 0
        for there, kind, head in found:
            if there == key:
                raise DamageError(f"the value {key!r} of search '{search.number}' is there, and not found")
            is_there = kind == "blob" and len(head) == _HEAD.size and type(there) is str
            _, seal, of_place = _HEAD.unpack(head) if is_there else (0, 0, -1)
            if not is_there or of_place != crc32(place_of(str(search.number), there)):
                raise DamageError(
                    f"the value {there!r} of search '{search.number}' cannot be read: its checksum is wrong"
                )
            total += seal
        if connection.execute("SELECT adopted FROM sums WHERE jobs = ?", (search.end,)).fetchall() != [(total,)]:
            raise DamageError(f"search '{search.number}' lacks values")
    return data


def _data_at(connection: sqlite3.Connection, search: Search, key: str) -> Any:
    found = connection.execute(
        "SELECT value FROM search_values WHERE search = ? AND key = ?", (search.number, key)
    ).fetchone()
    return None if found is None else found[0]


def _seal_at(search: int, key: str, data: bytes) -> int:
    try:
        return _seal(data, place_of(str(search), key))
    except DamageError as exc:
        raise DamageError(f"the value {key!r} of search '{search}' cannot be read: {exc}") from exc


# -- leases ------------------------------------------------------------------------------------------------------------


Lease = list[Any]
"""By which boot of which machine it was given, when it ends by that one's monotonic clock, and by the time of the day.

The first two hold for who shares them: the time of the day may be set, and goes on while the machine sleeps and nobody
can renew a lease. The last is for everybody else.
"""


def lease_for(seconds: float) -> Lease:
    """Give a lease that begins now."""
    return [_boot(), time.monotonic() + seconds, time.time() + seconds]


def is_running(lease: Lease) -> bool:
    """Whether a lease has not ended."""
    boot, ends, ends_at = lease
    return bool(ends > time.monotonic() if boot == _boot() else ends_at > time.time())


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().decode().strip()
    except OSError:  # not Linux
        return uuid.uuid4().hex  # so each process goes by the time of the day with all others


def read_leases(connection: sqlite3.Connection) -> dict[str, Lease]:
    """Give the lease of each owner.

    Raises:
        DamageError: it is not as it was written.
    """
    found = connection.execute("SELECT data FROM leases").fetchall()
    if len(found) != 1:
        raise DamageError(f"of its leases, there are {len(found)} lists")
    try:
        leases: dict[str, Lease] = unsealed(found[0][0], _LEASES)
    except DamageError as exc:
        raise DamageError(f"its leases cannot be read: {exc}") from exc
    return leases


def write_leases(connection: sqlite3.Connection, leases: dict[str, Lease]) -> None:
    """Put these in the place of those that were there."""
    connection.execute("UPDATE leases SET data = ?", (sealed(leases, "lease", _LEASES),))


# -- checksums ---------------------------------------------------------------------------------------------------------

_HEAD: Final = struct.Struct(">III")  # the length of what follows; its checksum, into which goes its place; the place's


def place_of(search_id: str, key: str) -> bytes:
    """Say where a value of a search is, for its checksum."""
    return f"{search_id}/{key}".encode("utf-8", "surrogatepass")


def sealed(value: Any, what: str, place: bytes) -> bytes:
    """Write a value with a checksum.

    Raises:
        UnstorableError: there is something in it that cannot be kept.
    """
    data = encode(value, what)
    return _HEAD.pack(len(data), crc32(data, crc32(place)), crc32(place)) + data


def unsealed(data: bytes, place: bytes) -> Any:
    """Read what :func:`sealed` gave for this place.

    Raises:
        DamageError: it is not as it was written.
    """
    _seal(data, place)
    try:
        return decode(data[_HEAD.size :])
    except CorruptStoreError as exc:
        raise DamageError(str(exc)) from exc


def _seal(data: bytes, place: bytes) -> int:
    """Give the checksum, if it is right."""
    if type(data) is not bytes:  # a column of SQLite may hold anything
        raise DamageError(f"it is {data!r:.80}")
    if len(data) < _HEAD.size:
        raise DamageError("it is cut short")
    length, checksum, of_place = _HEAD.unpack_from(data)
    is_whole = len(data) == _HEAD.size + length and of_place == crc32(place)
    if not is_whole or crc32(memoryview(data)[_HEAD.size :], of_place) != checksum:
        raise DamageError("its checksum is wrong")
    return int(checksum)


_LEASES: Final = b"leases"
NO_LEASES: Final = sealed({}, "lease", _LEASES)
"""As it is in a new store."""
