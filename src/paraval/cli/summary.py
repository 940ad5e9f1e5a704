"""What a sweep came to, on stdout: tables on a terminal, the same without frames and colours elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from paraval.cli.messages import printable
from paraval.cli.progress import duration, number
from paraval.cli.tally import FRONT_LIMIT, Candidate, Tally

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["make_table", "output_console", "print_summary", "print_table"]

SHOWN: Final = 20
"""How many reasons, and how many non-dominated configurations, are shown."""

EXAMPLE_LENGTH: Final = 200
"""How much of an error message is shown."""


def print_summary(
    tally: Tally,
    *,
    method: str,
    num_workers: int,
    wall_time: float,
    utilisation: float | None,
    storage: str | None,
    ending: str | None,
    results: str,
) -> None:
    """Print it.

    Args:
        tally: what happened.
        method: how the jobs ran.
        num_workers: how many at a time.
        wall_time: seconds from the first submit to the end.
        utilisation: share of the workers' time in which they ran jobs, from 0 to 1; None when it is not known.
        storage: the storage and the search in it, where the sweep has one that was named.
        ending: why the sweep ended early, None when it did not.
        results: where the results are.
    """
    console = output_console()
    totals = make_table(console, header=False)
    totals.add_column()
    totals.add_column()
    for label, text in _totals(tally, method, num_workers, wall_time, utilisation, storage, ending):
        totals.add_row(label, text)
    print_table(console, "Sweep", totals)
    if tally.reasons:
        print_table(console, "Failures", _failures(console, tally))
    if tally.best:
        print_table(console, "Best (objectives are maximised)", _candidates(console, tally.best))
    elif tally.front:
        title = f"Non-dominated (objectives are maximised): {len(tally.front)} of {tally.succeeded}"
        if tally.front_is_partial:
            title += f" (only {FRONT_LIMIT} were kept: see the results for all)"
        print_table(console, title, _candidates(console, tally.front[:SHOWN]))
        if len(tally.front) > SHOWN:
            console.print(f"… and {len(tally.front) - SHOWN} more", soft_wrap=True)
    console.print(f"Results: {results}", soft_wrap=True)  # a long path must stay in one piece


def output_console() -> Console:
    """Make the console for stdout: as wide as it takes when no terminal limits it, so that nothing is cut or folded."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 10_000
    return Console(markup=False, highlight=False, emoji=False, width=width)


def print_table(console: Console, title: str, table: Table) -> None:
    """Print it, and a blank line."""
    with console.capture() as captured:
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)
    # Cells are padded to the width of their column, which in a log is only noise at the end of the line.
    console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    console.file.write("\n")


def make_table(console: Console, *, header: bool = True) -> Table:
    """Make an empty table: with a frame on a terminal, without elsewhere. What its cells hold is made printable."""
    from rich import box
    from rich.table import Table

    class PrintableTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*(printable(cell) for cell in cells), **options)

    return PrintableTable(
        show_header=header,
        box=box.ROUNDED if console.is_terminal else None,
        pad_edge=console.is_terminal,
    )


def _totals(
    tally: Tally,
    method: str,
    num_workers: int,
    wall_time: float,
    utilisation: float | None,
    storage: str | None,
    ending: str | None,
) -> list[tuple[str, str]]:
    rows = [
        ("configurations", str(tally.total)),
        ("done", str(tally.succeeded)),
        ("failed", str(tally.failed)),
        ("cancelled", str(tally.cancelled)),
        ("not started", str(tally.unfinished)),
        ("wall time", duration(wall_time)),
    ]
    if utilisation is not None:
        rows.append(("utilisation", f"{100 * utilisation:.0f} %"))
    rows.append(("method", f"{method}, {num_workers} worker{'s' if num_workers != 1 else ''}"))
    if storage is not None:
        rows.append(("storage", storage))
        rows.append(("restored from it", str(tally.restored)))
    if ending is not None:
        rows.append(("ended early", ending))
    return rows


def _failures(console: Console, tally: Tally) -> Table:
    table = make_table(console)
    table.add_column("reason")
    table.add_column("jobs", justify="right")
    table.add_column("first seen")
    reasons = sorted(tally.reasons.items(), key=lambda item: -item[1].count)
    for reason, seen in reasons[:SHOWN]:
        example = f"job {seen.job_id}: {_one_line(seen.example)}" if seen.example else f"job {seen.job_id}"
        table.add_row(_one_line(reason), str(seen.count), example)
    if len(reasons) > SHOWN:
        rest = sum(seen.count for _, seen in reasons[SHOWN:])
        table.add_row(f"… {len(reasons) - SHOWN} more reasons", str(rest), "")
    return table


def _candidates(console: Console, candidates: Sequence[Candidate]) -> Table:
    table = make_table(console)
    several = len(candidates[0].objectives) > 1
    for index in range(len(candidates[0].objectives)):
        table.add_column(f"objective_{index}" if several else "objective", justify="right", no_wrap=True)
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("configuration")
    for candidate in candidates:
        configuration = ", ".join(f"{key}={_value(value)}" for key, value in candidate.configuration.items())
        table.add_row(*map(number, candidate.objectives), candidate.job_id, configuration)
    return table


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and value else _shown(value)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - it is a user's; and an int of more than 4,300 digits has none
        return f"<{type(value).__name__} without a text>"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_LENGTH else f"{line[: EXAMPLE_LENGTH - 1]}…"
