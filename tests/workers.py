"""What the tests of worker processes share: who is alive, what is open, programs that die, executors of others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest

from paraval import Evaluator, Job, JobStatus, RunningJob
from runfunctions import Flags
from support import WAIT_S, run_all, until

worker_marks = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc"),
    pytest.mark.usefixtures("no_process_left_behind"),
]
"""What a module of such tests is marked with."""
needs_loky = pytest.mark.skipif(find_spec("loky") is None, reason="loky is not installed (extra 'loky')")
needs_trio = pytest.mark.skipif(find_spec("trio") is None, reason="trio is not installed (extra 'trio')")
LOKY = pytest.param("loky", marks=needs_loky)

TESTS = str(Path(__file__).parent)
PROC = Path("/proc")


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended (what has ended may wait for a parent that never looks)."""
    return _stat(pid)[0] not in {"", "Z", "X"}


def _stat(pid: int) -> tuple[str, int]:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def children() -> set[int]:
    """Give the processes that this one started and has not waited for, dead ones included.

    Those excepted that multiprocessing keeps for the whole life of a program.
    """
    found = {pid for pid in _pids() if _stat(pid)[1] == os.getpid()}
    return {pid for pid in found if not any(name in _read(pid, "cmdline") for name in _KEPT)}


_KEPT = (b"resource_tracker", b"forkserver")


def _pids() -> list[int]:
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


def open_files(pid: int | str = "self") -> list[str]:
    """Give the file descriptors of a process, as what they are open on."""
    found = []
    for entry in (PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the folder itself, gone by now
            found.append(f"{entry.name}:{entry.readlink()}")
    return sorted(found)


def listening(*pids: int) -> list[str]:
    """Give the sockets of processes that listen for connections."""
    sockets = {file.partition("[")[2].rstrip("]") for pid in pids for file in open_files(pid) if "socket:[" in file}
    lines = []
    for name, is_listening in (("tcp", _tcp_listens), ("tcp6", _tcp_listens), ("unix", _unix_listens)):
        path = PROC / "net" / name
        for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else ():
            fields = line.split()
            inode = fields[6] if name == "unix" else fields[9]
            if inode in sockets and is_listening(fields):
                lines.append(line)
    return lines


def _tcp_listens(fields: list[str]) -> bool:
    return fields[3] == "0A"


def _unix_listens(fields: list[str]) -> bool:
    return bool(int(fields[3], 16) & 0x10000)


class Driver:
    """A Python program with workers, apart from the terminal; all its descendants bear a mark.

    Args:
        source: the program. It finds ``flags``, and the modules of the tests.
        folder: where the flags are.
        options: of the interpreter.
    """

    def __init__(self, source: str, folder: Path, *options: str) -> None:
        self.flags = Flags(folder)
        self._mark = f"PARAVAL_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        head = (
            f"import sys; sys.path.insert(0, {TESTS!r}); from runfunctions import *; flags = Flags({str(folder)!r})\n"
        )
        self._output = (folder / "output").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, *options, "-c", head + textwrap.dedent(source)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, name: value, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._output.close()

    def descendants(self) -> list[int]:
        """Give all processes alive that came from the driver, however far; itself excepted."""
        mark = self._mark.encode()
        found = [pid for pid in _pids() if mark in _read(pid, "environ").split(b"\0")]
        return [pid for pid in found if is_alive(pid) and pid != self.process.pid]

    def wait_for(self, *names: str) -> list[str]:
        """Wait for flags that the program or its jobs raise; give their texts."""
        until(lambda: all(self.flags.up(name) for name in names) or self.process.poll() is not None)
        assert all(self.flags.up(name) for name in names), f"the program ended without {names}: {self.output}"
        return [self.flags.text(name) for name in names]

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def kill_group(self, number: int) -> None:
        """Send a signal to the driver and to whom a terminal would take for a part of it."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Wait for the end of the driver; give its exit code."""
        return self.process.wait(WAIT_S)

    def everybody_is_gone(self, seconds: float) -> None:
        """Wait until no descendant lives."""
        deadline = time.monotonic() + seconds
        while left := self.descendants():
            lines = [f"{pid}: {_read(pid, 'cmdline')!r}" for pid in left]
            assert time.monotonic() < deadline, f"still alive {seconds} s after the driver: {lines}; {self.output}"
            time.sleep(0.01)

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace")


def polite(flags: Flags) -> Callable[[RunningJob], Any]:
    """Make a run-function that says where it runs, and returns early when it is asked to stop."""

    def function(job: RunningJob) -> Any:
        flags.put(f"pid-{job['x']}", os.getpid())
        while not flags.up(f"go-{job['x']}"):
            if job.stopped():
                return f"stopped: {job.status.name}"
            time.sleep(0.002)
        return job["x"]

    return function


def by_x(jobs: list[Job]) -> dict[Any, Job]:
    return {job.args["x"]: job for job in jobs}


def errors(jobs: list[Job]) -> list[str]:
    """Give the failures of jobs, to be compared with an empty list."""
    return [f"{job.id}: {job.error.summary}" for job in jobs if job.error is not None]


def error_of(job: Job) -> tuple[str, str]:
    assert job.error is not None, job
    return job.error.kind, job.error.message


def timed_out(job: Job) -> bool:
    return job.status is JobStatus.CANCELLED and job.error is not None and job.error.kind == "timeout"


# -- executors ---------------------------------------------------------------------------------------------------------


def processes(workers: int = 2) -> ProcessPoolExecutor:
    # Not by fork: what is forked from a process with threads may wait for ever for a lock that one of them held.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"))


def threads(workers: int = 2) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


class ThreadEach(Executor):
    """Somebody's own executor: a thread for each call, and no more than an Executor must have."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(self.call(fn, *args, **kwargs))
            except BaseException as exc:  # noqa: BLE001 - it is raised where the result is asked for
                future.set_exception(exc)

        threading.Thread(target=run, daemon=True).start()
        return future

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)


def make_in(function: Callable[..., Any], executor: Any, **kwargs: Any) -> Evaluator:
    """Make an evaluator on an executor, or on a factory of some."""
    return Evaluator.create(function, "executor", {"executor": executor, **kwargs})


def run_in(function: Callable[..., Any], executor: Any, args_list: list[dict[str, Any]], **kwargs: Any) -> list[Job]:
    """Run jobs there; give them in the order of submission."""
    return run_all(make_in(function, executor, **kwargs), args_list)
