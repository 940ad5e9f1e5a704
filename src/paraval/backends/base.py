"""What a backend is to the engine: slots that run batches of jobs.

A backend adapts something that can run a function (a coroutine, a thread, a process, a foreign future) to one
awaitable, :meth:`Slot.run`. Everything else, that is queueing, deadlines, settling, belongs to the engine.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final, Literal

import anyio

from paraval.backends.batch import Batch, Ended, Returned
from paraval.functions import has_own_process
from paraval.outcome import JobError, Outcome, error_from_exception
from paraval.storage import Storage
from paraval.worker.main import may_retry

__all__ = [
    "Backend",
    "Batch",
    "Cancellation",
    "Ended",
    "Returned",
    "RunSpec",
    "Slot",
    "WorkerDiedError",
    "failure_of",
    "outcome_of",
]

Cancellation = Literal["cancel", "kill", "cooperative"]
"""What a backend can do to a running job: cancel its coroutine, kill it, or only ask it to stop."""


class RunSpec:
    """What is the same for every job of an evaluator, read anew for each job.

    Attributes:
        function: the run-function.
        kwargs: static keyword arguments of the run-function.
        stopper: copied for each job; or None.
        clock: seconds since the evaluator was created.
        origin: where that clock is zero, on ``time.monotonic()``.
        kill_grace: seconds between asking a job to stop and the strongest means.
        retry_on: exception types of the run-function that are worth another attempt.
        storage: where jobs are recorded.
        budget_end: when everything must have ended, on the clock.
        home_is_ending: whether the engine's loop is being shut down under it.
    """

    __slots__ = (
        "budget_end",
        "clock",
        "function",
        "home_is_ending",
        "kill_grace",
        "kwargs",
        "origin",
        "retry_on",
        "stopper",
        "storage",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
        *,
        origin: float,
        kill_grace: float,
        storage: Storage,
        retry_on: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.function = function
        self.kwargs = kwargs
        self.stopper: Any = None
        self.origin = origin
        self.clock: Callable[[], float] = lambda: time.monotonic() - origin
        self.kill_grace = kill_grace
        self.retry_on = retry_on
        self.storage = storage
        self.budget_end = math.inf
        self.home_is_ending: Callable[[], bool] = lambda: False

    @property
    def patience(self) -> float:
        """Seconds from asking a job to stop to giving it up, where nothing can end it.

        One that has a process of its own is not given up while that is killed, when the grace is over.
        """
        return self.kill_grace + (_KILL_S if has_own_process(self.function) else 0.0)


_KILL_S: Final = 0.3
"""Within what an engine allows for anything to be seen ended."""


class WorkerDiedError(Exception):
    """A slot lost its worker. Whose fault it was is for the engine to find out.

    Attributes:
        error: how it was lost.
        alone: nothing but this batch can have caused it. (Calls in one pool of processes die together.)
    """

    def __init__(self, error: JobError, *, alone: bool = True) -> None:
        super().__init__(error.message)
        self.error = error
        self.alone = alone


def failure_of(exc: BaseException, spec: RunSpec) -> Outcome:
    """Turn what a call on the engine's loop raised, be it SystemExit, into its outcome. To be called in its handler.

    A cancellation that comes from above is raised on. One that the run-function made up itself (it awaited a task that
    was cancelled) is its failure.
    """
    try:
        cancelled = anyio.get_cancelled_exc_class()
    except anyio.NoEventLoopError:  # the coroutine is being closed: its loop was dropped while it ran
        raise exc from None
    if isinstance(exc, cancelled) and (anyio.current_effective_deadline() == -math.inf or spec.home_is_ending()):
        raise exc
    return outcome_of(exc, spec)


def outcome_of(exc: BaseException, spec: RunSpec) -> Outcome:
    """Turn what a run-function raised into its outcome."""
    error = error_from_exception(exc)
    return Outcome(error=error, may_retry=may_retry(exc, error, spec.retry_on))


class Slot(abc.ABC):
    """One worker's place to run jobs. Made, used and closed on the engine's loop."""

    @abc.abstractmethod
    async def run(self, batch: Batch) -> None:
        """Run jobs until ``batch.take()`` gives None.

        When it is cancelled, the current job shall stop: it is asked (its status is ``CANCELLING``), after
        ``kill_grace`` seconds the strongest means follow, and the cancellation goes on up.

        Raises:
            WorkerDiedError: the worker died under its jobs; the next ``run`` has another. (Any other exception says
                that the slot itself failed, and is taken in the same way.)
        """

    # Two turns of the loop for each batch are spared where it can be run without a task. Most slots need one.

    @property
    def is_prompt(self) -> bool:
        """Whether :meth:`begin` may be tried in place of :meth:`run`."""
        return False

    def begin(self, batch: Batch, ended: Callable[[], object], needs_task: Callable[[], object]) -> bool:
        """Begin to run jobs.

        Args:
            batch: the jobs.
            ended: called on the loop when ``batch.take()`` has given None.
            needs_task: called on the loop, in place of that, when this batch turns out to need a task: its ``run``
                goes on with it.

        Returns:
            Whether it was begun; else it needs a task at once.
        """
        raise NotImplementedError

    async def stop(self) -> None:
        """Stop what was begun, as a :meth:`run` that is cancelled does; and end when it would."""
        raise NotImplementedError

    def catch_up(self, batch: Batch) -> None:  # noqa: B027 - most slots leave nothing
        """Hand in at once what the worker has said of this batch already, and was left for later."""

    def take_back(self, batch: Batch) -> bool:  # noqa: ARG002 - most slots send nothing ahead
        """Have the worker give back what it was given with :meth:`Batch.take_more` and has not begun.

        Returns:
            Whether it is known now which jobs it has; else that will be known in a moment.
        """
        return True

    def pin_down(self, batch: Batch, latest: float) -> float | None:  # noqa: ARG002 - most slots know which job runs
        """Find out which job of a batch runs, where the worker cannot say it.

        Args:
            batch: from now on, it knows the job as its current one.
            latest: where that began before this time, no other begins: what was not begun is given back.

        Returns:
            When it began, on the evaluator's clock; None: nobody knows which one runs.
        """
        return None

    async def recover(self) -> None:  # noqa: B027 - most slots need nothing here
        """After a cancelled ``run``: return when the slot can run jobs again."""

    async def close(self) -> None:  # noqa: B027 - likewise
        """Give up what the slot holds, within a fraction of a second; nothing cancels it."""


class Backend(abc.ABC):
    """Makes slots.

    Attributes:
        is_on_home_loop: whether run-functions run on the engine's loop, which what they call must not block.
        batch_limit: most jobs that a worker may take at once; None: as many as seem good.
        is_far: whether a trip to a worker takes long, and its slot asks for more jobs (``Batch.more``) before it is
            through with those that it has.
    """

    cancellation: ClassVar[Cancellation]
    is_on_home_loop: ClassVar[bool] = False
    batch_limit: int | None = None
    is_far: bool = False

    @abc.abstractmethod
    def slot(self, spec: RunSpec) -> Slot:
        """Make a slot. It may start what it needs when the first batch comes."""

    def prepare(self, spec: RunSpec, workers: int) -> None:  # noqa: B027 - likewise
        """Begin to start so many workers, before the loop is there; :meth:`supervise` ends those that nobody took."""

    async def supervise(self) -> None:  # noqa: B027 - most backends need nothing here
        """Look after the slots, for as long as the engine runs; cancelled at its end."""
