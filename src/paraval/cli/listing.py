"""The tables of ``paraval jobs`` and ``paraval searches``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from paraval.cli.progress import duration, number
from paraval.cli.stored import failures, in_order, is_objective, outputs_are_objectives, parameters_of, status_of
from paraval.cli.summary import _one_line, _shown, _value, make_table, output_console, print_table
from paraval.job import JobStatus
from paraval.storage import JobRecord

__all__ = ["print_jobs", "print_searches", "row_of"]


def print_searches(rows: Sequence[Sequence[str]]) -> None:
    """Print one line for each search; a row is what :func:`row_of` gives."""
    console = output_console()
    if not rows:
        console.print("no searches")
        return
    table = make_table(console)
    for column in ("search", "jobs", "waiting", "running", "done", "failed", "cancelled"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("best", "run-function"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    print_table(console, "Searches (objectives are maximised)", table)


def row_of(search_id: str, records: Sequence[JobRecord]) -> list[str]:
    """Give the cells of a search."""
    failed = failures(records)
    return [search_id, str(len(records)), *_counts(records, failed), _best(records, failed), _functions(records)]


def print_jobs(searches: Sequence[Sequence[JobRecord]], statuses: Collection[str], limit: int) -> None:
    """Print one line for each job.

    Args:
        searches: the jobs of each search to show.
        statuses: which to show: names in lower case, and ``"failed"``; none: all.
        limit: how many at most, the newest; 0: all.
    """
    console = output_console()
    records: list[JobRecord] = []
    failed: set[str] = set()
    for found in searches:
        records += in_order(found)
        failed |= failures(found)
    chosen = [
        record
        for record in records
        if not statuses or status_of(record).lower() in statuses or ("failed" in statuses and record.id in failed)
    ]
    shown = chosen[-limit:]
    if not shown:
        console.print("no jobs" if not records else f"no such jobs among the {len(records)} there are")
        return
    table = make_table(console)
    table.add_column("job", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    objectives = outputs_are_objectives(records)
    table.add_column("objective" if objectives else "output", justify="right" if objectives else "left")
    table.add_column("reason")
    table.add_column("parameters")
    table.add_column("submitted", justify="right", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    for record in shown:
        reason = "" if record.error is None else _one_line(record.error.summary)
        table.add_row(record.id, status_of(record), _output(record.out), reason, _parameters(record), *_times(record))
    print_table(console, "Jobs", table)
    if len(shown) < len(chosen):
        console.print(f"the newest {len(shown)} of {len(chosen)}; --limit 0 shows all")


def _counts(records: Sequence[JobRecord], failed: set[str]) -> list[str]:
    counts = Counter("failed" if record.id in failed else status_of(record) for record in records)
    running = counts["RUNNING"] + counts["CANCELLING"]
    return [str(count) for count in (counts["READY"], running, counts["DONE"], counts["failed"], counts["CANCELLED"])]


def _best(records: Sequence[JobRecord], failed: set[str]) -> str:
    """Give the best objective and its job, where there is one objective."""
    done = [record for record in records if record.status == JobStatus.DONE.value and record.id not in failed]
    ranked = [record for record in done if isinstance(record.out, int | float) and record.out == record.out]
    if not ranked or len(ranked) < len(done):
        return ""
    best = max(in_order(ranked), key=lambda record: record.out)  # of two that are equally good, the first
    return f"{_number(best.out)} (job {best.id})"


def _functions(records: Sequence[JobRecord]) -> str:
    return ", ".join(dict.fromkeys(record.function for record in records if record.function is not None))


def _output(out: Any) -> str:
    if out is None:
        return ""
    if not is_objective(out):
        return _one_line(_shown(out))
    several = out if isinstance(out, tuple | list) else [out]
    return ", ".join(_value(item) if isinstance(item, str) else _number(item) for item in several)


def _number(value: float) -> str:
    try:
        return number(float(value))
    except OverflowError:  # an int beyond the range of floats
        return "-inf" if value < 0 else "inf"


def _parameters(record: JobRecord) -> str:
    parameters = parameters_of(record)
    if parameters is not None:
        return ", ".join(f"{key}={_value(value)}" for key, value in parameters.items())
    return _one_line(
        ", ".join([*map(_shown, record.args or ()), *(f"{k}={_shown(v)}" for k, v in (record.kwargs or {}).items())])
    )


def _times(record: JobRecord) -> tuple[str, str]:
    """Give when the job was submitted, on its evaluator's clock, and how long it took."""
    metadata = record.metadata or {}

    def seconds(key: str) -> float | None:
        value = metadata.get(key)
        return float(value) if isinstance(value, int | float) else None

    submitted, gathered = seconds("timestamp_submit"), seconds("timestamp_gather")
    began, ended = seconds("timestamp_start"), seconds("timestamp_end")
    if began is None or ended is None:  # only a profiled job knows when it ran
        began, ended = submitted, gathered
    took = "" if began is None or ended is None else duration(max(0.0, ended - began))
    return "" if submitted is None else duration(submitted), took
