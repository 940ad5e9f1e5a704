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
from paraval.engine.ledger import Booking, Ledger
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

__all__ = ["Intake", "Launch"]

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


class Launch:
    """How far a launch has come: whatever interrupts it, Ctrl-C too, it is undone, or done.

    Attributes:
        private: told when a job ends, and nobody else is; None: they are for whoever gathers.
        into: the list that the jobs are added to.
        booking: what the ledger has noted of them.
        counted: how many of them are in ``num_submitted``.
        stamp: when their records were about to be inserted, which is in their metadata; None: they were not.
        ids: of the records that were inserted and are no other launch's; None: it is not known yet.
        taken: records that stand for some of the jobs: the next submissions shall not meet them again.
        new: the jobs.
        is_listed: whether they are in ``into``.
        handover: of the jobs to the engine.
    """

    __slots__ = ("booking", "counted", "handover", "ids", "into", "is_listed", "new", "private", "stamp", "taken")

    def __init__(self, private: Callable[[], object] | None, into: list[Job], closes: int | None) -> None:
        self.private = private
        self.into = into
        self.booking = Booking()
        self.counted = 0
        self.stamp: float | None = None
        self.ids: Sequence[str] | None = None
        self.taken: list[JobRecord] = []
        self.new = _New()
        self.is_listed = False
        self.handover = Handover(closes)

    @property
    def is_private(self) -> bool:
        """Whether the jobs are somebody's own."""
        return self.private is not None


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

    def launch(
        self,
        configurations: Sequence[Args],
        most_pending: int | None = None,
        closes: int | None = None,
        *,
        private: Callable[[], object] | None = None,
        into: list[Job] | None = None,
    ) -> Launch:
        """Make jobs, record them, and give them to the engine: as many, from the first on, as there is room for.

        Args:
            configurations: one for each job.
            most_pending: how many jobs may be pending then; None: any number.
            closes: how often the evaluator may have been closed; None: however often.
            private: told when one ends, and nobody else is; None: they are for whoever gathers.
            into: the list that they are added to, also where this is interrupted when the engine has them; None:
                ``jobs``.

        Raises:
            MaximumJobsSpawnReached: the limit was met; the jobs that fitted under it were launched.
            StorageError: they could not be recorded, and none was launched.
            EvaluatorClosedError: somebody has closed the evaluator, or the loop is gone; likewise.
        """
        launch = Launch(private, self.jobs if into is None else into, closes)
        try:
            wanted = self._ledger.reserve(launch.booking, len(configurations), most_pending)
            with self._counting:
                limit = self.most
                count = wanted if limit is None else max(0, min(wanted, limit - self.num_submitted))
                self.num_submitted += count
                launch.counted = count
            if count:
                self._launch_all(configurations[:count], launch)
            if count < wanted:
                self._ledger.release(launch.booking, count)
        except BaseException as exc:
            if launch.handover.call_off():
                self._undo(launch, exc)
            else:  # the engine has them by now
                if not launch.is_listed:
                    launch.into += launch.new.jobs
                self._ledger.release(launch.booking, launch.counted)
            raise
        if count < wanted:
            raise MaximumJobsSpawnReached(f"the maximum of {self._limit} jobs was reached")
        return launch

    def _launch_all(self, configurations: Sequence[Args], launch: Launch) -> None:
        count = len(configurations)
        if count > _MANY:
            with collector_at_rest(count):
                self._make(configurations, launch)
        else:
            self._make(configurations, launch)
        new = launch.new
        jobs = new.jobs
        self._ledger.expect(launch.booking, jobs, self._clock(), launch.private)
        if self._notifier.callbacks:
            self._announce(jobs, 0 if launch.is_private else len(jobs))
        self._life.submit(jobs, new.outcomes, new.sources, launch.handover)
        launch.into += jobs
        launch.is_listed = True

    def _undo(self, launch: Launch, exc: BaseException) -> None:
        with self._counting:
            self.num_submitted -= launch.counted
        self._ledger.forget(launch.booking)
        if launch.is_listed:
            gone = set(map(id, launch.new.jobs))
            launch.into[:] = [job for job in launch.into if id(job) not in gone]
        if launch.stamp is not None:
            self._call_off(launch, launch.stamp, exc)
        if self._recall is not None:
            self._recall.give_back(launch.taken, is_private=launch.is_private)

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

    def _make(self, configurations: Sequence[Args], launch: Launch) -> None:
        if self._writer is not None:
            self._writer.hold(self._owner)
        elif not self._holds:
            self._storage.renew(self._owner, math.inf)
            self._holds = True
        recall = self._recall
        if recall is not None:
            taken, is_private = launch.taken, launch.is_private
            known = patiently(lambda: recall.look_up(configurations, self.job_class, taken, is_private=is_private))
            self._make_known(configurations, known, launch)
        else:
            launch.new = _New(self._make_jobs(configurations, launch))

    def _make_jobs(self, configurations: Sequence[Args], launch: Launch) -> list[Job]:
        make, storage, context, function = self.job_class, self._storage, self._context, self._function
        name, owner, now = self._function_name, self._owner, self._clock()
        all_args = list(map(dict, configurations))
        if len(all_args) >= _ENOUGH and make in OURS and self._writer is None and self._recall is None:
            notes = Notes(now, len(all_args))
            job_ids = self._insert(NewJobs(all_args, notes, name, owner, launch.is_private), now, launch)
            return make_jobs(make, all_args, Submission(job_ids, function, storage, context, now, notes))
        all_metadata = [{"timestamp_submit": now} for _ in configurations]
        job_ids = self._insert(NewJobs(all_args, all_metadata, name, owner, launch.is_private), now, launch)
        jobs = []
        for job_id, args, metadata in zip(job_ids, all_args, all_metadata, strict=True):
            job = make(job_id, args, function, storage)
            job.context = context
            job._submitted = now
            job.metadata = metadata
            jobs.append(job)
        return jobs

    def _call_off(self, launch: Launch, stamp: float, exc: BaseException) -> None:
        """Record of jobs that there will be none: who resumes the search would wait for them."""
        error = error_from_exception(exc)._replace(kind="cancelled")
        cancelled, owner = JobStatus.CANCELLED.value, self._owner
        with contextlib.suppress(Exception):  # the storage may be what failed; and this is not what is to be told
            job_ids = launch.ids
            if job_ids is None:
                job_ids = [] if isinstance(exc, ParavalError) else self._stamped(stamp)
            if job_ids:
                self._storage.update([JobChange(it, status=cancelled, error=error, by=owner) for it in job_ids])

    def _stamped(self, stamp: float) -> list[str]:
        """Look for what an insertion has left that was interrupted: nobody knows whether it came to its end."""
        records, _ = self._storage.scan(self._search_id)
        mine = (record for record in records if record.owner == self._owner and record.metadata)
        return [record.id for record in mine if (record.metadata or {}).get("timestamp_submit") == stamp]

    def _insert(self, jobs: NewJobs, stamp: float, launch: Launch) -> Sequence[str]:
        launch.stamp = stamp
        launch.ids = job_ids = self._insert_all(jobs)
        return job_ids

    def _insert_all(self, jobs: NewJobs) -> Sequence[str]:
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

    def _make_known(self, configurations: Sequence[Args], known: list[Known], launch: Launch) -> None:
        """Make jobs: some under the ids of records that exist, some that will not be run."""
        taken, is_private = launch.taken, launch.is_private
        missing = [index for index, one in enumerate(known) if one.record is None]
        by_index: dict[int, Job] = {}
        if missing and (recall := self._recall) is not None:
            lacking = [configurations[index] for index in missing]
            made = self._make_jobs(lacking, launch)
            job_ids = [job.id for job in made]
            met = patiently(lambda: recall.meet_rivals(job_ids, lacking, self.job_class, taken, is_private=is_private))
            for index, one in zip(missing, met, strict=True):
                if isinstance(one, int):
                    by_index[index] = made[one]
                else:
                    known[index] = one
            launch.ids = [made[one].id for one in met if isinstance(one, int)]
        new = _New()
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
        launch.new = new

    def _make_again(self, configuration: Args, record: JobRecord | None) -> Job:
        job = self.job_class("" if record is None else record.id, dict(configuration), self._function, self._storage)
        job.context = self._context
        job._submitted = now = self._clock()
        job.metadata["timestamp_submit"] = now
        return job
