"""Every error that paraval itself raises.

Each class derives from :class:`ParavalError` and from the built-in that fits, so ``except ValueError`` and
``except paraval.ParavalError`` both work. What a *run-function* raises is not here: that is data, on ``job.error``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from paraval.job import Job

__all__ = [
    "BadValueError",
    "CorruptStoreError",
    "EvaluatorClosedError",
    "ForkedError",
    "JobFailedError",
    "JobsFailedError",
    "MaximumJobsSpawnReached",
    "MissingExtraError",
    "ParavalError",
    "StorageError",
    "StoreAccessError",
    "StoreUnreachableError",
    "UsageError",
    "WrongStoreError",
    "WrongTypeError",
]


class ParavalError(Exception):
    """Base of every error that paraval raises itself."""


class BadValueError(ParavalError, ValueError):
    """An argument has a value that makes no sense; the message says what would."""


class WrongTypeError(ParavalError, TypeError):
    """An argument has a type that makes no sense; the message says what would."""


class UsageError(ParavalError, RuntimeError):
    """A call was made where it cannot work, as a blocking call on the very loop that runs the jobs."""


class MissingExtraError(ParavalError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class EvaluatorClosedError(ParavalError, RuntimeError):
    """The event loop, the thread or the evaluator went away while a call waited on it."""


class ForkedError(ParavalError, RuntimeError):
    """An evaluator was used in a forked child: its threads and its loop exist in the parent only."""


class StorageError(ParavalError, OSError):
    """A storage could not do what was asked of it."""


class CorruptStoreError(StorageError):
    """What is in a store was damaged: cut, overwritten, emptied. Nothing is made anew in its place."""


class StoreAccessError(StorageError, PermissionError):
    """A store does not let us in, or does not permit what must be done: a password, a certificate, a permission."""


class StoreUnreachableError(StorageError, ConnectionError):
    """The server of a store did not answer, for as long as it was tried."""


class WrongStoreError(StorageError):
    """What is at the place of a store is something else, or of a later release; the message says what."""


class MaximumJobsSpawnReached(ParavalError, RuntimeError):  # noqa: N818 - the name is public since the reference system
    """``submit`` met the limit of ``set_maximum_num_jobs_submitted``.

    The jobs of the same call that fitted under the limit were submitted.
    """


class JobFailedError(ParavalError, RuntimeError):
    """One job failed, and ``on_error="raise"`` was asked for.

    Attributes:
        job: the failed job, with its ``error`` record.
    """

    def __init__(self, job: Job) -> None:
        error = job.error
        super().__init__(f"job {job.id}: {error.summary if error is not None else 'failed'}")
        self.job = job
        if error is not None and error.traceback:
            self.add_note(error.traceback)


class JobsFailedError(ParavalError, ExceptionGroup[JobFailedError]):
    """What ``gather`` raises under ``on_error="raise"``: one :class:`JobFailedError` for each failed job.

    Attributes:
        jobs: every job of that gather, good and failed, in completion order: nothing is lost by the raise.
    """

    jobs: list[Job]

    def __new__(cls, message: str, errors: Sequence[JobFailedError], jobs: Sequence[Job] = ()) -> Self:
        """Make the group; ``jobs`` ride on it."""
        self = super().__new__(cls, message, errors)
        self.jobs = list(jobs)
        return self

    def derive(self, excs: Sequence[JobFailedError]) -> JobsFailedError:  # type: ignore[override] # narrower: only our own errors are in it
        """Keep the jobs when ``except*`` splits the group."""
        return JobsFailedError(self.message, excs, self.jobs)
