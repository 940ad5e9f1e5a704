"""`paraval run`: the sweep, its CSV, its summary and its exit codes."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from commandline import CommandLine, wait_until

FUNCTIONS = """
import asyncio, os, pathlib, select, threading, time

def parabola(job, shift=0.0, label=""):
    x = job["x"]
    if x == 13:
        raise ValueError("thirteen\\nbrings bad luck")
    if x == 14:
        return "F_diverged"
    return {"objective": -((x - shift) ** 2), "metadata": {"label": label}}

async def coroutine(job):
    await asyncio.sleep(0)
    return float(job["x"])

def two(job):
    return job["x"], -job["x"] * (job["x"] % 2)

def nap(job):
    if job["x"] >= 2:
        time.sleep(60)
    return float(job["x"])

def stubborn(job):
    if job["x"] >= 2:
        threading.Thread(target=time.sleep, args=(60,)).start()  # no daemon: an ordinary exit would wait for it
        time.sleep(60)
    return float(job["x"])

async def blocking(job):
    if job["x"] >= 2:
        results = pathlib.Path("results.csv")
        while not results.exists() or results.read_bytes().count(b"\\r\\n") < 3:
            await asyncio.sleep(0.01)
        pathlib.Path("blocked").touch()
        time.sleep(60)
    return float(job["x"])

def fails(job):
    raise RuntimeError("always")

def prints(job):
    for number in range(200):
        print(f"from job {job['x']} {number}\\n", end="", flush=True)  # in one piece
    return float(job["x"])

def chatters(job):
    print("." * 1000, flush=True)
    if job["x"] > 1:
        while True:
            if not select.select([], [1], [], 0.3)[1]:  # all pipes are full
                pathlib.Path("full").touch()
            print("." * 1000, flush=True)
    return 1.0

def late(job):
    if job["x"] == 1:
        return {"objective": 1.0, "metadata": {"late": "note"}}
    return 0.0

def dies_once(job):
    print(f"attempt at {job['x']}", flush=True)
    mark = pathlib.Path(f"mark-{job['x']}")
    if not mark.exists():
        mark.touch()
        os._exit(3)
    return float(job["x"])

def asked(job):
    while not job.stopped():
        if job["x"] < 2:
            return float(job["x"])
        time.sleep(0.01)
    return 7.5
"""


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with CommandLine(tmp_path) as command_line:
        command_line.write("functions.py", FUNCTIONS)
        command_line.write("twenty.jsonl", "".join(f'{{"x": {x}, "kernel": "rbf"}}\n' for x in range(20)))
        yield command_line


def test_the_evaluator_takes_arguments_of_its_own(command_line: CommandLine) -> None:
    done = command_line.run(
        *("run", "functions.py:dies_once", "--configs", "-", "--method", "process", "--num-workers", "1"),
        *("--evaluator", "max_attempts=2", "-e", "capture_output=true", "--strict"),
        stdin="x\n1\n2\n",
    )
    assert done.returncode == 0, done.stderr
    assert sorted((row["objective"], row["m:stdout"]) for row in command_line.rows()) == [
        ("1.0", "attempt at 1\n"),
        ("2.0", "attempt at 2\n"),
    ]


def test_a_sweep_leaves_a_csv_and_a_summary(command_line: CommandLine) -> None:
    command_line.write("results.csv", "something older\n")
    done = command_line.run(
        *("run", "functions.py:parabola", "--configs", "twenty.jsonl", "--method", "thread", "--num-workers", "2"),
        *("--set", "shift=7", "--set", "label=a=b", "--job-timeout", "30", "--timeout", "30"),
    )
    assert done.returncode == 0, done.stderr
    rows = {int(row["p:x"]): row for row in command_line.rows()}
    assert sorted(rows) == list(range(20))
    assert list(rows[0])[:5] == ["p:x", "p:kernel", "objective", "job_id", "job_status"]
    assert {"m:timestamp_submit", "m:timestamp_gather", "m:label", "m:error"} <= rows[0].keys()
    assert float(rows[7]["objective"]) == 0.0
    assert rows[7]["m:label"] == "a=b"
    assert rows[13]["objective"] == "F_ValueError"
    assert rows[13]["m:error"] == "ValueError: thirteen brings bad luck"
    assert rows[14]["objective"] == "F_diverged"
    assert (command_line.directory / "results.csv.1").read_text() == "something older\n"

    assert re.search(r"configurations +20\ndone +18\nfailed +2\ncancelled +0\nnot started +0\nwall time ", done.stdout)
    assert re.search(r"method +thread, 2 workers", done.stdout)
    assert re.search(r"F_ValueError +1 +job 0\.13: ValueError: thirteen brings bad luck\n", done.stdout)
    assert re.search(r"F_diverged +1 +job 0\.14", done.stdout)
    best = re.findall(r"^ *(-?\d+) +0\.(\d+) +x=(\d+), kernel=rbf *$", done.stdout, re.MULTILINE)
    assert best[0][2] == "7"
    assert [int(objective) for objective, _, _ in best] == [0, -1, -1, -4, -4]
    assert re.search(
        r"Results: results\.csv \(20 rows; the file that was there is now .*results\.csv\.1\)", done.stdout
    )
    assert done.stderr.splitlines()[-1].startswith("paraval: 20/20 (100 %), best 0, 2 failed, ")
    assert "Traceback" not in done.stderr


def test_stdin_several_objectives_and_the_default_method(command_line: CommandLine) -> None:
    done = command_line.run(
        "run", "functions:two", "--configs", "-", "--output", "out/front.csv", "--quiet", stdin="x\n1\n2\n4\n3\n"
    )
    assert done.returncode == 2
    assert "out" in done.stderr
    done = command_line.run(
        "run", "functions:two", "--configs", "-", "--output", "front.csv", "--quiet", stdin="x\n1\n2\n4\n3\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {row["p:x"]: row["objective_1"] for row in command_line.rows("front.csv")} == {
        "1": "-1.0", "2": "0.0", "3": "-3.0", "4": "0.0",
    }  # fmt: skip
    assert re.search(r"Non-dominated .*: 1 of 4\n.*\n +4 +-?0 +0\.2 +x=4", done.stdout)
    assert re.search(rf"method +process, {len(os.sched_getaffinity(0))} worker", done.stdout)

    # What came out can go in again.
    again = command_line.run("run", "functions.py:coroutine", "--configs", "front.csv", "--output", "again.csv")
    assert again.returncode == 0
    assert re.search("method +serial, ", again.stdout)
    assert sorted(row["objective"] for row in command_line.rows("again.csv")) == ["1.0", "2.0", "3.0", "4.0"]


@pytest.mark.parametrize(("function", "args"), [("parabola", ["--strict"]), ("fails", [])])
def test_exit_1(command_line: CommandLine, function: str, args: list[str]) -> None:
    done = command_line.run("run", f"functions.py:{function}", "--configs", "twenty.jsonl", "-m", "thread", *args)
    assert done.returncode == 1
    assert len(command_line.rows()) == 20
    if function == "fails":
        assert re.search(r"F_RuntimeError +20 +job 0\.\d+: RuntimeError: always", done.stdout)


def test_the_timeout_of_the_sweep_ends_it(command_line: CommandLine) -> None:
    process = command_line.start(
        "run", "functions.py:stubborn", "--configs", "twenty.jsonl", "-m", "thread", "-n", "2", "--timeout", "0.5"
    )
    stdout, _ = process.communicate(timeout=20)  # far less than the sleep of the functions
    assert process.returncode == 0
    assert re.search(r"done +2\nfailed +0\ncancelled +2\nnot started +16\n", stdout)
    assert "--timeout 0.5 ran out" in stdout
    assert sorted(row["objective"] for row in command_line.rows()) == ["0.0", "1.0", "F_timeout", "F_timeout"]


def test_the_timeout_of_a_job_is_its_failure(command_line: CommandLine) -> None:
    command_line.write("four.csv", "x\n0\n1\n2\n3\n")
    done = command_line.run(
        "run", "functions.py:nap", "--configs", "four.csv", "-m", "thread", "-n", "4", "--job-timeout", "0.3"
    )
    assert done.returncode == 0
    assert re.search(r"done +2\nfailed +2\ncancelled +0\nnot started +0\n", done.stdout)
    assert re.search(r"F_timeout +2 ", done.stdout)


@pytest.mark.parametrize(
    ("function", "number", "code"),
    [
        ("nap", signal.SIGINT, 130),
        ("stubborn", signal.SIGTERM, 143),
        ("blocking", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_the_sweep_and_loses_nothing(
    command_line: CommandLine, function: str, number: signal.Signals, code: int
) -> None:
    process = command_line.start("run", f"functions.py:{function}", "--configs", "twenty.jsonl", "-n", "2")
    command_line.wait_for_rows(2, process)
    if function == "blocking":
        wait_until((command_line.directory / "blocked").exists)
    sent = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == code, stderr
    assert time.monotonic() - sent < 3.0
    assert "Traceback" not in stderr
    assert re.search(r"configurations +20\ndone +2\nfailed +0\n", stdout)
    assert re.search(f"ended early +{'Ctrl-C' if number is signal.SIGINT else 'SIGTERM'}\n", stdout)
    rows = {row["p:x"]: row["objective"] for row in command_line.rows()}
    assert rows.pop("0") == "0.0"
    assert rows.pop("1") == "1.0"
    if function != "blocking":  # what blocks the loop cannot be cancelled, and its end is never known
        assert re.search(r"cancelled +2\nnot started +16\n", stdout)
        # Two were running: the third job, and one after it. (A job may have been taken with another, and given back.)
        assert "2" in rows
        assert list(rows.values()) == ["F_cancelled"] * 2


def test_a_second_signal_ends_it_at_once(command_line: CommandLine) -> None:
    process = command_line.start("run", "functions.py:blocking", "--configs", "twenty.jsonl", "-n", "2")
    wait_until((command_line.directory / "blocked").exists)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "once more ends it" not in (line := process.stderr.readline()):
        assert line, "it ended without a word"
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "configurations" not in stdout
    assert len(command_line.rows()) == 2


def test_a_full_disk_stops_the_sweep_and_says_so(command_line: CommandLine) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = command_line.run("run", "functions.py:nap", "--configs", "twenty.jsonl", "-n", "2", "-o", "/dev/full")
    assert done.returncode == 1
    assert re.search("^paraval: error: cannot write /dev/full: No space left on device", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert "done" in done.stdout


def test_a_reader_who_leaves_early_does_no_harm(command_line: CommandLine) -> None:
    process = command_line.start("run", "functions.py:coroutine", "--configs", "twenty.jsonl")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in stderr
    assert "BrokenPipe" not in stderr
    assert len(command_line.rows()) == 20


@pytest.mark.parametrize("method", ["thread", "process"])
@pytest.mark.parametrize("shared", [False, True])
def test_jobs_that_print_for_a_reader_who_left_early(command_line: CommandLine, method: str, shared: bool) -> None:
    options = {"stderr": subprocess.STDOUT} if shared else {}
    process = command_line.start("run", "functions.py:prints", "-c", "twenty.jsonl", "-m", method, "-n", "2", **options)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=20)
    assert first.startswith("from job ")
    assert process.returncode == 0, stderr
    assert "Error" not in (stderr or "")
    assert sorted(float(row["objective"]) for row in command_line.rows()) == list(range(20))


@pytest.mark.parametrize(("output", "shared"), [("results.csv", True), ("results.csv", False), ("-", True)])
def test_ctrl_c_while_the_reader_of_the_output_takes_nothing(
    command_line: CommandLine, output: str, shared: bool
) -> None:
    temporary = command_line.directory / "temporary"
    temporary.mkdir()
    command_line.extra = {"TMPDIR": str(temporary)}
    process = command_line.start(
        *("run", "functions.py:chatters", "-c", "twenty.jsonl", "-m", "process", "-n", "1", "-o", output),
        **({"stderr": subprocess.STDOUT} if shared else {}),
    )
    wait_until((command_line.directory / "full").exists)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)  # without reading
    assert process.returncode == 130
    assert time.monotonic() - sent < 3.5
    results = command_line.directory / output if output != "-" else next(temporary.glob("*/results.csv"))
    assert len(command_line.rows(str(results))) >= 1


def test_what_jobs_print_arrives_before_the_summary(command_line: CommandLine) -> None:
    done = command_line.run("run", "functions.py:prints", "--configs", "twenty.jsonl", "-m", "process", "-n", "2")
    printed, _, summary = done.stdout.partition("Sweep\n")
    expected = {f"from job {x} {number}" for x in range(20) for number in range(200)}
    assert sorted(printed.splitlines()) == sorted(expected)
    assert "Results: results.csv (20 rows)" in summary


@pytest.mark.parametrize("output", ["-", "/dev/stdout"])
def test_results_on_stdout_and_nothing_else_there(command_line: CommandLine, output: str) -> None:
    temporary = command_line.directory / "temporary"
    temporary.mkdir()
    command_line.extra = {"TMPDIR": str(temporary)}
    done = command_line.run("run", "functions.py:prints", "-c", "twenty.jsonl", "-o", output, "-n", "2")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout, newline="")))
    assert sorted(float(row["objective"]) for row in rows) == list(range(20))
    assert "from job 3 7\n" in done.stderr
    assert "Results: stdout (20 rows)\n" in done.stderr
    assert not list(temporary.iterdir())
    assert not (command_line.directory / "results.csv").exists()


def test_results_that_stdout_does_not_take_are_kept(command_line: CommandLine) -> None:
    temporary = command_line.directory / "temporary"
    temporary.mkdir()
    command_line.extra = {"TMPDIR": str(temporary)}
    process = command_line.start("run", "functions.py:coroutine", "--configs", "twenty.jsonl", "--output", "-")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    (folder,) = temporary.iterdir()
    assert f"Results: {folder}/results.csv, as stdout did not take all of them: its reader left (20 rows)\n" in stderr
    assert len(command_line.rows(str(folder / "results.csv"))) == 20


def test_a_summary_that_cannot_be_written_is_one_line(command_line: CommandLine) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        process = command_line.start("run", "functions.py:coroutine", "--configs", "twenty.jsonl", stdout=full)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == (
        "paraval: error: the summary could not be written: No space left on device; the results are in results.csv"
    )
    assert len(command_line.rows()) == 20


def test_a_column_that_comes_late_is_kept(command_line: CommandLine) -> None:
    done = command_line.run("run", "functions.py:late", "-c", "twenty.jsonl", "-m", "thread", "-n", "1")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert [row["m:late"] for row in command_line.rows()] == ["", "note", *[""] * 18]


def test_what_a_stopped_job_returned_is_kept(command_line: CommandLine) -> None:
    process = command_line.start("run", "functions.py:asked", "-c", "twenty.jsonl", "-m", "thread", "-n", "2")
    command_line.wait_for_rows(2, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "left out" not in stderr
    stopped = [row for row in command_line.rows() if row["job_status"] == "CANCELLED"]
    assert [row["m:returned"] for row in stopped] == ["7.5"] * len(stopped)
    assert stopped


WAITING = """
import pathlib, time
pathlib.Path("importing").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("where", ["import", "stdin"])
def test_ctrl_c_before_the_first_job_says_so(command_line: CommandLine, where: str) -> None:
    command_line.write("waiting.py", WAITING)
    configs, target = ("twenty.jsonl", "waiting.py:run") if where == "import" else ("-", "functions.py:nap")
    process = command_line.start("run", target, "--configs", configs, stdin=subprocess.PIPE)
    if where == "import":
        wait_until((command_line.directory / "importing").exists)
    else:
        wait_until(lambda: is_reading(process.pid))
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout, stderr) == (130, "", "paraval: interrupted before the first job was started\n")
    assert not (command_line.directory / "results.csv").exists()


def is_reading(pid: int) -> bool:
    """Whether a process waits in a read of its standard input."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[:2] == ["0", "0x0"]


def test_a_long_sweep_of_short_jobs(command_line: CommandLine) -> None:
    command_line.write("many.csv", "x\n" + "".join(f"{x}\n" for x in range(20_000)))
    done = command_line.run("run", "functions.py:coroutine", "--configs", "many.csv", "-q")
    assert done.returncode == 0
    assert sorted(int(row["p:x"]) for row in command_line.rows()) == list(range(20_000))
