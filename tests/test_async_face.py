"""The asynchronous face, on every event loop of the matrix."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from paraval import Evaluator, HPOJob, Job, JobStatus, MaximumJobsSpawnReached, ParavalError, RunningJob
from paraval.callback import Callback
from paraval.errors import EvaluatorClosedError, JobsFailedError, UsageError
from support import (
    METHODS,
    CountingStorage,
    Latch,
    Stage,
    configurations,
    double,
    ids,
    in_thread,
    make,
    outputs,
    soon,
    until_async,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.fixture
def on_asyncio(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("about a task's own cancel(), which asyncio alone has")


async def gather_each(evaluator: Evaluator, count: int) -> list[Job]:
    jobs: list[Job] = []
    while len(jobs) < count:
        batch = await soon(evaluator.gather_async("BATCH", 1))
        assert batch
        jobs += batch
    return jobs


# -- gather ------------------------------------------------------------------------------------------------------------


async def test_gather_all(method: str) -> None:
    async with make(method, double, num_workers=3) as evaluator:
        await evaluator.submit_async(configurations(20))
        jobs = await soon(evaluator.gather_async("ALL"))
        assert outputs(jobs) == [2.0 * x for x in range(20)]
        assert all(job.status is JobStatus.DONE for job in jobs)
        assert await evaluator.gather_async("ALL") == []
        assert await evaluator.gather_async("BATCH", 3) == []
        evaluator.submit(configurations(2))  # a sync submit does not block, so it is welcome here
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0.0, 2.0]


async def test_a_flood_of_tiny_jobs_comes_back_whole(method: str) -> None:
    storage = CountingStorage()
    async with make(method, double, num_workers=2, storage=storage) as evaluator:
        await evaluator.submit_async(configurations(1000))
        jobs = await soon(evaluator.gather_async("ALL"))
    assert outputs(jobs) == [2.0 * x for x in range(1000)]
    assert set(storage.terminal.values()) == {1}
    assert len(storage.terminal) == 1000


async def test_a_batch_waits_for_its_size(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=4) as evaluator:
        await evaluator.submit_async(configurations(4))
        stage.release(2)
        assert outputs(await soon(evaluator.gather_async("BATCH"))) == [2]
        async with anyio.create_task_group() as group:
            gathered: list[Job] = []

            async def gather() -> None:
                gathered.extend(await evaluator.gather_async("BATCH", size=2))

            group.start_soon(gather)
            stage.release(0)
            await until_async(lambda: evaluator.statistics().done == 2)
            stage.release(9)
            await soon(evaluator.evaluate_async({"x": 9}))  # whoever was woken by the job before has gone on by now
            assert not gathered
            stage.release(3)
            await until_async(lambda: gathered)
        assert outputs(gathered) == [0, 3]
        stage.release(1)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [1]


async def test_more_than_is_in_flight_is_all_of_it_with_a_warning(method: str) -> None:
    async with make(method, double) as evaluator:
        await evaluator.submit_async(configurations(2))
        with pytest.warns(UserWarning, match=r"BATCH.* 3\).* 2 in flight") as caught:
            assert len(await evaluator.gather_async("BATCH", 3)) == 2
        assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["all", 3, None])
async def test_an_unknown_kind_of_gather_is_a_value_error(kind: Any) -> None:
    async with make("thread", double) as evaluator:
        with pytest.raises(ValueError, match=r"'ALL' or 'BATCH'") as caught:
            await evaluator.gather_async(kind)
        assert isinstance(caught.value, ParavalError)


async def test_the_loop_is_free_while_it_gathers(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method)) as evaluator, anyio.create_task_group() as group:
        await evaluator.submit_async(configurations(1))

        async def release() -> None:
            for _ in range(10):
                await checkpoint()
            stage.release(0)

        group.start_soon(release)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0]


async def test_many_jobs_run_at_a_time_and_never_more_than_there_are_workers(method: str) -> None:
    running = peak = 0
    lock = threading.Lock()
    full = Latch()

    def enter() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
            if running == 4:
                full.open()

    def leave() -> None:
        nonlocal running
        with lock:
            running -= 1

    async def coroutine(job: RunningJob) -> None:
        enter()
        await full.opened()
        leave()

    def plain(job: RunningJob) -> None:
        enter()
        full.wait()
        leave()

    async with make(method, coroutine if method == "serial" else plain, num_workers=4) as evaluator:
        await evaluator.submit_async(configurations(40))
        assert len(await soon(evaluator.gather_async("ALL"))) == 40
    assert peak == 4


async def test_two_tasks_share_the_results(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(2))
        batches: list[list[Any]] = []

        async def gather() -> None:
            batches.append(outputs(await evaluator.gather_async("BATCH", 1)))

        async with anyio.create_task_group() as group:
            group.start_soon(gather)
            group.start_soon(gather)
            await checkpoint()
            stage.release(0)
            await until_async(lambda: batches)
            stage.release(9)
            await soon(evaluator.evaluate_async({"x": 9}))  # whoever was woken by the job before has gone on by now
            assert batches == [[0]]  # the other goes on waiting: a job is in flight
            stage.release(1)
        assert batches == [[0], [1]]


async def test_failures_can_be_raised(method: str) -> None:
    def run(job: RunningJob) -> float:
        if job["x"] == 1:
            raise ValueError("poison")
        return double(job)

    async with make(method, run, on_error="raise") as evaluator:
        await evaluator.submit_async(configurations(3))
        with pytest.raises(JobsFailedError, match="1 of 3") as caught:
            await soon(evaluator.gather_async("ALL"))
        assert len(caught.value.jobs) == 3
        with pytest.raises(JobsFailedError):
            await soon(evaluator.evaluate_async({"x": 1}))


async def test_the_maximum_of_jobs_holds(method: str) -> None:
    async with make(method, double) as evaluator:
        evaluator.set_maximum_num_jobs_submitted(2)
        with pytest.raises(MaximumJobsSpawnReached):
            await evaluator.submit_async(configurations(5))
        with pytest.raises(MaximumJobsSpawnReached):
            await evaluator.evaluate_async({"x": 1})
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0.0, 2.0]


# -- cancelling who waits loses nothing --------------------------------------------------------------------------------


class Slow(Callback):
    """Its ``on_gather`` waits until it is let go."""

    def __init__(self) -> None:
        self.reached = Latch()
        self.go = Latch()

    def on_gather(self, local_jobs: list[Job], other_jobs: list[Job]) -> None:
        self.reached.open()
        self.go.wait()


async def test_a_cancelled_gather_loses_nothing(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=3) as evaluator:
        await evaluator.submit_async(configurations(3))
        stage.release(0)
        with anyio.move_on_after(0.02) as scope:
            await evaluator.gather_async("ALL")
        assert scope.cancelled_caught
        stage.release(1, 2)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 1, 2]


async def test_a_gather_cancelled_again_and_again_loses_nothing(method: str) -> None:
    storage = CountingStorage()
    async with make(method, double, num_workers=2, storage=storage) as evaluator:
        gathered: list[Job] = []
        for round_ in range(60):
            await evaluator.submit_async(configurations(3))
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:

                    async def gather() -> None:
                        gathered.extend(await evaluator.gather_async("BATCH", 1))

                    group.start_soon(gather)
                    for _ in range(round_ % 12):
                        await checkpoint()
                    scope.cancel()
        gathered += await soon(evaluator.gather_async("ALL"))
    assert len(gathered) == len({job.id for job in gathered}) == 180
    assert set(storage.terminal.values()) == {1}


async def test_a_gather_cancelled_while_callbacks_run_loses_nothing(method: str) -> None:
    slow = Slow()
    async with make(method, double, callbacks=[slow]) as evaluator:
        await evaluator.submit_async(configurations(2))
        gathered: list[Job] = []
        async with anyio.create_task_group() as group:

            async def gather() -> None:
                gathered.extend(await evaluator.gather_async("ALL"))

            group.start_soon(gather)
            await slow.reached.opened()
            group.cancel_scope.cancel()
            slow.go.open()
        gathered += await soon(evaluator.gather_async("ALL"))
        assert outputs(gathered) == [0.0, 2.0]
        assert evaluator.num_jobs_gathered == 2


@pytest.mark.usefixtures("on_asyncio")
async def test_a_gather_cancelled_by_asyncio_while_callbacks_run_loses_nothing(method: str) -> None:
    slow = Slow()
    async with make(method, double, callbacks=[slow]) as evaluator:
        await evaluator.submit_async(configurations(2))
        gather = asyncio.ensure_future(evaluator.gather_async("ALL"))
        await slow.reached.opened()
        gather.cancel()
        await checkpoint()
        slow.go.open()
        try:
            gathered = await gather
        except asyncio.CancelledError:
            gathered = []
        gathered += await soon(evaluator.gather_async("ALL"))
        assert outputs(gathered) == [0.0, 2.0]
        assert evaluator.num_jobs_gathered == 2


@pytest.mark.usefixtures("on_asyncio")
async def test_asyncio_wait_for_around_gather_loses_nothing(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(2))
        stage.release(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(evaluator.gather_async("ALL"), 0.02)
        stage.release(1)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 1]


async def test_a_cancelled_submit_has_submitted_what_it_says(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), max_pending=2) as evaluator:
        with anyio.move_on_after(0.05) as scope:
            await evaluator.submit_async(configurations(6))
        assert scope.cancelled_caught
        submitted = len(evaluator.jobs)
        assert 2 <= submitted <= 3
        stage.release_all()
        assert outputs(await soon(evaluator.gather_async("ALL"))) == list(range(submitted))
        assert evaluator.num_jobs_submitted == submitted


# -- as_completed ------------------------------------------------------------------------------------------------------


async def test_as_completed_gives_jobs_as_they_end(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=3) as evaluator:
        await evaluator.submit_async(configurations(3))
        stage.release(1)
        seen = []
        with anyio.fail_after(20):
            async for job in evaluator.as_completed():
                seen.append(job.output)
                if job.output == 1:
                    stage.release(2)
                elif job.output == 2:
                    stage.release(0)
        assert seen == [1, 2, 0]
        assert [job async for job in evaluator.as_completed()] == []
        assert evaluator.num_jobs_gathered == 3


async def test_jobs_may_be_submitted_while_others_come(method: str) -> None:
    async with make(method, double, num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(2))
        count = 0
        with anyio.fail_after(20):
            async for job in evaluator.as_completed():
                count += 1
                if count <= 10:
                    await evaluator.submit_async([{"x": job.args["x"] + 1}])
        assert count == 12


async def test_leaving_as_completed_early_loses_nothing(method: str) -> None:
    async with make(method, double, num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(10))
        seen = []
        async for job in evaluator.as_completed():
            seen.append(job)
            if len(seen) == 3:
                break
        assert outputs(seen + await soon(evaluator.gather_async("ALL"))) == [2.0 * x for x in range(10)]


async def test_closing_as_completed_early_loses_nothing(method: str) -> None:
    async with make(method, double, num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(10))
        seen = []
        results: Any = evaluator.as_completed()
        async with aclosing(results):
            async for job in results:
                seen.append(job)
                if len(seen) == 3:
                    break
        seen += [job async for job in evaluator.as_completed()]
        assert outputs(seen) == [2.0 * x for x in range(10)]


async def test_cancelling_as_completed_loses_nothing(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(4))
        stage.release(0)
        seen = []
        with anyio.move_on_after(0.03) as scope:
            async for job in evaluator.as_completed():
                seen.append(job)  # noqa: PERF401 - a comprehension would be lost by the cancellation
        assert scope.cancelled_caught
        stage.release_all()
        seen += [job async for job in evaluator.as_completed()]
        assert outputs(seen) == [0, 1, 2, 3]


async def test_as_completed_raises_failures_where_asked(method: str) -> None:
    def run(job: RunningJob) -> float:
        if job["x"] == 1:
            raise ValueError("poison")
        return double(job)

    async with make(method, run, on_error="raise") as evaluator:
        await evaluator.submit_async(configurations(3))
        seen: list[Job] = []
        with pytest.raises(JobsFailedError) as caught:
            async for job in evaluator.as_completed():
                seen.append(job)  # noqa: PERF401 - a comprehension would be lost by the failure
        assert [job.args["x"] for job in caught.value.jobs] == [1]
        assert outputs(seen + await soon(evaluator.gather_async("ALL"))) == [0.0, 4.0]


# -- evaluate ----------------------------------------------------------------------------------------------------------


async def test_evaluate_is_private(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2, job_class=HPOJob) as evaluator:
        await evaluator.submit_async(configurations(1))
        stage.release(7)
        job = await soon(evaluator.evaluate_async({"x": 7}))
        assert (type(job), job.status, job.output) == (HPOJob, JobStatus.DONE, {"objective": 7.0})
        assert await evaluator.gather_async("BATCH", 0) == []
        stage.release(0)
        assert ids(await soon(evaluator.gather_async("ALL"))) == ["0.0"]
        assert job not in evaluator.jobs


async def test_many_tasks_evaluate_at_a_time(method: str) -> None:
    async with make(method, double, num_workers=4) as evaluator, anyio.create_task_group() as group:
        results: dict[int, Any] = {}

        async def evaluate(x: int) -> None:
            results[x] = (await evaluator.evaluate_async({"x": x})).output

        for x in range(60):
            group.start_soon(evaluate, x)
    assert results == {x: 2.0 * x for x in range(60)}


async def test_cancelling_who_evaluates_cancels_the_job(method: str, stage: Stage) -> None:
    storage = CountingStorage()
    async with make(method, stage.function(method), num_workers=1, storage=storage) as evaluator:
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 0})
            await stage.started(0).opened()
            group.cancel_scope.cancel()
        # The job has ended when the cancelled call has returned.
        assert storage.load_job_status("0.0") == JobStatus.CANCELLED.value
        (record,) = storage.get(["0.0"])
        assert record.error is not None
        assert record.error.kind == "cancelled"
        assert stage.seen == [(0, JobStatus.CANCELLING)]
        # Its worker is free again.
        stage.release(1)
        assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 1
        assert storage.terminal == {"0.0": 1, "0.1": 1}
        assert evaluator.statistics().cancelled == 1
        # Nobody else will ever gather it, and a search that waits for the counts to meet must not wait for ever.
        assert evaluator.num_jobs_gathered == evaluator.num_jobs_submitted == 2


async def test_cancelling_who_evaluates_cancels_a_waiting_job(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=1) as evaluator:
        await evaluator.submit_async(configurations(1))
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 1})
            await until_async(lambda: evaluator.num_jobs_submitted == 2)
            group.cancel_scope.cancel()
        assert evaluator.storage.load_job_status("0.1") == JobStatus.CANCELLED.value
        stage.release(0, 1)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0]
        assert not stage.started(1).is_open


async def test_evaluate_may_time_out(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(1))
        with pytest.raises(TimeoutError), anyio.fail_after(0.03):
            await evaluator.evaluate_async({"x": 1})
        assert evaluator.storage.load_job_status("0.1") == JobStatus.CANCELLED.value
        stage.release(0)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0]


@pytest.mark.usefixtures("on_asyncio")
@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_by_asyncio_who_evaluates_cancels_the_job(method: str, stage: Stage, times: int) -> None:
    async with make(method, stage.function(method), num_workers=1) as evaluator:
        task = asyncio.ensure_future(evaluator.evaluate_async({"x": 0}))
        await stage.started(0).opened()
        for _ in range(times):
            task.cancel()
            await checkpoint()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_async(lambda: evaluator.storage.load_job_status("0.0") == JobStatus.CANCELLED.value)
        stage.release(1)
        assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 1


async def test_the_other_jobs_of_a_batch_outlive_a_cancelled_one(method: str) -> None:
    """A cancelled job may end in its own time and way; the next ones in its batch are innocent."""
    storage = CountingStorage()
    begin, started, hold = Latch(), Latch(), Latch()

    async def coroutine(job: RunningJob) -> Any:
        if job["x"] == "first":
            await begin.opened()
        elif job["x"] == "guilty":
            started.open()
            try:
                await anyio.sleep_forever()
            except BaseException:  # noqa: BLE001 - a run-function may do so: it cleans up and returns what it has
                return "partial"
        else:
            await checkpoint()
            await hold.opened()
        return job["x"]

    def plain(job: RunningJob) -> Any:
        if job["x"] == "first":
            begin.wait()
        elif job["x"] == "guilty":
            started.open()
            while not job.stopped():
                hold.peek(0.0005)
            return "partial"
        else:
            hold.wait()
        return job["x"]

    function = coroutine if method == "serial" else plain
    async with make(method, function, num_workers=1, batching=4, kill_grace=0.05, storage=storage) as evaluator:
        async with anyio.create_task_group() as group:
            evaluator.submit([{"x": "first"}])
            await until_async(lambda: evaluator.statistics().running == 1)
            group.start_soon(evaluator.evaluate_async, {"x": "guilty"})
            await until_async(lambda: evaluator.num_jobs_submitted == 2)
            evaluator.submit([{"x": "b"}, {"x": "c"}, {"x": "d"}])
            begin.open()
            await started.opened()  # these four are one batch
            group.cancel_scope.cancel()
        engine = evaluator._life.engine
        assert engine is not None
        await until_async(lambda: not engine._deadlines._heap)  # the grace is over, and what was to come after it
        hold.open()
        jobs = await soon(evaluator.gather_async("ALL"))
        assert {job.args["x"]: (job.status.name, job.output) for job in jobs} == {
            x: ("DONE", x) for x in ("first", "b", "c", "d")
        }
        assert storage.load_job_status("0.1") == JobStatus.CANCELLED.value
        assert set(storage.terminal.values()) == {1}


# -- the caller's loop is the home -------------------------------------------------------------------------------------


async def test_coroutines_share_the_callers_loop() -> None:
    shared = anyio.Event()  # it belongs to this loop
    limiter = anyio.CapacityLimiter(1)

    async def run(job: RunningJob) -> int:
        async with limiter:
            shared.set()
            return threading.get_ident()

    async with make("serial", run) as evaluator, anyio.create_task_group() as group:
        group.start_soon(evaluator.evaluate_async, {})
        await soon(shared.wait())
        assert (await soon(evaluator.evaluate_async({}))).output == threading.get_ident()


async def test_no_thread_is_started_for_coroutines() -> None:
    before = set(threading.enumerate())
    async with make("serial", double) as evaluator:
        await soon(evaluator.evaluate_async({"x": 1}))
        assert set(threading.enumerate()) == before


async def test_blocking_calls_on_the_home_loop_are_refused(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), max_pending=1) as evaluator:
        for opened in (False, True):
            for call, instead in (
                (lambda: evaluator.gather("ALL"), "gather_async"),
                (lambda: evaluator.gather("BATCH", 1), "gather_async"),
                (lambda: evaluator.evaluate({"x": 9}), "evaluate_async"),
                (evaluator.close, "aclose"),
                (lambda: evaluator.submit(configurations(9)), "submit_async"),
            ):
                with pytest.raises(RuntimeError, match=instead) as caught:
                    call()
                assert isinstance(caught.value, UsageError)
            if not opened:
                await stage.started(0).opened()
        stage.release_all()
        await soon(evaluator.gather_async("ALL"))


async def test_other_threads_may_call_synchronously(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2) as evaluator:
        stage.release_all()
        await in_thread(evaluator.submit, configurations(3))
        jobs = await in_thread(evaluator.gather, "ALL")
        assert outputs(jobs) == [0, 1, 2]
        job = await in_thread(evaluator.evaluate, {"x": 9})
        assert job.output == 9
        assert await in_thread(evaluator.close) == []
        await in_thread(evaluator.submit, configurations(1))
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0]


async def test_entering_twice_is_refused(method: str) -> None:
    async with make(method, double) as evaluator:
        with pytest.raises(UsageError, match="already"):
            async with evaluator:
                pytest.fail("it was entered twice")
        assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 2.0


async def test_entering_while_jobs_run_in_a_thread_is_refused(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method))
    evaluator.submit(configurations(1))
    with pytest.raises(UsageError, match="before 'async with'"):
        async with evaluator:
            pytest.fail("it was entered")
    stage.release(0)
    assert outputs(await soon(evaluator.gather_async("ALL"))) == [0]
    async with evaluator:  # nothing is in flight any more
        stage.release(1)
        assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 1


async def test_entering_again_after_leaving(method: str) -> None:
    evaluator = make(method, double)
    for _ in range(3):
        async with evaluator:
            await evaluator.submit_async(configurations(2))
            assert outputs(await soon(evaluator.gather_async("ALL"))) == [0.0, 2.0]


async def test_two_evaluators_in_one_block(method: str) -> None:
    async with make(method, double) as first, make(method, double) as second:
        await first.submit_async(configurations(2))
        await second.submit_async(configurations(3))
        assert len(await soon(second.gather_async("ALL"))) == 3
        assert len(await soon(first.gather_async("ALL"))) == 2


# -- leaving the block -------------------------------------------------------------------------------------------------


async def test_it_may_be_left_in_another_task(method: str, stage: Stage) -> None:
    """As fixtures and the hooks of a service's start and end do."""
    evaluator = make(method, stage.function(method))
    async with anyio.create_task_group() as group:
        group.start_soon(evaluator.__aenter__)
    stage.release(0)
    await evaluator.submit_async(configurations(2))
    assert outputs(await soon(evaluator.gather_async("BATCH", 1))) == [0]
    await stage.started(1).opened()
    async with anyio.create_task_group() as group:
        group.start_soon(evaluator.__aexit__, None, None, None)
    assert [job.status for job in evaluator.jobs] == [JobStatus.DONE, JobStatus.CANCELLED]
    async with evaluator:
        assert (await soon(evaluator.evaluate_async({"x": 0}))).output == 0


async def test_what_was_entered_may_be_left_in_any_order(method: str) -> None:
    first, second = make(method, double), make(method, double)
    await first.__aenter__()
    with anyio.CancelScope():
        await second.__aenter__()
        await first.submit_async(configurations(2))
        await second.submit_async(configurations(3))
        assert len(await soon(first.gather_async("ALL"))) == 2
        await first.__aexit__(None, None, None)
    assert len(await soon(second.gather_async("ALL"))) == 3
    await second.__aexit__(None, None, None)


async def test_what_is_submitted_while_the_block_ends_does_not_keep_it(method: str, stage: Stage) -> None:
    class Submits(Callback):
        def on_close(self) -> None:
            thread = threading.Thread(target=evaluator.submit, args=([{"x": "late"}],))
            thread.start()
            thread.join()

    async with make(method, stage.function(method), callbacks=[Submits()]) as evaluator:
        stage.release(0)
        assert (await soon(evaluator.evaluate_async({"x": 0}))).output == 0
    assert {job.status for job in evaluator.jobs} <= {JobStatus.CANCELLED}
    evaluator.callbacks.clear()
    stage.release(1)
    assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 1  # in a thread of its own
    await evaluator.aclose()


async def test_leaving_cancels_what_runs(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(3))
        await stage.started(1).opened()
        stage.release(0)
        await until_async(lambda: evaluator.statistics().done == 1)
        await stage.started(2).opened()
    statuses = [job.status for job in evaluator.jobs]
    assert statuses == [JobStatus.DONE, JobStatus.CANCELLED, JobStatus.CANCELLED]
    assert ids(evaluator.gather("ALL")) == ["0.0"]  # after the block the synchronous calls work here
    assert evaluator.num_jobs_gathered == 3


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), ExceptionGroup("mine", [ValueError(1)])]
)
async def test_an_exception_of_the_block_comes_out_as_it_is(method: str, stage: Stage, error: BaseException) -> None:
    caught: BaseException | None = None
    evaluator = make(method, stage.function(method))
    try:
        async with evaluator:
            await evaluator.submit_async(configurations(2))
            await stage.started(0).opened()
            raise error
    except BaseException as exc:  # noqa: BLE001 - whatever comes out is the point
        caught = exc
    assert caught is error
    assert {job.status for job in evaluator.jobs} == {JobStatus.CANCELLED}


async def test_a_cancellation_around_the_block_stays_with_its_scope(method: str, stage: Stage) -> None:
    with anyio.CancelScope() as scope:
        async with make(method, stage.function(method), num_workers=2) as evaluator:
            await evaluator.submit_async(configurations(3))
            await stage.started(1).opened()
            stage.release(0)
            await until_async(lambda: evaluator.statistics().done == 1)
            scope.cancel()
            await checkpoint()
            pytest.fail("the cancellation was swallowed")
    assert scope.cancelled_caught
    assert [job.status for job in evaluator.jobs] == [JobStatus.DONE, JobStatus.CANCELLED, JobStatus.CANCELLED]
    assert stage.seen
    assert {status for _, status in stage.seen} == {JobStatus.CANCELLING}  # the jobs were asked to stop
    # What was done before can still be gathered.
    assert outputs(job for job in evaluator.gather("ALL") if job.status is JobStatus.DONE) == [0]
    evaluator.submit([{"x": 0}])
    assert outputs(evaluator.gather("ALL")) == [0]
    evaluator.close()


async def test_a_cancellation_around_the_block_interrupts_a_gather(method: str, stage: Stage) -> None:
    gathered: list[Job] = []
    with anyio.CancelScope() as scope:
        async with make(method, stage.function(method), num_workers=2) as evaluator:
            await evaluator.submit_async(configurations(3))
            await stage.started(1).opened()
            stage.release(0)
            await until_async(lambda: evaluator.statistics().done == 1)
            scope.cancel()
            gathered += await evaluator.gather_async("ALL")
            await checkpoint()
            pytest.fail("the cancellation was swallowed")
    assert scope.cancelled_caught
    gathered += evaluator.gather("ALL")
    assert outputs(job for job in gathered if job.status is JobStatus.DONE) == [0]


async def test_a_cancelled_group_inside_the_block_stays_with_its_scope(method: str, stage: Stage) -> None:
    with anyio.CancelScope() as scope:
        async with make(method, stage.function(method)) as evaluator:
            await evaluator.submit_async(configurations(1))
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                group.start_soon(anyio.sleep_forever)
                await stage.started(0).opened()
                scope.cancel()
                await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert [job.status for job in evaluator.jobs] == [JobStatus.CANCELLED]


@pytest.mark.usefixtures("on_asyncio")
async def test_an_asyncio_timeout_around_the_block(method: str, stage: Stage) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), make(method, stage.function(method), num_workers=2) as evaluator:
            await evaluator.submit_async(configurations(2))
            stage.release(0)
            await evaluator.gather_async("ALL")
    assert evaluator.jobs[1].status is JobStatus.CANCELLED
    assert outputs(evaluator.gather("ALL")) == [0]


@pytest.mark.usefixtures("on_asyncio")
async def test_an_asyncio_task_in_the_block_can_be_cancelled(method: str, stage: Stage) -> None:
    async def main() -> None:
        async with evaluator:
            await evaluator.submit_async(configurations(2))
            await evaluator.gather_async("ALL")

    evaluator = make(method, stage.function(method), num_workers=1)
    task = asyncio.ensure_future(main())
    await stage.started(0).opened()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)
    assert {job.status for job in evaluator.jobs} == {JobStatus.CANCELLED}


# -- aclose and reuse --------------------------------------------------------------------------------------------------


async def test_aclose_returns_the_jobs_it_cancelled(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=1) as evaluator:
        await evaluator.submit_async(configurations(3))
        await stage.started(0).opened()
        stage.release(0)
        await stage.started(1).opened()
        cancelled = await soon(evaluator.aclose())
        assert ids(cancelled) == ["0.1", "0.2"]
        assert {job.status for job in cancelled} == {JobStatus.CANCELLED}
        assert await soon(evaluator.aclose()) == []
        assert ids(await soon(evaluator.gather_async("ALL"))) == ["0.0"]


async def test_it_opens_again_inside_and_after_the_block(method: str) -> None:
    async with make(method, double) as evaluator:
        for _ in range(3):
            await evaluator.submit_async(configurations(2))
            assert outputs(await soon(evaluator.gather_async("ALL"))) == [0.0, 2.0]
            assert await soon(evaluator.aclose()) == []
            assert await soon(evaluator.aclose()) == []
    await soon(evaluator.aclose())
    await evaluator.submit_async(configurations(2))  # in a thread of its own now
    assert outputs(evaluator.gather("ALL")) == [0.0, 2.0]
    await evaluator.submit_async(configurations(2))
    assert outputs(await soon(evaluator.gather_async("ALL"))) == [0.0, 2.0]
    assert await soon(evaluator.aclose()) == []
    assert evaluator.statistics().done == 10


async def test_aclose_needs_none_of_the_threads_that_a_program_has(method: str) -> None:
    """They may all wait for what happens after it."""
    evaluator = make(method, double)
    assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 2.0
    limiter = anyio.to_thread.current_default_thread_limiter()
    borrowers = [object() for _ in range(int(limiter.total_tokens))]
    for borrower in borrowers:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        with anyio.fail_after(20, shield=True):
            await evaluator.aclose()
    finally:
        for borrower in borrowers:
            limiter.release_on_behalf_of(borrower)


async def test_several_tasks_may_close_at_a_time(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method)) as evaluator:
        await evaluator.submit_async(configurations(3))
        returned: list[Job] = []

        async def close() -> None:
            returned.extend(await evaluator.aclose())

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(close)
        assert ids(returned) == ["0.0", "0.1", "0.2"]


async def test_a_cancelled_aclose_still_closes(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method)) as evaluator:
        await evaluator.submit_async(configurations(2))
        await stage.started(0).opened()
        with anyio.CancelScope() as scope:
            scope.cancel()
            await evaluator.aclose()
        assert {job.status for job in evaluator.jobs} == {JobStatus.CANCELLED}
        stage.release(7)
        assert (await soon(evaluator.evaluate_async({"x": 7}))).output == 7


@pytest.mark.usefixtures("on_asyncio")
async def test_an_aclose_cancelled_by_asyncio_leaves_a_usable_evaluator(method: str) -> None:
    """The job ends a while after it was asked to; meanwhile the closing task is cancelled."""
    asked, go = Latch(), Latch()

    async def coroutine(job: RunningJob) -> None:
        if job["x"] == 0:
            try:
                await anyio.sleep_forever()
            finally:
                asked.open()
                with anyio.CancelScope(shield=True):
                    await go.opened()

    def plain(job: RunningJob) -> None:
        if job["x"] == 0:
            while not job.stopped():
                go.peek(0.001)
            asked.open()
            go.wait()

    evaluator = make(method, coroutine if method == "serial" else plain)
    async with evaluator:
        await evaluator.submit_async(configurations(1))
        await until_async(lambda: evaluator.statistics().running == 1)
        closing = asyncio.ensure_future(evaluator.aclose())
        await asked.opened()
        closing.cancel()
        await checkpoint()
        go.open()
        with contextlib.suppress(asyncio.CancelledError):
            await soon(closing)
        job = await soon(evaluator.evaluate_async({"x": 1}))
        assert job.status is JobStatus.DONE
        assert evaluator.jobs[0].status is JobStatus.CANCELLED


async def test_exiting_by_hand_without_entering_does_no_harm(method: str) -> None:
    evaluator = make(method, double)
    await evaluator.__aexit__(None, None, None)
    assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 2.0
    await evaluator.aclose()


# -- without async with: a thread is the home --------------------------------------------------------------------------


async def test_async_methods_without_a_block(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method), num_workers=2)
    try:
        await evaluator.submit_async(configurations(3))
        stage.release(1)
        assert outputs(await soon(evaluator.gather_async("BATCH"))) == [1]
        stage.release(0, 2, 9)
        assert outputs([job async for job in evaluator.as_completed()]) == [0, 2]
        assert (await soon(evaluator.evaluate_async({"x": 9}))).output == 9
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 7})
            await stage.started(7).opened()
            group.cancel_scope.cancel()
        assert evaluator.storage.load_job_status("0.4") == JobStatus.CANCELLED.value
        await evaluator.submit_async([{"x": 8}])
        await stage.started(8).opened()
    finally:
        assert ids(await soon(evaluator.aclose())) == ["0.5"]


async def test_coroutines_without_a_block_run_elsewhere() -> None:
    async def run(job: RunningJob) -> int:
        return threading.get_ident()

    evaluator = make("serial", run)
    try:
        assert (await soon(evaluator.evaluate_async({}))).output != threading.get_ident()
        evaluator.submit([{}])
        (job,) = evaluator.gather("ALL")  # it blocks this loop, as any synchronous call does, and it works
        assert job.output != threading.get_ident()
    finally:
        await evaluator.aclose()


async def test_a_cancelled_gather_without_a_block_loses_nothing(method: str, stage: Stage) -> None:
    evaluator = make(method, stage.function(method), num_workers=2)
    try:
        await evaluator.submit_async(configurations(2))
        stage.release(0)
        with anyio.move_on_after(0.02):
            await evaluator.gather_async("ALL")
        stage.release(1)
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 1]
    finally:
        await evaluator.aclose()


# -- back-pressure -----------------------------------------------------------------------------------------------------


async def test_submit_waits_while_too_many_jobs_are_pending(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=1, max_pending=2) as evaluator:
        async with anyio.create_task_group() as group:
            submitted = Latch()

            async def submit() -> None:
                await evaluator.submit_async(configurations(5))
                submitted.open()

            group.start_soon(submit)
            await until_async(lambda: len(evaluator.jobs) == 3)  # one runs, two wait
            assert not submitted.is_open
            stage.release(0)
            await until_async(lambda: len(evaluator.jobs) >= 4)  # it may be in a batch with the next
            stage.release(1)
            await submitted.opened()
        stage.release_all()
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 1, 2, 3, 4]


async def test_closing_ends_a_waiting_submit(method: str, stage: Stage) -> None:
    async with make(method, stage.function(method), num_workers=1, max_pending=1) as evaluator:

        async def submit() -> None:
            with pytest.raises(EvaluatorClosedError, match=r"closed while submit\(\) waited .* 2 of 4 jobs were"):
                await evaluator.submit_async(configurations(4))

        async with anyio.create_task_group() as group:
            group.start_soon(submit)
            await stage.started(0).opened()
            await until_async(lambda: len(evaluator.jobs) == 2)
            stage.release_all()
            cancelled = await soon(evaluator.aclose())
        jobs = await soon(evaluator.gather_async("ALL"))
        assert len(evaluator.jobs) == 2
        assert ids(jobs + cancelled) == ids(evaluator.jobs)
        await soon(evaluator.submit_async(configurations(2)))  # it can be opened again
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0, 1]
