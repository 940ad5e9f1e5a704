"""Progress: one live line on a terminal, few plain lines elsewhere, and never at the cost of a result."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from commandline import DEADLINE_S, CommandLine
from paraval.cli.progress import PlainLines, duration, progress_line
from paraval.cli.tally import Tally
from paraval.job import HPOJob
from paraval.outcome import Outcome

SLOW = """
import pathlib, sys, time
def run(job):
    if job["x"] == 2:
        while not pathlib.Path("go_on").exists():
            time.sleep(0.01)
    if job["x"] == 1:
        raise ValueError("no such thing")
    print(f"seen {job['x']}")
    return float(job["x"])
"""


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with CommandLine(tmp_path) as command_line:
        yield command_line


def tally_of(total: int, *outputs: object) -> Tally:
    tally = Tally(total)
    for number, output in enumerate(outputs):
        job = HPOJob(f"0.{number}", {})
        job.settle(Outcome(output))
        tally.add(job)
    return tally


def test_the_line_says_it_all() -> None:
    tally = tally_of(8, 1.5, "F_x", 2.25, 0.5)
    tally._begin -= 8.0  # it began eight seconds ago: half a job a second
    assert progress_line(tally, None) == "4/8 (50 %), best 2.25, 1 failed, 30/min, 8.0 s left"
    assert progress_line(tally, 3.0).endswith(", 3.0 s left")
    assert progress_line(tally, 100.0).endswith(", 8.0 s left")
    assert progress_line(tally, 100.0, last=True).endswith(", 30/min, 8.0 s taken")
    tally.stopping = True
    assert progress_line(tally, 100.0).endswith(", 30/min, stopping")
    assert progress_line(Tally(8), None) == "0/8 (0 %), 0 failed"
    assert progress_line(Tally(8), 75.0) == "0/8 (0 %), 0 failed, 1:15 min left"
    assert "2 non-dominated" in progress_line(tally_of(8, (1.0, 2.0), (2.0, 1.0), (0.0, 0.0)), None)


def test_durations_are_for_people() -> None:
    shown = {0.123: "0.12 s", 1: "1.0 s", 59.97: "1:00 min", 61.2: "1:01 min", 3599.8: "1:00:00 h", 90061: "25:01:01 h"}
    assert {seconds: duration(seconds) for seconds in shown} == shown


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainLines()
    tally = tally_of(8, 1.0, 2.0)
    for _ in range(1000):
        progress.update(tally, None)
    assert capsys.readouterr().err == ""
    progress._written -= 6.0  # six seconds have passed
    progress.update(tally, None)
    progress.update(tally, None)
    assert capsys.readouterr().err.count("\n") == 1
    progress.finish(tally, None)
    assert capsys.readouterr().err.startswith("paraval: 2/8 (25 %), best 2")


def test_a_stderr_that_went_away_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", broken)
    progress = PlainLines()
    progress.finish(tally_of(8, 1.0), None)
    progress.say("still here")
    progress.finish(tally_of(8, 1.0), None)
    with contextlib.suppress(BrokenPipeError):  # what could not be written is flushed once more
        broken.close()


def test_a_terminal_gets_one_live_line(command_line: CommandLine) -> None:
    command_line.write("slow.py", SLOW)
    command_line.write("configs.jsonl", "".join(f'{{"x": {x}}}\n' for x in range(3)))
    terminal, its_end = pty.openpty()
    process = command_line.start(
        "run", "slow.py:run", "--configs", "configs.jsonl", "--method", "thread", "-n", "2", stderr=its_end
    )
    os.close(its_end)
    screen = read_until(terminal, r"2/3 \(66 %\), best 0, 1 failed, .*left")
    assert "\x1b[?25l" in screen  # the cursor is hidden
    command_line.write("go_on", "")
    screen += read_until(terminal, r"3/3 \(100 %\), best 2, 1 failed, [^,]*, [^,]* s taken\r\n\x1b\[\?25h")  # and shown
    stdout, _ = process.communicate(timeout=20)
    os.close(terminal)
    assert process.returncode == 0
    assert screen.count("\x1b[2K") >= 2  # the line is drawn over itself
    assert re.search(r"configurations +3\n", stdout)  # no frame and no colour where there is no terminal
    assert "seen 0\n" in stdout
    assert "\x1b" not in stdout


def test_everything_on_one_terminal(command_line: CommandLine) -> None:
    command_line.write("slow.py", SLOW)
    command_line.write("configs.jsonl", '{"x": 3}\n{"x": 1}\n')
    terminal, its_end = pty.openpty()
    process = command_line.start(
        "run", "slow.py:run", "--configs", "configs.jsonl", "--method", "thread", stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    screen = read_until(terminal, r"Results: .*results\.csv \(2 rows\)")
    process.wait(timeout=20)
    os.close(terminal)
    assert process.returncode == 0
    assert "seen 3\r\n" in screen  # what a run-function prints has a line of its own
    assert "╭" in screen
    assert "F_ValueError" in screen


def read_until(terminal: int, pattern: str) -> str:
    """Read from a terminal until the pattern was seen."""
    screen = ""
    while not re.search(pattern, screen, re.DOTALL):
        readable, _, _ = select.select([terminal], [], [], DEADLINE_S)
        assert readable, f"nothing more came, and {pattern!r} was not seen: {screen!r}"
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            chunk = b""
        assert chunk, f"the end came before {pattern!r}: {screen!r}"
        screen += chunk.decode()
    return screen
