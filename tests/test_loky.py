"""Jobs in the workers of loky: what they have beside those of the process evaluator, and that they lack nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

pytest.importorskip("loky", reason="the extra 'loky' brings it")

import loky

import runfunctions
from paraval import Evaluator, Job, JobStatus, LokyEvaluator, ParavalError, RunningJob
from paraval.storage import MemoryStorage
from runfunctions import Flags, double, sometimes_wrong, wrong_configuration
from support import CountingStorage, configurations, outputs, run_all, soon, until, until_async
from workers import Driver, by_x, children, errors, is_alive, open_files, timed_out, worker_marks

pytestmark = worker_marks


def make(function: Callable[..., Any], **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, "loky", kwargs)


def run(function: Callable[..., Any], args_list: list[dict[str, Any]], **kwargs: Any) -> list[Job]:
    """Run jobs; give them in the order of submission."""
    return run_all(make(function, **kwargs), args_list)


# -- what runs ---------------------------------------------------------------------------------------------------------


def test_functions_of_all_kinds() -> None:
    scale = 2

    async def coroutine(job: RunningJob) -> Any:
        await asyncio.sleep(0)
        return job["x"] * scale

    for function in (double, lambda job: job["x"] * scale, runfunctions.Scaler(2).method, coroutine):
        jobs = run(function, configurations(3), num_workers=1)
        assert errors(jobs) == []
        assert [job.output for job in jobs] == [0, 2, 4]


def test_the_class() -> None:
    before = children()
    evaluator = make(double, num_workers=3)
    assert type(evaluator) is LokyEvaluator
    assert evaluator.cancellation == "kill"
    assert evaluator.num_workers == 3
    assert children() <= before, "nothing starts before there is work"


def test_a_flood_of_tiny_jobs() -> None:
    storage = CountingStorage()
    jobs = run(double, configurations(2000), num_workers=2, storage=storage)
    assert errors(jobs) == []
    assert [job.output for job in jobs] == [2 * x for x in range(2000)]
    assert set(storage.terminal.values()) == {1}


SCRIPT = """
from paraval import Evaluator

class Point:
    def __init__(self, x):
        self.x = x

def helper(point):
    return Point(point.x * 2)

def run(job):
    return helper(job["point"])

evaluator = Evaluator.create(run, "loky", {"num_workers": 2})
evaluator.submit([{"point": Point(x)} for x in range(4)])
evaluator.gather("ALL")
assert [job.output.x for job in evaluator.jobs] == [0, 2, 4, 6], evaluator.jobs
evaluator.close()
print("done")
"""


def test_a_script_needs_no_guard_and_nothing_complains_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "always", str(path)], capture_output=True, encoding="utf-8", timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"variable 'lock'.*cannot be pickled") as caught:
        make(lambda job: lock.locked())
    assert isinstance(caught.value, ParavalError)

    def function(job: RunningJob) -> Any:
        return {"deep": [1, threading.Lock()]} if job["x"] == 1 else 0

    jobs = run(function, [{"x": {"y": [lock]}}, {"x": 1}, {"x": 2}], num_workers=1)
    messages = [None if job.error is None else job.error.message for job in jobs]
    assert str(messages[0]).startswith("the arguments['x']['y'][0] cannot be pickled: lock object")
    assert str(messages[1]).startswith("the result['deep'][1] cannot be pickled: lock object")
    assert messages[2] is None


def test_workers_are_not_those_of_the_reusable_executor() -> None:
    executor = loky.get_reusable_executor(max_workers=1)
    try:
        others = executor.submit(os.getpid).result(30)
        with make(runfunctions.pid, num_workers=1) as first, make(runfunctions.pid, num_workers=1) as second:
            pids = {evaluator.evaluate({}).output for evaluator in (first, second)}
            assert len(pids | {others, os.getpid()}) == 4
        assert executor.submit(os.getpid).result(30) == others
    finally:
        executor.shutdown(wait=True)


def test_the_limit_of_a_worker_and_its_initializer(flags: Flags) -> None:
    jobs = run(
        runfunctions.pid,
        configurations(5),
        num_workers=1,
        max_jobs_per_worker=2,
        initializer=lambda: flags.put(f"made-{os.getpid()}"),
    )
    assert errors(jobs) == []
    pids = [job.output for job in jobs]
    assert [len({*pids[at : at + 2]}) for at in (0, 2, 4)] == [1, 1, 1]
    assert len(set(pids)) == 3
    assert set(flags.names("made-")) == {f"made-{pid}" for pid in pids}


def test_what_a_job_records_is_there_while_it_runs(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        job.record(1, 0.5)
        flags.put("recorded")
        flags.wait("go")
        return job.storage.load_search_value(str(job.id).rpartition(".")[0], "said")

    storage = MemoryStorage()
    with make(function, storage=storage) as evaluator:
        evaluator.submit(configurations(1))
        flags.wait("recorded")
        assert storage.load_job("0.0")["intermediate"] == {"budget": [1], "objective": [0.5]}
        storage.store_search_value("0", "said", "hello")
        flags.put("go")
        (job,) = evaluator.gather("ALL")
    assert job.output == "hello"


def test_what_a_job_prints_is_kept_also_when_it_crashes() -> None:
    jobs = run(runfunctions.chatter, configurations(3), num_workers=1, capture_output=True)
    assert [job.stdout for job in jobs] == [
        "out 0\nbelow 0\n",
        "out 1\nbelow 1\nlast words\n",
        "out 2\nbelow 2\n",
    ]
    assert [str(job.stderr).partition("\n")[0] for job in jobs] == ["err 0", "err 1", "err 2"]
    assert [job.failed for job in jobs] == [False, True, False]


def test_the_time_of_a_job_begins_when_its_worker_is_ready() -> None:
    jobs = run(lambda job: job["x"], configurations(2), initializer=lambda: time.sleep(0.6), job_timeout=0.5)
    assert errors(jobs) == []


# -- what goes wrong ---------------------------------------------------------------------------------------------------

# (What each crash does is in test_crashes.)


def test_a_crash_among_jobs_that_were_sent_ahead() -> None:
    args_list: list[dict[str, Any]] = configurations(100)
    args_list[50] = wrong_configuration("running", "kill")
    jobs = run(sometimes_wrong, args_list, num_workers=2, batching=40)
    assert [number for number, job in enumerate(jobs) if job.failed] == [50]


def test_a_worker_that_cannot_start_is_the_failure_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with make(double, kill_grace=0.1) as evaluator:
        with monkeypatch.context() as patch:
            patch.setattr("paraval.backends.loky.ProcessPoolExecutor", lambda **_kwargs: 1 / 0)
            evaluator.submit(configurations(1))
            (job,) = evaluator.gather("ALL")
        assert job.error is not None
        assert job.error.kind == "worker_died"
        assert job.error.message == "loky could not start a worker: ZeroDivisionError: division by zero"
        assert evaluator.evaluate({"x": 1}).output == 2


def test_without_loky_the_extra_is_named() -> None:
    program = """
    import sys
    sys.modules["loky"] = None
    try:
        from paraval import LokyEvaluator
    except ImportError as exc:
        print(type(exc).__name__, exc)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    assert done.stdout == "MissingExtraError the loky evaluator needs loky: pip install 'paraval[loky]'\n"


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_a_job_is_asked_to_stop_and_then_killed_with_all_it_started(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 0:  # does as it is told
            while not job.stopped():
                time.sleep(0.002)
            flags.put("told", job.status.name)
            return "stopped"
        if job["x"] == 1:  # does not
            runfunctions.ignore_requests()
            flags.put("sleeper", runfunctions.start_sleeper())
            flags.put("pid", os.getpid())
            while True:
                runfunctions.hold_the_gil(60)
        return job["x"]

    with make(function, num_workers=2, job_timeout=0.4, kill_grace=0.2) as evaluator:
        evaluator.submit(configurations(6))
        jobs = by_x(evaluator.gather("ALL"))
        assert timed_out(jobs[0])
        assert jobs[0].metadata["returned"] == "stopped"
        assert flags.text("told") == "CANCELLING"
        assert timed_out(jobs[1])
        assert [jobs[x].output for x in range(2, 6)] == [2, 3, 4, 5]
        for name in ("pid", "sleeper"):
            until(lambda name=name: not is_alive(int(flags.text(name))))  # type: ignore[misc] # no type for the default


@pytest.mark.anyio
async def test_cancelling_the_caller_kills_its_job_alone(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put(f"pid-{job['x']}", os.getpid())
        if job["x"]:
            time.sleep(60)
        flags.wait("go")
        return "done"

    async with make(function, num_workers=2, kill_grace=0.1) as evaluator:
        await evaluator.submit_async(configurations(1))
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 1})
            await until_async(lambda: flags.up("pid-0") and flags.up("pid-1"))
            group.cancel_scope.cancel()
        await until_async(lambda: not is_alive(int(flags.text("pid-1"))))
        flags.put("go")
        (job,) = await soon(evaluator.gather_async("ALL"))
        assert job.output == "done"


@pytest.mark.parametrize("how", ["stdout", "stderr", "closed"])
def test_without_standard_streams_it_says_what_to_do(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "closed":
        monkeypatch.setattr("paraval.backends.loky.is_closed", lambda number: number == 1)  # pytest needs its own
    else:
        monkeypatch.setattr(sys, how, None)
    with make(double) as evaluator:
        (job,) = run_all(evaluator, configurations(1))
    assert job.error is not None
    assert "sys.stdout and sys.stderr" in job.error.message
    assert "'process'" in job.error.message


def test_close_ends_what_runs_and_what_starts(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put("pid", os.getpid())
        time.sleep(60)

    evaluator = make(function, kill_grace=0.1)
    evaluator.submit(configurations(2))
    flags.wait("pid")
    assert [job.status for job in evaluator.close()] == [JobStatus.CANCELLED] * 2
    evaluator.submit(configurations(1))  # its worker is on its way up when it is stopped
    assert len(evaluator.close()) == 1


def test_a_worker_killed_while_a_large_argument_is_on_its_way_leaves_nothing(flags: Flags) -> None:
    class Slow:
        def __init__(self) -> None:
            self.data = bytes(20_000_000)

        def __setstate__(self, state: Any) -> None:
            flags.put("arrives")
            time.sleep(60)

    with make(double, kill_grace=0.1) as evaluator:
        evaluator.evaluate({"x": 1})
        before = threading.active_count()
        evaluator.submit([{"x": Slow(), "y": bytes(20_000_000)}] * 2)
        flags.wait("arrives")
        evaluator.timeout = 0.01
        assert all(timed_out(job) for job in evaluator.gather("ALL"))
        evaluator.timeout = None
        assert evaluator.evaluate({"x": 2}).output == 4
        until(lambda: threading.active_count() <= before)


def _semaphores() -> int:
    return sum(f"loky-{os.getpid()}-" in entry.name for entry in Path("/dev/shm").iterdir())  # noqa: S108 - looked at


def test_workers_that_come_and_go_leave_nothing() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] % 3 == 1:
            os._exit(1)
        return job["x"]

    def once() -> tuple[int, int, int]:
        jobs = run(function, configurations(6), num_workers=2)
        assert outputs(job for job in jobs if not job.failed) == [0, 2, 3, 5]
        until(lambda: not any(thread.name.startswith("ExecutorManager") for thread in threading.enumerate()))
        gc.collect()
        return len(open_files()), threading.active_count(), _semaphores()

    first = once()
    last = [once() for _ in range(4)][-1]
    # What the last two workers' executors hold may await its collection; that of the sixteen before must be gone.
    assert all(now <= then + 2 for now, then in zip(last, first, strict=True)), (first, last)


# -- the driver --------------------------------------------------------------------------------------------------------

JOBS = """
import os, time
from paraval import Evaluator

def job(job):
    flags.put(f"sleeper-{job['x']}", start_sleeper())
    flags.put(f"pid-{job['x']}", os.getpid())
    if job["x"]:
        hold_the_gil(60)
    time.sleep(60)

evaluator = Evaluator.create(job, "loky", {"num_workers": 2, "kill_grace": 0.2})
evaluator.submit([{"x": x} for x in range(3)])
flags.wait("pid-0", "pid-1")
"""


def test_a_driver_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    with Driver(JOBS + 'evaluator.gather("ALL")', tmp_path) as driver:
        driver.wait_for("pid-0", "pid-1")
        driver.kill()
        driver.wait()
        driver.everybody_is_gone(5.0)


def test_a_driver_may_end_without_close(tmp_path: Path) -> None:
    with Driver(JOBS, tmp_path, "-W", "default") as driver:
        assert driver.wait() == 0
        driver.everybody_is_gone(5.0)
        assert "ResourceWarning" in driver.output
        assert "was not closed" in driver.output
        assert not driver.flags.up("pid-2")


def test_no_other_process_is_started_beside_the_workers() -> None:
    with make(double, num_workers=2) as evaluator:
        evaluator.submit(configurations(4))
        evaluator.gather("ALL")
        assert not vars(evaluator._backend)["_prepared"]
