"""Jobs that lie on the tray of a busy worker: they are nobody's until it begins them."""

from __future__ import annotations

import itertools
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from typing import Any, cast

import anyio
import pytest

import runfunctions
from paraval import Evaluator, Job, JobStatus, RunningJob
from paraval.backends.process import ProcessBackend
from paraval.backends.tray import Tray
from runfunctions import Flags, double
from support import configurations, outputs, soon, until, until_async
from workers import LOKY, by_x, errors, needs_trio, timed_out, worker_marks

pytestmark = worker_marks
both_methods = pytest.mark.parametrize("method", ["process", LOKY])
two_loops = pytest.mark.parametrize("anyio_backend", ["asyncio", pytest.param("trio", marks=needs_trio)])

LONG_S = 0.06


def make(function: Callable[..., Any], method: str = "process", **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, method, {"num_workers": 1, **kwargs})


class Trays:
    """What was laid on any tray, and taken back."""

    laid = 0
    back = 0


@pytest.fixture
def trays(monkeypatch: pytest.MonkeyPatch) -> Trays:
    trays, put, take_back = Trays(), Tray.put, Tray.take_back

    def noted_put(tray: Tray, message: bytes) -> bool:
        is_laid = put(tray, message)
        trays.laid += is_laid
        return is_laid

    def noted_take_back(tray: Tray) -> int:
        count = take_back(tray)
        trays.back += count
        return count

    monkeypatch.setattr(Tray, "put", noted_put)
    monkeypatch.setattr(Tray, "take_back", noted_take_back)
    return trays


def long_jobs(flags: Flags, special: Callable[[RunningJob], Any] | None = None) -> Callable[[RunningJob], Any]:
    """Make a run-function of long jobs, which says what it runs; that of a string is ``special``."""

    def function(job: RunningJob) -> Any:
        x = job["x"]
        flags.put(f"ran-{x}-{time.monotonic_ns()}")
        if isinstance(x, str) and special is not None:
            return special(job)
        time.sleep(LONG_S)
        return x

    return function


def waits(flags: Flags) -> Callable[[RunningJob], Any]:
    def special(job: RunningJob) -> Any:
        flags.put(f"began-{job['x']}")
        flags.wait(f"go-{job['x']}")
        return job["x"]

    return special


def learn(evaluator: Evaluator) -> None:
    """Have it see that jobs are long."""
    evaluator.submit([{"x": -1}] * 2)
    evaluator.gather("ALL")


def runs(flags: Flags, x: object) -> int:
    return len(flags.names(f"ran-{x}-"))


# -- the tray ----------------------------------------------------------------------------------------------------------


def test_what_lies_on_a_tray_goes_to_whoever_takes_it() -> None:
    tray = Tray()
    worker = os.dup(tray.fileno())
    assert [tray.put(message) for message in (b"one", b"two", b"three")] == [True] * 3
    assert os.read(worker, 100) == b"one"
    assert tray.take_back() == 2
    assert tray.take_back() == 0
    with pytest.raises(BlockingIOError):
        os.read(worker, 100)
    assert tray.put(b"four")
    assert os.read(worker, 100) == b"four"
    tray.close()
    assert (tray.put(b"five"), tray.take_back()) == (False, 0)
    os.close(worker)


def test_a_tray_takes_no_more_than_it_has_room_for() -> None:
    tray = Tray()
    assert not tray.put(bytes((1 << 16) + 1))
    laid = 0
    while tray.put(bytes(1 << 15)):
        laid += 1
    assert laid > 0
    assert tray.take_back() == laid
    tray.close()


def test_where_few_files_may_be_open_there_are_no_trays() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        assert Tray.can_be_had_by(128)
        assert not Tray.can_be_had_by(129)
        with make(double, num_workers=129) as evaluator:
            evaluator.submit(configurations(4))
            assert outputs(evaluator.gather("ALL")) == [0, 2, 4, 6]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@both_methods
@pytest.mark.parametrize(
    "option", [{"capture_output": True}, {"memory_limit": 2e9}], ids=lambda option: next(iter(option))
)
def test_what_a_job_prints_or_holds_is_its_own(method: str, option: dict[str, Any], flags: Flags, trays: Trays) -> None:
    with make(long_jobs(flags), method, **option) as evaluator:
        evaluator.submit(configurations(5))
        assert outputs(evaluator.gather("ALL")) == list(range(5))
    assert trays.laid == 0


@pytest.mark.anyio
@two_loops
async def test_a_worker_that_has_overlooked_something_is_told() -> None:
    """It waits already, and says so, when something is laid down."""
    evaluator = make(double)
    backend = cast("ProcessBackend", evaluator._make_backend())
    process = backend.start_worker(backend.setup(evaluator._spec))

    frames: list[Any] = []

    async def receive(kind: str) -> Any:
        while True:
            while not frames:
                frames.extend(await soon(process.receive()))
            frame = frames.pop(0)
            if frame[0] == kind:
                return frame[1]

    def jobs(x: int, number: int | None = None) -> bytes:
        return pickle.dumps(("jobs", number or process.next_number, [(f"0.{x}", {"x": x})], 0.1, True))

    await process.send_jobs(jobs(1))
    assert await receive("idle") == 1
    assert not process.overlooks(1)
    assert process.put_ahead(jobs(2))
    assert process.overlooks(1)
    await process.send(pickle.dumps(("look",)))
    ((job_id, *_, value),) = await receive("done")
    assert (job_id, value) == ("0.2", 4)
    assert await receive("idle") == 2
    assert process.put_ahead(jobs(3))
    assert process.take_back() == 1
    await process.send(pickle.dumps(("look",)))  # too late
    assert await receive("idle") == 2
    assert not process.overlooks(2)
    await process.send_jobs(jobs(4))
    assert not process.overlooks(2)  # what it said before it saw these
    assert await receive("idle") == 3
    # It looks at its tray before it has read what was sent to it before that was laid there.
    assert process.tray is not None
    assert process.tray.put(jobs(6, 5))
    await process.send(pickle.dumps(("look",)))
    await process.send_jobs(jobs(5, 4))
    assert [(await receive("done"))[0][0] for _ in range(2)] == ["0.5", "0.6"]
    assert await receive("idle") == 5
    await process.retire()


# -- what is ahead is nobody's -----------------------------------------------------------------------------------------


@both_methods
def test_a_worker_finds_its_next_job(method: str, flags: Flags, trays: Trays) -> None:
    with make(long_jobs(flags), method) as evaluator:
        learn(evaluator)
        evaluator.submit(configurations(5))
        jobs = evaluator.gather("ALL")
    assert outputs(jobs) == list(range(5))
    assert trays.laid >= 3
    spans = sorted((job.timing.started or 0.0, job.timing.finished or 0.0) for job in jobs)
    assert all(after[0] >= before[1] for before, after in itertools.pairwise(spans))


@both_methods
@pytest.mark.anyio
@two_loops
async def test_a_job_that_is_cancelled_ahead_disturbs_nobody(method: str, flags: Flags, trays: Trays) -> None:
    async with make(long_jobs(flags, waits(flags)), method, kill_grace=0.2) as evaluator:
        evaluator.submit([{"x": -1}] * 2)
        await soon(evaluator.gather_async("ALL"))
        evaluator.submit([{"x": "gate"}])
        await until_async(lambda: flags.up("began-gate"))
        evaluator.submit([{"x": "running"}])
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 7})
            await until_async(lambda: evaluator.statistics().submitted == 5)
            evaluator.submit([{"x": 8}])
            flags.put("go-gate")
            await until_async(lambda: flags.up("began-running") and trays.laid > 0)
            group.cancel_scope.cancel()
        assert trays.back > 0
        assert evaluator.statistics().running == 1
        flags.put("go-running")
        jobs = await soon(evaluator.gather_async("ALL"))
    assert errors(jobs) == []
    assert {job.args["x"] for job in jobs} == {"gate", "running", 8}
    assert [runs(flags, x) for x in ("running", 7, 8)] == [1, 0, 1]


@both_methods
@pytest.mark.parametrize("holds", [False, True], ids=["waits", "holds-the-gil"])
def test_an_idle_worker_is_given_what_another_has_ahead(method: str, holds: bool, flags: Flags, trays: Trays) -> None:
    wait = waits(flags)

    def special(job: RunningJob) -> Any:
        if not holds:
            return wait(job)
        flags.put("began-long")
        runfunctions.hold_the_gil(2)
        return job["x"]

    with make(long_jobs(flags, special), method, num_workers=2) as evaluator:
        evaluator.submit([{"x": -1}] * 8)
        evaluator.gather("ALL")
        evaluator.submit([{"x": "long"}, *configurations(6)])
        others: list[Job] = []
        while len(others) < 6:
            others += evaluator.gather("BATCH", 1)
        assert outputs(others) == list(range(6))
        (long,) = (job for job in evaluator.jobs if job.args["x"] == "long")
        assert long.status is JobStatus.RUNNING
        flags.put("go-long")
        evaluator.gather("ALL")
    assert trays.laid > 0
    assert errors(evaluator.jobs) == []
    assert {x: runs(flags, x) for x in ("long", *range(6))} == dict.fromkeys(["long", *range(6)], 1)


def test_a_slow_worker_does_not_hold_back_what_it_has_ahead(flags: Flags, trays: Trays) -> None:
    """The others have enough to do, so that none is ever idle."""
    with make(long_jobs(flags, waits(flags)), num_workers=2) as evaluator:
        evaluator.submit([{"x": -1}] * 8)
        evaluator.gather("ALL")
        evaluator.submit([{"x": 1000}, {"x": "long"}, *configurations(40)])
        while len(jobs := evaluator.gather("BATCH", 1)) > 0:
            if any(job.args["x"] == 20 for job in jobs):
                break
        ended = [job.args["x"] for job in evaluator.jobs[8:] if job.status is JobStatus.DONE]
        assert set(range(10)) <= set(ended)
        flags.put("go-long")
        evaluator.gather("ALL")
    assert errors(evaluator.jobs) == []
    assert trays.back > 0


def test_what_is_ahead_waits(flags: Flags, trays: Trays) -> None:
    with make(long_jobs(flags, waits(flags))) as evaluator:
        learn(evaluator)
        evaluator.submit([{"x": "first"}, {"x": "second"}, {"x": "third"}])
        until(lambda: flags.up("began-first") and trays.laid > 0)
        first, second, third = evaluator.jobs[-3:]
        assert [job.status for job in (first, second, third)] == [JobStatus.RUNNING, JobStatus.READY, JobStatus.READY]
        assert evaluator.statistics().running == 1
        assert evaluator.statistics().pending == 2
        flags.put("go-first")
        until(lambda: second.status is JobStatus.RUNNING)
        flags.put("go-second")
        flags.put("go-third")
        evaluator.gather("ALL")
    assert errors(evaluator.jobs) == []


# -- faults ------------------------------------------------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("holds", [False, True], ids=["sleeps", "holds-the-gil"])
def test_a_time_limit_strikes_the_job_that_runs(method: str, holds: bool, flags: Flags, trays: Trays) -> None:
    def special(_job: RunningJob) -> Any:
        while True:
            if holds:
                runfunctions.hold_the_gil(10)
            time.sleep(10)

    with make(long_jobs(flags, special), method, job_timeout=1.2, kill_grace=0.1) as evaluator:
        learn(evaluator)
        evaluator.submit([{"x": 0}, {"x": "endless"}, {"x": 1}, {"x": 2}, {"x": 3}])
        evaluator.gather("ALL")
    jobs = by_x(evaluator.jobs)
    assert timed_out(jobs["endless"])
    assert errors([jobs[x] for x in range(4)]) == []
    assert [runs(flags, x) for x in ("endless", *range(4))] == [1] * 5
    assert trays.back > 0


@both_methods
def test_the_death_of_a_worker_is_blamed_on_what_it_ran(method: str, flags: Flags, trays: Trays) -> None:
    with make(long_jobs(flags, lambda _job: os._exit(3)), method) as evaluator:
        learn(evaluator)
        evaluator.submit([{"x": 0}, {"x": "dies"}, {"x": 1}, {"x": 2}, {"x": "dies too"}, {"x": 3}])
        evaluator.gather("ALL")
    jobs = by_x(evaluator.jobs)
    for guilty in ("dies", "dies too"):
        error = jobs[guilty].error
        assert error is not None
        assert (error.kind, error.exit_code) == ("worker_died", 3)
    assert errors([jobs[x] for x in range(4)]) == []
    assert [runs(flags, x) for x in ("dies", "dies too", *range(4))] == [1] * 6
    assert trays.back > 0


@both_methods
def test_a_worker_that_is_asked_to_stop_by_others_goes_on_with_what_is_ahead(method: str, flags: Flags) -> None:
    def special(job: RunningJob) -> Any:
        flags.put("pid", os.getpid())
        while not job.stopped():
            time.sleep(0.002)
        return "asked to stop"

    with make(long_jobs(flags, special), method) as evaluator:
        learn(evaluator)
        evaluator.submit([{"x": "polite"}, {"x": 1}, {"x": 2}, {"x": 3}])
        os.kill(int(flags.wait("pid")[0]), signal.SIGTERM)
        evaluator.gather("ALL")
    jobs = by_x(evaluator.jobs)
    assert [jobs[x].output for x in ("polite", 1, 2, 3)] == ["asked to stop", 1, 2, 3]


def test_the_end_of_an_evaluator_begins_nothing_that_was_ahead(flags: Flags, trays: Trays) -> None:
    with make(long_jobs(flags, waits(flags)), kill_grace=0.1) as evaluator:
        learn(evaluator)
        evaluator.submit([{"x": "first"}, {"x": "second"}, {"x": "third"}])
        until(lambda: flags.up("began-first") and trays.laid > 0)
    assert [job.status for job in evaluator.jobs[-3:]] == [JobStatus.CANCELLED] * 3
    assert [runs(flags, x) for x in ("first", "second", "third")] == [1, 0, 0]


# -- what is not sent ahead --------------------------------------------------------------------------------------------


@both_methods
def test_a_worker_gets_no_more_jobs_than_it_may_run(method: str, flags: Flags) -> None:
    def function(_job: RunningJob) -> int:
        time.sleep(0.03)
        return os.getpid()

    with make(function, method, max_jobs_per_worker=3) as evaluator:
        evaluator.submit(configurations(12))
        pids = [job.output for job in evaluator.gather("ALL")]
    assert sorted(pids.count(pid) for pid in set(pids)) == [3] * 4


@both_methods
def test_what_is_too_large_or_cannot_be_sent_goes_the_usual_way(method: str) -> None:
    def function(job: RunningJob) -> int:
        time.sleep(0.03)
        return len(job["x"])

    sizes = [0, 1, 40_000, 2, 3, 300_000, 300_000, 4, 5]
    with make(function, method) as evaluator:
        evaluator.submit([{"x": bytes(4)}] * 4)
        evaluator.gather("ALL")
        args: list[Any] = [bytes(size) for size in sizes]
        evaluator.submit([{"x": x} for x in [*args[:4], (number for number in range(3)), *args[4:]]])
        evaluator.gather("ALL")
    jobs = evaluator.jobs[4:]
    failed = jobs.pop(4)
    assert failed.error is not None
    assert failed.error.type == "PicklingError"
    assert [job.output for job in jobs] == sizes


def test_where_the_caller_waits_for_pending_jobs_to_begin_none_is_sent_ahead(flags: Flags, trays: Trays) -> None:
    """One that was would not be pending, and not have begun."""
    with make(long_jobs(flags), max_pending=2) as evaluator:
        evaluator.submit(configurations(6))
        assert outputs(evaluator.gather("ALL")) == list(range(6))
    assert trays.laid == 0
