"""Jobs that are not run here, as another is the same: they get what that one gets, or are run after all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import anyio

from paraval.engine.known.owners import living_owners
from paraval.engine.known.recall import ended_too_often, final_outcome
from paraval.engine.running.settling import Settling
from paraval.job import HPOJob, Job, JobStatus
from paraval.loops import Loop, call_in_thread
from paraval.outcome import Outcome, is_failure
from paraval.storage import JobRecord, Storage
from paraval.storage.writer import patiently

__all__ = ["Following"]

T = TypeVar("T")

_LOOK_S: Final = 0.2
"""How often to look what has become of the jobs of other drivers."""


class Following:
    """On the engine's loop.

    Args:
        settling: where the jobs are settled.
        run: queues jobs that must be run after all.
        fail: told when the storage fails.
        max_attempts: how often a job may be run again that was running when its driver ended.
        storage: where the jobs of other drivers are.
        owner: who takes over what a driver that has gone leaves.
        clock: seconds since the evaluator was created.
        loop: the engine's.
    """

    def __init__(
        self,
        settling: Settling,
        run: Callable[[list[Job]], object],
        fail: Callable[[Exception], object],
        storage: Storage,
        owner: str,
        clock: Callable[[], float],
        loop: Loop,
        *,
        max_attempts: int,
    ) -> None:
        self._settling = settling
        self._run = run
        self._fail = fail
        self._max_attempts = max_attempts
        self._storage = storage
        self._owner = owner
        self._clock = clock
        self._loop = loop
        self._followers: dict[str, list[Job]] = {}
        self._wanted = loop.event()

    def add(self, job: Job, source: str) -> None:
        """Have an open job follow another: one that is open here, or one in the storage."""
        self._followers.setdefault(source, []).append(job)
        self._settling.on_settled = self._settled
        self._wanted.set()

    def _settled(self, job: Job, outcome: Outcome) -> None:
        self._resolve(job.id, outcome, has_failed=job.failed)

    async def watch(self) -> None:
        """Look, for as long as the engine runs, what becomes of the jobs of other drivers."""
        while True:
            self._wanted = self._loop.event()
            if not self._followers:
                await self._wanted.wait()
            await anyio.sleep(_LOOK_S)
            foreign = [source for source in self._followers if self._is_foreign(source)]
            if foreign:
                try:
                    await self._look(foreign)
                except Exception as exc:  # noqa: BLE001 - a store may raise anything; the next look may do better
                    self._fail(exc)

    def _is_foreign(self, source: str) -> bool:
        return source not in self._settling.open or any(job.id == source for job in self._followers[source])

    async def _look(self, sources: list[str]) -> None:
        records = await self._call(lambda: self._storage.get(sources))
        left = []
        for record in records:
            outcome = final_outcome(record)
            if outcome is not None:
                self._resolve(record.id, outcome, record)
            else:
                left.append(record)
        if left:
            living = await self._call(lambda: living_owners(self._storage))
            stopped = JobStatus.CANCELLED.value  # with its evaluator, which may live on
            await self._take_over([it for it in left if it.owner not in living or it.status == stopped])

    async def _take_over(self, records: Sequence[JobRecord]) -> None:
        orphans = {record.id: record.revision for record in records}
        mine = {source: rev for source, rev in orphans.items() if self._follows_itself(source)}
        adopted = await self._call(lambda: self._storage.adopt(mine, self._owner)) if mine else set()
        for record in records:
            if record.id in adopted:
                self._release(record.id, ended_too_often(record, self._max_attempts))
            elif record.id not in mine:
                self._release(record.id)

    def _follows_itself(self, source: str) -> bool:
        return any(job.id == source for job in self._followers.get(source, ()))

    async def _call(self, function: Callable[[], T]) -> T:
        if self._storage.by_reference:
            return function()
        return await call_in_thread(lambda: patiently(function), abandon_on_cancel=True)

    def _resolve(
        self, source: str, outcome: Outcome, record: JobRecord | None = None, *, has_failed: bool = False
    ) -> None:
        """Give followers what their source got. One that only joined it does not share its failure: it is run."""
        jobs = [job for job in self._followers.pop(source, ()) if job.id in self._settling.open]
        now = self._clock()
        ended = []
        for job in jobs:
            if job.id != source and (
                has_failed
                or outcome.error is not None
                or outcome.cancelled
                or (isinstance(job, HPOJob) and is_failure(outcome.value))
            ):
                self._run([job])
                continue
            take_over(job, source, record)
            ended.append((job, outcome if record is None else record.outcome_for(type(job)), now))
        self._settling.settle(ended)

    def _release(self, source: str, outcome: Outcome | None = None) -> None:
        """Have followers run, but the very job itself where it has an end already."""
        jobs = [job for job in self._followers.pop(source, ()) if job.id in self._settling.open]
        if outcome is not None:
            self._settling.settle([(job, outcome, self._clock()) for job in jobs if job.id == source])
            jobs = [job for job in jobs if job.id != source]
        for job in jobs:
            job._is_adopted = job.id == source
        if jobs:
            self._run(jobs)


def take_over(job: Job, source: str, record: JobRecord | None) -> None:
    """Mark a job that is not run as what it is, with what was noted beside the result that it is given."""
    if job.id == source:
        job.restored = True
    else:
        job.reused = job.metadata["reused"] = source
    for key, value in ((record and record.metadata) or {}).items():
        if job.restored or not key.startswith("timestamp_"):
            job.metadata[key] = value
