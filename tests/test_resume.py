"""Going on with a search, and answering configurations from a storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from paraval import Evaluator, HPOJob, Job, JobStatus, RunningJob
from paraval.engine.owners import new_owner
from paraval.functions import name_of
from paraval.storage import JobChange, JobRecord, MemoryStorage, SqliteStorage, Storage
from support import Stage, configurations, ids, make, soon, until_async


class Elsewhere(MemoryStorage):
    """A store that is not in this memory, as far as anyone can tell: it keeps copies, and takes its time."""

    by_reference = False

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        copies = [_copied(record) for record in records]
        super().insert(search_id, copies)
        for record, copied in zip(records, copies, strict=True):
            record.id = copied.id

    def update(self, changes: Sequence[JobChange]) -> None:
        copies = [msgspec.structs.replace(change) for change in changes]
        for change in copies:
            change.metadata = None if change.metadata is None else dict(change.metadata)
        super().update(copies)


def _copied(record: JobRecord) -> JobRecord:
    return JobRecord(
        args=record.args,
        metadata=dict(record.metadata or {}),
        function=record.function,
        owner=record.owner,
        attempts=record.attempts,
        is_private=record.is_private,
    )


@pytest.fixture(params=["memory", "elsewhere", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "sqlite":
        with SqliteStorage(tmp_path / "jobs.db") as opened:
            yield opened
    else:
        yield MemoryStorage() if request.param == "memory" else Elsewhere()


class Calls:
    """Run-functions that note what they were called with."""

    def __init__(self) -> None:
        self.seen: list[tuple[str | None, Any]] = []

    def run(self, job: RunningJob) -> Any:
        self.seen.append((job.id, job["x"]))
        if job["x"] == "bad":
            raise ValueError("it went wrong")
        return job["x"] * 2


def resumed(storage: Storage, function: Callable[..., Any], **kwargs: Any) -> Evaluator:
    return make("thread", function, storage=storage, search_id="0", resume=True, num_workers=2, **kwargs)


def statuses(storage: Storage) -> dict[str, int]:
    return {record.id: record.status for record in storage.scan("0")[0]}


def test_what_has_a_result_is_not_run_again(storage: Storage) -> None:
    calls = Calls()
    with make("thread", calls.run, storage=storage, job_class=HPOJob) as evaluator:
        evaluator.submit([{"x": 0}, {"x": 1}, {"x": "bad"}])
        first = {job.id: job for job in evaluator.gather("ALL")}
    assert len(calls.seen) == 3
    with resumed(storage, calls.run, job_class=HPOJob) as evaluator:
        evaluator.submit([{"x": "bad"}, {"x": 1}, {"x": 0}, {"x": 5}])
        again = {job.id: job for job in evaluator.gather("ALL")}
    assert calls.seen[3:] == [("0.3", 5)]
    assert set(again) == {"0.0", "0.1", "0.2", "0.3"}
    for job_id, job in first.items():
        assert again[job_id].restored
        assert not job.restored
        assert again[job_id].args == job.args
        assert again[job_id].output == job.output
        assert again[job_id].status is job.status
        assert (again[job_id].error is None) == (job.error is None)
        assert again[job_id].metadata["timestamp_submit"] == job.metadata["timestamp_submit"]
        assert again[job_id].metadata["timestamp_gather"] == job.metadata["timestamp_gather"]
    assert not again["0.3"].restored
    assert len(statuses(storage)) == 4
    assert evaluator.gather_other_jobs_done() == []


def test_the_kth_submission_meets_the_kth_record(storage: Storage) -> None:
    calls = Calls()
    with make("thread", calls.run, storage=storage) as evaluator:
        evaluator.submit([{"x": 1}, {"x": 1}])
        evaluator.gather("ALL")
    with resumed(storage, calls.run) as evaluator:
        evaluator.submit([{"x": 1}])
        evaluator.submit([{"x": 1}, {"x": 1}])
        assert sorted(ids(evaluator.gather("ALL"))) == ["0.0", "0.1", "0.2"]
    assert [job_id for job_id, _ in calls.seen[2:]] == ["0.2"]


def test_another_run_function_has_results_of_its_own(storage: Storage) -> None:
    def other(job: RunningJob) -> Any:
        return -job["x"]

    with make("thread", Calls().run, storage=storage) as evaluator:
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
    with resumed(storage, other) as evaluator:
        evaluator.submit([{"x": 1}])
        assert [job.output for job in evaluator.gather("ALL")] == [-1]


def test_what_was_stopped_with_its_evaluator_is_run(storage: Storage) -> None:
    stage = Stage()
    evaluator = make("thread", stage.polite, storage=storage, num_workers=1)
    evaluator.submit(configurations(3))
    stage.started(0).wait()
    assert len(evaluator.close()) == 3
    assert set(statuses(storage).values()) == {JobStatus.CANCELLED.value}
    stage.release_all()
    with resumed(storage, stage.polite) as evaluator:
        evaluator.submit(configurations(3))
        jobs = evaluator.gather("ALL")
    assert {job.id: (job.output, job.status, job.restored) for job in jobs} == {
        f"0.{x}": (x, JobStatus.DONE, False) for x in range(3)
    }
    assert set(statuses(storage).values()) == {JobStatus.DONE.value}


def left_behind(storage: Storage, owner: str, function: Callable[..., Any], *status: JobStatus, **record: Any) -> None:
    """Have records as a driver leaves them that is gone."""
    if not storage.search_ids():
        storage.new_search()
    records = [
        JobRecord(args=({"x": x},), metadata={}, function=name_of(function), owner=owner, **record)
        for x, _ in enumerate(status)
    ]
    storage.insert("0", records)
    storage.update([JobChange(job.id, status=one.value) for job, one in zip(records, status, strict=True)])


def test_what_a_driver_that_is_gone_had_is_run_under_its_old_id(storage: Storage) -> None:
    calls = Calls()
    left_behind(storage, "gone", calls.run, JobStatus.READY, JobStatus.RUNNING, JobStatus.CANCELLING)
    with resumed(storage, calls.run) as evaluator:
        evaluator.submit([{"x": 0}, {"x": 1}, {"x": 2}])
        jobs = evaluator.gather("ALL")
    assert sorted(calls.seen) == [("0.0", 0), ("0.1", 1), ("0.2", 2)]
    assert not any(job.restored for job in jobs)
    assert [record.attempts for record in storage.get(["0.0", "0.1", "0.2"])] == [0, 1, 0]
    assert {record.owner for record in storage.scan("0")[0]} != {"gone"}


@pytest.mark.parametrize(("max_attempts", "is_run"), [(1, False), (2, True)])
def test_what_was_running_too_often_fails(storage: Storage, max_attempts: int, is_run: bool) -> None:
    calls = Calls()
    left_behind(storage, "gone", calls.run, JobStatus.RUNNING, attempts=1)
    with resumed(storage, calls.run, max_attempts=max_attempts) as evaluator:
        evaluator.submit([{"x": 0}])
        (job,) = evaluator.gather("ALL")
    assert bool(calls.seen) == is_run
    if not is_run:
        assert job.error is not None
        assert job.error.kind == "worker_died"
        assert "2 times" in job.error.message
        assert storage.load_job_status("0.0") == JobStatus.DONE.value


@pytest.mark.anyio
@pytest.mark.parametrize("face", ["submit", "evaluate"])
async def test_a_driver_that_lives_is_not_robbed(storage: Storage, face: str) -> None:
    calls, owner = Calls(), new_owner()
    storage.renew(owner, math.inf)
    left_behind(storage, owner, calls.run, JobStatus.RUNNING, is_private=face == "evaluate")
    async with resumed(storage, calls.run) as evaluator:
        got: list[Job] = []

        async def get() -> None:
            if face == "evaluate":
                got.append(await evaluator.evaluate_async({"x": 0}))
            else:
                await evaluator.submit_async([{"x": 0}])
                got.extend(await evaluator.gather_async("ALL"))

        async with anyio.create_task_group() as group:
            group.start_soon(get)
            await until_async(lambda: evaluator.statistics().submitted == 1)
            storage.update([JobChange("0.0", status=JobStatus.DONE.value, out=7, by=owner)])
    assert [(job.id, job.output, job.restored) for job in got] == [("0.0", 7, True)]
    assert not calls.seen
    assert len(statuses(storage)) == 1


@pytest.mark.anyio
async def test_what_a_driver_leaves_that_goes_is_taken_over(storage: Storage) -> None:
    calls, owner = Calls(), new_owner()
    storage.renew(owner, math.inf)
    left_behind(storage, owner, calls.run, JobStatus.RUNNING)
    async with resumed(storage, calls.run) as evaluator:
        await evaluator.submit_async([{"x": 0}])
        storage.renew(owner, 0)
        (job,) = await soon(evaluator.gather_async("ALL"))
    assert calls.seen == [("0.0", 0)]
    assert (job.id, job.output) == ("0.0", 0)


def test_who_was_robbed_changes_nothing_any_more(storage: Storage) -> None:
    calls = Calls()
    with make("thread", calls.run, storage=storage) as evaluator:
        evaluator.submit([{"x": 1}])
        evaluator.gather("ALL")
    (record,) = storage.get(["0.0"])
    assert storage.adopt({"0.0": record.revision}, "another") == {"0.0"}
    assert record.owner is not None
    storage.update([JobChange("0.0", status=2, out=-1, by=record.owner)])
    (now,) = storage.get(["0.0"])
    assert (now.status, now.out, now.owner) == (0, None, "another")


def test_followed_jobs_end_with_their_evaluator(storage: Storage) -> None:
    calls, owner = Calls(), new_owner()
    storage.renew(owner, math.inf)
    left_behind(storage, owner, calls.run, JobStatus.RUNNING)
    evaluator = resumed(storage, calls.run)
    evaluator.submit([{"x": 0}])
    assert [(job.id, job.status) for job in evaluator.close()] == [("0.0", JobStatus.CANCELLED)]
    assert statuses(storage) == {"0.0": JobStatus.RUNNING.value}  # it is the other's


def test_resume_says_what_it_needs(storage: Storage) -> None:
    with pytest.raises(ValueError, match="search_id"):
        make("thread", Calls().run, storage=storage, resume=True)
    with pytest.raises(KeyError, match="no search '0'"):
        resumed(storage, Calls().run)


def test_without_resume_a_search_goes_on_with_new_jobs(storage: Storage) -> None:
    calls = Calls()
    for _ in range(2):
        with make("thread", calls.run, storage=storage, search_id="0" if storage.search_ids() else None) as evaluator:
            evaluator.submit([{"x": 1}])
            evaluator.gather("ALL")
    assert calls.seen == [("0.0", 1), ("0.1", 1)]


# -- reuse -------------------------------------------------------------------------------------------------------------


def test_a_known_configuration_is_answered(storage: Storage) -> None:
    calls = Calls()
    with make("thread", calls.run, storage=storage) as evaluator:
        evaluator.submit([{"x": 1, "y": 2}])
        evaluator.gather("ALL")
    with make("thread", calls.run, storage=storage, reuse=True) as evaluator:
        assert evaluator.search_id == "1"
        evaluator.submit([{"y": 2, "x": 1}])
        (job,) = evaluator.gather("ALL")
        assert evaluator.evaluate({"x": 1, "y": 2}).reused == "0.0"
    assert len(calls.seen) == 1
    assert (job.id, job.output, job.reused, job.restored) == ("1.0", 2, "0.0", False)
    (record,) = storage.get(["1.0"])
    assert (record.status, record.out) == (JobStatus.DONE.value, 2)
    assert (record.metadata or {})["reused"] == "0.0"


def test_failures_are_not_reused(storage: Storage) -> None:
    calls = Calls()
    with make("thread", calls.run, storage=storage, reuse=True) as evaluator:
        for _ in range(2):
            evaluator.submit([{"x": "bad"}])
            (job,) = evaluator.gather("ALL")
            assert job.error is not None
            assert job.reused is None
    assert len(calls.seen) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_the_same_in_flight_is_joined(storage: Storage, at_once: bool) -> None:
    stage = Stage()
    with make("thread", stage.polite, storage=storage, reuse=True, num_workers=3) as evaluator:
        if at_once:
            evaluator.submit([{"x": 1}, {"x": 1}, {"x": 1}])
        else:
            for _ in range(3):
                evaluator.submit([{"x": 1}])
        stage.started(1).wait()
        stage.released(1).open()
        jobs = {job.id: job for job in evaluator.gather("ALL")}
    assert {job_id: (job.output, job.reused) for job_id, job in jobs.items()} == {
        "0.0": (1, None),
        "0.1": (1, "0.0"),
        "0.2": (1, "0.0"),
    }


def test_who_joined_a_failure_is_run(storage: Storage) -> None:
    calls = Calls()
    with make("thread", calls.run, storage=storage, reuse=True) as evaluator:
        evaluator.submit([{"x": "bad"}, {"x": "bad"}])
        jobs = evaluator.gather("ALL")
    assert len(calls.seen) == 2
    assert all(job.error is not None and job.reused is None for job in jobs)


def test_objects_that_no_store_could_keep_are_like_no_other() -> None:
    with make("thread", Calls().run, reuse=True) as evaluator:
        evaluator.submit([{"x": [object()]}, {"x": [object()]}])
        assert [job.reused for job in evaluator.gather("ALL")] == [None, None]
