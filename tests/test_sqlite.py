"""The storage in a SQLite file: what it keeps, who may use it at once, and what a crash leaves."""

from __future__ import annotations

import gc
import itertools
import math
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings

from elsewhere import Elsewhere
from paraval import JobError, ParavalError
from paraval.errors import CorruptStoreError, StorageError
from paraval.storage import JobChange, JobRecord, MemoryStorage, Storage, UnknownIdError, UnstorableError
from paraval.storage.sqlite import SqliteStorage, opening
from paraval.storage.sqlite.sharing import _registry
from paraval.testing import StorageConformance, storage_machine
from paraval.testing.comparing import fields, same
from support import Program, in_threads, run_program, until


@pytest.fixture
def path(new_path: Callable[[], Path]) -> Path:
    return new_path()


@pytest.fixture
def storage(path: Path) -> Iterator[SqliteStorage]:
    with SqliteStorage(path) as storage:
        yield storage


def everything(storage: Storage) -> dict[str, list[dict[str, Any]]]:
    return {
        search_id: sorted((fields(record) for record in storage.scan(search_id)[0]), key=lambda job: int(job["id"][2:]))
        for search_id in storage.search_ids()
    }


def sql(storage: SqliteStorage, statement: str) -> list[Any]:
    """Run a statement on the storage's own connection."""
    with storage._opened()._lock:
        connection = storage._opened()._connected()
        return connection.execute(statement).fetchall()


# -- the contract ------------------------------------------------------------------------------------------------------


class TestSqliteStorage(StorageConformance):
    """Its peer is in another process, where that may write as this one does."""

    elsewhere: ClassVar[Elsewhere]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def other_process(cls) -> Iterator[None]:
        with Elsewhere() as cls.elsewhere:
            yield

    @pytest.fixture
    def storage(self, journal: str, path: Path) -> Iterator[Storage]:
        self._journal = journal
        with SqliteStorage(path) as storage:
            yield storage

    def make_peer(self, storage: Storage) -> Storage:
        if self._journal == "rollback":
            return self.elsewhere.client(storage)
        peer: Storage = pickle.loads(pickle.dumps(storage))  # noqa: S301 - made in the line itself
        return peer

    def reopen(self, storage: Storage) -> Storage:
        return crash(storage)


@pytest.mark.parametrize("is_sound", [False, True])
def test_at_random(new_path: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, is_sound: bool) -> None:
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: is_sound)
    machine = storage_machine(lambda: SqliteStorage(new_path()), crash)
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
    machine.TestCase("runTest").runTest()


def crash(storage: Storage) -> Storage:
    """Give the store as whoever comes after a crash in the midst of a commit finds it."""
    assert isinstance(storage, SqliteStorage)
    left = half_written(storage)
    storage.close()
    return SqliteStorage(left)


def half_written(storage: SqliteStorage) -> Path:
    """Copy the files as a loss of power in the midst of the next transaction leaves them."""
    path = storage._path
    left = Path(tempfile.mkdtemp(dir=path.parent))

    def begin_and_crash(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA cache_size = 1")  # so that pages are written, once the journal is, before the commit
        connection.execute(
            "INSERT INTO search_values SELECT 9, value, zeroblob(900) FROM json_each('[1,2,3,4,5,6,7,8]')"
        )
        connection.execute("UPDATE entries SET data = zeroblob(30000)")
        connection.execute("UPDATE new_jobs SET owner = 'nobody'")
        for file in path.parent.glob(f"{path.name}*"):
            if not file.name.endswith("-shm"):  # which a loss of power does not leave
                shutil.copy(file, left / file.name)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        storage._opened().write(begin_and_crash)
    return left / path.name


def test_a_crash_in_the_midst_of_a_commit_leaves_what_was_before(journal: str, storage: SqliteStorage) -> None:
    search_id = storage.new_search()
    storage.insert(search_id, [JobRecord(args=(number, "x" * 200)) for number in range(200)])
    before = everything(storage)
    left = half_written(storage)
    (beside,) = [file for file in left.parent.iterdir() if file != left]
    assert beside.name == f"{left.name}-{'wal' if journal == 'wal' else 'journal'}"
    with SqliteStorage(left) as found:
        assert everything(found) == before
        assert sql(found, "PRAGMA integrity_check") == [("ok",)]


def test_a_crash_in_the_midst_of_a_commit_is_one(storage: SqliteStorage) -> None:
    """The file alone, without its journal, is broken: so the test above tests something."""
    search_id = storage.new_search()
    storage.insert(search_id, [JobRecord(args=(number, "x" * 200)) for number in range(200)])
    left = half_written(storage)
    left.with_name(f"{left.name}-journal").unlink()
    with pytest.raises((CorruptStoreError, UnknownIdError)):
        everything(SqliteStorage(left))


# -- killed at any moment ----------------------------------------------------------------------------------------------

DRIVER = """
import random, sys
from paraval.storage import JobChange, JobRecord
from paraval.storage.sqlite import SqliteStorage, opening

opening.has_sound_wal = lambda version: {is_sound}
storage = SqliteStorage({path!r})
chance = random.Random({seed})
search_id = (storage.search_ids() or [storage.new_search()])[0]
print("ready", flush=True)
while True:
    records = [JobRecord(args=(chance.random(),), out=0) for _ in range(chance.choice([1, 1, 3, 200]))]
    storage.insert(search_id, records)
    print("made", *(record.id for record in records), flush=True)
    metadata = {{"x": "y" * chance.choice([1, 500])}}
    storage.update([JobChange(record.id, status=2, out=1, metadata=metadata) for record in records])
    print("done", *(record.id for record in records), flush=True)
"""


@pytest.mark.parametrize("is_sound", [False, True])
def test_what_was_acknowledged_survives_a_kill_at_any_moment(path: Path, monkeypatch: Any, is_sound: bool) -> None:
    monkeypatch.setattr(opening, "has_sound_wal", lambda _: is_sound)
    chance = random.Random(7)
    made: set[str] = set()
    done: set[str] = set()
    for kill in range(6):
        with Program(DRIVER.format(path=str(path), seed=kill, is_sound=is_sound)) as driver:
            driver.read_until("ready")
            killer = threading.Timer(chance.uniform(0, 0.15), driver.send, [signal.SIGKILL])
            killer.start()
            driver.wait()
            killer.join()
            for line in driver.stdout:
                kind, *job_ids = line.split(" ")
                ({"made": made, "done": done}.get(kind, set())).update(job_ids[:-1])  # the last may be cut
        with SqliteStorage(path) as storage:
            records = {record.id: record for record in storage.scan("0")[0]}
            assert made <= set(records)
            assert {job_id for job_id in done if records[job_id].out != 1} == set()
            assert sorted(int(job_id[2:]) for job_id in records) == list(range(len(records)))
            assert sql(storage, "PRAGMA integrity_check") == [("ok",)]
    assert done


# -- many at once ------------------------------------------------------------------------------------------------------


def test_threads_that_write_at_once_share_a_commit(storage: SqliteStorage) -> None:
    search_id = storage.new_search()
    database = storage._opened()
    begun, go_on = threading.Event(), threading.Event()

    def first(connection: sqlite3.Connection) -> None:
        begun.set()
        assert go_on.wait(20)

    statements: list[str] = []
    sql(storage, "SELECT 1")
    assert database._connection is not None
    database._connection.set_trace_callback(statements.append)

    def bad() -> str:
        with pytest.raises(UnknownIdError):
            storage.update([JobChange("0.99", out=1)])
        return "refused"

    def release() -> str:
        until(lambda: len(database._queue) == 8)
        go_on.set()
        return ""

    def good() -> str:
        assert begun.wait(20)
        return storage.create_new_job(search_id)

    made = in_threads(partial(database.write, first), *[good] * 8, release)
    assert sorted(made[1:9]) == [f"0.{number}" for number in range(8)]
    assert statements.count("COMMIT") == 2  # of the first, and of all the others
    begun.clear()
    go_on.clear()
    made = in_threads(partial(database.write, first), *[good] * 7, lambda: begun.wait(20) and bad(), release)
    assert "refused" in made
    assert len(storage.scan(search_id)[0]) == 15, "the others were stored nevertheless"


def test_a_scan_beside_writers_misses_nothing(storage: SqliteStorage) -> None:
    search_id = storage.new_search()
    records = [JobRecord(out=0) for _ in range(5000)]
    storage.insert(search_id, records)
    stop = threading.Event()

    def write() -> None:
        chance = random.Random(1)
        for step in itertools.count(1):
            if stop.is_set():
                return
            # Two jobs are always changed together.
            first = chance.randrange(2500)
            storage.update([JobChange(records[index].id, out=step) for index in (first, first + 2500)])

    def read() -> None:
        try:
            for _ in range(10):
                found, _revision = storage.scan(search_id)
                outs = {record.id: record.out for record in found}
                assert len(found) == len(outs) == 5000
                assert all(outs[f"0.{index}"] == outs[f"0.{index + 2500}"] for index in range(2500))
        finally:
            stop.set()

    in_threads(write, read)


TWO = """
import random, sys
from paraval.storage import JobChange, JobRecord
from paraval.storage.sqlite import SqliteStorage

storage = SqliteStorage({path!r})
print("ready", flush=True)
sys.stdin.readline()
made = 0
while made < 1000:
    records = [JobRecord(args=({name!r},)) for _ in range(random.choice([1, 1, 1, 1, 12]))]
    storage.insert("0", records)
    storage.update([JobChange(record.id, status=2, out=record.id) for record in records])
    storage.renew({name!r}, 60)
    storage.scan("0", records[0].revision)
    made += len(records)
print(made)
"""


def test_two_processes_on_one_file(path: Path) -> None:
    with SqliteStorage(path) as storage:
        storage.new_search()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TWO.format(path=str(path), name=name)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in ("one", "two")
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        results = in_threads(*[partial(process.communicate, "go\n", timeout=50) for process in processes])
        assert [error for _, error in results] == ["", ""]
        counts = [int(out) for out, _ in results]
        records, _ = storage.scan("0")
        assert len(records) == sum(counts)
        assert all(record.out == record.id for record in records)
        assert [sum(record.args == (name,) for record in records) for name in ("one", "two")] == counts
        assert storage.owners() == {"one", "two"}


def test_a_store_that_another_program_has_locked_is_waited_for(path: Path) -> None:
    with SqliteStorage(path, timeout=20) as storage, closing(sqlite3.connect(path, isolation_level=None)) as other:
        search_id = storage.new_search()
        other.execute("BEGIN EXCLUSIVE")

        def release() -> None:
            until(storage._opened()._lock.locked)
            other.execute("COMMIT")

        assert in_threads_but_first(release, lambda: storage.create_new_job(search_id)) == "0.0"
        other.execute("BEGIN EXCLUSIVE")
        assert in_threads_but_first(release, lambda: storage.scan(search_id)[1]) == 1
        other.execute("BEGIN")
        other.execute("SELECT * FROM entries").fetchall()  # a reader: it keeps others from committing, not from writing
        assert in_threads_but_first(release, lambda: storage.create_new_job(search_id)) == "0.1"


def in_threads_but_first(here: Callable[[], object], elsewhere: Callable[[], Any]) -> Any:
    """Call one function in a thread, as a connection of sqlite3 belongs to the thread that made it."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(elsewhere()), daemon=True)
    thread.start()
    here()
    thread.join(20)
    return results[0]


def test_a_store_that_stays_locked_is_an_error_after_the_time_given(path: Path) -> None:
    with SqliteStorage(path, timeout=0.05) as storage, closing(sqlite3.connect(path, isolation_level=None)) as other:
        search_id = storage.new_search()
        other.execute("BEGIN EXCLUSIVE")
        for call in (
            lambda: storage.create_new_job(search_id),
            lambda: storage.scan(search_id),
            lambda: pickle.loads(pickle.dumps(storage)).connect().search_ids(),  # noqa: S301 - made in the line itself
        ):
            with pytest.raises(StorageError, match=r"locked by another program for 0\.05 s"):
                call()
        other.execute("COMMIT")
        other.execute("BEGIN")
        other.execute("SELECT * FROM entries").fetchall()
        with pytest.raises(StorageError, match="locked"):
            storage.create_new_job(search_id)
        other.execute("COMMIT")
        assert storage.create_new_job(search_id) == "0.0"


def test_whoever_waits_for_a_locked_store_can_be_interrupted(path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with SqliteStorage(path, timeout=1000) as storage, closing(sqlite3.connect(path, isolation_level=None)) as other:
        search_id = storage.new_search()
        other.execute("BEGIN EXCLUSIVE")
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                storage.create_new_job(search_id)
            with storage._opened()._lock:  # as while another thread has its turn
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(KeyboardInterrupt):
                    storage.create_new_job(search_id)
        finally:
            signal.signal(signal.SIGALRM, before)
        other.execute("COMMIT")
        assert storage.create_new_job(search_id) == "0.0", "what was interrupted is not done later"


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_pickled_storage_is_the_same_store_in_another_process(storage: SqliteStorage) -> None:
    job_id = storage.create_new_job(storage.new_search())
    program = f"""
        import pickle
        storage = pickle.loads({pickle.dumps(storage)!r})
        assert not storage.is_connected()
        storage.store_job_out({job_id!r}, 2)
        print(storage.is_connected(), storage.load_job({job_id!r})["out"])
    """
    assert run_program(program).stdout == ["True 2"]
    assert storage.load_job(job_id)["out"] == 2
    assert storage.can_travel
    assert not storage.by_reference


def test_an_unpickled_storage_makes_no_new_file(storage: SqliteStorage, path: Path) -> None:
    data = pickle.dumps(storage)
    storage.close()
    path.unlink()
    with pytest.raises(StorageError, match="is gone"):
        pickle.loads(data).search_ids()  # noqa: S301 - made above
    assert not path.exists()


def test_a_fork_has_a_connection_of_its_own(path: Path) -> None:
    program = f"""
        import os, sqlite3, sys, threading, warnings
        from paraval.storage import JobChange, JobRecord
        from paraval.storage.sqlite import SqliteStorage, opening

        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: that a process with threads forks
        for is_sound in (False, True):
            opening.has_sound_wal = lambda version: is_sound
            storage = SqliteStorage({str(path)!r} + str(is_sound))
            search_id = storage.new_search()
            stop = threading.Event()
            made = []

            def write():
                while not stop.is_set():
                    made.append(storage.create_new_job(search_id))

            threads = [threading.Thread(target=write) for _ in range(2)]
            for thread in threads:
                thread.start()
            for _ in range(10):
                if (child := os.fork()) == 0:
                    assert not storage.is_connected()
                    for _ in range(5):
                        job_id = storage.create_new_job(search_id)
                        storage.store_job_out(job_id, "child")
                    storage.close()
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            stop.set()
            for thread in threads:
                thread.join()
            records, _ = storage.scan(search_id)
            assert len(records) == len(made) + 50, (len(records), len(made))
            assert sum(record.out == "child" for record in records) == 50
            with sqlite3.connect({str(path)!r} + str(is_sound)) as other:
                assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            other.close()
            storage.close()
        print("well")
    """
    done = run_program(program)
    assert (done.stdout, done.stderr) == (["well"], "")


def test_a_forked_child_may_end_as_it_likes(path: Path) -> None:
    """What it has of its parent's is not closed on the way out, which would roll back what the parent is doing."""
    program = f"""
        import os, sys, threading, warnings
        from paraval.storage.sqlite import SqliteStorage

        warnings.simplefilter("ignore", DeprecationWarning)
        storage = SqliteStorage({str(path)!r})
        search_id = storage.new_search()
        if (child := os.fork()) == 0:
            storage.create_new_job(search_id)
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(storage.create_new_job(search_id))
    """
    done = run_program(program)
    assert (done.stdout, done.stderr) == (["0.1"], "")


# -- open and closed ---------------------------------------------------------------------------------------------------


def descriptors(path: Path) -> int:
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += str(link.readlink()).startswith(str(path))
        except OSError:  # the one of the listing itself
            continue
    return found


def test_storages_on_one_file_share_a_connection(path: Path) -> None:
    first = SqliteStorage(path)
    second = SqliteStorage(os.path.relpath(path))
    assert first._opened() is second._opened()
    search_id = first.new_search()
    assert second.search_ids() == [search_id]
    first.close()
    assert second.is_connected()
    assert not first.is_connected()
    assert descriptors(path) > 0
    second.close()
    second.close()
    assert descriptors(path) == 0
    assert first.search_ids() == [search_id]
    assert first.is_connected()
    first.close()
    assert not _registry


def test_a_storage_that_is_dropped_closes_its_file(path: Path) -> None:
    storage = SqliteStorage(path)
    assert descriptors(path) > 0
    del storage
    gc.collect()
    assert descriptors(path) == 0
    assert not _registry


def test_the_garbage_collector_may_drop_a_storage_at_any_moment(path: Path) -> None:
    """Even in the midst of what holds all locks: it is closed by whoever opens or closes the next."""
    from paraval.storage.sqlite import sharing

    storage = SqliteStorage(path)
    other = SqliteStorage(path.with_name("other.db"))
    with sharing._registry_lock, other._opened()._lock:
        del storage
        gc.collect()
    assert descriptors(path) > 0
    SqliteStorage(path.with_name("third.db")).close()
    assert descriptors(path) == 0
    other.close()


def test_a_storage_closed_by_one_thread_goes_on_in_another(storage: SqliteStorage) -> None:
    search_id = storage.new_search()
    made: list[str] = []
    stop = threading.Event()

    def write() -> None:
        try:
            made.extend(storage.create_new_job(search_id) for _ in range(200))
        finally:
            stop.set()

    def close() -> None:
        while not stop.is_set():
            storage.close()

    in_threads(write, close)
    assert storage.load_all_job_ids(search_id) == made


def test_another_storage_of_the_process_does_not_drop_its_locks(storage: SqliteStorage, path: Path) -> None:
    """Closing any descriptor of the file drops all locks that the process has on it."""
    search_id = storage.new_search()
    begun, go_on = threading.Event(), threading.Event()

    def long(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM leases")
        begun.set()
        assert go_on.wait(20)

    def meanwhile() -> list[str]:
        assert begun.wait(20)
        try:
            opening.locate(path, may_create=True)
            opened = [threading.Thread(target=lambda: SqliteStorage(path).close()) for _ in range(3)]
            for thread in opened:
                thread.start()
            program = f"""
                import sqlite3
                other = sqlite3.connect({str(path)!r}, isolation_level=None, timeout=0)
                try:
                    other.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError as exc:
                    print(exc)
            """
            return run_program(program).stdout
        finally:
            go_on.set()
            for thread in opened:
                thread.join(20)

    _, said = in_threads(partial(storage._opened().write, long), meanwhile)
    assert said == ["database is locked"]
    assert storage.create_new_job(search_id) == "0.0"


# -- costs -------------------------------------------------------------------------------------------------------------


def steps(storage: SqliteStorage, call: Callable[[], object]) -> int:
    """Count the instructions of SQLite's machine."""
    count = itertools.count()
    database = storage._opened()
    database.connect()
    assert database._connection is not None
    database._connection.set_progress_handler(lambda: next(count) < 0, 1)
    call()
    database._connection.set_progress_handler(None, 1)
    return next(count)


def costs(path: Path, size: int) -> dict[str, int]:
    """Tell what operations cost in a store of so many jobs, in instructions; and opening it, in 16 KiB read."""
    with SqliteStorage(path) as storage:
        search_id = storage.new_search()
        records = [JobRecord(args=({"x": number},)) for number in range(size)]
        storage.insert(search_id, records)
        storage.update([JobChange(record.id, status=2, out=1.0) for record in records])
        _, revision = storage.scan(search_id)
        storage.close()
        before = read_by_this_process()
        storage.connect()
        opened = read_by_this_process() - before
        some = [record.id for record in records[:3]]
        return {
            "open": opened // 16384,
            "look whether a search is there": steps(storage, lambda: storage.scan(search_id, sys.maxsize)),
            "scan what is new": steps(storage, lambda: storage.scan(search_id, revision)),
            "insert": steps(storage, lambda: storage.create_new_job(search_id)),
            "update": steps(storage, lambda: storage.update([JobChange(each, out=2) for each in some])),
            "get": steps(storage, lambda: storage.get(some)),
        }


def test_what_it_costs_does_not_grow_with_what_is_stored(path: Path) -> None:
    assert costs(path.with_name("small.db"), 128) == costs(path.with_name("large.db"), 5120)


def read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def test_what_a_change_costs_does_not_grow_with_what_the_job_has_been_through(storage: SqliteStorage) -> None:
    memory = MemoryStorage()
    record, known = JobRecord(args=("a",), owner="me"), JobRecord(args=("a",), owner="me")
    for store, made in ((storage, record), (memory, known)):
        store.insert(store.new_search(), [made])
        for number in range(3000):
            store.store_job_intermediate(made.id, number, "x" * 20)
        store.update([JobChange(made.id, metadata={"x": "y" * 20_000}, status=1)])
        for number in range(3):
            store.store_job_metadata(made.id, f"m{number}", number)
    assert fields(storage.get(["0.0"])[0]) == fields(memory.get(["0.0"])[0])
    before = steps(storage, lambda: storage.store_job_metadata("0.0", "more", 1))
    memory.store_job_metadata("0.0", "more", 1)
    for store in (storage, memory):
        (found,) = store.get(["0.0"])
        assert store.adopt({"0.0": found.revision}, "them") == {"0.0"}
    assert fields(storage.get(["0.0"])[0]) == fields(memory.get(["0.0"])[0])
    new = storage.create_new_job("0")
    assert before == steps(storage, lambda: storage.store_job_metadata(new, "more", 1))


def test_large_values_have_entries_of_their_own_and_come_back(storage: SqliteStorage) -> None:
    search_id = storage.new_search()
    records = [JobRecord(args=("z" * size,)) for size in (10, 10_000, 3_000_000)]
    storage.insert(search_id, records)
    storage.update([JobChange(record.id, status=2, out=b"o" * 2_000_000) for record in records])
    for found, record in zip(storage.get(record.id for record in records), records, strict=True):
        assert (found.args, found.out) == (record.args, b"o" * 2_000_000)
    assert sql(storage, "SELECT count(*) FROM entries") == [(6,)]  # who wants one job need not read what is large


def test_what_is_new_is_found_from_any_revision_on(storage: SqliteStorage) -> None:
    """An entry holds up to 64 changes, and a revision may lie in the midst of one."""
    memory = MemoryStorage()
    for store in (storage, memory):
        search_id = store.new_search()
        records = [JobRecord(args=(number,), owner="me" if number < 90 else None) for number in range(150)]
        store.insert(search_id, records)
        ids = [record.id for record in records]
        store.update([JobChange(job_id, status=2, out=1.0, metadata={"a": 1}, by="me") for job_id in ids[::-1]])
        store.update([JobChange(job_id, intermediate=(1, number)) for number in range(3) for job_id in ids[::2]])
        assert store.adopt({record.id: record.revision for record in store.get(ids[80:100])}, "them") == set(
            ids[80:100]
        )
        store.update([JobChange(job_id, out=number, by="me") for number, job_id in enumerate(ids[70:100])])
    _, last = memory.scan("0")
    assert storage.scan("0")[1] == last
    for since in range(-1, last + 2):
        found, revision = storage.scan("0", since)
        expected, _ = memory.scan("0", since)
        assert revision == last
        assert [fields(record) for record in found] == [fields(record) for record in expected]
    assert sql(storage, "SELECT owner, count(*) FROM adopted GROUP BY owner") == [("them", 20)]


def test_batches_are_cut_where_one_statement_would_be_too_large(
    storage: SqliteStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paraval.storage.sqlite import rows

    monkeypatch.setattr(rows, "_MOST_BYTES", 300)
    search_id = storage.new_search()
    records = [JobRecord(args=(number, "x" * (number % 7 * 50))) for number in range(100)]
    storage.insert(search_id, records)
    storage.update([JobChange(record.id, out=record.args) for record in records])
    found, revision = storage.scan(search_id)
    assert revision == 200
    assert [(record.id, record.revision, record.out) for record in found] == [
        (f"0.{number}", 101 + number, [number, "x" * (number % 7 * 50)]) for number in range(100)
    ]


# -- faults ------------------------------------------------------------------------------------------------------------


class CommitsAndFails(sqlite3.Connection):
    """A connection on a disk that fails after a commit has taken effect, when SQLite lets go of the journal."""

    commits_until_failure = sys.maxsize

    def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
        cursor = super().execute(statement, *args)
        if statement == "COMMIT":
            CommitsAndFails.commits_until_failure -= 1
            if not CommitsAndFails.commits_until_failure:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
        return cursor


def test_what_was_committed_though_it_failed_is_not_done_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: connect(*args, factory=CommitsAndFails, **kw))
    with SqliteStorage(path) as storage:

        def failing(call: Callable[[], Any]) -> Any:
            CommitsAndFails.commits_until_failure = 1
            try:
                return call()
            finally:
                assert CommitsAndFails.commits_until_failure <= 0
                CommitsAndFails.commits_until_failure = sys.maxsize

        storage.new_search()
        records = [JobRecord(args=(number,), owner="me") for number in range(100)]
        failing(lambda: storage.insert("0", records))
        assert [record.id for record in records] == [f"0.{number}" for number in range(100)]
        failing(lambda: storage.store_job_intermediate("0.1", 1.0, 2.0))
        assert failing(lambda: storage.adopt({"0.2": 3}, "them")) == {"0.2"}
        found, revision = storage.scan("0")
        assert (len(found), revision) == (100, 102)
        assert [(record.objectives, record.owner) for record in storage.get(["0.1", "0.2"])] == [
            ([2.0], "me"),
            (None, "them"),
        ]
        assert failing(storage.new_search) == "1"
        assert storage.search_ids() == ["0", "1"]
        failing(lambda: storage.put_value("1", "key", 5))
        assert storage.get_value("1", "key") == 5
        failing(lambda: storage.renew("me", 100))
        assert storage.owners() == {"me"}


def test_what_was_committed_in_parts_though_it_failed_is_not_done_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: connect(*args, factory=CommitsAndFails, **kw))
    monkeypatch.setattr("paraval.storage.sqlite.rows._MOST_BYTES", 300)
    with SqliteStorage(path) as storage:
        storage.new_search()
        records = [JobRecord(args=("x" * 50,)) for _ in range(200)]
        changes = [JobChange(f"0.{number}", intermediate=(1.0, 2.0)) for number in range(200)]
        calls: list[Callable[[], None]] = [lambda: storage.insert("0", records), lambda: storage.update(changes)]
        for call in calls:
            CommitsAndFails.commits_until_failure = 1
            call()
            assert CommitsAndFails.commits_until_failure <= 0
            CommitsAndFails.commits_until_failure = sys.maxsize
        found, revision = storage.scan("0")
        assert (len(found), revision) == (200, 400)
        assert {tuple(record.objectives or ()) for record in found} == {(2.0,)}


def test_what_was_committed_together_though_it_failed_is_not_done_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all is there is asked of each, also of what could well be done twice."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: connect(*args, factory=CommitsAndFails, **kw))
    with SqliteStorage(path) as storage:
        storage.new_search()
        records = [JobRecord(owner="me"), JobRecord(owner="them")]
        storage.insert("0", records)
        calls = [
            lambda: storage.put_value("0", "key", 5),
            lambda: storage.renew("me", 100),
            storage.new_search,
            lambda: storage.create_new_job("0"),
            lambda: storage.store_job_intermediate("0.0", 1.0, 2.0),
            lambda: storage.update([JobChange("0.1", out=1, by="me")]),  # is left out
            lambda: storage.adopt({"0.1": 99}, "me"),  # likewise
        ]
        database = storage._opened()

        def release() -> None:
            until(lambda: len(database._queue) == len(calls))
            CommitsAndFails.commits_until_failure = 1
            database._lock.release()

        database._lock.acquire()
        *_, new_search, new_job, _, _, adopted, _ = in_threads(*calls, release)
        assert CommitsAndFails.commits_until_failure <= 0
        assert (new_search, new_job, adopted) == ("1", "0.2", set())
        assert storage.search_ids() == ["0", "1"]
        assert [record.objectives for record in storage.get(["0.0", "0.1", "0.2"])] == [[2.0], None, None]
        assert len(storage.scan("0")[0]) == 3


def script() -> list[Callable[[Storage], object]]:
    """Operations of every kind; made anew for each use, as an insert numbers the records it is given."""
    many = [JobRecord(args=(number, "x" * 100), owner="me") for number in range(60)]
    return [
        lambda storage: storage.new_search(),
        lambda storage: storage.insert("0", many),
        lambda storage: storage.insert("0", [JobRecord(args=("z" * 30_000,), metadata={"a": 1})]),
        lambda storage: storage.update(
            [JobChange(f"0.{number}", status=2, out=number, by="me") for number in range(40)]
        ),
        lambda storage: storage.update([JobChange("0.0", out="o" * 20_000), JobChange("0.60", metadata={"b": 2})]),
        lambda storage: storage.update([JobChange("0.1", intermediate=(1, 2)), JobChange("0.1", extra={"mine": 1})]),
        lambda storage: storage.put_value("0", "key", list(range(3000))),
        lambda storage: storage.renew("me", math.inf),
        lambda storage: storage.adopt({record.id: record.revision for record in storage.get(["0.1", "0.60"])}, "them"),
        lambda storage: storage.new_search(),
    ]


def state(storage: Storage) -> Any:
    found: list[Any] = [everything(storage), storage.owners()]
    try:
        found.append(storage.get_value("0", "key"))
    except UnknownIdError:
        found.append("none")
    return found


def test_a_full_disk_loses_nothing_whenever_it_fills(journal: str, path: Path) -> None:
    failures = 0
    for room in range(40):
        memory = MemoryStorage()
        with SqliteStorage(path.with_name(f"{room}.db")) as storage:
            pages = sql(storage, "PRAGMA page_count")[0][0]
            sql(storage, f"PRAGMA max_page_count = {pages + room}")
            for here, there in zip(script(), script(), strict=True):
                try:
                    here(storage)
                except StorageError as exc:
                    assert "there is no room" in str(exc)  # noqa: PT017 - when it fills is not the same everywhere
                    assert same(state(storage), state(memory)), "all or none"
                    failures += 1
                    sql(storage, "PRAGMA max_page_count = 100000")
                    here(storage)
                there(memory)
            assert same(state(storage), state(memory))
            assert sql(storage, "PRAGMA integrity_check") == [("ok",)]
    assert failures > 10


def test_every_operation_that_fails_at_any_step_is_done_wholly_or_not_at_all(journal: str, path: Path) -> None:
    """SQLite asks after every few instructions of its machine whether to go on; here it is told not to, once."""
    memory = MemoryStorage()
    failures = 0
    with SqliteStorage(path) as storage:
        for here, there in zip(script(), script(), strict=True):
            before = state(memory)
            # From short to long: each step in the beginning, where statements begin, and some of the many later ones.
            for last in itertools.takewhile(lambda last: last < 10**6, (int(1.35**n) + n for n in itertools.count())):
                left = itertools.count(last, -1)
                database = storage._opened()
                database.connect()
                assert database._connection is not None
                database._connection.set_progress_handler(lambda: next(left) == 0, 1)  # noqa: B023 - it is used at once
                try:
                    here(storage)
                except StorageError as exc:
                    assert "interrupted" in str(exc)  # noqa: PT017 - the last try succeeds
                    failures += 1
                else:
                    break
                finally:
                    database._connection.set_progress_handler(None, 1)
                assert same(state(storage), before)
            there(memory)
            assert same(state(storage), state(memory))
        assert sql(storage, "PRAGMA integrity_check") == [("ok",)]
    assert failures > 100


def test_a_value_that_sqlite_cannot_take_is_refused_alone(storage: SqliteStorage) -> None:
    search_id = storage.new_search()
    sql(storage, "SELECT 1")
    database = storage._opened()
    assert database._connection is not None
    database._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    with pytest.raises(UnstorableError, match="larger than what SQLite keeps"):
        storage.insert(search_id, [JobRecord(out="x" * 200_000)])
    with pytest.raises(UnstorableError, match="half a character"):
        storage.insert(search_id, [JobRecord(owner="\udc80")])
    with pytest.raises(UnstorableError, match="half a character"):
        storage.get_value(search_id, "\udc80")
    assert storage.create_new_job(search_id) == "0.0"


@pytest.mark.parametrize(
    "job_id",
    ["0.00", "0.-1", "0.1_0", "00.0", " 0.0", "0. 0", "0.0.0", "-1.0", "0.", ".0", "0.9" + "9" * 5000, "\u0660.\u0660"],
)
def test_an_id_is_known_by_its_letters(storage: SqliteStorage, job_id: str) -> None:
    storage.create_new_job(storage.new_search())
    for call in (
        lambda: storage.get([job_id]),
        lambda: storage.store_job_out(job_id, 1),
        lambda: storage.adopt({job_id: 1}, "me"),
        lambda: storage.scan(job_id.rpartition(".")[0] + "9"),
        lambda: storage.create_new_job("9" * 5000),
    ):
        with pytest.raises(UnknownIdError):
            call()


def test_numbers_that_no_row_can_have_are_unknown(storage: SqliteStorage) -> None:
    for job_id in (f"0.{2**40}", f"{2**23}.0", f"{2**63}.0", f"0.{2**80}"):
        with pytest.raises(UnknownIdError):
            storage.get([job_id])
    with pytest.raises(UnknownIdError):
        storage.scan(str(2**23))


def test_an_error_of_a_job_comes_back_whole(storage: SqliteStorage) -> None:
    error = JobError("exception", "\udc80", traceback="t", attempts=2, history=(JobError("timeout", "late", pid=3),))
    storage.insert(storage.new_search(), [JobRecord(error=error)])
    assert storage.get(["0.0"])[0].error == error
    storage.update([JobChange("0.0", error=error._replace(message="m"))])
    assert storage.get(["0.0"])[0].error == error._replace(message="m")


def test_its_repr_names_the_file(storage: SqliteStorage, path: Path) -> None:
    assert repr(storage) == f"SqliteStorage({str(path)!r})"


def test_its_errors_are_ours(storage: SqliteStorage) -> None:
    sql(storage, "DROP TABLE leases")
    with pytest.raises(ParavalError, match="a part of its layout is missing") as caught:
        storage.owners()
    assert isinstance(caught.value, CorruptStoreError)
    assert isinstance(caught.value.__cause__, sqlite3.Error)
