"""``max_attempts`` and ``retry_on``: more than one attempt at a job, on every backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import anyio
import pytest

import runfunctions
import support
from paraval import Evaluator, HPOJob, Job, JobStatus, ParavalError, RunningJob
from paraval.callback import Callback
from runfunctions import Flags
from support import CountingStorage, configurations, outputs, run_all, soon, until, until_async
from workers import LOKY, errors, processes, timed_out, worker_marks

pytestmark = worker_marks

METHODS = ["serial", "thread", "process"]
with_processes = pytest.mark.parametrize("method", ["process", LOKY, "executor"])
every_method = pytest.mark.parametrize("method", [*METHODS, LOKY, "executor"])


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paraval.engine.running.attempts._BACK_OFF_S", 0.005)


def make(method: str, function: Callable[..., Any], **kwargs: Any) -> Evaluator:
    if method == "executor":
        kwargs["executor"] = processes
    return support.make(method, function, **kwargs)


class UnluckyError(ConnectionError):
    pass


def fails_at_first(flags: Flags, times: int, error: type[BaseException] = ConnectionError) -> Callable[..., Any]:
    """Make a run-function whose first calls for each job fail."""

    def function(job: RunningJob) -> Any:
        number = flags.count(str(job["x"]))
        if number <= times:
            raise error(f"attempt {number} of {job['x']}")
        return job["x"], number

    return function


def run(method: str, function: Callable[..., Any], count: int = 1, **kwargs: Any) -> list[Job]:
    return run_all(make(method, function, **kwargs), configurations(count))


@every_method
def test_a_job_may_fail_so_often(method: str, flags: Flags) -> None:
    storage = CountingStorage()
    function = fails_at_first(flags, 2)
    kwargs: dict[str, Any] = {"max_attempts": 3, "retry_on": ConnectionError, "num_workers": 2, "storage": storage}
    jobs = run(method, function, 5, **kwargs)
    assert errors(jobs) == []
    assert outputs(jobs) == [(x, 3) for x in range(5)]
    assert {job.status for job in jobs} == {JobStatus.DONE}
    assert len(storage.terminal) == 5
    assert set(storage.terminal.values()) == {1}


class Unanswering(type):
    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("do not ask")


class UnansweringError(Exception, metaclass=Unanswering):
    pass


@every_method
def test_a_type_is_compared_as_except_does(method: str) -> None:
    def function(job: RunningJob) -> None:
        raise (UnansweringError if job["x"] else ValueError)(str(job["x"]))

    jobs = run(method, function, 2, max_attempts=2, retry_on=UnansweringError)
    found = {job.args["x"]: job.error and (job.error.kind, job.error.message, job.error.attempts) for job in jobs}
    assert found == {0: ("exception", "0", 1), 1: ("exception", "1", 2)}


@every_method
def test_past_its_attempts_a_job_fails_with_all_of_them(method: str, flags: Flags) -> None:
    function = fails_at_first(flags, 9)
    (job,) = run(method, function, max_attempts=3, retry_on=(OSError,), job_class=HPOJob)
    error = job.error
    assert error is not None
    assert isinstance(job, HPOJob)
    assert job.objective == "F_ConnectionError"
    assert (error.kind, error.type, error.message, error.attempts) == (
        "exception", "ConnectionError", "attempt 3 of 0", 3,
    )  # fmt: skip
    assert [past.message for past in error.history] == ["attempt 1 of 0", "attempt 2 of 0"]
    for past in (*error.history, error):
        assert past.traceback is not None
        assert past.message in past.traceback
    assert job.storage is not None
    assert job.storage.get([job.id])[0].error == error
    assert job.storage.get([job.id])[0].status == JobStatus.DONE.value


@pytest.mark.parametrize(
    ("kwargs", "attempts"),
    [
        ({}, 1),
        ({"max_attempts": 3}, 1),
        ({"retry_on": ConnectionError}, 1),
        ({"max_attempts": 3, "retry_on": KeyError}, 1),
        ({"max_attempts": 3, "retry_on": UnluckyError}, 1),
        ({"max_attempts": 3, "retry_on": ()}, 1),
        ({"max_attempts": 3, "retry_on": (KeyError, OSError)}, 3),
        ({"max_attempts": 3, "retry_on": [ConnectionError]}, 3),
        ({"max_attempts": 3, "retry_on": BaseException}, 3),
    ],
)
def test_only_what_is_named_is_tried_again(method: str, flags: Flags, kwargs: dict[str, Any], attempts: int) -> None:
    (job,) = run(method, fails_at_first(flags, 9), **kwargs)
    assert job.error is not None
    assert job.error.attempts == attempts
    assert len(job.error.history) == attempts - 1
    assert flags.text("count-0") == str(attempts)


@every_method
def test_subclasses_and_local_classes_are_known(method: str, flags: Flags) -> None:
    class LocalError(Exception):
        pass

    class ChildError(LocalError):
        pass

    (job,) = run(method, fails_at_first(flags, 1, ChildError), max_attempts=2, retry_on=LocalError)
    assert job.output == (0, 2)


@every_method
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_even_the_end_of_everything_can_be_tried_again(method: str, flags: Flags, error: type[BaseException]) -> None:
    (job,) = run(method, fails_at_first(flags, 1, error), max_attempts=2, retry_on=error)
    assert job.output == (0, 2)


def test_what_the_run_function_returned_is_no_reason_to_try_again(method: str, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        flags.count("calls")
        return "F_mine" if job["x"] == 0 else None

    jobs = run(method, function, 2, max_attempts=3, retry_on=Exception, job_class=HPOJob)
    assert [job.objective for job in jobs if isinstance(job, HPOJob)] == ["F_mine", "F_TypeError"]
    assert flags.text("count-calls") == "2"


@pytest.mark.parametrize("batching", [False, 4, "auto"])
def test_other_jobs_go_on_meanwhile(method: str, flags: Flags, batching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause before the next attempt costs nobody else anything, though there is one worker."""
    monkeypatch.setattr("paraval.engine.running.attempts.random.uniform", lambda _low, _high: 60.0)

    def function(job: RunningJob) -> Any:
        if job["x"] == 0 and flags.count("0") == 1:
            raise ConnectionError
        return job["x"]

    with make(method, function, max_attempts=2, retry_on=ConnectionError, batching=batching) as evaluator:
        evaluator.submit(configurations(8))
        assert outputs(evaluator.gather("BATCH", 7)) == [1, 2, 3, 4, 5, 6, 7]


def test_each_job_is_announced_and_recorded_once(method: str, flags: Flags) -> None:
    class Log(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[str, str]] = []

        def on_launch(self, job: Job) -> None:
            self.seen.append(("launch", job.id))

        def on_done(self, job: Job) -> None:
            self.seen.append(("done", job.id))

    log = Log()
    jobs = run(
        method, fails_at_first(flags, 2), 4, max_attempts=3, retry_on=ConnectionError, num_workers=2, callbacks=[log]
    )
    assert sorted(log.seen) == sorted((event, job.id) for job in jobs for event in ("launch", "done"))


def test_times_are_those_of_the_last_attempt(method: str, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paraval.engine.running.attempts.random.uniform", lambda _low, _high: 0.1)
    (job,) = run(method, fails_at_first(flags, 1), max_attempts=2, retry_on=ConnectionError)
    times = job.timing
    assert None not in times
    assert list(times) == sorted(times)  # type: ignore[type-var] # no None in it
    assert times.queued is not None
    assert times.queued >= 0.1


def waiting(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a run-function whose job 0 fails, and then waits a minute for its next attempt."""
    monkeypatch.setattr("paraval.engine.running.attempts.random.uniform", lambda _low, _high: 60.0)
    return fails_at_first(flags, 1)


def test_a_job_between_attempts_is_pending(method: str, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    function = waiting(flags, monkeypatch)
    storage = CountingStorage()
    evaluator = make(method, function, max_attempts=2, retry_on=ConnectionError, storage=storage)
    with evaluator:
        evaluator.submit(configurations(1))
        until(lambda: flags.up("count-0") and evaluator.jobs[0].status is JobStatus.READY)
        found = evaluator.statistics()
        assert (found.submitted, found.pending, found.done, found.failed) == (1, 1, 0, 0)
        assert evaluator.jobs[0].status is JobStatus.READY
    (job,) = evaluator.jobs
    assert job.status is JobStatus.CANCELLED
    assert job.error is not None
    assert job.error.kind == "cancelled"
    assert [past.message for past in job.error.history] == ["attempt 1 of 0"]
    assert set(storage.terminal.values()) == {1}
    assert evaluator.gather("ALL") == []


def test_the_budget_ends_the_wait(method: str, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(method, waiting(flags, monkeypatch), max_attempts=2, retry_on=ConnectionError) as evaluator:
        evaluator.submit(configurations(1))
        until(lambda: flags.up("count-0") and evaluator.jobs[0].status is JobStatus.READY)
        evaluator.timeout = 0.05
        (job,) = evaluator.gather("ALL")
    assert timed_out(job)
    assert flags.text("count-0") == "1"


@pytest.mark.anyio
async def test_cancelling_the_caller_ends_the_wait(method: str, flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    function = waiting(flags, monkeypatch)
    async with make(method, function, max_attempts=2, retry_on=ConnectionError) as evaluator:
        async with anyio.create_task_group() as group:
            group.start_soon(evaluator.evaluate_async, {"x": 0})
            await until_async(lambda: flags.up("count-0") and evaluator.statistics().running == 0)
            group.cancel_scope.cancel()
        assert evaluator.statistics().cancelled == 1
    assert flags.text("count-0") == "1"


@pytest.mark.anyio
async def test_attempts_on_every_loop(method: str, flags: Flags) -> None:
    function = fails_at_first(flags, 1)
    async with make(method, function, max_attempts=2, retry_on=ConnectionError, num_workers=2) as evaluator:
        await evaluator.submit_async(configurations(4))
        jobs = await soon(evaluator.gather_async("ALL"))
        assert outputs(jobs) == [(x, 2) for x in range(4)]
        assert (await soon(evaluator.evaluate_async({"x": 9}))).output == (9, 2)


def test_back_pressure_counts_right(method: str, flags: Flags) -> None:
    kwargs: dict[str, Any] = {"max_attempts": 3, "retry_on": ConnectionError, "max_pending": 2, "num_workers": 2}
    with make(method, fails_at_first(flags, 2), **kwargs) as evaluator:
        for _ in range(2):
            evaluator.submit(configurations(10))
            assert len(evaluator.gather("ALL")) == 10
        assert evaluator._ledger.pending == 0


def test_raised_failures_are_those_past_their_attempts(method: str, flags: Flags) -> None:
    function = fails_at_first(flags, 2)
    kwargs: dict[str, Any] = {"max_attempts": 2, "retry_on": ConnectionError, "on_error": "raise"}
    with make(method, function, **kwargs) as evaluator:
        evaluator.submit(configurations(2))
        with pytest.raises(ExceptionGroup, match="2 of 2 jobs failed"):
            evaluator.gather("ALL")


@pytest.mark.parametrize("bad", [0, -1, 1.5, "3", None, True])
def test_the_number_of_attempts_must_be_one(bad: Any) -> None:
    with pytest.raises(ValueError, match="max_attempts must be a positive int") as caught:
        make("thread", runfunctions.double, max_attempts=bad)
    assert isinstance(caught.value, ParavalError)


@pytest.mark.parametrize("bad", [3, "ValueError", (ValueError, 3), int, [ValueError()]])
def test_what_is_worth_another_attempt_must_be_exception_types(bad: Any) -> None:
    with pytest.raises(TypeError, match="retry_on") as caught:
        make("thread", runfunctions.double, retry_on=bad)
    assert isinstance(caught.value, ParavalError)


# -- attempts that end with the worker ---------------------------------------------------------------------------------


def dies_at_first(flags: Flags, times: int, *, raises: bool = False) -> Callable[[RunningJob], Any]:
    """Make a run-function whose first calls for each job end their worker; or every other one raises instead."""

    def function(job: RunningJob) -> Any:
        number = flags.count(str(job["x"]))
        if number <= times:
            if raises and number % 2 == 0:
                raise ConnectionError(f"attempt {number}")
            os._exit(number)
        return job["x"], number

    return function


@with_processes
@pytest.mark.parametrize("batching", ["auto", 10])
def test_a_job_whose_worker_dies_has_more_attempts(method: str, flags: Flags, batching: Any) -> None:
    storage = CountingStorage()
    workers = 1 if method == "executor" else 2  # a pool that breaks could end another job while that is counting
    kwargs = {"num_workers": workers, "batching": batching, "storage": storage}
    jobs = run(method, dies_at_first(flags, 2), 4, max_attempts=9, **kwargs)
    assert errors(jobs) == []
    assert outputs(jobs) == [(x, 3) for x in range(4)]
    assert set(storage.terminal.values()) == {1}


@with_processes
def test_past_its_attempts_a_job_whose_worker_died_fails_with_all_of_them(method: str, flags: Flags) -> None:
    (job,) = run(method, dies_at_first(flags, 9), max_attempts=3, job_class=HPOJob)
    error = job.error
    assert error is not None
    assert isinstance(job, HPOJob)
    assert job.objective == "F_worker_died"
    assert (error.kind, error.exit_code, error.attempts) == ("worker_died", 3, 3)
    assert [(past.kind, past.exit_code) for past in error.history] == [("worker_died", 1), ("worker_died", 2)]
    assert len({past.pid for past in (*error.history, error)}) == 3


@with_processes
def test_deaths_and_exceptions_count_together(method: str, flags: Flags) -> None:
    (job,) = run(method, dies_at_first(flags, 9, raises=True), max_attempts=4, retry_on=ConnectionError)
    error = job.error
    assert error is not None
    assert error.attempts == 4
    assert [past.kind for past in (*error.history, error)] == ["worker_died", "exception"] * 2


@with_processes
def test_a_death_is_one_attempt_even_among_jobs_sent_ahead(method: str, flags: Flags) -> None:
    """The guilty one of a batch is run again alone, to know that it is guilty: that is not an attempt of the others."""

    def function(job: RunningJob) -> Any:
        if job["x"] == 3:
            flags.count("3")
            os._exit(9)
        return job["x"]

    jobs = run(method, function, 8, batching=8, max_attempts=2)
    assert errors([job for job in jobs if job.args["x"] != 3]) == []
    error = jobs[3].error
    assert error is not None
    assert (error.attempts, len(error.history)) == (2, 1)


@every_method
def test_a_timeout_is_not_tried_again(method: str, flags: Flags) -> None:
    if method == "serial":

        async def function(job: RunningJob) -> Any:
            flags.count("0")
            await anyio.sleep(30)

    else:

        def function(job: RunningJob) -> Any:  # type: ignore[misc] # the plain form of it
            flags.count("0")
            while not job.stopped():
                pass
            raise ConnectionError("as I was stopped")

    (job,) = run(method, function, max_attempts=3, retry_on=ConnectionError, job_timeout=1.0)
    assert timed_out(job)
    assert flags.text("count-0") == "1"


def test_a_job_may_be_closed_between_two_deaths(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paraval.engine.running.attempts.random.uniform", lambda _low, _high: 60.0)
    evaluator = make("process", dies_at_first(flags, 9), max_attempts=5)
    evaluator.submit(configurations(1))
    until(lambda: flags.up("count-0") and evaluator.jobs[0].status is JobStatus.READY)
    (job,) = evaluator.close()
    assert job.error is not None
    assert job.error.kind == "cancelled"
    assert [past.kind for past in job.error.history] == ["worker_died"]
