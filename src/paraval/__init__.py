"""paraval: parallel evaluation of expensive functions, behind one interface, without losing a result.

The public names are imported when they are first used, so that ``import paraval`` is cheap.
"""

from __future__ import annotations

import importlib
import os

TYPE_CHECKING = False  # as type checkers read it; typing itself takes longer to import than all the rest
if TYPE_CHECKING:
    from typing import Any, Final

    from paraval.backends.executor import ExecutorEvaluator as ExecutorEvaluator
    from paraval.backends.loky import LokyEvaluator as LokyEvaluator
    from paraval.backends.process import ProcessPoolEvaluator as ProcessPoolEvaluator
    from paraval.backends.serial import SerialEvaluator as SerialEvaluator
    from paraval.backends.thread import ThreadPoolEvaluator as ThreadPoolEvaluator
    from paraval.engine.ledger import Statistics as Statistics
    from paraval.errors import EvaluatorClosedError as EvaluatorClosedError
    from paraval.errors import JobFailedError as JobFailedError
    from paraval.errors import JobsFailedError as JobsFailedError
    from paraval.errors import MaximumJobsSpawnReached as MaximumJobsSpawnReached
    from paraval.errors import ParavalError as ParavalError
    from paraval.evaluator import Evaluator as Evaluator
    from paraval.job import HPOJob as HPOJob
    from paraval.job import Job as Job
    from paraval.job import JobStatus as JobStatus
    from paraval.job import JobTiming as JobTiming
    from paraval.job import RunningJob as RunningJob
    from paraval.outcome import JobError as JobError
    from paraval.profiling import profile as profile
    from paraval.utils import parse_subprocess_result as parse_subprocess_result
    from paraval.utils import to_json as to_json

_MODULES: Final = {
    "Evaluator": "paraval.evaluator",
    "EvaluatorClosedError": "paraval.errors",
    "ExecutorEvaluator": "paraval.backends.executor",
    "HPOJob": "paraval.job",
    "Job": "paraval.job",
    "JobError": "paraval.outcome",
    "JobFailedError": "paraval.errors",
    "JobStatus": "paraval.job",
    "JobTiming": "paraval.job",
    "JobsFailedError": "paraval.errors",
    "LokyEvaluator": "paraval.backends.loky",
    "MaximumJobsSpawnReached": "paraval.errors",
    "ParavalError": "paraval.errors",
    "ProcessPoolEvaluator": "paraval.backends.process",
    "RunningJob": "paraval.job",
    "SerialEvaluator": "paraval.backends.serial",
    "Statistics": "paraval.engine.ledger",
    "ThreadPoolEvaluator": "paraval.backends.thread",
    "parse_subprocess_result": "paraval.utils",
    "profile": "paraval.profiling",
    "to_json": "paraval.utils",
}
try:
    WORKING_FOLDER: Final = os.getcwd()  # noqa: PTH109 - pathlib would take longer than all the rest
    """What ``""`` in ``sys.path`` stood for when paraval was imported; a program may change its directory later."""
except OSError:  # it was removed
    WORKING_FOLDER = "/"  # type: ignore[misc] # the other branch of the same definition

_SUBMODULES: Final = ("callback", "errors", "storage", "utils")

# What needs an extra is imported by name: a star must work with the base install.
_NEED_AN_EXTRA: Final = frozenset({"LokyEvaluator"})
__all__ = [*(name for name in _MODULES if name not in _NEED_AN_EXTRA), *_SUBMODULES, "__version__"]  # noqa: PLE0604 - the names of the table above


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"paraval.{name}")
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # here: it takes longer than all the rest

        try:
            value = version("paraval")
        except PackageNotFoundError:  # run from its sources
            value = "0+unknown"
    else:
        raise AttributeError(f"module 'paraval' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
