"""What the tests of the core share: jobs under control, storages that count or fail, programs as processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Self, TypeVar

import anyio
from anyio.lowlevel import current_token

from paraval import Evaluator, Job, JobStatus, RunningJob
from paraval.functions import is_async
from paraval.storage import JobChange, JobRecord, MemoryStorage

WAIT_S = 20.0
"""How long anything that must happen may take on a busy machine."""
METHODS = ("serial", "thread")

T = TypeVar("T")


def make(method: str, function: Callable[..., Any], **kwargs: Any) -> Evaluator:
    """Make an evaluator; for the serial method a plain function is made a coroutine function."""
    if method == "serial" and not is_async(function):
        plain = function

        async def function(job: RunningJob, **kwargs: Any) -> Any:
            return plain(job, **kwargs)

    return Evaluator.create(function, method, kwargs)


def run_all(evaluator: Evaluator, args_list: list[dict[str, Any]]) -> list[Job]:
    """Run jobs, and close the evaluator; give them in the order of submission."""
    with evaluator:
        evaluator.submit(args_list)
        evaluator.gather("ALL")
        return evaluator.jobs


def double(job: RunningJob) -> float:
    return float(job["x"] * 2)


def configurations(count: int) -> list[dict[str, int]]:
    return [{"x": x} for x in range(count)]


def outputs(jobs: Iterable[Job]) -> list[Any]:
    return sorted(job.output for job in jobs)


def ids(jobs: Iterable[Job]) -> list[str]:
    return sorted((job.id for job in jobs), key=lambda job_id: int(job_id.rpartition(".")[2]))


class Latch:
    """Opened once, from any thread; waited for in a thread or on any event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._wakes: list[Callable[[], object]] = []

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def open(self) -> None:
        with self._lock:
            self._open.set()
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            wake()

    def wait(self, timeout: float = WAIT_S) -> None:
        assert self._open.wait(timeout), "what the test waits for did not happen"

    def peek(self, seconds: float) -> bool:
        """Wait so long at most; tell whether it is open."""
        return self._open.wait(seconds)

    async def opened(self) -> None:
        event = anyio.Event()
        native: Any = current_token().native_token
        schedule = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        with self._lock:
            if self._open.is_set():
                return
            self._wakes.append(lambda: _try(schedule, event.set))
        with anyio.fail_after(WAIT_S):
            await event.wait()


def _try(schedule: Callable[..., object], function: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and who waited with it
        schedule(function)


class Stage:
    """Jobs under the test's control: the job of ``{"x": key}`` says that it started, then waits until it is released.

    A released job returns its key. ``plain`` does not look whether it was asked to stop, ``polite`` does.
    """

    def __init__(self) -> None:
        self._started: dict[Any, Latch] = {}
        self._released: dict[Any, Latch] = {}
        self._everything = False
        self.seen: list[tuple[Any, JobStatus]] = []

    def started(self, key: Any) -> Latch:
        return self._started.setdefault(key, Latch())

    def released(self, key: Any) -> Latch:
        latch = self._released.setdefault(key, Latch())
        if self._everything:
            latch.open()
        return latch

    def release(self, *keys: Any) -> None:
        for key in keys:
            self.released(key).open()

    def release_all(self) -> None:
        self._everything = True
        for latch in list(self._released.values()):
            latch.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release_all()

    def plain(self, job: RunningJob) -> Any:
        self.started(job["x"]).open()
        self.released(job["x"]).wait()
        return job["x"]

    def polite(self, job: RunningJob) -> Any:
        self.started(job["x"]).open()
        while not self.released(job["x"]).peek(0.002):
            if job.stopped():
                self.seen.append((job["x"], job.status))
                return "stopped early"
        return job["x"]

    async def coroutine(self, job: RunningJob) -> Any:
        self.started(job["x"]).open()
        try:
            await self.released(job["x"]).opened()
        except BaseException:
            self.seen.append((job["x"], job.status))
            raise
        return job["x"]

    def function(self, method: str, *, polite: bool = True) -> Callable[..., Any]:
        """Give the run-function that suits the method."""
        if method == "serial":
            return self.coroutine
        return self.polite if polite else self.plain


class CountingStorage(MemoryStorage):
    """Counts how often each job got a terminal status."""

    def __init__(self) -> None:
        super().__init__()
        self.terminal: Counter[str] = Counter()
        self._counting = threading.Lock()

    def update(self, changes: Sequence[JobChange]) -> None:
        super().update(changes)
        with self._counting:
            for change in changes:
                if isinstance(change.status, int) and JobStatus(change.status).is_terminal:
                    self.terminal[change.id] += 1


class FailingStorage(MemoryStorage):
    """Its operations from number ``first`` on, ``count`` of them, fail (counted from 0, reads excepted)."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self._operations = 0
        self._fails = range(first, first + count)
        self._counting = threading.Lock()
        self.has_failed = False

    def _operate(self) -> None:
        with self._counting:
            number = self._operations
            self._operations += 1
        if number in self._fails:
            self.has_failed = True
            raise OSError(28, "No space left on device")

    def new_search(self) -> str:
        self._operate()
        return super().new_search()

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self._operate()
        super().insert(search_id, records)

    def update(self, changes: Sequence[JobChange]) -> None:
        self._operate()
        super().update(changes)


def in_threads(*functions: Callable[[], T]) -> list[T]:
    """Call functions at the same moment, each in a thread; give what they return, or raise what one raised."""
    barrier = threading.Barrier(len(functions))
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def call(index: int, function: Callable[[], T]) -> None:
        try:
            barrier.wait(WAIT_S)
            results[index] = function()
        except BaseException as exc:  # noqa: BLE001 - it is raised below, in the thread of the test
            errors.append(exc)

    threads = [
        threading.Thread(target=call, args=(index, function), daemon=True) for index, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a call does not return"
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(functions))]


def until(condition: Callable[[], object]) -> None:
    """Wait for something that announces itself in no other way."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


async def until_async(condition: Callable[[], object]) -> None:
    """Do as ``until`` does on an event loop."""
    with anyio.fail_after(WAIT_S):
        while not condition():  # noqa: ASYNC110 - it is for what announces itself in no other way
            await anyio.sleep(0.002)


async def soon(awaitable: Awaitable[T]) -> T:
    """Await what must not take long."""
    with anyio.fail_after(WAIT_S):
        return await awaitable


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread and wait for it without blocking the loop, but not for ever."""
    ended = Latch()
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function(*args))
        except BaseException as exc:  # noqa: BLE001 - it is raised below, in the task of the test
            errors.append(exc)
        finally:
            ended.open()

    threading.Thread(target=call, daemon=True).start()
    await ended.opened()
    if errors:
        raise errors[0]
    return results[0]


class Program:
    """A Python program in a process of its own."""

    def __init__(self, source: str, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *options, "-c", textwrap.dedent(source)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.stdout: list[str] = []
        self.stderr = ""
        self._err = threading.Thread(target=self._read_stderr, daemon=True)
        self._err.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.wait()
        self._err.join(WAIT_S)
        _stream(self._process.stdout).close()
        _stream(self._process.stderr).close()

    def _read_stderr(self) -> None:
        self.stderr = _stream(self._process.stderr).read()

    def _lines(self) -> Iterator[str]:
        for line in _stream(self._process.stdout):
            self.stdout.append(line.rstrip("\n"))
            yield self.stdout[-1]

    def read_until(self, expected: str) -> float:
        """Read lines up to this one; give the moment."""
        for line in self._lines():
            if line == expected:
                return time.monotonic()
        self._process.wait(WAIT_S)
        self._err.join(WAIT_S)
        raise AssertionError(f"the program ended without saying {expected!r}: {self.stdout} {self.stderr}")

    def send(self, signal: int) -> float:
        """Send a signal; give the moment."""
        now = time.monotonic()
        self._process.send_signal(signal)
        return now

    def wait(self) -> float:
        """Wait for the end; give the moment."""
        for _ in self._lines():
            pass
        self._process.wait(WAIT_S)
        now = time.monotonic()
        self._err.join(WAIT_S)
        return now

    @property
    def complaints(self) -> list[str]:
        """What it wrote to stderr, but for asyncio's remarks (in development mode) that a busy machine is slow."""
        return [line for line in self.stderr.splitlines() if not line.startswith("Executing <")]

    @property
    def code(self) -> int:
        code = self._process.poll()
        assert code is not None, "the program still runs"
        return code


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def run_program(source: str, *options: str) -> Program:
    """Run a program to its end."""
    with Program(source, *options) as program:
        program.wait()
        return program
