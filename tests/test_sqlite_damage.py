"""Bits of a SQLite store that flip: what was written is there, or it is told that it is not; never anything else.

``PARAVAL_DAMAGE=all`` flips every bit of the file, which takes the better part of an hour.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from paraval.errors import CorruptStoreError, StorageError
from paraval.storage import JobChange, JobRecord, MemoryStorage, SqliteStorage, Storage
from paraval.testing.comparing import fields, same

STEP = 1 if os.environ.get("PARAVAL_DAMAGE") == "all" else 89
"""Bytes from one that is damaged to the next."""
OWNERS = ("me", "them", "new")
KEYS = ("a", "b", "long")


@pytest.fixture
def path(new_path: Callable[[], Path]) -> Path:
    return new_path()


def fill(storage: Storage) -> None:
    """Write something of every kind: in several searches, by several owners, some of which adopt jobs."""
    for number, count in enumerate((130, 0, 66, 1)):
        assert storage.new_search() == str(number)
        for start in range(0, count, 40):
            owner = OWNERS[start // 40 % 2] if number == 0 else "me"
            some = range(start, min(start + 40, count))
            storage.insert(str(number), [JobRecord(args=({"x": x},), owner=owner, function="f") for x in some])
        storage.update([JobChange(f"{number}.{job}", status=2, out=job / 7) for job in range(0, count, 3)])
        for job in range(0, count, 17):
            storage.update([JobChange(f"{number}.{job}", metadata={"m": "é" * job})])
            storage.update([JobChange(f"{number}.{job}", intermediate=(1.0, job), by="new")])  # which has none yet
        for key in KEYS if number != 2 else ():
            storage.put_value(str(number), key, [number, key * (300 if key == "long" else 1)])
    storage.put_value("0", "a", "again")
    for adopting, jobs in (("them", range(3, 40, 5)), ("new", range(8, 130, 30)), ("me", range(8, 60, 30))):
        seen = storage.get([f"0.{job}" for job in jobs])
        assert len(storage.adopt({record.id: record.revision for record in seen}, adopting)) == len(jobs)
    for owner in OWNERS[:2]:
        storage.renew(owner, math.inf)


def reads() -> Iterator[tuple[str, Callable[[Storage], object]]]:
    """Give ways to read, which are all that there are of each thing."""
    yield "owners", lambda storage: sorted(storage.owners())
    yield "searches", methodcaller("search_ids")
    for search_id in ("0", "1", "2", "3"):
        for since in (0, 30, 150) if search_id == "0" else (0, 30):
            yield f"scan of {search_id} since {since}", partial(scanned, search_id=search_id, since=since)
        for key in KEYS if search_id != "2" else ():
            yield f"value {key} of {search_id}", methodcaller("get_value", search_id, key)
    for job_ids in (["0.0", "0.8", "0.9", "0.129"], ["0.41"], ["2.5", "2.65"], ["3.0"]):
        yield f"jobs {job_ids}", partial(got, job_ids=job_ids)


def scanned(storage: Storage, search_id: str, since: int) -> tuple[list[Any], int]:
    records, revision = storage.scan(search_id, since)
    return [fields(record) for record in records], revision


def got(storage: Storage, job_ids: list[str]) -> list[Any]:
    return [fields(record) for record in storage.get(job_ids)]


def read(storage: Storage) -> dict[str, object]:
    """Read everything, in each of the ways that there are; leave out what is told to be damaged."""
    found = {}
    for name, one in reads():
        with contextlib.suppress(StorageError):
            found[name] = one(storage)
    return found


def changes() -> Iterator[Callable[[Storage], object]]:
    """Give a change by each owner of each of some jobs, and one of every other kind."""
    for owner in OWNERS:
        many = [JobChange(f"0.{job}", metadata={"by": owner}, by=owner) for job in range(0, 130, 3)]
        for those in (
            many,
            [JobChange("0.8", extra={"by": owner}, by=owner)],
            [JobChange(f"2.{job}", out=owner, by=owner) for job in range(60, 66)],
        ):
            yield methodcaller("update", those)
    yield lambda storage: storage.adopt({record.id: record.revision for record in storage.get(["0.8", "0.9"])}, "me")
    yield lambda storage: storage.insert("1", [JobRecord(args=("more",), owner="me")])
    yield lambda storage: storage.insert("3", [JobRecord(args=("more",), owner="me")])
    yield methodcaller("put_value", "3", "long", "short")
    yield methodcaller("renew", "me", math.inf)


@pytest.fixture
def filled(path: Path) -> Path:
    """A store in small pages, so that each table has several."""
    with SqliteStorage(path) as storage:
        fill(storage)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 512")
        connection.execute("VACUUM")
    return path


class Damaged:
    """A store of which bits flip; how it is without that is what a store in memory is."""

    def __init__(self, filled: Path) -> None:
        self._path = filled.with_name("damaged.db")
        self.data = filled.read_bytes()
        memory = MemoryStorage()
        fill(memory)
        self._expected: list[dict[str, str]] = []
        for these in ((), changes()):
            with self._opened(self.data) as storage:
                for call in these:
                    call(memory)
                for one in changes() if these else ():
                    one(storage)
                found = read(storage)
                assert same(found, read(memory))
                self._expected.append({name: repr(value) for name, value in found.items()})

    def find(self, place: int, bit: int) -> str | None:
        """Tell what is wrong when this bit flips; None: nothing; an empty text: that it is damaged is told."""
        data = bytearray(self.data)
        data[place] ^= 1 << bit
        is_told = False
        for expected, these in zip(self._expected, ((), changes()), strict=True):
            try:
                with self._opened(data) as storage:
                    for one in these:  # without reading before
                        one(storage)
                    found = read(storage)
            except StorageError:
                is_told = True
                continue
            except Exception as exc:  # noqa: BLE001 - it is told of all bits at once
                return f"{type(exc).__name__}: {exc}"
            is_told = is_told or found.keys() < expected.keys()
            for name, value in found.items():
                if repr(value) != expected[name]:
                    return f"{name}, {'after changes' if these else 'without changes'}"
        return "" if is_told else None

    def _opened(self, data: bytes | bytearray) -> SqliteStorage:
        for ending in ("-journal", "-wal", "-shm"):
            self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
        self._path.write_bytes(data)
        return SqliteStorage(self._path)


@pytest.mark.timeout(60 if STEP > 1 else 24 * 3600)
def test_a_bit_that_flips_anywhere_is_noticed_or_does_not_matter(filled: Path) -> None:
    damaged = Damaged(filled)
    found = {
        (place, bit): damaged.find(place, bit)
        for place in range(0, len(damaged.data), STEP)
        for bit in (range(8) if STEP == 1 else [place // STEP % 8])
    }
    wrong = [f"bit {bit} of byte {place}: {told}" for (place, bit), told in found.items() if told]
    assert not wrong, "\n".join([f"{len(wrong)} are wrong:", *wrong])
    assert list(found.values()).count("") > len(found) / 2


def test_a_value_that_is_not_found_for_a_damaged_one_beside_it_is_not_unknown(filled: Path) -> None:
    """SQLite compares keys with a row that makes no sense, and takes the wrong turn."""
    damaged = Damaged(filled)
    place = damaged.data.rindex(b"\x03a\x00\x00\x00\x04") - 4  # of search 3, in the middle of the table's only page
    assert damaged.data[place : place + 2] == b"\x04\x01", "how long a row's header is, and that a small number comes"
    assert damaged.find(place, 5) == ""


def update(owner: str, *jobs: int) -> Callable[[Storage], object]:
    return methodcaller("update", [JobChange(f"0.{job}", out="wrong", by=owner) for job in jobs])


def adopt(storage: Storage) -> object:
    return storage.adopt({record.id: record.revision for record in storage.get(["0.6"])}, "me")


MAKES, ADOPTS = "of who made jobs is not what was written", "of who has adopted jobs is not what was written"
LACKS = "of who has jobs is not all there"


@pytest.mark.parametrize(
    ("statement", "call", "said"),
    [
        ("UPDATE search_values SET key = 'c' WHERE key = 'b'", methodcaller("get_value", "0", "b"), "the value 'c'"),
        ("UPDATE search_values SET search = 2 WHERE search = 0", methodcaller("get_value", "0", "b"), "lacks values"),
        ("UPDATE search_values SET search = 2 WHERE search = 0", methodcaller("get_value", "2", "b"), "the value 'b'"),
        ("DELETE FROM search_values WHERE key = 'b'", methodcaller("get_value", "3", "b"), "'3' lacks values"),
        ("UPDATE search_values SET value = x'00'", methodcaller("put_value", "3", "b", 1), "the value 'b'"),
        ("DELETE FROM entries WHERE changed = {last}", methodcaller("scan", "0", 100), "latest changes or jobs"),
        ("DELETE FROM entries WHERE changed = {last}", methodcaller("insert", "0", [JobRecord()]), "latest changes"),
        ("UPDATE new_jobs SET changed = 1 WHERE first = 0", methodcaller("scan", "0", 150), "entries, .* are"),
        (
            "UPDATE new_jobs SET changed = 80 WHERE first = 0",
            methodcaller("scan", "0", 150),
            "lacks what .* were before",
        ),
        ("DELETE FROM new_jobs WHERE first = 120", methodcaller("insert", "0", [JobRecord()]), "latest changes or"),
        ("UPDATE adopted SET owner = 'me' WHERE job = 3", update("me", 3), ADOPTS),
        ("UPDATE adopted SET owner = 'me' WHERE job = 3", update("them", 3), ADOPTS),
        ("UPDATE adopted SET seal = seal + 1 WHERE job = 3", update("them", 3), ADOPTS),
        ("UPDATE adopted SET seal = 'x' WHERE job = 3", update("them", 3), ADOPTS),
        ("UPDATE adopted SET job = 4 WHERE job = 3", update("them", 3), ADOPTS),
        ("UPDATE adopted SET job = 99 WHERE job = 3", update("me", 2, 3), LACKS),
        ("UPDATE adopted SET job = 99 WHERE job = 3", update("me", 99), ADOPTS),
        ("DELETE FROM adopted WHERE job = 3", update("me", 3), LACKS),
        ("DELETE FROM adopted", update("me", 3), LACKS),
        ("DELETE FROM adopted WHERE job = 3", adopt, LACKS),
        ("DELETE FROM sums WHERE jobs = 0", update("me", 3), LACKS),
        ("UPDATE sums SET adopted = 0 WHERE jobs = 0", update("me", 3), LACKS),
        ("UPDATE new_jobs SET owner = 'me' WHERE first = 40", update("me", 41), MAKES),
        ("UPDATE new_jobs SET first = 42 WHERE first = 40", update("me", 41), LACKS),
        ("UPDATE new_jobs SET first = 42 WHERE first = 40", update("me", 39, 41), LACKS),
        ("UPDATE new_jobs SET first = 42 WHERE first = 40", update("me", 39, 42), MAKES),
        ("DELETE FROM new_jobs WHERE first = 40", update("me", 1, 41, 81), MAKES),
        ("DELETE FROM new_jobs WHERE first = 0", update("me", 1), LACKS),
        ("DELETE FROM searches WHERE id = 3", methodcaller("new_search"), "of its 4 searches, the last is 2"),
        ("DELETE FROM searches WHERE id = 3", methodcaller("scan", "3"), r"only \[0, 1, 2\] are there"),
        ("DELETE FROM searches WHERE id = 1", methodcaller("scan", "1"), r"only \[0, 2, 3\] are there"),
        ("DELETE FROM leases", methodcaller("renew", "me", 5), "of its leases, there are 0 lists"),
        ("UPDATE leases SET data = zeroblob(length(data))", methodcaller("renew", "me", 5), "leases cannot be read"),
    ],
)
def test_what_is_done_by_what_is_damaged_is_refused(
    path: Path, statement: str, call: Callable[[Storage], object], said: str
) -> None:
    with SqliteStorage(path) as storage:
        fill(storage)
        _, last = storage.scan("0")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(statement.format(last=last)).rowcount > 0
        connection.commit()
    with SqliteStorage(path) as storage, pytest.raises(CorruptStoreError, match=said) as caught:
        call(storage)
    assert str(path) in str(caught.value)


def test_jobs_far_from_one_another_are_looked_up_without_those_between(path: Path) -> None:
    """Damage between them is none of theirs; and that of each of them is noticed."""
    with SqliteStorage(path) as storage:
        storage.new_search()
        records = [JobRecord(owner="me") for _ in range(2000)]
        storage.insert("0", records)
        assert len(storage.adopt({f"0.{job}": job + 1 for job in (5, 1000, 1990)}, "them")) == 3
        storage.flush()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("DELETE FROM adopted WHERE job = 1000")
            connection.commit()
        storage.update([JobChange(f"0.{job}", out=owner, by=owner) for owner in ("me", "them") for job in (5, 6, 1990)])
        assert [record.out for record in storage.get(["0.5", "0.6", "0.1990"])] == ["them", "me", "them"]
        with pytest.raises(CorruptStoreError, match=LACKS):
            storage.update([JobChange(f"0.{job}", out=0, by="me") for job in (6, 1001, 1990)])
