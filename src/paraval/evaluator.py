"""The public face: submit, gather, evaluate, close, each in a synchronous and an asynchronous form."""

from __future__ import annotations

import abc
import atexit
import contextlib
import functools
import math
import sys
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self

import anyio
import anyio.lowlevel

from paraval import checks, registry
from paraval.backends.base import Backend, Cancellation, RunSpec
from paraval.checks import Args
from paraval.engine import (
    Engine,
    EngineSettings,
    Gate,
    Gathered,
    Intake,
    Launch,
    Ledger,
    Lifecycle,
    Notifier,
    Others,
    Statistics,
)
from paraval.engine.known.owners import new_owner
from paraval.engine.ledger import until_set, waker
from paraval.engine.running.batching import Batching, BatchSizer
from paraval.errors import (
    BadValueError,
    EvaluatorClosedError,
    JobFailedError,
    JobsFailedError,
    ParavalError,
    UsageError,
    WrongTypeError,
)
from paraval.functions import name_of
from paraval.job import HPOJob, Job, JobContext
from paraval.loops import Event, Loop, call_in_common_thread, to_the_end
from paraval.reference_names import ReferenceNames
from paraval.storage import MemoryStorage, Storage, UnknownIdError
from paraval.storage.writer import Writer

if TYPE_CHECKING:
    from paraval.callback import Callback
    from paraval.engine.known.recall import Recall
    from paraval.memory import MemoryLimit

__all__ = ["Evaluator"]

_CLOSE_S: Final = 0.8
"""How long, beyond the grace, a close waits for the engine."""
_CLOSE_SLOWLY_S: Final = 4.0
"""Likewise, where a storage may be slow."""


class Evaluator(ReferenceNames, abc.ABC):
    """Runs a run-function in parallel, and loses nothing.

    A *run-function* takes a :class:`~paraval.RunningJob` and, if wanted, static keyword arguments; what it returns is
    the job's output. Work begins at ``submit``, on up to ``num_workers`` workers. A job that fails is data
    (``job.error``), never an exception of ``gather``, unless that is asked for.

    Every method may be called from any thread, from a plain script, inside a running event loop, in Jupyter. The jobs'
    home is an event loop in a thread of its own, or, with ``async with``, the caller's loop (asyncio or trio). Such a
    block may be left in any task, and in any order with others.

    Args:
        run_function: called once for each job.
        num_workers: how many jobs run at a time.
        callbacks: see :mod:`paraval.callback`.
        run_function_kwargs: static keyword arguments of the run-function.
        storage: where jobs are recorded: a storage or its URL (``"sqlite:///campaign.db"``, see
            :func:`paraval.storage.open_storage`); None makes a :class:`~paraval.storage.MemoryStorage`.
        search_id: the search in the storage to submit to; None makes a new one.
        job_class: :class:`~paraval.Job`, or :class:`~paraval.HPOJob` for outputs that are objectives.
        job_timeout: seconds that one job may run; None: for ever.
        kill_grace: seconds between asking a job to stop and the strongest means.
        max_attempts: how often a job may be run when its worker dies under it or it raises what ``retry_on`` names.
        retry_on: exception types that are worth another attempt, after a back-off that doubles each time.
        on_error: ``"record"``: failures are only data; ``"raise"``: ``gather`` raises one
            :class:`~paraval.errors.JobsFailedError` after every job of that gather has been recorded.
        max_pending: back-pressure: submit waits while this many jobs wait for a worker; None: it never waits.
        batching: how many jobs a worker takes at once: ``"auto"`` (several only while jobs are far shorter than a
            millisecond), a number, or False for one.
        memory_limit: the bytes that a job's process and its children may hold; a job that takes more is killed, and
            fails as ``"memory_limit_exceeded"``. Where jobs have no worker process (serial, thread), each gets a
            process of its own. None: no limit.
        profile: measure when each job ran and how much memory it took, as :func:`~paraval.profile` does with
            ``memory=True``.
        resume: go on with the search ``search_id``: the k-th submission of a configuration meets the k-th record of
            it, be it of an earlier driver or of one that works on the search now, so that together they run each once.
            One that has ended comes back from ``gather`` as it was stored (``job.restored``); one that was waiting or
            running in a driver that is gone is run under its old id, at most ``max_attempts`` times; one that a living
            driver has is waited for. What was stopped because its driver ended is run.
        reuse: answer a configuration that has a result in the storage, in whatever search, with that result, and have
            one that is the same as a job in flight wait for that (``job.reused``). Failures are not reused.

    Raises:
        ValueError: an argument has no sensible value.
        TypeError: an argument has no sensible type.

    Attributes:
        run_function: as given, and decorated where ``profile`` or ``memory_limit`` asks for it.
        num_workers: as given.
        cancellation: what can be done to a running job: ``"cancel"`` its coroutine, ``"kill"`` it, or only
            ``"cooperative"`` asking.
        parallel: what runs side by side: ``"coroutines"``, ``"threads"``, …
        closures: whether lambdas and local functions can be run-functions.
        several_hosts: whether jobs can run on other machines.
        watches_memory: whether it watches the memory of its worker processes, so that jobs need none of their own.
        job_id_gathered: ids of the jobs that were gathered; those of ``evaluate`` excepted.
    """

    cancellation: ClassVar[Cancellation]
    parallel: ClassVar[str] = "?"
    closures: ClassVar[bool] = True
    several_hosts: ClassVar[bool] = False
    watches_memory: ClassVar[bool] = False
    run_function: Callable[..., Any]
    _memory_limit: MemoryLimit | None

    def __init__(
        self,
        run_function: Callable[..., Any],
        num_workers: int = 1,
        callbacks: list[Callback] | None = None,
        run_function_kwargs: dict[str, Any] | None = None,
        storage: Storage | str | None = None,
        search_id: str | None = None,
        *,
        job_class: type[Job] = Job,
        job_timeout: float | None = None,
        kill_grace: float = 1.0,
        max_attempts: int = 1,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] = (),
        on_error: Literal["record", "raise"] = "record",
        max_pending: int | None = None,
        batching: Batching = "auto",
        memory_limit: float | None = None,
        profile: bool = False,
        resume: bool = False,
        reuse: bool = False,
    ) -> None:
        if not callable(run_function):
            raise WrongTypeError(f"run_function must be callable, not {type(run_function).__name__}")
        self.run_function, self._memory_limit = run_function, None
        profile, resume, reuse = (
            checks.flag(flag, value) for flag, value in (("profile", profile), ("resume", resume), ("reuse", reuse))
        )
        if memory_limit is not None or profile or self.watches_memory:
            from paraval.profiling import for_evaluator  # here: most evaluators never need it

            self.run_function, self._memory_limit = for_evaluator(
                run_function, memory_limit, profile=profile, watches_memory=self.watches_memory
            )
        self.num_workers = checks.positive_int("num_workers", num_workers)
        self._callbacks: list[Callback] = checks.callbacks(callbacks)
        if resume and search_id is None:
            raise BadValueError("resume=True goes on with a search: say which one, with search_id")
        self._storage = _storage_of(storage, search_id)
        self._job_timeout = None if job_timeout is None else checks.seconds("job_timeout", job_timeout, or_zero=False)
        if on_error not in ("record", "raise"):
            raise BadValueError(f"on_error must be 'record' or 'raise', not {on_error!r}")
        self._on_error = on_error
        self._max_pending = None if max_pending is None else checks.positive_int("max_pending", max_pending)
        BatchSizer(batching, self.num_workers)  # refuses what it would refuse later
        self._batching = batching

        self._spec = RunSpec(
            self.run_function,
            checks.keywords("run_function_kwargs", run_function_kwargs),
            origin=time.monotonic(),
            kill_grace=checks.seconds("kill_grace", kill_grace, or_zero=True),
            storage=self._storage,
            retry_on=checks.exception_types("retry_on", retry_on),
        )
        self._clock = self._spec.clock
        self._owner = new_owner()
        self._writer = None if self._storage.by_reference else Writer(self._storage)
        max_attempts = checks.positive_int("max_attempts", max_attempts)
        name = name_of(run_function)
        job_class = checks.job_class(job_class)
        self._backend = self._make_backend()
        # After all that may be refused: it would leave an empty search behind.
        self._search_id = _search_in(self._storage, search_id, resume=resume)
        self._ledger = Ledger(counts_pending=self._max_pending is not None)
        self._notifier = Notifier(self._callbacks)
        overridden = type(self).execute is not Evaluator.execute
        # The engine must not keep an evaluator alive that nobody else holds, or it could never be collected.
        settings = EngineSettings(
            backend=self._backend,
            spec=self._spec,
            ledger=self._ledger,
            notifier=self._notifier,
            storage=self._storage,
            writer=self._writer,
            owner=self._owner,
            num_workers=self.num_workers,
            job_timeout=self._job_timeout,
            batching=self._batching,
            max_attempts=max_attempts,
            resumes=resume,
            execute=_execute_of(self) if overridden else None,
        )
        patience = self._spec.kill_grace + (_CLOSE_S if self._writer is None else _CLOSE_SLOWLY_S)
        writer = self._writer
        self._life = Lifecycle(
            functools.partial(Engine, settings),
            settings.prepare,
            self._ledger,
            patience,
            settles_here=lambda: writer is not None and writer.is_here,
        )

        self._context = JobContext(origin=self._spec.origin, kill_grace=self._spec.kill_grace)
        if self._writer is not None and self._backend.is_on_home_loop:
            self._context.record = self._writer.put_intermediate
        self._others = Others(self._storage, self._search_id, self._owner)
        self._gathered = Gathered(self._ledger, self._notifier, self._writer, self._owner, self._clock)
        self.job_id_gathered = self._gathered.ids
        self._intake = Intake(
            storage=self._storage,
            writer=self._writer,
            search_id=self._search_id,
            owner=self._owner,
            function=self.run_function,
            function_name=name,
            job_class=job_class,
            context=self._context,
            clock=self._clock,
            recall=self._recall(name, max_attempts, resume=resume, reuse=reuse),
            ledger=self._ledger,
            notifier=self._notifier,
            life=self._life,
        )
        self._num_offset = 0
        self._timeout: float | None = None
        self._timeout_set = 0.0
        self._closer: int | None = None
        _alive.add(self)

    def _recall(self, function_name: str, max_attempts: int, *, resume: bool, reuse: bool) -> Recall | None:
        if not resume and not reuse:
            return None
        from paraval.engine.known.recall import Recall  # here: most evaluators never need it

        return Recall(
            self._storage,
            self._search_id,
            function_name,
            self._owner,
            resume=resume,
            reuse=reuse,
            max_attempts=max_attempts,
        )

    @abc.abstractmethod
    def _make_backend(self) -> Backend:
        """Make the backend; refuse a run-function that it cannot run."""

    @staticmethod
    def create(
        run_function: Callable[..., Any], method: str = "serial", method_kwargs: Mapping[str, Any] | None = None
    ) -> Evaluator:
        """Make an evaluator by the name of its method.

        Args:
            run_function: called once for each job.
            method: ``"serial"``, ``"thread"``, or one that another package registered under the entry-point group
                ``paraval.evaluators``.
            method_kwargs: the constructor's other arguments.

        Raises:
            ValueError: no such method; the message lists those there are.
            ImportError: the method needs something that is not installed.
            TypeError: an argument that the constructor does not have.
        """
        cls = registry.method(method).load()
        kwargs = checks.keywords("method_kwargs", method_kwargs)
        try:
            return cls(run_function, **kwargs)
        except TypeError as exc:
            if not isinstance(exc, ParavalError):
                registry.refuse_unknown(cls, kwargs)
            raise

    # -- submit --------------------------------------------------------------------------------------------------------

    def submit(self, args_list: Sequence[Args]) -> None:
        """Start jobs, in order, one for each dict of arguments. It blocks only where ``max_pending`` asks for it.

        Raises:
            MaximumJobsSpawnReached: the limit was met; the jobs that fitted under it were submitted.
            EvaluatorClosedError: somebody closed the evaluator while it waited for ``max_pending``; likewise.
        """
        self._refuse_submission()
        waiting = checks.configurations(args_list)
        wanted, before = len(waiting), self._life.closes
        closes: int | None = None
        while waiting:
            launch = self._launch(waiting, wanted, closes)
            waiting, closes = waiting[launch.counted :], launch.handover.closes
            if not launch.counted:
                closes = before if closes is None else closes
                self._life.refuse_on_home("submit() with max_pending", "submit_async()")
                self._ledger.wait(self._has_room, self._life.check)

    async def submit_async(self, args_list: Sequence[Args]) -> None:
        """Start jobs as :meth:`submit` does; where ``max_pending`` asks for it, wait without blocking the loop."""
        self._refuse_submission()
        waiting = checks.configurations(args_list)
        wanted, before = len(waiting), self._life.closes
        closes: int | None = None
        while waiting:
            await self._life.wait_until_closed()
            launch = await self._call_slow(functools.partial(self._launch, waiting, wanted, closes))
            waiting, closes = waiting[launch.counted :], launch.handover.closes
            if not launch.counted:
                closes = before if closes is None else closes
                await self._ledger.wait_async(self._has_room, self._life.check_from_here)

    async def _call_slow(self, launch: Callable[[], Launch]) -> Launch:
        """Call what may wait for a disk or a network; a cancellation cannot come in the middle of it."""
        if not self._intake.is_slow:
            return launch()
        await anyio.lowlevel.checkpoint_if_cancelled()  # from here on there is no way back
        return await to_the_end(functools.partial(call_in_common_thread, launch))

    def _launch(self, waiting: list[Args], wanted: int, closes: int | None) -> Launch:
        """Launch what there is room for; the first part, if none was yet, opens the evaluator."""
        try:
            self._refuse_if_closed_since(closes, wanted, len(waiting))
            return self._intake.launch(waiting, self._max_pending, closes)
        except EvaluatorClosedError:
            self._refuse_if_closed_since(closes, wanted, len(waiting))
            raise

    def _refuse_submission(self) -> None:
        self._life.refuse_after_fork()
        if self._closer == threading.get_ident():
            raise UsageError("a callback that is told of the close cannot submit: do so after close() has returned")

    def _refuse_if_closed_since(self, closes: int | None, wanted: int, waiting: int) -> None:
        # Or the rest of a submission would open anew what somebody has just closed.
        if closes is not None and self._life.closes != closes:
            raise EvaluatorClosedError(
                f"the evaluator was closed while submit() waited for room (max_pending={self._max_pending}): "
                f"{wanted - waiting} of {wanted} jobs were submitted, the others were not"
            )

    def _has_room(self) -> bool:
        return self._max_pending is None or self._ledger.pending < self._max_pending

    # -- gather --------------------------------------------------------------------------------------------------------

    def gather(self, type: Literal["ALL", "BATCH"], size: int = 1) -> list[Job]:  # noqa: A002 - a public name
        """Wait for jobs and take them.

        Args:
            type: ``"ALL"``: every job in flight; ``"BATCH"``: at least ``size`` of them.
            size: for ``"BATCH"``; more than there are in flight means all of them, with a warning.

        Returns:
            The jobs, in the order in which they ended; ``[]`` at once when nothing is in flight.

        Raises:
            ValueError: another type.
            JobsFailedError: a job failed, and ``on_error="raise"``; the jobs are on it.
            EvaluatorClosedError: the event loop that runs the jobs went away.
        """
        self._life.refuse_after_fork()
        ready = self._gather_condition(type, size)
        self._life.refuse_on_home("gather()", "gather_async()")
        self._intake.refuse_in_on_launch(size if type == "BATCH" else None)
        jobs: list[Job] = []
        try:
            while True:
                self._ledger.wait(ready, self._life.check)
                if self._ledger.take_into(jobs, ready):  # else another thread was quicker
                    break
            self._gathered.add(jobs)
            return self._raise_failures(jobs)
        except JobsFailedError:
            raise  # the jobs are on it
        except BaseException:  # Ctrl-C between taking and handing over must lose nothing
            self._ledger.put_back(jobs)
            raise

    async def gather_async(self, type: Literal["ALL", "BATCH"], size: int = 1) -> list[Job]:  # noqa: A002 - likewise
        """Do as :meth:`gather` does without blocking the loop. A cancellation loses no job."""
        self._life.refuse_after_fork()
        ready = self._gather_condition(type, size)
        return await self._take_async(ready)

    def as_completed(self) -> AsyncIterator[Job]:
        """Give jobs one by one as they end, until nothing is in flight; those not taken stay to be gathered."""
        self._life.refuse_after_fork()
        return _Completed(self)

    async def _next_completed(self) -> Job | None:
        jobs = await self._take_async(self._ledger.when_batch_done(1), limit=1)
        return jobs[0] if jobs else None

    async def _take_async(self, ready: Callable[[], bool], limit: int | None = None) -> list[Job]:
        jobs: list[Job] = []
        while True:
            await self._ledger.wait_async(ready, self._life.check_from_here)
            if self._ledger.take_into(jobs, ready, limit):  # else another task or thread was quicker
                # Nothing awaits between the taking and the return unless it is shielded.
                await self._gathered.add_async(jobs)
                return self._raise_failures(jobs)

    def _gather_condition(self, type_: str, size: int) -> Callable[[], bool]:
        if type_ == "ALL":
            return self._ledger.when_all_done()
        if type_ != "BATCH":
            raise BadValueError(f"gather takes 'ALL' or 'BATCH', not {type_!r}")
        size = checks.count("size", size)
        available = self._ledger.in_flight + self._ledger.ungathered
        if size > available > 0:
            warnings.warn(
                f"gather('BATCH', {size}) asks for more jobs than the {available} in flight: waiting for all of them",
                stacklevel=3,
            )
        return self._ledger.when_batch_done(size)

    def _raise_failures(self, jobs: list[Job]) -> list[Job]:
        if self._on_error == "raise":
            failures = [JobFailedError(job) for job in jobs if job.error is not None]
            if failures:
                raise JobsFailedError(f"{len(failures)} of {len(jobs)} jobs failed", failures, jobs)
        return jobs

    # -- one job, private to its caller --------------------------------------------------------------------------------

    def evaluate(self, args: Args) -> Job:
        """Run one job and wait for it. It never shows in another's ``gather``.

        A job that waits for another one of its own evaluator keeps its worker meanwhile, and waits for ever when no
        other worker is free: jobs of jobs belong to an evaluator of their own.
        """
        self._refuse_submission()
        self._life.refuse_on_home("evaluate()", "evaluate_async()")
        gate = Gate()
        taken = checks.configuration(args)
        launched: list[Job] = []
        try:  # whatever is pending: its caller waits anyway, and back-pressure would gain nothing
            self._intake.launch([taken], private=gate.open, into=launched)
            gate.wait(self._life.check)
        except BaseException:
            for job in launched:
                self._cancel(job, "its caller was interrupted")
            self._gathered.stamp(launched, are_private=True)  # by nobody else, ever
            raise
        (job,) = launched
        self._refuse_lost(job)
        self._gathered.add([job], are_private=True)
        return self._raise_failures([job])[0]

    async def evaluate_async(self, args: Args) -> Job:
        """Run one job and wait for it; cancelling the waiting task cancels or kills the job, and waits for that."""
        self._refuse_submission()
        await self._life.wait_until_closed()
        ended = Loop.running().event()
        taken = checks.configuration(args)
        launched: list[Job] = []
        try:  # likewise whatever is pending
            launch = functools.partial(self._intake.launch, [taken], private=waker(ended), into=launched)
            await self._call_slow(launch)
            await until_set(ended, self._life.check_from_here)
        except EvaluatorClosedError:
            raise  # nobody is left to cancel it
        except BaseException:
            for job in launched:
                await self._call_off(job, ended)
            raise
        (job,) = launched
        self._refuse_lost(job)
        await self._gathered.add_async([job], are_private=True)
        return self._raise_failures([job])[0]

    async def _call_off(self, job: Job, ended: Event) -> None:
        if not job.status.is_terminal:
            self._cancel(job, "its caller was cancelled")
            with contextlib.suppress(EvaluatorClosedError):  # nobody is left to cancel it
                await to_the_end(functools.partial(until_set, ended, self._life.check_from_here))
        await self._gathered.add_async([job], are_private=True)  # by nobody else, ever

    def _cancel(self, job: Job, message: str) -> None:
        engine = self._life.engine
        if engine is not None:
            engine.cancel(job, message)

    def _refuse_lost(self, job: Job) -> None:
        if self._ledger.is_private(job):  # the engine failed before it could settle the job, or save it
            raise self._ledger.failure or ParavalError(f"job {job.id} was lost")

    # -- jobs of others ------------------------------------------------------------------------------------------------

    def gather_other_jobs_done(self) -> list[Job]:
        """Give the jobs that other evaluators on the same storage and search have finished; each of them once."""
        self._life.refuse_after_fork()
        jobs = self._others.gather(self.job_class, self._context, self._gathered.restored)
        if jobs:
            self.job_id_gathered += [job.id for job in jobs]
            for job in jobs if self._callbacks else ():
                self._notifier.call("on_done_other", job)
            self._notifier.call("on_gather", [], jobs)
        return jobs

    async def gather_other_jobs_done_async(self) -> list[Job]:
        """Do as :meth:`gather_other_jobs_done` does, in a thread."""
        return await call_in_common_thread(self.gather_other_jobs_done)

    # -- close ---------------------------------------------------------------------------------------------------------

    def close(self) -> list[Job]:
        """Stop everything: what runs is stopped by the backend's means, what waits never starts.

        Results that were not gathered yet can still be. A budget (``timeout``) is forgotten. Closing twice is
        harmless, and a new ``submit`` opens the evaluator again.

        Returns:
            The jobs that were cancelled by it; ``gather`` does not show them.
        """
        self._life.refuse_after_fork()
        return self._closed(self._life.close())

    async def aclose(self) -> list[Job]:
        """Do as :meth:`close` does without blocking the loop."""
        self._life.refuse_after_fork()
        return await to_the_end(self._aclose)

    async def _aclose(self) -> list[Job]:
        cancelled: list[Job] = []
        try:
            await self._life.aclose(cancelled)
        except BaseException:  # the loop ends, and with it this task
            self._closed(cancelled)
            raise
        if self._callbacks or self._intake.is_slow:
            await call_in_common_thread(self._closed, cancelled)
        else:
            self._closed(cancelled)
        return cancelled

    def _closed(self, cancelled: list[Job]) -> list[Job]:
        if self._closer is not None:  # a callback that is told of it closes it
            return cancelled
        self._closer = threading.get_ident()
        try:
            return self._close_the_rest(cancelled)
        finally:
            self._closer = None

    def _close_the_rest(self, cancelled: list[Job]) -> list[Job]:
        self.timeout = None
        finished = [job for job in self._ledger.peek() if job._gathered_at is None]
        if cancelled or finished:
            self._gathered.add(finished + cancelled)
        if self._callbacks:
            self._notifier.call("on_close")
        self._intake.close()
        return cancelled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._life.refuse_after_fork()
        await self._life.enter()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await to_the_end(self._leave)

    async def _leave(self) -> None:
        try:
            await self._aclose()
        finally:
            await self._life.exit()

    def __del__(self) -> None:
        life = self.__dict__.get("_life")  # missing when the constructor raised
        if life is not None and life.is_open:
            try:
                _warn_unclosed(self)  # where warnings are errors, it raises
            finally:
                life.drop()

    # -- time and limits -----------------------------------------------------------------------------------------------

    @property
    def timeout(self) -> float | None:
        """Seconds for everything, from the moment it is set; None: no limit.

        When it runs out, running jobs are stopped as ``job_timeout`` would, and waiting ones never start.

        Raises:
            ValueError: set to a negative number.
        """
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._timeout = None if seconds is None else checks.seconds("timeout", seconds, or_zero=True)
        self._timeout_set = self._clock()
        engine = self._life.engine
        self._spec.budget_end = math.inf if self._timeout is None else self._timeout_set + self._timeout
        if engine is not None:
            with contextlib.suppress(ParavalError):  # an engine that ends at this moment needs no budget
                engine.budget_changed()

    def set_timeout(self, timeout: float | None) -> None:
        """Set :attr:`timeout`."""
        self.timeout = timeout

    @property
    def time_left(self) -> float | None:
        """Seconds until :attr:`timeout` runs out (negative afterwards); None without one."""
        return None if self._timeout is None else self._timeout_set + self._timeout - self._clock()

    def set_maximum_num_jobs_submitted(self, maximum_num_jobs_submitted: int | None) -> None:
        """Allow so many jobs from now on, those in flight included; None or not positive: no limit.

        The counters :attr:`num_jobs_submitted` and :attr:`num_jobs_gathered` start anew with it.
        """
        limit = checks.int_or_none("maximum_num_jobs_submitted", maximum_num_jobs_submitted)
        self._num_offset = self._gathered.count
        self._intake.limit(limit if limit is not None and limit > 0 else None, since=self._num_offset)

    @property
    def num_jobs_submitted(self) -> int:
        """How many jobs were submitted (since the last ``set_maximum_num_jobs_submitted``)."""
        return self._intake.num_submitted - self._num_offset

    @property
    def num_jobs_gathered(self) -> int:
        """How many jobs were gathered, or returned by ``close`` (likewise)."""
        return self._gathered.count - self._num_offset

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def storage(self) -> Storage:
        """Where jobs are recorded."""
        return self._storage

    @property
    def search_id(self) -> str:
        """The search that jobs are submitted to."""
        return self._search_id

    @property
    def callbacks(self) -> list[Callback]:
        """The callbacks; the list may be changed."""
        return self._callbacks

    @property
    def run_function_kwargs(self) -> dict[str, Any]:
        """Static keyword arguments of the run-function; the dict may be changed, for jobs that start later."""
        return self._spec.kwargs

    @property
    def jobs(self) -> list[Job]:
        """Every job that was submitted, in order; those of ``evaluate`` excepted."""
        return self._intake.jobs

    @property
    def job_class(self) -> type[Job]:
        """What jobs are made of; it may be set until the first submit."""
        return self._intake.job_class

    @job_class.setter
    def job_class(self, job_class: type[Job]) -> None:
        if self._intake.num_submitted:
            raise UsageError("job_class can be set until the first submit, and jobs were submitted already")
        self._intake.job_class = checks.job_class(job_class)

    @property
    def search(self) -> Any:
        """The search that uses this evaluator, if any; jobs have it as ``job.context.search``."""
        return self._context.search

    @search.setter
    def search(self, search: Any) -> None:
        self._context.search = search

    @property
    def _job_class(self) -> type[Job]:
        """The reference system's searches set it, one after the other on the same evaluator."""
        return self._intake.job_class

    @_job_class.setter
    def _job_class(self, job_class: type[Job]) -> None:
        if not issubclass(job_class, Job):  # the one of the reference system itself
            job_class = HPOJob if job_class.__name__ == "HPOJob" else Job
        self._intake.job_class = job_class

    @property
    def _stopper(self) -> Any:
        """Copied for each job that starts; the reference system's searches set it."""
        return self._spec.stopper

    @_stopper.setter
    def _stopper(self, stopper: Any) -> None:
        self._spec.stopper = stopper

    def statistics(self) -> Statistics:
        """Take a picture of what goes on."""
        ledger, engine = self._ledger, self._life.engine
        running, running_s = (0, 0.0) if engine is None else engine.running()
        return ledger.statistics(self._clock(), self.num_workers, running, running_s, self._notifier.errors)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.run_function!r}, num_workers={self.num_workers})"

    # -- for subclasses ------------------------------------------------------------------------------------------------

    async def execute(self, job: Job) -> Job:
        """Run one job; a subclass may override it, to do something before or after, or in its place.

        It runs on the home loop, one call for each worker at a time. The default runs the job on the worker.

        Returns:
            The job, its output set.
        """
        engine = self._life.engine
        if engine is None:
            raise UsageError("execute() is called by the evaluator, for a job that a worker has taken")
        return await engine.execute_on_slot(job)


class _Completed(AsyncIterator[Job]):
    """Jobs as they end. No generator: one that is left early would have to be closed, and awaited for that."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    async def __anext__(self) -> Job:
        job = await self._evaluator._next_completed()
        if job is None:
            raise StopAsyncIteration
        return job

    async def aclose(self) -> None:
        """Do nothing: there is nothing to close, but ``contextlib.aclosing`` may be used on it."""


def _execute_of(evaluator: Evaluator) -> Callable[[Job], Awaitable[Job]]:
    found = weakref.ref(evaluator)

    async def execute(job: Job) -> Job:
        alive = found()
        if alive is None:
            raise UsageError("the evaluator is gone")
        return await alive.execute(job)

    return execute


def _storage_of(storage: Storage | str | None, search_id: object) -> Storage:
    if storage is None:
        return MemoryStorage()
    if isinstance(storage, Storage):
        return storage
    from paraval.storage.urls import open_storage, sqlite_path  # here: most evaluators never need it

    path = sqlite_path(storage) if isinstance(storage, str) else None
    if search_id is not None and path is not None:
        try:
            path.stat()
        except FileNotFoundError:  # it would be made
            raise UnknownIdError(f"no search {str(search_id)!r} to submit to: there is no file {str(path)!r}") from None
        except (OSError, ValueError):
            pass  # opening it says why it cannot be
    return open_storage(storage)


def _search_in(storage: Storage, search_id: object, *, resume: bool) -> str:
    """Give the id of the search to submit to: a new one where none is named."""
    if search_id is None:
        return storage.create_new_search()
    name = str(search_id)
    storage.scan(name, since=sys.maxsize)  # it raises where there is no such search
    if resume and name not in storage.search_ids():  # a NullStorage has never heard of any
        raise UnknownIdError(f"no search {name!r} to go on with: the storage, a {type(storage).__name__}, keeps none")
    return name


_alive: weakref.WeakSet[Evaluator] = weakref.WeakSet()


def _warn_unclosed(evaluator: Evaluator) -> None:
    warnings.warn(f"{evaluator!r} was not closed: use 'with', or call close()", ResourceWarning, stacklevel=2)


@atexit.register
def _close_at_exit() -> None:
    """End what a program left open, so that it ends, its callbacks' files are complete and no worker stays behind."""
    with contextlib.ExitStack() as stack:  # where warnings are errors, a warning must not keep the next from closing
        for evaluator in list(_alive):
            engine = evaluator._life.engine
            if evaluator._life.is_open and engine is not None:
                evaluator._spec.kill_grace = min(evaluator._spec.kill_grace, 1.0)
                with contextlib.suppress(ParavalError):
                    engine.stop()  # all of them at once: each may need its grace
                stack.callback(evaluator.close)
                stack.callback(_warn_unclosed, evaluator)
