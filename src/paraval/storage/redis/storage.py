"""A storage on a Redis or Valkey server: for drivers and workers on several machines."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from paraval.errors import BadValueError, CorruptStoreError, StorageError, WrongStoreError
from paraval.storage.base import Storage, UnknownIdError, UnstorableError
from paraval.storage.codec import decode, encode
from paraval.storage.records import JobChange, JobRecord
from paraval.storage.redis import scripts
from paraval.storage.redis.arguments import Groups, as_bytes, as_text, in_log, joined, mark, once, packed, placed, split
from paraval.storage.redis.frames import frame_of_adoption, frames_of_changes, frames_of_records, record_of
from paraval.storage.redis.server import parse

if TYPE_CHECKING:
    from paraval.storage.redis.link import Link

__all__ = ["RedisStorage"]

_MOST_BYTES: Final = 500 * 1024 * 1024
"""Redis takes no string of more than 512 MB."""
_MUCH: Final = 64 * 1024 * 1024
"""Bytes in one step of the server; changes beyond that make another."""
_JOBS: Final = 200
"""How many jobs to read in one step."""
_CHANGES: Final = (256, 4096)
"""How many changes to look at in one step of a scan: at first, and at most, while what they give is small."""
_SMALL: Final = 4 * 1024 * 1024
_FOREVER_MS: Final = 10**15
_NEVER: Final = "never"
"""A condition that no job meets: an owner has a mark before its name."""


class RedisStorage(Storage):
    """Keeps searches and jobs on a Redis or Valkey server, without any module of it.

    All who give the same server, database and prefix share what is there, on any machine. An operation is one step of
    the server: all or none of it happens, and no number is given out twice. One whose connection is lost is tried again
    for ``retry_for`` seconds, and the server does not execute it twice; when it stays lost, there is an error, and what
    was sent last may have been executed or not. If the thread makes the same call again within ten seconds, and writes
    nothing else before, that is another try: it is not executed twice either.

    Values are written as MessagePack, never pickle: whoever can write to the server cannot make a driver run anything.
    They are not encrypted.

    **What can be lost** is the server's to say: what is acknowledged is in its memory. With ``appendonly yes`` and
    ``appendfsync always`` it is also on its disk; with ``appendfsync everysec``, a crash may cost the last second or
    two; without ``appendonly``, all since its last snapshot (``save``). A fail-over costs what the replica had not yet
    received. Numbers of jobs that were lost so are given out again. ``maxmemory-policy`` should be ``noeviction``;
    there is a warning when it is another.

    The storage can be sent to other processes (its password goes along), and used after a fork. Nothing is connected
    before the first use. A server that has never answered is an error at once. A cluster will not do.

    Args:
        url: ``redis://host:6379/0``, ``rediss://`` with TLS, ``unix:///run/redis.sock?db=0`` through a local socket; a
            user and a password may stand in it, percent-encoded (``redis://user:password@host``).
        username: instead of one in the URL.
        password: likewise.
        ssl_ca_certs: file of the certificates to trust; None: those of the system.
        ssl_certfile: file of a certificate to show, where the server wants one.
        ssl_keyfile: its key.
        ssl_check_hostname: whether the server's certificate must be for this host.
        prefix: what all keys begin with: several storages may share a database.
        timeout: seconds to connect, and to wait for the next part of an answer.
        retry_for: seconds for which to try again what a lost connection has interrupted.

    Raises:
        ValueError: the URL or another argument makes no sense.
        ImportError: the Redis client is not installed.
    """

    can_travel = True

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        username: str | None = None,
        password: str | None = None,
        ssl_ca_certs: str | os.PathLike[str] | None = None,
        ssl_certfile: str | os.PathLike[str] | None = None,
        ssl_keyfile: str | os.PathLike[str] | None = None,
        ssl_check_hostname: bool = True,
        prefix: str = "paraval",
        timeout: float = 10.0,
        retry_for: float = 30.0,
    ) -> None:
        if not isinstance(prefix, str) or not prefix:
            raise BadValueError(f"prefix must be a text that is not empty, not {prefix!r}")
        if not 0 < timeout < math.inf:
            raise BadValueError(f"timeout must be a number of seconds above 0, not {timeout!r}")
        if not 0 <= retry_for < math.inf:
            raise BadValueError(f"retry_for must be a number of seconds, not {retry_for!r}")
        options = {"username": username, "password": password}
        files = {"ssl_ca_certs": ssl_ca_certs, "ssl_certfile": ssl_certfile, "ssl_keyfile": ssl_keyfile}
        options |= {name: None if value is None else os.fspath(value) for name, value in files.items()}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        server = parse(url)
        for name in given:
            if getattr(server, name) is not None:
                raise BadValueError(f"{name} is given twice: in the URL, and beside it")
            if name.startswith("ssl_") and not server.tls:
                raise BadValueError(f"{name} is for TLS: the URL should begin with rediss://")
        self._server = dataclasses.replace(
            server, **given, ssl_check_hostname=ssl_check_hostname, timeout=timeout, retry_for=retry_for
        )
        if self._server.username is not None and self._server.password is None:
            raise BadValueError("a username was given without a password")
        self._prefix = prefix
        self._was_known = False
        _ = self._link  # it needs the client, and says so where that is missing

    @functools.cached_property
    def _link(self) -> Link:
        from paraval.storage.redis.link import Link  # here: a worker that was sent a storage may never use it

        return Link(self._server, as_bytes(self._prefix), known=self._was_known)

    def __repr__(self) -> str:
        return f"RedisStorage({str(self._server)!r}, prefix={self._prefix!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_server": self._server, "_prefix": self._prefix, "_was_known": self._link.known}

    # -- connection ----------------------------------------------------------------------------------------------------

    def connect(self) -> Self:
        """See whether the server can be used.

        Raises:
            StorageError: it cannot; the message says why.
        """
        self._run(scripts.HELLO)
        return self

    def is_connected(self) -> bool:
        """Ask the server; it has ``timeout`` seconds to answer."""
        try:
            self._answer(self._link.run(scripts.HELLO, patient=False))
        except StorageError:
            return False
        return True

    def close(self) -> None:
        """Close the connections that are open in this process. The storage may be used again: it opens others."""
        self._link.close()

    # -- searches ------------------------------------------------------------------------------------------------------

    def new_search(self) -> str:
        return str(self._run(scripts.NEW_SEARCH, b"%d" % scripts.SCHEMA)[0])

    def search_ids(self) -> list[str]:
        return [str(number) for number in range(self._run(scripts.SEARCHES)[0])]

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        stored = encode(value, f"value {key!r}")
        _refuse_beyond(len(stored), f"the value {key!r}")
        self._run(scripts.PUT_VALUE, as_bytes(search_id), as_bytes(key), stored)

    def get_value(self, search_id: str, key: str) -> Any:
        (stored,) = self._run(scripts.GET_VALUE, as_bytes(search_id), as_bytes(key))
        if stored is None:
            raise UnknownIdError(f"no value {key!r} in search {search_id!r}")
        try:
            return decode(stored)
        except (CorruptStoreError, RecursionError) as exc:
            raise CorruptStoreError(f"the value {key!r} of search {search_id!r} in {self!r}: {exc}") from exc

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        args = [as_bytes(search_id)]
        for owner, some in itertools.groupby(records, key=_owner):
            ends, body = placed(frames_of_records(list(some)))
            _refuse_beyond(len(body), f"what was given of {len(records)} jobs")
            args += [as_bytes(mark(owner)), ends, body]
        number, revision = self._run(scripts.ADD, *args)
        for record in records:
            record.id, record.revision = f"{search_id}.{number}", revision
            number += 1
            revision += 1

    def update(self, changes: Sequence[JobChange]) -> None:
        steps = [Groups()]
        for change, frame in zip(changes, frames_of_changes(changes), strict=True):
            if steps[-1].size + len(frame) > _MUCH and steps[-1].size:
                steps.append(Groups())
            steps[-1].add(change.id, mark(change.by), frame)
        if len(steps) > 1:  # more than one step of the server should be; all of it is written if every job is there
            everyone = Groups()
            for change in changes:
                everyone.add(change.id, _NEVER, b"")
            self._change(everyone)
        for step in steps:
            self._change(step)

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        groups, frame = Groups(), frame_of_adoption(owner)
        for job_id, revision in revisions.items():
            groups.add(job_id, revision, frame)
        return {as_text(job_id) for job_id in self._change(groups, mark(owner))}

    def _change(self, groups: Groups, heir: str = "") -> list[bytes]:
        """Write changes; give the ids of those jobs that went to an heir, if there is one."""
        if not groups.by_search:
            return []
        args = [as_bytes(heir)]
        for search_id, (numbers, conditions, frames) in groups.by_search.items():
            lengths, body = joined(frames[:1] if heir else frames)
            _refuse_beyond(len(body), f"what was given of {len(numbers)} jobs")
            args += [as_bytes(search_id), packed(numbers), in_log(numbers), packed(once(conditions)), lengths, body]
        (adopted,) = self._run(scripts.CHANGE, *args)
        return list(adopted)

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        asked = [*job_ids]
        places: dict[str, list[int]] = {}
        for place, job_id in enumerate(asked):
            places.setdefault(split(job_id)[0], []).append(place)
        found: dict[int, JobRecord] = {}
        for search_id, here in places.items():
            for first in range(0, len(here), _JOBS):
                some = here[first : first + _JOBS]
                numbers = packed([split(asked[place])[1] for place in some])
                (answer,) = self._run(scripts.GET, as_bytes(search_id), numbers)
                found |= zip(some, self._read(search_id, answer), strict=True)
        return [found[place] for place in range(len(asked))]

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        # In several steps, if it is much. A job that changes meanwhile is met again at its new place: in the end, this
        # is the state that the last step saw.
        found: dict[str, JobRecord] = {}
        limit, most = _CHANGES
        since, is_end = max(0, since), False
        while not is_end:
            since, is_end, answer = self._run(scripts.SCAN, as_bytes(search_id), b"%d" % since, b"%d" % limit)
            found |= {record.id: record for record in self._read(search_id, answer)}
            if sum(len(item) for item in answer if isinstance(item, bytes)) < _SMALL:
                limit = min(4 * limit, most)
        return sorted(found.values(), key=_revision), since

    def _read(self, search_id: str, answer: list[Any]) -> Iterator[JobRecord]:
        """Give the records in an answer: for each job its number, its revision, how many pieces it has, and those."""
        at = 0
        while at < len(answer):
            number, revision, count = answer[at : at + 3]
            at += 3 + count
            try:
                yield record_of(f"{search_id}.{number}", revision, answer[at - count : at])
            except CorruptStoreError as exc:
                raise CorruptStoreError(f"{self!r}: {exc}") from exc

    # -- leases --------------------------------------------------------------------------------------------------------

    def renew(self, owner: str, seconds: float) -> None:
        span = min(max(0.0, seconds) * 1000, _FOREVER_MS)
        self._run(scripts.RENEW, as_bytes(owner), b"%d" % math.ceil(span))

    def owners(self) -> set[str]:
        return {as_text(owner) for owner in self._run(scripts.OWNERS)[0]}

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self, script: scripts.Script, *args: bytes) -> list[Any]:
        return self._answer(self._link.run(script, *args))

    def _answer(self, answer: list[Any]) -> list[Any]:
        """Give what a script gave, or say what it did not like."""
        match answer:
            case [b"ok", *rest]:
                return rest
            case [b"no search", bytes(search_id), int(count)]:
                raise UnknownIdError(f"no search {as_text(search_id)!r} in this storage; it has {_listed(count)}")
            case [b"no job", bytes(job_id)]:
                raise UnknownIdError(f"no job {as_text(job_id)!r} in this storage")
            case [b"schema", bytes(found)]:
                raise self._wrong_schema(found)
            case [b"full", bytes(search_id)]:
                raise StorageError(f"search {as_text(search_id)!r} had 80 million changes, and takes no more")
            case [b"lost", bytes(search_id)]:
                raise CorruptStoreError(
                    f"some of search {as_text(search_id)!r} is missing in {self!r}: keys were deleted, or evicted "
                    "when the memory was full (maxmemory-policy should be 'noeviction'); a backup may have them"
                )
        raise StorageError(f"the Redis server {self._server} gave an answer that makes no sense: {answer!r:.200}")

    def _wrong_schema(self, found: bytes) -> StorageError:
        if found.isdigit() and int(found) > scripts.SCHEMA:
            return WrongStoreError(
                f"{self!r} was written by a later release of paraval (schema {int(found)}; this one knows "
                f"{scripts.SCHEMA}): install that release, or give another prefix="
            )
        return CorruptStoreError(f"the schema of {self!r} is {found[:40]!r}, which is none: it was overwritten")


def _listed(count: int) -> str:
    if count > 10:  # noqa: PLR2004 - more than a message should name
        return f"'0' to '{count - 1}'"
    return str([str(number) for number in range(count)] or "none")


def _refuse_beyond(size: int, what: str) -> None:
    if size > _MOST_BYTES:
        raise UnstorableError(
            f"{what} would be {size >> 20} MB, and Redis takes at most 512 MB at once: write the data to a file, and "
            "give the path"
        )


def _owner(record: JobRecord) -> str | None:
    return record.owner


def _revision(record: JobRecord) -> int:
    return record.revision
