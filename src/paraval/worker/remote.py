"""What runs in the processes of an executor.

For an executor that only carries calls and their results, one call runs several jobs, one after the other
(:func:`run_jobs`). A worker of loky's becomes one like those of the process evaluator (:func:`serve`).
"""

from __future__ import annotations

import _thread
import os
import pickle
import sys
import time
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paraval.job import JobContext, JobStatus, LiveJob, running_job
from paraval.outcome import JobError, error_from_exception
from paraval.worker.board import Address, BoardOfWorker
from paraval.worker.frames import Sealed, sendable
from paraval.worker.main import exit_fork, main, may_retry
from paraval.worker.output import flush_output
from paraval.worker.pickling import PicklingFailed, dumps

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from paraval.storage import Storage
    from paraval.worker.notebook import Notebook

__all__ = ["Done", "Program", "Report", "hold", "run_jobs", "serve"]

_ENOUGH_S: Final = 0.005
"""After so many seconds a call starts no further job."""
_LOOK_S: Final = 0.5
"""How often a worker looks whether the driver is there, where it would not be told."""
_MOST_PROGRAMS: Final = 16


class Program(NamedTuple):
    """What is the same for many calls.

    Attributes:
        parts: three things, pickled together: the run-function; its static keyword arguments; the stopper, which is
            copied for each job.
        is_async: whether calling the run-function gives a coroutine.
        retry_on: pickled tuple of exception types.
        storage: pickled, where it is the same store in any process of the driver's machine; else None.
        driver: process id of the evaluator's process.
        origin: where the evaluator's clock is zero, on the driver's monotonic clock.
        kill_grace: seconds between asking a job to stop and the strongest means.
    """

    parts: bytes
    is_async: bool
    retry_on: bytes
    storage: bytes | None
    driver: int
    origin: float
    kill_grace: float


class Done(NamedTuple):
    """What became of one job.

    Attributes:
        job_id: which.
        started: when, on the worker's monotonic clock.
        finished: likewise.
        error: the fields of a ``JobError``, and whether the job may be tried again; None: there was none.
        value: what the run-function returned; :class:`~paraval.worker.frames.Sealed` unless it is plain.
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
        left: the ids of those that were not, as the others took long enough or the driver asked to stop.
        broken: why no job can be run in this process, as the fields of a ``JobError``; None: they can.
    """

    done: list[Done]
    left: list[str]
    broken: tuple[Any, ...] | None = None


# -- calls -------------------------------------------------------------------------------------------------------------


class _Loaded:
    """A program, unpickled: all of it is from our own driver."""

    def __init__(self, program: Program) -> None:
        self.function: Any
        self.kwargs: dict[str, Any]
        self.stopper: Any
        self.function, self.kwargs, self.stopper = pickle.loads(program.parts)  # noqa: S301 - see above
        self.is_async = program.is_async
        self.retry_on: tuple[type[BaseException], ...] = pickle.loads(program.retry_on)  # noqa: S301 - likewise
        self.context = JobContext(origin=program.origin, kill_grace=program.kill_grace)
        self._pickled_storage = program.storage
        self._storage: Storage | None = None

    @property
    def storage(self) -> Storage | None:
        """The driver's store, opened when a job first asks for it; None: it cannot be had in another process."""
        if self._storage is None and self._pickled_storage is not None:
            self._storage = pickle.loads(self._pickled_storage)  # noqa: S301 - from our own driver
        return self._storage


_loaded: dict[str, _Loaded] = {}
"""The programs that this process knows, by their tokens, oldest first."""


def run_jobs(
    token: str,
    program: Program | None,
    jobs: list[tuple[str, Any]],
    address: Address,
    number: int,  # noqa: ARG001 - its being there is what it is for
) -> Report | None:
    """Run jobs one after the other.

    Args:
        token: names the program.
        program: what to run, or None where this process is believed to know it.
        jobs: ids and arguments, the latter sealed unless they are plain.
        address: of a board, the way to be asked to stop, on the same machine.
        number: of the call among those with the same board. (Of two calls that are alike in everything, such as two
            attempts at a job, dask makes the first only, and answers the second with its result.)

    Returns:
        What became of them; or None: the program is not known here, send it along.
    """
    loaded = _loaded.get(token)
    if loaded is None:
        if program is None:
            return None
        try:
            _end_with(program.driver)
            loaded = _Loaded(program)
        except BaseException as exc:  # noqa: BLE001 - whatever importing the run-function does
            return Report([], [job_id for job_id, _ in jobs], tuple(error_from_exception(exc)))
        _loaded[token] = loaded
        while len(_loaded) > _MOST_PROGRAMS:  # a worker of a cluster may live long and serve many
            _loaded.pop(next(iter(_loaded)), None)
    board = _open(address)
    call = _Call(loaded, board)
    try:
        return call.run(jobs)
    finally:
        call.close()
        if board is not None:
            board.close()
        flush_output()


def _end_with(driver: int) -> None:
    """Where this process was made by multiprocessing for the driver, have it end when the driver is gone.

    The workers of a pool that were forked keep one another alive.
    """
    process = sys.modules.get("multiprocessing.process")
    parent = None if process is None else process.parent_process()
    if parent is not None and parent.pid == driver and driver not in _watched:
        _watched.add(driver)
        _thread.start_new_thread(_watch, (parent,))


_watched: set[int] = set()


def _watch(parent: Any) -> None:
    try:
        parent.join()
    except ValueError:  # loky gives nothing that could be waited for
        while os.getppid() == parent.pid:
            time.sleep(_LOOK_S)
    os._exit(1)


def _open(address: Address) -> BoardOfWorker | None:
    try:
        return BoardOfWorker.at(address)
    except (OSError, ValueError):  # another machine, or a driver that has gone
        return None


class _LiveJob(LiveJob):
    """A job whose status is what the board says."""

    __slots__ = ("_board", "_place")

    def __init__(self, context: JobContext, board: BoardOfWorker | None, place: int) -> None:
        self.context = context
        self._board = board
        self._place = place

    @property
    def _status(self) -> JobStatus:  # type: ignore[override] # nobody but the driver sets it
        stops = self._board is not None and self._board.stops(self._place)
        return JobStatus.CANCELLING if stops else JobStatus.RUNNING


class _StorageOfJob:
    """Gives a job its storage, when its run-function asks for it.

    Args:
        job_id: the job.
        args: its arguments.
        loaded: knows the driver's store; None where that cannot be had: on another machine.

    Attributes:
        notebook: what it was given, where it could not be given the store; or None.
    """

    def __init__(self, job_id: str, args: Any, loaded: _Loaded | None) -> None:
        self.notebook: Notebook | None = None
        self._job_id = job_id
        self._args = args
        self._loaded = loaded

    def __call__(self) -> Storage:
        if self._loaded is not None and (store := self._loaded.storage) is not None:
            return store
        if self.notebook is None:
            from paraval.worker.notebook import Notebook  # here: most jobs never ask for their storage

            self.notebook = Notebook(self._job_id, self._args)
        return self.notebook


class _Call:
    """One call. Two may run side by side, in threads."""

    def __init__(self, loaded: _Loaded, board: BoardOfWorker | None) -> None:
        self._loaded = loaded
        self._board = board
        self._runner: Any = None

    def run(self, jobs: list[tuple[str, Any]]) -> Report:
        done: list[Done] = []
        began = time.monotonic()
        for place, (job_id, args) in enumerate(jobs):
            now = time.monotonic()
            if place and now - began > _ENOUGH_S:
                break
            if self._board is not None and not self._board.begin(place, now):
                break
            done.append(self._run(place, job_id, args))
        return Report(done, [job_id for job_id, _ in jobs[len(done) :]])

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def _run(self, place: int, job_id: str, args: Any) -> Done:
        loaded = self._loaded
        storage: _StorageOfJob | None = None
        pid = os.getpid()
        error: tuple[Any, ...] | None = None
        value: Any = None
        notes: Sealed | None = None
        started = time.monotonic()
        try:
            if type(args) is Sealed:
                args = pickle.loads(args.data)  # noqa: S301 - from our own driver
            live = _LiveJob(loaded.context, self._board, place)
            # The board tells that this is the driver's machine, where a store is what it is there.
            storage = _StorageOfJob(job_id, args, None if self._board is None else loaded)
            value = loaded.function(running_job(live, job_id, dict(args), storage, loaded.stopper), **loaded.kwargs)
            if loaded.is_async or type(value) is CoroutineType:  # of a lambda, say
                value = self._complete(value, live)
        except BaseException as exc:  # noqa: BLE001 - whatever a job raises, SystemExit too, is its own failure
            if os.getpid() != pid:
                exit_fork(exc)
            failure = error_from_exception(exc)
            error, value = (*failure, may_retry(exc, failure, loaded.retry_on)), None
        finished = time.monotonic()
        if os.getpid() != pid:
            exit_fork(None)  # the job forked, and its child came back too: one of them is enough
        try:
            value = sendable(value)
            if storage is not None and (notebook := storage.notebook) is not None:
                notes = Sealed(dumps((notebook.changes, notebook.values), "what the job stored"))
        except PicklingFailed as exc:
            error = (*JobError("exception", str(exc), type="PicklingError"), False)
            value = None
        return Done(job_id, started, finished, error, value, notes)

    def _complete(self, coroutine: Any, live: _LiveJob) -> Any:
        """Run a coroutine to its end; cancel it when the driver asks to stop."""
        import asyncio  # here: most workers never need it

        from paraval.worker.coroutines import CoroutineRunner

        if self._runner is None:
            self._runner = CoroutineRunner()

        async def watched() -> Any:
            watch = asyncio.ensure_future(_cancel_when_asked(live, asyncio.current_task()))
            try:
                return await coroutine
            finally:
                watch.cancel()

        return self._runner.run(watched(), lambda: False)


async def _cancel_when_asked(live: _LiveJob, task: Any) -> None:
    import asyncio  # as above

    while live._status is not JobStatus.CANCELLING:  # noqa: ASYNC110 - another process says so, and sets no event
        await asyncio.sleep(0.05)
    task.cancel()


# -- loky --------------------------------------------------------------------------------------------------------------

_held: list[Any] = []


def hold(*connections: Connection | None) -> None:
    """Keep, as the initializer of a worker, what can be handed over only while a process is started."""
    _held[:] = connections


def serve() -> None:
    """Be a worker like those of the process evaluator, until the channel ends: one call that serves many jobs.

    :func:`hold` was given the channel, the tray or None, the board or None, the lifeline, and maybe what stdout and
    stderr shall be.
    """
    channel, tray, board, lifeline, *outputs = _held
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # so that all it starts can be signalled with it, and nobody else
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    try:
        board_fd = -1
        if board is not None:
            board_fd = os.dup(board.fileno())  # which main() closes
            board.close()
        main(channel.fileno(), -1 if tray is None else tray.fileno(), board_fd, lifeline.fileno())
    finally:
        channel.close()
