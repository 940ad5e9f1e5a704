"""``paraval export``: the jobs of a search as a file that other programs read.

CSV has the columns of the file that an evaluation leaves (:mod:`paraval.csvlog`), and all of them, as the whole search
is known here. Parquet has the same, typed; its objectives are numbers, and what stands in their place where a job
failed is in the column ``failure``. Metadata named ``error`` is in ``m:error_``, as ``m:error`` is why the job failed.
JSON and JSON Lines have one object for each job, with all that is stored of it.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from paraval.cli.choices import FORMATS
from paraval.cli.messages import FailedError
from paraval.cli.stored import in_order, is_same_file, outputs_are_objectives, parameters_of, status_of
from paraval.csvfile import CSVPathError, sink_at
from paraval.csvlog import _cell, name_beside_error
from paraval.errors import MissingExtraError
from paraval.outcome import is_failure
from paraval.storage import JobRecord

__all__ = ["Destination", "in_format"]


class Destination:
    """Where an export goes. It is looked at before anything is read.

    Args:
        name: the path of a file, which becomes whole in one step, or ``-`` for stdout.
        form: one of ``FORMATS``; None: the one that the name ends with, or CSV.
        sources: files that must not be written over.

    Attributes:
        form: one of ``FORMATS``.
        kept_as: the name that a file found at the path was given; None if there was none.

    Raises:
        click.ClickException: it cannot be.
        ImportError: the format needs what is not installed.
    """

    def __init__(self, name: str, form: str | None, sources: Sequence[Path] = ()) -> None:
        suffix = Path(name).suffix.removeprefix(".").lower()
        self.form = form or (suffix if suffix in FORMATS else "csv")
        self.kept_as: str | None = None
        if self.form == "parquet":
            _require_pyarrow()
        if name == "-":
            self._sink = None
            if self.form == "parquet" and sys.stdout.isatty():
                raise click.UsageError("Parquet is nothing to be read on a terminal: give --output FILE")
            return
        if any(is_same_file(name, source) for source in sources):
            raise click.UsageError(f"--output {name} is the storage itself")
        try:
            self._sink = sink_at(name)
        except CSVPathError as exc:
            raise click.UsageError(str(exc)) from exc

    def write(self, data: bytes) -> None:
        """Write all of it.

        Raises:
            FailedError: it could not be written.
        """
        if self._sink is None:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        try:
            with contextlib.closing(self._sink) as sink:
                sink.replace(data)
        except OSError as exc:
            raise FailedError(f"cannot write {self._sink.path}: {exc.strerror or exc}") from exc
        self.kept_as = self._sink.kept_as


def in_format(records: Sequence[JobRecord], form: str) -> bytes:
    """Give the jobs of a search in one of the ``FORMATS``."""
    records = in_order(records)
    match form:
        case "json":
            objects = b",\n".join(_encode(record) for record in records)
            return b"[\n" + objects + b"\n]\n" if objects else b"[]\n"
        case "jsonl":
            return b"".join(_encode(record) + b"\n" for record in records)
        case "parquet":
            return _parquet(records)
        case _:
            return _csv(records)


# -- JSON --------------------------------------------------------------------------------------------------------------


_RESERVED: Final = frozenset(
    {"job_id", "job_status", "args", "kwargs", "parameters", "output", "error", "metadata", "intermediate"}
    | {"function", "attempts", "extra"}
)
"""What an object says of its job itself: what was stored under such a name is in ``extra``."""


def _encode(record: JobRecord) -> bytes:
    parameters = parameters_of(record)
    given = {"args": record.args, "kwargs": record.kwargs} if parameters is None else {"parameters": parameters}
    error = record.error
    value: dict[str, Any] = {
        "job_id": record.id,
        "job_status": status_of(record),
        **given,
        "output": record.out,
        "error": None if error is None else _error(error),
        "metadata": record.metadata or {},
        "intermediate": {"budget": record.budgets or [], "objective": record.objectives or []},
        "function": record.function,
        "attempts": record.attempts,
    }
    extra = record.extra or {}
    clashing = {key: item for key, item in extra.items() if str(key) in _RESERVED}
    value |= {key: item for key, item in extra.items() if key not in clashing}
    if clashing:
        value["extra"] = clashing
    return msgspec.json.encode(_plain(value))


def _error(error: Any) -> dict[str, Any]:
    return {**error._asdict(), "history": [_error(earlier) for earlier in error.history]}


_MOST_BITS: Final = 10_000
"""Of an int that is written in decimal digits, which takes long for more; Python itself refuses soon after."""


def _plain(value: Any) -> Any:
    """Give what JSON can hold: keys are strings, bytes are Base64, NaN and the infinities become null."""
    if isinstance(value, dict):
        return {_encodable(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return hex(value)
    return value if value is None or isinstance(value, int | float) else _encodable(str(value))


def _encodable(text: str) -> str:
    """Give a text that can be written as UTF-8: a byte of a file name that could not be read is written as its code."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


# -- tables ------------------------------------------------------------------------------------------------------------


def _rows(records: Sequence[JobRecord]) -> tuple[list[str], list[dict[str, Any]]]:
    """Give the columns, and for each job its values by them."""
    hpo = outputs_are_objectives(records)
    several = max((len(record.out) for record in records if hpo and isinstance(record.out, tuple | list)), default=0)
    columns: tuple[dict[str, None], ...] = ({}, {}, {})
    theirs = name_beside_error(*(record.metadata or {} for record in records))
    rows = []
    for record in records:
        parameters = parameters_of(record)
        if parameters is None:
            parameters = {f"{index}": value for index, value in enumerate(record.args or ())} | (record.kwargs or {})
        inputs = {f"p:{key}": value for key, value in parameters.items()}
        ends = {"job_id": int(record.id.rpartition(".")[2]), "job_status": status_of(record)}
        shown = {key: value for key, value in (record.metadata or {}).items() if str(key)[:1] != "_"}
        metadata = {f"m:{theirs if key == 'error' else key}": value for key, value in shown.items()}
        parts = (inputs, _objectives(record.out, several), ends) if hpo else (ends, inputs, _outputs(record.out))
        metadata["m:error"] = None if record.error is None else record.error.summary
        for known, part in zip(columns, parts, strict=True):
            known.update(dict.fromkeys(part))
        rows.append({**parts[0], **parts[1], **parts[2], **metadata})
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("m:") and name != "m:error")
    return [*columns[0], *columns[1], *columns[2], *names, "m:error"], rows


def _objectives(out: Any, several: int) -> dict[str, Any]:
    """Give the objective, or each of them; a single failure stands for all."""
    if not several:
        return {"objective": out}
    items = out if isinstance(out, tuple | list) else [out] * several
    return {f"objective_{index}": item for index, item in enumerate(items)}


def _outputs(out: Any) -> dict[str, Any]:
    if out is None:
        return {}
    return {f"o:{key}": value for key, value in out.items()} if isinstance(out, dict) else {"o:": out}


def _csv(records: Sequence[JobRecord]) -> bytes:
    columns, rows = _rows(records)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _require_pyarrow() -> None:
    try:
        import pyarrow as pa  # noqa: F401 - is it there?
    except ImportError as exc:
        raise MissingExtraError("Parquet needs pyarrow: pip install 'paraval[parquet]'") from exc


def _parquet(records: Sequence[JobRecord]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, rows = _rows(records)
    values = {name: [row.get(name) for row in rows] for name in columns}
    objectives = [name for name in columns if name == "objective" or name.startswith("objective_")]
    if objectives:
        failures = [next((row[name] for name in objectives if is_failure(row.get(name))), None) for row in rows]
        for name in objectives:
            values[name] = [_float(value) for value in values[name]]
        values["failure"] = failures
    types = {name: (pa.float64() if name in objectives else None) for name in values}
    table = pa.table({name: _array(column, types[name]) for name, column in values.items()})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _array(values: list[Any], kind: Any) -> Any:
    """Make a column: of numbers, truth values or texts if it holds nothing else, of texts otherwise."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kind is None and not (kinds <= {int, float} or kinds in ({bool}, {str}, {bytes})):
        values = [None if value is None else _cell(value) for value in values]
    try:
        return pa.array(values, kind or (pa.float64() if kinds == {int, float} else None))
    except (OverflowError, UnicodeEncodeError, pa.ArrowException):  # an int of more than 64 bits, say
        return pa.array([None if value is None else _encodable(_cell(value)) for value in values])


def _float(value: Any) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("-inf") if value < 0 else float("inf")
