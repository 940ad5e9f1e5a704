"""`paraval run --storage … --resume`: what is in the storage is not run again."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("click", reason="the command line needs the extra 'cli'")
pytest.importorskip("rich", reason="the command line needs the extra 'cli'")

from commandline import CommandLine, wait_until
from paraval.storage import SqliteStorage
from paraval.storage.urls import without_secrets

FUNCTIONS = """
import pathlib, time
def run(job):
    with open("ran.txt", "a") as file:
        file.write(f"{job['x']}\\n")
    if job["x"] >= 5 and not pathlib.Path("go_on").exists():
        time.sleep(60)
    if job["x"] == 3:
        raise ValueError("three")
    return float(job["x"])
"""
ENTRY_POINTS = """[paraval.storages]
failing = failing:FailingStorage
closed = failing:open_closed
broken = failing:BrokenStorage
refused = failing:refuse
"""
FAILING = """
from paraval.errors import StorageError
from paraval.storage import MemoryStorage
class FailingStorage(MemoryStorage):
    def __init__(self, url):
        super().__init__()
        self.url = url
    def insert(self, search_id, records):
        raise StorageError(f"the disk of {self.url} is on fire")
class BrokenStorage(MemoryStorage):
    def __init__(self, url):
        super().__init__()
        self.url = url
        self.new_search()
    def scan(self, search_id, since=None):
        raise RuntimeError(f"no answer from {self.url}\\nat all")
def refuse(url):
    raise StorageError(f"the storage {url} cannot be had: {url.rpartition(':')[2]} is wrong")
def open_closed(url):
    raise ConnectionError(f"{url} is closed to {url.rpartition(':')[2]}")
"""


@pytest.fixture
def command_line(tmp_path: Path) -> Iterator[CommandLine]:
    with CommandLine(tmp_path) as command_line:
        command_line.write("functions.py", FUNCTIONS)
        command_line.write("configs.csv", "x\n" + "".join(f"{x}\n" for x in range(8)))
        yield command_line


RUN = ["run", "functions.py:run", "--configs", "configs.csv", "--num-workers", "2", "--storage", "sqlite:///c.db"]


def ran(command_line: CommandLine) -> list[int]:
    """Say which configurations were run since the last call, in their order."""
    path = command_line.directory / "ran.txt"
    lines = path.read_text(encoding="utf-8").split() if path.exists() else []
    path.unlink(missing_ok=True)
    return sorted(map(int, lines))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_goes_on_where_it_was_stopped(command_line: CommandLine, end: signal.Signals) -> None:
    process = command_line.start(*RUN, "--resume", "--job-timeout", "50")
    command_line.wait_for_rows(5, process)
    wait_until(lambda: len((command_line.directory / "ran.txt").read_text().split()) >= 7)
    process.send_signal(end)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == (130 if end is signal.SIGINT else -9)
    assert "there is nothing to resume in sqlite:///c.db yet: a search begins there\n" in stderr
    assert ran(command_line) == [0, 1, 2, 3, 4, 5, 6]

    command_line.write("go_on", "")
    done = command_line.run(*RUN, "--resume", "--output", "resumed.csv")
    assert done.returncode == 0, done.stderr
    assert "nothing to resume" not in done.stderr
    assert ran(command_line) == [5, 6, 7]
    assert re.search(r"done +7\nfailed +1\ncancelled +0\nnot started +0\n", done.stdout)
    assert re.search(r"storage +sqlite:///c\.db, search 0\nrestored from it +5\n", done.stdout)
    rows = command_line.rows("resumed.csv")
    assert sorted((row["p:x"], row["objective"], row["job_id"]) for row in rows) == [
        (str(x), "F_ValueError" if x == 3 else f"{x}.0", str(x)) for x in range(8)
    ]

    # Once more: everything is there. A configuration that is new is run.
    with (command_line.directory / "configs.csv").open("a") as file:
        file.write("8\n")
    done = command_line.run(*RUN, "--resume", "--search", "0", "--output", "again.csv")
    assert ran(command_line) == [8]
    assert re.search(r"restored from it +8\n", done.stdout)
    assert len(command_line.rows("again.csv")) == 9


def test_without_resume_a_search_is_not_touched(command_line: CommandLine) -> None:
    command_line.write("go_on", "")
    for search in ("0", "1"):
        done = command_line.run(*RUN)
        assert done.returncode == 0, done.stderr
        assert f"sqlite:///c.db, search {search}\n" in done.stdout
        assert ran(command_line) == list(range(8))
    done = command_line.run(*RUN, "--resume")
    assert done.returncode == 2
    assert done.stderr == (
        "paraval: error: the storage holds 2 searches (0, 1): name the one to go on with by --search ID\n"
    )
    done = command_line.run(*RUN, "--resume", "--search", "1")
    assert ran(command_line) == []
    assert "search 1\n" in done.stdout
    done = command_line.run(*RUN, "--search", "7")
    assert done.returncode == 2
    assert "'7'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_sweeps_that_begin_at_the_same_moment_share_one_search(command_line: CommandLine) -> None:
    command_line.write("go_on", "")
    sweeps = [command_line.start(*RUN, "--resume", "--quiet", "--output", f"{number}.csv") for number in range(3)]
    for sweep in sweeps:
        stdout, stderr = sweep.communicate(timeout=30)
        assert sweep.returncode == 0, stderr
        assert "sqlite:///c.db, search 0\n" in stdout
    assert ran(command_line) == list(range(8))
    for number in range(3):
        assert sorted(int(row["p:x"]) for row in command_line.rows(f"{number}.csv")) == list(range(8))
    command_line.run(*RUN, "--resume", "--quiet")  # no --search is needed
    assert ran(command_line) == []


def test_searches_without_jobs_are_nothing_to_go_on_with(command_line: CommandLine) -> None:
    command_line.write("go_on", "")
    with SqliteStorage(command_line.directory / "c.db") as storage:
        assert [storage.new_search() for _ in range(3)] == ["0", "1", "2"]
    done = command_line.run(*RUN, "--resume", "--quiet")
    assert "there is nothing to resume in sqlite:///c.db yet: a search begins there\n" in done.stderr
    assert "sqlite:///c.db, search 0\n" in done.stdout  # the oldest, as everybody who begins now takes it
    done = command_line.run(*RUN, "--resume", "--quiet")
    assert done.stderr == ""
    assert "search 0\n" in done.stdout
    assert ran(command_line) == list(range(8))


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_search_at_a_mistyped_path_leaves_no_store_there(command_line: CommandLine, resume: list[str]) -> None:
    before = sorted(command_line.directory.iterdir())
    done = command_line.run(*RUN, "--search", "0", *resume)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "paraval: error: no such file: c.db\n")
    assert sorted(path for path in command_line.directory.iterdir() if path.name != "__pycache__") == before


def test_a_storage_that_keeps_nothing_has_nothing_to_resume(command_line: CommandLine) -> None:
    command_line.write("go_on", "")
    done = command_line.run(*RUN[:-1], "null:", "--resume", "--quiet")
    assert done.returncode == 0
    assert done.stderr == "paraval: there is nothing to resume in null: yet: a search begins there\n"
    assert ran(command_line) == list(range(8))
    done = command_line.run(*RUN[:-1], "null:", "--resume", "--search", "0", "--quiet")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no search '0' to go on with" in done.stderr


def install_failing(command_line: CommandLine) -> None:
    command_line.write("failing.py", FAILING)
    metadata = command_line.directory / "failing-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)


def test_a_storage_that_fails_is_one_line(command_line: CommandLine) -> None:
    install_failing(command_line)
    done = command_line.run(*RUN[:-1], "failing:me:hidden", "-q")
    assert done.returncode == 1
    assert done.stderr == "paraval: error: the disk of failing:… is on fire\n"
    assert re.search(r"ended early +the disk of failing:… is on fire\n", done.stdout)
    assert "hidden" not in done.stdout
    assert ran(command_line) == []


@pytest.mark.parametrize(
    "args",
    [["jobs"], ["searches"], ["export"], [*RUN[:-2], "--resume", "--search", "0", "--storage"]],
    ids=lambda args: args[0],
)
def test_the_error_of_another_packages_storage_is_one_line_without_secrets(
    command_line: CommandLine, args: list[str]
) -> None:
    install_failing(command_line)
    for url, said in (
        ("closed:me:hidden", "the storage closed:… cannot be opened: ConnectionError: closed:… is closed to …"),
        ("refused:me:hidden", "the storage refused:… cannot be had: … is wrong"),
        ("broken:me:hidden", "RuntimeError: no answer from broken:…; at all"),
    ):
        done = command_line.run(*args, url)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"paraval: error: the storage {url.partition(':')[0]}:… cannot be ")
        assert said in done.stderr
        assert "hidden" not in done.stderr


def test_a_file_that_is_no_database(command_line: CommandLine) -> None:
    command_line.write("c.db", "not a database, but something that must be kept\n")
    done = command_line.run(*RUN, "--resume")
    assert done.returncode == 2
    assert done.stderr.startswith("paraval: error: ")
    assert done.stderr.count("\n") == 1
    assert "c.db" in done.stderr
    assert (command_line.directory / "c.db").read_text().startswith("not a database")
    assert ran(command_line) == []


@pytest.mark.parametrize("output", ["c.db", "c.db-journal", "here/c.db-wal", "./c.db-shm"])
def test_no_file_of_the_storage_is_the_output(command_line: CommandLine, output: str) -> None:
    (command_line.directory / "here").symlink_to(".")
    done = command_line.run(*RUN, "--output", output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"paraval: error: --output {output} is the file of --storage: name another file for the results\n"
    )
    assert not list(command_line.directory.glob("c.db*"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:hidden@host:6379/0", "redis://host:6379/0"),
        ("rediss://host/1?password=hidden", "rediss://host/1"),
        ("unix://:hid@den@/run/redis.sock?password=hidden", "unix:///run/redis.sock"),
        ("memory:", "memory:"),
        ("my:name:hidden", "my:…"),
        ("my://hidden/hidden", "my:…"),
        ("sqlite:///:hidden@h/x", "sqlite:///…@h/x"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


@pytest.mark.parametrize("args", [["jobs"], RUN[:-1]], ids=lambda args: args[0])
def test_what_was_meant_for_a_server_is_not_shown_as_a_path(command_line: CommandLine, args: list[str]) -> None:
    done = command_line.run(*args, "sqlite:///:hidden@host/x")
    assert done.returncode == 2
    assert "…@host" in done.stderr
    assert "hidden" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_password_is_not_in_an_error_either(command_line: CommandLine) -> None:
    pytest.importorskip("redis", reason="the store needs the extra 'redis'")
    done = command_line.run(*RUN[:-1], "redis://user:hidden@127.0.0.1:1/0")
    assert done.returncode == 2
    assert "127.0.0.1:1" in done.stderr
    assert "hidden" not in done.stderr
    assert done.stderr.count("\n") == 1
