"""Jobs that were submitted together: what they share is there once, and what nobody looks at is never made.

The evaluator's process alone imports this; a worker process has no such jobs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

if TYPE_CHECKING:
    from paraval.job import JobContext
    from paraval.storage import Storage

__all__ = ["Notes", "Submission"]


class _Whole:
    """What the parts of one sequence of notes have in common.

    Attributes:
        submitted: when the jobs were submitted.
        gathered: when all of them were gathered, together; None: not yet, or not together.
        made: the dicts that somebody has looked at, by their places.
        lock: who makes one, and who changes all, has it: else a dict could be made as things were a moment ago. What
            the collector finalizes in the middle of that may ask for one, too.
    """

    __slots__ = ("gathered", "lock", "made", "submitted")

    def __init__(self, submitted: float) -> None:
        self.submitted = submitted
        self.gathered: float | None = None
        self.made: dict[int, dict[str, Any]] = {}
        self.lock = threading.RLock()

    def new(self) -> dict[str, Any]:
        """Make the dict of a job of which nothing else is noted."""
        if self.gathered is None:
            return {"timestamp_submit": self.submitted}
        return {"timestamp_submit": self.submitted, "timestamp_gather": self.gathered}


class Notes(Sequence[dict[str, Any]]):
    """The metadata of jobs that were submitted together: each dict is made when it is first looked at, and then kept.

    Args:
        submitted: when they were submitted, in seconds on the evaluator's clock.
        count: how many they are.
    """

    __slots__ = ("_count", "_first", "_whole")

    def __init__(self, submitted: float, count: int) -> None:
        self._whole = _Whole(submitted)
        self._first = 0
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self._at(at) for at in range(*index.indices(self._count))]
        return self._at(range(self._count)[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._at, range(self._count))

    def _at(self, at: int) -> dict[str, Any]:
        whole = self._whole
        with whole.lock:
            made = whole.made.get(self._first + at)
            return whole.made.setdefault(self._first + at, whole.new()) if made is None else made

    def copy_of(self, at: int) -> dict[str, Any]:
        """Give what one of the dicts holds, or would if it were made."""
        whole = self._whole
        with whole.lock:
            made = whole.made.get(self._first + at)
            return whole.new() if made is None else dict(made)

    def part(self, at: int, count: int) -> Notes:
        """Give so many of them, from that place on: the same dicts."""
        part = Notes.__new__(Notes)
        part._whole = self._whole
        part._first = self._first + at
        part._count = count
        return part

    def is_part_of(self, notes: Notes, at: int) -> bool:
        """Whether these are some of those, from that place on."""
        return self._whole is notes._whole and self._first == notes._first + at

    @property
    def gathered(self) -> float | None:
        """When all of the jobs were gathered together."""
        return self._whole.gathered

    def note_gathered(self, now: float) -> None:
        """Note that all of them were gathered together."""
        whole = self._whole
        with whole.lock:
            whole.gathered = now
            for made in list(whole.made.values()):
                made["timestamp_gather"] = now


class Submission:
    """What the jobs of one call of ``submit`` share.

    Attributes:
        ids: of the jobs, in their order.
        run_function: what they run.
        storage: where they are recorded.
        context: what surrounds them.
        notes: their metadata.
        is_apart: one of them was gathered without the others, or has been given another metadata dict, so that there is
            no saying the same of all.
    """

    __slots__ = ("_first", "context", "ids", "is_apart", "notes", "run_function", "storage", "submitted")

    def __init__(
        self,
        ids: Sequence[str],
        run_function: Callable[..., Any],
        storage: Storage,
        context: JobContext,
        submitted: float,
        notes: Notes,
    ) -> None:
        self.ids = list(ids)
        self.run_function = run_function
        self.storage = storage
        self.context = context
        self.submitted = submitted
        self.notes = notes
        self.is_apart = False
        self._first = _number_of(self.ids[0])

    def find(self, job_id: str) -> int:
        """Give the place of a job."""
        at = _number_of(job_id) - self._first  # as a rule they are numbered on
        return at if 0 <= at < len(self.ids) and self.ids[at] == job_id else self.ids.index(job_id)

    def notes_of(self, job_ids: Sequence[str]) -> Notes | None:
        """Give the metadata of several jobs; None unless they are of this submission and follow one another.

        None, too, if one of them may have other metadata.
        """
        at = _number_of(job_ids[0]) - self._first
        if self.is_apart or at < 0 or self.ids[at : at + len(job_ids)] != job_ids:
            return None
        return self.notes.part(at, len(job_ids))


def _number_of(job_id: str) -> int:
    number = job_id.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1
