from __future__ import annotations

import csv
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraval.csvlog import MOST_LATE_COLUMNS, CSVError, CSVLog, CSVPathError, check_writable
from paraval.errors import ParavalError
from paraval.job import HPOJob, Job
from paraval.outcome import JobError, Outcome, is_failure

J = TypeVar("J", bound=Job)
RAISED = JobError("exception", "bad\nvalue", type="ValueError")


def settled(job: J, result: Any) -> J:
    """End a job with a result, or with a failure when the result is a JobError."""
    job.settle(Outcome(error=result) if isinstance(result, JobError) else Outcome(result))
    return job


def hpo(number: int, result: Any, args: dict[str, Any] | None = None) -> HPOJob:
    return settled(HPOJob(f"0.{number}", {"x": number} if args is None else args), result)


def plain(number: int, result: Any, args: dict[str, Any] | None = None) -> Job:
    return settled(Job(f"0.{number}", {"x": number} if args is None else args), result)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


# -- columns -----------------------------------------------------------------------------------------------------------


def test_one_objective(path: Path) -> None:
    log = CSVLog(path)
    log.write([hpo(7, {"objective": 0.1 + 0.2, "metadata": {"epochs": 3, "_hidden": 1}}, {"x": 1.5, "units": [8, 4]})])
    assert header(path) == ["p:x", "p:units", "objective", "job_id", "job_status", "m:epochs"]
    assert read(path) == [
        {
            "p:x": "1.5",
            "p:units": "[8, 4]",
            "objective": "0.30000000000000004",
            "job_id": "7",
            "job_status": "DONE",
            "m:epochs": "3",
        }
    ]


def test_several_objectives_and_a_failure_among_them(path: Path) -> None:
    log = CSVLog(path)
    log.write([hpo(0, (1.0, 2.0)), hpo(1, "F_oom"), hpo(2, ("F", 3.0))])
    assert header(path) == ["p:x", "objective_0", "objective_1", "job_id", "job_status"]
    assert [(row["objective_0"], row["objective_1"]) for row in read(path)] == [
        ("1.0", "2.0"),
        ("F_oom", "F_oom"),
        ("F", "3.0"),
    ]


def test_plain_jobs_with_a_dict_and_with_a_scalar(tmp_path: Path) -> None:
    log = CSVLog(tmp_path / "dict.csv")
    job = plain(0, {"loss": 0.5, "name": "a"})
    job.metadata.update(host="here", _hidden=1)
    log.write([job, plain(1, RAISED)])
    assert header(tmp_path / "dict.csv") == ["job_id", "job_status", "p:x", "o:loss", "o:name", "m:host"]
    assert [row["o:loss"] for row in read(tmp_path / "dict.csv")] == ["0.5", ""]

    CSVLog(tmp_path / "scalar.csv").write([plain(0, 42)])
    assert header(tmp_path / "scalar.csv") == ["job_id", "job_status", "p:x", "o:"]
    assert read(tmp_path / "scalar.csv")[0]["o:"] == "42"


def test_a_cancelled_job_says_so(path: Path) -> None:
    job = HPOJob("0.0", {"x": 1})
    job.settle(Outcome(error=JobError("timeout", "over 1 s"), cancelled=True))
    CSVLog(path).write([job])
    assert read(path) == [{"p:x": "1", "objective": "F_timeout", "job_id": "0", "job_status": "CANCELLED"}]


def test_metadata_named_error_is_beside_the_error_column(path: Path) -> None:
    log = CSVLog(path, error_column=True)
    failed = hpo(1, RAISED)
    failed.metadata.update(error="theirs", error_="also theirs", n=1)
    log.write([hpo(0, {"objective": 1.0, "metadata": {"error": 0.1, "error_": 1, "n": 2}}), failed, hpo(2, 1.0)])
    shown = [(row["m:error"], row["m:error_"], row["m:error__"], row["m:n"]) for row in read(path)]
    assert shown == [("", "1", "0.1", "2"), ("ValueError: bad value", "also theirs", "theirs", "1"), ("", "", "", "")]


def test_without_the_error_column_metadata_named_error_has_its_name(path: Path) -> None:
    CSVLog(path).write([hpo(0, {"objective": 1.0, "metadata": {"error": 0.1}})])
    assert read(path)[0]["m:error"] == "0.1"


def test_the_error_column_is_one_line(path: Path) -> None:
    log = CSVLog(path, error_column=True)
    log.write([hpo(0, RAISED), hpo(1, "F_oom"), hpo(2, {"objective": 1.0, "metadata": {"n": 1}})])
    assert header(path)[-2:] == ["m:n", "m:error"]
    assert [row["m:error"] for row in read(path)] == ["ValueError: bad value", "", ""]


def test_columns_freeze_at_the_first_success_and_the_log_names_what_is_left_out(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CSVLog(path)
    log.write([hpo(0, 1.0)])
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            log.write([hpo(number, {"objective": 2.0, "metadata": {"late": 1}})])
    assert header(path) == ["p:x", "objective", "job_id", "job_status"]
    assert len(read(path)) == 3
    assert ["'m:late'" in record.getMessage() for record in caplog.records] == [True]


def test_late_columns_come_at_the_end_and_nothing_is_lost(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = 'quoted "twice",\r\nand\rbroken\n'
    log = CSVLog(path, late_columns=True)
    log.write([hpo(0, {"objective": "F_early", "metadata": {"early": odd}})])
    log.write([hpo(1, {"objective": 1.0, "metadata": {"n": odd}}, {"x": odd})])
    columns = ["p:x", "objective", "job_id", "job_status", "m:n", "m:early"]
    assert header(path) == columns
    before = path.read_bytes()
    log.write([hpo(2, {"objective": 2.0, "metadata": {"n": 2, "late, too": odd, "empty": None}})])
    log.write([hpo(3, (3.0, 4.0)), hpo(4, {"objective": 5.0, "metadata": {"last": 5}})])
    assert header(path) == [*columns, "m:late, too", "m:last"]
    rows = read(path)
    assert [row["job_id"] for row in rows] == list("01234")
    assert [row["m:early"] for row in rows] == [odd, "", "", "", ""]
    assert [row["m:n"] for row in rows] == ["", odd, "2", "", ""]
    assert [row["m:late, too"] for row in rows] == ["", "", odd, "", ""]
    assert [row["m:last"] for row in rows] == ["", "", "", "", "5"]
    assert [row["objective"] for row in rows] == ["F_early", "1.0", "2.0", "(3.0, 4.0)", "5.0"]
    assert path.read_bytes().count(b"\r\n") == before.count(b"\r\n") + 3 + 1  # one more within a cell
    assert not caplog.records
    assert [file.name for file in path.parent.iterdir()] == ["results.csv"]


def test_more_objectives_than_before_are_late_columns(path: Path) -> None:
    log = CSVLog(path, late_columns=True)
    log.write([hpo(0, (1.0, 2.0))])
    log.write([hpo(1, (1.0, 2.0, 3.0)), hpo(2, "F_x")])
    assert header(path)[-1] == "objective_2"
    assert [row["objective_2"] for row in read(path)] == ["", "3.0", "F_x"]


def test_late_columns_have_an_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = CSVLog(path, late_columns=True)
    log.write([hpo(0, 1.0)])
    for number in range(1, MOST_LATE_COLUMNS + 3):
        log.write([hpo(number, {"objective": 1.0, "metadata": {f"only_{number}": number}})])
    rows = read(path)
    assert len(rows) == MOST_LATE_COLUMNS + 3
    assert all(rows[number][f"m:only_{number}"] == str(number) for number in range(1, MOST_LATE_COLUMNS + 1))
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        f"'m:only_{MOST_LATE_COLUMNS + late}' is left out: the columns are those of the first successful job, "
        f"and {MOST_LATE_COLUMNS} late ones"
        for late in (1, 2)
    ]


def test_several_objectives_where_one_was_expected_are_not_said_to_be_left_out(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CSVLog(path)
    log.write([hpo(0, 1.0), hpo(1, (2.0, 3.0))])
    assert [row["objective"] for row in read(path)] == ["1.0", "(2.0, 3.0)"]
    assert not caplog.records


def test_parameters_known_beforehand_have_a_column(path: Path) -> None:
    log = CSVLog(path, parameters=["x", "y"])
    log.write([hpo(0, 1.0), hpo(1, 2.0, {"x": 1, "y": 5})])
    assert header(path)[:2] == ["p:x", "p:y"]
    assert [row["p:y"] for row in read(path)] == ["", "5"]


def test_saved_keys(tmp_path: Path) -> None:
    job = hpo(0, 1.0, {"x": 1, "units": [1, 2], "z": 3})
    names = tmp_path / "names.csv"
    CSVLog(names, saved_keys=["units", "x"], convert=lambda value: f"<{value}>").write([job])
    assert header(names) == ["p:units", "p:x", "objective", "job_id", "job_status"]
    assert read(names)[0]["p:units"] == "<[1, 2]>"

    function = tmp_path / "function.csv"
    CSVLog(function, saved_keys=lambda job: {"twice": 2 * job.args["x"]}).write([job])
    assert header(function) == ["p:twice", "objective", "job_id", "job_status"]
    assert read(function)[0]["p:twice"] == "2"


def test_a_missing_saved_key_is_named_and_writes_nothing(path: Path) -> None:
    log = CSVLog(path, saved_keys=["x"])
    with pytest.raises(KeyError, match=r"^job 0\.1 has no argument 'x'.*\['y'\]$") as caught:
        log.write([hpo(0, 1.0), hpo(1, 1.0, {"y": 2})])
    assert isinstance(caught.value, ParavalError)
    assert not path.exists()
    log.write([hpo(2, 1.0)])
    assert [row["job_id"] for row in read(path)] == ["2"]


def test_wrong_saved_keys_are_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="saved_keys must be None, a list of names or a callable, not 'x'"):
        CSVLog(path, saved_keys="x")
    with pytest.raises(TypeError, match="must return a dict, not list"):
        CSVLog(path, saved_keys=lambda job: [1]).write([hpo(0, 1.0)])  # type: ignore[arg-type,return-value] # on purpose


# -- early failures ----------------------------------------------------------------------------------------------------


def test_early_failures_are_on_disk_at_once_and_stay(path: Path) -> None:
    log = CSVLog(path)
    log.write([hpo(0, "F_a")])
    log.write([hpo(1, RAISED)])
    assert [row["objective"] for row in read(path)] == ["F_a", "F_ValueError"]
    log.write([hpo(2, {"objective": 3.0, "metadata": {"n": 1}})])
    log.write([hpo(3, "F_b")])
    assert header(path) == ["p:x", "objective", "job_id", "job_status", "m:n"]
    assert [row["job_id"] for row in read(path)] == ["0", "1", "2", "3"]
    assert [row["objective"] for row in read(path)] == ["F_a", "F_ValueError", "3.0", "F_b"]


def test_failures_before_several_objectives(path: Path) -> None:
    log = CSVLog(path)
    log.write([hpo(0, "F_a")])
    assert header(path) == ["p:x", "objective", "job_id", "job_status"]
    log.write([hpo(1, ("F_b", 1.0))])
    assert header(path) == ["p:x", "objective_0", "objective_1", "job_id", "job_status"]
    log.write([hpo(2, (1.0, 2.0))])
    assert [(row["objective_0"], row["objective_1"]) for row in read(path)] == [
        ("F_a", "F_a"),
        ("F_b", "1.0"),
        ("1.0", "2.0"),
    ]


def test_before_the_first_success_no_argument_is_left_out(path: Path) -> None:
    log = CSVLog(path)
    log.write([hpo(0, "F", {"x": 1})])
    log.write([hpo(1, "F", {"y": 2})])
    assert [(row["p:x"], row["p:y"]) for row in read(path)] == [("1", ""), ("", "2")]


def test_an_early_row_is_written_as_it_was(path: Path) -> None:
    units = [1]
    log = CSVLog(path)
    log.write([hpo(0, "F", {"units": units})])
    units.append(2)
    log.write([hpo(1, {"objective": 1.0, "metadata": {"n": 1}}, {"units": units})])
    assert [row["p:units"] for row in read(path)] == ["[1]", "[1, 2]"]


# -- values ------------------------------------------------------------------------------------------------------------


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two\nlines", "two\nlines"),
        ("carriage\rreturn", "carriage\rreturn"),
        ('a,"quoted",b', 'a,"quoted",b'),
        ("größe ≤ 1 ∧ 🚀", "größe ≤ 1 ∧ 🚀"),
        ("\udcff undecodable", "\\udcff undecodable"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (1e-300, "1e-300"),
        (None, ""),
        (True, "True"),
        ({"a": [1]}, "{'a': [1]}"),
        pytest.param(10**5000, "<int without a text>", id="huge"),
        (Unprintable(), "<Unprintable without a text>"),
    ],
)
def test_values(path: Path, value: object, text: str) -> None:
    log = CSVLog(path)
    log.write([hpo(0, {"objective": 1.0, "metadata": {"value": value}}, {"value": value})])
    log.write([plain(1, None, {"value": value})])
    assert [row["p:value"] for row in read(path)] == [text, text]
    assert read(path)[0]["m:value"] == text


numbers = st.floats(allow_nan=True, allow_infinity=True)
texts = st.dictionaries(st.text(), st.text(), max_size=3)
results = st.one_of(
    numbers,
    st.tuples(numbers, numbers),
    st.sampled_from(["F", "F_oom", ("F", 1.0), (1.0, "F_x"), RAISED, JobError("timeout", "late"), None]),
    st.builds(lambda value, metadata: {"objective": value, "metadata": metadata}, numbers, texts),
)
values = st.one_of(st.text(), numbers, st.none(), st.lists(st.integers()))
arguments = st.dictionaries(st.text(max_size=3), values, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(results, arguments), max_size=4), max_size=6))
def test_whatever_the_jobs_return_late_columns_keep_all_of_it(
    batches: list[list[tuple[Any, dict[str, Any]]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.csv")
        log = CSVLog(path, late_columns=True)
        jobs: list[HPOJob] = []
        for batch in batches:
            new = [hpo(len(jobs) + number, result, args) for number, (result, args) in enumerate(batch)]
            jobs += new
            log.write(new)
            rows = read(path) if jobs else []
            assert [row["job_id"] for row in rows] == [job.id.removeprefix("0.") for job in jobs]
            for job, row in zip(jobs, rows, strict=True):
                cells = {f"p:{key}": value for key, value in job.args.items()}
                cells |= {f"m:{key}": value for key, value in job.metadata.items() if not key.startswith("_")}
                for name, value in cells.items():
                    assert row.get(name, "") == ("" if value is None else str(value))
                objective = job.objective
                shown = [cell for name, cell in row.items() if name.startswith("objective") and cell]
                if isinstance(objective, tuple):
                    assert shown in (list(map(str, objective)), [f"({', '.join(map(str, objective))})"])
                else:
                    assert set(shown) == {str(objective)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(results, arguments), max_size=4), max_size=6))
def test_whatever_the_jobs_return_all_rows_are_there(batches: list[list[tuple[Any, dict[str, Any]]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.csv")
        log = CSVLog(path)
        jobs: list[HPOJob] = []
        for batch in batches:
            new = [hpo(len(jobs) + number, result, args) for number, (result, args) in enumerate(batch)]
            jobs += new
            log.write(new)
            if jobs:
                assert_complete(path, jobs)
        assert [file.name for file in Path(folder).iterdir()] == (["results.csv"] if jobs else [])


def assert_complete(path: Path, jobs: list[HPOJob]) -> None:
    """Compare the file with a model that knows all jobs at once."""
    success = next((job for job in jobs if job.error is None and not is_failure(job.objective)), None)
    shape = success or next((job for job in jobs if isinstance(job.objective, tuple)), jobs[0])
    several = isinstance(shape.objective, tuple)
    columns = {"job_id", "job_status"} | ({"objective_0", "objective_1"} if several else {"objective"})
    for job in [success] if success else jobs:
        columns |= {f"p:{key}" for key in job.args} | {f"m:{key}" for key in job.metadata if not key.startswith("_")}
    assert set(header(path)) == columns
    assert len(header(path)) == len(columns)

    rows = read(path)
    assert [row["job_id"] for row in rows] == [job.id.removeprefix("0.") for job in jobs]
    for job, row in zip(jobs, rows, strict=True):
        objective: Any = job.objective
        if isinstance(objective, tuple):
            both = list(map(str, objective))
            expected = both if several else [f"({', '.join(both)})"]  # no room for two
        else:
            expected = [str(objective)] * (1 + several)
        assert [cell for name, cell in row.items() if name.startswith("objective")] == expected
        for key, value in job.args.items():
            if f"p:{key}" in columns:
                assert row[f"p:{key}"] == ("" if value is None else str(value))


# -- where it is written -----------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text("old")
    path.with_name("results.csv.1").write_text("older")
    log = CSVLog(path)
    before = log.kept_as
    assert before is None
    assert path.read_text() == "old"  # until there is a row
    with caplog.at_level(logging.INFO):
        log.write([hpo(0, "F")])
        log.write([hpo(1, {"objective": 1.0, "metadata": {"n": 1}})])  # replaces the file: its own is not kept
    assert log.kept_as == f"{path}.2"
    assert path.with_name("results.csv.2").read_text() == "old"
    assert path.with_name("results.csv.1").read_text() == "older"
    assert len(read(path)) == 2
    assert [record.getMessage() for record in caplog.records] == [f"{path} existed; it is kept as {path}.2"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["results.csv", "results.csv.1", "results.csv.2"]


def test_the_file_has_the_usual_permissions(path: Path) -> None:
    plain_file = path.with_name("plain")
    plain_file.touch()
    CSVLog(path).write([hpo(0, 1.0)])
    assert path.stat().st_mode == plain_file.stat().st_mode


def test_a_symbolic_link_stays_one(path: Path) -> None:
    target = path.with_name("target.csv")
    path.symlink_to(target)
    CSVLog(path).write([hpo(0, 1.0)])
    assert path.is_symlink()
    assert len(read(target)) == 1


def test_a_relative_path_is_meant_from_where_the_log_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = CSVLog()
    monkeypatch.chdir("/")
    log.write([hpo(0, 1.0)])
    assert log.path == str(tmp_path / "results.csv")
    assert len(read(tmp_path / "results.csv")) == 1


def test_a_file_moved_away_or_replaced_by_others_begins_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = CSVLog(path)
    log.write([hpo(0, 1.0)])
    path.rename(path.with_name("mine.csv"))
    log.write([hpo(1, 1.0)])
    assert "was moved or removed while it was written" in caplog.text
    assert [row["job_id"] for row in read(path)] == ["1"]

    other = path.with_name("other")
    other.write_text("not a CSV file of ours")
    other.replace(path)
    log.write([hpo(2, 1.0)])
    assert [row["job_id"] for row in read(path)] == ["2"]
    assert log.kept_as is not None
    assert Path(log.kept_as).read_text() == "not a CSV file of ours"


def test_it_can_be_written_after_close(path: Path) -> None:
    log = CSVLog(path)
    log.write([hpo(0, 1.0)])
    log.close()
    log.close()
    log.write([hpo(1, 2.0)])
    assert len(read(path)) == 2
    assert log.kept_as is None


def test_several_threads_write_whole_rows(path: Path) -> None:
    log = CSVLog(path)

    def write(first: int) -> None:
        for number in range(first, first + 20):
            log.write([hpo(number, 1.0)])

    threads = [threading.Thread(target=write, args=(first,)) for first in range(0, 80, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(row["job_id"]) for row in read(path)) == list(range(80))


BAD_PATHS = {
    "missing/results.csv": "the directory .*missing does not exist; create it first",
    "folder": "it is a directory; give the path of a file, as .*folder/results.csv",
    "": "it is a directory",
    "file/results.csv": "Not a directory",
    "null\0.csv": "null",
    "x" * 300: "File name too long",
    "/proc/results.csv": "no file can be made in the directory /proc",
}


@pytest.mark.parametrize("name", BAD_PATHS)
def test_a_path_that_cannot_be_written_is_refused_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CSVPathError, match=f"^cannot write .*{BAD_PATHS[name]}") as caught:
        check_writable(name)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ParavalError)
    with pytest.raises(CSVPathError):
        CSVLog(name)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("permission bits do not bind this user (root)")
        with pytest.raises(CSVPathError, match=r"no file can be made in the directory .*: Permission denied"):
            check_writable(tmp_path / "results.csv")
    finally:
        tmp_path.chmod(0o700)


def test_a_writable_path_is_left_as_it_was(path: Path) -> None:
    check_writable(path)
    assert not list(path.parent.iterdir())


# -- devices -----------------------------------------------------------------------------------------------------------

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@needs_dev_full
def test_a_full_device_is_an_error_that_says_so() -> None:
    log = CSVLog("/dev/full")
    for jobs in ([hpo(0, 1.0)], []):
        with pytest.raises(CSVError, match=r"^cannot write /dev/full: No space left on device; 1 row"):
            log.write(jobs)
    with pytest.raises(CSVError):
        log.close()


def test_a_pipe_gets_the_header_once_and_early_failures_with_the_first_success(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    log = CSVLog(pipe)
    log.write([hpo(0, "F")])
    log.write([hpo(1, {"objective": 1.0, "metadata": {"n": 1}})])
    log.write([hpo(2, 2.0)])
    log.close()
    reader.join(30)
    assert received[0].splitlines() == [
        "p:x,objective,job_id,job_status,m:n",
        "0,F,0,DONE,",
        "1,1.0,1,DONE,1",
        "2,2.0,2,DONE,",
    ]


def test_a_pipe_that_nobody_reads_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paraval.csvfile.PATIENCE", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    with pytest.raises(CSVPathError, match=r"^cannot write .*/pipe: nobody reads this pipe; start its reader first$"):
        CSVLog(pipe)


def test_a_reader_that_takes_nothing_holds_nothing_up_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paraval.csvfile.PATIENCE", 0.1)
    monkeypatch.setattr("paraval.csvlog.PATIENCE", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = CSVLog(pipe)
    for number in range(300):
        log.write([hpo(number, 1.0, {"text": "x" * 1000})])
    with pytest.raises(CSVError, match=r"its reader took nothing for 0\.1 s; \d+ row\(s\) are kept"):
        log.close()
    os.set_blocking(reader, True)
    received: list[str] = []

    def read_all() -> None:
        with os.fdopen(reader, encoding="utf-8", newline="") as file:
            received.append(file.read())

    thread = threading.Thread(target=read_all, daemon=True)
    keeper = os.open(pipe, os.O_WRONLY)  # the reader must not meet the end before the log has come back
    thread.start()
    log.close()
    os.close(keeper)
    thread.join(30)
    rows = list(csv.DictReader(received[0].splitlines()))
    assert [int(row["job_id"]) for row in rows] == list(range(300))


def test_a_pipe_gets_failures_at_the_end_when_there_is_nothing_else(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    log = CSVLog(pipe)
    log.write([hpo(0, "F")])
    log.close()
    reader.join(30)
    assert received[0].splitlines() == ["p:x,objective,job_id,job_status", "0,F,0,DONE"]


# -- when writing fails or the process dies ----------------------------------------------------------------------------

JOBS = """
import os, resource, sys
from paraval.csvlog import CSVError, CSVLog
from paraval.job import HPOJob
from paraval.outcome import Outcome

def job(number, result):
    job = HPOJob(f"0.{number}", {"x": "some text, " * 3 + str(number)})
    job.settle(Outcome(result))
    return job
"""


def run_python(code: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    source = str(Path(sys.modules["paraval.csvlog"].__file__ or "").parents[1])
    environment = os.environ | {"PYTHONPATH": source}
    command = [sys.executable, "-c", JOBS + textwrap.dedent(code), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.parametrize("room", [0, 37, 50, 137, 200])
def test_a_disk_that_fills_up_leaves_whole_rows_and_loses_none(path: Path, room: int) -> None:
    # A limit on the size of a file acts like a full disk: a write that crosses it is short, the next one fails.
    child = run_python(
        """
        path, room = sys.argv[1], int(sys.argv[2])
        log = CSVLog(path)
        log.write([job(0, "F")])
        size = os.path.getsize(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
        saved = 1
        for number in range(1, 6):
            result = {"objective": 1.0, "metadata": {"n": 1} if number > 2 else {}}
            try:
                log.write([job(number, result)])
            except CSVError as exc:
                assert "File too large" in str(exc), exc
                assert exc.errno
            else:
                saved = number + 1
            content = open(path, newline="").read()
            assert content.endswith("\\r\\n"), content
            assert content.count("\\n") == 1 + saved, (content, saved)
        assert saved < 6
        assert os.listdir(os.path.dirname(path)) == ["results.csv"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.close()
        """,
        str(path),
        str(room),
    )
    child.communicate()
    assert child.returncode == 0
    assert [row["job_id"] for row in read(path)] == list("012345")


@pytest.mark.parametrize("first", ["'F'", "1.0"])
def test_a_file_that_cannot_be_replaced_stays_as_it_was(path: Path, first: str) -> None:
    child = run_python(
        """
        path = sys.argv[1]
        log = CSVLog(path, late_columns=True)
        log.write([job(0, eval(sys.argv[2]))])
        before = open(path, newline="").read()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, resource.RLIM_INFINITY))
        try:
            log.write([job(1, {"objective": 1.0, "metadata": {"n": 1}})])  # brings a column
        except CSVError:
            pass
        else:
            raise AssertionError("it was written beyond the limit")
        assert open(path, newline="").read() == before
        assert os.listdir(os.path.dirname(path)) == ["results.csv"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.write([job(2, 2.0)])
        """,
        str(path),
        first,
    )
    child.communicate()
    assert child.returncode == 0
    assert [row["m:n"] for row in read(path)] == ["", "1", ""]


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_a_random_moment(path: Path, seed: int) -> None:
    child = run_python(
        """
        log = CSVLog(sys.argv[1])
        for number in range(100_000):
            log.write([job(number, "F" if number < 5 else {"objective": 1.0, "metadata": {"n": number}})])
            print(number, flush=True)
        """,
        str(path),
    )
    assert child.stdout is not None
    dice = random.Random(seed)
    acknowledged = [int(child.stdout.readline()) for _ in range(1 + seed if seed < 5 else 200)]
    for _ in range(dice.randrange(5_000)):  # somewhere within the next writes
        pass
    os.kill(child.pid, signal.SIGKILL)
    acknowledged += map(int, child.communicate()[0].split())
    assert child.returncode == -signal.SIGKILL

    content = path.read_bytes()
    assert content.endswith(b"\r\n")
    columns = ["p:x", "objective", "job_id", "job_status"]
    assert header(path) in (columns, [*columns, "m:n"])
    written = [int(row["job_id"]) for row in read(path)]
    assert written == list(range(len(written)))
    assert len(acknowledged) <= len(written) <= len(acknowledged) + 1
    assert all(row["job_status"] == "DONE" for row in read(path))
    leftovers = [file.name for file in path.parent.iterdir() if file != path]
    assert all(name.startswith(".results.csv.") for name in leftovers)
