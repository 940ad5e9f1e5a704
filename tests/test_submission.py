"""What jobs of one submission share, and what of them is made only when somebody looks at it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from paraval import Evaluator, HPOJob, Job
from paraval.job import JobContext, make_jobs
from paraval.storage import JobChange, MemoryStorage, NullStorage, SharedMemoryStorage, Storage
from paraval.storage.records import JobEnds, NewJobs
from paraval.submission import Notes, Submission
from runfunctions import Flags
from support import until


def value_of(job: Any) -> float:
    return float(job["x"])


def submission_of(count: int, notes: Notes | None = None) -> Submission:
    ids = [f"0.{number}" for number in range(7, 7 + count)]
    return Submission(ids, print, NullStorage(), JobContext(), 3.0, notes or Notes(3.0, count))


# -- notes -------------------------------------------------------------------------------------------------------------


def test_each_dict_is_made_once_and_kept() -> None:
    notes = Notes(3.0, 10)
    notes[5]["mine"] = 1
    plain = {"timestamp_submit": 3.0}
    assert list(notes) == [plain] * 5 + [{**plain, "mine": 1}] + [plain] * 4
    assert notes[-5] is notes[5]
    assert [one is other for one, other in zip(notes[4:7], list(notes)[4:7], strict=True)] == [True] * 3
    assert len(notes) == 10
    with pytest.raises(IndexError):
        notes[10]


def test_a_copy_is_not_kept() -> None:
    notes = Notes(3.0, 2)
    notes.copy_of(0)["mine"] = 1
    assert notes[0] == {"timestamp_submit": 3.0}
    notes.copy_of(0)["mine"] = 1
    assert notes[0] == {"timestamp_submit": 3.0}


def test_the_time_of_the_gather_is_in_those_that_were_made_and_in_those_to_come() -> None:
    notes = Notes(3.0, 2)
    early = notes[1]
    notes.note_gathered(5.0)
    assert list(notes) == [{"timestamp_submit": 3.0, "timestamp_gather": 5.0}] * 2
    assert early is notes[1]


def test_what_the_collector_finalizes_in_the_middle_finds_the_same_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, new, found = Notes(3.0, 2), Notes._new, []

    def new_with_a_finalizer(notes: Notes) -> dict[str, Any]:
        monkeypatch.setattr(Notes, "_new", new)
        found.append(notes[0])
        return new(notes)

    monkeypatch.setattr(Notes, "_new", new_with_a_finalizer)
    assert notes[0] is found[0]


# -- jobs --------------------------------------------------------------------------------------------------------------


def pickled(job: Job) -> Any:
    return pickle.loads(pickle.dumps(job))  # noqa: S301 - it is our own


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
@pytest.mark.parametrize("job_class", [Job, HPOJob])
def test_a_copy_of_a_job_has_what_the_job_would_have_shown(job_class: type[Job], copied: Any) -> None:
    submission = submission_of(2)
    job, _ = make_jobs(job_class, [{"x": 1}, {"x": 2}], submission)
    submission.notes.note_gathered(9.0)
    other = copied(job)
    assert other.metadata == {"timestamp_submit": 3.0, "timestamp_gather": 9.0}
    assert other.timing == job.timing == (3.0, None, None, 9.0)
    assert other._submission is None


def test_ids_that_are_not_numbered_on() -> None:
    submission = Submission(["a.x", "a.3", "a.2"], print, NullStorage(), JobContext(), 3.0, Notes(3.0, 3))
    jobs = make_jobs(Job, [{}, {}, {}], submission)
    for place, job in enumerate(jobs):
        job.metadata["place"] = place
    assert [note["place"] for note in submission.notes] == [0, 1, 2]


@pytest.mark.parametrize("new_id", ["mine", "0.99", 7])
def test_a_job_of_another_id_has_metadata_of_its_own(new_id: Any) -> None:
    submission = submission_of(2)
    job, other = make_jobs(Job, [{}, {}], submission)
    job.id = new_id
    assert copy.copy(job).metadata == job.metadata == {"timestamp_submit": 3.0}
    job.metadata["mine"] = True
    assert submission.is_renoted
    assert other.metadata == {"timestamp_submit": 3.0}


# -- with an evaluator -------------------------------------------------------------------------------------------------


def times(jobs: list[Job]) -> list[tuple[Any, Any]]:
    return [(job.metadata["timestamp_submit"], job.metadata["timestamp_gather"]) for job in jobs]


@pytest.mark.parametrize("sizes", [[10], [1, 9], [9, 1], [3, 3, 4]])
def test_all_have_the_times_whether_they_are_gathered_together_or_in_parts(sizes: list[int]) -> None:
    storage = MemoryStorage()
    with Evaluator.create(value_of, "thread", {"storage": storage, "num_workers": 2}) as evaluator:
        evaluator.submit([{"x": number} for number in range(10)])
        assert evaluator._ledger.wait(lambda: evaluator._ledger.settled == 10, timeout=10.0)
        gathered: list[Job] = []
        for size in sizes:
            taken: list[Job] = []
            assert evaluator._ledger.take_into(taken, lambda: True, size)
            evaluator._gathered.add(taken)
            gathered += taken
        assert times(gathered) == [(job.timing.submitted, job.timing.gathered) for job in gathered]
        assert None not in [when for job in gathered for when in job.timing]
        records = storage.get([job.id for job in gathered])
        assert [record.metadata for record in records] == [job.metadata for job in gathered]


class CopiesDicts(MemoryStorage):
    def insert_jobs(self, search_id: str, jobs: NewJobs) -> list[str]:
        return super().insert_jobs(search_id, jobs._replace(metadata=[dict(noted) for noted in jobs.metadata]))


class SeesEnds(MemoryStorage):
    def end_jobs(self, ends: JobEnds) -> None:
        assert ends.metadata is not None
        super().end_jobs(ends)


@pytest.mark.parametrize("kind", [CopiesDicts, SeesEnds])
def test_a_store_that_takes_many_jobs_in_a_way_of_its_own_is_given_the_metadata(kind: type[MemoryStorage]) -> None:
    storage = kind()
    with Evaluator.create(lambda job: {"output": 1, "metadata": {"m": job["x"]}}, "thread", {"storage": storage}) as it:
        it.submit([{"x": number} for number in range(50)])
        jobs = it.gather("ALL")
    records = storage.get([job.id for job in jobs])
    assert [(record.metadata or {}).get("m") for record in records] == [job.args["x"] for job in jobs]


class Submits:
    """Submits a job when the collector finds it, wherever that is."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.myself = self

    def __del__(self) -> None:
        self.evaluator.submit([{"x": 0}])


def test_a_finalizer_may_submit_in_the_middle_of_anything() -> None:
    rounds = 400
    with Evaluator.create(value_of, "thread", {"num_workers": 2}) as evaluator:
        thresholds = gc.get_threshold()
        try:
            for number in range(rounds):
                evaluator.submit([{"x": x} for x in range(20)])
                gc.set_threshold(1 + number % 40)
                Submits(evaluator)
                evaluator.gather("ALL")
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()
        evaluator.gather("ALL")
        assert (evaluator.statistics().done, len(evaluator.jobs)) == (21 * rounds, 21 * rounds)


def test_what_is_noted_at_any_time_is_in_the_record() -> None:
    class Noting:
        def on_done(self, job: Job) -> None:
            job.metadata["done"] = job.output

    storage = MemoryStorage()
    with Evaluator.create(
        value_of, "thread", {"storage": storage, "num_workers": 2, "callbacks": [Noting()]}
    ) as evaluator:
        evaluator.submit([{"x": number} for number in range(20)])
        jobs = evaluator.gather("ALL")
        jobs[3].metadata["late"] = True
        for job, record in zip(jobs, storage.get([job.id for job in jobs]), strict=True):
            assert record.metadata == job.metadata
            assert job.metadata["done"] == job.output
        assert storage.load_job(jobs[3].id)["metadata"]["late"] is True
        storage.store_job_metadata(jobs[4].id, "by", "another")
        assert storage.load_job(jobs[4].id)["metadata"]["by"] == "another"
        assert "by" not in jobs[4].metadata


@pytest.mark.parametrize("method", ["thread", "process"])
def test_a_metadata_dict_that_was_replaced_is_the_one_that_counts(method: str, flags: Flags) -> None:
    storage = MemoryStorage()

    def function(job: Any) -> float:
        flags.wait("go")
        return float(job["x"])

    with Evaluator.create(function, method, {"storage": storage, "num_workers": 2}) as evaluator:
        evaluator.submit([{"x": number} for number in range(200)])
        evaluator.jobs[150].metadata = {"mine": 1}
        flags.put("go")
        jobs = {job.id: job for job in evaluator.gather("ALL")}
    job = jobs["0.150"]
    assert job.metadata == {"mine": 1, "timestamp_gather": job.timing.gathered}
    assert storage.load_job("0.150")["metadata"]["mine"] == 1
    assert {len(one.metadata) for one in jobs.values()} == {2}


class Logged(MemoryStorage):
    """One that does something of its own when records change."""

    def update(self, changes: Sequence[JobChange]) -> None:
        super().update(changes)


@pytest.mark.parametrize("kind", [MemoryStorage, Logged, SharedMemoryStorage])
@pytest.mark.parametrize("job_class", [Job, HPOJob])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_what_a_job_returns_is_newer_than_what_others_have_stored(
    kind: type[Storage], job_class: type[Job], count: int
) -> None:
    storage = kind()

    def function(job: Any) -> Any:
        storage.store_job_metadata(job.id, "progress", "half")
        value = {"metadata": {"progress": "finished"}}
        return {"objective": 1.0, **value} if job_class is HPOJob else {"output": 1.0, **value}

    kwargs = {"num_workers": 1, "job_class": job_class, "storage": storage}
    with storage, Evaluator.create(function, "thread", kwargs) as evaluator:
        evaluator.submit([{"x": number} for number in range(count)])
        jobs = evaluator.gather("ALL")
        records = storage.get([job.id for job in jobs])
    assert {job.metadata["progress"] for job in jobs} == {"finished"}
    assert {(record.metadata or {}).get("progress") for record in records} == {"finished"}


def test_ends_of_jobs_of_two_searches_without_metadata() -> None:
    storage = MemoryStorage()
    (first, *_), notes = submitted(storage)
    (*_, last), others = submitted(storage)
    notes[0]["mine"], others[7]["mine"] = 1, 2
    storage.end_jobs(JobEnds([first, last], [2, 2], [1.0, 2.0], [None, None], None, "me"))
    assert [(record.out, (record.metadata or {})["mine"]) for record in storage.get([first, last])] == [
        (1.0, 1),
        (2.0, 2),
    ]


def test_a_subclass_may_set_its_metadata_before_all_else() -> None:
    class Early(Job):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.metadata = {"early": 1}
            super().__init__(*args, **kwargs)

    assert Early("0.1", {}).metadata == {}


def test_several_threads_that_look_find_the_same_dict() -> None:
    for _ in range(20):
        submission = submission_of(50)
        jobs = make_jobs(Job, [{} for _ in range(50)], submission)
        start = threading.Barrier(3)

        def look(start: threading.Barrier = start, jobs: list[Job] = jobs) -> None:
            start.wait()
            for job in jobs:
                job.metadata.setdefault("looked", 1)

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        submission.notes.note_gathered(9.0)
        for thread in threads:
            thread.join()
        expected = {"timestamp_submit": 3.0, "timestamp_gather": 9.0, "looked": 1}
        assert [job.metadata for job in jobs] == [expected] * 50
        assert all(job.metadata is note for job, note in zip(jobs, submission.notes, strict=True))


def test_a_storage_that_outlives_its_evaluators_keeps_no_function_of_theirs() -> None:
    class Large:
        pass

    storage = MemoryStorage()
    large = Large()
    there = weakref.ref(large)

    def function(job: Any, large: Large = large) -> float:
        return float(job["x"])

    with Evaluator.create(function, "thread", {"storage": storage, "num_workers": 1}) as evaluator:
        search = evaluator.search_id
        evaluator.submit([{"x": number} for number in range(10)])
        evaluator.gather("ALL")
    del evaluator, function, large
    until(lambda: (gc.collect(), there())[1] is None)  # a thread may be about to end
    assert len(storage.load_search(search)) == 10


# -- the memory storage ------------------------------------------------------------------------------------------------


def submitted(storage: MemoryStorage, count: int = 8) -> tuple[list[str], Notes]:
    notes = Notes(1.0, count)
    search = storage.create_new_search()
    ids = storage.insert_jobs(search, NewJobs([{"x": n} for n in range(count)], notes, "run", "me"))
    return ids, notes


@pytest.mark.parametrize("is_lazy", [True, False])
def test_what_the_storage_gives_is_a_copy(is_lazy: bool) -> None:
    storage = MemoryStorage()
    new: Sequence[dict[str, Any]] = Notes(1.0, 8) if is_lazy else [{"timestamp_submit": 1.0} for _ in range(8)]
    ids = storage.insert_jobs(storage.create_new_search(), NewJobs([{"x": n} for n in range(8)], new, "run", "me"))
    storage.end_jobs(JobEnds(ids[:4], [2] * 4, [1.0] * 4, [None] * 4, None, "me"))
    for record in storage.get(ids):
        assert record.metadata is not None
        record.metadata["changed"] = 1
    assert [record.metadata for record in storage.get(ids)] == list(new) == [{"timestamp_submit": 1.0}] * 8


def test_ends_in_columns_of_different_lengths_change_nothing() -> None:
    storage = MemoryStorage()
    ids, notes = submitted(storage)
    before = storage.scan("0")
    with pytest.raises(ValueError, match="one length"):
        storage.end_jobs(JobEnds(ids, [2] * 8, [1.0] * 7, [None] * 8, notes, "me"))
    assert storage.scan("0") == before


@pytest.mark.parametrize("by", ["me", "another"])
def test_ends_after_something_has_happened_to_one(by: str) -> None:
    storage = MemoryStorage()
    ids, notes = submitted(storage)
    storage.update([JobChange(ids[2], status=1)])
    values = [float(number) for number in range(8)]
    storage.end_jobs(JobEnds(ids, [2] * 8, values, [None] * 8, notes, by))
    outs = values if by == "me" else [None] * 8
    assert [record.out for record in storage.get(ids)] == outs
    notes[2]["noted"] = 1
    assert storage.get([ids[2]])[0].metadata == {"timestamp_submit": 1.0, "noted": 1}


def test_a_finalizer_in_the_middle_finds_all_as_it_was_or_as_it_is() -> None:
    storage = MemoryStorage()
    seen: list[Any] = []

    class Looks:
        def __init__(self, job_id: str) -> None:
            self.me, self.job_id = self, job_id

        def __del__(self) -> None:
            seen.append(storage.get([self.job_id])[0].status)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(50):
            ids, notes = submitted(storage, 8)
            Looks(ids[0])
            storage.end_jobs(JobEnds(ids, [2] * 8, [1.0] * 8, [None] * 8, notes, "me"))
            Looks(ids[5])
            assert [note["timestamp_submit"] for note in notes] == [1.0] * 8
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert len(seen) == 100
    assert set(seen) <= {0, 2}
