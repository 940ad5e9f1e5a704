"""Jobs that were submitted together: what they share is there once, and what nobody looks at is never made.

The evaluator's process alone imports this; a worker process has no such jobs.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

if TYPE_CHECKING:
    from paraval.job import Job, JobContext
    from paraval.storage import Storage

__all__ = ["Notes", "Submission", "submissions_of"]


class Notes(Sequence[dict[str, Any]]):
    """The metadata of jobs that were submitted together: each dict is made when it is first looked at, and then kept.

    Args:
        submitted: when they were submitted, in seconds on the evaluator's clock.
        count: how many they are.

    Attributes:
        gathered: when all of the jobs were gathered, together; None: not yet, or not together.
    """

    __slots__ = ("_count", "_lock", "_made", "_submitted", "gathered")

    def __init__(self, submitted: float, count: int) -> None:
        self._submitted = submitted
        self._count = count
        self.gathered: float | None = None
        self._made: dict[int, dict[str, Any]] = {}
        # Who makes one, and who changes all, has it: else a dict could be made as things were a moment ago. What the
        # collector finalizes in the middle of that may ask for one, too.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | list[dict[str, Any]]:
        places = range(self._count)[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.at, range(self._count))

    def at(self, place: int) -> dict[str, Any]:
        """Give one of them."""
        with self._lock:
            made = self._made.get(place)
            return self._made.setdefault(place, self._new()) if made is None else made

    def copy_of(self, place: int) -> dict[str, Any]:
        """Give what one of them holds, or would if it were made."""
        with self._lock:
            made = self._made.get(place)
            return self._new() if made is None else dict(made)

    def _new(self) -> dict[str, Any]:
        if self.gathered is None:
            return {"timestamp_submit": self._submitted}
        return {"timestamp_submit": self._submitted, "timestamp_gather": self.gathered}

    def note_gathered(self, now: float) -> None:
        """Note that all of the jobs were gathered together."""
        with self._lock:
            self.gathered = now
            for made in list(self._made.values()):
                made["timestamp_gather"] = now


class Submission:
    """What the jobs of one call of ``submit`` share.

    Attributes:
        ids: of the jobs, in their order.
        run_function: what they run.
        storage: where they are recorded.
        context: what surrounds them.
        submitted: when they were submitted, in seconds on the evaluator's clock.
        notes: their metadata.
        is_apart: one of them was gathered without the others.
        is_renoted: one of them has been given another metadata dict than that of the notes.
    """

    __slots__ = (
        "_first",
        "_prefix",
        "context",
        "ids",
        "is_apart",
        "is_renoted",
        "notes",
        "run_function",
        "storage",
        "submitted",
    )

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
        self.is_apart = self.is_renoted = False
        search, dot, number = self.ids[0].rpartition(".")
        self._prefix = len(search) + len(dot)
        self._first = int(number) if number.isdecimal() else -1

    def note_of(self, job_id: str) -> dict[str, Any]:
        """Give the metadata of a job; that of none, where somebody has given it another id."""
        ids = self.ids
        try:
            place = int(job_id[self._prefix :]) - self._first  # as a rule they are numbered on
            if place >= 0 and ids[place] == job_id:
                return self.notes.at(place)
        except (ValueError, IndexError, TypeError):
            pass
        if job_id in ids:
            return self.notes.at(ids.index(job_id))
        self.is_renoted = True
        return {"timestamp_submit": self.submitted}


_submission_of = operator.attrgetter("_submission")


def submissions_of(jobs: Iterable[Job]) -> set[Submission | None]:
    """Give the submissions of jobs; None for those that share nothing."""
    return set(map(_submission_of, jobs))
