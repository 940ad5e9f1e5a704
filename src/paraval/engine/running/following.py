"""Jobs that are not run here, as another is the same: they get what that one gets, or are run after all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
_FEW: Final = 100
"""So many records are read at each look. For more, whatever has changed in their searches is."""


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
        self._themselves: set[str] = set()
        """Sources that are followed as themselves: the very job is open here, and another driver has it."""
        self._heirs: dict[str, str] = {}
        """Sources of which nothing came; and who, of those that had joined one, is run in its place."""
        self._seen: dict[str, JobRecord] = {}
        """The jobs of other drivers as they were read last, while they are followed and have no end."""
        self._revisions: dict[str, int] = {}
        """Up to which revision of a search the records in ``_seen`` are known to be what they are."""
        self._wanted = loop.event()

    def add(self, job: Job, source: str) -> None:
        """Have an open job follow another: one that is open here, or one in the storage."""
        if job.id == source:
            self._themselves.add(source)
        else:
            while source in self._heirs:
                source = self._heirs[source]
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
            here, themselves = self._settling.open, self._themselves
            foreign = [it for it in self._followers if it not in here or it in themselves]
            if foreign:
                try:
                    await self._look(foreign)
                except Exception as exc:  # noqa: BLE001 - a store may raise anything; the next look may do better
                    self._fail(exc)

    def _is_foreign(self, source: str) -> bool:
        return source not in self._settling.open or source in self._themselves

    async def _look(self, sources: list[str]) -> None:
        await self._read(sources)
        left = [self._seen[source] for source in sources if source in self._seen]
        if left:
            living = await self._call(lambda: living_owners(self._storage))
            stopped = JobStatus.CANCELLED.value  # with its evaluator, which may live on
            me, themselves = self._owner, self._themselves
            # What is ours though its job is not was adopted, and the storage's answer was lost. Of another job that was
            # ours, and ended, the end may be on its way to the storage.
            await self._take_over(
                [
                    it
                    for it in left
                    if it.owner not in living or it.status == stopped or (it.owner == me and it.id in themselves)
                ]
            )

    async def _read(self, sources: list[str]) -> None:
        """Take in what may have changed of these jobs since the last time."""
        # A scan gives all that happens in a search, also here; so it is for those who follow much of it.
        if len(sources) <= _FEW:
            self._revisions.clear()
            self._note(await self._call(lambda: self._storage.get(sources)))
            return
        new = [source for source in sources if source not in self._seen]
        if new:
            self._note(await self._call(lambda: self._storage.get(new)))
        if new or not self._revisions:
            self._revisions = {key: self._revisions.get(key, since) for key, since in self._starts().items()}
        for search_id, since in list(self._revisions.items()):
            changed, revision = await self._call(partial(self._storage.scan, search_id, since))
            self._note(changed)
            self._revisions[search_id] = revision

    def _starts(self) -> dict[str, int]:
        """Give for each search a revision since which nothing was missed: a job that changes gets a higher one."""
        starts: dict[str, int] = {}
        for job_id, record in self._seen.items():
            search_id = job_id.rpartition(".")[0]
            starts[search_id] = min(record.revision, starts.get(search_id, record.revision))
        return starts

    def _note(self, records: Sequence[JobRecord]) -> None:
        for record in records:
            if record.id in self._followers and self._is_foreign(record.id):
                outcome = final_outcome(record)
                if outcome is None:
                    self._seen[record.id] = record
                else:
                    self._resolve(record.id, outcome, record)

    async def _take_over(self, records: Sequence[JobRecord]) -> None:
        orphans = {record.id: record.revision for record in records}
        mine = {source: rev for source, rev in orphans.items() if source in self._themselves}
        adopted = await self._call(lambda: self._storage.adopt(mine, self._owner)) if mine else set()
        for record in records:
            if record.id in adopted:
                self._release(record.id, ended_too_often(record, self._max_attempts))
            elif record.id not in mine:
                self._release(record.id)

    async def _call(self, function: Callable[[], T]) -> T:
        if self._storage.by_reference:
            return function()
        return await call_in_thread(lambda: patiently(function), abandon_on_cancel=True)

    def _resolve(
        self, source: str, outcome: Outcome, record: JobRecord | None = None, *, has_failed: bool = False
    ) -> None:
        """Give followers what their source got. Those that only joined it do not share its failure: one is run."""
        now = self._clock()
        ended, again = [], []
        for job in self._take(source):
            if job.id != source and (
                has_failed
                or outcome.error is not None
                or outcome.cancelled
                or (isinstance(job, HPOJob) and is_failure(outcome.value))
            ):
                again.append(job)
                continue
            take_over(job, source, record)
            ended.append((job, outcome if record is None else record.outcome_for(type(job)), now))
        self._settling.settle(ended)
        self._run_first(source, again)

    def _release(self, source: str, outcome: Outcome | None = None) -> None:
        """Have followers run, but the very job itself where it has an end already."""
        jobs = self._take(source)
        if outcome is not None:
            self._settling.settle([(job, outcome, self._clock()) for job in jobs if job.id == source])
        itself = [job for job in jobs if job.id == source and outcome is None]
        self._run_first(source, itself + [job for job in jobs if job.id != source])

    def _take(self, source: str) -> list[Job]:
        """Take the followers of a job that are still open."""
        self._seen.pop(source, None)
        self._themselves.discard(source)
        return [job for job in self._followers.pop(source, ()) if job.id in self._settling.open]

    def _run_first(self, source: str, jobs: list[Job]) -> None:
        """Have the first of jobs that are the same run, and the others follow it: one result is enough for all."""
        if not jobs:
            return
        first, *others = jobs
        first._is_adopted = first.id == source
        if first.id != source:
            self._heirs[source] = first.id  # for whoever joins the source later: the storage has it as open
        if others:
            self._followers.setdefault(first.id, []).extend(others)
        self._run([first])


def take_over(job: Job, source: str, record: JobRecord | None) -> None:
    """Mark a job that is not run as what it is, with what was noted beside the result that it is given."""
    if job.id == source:
        job.restored = True
    else:
        job.reused = job.metadata["reused"] = source
    for key, value in ((record and record.metadata) or {}).items():
        if job.restored or not key.startswith("timestamp_"):
            job.metadata[key] = value
