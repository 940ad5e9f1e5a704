"""Jobs that lie on the tray of a busy worker: they are nobody's until it begins them."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import anyio
import pytest

import runfunctions
from paraval import Evaluator, Job, JobStatus, RunningJob
from paraval.backends.packing import Packer
from paraval.backends.process import ProcessBackend
from paraval.backends.tray import Tray
from paraval.storage import MemoryStorage
from paraval.worker.frames import HEAD, MESSAGE
from runfunctions import Flags, double
from support import configurations, outputs, soon, until, until_async
from workers import LOKY, by_x, errors, needs_trio, timed_out, worker_marks

pytestmark = worker_marks
both_methods = pytest.mark.parametrize("method", ["process", LOKY])
two_loops = pytest.mark.parametrize("anyio_backend", ["asyncio", pytest.param("trio", marks=needs_trio)])

LONG_S = 0.06


class OtherProcessStorage(MemoryStorage):
    """Behaves as a store that may block: it is called in a thread."""

    by_reference = False


def make(function: Callable[..., Any], method: str = "process", **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, method, {"num_workers": 1, **kwargs})


class Trays:
    """What was laid on any tray, and taken back."""

    laid = 0
    back = 0


@pytest.fixture
def trays(monkeypatch: pytest.MonkeyPatch) -> Trays:
    trays, put, take_back = Trays(), Tray.put, Tray.take_back

    def noted_put(tray: Tray, number: int, message: bytes) -> bool:
        is_laid = put(tray, number, message)
        trays.laid += is_laid
        return is_laid

    def noted_take_back(tray: Tray) -> set[int]:
        numbers = take_back(tray)
        trays.back += len(numbers)
        return numbers

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
    assert [tray.put(number, b"text") for number in (1, 2, 3)] == [True] * 3
    assert os.read(worker, 100) == (1).to_bytes(HEAD, "little") + b"text"
    assert tray.take_back() == {2, 3}
    assert tray.take_back() == set()
    with pytest.raises(BlockingIOError):
        os.read(worker, 100)
    assert tray.put(4, b"more")
    assert os.read(worker, 100)[HEAD:] == b"more"
    tray.close()
    assert (tray.put(5, b""), tray.take_back()) == (False, set())
    os.close(worker)


def test_a_tray_takes_no_more_than_it_has_room_for() -> None:
    tray = Tray()
    assert not tray.put(1, bytes(MESSAGE))
    laid = 0
    while tray.put(laid, bytes(MESSAGE - HEAD)):
        laid += 1
    assert laid > 0
    assert tray.take_back() == set(range(laid))
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
async def test_a_worker_says_that_it_waits_and_looks_again_when_it_is_told() -> None:
    evaluator = make(double)
    backend = cast("ProcessBackend", evaluator._make_backend())
    process = backend.start_worker(backend.setup(evaluator._spec))
    frames: list[Any] = []

    async def next_frame() -> Any:
        while not frames:
            frames.extend(frame[:2] for frame in await soon(process.receive()))
        return frames.pop(0)

    def jobs(*, more: bool = True) -> bytes:
        number = process.next_number
        return pickle.dumps(("jobs", number, [f"0.{number}"], [{"x": number}], 0.1, more))

    look = pickle.dumps(("look",))
    await process.send_jobs(jobs())
    assert [await next_frame() for _ in range(4)] == [("ready", 0), ("begun", 1), ("done", 1), ("idle", 1)]
    assert process.put_ahead(jobs())
    assert process.put_ahead(jobs())
    await process.send(look)
    assert [await next_frame() for _ in range(3)] == [("done", 2), ("done", 3), ("idle", 3)]
    assert process.put_ahead(jobs())
    assert process.take_back() == {4}
    await process.send(look)  # too late
    assert await next_frame() == ("idle", 3)
    await process.send_jobs(jobs(more=False))  # of which there will be no more, so that it need not look
    assert await next_frame() == ("done", 5)
    await process.send_jobs(jobs())
    assert [await next_frame() for _ in range(3)] == [("begun", 6), ("done", 6), ("idle", 6)]
    await process.retire()


class _Interrupted:
    """The end of a tray where the driver reads, but for a pause after the first message."""

    def __init__(self, outlet: Any, pause: Callable[[], object]) -> None:
        self._outlet = outlet
        self._pause = pause
        self._reads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outlet, name)

    def recv(self, size: int) -> bytes:
        if self._reads == 1:
            self._pause()
        data: bytes = self._outlet.recv(size)
        self._reads += 1
        return data


@both_methods
def test_a_worker_may_take_a_message_between_two_that_are_taken_back(
    method: str, flags: Flags, trays: Trays, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_back = Tray.take_back
    crossed: list[set[int]] = []

    def interrupted_take_back(tray: Tray) -> set[int]:
        outlet: Any = tray._outlet

        def pause() -> None:  # until the worker has taken another
            flags.put("go-running")
            until(lambda: len(flags.names("ran-")) > ran)

        ran = len(flags.names("ran-"))
        is_test = flags.up("cancel") and not crossed
        if is_test:
            tray._outlet = cast("Any", _Interrupted(outlet, pause))
        try:
            numbers = take_back(tray)
        finally:
            tray._outlet = outlet
        if is_test and numbers:
            crossed.append(numbers)
        return numbers

    monkeypatch.setattr(Tray, "take_back", interrupted_take_back)

    def function(job: RunningJob) -> Any:
        flags.put(f"ran-{job['x']}-{time.monotonic_ns()}")
        if job["x"] == "running":
            flags.put("began-running")
            flags.wait("go-running")
        time.sleep(0.005)  # short: several are sent ahead
        return job["x"]

    with make(function, method) as evaluator:
        evaluator.submit([{"x": -1}] * 12)
        evaluator.gather("ALL")
        evaluator.submit([{"x": 0}, {"x": "running"}, *configurations(30)])
        until(lambda: flags.up("began-running") and trays.laid >= 2)
        flags.put("cancel")
        (second,) = (job for job in evaluator.jobs if job.args["x"] == 2)
        evaluator._cancel(second, "the test wants it")
        jobs = evaluator.gather("ALL")
    assert crossed
    assert len(jobs) == 32
    assert [job.args["x"] for job in jobs if job.error is not None] == [2]
    assert [runs(flags, x) for x in ("running", *range(1, 30))] == [1, 1, 0] + [1] * 27


@both_methods
@pytest.mark.parametrize("reopens", [False, True], ids=["closes", "reopens"])
def test_a_job_that_closes_the_tray_keeps_nobody_from_being_run(method: str, reopens: bool, flags: Flags) -> None:
    def special(_job: RunningJob) -> Any:
        for number in range(3, 100):
            with contextlib.suppress(OSError), socket.fromfd(number, 0, 0) as copy:
                if copy.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_SEQPACKET:
                    os.close(number)
                    if reopens:
                        os.dup2(os.open("/dev/zero", os.O_RDONLY), number)
                    flags.put("closed")
        return "closed"

    with make(long_jobs(flags, special), method) as evaluator:
        learn(evaluator)
        evaluator.submit([{"x": 0}, {"x": "closes"}, *configurations(4)])
        evaluator.gather("ALL")
    assert flags.up("closed")
    assert errors(evaluator.jobs) == []


def test_what_was_given_back_and_sent_ahead_again_is_under_the_time_limit(flags: Flags) -> None:
    """Behind a job that takes longer than was thought, they wait for the same worker."""

    def function(job: RunningJob) -> Any:
        if job["x"] == 40:
            for number in range(40):
                time.sleep(0.02)
                job.record(number, 0.0)
        if job["x"] == 45:
            time.sleep(50)
        return job["x"]

    with make(function, job_timeout=1.5, kill_grace=0.1) as evaluator:
        evaluator.submit([{"x": -1}] * 500)
        evaluator.gather("ALL")
        evaluator.submit(configurations(100))
        jobs = by_x(evaluator.gather("ALL"))
    assert timed_out(jobs.pop(45))
    assert errors(list(jobs.values())) == []


def test_what_cannot_be_packed_ahead_goes_the_usual_way(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_soon = Packer.pack_soon
    failed: list[int] = []

    def sometimes(packer: Packer, jobs: Any, most: int) -> Any:
        if len(failed) < 3:
            failed.append(1)
            raise MemoryError
        return pack_soon(packer, jobs, most)

    monkeypatch.setattr(Packer, "pack_soon", sometimes)
    with make(long_jobs(flags)) as evaluator:
        learn(evaluator)
        evaluator.submit(configurations(8))
        assert outputs(evaluator.gather("ALL")) == list(range(8))
    assert len(failed) == 3


def test_a_slow_job_that_calls_its_storage_holds_nothing_back(flags: Flags, trays: Trays) -> None:
    """Whatever its worker says, it has not begun what it has ahead."""

    def special(job: RunningJob) -> Any:
        number = 0
        while not flags.up("go"):
            job.record(number, 0.0)
            number += 1
            time.sleep(0.005)
        return "long"

    with make(long_jobs(flags, special), num_workers=2, storage=OtherProcessStorage()) as evaluator:
        evaluator.submit([{"x": -1}] * 8)
        evaluator.gather("ALL")
        evaluator.submit([{"x": 1000}, {"x": "long"}, *configurations(40)])
        while not any(job.args["x"] == 20 for job in evaluator.gather("BATCH", 1)):
            pass
        ended = {job.args["x"] for job in evaluator.jobs[8:] if job.status is JobStatus.DONE}
        assert set(range(10)) <= ended
        flags.put("go")
        evaluator.gather("ALL")
    assert errors(evaluator.jobs) == []
    assert trays.back > 0


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
