"""The statements, and how many rows go into one.

Many rows are one statement with a fixed number of parameters: all their bytes in one blob, and a JSON array that says
where in it each row's lie. It costs half of what ``executemany`` costs. And a connection lets go of the interpreter's
lock for each step of a statement: with a step for each row, it waits for the turns of other threads again and again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from paraval.storage.base import UnknownIdError
from paraval.storage.sqlite.logs import DamageError

__all__ = [
    "BITS",
    "LONG",
    "Row",
    "Search",
    "append",
    "checked",
    "insert",
    "job_id",
    "put_aside",
    "replace",
    "revision_of",
    "row_id",
    "row_ids",
    "rows_by_change",
    "rows_by_id",
    "search_ids",
]

T = TypeVar("T")

BITS: Final = 40
"""The id of a row is that of the search, shifted left by so many, plus the number of the job."""
_MOST: Final = 2**BITS - 1
"""Of jobs in a search, and of changes."""
_SEARCHES: Final = 2 ** (63 - BITS)
_MOST_BYTES: Final = 64_000_000
"""What one statement is given, if it is more than one row; SQLite itself allows 1 GB."""
LONG: Final = 8000
"""From so many bytes on, a log may be put aside."""

_DIGITS: Final = 13
_FORMAT: Final = b"%%0%dd" % _DIGITS
_FEW: Final = 10

_SEARCH: Final = """
SELECT
    (SELECT id FROM jobs WHERE id BETWEEN :first AND :last ORDER BY id DESC LIMIT 1),
    (SELECT changed FROM jobs WHERE changed BETWEEN :first AND :last ORDER BY changed DESC LIMIT 1)
FROM searches WHERE id = :search
"""
# Each number of the array is 2**31 times the place of a piece in the blob, plus its length.
_INSERT: Final = """
INSERT INTO jobs (id, changed, owner, log)
SELECT :row + key, :change + key, :owner, substr(:blob, (value >> 31) + 1, value & 2147483647) FROM json_each(:places)
"""
# The numbers of the jobs are decimal digits, as many for each.
_PIECES: Final = f"""
INSERT INTO jobs (id, changed, owner, log)
SELECT
    :first + CAST(substr(:numbers, {_DIGITS} * key + 1, {_DIGITS}) AS INTEGER), :change + key, :owner,
    substr(:blob, (value >> 31) + 1, value & 2147483647)
FROM json_each(:places) WHERE true
ON CONFLICT (id) DO UPDATE SET changed = excluded.changed
"""  # noqa: S608 - made of constants
_APPEND: Final = f"{_PIECES}, log = CAST(log || excluded.log AS BLOB) WHERE :owner IS NULL OR owner = :owner"
_REPLACE: Final = f"{_PIECES}, owner = excluded.owner, log = excluded.log"
_PUT_ASIDE: Final = """
INSERT INTO earlier_logs SELECT id, changed, log FROM jobs
WHERE id IN (SELECT value FROM json_each(?)) AND length(log) > ?
"""
_CUT: Final = "UPDATE jobs SET log = x'' WHERE id IN (SELECT value FROM json_each(?)) AND length(log) > ?"
_EARLIER: Final = (
    "SELECT job, log FROM earlier_logs WHERE job IN (SELECT value FROM json_each(?)) ORDER BY job, changed"
)


class Search(NamedTuple):
    """Where a search goes on.

    Attributes:
        number: of the search.
        next_row: the id of the row that its next job gets.
        next_change: what its next change is noted as.
    """

    number: int
    next_row: int
    next_change: int

    @classmethod
    def look_up(cls, connection: sqlite3.Connection, search_id: str) -> Search:
        """Find a search.

        Raises:
            UnknownIdError: there is none of this id.
        """
        number = int(search_id) if search_id.isdecimal() and len(search_id) < _DIGITS else _SEARCHES
        found = None
        if number < _SEARCHES and str(number) == search_id:
            first = number << BITS
            found = connection.execute(_SEARCH, {"search": number, "first": first, "last": first + _MOST}).fetchone()
        if found is None:
            known = search_ids(connection)
            there = str(known or "none") if len(known) <= _FEW else f"{len(known)}, from '0' on"
            raise UnknownIdError(f"no search {search_id!r:.80} in this storage; it has {there}")
        row, change = found
        before = number << BITS
        return cls(number, before if row is None else row + 1, (before if change is None else change) + 1)

    @property
    def size(self) -> int:
        """How many jobs it has."""
        return self.next_row & _MOST

    @property
    def revision(self) -> int:
        """Of its last change; 0 if there was none."""
        return (self.next_change - 1) & _MOST


class Row(NamedTuple):
    """A job as it is stored; ``log`` is all of it."""

    id: int
    changed: int
    owner: str | None
    log: bytes


def search_ids(connection: sqlite3.Connection) -> list[str]:
    """Give the ids of all searches, oldest first.

    Raises:
        DamageError: one is missing.
    """
    found = [number for (number,) in connection.execute("SELECT id FROM searches ORDER BY id")]
    last_row = connection.execute("SELECT id FROM jobs ORDER BY id DESC LIMIT 1").fetchone()
    if found != list(range(len(found))) or (last_row is not None and last_row[0] >> BITS >= len(found)):
        raise DamageError(f"of its searches, only {found} are there")
    return [str(number) for number in found]


def row_id(job_id: str) -> int:
    """Give the id of the row that a job has, if there is one.

    Raises:
        UnknownIdError: there can be none.
    """
    search_id, dot, digits = job_id.rpartition(".")
    try:
        first, number = _first_row(search_id), int(digits)
    except ValueError:
        first = number = -1
    if first >= 0 and 0 <= number <= _MOST and str(number) == digits:
        return first + number
    if not dot:
        raise UnknownIdError(f"{job_id!r} is no job id: it should look like '0.12' (search, dot, number)")
    raise UnknownIdError(f"no job {job_id!r} in this storage")


def row_ids(job_ids: Sequence[str]) -> list[int]:
    """Give the ids of the rows that jobs have, if there are such jobs.

    Raises:
        UnknownIdError: there can be none.
    """
    if not job_ids:
        return []
    first = row_id(job_ids[0]) & ~_MOST
    search_id, skipped = first >> BITS, job_ids[0].index(".") + 1
    try:
        numbers = [int(job_id[skipped:]) for job_id in job_ids]
    except ValueError:
        numbers = []
    # Mostly they are of one search; then all can be looked at in few steps.
    if [f"{search_id}.{number}" for number in numbers] == job_ids and min(numbers) >= 0 and max(numbers) <= _MOST:
        return [first + number for number in numbers]
    return [row_id(job_id) for job_id in job_ids]


def _first_row(search_id: str) -> int:
    """Give the id of the row of a search's first job; -1 if it can have none."""
    number = int(search_id)
    return number << BITS if 0 <= number < _SEARCHES and str(number) == search_id else -1


def job_id(row: int) -> str:
    """Give the id of the job in a row."""
    return f"{row >> BITS}.{row & _MOST}"


def revision_of(changed: int) -> int:
    """Give the revision of a change."""
    return changed & _MOST


# -- writing -----------------------------------------------------------------------------------------------------------


def insert(connection: sqlite3.Connection, search: Search, owner: str | None, logs: Sequence[bytes]) -> Search:
    """Add jobs; give where the search goes on then."""
    row, change = search.next_row, search.next_change
    for some in _parts(logs):
        connection.execute(_INSERT, {"row": row, "change": change, "owner": owner, **_packed(some)})
        row, change = row + len(some), change + len(some)
    put_aside(connection, [search.next_row + index for index, log in enumerate(logs) if len(log) > LONG])
    return Search(search.number, row, change)


def append(
    connection: sqlite3.Connection, search: Search, owner: str | None, rows: Sequence[int], logs: Sequence[bytes]
) -> Search:
    """Add to the logs of jobs that are there, in this order; give where the search goes on then.

    Args:
        connection: in a transaction.
        search: of the jobs.
        owner: leave out the jobs that have another; None: none.
        rows: one for each change; one may be there several times.
        logs: what is added.
    """
    return _write_pieces(connection, _APPEND, search, owner, rows, logs)


def replace(
    connection: sqlite3.Connection, search: Search, owner: str, rows: Sequence[int], logs: Sequence[bytes]
) -> Search:
    """Give jobs that are there new logs and an owner; give where the search goes on then."""
    connection.execute("DELETE FROM earlier_logs WHERE job IN (SELECT value FROM json_each(?))", (_json(rows),))
    return _write_pieces(connection, _REPLACE, search, owner, rows, logs)


def put_aside(connection: sqlite3.Connection, rows: Sequence[int]) -> None:
    """Put what is long of the logs in these rows where it need not be written again with each change."""
    if rows and connection.execute(_PUT_ASIDE, (_json(rows), LONG)).rowcount:
        connection.execute(_CUT, (_json(rows), LONG))


def _write_pieces(
    connection: sqlite3.Connection,
    statement: str,
    search: Search,
    owner: str | None,
    rows: Sequence[int],
    logs: Sequence[bytes],
) -> Search:
    first, change = search.number << BITS, search.next_change
    start = 0
    for some in _parts(logs):
        end = start + len(some)
        numbers = _FORMAT * len(some) % tuple([row & _MOST for row in rows[start:end]])
        given = {"first": first, "change": change + start, "owner": owner, "numbers": numbers, **_packed(some)}
        connection.execute(statement, given)
        start = end
    return Search(search.number, search.next_row, change + start)


def _parts(blobs: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Give the blobs in as many lists as it takes for none to be too large for one statement."""
    if sum(map(len, blobs)) <= _MOST_BYTES:
        if blobs:
            yield blobs
        return
    start = size = 0
    for index, blob in enumerate(blobs):
        if size and size + len(blob) > _MOST_BYTES:
            yield blobs[start:index]
            start, size = index, 0
        size += len(blob)
    yield blobs[start:]


def _packed(blobs: Sequence[bytes]) -> dict[str, bytes | str]:
    places = []
    start = 0
    for blob in blobs:
        length = len(blob)
        places.append(start << 31 | length)
        start += length
    return {"blob": b"".join(blobs), "places": _json(places)}


def _json(numbers: Sequence[int]) -> str:
    return msgspec.json.encode(numbers).decode()


# -- reading -----------------------------------------------------------------------------------------------------------


def rows_by_id(connection: sqlite3.Connection, ids: Sequence[int]) -> dict[int, Row]:
    """Give those of these rows that there are."""
    found = connection.execute(
        "SELECT id, changed, owner, log FROM jobs WHERE id IN (SELECT value FROM json_each(?))", (_json(ids),)
    )
    return {row.id: row for row in _whole(connection, found.fetchall())}


def rows_by_change(connection: sqlite3.Connection, search: Search, since: int, limit: int) -> list[Row]:
    """Give the rows that changed after a revision, in the order of their last change, at most so many."""
    first = search.number << BITS
    found = connection.execute(
        "SELECT id, changed, owner, log FROM jobs WHERE changed > ? AND changed <= ? ORDER BY changed LIMIT ?",
        (first + min(max(since, 0), _MOST), first + _MOST, limit),
    )
    changed = _whole(connection, found.fetchall())
    for row in changed:
        if row.id >> BITS != search.number:
            raise DamageError(f"its index of changes leads from search {search.number} to job {job_id(row.id)!r}")
    return changed


def _whole(connection: sqlite3.Connection, found: list[tuple[Any, ...]]) -> list[Row]:
    """Put before each log what was put aside of it."""
    earlier: dict[int, list[bytes]] = {}
    for row, log in connection.execute(_EARLIER, (_json([values[0] for values in found]),)):
        earlier.setdefault(row, []).append(checked(log, bytes))
    return [
        Row(row, checked(changed, int), owner, b"".join([*earlier.get(row, ()), checked(log, bytes)]))
        for row, changed, owner, log in found
    ]


def checked(value: Any, kind: type[T]) -> T:
    """Give a value of a column, which in SQLite may be of any type."""
    if type(value) is not kind:
        raise DamageError(f"it holds {value!r:.80} in place of {kind.__name__}")
    return value
