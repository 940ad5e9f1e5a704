"""What is printed while a sweep runs: it reaches whoever reads it, and when nobody does any more, that harms no job.

A run-function that prints into a pipe whose reader has left (``paraval run … | head``) would fail by BrokenPipeError,
in whatever process it runs. So where stdout or stderr is a pipe, what is printed goes into a pipe of our own, which
never breaks; a thread passes it on, and drops it once the reader has left.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import math
import os
import select
import stat
import sys
import termios
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["OutputGuard", "is_stdout"]

STDOUT: Final = 1
STDERR: Final = 2
HURRY: Final = 0.5
"""Seconds that a sweep which was told to end waits for a reader who takes nothing."""


def is_stdout(path: str) -> bool:
    """Whether the results are to go where stdout goes: ``-``, ``/dev/stdout``, and any other name of the same pipe."""
    if path in {"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"}:
        return True
    try:
        there, here = os.stat(path), os.fstat(STDOUT)  # noqa: PTH116 - beside os.fstat
    except (OSError, ValueError):
        return False
    return os.path.samestat(there, here) and not stat.S_ISREG(there.st_mode)


class OutputGuard:
    """Guards stdout and stderr of this process, and of those it starts, for the time of a ``with`` block.

    The end of the block waits until what was printed in it has been read.

    Args:
        results_on_stdout: stdout is for the results alone: whatever is printed meanwhile goes to stderr.
    """

    def __init__(self, *, results_on_stdout: bool) -> None:
        self._results_on_stdout = results_on_stdout
        self._patience = _Patience()
        self._real: dict[int, int] = {}
        self._relays: dict[int, _Relay] = {}

    def __enter__(self) -> Self:
        _flush()
        self._real = {number: os.dup(number) for number in (STDOUT, STDERR)}
        goals = self._real | ({STDOUT: self._real[STDERR]} if self._results_on_stdout else {})
        for number, goal in goals.items():
            status = os.fstat(goal)
            if stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
                # With 2>&1 the two are one pipe, and what goes there must keep its order.
                same = (relay for relay in self._relays.values() if os.path.samestat(os.fstat(relay.goal), status))
                self._relays[number] = relay = next(same, None) or _Relay(goal, self._patience)
                os.dup2(relay.entry, number)
            else:
                os.dup2(goal, number)
        for relay in set(self._relays.values()):
            os.close(relay.entry)  # the numbers 1 and 2 hold it now
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _flush()
        for number, real in self._real.items():
            relay = self._relays.get(number)
            os.dup2(_nowhere() if relay is not None and relay.is_broken else real, number)
        self._drain()

    def hurry(self) -> None:
        """Wait no longer than a moment for a reader who takes nothing. It may be called by a signal handler."""
        self._patience.seconds = HURRY

    def write_results(self, path: Path) -> None:
        """Copy a file to the real stdout.

        Raises:
            OSError: it was not written, or not all of it: BrokenPipeError where its reader left.
        """
        _flush()
        self._drain()  # where stderr is the same pipe, what was printed comes first
        with path.open("rb") as file:
            while data := file.read(1 << 16):
                _write(self._real[STDOUT], data, self._patience)

    def _drain(self) -> None:
        for relay in set(self._relays.values()):
            relay.drain()


class _Patience:
    """How long to wait for a reader who takes nothing; it may change while somebody waits."""

    seconds = math.inf


class _Relay:
    """A pipe whose writers are never disappointed.

    Args:
        goal: file descriptor to which a thread passes on what is written to ``entry``.
        patience: after which everything is dropped.

    Attributes:
        is_broken: whether nobody reads there any more.
    """

    def __init__(self, goal: int, patience: _Patience) -> None:
        self.goal = goal
        self.is_broken = False
        self._patience = patience
        self._exit, self.entry = os.pipe()
        self._reading = threading.Lock()
        self._read = 0  # bytes that have left the pipe
        self._done = 0  # bytes that were passed on, or dropped
        # A daemon: what a job left behind may hold the pipe open for ever.
        self._thread = threading.Thread(target=self._pass_on, name="paraval-output", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Wait until all that has been written is passed on, or dropped. Whoever holds the pipe may write more."""
        with self._reading:
            end = self._read + _waiting_bytes(self._exit)
        while self._thread.is_alive() and self._done < end:
            self._thread.join(0.005)

    def _pass_on(self) -> None:
        while True:
            _wait_for(self._exit, select.POLLIN, None)
            with self._reading:
                data = os.read(self._exit, 1 << 16)
                self._read += len(data)
            if not data:
                return
            try:
                if not self.is_broken:
                    _write(self.goal, data, self._patience)
            except OSError:
                self.is_broken = True
            self._done += len(data)


def _write(number: int, data: bytes, patience: _Patience) -> None:
    rest = memoryview(data)
    progress = time.monotonic()
    while rest:
        # A pipe that is ready takes so much without blocking, whatever those who share it have set it to.
        if _wait_for(number, select.POLLOUT, 0.1):
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(number, rest[: select.PIPE_BUF]) :]
                progress = time.monotonic()
        if time.monotonic() - progress > patience.seconds:
            raise TimeoutError(errno.ETIMEDOUT, "its reader took nothing")


def _wait_for(number: int, event: int, seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(number, event)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def _waiting_bytes(number: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(number, termios.FIONREAD, count)
    return count[0]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a run-function closed it
            stream.flush()


def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)
