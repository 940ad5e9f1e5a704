"""What runs in the processes of an executor: one call runs several jobs, one after the other.

For an executor that only carries calls and their results (:func:`run_jobs`), and for loky, whose worker becomes one like
those of the process evaluator (:func:`serve`).
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paraval.job import Job, JobStatus
from paraval.outcome import JobError, error_from_exception
from paraval.worker.board import Board
from paraval.worker.main import Sealed, Setup, Worker, _die_with_the_parent, _flush_output
from paraval.worker.pickling import PicklingFailed, dumps, is_plain

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from paraval.worker.notebook import Notebook

__all__ = ["Done", "Program", "Report", "hold", "run_jobs", "serve"]

_ENOUGH_S: Final = 0.005
"""After so many seconds a call starts no further job."""
_MOST_PROGRAMS: Final = 16


class Program(NamedTuple):
    """What is the same for many calls.

    Attributes:
        function: the pickled run-function, its static keyword arguments and the stopper.
        is_async: whether calling the run-function gives a coroutine.
        retry_on: pickled tuple of exception types; or None.
    """

    function: bytes
    is_async: bool
    retry_on: bytes | None


class Done(NamedTuple):
    """What became of one job.

    Attributes:
        job_id: which.
        started: when, on the worker's monotonic clock.
        finished: likewise.
        error: as the fields of a ``JobError``, and whether the job may be tried again; None: there was none.
        value: what the run-function returned; :class:`~paraval.worker.main.Sealed` unless it is plain.
        notes: what it stored, if anything: sealed ``(changes, values)`` of a notebook.
    """

    job_id: str
    started: float
    finished: float
    error: tuple[Any, ...] | None
    value: Any
    notes: Sealed | None


class Report(NamedTuple):
    """What a call gives back.

    Attributes:
        done: the jobs that were run.
        left: the ids of those that were not started, as the others took long enough or the driver asked to stop.
        broken: why no job can be run in this process, as the fields of a ``JobError``; None: they can.
    """

    done: list[Done]
    left: list[str]
    broken: tuple[Any, ...] | None = None


# -- calls -------------------------------------------------------------------------------------------------------------


class _Loaded(NamedTuple):
    function: Any
    kwargs: dict[str, Any]
    stopper: Any
    is_async: bool
    retry_on: tuple[type[BaseException], ...]


_loaded: dict[str, _Loaded] = {}
"""The programs that this process knows, by their tokens, oldest first."""


def run_jobs(token: str, program: Program | None, jobs: list[tuple[str, Any]], board_path: str) -> Report | None:
    """Run jobs one after the other.

    Args:
        token: names the program.
        program: what to run, or None where this process is believed to know it.
        jobs: ids and arguments, the latter sealed unless they are plain.
        board_path: the way to be asked to stop, on the same machine.

    Returns:
        What became of them; or None: the program is not known here, send it along.
    """
    loaded = _loaded.get(token)
    if loaded is None:
        if program is None:
            return None
        try:
            loaded = _load(program)
        except BaseException as exc:  # noqa: BLE001 - whatever importing the run-function does
            return Report([], [job_id for job_id, _ in jobs], tuple(error_from_exception(exc)))
        _loaded[token] = loaded
        while len(_loaded) > _MOST_PROGRAMS:  # a worker of a cluster may live long and serve many
            _loaded.pop(next(iter(_loaded)), None)
    board = _open(board_path)
    call = _Call(loaded, board)
    try:
        return call.run(jobs)
    finally:
        call.close()
        if board is not None:
            board.close()
        _flush_output()


def _load(program: Program) -> _Loaded:
    function, kwargs, stopper = pickle.loads(program.function)  # noqa: S301 - from our own driver
    retry_on = pickle.loads(program.retry_on) if program.retry_on else ()  # noqa: S301 - likewise
    return _Loaded(function, kwargs, stopper, program.is_async, retry_on)


def _open(path: str) -> Board | None:
    try:
        return Board(path)
    except (OSError, ValueError):  # another machine, or a driver that has gone
        return None


class _LiveJob(Job):
    """A job whose status is that of its board."""

    __slots__ = ("board",)

    board: Board | None

    @property
    def _status(self) -> JobStatus:
        board = getattr(self, "board", None)
        return JobStatus.RUNNING if board is None or not board.stopping else JobStatus.CANCELLING

    @_status.setter
    def _status(self, status: JobStatus) -> None:
        """Take no notice: the driver knows."""


class _Call:
    """One call: the jobs that share an event loop, if they are coroutines. Two may run side by side, in threads."""

    def __init__(self, loaded: _Loaded, board: Board | None) -> None:
        self._loaded = loaded
        self._board = board
        self._runner: Any = None

    def run(self, jobs: list[tuple[str, Any]]) -> Report:
        done: list[Done] = []
        began = time.monotonic()
        if self._board is not None and not self._board.stopping:
            self._board.note_start(began)
        for job_id, args in jobs:
            if (done and time.monotonic() - began > _ENOUGH_S) or (self._board is not None and self._board.stopping):
                break
            done.append(self._run(job_id, args))
        return Report(done, [job_id for job_id, _ in jobs[len(done) :]])

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def _run(self, job_id: str, args: Any) -> Done:
        loaded = self._loaded
        notebook: Notebook | None = None

        def storage() -> Notebook:
            nonlocal notebook
            if notebook is None:
                from paraval.worker.notebook import Notebook  # here: most jobs never ask for their storage

                notebook = Notebook(job_id, args)
            return notebook

        started = time.monotonic()
        try:
            if type(args) is Sealed:
                args = pickle.loads(args.data)  # noqa: S301 - from our own driver
            job = _LiveJob(job_id, args, loaded.function)
            job.board = self._board
            job.storage = storage  # type: ignore[assignment] # made when the run-function asks for it
            value = loaded.function(job.create_running_job(loaded.stopper), **loaded.kwargs)
            if loaded.is_async:
                value = self._complete(value)
            error = None
        except BaseException as exc:  # noqa: BLE001 - whatever a job raises, SystemExit too, is its own failure
            error = (*error_from_exception(exc), isinstance(exc, loaded.retry_on))
            value = None
        finished = time.monotonic()
        notes: Sealed | None = None
        try:
            if not is_plain(value):
                value = Sealed(dumps(value, "the result"))
            if notebook is not None:
                notes = Sealed(dumps((notebook.changes, notebook.values), "what the job stored"))
        except PicklingFailed as exc:
            error = (*JobError("exception", str(exc), type="PicklingError"), False)
            value = None
        return Done(job_id, started, finished, error, value, notes)

    def _complete(self, coroutine: Any) -> Any:
        """Run a coroutine to its end; cancel it when the driver asks to stop."""
        import asyncio  # here: most workers never need it

        if self._runner is None:
            self._runner = asyncio.Runner()

        async def watched() -> Any:
            watch = asyncio.ensure_future(_cancel_when_stopping(self._board, asyncio.current_task()))
            try:
                return await coroutine
            finally:
                watch.cancel()

        return self._runner.run(watched())


async def _cancel_when_stopping(board: Board | None, task: Any) -> None:
    import asyncio  # as above

    while board is not None:
        await asyncio.sleep(0.05)
        if board.stopping:
            task.cancel()
            return


# -- loky --------------------------------------------------------------------------------------------------------------

_held: list[Connection] = []


def hold(channel: Connection, lifeline: Connection, *outputs: Connection) -> None:
    """Keep, as the initializer of a worker, what can only be handed over while a process is started."""
    _held[:] = [channel, lifeline, *outputs]


def serve() -> None:
    """Be a worker like those of the process evaluator, until the channel ends: a call that serves many jobs."""
    channel, lifeline, *outputs = _held
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # so that all it starts can be signalled with it, and nobody else
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    _die_with_the_parent(lifeline.fileno())
    for descriptor in (channel.fileno(), lifeline.fileno()):
        os.set_inheritable(descriptor, False)
    worker = _HostedWorker(channel.fileno())
    # Ctrl-C is the driver's business. (A handler, not SIG_IGN, which programs that a job starts would inherit.)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, worker.ask_to_stop)
    try:
        worker.serve()
    finally:
        _flush_output()
        channel.close()


class _HostedWorker(Worker):
    """Says when it is ready: until then no job has begun."""

    def _set_up(self, setup: Setup) -> None:
        super()._set_up(setup)
        self._send(("ready",))
