"""The way from an engine to a storage that may be slow: one thread, which writes all that waits with one call.

Storages are synchronous. One that waits for a disk or a network must not be waited for on an event loop; and where a
commit costs a hundred times what a change costs, changes that come while one is on its way should share the next.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar

from msgspec import UNSET

from paraval.errors import ParavalError
from paraval.storage.base import Storage
from paraval.storage.records import JobChange, JobRecord

__all__ = ["RobbedError", "Writer", "patiently"]

T = TypeVar("T")

_logger = logging.getLogger("paraval")

_PAUSES_S: Final = (0.02, 0.1, 0.3, 0.6)
"""Between one try and the next. Stores that know better (a lock, a lost connection) have their own patience before."""
_LATER_S: Final = 0.05
"""How long a change that is in no hurry waits for one that is."""
_IDLE_S: Final = 2.0
"""After so long without work the thread ends; the next change starts another."""
_MOST: Final = 16384
"""Changes in one call."""
_SOON_S: Final = 0.01
"""How long new jobs whose end may come in a moment are left undurable."""
_QUICK_S: Final = 0.005
"""A job that has ended after no longer has ended in a moment."""

Written = Callable[[Exception | None], object]


_lease_clock: Final[Callable[[], float]] = (
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)
"""Goes on while the machine sleeps, as the clocks of other machines do."""


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


class RobbedError(ParavalError):
    """Changes were left out, as the jobs belong to another driver by now.

    Attributes:
        records: of these jobs, by their ids.
    """

    def __init__(self, records: dict[str, JobRecord]) -> None:
        super().__init__(f"taken over by another driver: {', '.join(records)}")
        self.records = records


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
        self._makers: list[Callable[[], Sequence[JobChange]]] = []
        # Entered by itself, and not through the condition: that is a function in Python, and where Ctrl-C comes at its
        # end, nobody ever lets go of the lock.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lease_s = lease_s
        self._beat_s = beat_s
        self._owner: str | None = None
        self._renewed = 0.0
        self._holds_until = math.inf
        self._may_be_robbed = False
        """Whether the lease has ever run out while there were jobs: others may have taken them since."""
        self._pace = _Pace()
        # When something is due, infinity if never; and when the thread looks next, whether or not it is notified.
        self._later_by = math.inf
        self._flush_by = math.inf
        self._looks_at = math.inf

    def insert(self, search_id: str, records: Sequence[JobRecord], *, soon: bool = False) -> None:
        """Have new jobs numbered and added, in the thread of the caller.

        Args:
            search_id: of the jobs.
            records: one for each job.
            soon: no other process will look for them at once. Then they may be durable only when they end, if jobs
                have lately ended in a moment; else soon after.

        Raises:
            Exception: whatever the storage raised at the last try.
        """
        if not (soon and self._pace.is_quick):
            patiently(lambda: self._storage.insert(search_id, records))
        else:
            try:
                patiently(lambda: self._storage.insert_soon(search_id, records))
            finally:  # after an interrupt, too: they may be there
                with self._lock:
                    if self._flush_by == math.inf:
                        self._flush_by = time.monotonic() + _SOON_S
                    self._wake_by(self._flush_by)
        if soon:
            self._pace.begin(records[0].id)

    def put(self, changes: Sequence[JobChange], written: Written) -> None:
        """Have changes written soon.

        Args:
            changes: all or none of them are written.
            written: called in the thread, with None or with why they could not be written; with RobbedError if only
                some were left out.
        """
        if self._pace.awaits:
            self._pace.look(changes)
        with self._lock:
            for change in changes if self._later else ():
                if change.status is not UNSET:
                    self._later.pop(change.id, None)  # what is put now says more
            self._todo.append((changes, written))
            self._wake()

    def put_later(self, *changes: JobChange) -> None:
        """Have changes written with others, or after a moment; one is dropped when a newer one of its job comes."""
        with self._lock:
            self._later.update({change.id: change for change in changes})
            if changes and self._later_by == math.inf:
                self._later_by = time.monotonic() + _LATER_S
                self._wake_by(self._later_by)

    def put_later_made(self, make: Callable[[], Sequence[JobChange]]) -> None:
        """Have changes written likewise that are made when their time has come, in the thread."""
        with self._lock:
            self._makers.append(make)
            if self._later_by == math.inf:
                self._later_by = time.monotonic() + _LATER_S
                self._wake_by(self._later_by)

    def put_intermediate(self, job_id: str, budget: float, objective: float) -> None:
        """Have an intermediate result of a job written soon."""
        self.put([JobChange(job_id, intermediate=(budget, objective))], _nothing)

    @property
    def is_here(self) -> bool:
        """Whether this is the thread that writes, and tells of what it has written."""
        return self._thread is threading.current_thread()

    def hold(self, owner: str) -> None:
        """Say, from now on until :meth:`close`, that the owner of jobs is alive."""
        if self._owner is None:
            begin = _lease_clock()
            patiently(lambda: self._storage.renew(owner, self._lease_s))
            with self._lock:
                self._owner = owner
                self._holds_until = begin + self._lease_s
                self._renewed = time.monotonic()
                self._wake()

    def close(self, timeout: float) -> bool:
        """Write all, and say that the owner has gone; False when that takes longer than ``timeout`` seconds."""
        with self._lock:
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
            self._looks_at = -math.inf
            self._thread = threading.Thread(target=self._work, name="paraval-storage", daemon=True)
            try:
                self._thread.start()
            except BaseException:  # Ctrl-C: nobody knows whether it has started, and so it is not the one
                self._thread = None
                raise
        else:
            self._condition.notify()

    def _wake_by(self, moment: float) -> None:
        """Have the thread look at the latest then: it is not woken, which takes a switch of threads, if it will."""
        if self._thread is None or self._looks_at > moment:
            self._wake()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self.is_here:
                    return
                self._rest()
                todo, later, makers = self._take()
                is_late, self._flush_by = self._flush_by < math.inf, math.inf  # what is written now includes it
                owner = self._owner
                if not todo and not later and not makers and not is_late and (owner is None or self._closing):
                    self._owner = None
                    self._thread = None  # under the lock: whoever puts something now starts another thread
                    break
            if todo or later or makers:
                made = [(make(), _nothing) for make in makers]
                self._write([([change], _nothing) for change in later] + made + todo)
                if is_late:
                    self._flush_within(_SOON_S)
            elif is_late:
                self._flush()
            if owner is not None and time.monotonic() - self._renewed >= self._beat_s:
                self._renew(owner, self._lease_s)
        if owner is not None:
            self._renew(owner, 0)

    def _rest(self) -> None:
        """Wait, with the lock, until something is to be written."""
        # After work, more will come soon, and most of it can wait for a moment: who brings it need not wake the thread.
        pause = _SOON_S
        end = time.monotonic() + _IDLE_S
        while not self._todo and not self._closing:
            now = time.monotonic()
            due = min(self._later_by, self._flush_by, end if self._owner is None else self._renewed + self._beat_s)
            if due <= now:
                break
            self._looks_at = min(due, now + pause)
            self._condition.wait(self._looks_at - now)
            pause = math.inf
        self._looks_at = -math.inf  # it looks before it rests again

    def _renew(self, owner: str, seconds: float) -> None:
        begin = _lease_clock()
        self._notice_lapse()
        try:
            self._storage.renew(owner, seconds)
            self._holds_until = begin + seconds if seconds else math.inf
        except Exception as exc:  # noqa: BLE001 - a store may raise anything; the next beat comes
            _logger.warning("the storage did not take that the driver is alive: %s: %s", type(exc).__name__, exc)
        self._renewed = time.monotonic()

    def _notice_lapse(self) -> None:
        if _lease_clock() > self._holds_until:
            self._may_be_robbed = True

    def _robbed_of(self, changes: Sequence[JobChange]) -> dict[str, JobRecord]:
        """Give the records of the jobs that have ended here and belong to others."""
        ours = {change.id: change.by for change in changes if change.status is not UNSET and change.by is not None}
        return {record.id: record for record in self._storage.get(ours) if record.owner != ours[record.id]}

    def _flush(self) -> None:
        if self._pace.awaits is not None:
            self._pace.is_quick = False
        try:
            patiently(self._storage.flush)
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            _logger.error("jobs that were submitted are not saved yet: %s: %s", type(exc).__name__, exc)  # noqa: TRY400
            if not self._closing:
                self._flush_within(self._beat_s)

    def _flush_within(self, seconds: float) -> None:
        with self._lock:
            self._flush_by = min(self._flush_by, time.monotonic() + seconds)

    def _take(
        self,
    ) -> tuple[list[tuple[Sequence[JobChange], Written]], list[JobChange], list[Callable[[], Sequence[JobChange]]]]:
        count = size = 0
        for changes, _ in self._todo:
            size += len(changes)
            if count and size > _MOST:
                break
            count += 1
        todo, self._todo = self._todo[:count], self._todo[count:]
        later, self._later = list(self._later.values()), {}
        makers, self._makers = self._makers, []
        self._later_by = math.inf
        return todo, later, makers

    def _write(self, items: list[tuple[Sequence[JobChange], Written]]) -> None:
        failure: Exception | None = None
        robbed: dict[str, JobRecord] = {}
        together = [change for changes, _ in items for change in changes]
        try:
            if together:
                patiently(lambda: self._storage.update(together))
                self._notice_lapse()
                if self._may_be_robbed:
                    robbed = patiently(lambda: self._robbed_of(together))
        except Exception as exc:  # noqa: BLE001 - a store may raise anything
            if len(items) > 1 and isinstance(exc, ParavalError) and not isinstance(exc, OSError):
                for item in items:  # one of them is to blame, and the others shall be written
                    self._write([item])
                return
            failure = exc
            self._flush_within(0)  # what was to be durable with it
        for changes, written in items:
            missing = {change.id: robbed[change.id] for change in changes if change.id in robbed} if robbed else None
            try:
                written(RobbedError(missing) if missing else failure)
            except Exception:
                _logger.exception("what follows the writing of a record failed")


def _nothing(_failure: Exception | None) -> None:
    """Of what is written later, nobody waits."""


class _Pace:
    """Whether jobs have lately ended in a moment. Used without a lock: a wrong answer costs a little time, once.

    Attributes:
        is_quick: whether they have.
        awaits: the id of the job whose end is waited for to tell, or None.
    """

    __slots__ = ("_since", "awaits", "is_quick")

    def __init__(self) -> None:
        self.is_quick = False
        self.awaits: str | None = None
        self._since = 0.0

    def begin(self, job_id: str) -> None:
        """Note that a job is new."""
        now = time.monotonic()
        if self.awaits is not None:
            if now - self._since < _QUICK_S:
                return  # the one before may still tell
            self.is_quick = False
        self.awaits, self._since = job_id, now

    def look(self, changes: Sequence[JobChange]) -> None:
        """Look whether the end of that job is among these changes."""
        for change in changes:
            if change.id == self.awaits and change.status is not UNSET:
                self.is_quick = time.monotonic() - self._since < _QUICK_S
                self.awaits = None
                return
