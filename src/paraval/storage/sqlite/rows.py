"""The statements, and how many rows go into one.

Many rows are one statement with a fixed number of parameters: all their bytes in one blob, and a JSON array that says
where in it each row's lie. It costs half of what ``executemany`` costs. And a connection lets go of the interpreter's
lock for each step of a statement: with a step for each row, it waits for the turns of other threads again and again.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar
from zlib import crc32

import msgspec

from paraval.storage.base import UnknownIdError
from paraval.storage.sqlite.entries import DamageError, Draft, entry

__all__ = [
    "BITS_OF_SUM",
    "MADE",
    "Found",
    "Search",
    "add_jobs",
    "add_search",
    "are_there",
    "as_json",
    "change_jobs",
    "checked",
    "entries_of",
    "entries_since",
    "index_sums",
    "job_id",
    "numbers_in_one_search",
    "numbers_of",
    "seal_of",
    "search_ids",
    "was_added",
]

T = TypeVar("T")

_BITS: Final = 40
"""A row of a search is the search, shifted left by so many, plus the number of a job, or a revision."""
_MOST: Final = 2**_BITS - 1
"""Of jobs in a search, and of changes."""
BITS_OF_SUM: Final = 6
"""A sum is over the jobs that differ in no more than so many."""
_SEARCHES: Final = 2 ** (63 - _BITS)
_MOST_BYTES: Final = 64_000_000
"""What one statement is given, if it is more than one entry; SQLite itself allows 1 GB."""
_MOST_CHANGES: Final = 2**20
"""In one statement: where in it each lies is told with 22 bits."""

_DIGITS: Final = 13
_FEW: Final = 10

_SEARCH: Final = f"""
SELECT
    (SELECT changed FROM entries WHERE changed BETWEEN :first AND :last ORDER BY changed DESC LIMIT 1),
    (SELECT places FROM sums WHERE jobs = :last >> {BITS_OF_SUM}), latest.*
FROM searches LEFT JOIN (
    SELECT first, count, owner, changed, seal FROM new_jobs
    WHERE first BETWEEN :first AND :last ORDER BY first DESC LIMIT 1
) AS latest WHERE id = :search
"""  # noqa: S608 - made of constants
_ADD_ENTRIES: Final = """
INSERT INTO entries
SELECT
    :first + json_extract(value, '$[0]'), substr(:blob, json_extract(value, '$[1]'), json_extract(value, '$[2]'))
FROM json_each(:where)
"""
_ADD_JOBS: Final = """
INSERT INTO new_jobs
SELECT
    json_extract(value, '$[0]'), json_extract(value, '$[1]'), :owner, json_extract(value, '$[2]'),
    json_extract(value, '$[3]')
FROM json_each(:where)
"""
MADE: Final = "(SELECT {} FROM new_jobs WHERE first <= {} ORDER BY first DESC LIMIT 1)"
# Each number of the array is that of the job, plus 2**40 times that of the change.
_NEW_PLACES: Final = f"""
SELECT :first + (value & {_MOST}) AS job, :before + (value >> {_BITS}) AS changed FROM json_each(:where)
"""  # noqa: S608 - made of constants
_ADD_PLACES: Final = f"INSERT INTO places {_NEW_PLACES}"
_SUM: Final = f"sum(3 * (job & {_MOST}) + (changed & {_MOST}))"
"""Over places: no bit of any can change and leave it the same."""
_ADD_SUMS: Final = f"""
INSERT INTO sums SELECT job >> {BITS_OF_SUM}, {_SUM}, 0 FROM ({_NEW_PLACES}) GROUP BY 1
ON CONFLICT (jobs) DO UPDATE SET places = places + excluded.places
"""  # noqa: S608 - likewise
_SINCE: Final = """
SELECT changed, data FROM entries WHERE changed > :since AND changed <= :last ORDER BY changed LIMIT :limit
"""
_PLACES: Final = f"""
SELECT {MADE.format("changed", "value")} FROM json_each(:jobs)
UNION SELECT changed FROM places WHERE job IN (SELECT value FROM json_each(:jobs))
"""  # noqa: S608 - likewise
_LACKS_PLACES: Final = f"""
SELECT EXISTS (
    SELECT 1 FROM (SELECT DISTINCT value >> {BITS_OF_SUM} AS some FROM json_each(:jobs))
    WHERE (SELECT places FROM sums WHERE jobs = some) IS NOT (
        SELECT {_SUM} FROM places
        WHERE job BETWEEN some << {BITS_OF_SUM} AND (some << {BITS_OF_SUM}) + {2**BITS_OF_SUM - 1}
    )
)
"""  # noqa: S608 - likewise
_SUMS: Final = f"""
SELECT
    (SELECT ifnull(sum(places), 0) FROM sums WHERE jobs >= :first >> {BITS_OF_SUM} AND jobs < :last >> {BITS_OF_SUM}),
    count(*), ifnull(sum(first & {_MOST}), 0), ifnull(sum(count), 0), ifnull(sum(changed & {_MOST}), 0)
FROM new_jobs WHERE first BETWEEN :first AND :last
"""  # noqa: S608 - likewise
_AT: Final = "SELECT changed, data FROM entries WHERE changed IN (SELECT value FROM json_each(?)) ORDER BY changed"


class Search(NamedTuple):
    """Where a search goes on.

    Attributes:
        number: of the search.
        next_job: the row of its next job.
        last_change: the row of its last change.
    """

    number: int
    next_job: int
    last_change: int

    @classmethod
    def look_up(cls, connection: sqlite3.Connection, search_id: str) -> Search:
        """Find a search.

        Raises:
            UnknownIdError: there is none of this id.
        """
        number = (
            int(search_id)
            if isinstance(search_id, str) and search_id.isdecimal() and len(search_id) < _DIGITS
            else _SEARCHES
        )
        found = None
        if number < _SEARCHES and str(number) == search_id:
            first = number << _BITS
            found = connection.execute(_SEARCH, {"search": number, "first": first, "last": first + _MOST}).fetchone()
        if found is None:
            known = search_ids(connection)
            if search_id in known:
                raise DamageError(f"search {search_id!r} is there, and not found")
            there = str(known or "none") if len(known) <= _FEW else f"{len(known)}, from '0' on"
            raise UnknownIdError(f"no search {search_id!r:.80} in this storage; it has {there}")
        last_change, num_changes, *latest = found
        first = next_job = number << _BITS
        if latest[0] is not None:
            next_job, count, _, _, seal = latest
            if seal != seal_of(*latest[:-1]):
                raise DamageError(f"what it says of the latest jobs of search {search_id!r} is not what was written")
            next_job += count
        if last_change is None:
            last_change = first
        # Adding a job is a change as well.
        if type(num_changes) is not int or last_change != next_job + num_changes:
            raise DamageError(f"of search {search_id!r}, the latest changes or jobs are missing")
        return cls(number, next_job, last_change)

    @property
    def first(self) -> int:
        """The row of its first job, and the one before that of its first change."""
        return self.number << _BITS

    @property
    def end(self) -> int:
        """The row of its sums that is after all of those of its jobs."""
        return _end(self.number)

    @property
    def size(self) -> int:
        """How many jobs it has."""
        return self.next_job - self.first

    @property
    def revision(self) -> int:
        """Of its last change; 0 if there was none."""
        return self.last_change - self.first


class Found(NamedTuple):
    """An entry as it is stored.

    Attributes:
        changed: where.
        revision: of its last change.
        data: its bytes.
    """

    changed: int
    revision: int
    data: bytes


def search_ids(connection: sqlite3.Connection) -> list[str]:
    """Give the ids of all searches, oldest first.

    Raises:
        DamageError: one is missing.
    """
    found = [number for (number,) in connection.execute("SELECT id FROM searches ORDER BY id")]
    if found != list(range(_count_searches(connection))):
        raise DamageError(f"of its searches, only {found} are there")
    return [str(number) for number in found]


def add_search(connection: sqlite3.Connection, token: bytes) -> int:
    """Add a search; give its number. By the token :func:`was_added` tells it from others of this number.

    Raises:
        DamageError: those that are there already are not those that were made.
    """
    number = _count_searches(connection)
    ((last,),) = connection.execute("SELECT max(id) FROM searches")
    if number != (0 if last is None else last + 1):
        raise DamageError(f"of its {number} searches, the last is {last}")
    connection.execute("INSERT INTO searches VALUES (?, ?)", (number, token))
    connection.execute("INSERT INTO sums VALUES (?, 0, 0)", (_end(number),))
    return number


def was_added(connection: sqlite3.Connection, number: int, token: bytes) -> bool:
    """Whether the search of this number is the one that was added with this token."""
    return connection.execute("SELECT token FROM searches WHERE id = ?", (number,)).fetchall() == [(token,)]


def _count_searches(connection: sqlite3.Connection) -> int:
    """Tell from the sums how many there should be: each has a row, which is after all rows of those before."""
    ((last,),) = connection.execute("SELECT max(jobs) FROM sums")
    return 0 if last is None else (last >> (_BITS - BITS_OF_SUM)) + 1


def _end(number: int) -> int:
    return (number + 1 << _BITS - BITS_OF_SUM) - 1


# -- ids ---------------------------------------------------------------------------------------------------------------


def numbers_in_one_search(job_ids: Sequence[str]) -> tuple[int, list[int]] | None:
    """Give the number of their search and those of the jobs, if they are all of one: in few steps for any number."""
    if len(job_ids) == 1:  # mostly, where jobs come one by one
        search_number, number = numbers_of(job_ids[0])
        return search_number, [number]
    if set(map(type, job_ids)) != {str}:
        return None
    search, dot, _ = job_ids[0].partition(".")
    begin = len(search) + 1
    digits = [job_id[begin:] for job_id in job_ids]
    try:
        numbers = list(map(int, digits))
    except ValueError:
        return None
    is_one = {job_id[:begin] for job_id in job_ids} == {search + dot} and ", ".join(digits) == str(numbers)[1:-1]
    if not is_one or min(numbers) < 0 or max(numbers) > _MOST:
        return None
    return numbers_of(job_ids[0])[0], numbers


def numbers_of(job_id: str) -> tuple[int, int]:
    """Give the number of a job's search, and its own.

    Raises:
        UnknownIdError: there can be no such job.
    """
    if not isinstance(job_id, str):
        raise UnknownIdError(f"{job_id!r} is no job id: it should be a text like '0.12' (search, dot, number)")
    search_id, dot, digits = job_id.rpartition(".")
    try:
        search, number = int(search_id), int(digits)
    except ValueError:
        search = number = -1
    if 0 <= search < _SEARCHES and 0 <= number <= _MOST and f"{search}.{number}" == job_id:
        return search, number
    if not dot:
        raise UnknownIdError(f"{job_id!r} is no job id: it should look like '0.12' (search, dot, number)")
    raise UnknownIdError(f"no job {job_id!r} in this storage")


# -- writing -----------------------------------------------------------------------------------------------------------


def add_jobs(connection: sqlite3.Connection, search: Search, owner: str | None, drafts: Sequence[Draft]) -> Search:
    """Add jobs of one owner; give where the search goes on then."""
    for some in _parts(drafts):
        where, end = [], 0
        for draft in some:
            first, size = search.next_job + end, draft.size
            end += size
            changed = search.last_change + end
            where.append((first, size, changed, seal_of(first, size, owner, changed)))
        connection.execute(_ADD_JOBS, {"owner": owner, "where": as_json(where)})
        _add_entries(connection, search, some)
        search = Search(search.number, search.next_job + end, search.last_change + end)
    return search


def are_there(connection: sqlite3.Connection, search: Search, drafts: Sequence[Draft]) -> bool:
    """Whether these jobs have been added where the search goes on."""
    place = search
    expected = []
    for some in _parts(drafts):
        expected += [Found(search.first + revision, revision, data) for revision, data in _entries(place, some)]
        added = sum(draft.size for draft in some)
        is_new = not some[0].numbers
        place = place._replace(
            next_job=place.next_job + (added if is_new else 0), last_change=place.last_change + added
        )
    return entries_since(connection, search, search.revision, len(drafts)) == expected


def change_jobs(connection: sqlite3.Connection, search: Search, drafts: Sequence[Draft]) -> Search:
    """Change jobs that are there, in this order; give where the search goes on then."""
    for some in _parts(drafts):
        where, end = [], 0
        for draft in some:
            end += draft.size
            place = end << _BITS
            where += [place | number for number in dict.fromkeys(draft.numbers)]
        given = {"first": search.first, "before": search.last_change, "where": as_json(where)}
        connection.execute(_ADD_PLACES, given)
        connection.execute(_ADD_SUMS, given)
        connection.execute("UPDATE sums SET places = places + ? WHERE jobs = ?", (end, search.end))
        _add_entries(connection, search, some)
        search = search._replace(last_change=search.last_change + end)
    return search


def _add_entries(connection: sqlite3.Connection, search: Search, drafts: Sequence[Draft]) -> None:
    datas, where = [], []
    place = 1  # SQLite counts bytes from 1
    for revision, data in _entries(search, drafts):
        datas.append(data)
        where.append((revision, place, len(data)))
        place += len(data)
    given = {"first": search.first, "blob": b"".join(datas), "where": as_json(where)}
    connection.execute(_ADD_ENTRIES, given)


def _entries(search: Search, drafts: Sequence[Draft]) -> Iterator[tuple[int, bytes]]:
    """Give the revision of each entry's last change, and its bytes."""
    size, revision = search.size, search.revision
    for draft in drafts:
        revision += draft.size
        yield revision, entry(draft, size, search.first + revision)
        size += draft.size


def seal_of(first: int, count: int, owner: str | None, changed: int) -> int:
    """Give the checksum of what is said of new jobs, or with nothing but the job and the owner, of one adopted."""
    try:
        numbers = _SEALED.pack(first, count, changed)
        return crc32(b"" if owner is None else b"/" + owner.encode("utf-8", "surrogatepass"), crc32(numbers))
    except (struct.error, AttributeError):  # a column of SQLite may hold anything
        return -1


_SEALED: Final = struct.Struct(">QQQ")


def _parts(drafts: Sequence[Draft]) -> Iterator[Sequence[Draft]]:
    """Give them in as many lists as it takes for none to be too large for one statement."""
    start = size = count = 0
    for index, draft in enumerate(drafts):
        if index > start and (size + len(draft.payload) > _MOST_BYTES or count + draft.size > _MOST_CHANGES):
            yield drafts[start:index]
            start, size, count = index, 0, 0
        size += len(draft.payload)
        count += draft.size
    if drafts:
        yield drafts[start:]


def as_json(values: Sequence[Any]) -> str:
    """Give what a statement takes apart with ``json_each``."""
    return msgspec.json.encode(values).decode()


# -- reading -----------------------------------------------------------------------------------------------------------


def entries_since(connection: sqlite3.Connection, search: Search, since: int, limit: int) -> list[Found]:
    """Give the entries after a revision, oldest first, at most so many."""
    first = search.first
    given = {"since": first + min(max(since, 0), _MOST), "last": first + _MOST, "limit": limit}
    return _found(search, connection.execute(_SINCE, given))


def entries_of(connection: sqlite3.Connection, search: Search, numbers: Sequence[int]) -> list[Found]:
    """Give all entries that speak of these jobs, of which there are such, oldest first.

    Raises:
        DamageError: one is missing.
    """
    jobs = as_json([search.first + number for number in numbers])
    places = [checked(place, int) for (place,) in connection.execute(_PLACES, {"jobs": jobs}).fetchall()]
    found = _found(search, connection.execute(_AT, (as_json(places),)))
    if len(found) != len(places):
        raise DamageError(f"of {len(places)} entries, {len(found)} are there")
    ((lacks_places,),) = connection.execute(_LACKS_PLACES, {"jobs": jobs})
    if lacks_places:
        raise DamageError("what it says of where jobs were changed is not what was written")
    return found


def index_sums(connection: sqlite3.Connection, search: Search) -> tuple[int, ...]:
    """Give sums over all that the indexes say of a search: as :attr:`History.sums` is when they are whole."""
    given = {"first": search.first, "last": search.first + _MOST}
    (sums,) = connection.execute(_SUMS, given).fetchall()
    return tuple(sums)


def _found(search: Search, rows: sqlite3.Cursor) -> list[Found]:
    return [Found(changed, checked(changed, int) - search.first, data) for changed, data in rows.fetchall()]


def checked(value: Any, kind: type[T]) -> T:
    """Give a value of a column, which in SQLite may be of any type."""
    if type(value) is not kind:
        raise DamageError(f"it holds {value!r:.80} in place of {kind.__name__}")
    return value


def job_id(search: Search, number: int) -> str:
    """Give the id of a job."""
    return f"{search.number}.{number}"
