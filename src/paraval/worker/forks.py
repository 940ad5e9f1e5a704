"""Whether this is the process that it was: a job may fork, and its child may come back from the job as the job does."""

from __future__ import annotations

import os
from typing import Any, Final

__all__ = ["mark_of_this_process"]

_WIPE_ON_FORK: Final = 18
"""``MADV_WIPEONFORK`` of Linux, which the mmap module does not name."""


def mark_of_this_process() -> Any:
    """Give something whose item 0 is true in this process, and false in each that is forked from it, in whatever way.

    On Linux that is memory which the kernel empties in a forked process. To ask for the process id takes ten times as
    long as to look there: as long as a third of all that is done for a tiny job. (``os.register_at_fork`` does not hear
    of forks that C code makes.)
    """
    try:
        import mmap

        memory = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_WIPE_ON_FORK)
    except (ImportError, AttributeError, OSError, ValueError):  # another system, an old kernel, no memory to be had
        return _ProcessId()
    memory[0] = 1
    return memory


class _ProcessId:
    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, _at: int) -> bool:
        return os.getpid() == self._pid
