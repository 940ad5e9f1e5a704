"""Opening a file as a store: what is at the path, how SQLite is to write it, and the layout with its versions."""

from __future__ import annotations

import functools
import os
import random
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from paraval.errors import CorruptStoreError, StorageError, WrongStoreError
from paraval.storage.sqlite.failures import LockedError, explained, is_busy
from paraval.storage.sqlite.filesystem import network_file_system

__all__ = ["APPLICATION_ID", "SCHEMA", "connect", "has_sound_wal", "locate", "look", "until_free"]

APPLICATION_ID: Final = int.from_bytes(b"PrVl", "big")
"""In the header of each store, so that the database of another program is recognised."""

SCHEMA: Final = (
    # 1. ``id`` is the search times 2**40 plus the number of the job; ``changed`` is the search times 2**40 plus the
    # revision of the last change. The largest of either says what comes next, so there is no counter to keep in step.
    # ``log`` is read by logs.py; what it was when it grew long is in ``earlier_logs``, so that a change of a job costs
    # the same whatever the job has been through. ``owner`` is what the log says, for the condition of an update.
    (
        "CREATE TABLE searches (id INTEGER PRIMARY KEY)",
        """
        CREATE TABLE search_values (search INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
        PRIMARY KEY (search, key)) WITHOUT ROWID
        """,
        "CREATE TABLE jobs (id INTEGER PRIMARY KEY, changed INTEGER NOT NULL, owner TEXT, log BLOB NOT NULL)",
        "CREATE INDEX jobs_by_change ON jobs (changed)",
        """
        CREATE TABLE earlier_logs (job INTEGER NOT NULL, changed INTEGER NOT NULL, log BLOB NOT NULL,
        PRIMARY KEY (job, changed)) WITHOUT ROWID
        """,
    ),
    # 2. ``ends`` is a time of the host's clock, in seconds since 1970; infinite for an owner that is there for good.
    ("CREATE TABLE leases (owner TEXT PRIMARY KEY, ends REAL NOT NULL) WITHOUT ROWID",),
)
"""The statements of each version of the layout, the first first: a new store goes through all of them, an older one
through those that it has not seen. What is here once released stays as it is; a new version is added below."""

_TABLES: Final = {"searches", "search_values", "jobs", "earlier_logs", "leases"}
_LONGEST_PAUSE_S: Final = 0.005
_HANDOVER_S: Final = 1.0
"""How long a program that writes ahead may take to end."""

T = TypeVar("T")


def locate(path: Path, *, may_create: bool) -> os.stat_result:
    """Look at what is at a path, without opening it; where there is nothing, put an empty file that only we may read.

    An existing file is not opened: closing it would drop the locks that SQLite holds on it for this process.

    Raises:
        WrongStoreError: there is something, and it is no file.
        CorruptStoreError: there is an empty file, and a journal that says it was a store.
        StorageError: there is nothing and ``may_create`` is false, or its folder is missing.
    """
    found = look(path)
    if found is None:
        if may_create:
            return _create(path)
        raise StorageError(f"the store {str(path)!r} is gone: there is no such file any more")
    if stat.S_ISLNK(found.st_mode):
        raise WrongStoreError(
            f"{str(path)!r} is a symbolic link; a store is opened by its own path ({os.path.realpath(path)!r}), as its "
            "journal lies beside it"
        )
    if stat.S_ISDIR(found.st_mode):
        raise WrongStoreError(
            f"{str(path)!r} is a folder; give the path of a file in it, as {str(path / 'campaign.db')!r}"
        )
    if not stat.S_ISREG(found.st_mode):
        raise WrongStoreError(f"{str(path)!r} is no regular file, so it cannot be a store; give the path of a file")
    if found.st_size == 1:  # which SQLite takes for none
        raise WrongStoreError(f"{str(path)!r} is no SQLite database, but a file of one byte; give the path of a store")
    if found.st_size == 0:
        _refuse_if_emptied(path)
    return found


def look(path: Path) -> os.stat_result | None:
    """Give what is at a path; None if there is nothing.

    Raises:
        StorageError: nobody can say.
    """
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StorageError(f"the store {str(path)!r} cannot be reached: {exc.strerror}") from exc


def connect(path: Path, patience_s: float) -> sqlite3.Connection:
    """Open the store at a path that :func:`locate` has looked at, making or migrating its layout where needed.

    Raises:
        WrongStoreError: it is no database, or that of another program, or of a later release of paraval.
        CorruptStoreError: it is damaged.
        StorageError: it cannot be opened for another reason, or was locked for ``patience_s`` seconds.
    """
    connection = None
    try:
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",
            uri=True,
            timeout=0,  # until_free waits, in a way that Ctrl-C can interrupt
            isolation_level=None,
            check_same_thread=False,
            cached_statements=32,
        )
        for pragma in (
            "synchronous = FULL",
            "fullfsync = ON",  # where fsync alone does not reach the disk (macOS)
            "temp_store = MEMORY",
            "cache_size = -16000",  # KiB; a large batch then need not be written out half-way
            "journal_size_limit = 4194304",
            "trusted_schema = OFF",
            "cell_size_check = ON",
        ):
            until_free(functools.partial(connection.execute, f"PRAGMA {pragma}"), path, patience_s)
        query = "SELECT count(*) FROM json_each('[1]')"
        until_free(functools.partial(connection.execute, query), path, patience_s)
        is_new = _prepare_layout(connection, path, patience_s)
        _choose_journal(connection, path, patience_s, is_new=is_new)
    except BaseException as exc:
        if connection is not None:
            connection.close()
        if isinstance(exc, sqlite3.Error):
            raise _told_from_file(exc, path) from exc
        raise
    return connection


def until_free(call: Callable[[], T], path: Path, patience_s: float) -> T:
    """Call again and again while the file is locked by somebody else; for calls that change nothing when they fail.

    Raises:
        LockedError: it was locked for ``patience_s`` seconds.
        sqlite3.Error: whatever else went wrong.
    """
    deadline = time.monotonic() + patience_s
    pause = 0.0001
    while True:
        try:
            return call()
        except sqlite3.Error as exc:
            if not is_busy(exc):
                raise
            if time.monotonic() >= deadline:
                raise LockedError(
                    f"the store {str(path)!r} was locked by another program for {patience_s:g} s; "
                    "let that program end, or give SqliteStorage a longer timeout"
                ) from exc
        # Short and uneven pauses: whoever writes one thing after the other leaves only short gaps, one of which we
        # must meet. SQLite's own pauses, of up to 100 ms, starve.
        time.sleep(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def has_sound_wal(version: tuple[int, ...]) -> bool:
    """Whether this version of SQLite is free of the bug that can damage a file in WAL mode when several write it."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)


def _create(path: Path) -> os.stat_result:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:  # somebody was faster
        return locate(path, may_create=False)
    except FileNotFoundError:
        raise StorageError(
            f"there is no folder {str(path.parent)!r} for the store {path.name!r}; make it first"
        ) from None
    except OSError as exc:
        raise StorageError(f"the store {str(path)!r} cannot be made: {exc.strerror}") from exc
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask; SQLite gives the files beside it the same mode
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)  # nobody has opened it yet, so there are no locks to drop


def _refuse_if_emptied(path: Path) -> None:
    """Raise if an empty file was a store once: then its journal, which outlives each commit, is not blank."""
    for ending, says_so in (("-journal", lambda head: head and not any(head)), ("-wal", bool)):
        try:
            with path.with_name(f"{path.name}{ending}").open(
                "rb"
            ) as file:  # SQLite holds no locks on these, so closing drops none
                head = file.read(28)
        except OSError:
            continue
        if says_so(head):
            raise CorruptStoreError(
                f"the store {str(path)!r} is empty, but {path.name}{ending} says that it was not: it was cut. Take a "
                "copy of it from before; to start anew, remove both"
            )


# -- the layout --------------------------------------------------------------------------------------------------------


def _prepare_layout(connection: sqlite3.Connection, path: Path, patience_s: float) -> bool:
    """Bring the layout up to date; True if there was none."""

    def version() -> int:
        return until_free(lambda: _version(connection, path), path, patience_s)

    if (found := version()) < len(SCHEMA):
        until_free(lambda: connection.execute("BEGIN IMMEDIATE"), path, patience_s)
        try:
            found = _version(connection, path, blank=1)  # somebody may have been faster
            for statements in SCHEMA[found:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(SCHEMA)}")
            until_free(lambda: connection.execute("COMMIT"), path, patience_s)
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    names = {name for (name,) in until_free(lambda: connection.execute(query).fetchall(), path, patience_s)}
    if missing := _TABLES - names:
        raise CorruptStoreError(
            f"the store {str(path)!r} is damaged: it lacks {', '.join(sorted(missing))}; take a copy of it from before"
        )
    return found == 0


def _version(connection: sqlite3.Connection, path: Path, *, blank: int = 0) -> int:
    """Give the version of the layout that is there; 0 in an empty file, which has this many pages.

    A transaction that is going to write gives an empty file its first page.
    """
    ((application_id,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    ((pages,),) = connection.execute("PRAGMA page_count")
    if application_id != APPLICATION_ID:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' LIMIT 5")]
        if pages == blank and application_id == version == 0 and not names:
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


def _choose_journal(connection: sqlite3.Connection, path: Path, patience_s: float, *, is_new: bool) -> None:
    """Have SQLite write ahead where it can be trusted with that, and keep a rollback journal elsewhere.

    The mode is one of the file, for everybody who has it open: so a file keeps the mode it was made with, but for one
    that was made to be written ahead and is opened by a SQLite that must not.

    A rollback journal persists: its header is overwritten, which takes one sync less than making a file anew each time.
    In this mode, unlike in SQLite's default, ``synchronous=FULL`` makes a commit last through a loss of power.
    """
    ((mode,),) = until_free(lambda: connection.execute("PRAGMA journal_mode").fetchall(), path, patience_s)
    is_sound = has_sound_wal(sqlite3.sqlite_version_info)
    wanted = "wal" if is_sound and (is_new or mode == "wal") else "persist"
    if wanted == "wal" and (kind := network_file_system(path)):
        raise StorageError(
            f"the store {str(path)!r} is on a network file system ({kind}), where SQLite cannot write ahead (WAL): put "
            "it on a disk of this machine, or use RedisStorage between machines"
        )
    pragma = f"PRAGMA journal_mode = {wanted}"
    try:
        until_free(lambda: connection.execute(pragma).fetchall(), path, patience_s if mode != "wal" else _HANDOVER_S)
    except LockedError as exc:
        if mode == "wal" != wanted:
            raise StorageError(
                f"the store {str(path)!r} is in use by a program whose SQLite writes ahead (WAL); that of this program "
                f"({sqlite3.sqlite_version}) could damage it then: let the other end, or give both the same SQLite"
            ) from exc
        raise


def _told_from_file(exc: sqlite3.Error, path: Path) -> Exception:
    """Explain a failure to open; if it is no database, by how the file begins."""
    if getattr(exc, "sqlite_errorcode", None) != sqlite3.SQLITE_NOTADB:
        return explained(exc, path)
    try:
        with path.open("rb") as file:  # it is no database, so nobody has locks on it to be dropped
            begin = f"it begins with {file.read(16)!r}"
    except OSError:
        begin = "it cannot be read"
    return WrongStoreError(
        f"{str(path)!r} is no SQLite database, or was damaged from its first bytes on ({begin}); give the path of a "
        "store, or one where there is nothing yet"
    )
