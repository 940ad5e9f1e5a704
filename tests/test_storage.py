"""The storage interface on the stores that need nothing, and evaluators that share a search."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

import redis_server as real
from paraval import Evaluator, HPOJob, Job, JobError, JobStatus, ParavalError, RunningJob
from paraval.callback import Callback
from paraval.storage import (
    JobChange,
    JobRecord,
    MemoryStorage,
    NullStorage,
    RedisStorage,
    SharedMemoryStorage,
    SqliteStorage,
    Storage,
    UnknownIdError,
)
from paraval.storage.memory import search as search_in_memory
from paraval.storage.records import JobEnds, NewJobs
from paraval.submission import Notes
from redis_server import new_prefix
from support import METHODS, Stage, configurations, double, ids, in_threads, make, outputs, until

redis_server = real.redis_server  # the fixture

BLANK: dict[str, Any] = {
    "status": 0,
    "in": None,
    "out": None,
    "metadata": {},
    "intermediate": {"budget": [], "objective": []},
}


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def search_id(storage: MemoryStorage) -> str:
    return storage.create_new_search()


# -- the named methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MemoryStorage, NullStorage])
def test_a_store_that_needs_no_connection_is_connected(cls: type[Storage]) -> None:
    storage = cls()
    assert storage.is_connected()
    assert storage.connect() is storage


def test_searches_and_jobs_are_numbered(storage: MemoryStorage) -> None:
    first, second = storage.create_new_search(), storage.create_new_search()
    assert storage.load_all_search_ids() == [first, second] == ["0", "1"]
    assert [storage.create_new_job(search) for search in (first, first, second)] == ["0.0", "0.1", "1.0"]
    assert storage.load_all_job_ids(first) == ["0.0", "0.1"]
    assert storage.load_all_job_ids(second) == ["1.0"]


def test_job_ids_come_in_the_order_of_their_numbers(storage: MemoryStorage, search_id: str) -> None:
    made = [storage.create_new_job(search_id) for _ in range(12)]
    for job_id in reversed(made):
        storage.store_job_status(job_id, 2)
    assert storage.load_all_job_ids(search_id) == made
    assert list(storage.load_search(search_id)) == [str(number) for number in range(12)]


def test_a_new_job_is_blank(storage: MemoryStorage, search_id: str) -> None:
    assert storage.load_job(storage.create_new_job(search_id)) == BLANK


def test_every_part_of_a_job_is_stored_and_loaded(storage: MemoryStorage, search_id: str) -> None:
    job_id = storage.create_new_job(search_id)
    other = storage.create_new_job(search_id)
    storage.store_job_in(job_id, args=(1, 2), kwargs={"k": 3})
    storage.store_job_out(job_id, 0.0)
    storage.store_job_metadata(job_id, "a", False)
    storage.store_job_metadata(job_id, "b", [1])
    storage.store_job_status(job_id, JobStatus.DONE.value)
    storage.store_job_intermediate(job_id, 1, 0.5)
    storage.store_job_intermediate(job_id, 2, 0.75)
    expected = {
        "status": 2,
        "in": {"args": (1, 2), "kwargs": {"k": 3}},
        "out": 0.0,
        "metadata": {"a": False, "b": [1]},
        "intermediate": {"budget": [1, 2], "objective": [0.5, 0.75]},
    }
    assert storage.load_job(job_id) == expected
    assert storage.load_job_status(job_id) == 2
    assert storage.load_jobs([other, job_id]) == {other: BLANK, job_id: expected}
    assert list(storage.load_jobs([other, job_id])) == [other, job_id]
    assert storage.load_search(search_id) == {"0": expected, "1": BLANK}


def test_store_job_in_takes_either_kind_of_argument(storage: MemoryStorage, search_id: str) -> None:
    job_id = storage.create_new_job(search_id)
    storage.store_job_in(job_id, args=(1,))
    assert storage.load_job(job_id)["in"] == {"args": (1,), "kwargs": None}
    storage.store_job_in(job_id, kwargs={"k": 1})
    assert storage.load_job(job_id)["in"] == {"args": None, "kwargs": {"k": 1}}


def test_store_job_stores_by_key(storage: MemoryStorage, search_id: str) -> None:
    job_id = storage.create_new_job(search_id)
    storage.store_job(job_id, "in", {"args": (1,), "kwargs": None})
    storage.store_job(job_id, "out", 3.5)
    storage.store_job(job_id, "status", 1)
    storage.store_job(job_id, "metadata", {"a": 1})
    storage.store_job(job_id, "metadata", {"b": 2})
    storage.store_job(job_id, "my own", [1, 2])
    assert storage.load_job(job_id) == {
        **BLANK,
        "status": 1,
        "in": {"args": (1,), "kwargs": None},
        "out": 3.5,
        "metadata": {"a": 1, "b": 2},
        "my own": [1, 2],
    }
    with pytest.raises(ValueError, match="store_job_intermediate") as caught:
        storage.store_job(job_id, "intermediate", {})
    assert isinstance(caught.value, ParavalError)


def test_search_values(storage: MemoryStorage, search_id: str) -> None:
    storage.store_search_value(search_id, "a", {"deep": [1]})
    storage.store_search_value(search_id, "a", 2)
    storage.store_search_value(search_id, "none", None)
    assert storage.load_search_value(search_id, "a") == 2
    assert storage.load_search_value(search_id, "none") is None
    with pytest.raises(KeyError, match="no value 'b'"):
        storage.load_search_value(search_id, "b")


def test_values_of_all_jobs_drop_none_alone(storage: MemoryStorage, search_id: str) -> None:
    for value in (0, None, False, 0.0, "", 3):
        job_id = storage.create_new_job(search_id)
        storage.store_job_metadata(job_id, "key", value)
        storage.store_job_out(job_id, value)
    storage.create_new_job(search_id)
    expected = [0, False, 0.0, "", 3]
    assert storage.load_metadata_from_all_jobs(search_id, "key") == expected
    assert storage.load_out_from_all_jobs(search_id) == expected
    assert storage.load_metadata_from_all_jobs(search_id, "other") == []


def test_what_is_loaded_can_be_changed_without_changing_the_store(storage: MemoryStorage, search_id: str) -> None:
    job_id = storage.create_new_job(search_id)
    storage.store_job_metadata(job_id, "a", 1)
    storage.store_job_intermediate(job_id, 1, 2)
    before = copy.deepcopy(storage.load_job(job_id))
    loaded = storage.load_job(job_id)
    loaded["metadata"]["b"] = 2
    loaded["intermediate"]["budget"].append(9)
    loaded["status"] = 4
    (record,) = storage.get([job_id])
    record.status = 4
    assert record.metadata is not None
    record.metadata.clear()
    assert storage.load_job(job_id) == before


@pytest.mark.parametrize(
    "call",
    [
        lambda storage: storage.create_new_job("9"),
        lambda storage: storage.load_all_job_ids("9"),
        lambda storage: storage.load_search("9"),
        lambda storage: storage.scan("9"),
        lambda storage: storage.store_search_value("9", "k", 1),
        lambda storage: storage.load_search_value("9", "k"),
        lambda storage: storage.load_job("0.9"),
        lambda storage: storage.load_job("9.0"),
        lambda storage: storage.load_job("no dot"),
        lambda storage: storage.load_jobs(["0.0", "0.9"]),
        lambda storage: storage.load_job_status("0.9"),
        lambda storage: storage.store_job_out("0.9", 1),
        lambda storage: storage.store_job_metadata("0.9", "k", 1),
        lambda storage: storage.store_job_in("0.9", (1,)),
        lambda storage: storage.store_job_status("0.9", 1),
        lambda storage: storage.store_job_intermediate("0.9", 1, 1),
        lambda storage: storage.load_metadata_from_all_jobs("9", "k"),
        lambda storage: storage.load_out_from_all_jobs("9"),
    ],
)
def test_an_unknown_id_is_named(storage: MemoryStorage, call: Any) -> None:
    storage.create_new_job(storage.create_new_search())
    with pytest.raises(UnknownIdError, match=r"9|no dot") as caught:
        call(storage)
    assert isinstance(caught.value, ParavalError)
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == caught.value.args[0]  # KeyError alone would show the message in quotes


def test_a_change_of_several_jobs_is_all_or_none(storage: MemoryStorage, search_id: str) -> None:
    job_id = storage.create_new_job(search_id)
    with pytest.raises(UnknownIdError):
        storage.update([JobChange(job_id, status=2), JobChange("0.9", status=2)])
    assert storage.load_job_status(job_id) == 0
    with pytest.raises(UnknownIdError):
        storage.insert("9", [JobRecord()])
    assert storage.load_all_job_ids(search_id) == [job_id]


# -- revisions ---------------------------------------------------------------------------------------------------------


def test_a_scan_gives_what_changed_since(storage: MemoryStorage, search_id: str) -> None:
    assert storage.scan(search_id) == ([], 0)
    made = [storage.create_new_job(search_id) for _ in range(4)]
    records, revision = storage.scan(search_id)
    assert [record.id for record in records] == made
    assert storage.scan(search_id, revision) == ([], revision)
    storage.store_job_out(made[2], 1.0)
    storage.store_job_out(made[0], 2.0)
    storage.store_job_status(made[2], 2)
    records, newer = storage.scan(search_id, revision)
    assert [record.id for record in records] == [made[0], made[2]]
    assert newer > revision
    assert storage.scan(search_id, newer)[0] == []
    assert [record.id for record in storage.scan(search_id)[0]] == [made[1], made[3], made[0], made[2]]


def test_searches_have_revisions_of_their_own(storage: MemoryStorage) -> None:
    first, second = storage.create_new_search(), storage.create_new_search()
    storage.create_new_job(first)
    assert storage.scan(second) == ([], 0)


class ScannedStorage(RuleBasedStateMachine):
    """Whoever scans from revision to revision has the same picture as whoever loads everything."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.storage = MemoryStorage()
        self.search_id = self.storage.create_new_search()
        self.revision = 0
        self.picture: dict[str, JobRecord] = {}
        self.changed: set[str] = set()

    @rule(target=jobs)
    def create(self) -> str:
        job_id = self.storage.create_new_job(self.search_id)
        self.changed.add(job_id)
        return job_id

    @rule(job_id=jobs, status=st.integers(0, 4))
    def set_status(self, job_id: str, status: int) -> None:
        self.storage.store_job_status(job_id, status)
        self.changed.add(job_id)

    @rule(changes=st.lists(st.tuples(jobs, st.integers()), max_size=4))
    def set_several(self, changes: list[tuple[str, int]]) -> None:
        self.storage.update([JobChange(job_id, out=out, metadata={"out": out}) for job_id, out in changes])
        self.changed |= {job_id for job_id, _ in changes}

    @rule()
    def scan(self) -> None:
        records, self.revision = self.storage.scan(self.search_id, self.revision)
        assert {record.id for record in records} == self.changed
        assert len(records) == len(self.changed)
        self.picture.update({record.id: record for record in records})
        self.changed.clear()

    @invariant()
    def the_picture_is_right_but_for_what_changed(self) -> None:
        everything = {record.id: record for record in self.storage.scan(self.search_id)[0]}
        assert set(everything) == set(self.picture) | self.changed
        for job_id, record in self.picture.items():
            if job_id not in self.changed:
                assert everything[job_id] == record


TestScannedStorage = ScannedStorage.TestCase
TestScannedStorage.settings = settings(max_examples=30, stateful_step_count=20)


class OneByOne(MemoryStorage):
    """It takes jobs one by one, as a store does that has no other way."""

    insert_jobs = Storage.insert_jobs
    end_jobs = Storage.end_jobs


class Columns(RuleBasedStateMachine):
    """What is inserted and ended in columns is as what is inserted and changed one by one, whatever happens between."""

    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.storages = MemoryStorage(), OneByOne()
        self.metadata: tuple[dict[str, tuple[Sequence[dict[str, Any]], int]], ...] = ({}, {})
        self.counts = Counter[str]()
        self.many, search_in_memory._MANY = search_in_memory._MANY, 5  # so that its log is merged now and then
        for storage in self.storages:
            assert [storage.create_new_search(), storage.create_new_search()] == ["0", "1"]

    def teardown(self) -> None:
        search_in_memory._MANY = self.many

    def do(self, action: Callable[[Storage], object]) -> Any:
        """Do it with both, and give what both give."""
        first, second = (action(storage) for storage in self.storages)
        assert first == second
        return first

    @rule(
        target=jobs,
        search_id=st.sampled_from("00001"),
        count=st.integers(1, 6),
        is_private=st.booleans(),
        is_lazy=st.booleans(),
    )
    def insert(self, search_id: str, count: int, is_private: bool, is_lazy: bool) -> Any:
        made: list[list[str]] = []
        for storage, metadata in zip(self.storages, self.metadata, strict=True):
            new: Sequence[dict[str, Any]] = [{"timestamp_submit": 3.0} for _ in range(count)]
            if is_lazy and storage is self.storages[0]:
                new = Notes(3.0, count)
            args = [{"x": number} for number in range(count)]
            made.append(storage.insert_jobs(search_id, NewJobs(args, new, "run", "me", is_private)))
            metadata.update({job_id: (new, place) for place, job_id in enumerate(made[-1])})
        assert made[0] == made[1]
        self.counts[search_id] += count
        return multiple(*made[0])

    @rule(target=jobs, search_id=st.sampled_from("01"))
    def create(self, search_id: str) -> Any:
        self.counts[search_id] += 1
        return self.do(lambda storage: storage.create_new_job(search_id))

    @rule(
        job_ids=st.lists(jobs, min_size=1, max_size=8, unique=True),
        by=st.sampled_from(["me", "me", "other"]),
        given=st.sampled_from(["none", "none", "their own", "another"]),
        in_order=st.booleans(),
        span=st.integers(0, 6),
    )
    def end(self, job_ids: list[str], by: str, given: str, in_order: bool, span: int) -> None:
        if span:  # those that follow the first
            search, first = job_ids[0].split(".")
            job_ids = [f"{search}.{int(first) + it}" for it in range(min(span, self.counts[search] - int(first)))]
        job_ids = [job_id for job_id in job_ids if job_id[0] == job_ids[0][0]]
        job_ids = sorted(job_ids, key=lambda job_id: int(job_id[2:])) if in_order else job_ids
        if given == "none":
            job_ids = [job_id for job_id in job_ids if job_id in self.metadata[0]]
            if not job_ids:
                return
        for storage, known in zip(self.storages, self.metadata, strict=True):
            metadata: list[dict[str, Any]] | None = [
                known[job_id][0][known[job_id][1]] if given != "another" and job_id in known else {"new": 1}
                for job_id in job_ids
            ]
            if given == "none" and storage is self.storages[0]:
                metadata = None
            statuses = [2 + 2 * (number % 2) for number, _ in enumerate(job_ids)]
            errors = [JobError("cancelled", "why") if status == 4 else None for status in statuses]
            storage.end_jobs(JobEnds(job_ids, statuses, list(range(len(job_ids))), errors, metadata, by))

    @rule(job_id=jobs, unknown=st.sampled_from(["0.99", "1.-1", "0.00", "0.x", "7.0", "0"]))
    def end_one_that_does_not_exist(self, job_id: str, unknown: str) -> None:
        for storage in self.storages:
            before = storage.scan(job_id[0])
            with pytest.raises(UnknownIdError):
                storage.end_jobs(JobEnds([job_id, unknown], [2, 2], [1, 1], [None] * 2, [{}, {}], "me"))
            assert storage.scan(job_id[0]) == before

    @rule(job_id=jobs, value=st.integers(0, 3), times=st.sampled_from([1, 1, 50]))
    def change(self, job_id: str, value: int, times: int) -> None:
        self.do(lambda storage: storage.update([JobChange(job_id, status=value) for _ in range(times)]))
        self.do(lambda storage: storage.store_job_metadata(job_id, "noted", value))
        self.do(lambda storage: storage.store_job_intermediate(job_id, 1, value))

    @rule(job_id=jobs)
    def note(self, job_id: str) -> None:
        for known in self.metadata:
            if job_id in known:
                notes, place = known[job_id]
                notes[place]["noted"] = 1  # which is in the record by reference

    @rule(job_id=jobs, owner=st.sampled_from(["me", "other"]))
    def adopt(self, job_id: str, owner: str) -> None:
        self.do(lambda storage: storage.adopt({job_id: storage.get([job_id])[0].revision}, owner))

    @rule(search_id=st.sampled_from("01"), since=st.integers(0, 50))
    def scan(self, search_id: str, since: int) -> None:
        self.do(lambda storage: storage.scan(search_id, since))

    @invariant()
    def both_hold_the_same(self) -> None:
        for search_id in "01":
            records, revision = self.do(lambda storage, it=search_id: storage.scan(it))  # type: ignore[misc] # the default binds it now
            assert len(records) == self.counts[search_id]
            assert [record.revision for record in records] == sorted({record.revision for record in records})
            assert revision == max([record.revision for record in records], default=0)
            assert self.do(lambda storage, them=records: storage.get(it.id for it in them)) == records  # type: ignore[misc] # likewise


TestColumns = Columns.TestCase
TestColumns.settings = settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize("seeds", [range(5), range(5, 10), range(35, 40)], ids=str)
def test_revisions_stay_in_order_whatever_finalizers_do_in_the_middle(seeds: range) -> None:
    thresholds = gc.get_threshold()
    for seed in seeds:
        gc.set_threshold(random.Random(seed).choice([1, 3, 7, 13, 29]), 2, 2)
        try:
            storage = changed_by_finalizers(random.Random(seed))
        finally:
            gc.set_threshold(*thresholds)
        gc.collect()  # none of them shall come in the middle of the scan
        records, revision = storage.scan("0")
        revisions = [record.revision for record in records]
        assert revisions == sorted(set(revisions)), seed
        assert revision == revisions[-1]


class Meddler:
    """Garbage that changes the storage when it is finalized."""

    def __init__(self, storage: MemoryStorage, rng: random.Random, job_ids: list[str]) -> None:
        self.itself, self.storage, self.rng, self.job_ids = self, storage, rng, job_ids

    def __del__(self) -> None:
        storage, job_ids = self.storage, self.job_ids
        kind = self.rng.randrange(4) if job_ids else -1
        if kind == 0:
            storage.store_job_metadata(self.rng.choice(job_ids), "noted", 1)
        elif kind == 1:
            storage.store_job(self.rng.choice(job_ids), "extra", 1)
        elif kind == 2:
            storage.scan("0", self.rng.randrange(9))
        elif kind == 3:
            job_ids += storage.insert_jobs("0", NewJobs([{}] * 3, [{}, {}, {}], "run", "me"))


def changed_by_finalizers(rng: random.Random) -> MemoryStorage:
    storage = MemoryStorage()
    storage.create_new_search()
    job_ids: list[str] = []
    for _ in range(60):
        for _ in range(3):
            Meddler(storage, rng, job_ids)
        made = storage.insert_jobs("0", NewJobs([{"x": it} for it in range(9)], [{} for _ in range(9)], "run", "me"))
        job_ids += made
        for _ in range(2):
            Meddler(storage, rng, job_ids)
        some = made[rng.randrange(3) : rng.randrange(4, 9)]
        count, kind = len(some), rng.randrange(3)
        if kind == 2:
            storage.update([JobChange(job_id, status=1) for job_id in some])
        else:
            metadata: list[dict[str, Any]] | None = [{"own": 1} for _ in some] if kind else None
            storage.end_jobs(JobEnds(some, [2] * count, list(range(count)), [None] * count, metadata, "me"))
    return storage


class Twelve:
    """Twelve jobs, submitted in two halves."""

    def __init__(self, storage: MemoryStorage, *, is_lazy: bool) -> None:
        self.storage = storage
        search = storage.create_new_search()
        self.notes: list[Sequence[dict[str, Any]]] = []
        for _ in range(2):
            new = Notes(3.0, 6) if is_lazy else [{"timestamp_submit": 3.0} for _ in range(6)]
            self.notes.append(new)
            storage.insert_jobs(search, NewJobs([{"x": number} for number in range(6)], new, "run", "me"))

    def note(self, number: int) -> dict[str, Any]:
        return self.notes[number // 6][number % 6]

    def change(self, number: int, value: int) -> None:
        self.storage.update([JobChange(f"0.{number}", status=value)])
        if value:
            self.storage.store_job_metadata(f"0.{number}", "by", "another")

    def end(self, numbers: list[int], by: str, kind: str) -> None:
        metadata: list[dict[str, Any]] | None = [self.note(number) for number in numbers]
        if kind == "one is another" and metadata:
            metadata[-1] = {"another": 1}
        elif kind == "none" and type(self.storage) is MemoryStorage:
            metadata = None
        outs = [1.5 * number for number in numbers]
        job_ids = [f"0.{number}" for number in numbers]
        self.storage.end_jobs(JobEnds(job_ids, [2] * len(outs), outs, [None] * len(outs), metadata, by))


@pytest.mark.parametrize("seed", range(4))
def test_ends_in_columns_are_as_ends_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(150):
        both = Twelve(MemoryStorage(), is_lazy=rng.random() < 0.7), Twelve(OneByOne(), is_lazy=False)
        for _ in range(rng.randint(0, 2)):
            number, value = rng.randrange(12), rng.randrange(3)
            for twelve in both:
                twelve.change(number, value)
        for _ in range(rng.randint(1, 4)):
            first = rng.randrange(12)
            numbers = list(range(first, min(12, first + rng.randint(1, 8))))
            if rng.random() < 0.3:
                rng.shuffle(numbers)
            by, kind = rng.choice(["me", "me", "me", "other"]), rng.choice(["none", "none", "own", "one is another"])
            late, key = rng.randrange(12), rng.choice(["late", "by"])
            for twelve in both:
                twelve.note(late)[key] = first
                twelve.end(numbers, by, kind)
            since = rng.randrange(30)
            assert both[0].storage.scan("0", since) == both[1].storage.scan("0", since)
        assert both[0].storage.scan("0") == both[1].storage.scan("0")


# -- many threads ------------------------------------------------------------------------------------------------------


def test_ids_never_collide(storage: MemoryStorage, search_id: str) -> None:
    def allocate() -> list[int]:
        numbers: list[int] = []
        for count in range(1, 40):
            records = [JobRecord() for _ in range(count)]
            storage.insert(search_id, records)
            numbers += [int(record.id.partition(".")[2]) for record in records]
            assert numbers[-count:] == list(range(numbers[-count], numbers[-1] + 1))
        return numbers

    numbers = [number for numbers in in_threads(*[allocate] * 8) for number in numbers]
    assert sorted(numbers) == list(range(8 * sum(range(1, 40))))
    assert [f"{search_id}.{number}" for number in sorted(numbers)] == storage.load_all_job_ids(search_id)


def test_searches_never_collide(storage: MemoryStorage) -> None:
    made = in_threads(*[lambda: [storage.create_new_search() for _ in range(50)]] * 8)
    assert len({search for searches in made for search in searches}) == 400
    assert len(storage.load_all_search_ids()) == 400


def test_changes_from_many_threads_are_all_kept(storage: MemoryStorage, search_id: str) -> None:
    job_id = storage.create_new_job(search_id)

    def change(thread: int) -> None:
        for number in range(50):
            storage.store_job_metadata(job_id, f"{thread}.{number}", number)
            storage.store_job_intermediate(job_id, thread, number)

    in_threads(*[partial(change, thread) for thread in range(4)])
    job = storage.load_job(job_id)
    assert len(job["metadata"]) == 200
    assert len(job["intermediate"]["budget"]) == 200


# -- a store in another process ----------------------------------------------------------------------------------------


def test_a_pickled_memory_storage_arrives_empty(storage: MemoryStorage, search_id: str) -> None:
    storage.create_new_job(search_id)
    arrived = pickle.loads(pickle.dumps(storage))  # noqa: S301 - made in the line itself
    assert isinstance(arrived, MemoryStorage)
    assert arrived.load_all_search_ids() == []
    assert storage.load_all_job_ids(search_id) == ["0.0"]


# -- NullStorage -------------------------------------------------------------------------------------------------------


def test_a_null_storage_gives_ids_and_forgets_everything_else() -> None:
    storage = NullStorage()
    first, second = storage.create_new_search(), storage.create_new_search()
    assert first != second
    job_ids = [storage.create_new_job(search) for search in (first, first, second)]
    assert len(set(job_ids)) == 3
    for job_id in job_ids:
        storage.store_job_in(job_id, args=(1,), kwargs={})
        storage.store_job_out(job_id, 1.0)
        storage.store_job_metadata(job_id, "a", 1)
        storage.store_job_status(job_id, 2)
        storage.store_job_intermediate(job_id, 1, 1)
        storage.store_job(job_id, "mine", 1)
        assert storage.load_job(job_id) == BLANK
        assert storage.load_job_status(job_id) == 0
    assert storage.load_jobs(job_ids) == dict.fromkeys(job_ids, BLANK)
    assert storage.load_all_job_ids(first) == []
    assert storage.load_search(first) == {}
    assert storage.load_all_search_ids() == []
    assert storage.scan(first, 3) == ([], 3)
    assert storage.load_metadata_from_all_jobs(first, "a") == []
    assert storage.load_out_from_all_jobs(first) == []
    storage.store_search_value(first, "a", 1)
    with pytest.raises(KeyError, match="NullStorage"):
        storage.load_search_value(first, "a")


def test_ids_of_a_null_storage_never_collide() -> None:
    storage = NullStorage()
    search_id = storage.create_new_search()
    made = in_threads(*[lambda: [storage.create_new_job(search_id) for _ in range(100)]] * 8)
    assert len({job_id for job_ids in made for job_id in job_ids}) == 800


@pytest.mark.parametrize("method", METHODS)
def test_everything_works_with_a_null_storage(method: str) -> None:
    def run(job: RunningJob) -> float:
        job.record(1, 2)
        if job["x"] == 3:
            raise ValueError("poison")
        assert not job.stopped()
        return double(job)

    with make(method, run, num_workers=2, storage=NullStorage(), job_class=HPOJob, job_timeout=60) as evaluator:
        evaluator.submit(configurations(5))
        jobs = evaluator.gather("ALL")
        objectives = {job.args["x"]: job.stored_output for job in jobs}
        assert objectives == {0: 0.0, 1: 2.0, 2: 4.0, 3: "F_ValueError", 4: 8.0}
        assert evaluator.evaluate({"x": 9}).output == {"objective": 18.0}
        assert evaluator.gather_other_jobs_done() == []
        jobs[0].status = JobStatus.DONE
        assert evaluator.statistics().done == 5


# -- what an evaluator records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluator_records_its_jobs(method: str, storage: MemoryStorage) -> None:
    def run(job: RunningJob) -> Any:
        job.record(1, job["x"])
        if job["x"] == 2:
            raise ValueError("poison")
        return {"objective": job["x"], "metadata": {"epochs": 3}}

    with make(method, run, storage=storage, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(3))
        jobs = evaluator.gather("ALL")
    assert storage.load_all_job_ids(evaluator.search_id) == ids(jobs) == ["0.0", "0.1", "0.2"]
    loaded = storage.load_jobs(ids(jobs))
    assert [job["status"] for job in loaded.values()] == [2, 2, 2]
    assert [job["in"]["args"] for job in loaded.values()] == [({"x": 0},), ({"x": 1},), ({"x": 2},)]
    assert [job["out"] for job in loaded.values()] == [0.0, 1.0, "F_ValueError"]
    assert [job["intermediate"]["objective"] for job in loaded.values()] == [[0], [1], [2]]
    assert [job["metadata"].get("epochs") for job in loaded.values()] == [3, 3, None]
    for job in loaded.values():
        assert job["metadata"]["timestamp_submit"] <= job["metadata"]["timestamp_gather"]
    (record,) = storage.get(["0.2"])
    assert isinstance(record.error, JobError)
    assert record.error.type == "ValueError"


@pytest.mark.parametrize("method", METHODS)
def test_the_output_of_a_plain_job_is_stored_too(method: str, storage: MemoryStorage) -> None:
    with make(method, lambda job: {"any": [job["x"]]}, storage=storage) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        assert storage.load_out_from_all_jobs(evaluator.search_id) == [{"any": [0]}, {"any": [1]}]


def test_a_search_in_the_storage_can_be_named(storage: MemoryStorage) -> None:
    storage.create_new_search()
    search_id = storage.create_new_search()
    with make("thread", double, storage=storage, search_id=search_id) as evaluator:
        assert evaluator.search_id == search_id
        assert evaluator.storage is storage
        evaluator.submit(configurations(2))
        assert ids(evaluator.gather("ALL")) == ["1.0", "1.1"]


def test_a_search_that_does_not_exist_is_named(storage: MemoryStorage) -> None:
    with pytest.raises(KeyError, match="no search '7'"):
        make("thread", double, storage=storage, search_id="7")


def note(job: RunningJob) -> Any:
    """Note something beside the output, in each way there is."""
    job.storage.store_job_metadata(str(job.id), "stored", 7)
    job.storage.store_job(str(job.id), "metadata", {"both": "stored"})
    return {"objective": 1.0, "metadata": {"returned": 8, "both": "returned"}}


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver"))


@pytest.fixture(params=["memory", "shared", "sqlite", "redis"])
def any_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")  # it skips the test where there is none
        with RedisStorage(server.url, prefix=new_prefix()) as storage:
            yield storage
    elif request.param == "sqlite":
        with SqliteStorage(tmp_path / "jobs.db") as storage:
            yield storage
    else:
        with MemoryStorage() if request.param == "memory" else SharedMemoryStorage() as storage:
            yield storage


@pytest.mark.parametrize("method", ["serial", "thread", "process", "loky", "executor"])
def test_what_a_job_stores_is_in_its_record_and_what_it_returns_in_both(any_storage: Storage, method: str) -> None:
    kwargs: dict[str, Any] = {"executor": processes} if method == "executor" else {}
    if method == "loky":
        pytest.importorskip("loky", reason="the evaluator needs the extra 'loky'")
    with make(method, note, storage=any_storage, job_class=HPOJob, **kwargs) as evaluator:
        job = evaluator.evaluate({"x": 1})
        assert job.error is None
        assert any_storage.load_job(job.id)["metadata"].keys() >= {"stored", "returned", "timestamp_submit"}
        any_storage.store_job_metadata(job.id, "later", 9)
        any_storage.store_job_metadata(job.id, "both", "stored later")
        timestamps = {"timestamp_submit", "timestamp_gather"}
        assert {key: value for key, value in job.metadata.items() if key not in timestamps} == {
            "returned": 8,
            "both": "returned",
        }
    stored = any_storage.load_job(job.id)["metadata"]
    assert stored.keys() == timestamps | {"stored", "returned", "both", "later"}
    assert (stored["stored"], stored["returned"], stored["later"]) == (7, 8, 9)
    assert stored["both"] == "stored later", "the last word"


def test_what_a_job_stored_is_in_the_metadata_of_whoever_finds_it(any_storage: Storage) -> None:
    with make("thread", note, storage=any_storage) as evaluator:
        evaluator.submit(configurations(1))
        evaluator.gather("ALL")
    options: dict[str, Any] = {"storage": any_storage, "search_id": evaluator.search_id}
    with make("thread", note, **options) as other, make("thread", note, resume=True, **options) as resumed:
        (theirs,) = other.gather_other_jobs_done()
        resumed.submit(configurations(1))
        (restored,) = resumed.gather("ALL")
    assert restored.restored
    assert theirs.metadata == restored.metadata == any_storage.load_job(theirs.id)["metadata"]
    assert theirs.metadata["stored"] == 7


def test_what_is_stored_under_a_name_of_the_record_hides_nothing(storage: MemoryStorage, search_id: str) -> None:
    record = JobRecord(status=2, out=1.0, extra={"out": "hijacked", "status": 0, "metadata": None, "mine": 1})
    storage.insert(search_id, [record])
    assert storage.load_job(record.id) == {**BLANK, "status": 2, "out": 1.0, "mine": 1}


# -- jobs of others ----------------------------------------------------------------------------------------------------


class Heard(Callback):
    """Keeps what it was told of others."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.gathered: list[list[str]] = []

    def on_done_other(self, job: Job) -> None:
        self.done.append(job.id)

    def on_gather(self, local_jobs: list[Job], other_jobs: list[Job]) -> None:
        if other_jobs:
            self.gathered.append(ids(other_jobs))


def peers(storage: Storage, function: Any, **kwargs: Any) -> tuple[Any, Any]:
    first = make("thread", function, storage=storage, **kwargs)
    return first, make("serial", function, storage=storage, search_id=first.search_id, **kwargs)


@pytest.mark.parametrize(
    ("job_class", "results"),
    [
        (HPOJob, [0.0, False, "F_oom", (1.0, 2.0), {"objective": 1.0, "metadata": {"a": 1}}, ValueError("poison")]),
        (Job, [0.0, False, None, "text", {"any": [1]}, [], ValueError("poison")]),
    ],
)
def test_each_job_of_another_is_seen_once(job_class: type[Job], results: list[Any], storage: MemoryStorage) -> None:
    def run(job: RunningJob) -> Any:
        result = results[job["x"]]
        if isinstance(result, Exception):
            raise result
        return result

    heard = Heard()
    first, second = peers(storage, run, job_class=job_class)
    second.callbacks.append(heard)
    with first, second:
        first.submit(configurations(len(results)))
        mine = {job.id: job for job in first.gather("ALL")}
        theirs = second.gather_other_jobs_done()
        assert ids(theirs) == ids(mine.values())
        assert second.gather_other_jobs_done() == []
        assert first.gather_other_jobs_done() == []
        assert sorted(heard.done) == sorted(mine)
        assert heard.gathered == [ids(mine.values())]
        assert sorted(second.job_id_gathered) == sorted(mine)
        for job in theirs:
            own = mine[job.id]
            assert type(job) is job_class
            assert (job.args, job.status) == (own.args, JobStatus.DONE)
            assert job.stored_output == own.stored_output
            assert (job.error and job.error.reason) == (own.error and own.error.reason)
            assert job.failed == own.failed


def test_jobs_of_another_are_seen_while_it_works(storage: MemoryStorage) -> None:
    with Stage() as stage:
        first, second = peers(storage, stage.plain, num_workers=2)
        with first, second:
            first.submit(configurations(3))
            stage.started(0).wait()
            assert second.gather_other_jobs_done() == []
            stage.release(0, 2)
            assert ids(first.gather("BATCH", 2)) == ["0.0", "0.2"]
            assert ids(second.gather_other_jobs_done()) == ["0.0", "0.2"]
            stage.release(1)
            first.gather("ALL")
            assert ids(second.gather_other_jobs_done()) == ["0.1"]


@pytest.mark.parametrize("by_reference", [True, False])
def test_a_job_of_another_is_seen_once_though_its_record_changes_later(by_reference: bool) -> None:
    storage = MemoryStorage()
    storage.by_reference = by_reference
    first, second = peers(storage, double)
    with first, second:
        first.submit(configurations(2))
        until(lambda: first.statistics().done == 2)
        assert ids(second.gather_other_jobs_done()) == ["0.0", "0.1"]
        first.gather("ALL")  # it notes when it gathered
        storage.store_job_metadata("0.0", "note", "added later")
        assert second.gather_other_jobs_done() == []


def test_many_evaluators_see_all_the_others(storage: MemoryStorage) -> None:
    search_id = storage.create_new_search()
    kwargs: dict[str, Any] = {"num_workers": 2, "storage": storage, "search_id": search_id}
    evaluators = [make(method, double, **kwargs) for method in METHODS for _ in range(2)]

    def work(evaluator: Evaluator) -> list[str]:
        seen: list[str] = []
        for _ in range(20):
            evaluator.submit(configurations(2))
            evaluator.gather("BATCH", 1)
            seen += ids(evaluator.gather_other_jobs_done())
        evaluator.gather("ALL")
        return seen

    seen = in_threads(*[partial(work, evaluator) for evaluator in evaluators])
    everything = storage.load_all_job_ids(search_id)
    assert len(everything) == len(set(everything)) == 160
    for evaluator, seen_before in zip(evaluators, seen, strict=True):
        others = seen_before + ids(evaluator.gather_other_jobs_done())
        assert sorted(others) == sorted(set(everything) - {job.id for job in evaluator.jobs})
        evaluator.close()


def test_one_strange_job_of_another_does_not_hide_the_rest(storage: MemoryStorage) -> None:
    def run(job: RunningJob) -> Any:
        return {"no": "objective"} if job["x"] == 1 else float(job["x"])

    first = make("thread", run, storage=storage)
    second = make("thread", double, storage=storage, search_id=first.search_id, job_class=HPOJob)
    with first, second:
        first.submit(configurations(3))
        first.gather("ALL")
        theirs = second.gather_other_jobs_done()
        assert {job.id: job.stored_output for job in theirs} == {"0.0": 0.0, "0.1": "F_ValueError", "0.2": 2.0}


def test_jobs_that_were_recorded_by_hand_are_seen(storage: MemoryStorage) -> None:
    search_id = storage.create_new_search()
    job_id = storage.create_new_job(search_id)
    storage.store_job_in(job_id, args=({"x": 1},))
    storage.store_job_out(job_id, 0.0)
    with make("thread", double, storage=storage, search_id=search_id, job_class=HPOJob) as evaluator:
        assert evaluator.gather_other_jobs_done() == []
        storage.store_job_status(job_id, JobStatus.DONE.value)
        (job,) = evaluator.gather_other_jobs_done()
        assert (job.id, job.args, job.stored_output) == (job_id, {"x": 1}, 0.0)


def test_cancelled_jobs_of_another_are_seen(storage: MemoryStorage) -> None:
    with Stage() as stage:
        first, second = peers(storage, stage.polite, job_class=HPOJob)
        with first, second:
            first.submit(configurations(2))
            stage.started(0).wait()
            first.close()
            theirs = second.gather_other_jobs_done()
            assert ids(theirs) == ["0.0", "0.1"]
            assert {job.status for job in theirs} == {JobStatus.CANCELLED}
            assert {job.stored_output for job in theirs} == {"F_cancelled"}


async def test_jobs_of_another_are_seen_on_a_loop(storage: MemoryStorage) -> None:
    first, second = peers(storage, double)
    async with second:
        second.submit(configurations(2))
        assert outputs(await second.gather_async("ALL")) == [0.0, 2.0]
        assert outputs(await first.gather_other_jobs_done_async()) == [0.0, 2.0]
        assert await first.gather_other_jobs_done_async() == []


# -- what an evaluator stores in memory --------------------------------------------------------------------------------


def test_what_becomes_of_a_job_after_its_end_is_not_in_its_record(storage: MemoryStorage, search_id: str) -> None:
    with make("thread", double, storage=storage, search_id=search_id) as evaluator:
        evaluator.submit(configurations(1))
        (job,) = evaluator.gather("ALL")
        before = storage.load_job(job.id)
        job.output, job.args = None, {}
        assert storage.load_job(job.id) == before


def test_a_job_that_was_answered_and_not_run_has_ended(storage: MemoryStorage, search_id: str) -> None:
    with make("thread", double, storage=storage, search_id=search_id, reuse=True) as evaluator:
        for _ in range(2):
            evaluator.submit([{"x": 1}, {"x": 1}])
            evaluator.gather("ALL")
    assert [(record.status, record.out) for record in storage.scan(search_id)[0]] == [(2, 2)] * 4


def test_a_storage_that_is_derived_sees_every_insert_and_update() -> None:
    class Counting(MemoryStorage):
        inserted = updated = 0

        def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
            self.inserted += len(records)
            super().insert(search_id, records)

        def update(self, changes: Sequence[JobChange]) -> None:
            self.updated += len(changes)
            super().update(changes)

    storage = Counting()
    with make("thread", double, storage=storage) as evaluator:
        evaluator.submit(configurations(5))
        evaluator.gather("ALL")
    assert storage.inserted == 5
    assert storage.updated >= 5


def test_methods_that_were_put_in_their_places_see_every_insert_and_update(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counter[str]()
    storage = MemoryStorage()
    insert, update = storage.insert, storage.update

    def spy_on_insert(search_id: str, records: Sequence[JobRecord]) -> None:
        seen["insert"] += len(records)
        insert(search_id, records)

    def spy_on_update(changes: Sequence[JobChange]) -> None:
        seen["update"] += len(changes)
        update(changes)

    monkeypatch.setattr(storage, "insert", spy_on_insert)
    monkeypatch.setattr(storage, "update", spy_on_update)
    with make("thread", double, storage=storage) as evaluator:
        evaluator.submit(configurations(5))
        evaluator.gather("ALL")
    assert seen["insert"] == 5
    assert seen["update"] >= 5


def test_a_finalizer_may_use_the_storage_in_the_middle_of_a_call(storage: MemoryStorage, search_id: str) -> None:
    finalized = []

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            finalized.append(storage.create_new_job(search_id))

    thresholds = gc.get_threshold()
    gc.set_threshold(1)  # so that it comes wherever it can
    try:
        for _ in range(20):
            Garbage()
            new: list[dict[str, Any]] = [{} for _ in range(30)]
            job_ids = storage.insert_jobs(search_id, NewJobs([{}] * 30, new, "run", "me"))
            Garbage()
            storage.end_jobs(JobEnds(job_ids, [2] * 30, list(range(30)), [None] * 30, new, "me"))
            assert [record.out for record in storage.get(job_ids)] == list(range(30))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert len(finalized) == 40
    assert sorted(storage.load_all_job_ids(search_id)) == sorted({*storage.load_all_job_ids(search_id)})
    assert len(storage.load_all_job_ids(search_id)) == 20 * 30 + 40


def test_the_end_of_a_job_that_was_adopted_is_its_new_owners_to_store() -> None:
    storage, release = MemoryStorage(), threading.Event()

    def function(job: RunningJob) -> float:
        assert release.wait(30)
        return 1.0

    with make("thread", function, storage=storage) as evaluator:
        evaluator.submit(configurations(1))
        (job,) = evaluator.jobs
        until(lambda: storage.get([job.id])[0].status == JobStatus.RUNNING.value)
        (record,) = storage.get([job.id])
        assert storage.adopt({job.id: record.revision}, "another") == {job.id}
        release.set()
        evaluator.gather("ALL")
        (record,) = storage.get([job.id])
    assert (record.owner, record.status, record.out, record.attempts) == ("another", 0, None, 1)


def test_a_record_may_be_of_a_class_of_ones_own() -> None:
    class Mine(JobRecord, gc=False):
        more: int = 3

    storage = MemoryStorage()
    record = Mine()
    storage.insert(storage.new_search(), [record])
    storage.update([JobChange(record.id, status=2)])
    (copy_,) = storage.get([record.id])
    assert (type(copy_), copy_.status) == (Mine, 2)


def test_a_change_that_cannot_be_applied_hides_none_before_it(storage: MemoryStorage, search_id: str) -> None:
    records = [JobRecord(metadata={}) for _ in range(2)]
    storage.insert(search_id, records)
    first, second = (record.id for record in records)
    bad: Any = [1]
    with pytest.raises((TypeError, ValueError)):
        storage.update([JobChange(first, out=1), JobChange(second, metadata=bad)])
    assert [(record.id, record.revision) for record in storage.scan(search_id, 2)[0]] == [(first, 3)]
    storage.update([JobChange(second, out=2)])
    assert [(record.id, record.revision) for record in storage.scan(search_id, 2)[0]] == [(first, 3), (second, 4)]


def test_what_changed_is_told_in_order_however_long_the_log_was(storage: MemoryStorage, search_id: str) -> None:
    records = [JobRecord() for _ in range(40)]
    storage.insert(search_id, records)
    chance = random.Random(0)
    changed_at = {record.id: number for number, record in enumerate(records, 1)}
    seen = 0
    for revision in range(41, 5000):
        job_id = records[chance.randrange(40)].id
        storage.update([JobChange(job_id, out=revision)])
        changed_at[job_id] = revision
        if chance.random() < 0.02:
            since = chance.choice([seen, seen, 0, chance.randrange(revision)])
            found, seen = storage.scan(search_id, since)
            expected = sorted((at, job_id) for job_id, at in changed_at.items() if at > since)
            assert [(record.revision, record.id) for record in found] == expected
            assert seen == revision
