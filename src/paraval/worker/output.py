"""What a worker process and its jobs print."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import sys
from typing import Any, Final

__all__ = ["StandardStreams", "flush_output", "unbuffer_output"]

_Identity = tuple[int, int, int]
_IONBF: Final = 2
"""C's name for a stream without a buffer."""


class _Unbuffered(io.TextIOWrapper):
    """Text that is out when ``write`` returns; ``write_through`` would leave it in the buffer below."""

    def write(self, text: str, /) -> int:
        count = super().write(text)
        self.flush()
        return count


def unbuffer_output() -> None:
    """Have all that is printed go out at once, also by C libraries, as the interpreter's own option ``-u`` does."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        stream.reconfigure(line_buffering=True)  # who has it already may go on with it
        # A file object of its own, as in a worker of loky's the first was opened on what was another file then.
        setattr(sys, name, _text_on(_Unbuffered, stream.fileno(), stream.encoding, stream.errors))
    try:
        import ctypes  # here: few workers need it

        libc = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
        libc.setvbuf(stdout, None, _IONBF, 0)
    except (ImportError, OSError, ValueError, AttributeError):  # a Python without it, or a C library of another kind
        return


def _text_on(kind: type[io.TextIOWrapper], fd: int, encoding: str | None, errors: str | None) -> io.TextIOWrapper:
    file = open(fd, "wb", closefd=False)  # noqa: SIM115 - open for the whole life
    return kind(file, encoding=encoding, errors=errors, line_buffering=True)


class StandardStreams:
    """Standard output and error, as they are when they are noted: what a job has closed, the next one shall find open.

    It may happen to a job that knows nothing of it: a file object that it opened on the descriptor is collected.
    """

    def __init__(self) -> None:
        self._descriptors: list[tuple[int, int, _Identity | None]] = []
        self._streams: list[tuple[str, int, Any, str | None, str | None]] = []
        self._blocking: set[int] = set()
        self._at_first = {fd: _identity(fd) for fd in (1, 2)}

    def note(self, *, are_own: bool) -> None:
        """Note what they are now.

        Args:
            are_own: whether they were pipes at first that nobody but this process, and what it starts, writes to.
        """
        if are_own:
            now = {fd: _identity(fd) for fd in (1, 2)}  # the set-up may have put something else there
            self._blocking = {fd for fd in now if now[fd] == self._at_first[fd] and now[fd] and os.get_blocking(fd)}
        for fd in (1, 2):
            with contextlib.suppress(OSError):  # it is closed, or no more files may be opened
                self._descriptors.append((fd, os.dup(fd), _identity(fd)))
        for fd, name in ((1, "stdout"), (1, "__stdout__"), (2, "stderr"), (2, "__stderr__")):
            stream: Any = getattr(sys, name, None)
            if not _is_closed(stream):
                # Of an object of somebody's own, these may be anything.
                is_text = type(stream) in {io.TextIOWrapper, _Unbuffered}
                encoding, errors = (stream.encoding, stream.errors) if is_text else (None, None)
                self._streams.append((name, fd, stream, encoding, errors))

    def restore(self) -> None:
        """Put back what is closed, or gone. What a job has put in the place of a stream stays, if it is open."""
        for fd, kept, is_what in self._descriptors:
            if _identity(fd) != is_what and _identity(kept) == is_what:  # else a job has closed that, too
                with contextlib.suppress(OSError):
                    os.dup2(kept, fd)
            if fd in self._blocking:
                with contextlib.suppress(OSError):
                    os.set_blocking(fd, True)
        for at, (name, fd, stream, encoding, errors) in enumerate(self._streams):
            if not _is_closed(getattr(sys, name, None)):
                continue
            if _is_closed(stream):
                kind = _Unbuffered if isinstance(stream, _Unbuffered) else io.TextIOWrapper
                try:
                    new = _text_on(kind, fd, encoding, errors)
                except Exception:  # noqa: BLE001, S112 - the descriptor is closed, and nothing is left to open it with
                    continue
                same = [(*one[:2], new, *one[3:]) if one[2] is stream else one for one in self._streams[at:]]
                self._streams[at:] = same  # sys.stdout and sys.__stdout__ may be one object
            setattr(sys, name, self._streams[at][2])

    def close_in_fork(self) -> None:
        """In a process that a job forked: whoever reads the output shall not wait for one that has left its own."""
        for _, kept, is_what in self._descriptors:
            if _identity(kept) == is_what:
                os.close(kept)
        self._descriptors.clear()  # the numbers are another's from now on, maybe for the same files


def _identity(fd: int) -> _Identity | None:
    """Say what a descriptor is: which file, and whether it is for reading or writing."""
    try:
        found = os.fstat(fd)
        return found.st_dev, found.st_ino, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return None


def _is_closed(stream: Any) -> bool:
    try:
        return stream is None or bool(stream.closed)
    except ValueError:  # its buffer was detached
        return True
    except BaseException:  # noqa: BLE001 - an object of somebody's own
        return False


def flush_output() -> None:
    """Have what was printed go out, as far as the streams are still there."""
    for name in ("stdout", "stderr"):
        with contextlib.suppress(BaseException):  # it is closed, or gone, or something else: a job may do that
            getattr(sys, name).flush()
