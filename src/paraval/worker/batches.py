"""The jobs of a message: they are run one after the other, and what became of them is said in time."""

from __future__ import annotations

import _thread
import math
import os
import struct
from collections import deque
from collections.abc import Callable
from time import monotonic  # by its name, as a job may put another in its place there
from typing import TYPE_CHECKING, Any, Final

from paraval.worker.frames import PAIR, Wire, place_of
from paraval.worker.output import flush_output

if TYPE_CHECKING:
    from paraval.worker.board import BoardOfWorker

__all__ = ["Batches"]

_HOLD_S: Final = 0.005
"""How long outcomes of tiny jobs may wait to be sent together."""
_LONGEST_S: Final = 0.1
"""How long the guard sleeps at most while there is a batch: clocks may be changed."""

_JobOfMessage = tuple[str, Any]
_Result = tuple[tuple[Any, ...] | None, Any]


class Batches:
    """Runs the jobs of message after message. A thread, the guard, reports for it when one of them takes long.

    Args:
        wire: where reports go.
        board: where it is noted which job runs; or None.
        run: runs one job; gives its error (as a tuple) and its value.

    Attributes:
        origin: where the evaluator's clock is zero, on the system's monotonic clock.
        is_asked_to_stop: no further job of this message is to begin.
    """

    def __init__(self, wire: Wire, board: BoardOfWorker | None, run: Callable[[str, Any], _Result]) -> None:
        self._wire = wire
        self._board = board
        self._run = run
        self.origin = 0.0
        self.is_asked_to_stop = False
        self._number = 0
        # Under _state: what the guard and the main thread share.
        self._state = _thread.allocate_lock()
        self._todo: deque[_JobOfMessage] = deque()
        self._count = 0  # of the jobs of the message, without those that were given back
        self._told = 0  # of how many of them the outcomes were sent
        # Of those that were begun after them; there may be a start more than were begun.
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._values: list[Any] = []
        self._errors: dict[int, tuple[Any, ...]] = {}  # by their places in the message
        self._batches = 0
        self._due = 0.0
        self._guard_wanted = _thread.allocate_lock()
        self._guard_wanted.acquire()
        self._guard_looks = math.inf
        self._guard_runs = False

    def run(self, number: int, job_ids: list[str], all_args: list[Any], hold_s: float) -> bool:
        """Run the jobs of a message.

        Args:
            number: of the message.
            job_ids: in the order in which they are to be run.
            all_args: their arguments.
            hold_s: after so many seconds, what was not begun is sent back.

        Returns:
            Whether it was asked to stop meanwhile.
        """
        self._number = number
        if len(job_ids) == 1:
            self._run_alone(job_ids[0], all_args[0])
        else:
            self._run_many(job_ids, all_args, hold_s)
        if not self.is_asked_to_stop:
            return False
        self.is_asked_to_stop = False  # only then, as it may come in between
        return True

    def _run_alone(self, job_id: str, args: Any) -> None:
        """Run the only job of a message. The guard has nothing to do with it, so it costs a fraction of a batch."""
        if self.is_asked_to_stop:  # before it has begun any: while it was set up, say
            self._wire.send(("back", self._number, 0, None))
            return
        began = monotonic() - self.origin
        error, value = self._run(job_id, args)
        times = PAIR.pack(began, monotonic() - self.origin)
        flush_output()
        self._wire.send(("done", self._number, 0, times, {} if error is None else {0: error}, [value]))

    def _run_many(self, job_ids: list[str], all_args: list[Any], hold_s: float) -> None:
        board, run, number, origin = self._board, self._run, self._number, self.origin
        # Without the lock: each of these is changed by one operation of one object, in the order given below.
        todo = deque(zip(job_ids, all_args, strict=True))
        starts: list[float] = []
        ends: list[float] = []
        values: list[Any] = []
        errors: dict[int, tuple[Any, ...]] = {}
        with self._state:
            self._todo, self._starts, self._ends, self._values, self._errors = todo, starts, ends, values, errors
            self._count = len(job_ids)
            self._told = 0
            self._batches += 1
            self._due = (now := monotonic()) + hold_s
        is_alone = not self._wake_guard()  # so that nobody could give back what it has not begun
        now -= origin
        report_at = now + _HOLD_S
        place = 0
        while True:
            # Asked to stop maybe before it has begun any: while it was set up, say. Where the board says no, the job
            # before was to be stopped, as it held the interpreter for too long.
            if self.is_asked_to_stop or (board is not None and not board.begin(place_of(number, place), now)):
                self._give_back()
            starts.append(now)  # before it is taken, so that of each that was taken it is known
            try:
                job_id, args = todo.popleft()
            except IndexError:  # all were begun, or the others were given back
                break
            error, value = run(job_id, args)
            if error is not None:
                errors[place] = error
            values.append(value)
            # With one look at the clock, the next job begins where this one ends.
            now = monotonic() - origin
            ends.append(now)  # last: where there is an end, there is all
            place += 1
            if now >= report_at:
                self._report()
                now = monotonic() - origin
                report_at = now + _HOLD_S
            if is_alone:
                self._give_back()
        if board is not None:
            board.end()
        flush_output()
        self._report()

    def _give_back(self) -> None:
        """Send back what was not begun."""
        with self._state:
            is_any = self._take_away()
        if is_any:
            self._report()
            self._wire.send(("back", self._number, self._count, None))

    def _take_away(self) -> bool:
        """Under the lock: see to it that no further job is begun; say whether there was one."""
        before = self._count
        try:
            while True:  # from the far end, as the main thread may take from the near end at the same moment
                self._todo.pop()
                self._count -= 1
        except IndexError:
            return self._count < before

    def _report(self) -> None:
        with self._state:
            count = len(self._ends)
            if count:
                told = self._told
                times = struct.pack(f"{count + 1}d", self._starts[0], *self._ends[:count])
                # A copy first, as the main thread may add one meanwhile.
                errors = {place - told: error for place, error in list(self._errors.items()) if place - told < count}
                # Under the lock: outcomes must not overtake a "back".
                self._wire.send(("done", self._number, told, times, errors, self._values[:count]))
                self._told += count
                for place in errors:
                    del self._errors[told + place]
                for reported in (self._starts, self._ends, self._values):
                    del reported[:count]

    # -- the guard -----------------------------------------------------------------------------------------------------

    def _wake_guard(self) -> bool:
        """Have the guard look in time for the batch that begins; False when there cannot be one."""
        if not self._guard_runs:
            try:
                _thread.start_new_thread(self._guard, ())
            except (RuntimeError, MemoryError):  # a job may have limited what the process may have
                return False
            self._guard_runs = True
            return True
        with self._state:
            if self._guard_looks > self._due:
                self._guard_looks = 0.0  # it is on its way
                self._guard_wanted.release()
        return True

    def _guard(self) -> None:
        try:
            self._keep_watch()
        except BaseException:  # noqa: BLE001 - there is no memory, say: nobody would report what this worker cannot
            os._exit(1)

    def _keep_watch(self) -> None:
        """While batches come: see to it that none keeps its finished or its waiting jobs for long.

        It looks no more often than that takes, as each of its turns takes the interpreter from the job that runs.
        """
        told = -1
        looks = 0.0
        while True:
            if looks < math.inf:
                self._guard_wanted.acquire(timeout=min(max(looks - monotonic(), 0.0), _LONGEST_S))
            else:
                self._guard_wanted.acquire()
            with self._state:
                self._guard_wanted.acquire(blocking=False)  # in case that it was released after the time had run out
                # In this order, each once, as the main thread goes on meanwhile: one that has just ended may seem to
                # run, which does no harm, but none that runs is overlooked.
                ended = self._told + len(self._ends)
                left = len(self._todo)
                runs = self._count - left > ended
                stuck = runs and monotonic() >= self._due
                seen = self._batches
                back: tuple[Any, ...] = ()
                if stuck:
                    self._take_away()
                    back = ("back", self._number, self._count, self._starts[self._count - 1 - self._told])
                # Decided here, under the lock, so that a batch that begins now finds it asleep, and wakes it.
                is_idle = stuck or not (left or runs)
                looks = self._guard_looks = math.inf if is_idle else self._due
            if back and told != seen:
                told = seen
                self._report()
                self._wire.send(back)
