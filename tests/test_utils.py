"""Results that subprocesses print, and values as JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import uuid
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import paraval
from paraval import ParavalError, parse_subprocess_result, to_json


def printed(stdout: Any, stderr: Any = b"") -> Any:
    return SimpleNamespace(stdout=stdout, stderr=stderr)


def parsed(text: str) -> Any:
    return parse_subprocess_result(printed(f"DH-OUTPUT:{text}\n".encode()))


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal and of the same types, NaN being itself."""
    return repr(left) == repr(right)


def run_python(code: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=30, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3.5", 3.5),
        ("3", 3),
        ("-1e-3", -0.001),
        ("[1,2]", [1, 2]),
        ("[1.0, 'F_oom']", [1.0, "F_oom"]),
        ("(1.5, 2)", (1.5, 2)),
        ("(1,)", (1,)),
        ("1.5, 2", (1.5, 2)),
        ('{"objective": 1.5}', {"objective": 1.5}),
        ("{'objective': 1.5, 'metadata': {'epochs': 3}}", {"objective": 1.5, "metadata": {"epochs": 3}}),
        ("{'objective': (1.0, nan), 'metadata': {}}", {"objective": (1.0, math.nan), "metadata": {}}),
        ("{'ok': true, 'bad': null}", {"ok": True, "bad": None}),
        ("{'x': np.float64(0.5), 'n': numpy.int64(-3), 'b': np.True_}", {"x": 0.5, "n": -3, "b": True}),
        ("'F_oom'", "F_oom"),
        ('"F_oom"', "F_oom"),
        ("F_oom", "F_oom"),
        ("F", "F"),
        ("F_can't open: 3 > 2", "F_can't open: 3 > 2"),
        ("'F_can't'", "F_can't"),
        ('"F_can\'t"', "F_can't"),
        ("{'note': \"it's\"}", {"note": "it's"}),
        ("None", None),
        ("null", None),
        ("True", True),
        ("true", True),
        ("False", False),
        ("nan", math.nan),
        ("NaN", math.nan),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("-Infinity", -math.inf),
        ("  4.5  ", 4.5),
        ("4.5\r", 4.5),
        ("'naïve'", "naïve"),
    ],
)
def test_what_a_subprocess_prints_is_read(text: str, value: Any) -> None:
    assert same(parsed(text), value)


@pytest.mark.parametrize(
    "stdout", [b"DH-OUTPUT:1.5", "DH-OUTPUT:1.5", "DH-OUTPUT:1.5\n", bytearray(b"DH-OUTPUT:1.5\n")]
)
def test_the_result_may_be_bytes_or_text_with_or_without_a_last_newline(stdout: Any) -> None:
    assert parse_subprocess_result(printed(stdout, None)) == 1.5


def test_the_first_result_counts_wherever_it_stands() -> None:
    text = b"epoch 1\nDH-OUTPUT:\nloss 0.1 DH-OUTPUT:1.5\nDH-OUTPUT:2.5\n"
    assert parse_subprocess_result(printed(text)) == 1.5


def test_bytes_that_are_no_text_do_no_harm() -> None:
    assert parse_subprocess_result(printed(b"\xff\xfe\nDH-OUTPUT:2\n")) == 2


@pytest.mark.parametrize("text", [False, True])
def test_the_result_of_a_real_program_is_read(text: bool) -> None:
    code = "print('hello'); print('DH-OUTPUT:', {'objective': (1, float('nan')), 'note': \"it's\"}, sep='', end='')"
    result = parse_subprocess_result(run_python(code, capture_output=True, text=text))
    assert same(result, {"objective": (1, math.nan), "note": "it's"})


@pytest.mark.parametrize("text", [False, True])
def test_without_a_result_the_error_shows_what_the_program_said(text: bool) -> None:
    done = run_python("raise ValueError('the reason')", capture_output=True, text=text)
    with pytest.raises(RuntimeError, match="code 1") as caught:
        parse_subprocess_result(done)
    assert isinstance(caught.value, ParavalError)
    assert "ValueError: the reason" in str(caught.value)


@pytest.mark.parametrize("stdout", [None, b"", b"DH-OUTPUT", b"DH-OUTPUT:\n", b"DH-OUTPUT:  \n3\n"])
def test_no_output_is_an_error_even_when_nothing_was_captured(stdout: Any) -> None:
    with pytest.raises(RuntimeError, match="DH-OUTPUT"):
        parse_subprocess_result(printed(stdout, None))


@pytest.mark.parametrize(
    "text", ["oops", "{'objective': ", "__import__('os')", "f(1)", "np.load('x')", "[" * 5000, "x.y"]
)
def test_what_is_no_value_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(ValueError, match="neither JSON nor a Python value") as caught:
        parsed(text)
    assert isinstance(caught.value, ParavalError)


_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["C", "Z"]))
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["C", "Z"])), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(_VALUES)
def test_every_value_comes_back_as_python_prints_it(value: Any) -> None:
    assert same(parsed(repr(value)), value)


@given(_VALUES)
def test_every_value_comes_back_as_json(value: Any) -> None:
    text = json.dumps(value)
    assert same(parsed(text), json.loads(text))


# -- JSON --------------------------------------------------------------------------------------------------------------


class Outer:
    def method(self) -> None: ...


def test_json_knows_ids_functions_and_classes() -> None:
    number = uuid.uuid4()
    value = {
        "id": number,
        "function": run_python,
        "class": Outer,
        "method": Outer.method,
        "built-in": len,
        "x": [1, None],
    }
    assert json.loads(to_json(value)) == {
        "id": str(number),
        "function": f"{__name__}.run_python",
        "class": f"{__name__}.Outer",
        "method": f"{__name__}.method",
        "built-in": "builtins.len",
        "x": [1, None],
    }


def test_json_knows_numpy() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed (dependency group 'test')")
    value = {
        "float": numpy.float32(0.5),
        "double": numpy.float64(0.25),
        "int": numpy.int64(3),
        "bool": numpy.bool_(True),
        "array": numpy.arange(4).reshape(2, 2),
        "objects": numpy.array([Outer, None], dtype=object),
    }
    assert json.loads(to_json(value)) == {
        "float": 0.5,
        "double": 0.25,
        "int": 3,
        "bool": True,
        "array": [[0, 1], [2, 3]],
        "objects": [f"{__name__}.Outer", None],
    }


def test_json_refuses_what_it_has_no_form_for() -> None:
    with pytest.raises(TypeError, match="Decimal has no form in JSON"):
        to_json({"x": Decimal(1)})


def test_the_names_are_where_they_were() -> None:
    assert paraval.utils.to_json is to_json
    assert paraval.utils.parse_subprocess_result is parse_subprocess_result
