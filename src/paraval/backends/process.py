"""Jobs in worker processes of this machine, which can be killed one by one."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import anyio
import anyio.to_thread

from paraval import checks
from paraval.backends.base import Backend, Batch, Cancellation, RunSpec, Slot, WorkerDiedError
from paraval.errors import BadValueError
from paraval.evaluator import Evaluator
from paraval.functions import describe, is_async
from paraval.job import Job
from paraval.outcome import JobError, Outcome
from paraval.worker.main import Sealed, Setup
from paraval.worker.pickling import PicklingFailed, dumps, is_plain

__all__ = ["ProcessPoolEvaluator"]

_READ: Final = 1 << 20
_BOOTSTRAP: Final = "import sys; sys.path.insert(0, {!r}); from paraval.worker.main import main; main({}, {})"


class ProcessSlot(Slot):
    """One worker process at a time, on a socket pair of its own; a new one when that one died or was killed."""

    def __init__(self, spec: RunSpec, backend: ProcessBackend) -> None:
        self._spec = spec
        self._backend = backend
        self._process: WorkerProcess | None = None

    async def run(self, batch: Batch) -> None:
        sent = batch.take_all()
        frame = self._encode(batch, sent)
        if not sent:
            return
        process = self._process
        if process is None:
            process = self._process = WorkerProcess(self._backend.setup(self._spec))
        try:
            await process.send(frame)
            while sent:
                for reply in await process.receive():
                    await self._take(process, batch, sent, reply)
                if sent:
                    batch.report()
        except OSError as exc:  # the end of the file, or a broken pipe: the worker is gone
            self._process = None
            raise WorkerDiedError(await process.post_mortem()) from exc
        except BaseException:
            with anyio.CancelScope(shield=True):
                self._process = None
                await self._stop(process, batch, sent)
            raise
        process.jobs_done += len(batch)
        if self._backend.max_jobs_per_worker is not None and process.jobs_done >= self._backend.max_jobs_per_worker:
            self._process = None
            await process.retire()

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.retire()

    def _encode(self, batch: Batch, sent: dict[str, Job]) -> bytes:
        items: list[tuple[str, Any]] = []
        for job in list(sent.values()):
            if is_plain(job.args):
                items.append((job.id, job.args))
                continue
            try:
                items.append((job.id, Sealed(dumps(job.args, "the arguments"))))
            except PicklingFailed as exc:
                now = self._spec.clock()
                batch.finish_sent(job, Outcome(error=JobError("exception", str(exc), type="PicklingError")), now, now)
        return pickle.dumps(("jobs", items), 5)

    async def _take(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job], frame: tuple[Any, ...]) -> None:
        match frame[0]:
            case "done":
                for job_id, started, finished, error, value in frame[1]:
                    job = sent.get(job_id)
                    if job is not None:
                        batch.finish_sent(job, _outcome(error, value), started, finished)
            case "back":
                batch.give_back(*frame[1:])
            case "call":
                await process.send(await self._answer(frame[1], frame[2]))
            case "broken":
                error = JobError(*frame[1])
                message = f"the worker could not be set up: {error.message}"
                now = self._spec.clock()
                for job in list(sent.values()):
                    batch.finish_sent(job, Outcome(error=error._replace(message=message)), now, now)
                self._process = None
                await process.retire()

    async def _answer(self, method: str, args: tuple[Any, ...]) -> bytes:
        """Call the storage for a job."""
        storage = self._spec.storage
        function = getattr(storage, method)
        try:
            # A memory store answers at once; another may wait for a disk or a network.
            value = function(*args) if storage.by_reference else await anyio.to_thread.run_sync(function, *args)
            return pickle.dumps(("reply", None, value), 5)
        except Exception as exc:  # noqa: BLE001 - it is raised again in the job
            try:
                return pickle.dumps(("reply", exc, None), 5)
            except Exception:  # noqa: BLE001 - an exception that cannot be sent
                return pickle.dumps(("reply", RuntimeError(f"{type(exc).__name__}: {exc}"), None), 5)

    async def _stop(self, process: WorkerProcess, batch: Batch, sent: dict[str, Job]) -> None:
        """Ask the worker to stop, and kill it: at the latest after the grace."""
        process.signal(signal.SIGTERM)
        with contextlib.suppress(OSError), anyio.move_on_after(self._spec.kill_grace):
            while sent:
                for reply in await process.receive():
                    await self._take(process, batch, sent, reply)
        await process.kill()


def _outcome(error: tuple[Any, ...] | None, value: Any) -> Outcome:
    if error is not None:
        *fields, may_retry = error
        return Outcome(error=JobError(*fields), may_retry=may_retry)
    if type(value) is Sealed:
        try:
            value = pickle.loads(value.data)  # noqa: S301 - from our own worker
        except Exception as exc:  # noqa: BLE001 - it may need what only the worker has imported
            message = f"the result cannot be unpickled: {type(exc).__name__}: {exc}"
            return Outcome(error=JobError("exception", message, type="UnpicklingError"))
    return Outcome(value)


class WorkerProcess:
    """A running worker and the socket to it."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        lifeline = _lifeline()
        home = str(Path(__file__).parents[2])
        try:
            self._popen = subprocess.Popen(  # noqa: S603 - this very interpreter, with our own arguments
                [
                    sys.executable,
                    *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined] # as multiprocessing does
                    "-c",
                    _BOOTSTRAP.format(home, theirs.fileno(), lifeline),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                process_group=0,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._received = bytearray()
        self._unsent_setup: bytes | None = setup
        self.jobs_done = 0

    @property
    def pid(self) -> int:
        """Of the worker; also its process group."""
        return self._popen.pid

    async def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            OSError: the worker is gone.
        """
        data = b"".join((len(frame).to_bytes(8, "little"), frame)) if len(frame) < _READ else None
        if self._unsent_setup is not None:
            setup, self._unsent_setup = self._unsent_setup, None
            await self.send(setup)
        if data is None:
            await self._write(memoryview(len(frame).to_bytes(8, "little")))
            data = frame
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            await self._write(memoryview(data)[sent:])

    async def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._socket)

    async def receive(self) -> list[tuple[Any, ...]]:
        """Wait for frames; give those that are there.

        Raises:
            OSError: the worker is gone.
        """
        frames: list[tuple[Any, ...]] = []
        while not frames:
            await anyio.wait_readable(self._socket)
            try:
                data = self._socket.recv(_READ)
            except BlockingIOError:
                continue
            if not data:
                raise ConnectionResetError("the worker closed its socket")
            self._received += data
            frames = self._complete_frames()
        return frames

    def _complete_frames(self) -> list[tuple[Any, ...]]:
        frames: list[tuple[Any, ...]] = []
        received = self._received
        begin = 0
        while len(received) >= begin + 8:
            end = begin + 8 + int.from_bytes(received[begin : begin + 8], "little")
            if len(received) < end:
                break
            with memoryview(received) as view:
                frames.append(pickle.loads(view[begin + 8 : end]))  # noqa: S301 - from our own worker
            begin = end
        if begin:
            del received[:begin]
        return frames

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker and all it started."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    async def kill(self) -> None:
        """End it by force, with all it started."""
        self.signal(signal.SIGKILL)
        self._socket.close()
        await self._reap()

    async def retire(self) -> None:
        """Let an idle worker end by itself: it does at the end of its input."""
        self._socket.close()
        if not await self._reap():
            await self.kill()

    async def post_mortem(self) -> JobError:
        """Say how a worker died; end what it started."""
        self._socket.close()
        if not await self._reap():
            await self.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)  # its children; its number is not given out while they live
        code = self._popen.returncode
        number = -code if code is not None and code < 0 else None
        if number is not None:
            try:
                how = f"was killed by {signal.Signals(number).name}"
            except ValueError:
                how = f"was killed by signal {number}"
        else:
            how = f"ended with exit code {code}"
        return JobError(
            "worker_died",
            f"the worker process {how} while it ran the job",
            exit_code=code if number is None else None,
            signal=number,
            host=os.uname().nodename,
            pid=self._popen.pid,
        )

    async def _reap(self) -> bool:
        """Wait a moment for the process to be gone."""
        pause = 0.0005
        give_up = time.monotonic() + _REAP_S
        while self._popen.poll() is None:
            if time.monotonic() > give_up:
                return False
            await anyio.sleep(pause)
            pause = min(pause * 2, 0.02)
        return True


_REAP_S: Final = 0.3


@functools.cache
def _lifeline_of(_pid: int) -> tuple[int, int]:
    return os.pipe()


def _lifeline() -> int:
    """Give the end of a pipe whose other end closes when this process is gone; all workers watch the same."""
    return _lifeline_of(os.getpid())[0]


class ProcessBackend(Backend):
    """A worker process for each slot."""

    cancellation: ClassVar[Cancellation] = "kill"

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_jobs_per_worker: int | None,
        initializer: Callable[[], object] | None,
    ) -> None:
        self.max_jobs_per_worker = max_jobs_per_worker
        self.batch_limit = max_jobs_per_worker
        self._function = function
        self._is_async = is_async(function)
        try:
            self._initializer = None if initializer is None else dumps(initializer, "initializer")
        except PicklingFailed as exc:
            raise BadValueError(f"the initializer cannot be sent to a worker process: {exc}") from exc
        self._setup: tuple[Any, bytes] | None = None

    def slot(self, spec: RunSpec) -> Slot:
        return ProcessSlot(spec, self)

    def setup(self, spec: RunSpec) -> bytes:
        """Give the first frame for a worker."""
        key = (spec.stopper, dict(spec.kwargs))
        if self._setup is None or self._setup[0] != key:
            self._setup = key, self._make_setup(spec)
        return self._setup[1]

    def check(self, spec: RunSpec) -> None:
        """Refuse a run-function that cannot be sent.

        Raises:
            ValueError: naming the object inside it that is to blame.
        """
        try:
            self.setup(spec)
        except PicklingFailed as exc:
            raise BadValueError(
                f"the run-function {describe(self._function)} cannot be sent to a worker process: {exc}"
            ) from exc

    def _make_setup(self, spec: RunSpec) -> bytes:
        name = "the run-function"
        function = dumps((self._function, spec.kwargs, spec.stopper), name)
        retry_on = dumps(spec.retry_on, "retry_on") if spec.retry_on else None
        setup = Setup(
            path=list(sys.path),
            argv=list(sys.argv),
            function=function,
            initializer=self._initializer,
            origin=spec.origin,
            is_async=self._is_async,
            retry_on=retry_on,
        )
        return pickle.dumps(("setup", setup), 5)


class ProcessPoolEvaluator(Evaluator):
    """Runs run-functions in ``num_workers`` processes of this machine; a job that must stop is killed, alone.

    For run-functions that compute. Functions defined in ``__main__``, lambdas and closures work, without any
    ``if __name__ == "__main__"``; an ``async`` run-function runs on an event loop of the worker. A worker that dies
    takes its own job only, and is replaced. No worker outlives the program, however that ends.

    See :class:`~paraval.Evaluator` for the other arguments.

    Args:
        max_jobs_per_worker: a worker is replaced after so many jobs; None: never.
        initializer: called without arguments in each new worker, before its first job.

    Raises:
        ValueError: the run-function cannot be sent to another process; the message names the object inside it.
    """

    cancellation: ClassVar[Cancellation] = "kill"
    parallel: ClassVar[str] = "processes"

    def __init__(
        self,
        run_function: Callable[..., Any],
        *args: Any,
        max_jobs_per_worker: int | None = None,
        initializer: Callable[[], object] | None = None,
        **kwargs: Any,
    ) -> None:
        if max_jobs_per_worker is not None:
            checks.positive_int("max_jobs_per_worker", max_jobs_per_worker)
        self._max_jobs_per_worker = max_jobs_per_worker
        self._initializer = initializer
        super().__init__(run_function, *args, **kwargs)

    def _make_backend(self) -> Backend:
        backend = ProcessBackend(
            self.run_function, max_jobs_per_worker=self._max_jobs_per_worker, initializer=self._initializer
        )
        backend.check(self._spec)
        return backend
