"""A storage in this process's memory: the default."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from paraval.storage.base import Storage, UnknownIdError
from paraval.storage.memory.search import Search
from paraval.storage.records import JobChange, JobEnds, JobRecord, NewJobs, adopt

__all__ = ["MemoryStorage"]


class MemoryStorage(Storage):
    """Keeps everything in the memory of this process; evaluators of the same process may share it.

    What it is given is kept by reference, and what it gives is a copy of the record around the same objects. So what a
    job notes in its metadata is in the record at once; but what is stored as metadata does not show in the job.
    """

    by_reference = True

    def __init__(self) -> None:
        self._lock = threading.RLock()  # what the collector finalizes in the middle of a call may use the storage
        self._searches: dict[str, Search] = {}
        self._leases: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The copy in another process would be a different store under the same name: it starts empty, as a lock
        # cannot be sent and records must not silently diverge.
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc] # the state is empty: a copy is a new store

    def new_search(self) -> str:
        with self._lock:
            search_id = str(len(self._searches))
            self._searches[search_id] = Search()
            return search_id

    def search_ids(self) -> list[str]:
        with self._lock:
            return list(self._searches)

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        with self._lock:
            self._search(search_id).add(search_id, records)

    def update(self, changes: Sequence[JobChange]) -> None:
        if not changes:
            return
        with self._lock:
            first = changes[0]
            search = self._search_of(first.id)
            if len(changes) == 1:  # what is made for many costs a job that comes alone twice as much
                record = search.record(first.id)
                if record is None:
                    raise _unknown(first.id)
                search.apply(changes, (record,))
                return
            records = [search.record(change.id) for change in changes]
            if all(records):  # all of one search, as nearly always
                search.apply(changes, cast("list[JobRecord]", records))
                return
            found = [self._find(change.id) for change in changes]
            for change, (search, record) in zip(changes, found, strict=True):
                search.apply((change,), (record,))

    # Both go past insert and update: not where somebody has put something else in their places.

    def insert_jobs(self, search_id: str, jobs: NewJobs) -> list[str]:
        if not self._has_its_own_ways:
            return super().insert_jobs(search_id, jobs)
        with self._lock:
            return self._search(search_id).add_jobs(search_id, jobs)

    def end_jobs(self, ends: JobEnds) -> None:
        if self._has_its_own_ways and ends.ids:
            with self._lock:
                if self._search_of(ends.ids[0]).end_jobs(ends):
                    return
        if ends.metadata is None:
            with self._lock:
                ends = ends._replace(metadata=[self._find(job_id)[1].metadata or {} for job_id in ends.ids])
        super().end_jobs(ends)

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        with self._lock:
            return [self._copy(job_id) for job_id in job_ids]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        with self._lock:
            search = self._search(search_id)
            revision = search.revision  # before, so that what a finalizer changes meanwhile is given next time
            copies = map(search.copy, search.changed_since(since))
            return cast("list[JobRecord]", list(copies)), revision

    def renew(self, owner: str, seconds: float) -> None:
        with self._lock:
            self._leases[owner] = time.monotonic() + seconds

    def owners(self) -> set[str]:
        with self._lock:
            now = time.monotonic()
            self._leases = {owner: end for owner, end in self._leases.items() if end > now}
            return set(self._leases)

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        with self._lock:
            found = [(*self._find(job_id), revision) for job_id, revision in revisions.items()]
            adopted = [(search, record) for search, record, revision in found if record.revision == revision]
            for search, record in adopted:
                adopt(record, owner)
                search.touch(record)
            return {record.id for _, record in adopted}

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        with self._lock:
            self._search(search_id).values[key] = value

    def get_value(self, search_id: str, key: str) -> Any:
        with self._lock:
            values = self._search(search_id).values
            if key not in values:
                raise UnknownIdError(f"no value {key!r} in search {search_id!r}")
            return values[key]

    @property
    def keeps_dicts(self) -> bool:  # type: ignore[override] # what is derived from this may be another kind of store
        """Whether it does; not where somebody has put something else in the place of anything that writes."""
        ways = tuple(getattr(way, "__func__", None) for way in (self.insert_jobs, self.end_jobs))
        return self._has_its_own_ways and ways == _OWN_WAYS_FOR_MANY

    @property
    def _has_its_own_ways(self) -> bool:
        return (getattr(self.insert, "__func__", None), getattr(self.update, "__func__", None)) == _OWN_WAYS

    def _search(self, search_id: str) -> Search:
        search = self._searches.get(search_id)
        if search is None:
            raise UnknownIdError(f"no search {search_id!r} in this storage; it has {list(self._searches) or 'none'}")
        return search

    def _search_of(self, job_id: str) -> Search:
        search_id, dot, _ = job_id.rpartition(".")
        if not dot:
            raise UnknownIdError(f"{job_id!r} is no job id: it should look like '0.12' (search, dot, number)")
        return self._search(search_id)

    def _find(self, job_id: str) -> tuple[Search, JobRecord]:
        search = self._search_of(job_id)
        record = search.record(job_id)
        if record is None:
            raise _unknown(job_id)
        return search, record

    def _copy(self, job_id: str) -> JobRecord:
        copied = self._search_of(job_id).copy(job_id)
        if copied is None:
            raise _unknown(job_id)
        return copied


_OWN_WAYS: Final = (MemoryStorage.insert, MemoryStorage.update)
_OWN_WAYS_FOR_MANY: Final = (MemoryStorage.insert_jobs, MemoryStorage.end_jobs)


def _unknown(job_id: str) -> UnknownIdError:
    return UnknownIdError(f"no job {job_id!r} in this storage")
