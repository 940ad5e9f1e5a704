"""A storage that keeps nothing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.records import JobChange, JobRecord

__all__ = ["NullStorage"]


class NullStorage(Storage):
    """Keeps nothing, and everything works: ids are given out, what is put is dropped, what is asked for is blank."""

    by_reference = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches = itertools.count()
        self._numbers: dict[str, int] = {}

    def new_search(self) -> str:
        return str(next(self._searches))

    def search_ids(self) -> list[str]:
        return []

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        with self._lock:
            first = self._numbers.get(search_id, 0)
            self._numbers[search_id] = first + len(records)
        for number, record in enumerate(records, first):
            record.id = f"{search_id}.{number}"

    def update(self, changes: Sequence[JobChange]) -> None:
        pass

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        return [JobRecord(job_id) for job_id in job_ids]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:  # noqa: ARG002 - the interface's
        return [], since

    def renew(self, owner: str, seconds: float) -> None:
        pass

    def owners(self) -> set[str]:
        return set()

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:  # noqa: ARG002 - the interface's
        return set(revisions)

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a lock cannot be sent, and there is nothing else to send

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc] # a copy is a new one

    def get_value(self, search_id: str, key: str) -> Any:
        raise UnknownIdError(f"NullStorage keeps nothing, so search {search_id!r} has no value {key!r}")
