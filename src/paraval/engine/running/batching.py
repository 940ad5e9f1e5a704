"""How many jobs a worker takes at once.

A batch spares the trips between loop and worker that cost more than a tiny job. It costs fairness when jobs are long,
so it grows only while jobs are measured to be tiny and many wait, and falls to one at once when they are not. (The idea
of self-sizing batches is joblib's; there a failure loses the batch, and the aim is 0.2 to 2 s, not 10 ms.)

A trip to a worker in another process takes longer, and the longer the busier all processors are; the worker does
nothing meanwhile. So what is tiny there is larger, and it is sent a few of jobs that are only short, too. Of these it
reports each as it ends, so that it is known which one runs.

Whatever a worker runs, it shall find its next jobs at hand when it is through. They can be taken back until it begins
them, so that this costs nobody's fairness: an idle worker is given what others have ahead.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from paraval.errors import BadValueError

__all__ = ["STALL_S", "BatchSizer", "Batching"]

Batching = Literal["auto"] | int | bool

STALL_S: Final = 0.010
"""After this many seconds on one batch the worker's finished jobs are reported and its waiting jobs go to others."""
_MOST: Final = 256
_NEAR: Final = (0.000_25, 0.005)
"""Up to how many seconds a job is tiny, and how many a batch of tiny jobs shall take."""
_FAR: Final = (0.002, 0.040)
_SHORT_S: Final = 0.020
"""Up to how many seconds a job is short."""
_LONGISH_S: Final = 0.250
"""Up to how many seconds a job takes for which a trip is not worth while, too; longer ones begin in their order."""
_PATIENCE_S: Final = 0.1
_AHEAD_S: Final = 0.060
"""For so many seconds a worker shall have short jobs to go on with."""


class BatchSizer:
    """Decides the size of the next batch.

    Args:
        batching: ``"auto"``, a fixed size, or False for one job at a time.
        num_workers: who shares the queue.
        limit: the most that the backend allows.
        is_far: whether a trip to a worker takes long, and it can be sent jobs ahead.
        may_be_long: whether those may be more than short.

    Attributes:
        is_far: as it was given.
        in_order: whether a batch begins with one job, and its worker is sent others ahead, each of which it reports.
        hold_s: for how many seconds a message with tiny jobs may keep these, before others are given those that wait.
        pace_s: how many seconds each job takes at least, going by the last ones; 0 if that is not known.
    """

    def __init__(
        self,
        batching: Batching,
        num_workers: int,
        limit: int | None = None,
        *,
        is_far: bool = False,
        may_be_long: bool = True,
    ) -> None:
        self.is_far = is_far
        self._may_be_long = may_be_long
        self.pace_s = self._mean_s = 0.0
        self._tiny_s, self._target_s = _FAR if is_far else _NEAR
        self.in_order = False
        self.hold_s = self._target_s
        self._most = _MOST if limit is None else limit
        self._auto = batching == "auto" or batching is True
        if self._auto or batching is False:
            self._size = 1
        elif isinstance(batching, int) and batching >= 1:
            self._size = batching
        else:
            raise BadValueError(f"batching must be 'auto', False or a positive int, not {batching!r}")
        self._num_workers = num_workers

    def next_size(self, waiting: int) -> int:
        """Give the number of jobs to take when ``waiting`` jobs wait: never more than a fair share of them."""
        return max(1, min(self._size, self._most, waiting // self._num_workers))

    @property
    def sends_ahead(self) -> bool:
        """Whether workers are sent jobs ahead: not before it is known what these are like."""
        return self.is_far and self._auto and min(self._size, self._most) > 1

    def next_stock(self, stock: int, waiting: int) -> int:
        """Give the number of jobs to send ahead to a worker that has so many."""
        size = min(self._size, self._most)
        # The other workers may be through earlier: one is left for each of them.
        share = (waiting - self._num_workers + 1) // self._num_workers
        return max(0, min(size - stock if self.in_order else size, share))

    @property
    def patience_s(self) -> float:
        """For how many seconds a worker may have jobs ahead that it does not begin."""
        return max(_PATIENCE_S, 2 * self._mean_s)

    def learn(self, jobs: int, seconds: float, shortest_s: float = math.inf) -> None:
        """Take into account that a batch of so many jobs took so long, the trip included, and the shortest so long."""
        if not self._auto:
            return
        self._mean_s = mean = seconds / jobs
        # It falls at once: a worker that was thought to have enough to do, and has not, does nothing meanwhile.
        if self.is_far and shortest_s < math.inf:
            self.pace_s = min(shortest_s, (self.pace_s + shortest_s) / 2)
        self.in_order = False
        if mean > self._tiny_s:
            self._size = 1
            if self.is_far and mean <= (_LONGISH_S if self._may_be_long else _SHORT_S):
                self.in_order = True
                self._size = 2 + (int(_AHEAD_S / mean) if mean <= _SHORT_S else 0)
        elif jobs >= self._size:  # a smaller batch, cut by a short queue, says little about a larger one
            self._size = max(1, min(self._size * 2, _MOST, int(self._target_s / max(mean, 1e-9))))
