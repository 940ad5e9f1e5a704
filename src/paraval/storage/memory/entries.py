"""What the records of jobs that were submitted together, and of those that ended together, have in common.

Nobody asks for most records: one is made, from the columns in which the jobs came, when somebody does.
"""

from __future__ import annotations

import operator
from typing import Any

from paraval.storage.records import JobEnds, JobRecord, NewJobs
from paraval.submission import Notes

__all__ = ["Ended", "Submitted"]


class Submitted:
    """Jobs that nothing has happened to since they were submitted together.

    Args:
        first: the number of the first of them.
        ids: of all.
        jobs: what they are.
        before: the revision before that of the first.
    """

    __slots__ = ("first", "ids", "jobs", "revision")

    def __init__(self, first: int, ids: list[str], jobs: NewJobs, before: int) -> None:
        self.first = first
        self.ids = ids
        self.jobs = jobs
        self.revision = before + 1

    def id_of(self, number: int) -> str:
        """Give the id of a job."""
        return self.ids[number - self.first]

    def revision_of(self, number: int) -> int:
        """Give the revision of a job."""
        return self.revision + number - self.first

    def record_of(self, number: int, *, as_copy: bool = False) -> JobRecord:
        """Make the record of a job; a copy has its metadata in a dict of its own."""
        at = number - self.first
        args, all_metadata, function, owner, is_private = self.jobs
        if not as_copy:
            metadata = all_metadata[at]
        elif isinstance(all_metadata, Notes):  # which need not keep one for that
            metadata = all_metadata.copy_of(at)
        else:
            metadata = dict(all_metadata[at])
        return JobRecord(
            self.ids[at],
            args=(args[at],),
            metadata=metadata,
            function=function,
            owner=owner,
            is_private=is_private,
            revision=self.revision + at,
        )

    def has(self, ends: JobEnds, first: int, at: int, count: int) -> bool:
        """Whether so many of these ends, from a place on, are of its jobs from a number on, and are all there is."""
        mine, metadata = first - self.first, ends.metadata
        if self.jobs.owner != ends.by or self.ids[mine : mine + count] != ends.ids[at : at + count]:
            return False
        if metadata is None:
            return True
        return all(map(operator.is_, metadata[at : at + count], self.jobs.metadata[mine : mine + count]))

    def came_with(self, metadata: dict[str, Any], number: int) -> bool:
        """Whether a job came with this very dict."""
        return self.jobs.metadata[number - self.first] is metadata


class Ended:
    """Jobs that were submitted together and have ended together, and nothing else has happened to them.

    Args:
        submitted: what is known of them otherwise.
        first: the number of the first of them.
        ends: how they ended, maybe with others.
        at: the place of the first of them there.
        before: the revision before that of the first.
    """

    __slots__ = ("ends", "offset", "revision", "submitted")

    def __init__(self, submitted: Submitted, first: int, ends: JobEnds, at: int, before: int) -> None:
        self.submitted = submitted
        self.ends = ends
        self.offset = at - first
        self.revision = before + 1 - first

    def id_of(self, number: int) -> str:
        """Give the id of a job."""
        return self.ends.ids[number + self.offset]

    def revision_of(self, number: int) -> int:
        """Give the revision of a job."""
        return self.revision + number

    def record_of(self, number: int, *, as_copy: bool = False) -> JobRecord:
        """Make the record of a job, likewise."""
        record = self.submitted.record_of(number, as_copy=as_copy)
        at, ends = number + self.offset, self.ends
        record.status, record.out, record.error = ends.statuses[at], ends.outs[at], ends.errors[at]
        record.revision = self.revision + number
        return record
