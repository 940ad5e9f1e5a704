"""Deadlines, budgets and cancellation: what is asked to stop stops or is given up; what has not begun never begins."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from paraval import Evaluator, HPOJob, Job, JobStatus, ParavalError, RunningJob, SerialEvaluator, ThreadPoolEvaluator
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
    soon,
    until,
    until_async,
)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.fixture
def storage() -> CountingStorage:
    return CountingStorage()


def reasons(jobs: list[Job]) -> dict[Any, Any]:
    return {job.args["x"]: job.objective for job in jobs if isinstance(job, HPOJob)}


def check_timed_out(job: Job, storage: CountingStorage) -> None:
    assert isinstance(job, HPOJob)
    assert job.status is JobStatus.CANCELLED
    assert job.objective == "F_timeout"
    assert job.error is not None
    assert job.error.kind == "timeout"
    record = storage.load_job(job.id)
    assert (record["status"], record["out"]) == (JobStatus.CANCELLED.value, "F_timeout")
    assert storage.terminal[job.id] == 1


# -- job_timeout -------------------------------------------------------------------------------------------------------


def test_a_job_that_runs_too_long_is_stopped_and_no_other(method: str, stage: Stage, storage: CountingStorage) -> None:
    stage.release(0, 2, 3, 4)
    function = stage.function(method)
    with make(method, function, num_workers=2, job_timeout=0.5, job_class=HPOJob, storage=storage) as evaluator:
        evaluator.submit(configurations(5))
        jobs = {job.args["x"]: job for job in evaluator.gather("ALL")}
        assert reasons(list(jobs.values())) == {0: 0.0, 1: "F_timeout", 2: 2.0, 3: 3.0, 4: 4.0}
        check_timed_out(jobs[1], storage)
        assert jobs[1].error is not None
        assert "0.5" in jobs[1].error.message
        assert stage.seen == [(1, JobStatus.CANCELLING)]
        assert jobs[1].timing.ran is not None
        assert jobs[1].timing.ran >= 0.5
        assert evaluator.statistics().cancelled == 1
        assert evaluator.statistics().done == 4


def test_the_time_in_the_queue_does_not_count(method: str) -> None:
    async def coroutine(job: RunningJob) -> None:
        await anyio.sleep(0.15)

    def plain(job: RunningJob) -> None:
        time.sleep(0.15)

    function = coroutine if method == "serial" else plain
    with make(method, function, num_workers=1, job_timeout=0.4) as evaluator:
        evaluator.submit(configurations(3))  # 0.45 s in all
        assert {job.status for job in evaluator.gather("ALL")} == {JobStatus.DONE}


def test_every_job_of_a_batch_has_its_own_limit(method: str, stage: Stage) -> None:
    stage.release(0, 3)
    with make(method, stage.function(method), job_timeout=0.5, batching=4, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(4))
        assert reasons(evaluator.gather("ALL")) == {0: 0.0, 1: "F_timeout", 2: "F_timeout", 3: 3.0}


def test_a_limit_shorter_than_a_batch_may_wait(method: str, stage: Stage) -> None:
    """The limit passes before the waiting jobs of the batch are taken back: they are innocent all the same."""
    stage.release(1, 2, 3)
    with make(method, stage.function(method), job_timeout=0.004, batching=4, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(4))
        first = reasons(evaluator.gather("ALL"))
        assert first[0] == "F_timeout"
        assert set(first) == {0, 1, 2, 3}


def test_many_jobs_time_out_at_a_time(method: str, stage: Stage, storage: CountingStorage) -> None:
    kwargs: dict[str, Any] = {"num_workers": 20, "job_timeout": 0.05, "job_class": HPOJob, "storage": storage}
    with make(method, stage.function(method), **kwargs) as evaluator:
        evaluator.submit(configurations(40))
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 40
        for job in jobs:
            check_timed_out(job, storage)


def test_a_worker_works_on_after_a_timeout(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=1, job_timeout=0.3, job_class=HPOJob) as evaluator:
        for x in range(3):
            assert evaluator.evaluate({"x": x})[1] == "F_timeout"  # type: ignore[index] # it is an HPOJob
        stage.release(9)
        assert evaluator.evaluate({"x": 9})[1] == 9.0  # type: ignore[index] # likewise


def test_what_a_stopped_job_returns_is_no_result(storage: CountingStorage) -> None:
    """It was stopped, whatever it returns then; what it returned is noted."""

    async def run(job: RunningJob) -> float:
        try:
            await anyio.sleep_forever()
        except BaseException:  # noqa: BLE001 - it swallows the cancellation, and that is the point
            return 42.0
        raise AssertionError

    def plain(job: RunningJob) -> float:
        while not job.stopped():
            time.sleep(0.001)
        return 42.0

    for method, function in (("serial", run), ("thread", plain)):
        store = CountingStorage()
        with make(method, function, job_timeout=0.02, job_class=HPOJob, storage=store) as evaluator:
            job = evaluator.evaluate({})
            check_timed_out(job, store)
            assert job.metadata["returned"] == 42.0


def test_a_job_that_raises_when_it_is_stopped_has_timed_out(storage: CountingStorage) -> None:
    async def run(job: RunningJob) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise LookupError("during the clean-up")

    with make("serial", run, job_timeout=0.02, job_class=HPOJob, storage=storage) as evaluator:
        check_timed_out(evaluator.evaluate({}), storage)
        check_timed_out(evaluator.evaluate({}), storage)


def test_an_own_execute_can_be_stopped(storage: CountingStorage) -> None:
    class Own(SerialEvaluator):
        async def execute(self, job: Job) -> Job:
            try:
                await anyio.sleep_forever()
            except BaseException:  # noqa: BLE001 - it swallows the cancellation, and that is the point
                job.set_output(1.0)
            return job

    async def run(job: RunningJob) -> None:
        raise AssertionError

    with Own(run, job_timeout=0.02, job_class=HPOJob, storage=storage) as evaluator:
        job = evaluator.evaluate({})
        check_timed_out(job, storage)
        assert job not in job.metadata.values()  # metadata is data: it is stored


def test_an_async_job_in_a_thread_is_cancelled(storage: CountingStorage) -> None:
    cleaned = Latch()

    async def run(job: RunningJob) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.open()

    kwargs: dict[str, Any] = {"num_workers": 2, "job_timeout": 0.05, "kill_grace": 5, "job_class": HPOJob}
    with make("thread", run, storage=storage, **kwargs) as evaluator:
        evaluator.submit(configurations(4))
        for job in evaluator.gather("ALL"):
            check_timed_out(job, storage)
            assert job.error is not None
            assert "did not stop" not in job.error.message  # it did not take the grace
    assert cleaned.is_open


def test_a_coroutine_that_begins_after_it_was_asked_to_stop_is_cancelled(storage: CountingStorage) -> None:
    """The run-function takes a while to make its coroutine, and the limit passes meanwhile."""

    cancelled, release = Latch(), Latch()

    async def endless() -> None:
        try:
            await release.opened()
        except BaseException:
            cancelled.open()
            raise

    def run(job: RunningJob) -> Any:
        while not job.stopped():
            time.sleep(0.001)
        return endless()

    with make("thread", run, job_timeout=0.02, kill_grace=0.3, storage=storage) as evaluator:
        try:
            assert evaluator.evaluate({}).status is JobStatus.CANCELLED
            assert cancelled.is_open
        finally:
            release.open()


# -- threads that do not stop ------------------------------------------------------------------------------------------


def test_a_thread_that_does_not_stop_is_given_up_and_its_slot_not_used(stage: Stage, storage: CountingStorage) -> None:
    calls: list[str] = []

    def run(job: RunningJob) -> Any:
        calls.append(f"{job['x']} begins")
        value = stage.plain(job)
        calls.append(f"{job['x']} returns")
        return value

    evaluator = make("thread", run, num_workers=1, job_timeout=0.3, kill_grace=0.05, job_class=HPOJob, storage=storage)
    with evaluator:
        evaluator.submit(configurations(2))
        (job,) = evaluator.gather("BATCH", 1)
        check_timed_out(job, storage)
        assert job.error is not None
        assert "did not stop" in job.error.message
        # The only thread is still in that call: the next job waits for it.
        statistics = evaluator.statistics()
        assert (statistics.pending, statistics.running) == (1, 0)
        stage.release(1)
        stage.release(0)
        (job,) = evaluator.gather("ALL")
        assert (job.args, job.stored_output) == ({"x": 1}, 1.0)
        assert calls == ["0 begins", "0 returns", "1 begins", "1 returns"]
        assert storage.terminal == {"0.0": 1, "0.1": 1}


def test_the_other_slots_work_on_beside_a_thread_that_does_not_stop(stage: Stage) -> None:
    stage.release(*range(1, 30))
    evaluator = make("thread", stage.plain, num_workers=2, job_timeout=0.3, kill_grace=0.0, job_class=HPOJob)
    with evaluator:
        evaluator.submit(configurations(30))
        assert reasons(evaluator.gather("ALL")) == {0: "F_timeout"} | {x: float(x) for x in range(1, 30)}
        stage.release(0)


def test_close_gives_up_a_thread_that_does_not_stop(stage: Stage, storage: CountingStorage) -> None:
    returned: list[int] = []

    def run(job: RunningJob) -> Any:
        value = stage.plain(job)
        returned.append(job["x"])
        return value

    evaluator = make("thread", run, num_workers=2, kill_grace=0.05, storage=storage)
    evaluator.submit(configurations(3))
    stage.started(0).wait()
    stage.started(1).wait()
    assert ids(evaluator.close()) == ["0.0", "0.1", "0.2"]
    assert returned == []  # it has not waited for them
    assert {job.status for job in evaluator.jobs} == {JobStatus.CANCELLED}
    # It can be used again at once, on new threads.
    stage.release(7)
    assert evaluator.evaluate({"x": 7}).output == 7
    stage.release_all()
    evaluator.close()
    assert set(storage.terminal.values()) == {1}
    assert evaluator.statistics().cancelled == 3


def test_close_gives_up_a_loop_that_does_not_answer(storage: CountingStorage) -> None:
    go, started, went_on = Latch(), Latch(), Latch()

    async def run(job: RunningJob) -> int:
        if job["x"] == 0:
            started.open()
            go.wait()  # it blocks the loop
            went_on.open()
        return int(job["x"])

    evaluator = make("serial", run, num_workers=2, kill_grace=0.05, storage=storage)
    evaluator.submit(configurations(2))
    started.wait()
    assert ids(evaluator.close()) == ["0.0", "0.1"]
    assert not went_on.is_open  # it has not waited for it
    go.open()
    assert evaluator.evaluate({"x": 7}).output == 7
    assert evaluator.close() == []
    assert set(storage.terminal.values()) == {1}
    assert evaluator.gather("ALL") == []


# -- timeout: a budget for the whole evaluator -------------------------------------------------------------------------


def test_when_the_budget_runs_out_everything_ends(method: str, stage: Stage, storage: CountingStorage) -> None:
    stage.release(0)
    kwargs: dict[str, Any] = {"num_workers": 2, "batching": False, "job_class": HPOJob, "storage": storage}
    with make(method, stage.function(method), **kwargs) as evaluator:
        evaluator.timeout = 100
        assert evaluator.timeout == 100
        assert evaluator.time_left is not None
        assert 0 < evaluator.time_left <= 100
        evaluator.submit(configurations(6))
        until(lambda: evaluator.statistics().done == 1)
        stage.started(1).wait()
        stage.started(2).wait()
        evaluator.timeout = 0.05
        jobs = {job.args["x"]: job for job in evaluator.gather("ALL")}
        assert jobs[0].status is JobStatus.DONE
        for x in range(1, 6):
            check_timed_out(jobs[x], storage)
        assert sorted(stage.seen) == [(1, JobStatus.CANCELLING), (2, JobStatus.CANCELLING)]
        for x in (3, 4, 5):
            assert not stage.started(x).is_open  # what had not begun never began
            assert jobs[x].timing.started is None
        assert evaluator.time_left <= 0
        # What comes after the end never begins either.
        evaluator.submit([{"x": 0}])
        (job,) = evaluator.gather("ALL")
        check_timed_out(job, storage)
        assert job.timing.started is None
        assert evaluator.evaluate({"x": 0}).status is JobStatus.CANCELLED


def test_the_budget_may_be_set_while_jobs_run(method: str, stage: Stage, storage: CountingStorage) -> None:
    with make(method, stage.function(method), num_workers=1, job_class=HPOJob, storage=storage) as evaluator:
        evaluator.submit(configurations(2))
        stage.started(0).wait()
        assert evaluator.timeout is None
        assert evaluator.time_left is None
        evaluator.set_timeout(0.05)
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 2
        for job in jobs:
            check_timed_out(job, storage)


def test_the_budget_may_be_moved(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=1, job_class=HPOJob) as evaluator:
        evaluator.timeout = 0.05
        evaluator.submit(configurations(1))
        evaluator.timeout = 100
        stage.started(0).wait()
        assert not stage.started(9).peek(0.1)  # the first budget passes
        assert evaluator.statistics().running == 1
        evaluator.timeout = None
        assert evaluator.time_left is None
        stage.release(0)
        assert reasons(evaluator.gather("ALL")) == {0: 0.0}


def test_a_budget_of_nothing_stops_at_once(method: str, stage: Stage) -> None:
    with make(method, stage.function(method), num_workers=1, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(2))
        stage.started(0).wait()
        evaluator.timeout = 0
        assert reasons(evaluator.gather("ALL")) == {0: "F_timeout", 1: "F_timeout"}
        evaluator.timeout = None
        stage.release(5)
        assert evaluator.evaluate({"x": 5})[1] == 5.0  # type: ignore[index] # it is an HPOJob


def test_close_forgets_the_budget(method: str, stage: Stage) -> None:
    stage.release_all()
    evaluator = make(method, stage.function(method))
    evaluator.timeout = 0
    evaluator.submit(configurations(1))
    assert evaluator.gather("ALL")[0].status is JobStatus.CANCELLED
    evaluator.close()
    assert evaluator.timeout is None
    assert evaluator.time_left is None
    evaluator.submit(configurations(1))
    assert outputs(evaluator.gather("ALL")) == [0]
    evaluator.close()


@pytest.mark.parametrize("bad", [-1, -0.001, math.nan, "3", True])
def test_a_bad_budget_is_named(bad: Any) -> None:
    evaluator = make("thread", double)
    with pytest.raises((ValueError, TypeError), match="timeout") as caught:
        evaluator.timeout = bad
    assert isinstance(caught.value, ParavalError)
    with pytest.raises((ValueError, TypeError), match="timeout"):
        evaluator.set_timeout(bad)
    assert evaluator.timeout is None


def test_the_budget_gives_up_a_thread_that_does_not_stop(stage: Stage, storage: CountingStorage) -> None:
    with make("thread", stage.plain, num_workers=1, kill_grace=0.05, job_class=HPOJob, storage=storage) as evaluator:
        evaluator.timeout = 0.05
        evaluator.submit(configurations(3))
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 3
        for job in jobs:
            check_timed_out(job, storage)
        assert not stage.started(1).is_open
        evaluator.timeout = None
        stage.release_all()
        assert evaluator.evaluate({"x": 9})[1] == 9.0  # type: ignore[index] # it is an HPOJob


def test_a_job_timeout_and_a_budget_at_a_time(method: str, stage: Stage, storage: CountingStorage) -> None:
    evaluator = make(method, stage.function(method), num_workers=4, job_timeout=0.05, job_class=HPOJob, storage=storage)
    with evaluator:
        evaluator.timeout = 0.05
        evaluator.submit(configurations(8))
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 8
        for job in jobs:
            check_timed_out(job, storage)


# -- on every event loop -----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_job_that_runs_too_long_is_stopped_on_any_loop(
    method: str, stage: Stage, storage: CountingStorage
) -> None:
    stage.release(0, 2)
    kwargs: dict[str, Any] = {"num_workers": 2, "job_timeout": 0.5, "job_class": HPOJob, "storage": storage}
    async with make(method, stage.function(method), **kwargs) as evaluator:
        await evaluator.submit_async(configurations(3))
        jobs = {job.args["x"]: job for job in await soon(evaluator.gather_async("ALL"))}
        assert reasons(list(jobs.values())) == {0: 0.0, 1: "F_timeout", 2: 2.0}
        check_timed_out(jobs[1], storage)
        assert stage.seen == [(1, JobStatus.CANCELLING)]


@pytest.mark.anyio
async def test_when_the_budget_runs_out_everything_ends_on_any_loop(
    method: str, stage: Stage, storage: CountingStorage
) -> None:
    async with make(method, stage.function(method), num_workers=2, job_class=HPOJob, storage=storage) as evaluator:
        evaluator.timeout = 0.05
        await evaluator.submit_async(configurations(4))
        jobs = await soon(evaluator.gather_async("ALL"))
        assert len(jobs) == 4
        for job in jobs:
            check_timed_out(job, storage)
        evaluator.timeout = None
        stage.release(9)
        assert (await soon(evaluator.evaluate_async({"x": 9}))).output == {"objective": 9.0}


@pytest.mark.anyio
async def test_a_cancelled_coroutine_may_take_its_grace() -> None:
    """It is shielded for a moment; it ends within the grace, and its clean-up is whole."""
    cleaned = []

    async def run(job: RunningJob) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            cleaned.append(job["x"])

    async with make("serial", run, num_workers=3, kill_grace=5) as evaluator:
        await evaluator.submit_async(configurations(3))
        await until_async(lambda: evaluator.statistics().running == 3)
        cancelled = await soon(evaluator.aclose())
        assert sorted(cleaned) == [0, 1, 2]
        assert all(job.error is not None and "did not stop" not in job.error.message for job in cancelled)


@pytest.mark.anyio
async def test_a_coroutine_that_does_not_stop_is_given_up(storage: CountingStorage) -> None:
    release, ended = Latch(), Latch()

    async def run(job: RunningJob) -> str:
        if job["x"] == 1:
            return "done"
        try:
            with anyio.CancelScope(shield=True):
                await release.opened()
            await checkpoint()  # here the cancellation comes at last
        finally:
            ended.open()
        return "never"

    kwargs: dict[str, Any] = {
        "num_workers": 1,
        "job_timeout": 0.3,
        "kill_grace": 0.05,
        "job_class": Job,
        "storage": storage,
    }
    async with make("serial", run, **kwargs) as evaluator:
        try:
            evaluator.submit(configurations(1))
            (job,) = await soon(evaluator.gather_async("ALL"))
            assert job.status is JobStatus.CANCELLED
            assert job.error is not None
            assert job.error.kind == "timeout"
            assert "did not stop" in job.error.message
        finally:
            release.open()
        await ended.opened()
        # Its late end changes nothing, and the worker goes on.
        assert (await soon(evaluator.evaluate_async({"x": 1}))).output == "done"
        assert job.status is JobStatus.CANCELLED
        assert storage.terminal == {"0.0": 1, "0.1": 1}
        statistics = evaluator.statistics()
        assert (statistics.pending, statistics.running, statistics.done, statistics.cancelled) == (0, 0, 1, 1)


class Interrupted:
    """Evaluates jobs, each cancelled after a number of turns of the loop, or not."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    async def coroutine(self, job: RunningJob) -> int:
        if "meet" in job:
            await self._stage.coroutine(job)
        for _ in range(job["x"] % 5):
            await checkpoint()
        return int(job["x"])

    def plain(self, job: RunningJob) -> int:
        if "meet" in job:
            self._stage.plain(job)
        for _ in range(job["x"] % 5):
            if job.stopped():
                break
            time.sleep(0)
        return int(job["x"])

    async def evaluate(self, evaluator: Evaluator, x: int) -> None:
        async def evaluate() -> None:
            job = await evaluator.evaluate_async({"x": x})
            assert job.output == x
            scope.cancel()

        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(evaluate)
                for _ in range(x % 7):
                    await checkpoint()
                scope.cancel()


@pytest.mark.anyio
async def test_cancelling_many_evaluations_leaves_every_slot_free(
    method: str, stage: Stage, storage: CountingStorage
) -> None:
    interrupted = Interrupted(stage)
    function = interrupted.coroutine if method == "serial" else interrupted.plain
    async with make(method, function, num_workers=3, storage=storage) as evaluator:
        async with anyio.create_task_group() as group:
            for x in range(150):
                group.start_soon(interrupted.evaluate, evaluator, x)
        await until_async(lambda: evaluator.statistics().running == 0)
        # All three slots are free: three jobs meet.
        evaluator.submit([{"x": 5 * number, "meet": True} for number in range(3)])
        for number in range(3):
            await stage.started(5 * number).opened()
        stage.release_all()
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 5, 10]
    assert set(storage.terminal.values()) == {1}
    assert len(storage.terminal) == 153
    statistics = evaluator.statistics()
    assert statistics.submitted == 153 == statistics.done + statistics.cancelled


# -- closing -----------------------------------------------------------------------------------------------------------


def test_close_during_a_timeout_ends_once(method: str, stage: Stage, storage: CountingStorage) -> None:
    function = stage.coroutine if method == "serial" else stage.plain
    with make(method, function, num_workers=4, job_timeout=0.02, kill_grace=0.1, storage=storage) as evaluator:
        evaluator.submit(configurations(8))
        stage.started(3).wait()
        until(lambda: any(job.status is not JobStatus.RUNNING for job in evaluator.jobs[:4]))
        cancelled = evaluator.close()
        assert ids(cancelled + evaluator.gather("ALL")) == ids(evaluator.jobs)
        stage.release_all()
    assert len(storage.terminal) == 8
    assert set(storage.terminal.values()) == {1}


def test_close_in_a_job_comes_to_an_end(stage: Stage) -> None:
    """A job closes its own evaluator: foolish, and no reason to hang."""
    evaluator: Evaluator

    def run(job: RunningJob) -> None:
        evaluator.close()

    evaluator = ThreadPoolEvaluator(run, kill_grace=0.05)
    evaluator.submit(configurations(1))
    until(lambda: evaluator.jobs[0].status.is_terminal)
    evaluator.close()


def test_a_budget_that_runs_out_while_it_is_closed(method: str, stage: Stage, storage: CountingStorage) -> None:
    for _ in range(10):
        evaluator = make(method, stage.function(method), num_workers=2, storage=storage)
        evaluator.submit(configurations(4))
        taken = in_threads(lambda: evaluator.set_timeout(0) or [], evaluator.close)  # type: ignore[func-returns-value] # noqa: B023 - it runs at once
        assert ids(taken[1] + evaluator.gather("ALL")) == ids(evaluator.jobs)
        assert evaluator.close() == []
    assert len(storage.terminal) == 40
    assert set(storage.terminal.values()) == {1}


async def block(job: RunningJob) -> str:
    if job["x"] >= 50:
        time.sleep(job["s"])  # noqa: ASYNC251 - what a coroutine must not do
    return "in time, as far as I know"


def test_a_coroutine_that_blocks_the_loop_is_out_of_time_nevertheless() -> None:
    with make("serial", block, num_workers=1, job_timeout=0.1) as evaluator:
        evaluator.submit([{"x": x, "s": 0.15} for x in range(54)])  # in batches, when the first ones are done
        jobs = evaluator.gather("ALL")
        assert {job.args["x"] for job in jobs if job.error is not None and job.error.kind == "timeout"} == set(
            range(50, 54)
        )


def test_blocking_coroutines_do_not_outlive_the_budget_together() -> None:
    with make("serial", block, num_workers=1) as evaluator:
        evaluator.submit([{"x": x, "s": 0.1} for x in range(100)])
        evaluator.timeout = 0.15
        jobs = evaluator.gather("ALL")
        started = [job for job in jobs if job.timing.started is not None]
        assert len(started) < 60
        assert all(job.status is JobStatus.CANCELLED for job in jobs if job.args["x"] > 60)


def test_what_waits_behind_a_job_in_a_batch_ends_with_the_budget() -> None:
    """It is not given back to the queue, where it would begin after all."""
    begun: list[int] = []
    running = Latch()

    def function(job: RunningJob) -> None:
        begun.append(job["x"])
        running.open()
        while not job.stopped():
            time.sleep(0.001)

    with make("thread", function, num_workers=2, batching=4) as evaluator:
        evaluator.submit(configurations(12))
        running.wait()
        evaluator.timeout = 0.001
        assert {job.error.kind for job in evaluator.gather("ALL") if job.error} == {"timeout"}
        assert all(job.status is JobStatus.CANCELLED for job in evaluator.jobs)
    assert len(begun) <= 2
