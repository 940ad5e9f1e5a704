"""Several drivers on one search of one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paraval import Evaluator
from paraval.storage import SqliteStorage
from sharing import function
from support import in_threads

DRIVERS, JOBS = 2, 1_000


def test_two_programs_on_one_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    with SqliteStorage(tmp_path / "shared.db") as storage:
        assert storage.create_new_search() == "0"
    command = [sys.executable, str(Path(__file__).with_name("sharing.py")), url, str(JOBS), str(JOBS * (DRIVERS - 1))]
    programs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(DRIVERS)
    ]
    said: list[dict[str, Any]] = []
    for program in programs:
        out, err = program.communicate(timeout=50)
        assert (program.returncode, err) == (0, "")
        said.append(json.loads(out))
    all_ids = [job_id for one in said for job_id in one["mine"]]
    assert len(set(all_ids)) == len(all_ids) == DRIVERS * JOBS
    for one in said:
        assert set(one["seen"]) == set(all_ids) - set(one["mine"])
        for x, output in one["seen"].values():
            expected = None if x % 10 == 7 else x * 0.5 if x % 10 else False
            assert (output, type(output)) == (expected, type(expected))
    with SqliteStorage(tmp_path / "shared.db") as storage:
        assert sorted(storage.load_all_job_ids("0")) == sorted(all_ids)
        assert {record.status for record in storage.scan("0")[0]} == {2}


def test_two_evaluators_of_one_program(tmp_path: Path) -> None:
    with SqliteStorage(tmp_path / "shared.db") as storage:
        search_id = storage.create_new_search()

        def drive() -> tuple[set[str], set[str]]:
            options = {"num_workers": 2, "storage": storage, "search_id": search_id}
            with Evaluator.create(function, "thread", options) as evaluator:
                seen = []
                for _ in range(20):
                    evaluator.submit([{"x": x} for x in range(20)])
                    evaluator.gather("ALL")
                    seen += evaluator.gather_other_jobs_done()
                mine = {job.id for job in evaluator.jobs}
                while len(seen) < 400:
                    seen += evaluator.gather_other_jobs_done()
            assert len(seen) == 400
            return mine, {job.id for job in seen}

        (first, seen_by_first), (second, seen_by_second) = in_threads(drive, drive)
    assert len(first | second) == 800
    assert (seen_by_first, seen_by_second) == (second, first)
