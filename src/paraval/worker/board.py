"""A few bytes that two processes of one machine share, for an executor that carries only calls and their results.

Over it the driver can ask a running job to stop, and see how far the worker is. Where the worker cannot open it (it is
on another machine), all the rest works without.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Address", "Board", "BoardOfWorker"]

# Each number has one writer. A job is named by its place in the call, and the driver asks one job to stop: so the next
# one, which may begin at that moment, is not meant by it.
_NUMBER: Final = struct.Struct("<q")
_HOLD_AT, _STOP_AT, _CURRENT_AT, _SIZE = 0, 8, 16, 24


class Address(NamedTuple):
    """Where a worker finds a board.

    Attributes:
        path: of the file; empty: there is none.
        link: what the path must be a link to, or it is another process's, on another machine; empty: it is no link.
    """

    path: str = ""
    link: str = ""


class Board:
    """The driver's side, which makes the file: in memory where the system can, so that none is left when it is killed.

    Attributes:
        address: for :class:`BoardOfWorker`.
        lack: why there is no file that another process could open; None: there is one.
    """

    def __init__(self) -> None:
        self.address = Address()
        self.lack: OSError | None = None
        self._file: int | None = None
        try:
            self._file, self.address = _in_memory() if hasattr(os, "memfd_create") else _on_disk()
            self._delete = weakref.finalize(self, _delete, self._file, self.address, os.getpid())
            self.clear()  # by a write: where there is no room, the worker's first touch of it would be its end
        except OSError as exc:  # no room, say
            self.close()
            self.lack = exc

    @property
    def current(self) -> int | None:
        """The place of the last job that began; None: none has."""
        if self._file is None:
            return None
        place: int = _NUMBER.unpack(os.pread(self._file, _NUMBER.size, _CURRENT_AT))[0] - 1
        return None if place < 0 else place

    def hold(self) -> None:
        """Let no further job begin."""
        self._write(_HOLD_AT, _NUMBER.pack(1))

    def stop(self, place: int) -> None:
        """Ask a job to stop."""
        self._write(_STOP_AT, _NUMBER.pack(place + 1))

    def clear(self) -> None:
        """Make it ready for the next call."""
        self._write(0, bytes(_SIZE))

    def _write(self, at: int, data: bytes) -> None:
        if self._file is not None:
            os.pwrite(self._file, data, at)

    def close(self) -> None:
        """Let go; the file goes with its maker."""
        if self._file is not None:
            self._file = None
            self.address = Address()
            self._delete()


def _in_memory() -> tuple[int, Address]:
    name = f"paraval-{uuid.uuid4().hex}"
    file = os.memfd_create(name)
    return file, Address(f"/proc/{os.getpid()}/fd/{file}", f"/memfd:{name} (deleted)")


def _on_disk() -> tuple[int, Address]:
    file, path = tempfile.mkstemp(prefix="paraval-")
    return file, Address(path)


def _delete(file: int, address: Address, maker: int) -> None:
    os.close(file)
    if not address.link and os.getpid() == maker:  # not a fork of it
        Path(address.path).unlink(missing_ok=True)


class BoardOfWorker:
    """The worker's side.

    Args:
        address: of the driver's.

    Raises:
        OSError: it is not here.
    """

    def __init__(self, address: Address) -> None:
        path, link = address
        if link and str(Path(path).readlink()) != link:  # not to be opened, which may do things to what it is
            raise FileNotFoundError(f"{path} is another process's")
        file = os.open(path, os.O_RDWR)
        try:
            if link and str(Path(f"/proc/self/fd/{file}").readlink()) != link:  # the driver has closed it meanwhile
                raise FileNotFoundError(f"{path} is something else by now")
            self._memory = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)

    def begin(self, place: int) -> bool:
        """Say which job is about to begin, and ask whether it may."""
        _NUMBER.pack_into(self._memory, _CURRENT_AT, place + 1)
        return not self._memory[_HOLD_AT]  # asked second: a driver that holds, then looks, sees this job or is obeyed

    def stops(self, place: int) -> bool:
        """Whether this job shall stop."""
        return bool(_NUMBER.unpack_from(self._memory, _STOP_AT)[0] == place + 1)

    def close(self) -> None:
        """Let go."""
        self._memory.close()
