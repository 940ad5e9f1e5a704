"""Storages that take their time, or fail: nothing waits for them on a loop, and nothing is shown that is not saved."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from paraval import Job, JobStatus, RunningJob
from paraval.errors import StorageError
from paraval.storage import JobChange, JobRecord, MemoryStorage, UnstorableError
from paraval.storage.writer import Writer, patiently
from support import Latch, Stage, configurations, double, ids, make, outputs, soon, until, until_async


class Slow(MemoryStorage):
    """Waits, in every write, until the test lets it go on; counts what comes with one call."""

    by_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()  # of updates
        self.gate.set()
        self.door = threading.Event()  # of new jobs
        self.door.set()
        self.calls: list[list[JobChange]] = []
        self.entered = Latch()
        self.threads: set[int] = set()

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self.threads.add(threading.get_ident())
        assert self.door.wait(30)
        super().insert(search_id, records)

    def update(self, changes: Sequence[JobChange]) -> None:
        self.threads.add(threading.get_ident())
        self.entered.open()
        assert self.gate.wait(30)
        self.calls.append(list(changes))
        super().update(changes)


class Failing(Slow):
    """Fails as long as ``failures`` are left."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def update(self, changes: Sequence[JobChange]) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError(5, "the disk hiccuped")
        super().update(changes)


class Picky(Slow):
    """Cannot keep sets."""

    def update(self, changes: Sequence[JobChange]) -> None:
        for change in changes:
            if isinstance(change.out, set):
                raise UnstorableError("the output cannot be stored: it is a set; return a list")
        super().update(changes)


async def async_double(job: RunningJob) -> float:
    return float(job["x"] * 2)


@pytest.mark.anyio
async def test_no_store_blocks_the_loop() -> None:
    storage = Slow()
    async with make("serial", async_double, storage=storage) as evaluator:
        storage.door.clear()
        storage.gate.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.submit_async, configurations(3))
            await until_async(lambda: storage.threads)  # it waits, in a thread
            storage.door.set()
        await until_async(lambda: storage.entered.is_open)
        assert evaluator.statistics().done == 0  # as none of it is saved
        storage.gate.set()
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 2, 4]
        assert threading.get_ident() not in storage.threads


@pytest.mark.parametrize("method", ["serial", "thread"])
def test_what_waits_for_the_storage_goes_with_one_call(method: str) -> None:
    storage = Slow()
    with make(method, async_double if method == "serial" else double, storage=storage, num_workers=2) as evaluator:
        evaluator.submit(configurations(1))
        evaluator.gather("ALL")
        storage.entered = Latch()
        storage.gate.clear()
        try:
            threads = [threading.Thread(target=evaluator.submit, args=(configurations(50),)) for _ in range(4)]
            for thread in threads:
                thread.start()
        finally:
            storage.gate.set()
        for thread in threads:
            thread.join(30)
        before = len(storage.calls)
        assert len(evaluator.gather("ALL")) == 200
        assert len(storage.calls) - before < 100


def test_a_change_that_can_wait_is_dropped_for_a_newer_one() -> None:
    storage = Slow()
    job_id = storage.create_new_job(storage.create_new_search())
    writer = Writer(storage)
    written = Latch()
    storage.gate.clear()
    writer.put([JobChange(job_id, metadata={"first": 1})], lambda _failure: None)
    until(lambda: storage.entered.is_open)
    writer.put_later(JobChange(job_id, status=JobStatus.RUNNING.value))
    writer.put([JobChange(job_id, status=JobStatus.DONE.value)], lambda _failure: written.open())
    storage.gate.set()
    written.wait()
    assert writer.close(10)
    assert [[change.status for change in call] for call in storage.calls[1:]] == [[JobStatus.DONE.value]]


def test_a_change_that_can_wait_is_written_after_a_moment() -> None:
    storage = Slow()
    job_id = storage.create_new_job(storage.create_new_search())
    writer = Writer(storage)
    writer.put_later(JobChange(job_id, status=JobStatus.RUNNING.value))
    until(lambda: storage.load_job_status(job_id) == JobStatus.RUNNING.value)
    assert writer.close(10)


def test_all_is_written_at_the_close() -> None:
    before = set(threading.enumerate())
    storage = Slow()
    search_id = storage.create_new_search()
    job_ids = [storage.create_new_job(search_id) for _ in range(100)]
    writer = Writer(storage)
    for job_id in job_ids:
        writer.put_later(JobChange(job_id, status=JobStatus.RUNNING.value))
    assert writer.close(10)
    assert {storage.load_job_status(job_id) for job_id in job_ids} == {JobStatus.RUNNING.value}
    assert set(threading.enumerate()) <= before


def test_a_hiccup_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    storage = Failing(2)
    with make("thread", double, storage=storage) as evaluator:
        evaluator.submit(configurations(3))
        assert outputs(evaluator.gather("ALL")) == [0, 2, 4]
    assert "hiccuped" in caplog.text


def test_what_cannot_be_saved_is_not_acknowledged() -> None:
    storage = Failing(1_000_000)
    with make("thread", double, storage=storage) as evaluator:
        evaluator.submit(configurations(3))
        with pytest.raises(StorageError, match="hiccuped"):
            evaluator.gather("ALL")
        assert evaluator.statistics().done == 0
        storage.failures = 0
        assert evaluator.close() == []  # what ended is saved at the last try
        assert outputs(evaluator.gather("ALL")) == [0, 2, 4]


def test_patience_has_an_end() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space left"):
        patiently(fail)
    assert 3 <= len(calls) <= 10


@pytest.mark.parametrize("exc", [UnstorableError("a set"), StorageError("locked")])
def test_only_what_may_get_better_is_tried_again(exc: Exception) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise exc

    with pytest.raises(type(exc)):
        patiently(fail)
    assert (len(calls) > 1) == isinstance(exc, OSError)


def test_an_output_that_cannot_be_stored_fails_that_job_alone() -> None:
    def function(job: RunningJob) -> Any:
        return {1, 2} if job["x"] % 7 == 3 else job["x"]

    with make("thread", function, storage=Picky(), num_workers=2) as evaluator:
        evaluator.submit(configurations(30))
        jobs = evaluator.gather("ALL")
        bad = [job for job in jobs if job.error is not None]
        assert sorted(job.args["x"] for job in bad) == [3, 10, 17, 24]
        assert {job.error.reason for job in bad if job.error} == {"F_TypeError"}
        assert all("return a list" in job.error.message for job in bad if job.error)
        assert evaluator.storage.load_job(bad[0].id)["out"] is None
        assert len(ids(jobs)) == 30


@pytest.mark.anyio
async def test_intermediate_results_are_recorded_without_blocking() -> None:
    stage = Stage()

    async def function(job: RunningJob) -> float:
        for budget in range(3):
            job.record(budget, budget * 2.0)
        stage.started(0).open()
        return 1.0

    storage = Slow()
    async with make("serial", function, storage=storage) as evaluator:
        await evaluator.submit_async(configurations(1))
        storage.gate.clear()
        await stage.started(0).opened()  # it did not wait for the storage
        storage.gate.set()
        (job,) = await soon(evaluator.gather_async("ALL"))
    assert storage.load_job(job.id)["intermediate"] == {"budget": [0, 1, 2], "objective": [0.0, 2.0, 4.0]}


@pytest.mark.parametrize("storage", [MemoryStorage, Slow])
def test_the_owner_holds_a_lease_while_it_is_open(storage: type[MemoryStorage]) -> None:
    kept = storage()
    with make("thread", double, storage=kept) as evaluator:
        assert kept.owners() == set()
        for _ in range(2):
            evaluator.submit(configurations(1))
            evaluator.gather("ALL")
            (owner,) = kept.owners()
            assert kept.get([f"{evaluator.search_id}.0"])[0].owner == owner
            evaluator.close()
            assert kept.owners() == set()


def test_a_lease_is_renewed() -> None:
    storage = Slow()
    writer = Writer(storage, lease_s=0.2, beat_s=0.02)
    renewed = threading.Semaphore(0)
    renew = storage.renew

    def noted(owner: str, seconds: float) -> None:
        renew(owner, seconds)
        renewed.release()

    storage.renew = noted  # type: ignore[method-assign] # to hear of each
    writer.hold("me")
    for _ in range(20):
        assert renewed.acquire(timeout=10)
    assert storage.owners() == {"me"}
    assert writer.close(10)
    assert storage.owners() == set()


class FailingFrom(Slow):
    """Its writes from number ``first`` on, ``count`` of them, fail."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._fails = range(first, first + count)
        self.failed = 0

    def _operate(self) -> None:
        if next(self._numbers) in self._fails:
            self.failed += 1
            raise OSError(28, "No space left on device")

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self._operate()
        super().insert(search_id, records)

    def update(self, changes: Sequence[JobChange]) -> None:
        self._operate()
        super().update(changes)


@pytest.mark.parametrize("count", [1, 10**9], ids=["once", "for ever"])
@pytest.mark.parametrize("first", range(12))
@pytest.mark.parametrize("method", ["serial", "thread"])
def test_any_write_may_fail(monkeypatch: pytest.MonkeyPatch, method: str, first: int, count: int) -> None:
    monkeypatch.setattr("paraval.storage.writer._PAUSES_S", (0.001, 0.001))
    storage = FailingFrom(first, count)
    shown: list[Job] = []
    failures = 0
    function = async_double if method == "serial" else double
    evaluator = make(method, function, num_workers=2, storage=storage, kill_grace=0.05)
    calls: list[Callable[[], Any]] = [
        lambda: evaluator.submit(configurations(2)),
        lambda: shown.extend(evaluator.gather("ALL")),
        lambda: shown.append(evaluator.evaluate({"x": 1})),
    ] * 3
    for call in [*calls, evaluator.close, calls[1]]:
        try:
            call()
        except StorageError:
            failures += 1
    evaluator.close()
    assert storage.failed
    assert bool(failures) == (count > 1)
    assert len({job.id for job in shown}) == len(shown)
    for job in shown:
        assert storage.load_job_status(job.id) == job.status.value
    if count == 1:
        assert len(shown) == 9
