"""Jobs in the worker processes of loky."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar, Final

import anyio

from paraval.backends.base import RunSpec
from paraval.backends.child import WorkerProcess, _Lifeline, _Tail
from paraval.backends.futures import close_before_pools_wait
from paraval.backends.process import ProcessBackend, ProcessPoolEvaluator
from paraval.backends.tray import Tray
from paraval.descriptors import above_standard, is_closed, pipe, socketpair
from paraval.errors import MissingExtraError
from paraval.loops import call_in_thread
from paraval.outcome import JobError
from paraval.worker import remote
from paraval.worker.board import Board

try:
    from loky.process_executor import ProcessPoolExecutor
except ImportError as exc:
    raise MissingExtraError("the loky evaluator needs loky: pip install 'paraval[loky]'") from exc

__all__ = ["LokyEvaluator"]

_CODE_S: Final = 0.1
"""How long, at most, loky's thread may take from having an exit code to telling it."""
_NO_OUTPUT: Final = (
    "loky starts none in a program without sys.stdout and sys.stderr (they are None, or closed): open them, on "
    "os.devnull for example, or use the method 'process'"
)


class LokyWorker(WorkerProcess):
    """A worker in an executor of loky's own, with a channel to it.

    The executor gets one call, which lasts as long as the worker and serves jobs over the channel. So a job costs no
    trip through the executor's queues and threads, a large argument cannot get stuck in them when the worker is killed,
    and jobs can do all that they can in the process evaluator. Start and end of the process are loky's.
    """

    _popen: Any  # a _LokyProcess, which has what is used of a _Popen: pid, has_ended, was_taken, returncode, wait

    def __init__(self, setup: bytes, capture: int | None, *, has_tray: bool = False, has_board: bool = False) -> None:
        # Not the base's __init__, which would start a process of its own.
        with contextlib.ExitStack() as for_failure:
            ours, theirs = socketpair()
            for_failure.callback(ours.close)
            for_failure.callback(theirs.close)
            ours.setblocking(False)
            self.tray = tray = Tray() if has_tray else None
            if tray is not None:
                for_failure.callback(tray.close)
            self.board = board = Board() if has_board else None
            if board is not None:
                for_failure.callback(board.close)
            self._lifeline = lifeline = _Lifeline()
            for_failure.callback(lifeline.close)
            self._hand_over: list[Connection | None] = [Connection(lifeline.watched, writable=False)]
            for_failure.callback(self._close_what_is_handed_over)
            self._tails = []
            self._selector = None
            if capture is not None:
                self._selector = selectors.DefaultSelector()
                for_failure.callback(self._selector.close)
                self._selector.register(ours.fileno(), selectors.EVENT_READ)
                for _ in ("stdout", "stderr"):
                    read, write = pipe()
                    self._hand_over.append(Connection(write, readable=False))
                    tail = _Tail(os.fdopen(read, "rb", buffering=0), capture)
                    for_failure.callback(tail.close)
                    self._tails.append(tail)
                    self._selector.register(tail.fileno(), selectors.EVENT_READ)
            self._hand_over.insert(
                0, None if board is None or board.lack else Connection(above_standard(os.dup(board.fileno())))
            )
            self._hand_over.insert(0, None if tray is None else Connection(above_standard(os.dup(tray.fileno()))))
            self._hand_over.insert(0, Connection(theirs.detach()))
            for_failure.pop_all()
        self._socket = ours
        self._received = bytearray()
        self.setup = setup
        self._unsent_setup = setup
        self._popen = _LokyProcess()
        self.jobs_done = 0

    def _close_what_is_handed_over(self) -> None:
        _close_all(self._hand_over)

    async def send(self, frame: bytes) -> None:
        if self._hand_over:
            hand_over, self._hand_over = self._hand_over, []
            # In a thread, as loky takes some milliseconds; not to be cancelled half-way.
            with anyio.CancelScope(shield=True):
                await call_in_thread(self._popen.start, hand_over, self._notice_the_end_of_call)
        await super().send(frame)

    def _notice_the_end_of_call(self, call: Future[Any]) -> None:
        """Have the slot notice, from loky's thread, that loky has lost the worker."""
        if call.cancelled() or call.exception() is not None:
            self.notice_the_end()

    def signal(self, number: signal.Signals) -> None:
        self._popen.signal(number)

    async def retire(self) -> None:
        self._popen.shut_down()  # takes effect when the call has returned, which it does at the end of the channel
        await super().retire()

    async def _reap(self) -> bool:
        give_up = time.monotonic() + _CODE_S
        is_gone = await super()._reap()
        while is_gone and self._was_taken and time.monotonic() < give_up:  # noqa: ASYNC110 - loky sets no event
            await anyio.sleep(0.001)
        return is_gone

    async def post_mortem(self) -> JobError:
        if self._popen.start_failure is None:
            return await super().post_mortem()
        self._close()
        self._finish()
        failure = self._popen.start_failure
        return JobError("worker_died", f"loky could not start a worker: {type(failure).__name__}: {failure}")

    def _finish(self) -> None:
        super()._finish()
        self._popen.shut_down()


class _LokyProcess:
    """An executor of loky's with one worker, seen as that process."""

    def __init__(self) -> None:
        self._executor: Any = None
        self._process: BaseProcess | None = None
        self.start_failure: Exception | None = None

    def start(self, hand_over: list[Connection | None], on_end: Callable[[Future[Any]], object]) -> None:
        """Start the worker, and the call that serves jobs; close our copies of what is handed over.

        Raises:
            OSError: there is no worker.
        """
        try:
            if sys.stdout is None or sys.stderr is None or is_closed(1) or is_closed(2):
                raise OSError(_NO_OUTPUT)  # noqa: TRY301 - as any other failure
            self._executor = ProcessPoolExecutor(max_workers=1, initializer=remote.hold, initargs=tuple(hand_over))
            call = self._executor.submit(remote.serve)
            self._process = _process_of(self._executor)
            call.add_done_callback(on_end)
            close_before_pools_wait(LokyEvaluator)  # each time, as loky registers its own part each time
        except Exception as exc:
            self.start_failure = exc
            raise ChildProcessError(str(exc)) from exc
        finally:
            _close_all(hand_over)

    def shut_down(self) -> None:
        """Let the executor end with its call. It does not wait."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    @property
    def pid(self) -> int:
        pid = None if self._process is None else self._process.pid
        if pid is None:
            raise ProcessLookupError("the worker was not started")
        return pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None as long as the process runs, or where it is not known."""
        return None if self._process is None else self._process.exitcode

    @property
    def has_ended(self) -> bool:
        """Whether the process was started and has ended."""
        return self._process is not None and (self.returncode is not None or _is_reaped(self.pid))

    @property
    def was_taken(self) -> bool:
        """Whether its exit code is not known. Loky's thread, which waits too, may have it and tell in a moment."""
        return self.has_ended and self.returncode is None

    def wait(self) -> None:
        """Do nothing: loky's thread waits for the process."""

    def signal(self, number: signal.Signals) -> None:
        """Signal the worker and all it started; or only the worker, where it is not yet the head of a group."""
        try:
            pid = self.pid
            if not self.has_ended:
                (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, number)
        except ProcessLookupError:
            pass


def _close_all(connections: list[Connection | None]) -> None:
    for connection in connections:
        if connection is not None:
            connection.close()


def _is_reaped(pid: int) -> bool:
    """Whether a child has ended and somebody has taken its exit code, where the system tells."""
    if not hasattr(os, "waitid"):
        return False
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def _process_of(executor: Any) -> BaseProcess:
    for process in list(executor._processes.values()):
        if isinstance(process, BaseProcess):
            return process
    raise ChildProcessError("it ended as soon as it was started")


class LokyBackend(ProcessBackend):
    """A worker of loky's for each slot."""

    def start_worker(self, setup: bytes) -> WorkerProcess:
        worker = LokyWorker(setup, self._capture, has_tray=self.is_far, has_board=self.has_boards)
        self.workers.add(worker)
        return worker

    def prepare(self, spec: RunSpec, workers: int) -> None:
        """Do nothing: it is loky that starts the workers, when there is a loop to wait for it."""


class LokyEvaluator(ProcessPoolEvaluator):
    """Runs run-functions in ``num_workers`` worker processes of loky; a job that must stop is killed, alone.

    As the process evaluator, with loky's interpreters as workers: for programs that configure loky, or whose
    run-functions use joblib or loky themselves. Each worker has an executor of loky's own, never the reusable one that
    the rest of the program may share. Needs the extra ``loky``.

    See :class:`~paraval.Evaluator` and :class:`~paraval.ProcessPoolEvaluator` for the arguments.

    Raises:
        ValueError: the run-function cannot be sent to another process; the message names the object inside it.
    """

    parallel: ClassVar[str] = "processes of loky"
    _backend_class: ClassVar[type[ProcessBackend]] = LokyBackend
