"""One worker process, as its parent sees it: the socket, the signals, the output, the end."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, ClassVar, Final

import anyio

from paraval.backends.channel import Channel
from paraval.backends.tray import Tray
from paraval.descriptors import pipe, socketpair
from paraval.memory import MemoryMeter, WatchedProcess, descendants
from paraval.outcome import JobError
from paraval.worker.board import Board, Look
from paraval.worker.frames import STOP

__all__ = ["WorkerProcess"]

_REAP_S: Final = 0.3
_LOOK: Final = os.WEXITED | os.WNOHANG | os.WNOWAIT if hasattr(os, "waitid") else None
# The working directory, which -c puts first, must not hide the standard library from a worker; ours comes last.
_BOOTSTRAP: Final = (
    "import sys; sys.path[:] = [*filter(None, sys.path), {!r}]; from paraval.worker.main import main; main(*{!r})"
)


class WorkerProcess(Channel):
    """A running worker and the socket to it.

    Attributes:
        memory: what watches its memory, while it runs jobs that are limited in it.
        base: the bytes that it held before its first job, where memory is limited.
        is_ready: whether it has said that it is set up.
        held: the bytes that it held before the jobs that it runs.
        makes_calls: whether a job of it has called its storage, and others may.
        tray: where it finds its next jobs; or None.
        board: where it says which job it is at; or None.

    Args:
        setup: the first frame, sent with the first jobs.
        capture: how many bytes of its stdout and stderr to keep, from the end; None: they go where ours go.
        has_tray: whether it is to be sent jobs ahead.
        has_board: whether it is to say which job it is at, as none may run for ever.
    """

    memory: WatchedProcess | None = None
    base = 0
    is_ready = False
    held = 0
    makes_calls = False
    _posted = 0
    """Messages with jobs that it was sent, or that were laid down for it."""
    _strays: Mapping[int, int] = {}
    """Descendants that have left its process group: their starts, by their numbers."""

    def __init__(
        self, setup: bytes, capture: int | None = None, *, has_tray: bool = False, has_board: bool = False
    ) -> None:
        if not sys.executable:
            raise FileNotFoundError("sys.executable does not say which interpreter is to be started")
        home = str(Path(__file__).parents[2])
        stdout, stderr = (_output(number) if capture is None else subprocess.PIPE for number in (1, 2))
        with contextlib.ExitStack() as for_failure, contextlib.ExitStack() as theirs:
            ours, socket_of_worker = socketpair()
            for_failure.callback(ours.close)
            theirs.callback(socket_of_worker.close)
            ours.setblocking(False)
            self.tray = tray = Tray() if has_tray else None
            if tray is not None:
                for_failure.callback(tray.close)
            self.board = board = Board() if has_board else None
            if board is not None:
                for_failure.callback(board.close)
            self._lifeline = lifeline = _Lifeline()
            for_failure.callback(lifeline.close)
            theirs.callback(lifeline.close_watched)
            # A selector is itself a descriptor that can be waited for: one wait for socket and output.
            self._selector = None if capture is None else selectors.DefaultSelector()
            if self._selector is not None:
                for_failure.callback(self._selector.close)
            theirs_to_keep = [
                socket_of_worker.fileno(),
                -1 if tray is None else tray.fileno(),
                -1 if board is None else board.fileno(),
                lifeline.watched,
            ]
            # Last, as it is what cannot be undone.
            self._popen = _Popen(
                [
                    sys.executable,
                    *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined] # as multiprocessing does
                    "-c",
                    _BOOTSTRAP.format(home, theirs_to_keep),
                ],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[fd for fd in theirs_to_keep if fd >= 0],
                process_group=0,
            )
            for_failure.pop_all()
        self._socket = ours
        self._received = bytearray()
        self._tails = [
            _Tail(stream, capture) for stream in (self._popen.stdout, self._popen.stderr) if capture and stream
        ]
        if self._selector is not None:
            for source in (ours.fileno(), *(tail.fileno() for tail in self._tails)):
                self._selector.register(source, selectors.EVENT_READ)
        self.setup = setup
        self._unsent_setup: bytes | None = setup
        self.jobs_done = 0

    @property
    def pid(self) -> int:
        """Of the worker; also its process group."""
        return self._popen.pid

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended (it may not be reaped: its number still stands for its group)."""
        return self._popen.has_ended

    @property
    def _was_taken(self) -> bool:
        return self._popen.was_taken

    def notice_the_end(self) -> None:
        """Have whoever waits in :meth:`wait` notice that the process has ended.

        The end of its socket tells as a rule; but a process that it forked may hold that open.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def next_number(self) -> int:
        """Of the next message with jobs."""
        return self._posted + 1

    async def send_jobs(self, frame: bytes) -> None:
        """Send jobs to a worker that has none; as :meth:`send`."""
        self._posted += 1
        await self.send(frame)

    def post_jobs(self, frame: bytes, calls: Callable[[], object]) -> bytes | None:
        """Do the same at once; as :meth:`post`."""
        rest = self.post(frame, calls)
        if rest is not None:
            self._posted += 1
        return rest

    def put_ahead(self, frame: bytes) -> bool:
        """Lay down jobs for when it is through with those that it has; False if there is no room."""
        if self.tray is None or not self.tray.put(self.next_number, frame):
            return False
        self._posted += 1
        return True

    def take_back(self) -> set[int]:
        """Take back what was laid down and it has not taken; give the numbers of these messages."""
        return set() if self.tray is None else self.tray.take_back()

    def lose_tray(self) -> None:
        """Go on without a tray."""
        if self.tray is not None:
            self.tray.close()
            self.tray = None

    def pin_down(self, message: int, latest: float) -> Look | None:
        """As :meth:`~paraval.worker.board.Board.pin_down`."""
        return None if self.board is None else self.board.pin_down(message, latest)

    def look_at_memory(self) -> int:
        """Give the bytes that an idle worker holds. Its next jobs are not to blame for what others have left there."""
        self.held = MemoryMeter(self.pid).sample()
        return self.held

    def watch_memory(self, limit: float) -> None:
        """Have it killed when it holds more."""
        self.memory = WatchedProcess(self.pid, limit, self.strike, inherited=max(0, self.held - self.base))

    def output(self) -> tuple[str, str] | None:
        """Give and forget the tails of stdout and stderr so far; None when they are not captured."""
        if not self._tails:
            return None
        self._drain()
        stdout, stderr = (tail.take() for tail in self._tails)
        return stdout, stderr

    def _close(self) -> None:
        super()._close()
        self.lose_tray()
        if self.board is not None:
            self.board.close()
            self.board = None

    def _drain(self) -> None:
        for tail in self._tails:
            if not tail.drain() and self._selector is not None:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(tail.fileno())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker and all in its process group, which is all it started as a rule."""
        if self.is_gone:
            return
        pid = self._popen.pid
        _signal_group(pid, number)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(pid) != pid:  # a job has moved it to another group
                os.kill(pid, number)

    def ask_to_stop(self) -> None:
        """Send SIGTERM; and a frame, as a job may make something else of that."""
        self._look_for_strays()  # what is asked may end, and leave its children without a line to the worker
        self.send_if_possible(STOP)
        self.signal(signal.SIGTERM)

    def strike(self) -> None:
        """Send SIGKILL to the worker and all it started, those included that have left its process group.

        Where there is no ``/proc``, these are spared; and so are those that have no living parent below the worker.
        """
        self._look_for_strays()
        self.signal(signal.SIGKILL)
        strays, self._strays = self._strays, {}
        for pid, started in strays.items():
            now = _group_and_start(pid)
            if now is not None and now[1] == started:  # else another process has its number by now
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _look_for_strays(self) -> None:
        """Note the descendants that have left the group: before a signal, as nothing leads to orphans."""
        with contextlib.suppress(ProcessLookupError):  # it was never started
            if not self.is_gone:
                group = self.pid
                for pid in descendants(group):
                    seen = _group_and_start(pid)
                    if seen is not None and seen[0] != group:
                        self._strays = {**self._strays, pid: seen[1]}

    async def kill(self) -> None:
        """End it by force, with all it started."""
        self.strike()
        self._close()
        if not await self._reap():  # the system is slow; but a dead child must not stay one for as long as this program
            threading.Thread(target=self._popen.wait, name="paraval-reaper", daemon=True).start()
        self._finish()

    async def retire(self) -> None:
        """Let an idle worker end by itself: it does at the end of its input."""
        self._close()
        if not await self._reap():
            await self.kill()
        self._finish()

    def _finish(self) -> None:
        """The process is gone: take what is left of its output. What its children still write has no reader."""
        self._lifeline.close()
        for tail in self._tails:
            tail.drain()
            tail.close()

    async def post_mortem(self) -> JobError:
        """Say how a worker died; end what it started."""
        self._close()
        if not await self._reap():
            await self.kill()
        self._finish()
        code = None if self._was_taken else self._popen.returncode
        number = -code if code is not None and code < 0 else None
        if number is not None:
            try:
                how = f"was killed by {signal.Signals(number).name}"
            except ValueError:
                how = f"was killed by signal {number}"
        elif self._was_taken:
            how = "ended (its exit code was taken by another part of the program)"
        else:
            how = f"ended with exit code {code}"
        return JobError(
            "worker_died",
            f"the worker process {how} while it {'ran the job' if self.is_ready else 'was being set up'}",
            exit_code=code if number is None else None,
            signal=number,
            host=os.uname().nodename,
            pid=self._popen.pid,
        )

    async def _reap(self) -> bool:
        """Wait a moment for the process to be gone, and end what it left behind."""
        pause = 0.0005
        give_up = time.monotonic() + _REAP_S
        while not self.is_gone:
            if time.monotonic() > give_up:
                return False
            await anyio.sleep(pause)
            pause = min(pause * 2, 0.02)
        # Before it is reaped, as long as no other process can have its number. If others have reaped it: the system
        # gives the number of a group to no process as long as one of the group lives. So where no process has it, there
        # is either nobody to end or what the worker left behind; and where one has it, the group is not ours any more.
        if not self._was_taken or not _exists(self._popen.pid):
            _signal_group(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        return True


def _output(number: int) -> int | None:
    """Say where a worker's output goes that is not captured: where ours goes, or nowhere."""
    try:
        return None if os.get_inheritable(number) else subprocess.DEVNULL  # else its number is another file's by now
    except OSError:  # it is closed
        return subprocess.DEVNULL


class _Popen(subprocess.Popen[bytes]):
    """A child that others may wait for too: a handler of SIGCHLD that reaps all, or the system where it is ignored.

    Attributes:
        was_taken: others did, so its exit code is unknown (``returncode`` is 0), and its number may be another's.
    """

    was_taken = False

    @property
    def has_ended(self) -> bool:
        """Whether it has ended. Where the system allows it, it is not reaped by this."""
        if self.returncode is None:
            if _LOOK is None:
                self._reap(os.WNOHANG)
            else:
                try:
                    return os.waitid(os.P_PID, self.pid, _LOOK) is not None
                except ChildProcessError:
                    self._note_taken()
        return self.returncode is not None

    def wait(self, timeout: float | None = None) -> int:
        """Reap it, however long that takes."""
        del timeout
        if self.returncode is None:
            self._reap(0)
        return self.returncode

    def _reap(self, flags: int) -> None:
        # Not through the base, to which a child that others took has ended with 0.
        try:
            pid, status = os.waitpid(self.pid, flags)
        except ChildProcessError:
            self._note_taken()
            return
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def _note_taken(self) -> None:
        self.was_taken = True
        self.returncode = 0  # the base must not think that it runs


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _group_and_start(pid: int) -> tuple[int, int] | None:
    """Give a process's group, and when it was started, in the system's ticks; None of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[2]), int(fields[19])


class _Tail:
    """The last bytes of a stream."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._bytes = bytearray()
        os.set_blocking(stream.fileno(), False)

    def fileno(self) -> int:
        return self._stream.fileno()

    def drain(self) -> bool:
        """Read what is there; False at the end of the stream."""
        if self._stream.closed:
            return False
        while True:
            try:
                data = os.read(self._stream.fileno(), 1 << 16)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._bytes += data
            if len(self._bytes) > 2 * self._limit:
                del self._bytes[: -self._limit]

    def take(self) -> str:
        text = self._bytes[-self._limit :].decode("utf-8", "replace")
        self._bytes.clear()
        return text

    def close(self) -> None:
        self._stream.close()


class _Lifeline:
    """A pipe whose end is held here and never written to; its other end tells a worker when this process is gone.

    Each worker has one of its own: whom the kernel tells is a property of the open pipe, not of who watches it.
    """

    _held: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.watched, self._end = pipe()
        self._held.add(self._end)

    def close_watched(self) -> None:
        """Close the worker's end, which it has by now."""
        os.close(self.watched)

    def close(self) -> None:
        """Let go. A worker that still lives is killed by it."""
        if self._end in self._held:
            self._held.discard(self._end)
            os.close(self._end)

    @classmethod
    def close_all_in_a_fork(cls) -> None:
        # Or the workers would live for as long as a process that this one forked.
        for end in cls._held:
            with contextlib.suppress(OSError):
                os.close(end)
        cls._held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Lifeline.close_all_in_a_fork)
