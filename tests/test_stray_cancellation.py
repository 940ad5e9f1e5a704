"""What a job leaves behind, what a slot forgets and what a callback raises strikes nobody else; no job is ever lost."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

import anyio
import pytest
from anyio.lowlevel import checkpoint

from paraval import Evaluator, Job, JobStatus, RunningJob, SerialEvaluator
from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot
from paraval.callback import Callback
from paraval.loops import Loop
from paraval.outcome import Outcome
from support import configurations, make, outputs, run_program, soon, until_async

BATCHES = [1, 20]
"""With 1, each job has a batch of its own; with 20, all share one."""

kept: list[Any] = []
"""What jobs leave behind is kept alive here, or whoever collects the garbage would close it."""


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    kept.clear()


async def gathered(evaluator: Evaluator, count: int = 20) -> list[Job]:
    """Run jobs; give them in their order."""
    await evaluator.submit_async(configurations(count))
    jobs = await soon(evaluator.gather_async("ALL"))
    return sorted(jobs, key=lambda job: int(job.args["x"]))


def check_only_one_failed(jobs: Sequence[Job], *, failed: int, kind: str) -> str:
    """Check that all others are done; give what is said of that one."""
    error = jobs[failed].error
    assert error is not None
    assert error.kind == kind
    others = [job for job in jobs if job is not jobs[failed]]
    assert [(job.output, job.error) for job in others] == [(job.args["x"], None) for job in others]
    return error.message


# -- what a job leaves open --------------------------------------------------------------------------------------------


async def a_scope_that_somebody_cancels_later() -> None:
    scope = anyio.CancelScope()
    scope.__enter__()
    kept.append(scope)


async def a_cancelled_group() -> None:
    group = anyio.create_task_group()
    kept.append(group)
    await group.__aenter__()
    group.cancel_scope.cancel()


async def a_group_with_a_task() -> None:
    group = anyio.create_task_group()
    kept.append(group)
    await group.__aenter__()
    group.start_soon(checkpoint)


async def a_generator_whose_time_is_up() -> None:
    async def numbers() -> AsyncIterator[int]:
        with anyio.move_on_after(0):
            yield 1

    generator = numbers()
    kept.append(generator)
    await anext(generator)


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the generator's own complaint
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # likewise
@pytest.mark.parametrize("batching", BATCHES)
@pytest.mark.parametrize(
    "leaves",
    [a_scope_that_somebody_cancels_later, a_cancelled_group, a_group_with_a_task, a_generator_whose_time_is_up],
)
async def test_what_a_job_leaves_open_cancels_no_other(leaves: Callable[[], Any], batching: int) -> None:
    async def run(job: RunningJob) -> int:
        if job["x"] == 3:
            await leaves()
        elif job["x"] > 3:
            for scope in kept:
                if isinstance(scope, anyio.CancelScope):
                    scope.cancel()
            for _ in range(3):
                await checkpoint()
        return int(job["x"])

    async with make("serial", run, batching=batching) as evaluator:
        for _ in range(2):
            assert outputs(await gathered(evaluator)) == list(range(20))


@pytest.mark.anyio
@pytest.mark.parametrize("batching", BATCHES)
async def test_a_shield_that_a_job_leaves_open_protects_no_other(batching: int) -> None:
    async def run(job: RunningJob) -> int:
        if job["x"] == 3:
            scope = anyio.CancelScope(shield=True)
            scope.__enter__()
            kept.append(scope)
        elif job["x"] == 4:
            await anyio.sleep_forever()
        return int(job["x"])

    async with make("serial", run, batching=batching, job_timeout=0.2) as evaluator:
        check_only_one_failed(await gathered(evaluator), failed=4, kind="timeout")


@pytest.mark.anyio
@pytest.mark.parametrize("batching", BATCHES)
async def test_a_job_that_is_cancelled_by_what_it_left_open_fails_alone(batching: int) -> None:
    async def run(job: RunningJob) -> int:
        if job["x"] == 3:
            await a_cancelled_group()
            await anyio.sleep_forever()
        await checkpoint()
        return int(job["x"])

    async with make("serial", run, batching=batching) as evaluator:
        for _ in range(2):
            assert check_only_one_failed(await gathered(evaluator), failed=3, kind="exception")
            kept.clear()


@pytest.mark.anyio
@pytest.mark.parametrize("batching", BATCHES)
async def test_a_job_in_a_scope_that_it_left_open_can_be_stopped(batching: int) -> None:
    async def run(job: RunningJob) -> int:
        if job["x"] == 3:
            await a_scope_that_somebody_cancels_later()
            await anyio.sleep_forever()
        await checkpoint()
        return int(job["x"])

    async with make("serial", run, batching=batching, job_timeout=0.2) as evaluator:
        message = check_only_one_failed(await gathered(evaluator), failed=3, kind="timeout")
        assert "did not stop" not in message


@pytest.mark.anyio
async def test_jobs_that_never_wait_leave_the_loop_its_turns() -> None:
    turns = 0

    async def run(job: RunningJob) -> int:
        time.sleep(0.006)  # noqa: ASYNC251 - the mistake
        return turns

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with anyio.create_task_group() as group, make("serial", run, batching=20) as evaluator:
        group.start_soon(take_turns)
        seen = [job.output for job in await gathered(evaluator)]
        assert len(set(seen)) >= 10
        group.cancel_scope.cancel()


# -- what a job does to its surroundings, which only trio shows --------------------------------------------------------


def on_trio(function: Callable[..., Any], *args: Any) -> None:
    pytest.importorskip("trio", reason="trio is not installed (extra 'trio')")
    anyio.run(function, *args, backend="trio")


class Overrides(SerialEvaluator):
    """Goes the way of an overridden ``execute``."""

    async def execute(self, job: Job) -> Job:
        return await super().execute(job)


@pytest.mark.parametrize("evaluator_class", [SerialEvaluator, Overrides])
@pytest.mark.parametrize("batching", BATCHES)
@pytest.mark.parametrize("waits", [True, False])
def test_a_job_that_cancels_its_surroundings_cancels_no_other(
    evaluator_class: type[Evaluator], batching: int, waits: bool
) -> None:
    async def run(job: RunningJob) -> int:
        import trio

        if job["x"] == 3:
            nursery = trio.lowlevel.current_task().parent_nursery
            assert nursery is not None
            nursery.cancel_scope.cancel()
        if job["x"] != 3 or waits:
            await checkpoint()
        return int(job["x"])

    async def main() -> None:
        async with evaluator_class(run, batching=batching, job_timeout=30) as evaluator:
            jobs = await gathered(evaluator)
            if waits:
                message = check_only_one_failed(jobs, failed=3, kind="exception")
                assert "the job cancelled itself" in message
                assert jobs[3].error is not None
                assert "checkpoint" in (jobs[3].error.traceback or "")
            else:
                assert outputs(jobs) == list(range(20))

    on_trio(main)


@pytest.mark.parametrize("batching", BATCHES)
def test_what_a_job_starts_in_its_surroundings_holds_up_no_other(batching: int) -> None:
    async def run(job: RunningJob) -> int:
        import trio

        nursery = trio.lowlevel.current_task().parent_nursery
        assert nursery is not None
        if job["x"] == 3:
            nursery.start_soon(trio.sleep_forever)
        return int(job["x"])

    async def main() -> None:
        async with make("serial", run, batching=batching) as evaluator:
            assert outputs(await gathered(evaluator)) == list(range(20))

    on_trio(main)


def test_a_job_in_a_nursery_is_cancelled_when_the_loop_ends() -> None:
    started: list[int] = []

    async def run(job: RunningJob) -> None:
        import trio

        async with trio.open_nursery() as nursery:
            started.append(job["x"])
            nursery.start_soon(trio.sleep_forever)

    evaluator = make("serial", run, kill_grace=0.1)

    async def main() -> None:
        await evaluator.__aenter__()
        await evaluator.submit_async(configurations(1))
        await until_async(lambda: bool(started))

    on_trio(main)
    assert [job.status for job in evaluator.jobs] == [JobStatus.CANCELLED]
    evaluator.close()


# -- what a slot forgets -----------------------------------------------------------------------------------------------

FORGOTTEN = 3


class OneByOne(Slot):
    """Goes on when it comes to one job, as if it had finished that."""

    async def run(self, batch: Batch) -> None:
        self._run(batch)

    def _run(self, batch: Batch) -> None:
        while (job := batch.take()) is not None and job.args["x"] != FORGOTTEN:
            batch.finish(job, Outcome(job.args["x"]))


class AllAtOnce(Slot):
    async def run(self, batch: Batch) -> None:
        for job in list(batch.take_all().values()):
            if job.args["x"] == FORGOTTEN:
                return
            batch.finish_sent(job, Outcome(job.args["x"]), 0.0, 0.0)


class Prompt(OneByOne):
    @property
    def is_prompt(self) -> bool:
        return True

    def begin(self, batch: Batch, ended: Callable[[], object], needs_task: Callable[[], object]) -> bool:
        def go() -> None:
            self._run(batch)
            ended()

        Loop.running().call_soon(go)
        return True

    async def stop(self) -> None:
        pass


class Forgetful(SerialEvaluator):
    slot_class: ClassVar[type[Slot]]

    def _make_backend(self) -> Backend:
        slot_class = self.slot_class

        class ForgetfulBackend(Backend):
            cancellation: ClassVar[Cancellation] = "cancel"

            def slot(self, spec: RunSpec) -> Slot:
                return slot_class()

        return ForgetfulBackend()


async def never_called(job: RunningJob) -> None:
    raise AssertionError


@pytest.mark.anyio
@pytest.mark.parametrize("overrides", [False, True], ids=["", "execute"])
@pytest.mark.parametrize("batching", BATCHES)
@pytest.mark.parametrize("slot_class", [OneByOne, AllAtOnce, Prompt])
async def test_a_job_that_its_slot_forgets_fails(slot_class: type[Slot], batching: int, overrides: bool) -> None:
    bases: tuple[type, ...] = (Overrides, Forgetful) if overrides else (Forgetful,)
    forgetful: Any = type("TheForgetful", bases, {"slot_class": slot_class})
    async with forgetful(never_called, batching=batching) as evaluator:
        message = check_only_one_failed(await gathered(evaluator), failed=FORGOTTEN, kind="worker_died")
        assert message == "the worker went on without having finished the job"
        statistics = evaluator.statistics()
        assert (statistics.pending, statistics.running) == (0, 0)


# -- callbacks ---------------------------------------------------------------------------------------------------------


class Interrupts(Callback):
    def on_done(self, job: Job) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["serial", "thread"])
def test_an_interrupt_that_a_callback_makes_up_costs_no_job(method: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with make(method, lambda job: job["x"], callbacks=[Interrupts()], num_workers=2) as evaluator:
            assert outputs(await gathered(evaluator)) == list(range(20))
            assert evaluator.statistics().callback_errors == 20

    on_trio(main)
    assert "Interrupts.on_done raised; no job is lost by it" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    "runner",
    [
        "asyncio.run(main())",
        "asyncio.new_event_loop().run_until_complete(main())",  # without asyncio.run's own way with Ctrl-C
        "trio.run(main)",
    ],
)
def test_ctrl_c_while_a_callback_is_at_work_ends_the_program(runner: str) -> None:
    if "trio" in runner:
        pytest.importorskip("trio", reason="trio is not installed (extra 'trio')")
    program = run_program(
        f"""
        import asyncio, signal, anyio
        from paraval import Evaluator
        from paraval.callback import Callback
        {"import trio" if "trio" in runner else ""}

        class Signals(Callback):
            def on_done(self, job):
                if job.args["x"] == 1:
                    signal.raise_signal(signal.SIGINT)

        async def run(job):
            pass

        async def main():
            async with evaluator:
                await evaluator.submit_async([dict(x=x) for x in range(4)])
                await evaluator.gather_async("ALL")
                await anyio.sleep(20)

        evaluator = Evaluator.create(run, "serial", dict(callbacks=[Signals()]))
        try:
            {runner}
        except KeyboardInterrupt:
            print("interrupted", evaluator.statistics().callback_errors, flush=True)
        """
    )
    assert program.stdout == ["interrupted 0"], program.stderr
