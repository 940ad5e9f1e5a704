"""What the commands find in a storage: never one that they would make, and of each job what a person asks first."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click

from paraval.errors import ParavalError
from paraval.job import JobStatus
from paraval.outcome import FAILURE, is_failure
from paraval.storage import JobRecord, Storage
from paraval.storage.urls import hide_secrets, open_storage, sqlite_path, without_secrets

__all__ = [
    "failures",
    "files_at",
    "files_of",
    "in_order",
    "is_objective",
    "is_same_file",
    "not_empty",
    "open_existing",
    "outputs_are_objectives",
    "parameters_of",
    "status_of",
    "told_of_storage",
]

_FLEETING: Final = {"memory", "null", "shared"}


def open_existing(name: str) -> Storage:
    """Open a storage that is there.

    Args:
        name: a URL, or the path of a SQLite file.

    Raises:
        click.ClickException: there is no such storage.
        ParavalError: it cannot be opened.
    """
    path = _path_of(name)
    if path is not None and not os.path.exists(path):  # noqa: PTH110 - pathlib's raises where a folder is closed to us
        raise click.ClickException(
            hide_secrets(f"no such file: {path}", name) if ":" in name else f"no such file: {path}"
        )
    if path is not None and path.is_file() and path.stat().st_size == 0:
        raise click.ClickException(f"{path} is empty, and no storage")
    if path is not None and path.is_dir():
        raise click.ClickException(f"{path} is a directory; a storage is a SQLite file, or a URL")
    scheme = name.partition(":")[0].lower()
    if path is None and scheme in _FLEETING:
        raise click.ClickException(f"'{scheme}:' ends with the program that made it: there is nothing to see")
    if path is None:
        with told_of_storage(name, "opened"):
            return open_storage(name)
    from paraval.storage.sqlite import SqliteStorage

    return SqliteStorage(path)


@contextlib.contextmanager
def told_of_storage(url: str, what: str) -> Iterator[None]:
    """Make one line of whatever a storage raises that another package brought.

    Args:
        url: of the storage; there may be a password in it.
        what: what cannot be done to it.

    Raises:
        click.ClickException: for every exception that is neither paraval's own nor click's, and for one of paraval's
            own whose message holds what must not be shown.
        ParavalError: as it was raised.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as exc:
        is_url = ":" in url
        shown = without_secrets(url) if is_url else url
        told = hide_secrets(str(exc), url) if is_url else str(exc)
        if isinstance(exc, ParavalError):
            if told == str(exc):
                raise
            raise click.ClickException(told) from exc
        raise click.ClickException(f"the storage {shown} cannot be {what}: {type(exc).__name__}: {told}") from exc


def files_of(name: str) -> list[Path]:
    """Give the files that a storage consists of; not all of them need be there."""
    path = _path_of(name)
    if path is None:
        return []
    return files_at(path)


def files_at(path: Path) -> list[Path]:
    """Give the files that a SQLite store at this path consists of; not all of them need be there."""
    return [Path(f"{path}{end}") for end in ("", "-journal", "-wal", "-shm")]


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, or would, were it there."""
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):  # one of them does not exist yet, or cannot
        pass
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError):
        return Path(one).absolute() == Path(other).absolute()


def _path_of(name: str) -> Path | None:
    """Give the path of a SQLite file; None for what is a URL of another kind."""
    return Path(name) if ":" not in name or os.path.exists(name) else sqlite_path(name)  # noqa: PTH110 - it never raises


def not_empty(storage: Storage, search_ids: Iterable[str], most: int) -> list[str]:
    """Give those of the searches that have jobs, at most so many: finding out may mean reading them."""
    return list(itertools.islice((search_id for search_id in search_ids if storage.scan(search_id)[0]), most))


def in_order(records: Sequence[JobRecord]) -> list[JobRecord]:
    """Sort the jobs of a search by their numbers."""
    return sorted(records, key=lambda record: int(record.id.rpartition(".")[2]))


def parameters_of(record: JobRecord) -> dict[str, Any] | None:
    """Give the configuration of a job that an evaluator submitted; None where it has arguments of another form."""
    if record.args is not None and len(record.args) == 1 and isinstance(record.args[0], dict) and not record.kwargs:
        parameters: dict[str, Any] = record.args[0]
        return parameters
    return {} if not record.args and not record.kwargs else None


def status_of(record: JobRecord) -> str:
    """Name the status."""
    try:
        return JobStatus(record.status).name
    except ValueError:  # stored by hand
        return str(record.status)


def is_objective(out: Any) -> bool:
    """Whether an output may be what a run-function of an optimisation returns: a number, a failure, or several."""
    if isinstance(out, tuple | list):
        return bool(out) and all(isinstance(item, int | float | str) for item in out)
    return isinstance(out, int | float | str)


def outputs_are_objectives(records: Sequence[JobRecord]) -> bool:
    """Whether what the jobs of a search returned are objectives: what stands for failures is not all there is."""
    outs = [record.out for record in records if record.out is not None]
    if not all(map(is_objective, outs)):
        return False
    return not all(map(is_failure, outs)) or all(str(out).startswith(FAILURE) for out in outs if isinstance(out, str))


def failures(records: Sequence[JobRecord]) -> set[str]:
    """Give the ids of those jobs of a search that ended without a result, other than by being cancelled."""
    objectives = outputs_are_objectives(records)
    return {
        record.id
        for record in records
        if record.status == JobStatus.DONE.value
        and (record.error is not None or (objectives and is_failure(record.out)))
    }
