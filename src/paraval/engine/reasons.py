"""Why jobs are stopped, or never run: the error that such a job ends with."""

from __future__ import annotations

from typing import Final

from paraval.outcome import JobError

__all__ = ["OUT_OF_BUDGET", "SURPLUS", "out_of_time"]

OUT_OF_BUDGET: Final = JobError("timeout", "the evaluator's timeout ran out")
SURPLUS: Final = JobError("cancelled", "another driver has submitted the same at the same moment, and runs it")
"""Why a record is not run that stands for nothing: the next submission of its configuration meets it."""


def out_of_time(limit: float) -> JobError:
    """Say that a job took too long."""
    return JobError("timeout", f"the job ran longer than job_timeout={limit:g} s")
