"""A few bytes that two processes of one machine share.

On it the driver sees how far the worker is, also while a job lets nothing else of the worker run, and says that no
further job shall begin. Over that of an executor, which carries only calls and their results, it can also ask a running
job to stop. Where the worker cannot open it (it is on another machine), all the rest works without.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final, NamedTuple

from paraval.worker.frames import message_of

__all__ = ["Address", "Board", "BoardOfWorker", "Look"]

# Each number has one writer. A job is named by its place, and the driver asks one job to stop: so the next one, which
# may begin at that moment, is not meant by it. (In the machine's own format a number is written at once, not by bytes.)
_NUMBER: Final = struct.Struct("q")
_BEGUN: Final = struct.Struct("dq")
_HOLD_AT, _STOP_AT, _BEGUN_AT, _SIZE = 0, 8, 16, 32


class Address(NamedTuple):
    """Where a worker finds a board.

    Attributes:
        path: of the file; empty: there is none.
        link: what the path must be a link to, or it is another process's, on another machine; empty: it is no link.
    """

    path: str = ""
    link: str = ""


class Look(NamedTuple):
    """What is seen on a board.

    Attributes:
        began: when the last job began, on the worker's clock.
        place: which one that was.
    """

    began: float
    place: int


class Board:
    """The driver's side, which makes the file: in memory where the system can, so that none is left when it is killed.

    Attributes:
        address: for :meth:`BoardOfWorker.at`.
        lack: why there is no file that another process could open; None: there is one.
    """

    def __init__(self) -> None:
        import weakref  # here, as other imports below: a worker needs none of them

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

    def fileno(self) -> int:
        """Give the file for :class:`BoardOfWorker`; -1: there is none."""
        return -1 if self._file is None else self._file

    @property
    def current(self) -> int | None:
        """The place of the last job that began; None: none has."""
        seen = self._look()
        return None if seen is None or seen.place < 0 else seen.place

    def _look(self) -> Look | None:
        if self._file is None:
            return None
        began, number = _BEGUN.unpack(os.pread(self._file, _BEGUN.size, _BEGUN_AT))
        return Look(began, number - 1)

    def pin_down(self, message: int, latest: float) -> Look | None:
        """Give the job of a message that runs; if it began before ``latest``, no further one of these will begin.

        Returns:
            None where that is not known: the worker is not at this message, or another job is just about to begin.
        """
        seen = self._look()
        # Two numbers are not read at once. The worker writes first when it began, then which: so of two looks that show
        # the same, the time is that of this job, or of one that is about to begin.
        if seen is None or seen != self._look() or message_of(seen.place)[0] != message:
            return None
        if seen.began < latest:
            self.hold(message)
            if seen != self._look():  # it has ended in this moment; what was not begun comes back
                return None
        return seen

    def hold(self, message: int = 0) -> None:
        """Let no further job of this message begin. Those of the next ones are not meant, so nobody must let go."""
        self._write(_HOLD_AT, _NUMBER.pack(message + 1))

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
    import uuid

    from paraval.descriptors import above_standard

    name = f"paraval-{uuid.uuid4().hex}"
    file = above_standard(os.memfd_create(name))
    return file, Address(f"/proc/{os.getpid()}/fd/{file}", f"/memfd:{name} (deleted)")


def _on_disk() -> tuple[int, Address]:
    import tempfile

    from paraval.descriptors import above_standard

    file, path = tempfile.mkstemp(prefix="paraval-")
    return above_standard(file), Address(path)


def _delete(file: int, address: Address, maker: int) -> None:
    os.close(file)
    if not address.link and os.getpid() == maker:  # not a fork of it
        from pathlib import Path

        Path(address.path).unlink(missing_ok=True)


class BoardOfWorker:
    """The worker's side.

    Args:
        file: of the driver's, for this process; closed by this.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, file: int) -> None:
        try:
            self._memory = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)

    @classmethod
    def at(cls, address: Address) -> BoardOfWorker:
        """Open the driver's.

        Raises:
            OSError: it is not here.
        """
        from pathlib import Path

        path, link = address
        if link and str(Path(path).readlink()) != link:  # not to be opened, which may do things to what it is
            raise FileNotFoundError(f"{path} is another process's")
        file = os.open(path, os.O_RDWR)
        if link and str(Path(f"/proc/self/fd/{file}").readlink()) != link:  # the driver has closed it meanwhile
            os.close(file)
            raise FileNotFoundError(f"{path} is something else by now")
        return cls(file)

    def begin(self, place: int, now: float) -> bool:
        """Say which job is about to begin, and ask whether it may."""
        memory = self._memory
        _BEGUN.pack_into(memory, _BEGUN_AT, now, place + 1)
        # Asked second: a driver that holds, then looks, sees this job or is obeyed.
        return bool(_NUMBER.unpack_from(memory, _HOLD_AT)[0] != message_of(place)[0] + 1)

    def end(self) -> None:
        """Say that none runs."""
        _BEGUN.pack_into(self._memory, _BEGUN_AT, 0.0, 0)

    def stops(self, place: int) -> bool:
        """Whether this job shall stop."""
        return bool(_NUMBER.unpack_from(self._memory, _STOP_AT)[0] == place + 1)

    def close(self) -> None:
        """Let go."""
        self._memory.close()
