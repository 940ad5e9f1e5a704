"""From dicts of arguments to jobs at work: counted, numbered, recorded, and given to the engine."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from paraval.checks import Args
from paraval.engine.collector import collector_at_rest, those_that_stayed_may_go
from paraval.engine.handover import Handover
from paraval.engine.ledger import Ledger
from paraval.engine.life.lifecycle import Lifecycle
from paraval.engine.notify import Notifier
from paraval.engine.running.following import take_over
from paraval.errors import MaximumJobsSpawnReached, ParavalError, StorageError, UsageError
from paraval.job import OURS, Job, JobContext, JobStatus, make_jobs
from paraval.outcome import Outcome, error_from_exception
from paraval.storage import JobChange, JobRecord, Storage
from paraval.storage.records import NewJobs
from paraval.storage.writer import Writer, patiently
from paraval.submission import Notes, Submission

if TYPE_CHECKING:
    from paraval.engine.known.answers import Known
    from paraval.engine.known.recall import Recall

__all__ = ["Intake"]

_CLOSE_S: Final = 2.0
"""How long a close waits for the storage."""
_ENOUGH: Final = 10
"""With fewer jobs, what they would share costs more than it spares."""
_MANY: Final = 1_000
"""So many jobs are made without looking for garbage meanwhile: all of them stay."""


@dataclass(slots=True)
class _New:
    """Jobs that are being submitted, and what is known of some of them already."""

    jobs: list[Job] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    known: Sequence[Known] = ()


class _Launch:
    """How far a launch has come: whatever interrupts it, Ctrl-C too, it is undone, or done.

    Attributes:
        counted: how many jobs ``num_submitted`` has in it.
        new: the jobs that the ledger expects, or is about to.
        is_expected: whether it does.
        is_listed: whether they are in ``jobs``.
        handover: of the jobs to the engine.
    """

    def __init__(self, private: Callable[[], object] | None) -> None:
        self.private = private
        self.counted = 0
        self.new = _New()
        self.is_expected = False
        self.is_listed = False
        self.handover = Handover()


class Intake:
    """Makes jobs. Usable from any thread.

    Args:
        storage: where they are recorded.
        writer: the way to a storage that may be slow, or None.
        search_id: the search that they belong to.
        owner: whose they are.
        function: what they run.
        function_name: its name in the storage.
        job_class: what they are made of.
        context: what surrounds them.
        clock: seconds since the evaluator was created.
        recall: what the storage knows of configurations already, or None: each is a job to run.
        ledger: it expects them.
        notifier: callbacks hear of them.
        life: the way to the engine.

    Attributes:
        jobs: every job that was submitted, in order; private ones excepted.
        num_submitted: how many jobs were submitted.
        most: how many may be, or None.
    """

    def __init__(
        self,
        *,
        storage: Storage,
        writer: Writer | None,
        search_id: str,
        owner: str,
        function: Callable[..., Any],
        function_name: str,
        job_class: type[Job],
        context: JobContext,
        clock: Callable[[], float],
        recall: Recall | None,
        ledger: Ledger,
        notifier: Notifier,
        life: Lifecycle,
    ) -> None:
        self._storage = storage
        self._writer = writer
        self._search_id = search_id
        self._owner = owner
        self._function = function
        self._function_name = function_name
        self.job_class = job_class
        self._context = context
        self._clock = clock
        self._recall = recall
        self._ledger = ledger
        self._notifier = notifier
        self._life = life
        self._counting = threading.Lock()
        self._announcing: dict[int, int] = {}  # how many jobs, by threads
        self.jobs: list[Job] = []
        self.num_submitted = 0
        self.most: int | None = None
        self._holds = False
        self._limit: int | None = None

    def limit(self, most: int | None, since: int) -> None:
        """Allow so many jobs (None: any number), beyond the ``since`` first."""
        self.most = None if most is None else most + since
        self._limit = most

    def close(self) -> None:
        """Have all written, and say that the owner of the jobs is gone; another launch says that it is back."""
        those_that_stayed_may_go()
        if self._writer is not None:
            self._writer.close(_CLOSE_S)
        elif self._holds:
            self._holds = False
            self._storage.renew(self._owner, 0)

    @property
    def is_slow(self) -> bool:
        """Whether a launch may wait for a disk or a network."""
        return self._writer is not None

    def launch(self, configurations: Sequence[Args], private: Callable[[], object] | None = None) -> list[Job]:
        """Make jobs, record them, and give them to the engine. The ledger has room for them.

        Args:
            configurations: one for each job.
            private: told when one ends, and nobody else is; None: they are for whoever gathers.

        Raises:
            MaximumJobsSpawnReached: the limit was met; the jobs that fitted under it were launched.
            StorageError: they could not be recorded, and none was launched.
        """
        wanted = len(configurations)
        launch = _Launch(private)
        try:
            with self._counting:
                limit = self.most
                count = wanted if limit is None else max(0, min(wanted, limit - self.num_submitted))
                self.num_submitted += count
                launch.counted = count
            if count:
                self._launch_all(configurations[:count], launch)
        except BaseException as exc:
            if launch.handover.call_off():  # else the engine has them by now
                self._undo(launch, exc)
                self._ledger.release(wanted)
            elif private is None and not launch.is_listed:
                self.jobs += launch.new.jobs
            raise
        if count < wanted:
            self._ledger.release(wanted - count)
            raise MaximumJobsSpawnReached(f"the maximum of {self._limit} jobs was reached")
        return launch.new.jobs

    def _launch_all(self, configurations: Sequence[Args], launch: _Launch) -> None:
        count = len(configurations)
        private = launch.private
        if count > _MANY:
            with collector_at_rest(count):
                new = self._make(configurations, is_private=private is not None)
        else:
            new = self._make(configurations, is_private=private is not None)
        launch.new = new
        jobs = new.jobs
        self._ledger.expect(jobs, self._clock(), private)
        launch.is_expected = True
        if self._notifier.callbacks:
            self._announce(jobs, 0 if private is not None else len(jobs))
        self._life.submit(jobs, new.outcomes, new.sources, launch.handover)
        if private is None:
            self.jobs += jobs
            launch.is_listed = True

    def _undo(self, launch: _Launch, exc: BaseException) -> None:
        with self._counting:
            self.num_submitted -= launch.counted
        jobs, known = launch.new.jobs, launch.new.known
        if launch.is_expected:
            self._ledger.forget(jobs)
        if launch.is_listed:
            gone = set(map(id, jobs))
            self.jobs[:] = [job for job in self.jobs if id(job) not in gone]
        if jobs:
            self._call_off([job.id for at, job in enumerate(jobs) if not known or known[at].record is None], exc)
            if self._recall is not None:
                self._recall.give_back(known, is_private=launch.private is not None)

    def _announce(self, jobs: Sequence[Job], public: int) -> None:
        here = threading.get_ident()
        before = self._announcing.get(here, 0)
        self._announcing[here] = before + public
        try:
            for job in jobs:
                self._notifier.call("on_launch", job)
        finally:
            self._announcing[here] = before
            if not before:
                del self._announcing[here]

    def refuse_in_on_launch(self, size: int | None) -> None:
        """Raise UsageError where a gather would wait for jobs that this thread is about to submit.

        Args:
            size: how many jobs it waits for; None: for all.
        """
        announced = self._announcing.get(threading.get_ident(), 0)
        ledger = self._ledger
        if announced and (size is None or ledger.ungathered + ledger.in_flight - announced < size):
            raise UsageError("gather() in on_launch() would wait for jobs that are submitted when that has returned")

    def _make(self, configurations: Sequence[Args], *, is_private: bool) -> _New:
        if self._writer is not None:
            self._writer.hold(self._owner)
        elif not self._holds:
            self._storage.renew(self._owner, math.inf)
            self._holds = True
        recall = self._recall
        if recall is not None:
            known = patiently(lambda: recall.look_up(configurations, self.job_class, is_private=is_private))
            try:
                return self._make_known(configurations, known, is_private=is_private)
            except BaseException:
                recall.give_back(known, is_private=is_private)
                raise
        return _New(self._make_jobs(configurations, is_private=is_private))

    def _make_jobs(self, configurations: Sequence[Args], *, is_private: bool) -> list[Job]:
        make, storage, context, function = self.job_class, self._storage, self._context, self._function
        name, owner, now = self._function_name, self._owner, self._clock()
        all_args = list(map(dict, configurations))
        if len(all_args) >= _ENOUGH and make in OURS and self._writer is None and self._recall is None:
            notes = Notes(now, len(all_args))
            job_ids = self._insert(NewJobs(all_args, notes, name, owner, is_private))
            return make_jobs(make, all_args, Submission(job_ids, function, storage, context, now, notes))
        all_metadata = [{"timestamp_submit": now} for _ in configurations]
        job_ids = self._insert(NewJobs(all_args, all_metadata, name, owner, is_private))
        jobs = []
        try:
            for job_id, args, metadata in zip(job_ids, all_args, all_metadata, strict=True):
                job = make(job_id, args, function, storage)
                job.context = context
                job._submitted = now
                job.metadata = metadata
                jobs.append(job)
        except BaseException as exc:  # a class of the user's
            self._call_off(job_ids, exc)
            raise
        return jobs

    def _call_off(self, job_ids: Sequence[str], exc: BaseException) -> None:
        """Record of jobs that there will be none: who resumes the search would wait for them."""
        error = error_from_exception(exc)._replace(kind="cancelled")
        cancelled = JobStatus.CANCELLED.value
        with contextlib.suppress(Exception):  # the storage may be what failed; and this is not what is to be told
            self._storage.update([JobChange(job_id, status=cancelled, error=error) for job_id in job_ids])

    def _insert(self, jobs: NewJobs) -> Sequence[str]:
        try:
            if self._writer is None and len(jobs.args) > 1:  # which costs a job that comes alone more
                return self._storage.insert_jobs(self._search_id, jobs)
            records = jobs.records()
            if self._writer is None:
                self._storage.insert(self._search_id, records)
            else:
                # Where the storage is not to be called from where the jobs run, they run here.
                is_here = self._context.record is not None
                self._writer.insert(self._search_id, records, soon=is_here)
        except ParavalError:
            raise
        except Exception as exc:  # a store may raise anything
            what = f"{type(exc).__name__}: {exc}"
            raise StorageError(f"the storage failed, so the jobs were not submitted: {what}") from exc
        return [record.id for record in records]

    def _make_known(self, configurations: Sequence[Args], known: Sequence[Known], *, is_private: bool) -> _New:
        """Make jobs: some under the ids of records that exist, some that will not be run."""
        missing = [index for index, one in enumerate(known) if one.record is None]
        known = list(known)
        by_index: dict[int, Job] = {}
        if missing and (recall := self._recall) is not None:
            lacking = [configurations[index] for index in missing]
            made = self._make_jobs(lacking, is_private=is_private)
            job_ids = [job.id for job in made]
            met = patiently(lambda: recall.meet_rivals(job_ids, lacking, self.job_class, is_private=is_private))
            for index, one in zip(missing, met, strict=True):
                if isinstance(one, int):
                    by_index[index] = made[one]
                else:
                    known[index] = one
        new = _New(known=known)
        for index, (configuration, one) in enumerate(zip(configurations, known, strict=True)):
            job = by_index.get(index) or self._make_again(configuration, one.record)
            if one.record is not None and one.outcome is None and one.source is None:
                job._is_adopted = True
            new.jobs.append(job)
            if one.outcome is not None:
                new.outcomes[job.id] = one.outcome
                if one.source is not None:
                    take_over(job, one.source, one.noted)
            elif one.twin is not None:
                new.sources[job.id] = new.jobs[one.twin].id
            elif one.source is not None:
                new.sources[job.id] = one.source
        return new

    def _make_again(self, configuration: Args, record: JobRecord | None) -> Job:
        job = self.job_class("" if record is None else record.id, dict(configuration), self._function, self._storage)
        job.context = self._context
        job._submitted = now = self._clock()
        job.metadata["timestamp_submit"] = now
        return job
