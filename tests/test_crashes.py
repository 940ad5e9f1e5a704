"""Jobs that end their process, or raise where nobody expects it: each fails alone, for the right reason; nothing hangs.

A backend joins the matrix by an entry in ``HOSTS``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

import runfunctions
from paraval import Evaluator, HPOJob, Job, JobStatus, RunningJob
from runfunctions import sometimes_wrong, wrong_configuration
from support import CountingStorage, configurations, outputs, run_all, soon, until
from workers import children, errors, is_alive, listening, open_files, processes, timed_out, worker_marks

pytestmark = worker_marks


@dataclass(frozen=True)
class Host:
    """A backend whose jobs run in processes that may die.

    Attributes:
        method: its name.
        requires: the module that it adapts.
        kwargs: what its evaluator needs.
    """

    method: str
    requires: str = "paraval"
    kwargs: dict[str, Any] = field(default_factory=dict)


PROCESS = Host("process")
HOSTS = [
    PROCESS,
    Host("loky", requires="loky"),
    Host("executor", kwargs={"executor": processes}),
]


@pytest.fixture(params=HOSTS, ids=lambda host: host.method)
def host(request: pytest.FixtureRequest) -> Host:
    found: Host = request.param
    pytest.importorskip(found.requires)
    return found


def make(host: Host, function: Callable[..., Any], **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, host.method, {**host.kwargs, **kwargs})


# -- the ways to use an evaluator --------------------------------------------------------------------------------------

Face = Callable[[Evaluator, list[dict[str, Any]]], list[Job]]


def plain(evaluator: Evaluator, args_list: list[dict[str, Any]]) -> list[Job]:
    with evaluator:
        evaluator.submit(args_list)
        return evaluator.gather("ALL")


def inside(backend: str) -> Face:
    """Use the synchronous methods inside a running event loop."""

    def face(evaluator: Evaluator, args_list: list[dict[str, Any]]) -> list[Job]:
        async def main() -> list[Job]:
            return plain(evaluator, args_list)

        return anyio.run(main, backend=backend)

    return face


def at_home_on(backend: str) -> Face:
    """Make an event loop the home, and await."""

    def face(evaluator: Evaluator, args_list: list[dict[str, Any]]) -> list[Job]:
        async def main() -> list[Job]:
            async with evaluator:
                await evaluator.submit_async(args_list)
                return await soon(evaluator.gather_async("ALL"))
            raise AssertionError("nothing was raised that could be swallowed")

        return anyio.run(main, backend=backend)

    return face


FACES: dict[str, Face] = {}
for _loop in ("asyncio", "trio"):
    FACES |= {f"sync-in-{_loop}": inside(_loop), f"async-{_loop}": at_home_on(_loop)}


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> Face:
    if "trio" in request.param:
        pytest.importorskip("trio")
    return FACES[request.param]


# -- the matrix --------------------------------------------------------------------------------------------------------

DEADLY: dict[str, tuple[int | None, int | None]] = {
    "exit": (runfunctions.EXIT_CODE, None),
    "kill": (None, signal.SIGKILL),
    "segfault": (None, signal.SIGSEGV),
}
RAISING = ["raise", "sys.exit", "interrupt"]
PLACES = ["argument", "running", "result"]


def check(job: Job, kind: str) -> None:
    """Look whether a job failed for the right reason."""
    error = job.error
    assert error is not None, job
    assert job.status is JobStatus.DONE
    assert error.attempts == 1
    if kind in DEADLY:
        assert error.kind == "worker_died", error
        assert isinstance(job, HPOJob)
        assert job.objective == "F_worker_died"
        assert (error.exit_code, error.signal) == DEADLY[kind]
        assert error.pid not in (None, os.getpid())
        assert error.host == os.uname().nodename
    else:
        assert error.kind == "exception", error
        assert "it went wrong" in error.message


def test_each_crash_is_one_failure(host: Host, face: Face) -> None:
    crash(host, face, "auto")


def test_each_crash_is_one_failure_among_jobs_sent_ahead(host: Host) -> None:
    crash(host, plain, 50)


def crash(host: Host, face: Face, batching: Any) -> None:
    crashes = [(place, kind) for place in PLACES for kind in (*DEADLY, *RAISING)]
    args_list = configurations(4)
    for number, (place, kind) in enumerate(crashes):
        args_list += [wrong_configuration(place, kind), {"x": 10 * number}, {"x": 10 * number + 1}]
    storage = CountingStorage()
    kwargs = {"num_workers": 2, "batching": batching, "storage": storage, "job_class": HPOJob}
    evaluator = make(host, sometimes_wrong, **kwargs)
    jobs = face(evaluator, args_list)
    assert len({job.id for job in jobs}) == len(jobs) == len(args_list)
    for number, (_, kind) in enumerate(crashes):
        check(evaluator.jobs[4 + 3 * number], kind)
    innocent = [job for number, job in enumerate(evaluator.jobs) if number < 4 or (number - 4) % 3]
    assert errors(innocent) == []
    assert [job.output["objective"] for job in innocent] == [2 * job.args["x"] for job in innocent]
    assert len(storage.terminal) == len(args_list)
    assert set(storage.terminal.values()) == {1}
    statistics = evaluator.statistics()
    assert (statistics.failed, statistics.done) == (len(crashes), len(innocent))


@pytest.mark.parametrize("place", ["argument", "result"])
def test_what_goes_wrong_on_the_driver_s_side_is_one_failure(host: Host, place: str) -> None:
    """The argument is pickled here, the result unpickled."""
    args_list: list[dict[str, Any]] = configurations(4)
    for kind in RAISING:
        wrong = runfunctions.WrongWhenPickled(kind) if place == "argument" else 0
        args_list += [{"x": wrong, "back": kind}, {"x": 1}]
    function = sometimes_wrong if place == "argument" else runfunctions.wrong_for_the_driver
    evaluator = make(host, function, num_workers=2, batching=50)
    jobs = plain(evaluator, args_list)
    assert len(jobs) == 10
    assert [job.args["x"] for job in jobs if not job.failed] != []
    for number, job in enumerate(evaluator.jobs):
        if number in (4, 6, 8):
            assert job.error is not None
            assert job.error.kind == "exception", job.error
            assert "it went wrong" in job.error.message
        else:
            assert job.error is None, job.error


def test_20_poison_jobs_among_1000(host: Host) -> None:
    poison_1000(host, "auto")


@pytest.mark.parametrize("batching", [False, 256])
def test_20_poison_jobs_among_1000_whatever_the_batches(batching: Any) -> None:
    poison_1000(PROCESS, batching)


def poison_1000(host: Host, batching: Any) -> None:
    poison = {x: [*DEADLY, "raise"][x % 4] for x in range(7, 1000, 50)}
    assert len(poison) == 20
    args_list: list[dict[str, Any]] = configurations(1000)
    for x, kind in poison.items():
        args_list[x] |= {"wrong": "running", "kind": kind}
    storage = CountingStorage()
    evaluator = make(host, sometimes_wrong, num_workers=2, batching=batching, storage=storage, job_class=HPOJob)
    with evaluator:
        evaluator.submit(configurations(500))  # jobs are tiny, it learns
        evaluator.gather("ALL")
        evaluator.submit(args_list)
        jobs = evaluator.gather("ALL")
    assert len(jobs) == 1000
    assert {job.args["x"] for job in jobs if job.failed} == set(poison)
    for job in jobs:
        if job.args["x"] in poison:
            check(job, poison[job.args["x"]])
        else:
            assert job.output == {"objective": 2.0 * job.args["x"]}
    assert len(storage.terminal) == 1500
    assert set(storage.terminal.values()) == {1}


def test_nothing_but_poison(host: Host) -> None:
    evaluator = make(host, sometimes_wrong, num_workers=2, batching=5, job_class=HPOJob)
    with evaluator:
        evaluator.submit([wrong_configuration("running", "exit")] * 10)
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 10
        for job in jobs:
            check(job, "exit")
        assert evaluator.evaluate({"x": 1}).output == {"objective": 2.0}


# -- exceptions cross as data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [False, 10])
def test_exceptions_cross_as_data(host: Host, batching: Any) -> None:
    names = list(runfunctions.EXCEPTIONS)
    with make(host, runfunctions.raise_by_name, batching=batching) as evaluator:
        evaluator.submit([{"name": name} for one in names for name in (one, "none")])
        evaluator.gather("ALL")
        guilty, innocent = evaluator.jobs[::2], evaluator.jobs[1::2]
    assert errors(innocent) == []
    for job in guilty:
        _, expected_type, expected_text = runfunctions.EXCEPTIONS[job.args["name"]]
        error = job.error
        assert error is not None
        assert (error.kind, error.type) == ("exception", expected_type), error.message[:1000]
        assert expected_text in error.message
        assert type(error.message) is str
        assert type(error.type) is str
        assert error.traceback is None or "raise_by_name" in error.traceback
        assert error.pid not in (None, os.getpid())
        assert error.host == os.uname().nodename
        assert job.output is None


def test_the_traceback_shows_causes_and_notes(host: Host) -> None:
    with make(host, runfunctions.raise_by_name) as evaluator:
        error = evaluator.evaluate({"name": "chain"}).error
    assert error is not None
    assert error.traceback is not None
    for text in (
        "KeyError: 'the first'",
        "The above exception was the direct cause",
        "RuntimeError: the second",
        "a note",
    ):
        assert text in error.traceback


# -- in the long run ---------------------------------------------------------------------------------------------------

# Of the process evaluator, test_process has the like.
others = pytest.mark.parametrize("host", HOSTS[1:], ids=lambda host: host.method, indirect=True)


def _pool_of_children() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@others
def test_workers_killed_at_random(host: Host) -> None:
    """Whatever moment a worker is killed at: at most the job that it ran fails, and never another."""

    def function(job: RunningJob) -> Any:
        end = time.monotonic() + job["x"] % 7 / 1000
        while time.monotonic() < end:
            pass
        return job["x"]

    storage = CountingStorage()
    random_ = random.Random(7)
    killed: set[int] = set()
    jobs: list[Job] = []
    kwargs = {"executor": _pool_of_children} if host.method == "executor" else {}
    with make(host, function, num_workers=2, storage=storage, **kwargs) as evaluator:
        before = children()
        evaluator.submit(configurations(300))
        while evaluator.statistics().done + evaluator.statistics().failed < 300:
            if len(killed) < 5 and (alive := sorted(pid for pid in children() - before if is_alive(pid))):
                pid = random_.choice(alive)
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            jobs += evaluator.gather("BATCH", 1)
        jobs += evaluator.gather("ALL")
    assert len(killed) == 5
    assert len(jobs) == 300
    assert len(storage.terminal) == 300
    assert set(storage.terminal.values()) == {1}
    failed = [job.error for job in jobs if job.error is not None]
    assert [error for error in failed if (error.kind, error.signal) != ("worker_died", signal.SIGKILL)] == []
    guilty = [error.pid for error in failed]
    assert len(set(guilty)) == len(guilty)
    assert set(guilty) <= killed
    assert outputs(job for job in jobs if job.error is None) == sorted(job.args["x"] for job in jobs if not job.failed)


@others
def test_a_long_series_leaves_nothing_open(host: Host) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] % 10 == 0:
            raise ValueError(job["x"])
        if job["x"] % 100 == 1:
            return os.getpid(), len(runfunctions.open_files(job)), threading.active_count()
        return job["x"]

    storage = CountingStorage()
    with make(host, function, num_workers=2, storage=storage) as evaluator:

        def a_round(count: int) -> tuple[int, set[threading.Thread], set[Any]]:
            evaluator.submit(configurations(count))
            jobs = evaluator.gather("ALL")
            assert len(jobs) == count
            assert sorted(job.args["x"] for job in jobs if job.failed) == list(range(0, count, 10))
            inside = {job.output for job in jobs if job.args["x"] % 100 == 1}
            # A submit that took long has the next ones made in threads, which anyio keeps for a while.
            threads = {thread for thread in threading.enumerate() if not thread.name.startswith("AnyIO")}
            return len(open_files()), threads, inside

        files, threads, inside = a_round(1000)
        files_after, threads_after, inside_after = a_round(20_000)
    assert files_after <= files
    assert threads_after <= threads
    workers = {pid for pid, _, _ in inside}  # one of them may have had nothing to do in the short round
    assert {found for found in inside_after if found[0] in workers} <= inside
    assert set(storage.terminal.values()) == {1}


@others
def test_200_mb_of_argument_and_of_result(host: Host) -> None:
    size = 200_000_000
    with make(host, runfunctions.echo) as evaluator:
        job = evaluator.evaluate({"x": bytes(size)})
        assert job.error is None
        assert len(job.output) == size


@others
def test_nothing_listens(host: Host) -> None:
    before = listening(os.getpid())
    with make(host, runfunctions.pid, num_workers=2) as evaluator:
        pid = evaluator.evaluate({}).output
        assert listening(os.getpid(), pid) == before
    assert listening(os.getpid()) == before


# -- other ways to go --------------------------------------------------------------------------------------------------

# What follows needs to know which process a job is in, and to kill it.


def run(function: Callable[..., Any], args_list: list[dict[str, Any]], **kwargs: Any) -> list[Job]:
    return run_all(make(PROCESS, function, **kwargs), args_list)


def test_three_ends_by_memory_have_three_reasons() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 0:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
            return len(bytearray(1 << 30))
        if job["x"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does when memory runs out
        return 1.0

    failed, killed, good = run(function, configurations(3), job_class=HPOJob, max_jobs_per_worker=1)
    assert isinstance(failed, HPOJob)
    assert isinstance(killed, HPOJob)
    assert (failed.objective, killed.objective) == ("F_MemoryError", "F_worker_died")
    assert good.error is None


@pytest.mark.parametrize("place", ["argument", "result"])
def test_pickling_that_never_ends_is_killed(place: str) -> None:
    def function(job: RunningJob) -> Any:
        return runfunctions.SlowWhenPickled() if job["x"] == "result" else 1

    slow: Any = runfunctions.SlowWhenUnpickled() if place == "argument" else place
    first, job, last = run(function, [{"x": 0}, {"x": slow}, {"x": 0}], job_timeout=0.4, kill_grace=0.2)
    assert timed_out(job)
    assert errors([first, last]) == []


def test_a_job_that_stops_its_process_is_killed() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return job["x"]

    jobs = run(function, configurations(3), job_timeout=0.4, kill_grace=0.2)
    assert timed_out(jobs[1])
    assert [jobs[0].output, jobs[2].output] == [0, 2]


def test_a_job_that_kills_its_group_kills_itself_alone() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 1:
            os.killpg(0, signal.SIGKILL)
        return job["x"]

    jobs = run(function, configurations(4), num_workers=2)
    assert jobs[1].error is not None
    assert jobs[1].error.signal == signal.SIGKILL
    assert errors([jobs[0], *jobs[2:]]) == []


def test_a_worker_that_dies_takes_what_its_job_started_along() -> None:
    def function(job: RunningJob) -> Any:
        job.storage.store_job_metadata(str(job.id), "sleeper", runfunctions.start_sleeper())
        os._exit(3)

    (job,) = run(function, configurations(1))
    assert job.error is not None
    assert job.error.exit_code == 3
    assert job.storage is not None
    sleeper = job.storage.load_job(job.id)["metadata"]["sleeper"]
    until(lambda: not is_alive(sleeper))  # it was sent SIGKILL


def test_a_job_that_closes_every_file_fails_alone() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 1:
            sys.stderr = None  # what it says at its end is of no interest here
            os.closerange(3, 256)
        return job["x"]

    jobs = run(function, configurations(3), batching=3)
    assert jobs[1].error is not None
    assert jobs[1].error.kind == "worker_died"
    assert [jobs[0].output, jobs[2].output] == [0, 2]


@pytest.mark.parametrize("how", ["close", "none", "file"])
def test_a_job_may_do_away_with_its_output(how: str) -> None:
    def function(job: RunningJob) -> Any:
        if how == "close":
            sys.stdout.close()
        elif how == "none":
            sys.stdout = None  # people do that
        else:
            os.close(1)
        return job["x"]

    jobs = run(function, configurations(2))
    assert [job.error for job in jobs[:1]] == [None]


def test_a_run_function_whose_import_ends_the_process() -> None:
    jobs = run(runfunctions.DeadlyFunction(), configurations(6), num_workers=2, batching=3)
    reasons = [job.error and (job.error.kind, job.error.exit_code) for job in jobs]
    assert reasons == [("worker_died", runfunctions.EXIT_CODE)] * 6


@pytest.mark.parametrize("kind", ["raise", "sys.exit"])
def test_a_run_function_whose_import_raises(kind: str) -> None:
    jobs = run(runfunctions.DeadlyFunction(kind), configurations(3), num_workers=2)
    for job in jobs:
        assert job.error is not None
        assert job.error.kind == "exception"
        assert "could not be set up: it went wrong" in job.error.message


def test_deeply_nested_data_fails_its_job_alone() -> None:
    def nested(depth: int) -> list[Any]:
        data: list[Any] = []
        for _ in range(depth):
            data = [data]
        return data

    def function(job: RunningJob) -> Any:
        return nested(job["depth"])

    jobs = run(function, [{"depth": 1, "x": nested(100_000)}, {"depth": 100_000}, {"depth": 1}], batching=3)
    for job in jobs[:2]:
        assert job.error is not None
        assert job.error.kind == "exception"
    assert outputs(jobs[2:]) == [[[]]]
