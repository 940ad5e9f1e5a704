"""Running the command line as the user does: as a process of its own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import paraval

DEADLINE_S = 20.0
"""How long anything may take on a busy machine."""


class CommandLine:
    """The command ``paraval`` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.extra: dict[str, str] = {}  # environment variables
        self._started: list[subprocess.Popen[str]] = []

    def write(self, name: str, text: str) -> Path:
        """Make a file in the directory."""
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        return path

    def run(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return subprocess.run(
            self._command(args),
            cwd=self.directory,
            env=self.environment(),
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=DEADLINE_S,
            check=False,
        )

    def start(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        """Start it; it is killed at the end of the test if it still runs."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        process = subprocess.Popen(
            self._command(args), cwd=self.directory, env=self.environment(), encoding="utf-8", **options
        )
        self._started.append(process)
        return process

    def rows(self, name: str = "results.csv") -> list[dict[str, str]]:
        """Read the rows of a results file; a file that is not there has none."""
        path = self.directory / name
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def wait_for_rows(self, count: int, process: subprocess.Popen[str]) -> None:
        """Wait until so many rows are on disk."""
        wait_until(lambda: len(self.rows()) >= count or process.poll() is not None)
        assert process.poll() is None, process.stderr.read() if process.stderr else "it ended"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    @staticmethod
    def _command(args: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-W", "error", "-m", "paraval", *args]

    def environment(self) -> dict[str, str]:
        source = str(Path(paraval.__file__).resolve().parents[1])  # it may be on this process's path by a relative name
        hidden = {"FORCE_COLOR", "COLUMNS", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONPATH"}
        kept = {key: value for key, value in os.environ.items() if key not in hidden}
        return {**kept, "PYTHONPATH": source, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **self.extra}


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
