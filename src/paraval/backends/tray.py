"""A tray in front of a worker process: its next jobs lie there, and can be taken back until it takes them itself."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from paraval.descriptors import socketpair
from paraval.worker.frames import HEAD, MESSAGE

__all__ = ["Tray"]

_FILES: Final = 4
"""A worker takes two, and two more with a tray."""


class Tray:
    """A pair of sockets for messages. Both processes hold the end where these come out.

    Whoever reads a message has it alone; the system sees to that, whatever the other process is doing. So a worker that
    is through with a job finds the next one without a trip to the driver and back; and the driver can give that job to
    another worker, or cancel it, while a job runs that lets nothing else of its process run.
    """

    def __init__(self) -> None:
        self._inlet, self._outlet = _pair()
        self._inlet.setblocking(False)
        self._outlet.setblocking(False)  # for the worker too, as it has the same open file

    @staticmethod
    def can_be_had_by(workers: int) -> bool:
        """Whether so many workers with a tray would leave half of the files that this process may open to others."""
        try:
            import resource
        except ImportError:  # this system has no such limit
            return True
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return most == resource.RLIM_INFINITY or workers * _FILES <= most // 2

    def fileno(self) -> int:
        """Give the end that the worker reads from."""
        return self._outlet.fileno()

    def put(self, number: int, message: bytes) -> bool:
        """Lay a message down; False if it is too large, or the tray is full."""
        if len(message) > MESSAGE - HEAD:
            return False
        try:
            self._inlet.send(number.to_bytes(HEAD, "little") + message)
        except OSError:
            return False
        return True

    def take_back(self) -> set[int]:
        """Take the messages that the worker has not taken; give their numbers.

        They need not be the last ones: the worker may take one between two that are taken here.
        """
        numbers = set()
        with contextlib.suppress(OSError):  # there is no more; or it is closed
            while head := self._outlet.recv(HEAD):  # the rest of a message goes with it
                numbers.add(int.from_bytes(head, "little"))
        return numbers

    def close(self) -> None:
        """Close both ends."""
        self._inlet.close()
        self._outlet.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    # Of those that keep messages apart, the ones with a connection hold as many as their buffer has room for; others
    # hold ten. Not every system has the former.
    with contextlib.suppress(OSError, AttributeError):
        return socketpair(socket.SOCK_SEQPACKET)
    return socketpair(socket.SOCK_DGRAM)
