"""New jobs that are committed with what comes next: certain in this process, and lost with it alone."""

from __future__ import annotations

import gc
import itertools
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from paraval import RunningJob
from paraval.errors import StorageError
from paraval.storage import JobChange, JobRecord, MemoryStorage, Storage, UnknownIdError
from paraval.storage.sqlite import SqliteStorage, rows
from paraval.storage.writer import Writer
from paraval.testing.comparing import fields, same
from support import in_threads, make, run_program, until


@pytest.fixture
def path(new_path: Callable[[], Path]) -> Path:
    return new_path()


@pytest.fixture
def storage(path: Path) -> Iterator[SqliteStorage]:
    with SqliteStorage(path, timeout=10) as storage:
        storage.new_search()
        yield storage


def new(storage: Storage, count: int = 1) -> list[str]:
    records = [JobRecord(args=(number,), owner="me") for number in range(count)]
    storage.insert_soon("0", records)
    return [record.id for record in records]


def end(storage: Storage, job_id: str) -> None:
    storage.update([JobChange(job_id, status=2, out=job_id * 100, by="me")])


def elsewhere(path: Path) -> int:
    """Give how many jobs another program finds."""
    with closing(sqlite3.connect(path)) as other:
        return int(other.execute("SELECT ifnull(sum(count), 0) FROM new_jobs").fetchone()[0])


def lose_transaction(storage: SqliteStorage) -> None:
    """Do what follows an error of the disk: the connection is closed, and opened anew when it is needed."""
    database = storage._opened()
    with database._lock:
        database._disconnect()


# -- what it is for ----------------------------------------------------------------------------------------------------


def test_new_jobs_share_the_commit_of_what_follows(journal: str, storage: SqliteStorage, path: Path) -> None:
    commits: list[str] = []
    connection = storage._opened()._connection
    assert connection is not None
    connection.set_trace_callback(lambda statement: commits.append(statement) if statement == "COMMIT" else None)
    for number in range(5):
        (first,), (second,) = new(storage), new(storage)
        assert (first, second) == (f"0.{2 * number}", f"0.{2 * number + 1}")
        assert elsewhere(path) == 2 * number
        assert len(commits) == number
        end(storage, first)
        assert len(commits) == number + 1
        assert elsewhere(path) == 2 * number + 2
    connection.set_trace_callback(None)


FOLLOWING: dict[str, Callable[[SqliteStorage], object]] = {
    "flush": lambda storage: storage.flush(),
    "get": lambda storage: storage.get(["0.0"]),
    "scan": lambda storage: storage.scan("0"),
    "insert": lambda storage: storage.insert("0", []),
    "renew": lambda storage: storage.renew("me", 1),
    "close": lambda storage: storage.close(),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("call", FOLLOWING.values(), ids=FOLLOWING.keys())
def test_whatever_follows_commits(storage: SqliteStorage, path: Path, call: Callable[[SqliteStorage], object]) -> None:
    new(storage, 3)
    assert elsewhere(path) == 0
    call(storage)
    assert elsewhere(path) == 3


def test_a_storage_that_is_dropped_commits(path: Path) -> None:
    storage = SqliteStorage(path)
    storage.new_search()
    new(storage)
    del storage
    gc.collect()
    assert elsewhere(path) == 1


def test_what_fails_for_its_own_reasons_leaves_the_rest(storage: SqliteStorage, path: Path) -> None:
    (first,) = new(storage)
    with pytest.raises(UnknownIdError):
        storage.insert_soon("7", [JobRecord()])
    (second,) = new(storage)
    with pytest.raises(UnknownIdError):
        end(storage, "0.99")
    assert elsewhere(path) == 2  # nobody is kept waiting for what may never come
    end(storage, second)
    assert storage.load_jobs([first, second])[second]["out"] == second * 100


def test_large_jobs_are_written_at_once(storage: SqliteStorage, path: Path) -> None:
    storage.insert_soon("0", [JobRecord(args=("x" * 5_000_000,))])
    assert elsewhere(path) == 1


# -- others ------------------------------------------------------------------------------------------------------------


def test_another_program_waits_no_longer_than_until_the_flush(storage: SqliteStorage, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
        (job_id,) = new(storage)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        end(storage, job_id)
        other.execute("BEGIN IMMEDIATE")  # between two of ours
        rows.add_search(other, b"token")
        storage.flush()
        other.execute("COMMIT")
    assert storage.search_ids() == ["0", "1"]


def test_another_program_that_writes_gets_its_turn(storage: SqliteStorage, path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)) as other:
        end(storage, *new(storage))
        other.execute("BEGIN IMMEDIATE")
        rows.add_search(other, b"token")

        def commit() -> bool:
            try:
                other.execute("COMMIT")
            except sqlite3.OperationalError:
                return False
            return True

        def go_on() -> list[str]:
            return new(storage)

        assert in_threads(go_on, lambda: until(commit))[0] == ["0.1"]
        assert elsewhere(path) == 2  # as somebody else writes, it was not left open


DRIVER = """
import sys
from paraval import Evaluator
from paraval.storage import SqliteStorage

async def run(job):
    return job["x"]

with SqliteStorage(sys.argv[1], timeout=10) as storage:
    with Evaluator.create(run, "serial", {"num_workers": 1, "storage": storage, "search_id": "0"}) as evaluator:
        for x in range(150):
            evaluator.submit([{"x": x}])
            (job,) = evaluator.gather("BATCH", 1)
            print(job.id, flush=True)
"""


def test_two_drivers_in_turns(storage: SqliteStorage, path: Path) -> None:
    drivers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", DRIVER, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    printed = [driver.communicate(timeout=50) for driver in drivers]
    assert [(driver.returncode, said) for driver, (_, said) in zip(drivers, printed, strict=True)] == [(0, b"")] * 2
    job_ids = b"".join(out for out, _ in printed).decode().split()
    assert sorted(job_ids) == sorted(f"0.{number}" for number in range(300))
    assert {record.status for record in storage.get(job_ids)} == {2}


def test_a_fork_commits_and_has_none_of_it(path: Path) -> None:
    program = f"""
        import os
        from paraval.storage import JobRecord
        from paraval.storage.sqlite import SqliteStorage

        storage = SqliteStorage({str(path)!r})
        storage.new_search()
        storage.insert_soon("0", [JobRecord(owner="me")])
        if (child := os.fork()) == 0:
            assert storage.create_new_job("0") == "0.1"
            storage.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert storage.create_new_job("0") == "0.2"
        storage.close()
        print("well")
    """
    done = run_program(program)
    assert (done.stdout, done.stderr) == (["well"], "")


# -- what is lost, and what is not -------------------------------------------------------------------------------------


def test_a_crash_loses_what_was_not_acknowledged(journal: str, storage: SqliteStorage, path: Path) -> None:
    program = f"""
        import os, signal
        from paraval.storage import JobChange, JobRecord
        from paraval.storage.sqlite import SqliteStorage, opening

        opening.has_sound_wal = lambda version: {journal == "wal"}
        storage = SqliteStorage({str(path)!r})
        for _ in range(3):
            storage.insert_soon("0", [record := JobRecord(owner="me")])
            storage.update([JobChange(record.id, status=2, by="me")])
        storage.insert_soon("0", [JobRecord(owner="me")])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    storage.close()  # so that the other may choose its way to write
    done = subprocess.run([sys.executable, "-c", program.replace("\n        ", "\n")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [record.status for record in storage.scan("0")[0]] == [2, 2, 2]
    assert storage.create_new_job("0") == "0.3"


@pytest.mark.parametrize("is_long", [False, True])
def test_a_transaction_that_is_lost_is_done_again(storage: SqliteStorage, path: Path, is_long: bool) -> None:
    job_ids = new(storage, 3) + new(storage, 40 if is_long else 1)
    lose_transaction(storage)
    assert elsewhere(path) == 0
    job_ids += new(storage)
    lose_transaction(storage)
    end(storage, job_ids[1])
    assert job_ids == [f"0.{number}" for number in range(len(job_ids))]
    assert [record.status for record in storage.get(job_ids)] == [0, 2] + [0] * (len(job_ids) - 2)


def test_a_commit_that_succeeded_after_all_is_not_done_again(storage: SqliteStorage, path: Path) -> None:
    job_ids = new(storage, 3)
    database = storage._opened()
    promises = list(database._promises)
    storage.flush()
    database._promises += promises  # as if nobody had heard that it was committed
    job_ids += new(storage)
    end(storage, job_ids[0])
    assert job_ids == ["0.0", "0.1", "0.2", "0.3"]
    assert [record.status for record in storage.get(job_ids)] == [2, 0, 0, 0]


def test_an_interrupt_in_the_middle_loses_no_other_job(storage: SqliteStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = new(storage)
    add_jobs = rows.add_jobs

    def interrupted(*args: Any) -> Any:
        add_jobs(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "add_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new(storage, 2)
    monkeypatch.undo()
    (second,) = new(storage)
    end(storage, first)
    assert (first, second) == ("0.0", "0.1")
    assert len(storage.scan("0")[0]) == 2


def test_numbers_that_another_has_taken_meanwhile_are_told(storage: SqliteStorage, path: Path) -> None:
    lost = new(storage, 2)
    lose_transaction(storage)
    done = run_program(f"""
        from paraval.storage.sqlite import SqliteStorage
        with SqliteStorage({str(path)!r}) as storage:
            print(storage.create_new_job("0"))
    """)
    assert done.stdout == [lost[0]]
    assert new(storage) == ["0.1"]
    for job_id in lost:
        with pytest.raises(StorageError, match=r"jobs 0\.0 to 0\.1 could not be saved"):
            end(storage, job_id)
    with SqliteStorage(path) as another:  # of the same process, on the same file
        with pytest.raises(StorageError, match=r"jobs 0\.0 to 0\.1 could not be saved"):
            end(another, lost[0])
        storage.close()
        with pytest.raises(StorageError, match=r"jobs 0\.0 to 0\.1 could not be saved"):
            end(another, lost[1])
    with pytest.raises(StorageError, match=r"jobs 0\.0 to 0\.1 could not be saved"):
        end(storage, lost[1])  # opened anew by now
    assert [(record.owner, record.status) for record in storage.get(["0.0", "0.1"])] == [(None, 0), ("me", 0)]


def test_a_full_disk_loses_nothing_that_was_given_out(journal: str, path: Path) -> None:
    failures = 0
    for room in range(12):
        memory = MemoryStorage()
        memory.new_search()
        with SqliteStorage(path.with_name(f"{room}.db")) as storage:
            storage.new_search()
            limit(storage, room)
            for number in range(60):
                for call in (
                    lambda storage: new(storage, 2),
                    lambda storage, number=number: end(storage, f"0.{number}"),
                ):
                    try:
                        call(storage)
                    except StorageError as exc:
                        assert "there is no room" in str(exc)  # noqa: PT017 - when it fills is not the same everywhere
                        failures += 1
                        limit(storage, None)
                        call(storage)
                    call(memory)
            assert same(state(storage), state(memory))
    assert failures > 5


def limit(storage: SqliteStorage, room: int | None) -> None:
    database = storage._opened()
    with database._lock:
        connection = database._connected()
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {100_000 if room is None else pages + room}")


def state(storage: Storage) -> list[dict[str, Any]]:
    return sorted((fields(record) for record in storage.scan("0")[0]), key=lambda job: int(job["id"][2:]))


def test_every_step_may_fail(journal: str, storage: SqliteStorage) -> None:
    """SQLite asks after every few instructions of its machine whether to go on; here it is told not to, once."""
    memory = MemoryStorage()
    memory.new_search()
    failures = 0
    script: list[Callable[[Storage], object]] = [
        lambda storage: new(storage, 2),
        lambda storage: end(storage, "0.1"),
        new,
        lambda storage: new(storage, 3),
        lambda storage: end(storage, "0.2"),
        new,
        lambda storage: storage.flush(),
    ]
    for number, call in enumerate(script):
        before = state(memory)
        for last in (int(1.35**n) + n for n in itertools.count()):
            left = itertools.count(last, -1)
            connection = storage._opened()._connected()
            connection.set_progress_handler(lambda: next(left) == 0, 1)  # noqa: B023 - it is used at once
            try:
                call(storage)
            except StorageError as exc:
                assert "interrupted" in str(exc)  # noqa: PT017 - the last try succeeds
                failures += 1
            else:
                break
            finally:
                connection.set_progress_handler(None, 1)
            if last % 2:  # else the next try finds what this one left
                assert same(state(storage), before)
        call(memory)
        if number % 2:
            assert same(state(storage), state(memory))
    assert same(state(storage), state(memory))
    assert failures > 50


# -- when the engine makes use of it -----------------------------------------------------------------------------------


class Noted(MemoryStorage):
    """Notes how it is called."""

    by_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def insert(self, search_id: str, records: Any) -> None:
        self.calls.append("insert")
        super().insert(search_id, records)

    def insert_soon(self, search_id: str, records: Any) -> None:
        self.calls.append("insert_soon")
        super().insert(search_id, records)

    def flush(self) -> None:
        self.calls.append("flush")


def test_only_where_jobs_end_in_a_moment() -> None:
    storage = Noted()
    ends = threading.Event()

    async def function(job: RunningJob) -> int:
        if job["x"] == "long":
            ends.wait(30)
        return 1

    with make("serial", function, storage=storage, num_workers=1) as evaluator:

        def quickly() -> bool:
            evaluator.submit([{"x": "short"}])
            evaluator.gather("ALL")
            return storage.calls[-1] == "insert_soon"

        evaluator.submit([{"x": "short"}])
        assert storage.calls == ["insert"]  # nothing is known yet
        evaluator.gather("ALL")
        until(quickly)
        evaluator.submit([{"x": "long"}])
        until(lambda: storage.calls[-1] == "flush")  # no longer than a moment
        evaluator.submit([{"x": "short"}])
        assert storage.calls[-1] == "insert"
        ends.set()
        evaluator.gather("ALL")
    assert storage.calls.count("insert_soon") >= 1


def test_not_where_jobs_run_elsewhere() -> None:
    storage = Noted()
    with make("thread", lambda job: job["x"], storage=storage, num_workers=1) as evaluator:
        for x in range(20):
            evaluator.submit([{"x": x}])
            evaluator.gather("ALL")
    assert set(storage.calls) == {"insert"}


def test_a_flush_that_fails_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, storage: SqliteStorage, path: Path
) -> None:
    monkeypatch.setattr("paraval.storage.writer._PAUSES_S", (0.001,))
    monkeypatch.setattr("paraval.storage.writer._SOON_S", 0.2)
    writer = Writer(storage, beat_s=0.02)
    writer._pace.is_quick = True
    records = [JobRecord(args=("x" * 500,), owner="me")]
    writer.insert("0", records, soon=True)
    database = storage._opened()
    away = path.with_name("away")
    path.rename(away)
    try:
        until(lambda: "not saved yet" in caplog.text)
        assert "there is no such file any more" in caplog.text
        assert database._promises
    finally:
        away.rename(path)
    until(lambda: elsewhere(path) == 1)
    assert writer.close(10)
    assert storage.get([records[0].id])[0].owner == "me"
