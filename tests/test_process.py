"""Jobs in worker processes: what can run there, what a job can do, and how it is stopped."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import itertools
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

import runfunctions
from paraval import Evaluator, HPOJob, Job, JobStatus, ParavalError, RunningJob
from paraval.backends.process import ProcessBackend, ProcessPoolEvaluator
from paraval.engine.reasons import out_of_time
from paraval.storage import JobRecord, MemoryStorage, UnknownIdError
from runfunctions import AsyncScaler, Flags, Scaler, append_one, async_double, double, echo, scaled
from support import WAIT_S, CountingStorage, Latch, configurations, outputs, run_all, soon, until, until_async
from workers import (
    LOKY,
    by_x,
    children,
    errors,
    is_alive,
    listening,
    needs_trio,
    open_files,
    polite,
    timed_out,
    worker_marks,
)

pytestmark = worker_marks
two_loops = pytest.mark.parametrize(
    "anyio_backend",
    [
        "asyncio",
        pytest.param("trio", marks=needs_trio),
    ],
)


def make(function: Callable[..., Any], **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, "process", kwargs)


def run(function: Callable[..., Any], args_list: list[dict[str, Any]], **kwargs: Any) -> list[Job]:
    """Run jobs; give them in the order of submission."""
    return run_all(make(function, **kwargs), args_list)


def results(function: Callable[..., Any], args_list: list[dict[str, Any]], **kwargs: Any) -> list[Any]:
    jobs = run(function, args_list, **kwargs)
    assert errors(jobs) == []
    return [job.output for job in jobs]


# -- what can be a run-function ----------------------------------------------------------------------------------------

_two = 2.0


def _closure(scale: float) -> Callable[[RunningJob], float]:
    def multiply(value: float) -> float:
        return value * scale

    def function(job: RunningJob) -> float:
        return multiply(job["x"])

    return function


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(double, id="function"),
        pytest.param(lambda job: job["x"] * _two, id="lambda"),
        pytest.param(_closure(2), id="closure"),
        pytest.param(functools.partial(scaled, scale=2), id="partial"),
        pytest.param(functools.partial(lambda job, scale: job["x"] * scale, scale=2), id="partial-of-lambda"),
        pytest.param(Scaler(2), id="callable-object"),
        pytest.param(Scaler(2).method, id="method"),
        pytest.param(Scaler.of_class, id="class-method"),
        pytest.param(Scaler.static, id="static-method"),
        pytest.param(async_double, id="async-function"),
        pytest.param(AsyncScaler(2), id="async-callable-object"),
        pytest.param(functools.partial(async_double), id="async-partial"),
    ],
)
def test_everything_that_can_be_called_can_be_a_run_function(function: Callable[..., Any]) -> None:
    assert results(function, configurations(4)) == [0, 2, 4, 6]


SCRIPT = """
import dataclasses
import enum

print("begin", flush=True)
from paraval import Evaluator

OFFSET = 1

class Colour(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Point:
    x: int
    colour: Colour = Colour.RED

class Odd(Exception):
    def __init__(self, x, y):
        super().__init__(f"{x} is odd, {y}")

def moved(point):
    return Point(point.x * 2 + OFFSET, point.colour)

def run(job):
    if job["point"].x == 3:
        raise Odd(3, "really")
    assert isinstance(job["point"], Point)
    return moved(job["point"])

evaluator = Evaluator.create(run, "process", {"num_workers": 2})
evaluator.submit([{"point": Point(x)} for x in range(4)])
evaluator.gather("ALL")
jobs = evaluator.jobs
assert [job.output for job in jobs] == [Point(1), Point(3), Point(5), None], jobs
assert type(jobs[0].output) is Point and jobs[0].output.colour is Colour.RED
assert (jobs[3].error.type, jobs[3].error.message) == ("Odd", "3 is odd, really"), jobs[3].error
evaluator.close()

with Evaluator.create(lambda job: job["x"] + OFFSET, "process") as evaluator:
    print(evaluator.evaluate({"x": 1}).output)
print("end", flush=True)
"""


def python(folder: Path, *arguments: str | Path) -> tuple[str, str]:
    """Run Python in a folder; give its stdout and its stderr."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=False, timeout=40
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def test_a_script_needs_no_guard_and_runs_once(tmp_path: Path) -> None:
    script = write(tmp_path / "script.py", SCRIPT)
    assert python(tmp_path, "-W", "error", script) == ("begin\n2\nend\n", "")


def test_a_program_without_a_file_needs_no_guard(tmp_path: Path) -> None:
    assert python(tmp_path, "-W", "error", "-c", SCRIPT) == ("begin\n2\nend\n", "")


def test_modules_are_found_through_the_path_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "found_by_path.py", "def run(job):\n    return job['x'] + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("found_by_path")
    try:
        assert results(module.run, configurations(2)) == [1, 2]
    finally:
        del sys.modules["found_by_path"]


def test_modules_of_the_working_directory_are_found_after_it_was_changed(tmp_path: Path) -> None:
    write(tmp_path / "here.py", "def run(job):\n    return job['x'] + 1\n")
    program = """
import os
import here
from paraval import Evaluator
os.chdir("/")
with Evaluator.create(here.run, "process") as evaluator:
    job = evaluator.evaluate({"x": 1})
print(job.output, job.error)
"""
    assert python(tmp_path, "-c", program) == ("2 None\n", "")


def test_modules_of_the_working_directory_do_not_hide_those_of_python(tmp_path: Path) -> None:
    for name in ("signal", "pickle", "struct", "typing", "collections"):
        write(tmp_path / f"{name}.py", "raise RuntimeError('the wrong module')\n")
    script = write(tmp_path / "elsewhere" / "script.py", SCRIPT)
    assert python(tmp_path, script) == ("begin\n2\nend\n", "")


def test_static_arguments() -> None:
    assert results(scaled, configurations(3), run_function_kwargs={"scale": 2, "offset": 1}) == [1.0, 3.0, 5.0]


def test_static_arguments_may_change_later() -> None:
    with make(scaled, run_function_kwargs={"scale": 1}, num_workers=2) as evaluator:
        evaluator.submit(configurations(4))
        assert outputs(evaluator.gather("ALL")) == [0, 1, 2, 3]
        evaluator.run_function_kwargs["scale"] = 2
        evaluator.submit(configurations(4))
        assert outputs(evaluator.gather("ALL")) == [0, 2, 4, 6]


def test_a_run_function_that_cannot_be_sent_is_refused_by_name() -> None:
    lock = threading.Lock()
    holder = {"name": "good", "inner": [1, lock]}

    def function(job: RunningJob) -> Any:
        return holder

    with pytest.raises(ValueError, match=r"function.*'holder'.*\['inner'\]\[1\] cannot be pickled: lock") as caught:
        make(function)
    assert isinstance(caught.value, ParavalError)
    assert len(str(caught.value).splitlines()) == 1


def test_static_arguments_that_cannot_be_sent_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\['offset'\] cannot be pickled: lock"):
        make(scaled, run_function_kwargs={"scale": 1, "offset": threading.Lock()})


def test_the_file_of_a_run_function_need_not_be_importable_in_the_driver_again() -> None:
    """A function from a module that was made at run time goes by value."""
    source = "def run(job):\n    return moved(job['x'])\n\ndef moved(x):\n    return x + 1\n"
    namespace: dict[str, Any] = {"__name__": "nowhere_to_be_found"}
    exec(source, namespace)  # noqa: S102 - a notebook does the same
    assert results(namespace["run"], configurations(2)) == [1, 2]


# -- arguments and results ---------------------------------------------------------------------------------------------


def test_arguments_and_results_come_as_they_are() -> None:
    values: list[Any] = [
        None, True, 0, -(2**80), 1.5, float("inf"), "", "äöü \N{GRINNING FACE}", "\ud800", "__main__", b"\0bytes",
        (1, (2, [3])), [], {}, {"a": {"b": [1, {"c": (None,)}]}}, {1, 2}, range(3), JobStatus.DONE, sys.maxsize,
        {"x": 1, 2: "y"}, bytearray(b"12"), Scaler, double,
    ]  # fmt: skip
    found = results(echo, [{"x": value} for value in values])
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_arguments_that_only_cloudpickle_can_send() -> None:
    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    offset = 5
    job = run(
        lambda job: Local(job["function"](job["item"].x)), [{"item": Local(1), "function": lambda x: x + offset}]
    )[0]
    assert type(job.output) is Local
    assert job.output.x == 6


@pytest.mark.parametrize("batching", [False, 3])
def test_jobs_share_nothing(batching: Any) -> None:
    items: list[int] = []
    shared = {"items": items, "list": []}
    given = {"x": "as it was", "items": items, "deep": shared}
    jobs = run(append_one, [given] * 3, batching=batching)
    assert [job.output for job in jobs] == [[[1], [1], True]] * 3
    assert given == {"x": "as it was", "items": [], "deep": {"items": [], "list": []}}
    assert [job.args for job in jobs] == [given] * 3


def test_a_job_knows_itself() -> None:
    def function(job: RunningJob) -> Any:
        return job.id, job["job_id"], dict(job), job.status.name, job.stopped()

    with make(function) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        assert [job.output for job in evaluator.jobs] == [
            (job.id, index, {"x": index}, "RUNNING", False) for index, job in enumerate(evaluator.jobs)
        ]


def test_the_standards_of_outputs_hold() -> None:
    given = [0.0, False, "F_mine", float("nan"), {"objective": 1, "metadata": {"note": 2}}, (1, 2.0), None]
    jobs = run(echo, [{"x": value} for value in given], job_class=HPOJob)
    assert [job.objective for job in jobs if isinstance(job, HPOJob)] == [
        0.0, 0.0, "F_mine", "F", 1.0, (1.0, 2.0), "F_TypeError",
    ]  # fmt: skip
    assert jobs[4].metadata["note"] == 2


def test_an_argument_that_cannot_be_sent_fails_its_job_with_the_path_to_it() -> None:
    bad = {"x": 0, "deep": [1, {"lock": threading.Lock()}]}
    for batching in (False, 3):
        jobs = run(double, [{"x": 1}, bad, {"x": 2}], batching=batching)
        assert [job.output for job in jobs] == [2, None, 4]
        error = jobs[1].error
        assert error is not None
        assert (error.kind, error.type) == ("exception", "PicklingError")
        assert "the arguments['deep'][1]['lock'] cannot be pickled: lock object" in error.message


def test_a_result_that_cannot_be_sent_fails_its_job_with_the_path_to_it() -> None:
    def function(job: RunningJob) -> Any:
        return {"fine": 1, "deep": [{"lock": threading.Lock()}]} if job["x"] == 1 else job["x"]

    jobs = run(function, configurations(3), batching=3)
    assert [job.output for job in jobs] == [0, None, 2]
    error = jobs[1].error
    assert error is not None
    assert (error.kind, error.type) == ("exception", "PicklingError")
    assert "the result['deep'][0]['lock'] cannot be pickled: lock object" in error.message


@pytest.mark.parametrize("is_argument", [False, True])
@pytest.mark.parametrize(
    "value", [runfunctions.OfUnhashableClass(), [runfunctions.OfUnhashableClass()]], ids=["alone", "in a list"]
)
def test_an_object_of_an_unhashable_class_fails_its_own_job(is_argument: bool, value: object) -> None:
    def function(job: RunningJob) -> Any:
        return runfunctions.OfUnhashableClass() if job["x"] == 1 and not is_argument else 1

    jobs_args: list[dict[str, Any]] = [{"x": 0}, {"x": 1, "v": value if is_argument else 0}, {"x": 2}]
    evaluator = Evaluator.create(function, "process", {"num_workers": 1})
    alone = [evaluator.evaluate(args) for args in jobs_args]  # each is begun by the loop itself
    for jobs in (alone, run_all(evaluator, jobs_args)):
        assert [job.output for job in jobs] == [1, None, 1]
        error = jobs[1].error
        assert error is not None
        assert (error.kind, error.type) == ("exception", "PicklingError")
        assert ("the arguments['v']" if is_argument else "the result") in error.message


def test_a_result_that_cannot_be_unpickled_fails_its_job() -> None:
    def function(job: RunningJob) -> Any:
        return runfunctions.NotForTheDriver() if job["x"] == 1 else job["x"]

    jobs = run(function, configurations(3), batching=3)
    assert [job.output for job in jobs] == [0, None, 2]
    error = jobs[1].error
    assert error is not None
    assert error.kind == "exception"
    assert "the result cannot be unpickled: LookupError: not in this house" in error.message


def test_200_mb_of_argument_and_of_result() -> None:
    size = 200_000_000

    def function(job: RunningJob) -> Any:
        return len(job["x"]) if job["back"] is None else bytes(job["back"])

    with make(function, num_workers=2) as evaluator:
        evaluator.submit([{"x": bytes(size), "back": None}, {"x": b"", "back": size}, {"x": b"1", "back": None}])
        evaluator.gather("ALL")
        assert errors(evaluator.jobs) == []
        first, second, third = (job.output for job in evaluator.jobs)
        assert (first, len(second), third) == (size, size, 1)


# -- the worker --------------------------------------------------------------------------------------------------------


HEAVY = {
    "anyio", "asyncio", "concurrent.futures", "msgspec", "multiprocessing", "numpy", "selectors", "socket", "ssl",
    "subprocess", "tempfile", "trio", "paraval.backends", "paraval.engine", "paraval.evaluator", "paraval.storage",
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        pytest.param("lean.run", HEAVY | {"cloudpickle", "inspect", "logging"}, id="by-name"),
        pytest.param("lambda job: [job['x'], *sys.modules]", HEAVY, id="by-value"),
    ],
)
@pytest.mark.parametrize("kwargs", [{}, {"job_timeout": 60}], ids=["", "limited"])
def test_a_worker_imports_little(function: str, refused: set[str], kwargs: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "lean.py", "import sys\n\ndef run(job):\n    return [job['x'], *sys.modules]\n")
    program = f"""
import sys
import lean
from paraval import Evaluator
with Evaluator.create({function}, "process", {kwargs}) as evaluator:
    print(*evaluator.evaluate({{"x": [2]}}).output, sep="\\n")
"""
    loaded = set(python(tmp_path, "-c", program)[0].splitlines())
    assert "paraval.worker.main" in loaded
    assert loaded & refused == set()


def test_workers_are_kept_and_work_side_by_side(flags: Flags) -> None:
    def meet(job: RunningJob) -> int:
        flags.put(f"here-{job['x']}")
        flags.wait("here-0", "here-1")
        return os.getpid()

    with make(meet, num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        first = outputs(evaluator.gather("ALL"))
        assert len(set(first)) == 2
        assert os.getpid() not in first
        evaluator.submit(configurations(2) * 10)
        assert set(outputs(evaluator.gather("ALL"))) <= set(first)
        assert all(is_alive(pid) for pid in first)
    assert not any(is_alive(pid) for pid in first)


def test_there_is_no_worker_before_there_is_work() -> None:
    before = children()
    with make(double, num_workers=4) as evaluator:
        assert children() == before
        evaluator.evaluate({"x": 1})
        assert len(children() - before) == 1


def test_async_jobs_of_a_worker_share_its_loop() -> None:
    async def function(job: RunningJob) -> int:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        loop.jobs = getattr(loop, "jobs", 0) + 1  # type: ignore[attr-defined] # a mark on it
        return int(loop.jobs)  # type: ignore[attr-defined] # likewise

    assert results(function, configurations(3)) == [1, 2, 3]


def test_an_initializer_runs_once_in_each_worker(flags: Flags) -> None:
    def initialize() -> None:
        os.environ["PARAVAL_TEST_READY"] = "yes"
        flags.put(f"ready-{os.getpid()}")

    def function(job: RunningJob) -> Any:
        flags.put(f"here-{job['x']}")
        if job["x"] < 2:
            flags.wait("here-0", "here-1")
        return os.getpid(), os.environ["PARAVAL_TEST_READY"]

    found = results(function, configurations(20), num_workers=2, initializer=initialize)
    assert {ready for _, ready in found} == {"yes"}
    assert flags.names("ready-") == sorted({f"ready-{pid}" for pid, _ in found})
    assert len(flags.names("ready-")) == 2


@pytest.mark.parametrize("size", [1, 10_000_000], ids=["small", "large"])
def test_an_initializer_that_raises_fails_the_jobs(size: int) -> None:
    def initialize() -> None:
        raise RuntimeError("no licence")

    jobs = run(echo, [{"x": "x" * size}] * 3, initializer=initialize, batching=2, job_class=HPOJob)
    for job in jobs:
        assert job.error is not None
        assert (job.error.kind, job.error.type) == ("exception", "RuntimeError")
        assert "could not be set up: no licence" in job.error.message
        assert job.error.traceback is not None
        assert "initialize" in job.error.traceback


def test_an_initializer_that_dies_fails_the_jobs() -> None:
    jobs = run(echo, configurations(3), initializer=lambda: os._exit(runfunctions.EXIT_CODE))
    assert [(job.error.kind, job.error.exit_code) for job in jobs if job.error] == [("worker_died", 7)] * 3
    assert {job.error.message for job in jobs if job.error} == {
        "the worker process ended with exit code 7 while it was being set up"
    }


@pytest.mark.parametrize("bad", [3, "initialize", [double]])
def test_an_initializer_must_be_callable(bad: Any) -> None:
    with pytest.raises(TypeError, match="initializer"):
        make(double, initializer=bad)


def test_an_initializer_that_cannot_be_sent_is_refused() -> None:
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"initializer.*'lock'"):
        make(double, initializer=lambda: lock)


@pytest.mark.parametrize("batching", ["auto", False, 2, 5])
def test_a_worker_is_replaced_after_so_many_jobs(batching: Any) -> None:
    jobs = run(runfunctions.pid, configurations(10), max_jobs_per_worker=3, batching=batching)
    assert errors(jobs) == []
    counts = Counter(job.output for job in jobs)
    assert max(counts.values()) <= 3
    if batching is False:
        assert list(counts.values()) == [3, 3, 3, 1]


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True])
def test_the_number_of_jobs_of_a_worker_must_be_one(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_jobs_per_worker must be a positive int"):
        make(double, max_jobs_per_worker=bad)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_workers": 0}, "num_workers"),
        ({"job_timeout": -1}, "job_timeout"),
        ({"kill_grace": -1}, "kill_grace"),
        ({"max_attempts": 0}, "max_attempts"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(double, **kwargs)


def test_an_initializer_that_nobody_would_await_is_refused() -> None:
    async def initializer() -> None:
        raise AssertionError("it is never called")

    with pytest.raises(TypeError, match=r"initializer must be a plain function: nobody awaits what .*initializer"):
        make(double, initializer=initializer)


def test_nothing_listens(flags: Flags) -> None:
    def function(job: RunningJob) -> int:
        flags.put(f"pid-{job['x']}", os.getpid())
        flags.wait("go")
        return os.getpid()

    before = listening(os.getpid())
    with make(function, num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        pids = [int(text) for text in flags.wait("pid-0", "pid-1")]
        assert listening(os.getpid()) == before
        assert listening(*pids) == []
        flags.put("go")
        assert outputs(evaluator.gather("ALL")) == sorted(pids)
    assert listening(os.getpid()) == before


def test_a_worker_has_nothing_open_but_its_own() -> None:
    """What a worker should not hold may never come to its end: a socket of another worker, a file of the driver."""
    with Path("/dev/zero").open("rb"), make(runfunctions.open_files, num_workers=2) as evaluator:
        evaluator.submit(configurations(8))
        jobs = evaluator.gather("ALL")
    assert errors(jobs) == []
    for job in jobs:
        assert sum(file.startswith("socket:") for file in job.output) == 2  # its channel and its tray
        assert "/dev/zero" not in job.output
    # Nor does what a job starts.
    (files,) = results(runfunctions.open_files_of_a_program, configurations(1))
    assert not [file for file in files if file.startswith(("socket:", "pipe:"))]


# -- what a job can do while it runs -----------------------------------------------------------------------------------


class OtherProcessStorage(MemoryStorage):
    """Behaves as a store that may block: it is called in a thread."""

    by_reference = False


@pytest.fixture(params=[MemoryStorage, OtherProcessStorage])
def storage(request: pytest.FixtureRequest) -> MemoryStorage:
    made: MemoryStorage = request.param()
    return made


def test_intermediate_results_are_stored_while_the_job_runs(flags: Flags, storage: MemoryStorage) -> None:
    def function(job: RunningJob) -> Any:
        job.record(1, 0.5)
        job.record(2, 0.75)
        flags.put("recorded")
        flags.wait("seen")
        return job.objective

    with make(function, storage=storage) as evaluator:
        evaluator.submit(configurations(1))
        flags.wait("recorded")
        record = storage.load_job(evaluator.jobs[0].id)
        assert record["intermediate"] == {"budget": [1, 2], "objective": [0.5, 0.75]}
        assert record["status"] == JobStatus.RUNNING.value
        flags.put("seen")
        assert outputs(evaluator.gather("ALL")) == [0.75]


def test_the_threads_of_a_job_may_all_record(storage: MemoryStorage) -> None:
    def function(job: RunningJob) -> Any:
        threads = [threading.Thread(target=job.record, args=(number, 1.0)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(job.storage.load_job(str(job.id))["intermediate"]["budget"])

    jobs = run(function, configurations(3), storage=storage, batching=3)
    assert [job.output for job in jobs] == [20, 20, 20]
    for job in jobs:
        assert sorted(storage.load_job(job.id)["intermediate"]["budget"]) == list(range(20))


def test_every_method_of_the_storage_works_in_a_job(storage: MemoryStorage) -> None:
    def function(job: RunningJob) -> Any:
        store, own = job.storage, str(job.id)
        search = store.create_new_search()
        other = store.create_new_job(search)
        store.store_job_in(other, args=({"a": [1]},), kwargs={"b": 2})
        store.store_job_out(other, 1.5)
        store.store_job_metadata(other, "note", {"deep": (1, None)})
        store.store_job_status(other, JobStatus.DONE.value)
        store.store_job_intermediate(other, 1, 0.5)
        store.store_job(other, "mine", [1])
        store.store_search_value(search, "key", {"value": 1})
        store.store_job_metadata(own, "note", 0)
        assert store.connect() is store
        return {
            "connected": store.is_connected(),
            "searches": store.load_all_search_ids(),
            "jobs": store.load_all_job_ids(search),
            "job": store.load_job(other),
            "loaded": store.load_jobs([other]),
            "search": store.load_search(search),
            "status": store.load_job_status(own),
            "value": store.load_search_value(search, "key"),
            "metadata": store.load_metadata_from_all_jobs(search, "note"),
            "own metadata": store.load_metadata_from_all_jobs(own.partition(".")[0], "note"),
            "outs": store.load_out_from_all_jobs(search),
            "scan": [type(record) is JobRecord for record in store.scan(search)[0]],
        }

    (seen,) = results(function, configurations(1), storage=storage)
    search, other = "1", "1.0"
    assert seen == {
        "connected": True,
        "searches": ["0", search],
        "jobs": [other],
        "job": storage.load_job(other),
        "loaded": {other: storage.load_job(other)},
        "search": {"0": storage.load_job(other)},
        "status": JobStatus.RUNNING.value,
        "value": {"value": 1},
        "metadata": [{"deep": (1, None)}],
        "own metadata": [0],
        "outs": [1.5],
        "scan": [True],
    }
    record = storage.load_job(other)
    assert record["in"] == {"args": ({"a": [1]},), "kwargs": {"b": 2}}
    assert (record["out"], record["status"], record["mine"]) == (1.5, JobStatus.DONE.value, [1])
    assert storage.load_job("0.0")["metadata"]["note"] == 0


def test_errors_of_the_storage_come_through_as_they_are(storage: MemoryStorage) -> None:
    def function(job: RunningJob) -> Any:
        caught = []
        for call in (
            lambda: job.storage.load_job("7.7"),
            lambda: job.storage.load_search_value("0", "missing"),
            lambda: job.storage.create_new_job("nowhere"),
            lambda: job.storage.store_job("0.0", "intermediate", 1),
        ):
            try:
                call()
            except Exception as exc:  # noqa: BLE001 - they are what is looked at
                caught.append(exc)
        return [(exc, str(exc)) for exc in caught]

    (caught,) = results(function, configurations(1), storage=storage)
    assert [type(exc) for exc, _ in caught[:3]] == [UnknownIdError] * 3
    assert [str(exc) for exc, _ in caught] == [text for _, text in caught]
    assert "no job '7.7' in this storage" in caught[0][1] or "no search '7'" in caught[0][1]
    assert isinstance(caught[3][0], ValueError)


class StrangeError(Exception):
    """Can be pickled, and cannot be unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class StrangerError(StrangeError):
    """Cannot even be pickled."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.lock = threading.Lock()


class StrangeStorage(MemoryStorage):
    def get_value(self, search_id: str, key: str) -> Any:
        match key:
            case "lock":
                return threading.Lock()
            case "error":
                raise StrangeError(1, 2)
            case "worse error":
                raise StrangerError
            case "full":
                raise OSError(28, "No space left on device")
        return super().get_value(search_id, key)


def test_what_cannot_cross_is_an_error_of_the_call_and_costs_nothing_else() -> None:
    def function(job: RunningJob) -> Any:
        store, own = job.storage, str(job.id)
        seen = []
        for call in (
            lambda: store.load_search_value("0", "lock"),
            lambda: store.load_search_value("0", "error"),
            lambda: store.load_search_value("0", "worse error"),
            lambda: store.load_search_value("0", "full"),
            lambda: store.store_job_metadata(own, "key", threading.Lock()),
            lambda: store.store_job_metadata(own, "key", runfunctions.NotForTheDriver()),
            lambda: store.store_job_metadata(own, "key", runfunctions.WrongWhenUnpickled("sys.exit")),
        ):
            try:
                call()
            except BaseException as exc:  # noqa: BLE001 - they are what is looked at
                seen.append((isinstance(exc, OSError), str(exc)))
        store.store_job_metadata(own, "key", "fine")
        return seen

    jobs = run(function, configurations(2), storage=StrangeStorage(), batching=2)
    assert errors(jobs) == []
    for job in jobs:
        lock, error, worse, full, unsent, refused, exits = job.output
        assert "lock" in lock[1]
        assert "1 and 2" in error[1]  # with its name before it, unless a library has taught it to be pickled
        assert "3 and 4" in worse[1]
        assert full == (True, "[Errno 28] No space left on device")
        assert "lock" in unsent[1]
        assert "not in this house" in refused[1]
        assert "it went wrong" in exits[1]
        assert job.storage is not None
        assert job.storage.load_job(job.id)["metadata"]["key"] == "fine"


class SlowStorage(OtherProcessStorage):
    """Does not answer before the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.was_called = Latch()
        self.may_answer = threading.Event()

    def get_value(self, search_id: str, key: str) -> Any:
        self.was_called.open()
        assert self.may_answer.wait(WAIT_S)
        return "late"


def asking(flags: Flags) -> Callable[[RunningJob], Any]:
    """Make a run-function whose job 0 asks the storage."""

    def function(job: RunningJob) -> Any:
        flags.put(f"pid-{job['x']}", os.getpid())
        return [job.storage.load_search_value("0", "key"), job.stopped()] if job["x"] == 0 else job["x"]

    return function


def test_a_kill_does_not_wait_for_a_slow_storage(flags: Flags) -> None:
    storage = SlowStorage()
    with make(asking(flags), storage=storage, job_timeout=0.2, kill_grace=0.2) as evaluator:
        evaluator.submit(configurations(2))
        (job,) = evaluator.gather("BATCH", 1)
        assert timed_out(job)
        assert "did not stop" not in str(job.error)
        gone(flags, "pid-0")
        storage.may_answer.set()
        assert outputs(evaluator.gather("ALL")) == [1]


def test_a_close_does_not_wait_for_a_slow_storage(flags: Flags) -> None:
    storage = SlowStorage()
    with make(asking(flags), storage=storage, kill_grace=0.2) as evaluator:
        evaluator.submit(configurations(2))
        storage.was_called.wait()
        stopped = evaluator.close()
        assert len(stopped) == 2
        assert "did not stop" not in str([job.error for job in stopped])
        gone(flags, "pid-0")
        storage.may_answer.set()
        evaluator.submit([{"x": 2}])
        assert outputs(evaluator.gather("ALL")) == [2]


def test_a_job_that_is_asked_to_stop_still_has_the_reply_to_its_call(flags: Flags) -> None:
    storage = SlowStorage()
    with make(asking(flags), storage=storage, job_timeout=0.2, kill_grace=WAIT_S) as evaluator:
        evaluator.submit(configurations(1))
        until(lambda: evaluator.jobs[0].status is JobStatus.CANCELLING)
        storage.may_answer.set()
        (job,) = evaluator.gather("ALL")
        assert timed_out(job)
        assert job.metadata["returned"] == ["late", True]


def test_objects_of_local_classes_can_be_stored_from_a_job() -> None:
    class Note:
        def __init__(self, text: str) -> None:
            self.text = text

    def function(job: RunningJob) -> Any:
        job.storage.store_job_metadata(str(job.id), "note", Note("hello"))
        found = job.storage.load_metadata_from_all_jobs("0", "note")
        return [note.text for note in found], isinstance(found[0], Note)

    assert results(function, configurations(1)) == [(["hello"], True)]


def test_each_job_has_a_stopper_of_its_own() -> None:
    def function(job: RunningJob) -> Any:
        for step in range(10):
            job.record(step, job["x"] + step)
            if job.stopped():
                break
        return job.objective

    with make(function, num_workers=2) as evaluator:
        evaluator._stopper = runfunctions.Patience()
        evaluator.submit(configurations(4))
        assert outputs(evaluator.gather("ALL")) == [2, 3, 4, 5]
        assert [evaluator.storage.load_job(job.id)["metadata"]["seen"] for job in evaluator.jobs] == [3] * 4


def test_jobs_may_talk_through_the_storage() -> None:
    def function(job: RunningJob) -> Any:
        store = job.storage
        if job["x"] == 0:
            store.store_search_value("0", "token", "from the first")
            return None
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                return store.load_search_value("0", "token")
            except KeyError:
                time.sleep(0.002)
        return "never"

    jobs = run(function, [{"x": 1}, {"x": 0}], num_workers=2)
    assert jobs[0].output == "from the first"


def test_a_thread_that_a_job_left_behind_harms_nobody() -> None:
    def function(job: RunningJob) -> Any:
        def go_on() -> None:
            for step in range(2000):
                try:
                    job.record(step, 1.0)
                except Exception:  # noqa: BLE001 - it may be told that its job has ended
                    return

        if job["x"] == 0:
            threading.Thread(target=go_on).start()
        return job["x"]

    with make(function) as evaluator:
        for _ in range(4):
            for x in (0, *[1] * 20):
                assert evaluator.evaluate({"x": x}).error is None


def test_an_extended_execute_hears_of_every_end() -> None:
    class Extended(ProcessPoolEvaluator):
        async def execute(self, job: Job) -> Job:
            done = await super().execute(job)
            done.metadata["seen"] = done.error is None
            return done

    def function(job: RunningJob) -> Any:
        if job["kind"] == "slow":
            time.sleep(60)
        runfunctions.go_wrong(job["kind"])  # nothing, of kinds that it does not know
        return job["kind"]

    with Extended(function, num_workers=2, job_timeout=1.5, kill_grace=0.2) as evaluator:
        evaluator.submit([{"kind": kind} for kind in ("fine", "exit", "slow", "raise", "kill", "fine")])
        evaluator.gather("ALL")
        fine, exited, slow, raised, killed, also_fine = evaluator.jobs
    assert [(job.output, job.metadata["seen"]) for job in (fine, also_fine)] == [("fine", True)] * 2
    reasons = [job.error and (job.error.kind, job.error.type) for job in (exited, slow, raised, killed)]
    assert reasons == [("worker_died", None), ("timeout", None), ("exception", "ValueError"), ("worker_died", None)]
    assert exited.error is not None
    assert exited.error.exit_code == runfunctions.EXIT_CODE


# -- what a job prints -------------------------------------------------------------------------------------------------


def test_what_a_job_prints_is_kept() -> None:
    jobs = run(runfunctions.chatter, configurations(3), capture_output=True, batching=3)
    for number in (0, 2):
        job = jobs[number]
        assert sorted((job.stdout or "").splitlines()) == [f"below {number}", f"out {number}"]
        assert job.stderr == f"err {number}\n"
        assert job.metadata["stdout"] == job.stdout
    died = jobs[1]
    assert died.error is not None
    assert died.error.signal == signal.SIGSEGV
    assert "last words" in (died.stdout or "")
    assert (died.stderr or "").startswith("err 1\n")


def test_of_much_output_the_tail_is_kept() -> None:
    def function(job: RunningJob) -> None:
        for number in range(100_000):
            print(number)

    (job,) = run(function, configurations(1), capture_output=100)
    assert job.error is None
    assert job.stdout is not None
    assert len(job.stdout) == 100
    assert job.stdout.endswith("99998\n99999\n")


def test_what_holds_the_output_of_a_dead_worker_holds_nothing_up() -> None:
    def function(job: RunningJob) -> None:
        print("before", flush=True)
        runfunctions.start_sleeper()  # it has the same stdout
        os._exit(runfunctions.EXIT_CODE)

    (job,) = run(function, configurations(1), capture_output=True)
    assert job.error is not None
    assert (job.error.exit_code, job.stdout) == (runfunctions.EXIT_CODE, "before\n")


def test_what_a_stopped_job_printed_is_kept() -> None:
    def function(job: RunningJob) -> None:
        print("before", flush=True)
        while not job.stopped():
            time.sleep(0.002)
        print("asked to stop", flush=True)
        time.sleep(60)

    (job,) = run(function, configurations(1), capture_output=True, job_timeout=0.3, kill_grace=0.3)
    assert timed_out(job)
    assert job.stdout == "before\nasked to stop\n"


@pytest.mark.parametrize("bad", [0, -1, 1.5, "all"])
def test_how_much_is_kept_must_be_a_number(bad: Any) -> None:
    with pytest.raises(ValueError, match="capture_output"):
        make(double, capture_output=bad)


# -- stopping jobs -----------------------------------------------------------------------------------------------------


def deaf(flags: Flags, how: str, seconds: float = 60) -> Callable[[RunningJob], Any]:
    """Make a run-function that says that it runs, and would go on for so long whoever asks it to stop."""

    def function(job: RunningJob) -> Any:
        if how == "ignores":
            runfunctions.ignore_requests()
        flags.put(f"sleeper-{job['x']}", runfunctions.start_sleeper())
        flags.put(f"pid-{job['x']}", os.getpid())
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if how == "gil":
                runfunctions.hold_the_gil(seconds)
            elif how != "spins":
                time.sleep(seconds)
        return "never stopped"

    return function


async def deaf_coroutine(job: RunningJob) -> Any:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


def gone(flags: Flags, *names: str) -> None:
    for name in names:
        pid = int(flags.text(name))
        until(lambda pid=pid: not is_alive(pid))  # type: ignore[misc] # mypy does not infer the default


DEAF = ["sleeps", "spins", "ignores", "gil"]


@pytest.mark.parametrize("how", DEAF)
def test_a_job_that_runs_too_long_is_killed_with_all_it_started(how: str, flags: Flags) -> None:
    function = deaf(flags, how)

    def either(job: RunningJob) -> Any:
        return function(job) if job["x"] == 1 else job["x"]

    with make(either, num_workers=2, job_timeout=0.4, kill_grace=0.2, job_class=HPOJob) as evaluator:
        evaluator.submit(configurations(5))
        jobs = by_x(evaluator.gather("ALL"))
        assert timed_out(jobs[1])
        assert jobs[1].error is not None
        assert "job_timeout=0.4" in jobs[1].error.message
        assert isinstance(jobs[1], HPOJob)
        assert jobs[1].objective == "F_timeout"
        assert [jobs[x].output["objective"] for x in (0, 2, 3, 4)] == [0, 2, 3, 4]
        gone(flags, "pid-1", "sleeper-1")
        evaluator.submit(configurations(1))
        assert errors(evaluator.gather("ALL")) == []


def test_a_coroutine_that_will_not_be_cancelled_is_killed() -> None:
    (job,) = run(deaf_coroutine, configurations(1), job_timeout=0.3, kill_grace=0.2)
    assert timed_out(job)


def test_a_coroutine_is_cancelled_and_may_tidy_up(flags: Flags) -> None:
    async def function(job: RunningJob) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            flags.put("tidy", job.status.name)

    (job,) = run(function, configurations(1), job_timeout=0.3, kill_grace=15.0)
    assert timed_out(job)
    assert flags.text("tidy") == "CANCELLING"


def test_a_job_that_stops_within_the_grace_is_not_waited_for(flags: Flags) -> None:
    began = time.monotonic()
    (job,) = run(polite(flags), configurations(1), job_timeout=0.3, kill_grace=40.0)
    assert time.monotonic() - began < 20  # far less than the grace
    assert timed_out(job)
    assert job.metadata["returned"] == "stopped: CANCELLING"


def test_what_a_job_started_is_asked_to_stop_too(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        script = f"trap 'touch {flags.folder}/told; exit' TERM; while :; do sleep 0.01; done"
        with subprocess.Popen(["sh", "-c", script]):  # which ends when it is told, and the job with it
            pass
        return "all tidy"

    (job,) = run(function, configurations(1), job_timeout=0.5, kill_grace=15.0)
    assert timed_out(job)
    assert flags.up("told")
    assert job.metadata["returned"] == "all tidy"


@pytest.mark.parametrize("closed", ["1>&- 2>&-", "0<&- 1>&- 2>&-"])
@pytest.mark.parametrize("kwargs", [{}, {"capture_output": True}, {"job_timeout": 20}], ids=["", "captured", "limited"])
def test_the_program_may_have_closed_its_standard_streams(closed: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    program = write(
        tmp_path / "daemon.py",
        f"""
        import os
        from pathlib import Path
        from paraval import Evaluator

        def run(job):
            print("to stdout")
            os.system("echo to stdout, too")
            return job["x"]

        with Evaluator.create(run, "process", {{"num_workers": 2, **{kwargs!r}}}) as evaluator:
            evaluator.timeout = 15
            evaluator.submit([{{"x": x}} for x in range(8)])
            jobs = evaluator.gather("ALL")
        Path("told.txt").write_text(str(sorted((job.output, job.error is None) for job in jobs)))
        """,
    )
    subprocess.run(["sh", "-c", f"exec {sys.executable} {program} {closed}"], cwd=tmp_path, check=True, timeout=40)
    assert (tmp_path / "told.txt").read_text() == str([(x, True) for x in range(8)])


def test_what_has_taken_the_number_of_a_standard_stream_is_not_a_workers_output(tmp_path: Path) -> None:
    program = write(
        tmp_path / "daemon.py",
        """
        import os
        from pathlib import Path
        from paraval import Evaluator

        os.close(1), os.close(2)
        assert [os.open(name, os.O_WRONLY | os.O_CREAT) for name in ("one", "two")] == [1, 2]  # not to be inherited

        def run(job):
            os.write(1, b"stray"), os.write(2, b"stray")
            return [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]

        with Evaluator.create(run, "process", {"job_timeout": 20}) as evaluator:
            Path("told.txt").write_text(str(evaluator.evaluate({}).output))
        """,
    )
    subprocess.run([sys.executable, program], cwd=tmp_path, check=True, timeout=40)
    assert (tmp_path / "told.txt").read_text() == "['/dev/null', '/dev/null']"


@pytest.mark.parametrize(("workers", "has_boards"), [(1, True), (1_000_000, False)])
def test_where_files_are_scarce_there_are_no_boards(workers: int, has_boards: bool) -> None:
    backend = ProcessBackend(
        echo, max_jobs_per_worker=None, initializer=None, capture=None, num_workers=workers, has_limit=True
    )
    assert backend.has_boards is has_boards


def test_without_a_grace_it_is_killed_at_once(flags: Flags) -> None:
    (job,) = run(deaf(flags, "sleeps"), configurations(1), job_timeout=0.3, kill_grace=0)
    assert timed_out(job)


@pytest.mark.parametrize("how", ["import", "initializer"])
def test_the_time_of_a_job_begins_when_its_worker_is_set_up(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "slow_to_import.py",
        """
        import os, time
        if os.environ.get("PARAVAL_TEST_DRIVER") != str(os.getpid()):
            time.sleep(1)

        def run(job):
            return job["x"]
        """,
    )
    monkeypatch.setenv("PARAVAL_TEST_DRIVER", str(os.getpid()))
    monkeypatch.syspath_prepend(tmp_path)
    slow = importlib.import_module("slow_to_import")
    monkeypatch.delitem(sys.modules, "slow_to_import", raising=False)
    monkeypatch.setitem(sys.modules, "slow_to_import", slow)
    kwargs: dict[str, Any] = {"initializer": lambda: time.sleep(1)} if how == "initializer" else {}
    function = slow.run if how == "import" else echo
    jobs = run(function, configurations(3), job_timeout=0.5, **kwargs)
    assert errors(jobs) == []


def test_the_budget_of_an_evaluator_holds_while_a_worker_is_set_up() -> None:
    with make(echo, initializer=lambda: time.sleep(60), kill_grace=0.2) as evaluator:
        evaluator.timeout = 0.4
        evaluator.submit(configurations(2))
        assert all(timed_out(job) for job in evaluator.gather("ALL"))


@pytest.mark.parametrize("method", ["process", LOKY])
@pytest.mark.parametrize("limit", [0.4, 1.1])  # above a second, several messages may be with a worker
def test_a_job_in_a_batch_that_holds_the_gil_is_killed_alone(method: str, limit: float, flags: Flags) -> None:
    function = deaf(flags, "gil", seconds=30)

    def either(job: RunningJob) -> Any:
        if job["x"] == 2:
            flags.count("runs")
            return function(job)
        return job["x"]

    kwargs = {"batching": 5, "job_timeout": limit, "kill_grace": 0.2}
    with Evaluator.create(either, method, kwargs) as evaluator:
        evaluator.submit(configurations(5))
        jobs = by_x(evaluator.gather("ALL"))
        assert timed_out(jobs[2])
        assert [jobs[x].output for x in (0, 1, 3, 4)] == [0, 1, 3, 4]
        assert flags.text("count-runs") == "1"
        assert jobs[2].error is not None
        assert jobs[2].error.attempts == 1
        gone(flags, "pid-2", "sleeper-2")


@pytest.mark.parametrize("method", ["process", LOKY])
def test_a_job_in_a_batch_that_holds_the_gil_may_end_within_the_grace(method: str, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 2:
            runfunctions.hold_the_gil(60)  # which the signal ends
            return f"stopped: {job.stopped()}"
        flags.put(f"count-{job['x']}", flags.count(str(job["x"])))
        return "asked to stop" if job.stopped() else job["x"]

    kwargs = {"batching": 5, "job_timeout": 0.5, "kill_grace": 40.0}
    with Evaluator.create(function, method, kwargs) as evaluator:
        evaluator.submit(configurations(5))
        jobs = by_x(evaluator.gather("ALL"))
    assert timed_out(jobs[2])
    assert jobs[2].metadata["returned"] == "stopped: True"
    assert [jobs[x].output for x in (0, 1, 3, 4)] == [0, 1, 3, 4]
    assert [flags.text(f"count-{x}") for x in (0, 1, 3, 4)] == ["1"] * 4


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("anyio_backend", "batching"),
    [
        ("asyncio", "auto"),
        pytest.param("trio", "auto", marks=needs_trio),
        pytest.param("trio", 5, marks=needs_trio),
    ],
)
async def test_what_ended_in_time_has_done_so_whatever_the_loop_was_busy_with(batching: Any) -> None:
    def function(job: RunningJob) -> Any:
        time.sleep(0.05)
        return job["x"]

    async with make(function, batching=batching, job_timeout=0.4, kill_grace=0.2) as evaluator:
        for _ in range(2):
            await evaluator.submit_async(configurations(5))
            await anyio.sleep(0.06)
            time.sleep(0.6)  # noqa: ASYNC251 - a caller that blocks its own loop
            jobs = await soon(evaluator.gather_async("ALL"))
            assert errors(jobs) == []


@pytest.mark.anyio
@two_loops
async def test_what_raised_in_time_has_its_next_attempt_even_if_it_is_heard_late(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.wait("go")
        raise ConnectionError(job["x"])

    kwargs = {"job_timeout": 10.0, "kill_grace": 0.2, "max_attempts": 2, "retry_on": ConnectionError}
    async with make(function, **kwargs) as evaluator:
        await evaluator.submit_async(configurations(1))
        (job,) = evaluator.jobs
        await until_async(lambda: job.status is JobStatus.RUNNING and bool(evaluator._life.engine))
        engine: Any = evaluator._life.engine
        (worker,) = engine._workers
        process = worker._slot._process
        await until_async(lambda: process.is_ready)
        flags.put("go")  # and from here on this loop hears nothing
        assert select.select([process._socket], [], [], WAIT_S)[0], "the worker has not said that it raised"
        engine._watch.interrupt(worker, job, out_of_time(10.0))
        (job,) = await soon(evaluator.gather_async("ALL"))
    assert job.error is not None
    assert (job.error.type, job.error.attempts, job.status) == ("ConnectionError", 2, JobStatus.DONE)


def test_what_ended_as_it_was_asked_to_has_not_ended_in_time(flags: Flags) -> None:
    """The driver counts from when it has sent a job; the worker was late to begin it."""

    def function(job: RunningJob) -> Any:
        if job["x"] == 0:
            return os.getpid()
        flags.put("began")
        while not job.stopped():
            time.sleep(0.001)
        return "asked"

    with make(function, job_timeout=1.0, kill_grace=40.0) as evaluator:
        worker = evaluator.evaluate({"x": 0}).output
        os.kill(worker, signal.SIGSTOP)
        evaluator.submit([{"x": 1}])
        time.sleep(0.3)
        assert not flags.up("began")
        os.kill(worker, signal.SIGCONT)
        (job,) = evaluator.gather("ALL")
    assert timed_out(job)
    assert job.metadata["returned"] == "asked"
    ran = job.timing.ran
    assert ran is not None
    assert ran < 1.0


@pytest.mark.parametrize("method", ["process", LOKY])
def test_to_forbid_that_more_begin_is_of_one_message_only(method: str, flags: Flags) -> None:
    """As it is where the job to be stopped ends at that moment after all: nobody takes it back."""

    def function(job: RunningJob) -> Any:
        flags.put(f"count-{job['x']}", flags.count(str(job["x"])))
        if job["x"] == 0:
            flags.put("began")
            flags.wait("go")
        return job["x"]

    with Evaluator.create(function, method, {"batching": 4, "job_timeout": 60}) as evaluator:
        evaluator.submit(configurations(4))
        flags.wait("began")
        engine = evaluator._life.engine
        assert engine is not None
        (worker,) = engine._workers
        process: Any = cast("Any", worker._slot)._process
        process.board.hold(process._posted)
        flags.put("go")
        jobs = evaluator.gather("ALL")
        evaluator.submit([{"x": x} for x in range(4, 12)])
        assert sorted(outputs(jobs + evaluator.gather("ALL"))) == list(range(12))
    assert [flags.text(f"count-{x}") for x in range(12)] == ["1"] * 12


def test_the_one_job_that_could_be_sent_has_its_grace(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.count("runs")
        while not job.stopped():
            time.sleep(0.002)
        return "asked"

    with make(function, batching=3, job_timeout=0.4, kill_grace=40.0) as evaluator:
        evaluator.submit([{"x": threading.Lock()}, {"x": threading.Lock()}, {"x": 2}])
        jobs = evaluator.gather("ALL")
    (stopped,) = (job for job in jobs if job.args["x"] == 2)
    assert timed_out(stopped)
    assert stopped.metadata["returned"] == "asked"
    assert flags.text("count-runs") == "1"


def test_jobs_that_hold_the_gil_in_turn_have_each_their_own_time() -> None:
    def function(job: RunningJob) -> Any:
        runfunctions.hold_the_gil(0.4)
        return job["x"]

    jobs = run(function, configurations(4), batching=4, job_timeout=0.9, kill_grace=0.2)
    assert errors(jobs) == []


@pytest.mark.parametrize("how", ["ignores", "gil"])
def test_the_budget_stops_what_runs_and_what_waits_never_starts(how: str, flags: Flags) -> None:
    storage = CountingStorage()
    with make(deaf(flags, how), num_workers=2, kill_grace=0.2, storage=storage) as evaluator:
        evaluator.submit(configurations(6))
        flags.wait("pid-0", "pid-1")
        evaluator.timeout = 0.05
        jobs = evaluator.gather("ALL")
        assert len(jobs) == 6
        assert all(timed_out(job) for job in jobs)
        gone(flags, "pid-0", "pid-1", "sleeper-0", "sleeper-1")
        assert len(flags.names("pid-")) == 2
        assert set(storage.terminal.values()) == {1}
        evaluator.submit(configurations(2))
        assert all(timed_out(job) for job in evaluator.gather("ALL"))
        assert len(flags.names("pid-")) == 2


@pytest.mark.parametrize("how", ["ignores", "gil"])
def test_close_ends_running_jobs(how: str, flags: Flags) -> None:
    storage = CountingStorage()
    evaluator = make(deaf(flags, how), num_workers=2, kill_grace=0.2, storage=storage)
    evaluator.submit(configurations(4))
    flags.wait("pid-0", "pid-1")
    cancelled = evaluator.close()
    assert sorted(job.args["x"] for job in cancelled) == [0, 1, 2, 3]
    assert {job.status for job in cancelled} == {JobStatus.CANCELLED}
    assert {job.error.kind for job in cancelled if job.error} == {"cancelled"}
    gone(flags, "pid-0", "pid-1", "sleeper-0", "sleeper-1")
    assert len(flags.names("pid-")) == 2
    assert set(storage.terminal.values()) == {1}
    assert len(storage.terminal) == 4


def test_close_lets_a_job_stop_within_the_grace(flags: Flags) -> None:
    evaluator = make(polite(flags), kill_grace=40.0)
    evaluator.submit(configurations(1))
    flags.wait("pid-0")
    (job,) = evaluator.close()
    assert job.status is JobStatus.CANCELLED
    assert job.metadata["returned"] == "stopped: CANCELLING"
    assert evaluator.gather("ALL") == []
    evaluator.submit([{"x": 1}])  # it can be used again
    flags.put("go-1")
    assert outputs(evaluator.gather("ALL")) == [1]
    evaluator.close()


@pytest.mark.parametrize("hold", [False, True], ids=["", "gil"])
def test_many_jobs_sent_ahead_are_all_stopped(hold: bool, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put(f"pid-{job['x']}", os.getpid())
        if hold:
            runfunctions.hold_the_gil(60)
        time.sleep(60)

    storage = CountingStorage()
    evaluator = make(function, num_workers=2, batching=100, kill_grace=0.2, storage=storage)
    evaluator.submit(configurations(200))
    until(lambda: len(flags.names("pid-")) == 2)
    cancelled = evaluator.close()
    assert len(cancelled) == 200
    assert {job.status for job in cancelled} == {JobStatus.CANCELLED}
    assert len(flags.names("pid-")) == 2
    assert len(storage.terminal) == 200
    assert set(storage.terminal.values()) == {1}


def test_processes_that_a_job_left_behind_end_with_its_worker(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        return runfunctions.start_sleeper(), os.getpid()

    with make(function, max_jobs_per_worker=2, batching=False) as evaluator:
        evaluator.submit(configurations(3))
        (first, one), (second, two), (third, three) = outputs(evaluator.gather("ALL"))
        assert len({one, two, three}) == 2
        left = [pid for pid, worker in ((first, one), (second, two), (third, three)) if worker != three]
        until(lambda: not any(is_alive(pid) for pid in left))
    until(lambda: not is_alive(third))


def test_a_worker_with_a_thread_that_never_ends_is_ended() -> None:
    def function(job: RunningJob) -> int:
        threading.Thread(target=time.sleep, args=(60,)).start()
        return os.getpid()

    (pid,) = results(function, configurations(1))
    until(lambda: not is_alive(pid))


def test_a_worker_that_dies_is_noticed_though_its_children_hold_on_to_its_socket(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        forked = os.fork()
        if forked == 0:
            time.sleep(60)
        flags.put("forked", forked)
        os._exit(runfunctions.EXIT_CODE)

    (job,) = run(function, configurations(1))
    assert job.error is not None
    assert (job.error.kind, job.error.exit_code) == ("worker_died", 7)
    gone(flags, "forked")


def test_a_fork_of_a_worker_that_comes_back_does_no_harm() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] % 50 == 0:
            os.fork()
        return job["x"]

    jobs = run(function, configurations(300), num_workers=2, batching=1)
    assert [job.output for job in jobs] == list(range(300))


def test_an_idle_worker_that_is_killed_costs_no_job() -> None:
    with make(runfunctions.pid) as evaluator:
        first = evaluator.evaluate({"x": 0}).output
        os.kill(first, signal.SIGKILL)
        until(lambda: not is_alive(first))
        job = evaluator.evaluate({"x": 0})
        assert job.error is None
        assert job.output != first


# -- stopping one job among others: on every event loop ---------------------------------------------------------------


@pytest.mark.anyio
async def test_all_kinds_of_ends_on_every_loop(flags: Flags) -> None:
    function = deaf(flags, "sleeps")

    def mixed(job: RunningJob) -> Any:
        match job["x"]:
            case 3:
                return function(job)
            case 5:
                os._exit(runfunctions.EXIT_CODE)
            case 7:
                raise ValueError("seven")
        return job["x"]

    storage = CountingStorage()
    kwargs: dict[str, Any] = {"num_workers": 2, "job_timeout": 0.4, "kill_grace": 0.2, "storage": storage}
    async with make(mixed, **kwargs) as evaluator:
        await evaluator.submit_async(configurations(30))
        jobs = by_x(await soon(evaluator.gather_async("ALL")))
    assert len(jobs) == 30
    assert set(storage.terminal.values()) == {1}
    assert timed_out(jobs[3])
    reasons = [error and (error.kind, error.exit_code, error.type) for error in (jobs[5].error, jobs[7].error)]
    assert reasons == [("worker_died", 7, None), ("exception", None, "ValueError")]
    assert errors([job for x, job in jobs.items() if x not in (3, 5, 7)]) == []


@pytest.mark.anyio
async def test_a_flood_on_every_loop() -> None:
    storage = CountingStorage()
    async with make(double, num_workers=2, storage=storage) as evaluator:
        await evaluator.submit_async(configurations(1000))
        jobs = await soon(evaluator.gather_async("ALL"))
        one_by_one = [job async for job in _as_completed(evaluator, 20)]
    assert outputs(jobs) == [x * 2 for x in range(1000)]
    assert len(one_by_one) == 20
    assert set(storage.terminal.values()) == {1}
    assert len(storage.terminal) == 1020


async def _as_completed(evaluator: Evaluator, count: int) -> Any:
    await evaluator.submit_async(configurations(count))
    async for job in evaluator.as_completed():
        yield job


@pytest.mark.anyio
@two_loops
async def test_cancelling_the_caller_kills_its_job_alone(flags: Flags) -> None:
    function = deaf(flags, "sleeps")

    def either(job: RunningJob) -> Any:
        if job["x"] == 0:
            return function(job)
        flags.put(f"pid-{job['x']}", os.getpid())
        flags.wait("go")
        return job["x"]

    async with make(either, num_workers=2, kill_grace=0.2) as evaluator:
        await evaluator.submit_async([{"x": 1}])
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(evaluator.evaluate_async, {"x": 0})
                await until_async(lambda: flags.up("pid-0") and flags.up("pid-1"))
                scope.cancel()
        assert not is_alive(int(flags.text("pid-0")))
        assert is_alive(int(flags.text("pid-1")))
        flags.put("go")
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [1]
        assert (await soon(evaluator.evaluate_async({"x": 2}))).output == 2
        statistics = evaluator.statistics()
        assert (statistics.cancelled, statistics.done, statistics.failed) == (1, 2, 0)


@pytest.mark.anyio
@two_loops
async def test_aclose_ends_running_jobs(flags: Flags) -> None:
    async with make(deaf(flags, "gil"), num_workers=2, kill_grace=0.2) as evaluator:
        await evaluator.submit_async(configurations(3))
        await until_async(lambda: flags.up("pid-0") and flags.up("pid-1"))
        assert len(await soon(evaluator.aclose())) == 3
        gone(flags, "pid-0", "pid-1", "sleeper-0", "sleeper-1")


@pytest.mark.anyio
@two_loops
async def test_a_kill_does_not_wait_for_a_slow_storage_async(flags: Flags) -> None:
    storage = SlowStorage()
    async with make(asking(flags), storage=storage, kill_grace=0.2) as evaluator:
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 0})
            await soon(storage.was_called.opened())
            group.cancel_scope.cancel()
        gone(flags, "pid-0")
        storage.may_answer.set()
        assert (await soon(evaluator.evaluate_async({"x": 1}))).output == 1


@pytest.mark.anyio
@two_loops
async def test_the_loop_is_free_while_a_worker_starts_and_a_job_runs(flags: Flags) -> None:
    async with make(polite(flags)) as evaluator, anyio.create_task_group() as group:
        await evaluator.submit_async(configurations(1))
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while not flags.up("go-0"):
                turns += 1
                await anyio.lowlevel.checkpoint()

        group.start_soon(turn)
        await until_async(lambda: flags.up("pid-0"))
        assert turns > 10
        flags.put("go-0")
        assert outputs(await soon(evaluator.gather_async("ALL"))) == [0]


async def cancel_one(evaluator: Evaluator, flags: Flags, before: list[Any], after: list[Any]) -> list[Job]:
    """Send jobs ahead in one batch, with one among them that is evaluated; cancel that; give the others."""
    evaluator.submit([{"x": "holds the worker"}])
    await until_async(lambda: flags.up("holds"))
    evaluator.submit(before)
    async with anyio.create_task_group() as group:
        group.start_soon(evaluator.evaluate_async, {"x": "cancelled"})
        await until_async(lambda: evaluator.statistics().submitted == len(before) + 2)
        evaluator.submit(after)
        flags.put("go")
        await until_async(lambda: flags.up("began"))
        group.cancel_scope.cancel()
    return await soon(evaluator.gather_async("ALL"))


@pytest.mark.anyio
@two_loops
async def test_cancelling_a_job_leaves_those_behind_it_alone(flags: Flags) -> None:
    """The first of a batch holds the GIL, so that the worker cannot say what it is at."""

    def function(job: RunningJob) -> Any:
        if job["x"] == "holds the worker":
            runfunctions.hold_the_gil(0)  # what it needs is imported now, and takes no time later
            flags.put("holds")
            flags.wait("go")
        elif job["x"] == "cancelled":
            flags.put("began")
            runfunctions.hold_the_gil(0.6)
        elif job["x"] == "long":
            end = time.monotonic() + 0.8
            while time.monotonic() < end:
                if job.stopped():
                    return "asked to stop"
                time.sleep(0.01)
        return job["x"]

    async with make(function, batching=3, kill_grace=0.3) as evaluator:
        jobs = await cancel_one(evaluator, flags, [], [{"x": "long"}, {"x": "tiny"}])
    assert errors(jobs) == []
    assert outputs(jobs) == ["holds the worker", "long", "tiny"]


@pytest.mark.anyio
@two_loops
async def test_cancelling_a_job_leaves_those_in_front_of_it_alone(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == "holds the worker":
            runfunctions.hold_the_gil(0)  # what it needs is imported now, and takes no time later
            flags.put("holds")
            flags.wait("go")
        elif job["x"] == "long":
            flags.put("began")
            runfunctions.hold_the_gil(0.6)
            return "asked to stop" if job.stopped() else "long"
        return job["x"]

    async with make(function, batching=3, kill_grace=0.3) as evaluator:
        jobs = await cancel_one(evaluator, flags, [{"x": "long"}], [{"x": "tiny"}])
    assert errors(jobs) == []
    assert outputs(jobs) == ["holds the worker", "long", "tiny"]


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["auto", 1, 16, 1000])
def test_a_long_job_delays_nobody_else(batching: Any, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 150:
            flags.put("began")
            flags.wait("go")
        return job["x"]

    storage = CountingStorage()
    with make(function, num_workers=2, batching=batching, storage=storage) as evaluator:
        evaluator.submit([{"x": -1}] * 500)  # jobs are tiny, it learns
        evaluator.gather("ALL")
        evaluator.submit(configurations(300))
        others: list[Job] = []
        while len(others) < 299:  # all but one come, while that one runs
            others += evaluator.gather("BATCH", 1)
        assert outputs(others) == [x for x in range(300) if x != 150]
        assert flags.up("began")
        long = evaluator.jobs[500 + 150]
        assert long.status is JobStatus.RUNNING
        until(lambda: storage.load_job_status(long.id) == JobStatus.RUNNING.value)
        assert evaluator.statistics().running == 1
        flags.put("go")
        assert outputs(evaluator.gather("ALL")) == [150]
    assert set(storage.terminal.values()) == {1}


def test_a_long_job_delays_no_finished_result_of_its_own_batch(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put(f"ran-{job['x']}")
        if job["x"] == 10:
            flags.wait("go")
        return job["x"]

    with make(function, batching=20) as evaluator:
        evaluator.submit(configurations(20))
        assert outputs(evaluator.gather("BATCH", 10)) == list(range(10))
        until(lambda: [job.status for job in evaluator.jobs[11:]] == [JobStatus.READY] * 9)
        flags.put("go")
        assert outputs(evaluator.gather("ALL")) == list(range(10, 20))
    assert len(flags.names("ran-")) == 20


def test_jobs_that_come_back_run_once(flags: Flags) -> None:
    """Every few jobs one is too long for its batch; whoever takes over what was behind it."""

    def function(job: RunningJob) -> Any:
        if job["x"] % 37 == 0:
            time.sleep(0.015)
        return job["x"], flags.count(str(job["x"]))

    jobs = run(function, configurations(200), num_workers=2, batching=64)
    assert [job.output for job in jobs] == [(x, 1) for x in range(200)]


def test_two_evaluators_work_at_once(flags: Flags) -> None:
    def meet(job: RunningJob, own: str, other: str) -> int:
        flags.put(own)
        flags.wait(other)
        return os.getpid()

    one = make(meet, run_function_kwargs={"own": "one", "other": "two"})
    two = make(meet, run_function_kwargs={"own": "two", "other": "one"})
    with one, two:
        one.submit(configurations(2))
        two.submit(configurations(3))
        first, second = outputs(one.gather("ALL")), outputs(two.gather("ALL"))
    assert len(first) == 2
    assert len(second) == 3
    assert not set(first) & set(second)


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [False, 10, "auto"])
def test_times_are_in_order(batching: Any) -> None:
    with make(double, num_workers=2, batching=batching) as evaluator:
        for _ in range(3):
            evaluator.submit(configurations(100))
            evaluator.gather("ALL")
        jobs = evaluator.jobs
        spans = []
        for job in jobs:
            times = job.timing
            assert None not in times
            assert list(times) == sorted(times), times  # type: ignore[type-var] # no None in it
            spans.append((times.started, times.finished))
        now = evaluator._clock()
        assert all(0 <= (finished or 0) <= now for _, finished in spans)


def test_jobs_of_one_worker_do_not_overlap() -> None:
    jobs = run(double, configurations(200), batching=20)
    spans = sorted((job.timing.started or 0, job.timing.finished or 0) for job in jobs)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_statistics(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put(f"pid-{job['x']}")
        flags.wait("go")
        if job["x"] == 0:
            raise ValueError
        if job["x"] == 1:
            os._exit(1)

    with make(function, num_workers=2) as evaluator:
        evaluator.submit(configurations(5))
        flags.wait("pid-0", "pid-1")
        until(lambda: evaluator.statistics().running == 2)
        found = evaluator.statistics()
        assert (found.submitted, found.pending, found.running, found.done) == (5, 3, 2, 0)
        flags.put("go")
        evaluator.gather("ALL")
        found = evaluator.statistics()
        assert (found.submitted, found.pending, found.running, found.done, found.failed) == (5, 0, 0, 3, 2)
        assert 0 < found.utilisation <= 1


# -- for a long time ---------------------------------------------------------------------------------------------------


def test_a_long_series_leaves_nothing_open() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] % 10 == 0:
            raise ValueError(job["x"])
        return (len(runfunctions.open_files(job)), threading.active_count()) if job["x"] % 10 == 1 else job["x"]

    with make(function, num_workers=2, storage=CountingStorage()) as evaluator:

        def a_round(count: int) -> tuple[int, set[threading.Thread], int, set[Any]]:
            evaluator.submit(configurations(count))
            jobs = evaluator.gather("ALL")
            assert len(jobs) == count
            assert sorted(job.args["x"] for job in jobs if job.failed) == list(range(0, count, 10))
            inside = {job.output for job in jobs if job.args["x"] % 10 == 1}
            return len(open_files()), set(threading.enumerate()), len(children()), inside

        files, threads, processes, inside = a_round(1000)
        files_after, threads_after, processes_after, inside_after = a_round(20_000)
        assert files_after <= files
        assert threads_after <= threads
        assert processes_after == processes
        assert max(number for number, _ in inside_after) <= max(number for number, _ in inside)
        assert {count for _, count in inside_after} == {1}
        assert isinstance(evaluator.storage, CountingStorage)
        assert set(evaluator.storage.terminal.values()) == {1}


def test_evaluators_that_come_and_go_leave_nothing() -> None:
    def once() -> None:
        assert results(double, configurations(2), num_workers=1) == [0, 2]

    once()
    files, threads, processes = len(open_files()), set(threading.enumerate()), children()
    for _ in range(50):
        once()
    assert len(open_files()) <= files
    assert set(threading.enumerate()) <= threads
    assert children() <= processes


def test_workers_that_die_leave_nothing() -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] % 3 == 0:
            os._exit(1)
        return job["x"]

    def rounds(count: int) -> tuple[int, set[threading.Thread], set[int]]:
        with make(function, num_workers=2) as evaluator:
            for _ in range(count):
                evaluator.submit(configurations(4))
                assert sum(job.failed for job in evaluator.gather("ALL")) == 2
                assert len(children() - before) <= 2
        return len(open_files()), set(threading.enumerate()), children()

    before = children()
    files, threads, processes = rounds(1)
    _, threads_after, processes_after = rounds(10)
    until(lambda: len(open_files()) <= files)
    assert threads_after <= threads
    assert processes_after <= processes


def test_workers_killed_at_random() -> None:
    """Whatever moment a worker is killed at: at most the job that it ran fails, and never another."""

    def function(job: RunningJob) -> Any:
        end = time.monotonic() + job["x"] % 7 / 1000
        while time.monotonic() < end:
            pass
        return job["x"]

    for attempts in (1, 50):
        storage = CountingStorage()
        with make(function, num_workers=2, max_attempts=attempts, storage=storage) as evaluator:
            before = children()
            evaluator.submit(configurations(300))
            random_ = random.Random(attempts)
            killed: set[int] = set()
            jobs: list[Job] = []
            while evaluator.statistics().done + evaluator.statistics().failed < 300:
                if len(killed) < 15 and (alive := sorted(pid for pid in children() - before if is_alive(pid))):
                    pid = random_.choice(alive)
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                jobs += evaluator.gather("BATCH", 1)
            jobs += evaluator.gather("ALL")
        assert len(jobs) == 300
        assert len(storage.terminal) == 300
        assert set(storage.terminal.values()) == {1}
        failed = [job.error for job in jobs if job.error is not None]
        assert all((error.kind, error.signal) == ("worker_died", signal.SIGKILL) for error in failed)
        guilty = [error.pid for error in failed]
        assert set(guilty) <= killed
        assert len(set(guilty)) == len(guilty)
        assert sorted(job.output for job in jobs if job.error is None) == sorted(
            job.args["x"] for job in jobs if job.error is None
        )
        if attempts > 1:
            assert failed == []


# -- short jobs, of which a worker is sent several ---------------------------------------------------------------------


def short(folder: Path, deadly: int, how: str) -> Callable[[RunningJob], int]:
    def function(job: RunningJob) -> int:
        with (folder / str(job["x"])).open("a") as log:
            log.write("x")
        if job["x"] == deadly:
            if how == "exit":
                os._exit(3)
            time.sleep(60)
        time.sleep(0.006)
        return int(job["x"])

    return function


@pytest.mark.parametrize("deadly", range(100, 106))
def test_of_short_jobs_the_one_that_ran_is_to_blame_for_the_death_of_its_worker(tmp_path: Path, deadly: int) -> None:
    """At once, and no other runs twice: those behind it had not begun."""
    jobs = run(short(tmp_path, deadly, "exit"), configurations(200), num_workers=2)
    assert {job.args["x"]: job.error.kind for job in jobs if job.error} == {deadly: "worker_died"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(x): "x" for x in range(200)}


def test_of_short_jobs_one_that_takes_too_long_is_stopped_alone(tmp_path: Path) -> None:
    jobs = run(short(tmp_path, 101, "sleep"), configurations(200), num_workers=2, job_timeout=1.1, kill_grace=0.1)
    assert [job.args["x"] for job in jobs if timed_out(job)] == [101]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(x): "x" for x in range(200)}


def test_of_short_jobs_those_behind_a_long_one_go_to_another_worker(tmp_path: Path) -> None:
    with make(short(tmp_path, 101, "sleep"), num_workers=2, kill_grace=0.1) as evaluator:
        evaluator.submit(configurations(200))
        gathered: list[Job] = []
        while len(gathered) < 199:
            gathered += evaluator.gather("BATCH", 1)
        assert sorted(outputs(gathered)) == [x for x in range(200) if x != 101]
        (stopped,) = evaluator.close()
    assert stopped.args["x"] == 101
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {str(x): "x" for x in range(200)}


# -- workers that start before the loop --------------------------------------------------------------------------------


def test_workers_that_nobody_takes_end_with_the_engine() -> None:
    """The static arguments change between the start of the workers and the first job: others take their place."""
    before = children()
    with make(scaled, num_workers=2, run_function_kwargs={"scale": 2.0}) as evaluator:
        backend = evaluator._backend
        backend.prepare(evaluator._spec, 2)
        prepared = children() - before
        assert len(prepared) == 2
        evaluator.run_function_kwargs["scale"] = 3.0
        evaluator.submit(configurations(4))
        assert outputs(evaluator.gather("ALL")) == [0.0, 3.0, 6.0, 9.0]
        evaluator.close()
        assert not prepared & children()
