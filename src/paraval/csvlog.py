"""Jobs as rows of a CSV file: one writer for the callback, for ``Evaluator.dump_evals`` and for the command line.

What is on disk. A file begins, and gets another header, as a temporary file in the same directory, which is fsynced and
renamed over the path (then the directory is fsynced): a reader sees the old file or the new one, both whole. Every
later row is appended, by one write of whole rows that is flushed and fsynced, because a rename for each would copy
all earlier rows, and the cost of a job would grow with the number of jobs. A write that fails is cut back to the
last whole row. So whenever :meth:`CSVLog.write` has returned, its rows are on disk, whole, and stay so. Only rows whose
write has *not* returned can be cut, when the machine loses power or SIGKILL strikes inside that very call: the file's
last line then has no line end.

Rows end with CRLF and the encoding is UTF-8 (RFC 4180, and what the ``csv`` module writes by default).
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import itertools
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paraval.errors import BadValueError, ParavalError, WrongTypeError
from paraval.job import HPOJob, Job
from paraval.outcome import is_failure

__all__ = ["CSVError", "CSVLog", "CSVPathError", "SavedKeyError", "SavedKeys", "check_writable"]

_logger = logging.getLogger(__name__)

SavedKeys = Sequence[str] | Callable[[Any], Mapping[str, Any]] | None
"""Which arguments of a job become columns: all, those with these names, or what a function of the job returns."""


class CSVError(ParavalError, OSError):
    """The CSV file could not be written; its rows are kept in memory and tried again."""


class CSVPathError(CSVError, BadValueError):
    """No CSV file can be written at this path; the message says why."""


class SavedKeyError(ParavalError, KeyError):
    """A job lacks an argument that was to be saved."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a CSV file can be written at ``path``. The check leaves nothing there.

    An existing file is no obstacle: it is kept under another name when the first row is written. Character devices such
    as ``/dev/full`` and ``/dev/stdout`` and named pipes are allowed, if they may be written.

    Raises:
        CSVPathError: (an OSError and a ValueError) it cannot; the message names what is wrong.
    """
    _sink_at(path)


class CSVLog:
    """Writes jobs to a CSV file, one row each, in the order given. It may be used from several threads.

    The columns are, for an :class:`HPOJob`, ``p:*`` (arguments), ``objective`` (or ``objective_0``, …, over which a
    single failure is repeated), ``job_id``, ``job_status``, ``m:*`` (metadata, without the keys that start with ``_``);
    for a plain :class:`Job`, ``job_id``, ``job_status``, ``p:*``, ``o:*`` (or ``o:`` for an output that is no dict),
    ``m:*``. They freeze at the first successful job: what later jobs have beyond them is left out, and a warning names
    it once. Jobs that failed before it are written at once with the columns known then; when the first success has
    others, the file is replaced by one with the frozen columns and all earlier rows. (A device cannot be replaced:
    there they wait for the first success, or for ``close``.)

    A file that exists at the path is never destroyed: it is renamed to ``results.csv.1`` (or the next free number).

    Args:
        path: where to write. It is checked now; the file is made with the first row.
        saved_keys: None: all arguments; a list: those with these names; a callable: the dict it returns for the job.
        convert: applied to the values that a list of ``saved_keys`` selects.
        error_column: adds ``m:error``: one line on why the job failed, empty otherwise.
        parameters: names of arguments that get a column even if the first successful job lacks them.

    Attributes:
        path: where the rows go, absolute.

    Raises:
        CSVPathError: no file can be written at ``path``.
        TypeError: ``saved_keys`` is none of the above.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "results.csv",
        *,
        saved_keys: SavedKeys = None,
        convert: Callable[[Any], Any] | None = None,
        error_column: bool = False,
        parameters: Iterable[str] = (),
    ) -> None:
        if not (saved_keys is None or callable(saved_keys) or isinstance(saved_keys, list | tuple)):
            raise WrongTypeError(f"saved_keys must be None, a list of names or a callable, not {saved_keys!r}")
        self._sink = _sink_at(path)
        self.path = str(self._sink.path)
        self._saved_keys = saved_keys
        self._convert = convert
        self._error_column = error_column
        self._parameters: dict[str, str] = dict.fromkeys((f"p:{name}" for name in parameters), "")
        self._layout = _Layout()
        self._early: list[_Row] = []  # on disk, under columns that may still change
        self._pending: list[_Row] = []  # not on disk yet
        self._left_out: set[str] = set()  # columns that a warning has named
        self._lock = threading.Lock()

    @property
    def kept_as(self) -> str | None:
        """The name that a file found at the path was given; None if there was none, or no row has been written yet."""
        return self._sink.kept_as

    def write(self, jobs: Iterable[Job] = ()) -> None:
        """Write one row for each job, after those that are left over; on return they are on disk.

        Raises:
            CSVError: (an OSError) the disk is full, say. The file is whole; the rows are written with the next call.
            KeyError: a job lacks a name of ``saved_keys``; then none of ``jobs`` is written.
            TypeError: the ``saved_keys`` callable returned no dict; likewise.
        """
        self.add(jobs)
        with self._lock:
            self._flush()

    def add(self, jobs: Iterable[Job]) -> None:
        """Take the rows of jobs, all or none, to be written with the next ``write``.

        Raises:
            KeyError: a job lacks a name of ``saved_keys``.
            TypeError: the ``saved_keys`` callable returned no dict.
        """
        rows = [self._row(job) for job in jobs]
        with self._lock:
            self._pending += rows

    def close(self) -> None:
        """Write what is left over. It may be called again, and ``write`` may be called after it.

        Raises:
            CSVError: what is left over could not be written; it is still kept.
        """
        with self._lock:
            try:
                self._flush(last=True)
            finally:
                self._sink.close()

    def _flush(self, *, last: bool = False) -> None:
        if not self._pending:
            return
        layout = self._next_layout()
        if not layout.frozen and not self._sink.replaceable:
            if not last:
                return
            layout = layout._replace(frozen=True)
        try:
            if layout.columns == self._layout.columns and self._sink.is_ours():
                self._sink.append(self._text(layout, self._pending))
            else:
                self._sink.replace(self._text(layout, self._early + self._pending, header=True))
        except OSError as exc:
            error = CSVError(
                f"cannot write {self.path}: {exc.strerror or exc}; {len(self._pending)} row(s) are not on disk yet, "
                "but kept in memory and tried again with the next write"
            )
            error.errno = exc.errno
            raise error from exc
        if layout.frozen:
            self._early = []
        else:
            self._early += self._pending
        self._pending = []
        self._layout = layout

    def _next_layout(self) -> _Layout:
        """Find the columns for the rows on disk and those to be written."""
        old = self._layout
        if old.frozen:
            return old
        success = next((row for row in self._pending if row.success), None)
        if success is not None:
            return _Layout(tuple(success.cells(success.objectives)), success.objectives, frozen=True)
        columns, rows, objectives = old.columns, self._pending, old.objectives
        if objectives is None:
            objectives = next((row.objectives for row in rows if row.objectives), None)
            if objectives is not None:  # one column becomes several, in the earlier rows too
                columns, rows = (), self._early + rows
        names = (name for row in rows for name in row.cells(objectives))
        return _Layout(tuple(dict.fromkeys(itertools.chain(columns, names))), objectives)

    def _text(self, layout: _Layout, rows: Iterable[_Row], *, header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, layout.columns, extrasaction="ignore")
        known = frozenset(layout.columns)
        if header:
            writer.writeheader()
        for row in rows:
            cells = row.cells(layout.objectives)
            if row.objectives and "objective" in known:  # the columns froze with one objective: better there than lost
                cells["objective"] = f"({', '.join(row.objective)})"
            writer.writerow(cells)
            for name in sorted(cells.keys() - known - self._left_out):
                if cells[name] != "":
                    self._left_out.add(name)
                    _logger.warning(
                        "%s: %r is left out: the columns are those of the first successful job", self.path, name
                    )
        # A byte that could not be decoded, in a file name or a message, is a lone surrogate: it must not cost the row.
        return text.getvalue().encode("utf-8", "backslashreplace")

    def _row(self, job: Job) -> _Row:
        ends = {"job_id": str(job.id).rpartition(".")[2], "job_status": job.status.name}
        parameters = self._parameters | {f"p:{key}": _cell(value) for key, value in self._selected(job).items()}
        metadata = {f"m:{key}": _cell(value) for key, value in list(job.metadata.items()) if str(key)[:1] != "_"}
        if self._error_column and (job.error is not None or "m:error" not in metadata):
            metadata["m:error"] = "" if job.error is None else " ".join(job.error.summary.split())
        if not isinstance(job, HPOJob):
            output = job.output if isinstance(job.output, dict) else {"": job.output}
            outputs = {f"o:{key}": _cell(value) for key, value in output.items()}
            return _Row(ends | parameters | outputs, (), metadata, job.error is None)
        value = job.objective
        objective = tuple(map(_cell, value)) if isinstance(value, tuple | list) else _cell(value)
        success = not (job.error is not None or value is None or is_failure(value))
        return _Row(parameters, objective, ends | metadata, success)

    def _selected(self, job: Job) -> Mapping[str, Any]:
        if self._saved_keys is None:
            return job.args
        if not callable(self._saved_keys):
            try:
                values = {key: job.args[key] for key in self._saved_keys}
            except KeyError as exc:
                raise SavedKeyError(
                    f"job {job.id} has no argument {exc.args[0]!r}, which saved_keys names; it has {list(job.args)}"
                ) from None
            return values if self._convert is None else {key: self._convert(value) for key, value in values.items()}
        selected = self._saved_keys(job)
        if not isinstance(selected, Mapping):
            raise WrongTypeError(f"the saved_keys function must return a dict, not {type(selected).__name__}")
        return selected


def _cell(value: Any) -> str:
    """Give the text of a value as of now: a list changed later is written as it was. Floats keep their digits."""
    try:
        return "" if value is None else str(value)
    except Exception:  # noqa: BLE001 - a broken __str__, or an int of more than 4300 digits, must not cost the row
        return f"<{type(value).__name__} without a text>"


class _Layout(NamedTuple):
    """The header of the file, and how many objectives it has room for: None is one, in the column ``objective``."""

    columns: tuple[str, ...] = ()
    objectives: int | None = None
    frozen: bool = False


class _Row(NamedTuple):
    """One job. Its objectives stand between two groups of columns, because their names depend on the whole file."""

    before: dict[str, str]
    objective: str | tuple[str, ...]
    after: dict[str, str]
    success: bool

    @property
    def objectives(self) -> int | None:
        """How many objectives there are; None when there is one, or (a plain job) none."""
        return len(self.objective) or None if isinstance(self.objective, tuple) else None

    def cells(self, objectives: int | None) -> dict[str, str]:
        if isinstance(self.objective, tuple):
            several = self.objective
        elif objectives is None:
            return {**self.before, "objective": self.objective, **self.after}
        else:
            several = (self.objective,) * objectives
        return {**self.before, **{f"objective_{i}": cell for i, cell in enumerate(several)}, **self.after}


def _sink_at(given: str | os.PathLike[str]) -> _File | _Stream:
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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept_as: str | None = None
        self._identity: tuple[int, int] | None = None  # device and inode of the file made here
        self._whole = 0  # how many bytes of it are whole rows; told apart only while _torn
        self._torn = False

    def is_ours(self) -> bool:
        """Whether the file at the path is the one made here: not removed, not replaced by somebody else."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def replace(self, data: bytes) -> None:
        """Put a new file with ``data`` in the place of ours, in one step. A file that is not ours is kept aside."""
        temporary = self.path.with_name(f".{self.path.name}.{os.urandom(4).hex()}.tmp")
        try:
            with temporary.open("xb", buffering=0) as file:
                _write_all(file, data)
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
    """A character device or a pipe, written plainly: there is nothing to replace, to sync or to cut back."""

    replaceable = False
    kept_as: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._sent = 0  # bytes that got through before a write failed: they come again with the next try

    def is_ours(self) -> bool:
        """Whether it can be written on: always."""
        return True

    def append(self, data: bytes) -> None:
        """Write, all of it."""
        if self._file is None:
            self._file = self.path.open("wb", buffering=0)
        while self._sent < len(data):
            self._sent += self._file.write(memoryview(data)[self._sent :])
        self._sent = 0

    replace = append

    def close(self) -> None:
        """Close it, so that the reader of a pipe sees its end."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
