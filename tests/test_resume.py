"""Going on with a search, and answering configurations from a storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from paraval import Evaluator, HPOJob, Job, JobStatus, ParavalError, RunningJob
from paraval.engine.known.owners import new_owner
from paraval.engine.running import following
from paraval.functions import name_of
from paraval.outcome import JobError
from paraval.storage import JobChange, JobRecord, MemoryStorage, SqliteStorage, Storage
from support import Stage, configurations, ids, make, soon, until, until_async


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


def test_a_job_is_run_whose_adoption_was_done_without_an_answer() -> None:
    class Mute(Elsewhere):
        lost = 0

        def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
            adopted = super().adopt(revisions, owner)
            if not self.lost:
                self.lost += 1
                raise OSError(104, "the answer was lost")
            return adopted

    storage, calls, owner = Mute(), Calls(), new_owner()
    storage.renew(owner, math.inf)
    left_behind(storage, owner, calls.run, JobStatus.RUNNING)
    with resumed(storage, calls.run) as evaluator:
        evaluator.submit([{"x": 0}])
        assert not storage.lost
        storage.renew(owner, 0)
        (job,) = evaluator.gather("ALL")
    assert storage.lost
    assert calls.seen == [("0.0", 0)]
    assert job.output == 0
    assert storage.get(["0.0"])[0].attempts == 1


class Asked(Elsewhere):
    """Notes what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[str] = []
        self.scans = 0

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        asked = [*job_ids]
        self.got += asked
        return super().get(asked)

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        self.scans += 1
        return super().scan(search_id, since)


def test_of_many_that_are_followed_only_what_has_changed_is_read() -> None:
    storage, calls, owner = Asked(), Calls(), new_owner()
    count = 2 * following._FEW
    storage.renew(owner, math.inf)
    left_behind(storage, owner, calls.run, *[JobStatus.RUNNING] * count)

    def looks(count: int) -> None:
        before = storage.scans
        until(lambda: storage.scans >= before + count)

    with resumed(storage, calls.run) as evaluator:
        evaluator.submit(configurations(count))
        looks(2)
        storage.got.clear()
        looks(3)
        assert storage.got == []
        storage.update([JobChange(f"0.{x}", status=JobStatus.DONE.value, out=-x, by=owner) for x in range(40)])
        jobs = evaluator.gather("BATCH", 40)
        assert sorted(job.output for job in jobs) == [-x for x in reversed(range(40))]
        assert all(job.restored for job in jobs)
        storage.renew(owner, 0)
        jobs = evaluator.gather("ALL")
        assert {job.id: job.output for job in jobs} == {f"0.{x}": 2 * x for x in range(40, count)}
    assert len(calls.seen) == count - 40


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


def test_two_that_were_made_before_either_submits_share(storage: Storage) -> None:
    calls = Calls()
    storage.new_search()
    with resumed(storage, calls.run) as first, resumed(storage, calls.run) as second:
        first.submit([{"x": 1}, {"x": 2}])
        second.submit([{"x": 2}, {"x": 3}])
        first.submit([{"x": 3}, {"x": 1}])
        assert sorted((job.id, job.output) for job in first.gather("ALL")) == [
            ("0.0", 2),
            ("0.1", 4),
            ("0.2", 6),
            ("0.3", 2),
        ]
        assert sorted((job.id, job.output) for job in second.gather("ALL")) == [("0.1", 4), ("0.2", 6)]
    assert sorted(calls.seen) == [("0.0", 1), ("0.1", 2), ("0.2", 3), ("0.3", 1)]


class Quicker(MemoryStorage):
    """Where jobs are recorded, others have recorded theirs the moment before."""

    theirs: Sequence[JobRecord] = ()
    then: Callable[[], object] | None = None

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        theirs, self.theirs = self.theirs, ()
        super().insert(search_id, theirs)
        then, self.then = self.then, None
        if then is not None:
            then()
        super().insert(search_id, records)


def theirs(function: Callable[..., Any], owner: str, *xs: int, is_private: bool = False) -> list[JobRecord]:
    return [
        JobRecord(args=({"x": x},), metadata={}, function=name_of(function), owner=owner, is_private=is_private)
        for x in xs
    ]


@pytest.mark.parametrize("their_driver", ["lives", "is gone"])
def test_of_those_that_are_submitted_at_the_same_moment_one_is_run(their_driver: str) -> None:
    storage, calls, owner = Quicker(), Calls(), new_owner()
    storage.new_search()
    storage.renew(owner, math.inf if their_driver == "lives" else 0)
    storage.theirs = theirs(calls.run, owner, 2, 8)
    with resumed(storage, calls.run) as evaluator:
        evaluator.submit([{"x": 1}, {"x": 2}, {"x": 2}])
        storage.update([JobChange("0.0", status=JobStatus.DONE.value, out=-2, by=owner)])  # unless it was taken over
        first = ("0.0", -2 if their_driver == "lives" else 4)
        assert sorted((job.id, job.output) for job in evaluator.gather("ALL")) == [first, ("0.2", 2), ("0.3", 4)]
        assert len(calls.seen) == (2 if their_driver == "lives" else 3)
        assert storage.load_job_status("0.4") == JobStatus.CANCELLED.value
        with make("thread", calls.run, storage=storage, search_id="0") as other:
            assert "0.4" not in ids(other.gather_other_jobs_done())
        calls.seen.clear()
        evaluator.submit([{"x": 2}])  # what was left over is the next record of its configuration
        assert ids(evaluator.gather("ALL")) == ["0.4"]
    with resumed(storage, calls.run) as evaluator:
        evaluator.submit([{"x": 2}] * 3)
        assert ids(evaluator.gather("ALL")) == ["0.0", "0.3", "0.4"]
    assert calls.seen == [("0.4", 2)]


def test_what_is_evaluated_at_the_same_moment_is_run_once_too() -> None:
    storage, calls = Quicker(), Calls()
    storage.new_search()
    storage.theirs = [*theirs(calls.run, "gone", 2), *theirs(calls.run, "gone", 2, is_private=True)]
    with resumed(storage, calls.run) as evaluator:
        assert [evaluator.evaluate({"x": 2}).id for _ in range(2)] == ["0.1", "0.2"]


def test_what_is_left_over_waits_for_its_turn() -> None:
    storage, calls = Quicker(), Calls()
    storage.new_search()
    storage.theirs = theirs(calls.run, "gone", 2, 2, 2)
    with resumed(storage, calls.run) as evaluator:
        for k in range(4):
            evaluator.submit([{"x": 2}])
            assert ids(evaluator.gather("ALL")) == [f"0.{k}"]


@pytest.mark.parametrize("meanwhile", [[5], [2], [2, 5], [5, 2, 2]])
def test_another_submission_between_hides_no_rival(meanwhile: list[int]) -> None:
    storage, calls = Quicker(), Calls()
    storage.new_search()
    storage.theirs = theirs(calls.run, "gone", 2)
    with resumed(storage, calls.run) as evaluator:
        storage.then = lambda: evaluator.submit([{"x": x} for x in meanwhile])
        evaluator.submit([{"x": 2}])
        assert len(set(ids(evaluator.gather("ALL")))) == len(meanwhile) + 1
    assert sorted(x for _, x in calls.seen) == sorted([2, *meanwhile])
    twos = [record.id for record in storage.scan("0")[0] if record.args == ({"x": 2},)]
    met = sorted(str(job_id) for job_id, x in calls.seen if x == 2)
    assert met == sorted(twos)[: len(met)], "the k-th has met the k-th"


def test_a_storage_that_fails_while_rivals_are_met_costs_no_record() -> None:
    class Hiccup(Quicker):
        failures = 0

        def adopt(self, revisions: Any, owner: str) -> set[str]:
            if self.failures:
                self.failures -= 1
                raise OSError(5, "I/O error")
            return super().adopt(revisions, owner)

    storage, calls = Hiccup(), Calls()
    storage.new_search()
    storage.theirs = theirs(calls.run, "gone", 2)
    storage.failures = 2
    with resumed(storage, calls.run) as evaluator:
        evaluator.submit([{"x": 2}])
        assert ids(evaluator.gather("ALL")) == ["0.0"]
    assert calls.seen == [("0.0", 2)]


def test_a_storage_that_keeps_nothing_has_nothing_to_resume() -> None:
    with pytest.raises(KeyError, match=r"no search '0' to go on with.*NullStorage"):
        make("thread", Calls().run, storage="null:", search_id="0", resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_a_search_at_a_mistyped_path_leaves_no_store_there(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(KeyError, match=r"no search '0'.*there is no file '.*typo\.db'") as caught:
        make("thread", Calls().run, storage=f"sqlite:///{tmp_path}/typo.db", search_id="0", resume=resume)
    assert isinstance(caught.value, ParavalError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gather", "others", "reuse", "follow"])
def test_several_objectives_come_back_as_a_tuple(storage: Storage, method: str) -> None:
    def run(job: RunningJob) -> Any:
        return (1.0, job["x"]) if job["x"] else {"objective": (1.0, 2.0), "metadata": {"a": [1]}}

    objectives = {0: (1.0, 2.0), 3: (1.0, 3.0), 4: (1.0, "F_x")}
    storage.new_search()
    owner = new_owner()
    with make("thread", run, storage=storage, search_id="0", job_class=HPOJob) as evaluator:
        if method == "follow":
            storage.renew(owner, math.inf)
            left_behind(storage, owner, run, JobStatus.RUNNING)
        else:
            evaluator.submit([{"x": 0}, {"x": 3}, {"x": "F_x"}])
            evaluator.gather("ALL")
    options: dict[str, Any] = {"reuse": True} if method == "reuse" else {"search_id": "0", "resume": method != "others"}
    with make("thread", run, storage=storage, job_class=HPOJob, **options) as evaluator:
        if method == "others":
            jobs = evaluator.gather_other_jobs_done()
        else:
            evaluator.submit([{"x": 0}] if method == "follow" else [{"x": 0}, {"x": 3}])
            if method == "follow":
                storage.update([JobChange("0.0", status=JobStatus.DONE.value, out=[1.0, 2.0], by=owner)])
            jobs = evaluator.gather("ALL")
    assert jobs
    for job in jobs:
        assert isinstance(job, HPOJob)
        assert job.objective == objectives.get(job.args["x"], (1.0, "F_x"))
        assert isinstance(job.objective, tuple)


def test_a_list_that_a_plain_job_returned_stays_one(storage: Storage) -> None:
    def run(job: RunningJob) -> Any:
        return [1.0, 2.0]

    for options in ({}, {"search_id": "0", "resume": True}):
        with make("thread", run, storage=storage, **options) as evaluator:
            assert evaluator.evaluate({}).output == [1.0, 2.0]


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


def test_of_those_that_joined_a_failure_one_is_run_for_all(storage: Storage) -> None:
    seen: list[str | None] = []

    def run(job: RunningJob) -> int:
        seen.append(job.id)
        if len(seen) <= 2:
            raise ValueError("it went wrong")
        return 7

    with make("thread", run, storage=storage, reuse=True, num_workers=4) as evaluator:
        evaluator.submit([{"x": 1}] * 8)
        jobs = {job.id: job for job in evaluator.gather("ALL")}
    assert seen == ["0.0", "0.1", "0.2"]
    assert [jobs[f"0.{x}"].failed for x in range(8)] == [True] * 2 + [False] * 6
    assert [jobs[f"0.{x}"].reused for x in range(2, 8)] == [None] + ["0.2"] * 5


def test_of_what_a_driver_that_is_gone_had_one_is_run_for_all_who_joined(storage: Storage) -> None:
    stage = Stage()
    left_behind(storage, "gone", stage.polite, JobStatus.RUNNING)
    with make("thread", stage.polite, storage=storage, reuse=True, num_workers=4) as evaluator, stage:
        evaluator.submit([{"x": 0}] * 5)
        stage.started(0).wait()
        evaluator.submit([{"x": 0}] * 5)  # the storage still has it as open
        stage.release(0)
        jobs = {job.id: job for job in evaluator.gather("ALL")}
    assert [jobs[f"1.{x}"].output for x in range(10)] == [0] * 10
    assert [jobs[f"1.{x}"].reused for x in range(10)] == [None] + ["1.0"] * 9


@pytest.mark.parametrize("end", ["closed", "gone"])
def test_those_who_joined_a_driver_that_ends_run_one_for_all(storage: Storage, end: str) -> None:
    calls, owner = Calls(), new_owner()
    storage.renew(owner, math.inf)
    left_behind(storage, owner, calls.run, JobStatus.RUNNING)
    with make("thread", calls.run, storage=storage, reuse=True, num_workers=4) as evaluator:
        evaluator.submit([{"x": 0}] * 5)
        if end == "gone":
            storage.renew(owner, 0)
        else:
            closed = JobError("cancelled", "the evaluator was closed")
            storage.update([JobChange("0.0", status=JobStatus.CANCELLED.value, error=closed, by=owner)])
        jobs = evaluator.gather("ALL")
    assert len(calls.seen) == 1
    assert sorted(job.reused or "" for job in jobs) == [""] + ["1.0"] * 4


def test_objects_that_no_store_could_keep_are_like_no_other() -> None:
    with make("thread", Calls().run, reuse=True) as evaluator:
        evaluator.submit([{"x": [object()]}, {"x": [object()]}])
        assert [job.reused for job in evaluator.gather("ALL")] == [None, None]


class Counting(MemoryStorage):
    """Counts what is scanned."""

    def __init__(self) -> None:
        super().__init__()
        self.scanned: list[str] = []

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        self.scanned.append(search_id)
        return super().scan(search_id, since)


def test_what_reuse_costs_does_not_grow_with_the_searches() -> None:
    storage, calls = Counting(), Calls()

    def result_in(search_id: str, x: int) -> None:
        record = JobRecord(args=({"x": x},), metadata={}, function=name_of(calls.run), status=2, out=-x, owner="other")
        storage.insert(search_id, [record])

    for x in range(100, 300):
        result_in(storage.new_search(), x)
    with make("thread", calls.run, storage=storage, reuse=True) as evaluator:
        assert evaluator.evaluate({"x": 299}).output == -299
        evaluator.evaluate({"x": 0})  # it sees that nothing happens
        storage.scanned.clear()
        for x in range(10):
            evaluator.evaluate({"x": x})
        assert storage.scanned.count(evaluator.search_id) == 10
        assert len(storage.scanned) < 100  # of 2,000
        # What is new in a search that was made since is found at once, as is what follows there.
        result_in(new := storage.new_search(), 50)
        assert evaluator.evaluate({"x": 50}).output == -50
        result_in(new, 51)
        assert evaluator.evaluate({"x": 51}).output == -51
        # In one where nothing happened for a while, it is found when its turn comes.
        result_in("7", 60)
        for _ in range(30):
            evaluator.evaluate({"x": 0})
        assert evaluator.evaluate({"x": 60}).output == -60


def test_what_fails_while_searches_are_looked_at_is_looked_at_again() -> None:
    class Failing(Counting):
        fails = False

        def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
            if self.fails and search_id == "3":
                self.fails = False
                raise OSError(5, "I/O error")
            return super().scan(search_id, since)

    storage, calls = Failing(), Calls()
    for _ in range(5):
        storage.new_search()
    with make("thread", calls.run, storage=storage, reuse=True) as evaluator:
        for x in range(3):
            storage.fails = True
            evaluator.evaluate({"x": x})
        record = JobRecord(args=({"x": 9},), metadata={}, function=name_of(calls.run), status=2, out=-9, owner="other")
        storage.insert("3", [record])
        assert evaluator.evaluate({"x": 9}).output == -9
