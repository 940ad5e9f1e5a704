"""What workers report, and what becomes of it: each job gets its own, whatever the others do meanwhile."""

from __future__ import annotations

import _thread
import os
import signal
import socket
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paraval import Evaluator, Job, JobStatus, RunningJob
from paraval.backends.base import Batch, Returned
from paraval.backends.process import ProcessBackend
from paraval.backends.process_slot import ProcessSlot, _Load
from paraval.callback import Callback
from paraval.engine.ledger import Booking, Ledger
from paraval.engine.notify import Notifier
from paraval.engine.recorder import Recorder
from paraval.engine.running.attempts import Attempts
from paraval.engine.running.settling import Settling
from paraval.loops import Loop
from paraval.outcome import JobError, Outcome
from paraval.storage import MemoryStorage
from runfunctions import Flags, double
from support import configurations, outputs, until
from workers import LOKY, by_x, error_of, make_in, polite, processes, worker_marks

pytestmark = worker_marks
both_methods = pytest.mark.parametrize("method", ["process", LOKY])


def make(function: Any, method: str = "process", **kwargs: Any) -> Evaluator:
    return Evaluator.create(function, method, {"num_workers": 1, **kwargs})


# -- results -----------------------------------------------------------------------------------------------------------


_result: dict[str, Any] = {}


def same_dict(job: RunningJob) -> dict[str, Any]:
    """Return one dict again and again."""
    _result["x"] = job["x"]
    return _result


@pytest.mark.parametrize("method", ["process", LOKY, "executor"])
def test_what_a_job_returned_is_not_what_the_next_one_makes_of_it(method: str) -> None:
    evaluator = make_in(same_dict, processes) if method == "executor" else make(same_dict, method)
    with evaluator:
        evaluator.submit(configurations(300))
        jobs = evaluator.gather("ALL")
    assert [job.output for job in jobs] == [{"x": job.args["x"]} for job in jobs]
    assert len({id(job.output) for job in jobs}) == 300


def test_a_job_that_waits_for_its_next_attempt_is_not_taken_to_run() -> None:
    long, other, raising, last = [Job(f"0.{number}", {}) for number in range(4)]
    evaluator = make(double)
    slot = ProcessSlot(evaluator._spec, cast("ProcessBackend", evaluator._make_backend()))
    slot._has_begun = True
    batch = Batch([long, other], lambda: 5.0, lambda: None)
    slot._sent = batch.take_all()
    slot._loads.append(_Load(1, [long, other]))
    batch.take_more([raising, last])
    slot._loads.append(_Load(2, [raising, last]))

    def done(number: int, errors: dict[int, tuple[Any, ...]]) -> None:
        process = cast("Any", SimpleNamespace(jobs_done=0))
        slot._take_done(process, batch, number, 0, struct.pack("2d", 1.0, 2.0), errors, [None])

    done(1, {})  # which took long: the worker's guard is about to give the other one back
    done(2, {0: (*JobError("exception", "once more", type="ValueError"), True)})
    ended = {report[0].id: report[1] for report in batch.collect() if not isinstance(report, Returned)}
    assert ended["0.2"].may_retry
    raising._started, raising._status = None, JobStatus.READY  # it waits for its next attempt
    slot._take_over(batch, 1, 1, 1.0)
    assert raising.status is JobStatus.READY
    assert (last.status, batch.reclaim()) == (JobStatus.RUNNING, [other])


@both_methods
def test_a_worker_that_cannot_report_ends(method: str) -> None:
    def spoil() -> None:
        from paraval.worker import batches

        report, thread = batches.Batches._report, _thread.get_ident()

        def spoiled(reporter: Any) -> None:
            if _thread.get_ident() != thread:
                raise MemoryError
            report(reporter)

        cast("Any", batches.Batches)._report = spoiled  # in a process of its own

    def function(job: RunningJob) -> Any:
        time.sleep(0.15 if job["x"] == 0 else 0)  # so that its guard reports
        return job["x"]

    with make(function, method, initializer=spoil, batching=4) as evaluator:
        evaluator.submit(configurations(4))
        assert sorted(outputs(evaluator.gather("ALL"))) == [0, 1, 2, 3], "each was run alone in the end"


# -- before a job begins -----------------------------------------------------------------------------------------------


@both_methods
def test_setting_a_worker_up_is_not_the_time_of_a_job(method: str) -> None:
    with make(double, method, initializer=lambda: time.sleep(1.0), job_timeout=0.5) as evaluator:
        evaluator.submit([{"x": threading.Lock()}])  # after that there is a worker, but it was sent nothing
        (job,) = evaluator.gather("ALL")
        assert error_of(job)[0] == "exception"
        evaluator.submit(configurations(1))
        assert outputs(evaluator.gather("ALL")) == [0]


@both_methods
def test_a_worker_that_was_sent_nothing_takes_the_next_jobs(method: str) -> None:
    with make(double, method, memory_limit=2e9) as evaluator:
        evaluator.submit([{"x": threading.Lock()}])
        assert error_of(evaluator.gather("ALL")[0])[0] == "exception"
        evaluator.submit(configurations(3))
        assert outputs(evaluator.gather("ALL")) == [0, 2, 4]


@both_methods
@pytest.mark.parametrize("how", ["close", "timeout"])
def test_what_is_stopped_while_its_worker_is_set_up_never_begins(method: str, how: str, flags: Flags) -> None:
    def set_up() -> None:  # until it is asked to stop
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        flags.put("in-set-up")
        while signal.SIGTERM not in signal.sigpending():
            time.sleep(0.001)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def function(job: RunningJob) -> Any:
        flags.put("ran")

    with make(function, method, initializer=set_up, kill_grace=30.0) as evaluator:
        evaluator.submit(configurations(1))
        until(lambda: flags.up("in-set-up"))
        if how == "timeout":
            evaluator.timeout = 0.01
        (job,) = evaluator.close() if how == "close" else evaluator.gather("ALL")
        assert (job.status, job.timing.started) == (JobStatus.CANCELLED, None)
        assert error_of(job)[0] == ("cancelled" if how == "close" else "timeout")
        assert not flags.up("ran")


def test_a_job_that_was_given_up_is_not_touched_any_more() -> None:
    ended, returned, waiting, last = [Job(f"0.{number}", {}) for number in range(4)]
    batch = Batch([ended, returned], lambda: 5.0, lambda: None)
    batch.take_all()
    near = Batch([waiting, last], lambda: 5.0, lambda: None)
    for job in (ended, returned, waiting):
        job._started, job._status = 1.0, JobStatus.CANCELLED
    batch.finish_all([ended], [Outcome(1)], [2.0], [3.0])
    batch.return_ahead([returned])
    assert near.take() is last
    assert {(job.status, job.timing.started) for job in (ended, returned, waiting)} == {(JobStatus.CANCELLED, 1.0)}


# -- a job that has made something else of SIGTERM ---------------------------------------------------------------------


@both_methods
@pytest.mark.parametrize("how", ["ignores it", "handles it", "handles it, and calls its storage"])
def test_a_job_that_is_not_ended_by_sigterm_sees_that_it_shall_stop(method: str, how: str, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "ignores it" else lambda *_: None)
        assert (job.stopped(), job.status) == (False, JobStatus.RUNNING)
        flags.put("runs")
        while not job.stopped():
            if "storage" in how:
                job.record(1, 1)
            time.sleep(0.002)
        return job.status.name

    with Evaluator.create(function, method, {"kill_grace": 20}) as evaluator:
        evaluator.submit(configurations(1))
        flags.wait("runs")
        evaluator.timeout = 0.01
        (job,) = evaluator.gather("ALL")
        assert (job.status, job.metadata["returned"]) == (JobStatus.CANCELLED, "CANCELLING")


@both_methods
def test_a_job_that_has_ignored_sigterm_for_a_while_sees_that_it_shall_stop(method: str, flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        flags.put("runs", os.getpid())
        flags.wait("go")
        signal.signal(signal.SIGTERM, before)
        until(job.stopped)
        return "told"

    with Evaluator.create(function, method, {"kill_grace": 20}) as evaluator:
        evaluator.submit(configurations(1))
        flags.wait("runs")
        evaluator.timeout = 0.01
        until(lambda: evaluator.jobs[0].status is JobStatus.CANCELLING)
        flags.put("go")
        (job,) = evaluator.gather("ALL")
        assert job.metadata["returned"] == "told"


@both_methods
def test_to_ask_whether_to_stop_changes_nothing_of_the_socket(method: str) -> None:
    def function(job: RunningJob) -> Any:
        socket.setdefaulttimeout(5)
        signal.signal(signal.SIGTERM, lambda *_: None)
        assert not job.stopped()
        job.record(1, 2)
        return bytes(2_000_000) if job["x"] == 1 else job["x"]

    with Evaluator.create(function, method) as evaluator:
        found = [evaluator.evaluate({"x": x}) for x in range(4)]
        assert [job.error for job in found] == [None] * 4
        assert [job.output for job in found] == [0, bytes(2_000_000), 2, 3]


def test_what_a_job_left_behind_is_not_told_what_the_next_one_shall_do(flags: Flags) -> None:
    def function(job: RunningJob) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if job["x"] == 0:
            threading.Thread(target=look, args=(job,), daemon=True).start()
            return 0
        while not job.stopped():
            time.sleep(0.002)
        flags.put("saw")
        return flags.wait("looked")

    def look(job: RunningJob) -> None:
        flags.wait("saw")
        flags.put("looked", job.stopped())

    with Evaluator.create(function, "process", {"kill_grace": 20}) as evaluator:
        evaluator.submit([{"x": 0}])
        evaluator.gather("ALL")
        evaluator.submit([{"x": 1}])
        until(lambda: evaluator.statistics().running)
        evaluator.timeout = 0.01
        (job,) = evaluator.gather("ALL")
        assert job.metadata["returned"] == ["False"]


# -- the end -----------------------------------------------------------------------------------------------------------


@both_methods
def test_what_runs_is_stopped_before_slow_callbacks_hear_of_what_waits(method: str, flags: Flags) -> None:
    class Slow(Callback):
        heard = 0

        def on_done(self, job: Job) -> None:
            if job.args["x"] != 0:
                self.heard += 1
                time.sleep(0.02)
                assert self.heard == 1 or flags.wait("told")

    function = polite(flags)

    def tells(job: RunningJob) -> Any:
        output = function(job)
        flags.put("told")
        return output

    slow = Slow()
    with make(tells, method, callbacks=[slow], kill_grace=30.0, batching=False) as evaluator:
        evaluator.submit(configurations(20))
        until(lambda: flags.up("pid-0"))
        evaluator.timeout = 0.01
        jobs = by_x(evaluator.gather("ALL"))
        assert jobs[0].metadata["returned"] == "stopped: CANCELLING"
        assert all(job.status is JobStatus.CANCELLED for job in jobs.values())
        assert [x for x, job in jobs.items() if job.timing.started is not None] == [0]
        assert evaluator.statistics().callback_errors == 0
    assert slow.heard == 19


@pytest.mark.anyio
async def test_a_job_that_a_worker_had_counts_as_begun(anyio_backend: str) -> None:
    ledger, storage = Ledger(), MemoryStorage()
    recorder = Recorder(storage, None, "me", Notifier([]), ledger)
    settling = Settling(recorder, Attempts(1), lambda *_: None, lambda: 7.0, Loop.running())
    job = Job(storage.create_new_job(storage.create_new_search()), {})
    booking = Booking()
    ledger.reserve(booking, 1, 10)
    ledger.expect(booking, [job], 0.0)
    settling.open[job.id] = job
    job._holder = cast("Any", object())
    ledger.started(1)
    settling.settle([(job, Outcome(error=JobError("timeout", "late"), cancelled=True), 8.0)])
    assert (ledger.pending, job.timing.started, job._holder) == (0, 8.0, None)
