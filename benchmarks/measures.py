"""The measures. Each runs in a fresh interpreter, so none inherits modules, threads or garbage from another.

Machines are shared and noisy, so what counts is a ratio: ours and the peer's are measured right after one another, many
times, and the median of the pairs' ratios is judged. The garbage collector is on, with its defaults, as users have it;
what earlier samples left is collected before a sample starts. First runs, which import and start threads, do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, Final

import anyio
import anyio.to_thread
import psutil

import peers
from peers import Contestant, Method
from report import Goal, Row, Sample

__all__ = ["MEASURES", "Measure"]

Measure = Callable[[bool], list[Row]]
"""Takes whether it shall be quick, gives rows of the table."""

_US: Final = 1e6
_METHODS: Final[tuple[Method, ...]] = ("serial", "thread")
_DEEPHYPER_JOBS: Final = 3_000
_EIGHTH: Final = Goal("at most", 1 / 8)


def flood_serial(quick: bool) -> list[Row]:
    """Time submitting all jobs at once and gathering all: 10,000 of ours, 3,000 of DeepHyper's, per job.

    Each sample has an evaluator of its own, which has run 10 jobs before. DeepHyper gets fewer jobs, as its
    cost per job grows with their number. Both never use more than one processor at a time, so both get the same one:
    of two, one may be slower for seconds, and ours would always be on the other one, as its loop has a thread.
    """
    with one_processor():
        samples = pairs(
            lambda: flood(lambda: peers.paraval("serial"), 10_000),
            lambda: flood(lambda: peers.deephyper("serial"), _DEEPHYPER_JOBS),
            3 if quick else 21,
        )
    return [Row("flood of 10,000, serial", "µs/job", "DeepHyper serial, 3,000", _EIGHTH, samples)]


def flood_thread(quick: bool) -> list[Row]:
    """Time submitting 10,000 jobs at once and gathering all, against as many futures and their results."""
    samples = pairs(
        lambda: flood(lambda: peers.paraval("thread"), 10_000),
        lambda: flood(peers.BareThreadPool, 10_000),
        11 if quick else 31,
    )
    return [Row("flood of 10,000, thread", "µs/job", "ThreadPoolExecutor", Goal("at most", 1.0), samples)]


def loop_deephyper(quick: bool) -> list[Row]:
    """Time the loop of a search, gather("BATCH", 1) and submit as many, after 3,000 jobs went through that loop.

    Per job gathered. Both sides have their 3,000 jobs behind them (a quick run floods them with these instead), and
    live on while segments of the loop are timed in turn: 200 jobs of DeepHyper's, whose cost still grows, 1,000 of
    ours.
    """
    rows = []
    for method in _METHODS:
        with peers.paraval(method) as ours, peers.deephyper(method) as theirs:
            for contestant in (ours, theirs):
                (contestant.flood if quick else contestant.loop)(_DEEPHYPER_JOBS)
            samples = loop_pairs(ours, 1_000, theirs, 200, rounds=3 if quick else 9)
        rows.append(Row(f"one in, one out, {method}", "µs/job", f"DeepHyper {method}, after 3,000", _EIGHTH, samples))
    return rows


def loop_thread_pool(quick: bool) -> list[Row]:
    """Time the loop of a search in threads, against wait(FIRST_COMPLETED) and submit as many on the bare executor.

    Both depend on how quickly the system wakes threads, which changes from one moment to the next: so the segments are
    short (500 jobs), and many.
    """
    with peers.paraval("thread") as ours, peers.BareThreadPool() as theirs:
        ours.loop(1_000)
        theirs.loop(1_000)
        samples = loop_pairs(ours, 500, theirs, 500, rounds=21 if quick else 101)
    return [Row("one in, one out, thread", "µs/job", "ThreadPoolExecutor", Goal("at most", 4.0), samples)]


def growth(quick: bool) -> list[Row]:
    """Time the loop of a search after 50,000 jobs ("ours") and after 1,000 ("theirs") of the same evaluator.

    Each figure is the median of 7 segments of 300 jobs. The jobs between come as floods of 1,000, so that less than a
    second lies between the two figures and the machine has little time to change. All jobs stay in the evaluator and in
    its storage.
    """
    rows = []
    for method in _METHODS:
        samples = []
        for _ in range(1 + (2 if quick else 15)):
            gc.collect()
            with peers.paraval(method) as evaluator:
                evaluator.loop(1_000)
                young = typical_loop(evaluator)
                for _ in range(46):
                    evaluator.flood(1_000)
                evaluator.loop(1_000)
                old = typical_loop(evaluator)
            samples.append(Sample(old, young))
        rows.append(Row(f"growth: {method}, after 50,000", "µs/job", "after 1,000", Goal("at most", 1.15), samples[1:]))
    return rows


def utilisation(quick: bool) -> list[Row]:
    """Compute how busy workers are that sleep for 1 s a job, 5 jobs each, all submitted at once.

    The seconds that were asked for (jobs x 1 s, not what the sleeps really took, which a busy loop makes longer) over
    workers x the time from submit to the return of gather. DeepHyper comes last, as its import makes every pass of the
    garbage collector longer; a quick run leaves it out.
    """
    rounds = 1 if quick else 3
    many = [busy_share(peers.paraval, 10_000) for _ in range(rounds)]
    few = [busy_share(peers.paraval, 1_920) for _ in range(rounds)]
    theirs = [None if quick else busy_share(peers.deephyper, 1_920) for _ in range(rounds)]
    peer = None if quick else "DeepHyper serial"
    goal_few, goal_many = Goal("at least", 0.96, "ours"), Goal("at least", 0.88, "ours")
    return [
        Row("utilisation, serial, 1,920 workers", "", peer, goal_few, list(map(Sample, few, theirs))),
        Row("utilisation, serial, 10,000 workers", "", None, goal_many, list(map(Sample, many))),
    ]


def cpu_while_waiting(quick: bool) -> list[Row]:
    """Compute the CPU time of the whole process over wall time while gather waits for a job that sleeps for 2 s."""
    goal = Goal("at most", 1.0, "ours")
    rounds = 1 if quick else 2
    rows = []
    for method in _METHODS:
        sync = [Sample(waiting_sync(method) * 100) for _ in range(rounds)]
        rows.append(Row(f"CPU while gather waits, {method}", "%", None, goal, sync))
        on_loop = [Sample(anyio.run(waiting_async, method) * 100) for _ in range(rounds)]
        rows.append(Row(f"CPU while gather_async waits, {method}", "%", None, goal, on_loop))
    return rows


def import_time(quick: bool) -> list[Row]:
    """Time the import in a fresh interpreter; the start of the interpreter is not in it.

    `import paraval` imports little until a name is used, so the import of what a program uses is shown too.
    """
    lazy, whole, theirs = (
        "import paraval",
        "from paraval import Evaluator, SerialEvaluator",
        "import deephyper.evaluator",
    )
    rounds = 1 if quick else 5
    for statement in (lazy, whole, theirs):
        import_seconds(statement)  # the first writes the bytecode
    times = [(import_seconds(lazy), import_seconds(whole), import_seconds(theirs)) for _ in range(rounds)]
    goal = Goal("at most", 1 / 30)
    return [
        Row(lazy, "ms", theirs, goal, [Sample(a * 1e3, c * 1e3) for a, _, c in times]),
        Row(whole, "ms", theirs, None, [Sample(b * 1e3, c * 1e3) for _, b, c in times]),
    ]


def memory(quick: bool) -> list[Row]:
    """Compute the bytes that stay for each gathered job; evaluator, storage and jobs are kept.

    Plain jobs with two arguments, which return a dict with one value, all of which is counted. "Traced" is what Python
    allocated (tracemalloc), "resident" how much larger the process became.
    """
    jobs = 20_000 if quick else 50_000
    goal = Goal("at most", 2.0, "ours")
    with peers.paraval("thread", function=small_result) as ours:  # what is needed once is not a job's
        ours.flood(1_000)
    resident = [Sample(kept_bytes(lambda: peers.paraval("thread", function=small_result), jobs, resident_bytes) / 1024)]
    with peers.deephyper("thread", function=small_result) as theirs:  # its import is not to be traced
        theirs.flood(10)
    tracemalloc.start()
    traced = [
        Sample(
            kept_bytes(lambda: peers.paraval("thread", function=small_result), 20_000, traced_bytes) / 1024,
            kept_bytes(lambda: peers.deephyper("thread", function=small_result), _DEEPHYPER_JOBS, traced_bytes) / 1024,
        )
    ]
    tracemalloc.stop()
    return [
        Row("memory per finished job, traced", "KiB", "DeepHyper thread, 3,000", goal, traced),
        Row("memory per finished job, resident", "KiB", None, goal, resident),
    ]


MEASURES: Final[dict[str, Measure]] = {
    "flood-serial": flood_serial,
    "flood-thread": flood_thread,
    "loop-deephyper": loop_deephyper,
    "loop-thread-pool": loop_thread_pool,
    "growth": growth,
    "utilisation": utilisation,
    "cpu": cpu_while_waiting,
    "import": import_time,
    "memory": memory,
}


@contextlib.contextmanager
def one_processor() -> Iterator[None]:
    """Keep this process on one processor meanwhile, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def pairs(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> list[Sample]:
    """Measure the two in turn, the one that begins changing each time; a first pair is thrown away."""
    samples = []
    for number in range(1 + rounds):
        figures = {}
        for contestant in (ours, theirs) if number % 2 else (theirs, ours):
            gc.collect()
            figures[contestant] = contestant()
        samples.append(Sample(figures[ours], figures[theirs]))
    return samples[1:]


def loop_pairs(ours: Contestant, our_jobs: int, theirs: Contestant, their_jobs: int, *, rounds: int) -> list[Sample]:
    """Time segments of the two loops in turn, in µs per job."""
    return pairs(lambda: ours.loop(our_jobs) * _US, lambda: theirs.loop(their_jobs) * _US, rounds)


def typical_loop(contestant: Contestant) -> float:
    """Give the median of some segments of the loop, in µs per job."""
    return statistics.median(contestant.loop(300) for _ in range(7)) * _US


def flood(make: Callable[[], Contestant], jobs: int) -> float:
    """Make a contestant, let its workers start, flood it; return the µs per job."""
    contestant = make()
    contestant.flood(10)
    gc.collect()
    seconds = contestant.flood(jobs)
    contestant.close()
    return seconds * _US


def busy_share(make: Callable[..., peers.Evaluator], workers: int, rounds: int = 5) -> float:
    """Let every worker sleep for 1 s so many times; return the share of the workers' time that was asked for."""
    with make("serial", workers, sleep_1_s) as evaluator:
        gc.collect()
        per_job = evaluator.flood(workers * rounds)
    return 1.0 / (workers * per_job)


async def sleep_1_s(job: Any) -> float:  # noqa: ARG001 - the work is the same for every job
    """Sleep for 1 s."""
    await asyncio.sleep(1.0)
    return 1.0


_asleep = threading.Event()
_SLEEP_S: Final = 2.0


def sleep_2_s(job: Any) -> float:  # noqa: ARG001 - likewise
    """Sleep for 2 s, in a thread."""
    _asleep.set()
    time.sleep(_SLEEP_S)
    return 1.0


async def sleep_2_s_async(job: Any) -> float:  # noqa: ARG001 - likewise
    """Sleep for 2 s, in a coroutine."""
    _asleep.set()
    await asyncio.sleep(_SLEEP_S)
    return 1.0


def waiting_sync(method: Method) -> float:
    """Give the share of a CPU that is used while gather waits."""
    with waiting_evaluator(method) as contestant:
        contestant.evaluator.submit([{}])
        _asleep.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        contestant.evaluator.gather("ALL")
        return (time.process_time() - cpu) / (time.perf_counter() - wall)


async def waiting_async(method: Method) -> float:
    """Give the share of a CPU that is used while gather_async waits, on the loop that is also the jobs' home."""
    async with waiting_evaluator(method).evaluator as evaluator:
        await evaluator.submit_async([{}])
        await anyio.to_thread.run_sync(_asleep.wait)
        wall, cpu = time.perf_counter(), time.process_time()
        await evaluator.gather_async("ALL")
        return (time.process_time() - cpu) / (time.perf_counter() - wall)


def waiting_evaluator(method: Method) -> peers.Evaluator:
    """Make a warm evaluator whose jobs sleep for 2 s."""
    _asleep.clear()
    return peers.paraval(method, function=sleep_2_s_async if method == "serial" else sleep_2_s)


def import_seconds(statement: str) -> float:
    """Time one import in a fresh interpreter, which may write bytecode: nobody's second import does without it."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return float(shown.stdout.split()[-1])


def small_result(job: Any) -> dict[str, float]:
    """Return a small dict of one's own."""
    return {"y": job["x"] * 0.5}


def kept_bytes(make: Callable[[], peers.Evaluator], jobs: int, measured: Callable[[], int]) -> float:
    """Run jobs in floods of 1,000; return how many bytes each of them still holds while the evaluator lives."""
    with make() as contestant:
        contestant.flood(10)
        gc.collect()
        before = measured()
        for _ in range(jobs // 1_000):
            contestant.evaluator.submit([{"x": number, "y": 0.5} for number in range(1_000)])
            contestant.evaluator.gather("ALL")
        gc.collect()
        return (measured() - before) / jobs


def resident_bytes() -> int:
    """Give the size of this process."""
    return int(psutil.Process().memory_info().rss)


def traced_bytes() -> int:
    """Give what Python has allocated."""
    return tracemalloc.get_traced_memory()[0]
