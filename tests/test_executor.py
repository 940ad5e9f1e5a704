"""Jobs in executors that others made: Python's own, and somebody's own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import paraval.storage
import runfunctions
from paraval import ExecutorEvaluator, JobStatus, ParavalError, RunningJob
from paraval.storage import MemoryStorage
from paraval.worker.board import Address
from paraval.worker.remote import Report
from runfunctions import Flags, double, sometimes_wrong, wrong_configuration
from support import CountingStorage, Stage, configurations, outputs, soon, until, until_async
from workers import (
    Driver,
    ThreadEach,
    by_x,
    error_of,
    errors,
    is_alive,
    needs_loky,
    polite,
    processes,
    threads,
    timed_out,
    worker_marks,
)
from workers import make_in as make
from workers import run_in as run

pytestmark = worker_marks


class AtOnce(ThreadEach):
    """Makes the call in submit, so that the future has ended before anybody can wait for it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.call(fn, *args, **kwargs))
        return future


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "threads": threads,
    "processes": processes,
    "own": ThreadEach,
    "at-once": AtOnce,
}


@pytest.fixture(params=EXECUTORS)
def factory(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    return EXECUTORS[request.param]


# -- what runs, and where ----------------------------------------------------------------------------------------------


def test_functions_of_all_kinds(factory: Callable[[], Executor]) -> None:
    scale = 2

    async def coroutine(job: RunningJob) -> Any:
        await asyncio.sleep(0)
        return job["x"] * scale

    executor = factory()
    for function in (double, lambda job: job["x"] * scale, runfunctions.Scaler(2).method, coroutine):
        jobs = run(function, executor, configurations(5), num_workers=2)
        assert errors(jobs) == []
        assert [job.output for job in jobs] == [0, 2, 4, 6, 8]
    executor.shutdown()


@pytest.mark.anyio
async def test_a_flood_on_every_loop(factory: Callable[[], Executor]) -> None:
    storage = CountingStorage()
    async with make(double, factory, num_workers=2, storage=storage) as evaluator:
        await evaluator.submit_async(configurations(500))
        jobs = await soon(evaluator.gather_async("ALL"))
        assert errors(jobs) == []
        assert outputs(jobs) == [2 * x for x in range(500)]
        assert (await soon(evaluator.evaluate_async({"x": 7}))).output == 14
    assert set(storage.terminal.values()) == {1}


def test_an_executor_that_was_given_is_not_shut_down_and_one_that_was_made_is() -> None:
    made: list[ThreadPoolExecutor] = []

    def factory() -> ThreadPoolExecutor:
        made.append(threads())
        return made[-1]

    with threads() as given:
        for executor in (given, factory):
            evaluator = make(double, executor)
            for _ in range(2):  # a submit after the close opens it again
                assert evaluator.evaluate({"x": 1}).output == 2
                evaluator.close()
        assert given.submit(int, "3").result() == 3
    assert len(made) == 2
    for executor in made:
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(int)


def test_several_evaluators_share_an_executor() -> None:
    with processes() as executor, make(double, executor) as first, make(runfunctions.echo, executor) as second:
        for evaluator in (first, second):
            evaluator.submit(configurations(20))
        assert outputs(first.gather("ALL")) == [2 * x for x in range(20)]
        assert outputs(second.gather("ALL")) == list(range(20))


def test_in_threads_a_job_shares_the_objects_of_the_program() -> None:
    lock = threading.Lock()  # cannot be sent anywhere
    seen: list[object] = []
    (job,) = run(lambda job: seen.append(job["lock"]), threads, [{"lock": lock}])
    assert job.error is None
    assert seen == [lock]


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "large"])
def test_static_arguments_reach_every_process(size: int, flags: Flags) -> None:
    def function(job: RunningJob, data: bytes) -> Any:
        flags.put(f"pid-{os.getpid()}")
        until(lambda: len(flags.names("pid-")) == 2)  # both work
        return len(data), os.getpid()

    jobs = run(function, processes, configurations(30), num_workers=2, run_function_kwargs={"data": bytes(size)})
    assert errors(jobs) == []
    assert {job.output[0] for job in jobs} == {size}
    assert len({job.output[1] for job in jobs} - {os.getpid()}) == 2


@pytest.mark.parametrize("executor", [processes, threads])
@pytest.mark.parametrize("exception", [ValueError, SystemExit, KeyboardInterrupt, TimeoutError])
def test_what_a_coroutine_raises_is_its_error(
    executor: Callable[[], Executor], exception: type[BaseException], flags: Flags
) -> None:
    async def function(job: RunningJob) -> float:
        if flags.count("calls") < job["x"]:
            raise exception("the real reason")
        return 1.0

    with make(function, executor, retry_on=exception, max_attempts=2) as evaluator:
        assert evaluator.evaluate({"x": 2}).output == 1.0
        job = evaluator.evaluate({"x": 9})
        assert job.error is not None
        assert (job.error.type, job.error.message, job.error.attempts) == (exception.__name__, "the real reason", 2)


def test_a_long_job_in_a_batch_gives_the_others_back(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.count(str(job["x"]))
        if job["x"] == 3:
            time.sleep(0.02)
        return job["x"]

    jobs = run(function, processes, configurations(40), num_workers=1, batching=20)
    assert errors(jobs) == []
    assert [job.output for job in jobs] == list(range(40))
    assert all(flags.text(f"count-{x}") == "1" for x in range(40))


@pytest.mark.parametrize("kind", ["processes", "own"])
def test_what_a_job_stores_arrives_with_its_outcome(kind: str) -> None:
    def function(job: RunningJob) -> Any:
        search = str(job.id).rpartition(".")[0]
        for budget in (1, 2):
            job.record(budget, budget * 0.5)
        job.storage.store_job_metadata(str(job.id), "note", job["x"])
        job.storage.store_search_value(search, "said", "hello")
        refused = ""
        try:
            job.storage.load_job(f"{search}.77")
        except KeyError as exc:
            refused = str(exc)
        assert "knows its own record" in refused
        if job["x"] == 1:
            raise LookupError("after all that")
        return [job.storage.load_job(str(job.id))["intermediate"], job.storage.load_search_value(search, "said")]

    storage = MemoryStorage()
    first, second = run(function, EXECUTORS[kind], configurations(2), storage=storage)
    intermediate = {"budget": [1, 2], "objective": [0.5, 1.0]}
    assert first.output == [intermediate, "hello"]
    assert error_of(second) == ("exception", "after all that")
    for job in (first, second):
        record = storage.load_job(job.id)
        assert record["intermediate"] == intermediate
        assert record["metadata"]["note"] == job.args["x"]
    assert storage.load_search_value("0", "said") == "hello"


class OnAnotherMachine(ThreadEach):
    """Cannot see the files of this one."""

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        *rest, _address, number = args
        return super().call(fn, *rest, Address("/nowhere/to/be/found"), number, **kwargs)


@pytest.mark.parametrize("store", ["SqliteStorage", "SharedMemoryStorage"])
@pytest.mark.parametrize("executor", [processes, OnAnotherMachine])
def test_a_job_uses_a_storage_that_other_processes_can_use(
    executor: Callable[[], Executor], store: str, flags: Flags, tmp_path: Path
) -> None:
    is_here = executor is processes

    def function(job: RunningJob) -> Any:
        job.record(1, 0.5)
        if is_here:
            flags.put("recorded")
            flags.wait("seen")
            assert job.storage.load_all_job_ids(str(job.id).rpartition(".")[0]) == [str(job.id)]
        return type(job.storage).__name__

    make_storage = getattr(paraval.storage, store)
    with make_storage(tmp_path / "store") if store == "SqliteStorage" else make_storage() as storage:
        with make(function, executor, storage=storage) as evaluator:
            evaluator.submit(configurations(1))
            if is_here:
                flags.wait("recorded")
                assert storage.load_job(evaluator.jobs[0].id)["intermediate"]["objective"] == [0.5]
                flags.put("seen")
            (job,) = evaluator.gather("ALL")
        assert job.error is None
        assert job.output == (store if is_here else "Notebook")
        assert storage.load_job(job.id)["intermediate"]["objective"] == [0.5]


def test_a_stopper_stops_its_job() -> None:
    def function(job: RunningJob) -> Any:
        step = 0
        while not job.stopped():
            step += 1
            job.record(step, step)
        return step

    with make(function, processes) as evaluator:
        evaluator._spec.stopper = runfunctions.Patience()
        assert evaluator.evaluate({}).output == 3


class Elsewhere(ThreadEach):
    """As if on a machine whose clock has nothing to do with ours."""

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        report: Report = super().call(fn, *args, **kwargs)
        moved = [done._replace(started=done.started - 9e6, finished=done.finished - 9e6) for done in report.done]
        return report._replace(done=moved)


@pytest.mark.parametrize("executor", [processes, Elsewhere])
def test_times_are_on_the_evaluators_clock(executor: Callable[[], Executor]) -> None:
    jobs = run(lambda _job: time.sleep(0.01), executor, configurations(4), num_workers=2)
    for job in jobs:
        submitted, started, finished, gathered = job.timing
        assert None not in (submitted, started, finished, gathered)
        assert submitted <= started <= finished <= gathered  # type: ignore[operator] # the line above sees to it
        assert job.timing.ran is not None
        assert job.timing.ran >= 0.0099


# -- what is refused ---------------------------------------------------------------------------------------------------


def _broken_factory() -> Executor:
    raise LookupError("no executor to be had")


@pytest.mark.parametrize(
    ("executor", "builtin", "message"),
    [
        (None, TypeError, r"executor must be a concurrent\.futures\.Executor, or a function .* not None"),
        (3, TypeError, r"executor must be .* not 3"),
        (dict, TypeError, r"what the factory builtins\.dict makes must be a concurrent\.futures\.Executor, not \{\}"),
        (_broken_factory, ValueError, r"the factory of executors .*_broken_factory failed: LookupError: no executor"),
    ],
)
def test_a_bad_executor_is_refused(executor: Any, builtin: type[Exception], message: str) -> None:
    with pytest.raises(builtin, match=message) as caught:
        make(double, executor)
    assert isinstance(caught.value, ParavalError)


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"variable 'lock'.*cannot be pickled") as caught:
        make(lambda job: lock.locked(), processes)
    assert isinstance(caught.value, ParavalError)

    def function(job: RunningJob) -> Any:
        return {"deep": [1, threading.Lock()]} if job["x"] == 1 else 0

    jobs = run(function, processes, [{"x": {"y": [lock]}}, {"x": 1}, {"x": 2}])
    assert error_of(jobs[0])[1].startswith("the arguments['x']['y'][0] cannot be pickled: lock object")
    assert error_of(jobs[1])[1].startswith("the result['deep'][1] cannot be pickled: lock object")
    assert jobs[2].error is None


class NotThere:
    """A callable that cannot be loaded where it arrives."""

    def __call__(self, job: RunningJob) -> None: ...

    def __reduce__(self) -> Any:
        return runfunctions.go_wrong, ("raise",)


def test_a_run_function_that_cannot_be_loaded_is_the_failure_of_its_jobs() -> None:
    for job in run(NotThere(), processes, configurations(2)):
        assert error_of(job) == ("exception", "the run-function could not be loaded by the executor: it went wrong")


def test_an_executor_that_takes_no_more_jobs_is_the_failure_of_them() -> None:
    executor = threads()
    with make(double, executor) as evaluator:
        assert evaluator.evaluate({"x": 1}).output == 2
        executor.shutdown()
        evaluator.submit(configurations(3))
        for job in evaluator.gather("ALL"):
            kind, message = error_of(job)
            assert kind == "worker_died"
            assert message.startswith("the executor takes no job (RuntimeError: cannot schedule new futures")
            assert "pass a factory" in message


def test_a_factory_that_fails_later_is_the_failure_of_the_jobs() -> None:
    executors = [threads()]

    def factory() -> Executor:
        return executors.pop() if executors else _broken_factory()

    evaluator = make(double, factory)
    assert evaluator.evaluate({"x": 1}).output == 2
    evaluator.close()
    kind, message = error_of(evaluator.evaluate({"x": 1}))
    assert kind == "worker_died"
    assert message.endswith("failed: LookupError: no executor to be had")
    evaluator.close()


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", [threads, processes, ThreadEach])
def test_a_job_is_asked_to_stop(executor: Callable[[], Executor], flags: Flags) -> None:
    flags.put("go-1")
    first, second = run(polite(flags), executor, configurations(2), num_workers=2, job_timeout=0.3, kill_grace=20.0)
    assert timed_out(first)
    assert first.metadata["returned"] == "stopped: CANCELLING"
    assert second.output == 1


@pytest.mark.parametrize("executor", [threads, processes, ThreadEach])
def test_a_coroutine_is_cancelled_and_may_tidy_up(executor: Callable[[], Executor], flags: Flags) -> None:
    async def function(job: RunningJob) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            flags.put("tidy", job.status.name)

    (job,) = run(function, executor, configurations(1), job_timeout=0.3, kill_grace=20.0)
    assert timed_out(job)
    assert flags.text("tidy") == "CANCELLING"


@pytest.mark.parametrize("executor", [threads, processes, ThreadEach])
def test_a_job_that_goes_on_is_given_up_and_its_slot_is_not_used_until_it_ends(
    executor: Callable[[], Executor], flags: Flags
) -> None:
    def function(job: RunningJob) -> Any:
        flags.put(f"began-{job['x']}")
        if job["x"] == 0:
            flags.wait("go")
        return job["x"]

    with make(function, executor, job_timeout=0.2, kill_grace=0.1) as evaluator:
        evaluator.submit(configurations(2))
        (job,) = evaluator.gather("BATCH", 1)
        assert timed_out(job)
        assert job.args["x"] == 0
        assert not flags.up("began-1")
        flags.put("go")
        (job,) = evaluator.gather("ALL")
        assert job.output == 1


def test_a_job_that_holds_the_gil_is_given_up_until_it_lets_go() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 0:
            runfunctions.hold_the_gil(0.8)
        return job["x"]

    jobs = run(function, processes, configurations(2), job_timeout=0.2, kill_grace=0.1)
    assert timed_out(jobs[0])
    assert jobs[1].output == 1


@pytest.mark.anyio
@pytest.mark.parametrize("executor", [threads, processes])
async def test_a_call_that_waits_in_the_executor_is_stopped_at_once(
    executor: Callable[[int], Executor], flags: Flags
) -> None:
    with executor(1) as pool:
        async with make(polite(flags), pool, num_workers=2, kill_grace=20.0) as evaluator:
            await evaluator.submit_async(configurations(1))
            await until_async(lambda: flags.up("pid-0"))
            async with anyio.create_task_group() as group:
                group.start_soon(evaluator.evaluate_async, {"x": 1})
                await until_async(lambda: evaluator.statistics().pending == 0)
                group.cancel_scope.cancel()
            flags.put("go-0")
            (job,) = await soon(evaluator.gather_async("ALL"))
            assert job.output == 0
            assert not flags.up("pid-1")


def test_cancelling_a_job_leaves_those_beside_it_in_its_batch_alone(flags: Flags) -> None:
    function = polite(flags)

    def either(job: RunningJob) -> Any:
        return job["x"] if job["x"] == 0 else function(job)

    with make(either, processes, batching=5, kill_grace=20.0) as evaluator:
        evaluator.submit(configurations(4))
        flags.wait("pid-1")
        first, running, unwanted, last = evaluator.jobs
        evaluator._cancel(unwanted, "it is not wanted")
        until(lambda: unwanted.status is not JobStatus.RUNNING)
        flags.put("go-1")  # it was not asked to stop
        flags.put("go-3")
        evaluator.gather("ALL")
    assert [job.output for job in (first, running, last)] == [0, 1, 3]
    assert unwanted.status is JobStatus.CANCELLED
    assert not flags.up("pid-2")


def test_the_time_of_a_job_begins_with_its_call() -> None:
    with processes(1) as executor:
        jobs = run(lambda _job: time.sleep(0.5), executor, configurations(3), num_workers=3, job_timeout=0.95)
    assert errors(jobs) == []


def test_close_does_not_wait_for_a_job_that_goes_on() -> None:
    with Stage() as stage:
        evaluator = make(stage.plain, threads, num_workers=2, kill_grace=0.1)
        evaluator.submit(configurations(3))
        stage.started(0).wait()
        stage.started(1).wait()
        assert {job.status for job in evaluator.close()} == {JobStatus.CANCELLED}


# -- pools that break --------------------------------------------------------------------------------------------------

# (What each crash does is in test_crashes.)


def test_poison_in_batches_is_found() -> None:
    args_list: list[dict[str, Any]] = configurations(120)
    for x in (17, 60, 61):
        args_list[x] = wrong_configuration("running", "kill")
    jobs = run(sometimes_wrong, processes, args_list, num_workers=2, batching=20)
    assert [number for number, job in enumerate(jobs) if job.failed] == [17, 60, 61]


def test_those_who_were_there_when_it_broke_are_run_again_side_by_side(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        x = job["x"]
        if flags.count(str(x)) == 1:
            flags.put(f"there-{x}")
            flags.wait("there-0", "there-1", "there-2")
            if x == 0:
                os._exit(3)
            time.sleep(60)  # ends with the pool
        if x == 0:
            os._exit(3)
        flags.put(f"again-{x}")
        flags.wait("again-1", "again-2")  # if one came after the other, neither would come to an end
        return x

    guilty, *others = run(function, lambda: processes(3), configurations(3), num_workers=3)
    assert guilty.error is not None
    assert (guilty.error.kind, guilty.error.exit_code, guilty.error.attempts) == ("worker_died", 3, 1)
    assert [job.output for job in others] == [1, 2]


def test_a_job_whose_worker_dies_has_its_attempts(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        if flags.count(str(job["x"])) < job["x"]:
            os._exit(3)
        return job["x"]

    jobs = run(function, processes, [{"x": x} for x in (1, 2, 3, 9)], num_workers=1, max_attempts=3)
    assert [job.output for job in jobs] == [1, 2, 3, None]
    assert jobs[3].error is not None
    assert (jobs[3].error.kind, jobs[3].error.attempts) == ("worker_died", 3)


def test_without_a_factory_a_broken_executor_stays_broken() -> None:
    with processes(1) as executor, make(sometimes_wrong, executor, num_workers=2) as evaluator:
        assert evaluator.evaluate({"x": 1}).output == 2
        evaluator.submit([wrong_configuration("running", "kill"), *configurations(5)])
        jobs = evaluator.gather("ALL")
        failed = [job for job in jobs if job.failed]
        assert evaluator.jobs[0] in failed  # of the others, those that were not done before
        assert {error_of(job)[0] for job in failed} == {"worker_died"}
        assert {"pass a factory" in error_of(job)[1] for job in failed} == {True}
        kind, message = error_of(evaluator.evaluate({"x": 1}))
        assert kind == "worker_died"
        assert message.startswith("the executor takes no job (")
        assert "pass a factory" in message
        assert len(jobs) == 6


def test_without_a_factory_it_is_said_how_it_broke() -> None:
    with processes(1) as executor:
        (job,) = run(sometimes_wrong, executor, [wrong_configuration("running", "kill")])
    assert job.error is not None
    assert (job.error.signal, job.error.host) == (signal.SIGKILL, os.uname().nodename)
    assert job.error.pid not in (None, os.getpid())


def test_an_idle_pool_that_breaks_costs_no_job() -> None:
    with make(runfunctions.pid, lambda: processes(1)) as evaluator:
        pid = evaluator.evaluate({}).output
        os.kill(pid, signal.SIGKILL)  # whether the pool notices before the next job is there, or after
        job = evaluator.evaluate({})
        assert job.error is None
        assert job.output != pid


def test_the_end_of_the_fork_server_costs_no_job(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put("began")
        flags.wait("go")
        return job["x"]

    with make(function, processes) as evaluator:
        evaluator.submit(configurations(1))
        flags.wait("began")
        server: Any = forkserver
        pid = server._forkserver._forkserver_pid
        os.kill(pid, signal.SIGKILL)  # all pools that have processes of it break
        until(lambda: not is_alive(pid))
        flags.put("go")
        (job,) = evaluator.gather("ALL")
        forkserver.ensure_running()  # which buries the old one
    assert (job.error, job.output) == (None, 0)


def test_an_exit_code_that_could_mean_anything_fails_its_job_at_last(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.count("runs")
        os._exit(255)  # what multiprocessing says of a process of which it knows nothing

    (job,) = run(function, processes, configurations(1))
    assert job.error is not None
    assert (job.error.kind, job.error.exit_code, job.error.attempts) == ("worker_died", 255, 1)
    assert flags.text("count-runs") == "3"


class HidesCodes(ProcessPoolExecutor):
    """Does not say how its process has ended, as if the fork server had died before it could."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def hide(_future: Future[Any]) -> None:
            ended: Any = {pid: SimpleNamespace(pid=pid, exitcode=None, _popen=popen) for pid in self._processes}
            self._processes = ended

        popen = SimpleNamespace(returncode=None)
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(hide)
        return future


def test_a_job_of_whose_process_nobody_can_tell_the_end_is_run_again(
    flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paraval.backends.futures._CODES_S", 0.05)

    def function(job: RunningJob) -> Any:
        flags.count("runs")
        os._exit(7)

    def pool() -> ProcessPoolExecutor:
        kind = ProcessPoolExecutor if flags.up("count-runs") else HidesCodes
        return kind(1, mp_context=multiprocessing.get_context("forkserver"))

    (job,) = run(function, pool, configurations(1))
    assert job.error is not None
    assert (job.error.kind, job.error.exit_code, job.error.attempts) == ("worker_died", 7, 1)
    assert flags.text("count-runs") == "2"


class LosesCalls(ProcessPoolExecutor):
    """Has a process that is dead, and calls that it will never end, as a pool whose pipe was inherited by a fork."""

    def __init__(self) -> None:
        super().__init__(1)
        process = multiprocessing.get_context("spawn").Process(target=int)
        process.start()
        process.join()
        processes: Any = {process.pid: process}
        self._processes = processes

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()


def test_a_pool_that_does_not_notice_a_death_hangs_nobody() -> None:
    (job,) = run(double, LosesCalls(), configurations(1))
    kind, message = error_of(job)
    assert kind == "worker_died"
    assert message.startswith("a process of the executor ended with exit code 0 while it ran the job: pass a factory")


class Loses(ThreadEach):
    """Ends some calls with an error of its own, as the scheduler of a cluster that has lost a machine."""

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        report: Report = super().call(fn, *args, **kwargs)
        if any(done.value == 6 for done in report.done):
            raise ConnectionResetError("the machine is gone")
        return report


@pytest.mark.parametrize("executor", [Loses, Loses()], ids=["factory", "object"])
@pytest.mark.parametrize("batching", [False, 5])
def test_a_call_that_the_executor_loses_is_one_failure(executor: Any, batching: Any) -> None:
    jobs = by_x(run(double, executor, configurations(10), num_workers=2, batching=batching))
    message = "the executor lost the job: ConnectionResetError: the machine is gone"
    assert error_of(jobs[3]) == ("worker_died", message)
    assert [job.output for x, job in jobs.items() if x != 3] == [2 * x for x in range(10) if x != 3]


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_an_initializer_that_fails_fails_the_jobs(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    context = {"mp_context": multiprocessing.get_context("forkserver")} if kind is ProcessPoolExecutor else {}
    jobs = run(
        double,
        lambda: kind(1, initializer=runfunctions.go_wrong, initargs=("raise",), **context),
        configurations(3),
        num_workers=2,
    )
    assert {error_of(job)[0] for job in jobs} == {"worker_died"}


# -- executors of other libraries --------------------------------------------------------------------------------------

DASK = """
import os, time
from distributed import Client
from paraval import Evaluator
from paraval.storage import MemoryStorage

def function(job):
    match job["x"]:
        case "raise":
            raise LookupError("it went wrong")
        case "fail at first":
            if flags.count("attempts") == 1:
                raise ConnectionError
            return "well"
        case "stop":
            while not job.stopped():
                time.sleep(0.002)
            return job.status.name
        case x:
            job.record(1, x)
            return x * scale

async def coroutine(job):
    return job["x"]

def make(function, **kwargs):
    return Evaluator.create(function, "executor", {"executor": client.get_executor(), "num_workers": 2, **kwargs})

def evaluate(function, x, **kwargs):
    with make(function, **kwargs) as evaluator:
        return evaluator.evaluate({"x": x})

scale = 2
with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
    with make(function, storage=(storage := MemoryStorage())) as evaluator:
        evaluator.submit([{"x": x} for x in range(50)])
        jobs = evaluator.gather("ALL")
    assert sorted(job.output for job in jobs) == [2 * x for x in range(50)], [job.error for job in jobs]
    assert all(storage.load_job(job.id)["intermediate"]["objective"] == [job.args["x"]] for job in jobs)
    assert evaluate(coroutine, 7).output == 7
    assert evaluate(function, "raise").error.message == "it went wrong"
    # A second attempt is the very same call, which dask might answer with what it remembers of the first.
    assert evaluate(function, "fail at first", max_attempts=2, retry_on=ConnectionError).output == "well"
    job = evaluate(function, "stop", job_timeout=0.3, kill_grace=20.0)
    assert (job.error.kind, job.metadata["returned"]) == ("timeout", "CANCELLING")
print("all is well")
"""


def test_the_executor_of_dask(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="dask's executor is tested with it")
    with Driver(DASK, tmp_path) as driver:
        driver.process.wait(50)
        assert "all is well" in driver.output, driver.output


def test_the_executor_of_interpreters() -> None:
    executor: Any = getattr(futures, "InterpreterPoolExecutor", None)
    if executor is None:
        pytest.skip("InterpreterPoolExecutor comes with Python 3.14")
    scale = 2
    jobs = run(lambda job: job["x"] * scale, lambda: executor(2), [*configurations(5), {"x": None}], num_workers=2)
    assert [job.output for job in jobs[:5]] == [0, 2, 4, 6, 8]
    assert error_of(jobs[5])[0] == "exception"


# -- the driver --------------------------------------------------------------------------------------------------------

JOBS = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from paraval import Evaluator

def job(job):
    flags.put(f"pid-{job['x']}", os.getpid())
    time.sleep(60)

def factory():
    return ProcessPoolExecutor(2)

evaluator = Evaluator.create(job, "executor", {"num_workers": 2, "kill_grace": 0.2, "executor": factory})
evaluator.submit([{"x": x} for x in range(3)])
flags.wait("pid-0", "pid-1")
"""
forks = pytest.mark.skipif(sys.version_info >= (3, 14), reason="the program's pool would need a guard")


@forks
def test_a_driver_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    with Driver(JOBS + 'evaluator.gather("ALL")', tmp_path, "-W", "ignore") as driver:
        driver.wait_for("pid-0", "pid-1")
        driver.kill()
        driver.wait()
        driver.everybody_is_gone(5.0)


@forks
@needs_loky
def test_a_driver_that_is_killed_leaves_no_worker_in_a_pool_of_lokys(tmp_path: Path) -> None:
    jobs = JOBS.replace("from concurrent.futures import ProcessPoolExecutor", "from loky import ProcessPoolExecutor")
    assert jobs != JOBS
    with Driver(jobs + 'evaluator.gather("ALL")', tmp_path, "-W", "ignore") as driver:
        driver.wait_for("pid-0", "pid-1")
        driver.kill()
        driver.wait()
        driver.everybody_is_gone(5.0)
        assert "Exception ignored" not in driver.output


@forks
def test_a_driver_may_end_without_close(tmp_path: Path) -> None:
    with Driver(JOBS, tmp_path, "-W", "ignore", "-W", "default::ResourceWarning") as driver:
        assert driver.wait() == 0
        driver.everybody_is_gone(5.0)
        assert "ExecutorEvaluator" in driver.output
        assert "was not closed" in driver.output
        assert not driver.flags.up("pid-2")


def test_the_class() -> None:
    evaluator = make(double, threads, num_workers=3)
    assert type(evaluator) is ExecutorEvaluator
    assert evaluator.cancellation == "cooperative"
    assert evaluator.num_workers == 3
