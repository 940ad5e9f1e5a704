"""The measures of processes: what worker processes cost, how well they are used, how exactly their jobs are stopped.

As in ``measures``: the two sides right after one another, many times, medians.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Literal

import anyio

import peers
from measures import Measure, flood, loop_pairs, pairs
from report import Goal, Row, Sample
from run_functions import never_end, noop, sleep, spin, spin_for

__all__ = ["MEASURES"]

_US: Final = 1e6
_PROCESSES: Final[tuple[Literal["process", "loky"], ...]] = ("process", "loky")
_WORKERS: Final = 2
_LONG_S: Final = 0.2


def flood_process(quick: bool) -> list[Row]:
    """Time submitting 20,000 jobs at once and gathering all, against as many futures and their results."""
    samples = pairs(
        lambda: flood(lambda: peers.paraval("process"), 20_000),
        lambda: flood(peers.BareProcessPool, 20_000),
        2 if quick else 9,
    )
    return [Row("flood of 20,000, process", "µs/job", "ProcessPoolExecutor", Goal("at most", 1 / 10), samples)]


def flood_joblib(quick: bool) -> list[Row]:
    """Time submitting 20,000 jobs at once and gathering all, against one call of joblib's with as many items.

    From nothing, each in a fresh interpreter that has imported what it needs, as a script does it; and with workers
    that are there already: to a joblib that is called anew, as its documentation does, and to one that is kept as a
    context. joblib gives back a list of values: it has no jobs, no records, no times, and one failure loses the batch.
    """
    alone = pairs(
        lambda: _seconds_of(_OUR_FLOOD) / 20_000 * _US,
        lambda: _seconds_of(_JOBLIB_FLOOD) / 20_000 * _US,
        2 if quick else 7,
    )
    rounds = 5 if quick else 21
    ours = functools.partial(flood, lambda: peers.paraval("process"), 20_000)
    anew = pairs(ours, lambda: flood(lambda: peers.Joblib(anew=True), 20_000), rounds)
    kept = pairs(ours, lambda: flood(peers.Joblib, 20_000), rounds)
    goal, peer = Goal("at most", 1.0), "joblib (loky, auto batches)"
    return [
        Row("flood of 20,000 from nothing, process", "µs/job", peer, goal, alone),
        Row("flood of 20,000, workers are there, process", "µs/job", f"{peer}, called anew", goal, anew),
        Row("flood of 20,000, workers are there, process", "µs/job", f"{peer}, as a context", goal, kept),
    ]


def flood_deephyper(quick: bool) -> list[Row]:
    """Time submitting 3,000 jobs at once and gathering all, on both sides."""
    rows = []
    for method in _PROCESSES:
        samples = pairs(
            functools.partial(flood, functools.partial(peers.paraval, method), 3_000),
            functools.partial(flood, functools.partial(peers.deephyper, method), 3_000),
            1 if quick else 3,
        )
        goal = Goal("at most", 1 / 100)
        rows.append(Row(f"flood of 3,000, {method}", "µs/job", f"DeepHyper {method}", goal, samples))
    return rows


def loop_process(quick: bool) -> list[Row]:
    """Time the loop of a search, gather("BATCH", 1) and submit as many, against wait(FIRST_COMPLETED) and submit.

    Short segments (500 jobs), and many: both depend on how quickly the system wakes threads and processes.
    """
    with peers.paraval("process") as ours, peers.BareProcessPool() as theirs:
        ours.loop(1_000)
        theirs.loop(1_000)
        samples = loop_pairs(ours, 500, theirs, 500, rounds=15 if quick else 61)
    return [Row("one in, one out, process", "µs/job", "ProcessPoolExecutor", Goal("at most", 1.1), samples)]


def loop_async(quick: bool) -> list[Row]:
    """Time a task for each of two workers that evaluates job after job, on the caller's loop.

    Against one synchronous round trip of such a job through a pipe to another process, which sends it back. Both in µs
    of wall time per job, so that our two workers, side by side, may take twice as long each.
    """
    rows = []
    for backend, goal in (("asyncio", Goal("at most", 3.0)), ("trio", None)):
        samples = anyio.run(_async_samples, 5 if quick else 31, backend=backend)
        rows.append(
            Row(f"async, one in, one out per worker, {backend}", "µs/job", "a pipe, there and back", goal, samples)
        )
    return rows


def loky(quick: bool) -> list[Row]:
    """Time a flood of 10,000 jobs, and the loop of a search, against loky's own executor."""
    floods = pairs(
        lambda: flood(lambda: peers.paraval("loky"), 10_000),
        lambda: flood(peers.BareLoky, 10_000),
        2 if quick else 7,
    )
    with peers.paraval("loky") as ours, peers.BareLoky() as theirs:
        ours.loop(1_000)
        theirs.loop(1_000)
        loops = loop_pairs(ours, 300, theirs, 300, rounds=11 if quick else 41)
    return [
        Row("flood of 10,000, loky", "µs/job", "bare loky", Goal("at most", 0.3), floods),
        Row("one in, one out, loky", "µs/job", "bare loky", Goal("at most", 2.0), loops),
    ]


def utilisation(quick: bool) -> list[Row]:
    """Compute how busy two workers are with jobs that spin for a millisecond, for ten, for a hundred: a second in all.

    The seconds asked for over workers x wall time. Beside it the same of two bare processes, each of which spins for
    its half of the jobs, one after the other: that is what the machine can give at this moment. The ratio is judged.
    """
    rows = []
    for milliseconds, share in ((1, 0.90), (10, 0.97), (100, 0.99)):
        seconds, jobs = milliseconds / 1_000, _WORKERS * 1_000 // milliseconds
        with peers.paraval("process", function=spin) as evaluator:
            evaluator.evaluator.submit([{"seconds": seconds}] * 8)
            evaluator.evaluator.gather("ALL")
            samples = pairs(
                functools.partial(_busy_share, evaluator.evaluator, jobs, seconds),
                functools.partial(_bare_share, jobs, seconds),
                1 if quick else 5,
            )
        title = f"utilisation, process, jobs of {milliseconds} ms"
        rows.append(Row(title, "", "two bare processes", Goal("at least", share), samples))
    return rows


def mixed(quick: bool) -> list[Row]:
    """Time 2,000 jobs, of which 20, in random places, take 200 ms and others nothing, against the ideal schedule."""
    ideal = 20 / _WORKERS * _LONG_S
    samples = []
    for number in range(1 if quick else 3):
        jobs = [{"seconds": _LONG_S}] * 20 + [{"seconds": 0.0}] * 1_980
        random.Random(number).shuffle(jobs)
        with peers.paraval("process", function=sleep) as evaluator:
            evaluator.flood(10)
            start = time.perf_counter()
            evaluator.evaluator.submit(jobs)
            evaluator.evaluator.gather("ALL")
            samples.append(Sample(time.perf_counter() - start, ideal))
    return [Row("99 % no-ops, 1 % of 200 ms, process", "s", "the ideal schedule", Goal("at most", 1.2), samples)]


def overshoot(quick: bool) -> list[Row]:
    """Compute how long after job_timeout and grace jobs have ended that will not stop: the 99th percentile.

    From the job's start to the moment when it was seen ended, its process being gone. A third of the jobs sleep, a
    third spin, a third hold the interpreter's lock.
    """
    limit_s, grace_s = 0.1, 0.1
    rows = []
    for method in _PROCESSES:
        samples = []
        for _ in range(1 if quick else 2):
            with peers.paraval(method, function=never_end, job_timeout=limit_s, kill_grace=grace_s) as evaluator:
                evaluator.evaluator.submit([{"how": how} for how in ("sleep", "spin", "lock") * (4 if quick else 12)])
                jobs = evaluator.evaluator.gather("ALL")
            over = [job.timing.finished - job.timing.started - limit_s - grace_s for job in jobs]
            samples.append(Sample(statistics.quantiles(over, n=100, method="inclusive")[-1]))
        goal = Goal("at most", 0.5, "ours")
        rows.append(Row(f"overshoot past time limit and grace, {method}, p99", "s", None, goal, samples))
    return rows


def first_result(quick: bool) -> list[Row]:
    """Time making two workers, submitting two jobs and waiting for the first result, in a fresh interpreter.

    Everything that the driver needs is imported before.
    """
    samples = pairs(lambda: _seconds_of(_OURS), lambda: _seconds_of(_SPAWN), 3 if quick else 11)
    return [Row("creation to first result, process", "s", "ProcessPoolExecutor, spawn", Goal("at most", 1.0), samples)]


MEASURES: Final[dict[str, Measure]] = {
    "process-flood": flood_process,
    "process-joblib": flood_joblib,
    "process-deephyper": flood_deephyper,
    "process-loop": loop_process,
    "process-async": loop_async,
    "loky": loky,
    "process-utilisation": utilisation,
    "process-mixed": mixed,
    "process-overshoot": overshoot,
    "process-start": first_result,
}


# -- the two sides -----------------------------------------------------------------------------------------------------


async def _async_samples(rounds: int) -> list[Sample]:
    from paraval import Evaluator

    ours_end, theirs_end = multiprocessing.Pipe()
    echo = multiprocessing.get_context("spawn").Process(target=_echo, args=(theirs_end,))
    echo.start()
    theirs_end.close()
    samples = []
    async with Evaluator.create(noop, "process", {"num_workers": _WORKERS}) as evaluator:
        for number in range(1 + rounds):  # as `pairs` does, which is not for tasks
            if number % 2:
                ours, theirs = await _evaluate(evaluator, 1_000), _round_trips(ours_end, 1_000)
            else:
                theirs, ours = _round_trips(ours_end, 1_000), await _evaluate(evaluator, 1_000)
            samples.append(Sample(ours, theirs))
    ours_end.close()
    echo.join()
    return samples[1:]


async def _evaluate(evaluator: Any, jobs: int) -> float:
    async def one_after_the_other() -> None:
        for number in range(jobs // _WORKERS):
            await evaluator.evaluate_async({"x": number})

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(_WORKERS):
            group.start_soon(one_after_the_other)
    return (time.perf_counter() - start) / jobs * _US


def _round_trips(connection: Connection, jobs: int) -> float:
    start = time.perf_counter()
    for number in range(jobs):
        connection.send(("0.0", {"x": number}))
        connection.recv()
    return (time.perf_counter() - start) / jobs * _US


def _echo(connection: Connection) -> None:
    while True:
        try:
            connection.send(connection.recv())
        except EOFError:
            return


def _busy_share(evaluator: Any, jobs: int, seconds: float) -> float:
    configurations = [{"seconds": seconds}] * jobs
    start = time.perf_counter()
    evaluator.submit(configurations)
    evaluator.gather("ALL")
    return jobs * seconds / (_WORKERS * (time.perf_counter() - start))


def _bare_share(jobs: int, seconds: float) -> float:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(_WORKERS + 1)
    halves = [context.Process(target=_spin_often, args=(barrier, jobs // _WORKERS, seconds)) for _ in range(_WORKERS)]
    for half in halves:
        half.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    wall = time.perf_counter() - start
    for half in halves:
        half.join()
    return jobs * seconds / (_WORKERS * wall)


def _spin_often(barrier: Any, times: int, seconds: float) -> None:
    barrier.wait()
    for _ in range(times):
        spin_for(seconds)
    barrier.wait()


_OURS: Final = """
from paraval import ProcessPoolEvaluator
start = time.perf_counter()
with ProcessPoolEvaluator(run_functions.noop, num_workers=2) as evaluator:
    evaluator.submit([{"x": 0}, {"x": 1}])
    assert evaluator.gather("BATCH", 1)
    print(time.perf_counter() - start)
"""
_OUR_FLOOD: Final = """
from paraval import ProcessPoolEvaluator
configurations = [{"x": number} for number in range(20_000)]
start = time.perf_counter()
with ProcessPoolEvaluator(run_functions.noop, num_workers=2) as evaluator:
    evaluator.submit(configurations)
    assert len(evaluator.gather("ALL")) == 20_000
    print(time.perf_counter() - start)
"""
_JOBLIB_FLOOD: Final = """
from joblib import Parallel, delayed
configurations = [{"x": number} for number in range(20_000)]
start = time.perf_counter()
assert len(Parallel(n_jobs=2)(delayed(run_functions.noop)(configuration) for configuration in configurations)) == 20_000
print(time.perf_counter() - start)
"""
_SPAWN: Final = """
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
start = time.perf_counter()
with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
    futures = [executor.submit(run_functions.noop, {"x": number}) for number in range(2)]
    assert wait(futures, return_when=FIRST_COMPLETED).done
    print(time.perf_counter() - start)
"""


def _seconds_of(program: str) -> float:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    shown = subprocess.run(
        [sys.executable, "-c", "import time\nimport run_functions\n" + program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    return float(shown.stdout.split()[-1])
