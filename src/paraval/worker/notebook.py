"""The storage of a job that has no way to the driver while it runs: what it stores travels home with its outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from paraval.errors import StorageError
from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.records import JobChange, JobRecord

__all__ = ["Notebook"]


class Notebook(Storage):
    """Knows one job: its own.

    Args:
        job_id: the job.
        args: its arguments.

    Attributes:
        changes: what was stored of the job, in order.
        values: what was stored of the search: ``(search id, key, value)``, in order.
    """

    def __init__(self, job_id: str, args: dict[str, Any]) -> None:
        self._record = JobRecord(job_id, status=1, args=(args,), metadata={}, revision=1)
        self._search_id = job_id.rpartition(".")[0]
        self.changes: list[JobChange] = []
        self.values: list[tuple[str, str, Any]] = []

    def update(self, changes: Sequence[JobChange]) -> None:
        for change in changes:
            self._look_up(change.id)
        for change in changes:
            change.apply_to(self._record)
            self._record.revision += 1
        self.changes += changes

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        return [self._look_up(job_id) for job_id in job_ids]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        is_news = search_id == self._search_id and self._record.revision > since
        return [self._record] if is_news else [], self._record.revision

    def search_ids(self) -> list[str]:
        return [self._search_id]

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        self.values.append((search_id, key, value))

    def get_value(self, search_id: str, key: str) -> Any:
        for known_search, known_key, value in reversed(self.values):
            if (known_search, known_key) == (search_id, key):
                return value
        raise UnknownIdError(f"a job in an executor knows what it stored itself, and not {key!r} of {search_id!r}")

    def new_search(self) -> str:
        self._refuse("make a search")

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:  # noqa: ARG002 - the interface's
        self._refuse("make jobs")

    def renew(self, owner: str, seconds: float) -> None:  # noqa: ARG002 - the interface's
        self._refuse("own jobs")

    def owners(self) -> set[str]:
        return set()

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:  # noqa: ARG002 - the interface's
        self._refuse("own jobs")

    def _look_up(self, job_id: str) -> JobRecord:
        if job_id != self._record.id:
            raise UnknownIdError(f"a job in an executor knows its own record ({self._record.id}), and not {job_id!r}")
        return self._record

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise StorageError(f"a job in an executor cannot {what}: it has no way to the storage while it runs")
