"""The tables of a store, and how those of an older release become those of this one."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

from paraval.errors import CorruptStoreError, WrongStoreError
from paraval.storage.sqlite.values import NO_LEASES

__all__ = ["APPLICATION_ID", "SCHEMA", "prepare"]

APPLICATION_ID: Final = int.from_bytes(b"PrVl", "big")
"""In the header of each store, so that the database of another program is recognised."""

SCHEMA: Final = (
    # 1. All that is known of jobs is in ``entries``, to which is only ever added; entries.py reads them. ``changed`` is
    # the search times 2**40 plus the revision of the entry's last change; those of its other changes come before. A job
    # is the search times 2**40 plus its number. ``new_jobs`` says in which entry so many jobs, from the first on, were
    # made, and who by; ``places`` in which entries else a job is changed; ``adopted`` to whom a job was given since.
    # The last entry and the last new job say what comes next, so there is no counter to keep in step.
    #
    # Each ``seal`` is a checksum of its row. What is missing is seen by ``sums``: over the places of 64 jobs, and over
    # the seals of those of them that were adopted. One row stands after all others of a search, where there can be no
    # jobs, on the page that is written most of the time anyway: its ``places`` is how many changes of jobs there were,
    # its ``adopted`` a sum over the search's values. ``token`` is by chance, and tells who made a search.
    (
        "CREATE TABLE store (id BLOB NOT NULL)",  # by chance: so that no other is taken for it
        "INSERT INTO store VALUES (randomblob(16))",
        "CREATE TABLE searches (id INTEGER PRIMARY KEY, token BLOB NOT NULL)",
        (
            "CREATE TABLE search_values (search INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,"
            " PRIMARY KEY (search, key)) WITHOUT ROWID"
        ),
        "CREATE TABLE entries (changed INTEGER PRIMARY KEY, data BLOB NOT NULL)",
        (
            "CREATE TABLE new_jobs (first INTEGER PRIMARY KEY, count INTEGER NOT NULL, owner TEXT,"
            " changed INTEGER NOT NULL, seal INTEGER NOT NULL)"
        ),
        (
            "CREATE TABLE places (job INTEGER NOT NULL, changed INTEGER NOT NULL, PRIMARY KEY (job, changed))"
            " WITHOUT ROWID"
        ),
        "CREATE TABLE sums (jobs INTEGER PRIMARY KEY, places INTEGER NOT NULL, adopted INTEGER NOT NULL)",
        "CREATE TABLE adopted (job INTEGER PRIMARY KEY, owner TEXT NOT NULL, seal INTEGER NOT NULL)",
    ),
    # 2. All leases are one row with a checksum, so that none can be missing unnoticed; values.py reads it.
    (
        "CREATE TABLE leases (data BLOB NOT NULL)",
        f"INSERT INTO leases VALUES (x'{NO_LEASES.hex()}')",  # noqa: S608 - made of a constant
    ),
)
"""The statements of each version of the layout, the first first: a new store goes through all of them, an older one
through those that it has not seen. What is here once released stays as it is; a new version is added below."""

Ask = Callable[[str], list[Any]]
"""Runs a statement, and gives all that it finds."""


def prepare(ask: Ask, path: Path, *, may_create: bool) -> bool:
    """Bring the layout of a database up to date; True if it had none, being empty.

    Raises:
        CorruptStoreError: it is empty, and it was a store.
        WrongStoreError: it is the database of another program, or of a later release.
        CorruptStoreError: the layout is damaged.
    """
    with _transaction(ask, "BEGIN"):
        found = _version(ask, path)
    if found == 0 and not may_create:
        raise CorruptStoreError(
            f"the store {str(path)!r} is empty: it was cut while it was in use, or since; take a copy of it from before"
        )
    if found < len(SCHEMA):
        with _transaction(ask, "BEGIN IMMEDIATE"):
            found = _version(ask, path, blank=1)  # somebody may have been faster
            for statements in SCHEMA[found:]:
                for statement in statements:
                    ask(statement)
            ask(f"PRAGMA application_id = {APPLICATION_ID}")
            ask(f"PRAGMA user_version = {len(SCHEMA)}")
    if missing := _layout() - set(ask("SELECT name, sql FROM sqlite_master")):
        names = ", ".join(sorted(name for name, _ in missing))
        raise CorruptStoreError(
            f"the store {str(path)!r} is damaged: it lacks {names}, or has it in another form; "
            "take a copy of it from before"
        )
    return found == 0


def _version(ask: Ask, path: Path, *, blank: int = 0) -> int:
    """Give the version of the layout that is there; 0 in an empty file, which has this many pages.

    A transaction that is going to write gives an empty file its first page.
    """
    ((application_id,),) = ask("PRAGMA application_id")
    ((version,),) = ask("PRAGMA user_version")
    if application_id != APPLICATION_ID:
        names = [name for (name,) in ask("SELECT name FROM sqlite_master WHERE type = 'table' LIMIT 5")]
        if ask("PRAGMA page_count") == [(blank,)] and application_id == version == 0 and not names:
            return 0
        raise WrongStoreError(
            f"{str(path)!r} is a SQLite database, but no store of paraval (its tables: {', '.join(names) or 'none'}); "
            "give the path of a store, or one where there is nothing yet"
        )
    if version > len(SCHEMA):
        raise WrongStoreError(
            f"the store {str(path)!r} has layout {version}, of a later release of paraval; this one knows them up to "
            f"{len(SCHEMA)}: upgrade paraval"
        )
    if version < 1:
        raise CorruptStoreError(f"the store {str(path)!r} is damaged: its layout is {version}; take a copy from before")
    return int(version)


@functools.cache
def _layout() -> frozenset[tuple[str, str]]:
    """Give the names and texts of all tables and indexes as SQLite keeps them."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for statements in SCHEMA:
            for statement in statements:
                connection.execute(statement)
        return frozenset(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


@contextmanager
def _transaction(ask: Ask, begin: str) -> Iterator[None]:
    """Begin, and in the end commit; after an error the connection is closed, which rolls back."""
    ask(begin)
    yield
    ask("COMMIT")
