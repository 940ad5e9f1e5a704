"""What goes wrong, goes wrong for one job alone; what was done is kept; nothing hangs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from paraval import Evaluator, EvaluatorClosedError, HPOJob, Job, JobStatus, ParavalError, RunningJob, SerialEvaluator
from paraval.callback import Callback
from paraval.storage import JobChange, MemoryStorage
from support import (
    METHODS,
    WAIT_S,
    CountingStorage,
    FailingStorage,
    Latch,
    Program,
    Stage,
    configurations,
    double,
    ids,
    in_thread,
    in_threads,
    make,
    outputs,
    run_program,
    soon,
    until,
    until_async,
)

ENDS_WITHIN_S = 20.0
"""A program that waited for its jobs would take a minute."""
posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks as POSIX has them")


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


# -- jobs that raise ---------------------------------------------------------------------------------------------------


class NeedsArguments(Exception):  # noqa: N818 - the shape matters, not the name
    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right}")


class BrokenStr(Exception):  # noqa: N818 - likewise
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


POISONS: dict[str, Any] = {
    "ValueError": ValueError("poison"),
    "SystemExit": SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "StopIteration": StopIteration(1),
    "StopAsyncIteration": StopAsyncIteration(1),
    "CancelledError": asyncio.CancelledError(),
    "BaseException": BaseException("bare"),
    "BaseExceptionGroup": BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError(1)]),
    "MemoryError": MemoryError(),
    "RecursionError": RecursionError(),
    "NeedsArguments": NeedsArguments(1, 2),
    "BrokenStr": BrokenStr(),
}


def check_one_failure(jobs: list[Job], poisoned: int, name: str) -> None:
    by_x = {job.args["x"]: job for job in jobs}
    assert sorted(by_x) == list(range(50))
    assert {job.status for job in jobs} == {JobStatus.DONE}
    poison = by_x.pop(poisoned)
    assert all(job.error is None and job.output == {"objective": 1.0} for job in by_x.values())
    assert poison.error is not None
    assert poison.error.kind == "exception"
    assert poison.error.type == name
    assert poison.error.reason == f"F_{name}"
    assert poison.error.pid == os.getpid()
    assert isinstance(poison.error.message, str)
    assert poison.error.traceback is None or name in poison.error.traceback


@pytest.mark.parametrize("name", POISONS)
@pytest.mark.parametrize("batching", ["auto", 10])
def test_one_poison_among_fifty(method: str, name: str, batching: Any) -> None:
    def run(job: RunningJob) -> float:
        if job["x"] == 7:
            raise POISONS[name]
        return 1.0

    # A coroutine cannot raise StopIteration: Python turns it into RuntimeError.
    expected = "RuntimeError" if name == "StopIteration" and method == "serial" else name
    storage = CountingStorage()
    with make(method, run, num_workers=3, job_class=HPOJob, storage=storage, batching=batching) as evaluator:
        evaluator.submit(configurations(50))
        check_one_failure(evaluator.gather("ALL"), 7, expected)
        assert evaluator.evaluate({"x": 0}).error is None
        statistics = evaluator.statistics()
        assert (statistics.done, statistics.failed) == (50, 1)
    assert set(storage.terminal.values()) == {1}


@pytest.mark.parametrize("name", POISONS)
def test_one_poison_among_fifty_coroutines_in_threads(name: str) -> None:
    async def run(job: RunningJob) -> float:
        await asyncio.sleep(0)
        if job["x"] == 7:
            raise POISONS[name]
        return 1.0

    expected = "RuntimeError" if name == "StopIteration" else name
    with make("thread", run, num_workers=3, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(50))
        check_one_failure(evaluator.gather("ALL"), 7, expected)


@pytest.mark.anyio
@pytest.mark.parametrize("name", POISONS)
async def test_one_poison_among_fifty_on_any_loop(method: str, name: str) -> None:
    async def coroutine(job: RunningJob) -> float:
        await checkpoint()
        return plain(job)

    def plain(job: RunningJob) -> float:
        if job["x"] == 7:
            raise POISONS[name]
        return 1.0

    function = coroutine if method == "serial" else plain
    expected = "RuntimeError" if name == "StopIteration" and method == "serial" else name
    async with make(method, function, num_workers=3, job_class=HPOJob) as evaluator:
        await evaluator.submit_async(configurations(50))
        check_one_failure(await soon(evaluator.gather_async("ALL")), 7, expected)


def test_when_every_job_fails_every_job_is_gathered(method: str) -> None:
    def run(job: RunningJob) -> None:
        sys.exit(job["x"])

    with make(method, run, num_workers=2, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(200))
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 200
        assert {job[1] for job in jobs} == {"F_SystemExit"}  # type: ignore[index] # they are HPOJobs
        assert evaluator.statistics().failed == 200


def test_the_traceback_shows_the_run_function(method: str) -> None:
    def run(job: RunningJob) -> None:
        raise ValueError("poison")

    with make(method, run) as evaluator:
        error = evaluator.evaluate({}).error
        assert error is not None
        assert error.traceback is not None
        assert __file__ in error.traceback
        assert error.traceback.rstrip().endswith("ValueError: poison")


@pytest.mark.anyio
async def test_a_cancellation_the_job_made_itself_is_its_failure() -> None:
    async def run(job: RunningJob) -> str:
        if job["x"] == 1:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep(1)
            return "went on"
        if job["x"] == 2:
            with anyio.fail_after(0.01):
                await anyio.sleep(60)
        return "done"

    async with make("serial", run, num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(4))
        jobs = {job.args["x"]: job for job in await soon(evaluator.gather_async("ALL"))}
        assert [jobs[x].output for x in range(4)] == ["done", "went on", None, "done"]
        assert jobs[2].error is not None
        assert jobs[2].error.type == "TimeoutError"
        assert {job.status for job in jobs.values()} == {JobStatus.DONE}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the generator's own complaint
@pytest.mark.parametrize("num_workers", [1, 2])
async def test_a_scope_that_a_job_leaves_open_strikes_no_other(num_workers: int) -> None:
    async def numbers() -> AsyncIterator[int]:
        with anyio.move_on_after(0.05):
            yield 1
            yield 2

    kept: list[Any] = []

    async def run(job: RunningJob) -> int:
        if job["x"] == 0:
            generator = numbers()
            kept.append(generator)  # or it would be closed by whoever collects it
            await anext(generator)
        elif job["x"] < 6:
            await anyio.sleep(0.03)
        return int(job["x"])

    async with make("serial", run, num_workers=num_workers) as evaluator:
        for _ in range(2):
            await evaluator.submit_async(configurations(20))
            assert outputs(await soon(evaluator.gather_async("ALL"))) == list(range(20))


def test_a_job_that_cancels_its_own_task_cancels_no_other() -> None:
    async def run(job: RunningJob) -> int:
        if job["x"] == 0:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        elif job["x"] == 1:
            await asyncio.sleep(0)
        return int(job["x"])

    with make("serial", run) as evaluator:
        for _ in range(3):
            evaluator.submit(configurations(10))
            assert outputs(evaluator.gather("ALL")) == list(range(10))


def test_an_awaited_task_that_was_cancelled_is_the_failure_of_its_job() -> None:
    async def run(job: RunningJob) -> None:
        task = asyncio.ensure_future(asyncio.sleep(60))
        await asyncio.sleep(0)
        task.cancel()
        await task

    for method in METHODS:
        with make(method, run, num_workers=2) as evaluator:
            evaluator.submit(configurations(4))
            for job in evaluator.gather("ALL"):
                assert job.status is JobStatus.DONE
                assert job.error is not None
                assert job.error.type == "CancelledError"


def test_a_stopper_that_raises_is_the_failure_of_its_job(method: str) -> None:
    class Stopper:
        def stop(self) -> bool:
            raise LookupError("mine")

    def run(job: RunningJob) -> bool:
        return job.stopped()

    with make(method, run) as evaluator:
        evaluator._stopper = Stopper()
        job = evaluator.evaluate({"x": 1})
        assert job.error is not None
        assert job.error.type == "LookupError"


def test_a_stopper_that_cannot_be_copied_is_the_failure_of_its_job(method: str) -> None:
    class Stopper:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot be copied")

    with make(method, double) as evaluator:
        evaluator._stopper = Stopper()
        job = evaluator.evaluate({"x": 1})
        assert job.error is not None
        assert job.error.message == "cannot be copied"
        evaluator._stopper = None
        assert evaluator.evaluate({"x": 1}).output == 2.0


# -- callbacks that raise ----------------------------------------------------------------------------------------------


class Raising(Callback):
    """Raises in every method."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls: list[str] = []

    def _raise(self, method: str) -> None:
        self.calls.append(method)
        raise self.error

    def on_launch(self, job: Job) -> None:
        self._raise("launch")

    def on_done(self, job: Job) -> None:
        assert job.storage is not None
        if job.storage.load_job_status(job.id) != JobStatus.DONE.value:
            self.calls.append("not stored first")
        self._raise("done")

    def on_gather(self, local_jobs: list[Job], other_jobs: list[Job]) -> None:
        self._raise("gather")

    def on_close(self) -> None:
        self._raise("close")


class Counting(Callback):
    def __init__(self) -> None:
        self.done = 0

    def on_done(self, job: Job) -> None:
        self.done += 1


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), SystemExit(3), GeneratorExit(), asyncio.CancelledError(), BaseException("bare")],
    ids=repr,
)
def test_a_callback_that_raises_costs_no_job(
    method: str, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    raising, counting = Raising(error), Counting()
    evaluator = make(method, double, num_workers=2, callbacks=[raising, counting])
    with caplog.at_level(logging.ERROR, "paraval"), evaluator:
        evaluator.submit(configurations(3))
        assert outputs(evaluator.gather("ALL")) == [0.0, 2.0, 4.0]
        assert evaluator.evaluate({"x": 5}).output == 10.0
    assert sorted(raising.calls) == ["close"] + ["done"] * 4 + ["gather"] * 2 + ["launch"] * 4
    assert evaluator.statistics().callback_errors == 11
    assert counting.done == 4  # the callback after it is called all the same
    assert sum("on_done raised" in record.getMessage() for record in caplog.records) == 4


@pytest.mark.anyio
async def test_a_callback_that_raises_costs_no_job_on_any_loop(method: str) -> None:
    raising = Raising(ValueError("mine"))
    async with make(method, double, num_workers=2, callbacks=[raising]) as evaluator:
        await evaluator.submit_async(configurations(3))
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0.0, 2.0, 4.0]
    assert evaluator.statistics().callback_errors == len(raising.calls) == 8


def test_a_callback_hears_what_it_has_methods_for(method: str) -> None:
    class Listener:
        heard = 0

        def on_done(self, job: Job) -> None:
            self.heard += 1

    listener: Any = Listener()
    with make(method, double, callbacks=[listener]) as evaluator:
        assert evaluator.evaluate({"x": 1}).output == 2.0
        assert evaluator.statistics().callback_errors == 0
    assert listener.heard == 1


def test_a_callback_may_submit(method: str) -> None:
    class Chain(Callback):
        def on_done(self, job: Job) -> None:
            if job.args["x"] < 5:
                evaluator.submit([{"x": job.args["x"] + 1}])

    with make(method, double, callbacks=[Chain()]) as evaluator:
        evaluator.submit([{"x": 0}])
        jobs: list[Job] = []
        while batch := evaluator.gather("ALL"):
            jobs += batch
        assert outputs(jobs) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_a_callback_that_blocks_on_its_own_evaluator_is_told(method: str) -> None:
    class Foolish(Callback):
        def on_done(self, job: Job) -> None:
            evaluator.gather("ALL")

    with make(method, double, callbacks=[Foolish()]) as evaluator:
        evaluator.submit(configurations(2))
        assert len(evaluator.gather("ALL")) == 2
        assert evaluator.statistics().callback_errors == 2


# -- storage that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 10**9], ids=["once", "for ever"])
@pytest.mark.parametrize("first", range(16))
def test_a_storage_that_fails_is_never_taken_for_a_success(method: str, first: int, count: int) -> None:
    """Operation number ``first`` fails, or all from there on: nothing hangs, nothing unsaved is shown as done."""
    storage = FailingStorage(first, count)
    shown: list[Job] = []
    raised: list[OSError] = []
    try:
        evaluator = make(
            method, double, num_workers=2, storage=storage, job_class=HPOJob, batching=False, kill_grace=0.05
        )
    except OSError:
        assert first == 0
        return

    def attempt(call: Any) -> Any:
        try:
            return call() or []
        except OSError as exc:
            raised.append(exc)
            return []

    def check(jobs: list[Job]) -> None:
        for job in jobs:
            record = storage.load_job(job.id)
            assert JobStatus(record["status"]) is job.status
            assert job.status.is_terminal
            assert record["out"] == job.stored_output

    try:
        for round_ in range(3):
            attempt(lambda: evaluator.submit(configurations(2)))
            jobs = attempt(lambda: evaluator.gather("ALL"))
            check(jobs)
            shown += jobs
            job = attempt(partial(evaluator.evaluate, {"x": round_}))
            if job:
                check([job])
                shown.append(job)
    finally:
        attempt(evaluator.close)
    # What was saved can still be had.
    jobs = attempt(lambda: evaluator.gather("ALL"))
    check(jobs)
    shown += jobs
    attempt(evaluator.close)
    assert bool(raised) == storage.has_failed
    assert all(isinstance(exc, ParavalError) or "No space left" in str(exc) for exc in raised)
    assert len({job.id for job in shown}) == len(shown)
    done = {record.id for record in storage.scan(evaluator.search_id)[0] if record.status == JobStatus.DONE.value}
    assert done == {job.id for job in shown if job.status is JobStatus.DONE} | _evaluated_in_vain(evaluator, done)


def _evaluated_in_vain(evaluator: Any, done: set[str]) -> set[str]:
    """Jobs of ``evaluate`` that were saved at the second try, when their caller had been told of the failure."""
    return done - {job.id for job in evaluator.jobs}


@pytest.mark.anyio
@pytest.mark.parametrize("first", range(3, 9))
async def test_a_storage_that_fails_on_any_loop(method: str, first: int) -> None:
    storage = FailingStorage(first, 10**9)
    async with make(method, double, num_workers=2, storage=storage, batching=False, kill_grace=0.05) as evaluator:
        with pytest.raises(OSError, match="No space left"):
            for _ in range(4):
                await evaluator.submit_async(configurations(2))
                for job in await soon(evaluator.gather_async("ALL")):
                    assert storage.load_job_status(job.id) == JobStatus.DONE.value
        with pytest.raises(OSError, match="No space left"):
            await soon(evaluator.evaluate_async({"x": 1}))


class Switched(MemoryStorage):
    """Refuses updates while it is full."""

    full = False

    def update(self, changes: Sequence[JobChange]) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        super().update(changes)


@pytest.mark.parametrize("recovers", [True, False], ids=["recovers", "stays full"])
def test_close_tries_once_more_to_save_results(
    method: str, stage: Stage, recovers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Switched()
    evaluator = make(method, stage.function(method), storage=storage, kill_grace=0.05)
    evaluator.submit(configurations(1))
    stage.started(0).wait()
    storage.full = True
    stage.release(0)
    with pytest.raises(OSError, match="No space left"):
        evaluator.gather("ALL")
    storage.full = not recovers
    assert evaluator.close() == []
    jobs = evaluator.gather("ALL")
    if recovers:
        assert outputs(jobs) == [0]
        assert storage.load_job("0.0")["status"] == JobStatus.DONE.value
        assert storage.load_job("0.0")["out"] == 0
    else:
        assert jobs == []
        assert storage.load_job("0.0")["status"] == JobStatus.RUNNING.value
        assert any("never saved: 0.0" in record.getMessage() for record in caplog.records)
    assert evaluator.statistics().pending == evaluator.statistics().running == 0


def test_a_storage_failure_names_itself(method: str, caplog: pytest.LogCaptureFixture) -> None:
    storage = Switched()
    storage.full = True
    evaluator = make(method, double, storage=storage, kill_grace=0.05)
    with caplog.at_level(logging.CRITICAL + 1, "paraval"), evaluator:
        evaluator.submit(configurations(1))
        with pytest.raises(ParavalError, match=r"the storage failed.*No space left") as caught:
            evaluator.gather("ALL")
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value.__cause__, OSError)


def test_a_storage_failure_wakes_everyone_who_waits(method: str, stage: Stage) -> None:
    storage = Switched()

    def waiting(call: Any) -> Any:
        def wait() -> type[BaseException] | None:
            try:
                call()
            except OSError as exc:
                return type(exc)
            return None

        return wait

    def fail() -> None:
        until(lambda: evaluator.num_jobs_submitted == 4)
        stage.started(0).wait()
        storage.full = True
        stage.release(0)

    evaluator = make(method, stage.function(method), num_workers=3, storage=storage, kill_grace=0.1)
    with evaluator:
        evaluator.submit(configurations(2))
        errors = in_threads(
            waiting(lambda: evaluator.gather("ALL")),
            waiting(lambda: evaluator.gather("BATCH", 2)),
            waiting(lambda: evaluator.evaluate({"x": 2})),
            waiting(lambda: evaluator.evaluate({"x": 3})),
            fail,
        )
        assert None not in errors[:4]
        storage.full = False


# -- the loop goes away ------------------------------------------------------------------------------------------------


def leaves_a_worker(test: Callable[..., None]) -> Callable[..., None]:
    """Allow for the task of a worker that had not begun when its loop was stopped: Python says so at its collection."""
    for what in (
        "ignore:coroutine 'Worker.work' was never awaited:RuntimeWarning",
        "ignore:(?s).*Worker.work:pytest.PytestUnraisableExceptionWarning",
    ):
        test = pytest.mark.filterwarnings(what)(test)
    return test


@leaves_a_worker
def test_the_threads_loop_is_stopped_under_the_evaluator(caplog: pytest.LogCaptureFixture) -> None:
    async def run(job: RunningJob) -> int:
        if job["x"] == "stop":
            await until_async(lambda: evaluator._ledger._waiters)  # a gather that comes later is given the jobs
            asyncio.get_running_loop().stop()
            await asyncio.sleep(60)
        return 1

    storage = CountingStorage()
    evaluator = SerialEvaluator(run, num_workers=2, storage=storage)
    evaluator.submit([{"x": 0}])
    (done,) = evaluator.gather("ALL")
    evaluator.submit([{"x": "stop"}, {"x": "stop"}])
    with pytest.raises(EvaluatorClosedError, match="loop") as caught:
        evaluator.gather("ALL")
    assert isinstance(caught.value, ParavalError)
    assert isinstance(caught.value, RuntimeError)
    # A new submit opens it again, and the jobs that went down with the loop are accounted for.
    until(lambda: all(job.status.is_terminal for job in evaluator.jobs))
    evaluator.submit([{"x": 1}])
    jobs = evaluator.gather("ALL")
    assert {job.id: job.status.name for job in jobs} == {"0.1": "CANCELLED", "0.2": "CANCELLED", "0.3": "DONE"}
    assert evaluator.close() == []
    assert done.status is JobStatus.DONE
    assert set(storage.terminal.values()) == {1}


@leaves_a_worker
def test_an_evaluate_ends_when_the_loop_is_stopped() -> None:
    async def run(job: RunningJob) -> None:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(60)

    evaluator = SerialEvaluator(run)
    try:
        job = evaluator.evaluate({})
    except EvaluatorClosedError:
        pass
    else:
        assert job.status is JobStatus.CANCELLED
    evaluator.close()


class StoppedLoop:
    """A loop that is stopped inside an evaluator's block and runs no more, as when a GUI ends."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.loop = asyncio.new_event_loop()
        self.entered = Latch()
        self.stopped = Latch()
        self._evaluator = evaluator
        self._stopping = False
        self._task = self.loop.create_task(self._main())

    async def _main(self) -> None:
        async with self._evaluator:
            self.entered.open()
            await self.loop.create_future()

    def stop(self) -> None:
        """Stop it, once, from another thread."""
        if not self._stopping:
            self._stopping = True
            self.loop.call_soon_threadsafe(self.loop.stop)

    def run(self) -> None:
        """Run it until it is stopped."""
        self.loop.run_forever()
        self.stopped.open()

    def leave(self) -> None:
        """Run it once more after all, to leave the block in peace."""
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            self.loop.run_until_complete(self._task)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


CALLS: dict[str, Callable[[Evaluator], object]] = {
    "gather": lambda evaluator: evaluator.gather("ALL"),
    "gather_async": lambda evaluator: asyncio.run(evaluator.gather_async("ALL")),
    "evaluate": lambda evaluator: evaluator.evaluate({"x": 1}),
    "close": lambda evaluator: evaluator.close(),
}


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except EvaluatorClosedError:
        return "raised"
    return "returned"


@pytest.mark.parametrize("call", CALLS)
def test_the_callers_loop_is_stopped_under_a_call_of_another_thread(method: str, stage: Stage, call: str) -> None:
    """Whoever waits in a thread must hear of it, and whoever comes later too."""
    evaluator = make(method, stage.function(method, polite=False), kill_grace=0.05)
    stopped = StoppedLoop(evaluator)
    results: list[str] = []

    def in_another_thread() -> None:
        try:
            stopped.entered.wait()
            evaluator.submit([{"x": 0}])
            stage.started(0).wait()
            if call.startswith("gather"):
                threading.Timer(0.05, stopped.stop).start()
            else:
                stopped.stop()
                stopped.stopped.wait()
            results.append(outcome(lambda: CALLS[call](evaluator)))
        finally:
            stopped.stop()

    thread = threading.Thread(target=in_another_thread, daemon=True)
    thread.start()
    stopped.run()
    thread.join(WAIT_S)
    stage.release_all()
    stopped.leave()
    assert results == ["returned" if call == "close" else "raised"]


@pytest.mark.parametrize("call", CALLS)
def test_the_callers_loop_was_stopped_before_it_had_work(method: str, call: str) -> None:
    evaluator = make(method, double, kill_grace=0.05)
    stopped = StoppedLoop(evaluator)
    results: list[str] = []

    def in_another_thread() -> None:
        stopped.entered.wait()
        stopped.stop()
        stopped.stopped.wait()

        def submit_and_call() -> None:
            if call.startswith("gather"):
                evaluator.submit([{"x": 0}])
            CALLS[call](evaluator)

        results.append(outcome(submit_and_call))

    thread = threading.Thread(target=in_another_thread, daemon=True)
    thread.start()
    stopped.run()
    thread.join(WAIT_S)
    stopped.leave()
    assert results == ["returned" if call == "close" else "raised"]


def test_the_thread_of_a_stopped_loop_can_close(method: str, stage: Stage) -> None:
    """The loop was stopped, not left: its own thread, which runs no loop now, must not be refused for ever."""
    evaluator = make(method, stage.function(method), kill_grace=0.05)
    stopped = StoppedLoop(evaluator)
    stopped.loop.call_soon(evaluator.submit, configurations(1))

    def stop() -> None:
        stage.started(0).wait()
        stopped.stop()

    threading.Thread(target=stop, daemon=True).start()
    stopped.run()
    try:
        with pytest.raises(EvaluatorClosedError):
            evaluator.gather("ALL")
        assert ids(evaluator.close()) == ["0.0"]
    finally:
        stage.release_all()
        stopped.leave()


@pytest.mark.parametrize("again", ["submit", "close"])
def test_the_callers_loop_was_closed_and_the_evaluator_works_on(method: str, again: str) -> None:
    """The loop was closed inside the block; every job that went down with it is still handed over, once."""
    program = run_program(
        f"""
        import asyncio, threading, time
        from paraval import Evaluator, EvaluatorClosedError

        def run(job):
            if job["x"] == 0:
                release.wait(20)
            return job["x"]

        async def run_async(job):
            if job["x"] == 0:
                await asyncio.sleep(60)
            return job["x"]

        async def main():
            async with evaluator:
                evaluator.submit([dict(x=x) for x in range(3)])
                while evaluator.statistics().running == 0:
                    await asyncio.sleep(0.001)
                loop.stop()
                await loop.create_future()

        release = threading.Event()
        function = run_async if {method!r} == "serial" else run
        evaluator = Evaluator.create(function, {method!r}, dict(kill_grace=0.1, batching=False))
        loop = asyncio.new_event_loop()
        task = loop.create_task(main())
        loop.run_forever()
        loop.close()
        try:
            evaluator.gather("ALL")
        except EvaluatorClosedError:
            print("raised")
        jobs = evaluator.close() if {again!r} == "close" else []
        evaluator.submit([dict(x=7)])
        jobs += evaluator.gather("ALL")
        release.set()
        jobs += evaluator.close()
        print(sorted((job.args["x"], job.status.name) for job in jobs))
        print(evaluator.num_jobs_submitted, evaluator.num_jobs_gathered, evaluator.statistics().cancelled)
        """
    )
    assert program.stdout == [
        "raised",
        "[(0, 'CANCELLED'), (1, 'CANCELLED'), (2, 'CANCELLED'), (7, 'DONE')]",
        "4 4 3",
    ], program.stderr
    assert program.code == 0


def test_loops_may_come_and_go(method: str) -> None:
    evaluator = make(method, double, num_workers=2)

    async def main() -> list[Any]:
        async with evaluator:
            await evaluator.submit_async(configurations(2))
            return outputs(await evaluator.gather_async("ALL"))

    for _ in range(3):
        assert asyncio.run(main()) == [0.0, 2.0]
        evaluator.submit(configurations(2))
        assert outputs(evaluator.gather("ALL")) == [0.0, 2.0]
        evaluator.close()


@pytest.mark.anyio
async def test_a_gather_of_another_thread_ends_with_the_block(method: str, stage: Stage) -> None:
    async with anyio.create_task_group() as group:
        batches: list[list[Job]] = []

        async def gather() -> None:
            batches.append(await in_thread(evaluator.gather, "ALL"))

        async with make(method, stage.function(method)) as evaluator:
            await evaluator.submit_async(configurations(2))
            group.start_soon(gather)
            await stage.started(0).opened()
            stage.release(0)
            await until_async(lambda: evaluator.statistics().done == 1)
        await until_async(lambda: batches)
    assert ids(batches[0] + evaluator.gather("ALL")) == ["0.0"]


# -- a program that forgets to close -----------------------------------------------------------------------------------


FORGETFUL = """
    import sys, threading, time
    from paraval import Evaluator, RunningJob
    from paraval.callback import Callback

    class Closing(Callback):
        def on_close(self):
            print("closed", flush=True)

    def run(job):
        if job["x"] == 1:
            started.set()
            time.sleep(60)

    async def run_async(job):
        if job["x"] == 1:
            started.set()
            await __import__("anyio").sleep(60)

    started = threading.Event()
    method = {method!r}
    evaluators = [
        Evaluator.create(
            run if method == "thread" else run_async, method, dict(num_workers=2, callbacks=[Closing()])
        )
        for _ in range({count})
    ]
    for evaluator in evaluators:
        started.clear()
        evaluator.submit([dict(x=x) for x in range(3)])
        assert started.wait(20)
    print("leaving", flush=True)
"""


@pytest.mark.parametrize(
    "options", [[], ["-X", "dev"], ["-W", "error::ResourceWarning"]], ids=["plain", "dev", "warnings are errors"]
)
def test_a_program_that_forgets_to_close_ends_and_is_told(method: str, options: list[str]) -> None:
    with Program(FORGETFUL.format(method=method, count=3), *options) as program:
        left = program.read_until("leaving")
        ended = program.wait()
        assert ended - left < ENDS_WITHIN_S
        assert program.code == 0
        assert program.stdout.count("closed") == 3  # its callbacks' files are complete
        assert ("was not closed" in program.stderr) == bool(options)
        assert ("ResourceWarning" in program.stderr) == bool(options)
        assert "Fatal Python error" not in program.stderr


def test_a_program_that_ends_with_an_exception_ends_in_time(method: str) -> None:
    source = FORGETFUL.format(method=method, count=1) + "    raise SystemExit(7)\n"
    with Program(source) as program:
        left = program.read_until("leaving")
        assert program.wait() - left < ENDS_WITHIN_S
        assert program.code == 7
        assert "closed" in program.stdout


def test_a_program_that_blocks_the_loop_ends_in_time() -> None:
    source = FORGETFUL.format(method="serial", count=1).replace('await __import__("anyio").sleep(60)', "time.sleep(60)")
    with Program(source) as program:
        left = program.read_until("leaving")
        assert program.wait() - left < ENDS_WITHIN_S
        assert program.code == 0


def test_a_long_grace_does_not_keep_a_program_from_ending(method: str) -> None:
    source = FORGETFUL.format(method=method, count=1).replace("num_workers=2", "num_workers=2, kill_grace=50.0")
    with Program(source) as program:
        left = program.read_until("leaving")
        assert program.wait() - left < ENDS_WITHIN_S


def test_a_program_that_closes_is_not_told_anything(method: str) -> None:
    program = run_program(
        f"""
        from paraval import Evaluator
        async def run_async(job): return 1.0
        def run(job): return 1.0
        function = run_async if {method!r} == "serial" else run
        with Evaluator.create(function, {method!r}) as evaluator:
            evaluator.submit([{{}}])
            evaluator.gather("ALL")
        never_used = Evaluator.create(function, {method!r})
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert (program.code, program.complaints) == (0, [])


def test_an_async_program_leaves_nothing_behind(method: str) -> None:
    for runner in ("asyncio.run(main())", "trio.run(main)"):
        if "trio" in runner:
            pytest.importorskip("trio", reason="trio is not installed (extra 'trio')")
        program = run_program(
            f"""
            import {runner.partition(".")[0]}
            from paraval import Evaluator
            async def run_async(job): return 1.0
            def run(job): return 1.0

            async def main():
                function = run_async if {method!r} == "serial" else run
                async with Evaluator.create(function, {method!r}, dict(num_workers=3)) as evaluator:
                    await evaluator.submit_async([{{}}] * 10)
                    assert len(await evaluator.gather_async("ALL")) == 10

            {runner}
            """,
            "-X",
            "dev",
            "-W",
            "error",
        )
        assert (program.code, program.complaints) == (0, [])


COLLECTED = """
    import gc, threading, time, warnings
    from paraval import Evaluator

    async def run_async(job):
        started.set()
        await __import__("anyio").sleep(60)

    def run(job):
        started.set()
        while not job.stopped():
            time.sleep(0.001)

    started = threading.Event()
    method = {method!r}
    evaluator = Evaluator.create(run_async if method == "serial" else run, method)
    evaluator.submit([{{}}])
    assert started.wait(20)
    evaluator.jobs.clear()
    del evaluator
    gc.collect()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("paraval") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.005)
    print("all threads have ended")
"""


@pytest.mark.parametrize(
    "options", [[], ["-X", "dev"], ["-W", "error::ResourceWarning"]], ids=["plain", "dev", "warnings are errors"]
)
def test_an_evaluator_that_is_collected_ends_and_says_so(method: str, options: list[str]) -> None:
    program = run_program(COLLECTED.format(method=method), *options)
    assert program.stdout == ["all threads have ended"], program.stderr
    assert program.code == 0
    assert ("was not closed" in program.stderr) == bool(options)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


SWEEP = """
    import asyncio, sys, threading, time
    from paraval import Evaluator, JobStatus

    def finish(evaluator):
        print("interrupted", flush=True)
        jobs = evaluator.gather("ALL")
        print("kept", sorted(job.output for job in jobs if job.status is JobStatus.DONE), flush=True)
        print("cancelled", sum(job.status is JobStatus.CANCELLED for job in evaluator.jobs), flush=True)

    def run(job):
        if job["x"] < 2:
            return job["x"]
        both.wait(20)
        time.sleep(60)

    async def run_async(job):
        if job["x"] < 2:
            return job["x"]
        await __import__("anyio").sleep(60)

    def say_ready():
        deadline = time.monotonic() + 20
        # A signal that meets Thread.start() may come out as a RuntimeError: of threading's own locks, not of ours.
        while not started or evaluator.statistics().done < 2 or evaluator.statistics().running < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        print("ready", flush=True)

    started = []
    both = threading.Barrier(2)
    method = {method!r}
    evaluator = Evaluator.create(
        run if method == "thread" else run_async, method, dict(num_workers=2, kill_grace=0.1, batching=False)
    )
"""

SYNC_SWEEP = (
    SWEEP
    + """
    evaluator.submit([dict(x=x) for x in range(6)])
    try:
        with evaluator:
            threading.Thread(target=say_ready, daemon=True).start()
            started.append(True)
            evaluator.gather("ALL")
    except KeyboardInterrupt:
        finish(evaluator)
        raise
"""
)

ASYNC_SWEEP = (
    SWEEP
    + """
    async def main():
        async with evaluator:
            await evaluator.submit_async([dict(x=x) for x in range(6)])
            threading.Thread(target=say_ready, daemon=True).start()
            started.append(True)
            await evaluator.gather_async("ALL")

    try:
        {runner}
    except KeyboardInterrupt:
        finish(evaluator)
        raise
"""
)


def check_interrupted(source: str, *, calls: int = 1) -> None:
    with Program(source) as program:
        program.read_until("ready")
        sent = program.send(signal.SIGINT)
        program.read_until("interrupted")
        ended = program.wait()
        assert ended - sent < ENDS_WITHIN_S
        assert program.stdout[-2:] == ["kept [0, 1]", "cancelled 4"]
        assert program.stderr.rstrip().endswith("KeyboardInterrupt")
        assert program.code in (-signal.SIGINT, 130, 1)


@posix
def test_ctrl_c_in_a_sync_gather(method: str) -> None:
    check_interrupted(SYNC_SWEEP.format(method=method))


@posix
@pytest.mark.parametrize(
    "runner", ["asyncio.run(main())", "__import__('trio').run(main)", "__import__('uvloop').run(main())"]
)
def test_ctrl_c_in_an_async_block(method: str, runner: str) -> None:
    for library in ("trio", "uvloop"):
        if library in runner:
            pytest.importorskip(library, reason=f"{library} is not installed (extra 'trio', dependency group 'test')")
    check_interrupted(ASYNC_SWEEP.format(method=method, runner=runner))


@posix
@pytest.mark.parametrize("how", ["evaluate", "without with"])
def test_ctrl_c_in_other_sync_calls(method: str, how: str) -> None:
    call = 'evaluator.evaluate({"x": 5})' if how == "evaluate" else 'evaluator.gather("ALL")'
    source = (
        SWEEP.format(method=method)
        + f"""
    evaluator.submit([dict(x=x) for x in range(5)])
    threading.Thread(target=say_ready, daemon=True).start()
    started.append(True)
    {call}
"""
    )
    with Program(source) as program:
        program.read_until("ready")
        sent = program.send(signal.SIGINT)
        assert program.wait() - sent < ENDS_WITHIN_S
        assert program.stderr.rstrip().endswith("KeyboardInterrupt")
        assert program.code in (-signal.SIGINT, 130, 1)


@posix
@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_ctrl_c_while_a_job_is_at_work_on_the_loop_is_not_that_jobs(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed (extra 'trio')")
    program = run_program(
        f"""
        import signal, anyio
        from paraval import Evaluator

        async def run(job):
            if job["x"] == 1:
                signal.raise_signal(signal.SIGINT)
            await anyio.sleep(0)

        async def main():
            async with evaluator:
                evaluator.submit([dict(x=x) for x in range(4)])
                await evaluator.gather_async("ALL")
                await anyio.sleep(60)

        evaluator = Evaluator.create(run, "serial")
        try:
            anyio.run(main, backend={library!r})
        except KeyboardInterrupt:
            print([job.error.type for job in evaluator.jobs if job.error and job.error.kind == "exception"])
        """
    )
    assert program.stdout == ["[]"], program.stderr


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_a_block_that_is_never_left_ends_with_its_loop(method: str, stage: Stage, library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed (extra 'trio')")
    evaluator = make(method, stage.function(method), kill_grace=0.1)

    async def main() -> None:
        await evaluator.__aenter__()
        await evaluator.submit_async(configurations(3))
        await stage.started(0).opened()

    anyio.run(main, backend=library)
    assert {job.status for job in evaluator.jobs} == {JobStatus.CANCELLED}
    assert len(evaluator.gather("ALL")) == 3
    stage.release(9)
    assert evaluator.evaluate({"x": 9}).output == 9  # in a thread of its own
    evaluator.close()


STUBBORN = """
        while not job.stopped():
            time.sleep(0.005)
        print("asked to stop\\n", end="", flush=True)  # in one piece: several threads say it
        time.sleep(60)
"""
STUBBORN_ASYNC = """
        import anyio
        try:
            await anyio.sleep(60)
        finally:
            print("asked to stop\\n", end="", flush=True)
            with anyio.CancelScope(shield=True):
                await anyio.sleep(60)
"""


@posix
def test_ctrl_c_again_while_it_closes(method: str) -> None:
    source = SYNC_SWEEP.format(method=method).replace("kill_grace=0.1", "kill_grace=1.0")
    source = source.replace("        time.sleep(60)\n", STUBBORN).replace(
        '        await __import__("anyio").sleep(60)\n', STUBBORN_ASYNC
    )
    with Program(source) as program:
        program.read_until("ready")
        sent = program.send(signal.SIGINT)
        program.read_until("asked to stop")
        program.send(signal.SIGINT)
        assert program.wait() - sent < ENDS_WITHIN_S


# -- fork --------------------------------------------------------------------------------------------------------------


@posix
def test_a_forked_child_is_told_and_the_parent_unharmed(method: str) -> None:
    program = run_program(
        f"""
        import os, signal, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        from paraval import Evaluator, ParavalError
        from paraval.errors import ForkedError

        async def run_async(job): return job["x"]
        def run(job): return job["x"]

        evaluator = Evaluator.create(run_async if {method!r} == "serial" else run, {method!r}, dict(num_workers=2))
        evaluator.submit([dict(x=0)])
        evaluator.gather("ALL")
        evaluator.submit([dict(x=1)])
        child = os.fork()
        if child == 0:
            signal.alarm(15)  # it must not outlive a test that failed
            told = 0
            for call in (
                lambda: evaluator.submit([dict(x=2)]),
                lambda: evaluator.gather("ALL"),
                lambda: evaluator.evaluate(dict(x=2)),
                lambda: evaluator.close(),
                lambda: evaluator.gather_other_jobs_done(),
            ):
                try:
                    call()
                except ForkedError as exc:
                    assert isinstance(exc, ParavalError) and isinstance(exc, RuntimeError)
                    assert str(os.getpid()) in str(exc) and "child" in str(exc)
                    told += 1
            evaluator.statistics()
            evaluator.timeout = 5
            with Evaluator.create(run, "thread") as own:  # a new one works
                own.submit([dict(x=7)])
                told += own.gather("ALL")[0].output
            sys.exit(told)
        _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))
        evaluator.submit([dict(x=2)])
        print("parent", sorted(job.output for job in evaluator.gather("ALL")))
        evaluator.close()
        """,
    )
    assert program.stdout == ["child 12", "parent [1, 2]"], program.stderr
    assert program.stderr == ""


@posix
def test_a_forked_child_may_just_end(method: str) -> None:
    """Neither its atexit nor its collector touches the parent's evaluator."""
    program = run_program(
        f"""
        import gc, os, signal, sys, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from paraval import Evaluator

        async def run_async(job): await __import__("anyio").sleep(0.3)
        def run(job): time.sleep(0.3)

        evaluator = Evaluator.create(run_async if {method!r} == "serial" else run, {method!r})
        evaluator.submit([{{}}])
        child = os.fork()
        if child == 0:
            signal.alarm(15)
            del evaluator
            gc.collect()
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))
        print("parent", len(evaluator.gather("ALL")), evaluator.jobs[0].status.name)
        evaluator.close()
        """,
        "-W",
        "default::ResourceWarning",
    )
    assert program.stdout == ["child 0", "parent 1 DONE"], program.stderr
    assert program.stderr == ""


# -- the clock jumps ---------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_no_duration(method: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    jumps = iter([-86400.0, 86400.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with make(method, stage.function(method), num_workers=2, job_timeout=30) as evaluator:
        evaluator.timeout = 30
        evaluator.submit(configurations(4))
        stage.release_all()
        jobs = evaluator.gather("ALL")
        assert {job.status for job in jobs} == {JobStatus.DONE}
        for job in jobs:
            submitted, started, finished, gathered = job.timing
            assert submitted is not None
            assert started is not None
            assert finished is not None
            assert gathered is not None
            assert 0 <= submitted <= started <= finished <= gathered < 20
        assert evaluator.time_left is not None
        assert 0 < evaluator.time_left <= 30
        assert 0 <= evaluator.statistics().utilisation <= 1
