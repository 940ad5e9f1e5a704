"""`paraval backends`, `--help` and `--version`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from commandline import CommandLine
from paraval.registry import methods


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with CommandLine(tmp_path) as command_line:
        yield command_line


def test_every_method_is_in_the_table(command_line: CommandLine) -> None:
    done = command_line.run("backends")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for name, method in methods().items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert method.parallel in line
        assert ("yes" if method.missing is None else method.missing) in line
    assert re.search(r"^ *serial +yes +coroutines +cancels the coroutine +yes +no ", done.stdout, re.MULTILINE)
    assert re.search(r"^ *thread +yes +threads +asks; then abandons it +yes +no ", done.stdout, re.MULTILINE)


def test_help_and_version(command_line: CommandLine) -> None:
    done = command_line.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "paraval run " in done.stdout
    assert command_line.run().stdout == done.stdout
    help_of_run = command_line.run("run", "--help")
    assert help_of_run.returncode == 0
    for word in ["TARGET", "--configs", "--method", "--num-workers", "--timeout", "--job-timeout", "--output", "--set"]:
        assert word in help_of_run.stdout
    assert "Exit codes: 0" in help_of_run.stdout
    assert re.fullmatch(r"paraval (\d+\.\d+.*|\(not installed, .*\))\n", command_line.run("--version").stdout)
