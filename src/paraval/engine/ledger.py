"""The ledger: what was submitted, what is done and waits to be gathered, and everyone who waits for either.

It is the one place where threads and tasks of any loop meet the engine, and the one place where anything waits.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import anyio

from paraval.backends.base import Returned
from paraval.errors import ParavalError
from paraval.job import Job, JobStatus
from paraval.loops import Event, Loop

__all__ = ["Booking", "Gate", "Ledger", "Statistics", "until_set", "waker"]

_CANCELLED: Final = JobStatus.CANCELLED
_LIVENESS_S: Final = 0.5
"""How often a blocked thread looks whether anyone can still wake it."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """A moment of an evaluator; ``submitted`` is the sum of the five counts after it.

    Attributes:
        submitted: jobs submitted so far.
        pending: of them, not started.
        running: of them, started and not ended.
        done: of them, ended with a result.
        failed: of them, ended with a failure (they raised, their worker died, or they returned ``"F…"``).
        cancelled: of them, stopped: a timeout, a cancellation, the end of the evaluator.
        utilisation: busy worker-seconds over available worker-seconds (0 to 1), from the first submit to the last end
            of a job, or to now while there is work.
        callback_errors: how often a callback raised.
    """

    submitted: int
    pending: int
    running: int
    done: int
    failed: int
    cancelled: int
    utilisation: float
    callback_errors: int = 0


class Booking:
    """What the ledger has noted of jobs that are being submitted: whatever interrupts that, it can be undone.

    It says so at every moment at which Ctrl-C may come, which is where a function begins, a call of one in C ends, or a
    loop goes round: what is noted here, and what that stands for, follow each other without any of these.

    Attributes:
        room: for how many of them there is room, which is theirs.
        jobs: those that may be in the mailbox's list of private ones.
        expected: how many are expected.
        is_private: whether somebody of their own waits for them.
    """

    __slots__ = ("expected", "is_private", "jobs", "room")

    def __init__(self) -> None:
        self.room = 0
        self.jobs: Sequence[Job] = ()
        self.expected = 0
        self.is_private = False


class _Waiter:
    """It stays in the list until it has seen that it was woken: whoever wakes it may be interrupted before they do.

    Attributes:
        is_awake: whether it was woken.
    """

    __slots__ = ("_wake", "despite_failure", "error", "is_awake", "ready")

    def __init__(self, ready: Callable[[], bool], wake: Callable[[], object], despite_failure: bool) -> None:
        self.ready = ready
        self._wake = wake
        self.despite_failure = despite_failure
        self.error: ParavalError | None = None
        self.is_awake = False

    def wake(self) -> None:
        self._wake()
        self.is_awake = True


class Gate:
    """What one thread waits at until another opens it; it can be opened from any thread, several times."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def open(self) -> None:
        """Let the waiting thread through."""
        try:  # contextlib.suppress would cost more than all the rest
            self._lock.release()
        except RuntimeError:  # it is open
            return

    def wait(self, check: Callable[[], object] | None = None, timeout: float | None = None) -> bool:
        """Block until it is opened; False when ``timeout`` seconds passed first.

        ``check`` is called every half second meanwhile; it raises when nobody is left to open the gate.
        """
        left = math.inf if timeout is None else timeout
        while not self._lock.acquire(timeout=min(left, _LIVENESS_S)):
            left -= _LIVENESS_S
            if left <= 0:
                return False
            if check is not None:
                check()
        return True


class Ledger:
    """Counts and the mailbox, under one lock.

    Attributes:
        submitted: jobs submitted, private ones too.
        settled: jobs that ended, private ones too.
        in_flight: public jobs submitted and not yet in the mailbox.
        pending: jobs submitted and not started, roughly; only where back-pressure needs it (``counts_pending``).
        counts_pending: whether it does.
        failure: why no more outcomes will come, or None.
    """

    def __init__(self, *, counts_pending: bool = True) -> None:
        self.counts_pending = counts_pending
        # What the collector finalizes in the middle of something may submit; it is never in the middle of a count.
        self._lock = threading.RLock()
        self._mailbox: deque[Job] = deque()
        self._waiters: list[_Waiter] = []
        self._private: dict[str, Callable[[], object]] = {}
        self._delivered = 0
        self.submitted = 0
        self.settled = 0
        self.in_flight = 0
        self.pending = 0
        self.done = 0
        self.failed = 0
        self.cancelled = 0
        self.busy_s = 0.0
        self.first_submit: float | None = None
        self.last_end: float | None = None
        self.failure: ParavalError | None = None

    # -- the engine's side ---------------------------------------------------------------------------------------------

    def reserve(self, booking: Booking, wanted: int, most_pending: int | None) -> int:
        """Make room for jobs that are to be submitted; give how many may be, so that at most so many are pending."""
        with self._lock:
            room = wanted if most_pending is None else max(0, min(wanted, most_pending - self.pending))
            self.pending += room
            booking.room = room
        return room

    def expect(
        self, booking: Booking, jobs: Sequence[Job], now: float, private: Callable[[], object] | None = None
    ) -> None:
        """Note jobs that are being submitted, after :meth:`reserve`; private ones go to ``private()``."""
        count = len(jobs)
        with self._lock:
            if self.first_submit is None:
                self.first_submit = now
            booking.jobs = jobs
            if private is None:
                self.in_flight += count
            else:
                booking.is_private = True
                for job in jobs:
                    self._private[job.id] = private
            self.submitted += count
            booking.expected = count

    def started(self, count: int) -> None:
        """Note that jobs left the queue for a worker (negative: that they came back)."""
        if not self.counts_pending:
            return
        with self._lock:
            self.pending -= count
            ready = self._take_ready()
        _wake(ready)

    def deliver(self, jobs: Sequence[Job], *, mail: bool = True) -> None:
        """Hand over jobs that have ended and are recorded; without ``mail`` their gatherer is whoever closes."""
        with self._lock:
            self._count(jobs)
            wakes = self._hand_out(jobs, mail=mail)
        _wake(wakes)

    def deliver_returned(self, group: Returned) -> None:
        """Do so for jobs that all returned, and have not failed by what they returned."""
        with self._lock:
            self.settled += len(group.jobs)
            self.done += len(group.jobs)
            self.busy_s += sum(group.ends) - sum(group.starts)
            self._note_end(group.ends[-1])
            wakes = self._hand_out(group.jobs, mail=True)
        _wake(wakes)

    def _hand_out(self, jobs: Sequence[Job], *, mail: bool) -> list[Callable[[], object]]:
        """Under the lock: put jobs where their gatherers find them; give what wakes those that wait."""
        private = self._private
        wakes: list[Callable[[], object]] = []
        public = [job for job in jobs if job.id not in private] if private else jobs
        if len(public) < len(jobs):
            wakes = [private.pop(job.id) for job in jobs if job.id in private]
        self.in_flight -= len(public)
        if mail:
            self._delivered += len(public)
            self._mailbox.extend(public)
        if self._waiters:
            wakes += self._take_ready()
        return wakes

    def fail(self, error: ParavalError, *, lasting: bool = True) -> None:
        """Wake everyone with an error: nothing more will come. A lasting one stays until :meth:`reopen`."""
        with self._lock:
            if lasting:
                self.failure = error
            for waiter in self._waiters:
                if waiter.despite_failure or waiter.is_awake:
                    continue
                waiter.error = error
                waiter.wake()
            wakes = list(self._private.values())
        _wake(wakes)

    def reopen(self) -> None:
        """Forget a failure: a new engine is at work."""
        self.failure = None

    def look_again(self) -> None:
        """Have everyone who waits look whether it is ready: something outside the ledger changed."""
        with self._lock:
            ready = self._take_ready()
        _wake(ready)

    def release(self, booking: Booking, left: int) -> None:
        """Undo :meth:`reserve`, but for so many jobs."""
        with self._lock:
            self.pending -= booking.room - left
            booking.room = left
            ready = self._take_ready()
        _wake(ready)

    def is_private(self, job: Job) -> bool:
        """Whether the job belongs to whoever evaluates it, and not to gather."""
        return job.id in self._private

    def forget(self, booking: Booking) -> None:
        """Undo :meth:`expect` and :meth:`reserve` for jobs that could not be submitted."""
        with self._lock:
            for job in booking.jobs if booking.is_private else ():
                self._private.pop(job.id, None)
            self.submitted -= booking.expected
            if not booking.is_private:
                self.in_flight -= booking.expected
            booking.expected = 0
        self.release(booking, 0)

    def _count(self, jobs: Sequence[Job]) -> None:
        self.settled += len(jobs)
        failed = cancelled = 0
        busy_s = 0.0
        finished: float | None = None
        for job in jobs:
            started, finished = job._started, job._finished
            if started is None:
                self.pending -= 1  # it was never given to a worker
            elif finished is not None:
                busy_s += finished - started
            if job._status is _CANCELLED:
                cancelled += 1
            elif job.error is not None if type(job) is Job else _has_failed(job):
                failed += 1
        if finished is not None:
            self._note_end(finished)
        self.busy_s += busy_s
        self.failed += failed
        self.cancelled += cancelled
        self.done += len(jobs) - failed - cancelled

    def _note_end(self, finished: float) -> None:
        if self.last_end is None or finished > self.last_end:  # one that ended before may be heard of later
            self.last_end = finished

    def _take_ready(self) -> Sequence[Callable[[], object]]:
        """Under the lock: give what wakes those that need not wait any more; to be done without it, which they take."""
        if not self._waiters:
            return ()
        return [waiter.wake for waiter in self._waiters if not waiter.is_awake and waiter.ready()]

    # -- the caller's side ---------------------------------------------------------------------------------------------

    def statistics(
        self, now: float, num_workers: int, running: int, running_s: float, callback_errors: int
    ) -> Statistics:
        """Take a picture; ``running`` jobs have run for ``running_s`` seconds together so far."""
        with self._lock:
            at_work = self.settled < self.submitted
            begin = now if self.first_submit is None else self.first_submit
            end = now if at_work or self.last_end is None else self.last_end
            available_s = (end - begin) * num_workers
            running = min(running, self.submitted - self.settled)
            return Statistics(
                submitted=self.submitted,
                pending=self.submitted - self.settled - running,
                running=running,
                done=self.done,
                failed=self.failed,
                cancelled=self.cancelled,
                utilisation=min(1.0, (self.busy_s + running_s) / available_s) if available_s > 0 else 0.0,
                callback_errors=callback_errors,
            )

    @property
    def ungathered(self) -> int:
        """How many jobs wait in the mailbox."""
        return len(self._mailbox)

    def take_into(self, jobs: list[Job], ready: Callable[[], bool], limit: int | None = None) -> bool:
        """Move jobs from the mailbox to a list, oldest first, at most ``limit``; False if it is not ``ready()``.

        The list is the caller's, so that :meth:`put_back` can undo even a take that was interrupted (by Ctrl-C).
        """
        with self._lock:
            if not ready():
                return False
            mailbox = self._mailbox
            if limit is None:
                jobs.extend(mailbox)
                mailbox.clear()
            else:
                for _ in range(min(limit, len(mailbox))):
                    jobs.append(mailbox[0])
                    mailbox.popleft()
            return True

    def put_back(self, jobs: list[Job]) -> None:
        """Undo a take whose jobs could not be handed on."""
        with self._lock:
            if self._mailbox:  # an interrupted take may have left there what is in the list already
                first = self._mailbox[0]
                jobs = jobs[: next((index for index, job in enumerate(jobs) if job is first), None)]
            self._mailbox.extendleft(reversed(jobs))

    def peek(self) -> list[Job]:
        """Give the jobs in the mailbox without taking them."""
        with self._lock:
            return list(self._mailbox)

    def when_all_done(self) -> Callable[[], bool]:
        """Make the condition that every public job that is in flight now has been delivered."""
        with self._lock:
            target = self._delivered + self.in_flight
        # A closing evaluator takes jobs out of flight without delivering them: then there is nothing to wait for.
        return lambda: self._delivered >= target or self.in_flight == 0

    def when_batch_done(self, size: int) -> Callable[[], bool]:
        """Make the condition that ``size`` jobs can be gathered, or that no more will come."""
        return lambda: len(self._mailbox) >= size or self.in_flight == 0

    def wait(
        self,
        ready: Callable[[], bool],
        check: Callable[[], object] | None = None,
        timeout: float | None = None,
        *,
        despite_failure: bool = False,
    ) -> bool:
        """Block this thread until ``ready()``.

        Args:
            ready: looked at under the lock whenever something changes.
            check: called every half second meanwhile; it raises when nobody is left to wake us.
            timeout: seconds; None waits for as long as it takes.
            despite_failure: go on waiting after a failure; for who waits for the end.

        Returns:
            Whether it became ready.

        Raises:
            ParavalError: the failure of the engine.
        """
        with self._lock:
            if not despite_failure:
                self._refuse_if_failed()
            if ready():
                return True
            gate = Gate()
            waiter = _Waiter(ready, gate.open, despite_failure)
            self._waiters.append(waiter)
        try:
            if not gate.wait(check, timeout):
                return False
        finally:
            self._forget(waiter)
        if waiter.error is not None:
            raise waiter.error
        return True

    async def wait_async(
        self,
        ready: Callable[[], bool],
        check: Callable[[], object] | None = None,
        *,
        despite_failure: bool = False,
    ) -> None:
        """Wait, on any loop, until ``ready()``; as :meth:`wait`. ``check`` is for loops that are not the engine's."""
        with self._lock:
            if not despite_failure:
                self._refuse_if_failed()
            if ready():
                return
            waiter = _Waiter(ready, waker(event := Loop.running().event()), despite_failure)
            self._waiters.append(waiter)
        try:
            await until_set(event, check)
        finally:
            self._forget(waiter)
        if waiter.error is not None:
            raise waiter.error

    def _forget(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _refuse_if_failed(self) -> None:
        if self.failure is not None:
            raise self.failure


def _has_failed(job: Job) -> bool:
    try:
        return job.failed
    except Exception:  # noqa: BLE001 - a subclass's is user code, and the counts must stay right
        return True


def _wake(wakes: Sequence[Callable[[], object]]) -> None:
    for wake in wakes:
        wake()


async def until_set(event: Event, check: Callable[[], object] | None) -> None:
    """Wait for an event; ``check()``, if given, is called every half second, and raises when nobody can set it."""
    if check is None:
        await event.wait()
        return
    while True:
        with anyio.move_on_after(_LIVENESS_S):
            await event.wait()
            return
        check()


def waker(event: Event) -> Callable[[], object]:
    """Give a function that sets an event of this loop from any thread."""
    loop = Loop.running()
    return lambda: event.set() if loop.is_here else loop.call_soon(event.set)
