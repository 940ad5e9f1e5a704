"""How much memory processes hold: from ``/proc`` on Linux, through psutil (extra ``profile``) elsewhere.

A worker process imports this module when a job wants to be measured, so it is light.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

from paraval.errors import BadValueError, MissingExtraError, UsageError, WrongTypeError
from paraval.outcome import JobError, Outcome

__all__ = [
    "MemoryLimit",
    "MemoryMeter",
    "PeakMemory",
    "WatchedProcess",
    "descendants",
    "interpreter_size",
    "limit_in_bytes",
    "require",
    "supervise",
]

INTERVAL_S: Final = 0.1
"""Seconds between two looks at the memory, unless told otherwise."""
_LOOK_SHARE: Final = 10
"""Looking for shared memory is slow (20 ms for a gigabyte), so it takes at most one part in so many of the time."""


# -- limits ------------------------------------------------------------------------------------------------------------


class MemoryLimit(NamedTuple):
    """How much memory a job may hold, and what becomes of it when it holds more.

    Attributes:
        bytes: the limit.
        interval: seconds between two looks.
        excess: the job fails as ``"memory_limit_exceeded"`` (``"fail"``) or with MemoryError (``"raise"``), or its
            output is ``"F_memory_limit_exceeded"`` (``"return"``).
    """

    bytes: float
    interval: float = INTERVAL_S
    excess: Literal["fail", "return", "raise"] = "fail"

    def outcome(self, size: int, started: float, ended: float, pid: int | None) -> Outcome:
        """Say what becomes of a job whose process was killed when it held ``size`` bytes.

        Args:
            size: in bytes.
            started: when the job started, on the evaluator's clock.
            ended: when it ended.
            pid: of the process.
        """
        message = f"the job's process held {size} bytes, and its memory limit is {self.bytes:.0f}"
        error = JobError("memory_limit_exceeded", message, host=os.uname().nodename, pid=pid)
        match self.excess:
            case "fail":
                return Outcome(error=error)
            case "raise":
                return Outcome(error=error._replace(kind="exception", type="MemoryError"))
            case "return":
                metadata = {"timestamp_start": started, "timestamp_end": ended, "memory": size}
                return Outcome({"output": error.reason, "metadata": metadata})


def limit_in_bytes(name: str, value: object) -> int:
    """Take a memory limit: a number of bytes in which a worker process fits at all.

    Raises:
        TypeError: not a number.
        ValueError: below what the interpreter takes by itself.
        ImportError: memory cannot be measured here.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise WrongTypeError(f"{name} must be a number of bytes, not {value!r}")
    size = value if isinstance(value, int) else float(value)
    if not 0 < size < math.inf:
        raise BadValueError(f"{name} must be a positive number of bytes, not {value!r}")
    least = interpreter_size()
    if size < least:
        raise BadValueError(
            f"{name}={size:g} is less than the {least} bytes that a worker process takes before its first job"
        )
    return int(size)


@functools.cache
def interpreter_size() -> int:
    """Measure, once, the bytes that a worker process takes before it has anything to do."""
    home = str(Path(__file__).parents[1])
    probe = (
        f"import sys; sys.path[0] = {home!r}; import os, paraval.worker.main; "
        "from paraval.memory import MemoryMeter; print(MemoryMeter(os.getpid()).sample())"
    )
    import subprocess  # here: a worker process that measures itself need not import it

    require()
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # as multiprocessing does
    shown = subprocess.run(  # noqa: S603 - this very interpreter, with our own argument
        [sys.executable, *flags, "-c", probe], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if shown.returncode:
        raise UsageError(f"{sys.executable!r} cannot be started as a worker process: {shown.stderr.strip()[-500:]}")
    return int(shown.stdout)


# -- the memory of a process and its children --------------------------------------------------------------------------


class MemoryMeter:
    """Measures the resident memory of a process and all its descendants.

    Memory that several of them share (after a fork, say) counts once, on Linux. Elsewhere it counts for each.

    Args:
        pid: the process. Of one that is gone, the memory is 0.
    """

    __slots__ = ("_next_look", "_pids", "_shared", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pids: list[int] = []
        self._shared = 0
        self._next_look = 0.0

    def sample(self, *, exact: bool = False) -> int:
        """Give the bytes.

        Args:
            exact: look anew for what the processes share, which may take a while; otherwise the last look may be a
                moment old.
        """
        require()
        if not _has_proc():
            return _sample_with_psutil(self.pid)
        pids = list(_family(self.pid))
        resident = sum(map(_resident, pids))
        if len(pids) == 1:
            return resident
        began = time.monotonic()
        if exact or pids != self._pids or began >= self._next_look:
            self._pids = pids
            self._shared = max(0, resident - sum(map(_proportional, pids)))
            took = time.monotonic() - began
            self._next_look = began + took * _LOOK_SHARE
        return max(0, resident - self._shared)


class PeakMemory:
    """The most memory that this process and its children held within a ``with`` block.

    A thread samples it. On Linux the kernel knows the peak of this process itself, however short it was.

    Args:
        interval: seconds between samples.

    Attributes:
        bytes: the peak; known after the block.
    """

    def __init__(self, interval: float = INTERVAL_S) -> None:
        self._interval = interval
        self._meter = MemoryMeter(os.getpid())
        self.bytes = 0

    def __enter__(self) -> Self:
        import threading  # here: a worker process that measures nothing need not import it

        require()
        self._kernel_knows = _forget_own_peak()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="paraval-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        own = _own_peak() if self._kernel_knows else 0
        self.bytes = max(self.bytes, own, self._meter.sample())

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.bytes = max(self.bytes, self._meter.sample())


def descendants(pid: int) -> list[int]:
    """Give the processes that come from this one and have an unbroken line to it; none where there is no ``/proc``."""
    return list(_family(pid))[1:] if _has_proc() else []


# -- watching others ---------------------------------------------------------------------------------------------------


class WatchedProcess:
    """A process that is killed when it holds too much memory.

    Args:
        pid: the process; its children count too.
        limit: in bytes.
        kill: called, on the loop, when it holds more.
        inherited: the bytes that earlier jobs had left in it.

    Attributes:
        exceeded: the bytes it held when it was killed for it; None until then.
    """

    __slots__ = ("_inherited", "_kill", "_limit", "_meter", "exceeded")

    def __init__(self, pid: int, limit: float, kill: Callable[[], object], inherited: int = 0) -> None:
        self._meter = MemoryMeter(pid)
        self._limit = limit
        self._kill = kill
        self._inherited = inherited
        self.exceeded: int | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._meter.pid

    @property
    def is_suspect_only(self) -> bool:
        """Whether it was killed, but might not have been if earlier jobs had left nothing in it."""
        return self.exceeded is not None and self.exceeded - self._inherited <= self._limit

    def excess(self) -> int | None:
        """Give the bytes it holds if these are too many. To be called in a worker thread, as it reads files."""
        if self._meter.sample() <= self._limit:
            return None
        size = self._meter.sample(exact=True)  # before anything is killed for what it shares with its own children
        return size if size > self._limit else None

    def end(self, size: int) -> None:
        """Kill it."""
        self.exceeded = size
        self._kill()


async def supervise(watched: Callable[[], Iterable[WatchedProcess]], interval: float = INTERVAL_S) -> None:
    """Look after processes until cancelled, on any event loop, which is not blocked by it.

    Args:
        watched: gives the processes that are to be watched now, on the loop. It is asked again before one is killed:
            what is not among them any more, since its job has ended meanwhile, is spared.
        interval: seconds between two looks.
    """
    import anyio
    import anyio.to_thread

    limiter = anyio.CapacityLimiter(1)  # our own: the program may have filled the common one with what blocks
    while True:
        await anyio.sleep(interval)
        processes = list(watched())
        if not processes:
            continue
        sizes = await anyio.to_thread.run_sync(_excesses, processes, limiter=limiter)
        still = list(watched())
        for process, size in zip(processes, sizes, strict=True):
            if size is not None and process in still:
                process.end(size)


def _excesses(processes: list[WatchedProcess]) -> list[int | None]:
    return [process.excess() for process in processes]


# -- where the figures come from ---------------------------------------------------------------------------------------


def require() -> None:
    """Refuse to measure where that is not possible.

    Raises:
        ImportError: psutil is needed and is not installed.
    """
    if not _has_proc():
        _psutil()


@functools.cache
def _has_proc() -> bool:
    own = os.getpid()
    return sys.platform == "linux" and Path(f"/proc/{own}/task/{own}/children").exists()


@functools.cache
def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


def _family(pid: int) -> Iterator[int]:
    """Give the process and its descendants, as far as their line to it is unbroken."""
    yield pid
    for child in _children(pid):
        yield from _family(child)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - several times faster, ten times a second
    except OSError:  # it ended
        return found
    for task in tasks:
        try:
            found += map(int, _read(f"/proc/{pid}/task/{task}/children").split())
        except OSError:  # this thread ended
            continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(_read(f"/proc/{pid}/statm").split()[1]) * _page_size()
    except OSError:  # it ended
        return 0


def _proportional(pid: int) -> int:
    """Give its memory, that which several processes share divided among them."""
    try:
        return _kibibytes(_read(f"/proc/{pid}/smaps_rollup"), b"Pss:")
    except OSError:  # it ended; or it runs under another user
        return _resident(pid)


def _forget_own_peak() -> bool:
    """Have the kernel begin anew with this process's peak; False where it does not do so."""
    if not _has_proc():
        return False
    try:
        Path("/proc/self/clear_refs").write_bytes(b"5")
    except OSError:  # a container may forbid it
        return False
    return True


def _own_peak() -> int:
    try:
        return _kibibytes(_read("/proc/self/status"), b"VmHWM:")
    except OSError:  # the job has used up the file descriptors, say
        return 0


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - twice as fast, ten times a second for each process
        return file.read() or b""


def _kibibytes(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _sample_with_psutil(pid: int) -> int:
    psutil = _psutil()
    total = 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:  # it ended
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:  # likewise
            continue
    return total


def _psutil() -> Any:
    try:
        import psutil
    except ImportError as exc:
        raise MissingExtraError("measuring memory needs psutil on this system: pip install 'paraval[profile]'") from exc
    return psutil
