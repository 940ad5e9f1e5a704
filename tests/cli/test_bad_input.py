"""Bad input: one clear line on stderr and exit code 2, before the first job runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from commandline import CommandLine

FUNCTIONS = """
import pathlib
CONSTANT = 3
def run(job, needed=None):
    pathlib.Path("it_ran").touch()
    return 1.0
"""

RUN = ["run", "functions.py:run", "--configs", "good.csv"]


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with CommandLine(tmp_path) as command_line:
        command_line.write("functions.py", FUNCTIONS)
        command_line.write("raises.py", "import paraval\n1 / 0\n")
        command_line.write("good.csv", "x\n1\n2\n")
        (tmp_path / "link.csv").symlink_to("good.csv")
        command_line.write("bad.jsonl", '{"x": 1}\n{"x": 2\n{"x": 3}\n')
        command_line.write("empty.csv", "")
        yield command_line


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["run", "missing.py:run", "--configs", "good.csv"], "no such file: missing.py"),
        (["run", "functions.py:rum", "--configs", "good.csv"], "no 'rum' in functions (did you mean run?)"),
        (["run", "functions.py:CONSTANT", "--configs", "good.csv"], "is not callable: it is of type int"),
        (
            ["run", "raises.py:run", "--configs", "good.csv"],
            "raised ZeroDivisionError: division by zero (raises.py, line 2)",
        ),
        (["run", "functions.py:run", "--configs", "missing.csv"], "no such file: missing.csv"),
        (["run", "functions.py:run", "--configs", "bad.jsonl"], "bad.jsonl, line 2: not valid JSON"),
        (["run", "functions.py:run", "--configs", "empty.csv"], "empty.csv is empty"),
        (["run", "functions.py:run", "--configs", "-"], "<stdin> is empty"),
        ([*RUN, "--method", "thraed"], "thread"),
        ([*RUN, "--method", "serial"], "thread"),
        ([*RUN, "--output", "no/such/place/results.csv"], "no/such/place"),
        ([*RUN, "--output", "."], "directory"),
        ([*RUN, "--output", "good.csv"], "--output good.csv is the file of --configs"),
        ([*RUN, "--output", "link.csv"], "--output link.csv is the file of --configs"),
        ([*RUN, "--output", "functions.py"], "--output functions.py is the file of TARGET"),
        ([*RUN, "--storage", "sqlite:///new.db", "-o", "./new.db"], "--output ./new.db is the file of --storage"),
        ([*RUN, "--method", "executor"], "it needs the argument 'executor'"),
        ([*RUN, "--resume"], "--resume needs --storage URL"),
        ([*RUN, "--search", "0"], "--search needs --storage URL"),
        ([*RUN, "--storage", "campaign.db"], "a SQLite file is 'sqlite:///campaign.db'"),
        ([*RUN, "--storage", "memory:", "--search", "nine"], "nine"),
        ([*RUN, "--set", "needed"], "'needed' must be KEY=VALUE"),
        ([*RUN, "--set", "unknown=1"], "unexpected keyword argument 'unknown'"),
        ([*RUN, "--evaluator", "max_attempts"], "'max_attempts' must be KEY=VALUE"),
        ([*RUN, "-e", "max_attempts=none"], "max_attempts must be a positive int, not 'none'"),
        ([*RUN, "-e", "unknown=1"], "has no argument 'unknown': it takes "),
        ([*RUN, "-e", "max_atempts=2"], "has no argument 'max_atempts': did you mean 'max_attempts'?"),
        ([*RUN, "-e", "num_workers=2"], "there is an option for it, --num-workers"),
        ([*RUN, "-e", "job_class=Job"], "only a program can choose"),
        ([*RUN, "--num-workers", "0"], "--num-workers"),
        ([*RUN, "--timeout", "nan"], "'nan' must be a positive number of seconds"),
        ([*RUN, "--job-timeout", "soon"], "'soon' is not a number of seconds"),
        ([*RUN, "--configurations", "x"], "No such option"),
        (["run", "functions.py:run"], "--configs"),
        (["rum"], "No such command 'rum'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_is_one_line_and_exit_2(command_line: CommandLine, args: list[str], complaint: str) -> None:
    done = command_line.run(*args)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("paraval: error: ")
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert not (command_line.directory / "it_ran").exists()
    assert not (command_line.directory / "results.csv").exists()
    assert not (command_line.directory / "new.db").exists()
    assert (command_line.directory / "good.csv").read_text() == "x\n1\n2\n"


def test_an_output_that_is_the_file_on_stdin(command_line: CommandLine) -> None:
    with (command_line.directory / "good.csv").open() as file:
        process = command_line.start("run", "functions.py:run", "--configs", "-", "--output", "good.csv", stdin=file)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert stderr.startswith("paraval: error: --output good.csv is the file of --configs")
    assert not (command_line.directory / "good.csv.1").exists()


def test_an_output_that_is_the_file_of_stdout(command_line: CommandLine) -> None:
    with (command_line.directory / "both.csv").open("w") as file:
        process = command_line.start(*RUN, "--output", "both.csv", stdout=file)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert stderr.startswith("paraval: error: --output both.csv is the file of stdout")
    assert not (command_line.directory / "both.csv.1").exists()


def test_a_pipe_that_nobody_reads(command_line: CommandLine) -> None:
    os.mkfifo(command_line.directory / "pipe")
    done = command_line.run(*RUN, "--output", "pipe")
    assert done.returncode == 2
    assert done.stderr.endswith("/pipe: nobody reads this pipe; start its reader first\n")
    assert not (command_line.directory / "it_ran").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(command_line: CommandLine) -> None:
    sealed = command_line.directory / "sealed"
    sealed.mkdir(mode=0o500)
    done = command_line.run(*RUN, "--output", "sealed/results.csv")
    assert done.returncode == 2
    assert "sealed" in done.stderr
    assert done.stderr.count("\n") == 1
