"""Programs that die, in every way: no worker outlives them, nor anything that a job started."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from support import until
from workers import Driver, worker_marks

pytestmark = worker_marks

GONE_S = 5.0
"""How soon after a driver that was killed everything must be gone."""
HOMES = ["thread", "asyncio", "trio"]

# The rest of a program: jobs, and what they do to outlive it.
JOBS = """
import os, sys, time, signal, subprocess, threading, warnings
from paraval import Evaluator

def job(job):
    flags.put(f"began-{job['x']}", os.getpid())
    kind = job.get("kind", "sleeps")
    if kind != "tiny":
        flags.put(f"sleeper-{job['x']}", start_sleeper())
        flags.put(f"ready-{job['x']}")
    if kind == "sleeps":
        time.sleep(60)
    if kind == "gil":
        hold_the_gil(60)
    if kind == "ignores":
        ignore_requests()
        while True:
            pass
    if kind == "forks":
        os.fork()
        time.sleep(60)
    return job["x"]

def configurations(*kinds):
    return [{"x": x, "kind": kind} for x, kind in enumerate(kinds)]
"""


@pytest.mark.parametrize("kind", ["sleeps", "gil", "ignores", "forks"])
def test_a_driver_that_is_killed_leaves_no_process(kind: str, tmp_path: Path) -> None:
    program = (
        JOBS
        + f"""
evaluator = Evaluator.create(job, "process", {{"num_workers": 3}})
evaluator.submit(configurations(*[{kind!r}] * 3))
evaluator.gather("ALL")
"""
    )
    with Driver(program, tmp_path) as driver:
        driver.wait_for("ready-0", "ready-1", "ready-2")
        until(lambda: len(driver.descendants()) >= 6)  # one that has just begun may not show its environment yet
        driver.kill()
        driver.wait()
        driver.everybody_is_gone(GONE_S)


@pytest.mark.parametrize("home", HOMES)
def test_a_driver_killed_at_a_random_moment_leaves_no_process(home: str, tmp_path: Path) -> None:
    if home == "trio":
        pytest.importorskip("trio")
    jobs = "configurations(*['tiny', 'sleeps', 'gil', 'tiny', 'forks', 'ignores'])"
    if home == "thread":
        rest = f"""
flags.put("begin")
while True:
    evaluator = Evaluator.create(job, "process", {{"num_workers": 2, "job_timeout": 0.3, "kill_grace": 0.1}})
    evaluator.submit({jobs})
    evaluator.gather("ALL")
    evaluator.close()
"""
    else:
        rest = f"""
import anyio

async def main():
    flags.put("begin")
    while True:
        options = {{"num_workers": 2, "job_timeout": 0.3, "kill_grace": 0.1}}
        async with Evaluator.create(job, "process", options) as evaluator:
            evaluator.submit({jobs})
            await evaluator.gather_async("ALL")

anyio.run(main, backend={home!r})
"""
    random_ = random.Random(home)
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        with Driver(JOBS + rest, folder) as driver:
            driver.wait_for("begin")
            time.sleep(random_.uniform(0, 0.9))  # the moment is meant to be any: nothing is waited for
            driver.kill()
            driver.wait()
            driver.everybody_is_gone(GONE_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGABRT], ids=lambda number: number.name)
def test_a_signal_that_ends_the_driver_ends_all(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        JOBS
        + """
evaluator = Evaluator.create(job, "process", {"num_workers": 2})
evaluator.submit(configurations("gil", "sleeps"))
evaluator.gather("ALL")
"""
    )
    with Driver(program, tmp_path) as driver:
        driver.wait_for("ready-0", "ready-1")
        driver.kill(number)
        assert driver.wait() == -number
        driver.everybody_is_gone(GONE_S)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        pytest.param("", 0, id="end"),
        pytest.param("sys.exit(3)", 3, id="sys.exit"),
        pytest.param("raise LookupError('lost')", 1, id="exception"),
        pytest.param("os._exit(4)", 4, id="os._exit"),
        pytest.param("del evaluator", 0, id="collected"),
        pytest.param("threading.Thread(target=time.sleep, args=(0.5,)).start()", 0, id="with-a-thread"),
    ],
)
def test_a_driver_may_end_without_close(ending: str, code: int, tmp_path: Path) -> None:
    program = (
        JOBS
        + f"""
evaluator = Evaluator.create(job, "process", {{"num_workers": 2, "kill_grace": 0.3}})
evaluator.submit(configurations("ignores", "gil", "sleeps"))
flags.wait("ready-0", "ready-1")
flags.put("end")
{ending}
"""
    )
    with Driver(program, tmp_path, "-W", "default") as driver:
        driver.wait_for("end")
        began = time.monotonic()
        assert driver.wait() == code, driver.output
        assert time.monotonic() - began < 10  # it does end; that it is soon is not for a busy machine to say
        driver.everybody_is_gone(GONE_S)
        assert not driver.flags.up("began-2")
        if ending != "os._exit(4)":
            assert "ResourceWarning" in driver.output
            assert "was not closed" in driver.output


def test_what_a_job_left_behind_ends_with_the_driver(tmp_path: Path) -> None:
    program = (
        JOBS
        + """
with Evaluator.create(job, "process", {"num_workers": 2}) as evaluator:
    evaluator.submit(configurations("returns", "returns"))
    evaluator.gather("ALL")
"""
    )
    with Driver(program, tmp_path) as driver:
        assert driver.wait() == 0, driver.output
        driver.everybody_is_gone(GONE_S)


def test_workers_do_not_live_as_long_as_a_fork_of_the_driver(tmp_path: Path) -> None:
    program = (
        JOBS
        + """
evaluator = Evaluator.create(job, "process", {"num_workers": 2})
evaluator.submit(configurations("sleeps", "gil"))
flags.wait("ready-0", "ready-1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer Pythons warn of forks beside threads
    forked = os.fork()
if forked == 0:
    os.closerange(0, 3)
    time.sleep(60)
    os._exit(0)
flags.put("forked", forked)
evaluator.gather("ALL")
"""
    )
    with Driver(program, tmp_path) as driver:
        (forked,) = driver.wait_for("forked")
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + GONE_S
        while driver.descendants() != [int(forked)]:
            assert time.monotonic() < deadline, driver.descendants()
            time.sleep(0.01)


def test_a_driver_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("without os.memfd_create, a driver that is killed leaves files")
    folder = tmp_path / "temporary"
    folder.mkdir()
    program = (
        JOBS
        + f"""
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

tempfile.tempdir = {str(folder)!r}

def alone(job):
    flags.put(f"ready-{{job['x']}}")
    time.sleep(60)

evaluator = Evaluator.create(
    alone, "executor", {{"executor": lambda: ProcessPoolExecutor(2, get_context("spawn")), "num_workers": 2}}
)
evaluator.submit([{{"x": 0}}, {{"x": 1}}])
evaluator.gather("ALL")
"""
    )
    with Driver(program, tmp_path) as driver:
        driver.wait_for("ready-0", "ready-1")
        driver.kill()
        driver.wait()
        driver.everybody_is_gone(GONE_S)
    assert list(folder.iterdir()) == []


def test_a_fork_of_the_driver_that_ends_takes_nothing_along(tmp_path: Path) -> None:
    program = (
        JOBS
        + """
evaluator = Evaluator.create(double, "process", {"num_workers": 2})
evaluator.submit([{"x": x} for x in range(10)])
assert len(evaluator.gather("ALL")) == 10
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    forked = os.fork()
if forked == 0:
    try:
        evaluator.submit([{"x": 1}])
    except RuntimeError as exc:
        print("refused:", exc, flush=True)
    sys.exit(5)  # with all that Python does at the end
assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 5
evaluator.submit([{"x": x} for x in range(10)])
jobs = evaluator.gather("ALL")
assert [job.error for job in jobs] == [None] * 10, jobs
evaluator.close()
print("the end", flush=True)
"""
    )
    with Driver(program, tmp_path) as driver:
        assert driver.wait() == 0, driver.output
        assert "refused: this evaluator belongs to process" in driver.output
        assert driver.output.endswith("the end\n")
        driver.everybody_is_gone(GONE_S)


def test_ctrl_c_in_a_terminal_does_not_reach_the_workers(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole foreground group: to the driver, and not to its workers."""
    program = (
        JOBS
        + """
def careful(job):
    import signal
    try:
        flags.put(f"began-{job['x']}", os.getpgid(0))
        flags.wait("go")
    except KeyboardInterrupt:
        return "interrupted"
    return job["x"]

evaluator = Evaluator.create(careful, "process", {"num_workers": 2})
evaluator.submit(configurations("", ""))
try:
    evaluator.gather("ALL")
except KeyboardInterrupt:
    flags.put("interrupted")
flags.put("go")
print(sorted(job.output for job in evaluator.gather("ALL")))
evaluator.close()
"""
    )
    with Driver(program, tmp_path) as driver:
        groups = driver.wait_for("began-0", "began-1")
        assert len({*groups, str(driver.process.pid)}) == 3
        driver.kill_group(signal.SIGINT)
        driver.wait_for("interrupted")
        assert driver.wait() == 0, driver.output
        assert driver.output == "[0, 1]\n"
        driver.everybody_is_gone(GONE_S)


def test_a_worker_ignores_sigint(tmp_path: Path) -> None:
    program = (
        JOBS
        + """
def interrupted(job):
    os.kill(os.getpid(), signal.SIGINT)
    done = subprocess.run([sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT).__name__)"],
                          stdout=subprocess.PIPE, check=True)
    return done.stdout

with Evaluator.create(interrupted, "process") as evaluator:
    print(evaluator.evaluate({"x": 1}).output.decode().strip())
"""
    )
    with Driver(program, tmp_path) as driver:
        assert driver.wait() == 0, driver.output
        # What a job starts has the usual answer to Ctrl-C.
        assert driver.output == "default_int_handler\n"


def test_workers_live_on_when_the_thread_that_made_them_has_ended(tmp_path: Path) -> None:
    program = (
        JOBS
        + """
import anyio
evaluators = []

def begin():
    evaluator = Evaluator.create(job, "process", {"num_workers": 2})
    evaluators.append(evaluator)
    evaluator.submit(configurations("tiny", "tiny"))

for _ in range(3):
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
for evaluator in evaluators:
    assert len(evaluator.gather("ALL")) == 2
    evaluator.submit(configurations("tiny", "tiny"))
    jobs = evaluator.gather("ALL")
    assert [job.error for job in jobs] == [None, None], jobs
    evaluator.close()
"""
    )
    with Driver(program, tmp_path) as driver:
        assert driver.wait() == 0, driver.output
        driver.everybody_is_gone(GONE_S)


def test_a_driver_without_its_standard_streams(tmp_path: Path) -> None:
    """As daemons are: the numbers 0 to 2 are then given to sockets and pipes."""
    program = (
        JOBS
        + """
os.closerange(0, 3)
try:
    with Evaluator.create(double, "process", {"num_workers": 2}) as evaluator:
        evaluator.submit([{"x": x} for x in range(10)])
        jobs = evaluator.gather("ALL")
        evaluator.evaluate({"x": [1]})
    flags.put("result", sorted((job.output, job.error) for job in jobs))
except BaseException as exc:
    flags.put("result", repr(exc))
"""
    )
    with Driver(program, tmp_path) as driver:
        driver.wait()
        (result,) = driver.wait_for("result")
        assert result == str([(2 * x, None) for x in range(10)])
        driver.everybody_is_gone(GONE_S)
