"""Submit, gather, evaluate, cancel, time out, close and open again in random order, against a simple model.

Whatever the order: no job is lost, none comes twice, each has exactly one terminal record, and the statistics add up.
Nothing here sleeps: a job is either quick or waits until the test lets it go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paraval import HPOJob, Job, JobStatus, RunningJob
from support import CountingStorage, Stage, make, soon, until_async

WORKERS = 2
QUICK, RAISING, WAITING = "quick", "raising", "waiting"
kinds = st.sampled_from([QUICK, RAISING, WAITING])


class EvaluatorMachine(RuleBasedStateMachine):
    """Drives one evaluator through its synchronous face, now and then through a block on a loop of its own."""

    method: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        self.storage = CountingStorage()
        self.count = 0
        self.in_flight: dict[int, str] = {}  # submitted and not yet returned to us, by their "x"
        self.waiting: list[int] = []  # those of them that have not been let go
        self.returned: dict[str, Job] = {}
        self.private: list[Job] = []
        self.cancelled_evaluations = 0

    @initialize(batching=st.sampled_from(["auto", False, 4]))
    def open(self, batching: Any) -> None:
        async def coroutine(job: RunningJob) -> float:
            if job["kind"] == WAITING:
                await self.stage.coroutine(job)
            return finish(job)

        def plain(job: RunningJob) -> float:
            if job["kind"] == WAITING:
                self.stage.polite(job)
            return finish(job)

        def finish(job: RunningJob) -> float:
            if job["kind"] == RAISING:
                raise ValueError("poison")
            return float(job["x"])

        function = coroutine if self.method == "serial" else plain
        self.evaluator = make(
            self.method,
            function,
            num_workers=WORKERS,
            batching=batching,
            storage=self.storage,
            job_class=HPOJob,
            kill_grace=20.0,  # never needed: every job looks whether it shall stop
        )

    # -- the model -----------------------------------------------------------------------------------------------------
    # Preconditions and draws look at ``waiting`` alone: ``in_flight`` depends on what ended when.

    @property
    def quick_ones_end(self) -> bool:
        """Whether a worker is free of waiting jobs, so that every other job comes to its end."""
        return len(self.waiting) < WORKERS

    def new(self, new_kinds: Iterable[str]) -> list[dict[str, Any]]:
        made = []
        for kind in new_kinds:
            made.append({"x": self.count, "kind": kind})
            self.in_flight[self.count] = kind
            if kind == WAITING:
                self.waiting.append(self.count)
            self.count += 1
        return made

    def new_private(self, kind: str) -> dict[str, Any]:
        self.count += 1
        return {"x": self.count - 1, "kind": kind}

    def take(self, jobs: Sequence[Job], *, stopped: str | None = None) -> None:
        """Tick off jobs that were returned to us; ``stopped`` says that, and why, they may have been cancelled."""
        for job in jobs:
            assert job.id not in self.returned, "a job came twice"
            self.returned[job.id] = job
            x = job.args["x"]
            assert x in self.in_flight, "a job came that was not in flight"
            del self.in_flight[x]
            self.check(job, stopped)
            if x in self.waiting:
                assert job.status is JobStatus.CANCELLED, "a job ended that was not let go"
                self.waiting.remove(x)

    def check(self, job: Job, stopped: str | None = None) -> None:
        assert isinstance(job, HPOJob)
        assert self.storage.terminal[job.id] == 1
        record = self.storage.load_job(job.id)
        assert (record["status"], record["out"]) == (job.status.value, job.objective)
        if job.status is JobStatus.CANCELLED:
            assert stopped is not None, "a job was cancelled for no reason"
            assert job.objective == f"F_{stopped}"
        else:
            assert job.status is JobStatus.DONE
            assert job.objective == ("F_ValueError" if job.args["kind"] == RAISING else job.args["x"])

    # -- what may happen -----------------------------------------------------------------------------------------------

    @rule(new_kinds=st.lists(kinds, min_size=1, max_size=6))
    def submit(self, new_kinds: list[str]) -> None:
        self.evaluator.submit(self.new(new_kinds))

    @rule(count=st.integers(50, 400))
    def submit_a_flood(self, count: int) -> None:
        self.evaluator.submit(self.new([QUICK] * count))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        x = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(x)
        self.stage.release(x)

    @precondition(lambda self: self.quick_ones_end)
    @rule(size=st.integers(1, 10))
    def gather_a_batch(self, size: int) -> None:
        size = min(size, len(self.in_flight) - len(self.waiting))
        jobs = self.evaluator.gather("BATCH", size)
        assert len(jobs) >= size
        self.take(jobs)

    @rule()
    def gather_what_is_there(self) -> None:
        self.take(self.evaluator.gather("BATCH", 0))

    @precondition(lambda self: not self.waiting)
    @rule()
    def gather_all(self) -> None:
        self.take(self.evaluator.gather("ALL"))
        assert not self.in_flight, "jobs were lost"

    @precondition(lambda self: self.quick_ones_end)
    @rule(kind=st.sampled_from([QUICK, RAISING]))
    def evaluate(self, kind: str) -> None:
        job = self.evaluator.evaluate(self.new_private(kind))
        self.private.append(job)
        self.check(job)

    @rule(running=st.booleans())
    def cancel_an_evaluation(self, running: bool) -> None:
        configuration = self.new_private(WAITING)
        may_start = self.quick_ones_end

        async def main() -> None:
            before = self.evaluator.num_jobs_submitted
            task = asyncio.ensure_future(self.evaluator.evaluate_async(configuration))
            await until_async(lambda: self.evaluator.num_jobs_submitted > before)
            if running and may_start:
                await self.stage.started(configuration["x"]).opened()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await soon(task)
            assert task.cancelled()

        asyncio.run(main())
        self.cancelled_evaluations += 1

    @rule()
    def run_out_of_time(self) -> None:
        self.evaluator.timeout = 0
        self.take(self.evaluator.gather("ALL"), stopped="timeout")
        self.evaluator.timeout = None
        assert not self.in_flight, "jobs were lost"

    @rule()
    def set_a_budget_that_does_not_run_out(self) -> None:
        self.evaluator.timeout = 1000

    @rule()
    def close(self) -> None:
        cancelled = self.evaluator.close()
        assert all(job.status is JobStatus.CANCELLED for job in cancelled)
        self.take(cancelled, stopped="cancelled")
        assert not self.waiting
        # All that is left is done, and can be gathered without waiting.

    @precondition(lambda self: not self.waiting)
    @rule(new_kinds=st.lists(kinds, min_size=1, max_size=6), gather=st.booleans())
    def visit_a_loop(self, new_kinds: list[str], gather: bool) -> None:
        self.gather_all()

        async def main() -> None:
            async with self.evaluator:
                await self.evaluator.submit_async(self.new(new_kinds))
                certain = len(self.in_flight) - len(self.waiting)
                if gather and self.quick_ones_end and certain:
                    jobs = await soon(self.evaluator.gather_async("BATCH", certain))
                    assert len(jobs) == certain
                    self.take(jobs)

        asyncio.run(main())
        # Who leaves the block does not get the cancelled jobs returned, so here they are read off the evaluator.
        left = [job for job in self.evaluator.jobs if job.args["x"] in self.in_flight]
        self.take([job for job in left if job.status is JobStatus.CANCELLED], stopped="cancelled")
        assert not self.waiting

    # -- what holds always ---------------------------------------------------------------------------------------------

    @invariant()
    def the_statistics_add_up(self) -> None:
        if self.count == 0:
            return
        shown = self.evaluator.statistics()
        assert shown.submitted == self.count
        assert shown.submitted == shown.pending + shown.running + shown.done + shown.failed + shown.cancelled
        assert min(shown.pending, shown.running, shown.done, shown.failed, shown.cancelled) >= 0
        assert shown.running <= WORKERS
        assert 0.0 <= shown.utilisation <= 1.0
        assert len(self.evaluator.jobs) == len(self.in_flight) + len(self.returned)
        assert self.evaluator.num_jobs_submitted == self.count

    def teardown(self) -> None:
        if not hasattr(self, "evaluator"):
            return
        self.stage.release_all()
        self.waiting.clear()
        try:
            self.take(self.evaluator.gather("ALL"))
        finally:
            cancelled = self.evaluator.close()
        assert not cancelled
        assert not self.in_flight, "jobs were lost"
        everything = self.storage.load_all_job_ids(self.evaluator.search_id)
        assert len(everything) == self.count
        assert self.storage.terminal == dict.fromkeys(everything, 1)
        known = [*self.returned.values(), *self.private]
        shown = self.evaluator.statistics()
        stopped = sum(job.status is JobStatus.CANCELLED for job in known)
        failed = sum(job.status is JobStatus.DONE and job.error is not None for job in known)
        assert shown.cancelled == stopped + self.cancelled_evaluations
        assert shown.failed == failed
        assert shown.done == len(known) - stopped - failed
        assert (shown.pending, shown.running, shown.callback_errors) == (0, 0, 0)
        assert self.evaluator.num_jobs_gathered == self.evaluator.num_jobs_submitted == self.count


class SerialMachine(EvaluatorMachine):
    method = "serial"


class ThreadMachine(EvaluatorMachine):
    method = "thread"


TestSerial = SerialMachine.TestCase
TestSerial.settings = settings(max_examples=40, stateful_step_count=25)
TestThread = ThreadMachine.TestCase
TestThread.settings = settings(max_examples=40, stateful_step_count=25)
