"""The storage interface: a few primitives that a store implements, and the named methods written once on top."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from paraval.errors import BadValueError, ParavalError
from paraval.storage.records import JobChange, JobEnds, JobRecord, NewJobs

__all__ = ["Storage", "UnknownIdError", "UnstorableError"]


class UnknownIdError(ParavalError, KeyError):
    """No such search or job in the storage."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnstorableError(ParavalError, TypeError):
    """A value is of a kind that the storage cannot keep; the message gives the way to it."""


class Storage(abc.ABC):
    """Keeps searches and their jobs. Synchronous, thread-safe, batch-first.

    A store implements the abstract methods; the named methods below them are the interface of the reference system.
    Search ids are strings; a job id is ``"search.job"``, where ``job`` is an int counted from 0 in its search.
    """

    by_reference: bool = False
    """Whether records hold the very objects they were given, so that later changes of a job's metadata show in them.

    Such a store is in this process's memory, and answers at once; any other is called in a thread.
    """

    keeps_dicts: bool = False
    """Whether :meth:`end_jobs` may be given no metadata: the store keeps the dicts that :meth:`insert_jobs` was given,
    and knows that what they hold at the end of a job is newer than what others have stored of it.
    """

    can_travel: bool = False
    """Whether the store, pickled and sent to another process of this machine, is the same store there."""

    # -- what a store implements ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def new_search(self) -> str:
        """Make a search; return its id."""

    @abc.abstractmethod
    def search_ids(self) -> list[str]:
        """Give the ids of all searches, oldest first."""

    @abc.abstractmethod
    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        """Number new jobs and add them, all or none. Durable on return if the store is.

        Each record's ``id`` is set: the numbers follow one another, and none is given out twice, whoever asks.

        Raises:
            UnknownIdError: no such search.
            UnstorableError: a value in a record is of a kind that this store cannot keep.
        """

    @abc.abstractmethod
    def update(self, changes: Sequence[JobChange]) -> None:
        """Apply changes in their order, all or none. Durable on return if the store is.

        A change whose ``by`` is not the owner of the record, as another driver has adopted the job, is left out.

        Raises:
            UnknownIdError: no such job.
            UnstorableError: a value in a change is of a kind that this store cannot keep.
        """

    @abc.abstractmethod
    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        """Give the records of these jobs, in this order.

        Raises:
            UnknownIdError: no such job.
        """

    @abc.abstractmethod
    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        """Give the records that changed after revision ``since``, in the order of their last change.

        Returns:
            The records, and the revision to pass next time. The cost is in proportion to what changed.

        Raises:
            UnknownIdError: no such search.
        """

    @abc.abstractmethod
    def put_value(self, search_id: str, key: str, value: Any) -> None:
        """Keep a value of the search."""

    @abc.abstractmethod
    def get_value(self, search_id: str, key: str) -> Any:
        """Give a value of the search.

        Raises:
            KeyError: no such search or value.
        """

    # -- drivers that come and go: each holds a lease for as long as it lives ------------------------------------------

    @abc.abstractmethod
    def renew(self, owner: str, seconds: float) -> None:
        """Say that this owner of jobs will be alive for so many seconds (infinity: until it says otherwise; 0: not)."""

    @abc.abstractmethod
    def owners(self) -> set[str]:
        """Give the owners whose lease has not run out."""

    @abc.abstractmethod
    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        """Give jobs to a new owner, each unless it has changed since that revision; READY, without output or error.

        Args:
            revisions: of the records, by the ids of the jobs, as they were last seen.
            owner: who runs them from now on. A job that was RUNNING has one attempt more behind it.

        Returns:
            The ids of the jobs that were adopted.

        Raises:
            UnknownIdError: no such job.
        """

    # -- new jobs that will have ended in a moment: a store may save the writing of them on their own ------------------

    def insert_soon(self, search_id: str, records: Sequence[JobRecord]) -> None:
        """Do as :meth:`insert`, but durable only when the next :meth:`update`, or :meth:`flush`, has returned.

        Other processes may not see the jobs before; in this one they are there. A failure may come late, with
        ``update`` or ``flush``; no later change of these jobs is taken then.
        """
        self.insert(search_id, records)

    def flush(self) -> None:  # noqa: B027 - a store whose insert_soon is durable has nothing to implement
        """Make durable what :meth:`insert_soon` left."""

    # -- what an evaluator does with many jobs at once: a store may do it at a lower cost ------------------------------

    def insert_jobs(self, search_id: str, jobs: NewJobs) -> list[str]:
        """Do as :meth:`insert` with the records of these; return their ids."""
        records = jobs.records()
        self.insert(search_id, records)
        return [record.id for record in records]

    def end_jobs(self, ends: JobEnds) -> None:
        """Do as :meth:`update` with the changes of these."""
        self.update(ends.changes())

    # -- connection: stores that need none are always connected --------------------------------------------------------

    def connect(self) -> Self:
        """Connect to the store, where that means anything."""
        return self

    def is_connected(self) -> bool:
        """Whether the store can be used."""
        return True

    def close(self) -> None:  # noqa: B027 - a store that holds neither has nothing to implement
        """Let go of files and connections, where there are any. What is asked next takes them up again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the named methods ---------------------------------------------------------------------------------------------

    def create_new_search(self) -> str:
        """Make a search; return its id."""
        return self.new_search()

    def create_new_job(self, search_id: str) -> str:
        """Make a job in the search; return its id."""
        record = JobRecord()
        self.insert(search_id, [record])
        return record.id

    def store_job(self, job_id: str, key: str, value: Any) -> None:
        """Store one part of a job.

        Args:
            job_id: the job.
            key: ``"in"``, ``"out"``, ``"status"``, ``"metadata"`` (merged), or a key of the caller's own.
            value: what to store.
        """
        match key:
            case "in":
                self.store_job_in(job_id, **value)
            case "out":
                self.store_job_out(job_id, value)
            case "status":
                self.store_job_status(job_id, value)
            case "metadata":
                self.update([JobChange(job_id, metadata=dict(value))])
            case "intermediate":
                raise BadValueError("intermediate results are appended one by one, by store_job_intermediate")
            case _:
                self.update([JobChange(job_id, extra={key: value})])

    def store_job_in(
        self, job_id: str, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None
    ) -> None:
        """Store the arguments of a job."""
        self.update([JobChange(job_id, args=args, kwargs=kwargs)])

    def store_job_out(self, job_id: str, value: Any) -> None:
        """Store the output of a job."""
        self.update([JobChange(job_id, out=value)])

    def store_job_metadata(self, job_id: str, key: str, value: Any) -> None:
        """Store one value beside the output of a job."""
        self.update([JobChange(job_id, metadata={key: value})])

    def store_job_status(self, job_id: str, job_status: int) -> None:
        """Store the status of a job, as an int."""
        self.update([JobChange(job_id, status=int(job_status))])

    def store_job_intermediate(self, job_id: str, budget: float, objective: Any) -> None:
        """Append an intermediate result of a job."""
        self.update([JobChange(job_id, intermediate=(budget, objective))])

    def store_search_value(self, search_id: str, key: str, value: Any) -> None:
        """Keep a value of the search."""
        self.put_value(search_id, key, value)

    def load_search_value(self, search_id: str, key: str) -> Any:
        """Give a value of the search; KeyError when there is none."""
        return self.get_value(search_id, key)

    def load_all_search_ids(self) -> list[str]:
        """Give the ids of all searches."""
        return self.search_ids()

    def load_all_job_ids(self, search_id: str) -> list[str]:
        """Give the ids of all jobs of the search, in the order they were made."""
        return [record.id for record in self._by_number(search_id)]

    def load_job(self, job_id: str) -> dict[str, Any]:
        """Give a job as ``{"status", "in": {"args", "kwargs"}, "out", "metadata", "intermediate": {…}}``."""
        return self.get([job_id])[0].as_dict()

    def load_jobs(self, job_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Give several jobs: ``{job id: as load_job}``."""
        return {record.id: record.as_dict() for record in self.get(job_ids)}

    def load_search(self, search_id: str) -> dict[str, dict[str, Any]]:
        """Give all jobs of the search: ``{job number as a string: as load_job}``."""
        return {record.id.rpartition(".")[2]: record.as_dict() for record in self._by_number(search_id)}

    def load_job_status(self, job_id: str) -> int:
        """Give the status of a job, as an int."""
        return self.get([job_id])[0].status

    def load_metadata_from_all_jobs(self, search_id: str, key: str) -> list[Any]:
        """Give this metadata value of every job that has it; None is dropped, 0 and False are not."""
        values = ((record.metadata or {}).get(key) for record in self._by_number(search_id))
        return [value for value in values if value is not None]

    def load_out_from_all_jobs(self, search_id: str) -> list[Any]:
        """Give the output of every job that has one; None is dropped, 0 and False are not."""
        return [record.out for record in self._by_number(search_id) if record.out is not None]

    def _by_number(self, search_id: str) -> list[JobRecord]:
        records, _ = self.scan(search_id)
        return sorted(records, key=lambda record: int(record.id.rpartition(".")[2]))
