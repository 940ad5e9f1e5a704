"""Several drivers on one search of one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paraval import Evaluator, JobStatus
from paraval.storage import MemoryStorage, SqliteStorage
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


RESUMED = """
import sys
from paraval import Evaluator, JobStatus

def body(job):
    with open(sys.argv[2], "a") as log:
        log.write(f"{job['x']}\\n")
    return job["x"]

with Evaluator.create(body, "thread", {"storage": sys.argv[1], "search_id": "0", "resume": True}) as evaluator:
    print("made", flush=True)
    sys.stdin.readline()
    xs = [*range(60), *range(0, 60, 5), *range(0, 60, 5)]
    for x in xs:
        evaluator.submit([{"x": x}])
    print(sorted(job.output for job in evaluator.gather("ALL")) == sorted(xs), flush=True)
"""


def test_two_programs_that_resume_at_once_run_each_configuration_once(tmp_path: Path) -> None:
    with SqliteStorage(tmp_path / "shared.db") as storage:
        storage.new_search()
    log = tmp_path / "log"
    command = [sys.executable, "-c", RESUMED, f"sqlite:///{tmp_path}/shared.db", str(log)]
    programs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(DRIVERS)
    ]
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "made\n"  # both have looked at what is there before either submits
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
    for program in programs:
        assert program.communicate(timeout=50) == ("True\n", "")
    expected = sorted([*range(60), *range(0, 60, 5), *range(0, 60, 5)])  # the k-th of one has met the k-th of the other
    assert sorted(map(int, log.read_text().split())) == expected
    with SqliteStorage(tmp_path / "shared.db") as storage:
        done = [record for record in storage.scan("0")[0] if record.status == JobStatus.DONE.value]
    assert sorted(record.out for record in done) == expected


def test_an_odd_job_of_another_does_not_hide_those_beside_it() -> None:
    storage = MemoryStorage()
    search_id = storage.create_new_search()
    options = {"num_workers": 2, "storage": storage, "search_id": search_id}
    with Evaluator.create(function, "thread", options) as one, Evaluator.create(function, "thread", options) as other:
        for args, status in (((1, 2), JobStatus.DONE.value), (({"x": 1},), 7), ((), JobStatus.DONE.value)):
            job_id = storage.create_new_job(search_id)
            storage.store_job_in(job_id, args=args)
            storage.store_job_status(job_id, status)
        other.submit([{"x": 1}, {"x": 2}])
        other.gather("ALL")
        found = one.gather_other_jobs_done()
        assert sorted((job.id, job.args.get("x")) for job in found) == [
            ("0.0", None),  # its arguments are no configuration
            ("0.2", None),
            ("0.3", 1),
            ("0.4", 2),
        ]
        assert one.gather_other_jobs_done() == []
