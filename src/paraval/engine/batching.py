"""How many jobs a worker takes at once.

A batch spares the trips between loop and worker that cost more than a tiny job. It costs fairness when jobs are long,
so it grows only while jobs are measured to be tiny and many wait, and falls to one at once when they are not. (The idea
of self-sizing batches is joblib's; there a failure loses the batch, and the aim is 0.2 to 2 s, not 10 ms.)
"""

from __future__ import annotations

from typing import Final, Literal

from paraval.errors import BadValueError

__all__ = ["STALL_S", "BatchSizer", "Batching"]

Batching = Literal["auto"] | int | bool

STALL_S: Final = 0.010
"""After this many seconds on one batch the worker's finished jobs are reported and its waiting jobs go to others."""
_TINY_S: Final = 0.000_25
_TARGET_S: Final = 0.005
_MOST: Final = 256


class BatchSizer:
    """Decides the size of the next batch.

    Args:
        batching: ``"auto"``, a fixed size, or False for one job at a time.
        num_workers: who shares the queue.
        limit: the most that the backend allows.
    """

    def __init__(self, batching: Batching, num_workers: int, limit: int | None = None) -> None:
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

    def learn(self, jobs: int, seconds: float) -> None:
        """Take into account that a batch of so many jobs took so long, the trip included."""
        if not self._auto:
            return
        mean = seconds / jobs
        if mean > _TINY_S:
            self._size = 1
        elif jobs == self._size:  # a smaller batch, cut by a short queue, says little about a larger one
            self._size = max(1, min(self._size * 2, _MOST, int(_TARGET_S / max(mean, 1e-9))))
