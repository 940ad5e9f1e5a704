"""What the command line counts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paraval.cli.tally import FRONT_LIMIT, TOP, Tally
from paraval.job import HPOJob
from paraval.outcome import JobError, Outcome


def ended(output: Any = None, *, error: JobError | None = None, cancelled: bool = False, ran: float = 1.0) -> HPOJob:
    job = HPOJob("0.7", {"x": output})
    job._submitted, job._started, job._finished = 0.0, 1.0, 1.0 + ran
    job.settle(Outcome(output, error, cancelled=cancelled))
    return job


def test_the_best_are_the_largest_and_of_equals_the_first() -> None:
    values = [float(value) for value in range(100)]
    random.Random(3).shuffle(values)
    tally = Tally(total=104)
    for value in [*values, float("nan"), "F_memory", "no number", True]:
        tally.add(ended(value))
    assert [candidate.objectives for candidate in tally.best] == [(99.0 - rank,) for rank in range(TOP)]
    assert (tally.succeeded, tally.failed, tally.finished, tally.unfinished) == (101, 3, 104, 0)
    assert {reason: seen.count for reason, seen in tally.reasons.items()} == {"F": 1, "F_memory": 1, "no number": 1}
    first, second = ended({"objective": 200.0, "name": "first"}), ended({"objective": 200.0, "name": "second"})
    tally.add(first)
    tally.add(second)
    assert tally.best[0].configuration is first.args
    assert tally.best[1].configuration is second.args


def test_the_front_holds_what_no_other_dominates() -> None:
    draw = random.Random(5)
    points = [tuple(float(draw.randrange(20)) for _ in range(3)) for _ in range(500)]
    tally = Tally(total=503)
    for point in [*points, (1.0, "F_diverged", 2.0), (1.0, "no number", 2.0), (1.0, 2.0)]:
        tally.add(ended(point))
    expected = {
        one
        for one in points
        if not any(other != one and all(b >= a for a, b in zip(one, other, strict=True)) for other in points)
    }
    assert {candidate.objectives for candidate in tally.front} == expected
    assert not tally.front_is_partial
    assert not tally.best
    assert list(tally.reasons) == ["F_diverged", "no number"]


def test_the_front_is_bounded() -> None:
    tally = Tally(total=2 * FRONT_LIMIT)
    for value in range(FRONT_LIMIT + 1):
        tally.add(ended((float(value), -float(value))))
    assert len(tally.front) == FRONT_LIMIT
    assert tally.front_is_partial


@pytest.mark.parametrize(
    ("kind", "ran", "job_timeout", "counted_as"),
    [
        ("cancelled", 1.0, None, "cancelled"),
        ("cancelled", 1.0, 5.0, "cancelled"),
        ("timeout", 1.0, None, "cancelled"),
        ("timeout", 1.0, 5.0, "cancelled"),
        ("timeout", 5.1, 5.0, "failed"),
    ],
)
def test_a_job_that_was_stopped_has_failed_only_by_its_own_timeout(
    kind: str, ran: float, job_timeout: float | None, counted_as: str
) -> None:
    tally = Tally(total=1, job_timeout=job_timeout)
    tally.add(ended(error=JobError(kind, "it was stopped"), cancelled=True, ran=ran))
    assert getattr(tally, counted_as) == 1
    assert tally.finished == tally.stopped == 1
    assert list(tally.reasons) == (["F_timeout"] if counted_as == "failed" else [])


def test_what_was_taken_from_the_storage_counts_but_took_no_time() -> None:
    pytest.importorskip("click", reason="the command line needs the extra 'cli'")
    pytest.importorskip("rich", reason="the command line needs the extra 'cli'")
    from paraval.cli.progress import progress_line  # here: the other tests need no extra

    tally = Tally(total=6, job_timeout=5.0)
    late = ended(error=JobError("timeout", "too long"), cancelled=True)
    for job in (ended(1.0), ended("F_x"), late):
        job.restored = True
        tally.add(job)
    assert (tally.restored, tally.succeeded, tally.failed, tally.cancelled, tally.stopped) == (3, 1, 2, 0, 0)
    assert tally.rate == 0.0
    assert progress_line(tally, None) == "3/6 (50 %), best 1, 2 failed, 3 restored"
    tally.add(ended(2.0))
    tally._begin -= 10.0
    assert progress_line(tally, None) == "4/6 (66 %), best 2, 2 failed, 3 restored, 6/min, 20.0 s left"
