"""What is written of jobs: entries, each of them some changes of jobs of one search. They are never changed again.

An entry is written at the end of a table and holds up to some dozen changes, encoded in one go: a tenth of what a row
for each costs, as most changes come by the hundred. What a job has become is found by going through the entries that
speak of it, in their order. (The idea is that of log-structured stores, and of event sourcing.)

An entry has a checksum, into which goes its place: SQLite itself does not notice when bits of a file flip.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Sequence
from typing import Any, Final, NamedTuple
from zlib import crc32

from paraval.errors import CorruptStoreError
from paraval.storage.codec import (
    decode_changes,
    decode_ends,
    decode_records,
    encode_changes,
    encode_ends,
    encode_records,
)
from paraval.storage.records import JobChange, JobRecord

__all__ = ["DamageError", "Draft", "History", "adoptions", "changes", "entry", "new_jobs"]

_NEW, _ENDS, _CHANGES, _ADOPTED = 1, 2, 3, 4
_MOST: Final = 64
"""Changes in one entry: whoever wants one job reads all of its entries."""
_MOST_BYTES: Final = 250_000
"""In one entry that is not of one change."""
_HEAD: Final = struct.Struct(">IBQ")  # the checksum, what kind of entry it is, the number of the first of new jobs
_PLACE: Final = struct.Struct(">BQQ")  # what goes into the checksum before the payload; ``changed`` is the last of it


class DamageError(CorruptStoreError):
    """Something is not as it was written; who raises it does not know in which file."""


class Draft(NamedTuple):
    """An entry whose place is not known yet.

    Attributes:
        size: how many changes it is.
        numbers: of the jobs in their search; none for new jobs, which have no numbers yet.
        kind: what it does to them.
        payload: their encoded changes.
    """

    size: int
    numbers: Sequence[int]
    kind: int
    payload: bytes


# -- writing -----------------------------------------------------------------------------------------------------------


def new_jobs(records: Sequence[JobRecord]) -> list[Draft]:
    """Write jobs that are to be added.

    Raises:
        UnstorableError: there is something in one that cannot be kept.
    """
    return _drafts(_NEW, lambda _none, some: encode_records(some), (), records)


def adoptions(numbers: Sequence[int], records: Sequence[JobRecord]) -> list[Draft]:
    """Write whole records of jobs that are there, in place of what they were."""
    return _drafts(_ADOPTED, lambda some_numbers, some: encode_records(some, some_numbers), numbers, records)


def changes(numbers: Sequence[int], those: Sequence[JobChange]) -> list[Draft]:
    """Write changes of jobs.

    Raises:
        UnstorableError: there is something in one that cannot be kept.
    """
    drafts = []
    for start in range(0, len(those), _MOST):
        some_numbers, some = numbers[start : start + _MOST], those[start : start + _MOST]
        payload = encode_ends(some, some_numbers)
        if payload is not None and len(payload) <= _MOST_BYTES:
            drafts.append(Draft(len(some), some_numbers, _ENDS, payload))
        else:
            drafts += _drafts(_CHANGES, lambda one, two: encode_changes(two, one), some_numbers, some)
    return drafts


def _drafts(
    kind: int, written: Callable[[Sequence[int], Sequence[Any]], bytes], numbers: Sequence[int], items: Sequence[Any]
) -> list[Draft]:
    drafts = []
    for start in range(0, len(items), _MOST):
        some_numbers, some = numbers[start : start + _MOST], items[start : start + _MOST]
        payload = written(some_numbers, some)
        if len(payload) <= _MOST_BYTES or len(some) == 1:
            drafts.append(Draft(len(some), some_numbers, kind, payload))
        else:
            for index, one in enumerate(some):
                number = some_numbers[index : index + 1]
                drafts.append(Draft(1, number, kind, written(number, [one])))
    return drafts


def entry(draft: Draft, first: int, changed: int) -> bytes:
    """Give the bytes of an entry.

    Args:
        draft: what it holds.
        first: the number of the first job, if they are new.
        changed: where it is written.
    """
    seed = crc32(_PLACE.pack(draft.kind, first, changed))
    return _HEAD.pack(crc32(draft.payload, seed), draft.kind, first) + draft.payload


# -- reading -----------------------------------------------------------------------------------------------------------


class History:
    """Goes through entries of a search, oldest first, and knows what the jobs have become.

    Attributes:
        records: of the jobs by their numbers, in the order of their last change.
        unknown: numbers of jobs of which changes were met, but not what they were before.
    """

    def __init__(self) -> None:
        self.records: dict[int, JobRecord] = {}
        self.unknown: set[int] = set()
        self._places = 0
        self._new = [0, 0, 0, 0]

    @property
    def sums(self) -> tuple[int, ...]:
        """What the indexes of all that was gone through should amount to, as :func:`rows.index_sums` gives it.

        The places of changes; and of new jobs how often some were added, the numbers of the first of them, how many
        they were, the revisions of the last of them.
        """
        return (self._places, *self._new)

    def take(self, changed: int, revision: int, data: bytes, only: Container[int] | None = None) -> int:
        """Go through an entry.

        Args:
            changed: where it is.
            revision: of its last change.
            data: its bytes.
            only: numbers of the jobs that are wanted; None: all.

        Returns:
            How many changes it is.

        Raises:
            DamageError: it is not as it was written.
        """
        kind, numbers, items = _opened(changed, data)
        if isinstance(numbers, list):
            some = set(numbers)
            self._places += 3 * sum(some) + len(some) * revision
        else:
            self._new = [
                known + new for known, new in zip(self._new, (1, numbers.start, len(items), revision), strict=True)
            ]
        revision -= len(items)
        records = self.records
        for number, item in zip(numbers, items, strict=True):
            revision += 1
            if only is not None and number not in only:
                continue
            known = records.pop(number, None)
            if kind in {_NEW, _ADOPTED}:
                record = item
            elif known is None:
                self.unknown.add(number)
                continue
            else:
                record = known
                item.apply_to(record)
            record.revision = revision
            records[number] = record
        return len(items)


def _opened(changed: int, data: bytes) -> tuple[int, range | list[int], list[Any]]:
    if type(data) is not bytes:  # a column of SQLite may hold anything
        raise DamageError(f"an entry holds {data!r:.80} in place of bytes")
    if len(data) < _HEAD.size:
        raise DamageError("an entry is cut short")
    checksum, kind, first = _HEAD.unpack_from(data)
    payload = data[_HEAD.size :]
    if crc32(payload, crc32(_PLACE.pack(kind, first, changed))) != checksum:
        raise DamageError("the checksum of an entry is wrong")
    try:
        if kind == _NEW:
            _, records = decode_records(payload)
            return kind, range(first, first + len(records)), records
        if kind == _ENDS:
            return kind, *decode_ends(payload)
        if kind == _CHANGES:
            return kind, *decode_changes(payload)
        if kind == _ADOPTED:
            return kind, *decode_records(payload)
    except CorruptStoreError as exc:
        raise DamageError(str(exc)) from exc
    raise DamageError(f"an entry is of kind {kind}, which only a later release of paraval knows")
