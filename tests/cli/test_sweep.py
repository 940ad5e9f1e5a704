"""What a sweep leaves behind; how it runs and ends is tested through the command in ``test_run.py``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from paraval import Evaluator, HPOJob
from paraval.cli.progress import NoProgress
from paraval.cli.sweep import run_sweep
from paraval.cli.tally import Tally
from paraval.csvlog import CSVLog


def value_of(job: dict[str, Any]) -> float:
    return float(job["x"])


def opened() -> list[str]:
    """What this process has open, by name."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing itself
            names.append(str(entry.readlink()))
    return names


def test_the_output_is_closed_also_if_it_could_not_be_written() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    log = CSVLog("/dev/full", error_column=True)
    assert "/dev/full" in opened()
    evaluator = Evaluator.create(value_of, "thread", method_kwargs={"num_workers": 2, "job_class": HPOJob})
    configs = [{"x": number} for number in range(20)]
    ending = run_sweep(evaluator, configs, log, Tally(len(configs)), NoProgress(), on_signal=lambda: None)
    assert ending.error is not None
    assert "/dev/full" not in opened()
