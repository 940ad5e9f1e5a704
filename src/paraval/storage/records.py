"""What a storage keeps of a job, and how a change is applied to it.

The structs are invisible to the garbage collector: there may be very many, and none refers back to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from paraval.job import HPOJob, Job
from paraval.outcome import JobError, Outcome

__all__ = ["JobChange", "JobEnds", "JobRecord", "NewJobs", "adopt"]


class JobRecord(msgspec.Struct, gc=False, omit_defaults=True):
    """One job as it is stored; it is written as it is, but for what is at its default.

    Attributes:
        id: ``"search.job"``; the storage sets it.
        status: a :class:`~paraval.JobStatus` value.
        args: positional arguments; an evaluator stores ``(parameters,)``.
        kwargs: keyword arguments.
        out: the objective of an ``HPOJob``, the output of a plain ``Job``.
        error: why the job failed.
        metadata: what was noted beside the output.
        budgets: of the intermediate results, in the order they were recorded.
        objectives: of the intermediate results.
        function: the name of the run-function.
        owner: the evaluator that submitted the job, or has adopted it.
        attempts: how often it was RUNNING when its owner went away.
        is_private: it belongs to whoever evaluates it, and is nothing for others to gather.
        extra: what ``store_job`` was given under a key of the caller's own.
        revision: of the search, when this record last changed.
    """

    id: str = ""
    status: int = 0
    args: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] | None = None
    out: Any = None
    error: JobError | None = None
    metadata: dict[str, Any] | None = None
    budgets: list[float] | None = None
    objectives: list[Any] | None = None
    function: str | None = None
    owner: str | None = None
    attempts: int = 0
    is_private: bool = False
    extra: dict[str, Any] | None = None
    revision: int = 0

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The arguments that an evaluator submitted; nothing where the job has others."""
        args = self.args[0] if self.args else None
        return args if isinstance(args, Mapping) else {}

    @property
    def outcome(self) -> Outcome:
        """What became of the job, where it has ended."""
        return Outcome(self.out, self.error, cancelled=self.status == _CANCELLED)

    def outcome_for(self, job_class: type[Job]) -> Outcome:
        """Give what became of a job of this class: its several objectives are a tuple, which stores keep as a list."""
        if issubclass(job_class, HPOJob) and type(self.out) is list:
            return self.outcome._replace(value=tuple(self.out))
        return self.outcome

    def as_dict(self) -> dict[str, Any]:
        """Give the record the form that ``load_job`` has in the reference system."""
        return {
            **(self.extra or {}),  # first: what is stored under a name of the record's own must not hide that
            "status": self.status,
            "in": None if self.args is None and self.kwargs is None else {"args": self.args, "kwargs": self.kwargs},
            "out": self.out,
            "metadata": dict(self.metadata or ()),
            "intermediate": {"budget": list(self.budgets or ()), "objective": list(self.objectives or ())},
        }


def adopt(record: JobRecord, owner: str) -> None:
    """Give a job to a new owner, who runs it anew."""
    if record.status == _RUNNING:
        record.attempts += 1
    record.status, record.out, record.error, record.owner = _READY, None, None, owner


_READY, _RUNNING, _CANCELLED = 0, 1, 4  # of JobStatus


class JobChange(msgspec.Struct, gc=False):
    """What to change of one record that exists; a field that is UNSET stays as it is.

    ``metadata`` and ``extra`` are merged, ``intermediate`` (budget, objective) is appended, the others replace.
    ``by`` is a condition: the change is left out unless the record's owner is this one; None: whoever that is.
    """

    id: str
    status: int | UnsetType = UNSET
    args: tuple[Any, ...] | UnsetType | None = UNSET
    kwargs: dict[str, Any] | UnsetType | None = UNSET
    out: Any = UNSET
    error: JobError | UnsetType | None = UNSET
    metadata: dict[str, Any] | None = None
    intermediate: tuple[float, Any] | None = None
    extra: dict[str, Any] | None = None
    by: str | None = None

    def apply_to(self, record: JobRecord) -> None:  # noqa: C901 - one question for each field, in the hot path
        """Change the record. Its first metadata dict is taken over, not copied."""
        if self.status is not UNSET:
            record.status = self.status
        if self.args is not UNSET:
            record.args = self.args
        if self.kwargs is not UNSET:
            record.kwargs = self.kwargs
        if self.out is not UNSET:
            record.out = self.out
        if self.error is not UNSET:
            record.error = self.error
        if self.metadata is not None and self.metadata is not record.metadata:
            if record.metadata is None:
                record.metadata = self.metadata
            else:
                record.metadata.update(self.metadata)
        if self.extra is not None:
            record.extra = {**(record.extra or {}), **self.extra}
        if self.intermediate is not None:
            budget, objective = self.intermediate
            if record.budgets is None or record.objectives is None:
                record.budgets, record.objectives = [], []
            record.budgets.append(budget)
            record.objectives.append(objective)


class NewJobs(NamedTuple):
    """Jobs that one evaluator submits together: what differs is in columns, what they share is there once.

    A store may keep the columns, and the dicts in them.

    Attributes:
        args: the parameters of each.
        metadata: the metadata of each; it may be a :class:`~paraval.submission.Notes`, which makes them when asked.
        function: the name of the run-function.
        owner: the evaluator that submits them.
        is_private: they belong to whoever evaluates them, and are nothing for others to gather.
    """

    args: Sequence[dict[str, Any]]
    metadata: Sequence[dict[str, Any]]
    function: str
    owner: str
    is_private: bool = False

    def records(self) -> list[JobRecord]:
        """Make a record of each, without an id yet."""
        _, _, function, owner, is_private = self
        return [
            JobRecord(args=(args,), metadata=metadata, function=function, owner=owner, is_private=is_private)
            for args, metadata in zip(self.args, self.metadata, strict=True)
        ]


class JobEnds(NamedTuple):
    """How several jobs of one owner have ended, in columns, which a store may keep.

    Attributes:
        ids: of the jobs.
        statuses: :class:`~paraval.JobStatus` values.
        outs: as in the records, likewise the next two.
        errors: why those that failed did.
        metadata: all of it; None, which only stores are given that say so (``Storage.keeps_dicts``): it is in the dicts
            that the jobs were inserted with.
        by: their owner; who is not that of a record by now does not end it.
    """

    ids: Sequence[str]
    statuses: Sequence[int]
    outs: Sequence[Any]
    errors: Sequence[JobError | None]
    metadata: Sequence[dict[str, Any]] | None
    by: str

    def changes(self) -> list[JobChange]:
        """Make the changes of the records."""
        by = self.by
        all_metadata = [None] * len(self.ids) if self.metadata is None else self.metadata
        return [
            JobChange(job_id, status=status, out=out, error=error, metadata=metadata, by=by)
            for job_id, status, out, error, metadata in zip(*self[:4], all_metadata, strict=True)
        ]
