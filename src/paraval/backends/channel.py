"""The socket to a worker process: frames in both directions, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import selectors
import socket
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Final

import anyio

from paraval.backends.packing import LARGE
from paraval.loops import Event, Loop

__all__ = ["Channel", "Frame"]

Frame = tuple[Any, ...]

_READ: Final = 1 << 16
_SMALL: Final = 1 << 13
_READ_MORE: Final = 1 << 20
"""Of a large frame. Not always, as the system maps and unmaps so much memory for each read."""


class Channel:
    """Frames to and from a worker: a length (8 bytes) and a pickled tuple.

    On asyncio, what comes is read by a callback of the loop that is registered once: to wait anew for each frame, as
    ``anyio.wait_readable`` does, costs as much as all the rest of a job's way through here. Trio has no such callbacks.
    """

    _unsent_setup: bytes | None
    _socket: socket.socket
    _received: bytearray
    _selector: selectors.DefaultSelector | None
    """Waits for socket and output, and can be waited for itself; None where the output is not captured."""
    _frames: Sequence[Frame] = ()
    _failure: Exception | None = None
    _loop: Loop | None = None
    _arrival: Event | None = None
    _watching: asyncio.AbstractEventLoop | None = None
    largest = 0
    """Bytes of the largest frame that has come."""
    is_resting = False
    _calls: Callable[[], object] | None = None

    def post(self, frame: bytes, calls: Callable[[], object]) -> bytes | None:
        """Send a small frame at once, for who does not :meth:`receive` but is called.

        Args:
            frame: as for :meth:`send`.
            calls: called, on the loop, when there is something to be :meth:`heard`, or the failure, until
                :meth:`stop_calling`.

        Returns:
            What is left to be sent with :meth:`send_rest`, in nearly all cases nothing; None where nothing was done.
        """
        if self._unsent_setup is not None or len(frame) >= _SMALL:
            return None
        if not self._begin_to_watch().is_asyncio or self.wants_to_be_heard:
            return None
        data = len(frame).to_bytes(8, "little") + frame
        try:
            sent = self._socket.send(data)
        except OSError:  # it is full, or the worker is gone
            return None
        self._calls = calls
        return data[sent:]

    async def send_rest(self, data: bytes) -> None:
        """Send what :meth:`post` has left; as :meth:`send`."""
        await self._write(memoryview(data))

    def send_if_possible(self, data: bytes) -> None:
        """Send a frame and its length, unless there is no room or nobody."""
        with contextlib.suppress(OSError):
            self._socket.send(data)

    def stop_calling(self) -> None:
        """Have what comes wait for :meth:`receive` again."""
        self._calls = None

    def heard(self) -> Sequence[Frame]:
        """Give the frames that have come."""
        frames, self._frames = self._frames, ()
        return frames

    async def send(self, frame: bytes) -> None:
        """Send a frame.

        Raises:
            OSError: the worker is gone.
        """
        if self._unsent_setup is not None:
            setup, self._unsent_setup = self._unsent_setup, None
            await self.send(setup)
        if len(frame) < _READ:
            data = len(frame).to_bytes(8, "little") + frame
        else:  # too large to be copied
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
                await self._until_writable()

    async def _until_writable(self) -> None:
        """Wait until more can be sent. What comes meanwhile is taken: the worker may wait for that before it reads."""
        if self._begin_to_watch().is_asyncio:
            await anyio.wait_writable(self._socket)
            return
        async with anyio.create_task_group() as group:
            group.start_soon(self._read_on)
            await anyio.wait_writable(self._socket)
            group.cancel_scope.cancel()

    async def _read_on(self) -> None:
        while self._failure is None:
            await anyio.wait_readable(self._source)
            self._read()

    async def receive(self) -> Sequence[Frame]:
        """Wait for frames; give those that are there. A large one is not unpickled: ``("large", memoryview)``.

        Raises:
            OSError: the worker is gone.
        """
        loop = self._begin_to_watch()
        while not self._frames:
            if self._failure is not None:
                raise self._failure
            if loop.is_asyncio:
                self._arrival = loop.event()
                await self._arrival.wait()
            else:
                await anyio.wait_readable(self._source)
                self._read()
        return self.heard()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Leave what comes where it is, but for what :meth:`look` takes: so it costs no turn of the loop for each."""
        self._begin_to_watch()
        watching = self._watching
        if watching is not None:
            watching.remove_reader(self._source)
        self.is_resting = True
        try:
            yield
        finally:
            self.is_resting = False
            if watching is not None and self._watching is watching:
                watching.add_reader(self._source, self._read)

    async def rest(self, seconds: float) -> None:
        """Wait, while :meth:`resting`."""
        await self._begin_to_watch().sleep(seconds)

    def look(self, kinds: Container[str]) -> Sequence[Frame]:
        """Give what has come, up to the first frame that is not of these kinds. Not while :meth:`receive` waits."""
        if self._failure is None:
            self._read()
        count = next((at for at, frame in enumerate(self._frames) if frame[0] not in kinds), len(self._frames))
        frames, self._frames = self._frames[:count], self._frames[count:]
        return frames

    def _begin_to_watch(self) -> Loop:
        loop = self._loop
        if loop is None:
            self._loop = loop = Loop.running()
            if loop.is_asyncio:
                self._watching = asyncio.get_running_loop()
                self._watching.add_reader(self._source, self._read)
        return loop

    @property
    def wants_to_be_heard(self) -> bool:
        """Whether there is something for :meth:`receive`."""
        return bool(self._frames) or self._failure is not None

    @property
    def has_only_ends(self) -> bool:
        """Whether all that has come are the ends of jobs."""
        return self._failure is None and [frame[0] for frame in self._frames].count("done") == len(self._frames)

    @property
    def is_broken(self) -> bool:
        """Whether nothing more can come."""
        return self._failure is not None

    @property
    def _source(self) -> int:
        return (self._socket if self._selector is None else self._selector).fileno()

    def _read(self) -> None:
        """Take what has come, or the end."""
        try:
            if self._selector is not None:
                self._drain()
            data = self._socket.recv(_READ_MORE if self._received else _READ)
            if not data:
                raise ConnectionResetError("the worker closed its socket")  # noqa: TRY301 - as any other failure
            self.largest = max(self.largest, int.from_bytes((self._received or data)[:8], "little"))
            if not self._received and len(data) == 8 + int.from_bytes(data[:8], "little"):  # as a rule
                self._frames = (*self._frames, pickle.loads(data[8:]))  # noqa: S301 - from our own worker
            else:
                self._received += data
                self._frames = (*self._frames, *self._complete_frames())
        except BlockingIOError:  # only output has come
            return
        except Exception as exc:  # noqa: BLE001 - it is raised to whoever waits
            self._failure = exc
            self._stop_watching()  # or the loop would call for ever
        if self._frames or self._failure is not None:
            if self._calls is not None:
                self._calls()
            elif self._arrival is not None:
                self._arrival.set()

    def _complete_frames(self) -> Iterator[Frame]:
        received = self._received
        begin = 0
        while len(received) >= begin + 8:
            end = begin + 8 + int.from_bytes(received[begin : begin + 8], "little")
            if len(received) < end:
                break
            if end - begin < LARGE:
                with memoryview(received) as view:
                    yield pickle.loads(view[begin + 8 : end])  # noqa: S301 - likewise
                begin = end
            else:  # it takes the buffer along
                self._received = received[end:]
                yield ("large", memoryview(received)[begin + 8 : end])
                received, begin = self._received, 0
        if begin:
            del received[:begin]

    def _drain(self) -> None:
        """Take what has come from the other sources of the selector."""

    def _stop_watching(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                watching.remove_reader(self._source)

    def _close(self) -> None:
        self._stop_watching()  # as long as the number is still that of the socket
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        self._socket.close()
