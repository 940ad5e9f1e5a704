"""A worker process: it reads jobs from its socket, runs them one after the other, and writes what became of them.

What it reads and writes is in :mod:`paraval.worker.frames`.
"""

from __future__ import annotations

import _thread
import faulthandler
import functools
import math
import os
import pickle
import signal
import sys

# The one in signal looks for an enum, which takes twenty times as long; typeshed leaves the C module out.
from _signal import getsignal as _handler_of  # type: ignore[import-not-found]
from time import monotonic  # by its name, as a job may put another in its place there
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from paraval.errors import UsageError
from paraval.job import JobContext, JobStatus, LiveJob, running_job
from paraval.outcome import JobError, error_from_exception
from paraval.worker.batches import Batches
from paraval.worker.forks import mark_of_this_process
from paraval.worker.frames import HEAD, MESSAGE, Sealed, Setup, Wire, sendable
from paraval.worker.leftovers import Leftovers
from paraval.worker.output import flush_output, unbuffer_output
from paraval.worker.pickling import PicklingFailed, dumps

if TYPE_CHECKING:
    from paraval.worker.board import BoardOfWorker

__all__ = ["exit_fork", "main", "may_retry"]

_new: Final = object.__new__
_held: Final = _thread._local()
"""Which signals a thread that forks had blocked before."""
_SIGTERM: Final = int(signal.SIGTERM)
_SIGALRM: Final = int(signal.SIGALRM)
# Enum's own look-up of a member costs more than anything else that is done with it here.
_RUNNING: Final = JobStatus.RUNNING
_CANCELLING: Final = JobStatus.CANCELLING
_PEEK_S: Final = 0.02
"""How often a job that asks whether it shall stop has the socket looked at."""


def main(socket_fd: int, tray_fd: int, board_fd: int, lifeline_fd: int) -> None:
    """Work until the socket ends. ``tray_fd`` and ``board_fd`` are -1 where there is none."""
    _die_with_the_parent(lifeline_fd)
    for fd in (socket_fd, tray_fd, lifeline_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    worker = Worker(socket_fd, tray_fd, _open_board(board_fd))
    # What the thread that started this process has blocked (to wait for it, say) shall be heard here.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Ctrl-C is the driver's business. (A handler, not SIG_IGN, which programs that a job starts would inherit.)
    signal.signal(signal.SIGINT, _take_no_notice)
    worker.handle_sigterm()
    os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=worker.disown)
    try:
        worker.serve()
    finally:
        flush_output()


def _hold_sigterm() -> None:
    """Before a job forks: until the child has put back what signals do, one would reach our handler, and be lost."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _open_board(fd: int) -> BoardOfWorker | None:
    if fd < 0:
        return None
    from paraval.worker.board import BoardOfWorker  # here: most workers have none

    try:
        return BoardOfWorker(fd)
    except (OSError, ValueError):  # there is no memory to be had: all else works without
        return None


def _take_no_notice(_number: int, _frame: object) -> None:
    """Handle a signal that means somebody else."""


def _die_with_the_parent(lifeline: int) -> None:
    """Have this process and all it started killed when the parent is gone, however it went.

    The parent holds the other end of the pipe and never writes. On Linux the kernel itself sends the SIGKILL when that
    end closes, to the whole process group, even while a job holds the GIL. (PR_SET_PDEATHSIG is no use: it goes by the
    *thread* that started the child.)
    """
    import fcntl

    if hasattr(fcntl, "F_SETSIG"):
        watched = {lifeline: -os.getpgrp()}
        # Itself, too, as a job may leave the group. Whom the kernel tells is a property of the open pipe: so once more.
        try:
            again = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            watched[again] = os.getpid()
        except OSError:  # there is no /proc
            pass
        for pipe, owner in watched.items():
            fcntl.fcntl(pipe, fcntl.F_SETOWN, owner)
            fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
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


class _LiveJob(LiveJob):
    """The job that runs: it is asked to stop by SIGTERM; or by a frame, where it has made something else of that."""

    __slots__ = ("_state", "_worker")
    _state: JobStatus
    _worker: Worker

    @property
    def _status(self) -> JobStatus:
        if self._state is JobStatus.RUNNING and self._worker.is_told_to_stop(self):
            self._state = JobStatus.CANCELLING
        return self._state

    @_status.setter
    def _status(self, status: JobStatus) -> None:
        self._state = status


class Worker:
    """Finds jobs and runs them, with all that a job may want while it runs."""

    def __init__(self, fd: int, tray: int, board: BoardOfWorker | None) -> None:
        self._wire = Wire(fd)
        self._batches = Batches(self._wire, board, self._run)
        self._tray = tray
        self._tray_inode = os.fstat(tray).st_ino if tray >= 0 else 0
        self._has_tray = tray >= 0
        self._seen = 0
        self._expects_more = False
        self._waits_to_be_told = False
        self._pid = os.getpid()
        self._here = mark_of_this_process()
        self._calling = _thread.allocate_lock()
        self._live: _LiveJob | None = None
        self._leftovers = Leftovers()
        self._peeks_at = 0.0
        self._client = self._storage_client
        self._has_client = False
        self._is_async = False
        self._runner: Any = None
        self._on_sigterm = self.ask_to_stop  # one object, to be known again

    def serve(self) -> None:
        """Set up, then run batches until the socket ends."""
        first = self._wire.receive()
        if first is None:
            return
        try:
            self._set_up(first[1])
        except BaseException as exc:  # noqa: BLE001 - whatever importing the run-function does
            if not self._here[0]:
                exit_fork(exc)
            self._wire.send(("broken", tuple(error_from_exception(exc))))
            self._wire.drain()
            return
        if not self._here[0]:
            exit_fork(None)  # it forked, and its child came back too: there is one worker on this socket
        self._wire.send(("ready", self._own_memory()))
        while (frame := self._next()) is not None:
            _, self._seen, job_ids, all_args, hold_s, more = frame
            self._expects_more = more and self._has_tray
            if self._batches.run(self._seen, job_ids, all_args, hold_s):
                self._waits_to_be_told = True  # it shall not go on by itself
            self._leftovers.undo()

    def _own_memory(self) -> int:
        if self._context.memory_limit == math.inf:
            return 0
        from paraval.memory import MemoryMeter  # here: most workers never need it

        return MemoryMeter(self._pid).sample()

    def ask_to_stop(self, _number: int, _frame: object) -> None:
        """React to SIGTERM: tell the job, whose ``stopped()`` turns true, or whose coroutine is cancelled."""
        self._batches.is_asked_to_stop = True
        job, runner = self._live, self._runner
        if job is not None:
            job._status = JobStatus.CANCELLING
        if runner is not None:
            runner.cancel()

    def is_told_to_stop(self, live: _LiveJob) -> bool:
        """Whether the parent has sent a frame that says so: the job may have ignored SIGTERM for a while."""
        now = monotonic()
        if now < self._peeks_at or live is not self._live or os.getpid() != self._pid:
            return False
        self._peeks_at = now + _PEEK_S
        return self._wire.has_stop()

    def handle_sigterm(self) -> None:
        """Have :meth:`ask_to_stop` react to SIGTERM, whatever a job has made of that."""
        if self._runner is not None:
            self._runner.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def disown(self) -> None:
        """In a process that a job forked: signals do what they do in any process, unless the job has changed that."""
        self._leftovers.streams.close_in_fork()
        if signal.getsignal(signal.SIGTERM) is self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is _take_no_notice:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _release_sigterm()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _set_up(self, setup: Setup) -> None:
        sys.path[:] = setup.path
        sys.argv[:] = setup.argv
        if setup.is_captured:
            unbuffer_output()
            faulthandler.enable()  # a crash shows where it was
        self._batches.origin = setup.origin
        self._context = JobContext(origin=setup.origin, kill_grace=setup.kill_grace, memory_limit=setup.memory_limit)
        function, kwargs, self._stopper, initializer = pickle.loads(setup.program)  # noqa: S301 - our parent's
        self._function = functools.partial(function, **kwargs) if kwargs else function
        self._is_async = setup.is_async
        if setup.is_async:
            self._make_runner()
        self._retry_on = pickle.loads(setup.retry_on) if setup.retry_on else ()  # noqa: S301 - likewise
        if initializer is not None:
            initializer()
        self._leftovers.begin(is_captured=setup.is_captured)

    def _next(self) -> Any:
        """Give the next jobs: from the tray, or else those that come; None when there are no more."""
        looks = self._expects_more and not self._waits_to_be_told
        self._waits_to_be_told = False
        while True:
            frame = self._from_tray() if looks else None
            if frame is not None:
                return frame
            try:
                if self._expects_more:
                    self._wire.send(("idle", self._seen))
                frame = self._wire.receive()
                if frame is None or frame[0] == "jobs":
                    if frame is not None and frame[-1]:
                        self._wire.send(("begun", frame[1]))
                    return frame
            except ConnectionError:  # the parent has closed its end, as it wants nothing more
                return None
            looks = True

    def _from_tray(self) -> Any:
        try:
            if os.fstat(self._tray).st_ino != self._tray_inode:
                raise OSError(f"descriptor {self._tray} is not what it was")  # noqa: TRY301 - as one that is closed
            message = os.read(self._tray, MESSAGE)
        except BlockingIOError:  # there is nothing
            return None
        except OSError:  # a job has closed it, and maybe its number is another file's now
            self._expects_more = self._has_tray = False
            self._wire.send(("lost",))
            return None
        return pickle.loads(message[HEAD:]) if message else None  # noqa: S301 - from our own parent

    def _run(self, job_id: str, args: Any) -> tuple[tuple[Any, ...] | None, Any]:
        """Run one job; give its error (as a tuple) and its value."""
        try:
            if type(args) is Sealed:
                args = pickle.loads(args.data)  # noqa: S301 - from our own parent
            if _handler_of(_SIGTERM) is not self._on_sigterm:  # an earlier job, or the set-up, has changed it
                self.handle_sigterm()
            live = _new(_LiveJob)  # a constructor would cost a tiny job more than this
            live.context = self._context
            live._worker = self
            live._state = _RUNNING
            self._live = live
            if self._batches.is_asked_to_stop:  # just before there was a job to tell
                live._state = _CANCELLING
            try:
                value = self._function(running_job(live, job_id, args, self._client, self._stopper))
                if self._is_async or type(value) is CoroutineType:  # of a lambda, say
                    value = self._complete(value, live)
            finally:
                # Here, where it can ring for nobody but this job. (As a rule nobody handles it.)
                if type(_handler_of(_SIGALRM)) is not int:
                    self._leftovers.stop_alarm()
        except BaseException as exc:  # noqa: BLE001 - whatever a job raises, SystemExit too, is its own failure
            return self._failed(exc), None
        if not self._here[0]:
            exit_fork(None)  # the job forked, and its child came back too: there is one worker on this socket
        self._live = None
        if self._has_client:
            self._end_calls()
        kind = type(value)
        if kind is float or kind is int or kind is str or value is None:  # as a rule; and it cannot fail to be sent
            return None, value
        return self._pickled(value)

    def _pickled(self, value: Any) -> tuple[tuple[Any, ...] | None, Any]:
        try:
            value = sendable(value)
        except PicklingFailed as exc:
            error = JobError("exception", str(exc), type="PicklingError")
            return (*error, False), None
        if not self._here[0]:
            exit_fork(None)  # how it is pickled is the job's, too
        return None, value

    def _failed(self, exc: BaseException) -> tuple[Any, ...]:
        if not self._here[0]:
            exit_fork(exc)
        flush_output()  # to where it had this go
        self._leftovers.streams.restore()  # it may be what it failed of, and the next one need not
        was_asked = self._live is not None and self._live._state is JobStatus.CANCELLING
        self._end_calls()
        error = error_from_exception(exc)
        if was_asked and error.type == "CancelledError" and not error.message:
            error = error._replace(message="it was asked to stop, by SIGTERM")
        return (*error, may_retry(exc, error, self._retry_on))

    def _complete(self, coroutine: Any, live: _LiveJob) -> Any:
        if self._runner is None:
            self._make_runner()
        return self._runner.run(coroutine, lambda: live._status is JobStatus.CANCELLING)

    def _make_runner(self) -> None:
        from paraval.worker.coroutines import CoroutineRunner  # here: most workers never need it

        self._runner = CoroutineRunner()

    def _storage_client(self) -> Any:
        from paraval.storage.pipe import PipeStorage  # here: most jobs never ask for their storage

        self._has_client = True
        return PipeStorage(self.call)

    def _end_calls(self) -> None:
        """The job is over; a call that a thread of it is in the middle of has its reply first."""
        self._live = None
        if self._has_client:  # looked at after that: whoever gets a client from now on finds that the job is over
            with self._calling:
                pass

    # -- the socket ----------------------------------------------------------------------------------------------------

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Have the parent call a method of the storage; give what it returns or raise what it raises.

        Raises:
            UsageError: it is called in another process than the worker, or when the job has ended.
        """
        if os.getpid() != self._pid:  # two processes on one socket would take each other's replies, and wait for ever
            raise UsageError("a process that a job forked cannot reach its storage: record and store in the job itself")
        sealed = dumps(args, f"the arguments of {method}")
        with self._calling:
            live = self._live
            if live is None:  # from now on the main thread reads from the socket
                raise UsageError("the job has ended; a thread that it left behind cannot reach its storage")
            self._wire.send(("call", method, sealed))
            while (reply := self._wire.receive()) is not None and reply[0] == "stop":
                live._status = JobStatus.CANCELLING
        if reply is None:
            raise EOFError("the driver is gone")
        _, error, value = reply
        if error is not None:
            raise pickle.loads(error)  # noqa: S301 - from our own parent
        return pickle.loads(value)  # noqa: S301 - likewise


def may_retry(exc: BaseException, error: JobError, retry_on: tuple[type[BaseException], ...]) -> bool:
    """Whether what a run-function raised is worth another attempt; its call may have had a process of its own, too."""
    # As "except" would catch it: unlike isinstance, that asks no metaclass, which might raise.
    return error.kind == "worker_died" or any(base is one for base in type(exc).__mro__ for one in retry_on)


def exit_fork(exc: BaseException | None) -> NoReturn:
    """End a process that a job forked and that comes back, maybe with an exception; with ``sys.exit``'s exit code."""
    code = exc.code if isinstance(exc, SystemExit) else int(exc is not None)
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    flush_output()
    os._exit((code or 0) & 0xFF)
