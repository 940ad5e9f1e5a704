"""A worker process: it reads jobs from its socket, runs them one after the other, and writes what became of them.

The frames are a length (8 bytes) and a pickled tuple, whose first item says what it is:

======== ================================= ==========================================================================
parent   ``("setup", Setup)``              once, first
         ``("jobs", [(id, args), …],       to run, in this order; whether to report each as it ends, and after how many
         each, seconds)``                  seconds those that have not begun are to be sent back
         ``("reply", error, value)``       to a call; both sealed
child    ``("ready", bytes)``               the setup is done; the memory held then, where it is limited
         ``("done", [(id, started, finished, error, value), …])``
         ``("back", [id, …], id, started)`` never started, send them elsewhere; and the one that keeps the worker busy
         ``("call", method, args)``        of the storage; sealed arguments
         ``("broken", error)``             the setup failed; no job will ever run here
======== ================================= ==========================================================================

An ``args`` or ``value`` is a :class:`Sealed` pickle unless it is plain, so that one that cannot be unpickled costs its
own job only.
"""

from __future__ import annotations

import _thread
import faulthandler
import math
import os
import pickle
import signal
import sys
import time
from collections import deque
from typing import Any, Final, NamedTuple

from paraval.job import Job, JobContext, JobStatus
from paraval.outcome import JobError, error_from_exception
from paraval.worker.pickling import PicklingFailed, dumps, is_plain

__all__ = ["Sealed", "Setup", "main"]

_HOLD_S: Final = 0.005
"""How long outcomes of tiny jobs may wait to be sent together."""


class Setup(NamedTuple):
    """What a worker needs to know, once.

    Attributes:
        path: ``sys.path`` of the parent.
        argv: ``sys.argv`` of the parent.
        function: the pickled run-function.
        kwargs: its static keyword arguments, pickled.
        stopper: pickled; copied for each job.
        initializer: pickled function without arguments, called before the first job; or None.
        origin: where the evaluator's clock is zero, on the system's monotonic clock.
        is_async: whether calling the run-function gives a coroutine.
        retry_on: pickled tuple of exception types; or None.
        is_captured: whether the parent reads what is printed, so that nothing may wait in a buffer for a crash.
        kill_grace: seconds between asking a job to stop and the strongest means.
        memory_limit: the bytes at which the parent kills this process; infinity for never.
    """

    path: list[str]
    argv: list[str]
    function: bytes
    kwargs: bytes
    stopper: bytes
    initializer: bytes | None
    origin: float
    is_async: bool
    retry_on: bytes | None
    is_captured: bool
    kill_grace: float
    memory_limit: float


class Sealed(NamedTuple):
    """A value, pickled on its own."""

    data: bytes


def main(socket_fd: int, lifeline_fd: int) -> None:
    """Work until the socket ends."""
    _die_with_the_parent(lifeline_fd)
    os.set_inheritable(socket_fd, False)
    os.set_inheritable(lifeline_fd, False)
    worker = Worker(socket_fd)
    # Ctrl-C is the driver's business. (A handler, not SIG_IGN, which programs that a job starts would inherit.)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, worker.ask_to_stop)
    try:
        worker.serve()
    finally:
        _flush_output()


def _die_with_the_parent(lifeline: int) -> None:
    """Have this process and all it started killed when the parent is gone, however it went.

    The parent holds the other end of the pipe and never writes. On Linux the kernel itself sends the SIGKILL when that
    end closes, to the whole process group, even while a job holds the GIL. (PR_SET_PDEATHSIG is no use: it goes by the
    *thread* that started the child.)
    """
    import fcntl

    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
        import select

        poll = select.poll()
        poll.register(lifeline, 0)
        if poll.poll(0):  # the parent went before we asked
            os._exit(1)
        return

    def watch() -> None:
        os.read(lifeline, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    _thread.start_new_thread(watch, ())


class Worker:
    """Runs jobs. Its main thread runs them; its guard thread reports for it when a job takes long."""

    def __init__(self, fd: int) -> None:
        self._reader = open(fd, "rb", buffering=1 << 16, closefd=False)  # noqa: SIM115 - open for the whole life
        self._fd = fd
        self._pid = os.getpid()
        self._sending = _thread.allocate_lock()
        self._calling = _thread.allocate_lock()
        # Under _state: what the guard and the main thread share.
        self._state = _thread.allocate_lock()
        self._todo: deque[tuple[str, Any]] = deque()
        self._unsent: list[tuple[str, float, float, tuple[Any, ...] | None, Any]] = []
        self._current: tuple[str, float] | None = None
        self._batches = 0
        self._due = 0.0
        self._guard_wanted = _thread.allocate_lock()
        self._guard_wanted.acquire()
        self._guard_asleep = False
        self._guard_runs = False
        self._live: Job | None = None
        self._runner: Any = None
        self._task: Any = None

    def serve(self) -> None:
        """Set up, then run batches until the socket ends."""
        first = self._receive()
        if first is None:
            return
        try:
            self._set_up(first[1])
        except BaseException as exc:  # noqa: BLE001 - whatever importing the run-function does
            self._send(("broken", tuple(error_from_exception(exc))))
            while self._reader.read(1 << 16):  # what is on its way: the parent must not meet a closed socket first
                pass
            return
        self._send(("ready", self._own_memory()))
        while (frame := self._receive()) is not None:
            self._run_batch(*frame[1:])

    def _own_memory(self) -> int:
        if self._context.memory_limit == math.inf:
            return 0
        from paraval.memory import MemoryMeter  # here: most workers never need it

        return MemoryMeter(self._pid).sample()

    def ask_to_stop(self, _number: int, _frame: object) -> None:
        """React to SIGTERM: tell the job, whose ``stopped()`` turns true, or whose coroutine is cancelled."""
        job, task = self._live, self._task
        if job is not None:
            job._status = JobStatus.CANCELLING
        if task is not None:
            self._runner.get_loop().call_soon_threadsafe(task.cancel)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _set_up(self, setup: Setup) -> None:
        sys.path[:] = setup.path
        sys.argv[:] = setup.argv
        if setup.is_captured:
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr] # they are the interpreter's own
            faulthandler.enable()  # a crash shows where it was
        self._origin = setup.origin
        self._context = JobContext(origin=setup.origin, kill_grace=setup.kill_grace, memory_limit=setup.memory_limit)
        self._is_async = setup.is_async
        self._function = pickle.loads(setup.function)  # noqa: S301 - from our own parent
        self._kwargs = pickle.loads(setup.kwargs)  # noqa: S301 - likewise
        self._stopper = pickle.loads(setup.stopper)  # noqa: S301 - likewise
        self._retry_on = pickle.loads(setup.retry_on) if setup.retry_on else ()  # noqa: S301 - likewise
        if setup.initializer is not None:
            pickle.loads(setup.initializer)()  # noqa: S301 - likewise

    def _run_batch(self, jobs: list[tuple[str, Any]], each: bool, hold_s: float) -> None:
        with self._state:
            self._todo.extend(jobs)
            self._batches += 1
            self._due = time.monotonic() + hold_s
        if len(jobs) > 1:
            self._wake_guard()
        while True:
            with self._state:
                if not self._todo:
                    self._current = None
                    break
                job_id, args = self._todo.popleft()
                started = time.monotonic() - self._origin
                self._current = (job_id, started)
            error, value = self._run(job_id, args)
            finished = time.monotonic() - self._origin
            with self._state:
                self._current = None
                self._unsent.append((job_id, started, finished, error, value))
                late = each or finished - self._unsent[0][2] > _HOLD_S
            if late:
                self._report()
        _flush_output()
        self._report()

    def _run(self, job_id: str, args: Any) -> tuple[tuple[Any, ...] | None, Any]:
        """Run one job; give its error (as a tuple) and its value."""
        try:
            if type(args) is Sealed:
                args = pickle.loads(args.data)  # noqa: S301 - from our own parent
            job = Job(job_id, args, self._function)
            job.context = self._context
            job.storage = self._storage_client  # type: ignore[assignment] # made when the run-function asks for it
            job._status = JobStatus.RUNNING
            self._live = job
            value = self._function(job.create_running_job(self._stopper), **self._kwargs)
            if self._is_async:
                value = self._complete(value, job)
        except BaseException as exc:  # noqa: BLE001 - whatever a job raises, SystemExit too, is its own failure
            self._end_calls()
            if os.getpid() != self._pid:
                os._exit(1)
            error = error_from_exception(exc)
            return (*error, isinstance(exc, self._retry_on)), None
        self._end_calls()
        if os.getpid() != self._pid:
            os._exit(0)  # the job forked, and its child came back too: there is one worker on this socket
        if is_plain(value):
            return None, value
        try:
            return None, Sealed(dumps(value, "the result"))
        except PicklingFailed as exc:
            error = JobError("exception", str(exc), type="PicklingError")
            return (*error, False), None

    def _complete(self, coroutine: Any, job: Job) -> Any:
        import asyncio  # here: most workers never need it

        if self._runner is None:
            self._runner = asyncio.Runner()

        async def watched() -> Any:
            self._task = task = asyncio.current_task()
            if job._status is JobStatus.CANCELLING and task is not None:
                task.cancel()  # it was asked to stop before there was a task to tell
            try:
                return await coroutine
            finally:
                self._task = None

        return self._runner.run(watched())

    def _storage_client(self) -> Any:
        from paraval.storage.pipe import PipeStorage  # here: most jobs never ask for their storage

        return PipeStorage(self.call)

    def _end_calls(self) -> None:
        """The job is over; a call that a thread of it is in the middle of has its reply first."""
        with self._calling:
            self._live = None

    # -- the guard -----------------------------------------------------------------------------------------------------

    def _wake_guard(self) -> None:
        if not self._guard_runs:
            self._guard_runs = True
            _thread.start_new_thread(self._guard, ())
            return
        with self._state:
            asleep, self._guard_asleep = self._guard_asleep, False
        if asleep:
            self._guard_wanted.release()

    def _guard(self) -> None:
        """While batches come: see to it that none keeps its finished or its waiting jobs for long."""
        told = -1
        while True:
            time.sleep(_HOLD_S)
            with self._state:
                stuck = self._current is not None and time.monotonic() >= self._due
                seen = self._batches
                back, current = [], self._current
                if stuck:
                    back = [job_id for job_id, _ in self._todo]
                    self._todo.clear()
                # Decided here, under the lock, so that a batch that begins now finds it asleep, and wakes it.
                self._guard_asleep = stuck or (not self._todo and self._current is None)
                asleep = self._guard_asleep
            if stuck and current is not None and told != seen:
                told = seen
                self._report()
                self._send(("back", back, *current))
            if asleep:
                self._guard_wanted.acquire()

    # -- the socket ----------------------------------------------------------------------------------------------------

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Have the parent call a method of the storage; give what it returns or raise what it raises."""
        sealed = dumps(args, f"the arguments of {method}")
        with self._calling:
            if self._live is None:  # from now on the main thread reads from the socket
                raise RuntimeError("the job has ended; a thread that it left behind cannot reach its storage")
            self._send(("call", method, sealed))
            reply = self._receive()
        if reply is None:
            raise EOFError("the driver is gone")
        _, error, value = reply
        if error is not None:
            raise pickle.loads(error)  # noqa: S301 - from our own parent
        return pickle.loads(value)  # noqa: S301 - likewise

    def _report(self) -> None:
        with self._state:
            unsent, self._unsent = self._unsent, []
            if unsent:
                self._send(("done", unsent))  # under the lock: outcomes must not overtake a "back"

    def _send(self, frame: tuple[Any, ...]) -> None:
        data = pickle.dumps(frame, 5)
        with self._sending:
            if len(data) < 1 << 16:
                _write(self._fd, memoryview(len(data).to_bytes(8, "little") + data))
            else:
                _write(self._fd, memoryview(len(data).to_bytes(8, "little")))
                _write(self._fd, memoryview(data))

    def _receive(self) -> Any:
        head = self._reader.read(8)
        if len(head) < 8:  # noqa: PLR2004 - the length of a length
            return None
        data = self._reader.read(int.from_bytes(head, "little"))
        return pickle.loads(data)  # noqa: S301 - from our own parent


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or gone: a job may do that
            continue
