"""What the type checker knows of the public names. The assertions are checked by mypy; running them costs nothing.

Every ``type: ignore`` here stands for a mistake that mypy must find: under ``--strict`` an unused one is an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, assert_type

import pytest

from paraval import (
    Evaluator,
    HPOJob,
    Job,
    JobError,
    JobStatus,
    JobTiming,
    RunningJob,
    SerialEvaluator,
    Statistics,
    ThreadPoolEvaluator,
)
from paraval.callback import Callback
from paraval.errors import JobFailedError, JobsFailedError
from paraval.storage import MemoryStorage, NullStorage, Storage


def double(job: RunningJob) -> float:
    return float(job["x"] * 2)


async def async_double(job: RunningJob) -> float:
    return double(job)


def test_the_synchronous_face() -> None:
    with ThreadPoolEvaluator(double, num_workers=2) as evaluator:
        assert_type(evaluator, ThreadPoolEvaluator)
        evaluator.submit([{"x": 1}])
        jobs = evaluator.gather("ALL")
        assert_type(jobs, list[Job])
        assert_type(evaluator.gather("BATCH", size=1), list[Job])
        assert_type(evaluator.evaluate({"x": 1}), Job)
        assert_type(evaluator.gather_other_jobs_done(), list[Job])
        assert_type(evaluator.close(), list[Job])
        assert_type(evaluator.statistics(), Statistics)
        assert_type(evaluator.statistics().utilisation, float)
        assert_type(evaluator.timeout, float | None)
        assert_type(evaluator.time_left, float | None)
        assert_type(evaluator.num_jobs_submitted, int)
        assert_type(evaluator.num_jobs_gathered, int)
        assert_type(evaluator.jobs, list[Job])
        assert_type(evaluator.storage, Storage)
        assert_type(evaluator.search_id, str)
        assert_type(evaluator.callbacks, list[Callback])
        assert_type(evaluator.job_class, type[Job])
        assert_type(evaluator.is_master, bool)
        assert_type(evaluator.to_json(), dict[str, Any])
        assert_type(evaluator.FAIL_RETURN_VALUE, str)


@pytest.mark.anyio
async def test_the_asynchronous_face() -> None:
    async with SerialEvaluator(async_double) as evaluator:
        assert_type(evaluator, SerialEvaluator)
        await evaluator.submit_async([{"x": 1}])
        assert_type(await evaluator.gather_async("ALL"), list[Job])
        assert_type(await evaluator.gather_async("BATCH", 1), list[Job])
        assert_type(await evaluator.evaluate_async({"x": 1}), Job)
        assert_type(await evaluator.gather_other_jobs_done_async(), list[Job])
        results: AsyncIterator[Job] = evaluator.as_completed()
        async for job in results:
            assert_type(job, Job)
        assert_type(await evaluator.aclose(), list[Job])


def test_making_an_evaluator() -> None:
    assert_type(Evaluator.create(double, "thread", {"num_workers": 2}), Evaluator)
    assert_type(Evaluator.create(double, method="thread", method_kwargs=None), Evaluator)
    ThreadPoolEvaluator(double, storage=NullStorage(), callbacks=[], job_class=HPOJob, on_error="raise", batching=False)
    with pytest.raises((TypeError, ValueError)):
        ThreadPoolEvaluator(double, num_workers="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error"):
        ThreadPoolEvaluator(double, on_error="explode")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="storage"):
        ThreadPoolEvaluator(double, storage={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="job_class"):
        ThreadPoolEvaluator(double, job_class=int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_wokers"):
        ThreadPoolEvaluator(double, num_wokers=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="abstract"):
        Evaluator(double)  # type: ignore[abstract]
    with ThreadPoolEvaluator(double) as evaluator, pytest.raises(ValueError, match="ALL"):
        evaluator.gather("SOME")  # type: ignore[arg-type]


def test_jobs() -> None:
    job = HPOJob("0.0", {"x": 1})
    assert_type(job.id, str)
    assert_type(job.args, dict[str, Any])
    assert_type(job.status, JobStatus)
    assert_type(job.error, JobError | None)
    assert_type(job.timing, JobTiming)
    assert_type(job.timing.ran, float | None)
    assert_type(job.metadata, dict[str, Any])
    assert_type(job.failed, bool)
    assert_type(job.objective, float | str | tuple[float | str, ...] | list[float | str] | None)
    running = job.create_running_job()
    assert_type(running, RunningJob)
    assert_type(running["job_id"], Any)
    assert_type(running.parameters, dict[str, Any])
    assert_type(running.stopped(), bool)
    assert_type(running.status, JobStatus)


def test_failures() -> None:
    failed = Job("0.0", {})
    failed.set_error(JobError("timeout", "too long"))
    group = JobsFailedError("1 of 1 jobs failed", [JobFailedError(failed)], [failed])
    assert_type(group.jobs, list[Job])
    (failure,) = group.exceptions
    if isinstance(failure, JobFailedError):
        assert_type(failure.job, Job)


def test_storage() -> None:
    storage = MemoryStorage().connect()
    assert_type(storage, MemoryStorage)
    search_id = storage.create_new_search()
    assert_type(search_id, str)
    assert_type(storage.create_new_job(search_id), str)
    assert_type(storage.load_job("0.0"), dict[str, Any])
    assert_type(storage.load_jobs(["0.0"]), dict[str, dict[str, Any]])
    assert_type(storage.load_all_job_ids(search_id), list[str])
