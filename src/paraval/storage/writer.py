"""The way from an engine to a storage that may be slow: one thread, which writes all that waits with one call.

Storages are synchronous. One that waits for a disk or a network must not be waited for on an event loop; and where a
commit costs a hundred times what a change costs, changes that come while one is on its way should share the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from msgspec import UNSET

from paraval.errors import ParavalError
from paraval.storage.base import Storage
from paraval.storage.records import JobChange

__all__ = ["Writer", "patiently"]

T = TypeVar("T")

_logger = logging.getLogger("paraval")

_PAUSES_S: Final = (0.02, 0.1, 0.3, 0.6)
"""Between one try and the next. Stores that know better (a lock, a lost connection) have their own patience before."""
_LATER_S: Final = 0.05
"""How long a change that is in no hurry waits for one that is."""
_IDLE_S: Final = 2.0
"""After so long without work the thread ends; the next change starts another."""
_MOST: Final = 4096
"""Changes in one call."""

Written = Callable[[Exception | None], object]


def patiently(call: Callable[[], T]) -> T:
    """Call a storage; try a few times more, for about a second, what may be better the next time.

    Raises:
        Exception: what the last try raised; at once what no other try would change (an unknown id, say).
    """
    for pause in _PAUSES_S:
        try:
            return call()
        except Exception as exc:  # a store may raise anything
            if isinstance(exc, ParavalError) and not isinstance(exc, OSError):
                raise
            _logger.warning("the storage failed (%s: %s); another try follows", type(exc).__name__, exc)
        time.sleep(pause)
    return call()


class Writer:
    """Writes changes in the order in which they were put. Usable from any thread.

    Args:
        storage: where to.
        lease_s: for how many seconds the owner of jobs is taken to be alive when it says so.
        beat_s: how often it says so.
    """

    def __init__(self, storage: Storage, *, lease_s: float = 20.0, beat_s: float = 5.0) -> None:
        self._storage = storage
        self._todo: list[tuple[Sequence[JobChange], Written]] = []
        self._later: dict[str, JobChange] = {}
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lease_s = lease_s
        self._beat_s = beat_s
        self._owner: str | None = None
        self._renewed = 0.0

    def put(self, changes: Sequence[JobChange], written: Written) -> None:
        """Have changes written soon.

        Args:
            changes: all or none of them are written.
            written: called in the thread, with None or with why they could not be written.
        """
        with self._condition:
            for change in changes if self._later else ():
                if change.status is not UNSET:
                    self._later.pop(change.id, None)  # what is put now says more
            self._todo.append((changes, written))
            self._wake()

    def put_later(self, *changes: JobChange) -> None:
        """Have changes written with others, or after a moment; one is dropped when a newer one of its job comes."""
        with self._condition:
            was_empty = not self._later
            self._later.update({change.id: change for change in changes})
            if was_empty and changes:
                self._wake()

    def put_intermediate(self, job_id: str, budget: float, objective: float) -> None:
        """Have an intermediate result of a job written soon."""
        self.put([JobChange(job_id, intermediate=(budget, objective))], _nothing)

    def hold(self, owner: str) -> None:
        """Say, from now on until :meth:`close`, that the owner of jobs is alive."""
        if self._owner is None:
            patiently(lambda: self._storage.renew(owner, self._lease_s))
            with self._condition:
                self._owner = owner
                self._renewed = time.monotonic()
                self._wake()

    def close(self, timeout: float) -> bool:
        """Write all, and say that the owner has gone; False when that takes longer than ``timeout`` seconds."""
        with self._condition:
            thread = self._thread
            if thread is None or thread is threading.current_thread():
                return True
            self._closing = True
            self._condition.notify()
        thread.join(timeout)
        return not thread.is_alive()

    def _wake(self) -> None:
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._work, name="paraval-storage", daemon=True)
            self._thread.start()
        else:
            self._condition.notify()

    def _work(self) -> None:
        while True:
            with self._condition:
                if not self._todo and not self._later and not self._closing:
                    self._condition.wait(_IDLE_S if self._owner is None else self._beat_s)
                if self._later and not self._todo and not self._closing:
                    self._condition.wait(_LATER_S)
                todo, later = self._take()
                owner = self._owner
                if not todo and not later and (owner is None or self._closing):
                    self._owner = None
                    self._thread = None  # under the lock: whoever puts something now starts another thread
                    break
            self._write([([change], _nothing) for change in later] + todo)
            if owner is not None and time.monotonic() - self._renewed >= self._beat_s:
                self._renew(owner, self._lease_s)
        if owner is not None:
            self._renew(owner, 0)

    def _renew(self, owner: str, seconds: float) -> None:
        try:
            self._storage.renew(owner, seconds)
            self._renewed = time.monotonic()
        except Exception as exc:  # noqa: BLE001 - a store may raise anything; the next beat comes
            _logger.warning("the storage did not take that the driver is alive: %s: %s", type(exc).__name__, exc)

    def _take(self) -> tuple[list[tuple[Sequence[JobChange], Written]], list[JobChange]]:
        count = size = 0
        for changes, _ in self._todo:
            size += len(changes)
            if count and size > _MOST:
                break
            count += 1
        todo, self._todo = self._todo[:count], self._todo[count:]
        later, self._later = list(self._later.values()), {}
        return todo, later

    def _write(self, items: list[tuple[Sequence[JobChange], Written]]) -> None:
        failure: Exception | None = None
        together = [change for changes, _ in items for change in changes]
        try:
            if together:
                patiently(lambda: self._storage.update(together))
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            if len(items) > 1 and isinstance(exc, ParavalError) and not isinstance(exc, OSError):
                for item in items:  # one of them is to blame, and the others shall be written
                    self._write([item])
                return
            failure = exc
        for _, written in items:
            try:
                written(failure)
            except Exception:
                _logger.exception("what follows the writing of a record failed")


def _nothing(_failure: Exception | None) -> None:
    """Of what is written later, nobody waits."""
