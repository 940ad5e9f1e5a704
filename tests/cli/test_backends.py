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

# What a third party's package looks like to paraval: entry points, found through the metadata on sys.path.
ENTRY_POINTS = """
[paraval.evaluators]
elsewhere = elsewhere:ElsewhereEvaluator
unready = elsewhere.nothing:UnreadyEvaluator
"""
ELSEWHERE = """
from paraval import ThreadPoolEvaluator
class ElsewhereEvaluator(ThreadPoolEvaluator):
    "Runs jobs elsewhere."
    parallel = "distant threads"
    several_hosts = True
    cancellation = "kill"
"""


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with CommandLine(tmp_path) as command_line:
        yield command_line


def test_every_method_is_in_the_table(command_line: CommandLine) -> None:
    command_line.write("elsewhere.py", ELSEWHERE)
    metadata = command_line.directory / "elsewhere-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    done = command_line.run("backends")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for name, method in methods().items():
        ready = "yes" if method.argument is None else "in"
        assert [line for line in lines if line.split()[:2] == [name, ready if method.missing is None else "no:"]]
    assert re.search(r"^serial +yes +coroutines +cancels the coroutine +yes +one$", done.stdout, re.MULTILINE)
    assert re.search(r"^thread +yes +threads +asks, then abandons +yes +one$", done.stdout, re.MULTILINE)
    assert re.search(r"^executor +in programs +calls in an executor ", done.stdout, re.MULTILINE)
    assert re.search(r"^executor: .* Not for 'paraval run': it needs executor=…$", done.stdout, re.MULTILINE)
    assert re.search(r"^elsewhere +yes +distant threads +kills the worker +yes +several$", done.stdout, re.MULTILINE)
    assert re.search(r"^unready +no: .*elsewhere\.nothing.* +\? +\? +\? +\?$", done.stdout, re.MULTILINE)
    assert "elsewhere: Runs jobs elsewhere.\n" in done.stdout

    command_line.write("functions.py", "def run(job): return 1.0\n")
    command = ("run", "functions.py:run", "--configs", "-", "--method")
    done = command_line.run(*command, "elsewhere", stdin="x\n1\n")
    assert done.returncode == 0
    assert re.search("^method +elsewhere, ", done.stdout, re.MULTILINE)
    done = command_line.run(*command, "unready", stdin="x\n1\n")
    assert done.returncode == 2
    assert re.fullmatch(r"paraval: error: .*'unready'.*elsewhere\.nothing.*\n", done.stderr)


def test_help_and_version(command_line: CommandLine) -> None:
    done = command_line.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "paraval run " in done.stdout
    assert command_line.run().stdout == done.stdout
    help_of_run = command_line.run("run", "--help")
    assert help_of_run.returncode == 0
    for word in [
        "TARGET",
        "--configs",
        "--method",
        "--num-workers",
        "--timeout",
        "--job-timeout",
        "--output",
        "--set",
        "-e",
    ]:
        assert word in help_of_run.stdout
    assert "Exit codes: 0" in help_of_run.stdout
    assert re.fullmatch(r"paraval (\d+\.\d+.*|\(not installed, .*\))\n", command_line.run("--version").stdout)
