"""What is kept beside the jobs: values of searches, and the leases of drivers. Each has a checksum."""

from __future__ import annotations

import sqlite3
import struct
from typing import Any, Final
from zlib import crc32

from paraval.errors import CorruptStoreError
from paraval.storage.codec import decode, encode
from paraval.storage.sqlite.entries import DamageError
from paraval.storage.sqlite.rows import Search

__all__ = ["NO_LEASES", "find_value", "keep_value", "place_of", "read_leases", "sealed", "unsealed", "write_leases"]


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
        found = connection.execute("SELECT search, key, value FROM search_values WHERE search = ?", (search.number,))
        seals = {there: _seal_at(number, there, value) for number, there, value in found}
        if key in seals:
            raise DamageError(f"the value {key!r} of search '{search.number}' is there, and not found")
        total = sum(seals.values())
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


def read_leases(connection: sqlite3.Connection) -> dict[str, float]:
    """Give when the lease of each owner ends, in seconds since 1970 by the host's clock; infinity: never.

    Raises:
        DamageError: it is not as it was written.
    """
    found = connection.execute("SELECT data FROM leases").fetchall()
    if len(found) != 1:
        raise DamageError(f"of its leases, there are {len(found)} lists")
    try:
        leases: dict[str, float] = unsealed(found[0][0], _LEASES)
    except DamageError as exc:
        raise DamageError(f"its leases cannot be read: {exc}") from exc
    return leases


def write_leases(connection: sqlite3.Connection, leases: dict[str, float]) -> None:
    """Put these in the place of those that were there."""
    connection.execute("UPDATE leases SET data = ?", (sealed(leases, "lease", _LEASES),))


# -- checksums ---------------------------------------------------------------------------------------------------------

_HEAD: Final = struct.Struct(">II")  # the length of what follows, and its checksum, into which goes its place


def place_of(search_id: str, key: str) -> bytes:
    """Say where a value of a search is, for its checksum."""
    return f"{search_id}/{key}".encode("utf-8", "surrogatepass")


def sealed(value: Any, what: str, place: bytes) -> bytes:
    """Write a value with a checksum.

    Raises:
        UnstorableError: there is something in it that cannot be kept.
    """
    data = encode(value, what)
    return _HEAD.pack(len(data), crc32(data, crc32(place))) + data


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
    length, checksum = _HEAD.unpack_from(data)
    if len(data) != _HEAD.size + length or crc32(memoryview(data)[_HEAD.size :], crc32(place)) != checksum:
        raise DamageError("its checksum is wrong")
    return int(checksum)


_LEASES: Final = b"leases"
NO_LEASES: Final = sealed({}, "lease", _LEASES)
"""As it is in a new store."""
