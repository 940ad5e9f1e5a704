"""What other drivers leave, and what they take: nothing is recorded twice, shown unsaved, or run for ever."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from paraval import Evaluator, HPOJob, Job, JobStatus, RunningJob
from paraval.errors import StorageError
from paraval.functions import name_of
from paraval.storage import JobChange, JobRecord, MemoryStorage, SqliteStorage, Storage
from paraval.storage.writer import RobbedError, Writer
from support import Latch, configurations, ids, outputs, until


def double(job: RunningJob) -> int:
    return int(job["x"] * 2)


def left(storage: Storage, count: int, *, owner: str = "gone", status: JobStatus = JobStatus.READY) -> list[str]:
    """Record jobs of another driver in search 0."""
    storage.new_search()
    records = [JobRecord(args=({"x": x},), function=name_of(double), owner=owner, metadata={}) for x in range(count)]
    storage.insert("0", records)
    if status is not JobStatus.READY:
        storage.update([JobChange(record.id, status=status.value) for record in records])
    return [record.id for record in records]


def resumed(storage: Any, function: Any = double, **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, "thread", {"storage": storage, "search_id": "0", "resume": True, **kwargs})


class Hiccup(SqliteStorage):
    """Fails in the next calls of one method."""

    failing = ""
    times = 0

    def _hiccup(self, method: str) -> None:
        if self.failing == method and self.times > 0:
            self.times -= 1
            raise StorageError("locked")

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        self._hiccup("get")
        return super().get(job_ids)

    def owners(self) -> set[str]:
        self._hiccup("owners")
        return super().owners()

    def adopt(self, revisions: Any, owner: str) -> set[str]:
        self._hiccup("adopt")
        return super().adopt(revisions, owner)

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self._hiccup("insert")
        super().insert(search_id, records)


@pytest.mark.parametrize("failing", ["get", "owners", "adopt"])
def test_a_storage_that_hiccups_while_records_are_met_costs_no_record(tmp_path: Path, failing: str) -> None:
    with Hiccup(tmp_path / "jobs.db") as storage:
        there = left(storage, 3)
        with resumed(storage) as evaluator:
            storage.failing, storage.times = failing, 1
            evaluator.submit(configurations(3))
            assert sorted(ids(evaluator.gather("ALL"))) == there
        assert storage.load_all_job_ids("0") == there


def test_a_submission_that_comes_to_nothing_gives_its_records_back(tmp_path: Path) -> None:
    with Hiccup(tmp_path / "jobs.db") as storage:
        there = left(storage, 2)
        with resumed(storage) as evaluator:
            storage.failing, storage.times = "insert", 5
            with pytest.raises(StorageError, match="locked"):
                evaluator.submit(configurations(3))  # the third needs a record
            evaluator.submit(configurations(2))
            assert sorted(ids(evaluator.gather("ALL"))) == there
        assert storage.load_all_job_ids("0") == there


@pytest.mark.parametrize("method", ["serial", "thread"])
def test_a_job_that_ends_its_driver_at_once_is_run_only_so_often(tmp_path: Path, method: str) -> None:
    """That it runs is stored before it does, once it has been left by a driver; and of no other job."""
    log = tmp_path / "log"
    program = textwrap.dedent(f"""
        import os
        from paraval import Evaluator

        def body(job):
            if job["x"] == 1:
                with open({str(log)!r}, "a") as log:
                    log.write("x")
                os._exit(9)
            return job["x"]

        async def on_loop(job):
            return body(job)

        function = on_loop if {method!r} == "serial" else body
        settings = {{"storage": "sqlite:///{tmp_path}/jobs.db", "search_id": "0", "resume": True}}
        with Evaluator.create(function, {method!r}, settings) as evaluator:
            evaluator.submit([{{"x": 1}}, {{"x": 2}}])
            evaluator.gather("ALL")
    """)
    with SqliteStorage(tmp_path / "jobs.db") as storage:
        storage.new_search()
    codes = [subprocess.run([sys.executable, "-c", program], check=False, timeout=50).returncode for _ in range(4)]
    assert codes == [9, 9, 9, 0]  # the first was not noted; then it is run max_attempts times more, and once to see
    assert log.read_text() == "xxx"
    with SqliteStorage(tmp_path / "jobs.db") as storage:
        poison, innocent = storage.get(["0.0", "0.1"])
    assert poison.error is not None
    assert poison.error.kind == "worker_died"
    assert (innocent.out, innocent.error) == (2, None)


def test_a_followed_job_that_has_ended_its_drivers_too_often_is_not_run_again() -> None:
    storage = MemoryStorage()
    (job_id,) = left(storage, 1, owner="other", status=JobStatus.RUNNING)
    storage.renew("other", 1000)
    for _ in range(3):
        assert storage.adopt({job_id: storage.get([job_id])[0].revision}, "other")
        storage.update([JobChange(job_id, status=JobStatus.RUNNING.value)])
    with resumed(storage, max_attempts=1) as evaluator:
        evaluator.submit([{"x": 0}])
        storage.renew("other", 0)
        (job,) = evaluator.gather("ALL")
    assert job.error is not None
    assert (job.error.kind, job.error.attempts) == ("worker_died", 4)


def test_what_a_followed_evaluator_leaves_at_its_close_is_run(tmp_path: Path) -> None:
    gate, running = threading.Event(), Latch()

    def waiting(job: RunningJob) -> int:
        running.open()
        gate.wait(30)
        return int(job["x"])

    url = f"sqlite:///{tmp_path}/jobs.db"
    with SqliteStorage(tmp_path / "jobs.db") as storage:
        storage.new_search()
    first = resumed(url, waiting, kill_grace=0.1)
    first.submit(configurations(3))
    running.wait()
    with resumed(url, waiting) as second:
        second.submit(configurations(3))  # it follows all three
        assert len(first.close()) == 3
        gate.set()
        jobs = second.gather("ALL")
        assert sorted(outputs(jobs)) == [0, 1, 2]
        assert {job.status for job in jobs} == {JobStatus.DONE}


def test_a_storage_that_hiccups_while_a_job_is_followed_harms_no_other(tmp_path: Path) -> None:
    with Hiccup(tmp_path / "jobs.db") as storage:
        (job_id,) = left(storage, 1, owner="other", status=JobStatus.RUNNING)
        storage.renew("other", 1000)
        with resumed(storage) as evaluator:
            storage.failing, storage.times = "get", 0
            evaluator.submit([{"x": 0}, {"x": 5}])
            assert outputs(evaluator.gather("BATCH", 1)) == [10]
            storage.times = 3
            until(lambda: storage.times == 0)
            storage.update([JobChange(job_id, status=JobStatus.DONE.value, out=7)])
            assert outputs(evaluator.gather("ALL")) == [7]


def test_a_storage_that_stays_away_while_a_job_is_followed_stops_everything_with_its_words(tmp_path: Path) -> None:
    with Hiccup(tmp_path / "jobs.db") as storage:
        left(storage, 1, owner="other", status=JobStatus.RUNNING)
        storage.renew("other", 1000)
        with resumed(storage) as evaluator:
            evaluator.submit([{"x": 0}])
            storage.failing, storage.times = "get", 10**6
            with pytest.raises(StorageError, match="locked"):
                evaluator.gather("ALL")
            storage.times = 0


@pytest.mark.parametrize("output", ["F_diverged", float("nan")])
def test_an_objective_that_says_failure_is_not_reused(output: Any) -> None:
    calls: list[int] = []

    def failing(job: RunningJob) -> Any:
        calls.append(1)
        return output

    storage = MemoryStorage()
    for _ in range(2):
        with Evaluator.create(failing, "thread", {"storage": storage, "reuse": True, "job_class": HPOJob}) as evaluator:
            assert evaluator.evaluate({"x": 1}).failed
    assert len(calls) == 2
    for _ in range(2):  # for plain jobs it is a value like any other
        with Evaluator.create(failing, "thread", {"storage": storage, "reuse": True}) as evaluator:
            evaluator.evaluate({"x": 2})
    assert len(calls) == 3


def test_others_are_gathered_again_when_they_were_stopped_and_then_run() -> None:
    storage = MemoryStorage()
    (job_id,) = left(storage, 1, owner="other")
    with Evaluator.create(double, "thread", {"storage": storage, "search_id": "0"}) as evaluator:
        storage.update([JobChange(job_id, status=JobStatus.CANCELLED.value)])
        assert ids(evaluator.gather_other_jobs_done()) == [job_id]
        storage.update([JobChange(job_id, metadata={"note": 1})])
        assert evaluator.gather_other_jobs_done() == []
        storage.update([JobChange(job_id, status=JobStatus.DONE.value, out=7)])
        (job,) = evaluator.gather_other_jobs_done()
        assert job.output == 7
        storage.update([JobChange(job_id, metadata={"note": 2})])
        assert evaluator.gather_other_jobs_done() == []


class Elsewhere(MemoryStorage):
    by_reference = False


def test_a_driver_whose_lease_ran_out_hears_which_jobs_are_another_s() -> None:
    storage = Elsewhere()
    storage.new_search()
    records = [JobRecord(args=({"x": x},), owner="me") for x in range(2)]
    storage.insert("0", records)
    writer = Writer(storage, lease_s=0.05, beat_s=1000.0)
    writer.hold("me")
    told: list[Any] = []

    def end(out: str) -> None:
        ends = [JobChange(it.id, status=JobStatus.DONE.value, out=out, by="me") for it in records]
        writer.put(ends, told.append)
        writer.put([JobChange(records[1].id, metadata={"note": 1}, by="me")], told.append)

    until(lambda: "me" not in storage.owners())
    assert storage.adopt({records[0].id: storage.get([records[0].id])[0].revision}, "other")
    end("mine")
    until(lambda: len(told) == 2)
    robbed, fine = told
    assert isinstance(robbed, RobbedError)
    assert list(robbed.records) == [records[0].id]
    assert fine is None
    assert [record.out for record in storage.get(["0.0", "0.1"])] == [None, "mine"]
    writer.close(5)


def test_a_robbed_driver_shows_what_is_recorded_and_not_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer.__init__, "__kwdefaults__", {"lease_s": 0.05, "beat_s": 1000.0})
    storage = Elsewhere()
    gate, running = threading.Event(), Latch()

    def waiting(job: RunningJob) -> str:
        running.open()
        gate.wait(30)
        return "mine"

    def rob(job_id: str) -> None:
        assert storage.adopt({job_id: storage.get([job_id])[0].revision}, "other")

    with Evaluator.create(waiting, "thread", {"storage": storage, "num_workers": 3}) as evaluator:
        evaluator.submit(configurations(3))
        running.wait()
        until(lambda: [it.status for it in storage.get(["0.0", "0.1", "0.2"])] == [JobStatus.RUNNING.value] * 3)
        until(lambda: time.monotonic() > evaluator._writer._holds_until)  # type: ignore[union-attr] # it has a writer
        rob("0.0")
        rob("0.1")
        storage.update([JobChange("0.1", status=JobStatus.DONE.value, out="theirs", by="other")])
        gate.set()
        jobs = {job.id: job for job in evaluator.gather("ALL")}
    assert shown(jobs["0.0"]) == (JobStatus.CANCELLED, None)
    assert "another driver" in jobs["0.0"].error.message  # type: ignore[union-attr] # the next line would fail
    assert shown(jobs["0.1"]) == (JobStatus.DONE, "theirs")
    assert shown(jobs["0.2"]) == (JobStatus.DONE, "mine")


def shown(job: Job) -> tuple[JobStatus, Any]:
    return job.status, job.output
