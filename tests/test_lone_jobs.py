"""A small job for a worker process that waits is begun and ended without a task, unless anything but its end comes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from paraval import Evaluator, Job, JobStatus, RunningJob
from paraval.backends.process_slot import ProcessSlot
from paraval.callback import Callback
from paraval.storage import MemoryStorage
from runfunctions import EXIT_CODE, Flags, WrongWhenPickled, go_wrong, hold_the_gil, start_sleeper
from support import soon, until, until_async
from workers import error_of, is_alive, worker_marks

pytestmark = worker_marks


class Act:
    """A run-function that does what its job says."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags

    def __call__(self, job: RunningJob) -> Any:
        self.flags.put(f"runs {job['act']}", os.getpid())
        match job["act"]:
            case "records":
                job.record(1, job["x"])
                job.storage.store_job_metadata(str(job.id), "noted", job["x"])
            case "large":
                return bytes(5_000_000)
            case "waits":
                self.flags.wait("go")
            case "sleeps":
                time.sleep(60)
            case "holds the GIL":
                hold_the_gil(60)
            case "starts a program":
                return start_sleeper()
            case "cannot be sent":
                return threading.Lock()
            case "wrong result":
                return WrongWhenPickled("exit")
            case wrong:
                go_wrong(wrong)  # if it is that
        return job["x"]


@asynccontextmanager
async def warm(flags: Flags, **kwargs: Any) -> AsyncIterator[Evaluator]:
    """Give an evaluator whose worker is set up and waits."""
    async with Evaluator.create(Act(flags), "process", {"num_workers": 1, "kill_grace": 0.1, **kwargs}) as evaluator:
        assert [(await evaluate(evaluator, "returns", x)).output for x in range(2)] == [0, 1]
        yield evaluator


async def evaluate(evaluator: Evaluator, act: str, x: Any = 7) -> Job:
    return await soon(evaluator.evaluate_async({"act": act, "x": x}))


def slot_of(evaluator: Evaluator) -> ProcessSlot:
    engine = evaluator._life.engine
    assert engine is not None
    (worker,) = engine._workers
    assert isinstance(worker._slot, ProcessSlot)
    return worker._slot


def process_of(evaluator: Evaluator) -> Any:
    return slot_of(evaluator)._process


async def until_dead(pid: int) -> None:
    await until_async(lambda: not is_alive(pid))


async def goes_on(evaluator: Evaluator) -> None:
    assert [(await evaluate(evaluator, "returns", x)).output for x in range(3)] == [0, 1, 2]


def on_asyncio(main: Any, *args: Any) -> None:
    anyio.run(main, *args, backend="asyncio")


def test_it_is_begun_without_a_task(flags: Flags) -> None:
    async def main() -> None:
        async with warm(flags) as evaluator, anyio.create_task_group() as group:
            group.start_soon(evaluate, evaluator, "waits")
            await until_async(lambda: flags.up("runs waits"))
            assert slot_of(evaluator)._begun is not None
            flags.put("go")
            group.start_soon(goes_on, evaluator)

    on_asyncio(main)


def test_as_many_jobs_as_idle_workers_are_begun_without_tasks(flags: Flags) -> None:
    def is_begun(evaluator: Evaluator) -> list[bool]:
        engine = evaluator._life.engine
        assert engine is not None
        return [isinstance(worker._slot, ProcessSlot) and worker._slot._begun is not None for worker in engine._workers]

    async def main() -> None:
        async with Evaluator.create(Act(flags), "process", {"num_workers": 2}) as evaluator:
            await soon(evaluator.submit_async([{"act": "returns", "x": 0}] * 20))  # they are tiny, it learns
            await soon(evaluator.gather_async("ALL"))
            for _ in range(100):  # what a worker said after its last batch may still be on its way, once
                await soon(evaluator.submit_async([{"act": "returns", "x": x} for x in range(2)]))
                begun = is_begun(evaluator)
                jobs = await soon(evaluator.gather_async("ALL"))
                assert sorted(job.output for job in jobs) == [0, 1]
                if begun == [True, True]:
                    return
            raise AssertionError("one of two jobs always had a task")

    on_asyncio(main)


@pytest.mark.parametrize("how", ["argument", "storage", "output", "limit", "recycled"])
def test_what_needs_a_task_has_one(flags: Flags, how: str) -> None:
    kwargs: dict[str, dict[str, Any]] = {
        "output": {"capture_output": True},
        "limit": {"memory_limit": 1 << 30},
        "recycled": {"max_jobs_per_worker": 9},
    }

    async def main() -> None:
        async with warm(flags, **kwargs.get(how, {})) as evaluator, anyio.create_task_group() as group:
            group.start_soon(evaluate, evaluator, "waits", [how] if how == "argument" else 1)
            await until_async(lambda: flags.up("runs waits"))
            assert (slot_of(evaluator)._begun is not None) is (how == "storage")
            flags.put("go")
            job = await evaluate(evaluator, "records")
            assert (job.output, evaluator.storage.load_job(job.id)["metadata"]["noted"]) == (7, 7)
            await goes_on(evaluator)

    on_asyncio(main)


@pytest.mark.parametrize(
    "act", ["exit", "kill", "segfault", "raise", "sys.exit", "interrupt", "wrong result", "cannot be sent"]
)
def test_one_that_goes_wrong_is_to_blame(flags: Flags, act: str) -> None:
    reasons = {
        "exit": ("worker_died", f"exit code {EXIT_CODE}"),
        "kill": ("worker_died", "SIGKILL"),
        "segfault": ("worker_died", "SIGSEGV"),
        "raise": ("ValueError", "it went wrong"),
        "sys.exit": ("SystemExit", "it went wrong"),
        "interrupt": ("KeyboardInterrupt", "it went wrong"),
        "wrong result": ("worker_died", f"exit code {EXIT_CODE}"),
        "cannot be sent": ("PicklingError", "lock"),
    }
    reason, message = reasons[act]

    async def main() -> None:
        async with warm(flags) as evaluator:
            for _ in range(2):
                job = await evaluate(evaluator, act)
                assert job.error is not None
                assert job.error.reason == f"F_{reason}"
                assert message in job.error.message
                await goes_on(evaluator)

    on_asyncio(main)


def test_one_whose_worker_dies_has_its_attempts(flags: Flags) -> None:
    async def main() -> None:
        async with warm(flags, max_attempts=3) as evaluator:
            job = await evaluate(evaluator, "kill")
            assert job.error is not None
            assert (job.error.kind, job.error.attempts) == ("worker_died", 3)
            await goes_on(evaluator)

    on_asyncio(main)


def test_a_large_result_and_a_call_of_the_storage_come_too(flags: Flags) -> None:
    async def main() -> None:
        async with warm(flags) as evaluator:
            for _ in range(3):
                assert (await evaluate(evaluator, "large")).output == bytes(5_000_000)
                job = await evaluate(evaluator, "records", 3)
                loaded = evaluator.storage.load_job(job.id)
                assert (loaded["intermediate"]["objective"], loaded["metadata"]["noted"]) == ([3], 3)
                await goes_on(evaluator)

    on_asyncio(main)


@pytest.mark.parametrize("act", ["sleeps", "holds the GIL"])
@pytest.mark.parametrize("how", ["time limit", "budget", "cancelled", "closed"])
def test_it_can_be_stopped(flags: Flags, act: str, how: str) -> None:
    async def main() -> None:
        async with warm(flags, job_timeout=0.5 if how == "time limit" else None) as evaluator:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    evaluated: list[Job] = []

                    async def ask() -> None:
                        evaluated.append(await evaluate(evaluator, act))

                    group.start_soon(ask)
                    await until_async(lambda: flags.up(f"runs {act}"))
                    pid = int(flags.text(f"runs {act}"))
                    assert is_alive(pid)
                    if how == "budget":
                        evaluator.timeout = 0.01
                    elif how == "cancelled":
                        scope.cancel()
                    elif how == "closed":
                        await soon(evaluator.aclose())
            if how != "cancelled":
                assert [job.status for job in evaluated] == [JobStatus.CANCELLED]
                assert error_of(evaluated[0])[0] == ("cancelled" if how == "closed" else "timeout")
            await until_dead(pid)
            if how == "budget":
                evaluator.timeout = None
            await goes_on(evaluator)

    on_asyncio(main)


def test_a_worker_that_dies_while_it_waits_costs_no_job(flags: Flags) -> None:
    async def main() -> None:
        async with warm(flags) as evaluator:
            for _ in range(3):
                pid = process_of(evaluator).pid
                os.kill(pid, signal.SIGKILL)
                await until_dead(pid)
                await goes_on(evaluator)

    on_asyncio(main)


def test_a_worker_that_dies_while_a_program_of_it_holds_its_socket_is_noticed(flags: Flags) -> None:
    async def main() -> None:
        async with warm(flags) as evaluator, anyio.create_task_group() as group:
            pids = [(await evaluate(evaluator, "starts a program")).output]

            async def ask() -> None:
                job = await evaluate(evaluator, "waits")
                assert error_of(job)[0] == "worker_died"

            group.start_soon(ask)
            await until_async(lambda: flags.up("runs waits"))
            os.kill(process_of(evaluator).pid, signal.SIGKILL)
            await until_async(lambda: not any(map(is_alive, pids)))

    on_asyncio(main)


def test_what_the_socket_does_not_take_at_once_is_sent_later(flags: Flags) -> None:
    async def main() -> None:
        async with warm(flags) as evaluator, anyio.create_task_group() as group:
            process = process_of(evaluator)
            process._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            os.kill(process.pid, signal.SIGSTOP)  # so that nobody makes room
            text = "x" * 7_000
            found: list[Job] = []

            async def ask() -> None:
                found.append(await evaluate(evaluator, "returns", text))

            group.start_soon(ask)
            await until_async(lambda: slot_of(evaluator)._sent)
            os.kill(process.pid, signal.SIGCONT)
            await until_async(lambda: found)
            assert (found[0].output, process_of(evaluator).pid) == (text, process.pid)
            await goes_on(evaluator)

    on_asyncio(main)


def test_a_defect_where_no_task_is_ends_the_worker_and_nothing_hangs(
    flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with warm(flags) as evaluator, anyio.create_task_group() as group:
            slot, pid = slot_of(evaluator), process_of(evaluator).pid

            def fail(*_args: object) -> None:
                raise MemoryError("no room for what came")

            async def ask() -> None:
                job = await evaluate(evaluator, "waits")
                assert error_of(job)[0] == "worker_died"
                assert "no room" in error_of(job)[1]

            group.start_soon(ask)
            await until_async(lambda: flags.up("runs waits"))
            with monkeypatch.context() as patch:
                patch.setattr(slot, "_take", fail)
                flags.put("go")
                await until_dead(pid)
            group.start_soon(goes_on, evaluator)

    on_asyncio(main)


def test_jobs_may_be_falsy() -> None:
    class Row(Job):
        def __len__(self) -> int:
            return len(self.args)

    for method in ("process", "thread"):
        with Evaluator.create(lambda job: 1, method, {"num_workers": 2, "job_class": Row}) as evaluator:
            for _ in range(3):
                assert evaluator.evaluate({}).output == 1
                evaluator.submit([{}] * 3)
                assert [job.output for job in evaluator.gather("ALL")] == [1] * 3


def test_others_begin_when_one_ends_and_callbacks_may_raise(flags: Flags) -> None:
    class Raises(Callback):
        def on_done(self, job: Job) -> None:
            raise RuntimeError(job.id)

    storage = MemoryStorage()
    with Evaluator.create(
        Act(flags), "process", {"num_workers": 2, "callbacks": [Raises()], "storage": storage}
    ) as evaluator:
        evaluator.submit([{"act": "returns", "x": x} for x in range(2)])
        seen = []
        for x in range(2, 60):
            (job, *more) = evaluator.gather("BATCH", 1)
            seen += [job.output, *(it.output for it in more)]
            evaluator.submit([{"act": "records" if x % 7 == 0 else "returns", "x": x} for _ in (job, *more)][:1])
        seen += [job.output for job in evaluator.gather("ALL")]
        assert sorted(seen) == list(range(60))
        until(lambda: evaluator.statistics().callback_errors == 60)
    assert [record.status for record in storage.scan(evaluator.search_id)[0]] == [JobStatus.DONE.value] * 60
