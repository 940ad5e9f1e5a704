"""A slot with a worker process of this machine: what goes to it, and what comes back."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio

from paraval.backends.base import Batch, RunSpec, Slot, WorkerDiedError
from paraval.backends.channel import Frame
from paraval.backends.packing import (
    Packer,
    are_values,
    outcome_of_worker,
    outcomes_of_worker,
    unpack_frame,
    unpicklable,
)
from paraval.backends.storage_call import StorageCall
from paraval.job import Job, JobStatus
from paraval.loops import Loop, call_in_thread
from paraval.memory import WatchedProcess
from paraval.outcome import JobError, Outcome
from paraval.worker.frames import PAIR, message_of
from paraval.worker.pickling import PicklingFailed, PiecewisePickler, is_plain

if TYPE_CHECKING:
    from paraval.backends.child import WorkerProcess
    from paraval.backends.process import ProcessBackend

__all__ = ["ProcessSlot"]

_REST_S: Final = 0.010
_BRISK_S: Final = 0.015
"""Where each job takes longer than this, one wake-up for each is less than one after each rest."""
_LOOK: Final = pickle.dumps(("look",), 5)
_LIGHT: Final = 8_000
"""Bytes: of frames that are no larger, a socket takes as many as come in that time."""
_MOST: Final = 1 << 30
_LARGEST_AHEAD: Final = 1 << 15
"""Bytes of a message for the tray, which are copied at once."""
_PASSING: Final = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""Reasons for which the system cannot start a process now, and may be able to a moment later."""
_PAUSES_S: Final = (0.05, 0.1, 0.25, 0.5)
"""How long that moment may be, each time."""
_OF_JOBS: Final = frozenset({"done", "back", "begun"})


class _Load(NamedTuple):
    """The jobs of one message, in their order."""

    number: int
    jobs: Sequence[Job]


class _Begun(NamedTuple):
    """A batch of one job that was begun without a task."""

    batch: Batch
    ended: Callable[[], object]
    needs_task: Callable[[], object]
    unsent: bytes
    failure: Exception | None = None


class ProcessSlot(Slot):
    """One worker process at a time, on a socket pair of its own; a new one when that one died or was killed."""

    def __init__(self, spec: RunSpec, backend: ProcessBackend) -> None:
        self._spec = spec
        self._backend = backend
        self._packer = Packer()
        self._process: WorkerProcess | None = None
        self._call: StorageCall | None = None
        # What the worker has: the jobs by their ids, and message by message. The first message is what it is at, though
        # it may not have taken that from its tray yet.
        self._sent: dict[str, Job] = {}
        self._loads: deque[_Load] = deque()
        self._has_begun = False
        self._wants_more = False
        self._bytes_per_job = 0
        self._has_overlooked = False
        self._cannot_be_set_up = False
        self._begun: _Begun | None = None

    async def run(self, batch: Batch) -> None:
        process, begun, self._begun = self._process, self._begun, None
        if begun is not None and process is not None:
            process.stop_calling()
            await self._attend(process, batch, self._sent, _go_on_with(process, begun))
        while batch.waiting:
            try:
                setup = self._backend.setup(self._spec)
            except PicklingFailed as exc:  # static arguments that were changed since the evaluator was made
                self._fail(batch, batch.take_all(), Outcome(error=unpicklable(exc)))
                return
            process = self._process
            if process is None or not self._can_go_on(process, setup):
                await self._let_go()
                process = None
            # Before a worker is there: where none can be started, these jobs end, or they would be tried for ever.
            sent = batch.take_all(self._backend.jobs_left(process))
            if process is None or not process.is_ready:  # one that was sent no job yet is not set up
                batch.wait_for_worker()
            if process is None:
                try:
                    process = await self._start_worker(setup)
                except Exception as exc:  # noqa: BLE001 - whatever keeps a program from being started
                    message = f"a worker process could not be started: {type(exc).__name__}: {exc}"
                    error = JobError("worker_died", message, host=os.uname().nodename)
                    self._fail(batch, sent, Outcome(error=error, may_retry=True))
                    continue
            await self._run_on(process, batch, sent)

    def _can_go_on(self, process: WorkerProcess, setup: bytes) -> bool:
        """Whether the worker is there and can take the next jobs."""
        # One that died while it had nothing to do is replaced in silence: no job is to blame.
        if process.setup is not setup or process.is_broken or process.is_gone:
            return False
        limit = self._backend.memory_limit
        if limit is None or not process.is_ready:
            return True
        return process.look_at_memory() <= limit.bytes  # else earlier jobs have filled it

    async def _start_worker(self, setup: bytes) -> WorkerProcess:
        for pause in _PAUSES_S:
            try:
                process = self._backend.start_worker(setup)
                break
            except OSError as exc:
                if exc.errno not in _PASSING:
                    raise
            await anyio.sleep(pause)
        else:
            process = self._backend.start_worker(setup)
        self._process = process
        self._call = None  # one that is under way was of a worker that is gone
        self._has_overlooked = self._cannot_be_set_up = False
        return process

    async def _run_on(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        self._expect(sent)
        frame = await self._encode(process.next_number, batch, sent)
        if len(sent) == 1:  # as the others could not be sent, maybe
            (batch.current,) = sent.values()
        sending = self._send(process, sent, frame)
        del frame  # which may be large, and the rest may take long
        await self._attend(process, batch, sent, sending)

    def _expect(self, sent: dict[str, Job]) -> None:
        self._sent = sent
        self._loads.clear()
        self._has_begun = self._wants_more = self._has_overlooked = False

    async def _attend(
        self,
        process: WorkerProcess,
        batch: Batch,
        sent: dict[str, Job],
        sending: Coroutine[Any, Any, None],
    ) -> None:
        """Have jobs sent, and see them to their ends.

        Args:
            process: runs them.
            batch: they are of this one.
            sent: the jobs; it shrinks as they end.
            sending: sends them.
        """
        count = len(sent)
        try:
            await sending
            await self._see_through(process, batch, sent)
            process.memory = None
        except OSError as exc:  # the end of the file, or a broken pipe: the worker is gone
            self.take_back(batch)  # what it has not begun is not to blame
            with anyio.CancelScope(shield=True):
                self._forget()
                error = await process.post_mortem()
                self._attach_output(process, sent.values())
            if process.memory is None or not self._settle_excess(process.memory, batch, sent, count, error):
                raise WorkerDiedError(error) from exc
        except BaseException:
            self.take_back(batch)  # or it would come between two jobs that are not to be stopped
            with anyio.CancelScope(shield=True):
                self._forget()
                await self._stop(process, batch, sent)
            raise
        if self._backend.jobs_left(process) == 0 or self._cannot_be_set_up:
            await self._let_go()

    async def _see_through(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        while sent:
            if self._rest(process, batch):
                await self._leave_alone(process, batch, sent)
            else:
                await self._receive(process, batch, sent)
            batch.has_waited = True
            if sent:
                self._send_ahead(process, batch)
                batch.report()

    async def _send(self, process: WorkerProcess, sent: dict[str, Job], frame: bytes) -> None:
        if not sent:  # none could be
            return
        process.output()  # what was printed between jobs belongs to none
        self._loads.append(_Load(process.next_number, list(sent.values())))
        self._bytes_per_job = len(frame) // len(sent)
        await process.send_jobs(frame)
        if self._backend.memory_limit is not None:
            process.watch_memory(self._backend.memory_limit.bytes)

    # -- without a task: one small job for a worker that waits, unless anything but its end comes ---------------------

    @property
    def is_prompt(self) -> bool:
        backend, process = self._backend, self._process
        if backend.is_captured or backend.memory_limit is not None or backend.max_jobs_per_worker is not None:
            return False
        return process is not None and process.is_ready and Loop.running().is_asyncio

    def begin(self, batch: Batch, ended: Callable[[], object], needs_task: Callable[[], object]) -> bool:
        job, process = batch.only, self._process
        if job is None or process is None or not is_plain(job.args) or not self._is_set_up(process):
            return False
        if not self._can_go_on(process, process.setup):
            return False
        number = process.next_number
        try:
            frame = pickle.dumps(("jobs", number, [job.id], [job.args], batch.hold_s, False), 5)
        except Exception:  # noqa: BLE001 - there is no memory for it, say; a task can tell
            return False
        unsent = process.post_jobs(frame, self._hear)
        if unsent is None:
            return False
        self._expect(batch.take_all())
        self._loads.append(_Load(number, [job]))
        self._begun = _Begun(batch, ended, needs_task, unsent)
        return not unsent

    def _hear(self) -> None:
        """Take the end of the job that was begun; leave all else to a task."""
        process, begun = self._process, self._begun
        if process is None or begun is None:
            return
        if not process.has_only_ends:
            process.stop_calling()
            begun.needs_task()
            return
        try:
            for frame in process.heard():
                self._take(process, begun.batch, self._sent, frame)
        except Exception as exc:  # noqa: BLE001 - a defect of ours: the task raises it
            process.stop_calling()
            self._begun = begun._replace(failure=exc)
            begun.needs_task()
            return
        if not self._sent:
            process.stop_calling()
            self._begun = None
            begun.batch.has_waited = True
            begun.ended()

    async def stop(self) -> None:
        process, begun, self._begun = self._process, self._begun, None
        if begun is None or process is None:
            return
        process.stop_calling()
        self.take_back(begun.batch)
        with anyio.CancelScope(shield=True):
            self._forget()
            await self._stop(process, begun.batch, self._sent)

    # -- what all ways have in common ---------------------------------------------------------------------------------

    async def _leave_alone(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Look now and then what the worker has reported, for as long as it has enough to do."""
        with process.resting():
            while rest := self._rest(process, batch):
                await process.rest(rest)
                before = len(sent)
                self._look(process, batch, sent)
                if sent:
                    self._send_ahead(process, batch)
                    if len(sent) != before:
                        batch.report()

    def _rest(self, process: WorkerProcess, batch: Batch) -> float:
        """Give the seconds for which the worker can be left alone: 0 if it may want something.

        Where all processors are busy, to wake up for each job of some milliseconds costs more than all the rest: what
        the interpreter needs is in no cache by then. All workers' rests end at the same moments, and none is so long
        that anybody would notice.
        """
        if batch.seconds_left() < _REST_S or batch.pace_s > _BRISK_S or batch.waits_for_worker:
            return 0.0
        if process.makes_calls or process.largest > _LIGHT or process.wants_to_be_heard:
            return 0.0
        now = self._spec.clock()
        return (now // _REST_S + 1) * _REST_S - now

    def _send_ahead(self, process: WorkerProcess, batch: Batch) -> None:
        """See to it that the worker, when it is through with what it is at, finds its next jobs on the tray."""
        if not self._wants_more:
            return
        self._wants_more = False
        # Nothing is laid down before the worker has begun what it was sent over the socket: it might find that first.
        if not batch.may_have_more or not self._has_begun or (len(self._loads) > 1 and not batch.in_order):
            return
        most = _LARGEST_AHEAD // max(1, self._bytes_per_job)
        if batch.in_order and most:
            most = _MOST  # each has a message of its own
        left = self._backend.jobs_left(process)
        if left is not None:
            most = min(most, left - len(self._sent))
        if most <= 0 or not self._is_set_up(process):
            return
        jobs = batch.ask_for_more(most)
        loads = [[job] for job in jobs] if batch.in_order or not jobs else [jobs]
        while loads and self._lay_down(process, batch, loads[0]):
            del loads[0]
        if loads:
            batch.refuse([job for load in loads for job in load])

    def _is_set_up(self, process: WorkerProcess) -> bool:
        """Whether static arguments are what they were when the worker was started."""
        try:
            return self._backend.setup(self._spec) is process.setup
        except PicklingFailed:
            return False

    def _lay_down(self, process: WorkerProcess, batch: Batch, jobs: Sequence[Job]) -> bool:
        number = process.next_number
        try:
            parcel = self._packer.pack_soon(jobs, _LARGEST_AHEAD)
            if parcel is None:
                return False
            frame = pickle.dumps(("jobs", number, parcel.ids, parcel.args, batch.hold_s, True), 5)
        except Exception:  # noqa: BLE001 - there is no memory for it, say; it will be told when their turn comes
            return False
        self._bytes_per_job = len(frame) // len(jobs)
        if not process.put_ahead(frame):
            return False
        batch.take_more(jobs)
        self._loads.append(_Load(number, jobs))
        return True

    def take_back(self, batch: Batch) -> bool:
        if self._process is not None and (numbers := self._process.take_back()):
            batch.return_ahead([job for load in self._loads if load.number in numbers for job in load.jobs])
            self._loads = deque(load for load in self._loads if load.number not in numbers)
        # Where the worker has taken more than the first, it has reported the jobs of that before.
        return len(self._loads) <= 1

    def pin_down(self, batch: Batch, latest: float) -> float | None:
        if self._process is None or not self._loads:
            return None
        number = self._loads[0].number  # where the worker is at another, what it has said since is on its way
        seen = self._process.pin_down(number, latest)
        if seen is None:
            return None
        if seen.began < latest:
            self._take_over(batch, number, message_of(seen.place)[1] + 1, seen.began)
        return seen.began

    def _take_done(
        self,
        process: WorkerProcess,
        batch: Batch,
        number: int,
        at: int,
        times: bytes,
        errors: dict[int, tuple[Any, ...]],
        values: list[Any],
    ) -> None:
        count = len(values)
        process.jobs_done += count
        self._wants_more = True
        load = self._load(number)
        if load is None:  # its jobs were all settled meanwhile
            return
        jobs = load.jobs[at : at + count]
        if self._backend.is_captured:
            self._attach_output(process, jobs)
        if count == 1:  # what is made for many costs a job that comes alone three times as much
            batch.finish_sent(jobs[0], outcome_of_worker(errors.get(0), values[0]), *PAIR.unpack(times))
        else:
            moments = struct.unpack(f"{count + 1}d", times)  # each begins where the one before it ends
            starts, ends = moments[:-1], moments[1:]
            if are_values(errors, values):
                batch.finish_returned(jobs, values, starts, ends)
            else:
                batch.finish_all(jobs, outcomes_of_worker(errors, values), starts, ends)
        self._go_on(batch)

    def _load(self, number: int) -> _Load | None:
        for load in self._loads:  # the first one, as a rule
            if load.number == number:
                return load
        return None

    def _go_on(self, batch: Batch) -> None:
        """Where the first load is through, the worker is at the next one."""
        loads = self._loads
        before = len(loads)
        while loads and loads[0].jobs[-1].id not in self._sent:
            loads.popleft()
        if loads and len(loads) < before:
            batch.go_on(loads[0].jobs)

    def _take_over(self, batch: Batch, number: int, at: int, started: float | None) -> None:
        """Take what the worker gives back: the jobs of a message from this place on."""
        load = self._load(number)
        if load is None or self._sent.keys().isdisjoint([job.id for job in load.jobs]):  # it is late: all were settled
            return
        begun, others = load.jobs[:at], load.jobs[at:]
        batch.give_back(others, begun[-1] if begun and started is not None else None, started)
        loads = [load._replace(jobs=begun) if load.number == number else load for load in self._loads]
        self._loads = deque(load for load in loads if load.jobs)
        self._go_on(batch)  # it may have been through with that one when it said this
        self.take_back(batch)
        self._wants_more = False

    def _settle_excess(
        self, memory: WatchedProcess, batch: Batch, sent: dict[str, Job], count: int, error: JobError
    ) -> bool:
        """Settle the job whose worker was killed for its memory; False when it was not killed for that.

        Raises:
            WorkerDiedError: jobs that the worker had run before may have left it there; what is left is run again.
        """
        size, limit, now = memory.exceeded, self._backend.memory_limit, self._spec.clock()
        if size is None or limit is None:
            return False
        if count > 1 or memory.is_suspect_only:
            raise WorkerDiedError(error, alone=False)
        for job in list(sent.values()):
            started = now if job._started is None else job._started
            job.metadata["memory"] = size
            batch.finish_sent(job, limit.outcome(size, started, now, error.pid), started, now)
        return True

    def catch_up(self, batch: Batch) -> None:
        process = self._process
        if process is not None and process.is_resting:
            self._look(process, batch, self._sent)

    def _look(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        for frame in process.look(_OF_JOBS):
            self._take(process, batch, sent, frame)

    async def recover(self) -> None:
        """Wait for the call that a killed job was in the middle of, so that no more than one is under way."""
        if self._call is not None:
            await self._call.end()

    async def close(self) -> None:
        await self._let_go()

    async def _let_go(self) -> None:
        process = self._process
        if process is not None:
            self._forget()
            with anyio.CancelScope(shield=True):
                await process.retire()

    def _forget(self) -> None:
        if self._process is not None:
            self._backend.workers.discard(self._process)
            self._process = None

    @staticmethod
    def _attach_output(process: WorkerProcess, jobs: Iterable[Job]) -> None:
        output = process.output()
        if output is None:
            return
        for job in jobs:
            job.stdout, job.stderr = output
            job.metadata["stdout"], job.metadata["stderr"] = output

    async def _encode(self, number: int, batch: Batch, sent: dict[str, Job]) -> bytes:
        parcel = await self._packer.pack(list(sent.values()))
        for job, reason in parcel.failures:
            self._fail(batch, {job.id: job}, Outcome(error=unpicklable(reason)))
        frame = ("jobs", number, parcel.ids, parcel.args, batch.hold_s, batch.may_have_more)
        if parcel.is_large:
            return await call_in_thread(PiecewisePickler().dumps, frame, "the jobs", abandon_on_cancel=True)
        return pickle.dumps(frame, 5)

    def _fail(self, batch: Batch, jobs: dict[str, Job], outcome: Outcome) -> None:
        now = self._spec.clock()
        for job in list(jobs.values()):
            batch.finish_sent(job, outcome, now, now)

    async def _receive(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Wait for what the worker has to say; reply when it calls the storage."""
        if self._call is None:
            for frame in await process.receive():
                if frame[0] == "large":
                    with batch.taking_in():
                        frame = await unpack_frame(frame[1])  # noqa: PLW2901 - it is the same one
                self._take(process, batch, sent, frame)
        if self._has_overlooked:
            self._has_overlooked = False
            await process.send(_LOOK)
        if self._call is not None:
            reply = await self._call.reply()
            self._call = None
            await process.send(reply)

    def _take(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job], frame: Frame) -> None:
        match frame[0]:
            case "done":
                self._take_done(process, batch, *frame[1:])
            case "back":
                self._take_over(batch, *frame[1:])
            case "begun":
                self._has_begun = self._wants_more = True
            case "idle":
                self._note_idle(frame[1])
            case "lost":
                self.take_back(batch)
                process.lose_tray()
            case "call":
                process.makes_calls = True
                self._call = StorageCall(self._spec.storage, self._backend.start_soon, *frame[1:])
            case "ready":
                process.base = frame[1]
                process.is_ready = True
                batch.worker_is_ready()
            case "broken":
                self._cannot_be_set_up = True
                self._attach_output(process, sent.values())
                self._fail(batch, sent, Outcome(error=_of_setup(JobError(*frame[1]))))

    def _note_idle(self, seen: int) -> None:
        """The worker waits, having seen messages up to this number."""
        # Before it has begun what it was sent, it has said this of what was before.
        self._has_overlooked = self._has_begun and bool(self._loads) and self._loads[-1].number > seen

    async def _stop(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Ask the worker to stop, and kill it: at the latest after the grace."""
        self._look(process, batch, sent)  # what has ended before it is asked to stop counts
        to_stop = sent
        if batch.in_order:  # another may have begun meanwhile: what it does when it is asked to stop must not count
            to_stop = {job_id: job for job_id, job in sent.items() if job._status is JobStatus.CANCELLING}
        if batch.hurry or (batch.in_order and batch.current not in to_stop.values()):
            await process.kill()  # the job to stop is not known to be the one that runs: asking could hit another
            return
        try:
            process.ask_to_stop()
            with contextlib.suppress(Exception), anyio.move_on_after(self._spec.kill_grace):
                while not sent.keys().isdisjoint(to_stop):
                    await self._receive(process, batch, to_stop)
        finally:
            await process.kill()
        self._attach_output(process, sent.values())


async def _go_on_with(process: WorkerProcess, begun: _Begun) -> None:
    if begun.failure is not None:
        raise begun.failure
    await process.send_rest(begun.unsent)


def _of_setup(error: JobError) -> JobError:
    return error._replace(message=f"the worker could not be set up: {error.message}")
