"""Files that a worker process shall have, too: none has the number of a standard stream.

Where a program has closed its stdin, stdout or stderr, as daemons do, the next files to be opened get their numbers. In
a worker these are what a job reads and prints to, whatever it is.
"""

from __future__ import annotations

import os
import socket
from typing import Final

__all__ = ["above_standard", "is_closed", "pipe", "socketpair"]

_STANDARD: Final = 2


def above_standard(fd: int) -> int:
    """Give a file another number, if it has one of a standard stream."""
    if fd > _STANDARD:
        return fd
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _STANDARD + 1)
    finally:
        os.close(fd)


def pipe() -> tuple[int, int]:
    """Make a pipe; give the end to read from, and the end to write to."""
    read, write = os.pipe()
    return above_standard(read), above_standard(write)


def socketpair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Make two connected sockets of this machine, which block."""
    one, other = map(_above_standard, socket.socketpair(socket.AF_UNIX, kind))
    for end in (one, other):
        end.setblocking(True)  # whatever the program has made the default of new ones
    return one, other


def _above_standard(sock: socket.socket) -> socket.socket:
    if sock.fileno() > _STANDARD:
        return sock
    return socket.socket(fileno=above_standard(sock.detach()))


def is_closed(fd: int) -> bool:
    """Whether this program has no such file."""
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False
