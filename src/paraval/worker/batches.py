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
        self._told = 0  # of how many jobs of the message the outcomes were sent
        # Of those that were begun after them. While a job runs, there is a start more than there are ends.
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._errors: dict[int, tuple[Any, ...]] = {}
        self._values: list[Any] = []
        self._batches = 0
        self._due = 0.0
        self._guard_wanted = _thread.allocate_lock()
        self._guard_wanted.acquire()
        self._guard_looks = math.inf
        self._guard_runs = False

    def run(self, number: int, jobs: list[_JobOfMessage], hold_s: float) -> bool:
        """Run the jobs of a message.

        Args:
            number: of the message.
            jobs: ids and arguments.
            hold_s: after so many seconds, what was not begun is sent back.

        Returns:
            Whether it was asked to stop meanwhile.
        """
        self._number = number
        if len(jobs) == 1:
            self._run_alone(*jobs[0])
        else:
            self._run_many(jobs, hold_s)
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

    def _run_many(self, jobs: list[_JobOfMessage], hold_s: float) -> None:
        state, board, todo, starts, ends, values, origin = (
            self._state,
            self._board,
            self._todo,
            self._starts,
            self._ends,
            self._values,
            self.origin,
        )
        with state:
            todo.extend(jobs)
            self._told = 0
            self._batches += 1
            self._due = (now := monotonic()) + hold_s
        is_alone = not self._wake_guard()  # so that nobody could give back what it has not begun
        report_at = now - origin + _HOLD_S
        job = self._begin_next()
        while job is not None:
            error, value = self._run(*job)
            # With one look at the clock and one turn with the lock, the next job begins where this one ends.
            with state:
                ended = monotonic() - origin
                if error is not None:
                    self._errors[len(ends)] = error
                ends.append(ended)
                values.append(value)
                if (
                    todo
                    and ended < report_at
                    and not (self.is_asked_to_stop or is_alone)
                    and (board is None or board.begin(place_of(self._number, self._told + len(starts)), ended))
                ):
                    job = todo.popleft()
                    starts.append(ended)
                    continue
            if ended >= report_at:
                report_at = ended + _HOLD_S
                self._report()
            if is_alone:
                self._give_back()
            job = self._begin_next()
        if board is not None:
            board.end()
        flush_output()
        self._report()

    def _begin_next(self) -> _JobOfMessage | None:
        if self.is_asked_to_stop:  # maybe before it has begun any, as above
            self._give_back()
        with self._state:
            if not self._todo:
                return None
            starts, board, now = self._starts, self._board, monotonic() - self.origin
            if board is None or board.begin(place_of(self._number, self._told + len(starts)), now):
                starts.append(now)
                return self._todo.popleft()
        self._give_back()  # the job before it was to be stopped, as it held the interpreter for too long
        return None

    def _give_back(self) -> None:
        """Send back what was not begun."""
        with self._state:
            at = self._told + len(self._starts)
            is_any = bool(self._todo)
            self._todo.clear()
        if is_any:
            self._report()
            self._wire.send(("back", self._number, at, None))

    def _report(self) -> None:
        with self._state:
            count = len(self._ends)
            if count:
                times = struct.pack(f"{2 * count}d", *self._starts[:count], *self._ends)
                # Under the lock: outcomes must not overtake a "back".
                self._wire.send(("done", self._number, self._told, times, self._errors, self._values))
                self._told += count
                del self._starts[:count]
                for told in (self._ends, self._errors, self._values):
                    told.clear()

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
                runs = len(self._starts) > len(self._ends)
                stuck = runs and monotonic() >= self._due
                seen = self._batches
                back: tuple[Any, ...] = ()
                if stuck:
                    back = ("back", self._number, self._told + len(self._starts), self._starts[-1])
                    self._todo.clear()
                # Decided here, under the lock, so that a batch that begins now finds it asleep, and wakes it.
                is_idle = stuck or (not self._todo and not runs)
                looks = self._guard_looks = math.inf if is_idle else self._due
            if back and told != seen:
                told = seen
                self._report()
                self._wire.send(back)
