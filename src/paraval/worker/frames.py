"""What goes over the socket between a worker and its parent, and the worker's end of it.

The frames are a length (8 bytes) and a pickled tuple, whose first item says what it is:

======== ================================= ==========================================================================
parent   ``("setup", Setup)``              once, first
         ``("jobs", n, ids, [args, …],     message n: jobs, to run in this order; after how many seconds what was not
         seconds, more)``                  begun is to be sent back; whether more may lie on the tray then
         ``("look",)``                     there is
         ``("reply", error, value)``       to a call; both sealed
         ``("stop",)``                     the job shall: for one that has made something else of SIGTERM
child    ``("ready", bytes)``               the setup is done; the memory held then, where it is limited
         ``("done", n, at, times,          what became of jobs of message n, of those from place ``at`` on: when the
         errors, values)``                 first began, then when each ended, which is when the next one began
                                           (doubles); the errors, by their place among these; what they returned
         ``("back", n, at, started)``      those of message n from ``at`` on were never begun, send them elsewhere;
                                           since when the one before them keeps the worker busy, or None
         ``("begun", n)``                  it has this message from the socket, and will look at the tray next
         ``("lost",)``                     a job has closed the tray
         ``("idle", n)``                   it waits, having seen messages up to this one; more may lie on the tray now
         ``("call", method, args)``        of the storage; sealed arguments
         ``("broken", error)``             the setup failed; no job will ever run here
======== ================================= ==========================================================================

Messages with jobs may lie on the tray, too (:class:`~paraval.backends.tray.Tray`), with their number in place of a
length. The worker looks there when it has run what it had, and reported that: so where one is gone from the tray, all
before it has been said.

An ``args`` or ``value`` is a :class:`Sealed` pickle unless it is plain, so that one that cannot be unpickled costs its
own job only.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import pickle
import struct
from typing import Any, Final, NamedTuple

from paraval.worker.pickling import dumps, is_plain

__all__ = ["HEAD", "MESSAGE", "PAIR", "STOP", "Sealed", "Setup", "Wire", "message_of", "place_of", "sendable"]

HEAD: Final = 8
"""Bytes of the number before a message on the tray."""
MESSAGE: Final = 1 << 16
"""Bytes of the largest message there, with its number."""

_STOP: Final = pickle.dumps(("stop",), 5)
STOP: Final = len(_STOP).to_bytes(8, "little") + _STOP
"""The frame, with its length."""
PAIR: Final = struct.Struct("2d")
"""When one job began, and when it ended."""
_PEEKED: Final = 1 << 12
_NOT_STANDARD: Final = 3
"""The first descriptor that is none of a standard stream, which are put back where a job has closed them."""


class Setup(NamedTuple):
    """What a worker needs to know, once.

    Attributes:
        path: ``sys.path`` of the parent.
        argv: ``sys.argv`` of the parent.
        program: four things, pickled together: the run-function; its static keyword arguments; the stopper, which is
            copied for each job; a function without arguments to be called before the first job, or None.
        origin: where the evaluator's clock is zero, on the system's monotonic clock.
        is_async: whether calling the run-function gives a coroutine.
        retry_on: pickled tuple of exception types; or None.
        is_captured: whether the parent reads what is printed, so that nothing may wait in a buffer: a crash would lose
            it, and the next job have it.
        kill_grace: seconds between asking a job to stop and the strongest means.
        memory_limit: the bytes at which the parent kills this process; infinity for never.
    """

    path: list[str]
    argv: list[str]
    program: bytes
    origin: float
    is_async: bool
    retry_on: bytes | None
    is_captured: bool
    kill_grace: float
    memory_limit: float


class Sealed(NamedTuple):
    """A value, pickled on its own."""

    data: bytes


def sendable(value: Any) -> Any:
    """Give a result as it is sent, some time later: the next job may change what this one returned.

    Raises:
        PicklingFailed: it cannot be sent.
    """
    if not is_plain(value):
        return Sealed(dumps(value, "the result"))
    return dict(value) if type(value) is dict else value


def place_of(message: int, at: int) -> int:
    """Give the place of a job: which message it is of, and where in that; in an executor's call, of message 0."""
    return message << 32 | at


def message_of(place: int) -> tuple[int, int]:
    """Give what :func:`place_of` was given."""
    return place >> 32, place & 0xFFFF_FFFF


class Wire:
    """The worker's end of the socket."""

    def __init__(self, fd: int) -> None:
        self._reader = open(fd, "rb", buffering=1 << 16, closefd=False)  # noqa: SIM115 - open for the whole life
        self._fd = fd
        self._sending = _thread.allocate_lock()
        self._peeked: Any = None

    def send(self, frame: tuple[Any, ...]) -> None:
        """Send a frame; from any thread."""
        data = pickle.dumps(frame, 5)
        with self._sending:
            if len(data) < 1 << 16:
                data = len(data).to_bytes(8, "little") + data
                sent = os.write(self._fd, data)
                if sent < len(data):
                    _write(self._fd, memoryview(data)[sent:])
            else:
                _write(self._fd, memoryview(len(data).to_bytes(8, "little")))
                _write(self._fd, memoryview(data))

    def receive(self) -> Any:
        """Wait for a frame; None at the end."""
        try:
            head = self._reader.read(8)
        except ConnectionError:  # the parent has closed its end with something unread
            return None
        if len(head) < 8:  # noqa: PLR2004 - the length of a length
            return None
        data = self._reader.read(int.from_bytes(head, "little"))
        return pickle.loads(data)  # noqa: S301 - from our own parent

    def drain(self) -> None:
        """Read to the end: the parent must not meet a closed socket before it has sent what is on its way."""
        while self._reader.read(1 << 16):
            pass

    def has_stop(self) -> bool:
        """Whether the job is told to stop by a frame that waits here; it stays where it is."""
        import _socket  # here: most workers never need it; the one in socket takes a while

        try:
            if self._peeked is None:
                self._peeked = _socket.socket(fileno=fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, _NOT_STANDARD))
                self._peeked.setblocking(True)  # for both descriptors, whatever a job has made the default of new ones
            return STOP in self._peeked.recv(_PEEKED, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
        except OSError:  # there is nothing, or nobody, or no descriptor left
            return False


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
