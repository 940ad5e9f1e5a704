"""The decorator ``profile`` on functions that are called by hand, and what memory is measured with."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import anyio
import cloudpickle
import pytest

import profiled
from paraval import Evaluator, Job, ParavalError, RunningJob, profile
from paraval.functions import is_async
from paraval.isolated import ChildFailedError
from paraval.job import JobContext
from paraval.memory import MemoryMeter, PeakMemory, WatchedProcess, interpreter_size, limit_in_bytes, require, supervise
from paraval.profiling import settings_of
from profiled import LIMIT, LOOK_S, MIB, Model, Picky, hoard, take
from runfunctions import Flags
from support import Latch, Program, run_program, soon, until, until_async
from workers import is_alive, worker_marks

pytestmark = worker_marks


def job(**parameters: Any) -> RunningJob:
    return RunningJob(parameters=parameters)


def impatient(running: RunningJob) -> RunningJob:
    """Have it killed soon after it was asked to stop."""
    running._live = Job(str(running.id), {})
    running._live.context = JobContext(kill_grace=0.05)
    return running


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Call a function by hand; run it if it is a coroutine function."""
    result = function(*args, **kwargs)
    report: dict[str, Any] = asyncio.run(result) if inspect.iscoroutine(result) else result
    return report


def plain(job: RunningJob, extra: int = 0) -> Any:
    """Return something."""
    return job["x"] + extra


async def coroutine(job: RunningJob, extra: int = 0) -> Any:
    """Return something."""
    await asyncio.sleep(0)
    return job["x"] + extra


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy", reason="NumPy is not installed")
    assert [limit_in_bytes("limit", kind(LIMIT)) for kind in (np.int64, np.float64, np.float32)] == [LIMIT] * 3
    function = profile(plain, memory_limit=np.int64(LIMIT), memory_tracing_interval=np.float32(0.5))
    assert settings_of(function) == settings_of(profile(plain, memory_limit=LIMIT, memory_tracing_interval=0.5))
    with Evaluator.create(functools.partial(print, "printed"), "process", {"capture_output": np.int64(9)}) as evaluator:
        assert evaluator.evaluate({}).stdout is not None


# -- the three forms, and what the function stays ----------------------------------------------------------------------


@pytest.mark.parametrize("function", [plain, coroutine])
@pytest.mark.parametrize(
    "decorate",
    [
        pytest.param(profile, id="bare"),
        pytest.param(profile(), id="with-nothing"),
        pytest.param(profile(memory=False), id="with-arguments"),
        pytest.param(lambda function: profile(function, memory=False, register=False), id="as-a-function"),
    ],
)
def test_a_profiled_function_reports_when_it_ran(decorate: Callable[..., Any], function: Callable[..., Any]) -> None:
    decorated = decorate(function)
    before = time.monotonic()
    report = call(decorated, job(x=1), extra=2)
    after = time.monotonic()
    assert report["output"] == 3
    assert report["metadata"].keys() == {"timestamp_start", "timestamp_end"}
    assert before <= report["metadata"]["timestamp_start"] <= report["metadata"]["timestamp_end"] <= after


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("function", [plain, coroutine])
def test_a_profiled_function_stays_what_it_was(function: Callable[..., Any], memory: bool) -> None:
    decorated: Any = profile(function, memory=memory)
    assert decorated.__name__ == function.__name__
    assert decorated.__qualname__ == function.__qualname__
    assert decorated.__module__ == function.__module__
    assert decorated.__doc__ == "Return something."
    assert decorated.__wrapped__ is function
    assert inspect.signature(decorated) == inspect.signature(function)
    assert inspect.iscoroutinefunction(decorated) == inspect.iscoroutinefunction(function)
    assert is_async(decorated) == is_async(function)


def test_a_profiled_function_of_a_module_is_pickled_by_its_name() -> None:
    for function in (profiled.timed, profiled.spike, profiled.async_spike):
        data = pickle.dumps(function)
        assert pickle.loads(data) is function  # noqa: S301 - it was pickled in the line above
        assert len(data) < 100


def test_a_profiled_local_function_is_pickled_by_value() -> None:
    offset = 5

    @profile(memory=True)
    def local(job: RunningJob) -> int:
        return int(job["x"]) + offset

    copied = pickle.loads(cloudpickle.dumps(local))  # noqa: S301 - likewise
    assert copied is not local
    assert call(copied, job(x=1))["output"] == 6


def test_a_process_pool_can_run_it() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        report = pool.submit(profiled.timed, job_to_send()).result()
    assert report["output"] == 1


def job_to_send() -> Any:
    return {"x": 1}  # by hand, any argument will do


class PlainCallable:
    def __call__(self, job: RunningJob) -> Any:
        return job["x"]


class AsyncCallable:
    async def __call__(self, job: RunningJob) -> Any:
        return job["x"]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(functools.partial(plain, extra=0), id="partial"),
        pytest.param(functools.partial(coroutine, extra=0), id="async-partial"),
        pytest.param(PlainCallable(), id="object"),
        pytest.param(AsyncCallable(), id="async-object"),
        pytest.param(lambda job: job["x"], id="lambda"),
    ],
)
def test_whatever_can_be_called_can_be_profiled(function: Callable[..., Any], memory: bool) -> None:
    decorated = profile(function, memory=memory)
    assert is_async(decorated) == is_async(function)
    assert call(decorated, job(x=1))["output"] == 1


def test_a_method_can_be_profiled() -> None:
    assert call(Model(2).run, job(x=1.5), offset=1)["output"] == 4.0


def test_profiled_twice_is_reported_once() -> None:
    report = call(profiled.twice, job())
    assert report["output"] != os.getpid()
    assert report["metadata"].keys() == {"timestamp_start", "timestamp_end", "memory"}


def test_what_a_function_returns_as_metadata_is_kept() -> None:
    @profile
    def run(job: RunningJob) -> Any:
        return {"objective": 1.0, "metadata": {"epochs": 3}}

    assert run(job())["output"] == {"objective": 1.0, "metadata": {"epochs": 3}}


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [profiled.spike, profiled.async_spike])
def test_the_peak_counts_however_short_it_was(function: Callable[..., Any]) -> None:
    before = time.monotonic()
    report = call(function, job(mebibytes=100))
    after = time.monotonic()
    assert report["output"] == 100 * MIB
    metadata = report["metadata"]
    assert metadata.keys() == {"timestamp_start", "timestamp_end", "memory"}
    assert 100 * MIB < metadata["memory"] < 200 * MIB
    assert before <= metadata["timestamp_start"] <= metadata["timestamp_end"] <= after


def test_the_memory_of_children_counts() -> None:
    memory = call(profiled.with_child, job(mebibytes=100))["metadata"]["memory"]
    assert 100 * MIB < memory < 200 * MIB


def test_the_memory_of_the_caller_does_not_count() -> None:
    held = take(300)
    assert call(profiled.spike, job(mebibytes=1))["metadata"]["memory"] < 100 * MIB
    del held


@pytest.mark.parametrize("function", [profiled.greedy, profiled.async_greedy])
def test_over_the_limit_the_output_says_so(function: Callable[..., Any]) -> None:
    before = time.monotonic()
    report = call(function, job())
    after = time.monotonic()
    assert report["output"] == "F_memory_limit_exceeded"
    metadata = report["metadata"]
    assert metadata.keys() == {"timestamp_start", "timestamp_end", "memory"}
    assert metadata["memory"] > LIMIT
    assert before <= metadata["timestamp_start"] <= metadata["timestamp_end"] <= after


def test_over_the_limit_memory_error_is_raised_where_asked_for() -> None:
    with pytest.raises(MemoryError, match=f"its memory limit is {LIMIT}"):
        profiled.greedy_raising(job())


def test_under_the_limit_nothing_happens() -> None:
    @profile(memory_limit=0.5 * 1024**3)  # the reference system's documentation has a float there
    def run(job: RunningJob) -> int:
        return len(take(10))

    report = run(job())
    assert report["output"] == 10 * MIB
    assert "memory" not in report["metadata"]


@pytest.mark.parametrize("limit", [None, -1, -1.0, 0])
def test_no_limit_needs_no_process(limit: float | None) -> None:
    @profile(memory_limit=limit)
    def run(job: RunningJob) -> int:
        return os.getpid()

    assert run(job())["output"] == os.getpid()


def test_what_the_function_started_is_killed_with_it() -> None:
    @profile(memory_limit=LIMIT, memory_tracing_interval=LOOK_S)
    def run(job: RunningJob) -> str:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        job.storage.store_job_metadata(str(job.id), "child", child.pid)
        return hoard()

    running = job()
    assert run(running)["output"] == "F_memory_limit_exceeded"
    pid = running.storage.load_job(str(running.id))["metadata"]["child"]
    until(lambda: not is_alive(pid))


# -- a process of its own, as if it were none --------------------------------------------------------------------------


def test_the_running_job_works() -> None:
    running = job(x=3.5)
    report = call(profiled.recording, running)
    assert report["output"] == 3.5
    record = running.storage.load_job(str(running.id))
    assert record["intermediate"] == {"budget": [1], "objective": [3.5]}
    assert record["metadata"]["seen"] == [0, {"x": 3.5}]


class Patience:
    """A stopper that has seen enough after two observations."""

    def __init__(self) -> None:
        self.job: Any = None
        self.seen: list[float] = []

    def observe(self, budget: float, objective: float) -> None:
        self.seen.append(objective)

    def stop(self) -> bool:
        return len(self.seen) >= 2

    @property
    def objective(self) -> float:
        return max(self.seen)


def test_the_stopper_works() -> None:
    @profile(memory=True)
    def run(job: RunningJob) -> Any:
        for step in range(10):
            job.record(step, -step)
            if job.stopped():
                return step, job.objective, job.stopper.job is job
        return None

    running = job()
    running.stopper = Patience()
    running.stopper.job = running
    assert run(running)["output"] == (1, 0, True)


def test_any_arguments_will_do() -> None:
    @profile(memory=True)
    def run(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert run(1, [2], three=3)["output"] == ((1, [2]), {"three": 3})
    assert run()["output"] == ((), {})


def test_a_job_is_known_by_whatever_name_it_is_passed() -> None:
    @profile(memory=True)
    def run(first: int, *, work: RunningJob) -> Any:
        return first, work["x"], work.id

    running = job(x=2)
    assert run(1, work=running)["output"] == (1, 2, running.id)


def test_it_is_another_process_each_time() -> None:
    pids = {call(profiled.process_id, job())["output"] for _ in range(2)}
    assert len(pids | {os.getpid()}) == 3


@pytest.mark.parametrize(("how", "expected"), [("value", ValueError), ("picky", Picky), ("exit", SystemExit)])
def test_what_the_function_raises_is_raised(how: str, expected: type[BaseException]) -> None:
    with pytest.raises(expected) as caught:
        profiled.fails(job(how=how))
    assert type(caught.value) is expected
    notes = "".join(caught.value.__notes__)
    assert "in process" in notes
    assert "profiled.py" in notes  # the traceback of where it was raised
    if how == "picky":
        assert (caught.value.args, getattr(caught.value, "code", None)) == (("so picky (7)",), 7)
    if how == "exit":
        assert getattr(caught.value, "code", None) == 3


def test_a_local_exception_comes_back_as_the_same_class() -> None:
    class Local(Exception):  # noqa: N818 - only a name
        pass

    @profile(memory=True)
    def run(job: RunningJob) -> None:
        raise Local("mine")

    with pytest.raises(Local, match="mine"):
        run(job())


@pytest.mark.parametrize(
    ("how", "kind", "what"),
    [
        ("unsendable", "Unsendable", "with a lock"),
        ("die", None, "exit code 4"),
        ("result", "PicklingError", "the result"),
    ],
)
def test_what_cannot_be_raised_here_is_told(how: str, kind: str | None, what: str) -> None:
    with pytest.raises(ChildFailedError, match=what) as caught:
        profiled.fails(job(how=how))
    assert isinstance(caught.value, ParavalError)
    assert caught.value.error.type == kind
    if how == "die":
        assert (caught.value.error.kind, caught.value.error.exit_code) == ("worker_died", 4)


@pytest.mark.parametrize(("how", "expected"), [("value", ValueError), ("cancelled", ChildFailedError)])
def test_what_a_coroutine_raises_is_raised(how: str, expected: type[BaseException]) -> None:
    with pytest.raises(expected):
        call(profiled.async_fails, job(how=how))


def test_a_function_that_cannot_be_sent_is_refused_by_name() -> None:
    lock = threading.Lock()

    @profile(memory=True)
    def run(job: RunningJob) -> Any:
        return lock

    with pytest.raises(ValueError, match=r"<locals>\.run cannot be called in a process of its own"):
        run(job())


def test_an_argument_that_cannot_be_sent_is_named() -> None:
    with pytest.raises(ChildFailedError, match=r"the arguments\['mebibytes'\]"):
        profiled.spike(job(mebibytes=threading.Lock()))


async def test_it_works_while_an_event_loop_runs() -> None:
    assert profiled.spike(job(mebibytes=10))["output"] == 10 * MIB  # blocks the loop, as the plain function would


async def test_a_coroutine_works_on_every_event_loop() -> None:
    results: list[Any] = []

    async def one() -> None:
        results.append((await profiled.async_spike(job(mebibytes=10), extra=1))["output"])

    async with anyio.create_task_group() as group:
        group.start_soon(one)
        group.start_soon(one)
    assert results == [10 * MIB + 1] * 2


async def test_a_cancelled_coroutine_ends_its_process(tmp_path: Path) -> None:
    flags = Flags(tmp_path)

    @profile(memory=True)
    async def run(job: RunningJob) -> None:
        flags.put("runs", os.getpid())
        threading.Event().wait(20)  # deaf: it has to be killed

    async with anyio.create_task_group() as group:
        group.start_soon(run, impatient(job()))
        await until_async(lambda: flags.up("runs"))
        group.cancel_scope.cancel()
    assert not is_alive(int(flags.text("runs")))


def test_ctrl_c_ends_the_process_of_a_call() -> None:
    program = """
        import os, threading
        from paraval import profile

        @profile(memory=True)
        def run(job):
            print(os.getpid(), flush=True)
            print("runs", flush=True)
            threading.Event().wait(30)

        try:
            run({})
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with Program(program) as running:
        running.read_until("runs")
        running.send(signal.SIGINT)
        running.read_until("interrupted")
        running.wait()
        assert running.code == 0, running.stderr
        pid = int(running.stdout[0])
    until(lambda: not is_alive(pid))


def test_the_program_may_be_a_script_without_a_guard() -> None:
    program = run_program(
        """
        from paraval import RunningJob, profile
        OFFSET = 1

        class Odd(ValueError):
            pass

        @profile(memory=True)
        def run(job):
            if job["x"] % 2:
                raise Odd(job["x"])
            return job["x"] + OFFSET

        print(run(RunningJob(parameters={"x": 2}))["output"])
        try:
            run(RunningJob(parameters={"x": 3}))
        except Odd as exc:
            print("odd", exc.args)
    """,
        "-W",
        "error",
    )
    assert (program.code, program.stdout) == (0, ["3", "odd (3,)"]), program.stderr


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"memory_limit": "1 GB"}, TypeError),
        ({"memory_limit": True}, TypeError),
        ({"memory_tracing_interval": 0}, ValueError),
        ({"memory_tracing_interval": -1.0}, ValueError),
        ({"memory_tracing_interval": float("inf")}, ValueError),
        ({"memory_tracing_interval": "often"}, TypeError),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        profile(**kwargs)
    assert isinstance(caught.value, ParavalError)


def test_what_is_no_function_is_refused() -> None:
    not_a_function: Any = 3
    with pytest.raises(TypeError, match="run-function"):
        profile(not_a_function)


# -- what memory is measured with --------------------------------------------------------------------------------------


def test_measuring_imports_little() -> None:
    program = run_program("""
        import sys
        import paraval.profiling
        from paraval.memory import PeakMemory
        with PeakMemory():
            pass
        print(sorted({"anyio", "asyncio", "psutil", "subprocess", "msgspec", "cloudpickle"} & sys.modules.keys()))
    """)
    assert program.stdout == ["[]"], program.stderr


class Memory:
    """A process that holds memory, and maybe forks, until it is let go."""

    def __init__(self, mebibytes: int, forks: int = 0) -> None:
        program = f"""
            import os
            held = b"x" * {mebibytes * MIB}
            for _ in range({forks}):
                if os.fork() == 0:
                    break
            os.write(1, b"x")
            os.read(0, 1)
        """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert len(self.process.stdout.read(1 + forks)) == 1 + forks
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(20)


def test_the_meter_knows_what_a_process_holds() -> None:
    with Memory(50) as process:
        meter = MemoryMeter(process.pid)
        assert 50 * MIB < meter.sample() < 90 * MIB
    assert meter.sample() == 0
    assert meter.sample(exact=True) == 0


def test_memory_that_a_fork_shares_counts_once() -> None:
    with Memory(100, forks=3) as process:
        meter = MemoryMeter(process.pid)
        assert 100 * MIB < meter.sample() < 180 * MIB
        assert 100 * MIB < meter.sample(exact=True) < 180 * MIB
        assert 100 * MIB < meter.sample() < 180 * MIB


def test_psutil_gives_the_same_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil", reason="psutil is not installed (extra 'profile')")
    monkeypatch.setattr("paraval.memory._has_proc", lambda: False)
    require()
    with Memory(50, forks=1) as process:
        meter = MemoryMeter(process.pid)
        assert 100 * MIB < meter.sample() < 180 * MIB  # what they share counts twice
    assert meter.sample() == 0
    with PeakMemory() as peak:
        held = take(50)
    assert peak.bytes > len(held)


def test_without_psutil_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paraval.memory._has_proc", lambda: False)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(ImportError, match=r"paraval\[profile\]"):
        require()


def test_a_peak_is_forgotten_by_the_next() -> None:
    with PeakMemory() as high:
        take(200)
    with PeakMemory() as low:
        pass
    assert high.bytes - low.bytes > 150 * MIB


def test_a_limit_must_leave_room_for_the_interpreter() -> None:
    assert 5 * MIB < interpreter_size() < 100 * MIB
    assert limit_in_bytes("memory_limit", 1e9) == 10**9
    with pytest.raises(ValueError, match="memory_limit=1e\\+06 is less than"):
        limit_in_bytes("memory_limit", 1_000_000)
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive number of bytes"):
            limit_in_bytes("memory_limit", value)
    for wrong in ("1 GB", True, None):
        with pytest.raises(TypeError, match="number of bytes"):
            limit_in_bytes("memory_limit", wrong)


async def test_the_supervisor_kills_who_holds_too_much_and_no_other() -> None:
    with Memory(50) as large, Memory(1) as small:
        processes = [
            WatchedProcess(large.pid, 40 * MIB, large.process.kill),
            WatchedProcess(small.pid, 40 * MIB, small.process.kill),
        ]
        async with anyio.create_task_group() as group:
            group.start_soon(supervise, lambda: processes, LOOK_S)
            await until_async(lambda: processes[0].exceeded is not None)
            group.cancel_scope.cancel()
        assert large.process.wait(20) == -signal.SIGKILL
        assert (processes[0].exceeded or 0) > 50 * MIB
        assert processes[1].exceeded is None
        assert small.process.poll() is None


async def test_the_supervisor_spares_who_is_not_watched_any_more() -> None:
    with Memory(50) as process:
        watched = WatchedProcess(process.pid, 40 * MIB, process.process.kill)
        answers: list[list[WatchedProcess]] = [[watched], [], [watched], []]  # before and after each look
        seen = Latch()

        def ask() -> list[WatchedProcess]:
            if not answers:
                seen.open()
                return []
            return answers.pop(0)

        async with anyio.create_task_group() as group:
            group.start_soon(supervise, ask, LOOK_S)
            await soon(seen.opened())
            group.cancel_scope.cancel()
        assert watched.exceeded is None
        assert process.process.poll() is None
