"""Jobs as rows of a CSV file: one writer for the callback, for ``Evaluator.dump_evals`` and for the command line.

What holds for the file on disk is told at :mod:`paraval.csvfile`. Rows end with CRLF and the encoding is UTF-8
(RFC 4180, and what the ``csv`` module writes by default).
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from paraval.csvfile import PATIENCE, CSVError, CSVPathError, check_writable, sink_at
from paraval.errors import ParavalError, WrongTypeError
from paraval.job import HPOJob, Job
from paraval.outcome import is_failure

__all__ = ["CSVError", "CSVLog", "CSVPathError", "SavedKeyError", "SavedKeys", "check_writable"]

_logger = logging.getLogger(__name__)

SavedKeys = Sequence[str] | Callable[[Any], Mapping[str, Any]] | None
"""Which arguments of a job become columns: all, those with these names, or what a function of the job returns."""

MOST_LATE_COLUMNS: Final = 100
"""How many columns a file gets after its first successful job: each one copies the file."""


class SavedKeyError(ParavalError, KeyError):
    """A job lacks an argument that was to be saved."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class CSVLog:
    """Writes jobs to a CSV file, one row each, in the order given. It may be used from several threads.

    The columns are, for an :class:`HPOJob`, ``p:*`` (arguments), ``objective`` (or ``objective_0``, …, over which a
    single failure is repeated), ``job_id``, ``job_status``, ``m:*`` (metadata, without the keys that start with ``_``);
    for a plain :class:`Job`, ``job_id``, ``job_status``, ``p:*``, ``o:*`` (or ``o:`` for an output that is no dict),
    ``m:*``. They freeze at the first successful job: what later jobs have beyond them is left out, and a warning names
    it once; or, with ``late_columns``, it gets columns at the end, for which the file is copied. Jobs that failed
    before the first success are written at once with the columns known then; when it has others, the file is replaced
    by one with the frozen columns and all earlier rows.

    A device or a pipe cannot be replaced: there early failures wait for the first success, or for ``close``, and late
    columns are left out. A named pipe must have a reader, whom the constructor gives a few seconds to appear. While
    that reader takes nothing, ``write`` keeps rows for later; ``close`` waits as long as it takes something now and
    then.

    A file that exists at the path is never destroyed: it is renamed to ``results.csv.1`` (or the next free number).

    Args:
        path: where to write. It is checked now; the file is made with the first row.
        saved_keys: None: all arguments; a list: those with these names; a callable: the dict it returns for the job.
        convert: applied to the values that a list of ``saved_keys`` selects.
        error_column: adds ``m:error``: one line on why the job failed, empty otherwise. What is named ``error`` in the
            metadata is then in ``m:error_``.
        parameters: names of arguments that get a column even if the first successful job lacks them.
        late_columns: keep what later jobs have beyond the columns of the first success (up to 100 columns more).

    Attributes:
        path: where the rows go, absolute.

    Raises:
        CSVPathError: no file can be written at ``path``, or nobody reads the pipe.
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
        late_columns: bool = False,
    ) -> None:
        if not (saved_keys is None or callable(saved_keys) or isinstance(saved_keys, list | tuple)):
            raise WrongTypeError(f"saved_keys must be None, a list of names or a callable, not {saved_keys!r}")
        self._sink = sink_at(path)
        self._sink.prepare()
        self._sink.patience = 0.0
        self.path = str(self._sink.path)
        self._saved_keys = saved_keys
        self._convert = convert
        self._error_column = error_column
        self._late_columns = late_columns and self._sink.replaceable
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
            self._sink.patience = PATIENCE
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
        old = self._layout
        try:
            if not self._sink.is_ours() or (layout.columns != old.columns and not old.frozen):
                self._sink.replace(self._text(layout, self._early + self._pending, header=True))
            elif layout.columns == old.columns:
                self._sink.append(self._text(layout, self._pending))
            else:
                self._sink.widen(layout.columns[len(old.columns) :], self._text(layout, self._pending))
        except BlockingIOError:  # the reader of a pipe takes nothing now
            if not last:
                return
            raise CSVError(
                f"cannot write {self.path}: its reader took nothing for {PATIENCE:g} s; {len(self._pending)} row(s) "
                "are kept in memory and tried again with the next write"
            ) from None
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
            return self._with_late_columns(old, self._pending)
        success = next((row for row in self._pending if row.success), None)
        if success is not None:
            frozen = _Layout(tuple(success.cells(success.objectives)), success.objectives, frozen=True)
            return self._with_late_columns(frozen, self._early + self._pending)
        columns, rows, objectives = old.columns, self._pending, old.objectives
        if objectives is None:
            objectives = next((row.objectives for row in rows if row.objectives), None)
            if objectives is not None:  # one column becomes several, in the earlier rows too
                columns, rows = (), self._early + rows
        names = (name for row in rows for name in row.cells(objectives))
        return _Layout(tuple(dict.fromkeys(itertools.chain(columns, names))), objectives)

    def _with_late_columns(self, layout: _Layout, rows: Sequence[_Row]) -> _Layout:
        room = MOST_LATE_COLUMNS - layout.late if self._late_columns else 0
        if not room:
            return layout
        late: dict[str, None] = {}
        objectives = layout.objectives
        if objectives is not None:
            objectives = max(objectives, *(row.objectives or 0 for row in rows))
            late |= {f"objective_{index}": None for index in range(layout.objectives or 0, objectives)}
        for row in rows:
            late |= {name: None for cells in (row.before, row.after) for name, cell in cells.items() if cell != ""}
        new = [name for name in late if name not in layout.columns][:room]
        return _Layout((*layout.columns, *new), objectives, frozen=True, late=layout.late + len(new))

    def _text(self, layout: _Layout, rows: Iterable[_Row], *, header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, layout.columns, extrasaction="ignore")
        known = frozenset(layout.columns)
        if header:
            writer.writeheader()
        for row in rows:
            cells = row.cells(layout.objectives)
            if row.objectives and "objective" in known:  # the columns froze with one objective: better there than lost
                cells = {**row.before, "objective": f"({', '.join(row.objective)})", **row.after}
            writer.writerow(cells)
            for name in sorted(cells.keys() - known - self._left_out):
                if cells[name] != "":
                    self._left_out.add(name)
                    late = f", and {layout.late} late ones" if layout.late else ""
                    _logger.warning(
                        "%s: %r is left out: the columns are those of the first successful job%s", self.path, name, late
                    )
        # A byte that could not be decoded, in a file name or a message, is a lone surrogate: it must not cost the row.
        return text.getvalue().encode("utf-8", "backslashreplace")

    def _row(self, job: Job) -> _Row:
        ends = {"job_id": str(job.id).rpartition(".")[2], "job_status": job.status.name}
        parameters = self._parameters | {f"p:{key}": _cell(value) for key, value in self._selected(job).items()}
        noted = {str(key): value for key, value in list(job.metadata.items()) if str(key)[:1] != "_"}
        if self._error_column and "error" in noted:
            noted[name_beside_error(noted)] = noted.pop("error")
        metadata = {f"m:{key}": _cell(value) for key, value in noted.items()}
        if self._error_column:
            metadata["m:error"] = "" if job.error is None else job.error.summary
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


def name_beside_error(*metadata: Container[str]) -> str:
    """Give the name for what metadata calls ``"error"``, where the column ``m:error`` says why a job failed."""
    name = "error_"
    while any(name in noted for noted in metadata):
        name += "_"
    return name


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
    late: int = 0


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
