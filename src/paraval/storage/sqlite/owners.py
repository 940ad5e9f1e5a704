"""Who has which jobs: as noted when they were made, and whenever some were adopted.

Each change of a driver is bound to that, so it is looked up for each: what is near the jobs in question is read, and
found to be whole, before it is believed.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from paraval.storage.sqlite.entries import DamageError
from paraval.storage.sqlite.rows import BITS_OF_SUM, MADE, Search, as_json, seal_of

__all__ = ["note_adopted", "owned_by_others"]

_NEAR: Final = 256
"""Jobs that are no further from one another are looked up together."""

# One statement, as each costs as much as reading some rows does.
_NOTES: Final = f"""
SELECT first, count, owner, changed, seal FROM new_jobs WHERE first BETWEEN {MADE.format("first", ":low")} AND :high
UNION ALL SELECT job, NULL, owner, NULL, seal FROM adopted
WHERE job BETWEEN :low >> {BITS_OF_SUM} << {BITS_OF_SUM} AND :high | {2**BITS_OF_SUM - 1}
UNION ALL SELECT NULL, NULL, NULL, NULL, ifnull(sum(adopted), 0) FROM sums
WHERE jobs BETWEEN :low >> {BITS_OF_SUM} AND :high >> {BITS_OF_SUM}
"""  # noqa: S608 - made of constants
_NOTE: Final = """
REPLACE INTO adopted SELECT json_extract(value, '$[0]'), :owner, json_extract(value, '$[1]') FROM json_each(:where)
"""
_ADD_TO_SUMS: Final = """
INSERT INTO sums SELECT json_extract(value, '$[0]'), 0, json_extract(value, '$[1]') FROM json_each(:where) WHERE true
ON CONFLICT (jobs) DO UPDATE SET adopted = adopted + excluded.adopted
"""


def owned_by_others(
    connection: sqlite3.Connection, search: Search, numbers: Sequence[int], owner: str
) -> frozenset[int]:
    """Give the numbers of those of these jobs that are not this owner's.

    Raises:
        DamageError: what is noted of jobs near them is not what was written.
    """
    others: set[int] = set()
    first = search.first
    for near, low, high in _near(numbers):
        notes = _noted(connection, first + low, first + high)
        if notes.adopted or any(made_by != owner for made_by in notes.made_by):
            others.update(number for number in near if notes.owner(first + number) != owner)
    return frozenset(others)


def note_adopted(connection: sqlite3.Connection, search: Search, numbers: Sequence[int], owner: str) -> None:
    """Note who has jobs from now on.

    Raises:
        DamageError: as for :func:`owned_by_others`.
    """
    seals = {row: _seal(row, owner) for row in {search.first + number for number in numbers}}
    more = Counter[int]()
    for row, seal in seals.items():
        more[row >> BITS_OF_SUM] += seal
    for _, low, high in _near(numbers):
        notes = _noted(connection, search.first + low, search.first + high)
        for row, (_, seal) in notes.adopted.items():
            if row in seals:
                more[row >> BITS_OF_SUM] -= seal
    connection.execute(_NOTE, {"owner": owner, "where": as_json(list(seals.items()))})
    connection.execute(_ADD_TO_SUMS, {"where": as_json(list(more.items()))})


class _Notes(NamedTuple):
    """Who has the jobs from one to another.

    Attributes:
        firsts: the rows of jobs from which on one owner made them.
        made_by: the owners.
        adopted: who has which row since, and the checksum of that.
    """

    firsts: list[int]
    made_by: list[str | None]
    adopted: dict[int, tuple[str, int]]

    def owner(self, row: int) -> str | None:
        """Give the owner of a job."""
        if row in self.adopted:
            return self.adopted[row][0]
        return self.made_by[bisect_right(self.firsts, row) - 1]


def _noted(connection: sqlite3.Connection, low: int, high: int) -> _Notes:
    """Read what is noted of the jobs from this row to that, and see that it is whole."""
    *rows, (_, _, _, _, total) = connection.execute(_NOTES, {"low": low, "high": high}).fetchall()
    notes = _Notes([], [], {})
    after = low
    for first, count, owner, changed, seal in rows:
        if count is None:
            if seal != _seal(first, owner):
                raise DamageError("what it says of who has adopted jobs is not what was written")
            notes.adopted[first] = owner, seal
            total -= seal
        else:
            if seal != seal_of(first, count, owner, changed) or (first != after if notes.firsts else first > low):
                raise DamageError("what it says of who made jobs is not what was written")
            notes.firsts.append(first)
            notes.made_by.append(owner)
            after = first + count
    if total != 0 or after <= high:
        raise DamageError("what it says of who has jobs is not all there")
    return notes


def _seal(row: int, owner: str) -> int:
    return seal_of(row, 0, owner, 0)


def _near(numbers: Sequence[int]) -> Iterator[tuple[Sequence[int], int, int]]:
    """Give them in parts, so that few others are between those of one; and the least and the most of each part."""
    low, high = min(numbers), max(numbers)
    if high - low <= 2 * len(numbers) + _NEAR:  # mostly
        yield numbers, low, high
        return
    ordered = sorted(numbers)
    start = 0
    for index, (one, next_one) in enumerate(pairwise(ordered), 1):
        if next_one - one > _NEAR:
            yield ordered[start:index], ordered[start], one
            start = index
    yield ordered[start:], ordered[start], high
