"""The README's promises and the examples: what they show runs as it stands, without a warning."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

has_digits_example = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed (extra 'examples')"
)
has_command_line = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("click", "rich")),
    reason="click and rich are not installed (extra 'cli')",
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_python(*arguments: str | Path, cwd: Path) -> str:
    """Run Python with warnings as errors; give what it printed."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Warning" not in ran.stderr
    return ran.stdout


def test_readme_begins_with_the_promised_commands() -> None:
    main_job, tests = blocks(README, "shell")[:2]
    for command in (main_job, tests):
        assert command.count("\n") == 1, "each command is one line"
        assert command.startswith("python3 -m venv .venv && .venv/bin/python -m pip install -q ")
    assert " && .venv/bin/paraval run examples/digits.py:run " in main_job
    assert tests.endswith(" && .venv/bin/nox\n")


def test_the_ten_line_example_shows_what_it_says(tmp_path: Path) -> None:
    program = blocks(README, "python")[0]
    assert len(program.splitlines()) <= 10
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    lines = run_python(file, cwd=tmp_path).splitlines()
    assert len(lines) == 10
    assert {"{'x': 0} F_ZeroDivisionError", "{'x': 1} 1.0", "{'x': 4} 0.25"} <= set(lines)


def test_the_async_sweep_finds_the_best_value(tmp_path: Path) -> None:
    assert run_python(ROOT / "examples/sweep_async.py", cwd=tmp_path) == "best of 100: 1.0000 at x = 3.0\n"


def test_the_search_loop_gets_near_the_best_value(tmp_path: Path) -> None:
    shown = run_python(ROOT / "examples/search_loop.py", cwd=tmp_path)
    found = re.fullmatch(r"best of 200: (-?\d+\.\d+) at x = (\S+), y = (\S+)\n", shown)
    assert found is not None, shown
    assert -3.0 < float(found[1]) <= 0.0  # anywhere else in the space it is -20 or so


@has_digits_example
def test_the_digits_configurations_are_those_the_script_draws(tmp_path: Path) -> None:
    written = (ROOT / "examples/digits.jsonl").read_text(encoding="utf-8")
    assert run_python(ROOT / "examples/digits.py", cwd=tmp_path) == written
    configurations = [json.loads(line) for line in written.splitlines()]
    assert len(configurations) >= 40
    assert len({json.dumps(configuration) for configuration in configurations}) == len(configurations)


@has_digits_example
@has_command_line
def test_the_main_job_on_three_configurations(tmp_path: Path) -> None:
    import csv

    arguments = shlex.split(blocks(README, "shell")[0].partition(".venv/bin/paraval ")[2])
    lines = (ROOT / "examples/digits.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    impossible = next(line for line in lines if json.loads(line)["n_components"] == 100)
    three = tmp_path / "three.jsonl"
    three.write_text("".join([*lines[:2], impossible]), encoding="utf-8")
    results = tmp_path / "results.csv"
    arguments[arguments.index("examples/digits.py:run")] = f"{ROOT}/examples/digits.py:run"
    arguments[arguments.index("examples/digits.jsonl")] = str(three)
    arguments[arguments.index("results.csv")] = str(results)

    summary = run_python("-m", "paraval", *arguments, cwd=tmp_path)

    with results.open(encoding="utf-8", newline="") as file:
        rows = {int(row["job_id"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {0, 1, 2}
    assert all(0.85 < float(rows[number]["objective"]) <= 1.0 for number in (0, 1))
    assert all(int(rows[number]["m:support_vectors"]) > 100 for number in (0, 1))
    assert rows[2]["objective"] == "F_ValueError"
    assert "n_components=100" in rows[2]["m:error"]
    best = max((0, 1), key=lambda number: float(rows[number]["objective"]))
    assert f"kernel={rows[best]['p:kernel']}" in summary
    assert "F_ValueError" in summary
