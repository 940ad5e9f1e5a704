"""A few bytes that two processes of one machine share, for an executor that carries only calls and their results.

Over it the driver can ask a running job to stop, and see how far the worker is. Where the worker cannot open the file
(it is on another machine), all the rest works without.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import weakref
from pathlib import Path
from typing import Final

__all__ = ["Board"]

_HOLD: Final = struct.Struct("<q")
_STOP: Final = struct.Struct("<q")
_CURRENT: Final = struct.Struct("<q")
_HOLD_AT, _STOP_AT, _CURRENT_AT, _SIZE = 0, 8, 16, 24


class Board:
    """Shared through a file. The driver makes it, the worker opens it by its path.

    Each number has one writer. A job is named by its place in the call, and the driver asks one job to stop: so the
    next one, which may begin at that moment, is not meant by it.

    Args:
        path: of the file that another process made; None makes one.

    Attributes:
        path: of the file; empty: there is none.
        lack: why there is no file that another process could open; None: there is one.

    Raises:
        OSError: there is no such file here.
    """

    lack: OSError | None = None
    _remove: weakref.finalize[[str, int], Board] | None = None
    _memory: mmap.mmap | bytearray

    def __init__(self, path: str | None = None) -> None:
        self.path = ""
        try:
            descriptor = self._make() if path is None else os.open(path, os.O_RDWR)
            try:
                self._memory = mmap.mmap(descriptor, _SIZE)
            finally:
                os.close(descriptor)
        except OSError as exc:
            if path is not None:
                raise
            self.lack = exc  # no room, say
            self._delete()
            self._memory = bytearray(_SIZE)
        else:
            self.path = path or self.path

    def _make(self) -> int:
        descriptor, self.path = tempfile.mkstemp(prefix="paraval-")
        self._remove = weakref.finalize(self, _remove, self.path, os.getpid())
        try:
            # Not by truncate: where the disk is full, the first touch of the memory would kill this process.
            os.write(descriptor, bytes(_SIZE))
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    # -- the worker's side ---------------------------------------------------------------------------------------------

    def begin(self, place: int) -> bool:
        """Say which job is about to begin, and ask whether it may."""
        _CURRENT.pack_into(self._memory, _CURRENT_AT, place + 1)
        return not self._memory[_HOLD_AT]  # asked second: a driver that holds, then looks, sees this job or is obeyed

    def stops(self, place: int) -> bool:
        """Whether this job shall stop."""
        return bool(_STOP.unpack_from(self._memory, _STOP_AT)[0] == place + 1)

    # -- the driver's side ---------------------------------------------------------------------------------------------

    @property
    def current(self) -> int | None:
        """The place of the last job that began; None: none has."""
        place: int = _CURRENT.unpack_from(self._memory, _CURRENT_AT)[0] - 1
        return None if place < 0 else place

    def hold(self) -> None:
        """Let no further job begin."""
        self._memory[_HOLD_AT] = 1

    def stop(self, place: int) -> None:
        """Ask a job to stop."""
        _STOP.pack_into(self._memory, _STOP_AT, place + 1)

    def clear(self) -> None:
        """Make it ready for the next call."""
        self._memory[:] = bytes(_SIZE)

    def close(self) -> None:
        """Let go; the file goes with its maker."""
        if isinstance(self._memory, mmap.mmap):
            self._memory.close()
        self._delete()

    def _delete(self) -> None:
        self.path = ""
        if self._remove is not None:
            self._remove()


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:  # not a fork of it
        Path(path).unlink(missing_ok=True)
