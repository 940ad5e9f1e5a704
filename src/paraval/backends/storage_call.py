"""A call of a job in a worker process to the storage, which is in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Coroutine
from typing import Any

from paraval.backends.packing import LARGE, load
from paraval.loops import Event, Loop, call_in_thread
from paraval.storage import Storage
from paraval.worker.pickling import dumps

__all__ = ["StorageCall"]


class StorageCall:
    """A call of a job to the storage.

    A memory store answers at once. Another may wait for a disk or a network, and what is large takes its time: then it
    is called in a thread, and by a task of its own, so that the job can be killed meanwhile.

    Args:
        storage: the driver's.
        start_soon: starts a task that outlasts a cancellation of :meth:`reply`.
        method: the name of the storage's method.
        sealed: its arguments, pickled.
    """

    def __init__(
        self,
        storage: Storage,
        start_soon: Callable[[Callable[[], Coroutine[Any, Any, object]]], object],
        method: str,
        sealed: bytes,
    ) -> None:
        self._storage = storage
        self._start_soon = start_soon
        self._method = method
        self._sealed = sealed
        self._ended: Event | None = None
        self._reply = b""

    async def reply(self) -> bytes:
        """Give the frame with the result, or with what the storage raised. After a cancellation it can be had again."""
        if self._storage.by_reference and len(self._sealed) < LARGE:
            return self._answer()
        if self._ended is None:
            self._ended = Loop.running().event()
            self._start_soon(self._run)
        await self.end()
        return self._reply

    async def end(self) -> None:
        """Wait until the storage has answered, if it was called."""
        if self._ended is not None:
            await self._ended.wait()

    async def _run(self) -> None:
        try:
            self._reply = await call_in_thread(self._answer, abandon_on_cancel=True)
        finally:
            if self._ended is not None:
                self._ended.set()

    def _answer(self) -> bytes:
        try:
            args = load(self._sealed)
            value = getattr(self._storage, self._method)(*args)
            if self._method == "insert":
                value = [record.id for record in args[1]]
            reply: tuple[Any, ...] = ("reply", None, dumps(value, f"the result of {self._method}"))
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - it is raised again in the job
            reply = ("reply", _sendable(exc), None)
        return pickle.dumps(reply, 5)


def _sendable(exc: BaseException) -> bytes:
    """Pickle an exception; one that would not arrive as it is goes as its type and text."""
    try:
        data = pickle.dumps(exc, 5)
        pickle.loads(data)  # noqa: S301 - it was made in the line above
    except Exception:  # noqa: BLE001 - its __init__ takes other arguments, say
        data = pickle.dumps(RuntimeError(f"{type(exc).__name__}: {exc}"), 5)
    return data
