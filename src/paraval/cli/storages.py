"""The commands that look into a storage: ``paraval jobs``, ``paraval searches`` and ``paraval export``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from paraval.cli.choices import FORMATS, STATUSES

if TYPE_CHECKING:
    from paraval.storage import Storage

__all__ = ["export", "jobs", "searches"]


@click.command(short_help="List the jobs in a storage.")
@click.argument("storage")
@click.option("--search", "search_id", metavar="ID", help="Of this search alone; 'paraval searches' lists them.")
@click.option(
    "--status",
    "statuses",
    type=click.Choice(STATUSES, case_sensitive=False),
    multiple=True,
    help="Those with this status alone, or that failed; repeatable.",
)
@click.option(
    "--limit", type=click.IntRange(min=0), default=50, show_default=True, metavar="N", help="The newest N; 0: all."
)
def jobs(storage: str, search_id: str | None, statuses: tuple[str, ...], limit: int) -> None:
    """List the jobs in STORAGE: what became of each, why it failed, with which parameters, and when.

    STORAGE is a URL (sqlite:///campaign.db, redis://host:6379/0) or the path of a SQLite file. Nothing is made where
    there is none. Times are on the clock of the evaluator that submitted the job; where a job was not profiled, it took
    from its submit to its gather.

    \b
    paraval jobs campaign.db --status failed
    """  # noqa: D301 - \b is the character by which click knows lines that must not be joined
    from paraval.cli.listing import print_jobs

    with _opened(storage) as opened:
        found = [opened.scan(chosen)[0] for chosen in _chosen(opened, search_id)]
    print_jobs(found, statuses, limit)


@click.command(short_help="List the searches in a storage.")
@click.argument("storage")
def searches(storage: str) -> None:
    """List the searches in STORAGE: how many of their jobs are in which state, and the best objective.

    STORAGE is a URL (sqlite:///campaign.db, redis://host:6379/0) or the path of a SQLite file.
    """
    from paraval.cli.listing import print_searches, row_of

    with _opened(storage) as opened:
        rows = [row_of(search_id, opened.scan(search_id)[0]) for search_id in opened.search_ids()]
    print_searches(rows)


@click.command(short_help="Write the jobs of a search to a file.")
@click.argument("storage")
@click.option("--search", "search_id", metavar="ID", help="Which search; needed where several have jobs.")
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(FORMATS, case_sensitive=False),
    help="[default: the one that FILE ends with, or csv]",
)
@click.option("-o", "--output", metavar="FILE", default="-", show_default=True, help="Where to; - for stdout.")
def export(storage: str, search_id: str | None, form: str | None, output: str) -> None:
    """Write the jobs of a search in STORAGE to a file that other programs read.

    CSV has the columns of the results of 'paraval run'. Parquet has the same, with numbers as numbers; it needs the
    extra 'parquet'. JSON and JSON Lines have one object for each job, with all that is stored of it. A file that is in
    the way of the output is kept beside it.

    \b
    paraval export campaign.db --output results.csv
    paraval export redis://host:6379/0 --search 3 --format jsonl | jq .output
    """  # noqa: D301 - as above
    from paraval.cli.export import Destination, in_format
    from paraval.cli.messages import say
    from paraval.cli.stored import files_of, not_empty

    destination = Destination(output, form, files_of(storage))
    with _opened(storage) as opened:
        known = chosen = _chosen(opened, search_id)
        if len(known) > 1:
            chosen = not_empty(opened, known, 2)
        if len(chosen) > 1:
            some = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")  # noqa: PLR2004 - enough of a line
            raise click.UsageError(f"there are {len(known)} searches ({some}): choose one with --search")
        records = opened.scan(chosen[0])[0] if chosen else []
    destination.write(in_format(records, destination.form))
    if destination.kept_as is not None:
        say(f"the file that was there is now {destination.kept_as}")


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Storage]:
    """Open a storage; the block is for what is asked of it, as whatever is raised there is taken for its failure."""
    from paraval.cli.stored import open_existing, told_of_storage

    with told_of_storage(name, "read"), open_existing(name) as storage:
        yield storage


def _chosen(storage: Storage, search_id: str | None) -> list[str]:
    """Give the searches that were asked for."""
    known = storage.search_ids()
    if search_id is None:
        return known
    if search_id not in known:
        raise click.UsageError(f"there is no search {search_id!r}; 'paraval searches' lists those there are")
    return [search_id]
