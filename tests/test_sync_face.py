"""The synchronous face: submit, gather, evaluate, close from plain code, from threads, and inside a running loop."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import gc
import importlib.util
import math
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import paraval
from paraval import (
    Evaluator,
    HPOJob,
    Job,
    JobError,
    JobStatus,
    MaximumJobsSpawnReached,
    ParavalError,
    RunningJob,
    SerialEvaluator,
    Statistics,
    ThreadPoolEvaluator,
)
from paraval.callback import Callback
from paraval.engine.running.batching import BatchSizer
from paraval.errors import EvaluatorClosedError, JobFailedError, JobsFailedError, UsageError
from paraval.storage import MemoryStorage, NullStorage
from support import (
    METHODS,
    CountingStorage,
    Latch,
    Stage,
    configurations,
    double,
    ids,
    in_threads,
    make,
    outputs,
    until,
)

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


async def async_double(job: RunningJob) -> float:
    return double(job)


# -- gather ------------------------------------------------------------------------------------------------------------


def test_gather_all(method: str) -> None:
    with make(method, double, num_workers=3) as evaluator:
        evaluator.submit(configurations(20))
        jobs = evaluator.gather("ALL")
        assert outputs(jobs) == [2.0 * x for x in range(20)]
        assert all(type(job) is Job and job.status is JobStatus.DONE and job.error is None for job in jobs)
        assert {job.id: job.args for job in jobs} == {f"0.{x}": {"x": x} for x in range(20)}
        assert evaluator.gather("ALL") == []


def test_a_flood_of_tiny_jobs_comes_back_whole(method: str) -> None:
    storage = CountingStorage()
    with make(method, double, num_workers=2, storage=storage) as evaluator:
        for _ in range(3):
            evaluator.submit(configurations(3000))
        jobs = evaluator.gather("ALL")
    assert sorted(job.output for job in jobs) == sorted([2.0 * x for x in range(3000)] * 3)
    assert len({job.id for job in jobs}) == 9000
    assert set(storage.terminal.values()) == {1}
    assert len(storage.terminal) == 9000


@pytest.mark.parametrize("kind", ["ALL", "BATCH"])
def test_nothing_in_flight_gives_nothing_at_once(method: str, kind: Any) -> None:
    with make(method, double) as evaluator:
        assert evaluator.gather(kind) == []
        assert evaluator.gather(kind, size=5) == []
        evaluator.submit([])
        assert evaluator.gather(kind) == []
        assert evaluator.jobs == []


def test_a_batch_waits_for_its_size_and_takes_all_that_is_done(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=5) as evaluator:
        evaluator.submit(configurations(5))
        stage.release(3)
        assert outputs(evaluator.gather("BATCH")) == [3]
        stage.release(0, 4)
        until(lambda: evaluator.statistics().done == 3)
        assert outputs(evaluator.gather("BATCH", 1)) == [0, 4]
        threading.Timer(0.01, stage.release, [1]).start()
        threading.Timer(0.02, stage.release, [2]).start()
        assert outputs(evaluator.gather("BATCH", size=2)) == [1, 2]


def test_jobs_come_in_the_order_they_ended(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=4) as evaluator:
        evaluator.submit(configurations(4))
        for done, x in enumerate((2, 0, 3, 1), 1):
            stage.release(x)
            until(lambda done=done: evaluator.statistics().done == done)  # type: ignore[misc] # the default binds it
        assert [job.output for job in evaluator.gather("ALL")] == [2, 0, 3, 1]


def test_a_batch_of_none_takes_what_is_there(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        assert evaluator.gather("BATCH", size=0) == []
        stage.release(0)
        until(lambda: evaluator.statistics().done == 1)
        assert outputs(evaluator.gather("BATCH", size=0)) == [0]


def test_more_than_is_in_flight_is_all_of_it_with_a_warning(method: str) -> None:
    with make(method, double, num_workers=2) as evaluator:
        evaluator.submit(configurations(3))
        with pytest.warns(UserWarning, match=r"BATCH.* 5\).* 3 in flight") as caught:
            jobs = evaluator.gather("BATCH", size=5)
        assert outputs(jobs) == [0.0, 2.0, 4.0]
        assert caught[0].filename == __file__
        evaluator.submit(configurations(2))
        assert len(evaluator.gather("BATCH", size=2)) == 2  # exactly as many: no warning


@pytest.mark.parametrize("kind", ["all", "batch", "", "ANY", 3, None])
def test_an_unknown_kind_of_gather_is_a_value_error(kind: Any) -> None:
    with make("thread", double) as evaluator:
        for jobs in (0, 1):
            evaluator.submit(configurations(jobs))
            with pytest.raises(ValueError, match=r"'ALL' or 'BATCH'") as caught:
                evaluator.gather(kind)
            assert isinstance(caught.value, ParavalError)
        assert len(evaluator.gather("ALL")) == 1


@pytest.mark.parametrize("size", [-1, 1.5, "2", None])
def test_a_bad_size_is_a_value_error(size: Any) -> None:
    with make("thread", double) as evaluator:
        evaluator.submit(configurations(1))
        with pytest.raises(ValueError, match="size") as caught:
            evaluator.gather("BATCH", size=size)
        assert isinstance(caught.value, ParavalError)
        assert len(evaluator.gather("ALL")) == 1


def test_work_begins_at_submit(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=2) as evaluator:
        evaluator.submit(configurations(3))
        stage.started(0).wait()
        stage.started(1).wait()
        assert not stage.started(2).is_open
        assert [job.status for job in evaluator.jobs] == [JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.READY]
        stage.release(0)
        stage.started(2).wait()


def test_jobs_start_in_the_order_of_submission(method: str) -> None:
    started = []

    def run(job: RunningJob) -> None:
        started.append(job["x"])

    with make(method, run) as evaluator:
        for first in range(0, 50, 10):
            evaluator.submit([{"x": x} for x in range(first, first + 10)])
        evaluator.gather("ALL")
    assert started == list(range(50))


def test_jobs_that_a_batch_gives_up_keep_their_place(method: str, stage: Stage) -> None:
    started = []
    inner: Any = stage.function(method)

    async def coroutine(job: RunningJob) -> None:
        started.append(job["x"])
        await inner(job)

    def plain(job: RunningJob) -> None:
        started.append(job["x"])
        inner(job)

    with make(method, coroutine if method == "serial" else plain, num_workers=1, batching=3) as evaluator:
        evaluator.submit(configurations(9))
        stage.started(0).wait()
        threading.Event().wait(0.05)  # the first batch is found to be slow, and gives up its other jobs
        stage.release_all()
        evaluator.gather("ALL")
    assert started == list(range(9))


def test_two_evaluators_run_at_the_same_time(method: str) -> None:
    with Stage() as left, Stage() as right:
        first = make(method, left.function(method))
        second = make(method, right.function(method))
        with first, second:
            first.submit(configurations(1))
            second.submit(configurations(1))
            left.started(0).wait()
            right.started(0).wait()
            right.release(0)
            assert outputs(second.gather("ALL")) == [0]
            left.release(0)
            assert outputs(first.gather("ALL")) == [0]


# -- what is submitted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"x": 1}, "x", b"x", 3, None])
def test_submit_takes_a_list_of_dicts(given: Any) -> None:
    with make("thread", double) as evaluator:
        with pytest.raises(TypeError, match=r"list of dicts") as caught:
            evaluator.submit(given)
        assert isinstance(caught.value, ParavalError)
        assert evaluator.num_jobs_submitted == 0


@pytest.mark.parametrize("given", [3, "x", None, [1], ({"x": 1},)])
def test_submit_names_the_item_that_is_no_dict(given: Any) -> None:
    with make("thread", double) as evaluator:
        with pytest.raises(TypeError, match=r"item 1.*dict") as caught:
            evaluator.submit([{"x": 1}, given])
        assert isinstance(caught.value, ParavalError)
        assert evaluator.gather("ALL") == []
        with pytest.raises(TypeError, match="dict"):
            evaluator.evaluate(given)


def test_submit_takes_any_iterable_of_mappings() -> None:
    from types import MappingProxyType

    with make("thread", double) as evaluator:
        evaluator.submit({"x": x} for x in range(2))  # type: ignore[arg-type] # the signature promises a sequence only
        evaluator.submit((MappingProxyType({"x": 2}),))
        assert outputs(evaluator.gather("ALL")) == [0.0, 2.0, 4.0]
        assert [type(job.args) for job in evaluator.jobs] == [dict] * 3


def test_the_caller_may_change_its_dicts_after_submit(method: str, stage: Stage) -> None:
    with make(method, stage.function(method)) as evaluator:
        configuration = {"x": 1}
        evaluator.submit([{"x": 0}, configuration])
        configuration["x"] = 7
        stage.release(0, 1)
        assert outputs(evaluator.gather("ALL")) == [0, 1]


def test_static_keyword_arguments_reach_the_run_function(method: str) -> None:
    def run(job: RunningJob, *, scale: int) -> int:
        return int(job["x"] * scale)

    with make(method, run, run_function_kwargs={"scale": 10}) as evaluator:
        evaluator.submit(configurations(3))
        assert outputs(evaluator.gather("ALL")) == [0, 10, 20]
        evaluator.run_function_kwargs["scale"] = 100
        assert evaluator.evaluate({"x": 1}).output == 100


def test_a_run_function_may_submit_more_jobs(method: str) -> None:
    def run(job: RunningJob) -> int:
        if job["x"] > 0:
            evaluator.submit([{"x": job["x"] - 1}])
        return int(job["x"])

    with make(method, run) as evaluator:
        evaluator.submit([{"x": 5}])
        gathered: list[Job] = []
        while len(gathered) < 6:
            gathered += evaluator.gather("BATCH")
        assert outputs(gathered) == [0, 1, 2, 3, 4, 5]


# -- run-functions of every kind ---------------------------------------------------------------------------------------


class AsyncCallable:
    async def __call__(self, job: RunningJob) -> float:
        return double(job)

    async def method(self, job: RunningJob) -> float:
        return double(job)


class PlainCallable:
    def __call__(self, job: RunningJob) -> float:
        return double(job)


async def scaled(job: RunningJob, scale: int) -> float:
    return float(job["x"] * scale)


@pytest.mark.parametrize(
    "function",
    [
        async_double,
        AsyncCallable(),
        AsyncCallable().method,
        partial(scaled, scale=2),
        partial(partial(scaled), scale=2),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_async_run_functions(method: str, function: Any) -> None:
    with Evaluator.create(function, method, {"num_workers": 2}) as evaluator:
        evaluator.submit(configurations(4))
        assert outputs(evaluator.gather("ALL")) == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    "function", [double, PlainCallable(), lambda job: job["x"] * 2.0, partial(double), math.sin, AsyncCallable]
)
def test_the_serial_evaluator_refuses_a_plain_function_and_names_the_thread_evaluator(function: Any) -> None:
    with pytest.raises(ValueError, match=r"ThreadPoolEvaluator") as caught:
        SerialEvaluator(function)
    assert isinstance(caught.value, ParavalError)


@pytest.mark.parametrize("function", [double, PlainCallable(), lambda job: job["x"] * 2.0, partial(double)])
def test_plain_run_functions_in_threads(function: Any) -> None:
    with ThreadPoolEvaluator(function, 2) as evaluator:
        evaluator.submit(configurations(4))
        assert outputs(evaluator.gather("ALL")) == [0.0, 2.0, 4.0, 6.0]


def test_serial_jobs_share_one_loop_and_thread_jobs_have_threads_of_their_own() -> None:
    async def where(job: RunningJob) -> tuple[int, int]:
        barrier.open()
        return threading.get_ident(), id(asyncio.get_running_loop())

    barrier = Latch()
    with Evaluator.create(where, "serial", {"num_workers": 4}) as evaluator:
        evaluator.submit(configurations(8))
        assert len({job.output for job in evaluator.gather("ALL")}) == 1

    async def meet(job: RunningJob) -> int:
        meeting.wait(20)  # a blocking call: it would be a deadlock on one loop
        return id(asyncio.get_running_loop())

    meeting = threading.Barrier(3)
    with Evaluator.create(meet, "thread", {"num_workers": 3}) as evaluator:
        evaluator.submit(configurations(3))
        assert len({job.output for job in evaluator.gather("ALL")}) == 3


def test_async_jobs_of_one_thread_share_its_loop() -> None:
    async def where(job: RunningJob) -> int:
        await asyncio.sleep(0)
        return id(asyncio.get_running_loop())

    with Evaluator.create(where, "thread", {"batching": False}) as evaluator:
        evaluator.submit(configurations(5))
        assert len({job.output for job in evaluator.gather("ALL")}) == 1


# -- where and from where ----------------------------------------------------------------------------------------------


def loop_factories() -> list[Any]:
    factories: list[Any] = [pytest.param(asyncio.new_event_loop, id="asyncio")]
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factories.append(pytest.param(uvloop.new_event_loop, id="uvloop"))
    return factories


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("factory", loop_factories())
def test_it_works_inside_a_running_loop(method: str, factory: Any, debug: bool) -> None:
    async def main() -> None:
        with make(method, double, num_workers=2) as evaluator:
            evaluator.submit(configurations(5))
            assert len(evaluator.gather("BATCH", 2)) >= 2
            evaluator.gather("ALL")
            assert evaluator.evaluate({"x": 4}).output == 8.0
            assert evaluator.close() == []
            evaluator.submit(configurations(2))
            assert outputs(evaluator.gather("ALL")) == [0.0, 2.0]

    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(main())


@pytest.mark.skipif(importlib.util.find_spec("trio") is None, reason="trio is not installed (extra 'trio')")
def test_it_works_inside_trio(method: str) -> None:
    import trio

    async def main() -> None:
        with make(method, double, num_workers=2) as evaluator:
            evaluator.submit(configurations(3))
            assert outputs(evaluator.gather("ALL")) == [0.0, 2.0, 4.0]
            assert evaluator.evaluate({"x": 4}).output == 8.0

    trio.run(main)


def test_a_job_in_a_running_loop_does_not_need_that_loop(method: str, stage: Stage) -> None:
    """The caller's loop is blocked by a gather, and the jobs go on all the same."""

    async def main() -> None:
        with make(method, stage.function(method), num_workers=2) as evaluator:
            evaluator.submit(configurations(2))
            threading.Timer(0.01, stage.release_all).start()
            assert outputs(evaluator.gather("ALL")) == [0, 1]

    asyncio.run(main())


def test_many_threads_share_one_evaluator(method: str) -> None:
    storage = CountingStorage()
    evaluator = make(method, double, num_workers=2, storage=storage)

    def work() -> list[Job]:
        jobs = []
        for number in range(30):
            evaluator.submit(configurations(3))
            if number % 3 == 0:
                jobs += evaluator.gather("BATCH")
            elif number % 3 == 1:
                jobs.append(evaluator.evaluate({"x": number}))
            evaluator.statistics()
        return jobs

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        gathered = [job for jobs in in_threads(*[work] * 6) for job in jobs] + evaluator.gather("ALL")
    finally:
        sys.setswitchinterval(interval)
    total = 6 * (30 * 3 + 10)
    assert len(gathered) == len({job.id for job in gathered}) == total
    assert all(job.output == job.args["x"] * 2 for job in gathered)
    assert set(storage.terminal) == {job.id for job in gathered}
    assert set(storage.terminal.values()) == {1}
    assert evaluator.num_jobs_submitted == total
    assert evaluator.num_jobs_gathered == total
    assert len(evaluator.jobs) == 6 * 30 * 3
    assert evaluator.statistics().done == total
    assert evaluator.close() == []


def test_each_of_two_gathering_threads_gets_a_batch(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        batches: list[list[Any]] = []
        threads = [
            threading.Thread(target=lambda: batches.append(outputs(evaluator.gather("BATCH", 1)))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        stage.release(0)
        until(lambda: batches)
        threads[0].join(0.02)
        threads[1].join(0.02)
        assert batches == [[0]]  # the other goes on waiting: a job is in flight
        stage.release(1)
        for thread in threads:
            thread.join()
        assert batches == [[0], [1]]


def test_gathering_threads_end_when_nothing_is_left_for_them(method: str, stage: Stage) -> None:
    with make(method, stage.function(method)) as evaluator:
        evaluator.submit(configurations(1))
        threading.Timer(0.02, stage.release_all).start()
        batches = in_threads(*[lambda: evaluator.gather("BATCH", 1)] * 2, lambda: evaluator.gather("ALL"))
        assert sorted(map(len, batches)) == [0, 0, 1]


# -- evaluate ----------------------------------------------------------------------------------------------------------


def test_evaluate_is_private(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=2, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(1))
        stage.release(7)
        job = evaluator.evaluate({"x": 7})
        assert (type(job), job.status, job.args, job.output) == (HPOJob, JobStatus.DONE, {"x": 7}, {"objective": 7.0})
        assert job not in evaluator.jobs
        assert evaluator.gather("BATCH", size=0) == []
        stage.release(0)
        assert ids(evaluator.gather("ALL")) == ["0.0"]
        assert evaluator.storage.load_job(job.id)["out"] == 7.0
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered == 2


def test_an_evaluated_job_that_fails_is_data(method: str) -> None:
    def run(job: RunningJob) -> None:
        raise ValueError("poison")

    with make(method, run) as evaluator:
        job = evaluator.evaluate({})
        assert job.error is not None
        assert (job.error.type, job.error.message) == ("ValueError", "poison")


def test_close_ends_an_evaluate_of_another_thread(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method))
    job, returned = in_threads(
        lambda: evaluator.evaluate({"x": 0}),
        lambda: (stage.started(0).wait(), evaluator.close())[1],  # type: ignore[func-returns-value] # it only waits
    )
    assert isinstance(job, Job)
    assert job.status is JobStatus.CANCELLED
    assert returned == []  # it belongs to who evaluates it


# -- close and reuse ---------------------------------------------------------------------------------------------------


def test_close_returns_the_jobs_it_cancelled(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method), num_workers=2, job_class=HPOJob)
    evaluator.submit(configurations(4))
    stage.started(0).wait()
    stage.started(1).wait()
    stage.release(0)
    until(lambda: evaluator.statistics().done == 1)
    stage.started(2).wait()
    cancelled = evaluator.close()
    assert ids(cancelled) == ["0.1", "0.2", "0.3"]
    for job in cancelled:
        assert isinstance(job, HPOJob)
        assert job.status is JobStatus.CANCELLED
        assert job.objective == "F_cancelled"
        assert job.error is not None
        assert job.error.kind == "cancelled"
        assert evaluator.storage.load_job(job.id)["status"] == JobStatus.CANCELLED.value
        assert evaluator.storage.load_job(job.id)["out"] == "F_cancelled"
    assert not stage.started(3).is_open
    assert ids(evaluator.gather("ALL")) == ["0.0"]
    assert evaluator.gather("ALL") == []
    assert evaluator.num_jobs_gathered == evaluator.num_jobs_submitted == 4
    assert sorted(evaluator.job_id_gathered) == ["0.0", "0.1", "0.2", "0.3"]
    assert [job.timing.started is None for job in sorted(cancelled, key=lambda job: job.id)] == [False, False, True]


def test_close_is_idempotent_and_the_evaluator_can_be_used_again(method: str) -> None:
    evaluator = make(method, double, num_workers=2)
    assert evaluator.close() == []
    for _ in range(3):
        evaluator.submit(configurations(2))
        assert outputs(evaluator.gather("ALL")) == [0.0, 2.0]
        assert evaluator.close() == []
        assert evaluator.close() == []
    assert [job.id for job in evaluator.jobs] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert evaluator.statistics().done == 6


def test_results_that_were_not_gathered_survive_close(method: str) -> None:
    evaluator = make(method, double, num_workers=2)
    evaluator.submit(configurations(3))
    until(lambda: evaluator.statistics().done == 3)
    assert evaluator.close() == []
    evaluator.submit([{"x": 9}])
    assert outputs(evaluator.gather("ALL")) == [0.0, 2.0, 4.0, 18.0]
    evaluator.close()
    assert evaluator.num_jobs_gathered == 4


def test_with_closes(method: str, stage: Stage) -> None:
    with make(method, stage.function(method)) as evaluator:
        evaluator.submit(configurations(1))
        stage.started(0).wait()
    assert evaluator.jobs[0].status is JobStatus.CANCELLED


def test_with_lets_exceptions_through(method: str, stage: Stage) -> None:
    with pytest.raises(LookupError, match="mine"), make(method, stage.function(method)) as evaluator:
        evaluator.submit(configurations(1))
        raise LookupError("mine")
    assert evaluator.jobs[0].status is JobStatus.CANCELLED


def test_close_ends_a_gather_of_another_thread(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method))
    evaluator.submit(configurations(2))
    gathered, cancelled = in_threads(
        lambda: evaluator.gather("ALL"),
        lambda: (stage.started(0).wait(), evaluator.close())[1],  # type: ignore[func-returns-value] # it only waits
    )
    assert ids(gathered + cancelled) == ["0.0", "0.1"]
    assert gathered == []


def test_close_from_many_threads(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method))
    evaluator.submit(configurations(3))
    returned = in_threads(*[evaluator.close] * 4)
    assert ids(job for jobs in returned for job in jobs) == ["0.0", "0.1", "0.2"]
    assert evaluator.statistics().cancelled == 3


def test_submit_and_close_from_many_threads_lose_nothing(method: str) -> None:
    storage = CountingStorage()
    evaluator = make(method, double, num_workers=2, storage=storage)
    refused = []

    def submit() -> list[Job]:
        for number in range(40):
            try:
                evaluator.submit([{"x": number}])
            except paraval.EvaluatorClosedError:
                refused.append(number)
        return []

    def close() -> list[Job]:
        return [job for _ in range(15) for job in evaluator.close()]

    def gather() -> list[Job]:
        return [job for _ in range(20) for job in evaluator.gather("BATCH", size=0)]

    taken = [job for jobs in in_threads(submit, submit, submit, close, gather) for job in jobs]
    taken += evaluator.gather("ALL") + evaluator.close() + evaluator.gather("ALL")
    assert len(taken) == len({job.id for job in taken}) == 120 - len(refused)
    assert {job.id for job in taken} == {job.id for job in evaluator.jobs}
    assert set(storage.terminal.values()) == {1}
    assert set(storage.terminal) == {job.id for job in taken}
    statistics = evaluator.statistics()
    assert statistics.submitted == statistics.done + statistics.cancelled == len(taken)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_maximum_of_jobs(method: str) -> None:
    with make(method, double) as evaluator:
        evaluator.set_maximum_num_jobs_submitted(3)
        evaluator.submit(configurations(2))
        with pytest.raises(MaximumJobsSpawnReached, match="3") as caught:
            evaluator.submit(configurations(2))
        assert isinstance(caught.value, ParavalError)
        assert isinstance(caught.value, RuntimeError)
        assert evaluator.num_jobs_submitted == 3
        with pytest.raises(MaximumJobsSpawnReached):
            evaluator.submit(configurations(1))
        with pytest.raises(MaximumJobsSpawnReached):
            evaluator.evaluate({"x": 1})
        assert outputs(evaluator.gather("ALL")) == [0.0, 0.0, 2.0]
        evaluator.set_maximum_num_jobs_submitted(1)
        assert (evaluator.num_jobs_submitted, evaluator.num_jobs_gathered) == (0, 0)
        evaluator.submit(configurations(1))
        with pytest.raises(MaximumJobsSpawnReached):
            evaluator.submit(configurations(1))
        evaluator.gather("ALL")
        for limit in (None, 0, -1):
            evaluator.set_maximum_num_jobs_submitted(limit)
            evaluator.submit(configurations(10))
            evaluator.gather("ALL")


def test_the_maximum_counts_jobs_in_flight(method: str, stage: Stage) -> None:
    with make(method, stage.function(method)) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.set_maximum_num_jobs_submitted(3)
        assert (evaluator.num_jobs_submitted, evaluator.num_jobs_gathered) == (2, 0)
        evaluator.submit([{"x": 2}])
        with pytest.raises(MaximumJobsSpawnReached):
            evaluator.submit([{"x": 3}])
        stage.release_all()
        assert outputs(evaluator.gather("ALL")) == [0, 1, 2]
        assert (evaluator.num_jobs_submitted, evaluator.num_jobs_gathered) == (3, 3)


def test_the_maximum_holds_for_many_threads(method: str) -> None:
    with make(method, double, num_workers=2) as evaluator:
        evaluator.set_maximum_num_jobs_submitted(50)

        def submit() -> int:
            submitted = 0
            try:
                for _ in range(20):
                    evaluator.submit([{"x": 1}])
                    submitted += 1
            except MaximumJobsSpawnReached:
                pass
            return submitted

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            assert sum(in_threads(*[submit] * 6)) == 50
        finally:
            sys.setswitchinterval(interval)
        assert len(evaluator.gather("ALL")) == 50


def test_submit_waits_while_too_many_jobs_are_pending(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=1, max_pending=2) as evaluator:
        submitted = Latch()

        def submit() -> None:
            evaluator.submit(configurations(5))
            submitted.open()

        thread = threading.Thread(target=submit)
        thread.start()
        stage.started(0).wait()
        until(lambda: len(evaluator.jobs) == 3)  # one runs, two wait
        assert not submitted.peek(0.05)
        assert len(evaluator.jobs) == 3
        stage.release(0)
        stage.started(1).wait()
        until(lambda: len(evaluator.jobs) >= 4)  # it may be in a batch with the next
        assert not submitted.peek(0.02)
        stage.release(1)
        submitted.wait()
        thread.join()
        stage.release_all()
        jobs = evaluator.gather("ALL")
        assert [job.args["x"] for job in sorted(jobs, key=lambda job: job.id)] == [0, 1, 2, 3, 4]


def test_closing_ends_a_waiting_submit(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=1, max_pending=2) as evaluator:

        def submit() -> None:
            with pytest.raises(EvaluatorClosedError, match=r"closed while submit\(\) waited .* 3 of 5 jobs were"):
                evaluator.submit(configurations(5))

        thread = threading.Thread(target=submit)
        thread.start()
        stage.started(0).wait()
        until(lambda: len(evaluator.jobs) == 3)  # one runs, two wait
        stage.release_all()
        evaluator.close()
        thread.join()
        assert len(evaluator.jobs) == 3
        assert evaluator.statistics().pending == 0


class Interrupted:
    """Raises KeyboardInterrupt, as Ctrl-C does, before or after a call of what it stands for."""

    def __init__(self, function: Any, *, before: bool) -> None:
        self._function = function
        self._before = before

    def __call__(self, *args: Any) -> None:
        if not self._before:
            self._function(*args)
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["_submit_unless_closing", "submit"])
def test_a_submit_that_is_interrupted_is_done_or_undone(
    method: str, name: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(method, double, num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        life = evaluator._intake._life
        with monkeypatch.context() as patched:
            patched.setattr(life, name, Interrupted(getattr(life, name), before=before))
            with pytest.raises(KeyboardInterrupt):
                evaluator.submit(configurations(3))
        # Whether the engine has seen them is a race, but the two sides agree about it.
        jobs = evaluator.gather("ALL")
        assert len(jobs) in ({2} if before else {2, 5})
        statistics = evaluator.statistics()
        assert (statistics.submitted, statistics.pending, statistics.done) == (len(jobs), 0, len(jobs))
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered == len(jobs) == len(evaluator.jobs)
        evaluator.submit(configurations(4))
        assert len(evaluator.gather("ALL")) == 4


def test_max_pending_lets_every_job_through(method: str) -> None:
    with make(method, double, num_workers=2, max_pending=3) as evaluator:
        evaluator.submit(configurations(200))
        assert len(evaluator.gather("ALL")) == 200


# -- counts and times --------------------------------------------------------------------------------------------------


def test_statistics_are_a_frozen_record_that_adds_up(method: str, stage: Stage) -> None:
    def run(job: RunningJob) -> Any:
        if job["x"] == 1:
            raise ValueError("poison")
        return "F_mine" if job["x"] == 2 else 1.0

    with make(method, run, job_class=HPOJob, num_workers=2) as evaluator:
        assert evaluator.statistics() == Statistics(0, 0, 0, 0, 0, 0, 0.0, 0)
        evaluator.submit(configurations(4))
        evaluator.gather("ALL")
        statistics = evaluator.statistics()
        assert (statistics.submitted, statistics.done, statistics.failed) == (4, 2, 2)
        assert (statistics.pending, statistics.running, statistics.cancelled) == (0, 0, 0)
        assert 0.0 < statistics.utilisation <= 1.0
        with pytest.raises(dataclasses.FrozenInstanceError):
            statistics.done = 7  # type: ignore[misc] # it is the error that is tested

    with make(method, stage.function(method), num_workers=2) as evaluator:
        evaluator.submit(configurations(5))
        stage.started(0).wait()
        stage.started(1).wait()
        statistics = evaluator.statistics()
        assert (statistics.submitted, statistics.running, statistics.pending) == (5, 2, 3)
        evaluator.close()
        statistics = evaluator.statistics()
        assert (statistics.submitted, statistics.cancelled, statistics.running, statistics.pending) == (5, 5, 0, 0)


def test_a_worker_that_always_works_is_fully_used(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=1) as evaluator:
        evaluator.submit(configurations(1))
        stage.started(0).wait()
        threading.Event().wait(0.2)
        assert evaluator.statistics().utilisation > 0.5
    with make(method, stage.function(method), num_workers=4) as evaluator:
        evaluator.submit([{"x": "alone"}])
        stage.started("alone").wait()
        threading.Event().wait(0.1)
        assert evaluator.statistics().utilisation <= 0.25


def test_times_are_in_order(method: str) -> None:
    with make(method, double, num_workers=2) as evaluator:
        evaluator.submit(configurations(10))
        first = evaluator.gather("BATCH", 3)
        jobs = first + evaluator.gather("ALL") + [evaluator.evaluate({"x": 1})]
        for job in jobs:
            submitted, started, finished, gathered = job.timing
            assert submitted is not None
            assert started is not None
            assert finished is not None
            assert gathered is not None
            assert 0 <= submitted <= started <= finished <= gathered
            assert job.timing.queued == started - submitted
            assert job.timing.ran == finished - started
            assert job.metadata["timestamp_submit"] == submitted
            assert job.metadata["timestamp_gather"] == gathered


def test_the_clock_of_each_evaluator_begins_when_it_is_made(method: str) -> None:
    for _ in range(2):
        with make(method, double) as evaluator:
            job = evaluator.evaluate({"x": 1})
            assert job.timing.submitted is not None
            assert job.timing.submitted < 20.0


# -- on_error="raise" --------------------------------------------------------------------------------------------------


def fail_when_odd(job: RunningJob) -> float:
    if job["x"] == 1:
        raise ValueError("one")
    if job["x"] == 3:
        raise KeyError("three")
    return float(job["x"])


def test_failures_can_be_raised(method: str) -> None:
    with make(method, fail_when_odd, num_workers=2, on_error="raise") as evaluator:
        evaluator.submit(configurations(5))
        with pytest.raises(ExceptionGroup, match="2 of 5 jobs failed") as caught:
            evaluator.gather("ALL")
        group = caught.value
        assert isinstance(group, JobsFailedError)
        assert isinstance(group, ParavalError)
        assert ids(group.jobs) == ids(evaluator.jobs)
        failures = {}
        for failure in group.exceptions:
            assert isinstance(failure, JobFailedError)
            assert isinstance(failure, RuntimeError)
            failures[failure.job.args["x"]] = failure
        assert set(failures) == {1, 3}
        assert str(failures[1]) == f"job {failures[1].job.id}: ValueError: one"
        assert any("ValueError: one" in note for note in failures[1].__notes__)
        assert all(evaluator.storage.load_job(job.id)["status"] == 2 for job in group.jobs)
        assert evaluator.gather("ALL") == []
        assert evaluator.num_jobs_gathered == 5


def test_raised_failures_can_be_split(method: str) -> None:
    with make(method, fail_when_odd, num_workers=2, on_error="raise") as evaluator:
        evaluator.submit(configurations(5))
        seen: list[Job] = []
        try:
            evaluator.gather("ALL")
        except* JobFailedError as group:
            seen = getattr(group, "jobs", [])
        assert len(seen) == 5
        evaluator.submit(configurations(4))
        with pytest.raises(JobsFailedError) as caught:
            evaluator.gather("ALL")
        matched, rest = caught.value.split(lambda exc: isinstance(exc, JobFailedError) and exc.job.args["x"] == 1)
        for part in (matched, rest):
            assert isinstance(part, JobsFailedError)
            assert len(part.exceptions) == 1
            assert len(part.jobs) == 4


def test_nothing_is_raised_when_nothing_failed(method: str) -> None:
    with make(method, double, on_error="raise") as evaluator:
        evaluator.submit(configurations(3))
        assert len(evaluator.gather("ALL")) == 3
        assert evaluator.evaluate({"x": 1}).output == 2.0


def test_evaluate_raises_too(method: str) -> None:
    with make(method, fail_when_odd, on_error="raise") as evaluator:
        with pytest.raises(JobsFailedError) as caught:
            evaluator.evaluate({"x": 1})
        (job,) = caught.value.jobs
        assert job.args == {"x": 1}


def test_a_failure_that_the_run_function_returned_is_a_result(method: str) -> None:
    with make(method, lambda job: "F_mine", on_error="raise", job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(1))
        assert [job[1] for job in evaluator.gather("ALL")] == ["F_mine"]  # type: ignore[index] # it is an HPOJob


# -- job_class ---------------------------------------------------------------------------------------------------------


def test_the_job_class_may_be_set_until_the_first_submit(method: str) -> None:
    class Mine(HPOJob):
        pass

    with make(method, double) as evaluator:
        assert evaluator.job_class is Job
        evaluator.job_class = Mine
        evaluator.submit(configurations(1))
        with pytest.raises(RuntimeError, match="first submit") as caught:
            evaluator.job_class = Job
        assert isinstance(caught.value, UsageError)
        (job,) = evaluator.gather("ALL")
        assert type(job) is Mine
        assert job.objective == 0.0
        evaluator.close()
        with pytest.raises(UsageError):
            evaluator.job_class = Job


@pytest.mark.parametrize("bad", [int, "Job", None, Job("0.0", {})])
def test_the_job_class_must_be_one(bad: Any) -> None:
    with pytest.raises(TypeError, match="job_class") as caught:
        make("thread", double, job_class=bad)
    assert isinstance(caught.value, ParavalError)
    evaluator = make("thread", double)
    with pytest.raises(TypeError, match="job_class"):
        evaluator.job_class = bad


def test_jobs_know_their_search(method: str) -> None:
    with make(method, double) as evaluator:
        evaluator.search = search = object()
        evaluator.submit(configurations(1))
        (job,) = evaluator.gather("ALL")
        assert job.context.search is search


# -- as the reference system's searches use it -------------------------------------------------------------------------


class StopAfter(Callback):
    """Asks the search to stop after so many jobs."""

    def __init__(self, jobs: int) -> None:
        self._left = jobs
        self.search_stopped = False

    def on_done(self, job: Job) -> None:
        self._left -= 1
        self.search_stopped = self._left <= 0


def search(evaluator: Any, max_evals: int, timeout: float | None) -> list[tuple[dict[str, Any], Any]]:
    """Search as the reference system does: ask, submit, gather, tell; then gather the rest and close."""
    evaluator._job_class = type("HPOJob", (), {})  # its own, which is none of ours
    evaluator.search = search
    evaluator._stopper = None
    evaluator.set_maximum_num_jobs_submitted(max_evals)
    if timeout is not None:
        evaluator.timeout = timeout
    told: list[tuple[dict[str, Any], Any]] = []
    asked = [{"x": x} for x in range(evaluator.num_workers)]
    try:
        while True:
            evaluator.submit(asked)
            jobs = evaluator.gather("BATCH", 1)
            told += [(config, objective) for config, objective in jobs]
            if evaluator.time_left is not None and evaluator.time_left <= 0:
                break
            if any(getattr(callback, "search_stopped", False) for callback in evaluator._callbacks):
                break
            asked = [{"x": len(told) + offset} for offset in range(len(jobs))]
    except MaximumJobsSpawnReached:
        pass
    while evaluator.num_jobs_submitted > evaluator.num_jobs_gathered:
        told += [(config, objective) for config, objective in evaluator.gather("ALL")]
    evaluator.close()
    return told


def test_a_search_of_the_reference_system(method: str) -> None:
    evaluator: Any = make(method, double, num_workers=3)
    for number in range(1, 4):  # an evaluator is used for several searches
        told = search(evaluator, 25, None)
        assert len(told) == 25
        assert all(objective == config["x"] * 2 for config, objective in told)
        assert len(evaluator.job_id_gathered) == 25 * number
    assert evaluator._search_id == "0"
    assert evaluator._storage.load_out_from_all_jobs("0") != []
    evaluator.job_id_gathered.append("7.7")


def test_a_search_of_the_reference_system_that_runs_out_of_time(method: str, stage: Stage) -> None:
    stage.release(0, 1, 2)
    evaluator: Any = make(method, stage.function(method), num_workers=3)
    told = search(evaluator, -1, 0.2)
    assert told[-1][1] == "F_timeout"
    assert [objective for _, objective in told if objective != "F_timeout"] == [0.0, 1.0, 2.0] or len(told) >= 6
    assert evaluator.timeout is None
    assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered


def test_a_search_of_the_reference_system_that_a_callback_stops(method: str) -> None:
    evaluator: Any = make(method, double, num_workers=2, callbacks=[StopAfter(10)])
    told = search(evaluator, -1, None)
    assert 10 <= len(told) <= 20
    assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered


# -- execute -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SerialEvaluator, ThreadPoolEvaluator])
def test_execute_can_be_extended(base: type[Evaluator]) -> None:
    class Noting(base):  # type: ignore[valid-type,misc] # each of the two in turn
        async def execute(self, job: Job) -> Job:
            job.metadata["before"] = job.status.name
            done: Job = await super().execute(job)
            done.metadata["after"] = done.output
            return done

    async def run(job: RunningJob) -> float:
        if job["x"] == 2:
            raise ValueError("poison")
        return double(job)

    with Noting(run, num_workers=2) as evaluator:
        evaluator.submit(configurations(4))
        jobs = {job.args["x"]: job for job in evaluator.gather("ALL")}
        assert [jobs[x].output for x in range(4)] == [0.0, 2.0, None, 6.0]
        assert {job.metadata["before"] for job in jobs.values()} == {"RUNNING"}
        assert [jobs[x].metadata["after"] for x in range(4)] == [0.0, 2.0, None, 6.0]
        assert jobs[2].error is not None
        assert jobs[2].error.type == "ValueError"
        assert {job.status for job in jobs.values()} == {JobStatus.DONE}
        assert evaluator.evaluate({"x": 5}).output == 10.0
        assert evaluator.statistics().failed == 1
        for job in jobs.values():
            assert job.timing.ran is not None


def test_execute_is_for_a_job_that_a_worker_has(method: str) -> None:
    async def execute() -> None:
        await evaluator.execute(job)

    with make(method, double) as evaluator:
        job = evaluator.evaluate({"x": 1})
        with pytest.raises(UsageError, match=f"no worker has job {job.id}"):
            asyncio.run(execute())
    with pytest.raises(UsageError, match="called by the evaluator"):
        asyncio.run(execute())


@pytest.mark.parametrize("base", [SerialEvaluator, ThreadPoolEvaluator])
def test_execute_can_be_replaced(base: type[Evaluator]) -> None:
    class Own(base):  # type: ignore[valid-type,misc] # each of the two in turn
        async def execute(self, job: Job) -> Job:
            if job.args["x"] == 2:
                raise LookupError("mine")
            await asyncio.sleep(0)
            job.set_output(job.args["x"] + 100)
            return job

    with Own(async_double, num_workers=2, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(4))
        objectives = {job.args["x"]: job.stored_output for job in evaluator.gather("ALL")}
        assert objectives == {0: 100.0, 1: 101.0, 2: "F_LookupError", 3: 103.0}
        assert evaluator.storage.load_out_from_all_jobs("0") == [100.0, 101.0, "F_LookupError", 103.0]


def test_an_extended_execute_can_be_closed(method: str, stage: Stage) -> None:
    base: Any = SerialEvaluator if method == "serial" else ThreadPoolEvaluator

    class Noting(base):  # type: ignore[misc] # each of the two in turn
        async def execute(self, job: Job) -> Job:
            done: Job = await super().execute(job)
            return done

    with Noting(stage.function(method), num_workers=2) as evaluator:
        evaluator.submit(configurations(3))
        stage.started(1).wait()
        assert ids(evaluator.close()) == ["0.0", "0.1", "0.2"]


# -- names of the reference system -------------------------------------------------------------------------------------


def test_what_it_says_of_itself(method: str) -> None:
    evaluator = make(method, double, num_workers=3)
    name = {"serial": "SerialEvaluator", "thread": "ThreadPoolEvaluator"}[method]
    assert evaluator.to_json() == {"type": name, "num_workers": 3}
    assert evaluator.cancellation == {"serial": "cancel", "thread": "cooperative"}[method]
    assert evaluator.is_master is True
    assert evaluator.NEST_ASYNCIO_PATCHED is False
    assert ("F", sys.executable) == (evaluator.FAIL_RETURN_VALUE, evaluator.PYTHON_EXE)
    assert repr(evaluator).startswith(f"{name}(")
    assert "num_workers=3" in repr(evaluator)
    assert evaluator.callbacks == []


def test_decode() -> None:
    evaluator = make("thread", double)
    assert evaluator.decode('{"x": [1, null]}') == {"x": [1, None]}
    for bad in ("[1]", "3", '"x"', "null", "{not json"):
        with pytest.raises(ValueError):  # noqa: PT011 - the last comes from the json module
            evaluator.decode(bad)


def test_convert_for_csv() -> None:
    evaluator = make("thread", double)
    assert evaluator.convert_for_csv([1, "a"]) == "[1, 'a']"
    for value in ("x", 1, 1.5, None, (1, 2)):
        assert evaluator.convert_for_csv(value) is value


# -- dump_evals --------------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_dump_evals_writes_what_was_gathered_since(method: str, tmp_path: Path) -> None:
    with make(method, double, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        evaluator.dump_evals(log_dir=str(tmp_path))
        assert [(row["p:x"], row["objective"], row["job_id"]) for row in rows(tmp_path / "results.csv")] == [
            ("0", "0.0", "0"),
            ("1", "2.0", "1"),
        ]
        evaluator.dump_evals(log_dir=str(tmp_path))
        evaluator.submit([{"x": 5}])
        evaluator.gather("ALL")
        evaluator.dump_evals(log_dir=str(tmp_path))
        assert [row["p:x"] for row in rows(tmp_path / "results.csv")] == ["0", "1", "5"]


@pytest.mark.parametrize(
    ("saved_keys", "expected"),
    [
        (None, {"p:x": "1", "p:units": "[8, 4]"}),
        (["units"], {"p:units": "[8, 4]"}),
        (lambda job: {"name": f"job {job.args['x']}"}, {"p:name": "job 1"}),
    ],
)
def test_dump_evals_chooses_keys(saved_keys: Any, expected: dict[str, str], tmp_path: Path) -> None:
    with make("thread", double, job_class=HPOJob) as evaluator:
        evaluator.submit([{"x": 1, "units": [8, 4]}])
        evaluator.gather("ALL")
        evaluator.dump_evals(saved_keys, str(tmp_path), "evals.csv")
        (row,) = rows(tmp_path / "evals.csv")
        assert {key: value for key, value in row.items() if key.startswith("p:")} == expected


def test_a_dump_that_fails_loses_no_row(tmp_path: Path) -> None:
    with make("thread", double, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        with pytest.raises(KeyError, match="nope"):
            evaluator.dump_evals(["nope"], str(tmp_path))
        evaluator.dump_evals(["x"], str(tmp_path))
        assert [row["p:x"] for row in rows(tmp_path / "results.csv")] == ["0", "1"]


def test_a_dump_to_a_bad_path_loses_no_row(tmp_path: Path) -> None:
    with make("thread", double, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        with pytest.raises(OSError, match="missing"):
            evaluator.dump_evals(log_dir=str(tmp_path / "missing"))
        evaluator.dump_evals(log_dir=str(tmp_path))
        assert [row["p:x"] for row in rows(tmp_path / "results.csv")] == ["0", "1"]


# -- callbacks ---------------------------------------------------------------------------------------------------------


class Heard(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_launch(self, job: Job) -> None:
        self.events.append(("launch", job.id))

    def on_done(self, job: Job) -> None:
        self.events.append(("done", (job.id, job.status, job.output)))

    def on_gather(self, local_jobs: list[Job], other_jobs: list[Job]) -> None:
        self.events.append(("gather", (ids(local_jobs), other_jobs)))

    def on_close(self) -> None:
        self.events.append(("close", None))


def test_callbacks_hear_everything_in_order(method: str) -> None:
    heard = Heard()
    evaluator = make(method, double, callbacks=[heard])
    evaluator.submit(configurations(1))
    evaluator.gather("ALL")
    evaluator.evaluate({"x": 3})
    evaluator.close()
    assert heard.events == [
        ("launch", "0.0"),
        ("done", ("0.0", JobStatus.DONE, 0.0)),
        ("gather", (["0.0"], [])),
        ("launch", "0.1"),
        ("done", ("0.1", JobStatus.DONE, 6.0)),
        ("gather", (["0.1"], [])),
        ("close", None),
    ]


def test_a_callback_cannot_submit_at_the_close(method: str, caplog: pytest.LogCaptureFixture) -> None:
    class Submits(Callback):
        def on_close(self) -> None:
            evaluator.submit(configurations(1))

    with make(method, double, callbacks=[Submits()]) as evaluator:
        assert evaluator.evaluate({"x": 3}).output == 6.0
    assert "a callback that is told of the close cannot submit: do so after close() has returned" in caplog.text
    assert evaluator.statistics().callback_errors == 1
    assert len(evaluator.jobs) == 0
    evaluator.callbacks.clear()
    evaluator.submit(configurations(1))
    assert len(evaluator.gather("ALL")) == 1
    evaluator.close()


def test_callbacks_hear_of_cancelled_jobs(method: str, stage: Stage) -> None:
    heard = Heard()
    evaluator = make(method, stage.function(method), callbacks=[heard])
    evaluator.submit(configurations(2))
    stage.started(0).wait()
    evaluator.close()
    done = [detail[:2] for event, detail in heard.events if event == "done"]
    assert sorted(done) == [("0.0", JobStatus.CANCELLED), ("0.1", JobStatus.CANCELLED)]
    assert ("gather", (["0.0", "0.1"], [])) in heard.events
    assert heard.events[-1] == ("close", None)


def test_the_terminal_record_is_stored_before_anyone_hears_of_it(method: str) -> None:
    class Looking(Callback):
        def __init__(self) -> None:
            self.stored: list[Any] = []

        def on_done(self, job: Job) -> None:
            assert job.storage is not None
            self.stored.append((job.storage.load_job(job.id)["status"], job.storage.load_job(job.id)["out"]))

    looking = Looking()
    with make(method, double, callbacks=[looking]) as evaluator:
        evaluator.submit(configurations(3))
        evaluator.gather("ALL")
    assert looking.stored == [(2, 0.0), (2, 2.0), (2, 4.0)]


# -- bad constructor arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "built_in", "name"),
    [
        ({"num_workers": 0}, ValueError, "num_workers"),
        ({"num_workers": -1}, ValueError, "num_workers"),
        ({"num_workers": 1.5}, (ValueError, TypeError), "num_workers"),
        ({"num_workers": True}, (ValueError, TypeError), "num_workers"),
        ({"num_workers": "2"}, (ValueError, TypeError), "num_workers"),
        ({"num_workers": None}, (ValueError, TypeError), "num_workers"),
        ({"callbacks": 3}, TypeError, "callbacks"),
        ({"run_function_kwargs": [1]}, TypeError, "run_function_kwargs"),
        ({"run_function_kwargs": "ab"}, TypeError, "run_function_kwargs"),
        ({"storage": {}}, TypeError, "storage"),
        ({"storage": MemoryStorage}, TypeError, "storage"),
        ({"job_timeout": 0}, ValueError, "job_timeout"),
        ({"job_timeout": -1}, ValueError, "job_timeout"),
        ({"job_timeout": math.nan}, ValueError, "job_timeout"),
        ({"job_timeout": math.inf}, ValueError, "job_timeout"),
        ({"job_timeout": "1"}, (ValueError, TypeError), "job_timeout"),
        ({"kill_grace": -1}, ValueError, "kill_grace"),
        ({"kill_grace": None}, (ValueError, TypeError), "kill_grace"),
        ({"kill_grace": math.inf}, ValueError, "kill_grace"),
        ({"on_error": "explode"}, ValueError, "on_error"),
        ({"on_error": None}, ValueError, "on_error"),
        ({"max_pending": 0}, ValueError, "max_pending"),
        ({"max_pending": 1.5}, (ValueError, TypeError), "max_pending"),
        ({"batching": 0}, ValueError, "batching"),
        ({"batching": -3}, ValueError, "batching"),
        ({"batching": "many"}, ValueError, "batching"),
        ({"batching": None}, (ValueError, TypeError), "batching"),
        ({"profile": "yes"}, TypeError, "profile must be True or False"),
        ({"resume": 1}, TypeError, "resume must be True or False"),
        ({"reuse": None}, TypeError, "reuse must be True or False"),
    ],
)
def test_a_bad_argument_is_named(kwargs: dict[str, Any], built_in: Any, name: str) -> None:
    for method in METHODS:
        with pytest.raises(built_in, match=name) as caught:
            make(method, double, **kwargs)
        assert isinstance(caught.value, ParavalError)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [None, 3, "double"])
@pytest.mark.parametrize("cls", [SerialEvaluator, ThreadPoolEvaluator])
def test_the_run_function_must_be_callable(cls: Any, function: Any) -> None:
    with pytest.raises(TypeError, match=r"run_function must be callable") as caught:
        cls(function)
    assert isinstance(caught.value, ParavalError)


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="num_wokers"):
        Evaluator.create(double, "thread", {"num_wokers": 1})


def test_the_common_arguments_are_positional_in_the_order_of_the_reference_system() -> None:
    storage = MemoryStorage()
    search_id = storage.create_new_search()
    with ThreadPoolEvaluator(partial(double), 2, [], {}, storage, search_id) as evaluator:
        assert (evaluator.num_workers, evaluator.storage, evaluator.search_id) == (2, storage, search_id)
        with pytest.raises(TypeError):
            ThreadPoolEvaluator(double, 2, [], {}, storage, search_id, HPOJob)  # type: ignore[call-arg] # keyword only


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["auto", True, False, 1, 4, 1000])
def test_every_way_of_batching_runs_every_job(method: str, batching: Any) -> None:
    with make(method, double, num_workers=3, batching=batching) as evaluator:
        evaluator.submit(configurations(100))
        assert outputs(evaluator.gather("ALL")) == [2.0 * x for x in range(100)]


def test_batches_grow_while_jobs_are_tiny_and_shrink_at_once() -> None:
    sizer = BatchSizer("auto", num_workers=2)
    sizes = []
    for _ in range(12):
        sizes.append(sizer.next_size(10_000))
        sizer.learn(sizes[-1], sizes[-1] * 1e-6)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256, 256]
    assert sizer.next_size(100) == 50  # a fair share of what waits
    assert sizer.next_size(1) == 1
    sizer.learn(256, 256 * 0.001)
    assert sizer.next_size(10_000) == 1
    for _ in range(12):  # jobs of 200 µs: a batch shall not take longer than some milliseconds
        size = sizer.next_size(10_000)
        assert size * 0.0002 < 0.010
        sizer.learn(size, size * 0.0002)


def test_a_worker_that_is_far_has_short_jobs_to_go_on_with() -> None:
    sizer = BatchSizer("auto", num_workers=2, is_far=True)
    assert not sizer.sends_ahead  # before it is known what the jobs are like
    sizer.learn(1, 0.010)
    assert sizer.sends_ahead
    assert sizer.in_order
    assert [sizer.next_stock(stock, 10_000) for stock in (1, 5, 8)] == [7, 3, 0]  # of jobs that take 10 ms
    assert [sizer.next_stock(1, waiting) for waiting in (1, 5)] == [0, 2]  # no more than a fair share of what waits
    sizer.learn(5, 5 * 0.100)
    assert [sizer.next_stock(stock, 10_000) for stock in (1, 2)] == [1, 0]  # of longer ones, one
    assert sizer.patience_s == 0.2
    sizer.learn(2, 2 * 0.300)
    assert not sizer.sends_ahead  # they begin in their order
    prompt = BatchSizer("auto", num_workers=2, is_far=True, may_be_long=False)
    prompt.learn(5, 5 * 0.100)
    assert (prompt.sends_ahead, prompt.in_order, prompt.next_size(10_000)) == (False, False, 1)
    for _ in range(12):
        size = sizer.next_size(10_000)
        sizer.learn(size, size * 0.001)  # for this worker they are tiny
        assert not sizer.in_order
    assert 20 <= sizer.next_size(10_000) <= 40
    near = BatchSizer("auto", num_workers=2)
    near.learn(1, 0.010)
    assert (near.next_size(10_000), near.in_order) == (1, False)


def test_the_pace_of_jobs_falls_at_once_and_rises_slowly() -> None:
    sizer = BatchSizer("auto", num_workers=2, is_far=True)
    assert sizer.pace_s == 0.0
    paces = []
    for shortest in (0.010, 0.010, 0.010, 0.001, 0.010, math.inf):  # infinity: none has told
        sizer.learn(5, 0.050, shortest)
        paces.append(sizer.pace_s)
    assert paces == pytest.approx([0.005, 0.0075, 0.00875, 0.001, 0.0055, 0.0055])


@pytest.mark.parametrize(("batching", "size"), [(False, 1), (1, 1), (7, 7), (1000, 256)])
def test_batches_of_a_fixed_size(batching: Any, size: int) -> None:
    sizer = BatchSizer(batching, num_workers=1)
    for _ in range(3):
        assert sizer.next_size(10_000) == size
        sizer.learn(size, 10.0)


def test_a_batch_gives_up_jobs_behind_a_long_one(method: str, stage: Stage) -> None:
    """Four jobs to a batch: the first result is not kept back by the second job, nor are the last two."""
    with make(method, stage.function(method), num_workers=2, batching=4) as evaluator:
        stage.release(*[x for x in range(8) if x != 1])
        evaluator.submit(configurations(8))
        stage.started(1).wait()
        gathered: list[Job] = []
        while len(gathered) < 7:
            gathered += evaluator.gather("BATCH", 1)
        assert outputs(gathered) == [0, 2, 3, 4, 5, 6, 7]
        stage.release(1)
        assert outputs(evaluator.gather("ALL")) == [1]


def test_no_warning_is_left_for_the_interpreter() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for method in METHODS:
            with make(method, double, num_workers=2) as evaluator:
                evaluator.submit(configurations(3))
                evaluator.gather("ALL")
    assert caught == []


# -- classes and context variables of the user's -----------------------------------------------------------------------


class BadStoredOutput(Job):
    @property
    def stored_output(self) -> Any:
        return self.output["loss"]  # which a job that failed has not


class BadFailed(Job):
    @property
    def failed(self) -> bool:
        return bool(self.output["loss"])


class BadSetError(Job):
    def set_error(self, error: JobError) -> None:
        raise RuntimeError("no errors here")


@pytest.mark.parametrize("cls", [BadStoredOutput, BadFailed, BadSetError])
def test_a_class_of_jobs_that_raises_fails_its_own_job(method: str, cls: type[Job]) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 1:
            raise ValueError("it went wrong")
        return {"loss": 0.5}

    with make(method, function, job_class=cls) as evaluator:
        evaluator.submit(configurations(3))
        jobs = {job.args["x"]: job for job in evaluator.gather("ALL")}
        assert [jobs[x].output for x in range(3)] == [{"loss": 0.5}, None, {"loss": 0.5}]
        assert jobs[1].error is not None
        assert evaluator.statistics().submitted == evaluator.statistics().done + evaluator.statistics().failed == 3


def test_a_class_of_jobs_that_cannot_be_made(method: str) -> None:
    class Other(Job):
        def __init__(self, id: str, args: dict[str, Any]) -> None:  # noqa: A002 - as its base has it
            super().__init__(id, args)

    with make(method, double, job_class=Other) as evaluator:
        with pytest.raises(TypeError, match="positional arguments"):
            evaluator.submit(configurations(2))
        assert [record.status for record in evaluator.storage.scan(evaluator.search_id)[0]] == [4, 4]
        assert evaluator.gather("ALL") == []


VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="clean")


def set_and_tell(job: RunningJob) -> str:
    before = VARIABLE.get()
    VARIABLE.set(f"set by {job.id}")
    return before


@pytest.mark.parametrize("waits", [False, True])
def test_context_variables_are_each_jobs_own(method: str, waits: bool) -> None:
    async def function(job: RunningJob) -> tuple[str, str]:
        before = set_and_tell(job)
        if waits:
            await anyio.lowlevel.checkpoint()
        return before, VARIABLE.get()

    with make(method, function, num_workers=1) as evaluator:
        evaluator.submit(configurations(20))
        assert [job.output for job in evaluator.gather("ALL")] == [("clean", f"set by 0.{x}") for x in range(20)]
    with make("thread", set_and_tell) as evaluator:
        evaluator.submit(configurations(20))
        assert {job.output for job in evaluator.gather("ALL")} == {"clean"}


def test_a_job_of_a_local_function_can_be_pickled(method: str) -> None:
    with make(method, lambda job: job["x"]) as evaluator:
        evaluator.submit(configurations(1))
        (job,) = evaluator.gather("ALL")
    copied = pickle.loads(pickle.dumps(job))  # noqa: S301 - it was made in this line
    assert (copied.id, copied.args, copied.output, copied.run_function) == (job.id, job.args, job.output, None)
    copied = pickle.loads(pickle.dumps(Job("0.1", {}, double)))  # noqa: S301 - likewise
    assert copied.run_function is double


def test_a_callback_may_remove_itself(method: str) -> None:
    heard = []

    class Once(Callback):
        def on_done(self, job: Job) -> None:
            evaluator.callbacks.remove(self)

    class Counter(Callback):
        def on_done(self, job: Job) -> None:
            heard.append(job.id)

    with make(method, double, callbacks=[Once(), Counter()]) as evaluator:
        evaluator.submit(configurations(3))
        evaluator.gather("ALL")
    assert len(heard) == 3


def test_a_thread_that_cannot_be_started_costs_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True])
    start = threading.Thread.start

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name == "paraval-job" and next(failures, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    with make("thread", double) as evaluator:
        evaluator.submit(configurations(3))
        jobs = evaluator.gather("ALL")
    assert [job.error.kind for job in jobs if job.error] == ["worker_died"]
    assert len(jobs) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_a_loop_that_cannot_be_started_leaves_no_open_record(monkeypatch: pytest.MonkeyPatch, resume: bool) -> None:
    failures = iter([True])
    start = threading.Thread.start

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name == "paraval-loop" and next(failures, False):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    storage = MemoryStorage()
    options = {"storage": storage, "search_id": storage.create_new_search(), "resume": resume}
    with make("thread", double, **options) as evaluator:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            evaluator.submit(configurations(3))
        assert evaluator.num_jobs_submitted == 0
        statuses = [record.status for record in storage.scan(evaluator.search_id)[0]]
        assert statuses == [JobStatus.CANCELLED.value] * 3  # or another driver would wait for them
        evaluator.submit(configurations(3))
        assert sorted(outputs(evaluator.gather("ALL"))) == [0.0, 2.0, 4.0]


class NamelessType(type):
    def __getattribute__(cls, name: str) -> Any:
        if name == "__name__":
            raise RuntimeError
        return super().__getattribute__(name)


class NamelessError(Exception, metaclass=NamelessType):
    pass


def test_an_exception_that_has_no_name(method: str) -> None:
    def function(job: RunningJob) -> Any:
        raise NamelessError

    with make(method, function) as evaluator:
        evaluator.submit(configurations(1))
        (job,) = evaluator.gather("ALL")
        assert job.error is not None
        assert job.error.type == "Exception"


def test_numbers_of_numpy_are_numbers(method: str) -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed (dependency group 'test')")
    options = {"num_workers": numpy.int64(2), "job_timeout": numpy.float32(50), "kill_grace": numpy.int64(1)}
    with make(method, double, **options) as evaluator:
        evaluator.timeout = numpy.int64(50)
        evaluator.set_maximum_num_jobs_submitted(numpy.int64(3))
        with pytest.raises(MaximumJobsSpawnReached, match="maximum of 3 "):
            evaluator.submit(configurations(4))
        assert len(evaluator.gather("BATCH", numpy.int64(3))) == 3
        with pytest.raises(ValueError, match="timeout must be"):
            evaluator.timeout = 10**400


def test_an_execute_that_forgets_to_return_the_job(method: str) -> None:
    cls = type(make(method, double))

    class Forgetful(cls):  # type: ignore[misc, valid-type] # a class that is found out here
        async def execute(self, job: Job) -> Job:
            await super().execute(job)
            return None  # type: ignore[return-value] # the mistake

    class Idle(cls):  # type: ignore[misc, valid-type] # likewise
        async def execute(self, job: Job) -> Job:
            return job

    with Forgetful(make(method, double).run_function, job_class=HPOJob) as evaluator:
        assert evaluator.evaluate({"x": 2}).objective == 4
    with Idle(make(method, double).run_function, job_class=HPOJob) as evaluator:
        job = evaluator.evaluate({"x": 2})
        assert job.objective == "F_TypeError"
        assert "execute()" in job.error.message
    found = weakref.ref(evaluator)
    del evaluator
    gc.collect()
    assert found() is None


class AsyncCallback(Callback):
    async def on_done(self, job: Job) -> None:  # type: ignore[override] # the mistake
        """Never be called."""


@pytest.mark.parametrize("bad", [None, 3, object(), Callback, AsyncCallback()])
def test_callbacks_are_objects_with_plain_methods(method: str, bad: Any) -> None:
    with pytest.raises(TypeError, match="callback"):
        make(method, double, callbacks=[bad])


def test_what_is_evaluated_leaves_nothing_behind(method: str) -> None:
    with make(method, double, storage=NullStorage()) as evaluator:
        found = weakref.ref(evaluator.evaluate({"x": 1}))
        evaluator.evaluate({"x": 2})
        gc.collect()
        assert found() is None
        assert not evaluator.jobs
        assert not evaluator.job_id_gathered
        assert evaluator.num_jobs_gathered == 2
