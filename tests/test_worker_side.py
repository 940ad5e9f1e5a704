"""What a job leaves in its worker, and what it may do there: signals, forks, output, an event loop, globals."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, cast

import pytest

from paraval import Evaluator, Job, ParavalError, RunningJob
from runfunctions import Flags
from support import outputs, run_all, run_program, until
from workers import LOKY, errors, processes, worker_marks

pytestmark = worker_marks

IN_PROCESSES = ["process", LOKY]
ASYNC_CAPABLE = ["process", "thread", "executor"]


def make(function: Callable[..., Any], method: str = "process", **kwargs: Any) -> Evaluator:
    if method == "executor":
        kwargs["executor"] = lambda: processes(1)
    return Evaluator.create(function, method, kwargs)


def run(function: Callable[..., Any], args_list: list[dict[str, Any]], method: str = "process", **kwargs: Any) -> Any:
    """Run jobs one after the other, in one worker; give them in the order of submission."""
    return run_all(make(function, method, num_workers=1, **kwargs), args_list)


def result(function: Callable[..., Any], method: str = "process", **kwargs: Any) -> Any:
    [job] = run(function, [{}], method, **kwargs)
    assert errors([job]) == []
    return job.output


def exit_code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- processes that a job forks ----------------------------------------------------------------------------------------


def forked_and_signalled(number: int) -> int:
    """Fork a process, send it a signal, give its exit code: 7, where it takes no notice."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, b"!")
            time.sleep(3)
            os._exit(7)
        except KeyboardInterrupt:
            os._exit(8)
    os.read(reader, 1)
    os.kill(pid, number)
    os.close(reader)
    os.close(writer)
    return exit_code_of(pid)


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_signals_do_their_part_in_a_process_that_a_job_forks(method: str) -> None:
    def function(job: RunningJob) -> list[int]:
        return [forked_and_signalled(signal.SIGTERM), forked_and_signalled(signal.SIGINT)]

    assert result(function, method) == [-signal.SIGTERM, 8]


@pytest.mark.parametrize("method", IN_PROCESSES)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_process_that_a_job_forks_can_be_ended_from_its_first_moment_on(method: str, is_async: bool) -> None:
    def function(job: RunningJob) -> list[int]:
        codes = []
        for _ in range(20):
            if (pid := os.fork()) == 0:
                time.sleep(5)
                os._exit(7)
            os.kill(pid, signal.SIGTERM)
            codes.append(exit_code_of(pid))
            if codes[-1] == 7:
                break
        return codes

    async def async_function(job: RunningJob) -> list[int]:
        return function(job)

    assert result(async_function if is_async else function, method) == [-signal.SIGTERM] * 20


def test_a_job_that_forks_leaves_the_signals_as_they_were() -> None:
    def function(job: RunningJob) -> list[set[int]]:
        masks = [signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})]
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writer, b"1" if signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR1} else b"0")
            os._exit(0)
        exit_code_of(pid)
        masks += [{int(os.read(reader, 1))}, signal.pthread_sigmask(signal.SIG_SETMASK, masks[0])]
        os.close(reader)
        os.close(writer)
        return [set(map(int, mask)) for mask in masks]

    assert result(function) == [set(), {1}, {int(signal.SIGUSR1)}]


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_process_that_is_forked_while_the_result_is_pickled_runs_no_other_job(method: str, flags: Flags) -> None:
    class Forking:
        def __reduce__(self) -> Any:
            if (pid := os.fork()) != 0:
                exit_code_of(pid)
            return int, (5,)

    def function(job: RunningJob) -> Any:
        flags.put(f"{job['x']}.{os.getpid()}")
        return [Forking()] if job["x"] % 10 == 3 else job["x"]

    jobs = run(function, [{"x": x} for x in range(40)], method)
    assert [job.output for job in jobs] == [[5] if x % 10 == 3 else x for x in range(40)]
    assert len(flags.names("")) == 40


def test_signals_do_their_part_in_a_process_forked_by_a_thread_of_a_job() -> None:
    def function(job: RunningJob) -> list[int]:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(forked_and_signalled(signal.SIGTERM)))
        thread.start()
        thread.join()
        return codes

    assert result(function) == [-signal.SIGTERM]


def test_a_forked_process_keeps_the_handler_that_the_job_has_set() -> None:
    def function(job: RunningJob) -> int:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
        return forked_and_signalled(signal.SIGTERM)

    assert result(function) == 9


@pytest.mark.parametrize("method", [*IN_PROCESSES, "executor"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_forked_process_that_comes_back_ends_with_its_own_exit_code(method: str, is_async: bool) -> None:
    ends: list[Callable[[], object]] = [
        lambda: None,
        sys.exit,
        lambda: sys.exit(0),
        lambda: sys.exit(3),
        lambda: sys.exit("a message"),
        lambda: 1 / 0,
    ]

    def function(job: RunningJob) -> Any:
        pid = os.fork()
        return exit_code_of(pid) if pid else ends[job["x"]]()

    async def async_function(job: RunningJob) -> Any:
        return function(job)

    jobs = run(async_function if is_async else function, [{"x": x} for x in range(len(ends))], method)
    assert errors(jobs) == []
    assert [job.output for job in jobs] == [0, 0, 0, 3, 1, 1]


FORKS_IN_THREADS = """
import os, sys, warnings
from concurrent.futures import ThreadPoolExecutor
from paraval import Evaluator

ends = [lambda: None, sys.exit, lambda: sys.exit(3), lambda: 1 / 0]

def function(job):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
        pid = os.fork()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else ends[job["x"]]()

async def coroutine(job):
    return function(job)

for run_function in (function, coroutine):
    for method, kwargs in {"thread": {}, "executor": {"executor": ThreadPoolExecutor}}.items():
        with Evaluator.create(run_function, method, kwargs) as evaluator:
            print(method, [evaluator.evaluate({"x": x}).output for x in range(4)])
"""


def test_a_process_forked_in_a_thread_that_comes_back_ends() -> None:
    program = run_program(FORKS_IN_THREADS)
    assert program.stdout == ["thread [0, 0, 3, 1]", "executor [0, 0, 3, 1]"] * 2
    assert program.complaints == []


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_forked_process_is_told_that_it_cannot_reach_the_storage(method: str) -> None:
    def function(job: RunningJob) -> str:
        reader, writer = os.pipe()
        job.record(1, 0.5)
        pid = os.fork()
        if pid == 0:
            try:
                job.record(2, 0.5)
            except ParavalError as exc:
                os.write(writer, f"{isinstance(exc, RuntimeError)}: {exc}".encode())
            os._exit(0)
        os.close(writer)
        exit_code_of(pid)
        with os.fdopen(reader) as pipe:
            told = pipe.read()
        job.record(3, 0.25)
        return told

    [job] = run(function, [{}], method)
    assert errors([job]) == []
    assert job.output == (
        "True: a process that a job forked cannot reach its storage: record and store in the job itself"
    )
    assert job.storage is not None
    assert job.storage.load_job(job.id)["intermediate"] == {"budget": [1, 3], "objective": [0.5, 0.25]}


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_what_one_job_does_with_sigterm_is_not_left_to_the_next(method: str) -> None:
    def function(job: RunningJob) -> str:
        if job["x"] == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return "done"
        while not job.stopped():
            time.sleep(0.005)
        return "saved"

    first, second = run(function, [{"x": 0}, {"x": 1}], method, job_timeout=0.5, kill_grace=5)
    assert first.output == "done"
    assert second.metadata["returned"] == "saved"


def test_what_one_coroutine_does_with_sigterm_is_not_left_to_the_next() -> None:
    struck: list[int] = []

    async def function(job: RunningJob) -> Any:
        if job["x"] == 0:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, struck.append, 1)
            return "done"
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)  # for the loop to hear of the signal too
            return ["saved", *struck]

    first, second = run(function, [{"x": 0}, {"x": 1}], job_timeout=0.5, kill_grace=5)
    assert first.output == "done"
    assert second.metadata["returned"] == ["saved"]


@pytest.mark.parametrize("method", IN_PROCESSES)
@pytest.mark.parametrize("timer", [signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF])
def test_a_timer_that_a_job_has_left_set_hits_no_other(method: str, timer: int) -> None:
    def function(job: RunningJob) -> int:
        if job["x"] == 0:
            signal.setitimer(timer, 0.1)
        else:
            began = time.process_time()
            while time.process_time() - began < 0.3:  # it works for longer
                pass
        return os.getpid()

    jobs = run(function, [{"x": x} for x in range(2)], method, batching=False)
    assert errors(jobs) == []
    assert len(set(outputs(jobs))) == 1


class SlowToFlush(io.StringIO):
    def flush(self) -> None:
        time.sleep(0.2)


@pytest.mark.parametrize("method", IN_PROCESSES)
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("batching", [False, 3])
def test_an_alarm_that_would_ring_just_after_its_job_rings_no_more(method: str, raises: bool, batching: Any) -> None:
    def function(job: RunningJob) -> int:
        if job["x"] == 1:
            signal.signal(signal.SIGALRM, lambda *_: sys.exit())
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            sys.stdout = SlowToFlush()  # the worker flushes it when the job is over
            if raises:
                raise ValueError
        return os.getpid()

    jobs = run(function, [{"x": x} for x in range(3)], method, batching=batching)
    assert [job.error and job.error.type for job in jobs] == [None, "ValueError" if raises else None, None]
    assert jobs[0].output == jobs[2].output


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_signals_that_a_job_blocks_are_blocked_for_no_other(method: str) -> None:
    def function(job: RunningJob) -> set[int]:
        return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})}

    jobs = run(function, [{}] * 3, method, batching=False)
    assert errors(jobs) == []
    assert outputs(jobs) == [set()] * 3


@pytest.mark.parametrize("method", IN_PROCESSES)
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGUSR1])
def test_a_signal_that_a_job_blocks_and_leaves_pending_hits_no_other(method: str, raises: bool, number: int) -> None:
    def function(job: RunningJob) -> int:
        if job["x"] == 1:
            signal.signal(number, lambda *_: sys.exit())
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
            if number == signal.SIGALRM:
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                until(lambda: number in signal.sigpending())
            else:
                signal.pthread_kill(threading.get_ident(), number)
            if raises:
                raise ValueError
        return os.getpid()

    jobs = run(function, [{"x": x} for x in range(4)], method, batching=False)
    assert [job.error and job.error.type for job in jobs] == [None, "ValueError" if raises else None, None, None]
    assert len({job.output for job in jobs if not job.failed}) == 1


def test_captured_output_that_the_set_up_makes_non_blocking_stays_so() -> None:
    def function(job: RunningJob) -> tuple[bool, bool]:
        return os.get_blocking(1), os.get_blocking(2)

    jobs = run(function, [{}] * 3, batching=False, capture_output=True, initializer=lambda: os.set_blocking(1, False))
    assert outputs(jobs) == [(False, True)] * 3


def test_signals_that_the_set_up_blocks_stay_blocked() -> None:
    def set_up() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def function(job: RunningJob) -> set[int]:
        return {int(number) for number in signal.pthread_sigmask(signal.SIG_SETMASK, ())}

    jobs = run(function, [{}] * 3, batching=False, initializer=set_up)
    assert outputs(jobs) == [{signal.SIGUSR1}] * 3


def test_an_alarm_of_the_set_up_that_has_rung_protects_no_other(flags: Flags) -> None:
    def set_up() -> None:
        signal.signal(signal.SIGALRM, lambda *_: flags.put("rang"))
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    def function(job: RunningJob) -> None:
        flags.wait("rang")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if job["x"] == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            time.sleep(0.3)  # it works for longer

    assert errors(run(function, [{"x": x} for x in range(2)], batching=False, initializer=set_up)) == []


def test_an_alarm_of_the_set_up_stays(flags: Flags) -> None:
    def set_up() -> None:
        signal.signal(signal.SIGALRM, lambda *_: flags.put(f"rang in {current[0]}"))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)

    current = [-1]

    def function(job: RunningJob) -> None:
        current[0] = job["x"]
        flags.wait(f"rang in {job['x']}")

    assert errors(run(function, [{"x": x} for x in range(2)], batching=False, initializer=set_up)) == []


@pytest.mark.parametrize("method", IN_PROCESSES)
@pytest.mark.parametrize(
    ("end", "code"),
    [
        pytest.param(lambda: None, 0, id="returns"),
        pytest.param(lambda: sys.exit(3), 3, id="exits"),
        pytest.param(lambda: 1 / 0, 1, id="raises"),
    ],
)
@pytest.mark.parametrize("size", [1, 200_000])
def test_a_process_that_the_initializer_forks_and_that_comes_back_is_no_worker(
    method: str, end: Callable[[], object], code: int, size: int
) -> None:
    def set_up() -> None:
        pid = os.fork()
        if pid == 0:
            end()
        else:
            os.environ["FORKED"] = str(pid)

    def function(job: RunningJob) -> tuple[int, int | None]:
        pid = os.environ.pop("FORKED", None)
        return os.getpid(), None if pid is None else exit_code_of(int(pid))

    jobs = run(function, [{"data": b"x" * size}] * 6, method, batching=False, initializer=set_up)
    assert errors(jobs) == []
    pids, codes = zip(*(job.output for job in jobs), strict=True)
    assert len(set(pids)) == 1
    assert codes == (code, *[None] * 5)


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_shared_memory_of_the_driver_outlives_the_workers_that_looked_at_it(method: str) -> None:
    def function(job: RunningJob) -> int:
        attached: Any = SharedMemory(job["name"])
        try:
            return int(attached.buf[0])
        finally:
            attached.close()

    memory: Any = SharedMemory(create=True, size=100)
    try:
        memory.buf[0] = 42
        for _ in range(3):
            jobs = run(function, [{"name": memory.name}] * 4, method, max_jobs_per_worker=1, batching=False)
            assert errors(jobs) == []
            assert outputs(jobs) == [42] * 4
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_locks_of_multiprocessing_that_a_job_makes_and_keeps_are_let_go_without_a_word(method: str) -> None:
    program = run_program(
        f"""
        import multiprocessing
        from paraval import Evaluator

        kept = []

        def run(job):
            kept.extend(multiprocessing.Lock() for _ in range(20))
            return len(kept)

        for _ in range(4):
            with Evaluator.create(run, {method!r}, dict(num_workers=1)) as evaluator:
                print(evaluator.evaluate(dict(x=0)).output)
        """
    )
    assert program.stdout == ["20"] * 4
    assert program.stderr == ""


# -- output ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker's interpreter buffer what it prints, as it does unless it is told otherwise."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize("method", IN_PROCESSES)
def test_what_c_libraries_print_is_with_the_job_that_printed_it(method: str) -> None:
    def function(job: RunningJob) -> None:
        sys.stdout.write("Python,")
        ctypes.CDLL(None).printf(b"C of job %d,", ctypes.c_int(job["x"]))
        sys.stdout.write("Python")
        if job["x"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    jobs = run(function, [{"x": x} for x in range(3)], method, capture_output=True)
    assert [job.stdout for job in jobs] == [f"Python,C of job {x},Python" for x in range(3)]


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize("stream", ["stdout", "stderr", "__stdout__"])
def test_a_line_that_has_not_ended_survives_a_crash(stream: str) -> None:
    def function(job: RunningJob) -> None:
        print("epoch 1 ", end="" if stream != "__stdout__" else "\n", file=getattr(sys, stream))
        os._exit(1)

    [job] = run(function, [{}], capture_output=True)
    assert (job.stdout + job.stderr).strip() == "epoch 1"


def close_descriptors() -> None:
    os.close(1)
    os.close(2)


def close_streams() -> None:
    sys.stdout.close()
    sys.stderr.close()


def close_all() -> None:
    close_streams()
    close_descriptors()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.close()


def lose_streams() -> None:
    del sys.stdout, sys.stderr


def forget_wrappers() -> None:
    for stream in (sys.stdout, sys.stderr):
        io.TextIOWrapper(stream.buffer)  # closes what it was made of when it is collected, which is now


def forget_files() -> None:
    for fd in (1, 2):
        os.fdopen(fd, "wb").close()


def detach_and_close() -> None:
    for name in ("stdout", "stderr"):
        wrapper = io.TextIOWrapper(getattr(sys, name).detach())
        setattr(sys, name, wrapper)
        wrapper.close()


def put_another_file_there() -> None:
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


@pytest.mark.parametrize("capture", [False, True], ids=["passed on", "captured"])
@pytest.mark.parametrize(
    "close",
    [
        close_descriptors,
        close_streams,
        close_all,
        lose_streams,
        forget_wrappers,
        forget_files,
        detach_and_close,
        put_another_file_there,
    ],
)
@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_job_that_closes_the_output_closes_it_to_no_other(
    method: str, close: Callable[[], None], capture: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def function(job: RunningJob) -> int:
        if job["x"] in {1, 3}:
            close()
            return os.getpid()
        print("out")
        print("err", file=sys.stderr)
        print("underscored", file=sys.__stdout__)
        os.write(1, b"descriptor")
        return os.getpid()

    jobs = run(function, [{"x": x} for x in range(5)], method, batching=False, capture_output=capture)
    assert errors(jobs) == []
    assert len(set(outputs(jobs))) == 1  # it is the same worker
    said = [(jobs[x].stdout, jobs[x].stderr) for x in (0, 2, 4)] if capture else [tuple(capfd.readouterr())]
    for stdout, stderr in said:
        assert stdout.count("out") == stdout.count("underscored") == stdout.count("descriptor") == 3 // len(said)
        assert stderr.count("err") == 3 // len(said)


class Logger:
    """Something else in the place of a stream, with attributes that mean something else."""

    encoding = "none"
    errors = 0
    closed = False

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_stream_of_somebodys_own_that_is_closed_costs_no_job(method: str) -> None:
    def set_up() -> None:
        sys.stdout = cast("Any", Logger())

    def function(job: RunningJob) -> int:
        if job["x"] == 1:
            sys.stdout.close()
        print("out")
        return os.getpid()

    jobs = run(function, [{"x": x} for x in range(4)], method, batching=False, initializer=set_up)
    assert errors(jobs) == []
    assert len(set(outputs(jobs))) == 1


def test_a_stream_of_somebodys_own_that_will_not_be_flushed_costs_no_job() -> None:
    class Unflushable(io.StringIO):
        def flush(self) -> None:
            sys.exit("I will not")

        @property
        def closed(self) -> bool:
            sys.exit("who asks?")

    def function(job: RunningJob) -> int:
        if job["x"] == 1:
            sys.stdout = Unflushable()
        return os.getpid()

    jobs = run(function, [{"x": x} for x in range(4)], batching=False)
    assert errors(jobs) == []
    assert len(set(outputs(jobs))) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system has no /proc")
@pytest.mark.parametrize("method", IN_PROCESSES)
def test_output_that_is_open_for_reading_only_is_put_back(method: str) -> None:
    def function(job: RunningJob) -> None:
        if job["x"] == 1:
            os.dup2(os.open("/proc/self/fd/1", os.O_RDONLY), 1)
        else:
            print(job["x"], flush=True)

    jobs = run(function, [{"x": x} for x in range(3)], method, batching=False, capture_output=True)
    assert errors(jobs) == []
    assert [job.stdout for job in jobs] == ["0\n", "", "2\n"]


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_captured_output_that_a_job_makes_non_blocking_blocks_for_the_next(method: str) -> None:
    def function(job: RunningJob) -> list[bool]:
        were = [os.get_blocking(fd) for fd in (1, 2)]
        for fd in (1, 2):
            os.set_blocking(fd, False)
        return were

    jobs = run(function, [{}] * 2, method, batching=False, capture_output=True)
    assert outputs(jobs) == [[True, True]] * 2


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_job_is_told_to_stop_where_one_before_has_asked_without_output(method: str) -> None:
    def function(job: RunningJob) -> str:
        if job["x"] == 0:
            os.close(1)
            job.stopped()
            return "asked"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        until(job.stopped)
        return "saved"

    first, second = run(function, [{"x": x} for x in range(2)], method, batching=False, job_timeout=0.3, kill_grace=10)
    assert first.output == "asked"
    assert second.metadata["returned"] == "saved"


FORKS_A_DAEMON = """
import os, time
from paraval import Evaluator

def run(job):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for fd in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    return pid

with Evaluator.create(run, "process") as evaluator:
    print(evaluator.evaluate({}).output)
"""


def test_what_a_process_that_a_job_forked_holds_of_the_output_is_its_own() -> None:
    def function(_job: RunningJob) -> int:
        pid = os.fork()
        if pid == 0:
            copies = [os.dup(1) for _ in range(40)]  # one has the number of a descriptor that was closed by the fork
            pid = os.fork()
            if pid == 0:
                os._exit(all(os.fstat(copy) for copy in copies) - 1)
            os._exit(exit_code_of(pid))
        return exit_code_of(pid)

    assert result(function) == 0


def test_a_process_that_a_job_forked_and_that_left_its_output_holds_up_nobody() -> None:
    arguments = [sys.executable, "-c", FORKS_A_DAEMON]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True)
    os.kill(int(done.stdout), signal.SIGKILL)  # it is still there; the output has ended


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize("raises", [False, True])
def test_what_a_job_prints_goes_to_where_it_has_put_its_output(raises: bool, tmp_path: Path) -> None:
    def function(job: RunningJob) -> None:
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 1)
        print("for the file", end="")
        if raises:
            raise ValueError

    path = tmp_path / "output"
    run(function, [{}])
    assert path.read_text(encoding="utf-8") == "for the file"


def test_what_a_job_puts_in_the_place_of_the_output_stays() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 0:
            sys.stdout = io.StringIO()
        print(job["x"], end=" ")
        return sys.stdout.getvalue() if isinstance(sys.stdout, io.StringIO) else None

    assert outputs(run(function, [{"x": x} for x in range(3)], batching=False)) == ["0 ", "0 1 ", "0 1 2 "]


def test_of_tiny_jobs_that_find_the_output_closed_one_fails() -> None:
    def function(job: RunningJob) -> None:
        if job["x"] == 3:
            sys.stdout.close()
        if job["x"] > 3:
            print(end="")

    jobs = run(function, [{"x": x} for x in range(20)], batching=20)
    assert [job.args["x"] for job in jobs if job.failed] == [4]


# -- event loops -------------------------------------------------------------------------------------------------------


async def exit_later() -> None:
    await asyncio.sleep(0.02)
    sys.exit("from an earlier job")


async def exit_when_cancelled() -> None:
    try:
        await asyncio.sleep(30)
    finally:
        sys.exit("from an earlier job")


async def leave_another() -> None:
    try:
        await asyncio.sleep(30)
    finally:
        await asyncio.sleep(0)
        asyncio.get_running_loop().left = [asyncio.create_task(exit_later())]  # type: ignore[attr-defined] # any object


async def end_with(writer: int) -> None:
    try:
        await asyncio.sleep(30)
    finally:
        os.write(writer, b"x")
        await asyncio.sleep(0.01)


def leave_behind(what: str) -> object:
    loop = asyncio.get_running_loop()
    match what:
        case "task that exits":
            return asyncio.create_task(exit_later())
        case "task that exits when it is cancelled":
            return [asyncio.create_task(exit_when_cancelled()) for _ in range(2)]
        case "task that leaves another":
            return asyncio.create_task(leave_another())
        case "stop":
            return loop.call_later(0.02, loop.stop)
        case "immediate stop":
            return loop.call_soon(loop.stop)
        case "reader that exits":
            reader, writer = os.pipe()
            loop.add_reader(reader, sys.exit, "from an earlier job")
            return asyncio.create_task(end_with(writer))
    raise AssertionError(what)


@pytest.mark.parametrize("method", ASYNC_CAPABLE)
@pytest.mark.parametrize(
    "what",
    [
        "task that exits", "task that exits when it is cancelled", "task that leaves another", "stop", "immediate stop",
        "reader that exits",
    ],
)  # fmt: skip
def test_what_a_coroutine_leaves_on_the_loop_does_not_strike_the_next(method: str, what: str) -> None:
    async def function(job: RunningJob) -> int:
        if job["x"] == 0:
            job_left.append(leave_behind(what))
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(0.06)
        return int(job["x"])

    job_left: list[object] = []
    # Three at a time, as an executor's worker has a loop for each call.
    jobs = run(function, [{"x": x} for x in range(3)], method, batching=3)
    assert errors(jobs) == []
    assert [job.output for job in jobs] == [0, 1, 2]


@pytest.mark.parametrize("method", ["process", "thread"])
def test_tasks_that_a_coroutine_leaves_are_cancelled_before_the_next_begins(method: str) -> None:
    events: list[str] = []

    async def linger() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.01)
            events.append("ended")

    async def function(job: RunningJob) -> list[str]:
        events.append("began")
        task = asyncio.create_task(linger())
        await asyncio.sleep(0)
        assert not task.done()
        return list(events)

    jobs = run(function, [{}, {}], method)
    assert outputs(jobs) == [["began"], ["began", "ended", "began"]]


@pytest.mark.parametrize("method", ["process", "thread"])
def test_a_coroutine_still_fails_by_the_exit_of_a_task_of_its_own(method: str) -> None:
    async def function(job: RunningJob) -> str:
        if job["x"] == 0:
            await asyncio.gather(exit_later(), asyncio.sleep(30))
        return "good"

    first, second = run(function, [{"x": 0}, {"x": 1}], method)
    assert first.error is not None
    assert first.error.type == "SystemExit"
    assert second.output == "good"


# -- globals -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from paraval import Evaluator

model = None
calls = []

def load():
    global model
    model = "loaded"

def count():
    calls.append(1)

def run(job, hook):
    hook()
    return model, len(calls)

method = sys.argv[1]
kwargs = {"run_function_kwargs": {"hook": count}}
if method == "executor":
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    kwargs["executor"] = lambda: ProcessPoolExecutor(1, mp_context=get_context("forkserver"))
    model = "loaded"
else:
    kwargs["initializer"] = load

if __name__ == "__main__":
    with Evaluator.create(run, method, kwargs) as evaluator:
        print(evaluator.evaluate({}).output, evaluator.evaluate({}).output)
"""


@pytest.mark.parametrize("method", [*IN_PROCESSES, "executor"])
def test_what_a_script_sends_shares_its_globals(tmp_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    arguments = [sys.executable, str(script), method]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=40, check=False)
    assert done.stdout == "('loaded', 1) ('loaded', 2)\n", done.stderr


def test_the_part_that_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()

    def locked() -> object:
        return lock

    def function(job: RunningJob, **_: Any) -> None:
        """Do nothing."""

    with pytest.raises(ValueError, match=r"the initializer cannot be sent .*'lock'"):
        make(function, initializer=locked)
    with pytest.raises(ValueError, match=r"run_function_kwargs\['held'\] cannot be pickled"):
        make(function, run_function_kwargs={"held": lock})
    with pytest.raises(ValueError, match=r"the run-function \(its variable 'lock'\) cannot be pickled"):
        make(lambda job: lock)
    jobs: list[Job] = run(function, [{}], run_function_kwargs={"held": [function]})
    assert errors(jobs) == []


# -- coroutines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", IN_PROCESSES)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_coroutines_need_is_imported_before_the_first_job_s_time_begins(
    method: str, kind: str, tmp_path: Path
) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    # Sent by value, as what this module imports is not wanted.
    exec(f"{kind} function(job):\n    return job['x']", namespace)  # noqa: S102 - the text is the line above's
    file = tmp_path / "imported"
    code = f"import pathlib, sys; pathlib.Path({str(file)!r}).write_text(str('asyncio' in sys.modules))"
    jobs = run(namespace["function"], [{"x": 1}], method, initializer=functools.partial(exec, code))
    assert outputs(jobs) == [1]
    if kind == "async def" or method == "process":  # loky imports what it needs itself
        assert file.read_text() == str(kind == "async def")


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_a_job_raises_when_it_is_asked_to_stop_is_its_own(kind: str) -> None:
    """It says nothing, and nothing is said for it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = "import os, signal, time\n    os.kill(os.getpid(), signal.SIGTERM)\n    raise ValueError"
    exec(f"{kind} function(job):\n    {code}", namespace)  # noqa: S102 - the text is above
    (job,) = run(namespace["function"], [{}])
    assert job.error is not None
    assert (job.error.type, job.error.message) == ("ValueError", "")


@pytest.mark.parametrize("method", IN_PROCESSES)
def test_a_coroutine_that_others_ask_to_stop_says_so(method: str, tmp_path: Path) -> None:
    file = tmp_path / "pid"

    async def function(_job: RunningJob) -> None:
        draft = file.with_name("draft")
        draft.write_text(str(os.getpid()), encoding="utf-8")
        draft.replace(file)
        await asyncio.sleep(50)

    with make(function, method) as evaluator:
        evaluator.submit([{}])
        until(file.exists)
        os.kill(int(file.read_text(encoding="utf-8")), signal.SIGTERM)
        (job,) = evaluator.gather("ALL")
    assert job.error is not None
    assert (job.error.type, job.error.message) == ("CancelledError", "it was asked to stop, by SIGTERM")
