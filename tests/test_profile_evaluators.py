"""Profiling and memory limits on every evaluator: by the decorator, and by the evaluator's own arguments."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anyio
import pytest

import profiled
from paraval import Evaluator, HPOJob, Job, JobStatus, ParavalError, RunningJob, profile
from profiled import LIMIT, LOOK_S, MIB
from runfunctions import Flags
from support import Program, configurations, run_all, soon, until, until_async
from workers import LOKY, by_x, error_of, errors, is_alive, processes, threads, worker_marks

pytestmark = worker_marks
FUNCTIONS = {
    "timed": (profiled.timed, profiled.async_timed),
    "spike": (profiled.spike, profiled.async_spike),
    "greedy": (profiled.greedy, profiled.async_greedy),
    "mixed": (profiled.mixed, profiled.async_mixed),
}
every_method = pytest.mark.parametrize("method", ["serial", "thread", "process", LOKY, "executor"])


def make(method: str, function: str | Callable[..., Any], **kwargs: Any) -> Evaluator:
    """Make an evaluator; of a named function, the one that suits the method."""
    if isinstance(function, str):
        function = FUNCTIONS[function][method == "serial"]
    if method == "executor":
        kwargs["executor"] = functools.partial(ProcessPoolExecutor, 1, mp_context=get_context("spawn"))
    return Evaluator.create(function, method, kwargs)


def run(method: str, function: str | Callable[..., Any], args_list: list[dict[str, Any]], **kwargs: Any) -> list[Job]:
    """Run jobs; give them in the order of submission."""
    return run_all(make(method, function, **kwargs), args_list)


def evaluate(method: str, function: str | Callable[..., Any], args: dict[str, Any], **kwargs: Any) -> Job:
    (job,) = run(method, function, [args], **kwargs)
    return job


def kind(job: Job) -> str | None:
    return None if job.error is None else job.error.kind


# -- the decorator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["timed", "spike"])
@every_method
def test_the_timestamps_are_on_the_clock_of_the_evaluator(method: str, function: str) -> None:
    job = evaluate(method, function, {"x": 1, "mebibytes": 1})
    assert errors([job]) == []
    stamps = [job.metadata[f"timestamp_{name}"] for name in ("submit", "start", "end", "gather")]
    assert stamps == sorted(stamps)
    timing = job.timing
    assert timing.started is not None
    assert timing.finished is not None
    assert 0 <= timing.started <= stamps[1] <= stamps[2] <= timing.finished < 60


@every_method
def test_the_peak_of_the_memory_is_in_the_metadata(method: str) -> None:
    job = evaluate(method, "spike", {"mebibytes": 100})
    assert job.output == 100 * MIB
    assert 100 * MIB < job.metadata["memory"] < 250 * MIB


@every_method
def test_over_the_limit_the_output_says_so(method: str) -> None:
    job = evaluate(method, "greedy", {})
    assert (job.output, job.error, job.status) == ("F_memory_limit_exceeded", None, JobStatus.DONE)
    assert job.metadata["memory"] > LIMIT
    stamps = [job.metadata[f"timestamp_{name}"] for name in ("submit", "start", "end", "gather")]
    assert stamps == sorted(stamps)


@pytest.mark.parametrize("method", ["thread", "process"])
def test_over_the_limit_memory_error_is_raised_where_asked_for(method: str) -> None:
    job = evaluate(method, profiled.greedy_raising, {}, job_class=HPOJob)
    assert isinstance(job, HPOJob)
    assert job.objective == "F_MemoryError"
    assert job.error is not None
    assert str(LIMIT) in job.error.message


def test_a_worker_process_is_process_enough() -> None:
    for function in (
        profiled.process_id,
        profiled.process_id_with_limit,
        profiled.twice,
        functools.partial(profiled.process_id_with_limit),
    ):
        first, second = run("process", function, configurations(2))
        assert first.output == second.output, "the call was given a process of its own"


def test_a_limit_that_the_evaluator_does_not_know_of_holds_too() -> None:
    def hidden(job: RunningJob) -> Any:
        return profiled.greedy(job)["output"]

    job = evaluate("process", hidden, {})
    assert job.output == "F_memory_limit_exceeded"


@every_method
def test_an_exception_tells_where_it_was_raised(method: str) -> None:
    function = profiled.async_fails if method == "serial" else profiled.fails
    job = evaluate(method, function, {"how": "value"})
    assert job.error is not None
    assert (job.error.kind, job.error.type, job.error.message) == ("exception", "ValueError", "a bad value")
    assert job.error.traceback is not None
    assert "profiled.py" in job.error.traceback


def test_an_exception_that_cannot_be_sent_keeps_its_name() -> None:
    job = evaluate("thread", profiled.fails, {"how": "unsendable"}, job_class=HPOJob)
    assert isinstance(job, HPOJob)
    assert job.objective == "F_Unsendable"


# -- the evaluator's own arguments -------------------------------------------------------------------------------------


@every_method
def test_profile_measures_without_a_decorator(method: str) -> None:
    plain, spike = run(method, "mixed", [{"x": 1}, {"x": "spike"}], profile=True)
    assert (plain.output, spike.output) == (1, 100 * MIB)
    assert plain.metadata["memory"] < 100 * MIB < spike.metadata["memory"] < 250 * MIB
    for job in (plain, spike):
        stamps = [job.metadata[f"timestamp_{name}"] for name in ("submit", "start", "end", "gather")]
        assert stamps == sorted(stamps)


@every_method
def test_a_decorated_function_is_not_reported_twice(method: str) -> None:
    for function in ("spike", "timed"):
        job = evaluate(method, function, {"x": 3, "mebibytes": 3}, profile=True, memory_limit=500 * MIB)
        assert job.output in (3, 3 * MIB)
        assert "memory" in job.metadata


@every_method
def test_a_memory_limit_fails_the_job_that_exceeds_it_and_no_other(method: str, tmp_path: Path) -> None:
    jobs = by_x(
        run(
            method,
            "mixed",
            [{"x": 1}, {"x": "hoard"}, {"x": 2}],
            memory_limit=LIMIT,
            max_attempts=3,
            job_class=HPOJob,
            run_function_kwargs={"folder": str(tmp_path)},
        )
    )
    guilty = jobs["hoard"]
    assert isinstance(guilty, HPOJob)
    assert guilty.objective == "F_memory_limit_exceeded"
    assert kind(guilty) == "memory_limit_exceeded"
    assert guilty.error is not None
    assert (guilty.error.attempts, guilty.error.signal) == (1, None)
    # Once more at most, in a fresh worker: where it might have fitted, had job 1 left nothing in the first.
    assert int(Flags(tmp_path).text("count-hoard")) <= 2
    assert errors([jobs[1], jobs[2]]) == []
    assert jobs[1].metadata.keys() == {"timestamp_submit", "timestamp_gather"}


def test_the_tighter_limit_holds() -> None:
    @profile(memory_limit=1000 * MIB)
    def loose(job: RunningJob) -> str:
        return profiled.hoard()

    @profile(memory_limit=LIMIT, memory_tracing_interval=LOOK_S)
    def tight(job: RunningJob) -> str:
        return profiled.hoard()

    for method in ("thread", "process"):
        assert kind(evaluate(method, loose, {}, memory_limit=LIMIT)) == "memory_limit_exceeded"
        assert evaluate(method, tight, {}, memory_limit=1000 * MIB).output == "F_memory_limit_exceeded"


@every_method
def test_three_ways_to_run_out_of_memory_are_told_apart(method: str, tmp_path: Path) -> None:
    ways = {"rlimit": "F_MemoryError", "hoard": "F_memory_limit_exceeded", "killed": "F_worker_died"}
    kwargs = {"folder": str(tmp_path)}
    with make(method, "mixed", memory_limit=LIMIT, job_class=HPOJob, run_function_kwargs=kwargs) as evaluator:
        jobs = [evaluator.evaluate({"x": way}) for way in ways]
        assert [job.output["objective"] for job in jobs] == list(ways.values())
        assert [job.error.signal if job.error else None for job in jobs] == [None, None, signal.SIGKILL]
        assert evaluator.evaluate({"x": 1}).output == {"objective": 1.0}


def test_a_job_that_holds_the_gil_is_killed_too() -> None:
    job = evaluate("process", "mixed", {"x": "in C"}, memory_limit=LIMIT)
    assert kind(job) == "memory_limit_exceeded"


async def test_memory_is_watched_on_every_event_loop() -> None:
    async with make("process", "mixed", memory_limit=LIMIT) as evaluator:
        job = await soon(evaluator.evaluate_async({"x": "hoard"}))
    assert kind(job) == "memory_limit_exceeded"


def test_one_greedy_job_among_many_is_found() -> None:
    jobs = run("process", "mixed", [*configurations(300), {"x": "hoard"}, *configurations(300)], memory_limit=LIMIT)
    assert [kind(job) for job in jobs if job.error is not None] == ["memory_limit_exceeded"]
    assert jobs[300].error is not None


def test_nobody_pays_for_what_another_job_left_behind(tmp_path: Path) -> None:
    first, second = run(
        "process",
        profiled.leaving,
        [{"x": "leave"}, {"x": "hold"}],
        memory_limit=LIMIT,
        run_function_kwargs={"folder": str(tmp_path)},
    )
    assert errors([first, second]) == []
    assert first.output != second.output
    assert Flags(tmp_path).text("count-tries") == "2"


def test_a_worker_that_is_full_already_is_replaced() -> None:
    first, second = run("process", profiled.filling, configurations(2), batching=False)
    assert errors([first, second]) == []
    assert first.output != second.output


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_a_job_in_a_process_of_its_own_hears_that_it_shall_stop(tmp_path: Path) -> None:
    kwargs = {"folder": str(tmp_path)}
    job = evaluate("thread", profiled.polite, {}, job_timeout=0.5, kill_grace=20.0, run_function_kwargs=kwargs)
    assert (job.status, kind(job)) == (JobStatus.CANCELLED, "timeout")
    assert job.metadata["returned"] == "stopped early"
    assert job.metadata["timestamp_start"] < job.metadata["timestamp_end"]


def test_one_that_does_not_listen_is_killed_and_its_thread_is_free_again(tmp_path: Path) -> None:
    kwargs = {"folder": str(tmp_path)}
    with make("thread", profiled.deaf, job_timeout=2.0, kill_grace=0.1, run_function_kwargs=kwargs) as evaluator:
        evaluator.submit(configurations(2))
        deaf, other = evaluator.gather("ALL")
    assert (kind(deaf), other.output) == ("timeout", 1)
    pid = int(Flags(tmp_path).text("runs"))
    until(lambda: not is_alive(pid))


async def test_cancelling_the_caller_ends_the_process(tmp_path: Path) -> None:
    flags = Flags(tmp_path)
    async with (
        make("serial", profiled.async_deaf, kill_grace=0.1, run_function_kwargs={"folder": str(tmp_path)}) as evaluator,
        anyio.create_task_group() as group,
    ):
        group.start_soon(evaluator.evaluate_async, {})
        await until_async(lambda: flags.up("runs"))
        group.cancel_scope.cancel()
    pid = int(flags.text("runs"))
    await until_async(lambda: not is_alive(pid))


def test_a_program_that_ends_leaves_no_process(tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import profiled, runfunctions
        from paraval import Evaluator
        kwargs = {{"folder": {str(tmp_path)!r}}}
        evaluator = Evaluator.create(profiled.deaf, "thread", {{"run_function_kwargs": kwargs}})
        evaluator.submit([{{"x": 0}}])
        runfunctions.Flags(**kwargs).wait("runs")
        print("end", flush=True)
    """
    with Program(program) as running:
        said = running.read_until("end")
        assert running.wait() - said < 5
    pid = int(Flags(tmp_path).text("runs"))
    until(lambda: not is_alive(pid))


# -- another attempt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["thread", "executor"])
@pytest.mark.parametrize(("how", "options"), [("die", {}), ("raise", {"retry_on": ValueError})])
def test_what_fails_in_a_process_of_its_own_gets_another_attempt(
    method: str, how: str, options: dict[str, Any], tmp_path: Path
) -> None:
    job = evaluate(
        method,
        profiled.second_time_lucky,
        {"x": how},
        max_attempts=2,
        run_function_kwargs={"folder": str(tmp_path)},
        **options,
    )
    assert errors([job]) == []
    assert job.output == 2


# -- bad input ---------------------------------------------------------------------------------------------------------


@every_method
def test_a_limit_below_the_interpreter_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="memory_limit=1000 is less than") as caught:
        make(method, "mixed", memory_limit=1000)
    assert isinstance(caught.value, ParavalError)
    with pytest.raises(ValueError, match="memory_limit"):
        make(method, "mixed", memory_limit=-1)
    with pytest.raises(TypeError, match="memory_limit"):
        make(method, "mixed", memory_limit="1 GB")


@pytest.mark.parametrize("method", ["thread", "process"])
def test_a_function_that_cannot_be_sent_is_refused_at_creation(method: str) -> None:
    lock = threading.Lock()

    def local(job: RunningJob) -> Any:
        return lock

    with pytest.raises(ValueError, match="'lock'"):
        make(method, local, memory_limit=LIMIT, profile=True)


@pytest.mark.parametrize("kwargs", [{"profile": True}, {"memory_limit": LIMIT}], ids=lambda kwargs: next(iter(kwargs)))
@pytest.mark.parametrize("executor", [None, threads, processes], ids=["thread", "threads", "processes"])
def test_a_job_whose_process_is_killed_in_time_has_stopped(executor: Any, kwargs: dict[str, Any]) -> None:
    options = {"job_timeout": 0.3, "kill_grace": 0.1, **kwargs}
    if executor is not None:
        options["executor"] = executor
    with Evaluator.create(sleeps, "thread" if executor is None else "executor", options) as evaluator:
        assert error_of(evaluator.evaluate({})) == ("timeout", "the job ran longer than job_timeout=0.3 s")


def sleeps(job: RunningJob) -> None:
    threading.Event().wait(60)
