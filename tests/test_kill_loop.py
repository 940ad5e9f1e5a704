"""A driver is killed at random moments and goes on: nothing that it acknowledged is lost, nothing is there twice.

``PARAVAL_KILLS`` says how often (``nox -s kills``: 3,000 times).
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from killed import CONFIGURATIONS
from paraval import JobStatus
from paraval.storage import SqliteStorage
from support import until

KILLS = int(os.environ.get("PARAVAL_KILLS", "200"))
METHODS = {"serial": 0.4, "thread": 0.4, "process": 0.2}
"""The share of each method in the kills."""


class Drivers:
    """Makes drivers, and kills them."""

    def __init__(self) -> None:
        self._program = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, method: str, url: str, history: Path) -> int:
        stdin, stdout = self._program.stdin, self._program.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{method} {url} {history}\n")
        stdin.flush()
        return int(stdout.readline())

    def close(self) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.close()
        self._program.stdout.close()
        assert self._program.wait(30) == 0


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    made = Drivers()
    yield made
    made.close()


class Campaign:
    """One database file, the history of what was acknowledged of it, and what must hold of both."""

    def __init__(self, folder: Path, number: int) -> None:
        self.database = folder / f"{number}.db"
        self.history = folder / f"{number}.txt"
        self.url = f"sqlite:///{self.database}"
        with SqliteStorage(str(self.database)) as storage:
            assert storage.create_new_search() == "0"

    def check(self) -> bool:
        """Compare; tell whether a driver has come to the end."""
        if not self.history.exists():
            return False
        # A line that was cut by the kill, which may be at the end of a page of the file, is none.
        lines = [
            line.removesuffix(" .") for line in self.history.read_text().split("\n") if line.endswith((" .", "end"))
        ]
        acknowledged: dict[str, str] = {}
        for line in lines:
            if line != "end":
                job_id, rest = line.split(" ", 1)
                assert acknowledged.setdefault(job_id, rest) == rest, "what was acknowledged has changed"
        with SqliteStorage(str(self.database)) as storage:
            records = {record.id: record for record in storage.scan("0")[0]}
        for job_id, rest in acknowledged.items():
            record = records[job_id]
            assert record.status == JobStatus.DONE.value
            assert record.args is not None
            result = record.out or (record.error and record.error.message)
            assert f"{record.args[0]['x']} {result}" == rest, "what was acknowledged is not what is stored"
        configurations = Counter(record.args[0]["x"] for record in records.values() if record.args)
        assert set(configurations.values()) <= {1}, "a configuration has two records"
        assert len(records) <= CONFIGURATIONS
        if "end" in lines:
            assert len(acknowledged) == CONFIGURATIONS
        return "end" in lines

    def check_integrity(self) -> None:
        connection = sqlite3.connect(self.database)
        try:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        finally:
            connection.close()


@pytest.mark.timeout(60 + KILLS)
@pytest.mark.parametrize("method", METHODS)
def test_a_driver_is_killed_again_and_again(drivers: Drivers, tmp_path: Path, method: str) -> None:
    dice = random.Random(f"{method} {KILLS}")
    kills, ends = 0, 0
    campaign = Campaign(tmp_path, 0)
    wanted = round(KILLS * METHODS[method])
    longest = 0.25 if method == "process" else 0.12
    while kills < wanted or not ends:
        pid = drivers.start(method, campaign.url, campaign.history)
        if kills < wanted:
            time.sleep(dice.uniform(0, longest))  # the moment of the kill: the test is about any
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        until(lambda pid=pid: is_gone(pid))  # type: ignore[misc] # mypy does not see the default
        if campaign.check():
            ends += 1
            campaign.check_integrity()
            campaign = Campaign(tmp_path, ends)
    campaign.check_integrity()
