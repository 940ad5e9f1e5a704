"""Ctrl-C comes at any moment: what it interrupts is done or undone, and what comes after is none the worse."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from paraval import Evaluator, EvaluatorClosedError, Job, JobStatus, MaximumJobsSpawnReached, RunningJob
from paraval.engine.handover import Handover
from paraval.storage import Storage
from paraval.storage.sqlite import SqliteStorage
from support import METHODS, CountingStorage, configurations, double, make, outputs, until


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


_SPARED = ("_weakrefset", "weakref", "threading", __name__)
"""What weakref callbacks raise is only printed; threading's own conditions and events keep their locks for ever where
Ctrl-C comes just when they have them; and this file is what interrupts, or looks at what is left."""


class Interrupter:
    """Raises KeyboardInterrupt at one of the points where the interpreter looks for signals.

    They are the begin of a Python function and the end of a C function; here in whatever this thread calls.
    """

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, frame: Any, event: str, _arg: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event in ("call", "c_return") and name not in _SPARED:
            self._left -= 1
            if self._left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    @property
    def has_fired(self) -> bool:
        return self._left <= 0


def interrupted(call: Callable[[], object], *, at_least: int = 10) -> Iterator[int]:
    """Make a call that is interrupted at its first point; then one at its second; up to one that comes to its end."""
    points = 0
    has_fired = True
    while has_fired:
        points += 1
        interrupter = Interrupter(points)
        gc.disable()  # what is raised in a finalizer goes no further
        try:
            sys.setprofile(interrupter)
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
            gc.enable()
        has_fired = interrupter.has_fired
        yield points
    assert points > at_least


def open_records(evaluator: Evaluator) -> list[str]:
    records, _ = evaluator.storage.scan(evaluator.search_id)
    return [record.id for record in records if not JobStatus(record.status).is_terminal]


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "paraval-loop" and thread.is_alive()]


def faults_after_submit(evaluator: Evaluator, before: int) -> list[str]:
    """Say what is wrong after a submit of three jobs that may have been interrupted, and one of three that was not."""
    jobs = evaluator.gather("ALL")
    found = []
    counted = evaluator.num_jobs_submitted - before
    if len(jobs) not in {0, 3} or counted != len(jobs):
        found.append(f"{len(jobs)} were gathered, {counted} are counted")
    if len(evaluator.jobs) != evaluator.num_jobs_submitted:
        found.append(f"{len(evaluator.jobs)} are listed")
    statistics, ledger = evaluator.statistics(), evaluator._ledger
    if (statistics.pending, statistics.running, ledger.in_flight) != (0, 0, 0):
        found.append(f"{statistics}, {ledger.in_flight} in flight")
    if ledger.counts_pending and ledger.pending:
        found.append(f"room for {ledger.pending} is lost")
    if left := open_records(evaluator):
        found.append(f"{left} are open in the storage")
    evaluator.submit(configurations(3))
    if len(evaluator.gather("ALL")) != 3:
        found.append("the next ones do not come")
    return found


@pytest.mark.parametrize("max_pending", [None, 4])
def test_submit(method: str, max_pending: int | None) -> None:
    faults = {}
    before = 0
    with make(method, double, num_workers=2, max_pending=max_pending) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        before = evaluator.num_jobs_submitted
        for point in interrupted(lambda: evaluator.submit(configurations(3))):
            if found := faults_after_submit(evaluator, before):
                faults[point] = found
            before = evaluator.num_jobs_submitted
    assert faults == {}


def test_submit_of_many_jobs_at_once(method: str) -> None:
    """As many as share what they have in common."""
    with make(method, double, num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        for point in interrupted(lambda: evaluator.submit(configurations(30))):
            assert len(evaluator.gather("ALL")) in {0, 30}, point
            assert open_records(evaluator) == [], point
        assert evaluator.num_jobs_submitted == evaluator.num_jobs_gathered == len(evaluator.jobs)


def test_submit_to_a_file(tmp_path: Path) -> None:
    faults = {}
    with SqliteStorage(tmp_path / "jobs.db") as storage, make("thread", double, storage=storage) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        before = evaluator.num_jobs_submitted
        for point in interrupted(lambda: evaluator.submit(configurations(3))):
            if found := faults_after_submit(evaluator, before):
                faults[point] = found
            before = evaluator.num_jobs_submitted
    assert faults == {}


@pytest.mark.parametrize("limit", [1, 2])
def test_submit_beyond_the_limit(method: str, limit: int) -> None:
    faults = {}
    with make(method, double, num_workers=2, max_pending=9) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")

        def submit() -> None:
            with contextlib.suppress(MaximumJobsSpawnReached):
                evaluator.submit(configurations(3))

        evaluator.set_maximum_num_jobs_submitted(limit)
        for point in interrupted(submit):
            count = len(evaluator.gather("ALL"))
            found = count, evaluator.num_jobs_submitted, evaluator._ledger.pending
            if count not in {0, limit} or found != (count, count, 0):
                faults[point] = found
            evaluator.set_maximum_num_jobs_submitted(limit)  # it counts from here on
    assert faults == {}


def test_the_first_submit() -> None:
    """It opens the evaluator; what is opened for nobody ends."""
    faults = {}
    with make("thread", double) as evaluator:
        evaluator.submit(configurations(3))  # all is imported then
        evaluator.gather("ALL")
    before = evaluator.num_jobs_submitted
    for point in interrupted(lambda: evaluator.submit(configurations(3))):
        if found := faults_after_submit(evaluator, before):
            faults[point] = found
        before = evaluator.num_jobs_submitted
        evaluator.close()
    assert faults == {}
    until(lambda: not loops())


def test_resumed_submit(tmp_path: Path) -> None:
    """The records that it has found are there for the next one: nothing is run twice."""
    calls: list[int] = []

    def run(job: RunningJob) -> float:
        calls.append(job["x"])
        return double(job)

    with SqliteStorage(tmp_path / "jobs.db") as storage:
        with make("thread", run, storage=storage) as evaluator:
            evaluator.submit(configurations(2))
            evaluator.gather("ALL")
            search_id = evaluator.search_id
        with make("thread", run, storage=storage, search_id=search_id, resume=True) as evaluator:
            for point in interrupted(lambda: evaluator.submit(configurations(3))):
                evaluator.gather("ALL")
                assert open_records(evaluator) == [], point
                if evaluator.jobs:
                    break
            assert outputs(evaluator.jobs) == [0.0, 2.0, 4.0]
    assert sorted(calls) == [0, 1, 2]
    assert point > 100


def test_evaluate(method: str) -> None:
    faults = {}
    with make(method, double, num_workers=2, kill_grace=0.1) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        for point in interrupted(lambda: evaluator.evaluate({"x": 1})):
            until(lambda: evaluator.statistics().pending + evaluator.statistics().running == 0)
            ledger = evaluator._ledger
            if ledger._private or ledger.in_flight or evaluator.jobs[2:]:
                faults[point] = (dict(ledger._private), ledger.in_flight, evaluator.jobs)
            until(lambda: not open_records(evaluator))
        assert evaluator.evaluate({"x": 4}).output == 8.0
    assert faults == {}


def test_gather(method: str) -> None:
    lost = []
    with make(method, double, num_workers=2) as evaluator:
        gathered: list[Job] = []

        def submit() -> None:
            evaluator.submit(configurations(2))
            until(lambda: evaluator.statistics().pending + evaluator.statistics().running == 0)

        def gather() -> None:
            gathered[:] = []
            gathered[:] = evaluator.gather("ALL")

        submit()
        for point in interrupted(gather):
            found = outputs(gathered + evaluator.gather("ALL"))
            if found != [0.0, 2.0]:
                lost.append((point, found))
            submit()
    assert lost == []


def test_the_bell_of_the_loop(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may have seen that somebody rings it, and was interrupted before it did."""
    with make(method, double) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        engine = evaluator._life.engine
        assert engine is not None
        heard = threading.Event()
        with monkeypatch.context() as at:

            def interrupted_ring(_answer: object) -> None:
                at.undo()
                assert engine.loop.call_soon(heard.set)
                raise KeyboardInterrupt

            at.setattr(engine.loop, "_schedule", interrupted_ring)
            with pytest.raises(KeyboardInterrupt):
                engine.loop.call_soon(lambda: None)
        until(heard.is_set)


def test_close(method: str) -> None:
    with make(method, double, num_workers=2) as evaluator:
        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        for _ in interrupted(evaluator.close):
            evaluator.submit(configurations(2))
            assert len(evaluator.gather("ALL")) == 2
    until(lambda: not loops())


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_an_interrupted_close_is_gone_on_with_by_whoever_comes_next(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed (extra 'trio')")
    with make("thread", double, num_workers=2) as evaluator:

        async def main() -> None:
            await evaluator.submit_async(configurations(2))
            assert len(await evaluator.gather_async("ALL")) == 2

        evaluator.submit(configurations(2))
        evaluator.gather("ALL")
        for _ in interrupted(evaluator.close):
            anyio.run(main, backend=library)
    until(lambda: not loops())


def test_what_a_file_was_asked_for_when_it_was_interrupted_is_not_done_later(tmp_path: Path) -> None:
    with SqliteStorage(tmp_path / "jobs.db") as storage:
        search_id = storage.new_search()
        expected = 0
        for _ in interrupted(lambda: storage.create_new_job(search_id)):
            found = len(storage.load_all_job_ids(search_id))
            assert found - expected in {0, 1}
            storage.create_new_job(search_id)
            expected = found + 1
            assert len(storage.load_all_job_ids(search_id)) == expected


def test_jobs_on_their_way_are_the_engines_or_nobodys() -> None:
    to_the_engine, called_off = Handover(), Handover()
    assert to_the_engine.take()
    assert not to_the_engine.call_off()
    assert called_off.call_off()
    assert called_off.call_off()  # it may be asked again
    assert not called_off.take()


# -- a close in the middle of a submit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["submit", "submit_async"])
def test_a_submit_does_not_open_what_was_closed_while_it_waited(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the close comes: here when the next part is about to be given to the engine."""
    storage: Storage = CountingStorage()
    with (
        make("thread", double, num_workers=1, max_pending=2, storage=storage) as evaluator,
        monkeypatch.context() as at,
    ):
        life = evaluator._life
        submit, calls = life.submit, 0

        def closing_before_the_second(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                closer = threading.Thread(target=evaluator.close)
                closer.start()
                closer.join()
            submit(*args)

        at.setattr(life, "submit", closing_before_the_second)
        with pytest.raises(EvaluatorClosedError, match="2 of 9 jobs were submitted"):
            if face == "submit":
                evaluator.submit(configurations(9))
            else:
                evaluator.submit([])
                anyio.run(evaluator.submit_async, configurations(9))
        assert not life.is_open
        assert evaluator.num_jobs_submitted == len(evaluator.jobs) == 2
        assert open_records(evaluator) == []
        at.undo()
        evaluator.submit(configurations(2))  # and a new one does open it
        assert outputs(evaluator.gather("ALL")).count(2.0) >= 1
