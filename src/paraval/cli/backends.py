"""The table of ``paraval backends``, made from what the evaluator classes say of themselves."""

from __future__ import annotations

from typing import Final

from paraval.cli.summary import make_table, output_console, print_table
from paraval.registry import methods

__all__ = ["print_backends"]

STOPPING: Final = {
    "cancel": "cancels the coroutine",
    "kill": "kills the worker",
    "cooperative": "asks; then abandons it",
}
"""What ``cancellation`` means to the job that has run out of time."""


def print_backends() -> None:
    """Print every known method."""
    console = output_console()
    table = make_table(console)
    for column in ("method", "ready", "jobs run in", "a timeout", "closures", "several hosts", ""):
        table.add_column(column)
    for method in methods().values():
        table.add_row(
            method.name,
            _yes(method.missing is None),
            method.parallel,
            STOPPING.get(method.cancellation, method.cancellation),
            _yes(method.closures),
            _yes(method.several_hosts),
            method.summary if method.missing is None else method.missing,
        )
    print_table(console, "Methods", table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
