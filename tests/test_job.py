"""Jobs, and what a run-function receives."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraval import HPOJob, Job, JobError, JobStatus, JobTiming, RunningJob
from paraval.job import JobContext, make_jobs
from paraval.outcome import Outcome
from paraval.storage import MemoryStorage, NullStorage
from paraval.submission import Notes, Submission

FAILED = JobError("exception", "bad", type="ValueError")
parameters = st.dictionaries(st.text().filter(lambda key: key != "job_id"), st.integers(), max_size=5)


# -- Job ---------------------------------------------------------------------------------------------------------------


def test_statuses_have_their_fixed_numbers() -> None:
    assert {status.name: status.value for status in JobStatus} == {
        "READY": 0,
        "RUNNING": 1,
        "DONE": 2,
        "CANCELLING": 3,
        "CANCELLED": 4,
    }
    assert [status for status in JobStatus if status.is_terminal] == [JobStatus.DONE, JobStatus.CANCELLED]


def test_a_new_job_is_blank() -> None:
    job = Job("3.7", {"x": 1})
    assert (job.id, job.args, job.status) == ("3.7", {"x": 1}, JobStatus.READY)
    assert (job.output, job.metadata, job.error) == (None, {}, None)
    assert job.timing == JobTiming(None, None, None, None)
    assert (job.timing.queued, job.timing.ran) == (None, None)
    assert (job.stdout, job.stderr) == (None, None)
    assert job.context.search is None
    assert not job.failed


def test_a_job_accepts_attributes_of_its_user() -> None:
    job = Job("0.0", {})
    job.note = "mine"  # type: ignore[attr-defined] # that is the point
    assert job.note == "mine"  # type: ignore[attr-defined] # likewise


def test_the_status_can_be_set_and_is_stored() -> None:
    storage = MemoryStorage()
    job = Job(storage.create_new_job(storage.create_new_search()), {}, None, storage)
    job.status = JobStatus.RUNNING
    assert job.status is JobStatus.RUNNING
    assert storage.load_job_status(job.id) == 1
    job.status = JobStatus.CANCELLED.value  # type: ignore[assignment] # the reference system's searches set numbers
    assert job.status is JobStatus.CANCELLED
    assert storage.load_job_status(job.id) == 4
    with pytest.raises(ValueError, match="99"):
        job.status = 99  # type: ignore[assignment] # it is the error that is tested


def test_the_status_of_a_job_without_storage_can_be_set() -> None:
    job = Job("0.0", {})
    job.status = JobStatus.DONE
    assert job.status is JobStatus.DONE


def test_timing_gives_differences() -> None:
    timing = JobTiming(1.0, 1.5, 4.0, 5.0)
    assert timing.queued == 0.5
    assert timing.ran == 2.5
    with pytest.raises(AttributeError):
        timing.started = 2.0  # type: ignore[misc] # it is frozen


@pytest.mark.parametrize("cls", [Job, HPOJob])
def test_a_failure_settles_a_job(cls: type[Job]) -> None:
    job = cls("0.0", {})
    job.settle(Outcome(error=FAILED))
    assert job.status is JobStatus.DONE
    assert job.error is FAILED
    assert job.failed
    assert job.output == ({"objective": "F_ValueError"} if cls is HPOJob else None)


@pytest.mark.parametrize("cls", [Job, HPOJob])
def test_a_stop_settles_a_job(cls: type[Job]) -> None:
    job = cls("0.0", {})
    job.settle(Outcome(error=JobError("timeout", "too long"), cancelled=True))
    assert job.status is JobStatus.CANCELLED
    assert job.failed
    if isinstance(job, HPOJob):
        assert job.objective == "F_timeout"


def test_a_subclass_may_refuse_an_output() -> None:
    class Picky(Job):
        def set_output(self, output: Any) -> None:
            raise LookupError("not this")

    job = Picky("0.0", {})
    job.settle(Outcome(1.0))
    assert job.status is JobStatus.DONE
    assert job.error is not None
    assert job.error.reason == "F_LookupError"


def test_an_output_that_was_set_already_stays() -> None:
    job = Job("0.0", {})
    job.set_output("mine")
    job.settle(Outcome(job))
    assert (job.output, job.status) == ("mine", JobStatus.DONE)


def test_repr_names_the_job() -> None:
    assert repr(HPOJob("0.1", {"x": 1})) == "HPOJob(id='0.1', status=READY, args={'x': 1})"


# -- HPOJob ------------------------------------------------------------------------------------------------------------


def test_an_hpo_job_unpacks() -> None:
    job = HPOJob("0.0", {"x": 1})
    job.settle(Outcome((1, 2)))
    configuration, objective = job
    assert (configuration, objective) == ({"x": 1}, (1.0, 2.0))
    assert job[0] == {"x": 1}
    assert job[1] == (1.0, 2.0)
    assert job[-1] == job[1]
    with pytest.raises(IndexError):
        job[2]
    job[0]["x"] = 5
    assert job.args == {"x": 1}


def test_an_hpo_job_that_is_not_done_has_no_objective() -> None:
    job = HPOJob("0.0", {"x": 1})
    assert job.objective is None
    assert tuple(job) == ({"x": 1}, None)
    assert not job.failed


def test_an_hpo_job_that_returned_a_failure_has_failed_without_error() -> None:
    job = HPOJob("0.0", {})
    job.settle(Outcome("F_oom"))
    assert job.failed
    assert job.error is None
    assert job.objective == "F_oom"


def test_a_plain_job_does_not_unpack() -> None:
    with pytest.raises(TypeError):
        Job("0.0", {})[0]  # type: ignore[index] # that is the point


# -- RunningJob --------------------------------------------------------------------------------------------------------


@given(parameters)
def test_a_running_job_is_a_mapping_over_its_parameters(given_parameters: dict[str, int]) -> None:
    job = RunningJob(parameters=dict(given_parameters))
    assert isinstance(job, MutableMapping)
    assert dict(job) == given_parameters
    assert len(job) == len(given_parameters)
    assert list(job) == list(given_parameters)
    assert {**job} == given_parameters
    assert job.parameters == given_parameters
    assert job.get("job_id") == 0
    assert job.pop("no such key", "default") == "default"
    model = dict(given_parameters)
    for mapping in (job, model):
        mapping["new"] = 1
        mapping.update(more=2)
        mapping.setdefault("more", 3)
        del mapping["new"]
    assert dict(job) == model
    assert job.parameters == model


def test_the_job_id_is_the_number_after_the_dot() -> None:
    storage = MemoryStorage()
    search_id = storage.create_new_search()
    storage.create_new_job(search_id)
    job = RunningJob(storage.create_new_job(search_id), {"x": 1}, storage)
    assert job.id == "0.1"
    assert job["job_id"] == 1
    assert type(job["job_id"]) is int
    assert "job_id" in job
    assert "job_id" not in list(job)
    with pytest.raises(KeyError, match="job_id"):
        job["job_id"] = 3
    with pytest.raises(KeyError, match="y"):
        job["y"]


def test_a_run_function_can_be_called_by_hand() -> None:
    def run(job: RunningJob) -> float:
        job.record(1, 0.5)
        assert not job.stopped()
        return float(job["x"] ** 2)

    job = RunningJob(parameters={"x": 3})
    assert run(job) == 9.0
    assert isinstance(job.storage, MemoryStorage)
    assert job.status is JobStatus.READY
    assert job.storage.load_job(str(job.id))["intermediate"] == {"budget": [1], "objective": [0.5]}


def test_running_jobs_made_by_hand_do_not_share_anything() -> None:
    first, second = RunningJob(), RunningJob()
    first["x"] = 1
    first.record(1, 2)
    assert dict(second) == {}
    assert first.storage is not second.storage
    assert second.objective is None


def test_a_running_job_shows_the_last_recorded_objective() -> None:
    job = RunningJob()
    assert job.objective is None
    job.record(1, 0.5)
    job.record(2, 0.0)
    assert job.objective == 0.0


@pytest.mark.parametrize(
    ("status", "stopped"),
    [
        (JobStatus.READY, False),
        (JobStatus.RUNNING, False),
        (JobStatus.DONE, False),
        (JobStatus.CANCELLING, True),
        (JobStatus.CANCELLED, True),
    ],
)
def test_a_running_job_is_stopped_when_it_is_being_cancelled(status: JobStatus, stopped: bool) -> None:
    storage = MemoryStorage()
    job = Job(storage.create_new_job(storage.create_new_search()), {}, None, storage)
    running = job.create_running_job()
    stored = RunningJob(job.id, {}, storage)
    job.status = status
    for view in (running, stored):
        assert view.status is status
        assert view.stopped() is stopped


class CountingStopper:
    """Stops after the given number of observations."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.observed: list[tuple[float, float]] = []
        self.job: RunningJob | None = None

    def observe(self, budget: float, objective: float) -> None:
        self.observed.append((budget, objective))

    def stop(self) -> bool:
        return len(self.observed) >= self.after

    @property
    def objective(self) -> float:
        return self.observed[-1][1]


def test_a_stopper_is_copied_for_each_job() -> None:
    storage = MemoryStorage()
    search_id = storage.create_new_search()
    stopper = CountingStopper(2)
    jobs = [Job(storage.create_new_job(search_id), {}, None, storage) for _ in range(2)]
    first, second = (job.create_running_job(stopper) for job in jobs)
    assert first.stopper is not stopper
    assert first.stopper.observed is not second.stopper.observed
    assert first.stopper.job is first
    assert second.stopper.job is second
    first.record(1, 0.1)
    assert not first.stopped()
    first.record(2, 0.2)
    assert first.stopped()
    assert first.objective == 0.2
    assert not second.stopped()
    assert stopper.observed == []
    assert stopper.job is None
    assert storage.load_job(jobs[0].id)["intermediate"] == {"budget": [1, 2], "objective": [0.1, 0.2]}


def test_a_running_job_may_change_its_parameters_without_changing_the_job() -> None:
    job = Job("0.0", {"x": 1}, None, MemoryStorage())
    running = job.create_running_job()
    running["x"] = 2
    assert job.args == {"x": 1}


def test_a_running_job_is_equal_to_a_mapping_with_the_same_items() -> None:
    job: Mapping[str, Any] = RunningJob(parameters={"x": 1})
    assert job == {"x": 1}


def test_repr_of_a_running_job_names_it() -> None:
    assert repr(RunningJob(parameters={"x": 1})) == "RunningJob(id='0.0', status=READY, parameters={'x': 1})"


@pytest.mark.parametrize("job_class", [Job, HPOJob])
def test_jobs_that_are_made_together_are_as_their_constructor_makes_them(job_class: type[Job]) -> None:
    def state(job: Job) -> dict[str, Any]:
        job.metadata  # noqa: B018 - made when it is looked at
        mine = {"__weakref__", "_submission"}
        return {name: getattr(job, name) for name in Job.__slots__ if name not in mine}

    context, storage = JobContext(), NullStorage()
    one = job_class("0.1", {"x": 1}, print, storage)
    one.metadata, one.context, one._submitted = {"timestamp_submit": 3.0}, context, 3.0
    submission = Submission(["0.1"], print, storage, context, 3.0, Notes(3.0, 1))
    (made,) = make_jobs(job_class, [{"x": 1}], submission)
    assert type(made) is job_class
    assert state(made) == state(one)
