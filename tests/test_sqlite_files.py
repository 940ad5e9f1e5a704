"""What a path of a SQLite store may lead to: nothing, a store of any age, damage, another's file."""

from __future__ import annotations

import math
import os
import pickle
import random
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from paraval import ParavalError
from paraval.errors import CorruptStoreError, StorageError, WrongStoreError
from paraval.storage import JobChange, JobRecord, UnknownIdError
from paraval.storage.base import UnstorableError
from paraval.storage.sqlite import SqliteStorage, layout, opening, values
from paraval.storage.sqlite.filesystem import network_file_system
from paraval.storage.sqlite.sharing import _registry
from paraval.testing.comparing import fields, same
from support import Program, in_threads, run_program


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture(autouse=True)
def nothing_left_open() -> Any:
    yield
    assert not _registry


def fill(path: Path) -> None:
    """Make a store with something in every table and column."""
    with SqliteStorage(path) as storage:
        for owner in ("me", None):
            search_id = storage.new_search()
            records = [
                JobRecord(args=({"x": number, "y": "é" * 9},), owner=owner, function="f") for number in range(120)
            ]
            storage.insert(search_id, records)
            storage.update(
                [
                    JobChange(record.id, status=2, out=number / 7, metadata={"m": "m" * (number % 50)})
                    for number, record in enumerate(records[:100])
                ]
            )
            storage.update([JobChange(record.id, extra={"long": "x" * 9000}) for record in records[:3]])
            storage.adopt({records[110].id: records[110].revision}, "me")
            for number in range(5):
                storage.put_value(search_id, f"key {number}", {"value": [number, "v" * 300]})
        storage.renew("me", 1e9)


def contents(path: Path) -> list[Any]:
    """Read everything that there is to read, except for the leases."""
    with SqliteStorage(path) as storage:
        found: list[Any] = []
        for search_id in storage.search_ids():
            jobs = {record.id: fields(record) for record in storage.scan(search_id)[0]}
            assert {record.id: fields(record) for record in storage.get(jobs)} == jobs
            found.append([jobs, [storage.get_value(search_id, f"key {number}") for number in range(5)]])
        storage.owners()
        return found


def raw(path: Path, *statements: str) -> list[Any]:
    """Run statements on a file that no storage has open; give what the last one gives."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements[:-1]:
            connection.execute(statement)
        return connection.execute(statements[-1]).fetchall()


# -- nothing there, and who may read it --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sound", [False, True])
def test_files_are_their_owners_alone_from_the_beginning(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_sound: bool
) -> None:
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: is_sound)
    for umask in (0, 0o777):
        before = os.umask(umask)
        try:
            with SqliteStorage(path) as storage:
                storage.create_new_job(storage.new_search())
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        finally:
            os.umask(before)
        beside = {"store.db-wal", "store.db-shm"} if is_sound else {"store.db-journal"}
        assert modes == dict.fromkeys({"store.db", *beside}, 0o600)
        for file in path.parent.iterdir():
            file.unlink()


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch(0o640)
    with SqliteStorage(path) as storage:
        assert storage.new_search() == "0"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "it is as its owner made it"


@pytest.mark.parametrize(
    "name", ["a b.db", "what?.db", "100%.db", "#.db", "é☂.db", "file:x.db", "-", "\udc80.db", "'.db"]
)
def test_a_path_may_have_any_characters(tmp_path: Path, name: str) -> None:
    with SqliteStorage(tmp_path / name) as storage:
        storage.new_search()
    with SqliteStorage(os.fspath(tmp_path / name)) as storage:
        assert storage.search_ids() == ["0"]
    assert (tmp_path / name).stat().st_size > 0


def test_a_relative_path_is_that_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = SqliteStorage("store.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.close()
    storage.new_search()
    storage.close()
    assert [file.name for file in tmp_path.glob("**/*.db")] == ["store.db"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("wrong", "error"), [("", ValueError), (":memory:", ValueError), ("a\0b", ValueError), (5, TypeError)]
)
def test_what_is_no_path_is_refused(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="path of a file") as caught:
        SqliteStorage(wrong)
    assert isinstance(caught.value, ParavalError)


@pytest.mark.parametrize("wrong", [-1, float("nan"), "5", None])
def test_what_is_no_timeout_is_refused(path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match="number of seconds"):
        SqliteStorage(path, timeout=wrong)
    assert not path.exists()


# -- something else there ----------------------------------------------------------------------------------------------


def symlink(path: Path) -> None:
    path.with_name("real.db").touch()
    path.symlink_to("real.db")


def dangling_symlink(path: Path) -> None:
    path.symlink_to("nowhere.db")


def hard_link(path: Path) -> None:
    fill(path.with_name("real.db"))
    path.hardlink_to(path.with_name("real.db"))


def foreign_database(path: Path) -> None:
    raw(path, "CREATE TABLE stamps (id INTEGER)", "CREATE TABLE jobs (id INTEGER)")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (symlink, "is a symbolic link; a store is opened by its own path .*real.db"),
        (dangling_symlink, "is a symbolic link"),
        (hard_link, r"has 2 names \(hard links\)"),
        (Path.mkdir, "is a folder; give the path of a file in it"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.write_text("time,objective\n1,2\n"), r"is no SQLite database.*begins with b'time,objective"),
        (lambda path: path.write_bytes(b"%PDF-1.7 " * 5000), r"is no SQLite database.*begins with b'%PDF-1.7"),
        (lambda path: path.write_bytes(bytes(10_000)), r"is no SQLite database.*begins with b'\\x00"),
        (lambda path: path.write_bytes(b"SQLite format 3\0"), "no SQLite database"),
        (lambda path: path.write_bytes(b"S"), "a file of one byte"),
        (foreign_database, r"no store of paraval \(its tables: stamps, jobs\); give the path"),
        (lambda path: raw(path, "PRAGMA user_version = 1"), r"no store of paraval \(its tables: none\)"),
        (lambda path: raw(path, "PRAGMA application_id = 77"), "no store of paraval"),
    ],
)
def test_what_is_no_store_is_left_alone(path: Path, make: Callable[[Path], object], said: str) -> None:
    make(path)
    before = {file: (file.read_bytes() if file.is_file() else b"") for file in path.parent.iterdir()}
    for _ in range(2):
        with pytest.raises(WrongStoreError, match=said) as caught:
            SqliteStorage(path)
        assert isinstance(caught.value, OSError)
        assert "\n" not in str(caught.value)
    assert {file: (file.read_bytes() if file.is_file() else b"") for file in path.parent.iterdir()} == before


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*/none'.*; make it first"):
        SqliteStorage(tmp_path / "none" / "store.db")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be reached: Not a directory"):
        SqliteStorage(tmp_path / "file" / "store.db")
    with pytest.raises(WrongStoreError, match="is a folder"):
        SqliteStorage(f"{tmp_path}/")


def test_a_folder_that_is_a_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        SqliteStorage(tmp_path / "link" / "store.db") as storage,
        SqliteStorage(tmp_path / "real" / "store.db") as same,
    ):
        assert storage._opened() is same._opened()


# -- stores of other ages ----------------------------------------------------------------------------------------------


def make_version_1(path: Path) -> list[Any]:
    """Make a store as it was before there were leases."""
    fill(path)
    before = contents(path)
    raw(path, "DROP TABLE leases", "PRAGMA user_version = 1")
    return before


def test_an_older_layout_is_migrated(path: Path) -> None:
    before = make_version_1(path)
    with SqliteStorage(path) as storage:
        assert storage.owners() == set()
        storage.renew("me", 100)
    assert same(contents(path), before)
    assert raw(path, "PRAGMA user_version") == [(len(layout.SCHEMA),)] == [(2,)]
    with SqliteStorage(path) as storage:
        assert storage.owners() == {"me"}


def test_the_layout_of_the_first_version_is_as_it_was(path: Path) -> None:
    """A store of the first version may be anywhere by now: what made it must not change."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in layout.SCHEMA[0]:
            connection.execute(statement)
        columns = {
            name: [(column[1], column[2]) for column in connection.execute(f"PRAGMA table_info({name})")]
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        }
    assert columns == {
        "searches": [("id", "INTEGER"), ("token", "BLOB")],
        "store": [("id", "BLOB")],
        "search_values": [("search", "INTEGER"), ("key", "TEXT"), ("value", "BLOB")],
        "entries": [("changed", "INTEGER"), ("data", "BLOB")],
        "new_jobs": [
            *[("first", "INTEGER"), ("count", "INTEGER"), ("owner", "TEXT"), ("changed", "INTEGER")],
            ("seal", "INTEGER"),
        ],
        "sums": [("jobs", "INTEGER"), ("places", "INTEGER"), ("adopted", "INTEGER")],
        "places": [("job", "INTEGER"), ("changed", "INTEGER")],
        "adopted": [("job", "INTEGER"), ("owner", "TEXT"), ("seal", "INTEGER")],
    }


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    before = make_version_1(path)
    raw(path, "CREATE TABLE leases (mine)")
    with pytest.raises(StorageError, match="already exists"):
        SqliteStorage(path)
    assert raw(path, "PRAGMA user_version") == [(1,)]
    raw(path, "DROP TABLE leases")
    assert same(contents(path), before)


@pytest.mark.parametrize("prepare", [lambda path: None, make_version_1], ids=["make", "migrate"])
def test_several_may_make_or_migrate_a_store_at_once(path: Path, prepare: Callable[[Path], object]) -> None:
    prepare(path)
    program = f"""
        import sys, threading
        from paraval.storage.sqlite import SqliteStorage
        print("ready", flush=True)
        sys.stdin.read()
        with SqliteStorage({str(path)!r}) as storage:
            storage.renew(str(storage.new_search()), 1000)
    """

    def run() -> list[str]:
        done = run_program(program)
        return [*done.stdout, *done.complaints]

    assert in_threads(*[run] * 4) == [["ready"]] * 4
    with SqliteStorage(path) as storage:
        assert len(storage.owners()) == 4


def test_a_newer_layout_is_refused(path: Path) -> None:
    fill(path)
    raw(path, "PRAGMA user_version = 9")
    before = path.read_bytes()
    with pytest.raises(WrongStoreError, match=r"has layout 9, of a later release of paraval.*up to 2: upgrade paraval"):
        SqliteStorage(path)
    assert path.read_bytes() == before


# -- journals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "is_sound"),
    [
        ((3, 6, 23), False),
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 44, 9), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 0), False),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 52, 0), True),
        ((4, 0, 0), True),
    ],
)
def test_versions_that_may_write_ahead(version: tuple[int, int, int], is_sound: bool) -> None:
    assert opening.has_sound_wal(version) == is_sound


def test_this_version_writes_as_it_may(path: Path) -> None:
    SqliteStorage(path).close()
    assert raw(path, "PRAGMA journal_mode") == [
        ("wal" if opening.has_sound_wal(sqlite3.sqlite_version_info) else "delete",)
    ]


def test_a_file_keeps_the_way_it_is_written_unless_that_is_dangerous(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(is_sound: bool) -> str:
        monkeypatch.setattr(opening, "has_sound_wal", lambda _: is_sound)
        with SqliteStorage(path) as storage:
            storage.new_search()
            connection = storage._opened()._connection
            assert connection is not None
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
            return str(connection.execute("PRAGMA journal_mode").fetchone()[0])

    assert opened(is_sound=False) == "persist"
    assert opened(is_sound=True) == "persist"
    path.unlink()
    assert opened(is_sound=True) == "wal"
    assert opened(is_sound=True) == "wal"
    assert opened(is_sound=False) == "persist"
    assert opened(is_sound=True) == "persist"
    with SqliteStorage(path) as storage:
        assert storage.search_ids() == ["0", "1", "2", "3"]


def test_what_another_writes_ahead_is_not_written_by_a_version_that_must_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
        import sys, time
        from paraval.storage.sqlite import SqliteStorage, layout, opening
        opening.has_sound_wal = lambda version: True
        storage = SqliteStorage({str(path)!r})
        storage.new_search()
        print("open", flush=True)
        time.sleep(60)
    """
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: False)
    monkeypatch.setattr(opening, "_HANDOVER_S", 0.05)
    with Program(program) as other:
        other.read_until("open")
        with pytest.raises(StorageError, match=r"in use by a program whose SQLite writes ahead \(WAL\)"):
            SqliteStorage(path)
    with SqliteStorage(path) as storage:
        assert storage.search_ids() == ["0"]


MOUNTS = rb"""
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
31 30 0:27 / /home/a\040b rw,relatime - fuse.sshfs me@server: rw
32 30 8:1 / /home/local rw,relatime shared:7 master:1 - xfs /dev/sda1 rw
33 22 0:28 / /hom rw - tmpfs tmpfs rw
34 22 0:29 / /over rw - nfs server:/x rw
35 34 8:2 / /over rw - ext4 /dev/sdb rw
""".strip()


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("/store.db", None),
        ("/home/store.db", "nfs4"),
        ("/home/me/deep/store.db", "nfs4"),
        ("/home/a b/store.db", "fuse.sshfs"),
        ("/home/local/x/store.db", None),
        ("/homeless/store.db", None),
        ("/hom/store.db", None),
        ("/over/store.db", None),
    ],
)
def test_network_file_systems_are_recognised(tmp_path: Path, place: str, kind: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_bytes(MOUNTS)
    assert network_file_system(Path(place), mounts) == kind
    assert network_file_system(Path(place), tmp_path / "none") is None


def test_a_store_on_a_network_file_system_is_not_written_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "network_file_system", lambda _: "nfs4")
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: True)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"is on a network file system \(nfs4\).*RedisStorage between machines"):
            SqliteStorage(path)
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: False)
    with SqliteStorage(path) as storage:
        assert storage.new_search() == "0"


# -- gone, moved, replaced while it is open ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_sound", [False, True])
def test_nothing_is_acknowledged_that_goes_into_a_file_that_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_sound: bool
) -> None:
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: is_sound)
    with SqliteStorage(path) as storage:
        search_id = storage.new_search()
        kept = path.rename(path.with_name("kept.db"))
        with pytest.raises(StorageError, match="is gone"):
            storage.create_new_job(search_id)
        shutil.copy(kept, path)
        with pytest.raises(StorageError, match="was replaced by another file"):
            storage.create_new_job(search_id)
        path.unlink()
        kept.rename(path)
        assert storage.create_new_job(search_id) == "0.0"


def test_a_storage_that_was_closed_makes_no_new_file(path: Path) -> None:
    storage = SqliteStorage(path)
    storage.close()
    path.unlink()
    for call in (storage.connect, storage.new_search, storage.search_ids):
        with pytest.raises(StorageError, match="is gone"):
            call()
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="whom the permissions of files do not concern")
def test_a_file_that_may_not_be_written_can_be_read(path: Path) -> None:
    fill(path)
    path.chmod(0o400)
    with SqliteStorage(path) as storage:
        assert storage.search_ids() == ["0", "1"]
        with pytest.raises(StorageError, match="cannot be written"):
            storage.new_search()
    path.chmod(0)
    with pytest.raises(StorageError, match="cannot be opened"):
        SqliteStorage(path)


# -- damage ------------------------------------------------------------------------------------------------------------


def assert_intact_or_named(path: Path, expected: list[Any], what: str) -> bool:
    """Whether it was found damaged; if not, everything must be there and right."""
    try:
        found = contents(path)
    except (StorageError, UnknownIdError) as exc:
        assert "\n" not in str(exc)  # noqa: PT017 - either it is damaged, or everything is there
        return True
    assert same(found, expected), what
    return False


@pytest.mark.parametrize("seed", range(2))
def test_bits_that_flip_are_noticed(tmp_path: Path, path: Path, seed: int) -> None:
    fill(path)
    expected = contents(path)
    data = path.read_bytes()
    damaged = tmp_path / "damaged.db"
    chance = random.Random(seed)
    found = 0
    for _ in range(100):
        flipped = bytearray(data)
        places = [chance.randrange(len(data)) for _ in range(chance.choice([1, 1, 8]))]
        for place in places:
            flipped[place] ^= 1 << chance.randrange(8)
        damaged.write_bytes(flipped)
        found += assert_intact_or_named(damaged, expected, f"bits at {places}")
        damaged.with_name("damaged.db-journal").unlink(missing_ok=True)
    assert found > 50


def test_pages_that_are_lost_are_noticed(tmp_path: Path, path: Path) -> None:
    fill(path)
    expected = contents(path)
    data = path.read_bytes()
    damaged = tmp_path / "damaged.db"
    pages = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    for number in range(len(pages)):
        for page in (bytes(4096), b"\xff" * 4096, pages[number - 1]):  # blank, full, another's
            damaged.write_bytes(b"".join([*pages[:number], page, *pages[number + 1 :]]))
            assert_intact_or_named(damaged, expected, f"page {number}")
            damaged.with_name("damaged.db-journal").unlink(missing_ok=True)


def test_a_file_that_is_cut_is_noticed(tmp_path: Path, path: Path) -> None:
    fill(path)
    expected = contents(path)
    data = path.read_bytes()
    damaged = tmp_path / "damaged.db"
    for length in [*range(1, len(data), 2777), *range(4096, len(data), 4096), 1, 15, 16, 99, 100, 511, 512, 4095]:
        damaged.write_bytes(data[:length])
        assert assert_intact_or_named(damaged, expected, f"{length} bytes"), f"{length} bytes of {len(data)}"


def test_a_store_that_was_emptied_is_no_new_one(path: Path) -> None:
    fill(path)
    os.truncate(path, 0)
    with pytest.raises(CorruptStoreError, match=r"store.db-journal says that it was not.*remove both"):
        SqliteStorage(path)
    path.with_name("store.db-journal").unlink()
    with SqliteStorage(path) as storage:
        assert storage.search_ids() == []


def test_a_store_that_was_removed_may_be_made_anew(path: Path) -> None:
    fill(path)
    path.unlink()
    with SqliteStorage(path) as storage:
        assert storage.search_ids() == []
        storage.new_search()


def test_a_crash_while_a_store_is_made_is_no_damage(path: Path) -> None:
    """The file is empty then, and its journal says that it is to be."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = PERSIST")
        connection.execute("BEGIN IMMEDIATE")
        for statement in layout.SCHEMA[0]:
            connection.execute(statement)
        left = path.with_name("left.db")
        for ending in ("", "-journal"):
            shutil.copy(f"{path}{ending}", f"{left}{ending}")
    assert left.stat().st_size == 0
    assert left.with_name("left.db-journal").stat().st_size > 0
    with SqliteStorage(left) as storage:
        assert storage.new_search() == "0"


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM entries WHERE changed = 64", "'0' cannot be read: its changes 1 to 64 are missing"),
        ("DELETE FROM entries WHERE changed = 120", "'0' cannot be read: its changes 65 to 120 are missing"),
        ("DELETE FROM entries WHERE changed = 224", "of search '0', the latest changes or jobs are missing"),
        (
            "UPDATE entries SET data = (SELECT data FROM entries WHERE changed = 184) WHERE changed = 220",
            "'0' cannot be read: the checksum of an entry is wrong",
        ),
        ("UPDATE entries SET data = x'' WHERE changed = 64", "an entry is cut short"),
        ("UPDATE entries SET data = 'x' WHERE changed = 64", "an entry holds 'x' in place of bytes"),
        ("UPDATE entries SET data = data || x'80' WHERE changed = 64", "a text in it is none"),
        ("UPDATE entries SET data = CAST(data || x'00' AS BLOB) WHERE changed = 64", "checksum of an entry is wrong"),
        ("DELETE FROM new_jobs WHERE first < 200", "of search '0', the latest changes or jobs are missing"),
        ("UPDATE new_jobs SET count = 10 WHERE first = 64", "the latest jobs of search '0' is not what was written"),
        ("UPDATE new_jobs SET count = 'x' WHERE first = 64", "the latest jobs of search '0' is not what was written"),
        ("UPDATE new_jobs SET owner = 'x' WHERE first = 64", "the latest jobs of search '0' is not what was written"),
        ("UPDATE new_jobs SET count = 63 WHERE first = 0", "search '0' lacks changes, or its indexes do"),
        ("UPDATE new_jobs SET changed = 63 WHERE first = 0", "search '0' lacks changes, or its indexes do"),
        ("UPDATE new_jobs SET changed = 'x' WHERE first = 0", "search '0' lacks changes, or its indexes do"),
        ("UPDATE places SET changed = 1 WHERE job = 5", "entries, .* are there"),
        ("UPDATE places SET changed = 223 WHERE job = 5", "where jobs were changed is not what was written"),
        ("DELETE FROM places WHERE job = 5", "where jobs were changed is not what was written"),
        ("UPDATE sums SET places = 6 WHERE jobs = 0", "search '0' lacks changes, or its indexes do"),
        ("DELETE FROM sums", r"of its searches, only \[0, 1\] are there"),
        ("DELETE FROM sums WHERE jobs = 0", "search '0' lacks changes, or its indexes do"),
        ("UPDATE sums SET places = 0 WHERE jobs = (1 << 34) - 1", "the latest changes or jobs are missing"),
        ("UPDATE sums SET places = 'x' WHERE jobs = (1 << 34) - 1", "the latest changes or jobs are missing"),
        ("DELETE FROM sums WHERE jobs = (1 << 34) - 1", "the latest changes or jobs are missing"),
        ("UPDATE places SET job = 119 WHERE job = 5", "where jobs were changed is not what was written"),
        ("DELETE FROM searches WHERE id = 0", r"of its searches, only \[1\] are there"),
        ("DELETE FROM searches WHERE id = 1", r"of its searches, only \[0\] are there"),
        ("UPDATE search_values SET value = 5", "the value 'key 0' of search '0' cannot be read"),
        ("UPDATE search_values SET value = zeroblob(50)", "the value 'key 0' of search '0' cannot be read"),
        ("UPDATE leases SET data = zeroblob(length(data))", "its leases cannot be read"),
        ("UPDATE leases SET data = x''", "its leases cannot be read: it is cut short"),
        ("UPDATE leases SET data = 'x'", "its leases cannot be read: it is 'x'"),
        ("UPDATE leases SET data = CAST(x'80' AS TEXT)", "a text in it is none"),
        ("DELETE FROM leases", "of its leases, there are 0 lists"),
        ("INSERT INTO leases VALUES (x'')", "of its leases, there are 2 lists"),
        ("DROP TABLE places", "it lacks places, or has it in another form"),
        ("PRAGMA user_version = 0", "its layout is 0"),
    ],
)
def test_damage_is_named(path: Path, statement: str, said: str) -> None:
    fill(path)
    raw(path, statement)
    with pytest.raises(CorruptStoreError, match=said) as caught:
        contents(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, StorageError)


def test_a_job_that_is_missing_is_damage_and_one_that_never_was_is_unknown(path: Path) -> None:
    fill(path)
    raw(path, "UPDATE new_jobs SET changed = 120 WHERE first = 0")
    with SqliteStorage(path) as storage:
        with pytest.raises(CorruptStoreError, match=r"job '0\.5' is missing, though there are later ones"):
            storage.get(["0.5"])
        with pytest.raises(UnknownIdError):
            storage.get(["0.120"])


# -- hostile bytes -----------------------------------------------------------------------------------------------------


class Canary:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._target}",)


def test_nothing_that_is_stored_is_ever_executed(path: Path) -> None:
    fill(path)
    sung = path.with_name("sung")
    columns = [
        (table, column)
        for (table,) in raw(path, "SELECT name FROM sqlite_master WHERE type = 'table'")
        for (_, column, *_) in raw(path, f"PRAGMA table_info({table})")
    ]
    assert len(columns) >= 12
    program = f"""
        import pathlib, sys

        heard = []
        bad = ("pickle", "marshal", "os.system", "exec", "compile", "subprocess")
        sys.addaudithook(lambda event, args: heard.append(event) if event.startswith(bad) else None)

        from paraval.errors import ParavalError
        from paraval.storage import JobChange
        from paraval.storage.sqlite import SqliteStorage

        def attempt(call):
            try:
                call()
            except ParavalError:
                pass

        for path in sorted(pathlib.Path({str(path.parent)!r}).glob("hostile-*.db")):
            heard.clear()
            storage = None
            try:
                storage = SqliteStorage(path)
            except ParavalError:
                continue
            for call in (
                storage.search_ids,
                storage.owners,
                lambda: storage.scan("0"),
                lambda: storage.scan("1"),
                lambda: storage.get(["0.0", "1.5"]),
                lambda: storage.get_value("0", "key 0"),
                lambda: storage.store_job_metadata("0.0", "a", 1),
                lambda: storage.update([JobChange("0.3", status=2, by="me")]),
                lambda: storage.adopt({{"0.1": 1, "1.1": 2}}, "them"),
                lambda: storage.create_new_job("0"),
                lambda: storage.new_search(),
                lambda: storage.put_value("0", "key 0", 1),
                lambda: storage.renew("me", 5),
            ):
                attempt(call)
            storage.close()
            print(path.name, heard, flush=True)
        print("end")
    """
    for table, column in columns:
        for kind, value in (("blob", "?"), ("text", "CAST(? AS TEXT)")):
            copy = path.with_name(f"hostile-{table}-{column}-{kind}.db")
            shutil.copy(path, copy)
            with closing(sqlite3.connect(copy)) as connection:
                for protocol in range(6):
                    data = pickle.dumps(Canary(sung), protocol)
                    try:
                        connection.execute(f"UPDATE OR IGNORE {table} SET {column} = {value}", (data,))  # noqa: S608
                    except sqlite3.Error:  # an id is an int
                        break
                connection.commit()
    done = run_program(program)
    assert done.stdout[-1] == "end", done.stderr
    assert len(done.stdout) > 10
    assert [line for line in done.stdout[:-1] if not line.endswith(" []")] == []
    assert not sung.exists()
    os.system(pickle.loads(pickle.dumps(Canary(sung))) or "true")  # noqa: S301, S605 - to see that the canary can sing
    assert sung.exists()


# -- one store is not taken for another --------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_store_that_is_emptied_in_use_is_not_begun_anew(new_path: Callable[[], Path]) -> None:
    path = new_path()
    with SqliteStorage(path) as storage:
        storage.new_search()
        os.truncate(path, 0)
        for ending in ("-journal", "-wal", "-shm"):  # SQLite removes them itself when it meets an empty file
            path.with_name(f"{path.name}{ending}").unlink(missing_ok=True)
        storage._opened()._disconnect()  # as before a fork
        for call in (storage.search_ids, storage.new_search):
            with pytest.raises(CorruptStoreError, match="is empty: it was cut"):
                call()
        storage.close()
        with pytest.raises(CorruptStoreError, match="is empty: it was cut"):
            storage.search_ids()
    assert path.stat().st_size == 0


def test_a_store_in_the_place_of_another_is_not_taken_for_it(new_path: Callable[[], Path]) -> None:
    path = new_path()
    storage = SqliteStorage(path)
    storage.new_search()
    sent = pickle.dumps(storage)
    assert pickle.loads(sent).search_ids() == ["0"]  # noqa: S301 - our own
    storage.close()
    path.unlink()
    SqliteStorage(path).close()
    for one in (storage, pickle.loads(sent)):  # noqa: S301 - our own
        with pytest.raises(StorageError, match="was replaced by another one"):
            one.search_ids()


def test_a_store_whose_inode_another_one_got_is_told_from_it(new_path: Callable[[], Path]) -> None:
    path, other = new_path(), new_path()
    with SqliteStorage(path) as storage, SqliteStorage(other) as another:
        storage.new_search()
        another.close()
        database = storage._opened()
        database._disconnect()
        path.write_bytes(other.read_bytes())  # the same inode
        with pytest.raises(StorageError, match="was replaced by another one"):
            storage.search_ids()


def test_leases_do_not_go_by_the_time_of_the_day(new_path: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with SqliteStorage(new_path()) as storage:
        storage.renew("me", 60)
        now = time.time()
        for step in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda step=step: now + step)
            assert "me" in storage.owners()
            storage.renew("you", 60)
            assert storage.owners() == {"me", "you"}
        later = time.monotonic() + 61
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert storage.owners() == set()


def test_leases_of_another_machine_go_by_the_time_of_the_day(
    new_path: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteStorage(new_path()) as storage:
        storage.renew("me", 60)
        storage.renew("always", math.inf)
        monkeypatch.setattr(values, "_boot", lambda: "another")
        assert storage.owners() == {"me", "always"}
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 61)
        assert storage.owners() == {"always"}


@pytest.mark.parametrize("key", [True, 1e20, None, 7, b"key"])
def test_keys_of_values_are_text(new_path: Callable[[], Path], key: Any) -> None:
    with SqliteStorage(new_path()) as storage:
        storage.new_search()
        with pytest.raises(UnstorableError, match="key of a value of a search should be a str"):
            storage.put_value("0", key, 1)
        with pytest.raises(UnknownIdError, match="no value 'other'"):
            storage.get_value("0", "other")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("made_by_another", [False, True])
def test_a_store_that_is_still_open_here_does_not_stand_for_the_one_in_its_place(
    new_path: Callable[[], Path], made_by_another: bool
) -> None:
    path, other = new_path(), new_path()
    with SqliteStorage(path) as storage, SqliteStorage(other) as another:
        storage.new_search()
        another.close()
        storage._opened()._disconnect()  # as before a fork: so the inode may be another file's
        if made_by_another:
            path.write_bytes(other.read_bytes())
        else:
            path.unlink()  # and most file systems give the next file the same inode
        with SqliteStorage(path) as in_its_place:
            assert in_its_place.search_ids() == []
            assert in_its_place.new_search() == "0"
            with pytest.raises(StorageError, match="was replaced by another"):
                storage.search_ids()
