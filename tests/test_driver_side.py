"""The driver's side of a worker process: one that cannot be started, is reaped by others, is flooded, or moves away."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import pytest

import runfunctions
from paraval import Evaluator, Job, RunningJob
from paraval.backends import child
from paraval.backends.base import Backend, Batch, RunSpec, Slot
from paraval.backends.child import WorkerProcess
from paraval.backends.serial import SerialEvaluator
from runfunctions import Flags, async_double, double
from support import configurations, soon, until, until_async
from workers import (
    LOKY,
    Driver,
    errors,
    is_alive,
    needs_loky,
    needs_trio,
    open_files,
    processes,
    timed_out,
    worker_marks,
)

pytestmark = worker_marks

both_methods = pytest.mark.parametrize("method", ["process", LOKY])


def make(function: Callable[..., Any], method: str = "process", **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, method, kwargs)


def failures(jobs: list[Job]) -> list[tuple[str, str]]:
    return [(job.error.kind, job.error.message) for job in jobs if job.error is not None]


# -- what a driver has made of itself ----------------------------------------------------------------------------------


@both_methods
def test_a_default_timeout_of_sockets_is_not_for_workers(method: str) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.01)
    try:
        with make(lambda _: os.getpid(), method, num_workers=1) as evaluator:
            jobs = []
            for _ in range(3):
                jobs.append(evaluator.evaluate({}))
                time.sleep(0.1)  # the worker waits for longer than that
    finally:
        socket.setdefaulttimeout(before)
    assert errors(jobs) == []
    assert len({job.output for job in jobs}) == 1


@both_methods
def test_signals_that_the_driver_has_blocked_are_not_blocked_in_workers(method: str) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    try:
        with make(lambda _: len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), method) as evaluator:
            job = evaluator.evaluate({})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert errors([job]) == []
    assert job.output == 0


def test_a_driver_need_not_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "argv")
    with make(double) as evaluator:
        assert evaluator.evaluate({"x": 2}).output == 4


IN_A_SPAWNED_PROCESS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from paraval import Evaluator

class Point:
    def __init__(self, x):
        self.x = x

def run(job):
    return Point(2 * job["x"].x)

def search():
    for method in {methods!r}:
        with Evaluator.create(run, method) as evaluator:
            job = evaluator.evaluate({{"x": Point(4)}})
        print(method, job.error, type(job.output) is Point and job.output.x, flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("{start}").Process(target=search)
    process.start()
    process.join()
"""


@pytest.mark.parametrize("start", ["spawn", "forkserver", "fork"])
def test_what_is_defined_in_the_script_crosses_from_its_processes_too(start: str, tmp_path: Path) -> None:
    methods = ["process", *(["loky"] if importlib.util.find_spec("loky") else [])]
    script = tmp_path / "script.py"
    script.write_text(IN_A_SPAWNED_PROCESS.format(start=start, methods=methods), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.splitlines() == [f"{method} None 8" for method in methods], done.stderr


@pytest.mark.parametrize("method", ["process", LOKY, "thread", "executor"])
def test_a_plain_function_may_give_a_coroutine(method: str) -> None:
    async def double_later(x: int) -> int:
        await asyncio.sleep(0.001)
        return 2 * x

    kwargs = {"executor": processes} if method == "executor" else {}
    with make(lambda job: double_later(job["x"]) if job["x"] else "plain", method, **kwargs) as evaluator:
        evaluator.submit(configurations(3))
        jobs = evaluator.gather("ALL")
    assert errors(jobs) == []
    assert {job.args["x"]: job.output for job in jobs} == {0: "plain", 1: 2, 2: 4}


# -- a worker that cannot be started -----------------------------------------------------------------------------------


def dies_on_odd(job: RunningJob) -> Any:
    if job["x"] % 2:
        os._exit(runfunctions.EXIT_CODE)
    return job["x"]


@pytest.mark.parametrize("interpreter", ["/gone/bin/python", None, "/dev/null"])
def test_jobs_whose_worker_cannot_be_started_fail(monkeypatch: pytest.MonkeyPatch, interpreter: str | None) -> None:
    with make(double, num_workers=2, job_timeout=5.0) as evaluator:
        before = open_files()
        monkeypatch.setattr(sys, "executable", interpreter)
        evaluator.submit(configurations(100))
        jobs = evaluator.gather("ALL")
        left = len(failures(jobs))
        assert left >= 98  # workers may have been prepared before
        for kind, message in failures(jobs):
            assert kind == "worker_died"
            assert message.startswith("a worker process could not be started: ")
            assert str(interpreter) in message or interpreter is None
        monkeypatch.undo()
        assert evaluator.evaluate({"x": 2}).output == 4
    assert len(open_files()) <= len(before)


def test_each_attempt_at_a_job_tries_to_start_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/gone/bin/python")
    with make(double, max_attempts=3) as evaluator:
        error = evaluator.evaluate({"x": 1}).error
    assert error is not None
    assert (error.kind, error.attempts, len(error.history)) == ("worker_died", 3, 2)


def test_a_call_in_a_process_that_cannot_be_started_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(double, "thread", profile=True) as evaluator:
        monkeypatch.setattr(sys, "executable", "/gone/bin/python")
        error = evaluator.evaluate({"x": 1}).error
    assert error is not None
    assert error.kind == "worker_died"
    assert "could not be started" in error.message
    assert "/gone/bin/python" in error.message


@contextlib.contextmanager
def no_more_files(spare: int = 0) -> Iterator[None]:
    """Have the system refuse to open any more files than a few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_the_system_refuses_for_long_is_told(flags: Flags) -> None:
    with make(dies_on_odd, capture_output=True) as evaluator:
        assert evaluator.evaluate({"x": 0}).output == 0
        evaluator.evaluate({"x": 1})
        before = open_files()
        with no_more_files():
            job = evaluator.evaluate({"x": 2})
        assert open_files() == before
        assert [(kind, "Too many open files" in message) for kind, message in failures([job])] == [
            ("worker_died", True)
        ]
        assert evaluator.evaluate({"x": 4}).output == 4


@both_methods
def test_a_worker_that_cannot_be_made_leaves_nothing_open(method: str) -> None:
    module, name = {"process": ("child", "WorkerProcess"), "loky": ("loky", "LokyWorker")}[method]
    worker_class = getattr(importlib.import_module(f"paraval.backends.{module}"), name)
    before = open_files()
    for spare in range(11):
        with no_more_files(spare), pytest.raises(OSError, match="Too many open files"):
            worker_class(b"", 100, has_tray=True)
        assert open_files() == before


def test_what_the_system_refuses_for_a_moment_is_tried_again() -> None:
    with make(dies_on_odd) as evaluator:
        assert evaluator.evaluate({"x": 0}).output == 0
        evaluator.evaluate({"x": 1})
        with no_more_files():
            evaluator.submit([{"x": 2}])
            until(lambda: evaluator.statistics().running == 1)
        (job,) = evaluator.gather("ALL")
        assert (job.output, errors([job])) == (2, [])


class _NoSlot(Slot):
    async def run(self, batch: Batch) -> None:
        raise OSError("there is no slot")


class _NoBackend(Backend):
    cancellation = "cancel"

    def slot(self, spec: RunSpec) -> Slot:
        return _NoSlot()


class _Slotless(SerialEvaluator):
    def _make_backend(self) -> Backend:
        return _NoBackend()


def test_jobs_whose_slot_fails_before_it_takes_them_fail() -> None:
    with _Slotless(async_double, num_workers=2) as evaluator:
        evaluator.submit(configurations(10))
        jobs = evaluator.gather("ALL")
    assert failures(jobs) == [("worker_died", "there is no slot")] * 10


# -- others that reap --------------------------------------------------------------------------------------------------

REAPERS = {
    "handler": """
import os, signal
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
""",
    "ignored": """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
""",
}

JOBS = """
import os, time
from paraval import Evaluator

def job(job):
    if job["x"] == 3:
        flags.put("sleeper", start_sleeper())
        os._exit(3)
    if job["x"] == 4:
        time.sleep(60)
    if job["x"] == 5:
        flags.wait("the idle one is gone")
    return os.getpid()

with Evaluator.create(job, "process", {"num_workers": 2, "job_timeout": 0.5, "kill_grace": 0.1}) as evaluator:
    evaluator.submit([{"x": x} for x in range(5)])
    jobs = {job.args["x"]: job for job in evaluator.gather("ALL")}
    assert [job.error for x, job in jobs.items() if x < 3] == [None] * 3, jobs
    assert jobs[4].error.kind == "timeout", jobs[4].error
    flags.put("error", jobs[3].error.summary)

with Evaluator.create(job, "process", {"num_workers": 2}) as evaluator:
    evaluator.submit([{"x": 5}, {"x": 0}])
    (first,) = evaluator.gather("BATCH", 1)
    os.kill(first.output, 9)
    time.sleep(0.6)  # for longer than two looks after the workers
    flags.put("the idle one is gone")
    jobs = [*evaluator.gather("ALL"), evaluator.evaluate({"x": 0})]
    assert [job.error for job in jobs] == [None] * 2, [job.error for job in jobs]
"""


@both_methods
@pytest.mark.parametrize("reaper", list(REAPERS))
def test_children_that_others_reap(reaper: str, method: str, tmp_path: Path) -> None:
    with Driver(REAPERS[reaper] + JOBS.replace('"process"', repr(method)), tmp_path) as driver:
        error, sleeper = driver.wait_for("error", "sleeper")
        assert driver.wait() == 0, driver.output
        until(lambda: not is_alive(int(sleeper)))
        driver.everybody_is_gone(5.0)
    assert "Traceback" not in driver.output
    lost = "worker_died: the worker process ended (its exit code was taken by another part of the program)"
    told = "worker_died: the worker process ended with exit code 3"
    assert error.removesuffix(" while it ran the job") in ([lost] if reaper == "ignored" else [lost, told])


def test_a_number_that_others_have_freed_is_not_signalled() -> None:
    """A process that got a worker's number, and has a group of its own, is spared."""
    newest = Path("/proc/sys/kernel/ns_last_pid")
    if not os.access(newest, os.W_OK):
        pytest.skip("may not choose the number of a process")
    worker = WorkerProcess(b"")
    os.kill(worker.pid, signal.SIGKILL)
    os.waitpid(worker.pid, 0)
    newest.write_text(str(worker.pid - 1), encoding="ascii")
    with subprocess.Popen(["sleep", "60"], process_group=0) as other:
        try:
            if other.pid != worker.pid:
                pytest.skip("another process was faster")
            # It is a child of this process, so waiting for it would take it for the worker: let that be known before.
            worker._popen._note_taken()
            anyio.run(worker.kill)
            worker.signal(signal.SIGKILL)
            assert other.poll() is None
        finally:
            anyio.run(worker.kill)
            other.kill()


def test_a_worker_that_is_slow_to_die_is_reaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it takes its time is brought about by a driver that has none; what is left behind fails the test."""
    monkeypatch.setattr(child, "_REAP_S", -1)
    with make(double) as evaluator:
        assert evaluator.evaluate({"x": 1}).output == 2


# -- large values ------------------------------------------------------------------------------------------------------


class Slow:
    """Is pickled, or unpickled, when a flag is up."""

    def __init__(self, flags: Flags, when: str) -> None:
        self.flags = flags
        self.when = when

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.when == "pickled":
            return _pass, (_waited(self.flags),)
        return _waited, (self.flags,)


def _waited(flags: Flags) -> str:
    flags.put("waits")
    flags.wait("seen")
    return "came"


def _pass(value: str) -> str:
    return value


def slow_result(job: RunningJob) -> Any:
    return [bytes(1 << 19), job["value"] or Slow(Flags(job["folder"]), "unpickled")]


HOSTS: list[Any] = [
    pytest.param("process", {}, id="process"),
    pytest.param("loky", {}, id="loky", marks=needs_loky),
    pytest.param("executor", {"executor": processes}, id="executor"),
]


@pytest.mark.parametrize("when", ["pickled", "unpickled"])
@pytest.mark.parametrize("loop", ["asyncio", pytest.param("trio", marks=needs_trio)])
@pytest.mark.parametrize(("method", "kwargs"), HOSTS)
def test_the_loop_does_not_wait_for_a_large_value(
    method: str, kwargs: dict[str, Any], loop: str, when: str, flags: Flags
) -> None:
    async def see() -> None:
        await until_async(lambda: flags.up("waits"))
        flags.put("seen")

    async def main() -> Any:
        large = [bytes(1 << 19), Slow(flags, when)]
        async with make(slow_result, method, **kwargs) as evaluator, anyio.create_task_group() as group:
            group.start_soon(see)
            args = {"value": large, "folder": None} if when == "pickled" else {"value": None, "folder": flags.folder}
            return (await soon(evaluator.evaluate_async(args))).output

    (_, value) = anyio.run(main, backend=loop)
    assert value == ([bytes(1 << 19), "came"] if when == "pickled" else "came")


@pytest.mark.parametrize(("method", "kwargs"), HOSTS)
def test_the_time_in_which_a_result_is_taken_in_is_not_the_jobs(method: str, kwargs: dict[str, Any]) -> None:
    def function(job: RunningJob) -> Any:
        return [bytes(1 << 19), Late()]

    with make(function, method, job_timeout=0.5, kill_grace=0.1, **kwargs) as evaluator:
        job = evaluator.evaluate({})
    assert errors([job]) == []
    assert job.output[1] == 1.0


class Late:
    """Takes a second to be unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _late, (1.0,)


def _late(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize(("method", "kwargs"), HOSTS)
def test_large_values_beside_small_ones_come_as_they_are(method: str, kwargs: dict[str, Any]) -> None:
    values: list[Any] = [
        {"n": 1},
        ["x" * (1 << 20), [1]],
        bytearray(3 << 20),
        {str(n): n for n in range(99_999)},
        "y" * (1 << 20),
    ]
    values += [threading.Lock(), lambda: 5, [7]]
    with make(runfunctions.echo, method, num_workers=1, batching=len(values), **kwargs) as evaluator:
        evaluator.submit([{"x": value} for value in values])
        evaluator.gather("ALL")
        jobs = evaluator.jobs
    *same, lock, function, last = jobs
    assert [job.output for job in [*same, last]] == [*values[:-3], values[-1]]
    assert function.output() == 5
    assert lock.error is not None
    assert lock.error.message.startswith("the arguments['x'] cannot be pickled: lock object")


@both_methods
def test_the_loop_does_not_wait_for_what_a_job_stores(method: str, flags: Flags) -> None:
    folder = flags.folder

    def function(job: RunningJob) -> Any:
        search = str(job.id).partition(".")[0]
        job.storage.store_search_value(search, "large", [bytes(1 << 19), Slow(Flags(folder), "unpickled")])
        return job.storage.load_search_value(search, "large") == [bytes(1 << 19), "came"]

    async def see() -> None:
        await until_async(lambda: flags.up("waits"))
        flags.put("seen")

    async def main() -> Any:
        async with make(function, method) as evaluator, anyio.create_task_group() as group:
            group.start_soon(see)
            return await soon(evaluator.evaluate_async({}))

    job = anyio.run(main)
    assert (job.output, errors([job])) == (True, [])


# -- a flood in both directions ----------------------------------------------------------------------------------------


def length(job: RunningJob) -> int:
    return len(job["data"])


def prints_much() -> None:
    print("x" * 200_000)


FLOOD = {"capture_output": True, "initializer": prints_much, "job_timeout": 10.0}


@both_methods
def test_a_worker_that_prints_much_while_it_is_set_up_gets_large_arguments(method: str) -> None:
    with make(length, method, **FLOOD) as evaluator:
        evaluator.timeout = 15
        job = evaluator.evaluate({"data": bytes(1_000_000)})
    assert (job.output, errors([job])) == (1_000_000, [])


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", pytest.param("trio", marks=needs_trio)])
@both_methods
async def test_likewise_on_every_loop(method: str) -> None:
    async with make(length, method, **FLOOD) as evaluator:
        evaluator.timeout = 15
        job = await soon(evaluator.evaluate_async({"data": bytes(1_000_000)}))
    assert (job.output, errors([job])) == (1_000_000, [])


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", pytest.param("trio", marks=needs_trio)])
async def test_a_worker_that_dies_before_it_has_read_its_arguments() -> None:
    def stops() -> None:
        os._exit(runfunctions.EXIT_CODE)

    async with make(length, initializer=stops) as evaluator:
        job = await soon(evaluator.evaluate_async({"data": bytes(10_000_000)}))
    assert job.error is not None
    assert (job.error.kind, job.error.exit_code) == ("worker_died", 7)


# -- processes that have left the worker's group -----------------------------------------------------------------------


# -- workers that have enough to do for a while ------------------------------------------------------------------------


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which workers were left alone, each time."""
    rests: list[float] = []
    rest = WorkerProcess.rest

    async def noted(process: WorkerProcess, seconds: float) -> None:
        rests.append(seconds)
        await rest(process, seconds)

    monkeypatch.setattr(WorkerProcess, "rest", noted)
    return rests


def takes_ten_milliseconds(job: RunningJob) -> int:
    time.sleep(0.010)
    return int(job["x"])


def takes_as_long_and_records(job: RunningJob) -> int:
    job.record(1.0, job["x"])
    return takes_ten_milliseconds(job)


def takes_as_long_and_dies_at_thirty(job: RunningJob, log: str) -> int:
    with Path(log).open("a") as file:
        file.write(f"{job['x']}\n")
    if job["x"] == 30:
        os._exit(runfunctions.EXIT_CODE)
    return takes_ten_milliseconds(job)


@pytest.mark.parametrize("backend", ["asyncio", pytest.param("trio", marks=needs_trio)])
def test_workers_that_have_enough_to_do_are_left_alone(backend: str, rests: list[float]) -> None:
    async def main() -> list[Job]:
        async with make(takes_ten_milliseconds, num_workers=2) as evaluator:
            evaluator.submit(configurations(120))
            return await evaluator.gather_async("ALL")

    assert sorted(job.output for job in anyio.run(main, backend=backend)) == list(range(120))
    assert len(rests) > 10
    assert 0 < max(rests) <= 0.011  # no result is told later than that by it


def gives_back_much(job: RunningJob) -> bytes:
    time.sleep(0.010)
    return bytes(60_000)


def test_those_that_give_back_much_are_not(rests: list[float]) -> None:
    with make(gives_back_much, num_workers=2) as evaluator:  # or they would wait for room in their sockets
        evaluator.submit(configurations(60))
        assert {len(job.output) for job in evaluator.gather("ALL")} == {60_000}
    assert rests == []


def test_those_that_call_their_storage_are_not(rests: list[float]) -> None:
    with make(takes_as_long_and_records, num_workers=2) as evaluator:
        evaluator.submit(configurations(60))
        assert sorted(job.output for job in evaluator.gather("ALL")) == list(range(60))
    assert rests == []


def test_one_that_dies_meanwhile_takes_its_own_job_only(rests: list[float], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make(takes_as_long_and_dies_at_thirty, num_workers=2, run_function_kwargs={"log": str(log)}) as evaluator:
        evaluator.submit(configurations(60))
        jobs = evaluator.gather("ALL")
    assert rests
    assert [job.args["x"] for job in jobs if job.error is not None] == [30]
    assert failures(jobs)[0][0] == "worker_died"
    assert sorted(map(int, log.read_text().split())) == list(range(60))  # each of the others ran once


def takes_four_milliseconds_and_notes_it(job: RunningJob, log: str) -> float:
    with Path(log).open("a") as file:
        file.write(f"{time.monotonic()} {job.id}\n")
    time.sleep(0.004)
    return time.monotonic()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_to_cancel_one_job_does_not_have_others_run_twice(rests: list[float], log: Path) -> None:
    async def main() -> None:
        kwargs: dict[str, Any] = {"num_workers": 2, "run_function_kwargs": {"log": str(log)}}
        async with make(takes_four_milliseconds_and_notes_it, **kwargs) as evaluator:
            for _ in range(4):
                tasks = [asyncio.ensure_future(evaluator.evaluate_async({})) for _ in range(60)]
                done = next(asyncio.as_completed(tasks[20:]))
                await done
                victim = next(task for task in tasks if not task.done())
                victim.cancel()
                others = [task for task in tasks if task is not victim]
                assert all(job.error is None for job in await asyncio.gather(*others))
                with contextlib.suppress(asyncio.CancelledError):
                    await victim

    asyncio.run(main())
    assert rests
    ids = [line.split()[1] for line in log.read_text().splitlines()]
    twice = sorted({job_id for job_id in ids if ids.count(job_id) > 1})
    assert len(twice) <= 4  # an innocent one that was running beside each victim may be run again


def test_what_has_ended_before_the_budget_did_counts_and_nothing_begins_after_it(rests: list[float], log: Path) -> None:
    kwargs: dict[str, Any] = {"num_workers": 2, "run_function_kwargs": {"log": str(log)}}
    with make(takes_four_milliseconds_and_notes_it, **kwargs) as evaluator:
        evaluator.submit(configurations(30))
        evaluator.gather("ALL")
        evaluator.submit(configurations(400))
        evaluator.timeout = 0.2
        end = time.monotonic() + 0.2
        jobs = evaluator.gather("ALL")
    assert rests
    assert any(job.error is None for job in jobs)
    assert any(job.error is not None for job in jobs)
    assert not [job for job in jobs if job.error and job.metadata.get("returned", end) < end - 0.001]
    begins = [float(line.split()[0]) for line in log.read_text().splitlines()]
    assert len([begin for begin in begins if begin > end + 0.1]) == 0  # what the worker has ahead would take longer


def takes_half_a_millisecond(job: RunningJob) -> int:
    time.sleep(0.0005)
    return int(job["x"])


@both_methods
def test_a_close_does_not_wait_for_what_workers_gave_back(method: str) -> None:
    with make(takes_half_a_millisecond, method, num_workers=2, kill_grace=40.0) as evaluator:
        evaluator.submit(configurations(4_000))
        evaluator.gather("BATCH", 500)
        begin = time.monotonic()
        evaluator.close()
        assert time.monotonic() - begin < 20.0  # else it has waited for the whole grace


def forbids_threads() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (6 << 20), size + (6 << 20)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of a process from /proc")
def test_a_worker_that_can_have_no_thread_runs_jobs_all_the_same() -> None:
    with make(takes_ten_milliseconds, num_workers=2, initializer=forbids_threads) as evaluator:
        evaluator.submit(configurations(60))
        jobs = evaluator.gather("ALL")
    assert failures(jobs) == []
    assert len(jobs) == 60


def has_clocks_stopped(job: RunningJob, folder: str) -> float:
    match job["x"]:
        case "stopped":
            with mock.patch("time.monotonic", return_value=0.0):
                time.sleep(0.15)
        case "long":
            Flags(folder).wait("seen")
    return bool(job["x"] == "long")


def test_a_job_may_stop_the_clocks(flags: Flags) -> None:
    kwargs: dict[str, Any] = {"num_workers": 1, "batching": 20, "run_function_kwargs": {"folder": flags.folder}}
    with make(has_clocks_stopped, **kwargs) as evaluator:
        for middle in ("stopped", "long"):
            evaluator.submit([{"x": x} for x in [""] * 10 + [middle] + [""] * 9])
            assert not any(job.output for job in evaluator.gather("BATCH", 10))  # those before are not held back
            if middle == "long":
                flags.put("seen")
            evaluator.gather("ALL")
        times = [(job._started or 0.0, job._finished or 0.0) for job in evaluator.jobs]
    assert all(0.0 < started <= finished for started, finished in times)


@both_methods
def test_a_worker_that_has_left_its_group_is_killed_with_what_it_left_there(method: str, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"]:
            return job["x"]
        flags.put("sleeper", runfunctions.start_sleeper())
        os.setpgid(0, os.getpgid(os.getppid()))
        runfunctions.ignore_requests()
        flags.put("worker", os.getpid())
        while True:
            pass

    with make(function, method, job_timeout=0.5, kill_grace=0.1) as evaluator:
        assert timed_out(evaluator.evaluate({"x": 0}))
        assert evaluator.evaluate({"x": 1}).output == 1
        for name in ("worker", "sleeper"):
            pid = int(flags.text(name))
            until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc] # mypy does not see the default


STRAYS = {
    "own-group": ["timeout", "60", "sleep", "60"],
    "job-control": ["bash", "-c", "set -m; sleep 60 & wait"],
    "session": ["setsid", "--wait", "bash", "-c", "sleep 60 & wait"],
}


def descendants(pid: int) -> list[int]:
    found = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    return [*found, *(further for one in found for further in descendants(one))]


@both_methods
def test_what_a_job_started_outside_its_group_is_killed_with_it(method: str, flags: Flags) -> None:
    def function(job: RunningJob) -> None:
        flags.put("worker", os.getpid())
        programs = [subprocess.Popen(command) for command in STRAYS.values()]
        for program in programs:
            program.wait()

    with make(function, method, job_timeout=1.5, kill_grace=0.1) as evaluator:
        evaluator.submit([{"x": 0}])
        (worker,) = flags.wait("worker")
        until(lambda: len(descendants(int(worker))) >= 2 * len(STRAYS))
        strays = descendants(int(worker))
        assert timed_out(evaluator.gather("ALL")[0])
        until(lambda: not any(map(is_alive, strays)))


def test_likewise_when_it_takes_too_much_memory(flags: Flags) -> None:
    def function(job: RunningJob) -> None:
        flags.put("stray", subprocess.Popen(["sleep", "60"], start_new_session=True).pid)
        memory = []
        while True:
            memory.append(b"x" * 1_000_000)
            time.sleep(0.001)

    with make(function, memory_limit=150_000_000) as evaluator:
        error = evaluator.evaluate({"x": 0}).error
    assert error is not None
    assert error.kind == "memory_limit_exceeded"
    until(lambda: not is_alive(int(flags.text("stray"))))
