"""The caller's loop as the home of an evaluator: cancelled, left, dropped or closed at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from paraval import Evaluator, EvaluatorClosedError, Job, JobStatus, RunningJob
from paraval.callback import Callback
from paraval.errors import UsageError
from paraval.storage import JobRecord, MemoryStorage
from support import WAIT_S, Latch, configurations, double, in_thread, run_program, soon, until, until_async
from workers import needs_trio

both_loops = pytest.mark.parametrize("backend", ["asyncio", pytest.param("trio", marks=needs_trio)])


class Heard(Callback):
    """What callbacks were told."""

    def __init__(self) -> None:
        self.gathered: list[str] = []
        self.closes = 0

    def on_gather(self, local_jobs: Sequence[Job], other_jobs: Sequence[Job]) -> None:
        self.gathered += [job.id for job in local_jobs]

    def on_close(self) -> None:
        self.closes += 1


class SlowStorage(MemoryStorage):
    """One that is called in threads, and takes new jobs in only when it may."""

    by_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.asked = Latch()
        self.may = Latch()

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self.asked.open()
        self.may.wait()
        super().insert(search_id, records)


async def never(job: RunningJob) -> None:
    await anyio.sleep_forever()


async def later(job: RunningJob) -> float:
    await anyio.sleep(0.01)
    return float(job["x"])


class Stubborn:
    """A run-function that does not end when it is told to, but when it may."""

    def __init__(self) -> None:
        self.runs = Latch()
        self.may_end = Latch()

    async def __call__(self, job: RunningJob) -> None:
        self.runs.open()
        while not self.may_end.is_open:
            with contextlib.suppress(BaseException):  # cancelled, it goes on
                await anyio.sleep(0.01)


@pytest.fixture
def stubborn() -> Iterator[Stubborn]:
    stubborn = Stubborn()
    yield stubborn
    stubborn.may_end.open()


# -- entering ----------------------------------------------------------------------------------------------------------


def test_a_loop_may_end_in_the_turn_in_which_a_block_is_entered() -> None:
    async def background() -> None:
        async with Evaluator.create(later) as evaluator:
            evaluator.submit(configurations(3))
            await asyncio.sleep(60)

    async def main() -> None:
        tasks.append(asyncio.create_task(background()))

    tasks: list[asyncio.Task[None]] = []
    asyncio.run(main())
    assert tasks[0].cancelled()


@both_loops
def test_of_two_tasks_that_enter_at_once_one_is_refused(backend: str) -> None:
    async def main() -> None:
        evaluator = Evaluator.create(later)
        evaluator.submit(configurations(1))
        evaluator.gather("ALL")
        refused: list[UsageError] = []

        async def enter() -> None:
            try:
                await evaluator.__aenter__()
            except UsageError as exc:
                refused.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(enter)
            group.start_soon(enter)
        assert len(refused) == 1
        assert (await evaluator.evaluate_async({"x": 2})).output == 2.0
        await evaluator.__aexit__(None, None, None)

    anyio.run(main, backend=backend)


@both_loops
def test_a_block_is_not_entered_over_the_job_of_another_thread(backend: str) -> None:
    runs, may_end = Latch(), Latch()

    def waits(job: RunningJob) -> str:
        runs.open()
        may_end.wait()
        return "done"

    async def main() -> None:
        evaluator = Evaluator.create(waits, "thread")
        async with anyio.create_task_group() as group:

            async def evaluate() -> None:
                assert (await in_thread(evaluator.evaluate, {})).output == "done"

            group.start_soon(evaluate)
            await until_async(lambda: runs.is_open)
            with pytest.raises(UsageError, match="1 jobs were submitted before 'async with'"):
                await evaluator.__aenter__()
            may_end.open()
        evaluator.close()

    anyio.run(main, backend=backend)


# -- leaving -----------------------------------------------------------------------------------------------------------


@both_loops
def test_a_job_that_does_not_end_keeps_nobody_from_leaving_nor_from_going_on(backend: str, stubborn: Stubborn) -> None:
    async def function(job: RunningJob) -> Any:
        return await stubborn(job) if job["x"] == 0 else job["x"]

    async def main() -> None:
        evaluator = Evaluator.create(function, "serial", {"kill_grace": 0.05})
        await evaluator.__aenter__()
        await evaluator.submit_async([{"x": 0}])
        await until_async(lambda: stubborn.runs.is_open)
        (given_up,) = await soon(evaluator.aclose())
        assert given_up.status is JobStatus.CANCELLED
        assert (await soon(evaluator.evaluate_async({"x": 7}))).output == 7  # it is open again
        await soon(evaluator.__aexit__(None, None, None))
        stubborn.may_end.open()

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("slow", [False, True], ids=["memory", "slow storage"])
def test_a_timeout_while_a_block_is_left_does_not_cut_that_short(slow: bool, stubborn: Stubborn) -> None:
    heard = Heard()
    storage = SlowStorage() if slow else MemoryStorage()
    if isinstance(storage, SlowStorage):
        storage.may.open()
    kwargs = {"kill_grace": 0.3, "num_workers": 2, "callbacks": [heard], "storage": storage}

    async def function(job: RunningJob) -> Any:
        return await stubborn(job) if job["x"] == 0 else job["x"]

    async def main() -> None:
        evaluator = Evaluator.create(function, "serial", kwargs)
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(asyncio.CancelledError):
            async with evaluator:
                await evaluator.submit_async([{"x": 0}, {"x": 1}])
                await until_async(lambda: evaluator.statistics().done == 1)
                asyncio.get_running_loop().call_later(0.1, task.cancel)  # in the middle of the grace
        task.uncancel()
        assert heard.closes == 1
        assert sorted(heard.gathered) == ["0.0", "0.1"]
        assert storage.owners() == set()
        stubborn.may_end.open()

    asyncio.run(main())


def test_what_is_left_when_the_loop_ends_in_the_middle_of_a_close(stubborn: Stubborn) -> None:
    evaluator = Evaluator.create(stubborn, "serial", {"kill_grace": 20.0})
    loop = asyncio.new_event_loop()

    async def enter() -> None:
        await evaluator.__aenter__()
        await evaluator.submit_async([{}])
        await until_async(lambda: stubborn.runs.is_open)

    async def turn() -> None:
        await asyncio.sleep(0.01)

    loop.run_until_complete(enter())
    leaving = loop.create_task(evaluator.__aexit__(None, None, None))
    loop.run_until_complete(turn())
    stubborn.may_end.open()
    tasks = asyncio.all_tasks(loop)
    loop.close()
    assert not leaving.done()
    evaluator.submit([{}])
    assert len(evaluator.gather("ALL")) == 1
    evaluator.close()
    statistics = evaluator.statistics()
    assert (statistics.submitted, statistics.done, statistics.cancelled) == (2, 1, 1)
    for task in tasks:  # nobody will run these any more
        task._log_destroy_pending = False  # type: ignore[attr-defined] # asyncio would complain, rightly, of this test
        with contextlib.suppress(RuntimeError):
            task.get_coro().close()


def test_a_loop_whose_tasks_were_all_cancelled_is_still_the_home() -> None:
    loops = []

    async def function(job: RunningJob) -> None:
        loops.append(asyncio.get_running_loop())

    async def main() -> None:
        async with Evaluator.create(function) as evaluator:
            await evaluator.evaluate_async({})
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.01)
            await evaluator.evaluate_async({})
            assert loops == [asyncio.get_running_loop()] * 2

    asyncio.run(main())


# -- launching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["submit", "evaluate"])
def test_a_launch_that_is_cancelled_leaves_no_job_that_nobody_owns(how: str) -> None:
    storage = SlowStorage()
    evaluator = Evaluator.create(never, "serial", {"storage": storage})

    async def main() -> None:
        async with evaluator:
            launch = evaluator.submit_async([{}]) if how == "submit" else evaluator.evaluate_async({})
            task = asyncio.ensure_future(launch)
            await until_async(lambda: storage.asked.is_open)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()  # the storage is at it
            storage.may.open()
            with pytest.raises(asyncio.CancelledError):
                await task
            statistics = evaluator.statistics()
            assert (statistics.submitted, statistics.cancelled) == (1, int(how == "evaluate"))
        assert evaluator.statistics().cancelled == 1

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "paraval-loop"]
    (record,) = storage.scan(evaluator.search_id)[0]
    assert record.status == JobStatus.CANCELLED.value


@both_loops
def test_a_submit_in_a_cancelled_scope_takes_no_room(backend: str) -> None:
    storage = SlowStorage()
    storage.may.open()

    async def main() -> None:
        async with Evaluator.create(later, "serial", {"max_pending": 1, "storage": storage}) as evaluator:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await evaluator.submit_async(configurations(1))
            assert evaluator.num_jobs_submitted == 0
            await soon(evaluator.submit_async(configurations(3)))
            assert len(await soon(evaluator.gather_async("ALL"))) == 3

    anyio.run(main, backend=backend)


def test_who_waits_on_another_loop_can_be_cancelled_when_the_home_has_stopped() -> None:
    home = asyncio.new_event_loop()
    thread = threading.Thread(target=home.run_forever)
    thread.start()
    evaluator = Evaluator.create(never)
    asyncio.run_coroutine_threadsafe(evaluator.__aenter__(), home).result(WAIT_S)

    async def main() -> None:
        task = asyncio.create_task(evaluator.evaluate_async({}))
        await until_async(lambda: evaluator.statistics().running == 1)
        home.call_soon_threadsafe(home.stop)
        await until_async(lambda: not home.is_running())
        task.cancel()
        with pytest.raises((asyncio.CancelledError, EvaluatorClosedError)):
            await soon(task)

    asyncio.run(main())
    thread.join(WAIT_S)
    home.run_until_complete(evaluator.__aexit__(None, None, None))
    home.close()


# -- callbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["gather", "evaluate", "close"])
def test_what_would_wait_for_itself_in_a_callback_is_refused(call: str) -> None:
    refusals: list[BaseException] = []
    storage = SlowStorage()
    storage.may.open()

    class Waiting(Callback):
        def on_done(self, job: Job) -> None:
            calls = {
                "gather": lambda: evaluator.gather("ALL"),
                "evaluate": lambda: evaluator.evaluate({"x": 1}),
                "close": evaluator.close,
            }
            try:
                calls[call]()
            except UsageError as exc:
                refusals.append(exc)

    with Evaluator.create(double, "thread", {"storage": storage, "callbacks": [Waiting()]}) as evaluator:
        evaluator.submit(configurations(3))
        assert len(evaluator.gather("ALL")) == 3
    assert len(refusals) == 3


# -- never left --------------------------------------------------------------------------------------------------------


def _drop(things: list[Any]) -> None:
    things.clear()
    gc.collect()


@both_loops
def test_one_that_is_dropped_in_its_block_is_told_of_and_ends(backend: str) -> None:
    async def main() -> None:
        evaluator = Evaluator.create(later)
        await evaluator.__aenter__()
        await evaluator.evaluate_async({"x": 1})
        dropped = [evaluator]
        del evaluator
        await anyio.lowlevel.checkpoint()
        with pytest.warns(ResourceWarning, match="was not closed"):
            _drop(dropped)

    before = set(threading.enumerate())
    anyio.run(main, backend=backend)
    until(lambda: set(threading.enumerate()) <= before)


def test_a_program_that_never_leaves_the_block_has_complete_files(tmp_path: Path) -> None:
    program = run_program(
        f"""
        import asyncio
        from paraval import Evaluator, HPOJob
        from paraval.callback import CSVLoggerCallback

        async def run(job):
            return float(job["x"])

        async def main():
            await evaluator.__aenter__()
            await evaluator.submit_async([dict(x=x) for x in range(5)])
            while evaluator.statistics().done < 5:
                await asyncio.sleep(0.01)

        kwargs = dict(job_class=HPOJob, callbacks=[CSVLoggerCallback({str(tmp_path / "rows.csv")!r})])
        evaluator = Evaluator.create(run, "serial", kwargs)
        asyncio.run(main())
        """,
        "-W",
        "default::ResourceWarning",
    )
    assert program.code == 0
    assert "was not closed" in program.stderr
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 6


def test_ctrl_c_while_the_program_computes_in_the_block_leaves_complete_files(tmp_path: Path) -> None:
    program = run_program(
        f"""
        import asyncio, os, signal
        from paraval import Evaluator, HPOJob
        from paraval.callback import CSVLoggerCallback

        async def run(job):
            return float(job["x"])

        async def main():
            async with evaluator:
                await evaluator.submit_async([dict(x=x) for x in range(5)])
                while evaluator.statistics().done < 5:
                    await asyncio.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)  # the task is told when it awaits: in the leaving of the block
                sum(range(100_000))

        kwargs = dict(job_class=HPOJob, callbacks=[CSVLoggerCallback({str(tmp_path / "rows.csv")!r})])
        evaluator = Evaluator.create(run, "serial", kwargs)
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    )
    assert "interrupted" in program.stdout
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 6
