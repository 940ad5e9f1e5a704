"""What a program has beside the jobs: threads all taken, pools shut down, full disks, executors that do nothing."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from paraval import Evaluator, RunningJob
from paraval.storage import MemoryStorage
from paraval.worker.board import Address, Board, BoardOfWorker
from paraval.worker.frames import place_of
from runfunctions import Flags, double
from support import WAIT_S, Stage, configurations, outputs, soon, until
from workers import TESTS, ThreadEach, by_x, error_of, errors, needs_loky, processes, threads, timed_out, worker_marks
from workers import make_in as make
from workers import run_in as run

pytestmark = worker_marks


class SlowStorage(MemoryStorage):
    """Is called in a thread, as those that wait for a disk."""

    by_reference = False


# -- the threads of the program ----------------------------------------------------------------------------------------


def noted(job: RunningJob) -> Any:
    job.record(1, 0.5)
    return job["x"] * 2


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        ("process", {"storage": SlowStorage}),
        pytest.param("loky", {}, marks=needs_loky),
        ("executor", {"executor": lambda: threads}),
        ("executor", {"executor": lambda: processes, "storage": SlowStorage}),
    ],
    ids=["process", "loky", "threads", "processes"],
)
def test_a_caller_may_hold_the_last_thread_of_the_programs(
    method: str, kwargs: dict[str, Callable[[], Any]], loop: str
) -> None:
    pytest.importorskip(loop)

    async def main() -> tuple[float, list[Any]]:
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = 1
        made = {name: value() for name, value in kwargs.items()}
        async with Evaluator.create(noted if "storage" in kwargs else double, method, made) as evaluator:

            def call() -> tuple[float, list[Any]]:
                # The loop that runs the jobs is the one that the token belongs to.
                return limiter.borrowed_tokens, [evaluator.evaluate({"x": x}).output for x in range(2)]

            return await soon(anyio.to_thread.run_sync(call, abandon_on_cancel=True))

    assert anyio.run(main, backend=loop) == (1, [0, 2])


# -- the end of pools --------------------------------------------------------------------------------------------------


class WrongEnd(ProcessPoolExecutor):
    """Is shut down, and says that it is not."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(2, mp_context=multiprocessing.get_context("forkserver"))
        self._error = error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=wait, cancel_futures=cancel_futures)
        raise self._error


@pytest.mark.parametrize("error", [RuntimeError("oh dear"), TypeError("oh dear"), SystemExit("oh dear")])
def test_what_a_shutdown_raises_is_no_job_s_failure(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def function(job: RunningJob) -> Any:
        return os._exit(3) if job["x"] == 1 else job["x"]

    jobs = run(function, lambda: WrongEnd(error), configurations(4), num_workers=2, batching=False)
    assert error_of(jobs.pop(1)) == (
        "worker_died",
        "a process of the executor ended with exit code 3 while it ran the job",
    )
    assert errors(jobs) == []
    assert outputs(jobs) == [0, 2, 3]
    assert {record.getMessage() for record in caplog.records} == {"the shutdown of the executor 'WrongEnd' failed"}
    assert {record.exc_info[1] for record in caplog.records if record.exc_info} == {error}


def test_jobs_go_on_in_a_pool_that_somebody_shuts_down(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.put(f"began-{job['x']}-{os.getpid()}")
        if job["x"] < 2:
            flags.wait(f"go-{job['x']}")
        return job["x"]

    made: list[ProcessPoolExecutor] = []

    def factory() -> ProcessPoolExecutor:
        made.append(processes())
        return made[-1]

    with make(function, factory, num_workers=2, batching=False) as evaluator:
        evaluator.submit(configurations(2))
        for x in range(2):
            until(lambda x=x: flags.names(f"began-{x}-"))  # type: ignore[misc] # a default, as it is a loop's
        ended: list[BaseException | None] = []
        somebody = threading.Thread(target=lambda: ended.append(_raised_by(made[0].shutdown)))
        somebody.start()
        # The slot of one becomes free: what comes next needs another pool, while the other is still in the first.
        flags.put("go-0")
        evaluator.gather("BATCH", 1)
        evaluator.submit([{"x": 2}])
        assert outputs(evaluator.gather("BATCH", 1)) == [2]
        flags.put("go-1")
        jobs = [*evaluator.gather("ALL"), *evaluator.jobs]
        somebody.join(WAIT_S)
    assert errors(jobs) == []
    assert len(made) == 2
    assert len(flags.names("began-1-")) == 1, "it was run again"
    assert ended == [None]


def _raised_by(function: Callable[[], object]) -> BaseException | None:
    try:
        function()
    except BaseException as exc:  # noqa: BLE001 - the test looks at it
        return exc
    return None


class Dropping(ThreadPoolExecutor):
    """Cancels every call, as a pool that is shut down by ``shutdown(cancel_futures=True)``."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        return future


class Losing(ThreadEach):
    """Loses every call to a broken pipe."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenPipeError(32, "Broken pipe"))
        return future


def test_a_job_that_a_pool_lost_is_run_by_the_next() -> None:
    pools: list[Callable[[], Executor]] = [ThreadEach, Losing]
    jobs = run(double, lambda: pools.pop()() if pools else ThreadEach(), configurations(1), num_workers=1)
    assert errors(jobs) == []
    assert outputs(jobs) == [0]
    assert not pools


@pytest.mark.parametrize(
    "executor", [lambda: ThreadPoolExecutor(1), lambda: processes(1)], ids=["threads", "processes"]
)
def test_jobs_that_somebody_drops_from_a_pool_are_run_by_the_next(
    executor: Callable[[], Executor], flags: Flags
) -> None:
    def function(job: RunningJob) -> Any:
        if job["x"] == 0:
            flags.put("began")
            flags.wait("go")
        return job["x"]

    made: list[Executor] = []

    def factory() -> Executor:
        made.append(executor())
        return made[-1]

    with make(function, factory, num_workers=6, batching=False) as evaluator:
        evaluator.submit(configurations(6))
        flags.wait("began")
        somebody = threading.Thread(target=lambda: made[0].shutdown(wait=True, cancel_futures=True))
        somebody.start()
        evaluator.gather("BATCH", 1)
        flags.put("go")
        evaluator.gather("ALL")
        somebody.join(WAIT_S)
    assert errors(evaluator.jobs) == []
    assert outputs(evaluator.jobs) == [0, 1, 2, 3, 4, 5]
    assert len(made) > 1


@pytest.mark.parametrize(
    ("executor", "what"), [(Dropping, "CancelledError: "), (Losing, "BrokenPipeError: [Errno 32] Broken pipe")]
)
@pytest.mark.parametrize("is_ours", [True, False])
def test_a_job_that_every_pool_loses_fails(executor: Callable[[], Executor], what: str, is_ours: bool) -> None:
    jobs = run(double, executor if is_ours else executor(), configurations(3), num_workers=2)
    assert [error_of(job) for job in jobs] == [("worker_died", f"the executor lost the job: {what}")] * 3


@pytest.mark.parametrize("error", [BrokenPipeError(32, "mine"), CancelledError("mine"), OSError(9, "mine")])
@pytest.mark.parametrize("executor", [threads, ThreadEach, processes])
def test_what_a_job_raises_is_its_own(executor: Callable[[], Executor], error: Exception, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.count("calls")
        raise error

    (job,) = run(function, executor, configurations(1))
    assert job.error is not None
    assert (job.error.kind, job.error.type) == ("exception", type(error).__name__)
    assert flags.count("calls") == 2


# -- no room for files -------------------------------------------------------------------------------------------------


def test_jobs_run_where_no_file_can_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "memfd_create")  # not every system has it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    jobs = run(noted, ThreadEach, configurations(6), num_workers=3)
    assert errors(jobs) == []
    assert outputs(jobs) == [0, 2, 4, 6, 8, 10]
    (record,) = caplog.records
    assert record.getMessage().startswith("jobs in the executor cannot be asked to stop: no shared file: [Errno 2]")


def test_a_job_is_out_of_time_where_no_file_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create")  # not every system has it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with Stage() as stage:

        class OnStage(ThreadEach):
            def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
                future: Future[Any] = Future()
                future.set_running_or_notify_cancel()

                def call() -> None:
                    stage.released("the executor").wait()
                    future.set_result(fn(*args, **kwargs))

                threading.Thread(target=call, daemon=True).start()
                return future

        (job,) = run(double, OnStage, configurations(1), job_timeout=0.05, kill_grace=0.05)
        assert timed_out(job)


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_a_job_is_asked_to_stop(
    monkeypatch: pytest.MonkeyPatch, flags: Flags, tmp_path_factory: pytest.TempPathFactory, is_on_disk: bool
) -> None:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    if is_on_disk:
        monkeypatch.delattr(os, "memfd_create")

    def polite(job: RunningJob) -> str:
        flags.put("files", [path.name for path in folder.iterdir()])
        until(job.stopped)
        return "asked"

    (job,) = run(polite, processes, configurations(1), job_timeout=0.05, kill_grace=WAIT_S)
    assert timed_out(job)
    assert job.metadata["returned"] == "asked"
    assert ("paraval-" in flags.text("files")) is is_on_disk
    assert list(folder.iterdir()) == []


def test_a_board_shows_which_job_runs_and_since_when() -> None:
    board = Board()
    worker = BoardOfWorker(os.dup(board.fileno()))
    assert board.pin_down(1, 9.0) is None
    assert worker.begin(place_of(1, 2), 5.0)
    assert board.pin_down(2, 9.0) is None  # it is at another message
    assert board.pin_down(1, 5.0) == (5.0, place_of(1, 2))
    assert worker.begin(place_of(1, 3), 6.0), "nothing was overdue"
    assert board.pin_down(1, 7.0) == (6.0, place_of(1, 3))
    assert not worker.begin(place_of(1, 4), 8.0)
    assert worker.begin(place_of(2, 0), 9.0), "another message is not meant"
    worker.end()
    assert board.pin_down(2, 99.0) is None
    assert board.current is None
    worker.close()
    board.close()


def test_what_is_not_the_board_is_not_touched(tmp_path: Path) -> None:
    """On another machine, a process of the same number may have something else open under the same number."""
    path = tmp_path / "precious"
    path.write_text("precious")
    with path.open("r+") as file:
        board = Board()
        link = board.address.link
        found = BoardOfWorker.at(board.address)
        assert found.begin(2, 0.5)
        assert board.current == 2
        for other in (f"/proc/self/fd/{file.fileno()}", str(path), "/proc/self/fd/none"):
            with pytest.raises(OSError, match=r"Errno|another process's"):
                BoardOfWorker.at(Address(other, link))
        address = board.address
        board.close()
        with pytest.raises(OSError, match=r"Errno|another process's"):
            BoardOfWorker.at(address)
        found.close()
    assert path.read_text() == "precious"


FULL_DISK = """
    import contextlib, os, sys, tempfile
    del os.memfd_create
    sys.path.insert(0, {tests!r})
    from test_pools import ThreadEach, run, double, configurations, outputs

    folder = tempfile.gettempdir()
    assert folder == {folder!r}
    with contextlib.suppress(OSError), open(folder + "/filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    print(outputs(run(double, ThreadEach, configurations(3))), sorted(os.listdir(folder)))
"""


def test_a_full_disk_does_not_kill_the_driver(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} && "
    in_namespace = [shutil.which("unshare") or "/usr/bin/unshare", "-rm", "sh", "-c"]
    if not Path(in_namespace[0]).exists() or subprocess.run([*in_namespace, mount + "true"], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    program = textwrap.dedent(FULL_DISK.format(tests=TESTS, folder=str(tmp_path)))
    ended = subprocess.run(
        [*in_namespace, mount + 'exec "$0" -c "$1"', sys.executable, program],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=WAIT_S * 2,
    )
    assert (ended.returncode, ended.stdout) == (0, "[0, 2, 4] ['filler']\n"), ended.stderr
    assert "No space left on device" in ended.stderr


# -- executors that do not execute -------------------------------------------------------------------------------------


class Answering(Executor):
    """Does not call what it is given."""

    answer: Any = 42

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.answer)
        return future


class AnsweringThreads(Answering, ThreadPoolExecutor):
    """Likewise."""

    answer = None


@pytest.mark.parametrize(("executor", "what"), [(Answering, "an object of type int"), (AnsweringThreads, "None")])
def test_an_executor_must_run_what_it_is_given(executor: Callable[[], Executor], what: str) -> None:
    jobs = run(double, executor, configurations(3), num_workers=2)
    message = f"the executor gave back {what} where the jobs' report should be: it must run what it is given"
    assert [error_of(job) for job in jobs] == [("worker_died", message)] * 3


class Refusing(Executor):
    """Raises in submit, once."""

    def __init__(self, answer: object) -> None:
        self._answers = [answer]
        self._good = ThreadEach()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._answers:
            answer = self._answers.pop()
            if isinstance(answer, BaseException):
                raise answer
            return answer  # type: ignore[return-value] # that is the mistake
        return self._good.submit(fn, *args, **kwargs)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt("mine"), "KeyboardInterrupt: mine"),
        (OSError("mine"), "OSError: mine"),
        (None, "TypeError: its submit() must give a Future, not NoneType"),
    ],
)
def test_what_submit_raises_is_that_job_s_failure(answer: object, what: str) -> None:
    jobs = run(double, Refusing(answer), configurations(3), num_workers=1, batching=False)
    kind, message = error_of(jobs[0])
    assert kind == "worker_died"
    assert message.startswith(f"the executor takes no job ({what})")
    assert errors(jobs[1:]) == []


def test_a_factory_that_would_end_the_program_fails_the_jobs() -> None:
    calls: list[int] = []

    def factory() -> Executor:
        calls.append(1)
        return Refusing(OSError("mine")) if len(calls) == 1 else sys.exit(3)

    jobs = by_x(run(double, factory, configurations(2)))
    for job in jobs.values():
        kind, message = error_of(job)
        assert kind == "worker_died"
        assert message.startswith("the factory of executors")
        assert message.endswith("failed: SystemExit: 3")
