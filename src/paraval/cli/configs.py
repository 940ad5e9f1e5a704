"""FILE on the command line: configurations from CSV, JSON (a list of objects) or JSON Lines.

The extension decides (``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.ndjson``), else the first character: ``[`` begins
JSON, ``{`` JSON Lines, anything else CSV.

A CSV has no types, so its cells are read the way JSON would read them: integers, floats (also ``nan`` and ``inf``) and
``true``/``false`` in any case are recognised, an empty cell is None, everything else is a string (blanks around a cell
are not part of it). When its columns are
those of a results file (``p:…``), these are the parameters, without the prefix, and the other columns are left out: so
the results of one sweep can be the input of the next.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, Final, NoReturn

from paraval.errors import BadValueError

__all__ = ["Configs", "parse_value", "read_configs"]

Configs = list[dict[str, Any]]


def read_configs(file: str) -> Configs:
    """Read all configurations of a file, in order.

    Args:
        file: a path, or ``-`` for standard input.

    Raises:
        BadValueError: it cannot be read, holds nothing, or a line is malformed; one line names the file, the line and
            why.
    """
    name = "<stdin>" if file == "-" else file
    if file == "-" and sys.stdin is None:
        raise BadValueError("cannot read <stdin>: it is closed")
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except FileNotFoundError:
        raise BadValueError(f"no such file: {name}") from None
    except OSError as exc:
        raise BadValueError(f"cannot read {name}: {exc.strerror or exc}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise BadValueError(f"{name}, line {line}: not UTF-8 text (byte 0x{data[exc.start]:02x})") from None
    if not text.strip():
        raise BadValueError(f"{name} is empty: it must hold at least one configuration")
    configs = _READERS[_format(file, text)](name, text)
    if not configs:
        raise BadValueError(f"{name} holds no configuration")
    return configs


def parse_value(text: str) -> Any:
    """Give one CSV cell its type: int, float, bool, None (empty) or str."""
    if text == "":
        return None
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < _LONGEST_INTEGER else text
    if _FLOAT.fullmatch(text):
        return float(text)
    return _WORDS.get(text.lower(), text)


# A leading zero is no number, as in JSON: "007" is a name.
_INTEGER: Final = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?|nan|inf)")
_WORDS: Final = {"true": True, "false": False}
_LONGEST_INTEGER: Final = 4000  # Python refuses to convert strings of more than 4300 digits


def _format(file: str, text: str) -> str:
    by_extension = _EXTENSIONS.get(Path(file).suffix.lower())
    if by_extension is not None:
        return by_extension
    return {"[": "json", "{": "jsonl"}.get(text.lstrip()[0], "csv")


_EXTENSIONS: Final = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def _read_json(name: str, text: str) -> Configs:
    try:
        items = _decode(text)
    except json.JSONDecodeError as exc:
        hint = "; JSON Lines? Then name it .jsonl" if exc.msg == "Extra data" else ""
        _malformed(name, exc.lineno, f"not valid JSON: {exc.msg} (column {exc.colno}{hint})")
    except (RecursionError, ValueError) as exc:
        _malformed(name, None, f"not valid JSON: {exc}")
    if not isinstance(items, list):
        _malformed(name, 1, f"a list of objects is needed, this is {_kind(items)}")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            _malformed(name, _line_of_item(text, index), f"item {index + 1} is {_kind(item)}, not an object")
    return items


def _line_of_item(text: str, index: int) -> int:
    # The whole text is known to be a valid list: step over the items before the one that is asked for.
    decoder = json.JSONDecoder()
    position = _BETWEEN.match(text, text.index("[") + 1).end()  # type: ignore[union-attr] # it matches the empty string
    for _ in range(index):
        _, position = decoder.raw_decode(text, position)
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr] # likewise
    return text.count("\n", 0, position) + 1


_BETWEEN: Final = re.compile(r"[\s,]*")


def _read_json_lines(name: str, text: str) -> Configs:
    configs: Configs = []
    # Not splitlines(): JSON strings may hold U+2028 and the like, which are no line ends in JSON Lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _decode(line)
        except json.JSONDecodeError as exc:
            _malformed(name, number, f"not valid JSON: {exc.msg} (column {exc.colno})")
        except (RecursionError, ValueError) as exc:
            _malformed(name, number, f"not valid JSON: {exc}")
        if not isinstance(item, dict):
            _malformed(name, number, f"an object is needed, this is {_kind(item)}")
        configs.append(item)
    return configs


def _decode(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is there twice in one object")
    return result


_CELL: Final = 2**31 - 1
"""The most characters of a cell that the csv module can be told on every system."""


def _read_csv(name: str, text: str) -> Configs:
    csv.field_size_limit(_CELL)  # captured output may be long; the limit is the process's
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True, skipinitialspace=True)
    configs: Configs = []
    header: list[str] | None = None
    keys: dict[str, int] = {}
    first = 1  # line on which the current row begins; a quoted cell may span several
    try:
        for row in reader:
            if not row or row == [""]:
                pass
            elif header is None:
                header = [column.strip() for column in row]
                keys = _parameters(name, first, header)
            elif len(row) != len(header):
                _malformed(name, first, f"{len(row)} cells, but the header has {len(header)}")
            else:
                configs.append({key: parse_value(row[index].strip()) for key, index in keys.items()})
            first = reader.line_num + 1
    except csv.Error as exc:
        _malformed(name, first, f"not valid CSV: {exc}")
    return configs


def _parameters(name: str, line: int, header: list[str]) -> dict[str, int]:
    """Which column holds which parameter."""
    for column in header:
        if not column:
            _malformed(name, line, f"column {header.index(column) + 1} has no name")
        if header.count(column) > 1:
            _malformed(name, line, f"the column '{column}' is there twice")
    prefixed = {column.removeprefix("p:"): index for index, column in enumerate(header) if column.startswith("p:")}
    return prefixed or {column: index for index, column in enumerate(header)}


def _delimiter(text: str) -> str:
    header = text.lstrip().partition("\n")[0]
    return next((sign for sign in ",;\t" if sign in header), ",")


_READERS: Final = {"csv": _read_csv, "json": _read_json, "jsonl": _read_json_lines}


def _kind(item: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(item), "a number")


def _malformed(name: str, line: int | None, why: str) -> NoReturn:
    raise BadValueError(f"{name}: {why}" if line is None else f"{name}, line {line}: {why}")
