"""A few bytes that two processes of one machine share, for an executor that carries only calls and their results.

Over it the driver can ask a running job to stop, and see when the worker began. Where the worker cannot open the file
(it is on another machine), all the rest works without.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile

__all__ = ["Board"]

_STARTED = struct.Struct("<d")
_STARTED_AT = 8
_SIZE = 16


class Board:
    """Shared through a file. One side makes it, the other opens it by its path.

    Args:
        path: of the file that another process made; None makes one.

    Raises:
        OSError: there is no such file here, or none can be made.
    """

    def __init__(self, path: str | None = None) -> None:
        self._is_ours = path is None
        if path is None:
            descriptor, path = tempfile.mkstemp(prefix="paraval-")
            os.truncate(descriptor, _SIZE)
        else:
            descriptor = os.open(path, os.O_RDWR)
        try:
            self._memory = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self.path = path

    @property
    def stopping(self) -> bool:
        """Whether the job shall stop."""
        return self._memory[0] != 0

    def stop(self) -> None:
        """Ask the running job to stop, and the worker to start no other."""
        self._memory[0] = 1

    @property
    def started(self) -> float:
        """When the worker began, on its monotonic clock; 0.0: it has not."""
        (moment,) = _STARTED.unpack_from(self._memory, _STARTED_AT)
        return float(moment)

    def note_start(self, moment: float) -> None:
        """Say, as the worker, that the first job begins."""
        _STARTED.pack_into(self._memory, _STARTED_AT, moment)

    def clear(self) -> None:
        """Make it ready for the next call."""
        self._memory[0] = 0
        self.note_start(0.0)

    def close(self) -> None:
        """Let go; the file goes with its maker."""
        self._memory.close()
        if self._is_ours:
            try:
                os.unlink(self.path)
            except OSError:  # somebody has tidied up
                pass
