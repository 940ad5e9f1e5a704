"""TARGET: what is found, and what is said when it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paraval.cli.target import check_call, load_target
from paraval.errors import BadValueError

SOURCE = """
import functools
from sweep_neighbour import SHARED
NOT_A_FUNCTION = {"x": 1}
def train(job): return SHARED
def train_more(job, epochs, *, rate=0.1): return epochs
class Model:
    def __call__(self, job): return 7.0
class Inert: pass
class Demanding:
    def __init__(self, x): pass
    def __call__(self, job): return 7.0
class Space:
    @staticmethod
    def evaluate(job): return 8.0
partial = functools.partial(train_more, epochs=4)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "sweep_target.py").write_text(SOURCE)
    (tmp_path / "sweep_neighbour.py").write_text("SHARED = 6.0\n")
    package = tmp_path / "sweep_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def run(job): return 9.0\n")
    (package / "broken.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("sweep_", "raises", "wrong")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "result"),
    [
        ("sweep_target.py:train", 6.0),
        ("./sweep_target.py:train", 6.0),
        ("sweep_target:train", 6.0),
        ("sweep_package.inner:run", 9.0),
        ("sweep_package/inner.py:run", 9.0),
        ("sweep_target.py:Model", 7.0),
        ("sweep_target.py:Space.evaluate", 8.0),
        ("sweep_target.py:partial", 4),
    ],
)
def test_the_run_function_is_found(place: Path, target: str, result: float) -> None:
    run_function = load_target(target)
    check_call(target, run_function, {})
    assert run_function(object()) == result


def test_a_file_is_a_module_of_its_own_name(place: Path) -> None:
    run_function = load_target(str(place / "sweep_target.py") + ":train")
    assert run_function.__module__ == "sweep_target"
    assert sys.modules["sweep_target"].train is run_function
    assert sys.path[0] == str(place)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("sweep_target.py", "must be path/to/file.py:function or package.module:function"),
        ("sweep_target.py:", "must be path/to/file.py:function"),
        (":train", "must be path/to/file.py:function"),
        ("sweep_target.py:a-b", "must be path/to/file.py:function"),
        ("sweep_targte.py:train", "no such file: sweep_targte.py (did you mean sweep_target.py"),
        ("nowhere/sweep_target.py:train", "no such file: nowhere/sweep_target.py"),
        ("sweep_package/inner:run", "no such file: sweep_package/inner (did you mean sweep_package/inner.py?)"),
        ("./sweep_package:run", "sweep_package is not a file"),
        ("no_such_module:run", "no module named 'no_such_module'"),
        ("sweep_package.nothing:run", "no module named 'sweep_package.nothing'"),
        (
            "sweep_package.broken:run",
            "raised ModuleNotFoundError: No module named 'no_such_dependency' (broken.py, line 1)",
        ),
        ("sweep_target.py:trian", "no 'trian' in sweep_target (did you mean train"),
        ("sweep_target.py:zzz", "no 'zzz' in sweep_target (it has train, train_more, Model"),
        ("sweep_target.py:Space.zzz", "no 'zzz' in Space"),
        ("sweep_target.py:NOT_A_FUNCTION", "is not callable: it is of type dict"),
        ("sweep_target.py:Inert", "is a class without __call__"),
        ("sweep_target.py:Demanding", "making it without arguments raised TypeError"),
    ],
)
def test_what_is_wrong_is_named(place: Path, target: str, complaint: str) -> None:
    with pytest.raises(BadValueError) as caught:
        load_target(target)
    assert complaint in str(caught.value)
    assert f"'{target}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1\nraise ValueError('two\\nlines')\n", "raised ValueError: two; lines (raises.py, line 2)"),
        ("def broken(:\n", "raised SyntaxError: invalid syntax (raises.py, line 1)"),
        ("import sys\nsys.exit(3)\n", "raised SystemExit: 3 (raises.py, line 2)"),
        ("import json\njson.loads('{')\n", "raised JSONDecodeError: Expecting property name"),
    ],
)
def test_an_import_that_raises_is_one_line(place: Path, source: str, complaint: str) -> None:
    (place / "raises.py").write_text(source)
    with pytest.raises(BadValueError) as caught:
        load_target("raises.py:run")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "raises" not in sys.modules


def test_a_name_that_is_taken_is_named(place: Path) -> None:
    (place / "json.py").write_text("def run(job): return 1.0\n")
    import json

    with pytest.raises(BadValueError, match=r"a module named 'json' is loaded already .*: rename json.py"):
        load_target("json.py:run")
    assert sys.modules["json"] is json


def test_arguments_are_checked_before_the_first_job(place: Path) -> None:
    run_function = load_target("sweep_target.py:train_more")
    check_call("sweep_target.py:train_more", run_function, {"epochs": 3, "rate": 0.5})
    with pytest.raises(BadValueError, match="missing a required argument: 'epochs'"):
        check_call("sweep_target.py:train_more", run_function, {})
    with pytest.raises(BadValueError, match="unexpected keyword argument 'epoch'"):
        check_call("sweep_target.py:train_more", run_function, {"epochs": 3, "epoch": 3})
