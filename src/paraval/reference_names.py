"""What evaluators have because the reference system's have it: names that programs written for it use.

The reference system is the evaluator subpackage of DeepHyper, whose programs shall run with paraval as they are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from paraval.errors import BadValueError
from paraval.job import Job
from paraval.outcome import FAILURE

if TYPE_CHECKING:
    from paraval.csvlog import CSVLog
    from paraval.engine.gathered import Gathered

__all__ = ["ReferenceNames"]


class ReferenceNames:
    """A mixin of ``Evaluator``."""

    FAIL_RETURN_VALUE: ClassVar[str] = FAILURE
    NEST_ASYNCIO_PATCHED: ClassVar[bool] = False
    PYTHON_EXE: ClassVar[str] = os.environ.get("DEEPHYPER_PYTHON_BACKEND", sys.executable)

    num_workers: int
    _gathered: Gathered
    _csv: CSVLog | None = None

    @property
    def is_master(self) -> bool:
        """Whether this process is the one that submits and gathers."""
        return True

    def to_json(self) -> dict[str, Any]:
        """Describe the evaluator as a dict."""
        return {"type": type(self).__name__, "num_workers": self.num_workers}

    def convert_for_csv(self, val: Any) -> Any:
        """Bring a value to what a CSV file can hold: a list becomes its text."""
        return str(val) if isinstance(val, list) else val

    def decode(self, key: str) -> dict[str, Any]:
        """Read a dict from JSON; ValueError if it is something else."""
        try:
            value = json.loads(key)
        except (TypeError, ValueError) as exc:
            raise BadValueError(f"expected a JSON object: {exc}") from exc
        if not isinstance(value, dict):
            raise BadValueError(f"expected a JSON object, got {type(value).__name__}")
        return value

    def dump_evals(
        self,
        saved_keys: list[str] | Callable[[Job], dict[str, Any]] | None = None,
        log_dir: str = ".",
        filename: str = "results.csv",
    ) -> None:
        """Write the jobs gathered since the last call to a CSV file; the first call starts the file.

        The arguments of the first call hold for the later ones.

        Args:
            saved_keys: None: all arguments; a list: these, through :meth:`convert_for_csv`; a function of a job: its
                dict.
            log_dir: directory of the file.
            filename: name of the file.

        Raises:
            KeyError: a job has no such argument.
        """
        from paraval.csvlog import CSVLog  # here: most evaluators never need it

        csv = self._csv
        if csv is None:
            csv = CSVLog(Path(log_dir, filename), saved_keys=saved_keys, convert=self.convert_for_csv)
        jobs = list(self._gathered.undumped)
        csv.add(jobs)  # raises before anything is forgotten; after that the log keeps the rows
        del self._gathered.undumped[: len(jobs)]
        self._csv = csv
        csv.write()
