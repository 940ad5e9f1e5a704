"""Jobs: what is submitted (``Job``, ``HPOJob``) and what a run-function receives (``RunningJob``).

A child process imports this module, so it is light: no anyio, no NumPy, no msgspec.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from paraval.errors import WrongTypeError
from paraval.outcome import JobError, Objective, Outcome, error_from_exception, is_failure, standardize

if TYPE_CHECKING:
    from paraval.engine.running.worker import Worker
    from paraval.storage import Storage
    from paraval.submission import Submission

__all__ = [
    "OURS",
    "HPOJob",
    "Job",
    "JobContext",
    "JobStatus",
    "JobTiming",
    "LiveJob",
    "RunningJob",
    "make_jobs",
    "running_job",
]


class JobStatus(Enum):
    """Where a job is on its way."""

    READY = 0
    """Submitted, not started."""
    RUNNING = 1
    """A worker runs it."""
    DONE = 2
    """It ended by itself: with a result or with a failure (``job.error``)."""
    CANCELLING = 3
    """It was asked to stop and has not stopped yet."""
    CANCELLED = 4
    """It was stopped: a timeout, a cancellation, the end of the evaluator."""

    @property
    def is_terminal(self) -> bool:
        """Whether nothing more will happen to the job."""
        return self is JobStatus.DONE or self is JobStatus.CANCELLED


class JobTiming(NamedTuple):
    """When things happened to a job, in seconds since its evaluator was created; None: not yet, or never."""

    submitted: float | None = None
    started: float | None = None
    finished: float | None = None
    gathered: float | None = None

    @property
    def queued(self) -> float | None:
        """Seconds between submit and start."""
        return None if self.submitted is None or self.started is None else self.started - self.submitted

    @property
    def ran(self) -> float | None:
        """Seconds between start and end."""
        return None if self.started is None or self.finished is None else self.finished - self.started


class JobContext:
    """What surrounds the jobs of one evaluator, in the process where it is used.

    Attributes:
        search: the search that uses the evaluator, if any.
        origin: where the evaluator's clock is zero, on ``time.monotonic()``.
        kill_grace: seconds between asking a job to stop and the strongest means.
        record: stores an intermediate result (job id, budget, objective) without blocking; None: the storage may be
            called from where the jobs run.
        memory_limit: in a worker process that runs one job at a time: the bytes at which its parent kills it, infinity
            for never. None where a job has no process of its own.
    """

    __slots__ = ("kill_grace", "memory_limit", "origin", "record", "search")

    def __init__(
        self,
        search: Any = None,
        *,
        origin: float = 0.0,
        kill_grace: float = 1.0,
        memory_limit: float | None = None,
    ) -> None:
        self.search = search
        self.origin = origin
        self.kill_grace = kill_grace
        self.memory_limit = memory_limit
        self.record: Callable[[str, float, float], object] | None = None


class Job:
    """One call of a run-function: its arguments, and in the end its output or its error.

    Args:
        id: ``"search.job"``.
        args: the arguments of this call; the run-function finds them in its ``job.parameters``.
        run_function: the function to call.
        storage: where the job is recorded.

    Attributes:
        output: what the run-function returned, as it was; None until then, and when it failed.
        error: None, or why the job failed.
        context: shared by the jobs of one evaluator.
        stdout: the tail of what the job printed, where ``capture_output`` was asked for and can be had.
        stderr: likewise.
        restored: whether it was taken from the storage as it had ended there, and not run (``resume``).
        reused: the id of the job whose result it was given, in place of being run (``reuse``); or None.
    """

    # Slots keep a finished job small; __dict__ (made only when used) lets users add attributes of their own.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_finished",
        "_gathered",
        "_holder",
        "_metadata",
        "_started",
        "_status",
        "_submission",
        "_submitted",
        "args",
        "context",
        "error",
        "id",
        "output",
        "run_function",
        "storage",
    )

    stdout: str | None = None
    stderr: str | None = None
    restored: bool = False
    _is_adopted: bool = False
    """Whether a driver that is gone has left it."""
    reused: str | None = None

    def __init__(
        self,
        id: str,  # noqa: A002 - the public name of the reference system
        args: dict[str, Any],
        run_function: Callable[..., Any] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.id = id
        self.args = args
        self.run_function = run_function
        self.storage = storage
        self.output: Any = None
        self._metadata: dict[str, Any] | None = {}
        self.error: JobError | None = None
        self.context = _NO_CONTEXT
        self._submission: Submission | None = None
        self._status = _READY
        self._submitted: float | None = None
        self._started: float | None = None
        self._finished: float | None = None
        self._gathered: float | None = None
        self._holder: Worker | None = None
        """The worker that has it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, status={self._status.name}, args={self.args!r})"

    @property
    def metadata(self) -> dict[str, Any]:
        """What the run-function and paraval noted beside the output."""
        metadata = self._metadata
        if metadata is None:
            made = {} if self._submission is None else self._submission.note_of(self.id)
            if self._metadata is None:  # else another thread has given it one meanwhile
                self._metadata = made
            metadata = self._metadata
        return metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata
        submission: Submission | None = getattr(self, "_submission", None)  # a subclass may set it before all else
        if submission is not None:
            submission.is_renoted = True

    @property
    def status(self) -> JobStatus:
        """Where the job is on its way."""
        return self._status

    @status.setter
    def status(self, status: JobStatus) -> None:
        self._status = JobStatus(status)
        if self.storage is not None:
            self.storage.store_job_status(self.id, self._status.value)

    @property
    def timing(self) -> JobTiming:
        """When it was submitted, started, finished and gathered."""
        return JobTiming(self._submitted, self._started, self._finished, self._gathered_at)

    @property
    def _gathered_at(self) -> float | None:
        """When it was gathered, maybe with all that were submitted with it."""
        if self._gathered is None and self._submission is not None:
            return self._submission.notes.gathered
        return self._gathered

    @property
    def failed(self) -> bool:
        """Whether the evaluation failed; ``job.error`` says why."""
        return self.error is not None

    @property
    def stored_output(self) -> Any:
        """What a storage keeps as the job's ``out``."""
        return self.output

    def set_output(self, output: Any) -> None:
        """Take what the run-function returned; ``{"output": …, "metadata": …}`` (from ``profile``) is unwrapped."""
        self.output, metadata = taken_apart(output)
        if metadata:
            self.metadata.update(metadata)

    def set_error(self, error: JobError) -> None:
        """Take the failure."""
        self.error = error
        self.output = None

    def settle(self, outcome: Outcome) -> None:
        """Take the outcome. An output that no standard allows is a failure of this job."""
        value, error, cancelled, _ = outcome
        if error is None and type(self) is Job and value is not self and not isinstance(value, dict):  # as a rule
            self.output = value
        elif error is None and value is not self:  # itself: an overridden execute() has set the output already
            try:
                self.set_output(value)
            except Exception as exc:  # noqa: BLE001 - a subclass's set_output is user code
                error = error_from_exception(exc)
                if isinstance(exc, WrongTypeError):
                    error = error._replace(type="TypeError")
                elif isinstance(exc, ValueError):
                    error = error._replace(type="ValueError")
        elif error is None and self.output is None and isinstance(self, HPOJob):
            error = JobError("exception", "execute() returned the job without an output", type="TypeError")
        if error is not None:
            self._set_error(error)
        if type(self) not in OURS:
            self._try_what_is_overridden()
        self._status = _CANCELLED if cancelled else _DONE

    def _set_error(self, error: JobError) -> None:
        try:
            self.set_error(error)
        except Exception:  # noqa: BLE001 - a subclass's is user code, and this is a failure already
            self.error, self.output = error, None

    def _try_what_is_overridden(self) -> None:
        """Ask a subclass now what it will be asked when the job is recorded and counted: it may raise."""
        try:
            _ = self.stored_output, self.failed
        except Exception as exc:  # noqa: BLE001 - it is user code
            self._set_error(self.error or error_from_exception(exc))

    def __getstate__(self) -> Any:
        state: Any = object.__getstate__(self)
        own, slots = state
        # What the submission has to give is taken along in its place.
        here = {"_metadata": self.metadata, "_gathered": self._gathered_at, "_submission": None, "_holder": None}
        slots = {**slots, **here}
        if "<" in getattr(self.run_function, "__qualname__", "<"):  # a lambda or a local function cannot be pickled
            slots = {**slots, "run_function": None}
        return own, slots

    def create_running_job(self, stopper: Any = None) -> RunningJob:
        """Make what the run-function receives.

        Args:
            stopper: copied (deeply) for this job, its ``job`` attribute set; or None.
        """
        return running_job(self, self.id, dict(self.args), self.storage, stopper)


class HPOJob(Job):
    """A job of hyperparameter optimisation: its output holds one or several objectives, in the standard form.

    ``configuration, objective = job`` unpacks it.
    """

    __slots__ = ()

    def __getitem__(self, index: int) -> Any:
        return (dict(self.args), self.objective)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((dict(self.args), self.objective))

    @property
    def objective(self) -> Objective | None:
        """One objective, several, or ``"F_reason"``; None while the job is not done. It is maximised by convention."""
        return None if self.output is None else self.output["objective"]

    @property
    def failed(self) -> bool:
        """Whether the evaluation failed, be it that the run-function returned ``"F…"``."""
        return self.error is not None or is_failure(self.objective)

    @property
    def stored_output(self) -> Any:
        """The objective."""
        return self.objective

    @staticmethod
    def standardize_output(output: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Bring an output to the standard form: ``({"objective": …, …}, metadata)``."""
        return standardize(output)

    def set_output(self, output: Any) -> None:
        """Take what the run-function returned, in any of the standard forms.

        Raises:
            TypeError: a type that is no objective.
            ValueError: a dict without ``"objective"``.
        """
        self.output, metadata = standardize(output)
        if metadata:
            self.metadata.update(metadata)

    def set_error(self, error: JobError) -> None:
        """Take the failure: the objective becomes ``"F_reason"``."""
        self.error = error
        self.output = {"objective": error.reason}


def make_jobs(job_class: type[Job], all_args: Sequence[dict[str, Any]], submission: Submission) -> list[Job]:
    """Make the jobs of a submission, of one of OURS, as its constructor does, in two thirds of the time."""
    jobs = []
    run_function, storage, context = submission.run_function, submission.storage, submission.context
    submitted = submission.submitted
    for job_id, args in zip(submission.ids, all_args, strict=True):
        job: Job = _new(job_class)
        job.id = job_id
        job.args = args
        job.run_function = run_function
        job.storage = storage
        job.output = job.error = job._metadata = None
        job.context = context
        job._status = _READY
        job._submission = submission
        job._submitted = submitted
        job._started = job._finished = job._gathered = job._holder = None
        jobs.append(job)
    return jobs


class LiveJob:
    """What a running job shows of its job where that is not: in a worker process, which says how it learns of that."""

    __slots__ = ("context",)
    context: JobContext
    _status: JobStatus


def taken_apart(output: Any) -> tuple[Any, dict[str, Any]]:
    """Give the output and the metadata of ``{"output": …, "metadata": …}``; of anything else, itself and none."""
    if isinstance(output, dict) and output.keys() == {"output", "metadata"} and isinstance(output["metadata"], dict):
        return output["output"], output["metadata"]
    return output, {}


class RunningJob(MutableMapping[str, Any]):
    """What a run-function receives: a mapping over its parameters, and the way back to the evaluator.

    A run-function can be called by hand with ``RunningJob(parameters={…})``: it then has a memory storage of its own.

    Args:
        id: ``"search.job"``.
        parameters: the arguments of this call.
        storage: where the job is recorded; None: without an id, in a memory storage of its own, else nowhere.
        stopper: decides early whether the job should stop, or None.
        live: the job whose status this one shows; for the backends.
    """

    __slots__ = ("_live", "_record", "_storage", "id", "parameters", "stopper")

    def __init__(
        self,
        id: str | None = None,  # noqa: A002 - the public name of the reference system
        parameters: dict[str, Any] | None = None,
        storage: Storage | None = None,
        stopper: Any = None,
        *,
        live: Job | LiveJob | None = None,
    ) -> None:
        self.parameters: dict[str, Any] = {} if parameters is None else parameters
        self.stopper = stopper
        self._live = live
        self._record: tuple[float, float] | None = None
        if storage is None:
            from paraval.storage import MemoryStorage, NullStorage  # here: a child process must not import it at start

            storage = MemoryStorage() if id is None else NullStorage()
            if id is None:
                id = storage.create_new_job(storage.create_new_search())  # noqa: A001 - as above
        self._storage: Any = storage
        self.id = id

    def __repr__(self) -> str:
        return f"RunningJob(id={self.id!r}, status={self.status.name}, parameters={self.parameters!r})"

    def __getitem__(self, key: str) -> Any:
        if key == "job_id":
            return int(str(self.id).rpartition(".")[2])
        return self.parameters[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "job_id":
            raise KeyError("the 'job_id' of a running job cannot be changed")
        self.parameters[key] = value

    def __delitem__(self, key: str) -> None:
        del self.parameters[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    @property
    def storage(self) -> Storage:
        """Where the job is recorded."""
        if callable(self._storage):  # a worker process makes its client when a job asks for it
            self._storage = self._storage()
        storage: Storage = self._storage
        return storage

    @property
    def status(self) -> JobStatus:
        """Where the job is on its way, live."""
        if self._live is not None:
            return self._live._status
        return JobStatus(self.storage.load_job_status(str(self.id)))

    @property
    def context(self) -> JobContext:
        """What surrounds the jobs of the evaluator; a default one where a run-function is called by hand."""
        return _NO_CONTEXT if self._live is None else self._live.context

    def clock(self) -> float:
        """Give the seconds since the evaluator was created; called by hand, those of ``time.monotonic()``."""
        return time.monotonic() - self.context.origin

    def record(self, budget: float, objective: float) -> None:
        """Report an intermediate result; it is stored, and the stopper (if any) observes it.

        Args:
            budget: what was spent so far (epochs, seconds, …).
            objective: what was reached with it.
        """
        self._record = (budget, objective)
        record = self.context.record or self.storage.store_job_intermediate
        record(str(self.id), budget, objective)
        if self.stopper is not None:
            self.stopper.observe(budget, objective)

    def stopped(self) -> bool:
        """Whether the job should end now: it is being cancelled, or its stopper says so."""
        if self.status in _STOPPING:
            return True
        return bool(self.stopper.stop()) if self.stopper is not None else False

    @property
    def objective(self) -> Any:
        """The stopper's objective, or without one the last recorded; None when nothing was recorded."""
        if self.stopper is not None:
            return self.stopper.objective
        return None if self._record is None else self._record[1]


def running_job(
    live: Job | LiveJob, job_id: str, parameters: dict[str, Any], storage: Any, stopper: Any = None
) -> RunningJob:
    """Make what a run-function receives; as ``RunningJob(…)`` does, which would be the largest part of a tiny job.

    Args:
        live: its status and its context are shown.
        job_id: ``"search.job"``.
        parameters: the job's own from now on.
        storage: where it is recorded, or a function that gives that.
        stopper: copied (deeply) for this job, its ``job`` attribute set; or None.
    """
    running = RunningJob.__new__(RunningJob)
    running.id = job_id
    running.parameters = parameters
    running.stopper = None
    running._live = live
    running._record = None
    running._storage = storage
    if stopper is not None:
        running.stopper = stopper = copy.deepcopy(stopper)
        stopper.job = running
    return running


_NO_CONTEXT = JobContext()
# Enum's own look-up of a member costs more than anything else that is done with it here.
_READY = JobStatus.READY
_DONE = JobStatus.DONE
_CANCELLED = JobStatus.CANCELLED
OURS: Final = frozenset({Job, HPOJob})
_new: Final = object.__new__
_STOPPING = frozenset({JobStatus.CANCELLING, JobStatus.CANCELLED})
