"""`paraval jobs`, `paraval searches` and `paraval export`."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from commandline import CommandLine
from paraval.cli.app import run_command_line
from paraval.cli.export import in_format
from paraval.outcome import JobError
from paraval.storage import JobRecord, SqliteStorage

SECRET = "hunter2"  # noqa: S105 - it opens nothing
HOT = JobError(
    "exception", "too\nhot", type="ValueError", traceback="…", history=(JobError("worker_died", "", signal=9),)
)
TIMES: dict[str, Any] = {"timestamp_submit": 0.5, "timestamp_gather": 2.0}


def tuned() -> list[JobRecord]:
    """Give the jobs of an optimisation."""
    return [
        JobRecord(status=2, args=({"x": 1, "name": "é"},), out=0.0, metadata={**TIMES, "epochs": 3}, function="train"),
        JobRecord(status=2, args=({"x": 2, "name": "b"},), out="F_ValueError", error=HOT, metadata=TIMES),
        JobRecord(status=2, args=({"x": 3, "name": "c"},), out=0.75, metadata={**TIMES, "_hidden": 1, "late": True}),
        JobRecord(status=4, args=({"x": 4, "name": "d"},), out="F_timeout", error=JobError("timeout", "late")),
        JobRecord(status=2, args=({"x": 5, "name": "e"},), out="F_oom"),
        JobRecord(status=1, args=({"x": 6, "name": "f"},)),
        JobRecord(args=({"x": 7, "name": "g"},)),
    ]


def plain() -> list[JobRecord]:
    """Give jobs of any kind, two of them stored by hand."""
    return [
        JobRecord(status=2, args=({"x": 1},), out={"a": [1, b"x"], "b": math.nan}, function="simulate"),
        JobRecord(status=2, args=(1, 2), kwargs={"k": 3}, out="text", extra={"mine": 1}),
        JobRecord(),
    ]


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with SqliteStorage(tmp_path / "campaign.db") as storage:
        for records in (tuned(), plain()):
            storage.insert(storage.new_search(), records)
    with CommandLine(tmp_path) as command_line:
        yield command_line


def table(text: str) -> list[list[str]]:
    """Give the cells of the lines of a table without frames."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_searches(command_line: CommandLine) -> None:
    done = command_line.run("searches", "campaign.db")
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows[1] == ["search", "jobs", "waiting", "running", "done", "failed", "cancelled", "best", "run-function"]
    assert rows[2] == ["0", "7", "1", "1", "2", "2", "1", "0.75 (job 0.2)", "train"]
    assert rows[3] == ["1", "3", "1", "0", "2", "0", "0", "simulate"]


def test_jobs(command_line: CommandLine) -> None:
    done = command_line.run("jobs", f"sqlite:///{command_line.directory}/campaign.db", "--search", "0")
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows[1] == ["job", "status", "objective", "reason", "parameters", "submitted", "took"]
    assert rows[2] == ["0.0", "DONE", "0", "x=1, name=é", "0.50 s", "1.5 s"]
    assert rows[3] == ["0.1", "DONE", "F_ValueError", "ValueError: too hot", "x=2, name=b", "0.50 s", "1.5 s"]
    assert rows[5] == ["0.3", "CANCELLED", "F_timeout", "timeout: late", "x=4, name=d"]
    assert rows[8] == ["0.6", "READY", "x=7, name=g"]


def test_jobs_can_be_chosen(command_line: CommandLine) -> None:
    done = command_line.run(
        "jobs", "campaign.db", "--status", "failed", "--status", "READY", "--search", "0", "--limit", "2"
    )
    assert [row[0] for row in table(done.stdout)[2:4]] == ["0.4", "0.6"]
    assert done.stdout.endswith("the newest 2 of 3; --limit 0 shows all\n")
    done = command_line.run("jobs", "campaign.db", "--limit", "0")
    assert [row[0] for row in table(done.stdout)[2:12]] == [*(f"0.{n}" for n in range(7)), "1.0", "1.1", "1.2"]
    assert "{'a': [1, b'x'], 'b': nan}" in done.stdout
    assert "1, 2, k=3" in done.stdout


# -- export ------------------------------------------------------------------------------------------------------------


def test_csv(command_line: CommandLine) -> None:
    done = command_line.run("export", "campaign.db", "--search", "0")
    assert (done.returncode, done.stderr) == (0, "")
    rows = list(csv.DictReader(io.StringIO(done.stdout, newline="")))
    expected = ["p:x", "p:name", "objective", "job_id", "job_status"]
    metadata = ["m:timestamp_submit", "m:timestamp_gather", "m:epochs", "m:late", "m:error"]
    assert list(rows[0]) == [*expected, *metadata], "the columns of an evaluator's CSV, all there are"
    assert [row["objective"] for row in rows] == ["0.0", "F_ValueError", "0.75", "F_timeout", "F_oom", "", ""]
    assert [row["job_id"] for row in rows] == list("0123456")
    assert (rows[0]["p:name"], rows[1]["m:error"], rows[2]["m:late"]) == ("é", "ValueError: too hot", "True")


def test_json_lines_in_a_file(command_line: CommandLine) -> None:
    command_line.write("out.jsonl", "it was there before\n")
    done = command_line.run("export", "campaign.db", "--search", "1", "--output", "out.jsonl")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("paraval: the file that was there is now ")
    assert (command_line.directory / "out.jsonl.1").read_text(encoding="utf-8") == "it was there before\n"
    lines = (command_line.directory / "out.jsonl").read_text(encoding="utf-8").splitlines()
    first, second, third = map(json.loads, lines)
    assert (first["job_id"], first["job_status"], first["parameters"]) == ("1.0", "DONE", {"x": 1})
    assert (first["output"], first["function"]) == ({"a": [1, "eA=="], "b": None}, "simulate")
    assert (second["args"], second["kwargs"], second["mine"]) == ([1, 2], {"k": 3}, 1)
    assert (third["job_status"], third["error"]) == ("READY", None)


def test_parquet(command_line: CommandLine) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs the extra 'parquet'")
    import pyarrow.parquet as pq

    done = command_line.run("export", "campaign.db", "--search", "0", "--output", "out.parquet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = pq.read_table(command_line.directory / "out.parquet")
    assert found.schema.field("p:x").type == "int64"
    assert found.schema.field("objective").type == "double"
    columns = found.to_pydict()
    assert columns["objective"] == [0.0, None, 0.75, None, None, None, None]
    assert columns["failure"] == [None, "F_ValueError", None, "F_timeout", "F_oom", None, None]
    assert columns["m:late"] == [None, None, True, None, None, None, None]


def test_without_pyarrow_the_extra_is_named(command_line: CommandLine) -> None:
    script = "import sys; sys.modules['pyarrow'] = None; from paraval.cli import main; sys.exit(main())"
    arguments = ["export", "campaign.db", "--search", "0", "--format", "parquet", "--output", "out.parquet"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        cwd=command_line.directory,
        env=command_line.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "paraval: error: Parquet needs pyarrow: pip install 'paraval[parquet]'\n"
    assert not (command_line.directory / "out.parquet").exists()


def read_csv(records: list[JobRecord]) -> list[dict[str, str]]:
    for number, record in enumerate(records):
        record.id = f"0.{number}"
    return list(csv.DictReader(io.StringIO(in_format(records, "csv").decode(), newline="")))


def test_several_objectives_have_a_column_each() -> None:
    rows = read_csv([JobRecord(out="F_oom"), JobRecord(out=(1.0, "F_x")), JobRecord(out=[2, 3]), JobRecord()])
    assert [row["objective_0"] for row in rows] == ["F_oom", "1.0", "2", ""]
    assert [row["objective_1"] for row in rows] == ["F_oom", "F_x", "3", ""]
    assert "objective" not in rows[0]


def test_jobs_of_any_kind_have_outputs() -> None:
    rows = read_csv(plain())
    columns = ["job_id", "job_status", "p:x", "p:0", "p:1", "p:k", "o:a", "o:b", "o:", "m:error"]
    assert list(rows[0]) == columns
    assert (rows[0]["o:a"], rows[0]["o:b"], rows[1]["o:"], rows[1]["p:1"]) == ("[1, b'x']", "nan", "text", "2")


def test_jobs_come_in_the_order_of_their_numbers() -> None:
    records = [JobRecord(f"0.{number}", out=number) for number in (10, 9, 100, 0)]
    exported = json.loads(in_format(records, "json"))
    assert [job["output"] for job in exported] == [0, 9, 10, 100]
    assert json.loads(in_format([], "json")) == []
    assert in_format([], "jsonl") == b""


def test_what_json_has_no_word_for() -> None:
    value = {1: math.inf, "big": 2**100, "bytes": b"\xff", "deep": [(1, {None: b""})], "odd": "\udc80"}
    record = JobRecord("0.0", out=value, error=HOT)
    exported = json.loads(in_format([record], "json"))[0]
    expected = {"1": None, "big": 2**100, "bytes": "/w==", "deep": [[1, {"None": ""}]], "odd": "\\udc80"}
    assert exported["output"] == expected
    assert exported["error"]["history"][0]["kind"] == "worker_died"


def test_parquet_takes_columns_of_any_kind() -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs the extra 'parquet'")
    import pyarrow.parquet as pq

    values = [1, 2.5, "text", 2**100, b"x", None, "\udc80"]
    records = [
        JobRecord(
            f"0.{number}", args=({"mixed": value, "big": 10**30 + number, "number": [1, 0.5][number % 2]},), out={}
        )
        for number, value in enumerate(values)
    ]
    columns = pq.read_table(io.BytesIO(in_format(records, "parquet"))).to_pydict()
    assert columns["p:mixed"] == ["1", "2.5", "text", str(2**100), "b'x'", None, "\\udc80"]
    assert columns["p:big"][0] == str(10**30)
    assert columns["p:number"][:2] == [1.0, 0.5]
    assert columns["m:error"] == [None] * 7
    numbers = [JobRecord("0.0", out=10**400), JobRecord("0.1", out=-(10**400)), JobRecord("0.2", out=True)]
    columns = pq.read_table(io.BytesIO(in_format(numbers, "parquet"))).to_pydict()
    assert columns["objective"] == [math.inf, -math.inf, 1.0]


def test_what_is_stored_under_names_of_ours_is_exported_under_another() -> None:
    metadata = {"error": "theirs", "error_": "also theirs"}
    extra = {"job_id": "hijack", "parameters": 1, "extra": 2, "mine": 3}
    record = JobRecord("0.0", args=({"x": 1},), out=1, error=HOT, metadata=metadata, extra=extra)
    (row,) = read_csv([record])
    assert (row["m:error"], row["m:error_"], row["m:error__"]) == ("ValueError: too hot", "also theirs", "theirs")
    (job,) = json.loads(in_format([record], "json"))
    assert (job["job_id"], job["parameters"], job["mine"], job["metadata"]) == ("0.0", {"x": 1}, 3, metadata)
    assert job["extra"] == {"job_id": "hijack", "parameters": 1, "extra": 2}


def test_an_int_of_very_many_digits_is_shown(command_line: CommandLine, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/huge.db"
    with SqliteStorage(tmp_path / "huge.db") as storage:
        record = JobRecord(args=({"x": 2**20_000},), status=2, out={"y": -(2**20_000)})
        storage.insert(storage.new_search(), [record])
    for command in ("jobs", "searches"):
        assert command_line.run(command, store).returncode == 0
    exported = command_line.run("export", store, "--format", "jsonl")
    assert exported.returncode == 0
    assert json.loads(exported.stdout)["parameters"] == {"x": hex(2**20_000)}


def test_of_several_searches_the_only_one_with_jobs_is_exported(command_line: CommandLine) -> None:
    with SqliteStorage(command_line.directory / "one.db") as storage:
        searches = [storage.new_search() for _ in range(3)]
        storage.insert(searches[1], plain())
    done = command_line.run("export", "one.db", "--format", "jsonl")
    assert done.returncode == 0
    assert [json.loads(line)["job_id"] for line in done.stdout.splitlines()] == ["1.0", "1.1", "1.2"]


# -- output ------------------------------------------------------------------------------------------------------------


needs_dev_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="there is no /dev/full, a device that is always full"
)


@needs_dev_full
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_full_disk_under_the_output_is_one_line(command_line: CommandLine, form: str) -> None:
    done = command_line.run("export", "campaign.db", "--search", "0", "--format", form, "--output", "/dev/full")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "paraval: error: cannot write /dev/full: No space left on device\n"


@needs_dev_full
@pytest.mark.parametrize(
    "args", [["jobs", "campaign.db"], ["searches", "campaign.db"], ["export", "campaign.db", "--search", "0"], ["-h"]]
)
def test_a_full_disk_under_stdout_is_one_line(command_line: CommandLine, args: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        process = command_line.start(*args, stdout=full)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (1, "paraval: error: stdout cannot be written: No space left on device\n")


def test_what_a_terminal_would_obey_is_shown_as_its_escape(command_line: CommandLine) -> None:
    parameters = {"\x1b[31mred": 1, "two\nlines": "\x07", "\u202eturned": 2}
    error = JobError("exception", "\x1b]0;title\x07", type="Type\x1bError")
    with SqliteStorage(command_line.directory / "odd.db") as storage:
        storage.insert(
            storage.new_search(),
            [JobRecord(status=2, args=(parameters,), out="F_\x9b", error=error, function="\x1b[1mf")],
        )
    for command, lines in (("jobs", 4), ("searches", 4)):
        done = command_line.run(command, "odd.db")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("\n") == lines
        assert all(line.isprintable() for line in done.stdout.splitlines())
        expected = r"\x1b[31mred=1, two\nlines='\x07', \u202eturned=2" if command == "jobs" else r"\x1b[1mf"
        assert expected in done.stdout


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["jobs", "missing.db"], "no such file: missing.db"),
        (["searches", "sqlite:///missing.db"], "no such file: missing.db"),
        (["export", "sqlite:////no/such/place/missing.db"], "no such file: /no/such/place/missing.db"),
        (["jobs", "empty.db"], "empty.db is empty"),
        (["jobs", "text.db"], "text.db"),
        (["jobs", "."], "is a directory"),
        (["jobs", "x" * 300], "no such file"),
        (["jobs", "memory:"], "ends with the program"),
        (["jobs", "sqlite:campaign.db"], "three slashes"),
        (["searches", f"nope://user:{SECRET}@host"], "unknown storage scheme 'nope:'; the schemes are: memory:"),
        (["searches", f"{SECRET}@host:1"], "no URL"),
        (["jobs", "campaign.db", "--search", "7"], "no search '7'"),
        (["jobs", "campaign.db", "--status", "dead"], "'failed'"),
        (["jobs", "campaign.db", "--limit", "-1"], "--limit"),
        (["jobs"], "STORAGE"),
        (["export", "campaign.db"], "2 searches (0, 1): choose one with --search"),
        (["export", "campaign.db", "--search", "0", "--output", "campaign.db"], "the storage itself"),
        (["export", "campaign.db", "--search", "0", "--output", "link.csv"], "the storage itself"),
        (["export", "campaign.db", "--search", "0", "--output", "campaign.db-wal"], "the storage itself"),
        (["export", "campaign.db", "--search", "0", "--output", "no/such/place.csv"], "no/such"),
        (["export", "campaign.db", "--search", "0", "--output", "."], "directory"),
        (["export", "campaign.db", "--search", "0", "--format", "xml"], "'parquet'"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_it_is_one_line_and_exit_2(
    command_line: CommandLine,
    args: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command_line.write("empty.db", "")
    command_line.write("text.db", "this is no database\n" * 100)
    (command_line.directory / "link.csv").symlink_to("campaign.db")
    before = {path: path.read_bytes() for path in command_line.directory.iterdir()}
    monkeypatch.chdir(command_line.directory)
    monkeypatch.setattr(sys, "argv", ["paraval", *args])
    assert run_command_line() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("paraval: error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert SECRET not in err
    after = {path: path.read_bytes() for path in command_line.directory.iterdir() if path.suffix != ".db-journal"}
    assert after == {path: data for path, data in before.items() if path in after}
    assert after.keys() >= before.keys() - {path for path in before if path.suffix == ".db-journal"}


def test_a_storage_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("redis", reason="redis is not installed (extra 'redis')")
    monkeypatch.setattr(sys, "argv", ["paraval", "jobs", f"redis://user:{SECRET}@127.0.0.1:1/0"])
    assert run_command_line() == 2
    err = capsys.readouterr().err
    assert "127.0.0.1:1" in err
    assert err.count("\n") == 1
    assert SECRET not in err
