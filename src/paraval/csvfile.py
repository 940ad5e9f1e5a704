"""Where the rows of a CSV log go: a regular file, or a device or pipe that can only be written on and on.

What is on disk. A file begins, and gets another column, as a temporary file in the same directory, which is fsynced and
renamed over the path (then the directory is fsynced): a reader sees the old file or the new one, both whole. Every
later row is appended, by one write of whole rows that is flushed and fsynced, because a rename for each would copy
all earlier rows, and the cost of a job would grow with the number of jobs. A write that fails is cut back to the
last whole row. So whenever ``CSVLog.write`` has returned, its rows are on disk, whole, and stay so. Only rows whose
write has *not* returned can be cut, when the machine loses power or SIGKILL strikes inside that very call: the file's
last line then has no line end.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import itertools
import logging
import os
import select
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from paraval.errors import BadValueError, ParavalError

__all__ = ["PATIENCE", "CSVError", "CSVPathError", "check_writable", "sink_at"]

_logger = logging.getLogger("paraval.csvlog")

PATIENCE: Final = 3.0
"""Seconds to wait for the reader of a pipe: to be there at all, and at the end to take something more."""


class CSVError(ParavalError, OSError):
    """The CSV file could not be written; its rows are kept in memory and tried again."""


class CSVPathError(CSVError, BadValueError):
    """No CSV file can be written at this path; the message says why."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a CSV file can be written at ``path``. The check leaves nothing there.

    An existing file is no obstacle: it is kept under another name when the first row is written. Character devices such
    as ``/dev/full`` and ``/dev/stdout`` and named pipes are allowed, if they may be written (whether somebody reads a
    pipe is not looked at: whoever opens one to see and closes it again ends its reader).

    Raises:
        CSVPathError: (an OSError and a ValueError) it cannot; the message names what is wrong.
    """
    sink_at(path)


def sink_at(given: str | os.PathLike[str]) -> _File | _Stream:
    """Find out what is at a path, or could be made there; nothing is made yet.

    Raises:
        CSVPathError: nothing can be written there.
    """
    path = Path(given).absolute()
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        kind = stat.S_IFREG  # it will be
    except (OSError, ValueError) as exc:  # ValueError: a null character in the name
        raise CSVPathError(f"cannot write {str(path)!r}: {getattr(exc, 'strerror', None) or exc}") from exc
    if kind in {stat.S_IFCHR, stat.S_IFIFO}:
        if not os.access(path, os.W_OK):
            raise CSVPathError(f"cannot write {path}: you have no permission to write to this device")
        return _Stream(path)
    if kind == stat.S_IFDIR:
        raise CSVPathError(f"cannot write {path}: it is a directory; give the path of a file, as {path}/results.csv")
    if kind != stat.S_IFREG:
        raise CSVPathError(f"cannot write {path}: it is neither a file, nor a character device, nor a pipe")
    if path.is_symlink():
        path = path.resolve()  # the link stays a link; a rename over it would end it
    if not path.parent.is_dir():
        raise CSVPathError(f"cannot write {path}: the directory {path.parent} does not exist; create it first")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits alone do not tell (root, read-only mounts)
    except OSError as exc:
        raise CSVPathError(
            f"cannot write {path}: no file can be made in the directory {path.parent}: {exc.strerror}"
        ) from exc
    return _File(path)


class _File:
    """A regular file that is whole on disk at any moment; see the docstring of the module."""

    replaceable = True
    patience = PATIENCE

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept_as: str | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the file made here
        self._whole = 0  # how many bytes of it are whole rows; told apart only while _torn
        self._torn = False

    def prepare(self) -> None:
        """Do nothing: the file is made with the first row."""

    def is_ours(self) -> bool:
        """Whether the file at the path is the one made here: not removed, not replaced by somebody else."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def replace(self, data: bytes) -> None:
        """Put a new file with ``data`` in the place of ours, in one step. A file that is not ours is kept aside."""
        self._replace((data,))

    def widen(self, columns: Sequence[str], data: bytes) -> None:
        """Give the header more columns, every row empty cells under them, and ``data`` (whole rows) after them."""
        cells = io.StringIO(newline="")
        csv.writer(cells).writerow(["", *columns])
        header = cells.getvalue().removesuffix("\r\n").encode("utf-8", "backslashreplace")
        with self.path.open("rb") as file:
            end = self._whole if self._torn else os.fstat(file.fileno()).st_size
            rows = _rows(file, end)
            self._replace(
                itertools.chain(
                    (row + header + b"\r\n" for row in itertools.islice(rows, 1)),
                    (row + b"," * len(columns) + b"\r\n" for row in rows),
                    (data,),
                )
            )

    def _replace(self, parts: Iterable[bytes]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.urandom(4).hex()}.tmp")
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
                made = os.fstat(file.fileno())
            if not self.is_ours():
                if self._identity is not None:
                    _logger.warning("%s was moved or removed while it was written; it begins anew", self.path)
                self._keep_other()
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._identity = made.st_dev, made.st_ino
        self._torn = False
        _sync_folder(self.path.parent)

    def append(self, data: bytes) -> None:
        """Write whole rows at the end. If that fails or is interrupted, the file ends where it ended before."""
        with self.path.open("r+b", buffering=0) as file:
            if self._torn:
                file.truncate(self._whole)  # an earlier write failed, and cutting it back did too
            self._whole = file.seek(0, os.SEEK_END)
            self._torn = True
            try:
                _write_all(file, data)
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(self._whole)
                self._torn = False
                raise
            self._torn = False

    def close(self) -> None:
        """Do nothing: the file is open only while it is written, so that a file moved away is noticed."""

    def _keep_other(self) -> None:
        if not self.path.exists():
            return
        kept = _reserve_name(self.path)
        try:
            self.path.replace(kept)
        except BaseException:
            kept.unlink()
            raise
        self.kept_as = str(kept)
        _logger.info("%s existed; it is kept as %s", self.path, kept)


class _Stream:
    """A character device or a pipe, written plainly: there is nothing to replace, to sync or to cut back.

    Attributes:
        patience: seconds that ``append`` waits for the reader of a pipe to take something more.
    """

    replaceable = False
    patience = PATIENCE
    kept_as: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._sent = 0  # bytes that got through before a write failed: they come again with the next try

    def prepare(self) -> None:
        """Open it, without which a pipe does not tell whether somebody reads it.

        Raises:
            CSVPathError: nobody does, or it cannot be opened.
        """
        self._opened()

    def _opened(self) -> io.FileIO:
        deadline = time.monotonic() + PATIENCE
        while self._file is None:
            try:
                # Never blocking: a pipe without a reader, or with one that takes nothing, would hold up everything.
                self._file = io.FileIO(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), "wb")
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise CSVPathError(f"cannot write {self.path}: {exc.strerror}") from exc
                if time.monotonic() > deadline:
                    raise CSVPathError(
                        f"cannot write {self.path}: nobody reads this pipe; start its reader first"
                    ) from None
                time.sleep(0.02)  # the two may have been started at the same time
        return self._file

    def is_ours(self) -> bool:
        """Whether it can be written on: always."""
        return True

    def append(self, data: bytes) -> None:
        """Write, all of it.

        Raises:
            BlockingIOError: the reader takes nothing now; what it took does not come again with the next try.
        """
        file = self._opened()
        while self._sent < len(data):
            written = file.write(memoryview(data)[self._sent :])
            if written is not None:
                self._sent += written
            elif not select.select([], [file], [], self.patience)[1]:
                raise BlockingIOError
        self._sent = 0

    replace = append

    def widen(self, columns: Sequence[str], data: bytes) -> None:
        """Never called: columns are late only where they can be added."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it, so that the reader of a pipe sees its end."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _rows(file: BinaryIO, end: int) -> Iterator[bytes]:
    """Give the rows of a file made here, without their line ends, up to the byte ``end``."""
    row = b""
    while end > 0 and (line := file.readline()):
        end -= len(line)
        row += line
        # A line end within a cell stands between quotes; a quote within a cell is doubled, and all others are in pairs.
        if row.endswith(b"\r\n") and row.count(b'"') % 2 == 0:
            yield row[:-2]
            row = b""


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]  # a disk that is nearly full takes a part, and refuses the next


def _reserve_name(path: Path) -> Path:
    """Make an empty ``path.N``, N the smallest free: a rename onto a name only *seen* free could overwrite a file."""
    for number in itertools.count(1):
        name = path.with_name(f"{path.name}.{number}")
        with contextlib.suppress(FileExistsError):
            name.open("xb").close()
            return name
    raise AssertionError  # the numbers do not end


def _sync_folder(folder: Path) -> None:
    """Make a rename in the directory last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # some network file systems cannot do it for a directory
            raise
    finally:
        os.close(handle)
