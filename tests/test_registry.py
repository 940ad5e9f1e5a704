"""Methods by name: ours, and those that other packages bring."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from paraval import Evaluator, ParavalError, RunningJob, SerialEvaluator, ThreadPoolEvaluator
from paraval.registry import default_method, method, methods


def double(job: RunningJob) -> float:
    return float(job["x"] * 2)


async def async_double(job: RunningJob) -> float:
    return double(job)


def install(folder: Path, name: str, module: str, entry_points: dict[str, str]) -> None:
    """Install a package of one module, as pip would leave it."""
    (folder / f"{name}.py").write_text(module, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = "\n".join(f"{method_name} = {value}" for method_name, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[paraval.evaluators]\n{lines}\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder whose packages are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


GOOD = """
from paraval import SerialEvaluator

class Renamed(SerialEvaluator):
    "Runs coroutines under another name."

    parallel = "renamed coroutines"
"""


def test_our_methods() -> None:
    assert list(methods())[:2] == ["serial", "thread"]
    assert method("serial").load() is SerialEvaluator
    assert method("thread").load() is ThreadPoolEvaluator
    for name in ("serial", "thread"):
        found = methods()[name]
        assert found.name == found.label == name
        assert found.missing is None


def test_an_evaluator_is_made_by_the_name_of_its_method() -> None:
    serial = Evaluator.create(async_double)
    assert type(serial) is SerialEvaluator
    thread = Evaluator.create(double, "thread", {"num_workers": 3})
    assert type(thread) is ThreadPoolEvaluator
    assert thread.num_workers == 3
    assert type(Evaluator.create(double, method="thread", method_kwargs=None)) is ThreadPoolEvaluator


def test_an_argument_that_there_is_not_is_named_and_what_may_have_been_meant() -> None:
    with pytest.raises(
        TypeError, match=r"ThreadPoolEvaluator has no argument 'num_worker': did you mean 'num_workers'\?"
    ):
        Evaluator.create(double, "thread", {"num_worker": 2})
    with pytest.raises(ParavalError, match=r"has no argument 'of_mine': it takes num_workers, .*, job_timeout, "):
        Evaluator.create(double, "thread", {"of_mine": 2})


def test_a_bad_value_is_not_taken_for_an_argument_that_there_is_not() -> None:
    with pytest.raises(TypeError, match=r"profile must be True or False"):
        Evaluator.create(double, "thread", {"profile": "yes"})


@pytest.mark.parametrize("name", ["nope", "", "Serial", None, 3, ["serial"]])
def test_an_unknown_method_is_a_value_error_that_lists_the_others(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown method.*serial, thread") as caught:
        Evaluator.create(double, name)
    assert isinstance(caught.value, ParavalError)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_package_brings_a_method(site: Path) -> None:
    install(site, "renamed", GOOD, {"renamed": "renamed:Renamed"})
    assert methods()["renamed"].missing is None
    assert methods()["renamed"].summary == "Runs coroutines under another name."
    assert methods()["renamed"].parallel == "renamed coroutines"
    with Evaluator.create(async_double, "renamed", {"num_workers": 2}) as evaluator:
        assert type(evaluator).__name__ == "Renamed"
        evaluator.submit([{"x": 1}, {"x": 2}])
        assert sorted(job.output for job in evaluator.gather("ALL")) == [2.0, 4.0]
    with pytest.raises(ValueError, match="renamed"):
        Evaluator.create(double, "nope")


def test_another_package_does_not_replace_ours(site: Path) -> None:
    install(site, "impostor", GOOD, {"serial": "impostor:Renamed"})
    assert type(Evaluator.create(async_double, "serial")) is SerialEvaluator


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("raise RuntimeError('it is broken')", "it is broken"),
        ("raise SystemExit('it gives up')", "it gives up"),
        ("x = 1", "Renamed"),
    ],
)
def test_a_broken_package_is_marked_and_harms_no_other(site: Path, module: str, reason: str) -> None:
    install(site, "broken", module, {"broken": "broken:Renamed"})
    found = methods()["broken"]
    assert found.missing is not None
    assert reason in found.missing
    assert reason in found.label
    assert found.summary == ""
    with pytest.raises(ImportError, match=r"'broken' cannot be used here") as caught:
        Evaluator.create(double, "broken")
    assert isinstance(caught.value, ParavalError)
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match=reason):
        Evaluator.create(double, "nope")
    assert type(Evaluator.create(double, "thread")) is ThreadPoolEvaluator


def test_another_package_is_not_imported_for_a_method_of_ours(site: Path) -> None:
    install(site, "costly", GOOD, {"costly": "costly:Renamed"})
    Evaluator.create(double, "thread")
    assert "costly" not in sys.modules


def test_what_is_no_evaluator_is_told(site: Path) -> None:
    install(site, "strange", "Renamed = 3", {"strange": "strange:Renamed"})
    with pytest.raises((TypeError, ImportError), match="strange") as caught:
        Evaluator.create(double, "strange")
    assert isinstance(caught.value, ParavalError)


class AsyncCallable:
    async def __call__(self, job: RunningJob) -> float:
        return double(job)


@pytest.mark.parametrize("function", [async_double, partial(async_double), AsyncCallable(), AsyncCallable().__call__])
def test_the_default_for_coroutines_is_serial(function: Any) -> None:
    assert default_method(function) == "serial"


@pytest.mark.parametrize("function", [double, partial(double), lambda job: job["x"] * 2.0, AsyncCallable, max])
def test_the_default_for_plain_functions_is_local(function: Any) -> None:
    name = default_method(function)
    assert name in ("thread", "process")
    assert methods()[name].missing is None
