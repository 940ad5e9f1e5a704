"""A worker process: it reads jobs from its socket, runs them one after the other, and writes what became of them.

The frames are a length (8 bytes) and a pickled tuple, whose first item says what it is:

======== ================================= ==========================================================================
parent   ``("setup", Setup)``              once, first
         ``("jobs", n, [(id, args), …],    message n: jobs, to run in this order; after how many seconds what was not
         seconds, more)``                  begun is to be sent back; whether more may lie on the tray then
         ``("look",)``                     there is
         ``("reply", error, value)``       to a call; both sealed
         ``("stop",)``                     the job shall: for one that has made something else of SIGTERM
child    ``("ready", bytes)``               the setup is done; the memory held then, where it is limited
         ``("done", n, at, times,          what became of jobs of message n, of those from place ``at`` on: when they
         errors, values)``                 began, then when they ended (doubles); the errors, by their place among
                                           these; what they returned
         ``("back", n, at, started)``      those of message n from ``at`` on were never begun, send them elsewhere;
                                           since when the one before them keeps the worker busy, or None
         ``("begun", n)``                  it has this message from the socket, and will look at the tray next
         ``("lost",)``                     a job has closed the tray
         ``("idle", n)``                   it waits, having seen messages up to this one; more may lie on the tray now
         ``("call", method, args)``        of the storage; sealed arguments
         ``("broken", error)``             the setup failed; no job will ever run here
======== ================================= ==========================================================================

Messages with jobs may lie on the tray, too (:class:`~paraval.backends.tray.Tray`), with their number in place of a
length. The worker looks there when it has run what it had, and reported that: so where one is gone from the tray, all
before it has been said.

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
import struct
import sys

# The one in signal looks for an enum, which takes twenty times as long; typeshed leaves the C module out.
from _signal import getsignal as _handler_of  # type: ignore[import-not-found]
from collections import deque
from time import monotonic  # by its name, as a job may put another in its place there
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from paraval.errors import UsageError
from paraval.job import JobContext, JobStatus, LiveJob, running_job
from paraval.outcome import JobError, error_from_exception
from paraval.worker.output import flush_output, unbuffer_output
from paraval.worker.pickling import PicklingFailed, dumps, is_plain

if TYPE_CHECKING:
    from paraval.worker.board import BoardOfWorker

__all__ = [
    "HEAD",
    "MESSAGE",
    "PAIR",
    "STOP",
    "Sealed",
    "Setup",
    "exit_fork",
    "is_one_of",
    "main",
    "message_of",
    "sendable",
]

_HOLD_S: Final = 0.005
"""How long outcomes of tiny jobs may wait to be sent together."""
_LONGEST_S: Final = 0.1
"""How long the guard sleeps at most while there is a batch: clocks may be changed."""
_PEEKED: Final = 1 << 12
_PEEK_S: Final = 0.02
"""How often a job that asks whether it shall stop has the socket looked at."""
HEAD: Final = 8
"""Bytes of the number before a message on the tray."""
MESSAGE: Final = 1 << 16
"""Bytes of the largest message there, with its number."""

_STOP: Final = pickle.dumps(("stop",), 5)
STOP: Final = len(_STOP).to_bytes(8, "little") + _STOP
"""The frame, with its length."""
PAIR: Final = struct.Struct("2d")
"""When one job began, and when it ended."""


class Setup(NamedTuple):
    """What a worker needs to know, once.

    Attributes:
        path: ``sys.path`` of the parent.
        argv: ``sys.argv`` of the parent.
        program: four things, pickled together: the run-function; its static keyword arguments; the stopper, which is
            copied for each job; a function without arguments to be called before the first job, or None.
        origin: where the evaluator's clock is zero, on the system's monotonic clock.
        is_async: whether calling the run-function gives a coroutine.
        retry_on: pickled tuple of exception types; or None.
        is_captured: whether the parent reads what is printed, so that nothing may wait in a buffer: a crash would lose
            it, and the next job have it.
        kill_grace: seconds between asking a job to stop and the strongest means.
        memory_limit: the bytes at which the parent kills this process; infinity for never.
    """

    path: list[str]
    argv: list[str]
    program: bytes
    origin: float
    is_async: bool
    retry_on: bytes | None
    is_captured: bool
    kill_grace: float
    memory_limit: float


class Sealed(NamedTuple):
    """A value, pickled on its own."""

    data: bytes


def main(socket_fd: int, tray_fd: int, board_fd: int, lifeline_fd: int) -> None:
    """Work until the socket ends. ``tray_fd`` and ``board_fd`` are -1 where there is none."""
    _die_with_the_parent(lifeline_fd)
    for fd in (socket_fd, tray_fd, lifeline_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)
    worker = Worker(socket_fd, tray_fd, _open_board(board_fd))
    # Ctrl-C is the driver's business. (A handler, not SIG_IGN, which programs that a job starts would inherit.)
    signal.signal(signal.SIGINT, _take_no_notice)
    worker.handle_sigterm()
    os.register_at_fork(after_in_child=worker.disown)
    try:
        worker.serve()
    finally:
        flush_output()


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

    def __init__(self, context: JobContext, worker: Worker) -> None:
        self.context = context
        self._state = JobStatus.RUNNING
        self._worker = worker

    @property
    def _status(self) -> JobStatus:
        if self._state is JobStatus.RUNNING and self._worker.is_told_to_stop(self):
            self._state = JobStatus.CANCELLING
        return self._state

    @_status.setter
    def _status(self, status: JobStatus) -> None:
        self._state = status


class Worker:
    """Runs jobs. Its main thread runs them; its guard thread reports for it when a job takes long."""

    def __init__(self, fd: int, tray: int, board: BoardOfWorker | None) -> None:
        self._reader = open(fd, "rb", buffering=1 << 16, closefd=False)  # noqa: SIM115 - open for the whole life
        self._fd = fd
        self._tray = tray
        self._tray_inode = os.fstat(tray).st_ino if tray >= 0 else 0
        self._has_tray = tray >= 0
        self._board = board
        self._seen = 0
        self._expects_more = False
        self._pid = os.getpid()
        self._sending = _thread.allocate_lock()
        self._calling = _thread.allocate_lock()
        # Under _state: what the guard and the main thread share.
        self._state = _thread.allocate_lock()
        self._todo: deque[tuple[str, Any]] = deque()
        self._told = 0  # of how many jobs of the message the outcomes were sent
        # Of those that were begun after them. While a job runs, there is a start more than there are ends.
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._errors: dict[int, tuple[Any, ...]] = {}
        self._values: list[Any] = []
        self._batches = 0
        self._due = 0.0
        self._guard_wanted = _thread.allocate_lock()
        self._guard_wanted.acquire()
        self._guard_looks = math.inf
        self._guard_runs = False
        self._is_asked_to_stop = False
        self._waits_to_be_told = False
        self._live: _LiveJob | None = None
        self._peeked: Any = None
        self._peeks_at = 0.0
        self._client = self._storage_client
        self._has_client = False
        self._runner: Any = None
        self._on_sigterm = self.ask_to_stop  # one object, to be known again

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
        while (frame := self._next()) is not None:
            _, self._seen, jobs, hold_s, more = frame
            self._expects_more = more and self._has_tray
            if len(jobs) == 1:
                self._run_alone(jobs[0])
            else:
                self._run_batch(jobs, hold_s)

    def _own_memory(self) -> int:
        if self._context.memory_limit == math.inf:
            return 0
        from paraval.memory import MemoryMeter  # here: most workers never need it

        return MemoryMeter(self._pid).sample()

    def ask_to_stop(self, _number: int, _frame: object) -> None:
        """React to SIGTERM: tell the job, whose ``stopped()`` turns true, or whose coroutine is cancelled."""
        self._is_asked_to_stop = True
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
        import _socket  # here: most workers never need it; the one in socket takes a while

        try:
            if self._peeked is None:
                self._peeked = _socket.socket(fileno=os.dup(self._fd))
                self._peeked.setblocking(True)  # for both descriptors, whatever a job has made the default of new ones
            return STOP in self._peeked.recv(_PEEKED, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
        except OSError:  # there is nothing, or nobody, or no descriptor left
            return False

    def handle_sigterm(self) -> None:
        """Have :meth:`ask_to_stop` react to SIGTERM, whatever a job has made of that."""
        if self._runner is not None:
            self._runner.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def disown(self) -> None:
        """In a process that a job forked: signals do what they do in any process, unless the job has changed that."""
        if signal.getsignal(signal.SIGTERM) is self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is _take_no_notice:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _set_up(self, setup: Setup) -> None:
        sys.path[:] = setup.path
        sys.argv[:] = setup.argv
        if setup.is_captured:
            unbuffer_output()
            faulthandler.enable()  # a crash shows where it was
        self._origin = setup.origin
        self._context = JobContext(origin=setup.origin, kill_grace=setup.kill_grace, memory_limit=setup.memory_limit)
        self._is_async = setup.is_async
        self._function, self._kwargs, self._stopper, initializer = pickle.loads(setup.program)  # noqa: S301 - our parent's
        if setup.is_async:
            from paraval.worker.coroutines import CoroutineRunner  # here: most workers never need it

            self._runner = CoroutineRunner()
        self._retry_on = pickle.loads(setup.retry_on) if setup.retry_on else ()  # noqa: S301 - likewise
        if initializer is not None:
            initializer()

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
                    self._send(("idle", self._seen))
                frame = self._receive()
                if frame is None or frame[0] == "jobs":
                    if frame is not None and frame[-1]:
                        self._send(("begun", frame[1]))
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
            self._send(("lost",))
            return None
        return pickle.loads(message[HEAD:]) if message else None  # noqa: S301 - from our own parent

    def _run_alone(self, job: tuple[str, Any]) -> None:
        """Run the one job of a message. The guard has nothing to do with it, so it costs a fraction of a batch."""
        if self._is_asked_to_stop:  # maybe before it has begun any: while it was set up, say
            self._send(("back", self._seen, 0, None))
        else:
            began = monotonic() - self._origin
            error, value = self._run(*job)
            times = PAIR.pack(began, monotonic() - self._origin)
            flush_output()
            self._send(("done", self._seen, 0, times, {} if error is None else {0: error}, [value]))
        self._end_batch()

    def _end_batch(self) -> None:
        if self._is_asked_to_stop:
            self._is_asked_to_stop = False
            self._waits_to_be_told = True  # it shall not go on by itself

    def _run_batch(self, jobs: list[tuple[str, Any]], hold_s: float) -> None:
        state, board, todo, starts, ends, values, origin = (
            self._state,
            self._board,
            self._todo,
            self._starts,
            self._ends,
            self._values,
            self._origin,
        )
        with state:
            todo.extend(jobs)
            self._told = 0
            self._batches += 1
            self._due = (now := monotonic()) + hold_s
        is_alone = not self._wake_guard()  # so that nobody could give back what it has not begun
        report_at = now - origin + _HOLD_S
        job = self._begin_next()
        while job is not None:
            error, value = self._run(*job)
            # With one look at the clock and one turn with the lock, the next job begins where this one ends.
            with state:
                ended = monotonic() - origin
                if error is not None:
                    self._errors[len(ends)] = error
                ends.append(ended)
                values.append(value)
                if (
                    todo
                    and ended < report_at
                    and not (self._is_asked_to_stop or is_alone)
                    and (board is None or board.begin(place_of(self._seen, self._told + len(starts)), ended))
                ):
                    job = todo.popleft()
                    starts.append(ended)
                    continue
            if ended >= report_at:
                report_at = ended + _HOLD_S
                self._report()
            if is_alone:
                self._give_back()
            job = self._begin_next()
        flush_output()
        self._report()
        self._end_batch()

    def _begin_next(self) -> tuple[str, Any] | None:
        if self._is_asked_to_stop:  # maybe before it has begun any: while it was set up, say
            self._give_back()
        with self._state:
            if not self._todo:
                return None
            starts, board, now = self._starts, self._board, monotonic() - self._origin
            if board is None or board.begin(place_of(self._seen, self._told + len(starts)), now):
                starts.append(now)
                return self._todo.popleft()
        self._give_back()  # the job before it was to be stopped, as it held the interpreter for too long
        return None

    def _run(self, job_id: str, args: Any) -> tuple[tuple[Any, ...] | None, Any]:
        """Run one job; give its error (as a tuple) and its value."""
        try:
            if type(args) is Sealed:
                args = pickle.loads(args.data)  # noqa: S301 - from our own parent
            if _handler_of(signal.SIGTERM) is not self._on_sigterm:  # an earlier job, or the set-up, has changed it
                self.handle_sigterm()
            self._live = live = _LiveJob(self._context, self)
            if self._is_asked_to_stop:  # just before there was a job to tell
                live._status = JobStatus.CANCELLING
            value = self._function(running_job(live, job_id, args, self._client, self._stopper), **self._kwargs)
            if self._is_async:
                value = self._complete(value, live)
        except BaseException as exc:  # noqa: BLE001 - whatever a job raises, SystemExit too, is its own failure
            if os.getpid() != self._pid:
                exit_fork(exc)
            was_asked = self._live is not None and self._live._state is JobStatus.CANCELLING
            self._end_calls()
            error = error_from_exception(exc)
            if was_asked and error.type == "CancelledError" and not error.message:
                error = error._replace(message="it was asked to stop, by SIGTERM")
            return (*error, is_one_of(exc, self._retry_on)), None
        if os.getpid() != self._pid:
            exit_fork(None)  # the job forked, and its child came back too: there is one worker on this socket
        self._end_calls()
        try:
            return None, sendable(value)
        except PicklingFailed as exc:
            error = JobError("exception", str(exc), type="PicklingError")
            return (*error, False), None

    def _complete(self, coroutine: Any, live: _LiveJob) -> Any:
        return self._runner.run(coroutine, lambda: live._status is JobStatus.CANCELLING)

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

    # -- the guard -----------------------------------------------------------------------------------------------------

    def _wake_guard(self) -> bool:
        """Have the guard look in time for the batch that begins; False when there cannot be one."""
        if not self._guard_runs:
            try:
                _thread.start_new_thread(self._guard, ())
            except (RuntimeError, MemoryError):  # a job may have limited what the process may have
                return False
            self._guard_runs = True
            return True
        with self._state:
            if self._guard_looks > self._due:
                self._guard_looks = 0.0  # it is on its way
                self._guard_wanted.release()
        return True

    def _give_back(self) -> None:
        """Send back what was not begun."""
        with self._state:
            at = self._told + len(self._starts)
            is_any = bool(self._todo)
            self._todo.clear()
        if is_any:
            self._report()
            self._send(("back", self._seen, at, None))

    def _guard(self) -> None:
        try:
            self._keep_watch()
        except BaseException:  # noqa: BLE001 - there is no memory, say: nobody would report what this worker cannot
            os._exit(1)

    def _keep_watch(self) -> None:
        """While batches come: see to it that none keeps its finished or its waiting jobs for long.

        It looks no more often than that takes, as each of its turns takes the interpreter from the job that runs.
        """
        told = -1
        looks = 0.0
        while True:
            if looks < math.inf:
                self._guard_wanted.acquire(timeout=min(max(looks - monotonic(), 0.0), _LONGEST_S))
            else:
                self._guard_wanted.acquire()
            with self._state:
                self._guard_wanted.acquire(blocking=False)  # in case that it was released after the time had run out
                runs = len(self._starts) > len(self._ends)
                stuck = runs and monotonic() >= self._due
                seen = self._batches
                back: tuple[Any, ...] = ()
                if stuck:
                    back = ("back", self._seen, self._told + len(self._starts), self._starts[-1])
                    self._todo.clear()
                # Decided here, under the lock, so that a batch that begins now finds it asleep, and wakes it.
                is_idle = stuck or (not self._todo and not runs)
                looks = self._guard_looks = math.inf if is_idle else self._due
            if back and told != seen:
                told = seen
                self._report()
                self._send(back)

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
            self._send(("call", method, sealed))
            while (reply := self._receive()) is not None and reply[0] == "stop":
                live._status = JobStatus.CANCELLING
        if reply is None:
            raise EOFError("the driver is gone")
        _, error, value = reply
        if error is not None:
            raise pickle.loads(error)  # noqa: S301 - from our own parent
        return pickle.loads(value)  # noqa: S301 - likewise

    def _report(self) -> None:
        with self._state:
            count = len(self._ends)
            if count:
                times = struct.pack(f"{2 * count}d", *self._starts[:count], *self._ends)
                # Under the lock: outcomes must not overtake a "back".
                self._send(("done", self._seen, self._told, times, self._errors, self._values))
                self._told += count
                del self._starts[:count]
                for told in (self._ends, self._errors, self._values):
                    told.clear()

    def _send(self, frame: tuple[Any, ...]) -> None:
        data = pickle.dumps(frame, 5)
        with self._sending:
            if len(data) < 1 << 16:
                data = len(data).to_bytes(8, "little") + data
                sent = os.write(self._fd, data)
                if sent < len(data):
                    _write(self._fd, memoryview(data)[sent:])
            else:
                _write(self._fd, memoryview(len(data).to_bytes(8, "little")))
                _write(self._fd, memoryview(data))

    def _receive(self) -> Any:
        try:
            head = self._reader.read(8)
        except ConnectionError:  # the parent has closed its end with something unread
            return None
        if len(head) < 8:  # noqa: PLR2004 - the length of a length
            return None
        data = self._reader.read(int.from_bytes(head, "little"))
        return pickle.loads(data)  # noqa: S301 - from our own parent


def place_of(number: int, at: int) -> int:
    """Give the place on the board of a message's job."""
    return number << 32 | at


def message_of(place: int) -> tuple[int, int]:
    """Give the message, and the place in it, of what is on the board."""
    return place >> 32, place & 0xFFFF_FFFF


def sendable(value: Any) -> Any:
    """Give a result as it is sent, some time later: the next job may change what this one returned.

    Raises:
        PicklingFailed: it cannot be sent.
    """
    if not is_plain(value):
        return Sealed(dumps(value, "the result"))
    return dict(value) if type(value) is dict else value


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def is_one_of(exc: BaseException, types: tuple[type[BaseException], ...]) -> bool:
    """Whether ``except types`` would catch it: unlike ``isinstance``, that asks no metaclass, which might raise."""
    return any(base is one for base in type(exc).__mro__ for one in types)


def exit_fork(exc: BaseException | None) -> NoReturn:
    """End a process that a job forked and that comes back, maybe with an exception; with ``sys.exit``'s exit code."""
    code = exc.code if isinstance(exc, SystemExit) else int(exc is not None)
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    flush_output()
    os._exit((code or 0) & 0xFF)
