"""The table of ``paraval backends``, made from what the evaluator classes say of themselves."""

from __future__ import annotations

from typing import Final

from paraval.cli.summary import make_table, output_console, print_table
from paraval.registry import methods

__all__ = ["print_backends"]

STOPPING: Final = {
    "cancel": "cancels the coroutine",
    "kill": "kills the worker",
    "cooperative": "asks, then abandons",
}
"""What ``cancellation`` means to a job that has run out of time."""


def print_backends() -> None:
    """Print every known method; what a method that is not ready could do is known only once it can be loaded."""
    console = output_console()
    table = make_table(console)
    for column in ("method", "ready", "runs jobs in", "a timeout", "closures", "hosts"):
        table.add_column(column)
    known = methods()
    for method in known.values():
        if method.missing is None:
            stopping = STOPPING.get(method.cancellation, method.cancellation)
            abilities = (method.parallel, stopping, _yes(method.closures), "several" if method.several_hosts else "one")
            table.add_row(method.name, "yes" if method.argument is None else "in programs", *abilities)
        else:
            table.add_row(method.name, f"no: {method.missing}", "?", "?", "?", "?")
    print_table(console, "Methods", table)
    for method in known.values():
        if method.summary:
            needs = "" if method.argument is None else f" Not for 'paraval run': it needs {method.argument}=…"
            console.print(f"{method.name}: {method.summary.replace('``', '')}{needs}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
