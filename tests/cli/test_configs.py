"""FILE: what is read from it, and what is said when it cannot be read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from paraval.cli.configs import parse_value, read_configs
from paraval.errors import BadValueError

EXPECTED = [{"x": 1, "kernel": "rbf"}, {"x": 2, "kernel": "linear"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "x,kernel\n1,rbf\n2,linear\n"),
        ("a.csv", "\ufeffx,kernel\r\n1,rbf\r\n\r\n2,linear"),
        ("a.csv", ' x , kernel\n1, "rbf"\n2 ,linear \n'),
        ("semicolons.csv", "x;kernel\n1;rbf\n2;linear\n"),
        ("a.tsv", "x\tkernel\n1\trbf\n2\tlinear\n"),
        ("a.json", '[{"x": 1, "kernel": "rbf"},\n {"x": 2, "kernel": "linear"}]'),
        ("a.jsonl", '{"x": 1, "kernel": "rbf"}\n\n{"x": 2, "kernel": "linear"}\n'),
        ("a.ndjson", '{"x": 1, "kernel": "rbf"}\r\n{"x": 2, "kernel": "linear"}'),
        ("no_extension", "x,kernel\n1,rbf\n2,linear\n"),
        ("no_extension", ' [{"x": 1, "kernel": "rbf"}, {"x": 2, "kernel": "linear"}]'),
        ("no_extension", '\n{"x": 1, "kernel": "rbf"}\n{"x": 2, "kernel": "linear"}'),
    ],
)
def test_every_format_gives_the_same(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    assert read_configs(str(path)) == EXPECTED


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("1.0", 1.0),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("-inf", -math.inf),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("", None),
        ("007", "007"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("infinity", "infinity"),
        ("None", "None"),
        ("[1, 2]", "[1, 2]"),
        ("\u0661", "\u0661"),
    ],
)
def test_a_cell_gets_its_type(cell: str, value: Any) -> None:
    parsed = parse_value(cell)
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    """A file of results may hold what jobs have printed."""
    path = tmp_path / "a.csv"
    path.write_text(f"x,m:stdout\n1,{'y' * 1_000_000}\n")
    (config,) = read_configs(str(path))
    assert config["x"] == 1


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_value("nan"))


def test_the_longest_integers_do_no_harm() -> None:
    assert parse_value("9" * 10_000) == "9" * 10_000
    assert parse_value("9" * 3_000) == int("9" * 3_000)


def test_a_results_file_can_be_fed_back(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("p:x,p:kernel,objective,job_id,job_status,m:error\n1,rbf,0.5,0,DONE,\n2,linear,F,1,DONE,boom\n")
    assert read_configs(str(path)) == EXPECTED


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", " \n\n", "a.csv is empty"),
        ("a.csv", "x,y\n", "a.csv holds no configuration"),
        ("a.csv", "x,y\n1,2\n3\n", "a.csv, line 3: 1 cells, but the header has 2"),
        ("a.csv", 'x,y\n1,"two\nlines"\n3,4,5\n', "a.csv, line 4: 3 cells, but the header has 2"),
        ("a.csv", 'x,y\n1,2\n3,"4\n', "a.csv, line 3: not valid CSV"),
        ("a.csv", "x,,y\n1,2,3\n", "a.csv, line 1: column 2 has no name"),
        ("a.csv", "x,y,x\n1,2,3\n", "a.csv, line 1: the column 'x' is there twice"),
        ("a.jsonl", '{"x": 1}\n\n{"x": 2\n', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", '{"x": 1}\n[1]\n', "a.jsonl, line 2: an object is needed, this is a list"),
        ("a.jsonl", '{"x": 1}\n{"x": 1, "x": 2}\n', "a.jsonl, line 2: not valid JSON: the key 'x' is there twice"),
        ("a.json", "[]", "a.json holds no configuration"),
        ("a.json", '[{"x": 1},\n {"x": 2}\n {"x": 3}]', "a.json, line 3: not valid JSON"),
        ("a.json", '[{"x": 1},\n {"x": [2, {}]},\n\n 3]', "a.json, line 4: item 3 is a number, not an object"),
        ("a.json", '{"x": 1}', "a.json, line 1: a list of objects is needed, this is an object"),
        ("a.json", '{"x": 1}\n{"x": 2}\n', "JSON Lines? Then name it .jsonl"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", '{"x": ' + "9" * 10_000 + "}", "a.jsonl, line 1: not valid JSON"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadValueError) as caught:
        read_configs(str(path))
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x\n1\n\xff\n")
    with pytest.raises(BadValueError, match=r"line 3: not UTF-8 text \(byte 0xff\)"):
        read_configs(str(path))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadValueError, match=r"no such file: .*missing\.csv"):
        read_configs(str(tmp_path / "missing.csv"))
    with pytest.raises(BadValueError, match=r"cannot read .*: Is a directory"):
        read_configs(str(tmp_path))
