"""The garbage collector is slowed while there are very many workers, and nothing of that stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import anyio
import pytest

from paraval import Evaluator, RunningJob
from paraval.engine.collector import collector_at_rest


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    gc.enable()


class Together:
    """A run-function whose jobs go on when so many run; each gives the threshold that it sees."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.running = 0
        self.all_run = anyio.Event()

    async def __call__(self, job: RunningJob) -> int:
        self.running += 1
        if self.running == self.jobs:
            self.all_run.set()
        await self.all_run.wait()
        return gc.get_threshold()[0]

    def evaluator(self) -> Evaluator:
        return Evaluator.create(self, "serial", {"num_workers": 1_000})

    def seen(self, evaluator: Evaluator) -> int:
        evaluator.submit([{"x": x} for x in range(self.jobs)])
        (seen,) = {job.output for job in evaluator.gather("ALL")}
        return int(seen)


def test_it_is_slow_while_there_are_many_workers_and_then_as_it_was() -> None:
    before = gc.get_threshold()
    many = Together(1_000)
    with many.evaluator() as evaluator:
        assert many.seen(evaluator) == 10_000
    assert gc.get_threshold() == before


def test_few_workers_leave_it_alone() -> None:
    few = Together(50)
    with few.evaluator() as evaluator:
        assert few.seen(evaluator) == gc.get_threshold()[0] < 10_000


def test_two_evaluators_share_it() -> None:
    before = gc.get_threshold()
    one, another = Together(1_000), Together(1_000)
    with another.evaluator() as stays:
        with one.evaluator() as goes:
            one.seen(goes)
            another.seen(stays)
        assert gc.get_threshold()[0] == 10_000
    assert gc.get_threshold() == before


def test_a_program_that_collects_when_it_wants_to_still_does() -> None:
    gc.set_threshold(0)
    many = Together(1_000)
    with many.evaluator() as evaluator:
        assert many.seen(evaluator) == 0
    assert gc.get_threshold()[0] == 0


def test_what_somebody_else_sets_meanwhile_stays() -> None:
    many = Together(1_000)
    with many.evaluator() as evaluator:
        many.seen(evaluator)
        gc.set_threshold(1_234, 5, 6)
    assert gc.get_threshold() == (1_234, 5, 6)


def test_what_a_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    with collector_at_rest(1):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count()


def test_what_somebody_freezes_meanwhile_stays_frozen() -> None:
    gc.unfreeze()
    with collector_at_rest(1):
        gc.freeze()
    assert gc.get_freeze_count()


def test_jobs_of_an_evaluator_that_is_closed_are_no_more_taken_to_stay() -> None:
    def submit() -> bool:
        with Evaluator.create(lambda job: job["x"], "thread") as evaluator:
            evaluator.submit([{"x": x} for x in range(1_001)])
            old = is_old(evaluator.jobs[0])
            evaluator.gather("ALL")
        return old

    gc.collect()
    assert [submit(), submit()] == [True, False]
    gc.collect()
    assert submit()


def test_a_program_without_a_collector_stays_without() -> None:
    gc.disable()
    with collector_at_rest(1):
        pass
    assert not gc.isenabled()


class Node:
    """Refers to itself, so that nobody but the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def is_old(thing: object) -> bool:
    return any(one is thing for one in gc.get_objects(generation=2))


def test_what_stays_is_old_at_once_and_what_was_garbage_before_is_gone() -> None:
    gc.collect()
    garbage = weakref.ref(Node())
    with collector_at_rest(10):
        assert garbage() is None
        stays = Node()
    assert gc.isenabled()
    assert is_old(stays)


def test_there_is_a_full_pass_however_many_stay() -> None:
    gc.collect()
    old = []
    for _ in range(12):
        with collector_at_rest(10_000):
            node = Node()
        old.append(is_old(node))
    assert old == [True] * 10 + [False] * 2
    gc.collect()
    with collector_at_rest(10_000):
        node = Node()
    assert is_old(node)
