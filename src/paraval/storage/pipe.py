"""The driver's storage, as a job in a worker process sees it: every primitive is a call over the worker's socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from paraval.storage.base import Storage
from paraval.storage.records import JobChange, JobRecord

__all__ = ["PipeStorage"]


class PipeStorage(Storage):
    """Works with every store, whether or not that store could be reached from another process.

    Args:
        call: takes the name of a method and its arguments, and gives what it returns or raises what it raises.
    """

    def __init__(self, call: Callable[[str, tuple[Any, ...]], Any]) -> None:
        self._call = call

    def new_search(self) -> str:
        return str(self._call("new_search", ()))

    def search_ids(self) -> list[str]:
        return list(self._call("search_ids", ()))

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        for record, job_id in zip(records, self._call("insert", (search_id, list(records))), strict=True):
            record.id = job_id

    def update(self, changes: Sequence[JobChange]) -> None:
        self._call("update", (list(changes),))

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        return list(self._call("get", (list(job_ids),)))

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        records, revision = self._call("scan", (search_id, since))
        return records, revision

    def renew(self, owner: str, seconds: float) -> None:
        self._call("renew", (owner, seconds))

    def owners(self) -> set[str]:
        return set(self._call("owners", ()))

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        return set(self._call("adopt", (dict(revisions), owner)))

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        self._call("put_value", (search_id, key, value))

    def get_value(self, search_id: str, key: str) -> Any:
        return self._call("get_value", (search_id, key))
