"""A storage under random operations, beside a model of dicts: what one knows, the other must know."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from paraval.outcome import JobError
from paraval.storage import JobChange, JobRecord, Storage, UnknownIdError
from paraval.testing.comparing import fields, same

__all__ = ["storage_machine"]

_NESTED: Final[list[Any]] = [[], {}, {"a": {"b": [1, None]}}, (1.0, "F_x"), [[b"\x00"], {"": -0.0}], 2**64, -(10**30)]
_values = (
    st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([None, False, *_NESTED]).map(copy.deepcopy)
)
_dicts = st.dictionaries(st.sampled_from(["a", "b", "é"]), _values, max_size=2)
_args = st.lists(_values, max_size=2).map(tuple)
_ERRORS: Final = [
    JobError("exception", "é\n", type="ValueError", traceback="…"),
    JobError("worker_died", "", exit_code=-9, signal=9, attempts=2, history=(JobError("timeout", "late"),)),
]
_errors = st.sampled_from([None, *_ERRORS])
_OWNERS: Final = ["me", "them"]
_statuses = st.sampled_from([0, 1, 2, 4])
_records = st.builds(
    JobRecord,
    status=_statuses,
    args=st.none() | _args,
    kwargs=st.none() | _dicts,
    out=_values,
    error=_errors,
    metadata=st.none() | _dicts,
    function=st.sampled_from([None, "", "f"]),
    owner=st.sampled_from([None, *_OWNERS]),
    attempts=st.integers(0, 3),
    is_private=st.booleans(),
    extra=st.none() | _dicts,
)
_changes = st.fixed_dictionaries(
    {},
    optional={
        "status": _statuses,
        "args": st.none() | _args,
        "kwargs": st.none() | _dicts,
        "out": _values,
        "error": _errors,
        "metadata": _dicts,
        "intermediate": st.tuples(st.floats(allow_nan=False), _values),
        "extra": _dicts,
        "by": st.sampled_from(_OWNERS),
    },
)


class _Sighting(NamedTuple):
    """A job as somebody saw it once: to be adopted unless it has changed since."""

    job_id: str
    revision: int
    touches: int


class _Search:
    """What the model knows of a search. ``touched`` holds the id of a job for each of its changes."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.touched: list[str] = []
        self.values: dict[str, Any] = {}
        self.revisions: list[tuple[int, int]] = []
        """Revisions that scans gave, each with how many changes there had been."""

    def changed_since(self, count: int) -> list[str]:
        """Give the ids of the jobs that changed after the first ``count`` changes, in the order of their last."""
        return list(dict.fromkeys(reversed(self.touched[count:])))[::-1]


def storage_machine(
    make: Callable[[], Storage], reopen: Callable[[Storage], Storage] | None = None
) -> type[RuleBasedStateMachine]:
    """Make a state machine that uses a storage at random, and compares all that it gives with a model.

    To be run by pytest, its ``TestCase`` must be in the test module, under a name that begins with ``Test``.

    Args:
        make: gives a storage that is empty. It is closed in the end.
        reopen: takes the storage and gives it as whoever comes after a crash finds it; None where it ends with its
            client.
    """
    namespace: dict[str, Any] = {"make": staticmethod(make)}
    if reopen is not None:

        def crash_and_reopen(self: _StorageMachine) -> None:
            self.storage = reopen(self.storage)

        namespace["crash_and_reopen"] = rule()(crash_and_reopen)
    return type("StorageMachine", (_StorageMachine,), namespace)


class _StorageMachine(RuleBasedStateMachine):
    make: Callable[[], Storage]

    searches: Bundle[str] = Bundle("searches")
    jobs: Bundle[str] = Bundle("jobs")
    sightings: Bundle[_Sighting] = Bundle("sightings")

    def __init__(self) -> None:
        super().__init__()
        self.storage = self.make()
        self.model: dict[str, _Search] = {}
        self.leases: set[str] = set()
        self.looked = False

    def teardown(self) -> None:
        """Close it."""
        self.storage.close()

    @initialize(target=jobs, records=st.lists(_records, min_size=3, max_size=3))
    def begin(self, records: list[JobRecord]) -> MultipleResults[str]:
        """Begin with some jobs, as there is little to do without."""
        return multiple(*self._insert(self._new_search(), records))

    # -- what is done to it --------------------------------------------------------------------------------------------

    @rule(target=searches)
    def new_search(self) -> str:
        return self._new_search()

    def _new_search(self) -> str:
        search_id = self.storage.new_search()
        assert search_id not in self.model
        self.model[search_id] = _Search()
        return search_id

    @rule(target=jobs, search_id=searches, records=st.lists(_records, max_size=3))
    def insert(self, search_id: str, records: list[JobRecord]) -> MultipleResults[str]:
        return multiple(*self._insert(search_id, records))

    def _insert(self, search_id: str, records: list[JobRecord]) -> list[str]:
        search = self.model[search_id]
        expected = [copy.deepcopy(fields(record)) for record in records]
        self.storage.insert(search_id, records)
        for number, (record, known) in enumerate(zip(records, expected, strict=True), len(search.records)):
            assert record.id == f"{search_id}.{number}"
            search.records[record.id] = known | {"id": record.id}
            search.touched.append(record.id)
        return [record.id for record in records]

    @rule(changes=st.lists(st.tuples(jobs, _changes), max_size=4))
    def update(self, changes: list[tuple[str, dict[str, Any]]]) -> None:
        expected = copy.deepcopy(changes)
        self.storage.update([JobChange(job_id, **change) for job_id, change in changes])
        for job_id, change in expected:
            self._apply(job_id, change)

    @rule(known=st.lists(jobs, max_size=2), search_id=searches)
    def update_unknown(self, known: list[str], search_id: str) -> None:
        unknown = f"{search_id}.{len(self.model[search_id].records)}"
        try:
            self.storage.update([JobChange(job_id, out="never") for job_id in [*known, unknown]])
        except UnknownIdError:
            return
        raise AssertionError(f"{unknown} was changed, which does not exist")

    def _apply(self, job_id: str, change: dict[str, Any]) -> None:
        search = self._search_of(job_id)
        record = search.records[job_id]
        if change.get("by") not in {None, record["owner"]}:
            return
        for name in ("metadata", "extra"):
            if name in change:
                record[name] = (record[name] or {}) | change[name]
        if "intermediate" in change:
            budget, objective = change["intermediate"]
            record["budgets"] = [*(record["budgets"] or ()), budget]
            record["objectives"] = [*(record["objectives"] or ()), objective]
        record |= {name: change[name] for name in ("status", "args", "kwargs", "out", "error") if name in change}
        search.touched.append(job_id)

    @rule(target=sightings, job_id=jobs)
    def look(self, job_id: str) -> _Sighting:
        (record,) = self.storage.get([job_id])
        self.looked = True
        return _Sighting(job_id, record.revision, self._search_of(job_id).touched.count(job_id))

    @precondition(lambda self: self.looked)
    @rule(
        seen=st.lists(sightings, max_size=3, unique_by=lambda sighting: sighting.job_id), owner=st.sampled_from(_OWNERS)
    )
    def adopt(self, seen: list[_Sighting], owner: str) -> None:
        unchanged = [
            sighting
            for sighting in seen
            if self._search_of(sighting.job_id).touched.count(sighting.job_id) == sighting.touches
        ]
        adopted = self.storage.adopt({sighting.job_id: sighting.revision for sighting in seen}, owner)
        assert adopted == {sighting.job_id for sighting in unchanged}
        for sighting in unchanged:
            search = self._search_of(sighting.job_id)
            record = search.records[sighting.job_id]
            record["attempts"] += record["status"] == 1
            record |= {"status": 0, "out": None, "error": None, "owner": owner}
            search.touched.append(sighting.job_id)

    @rule(search_id=searches, key=st.text(max_size=3), value=_values)
    def put_value(self, search_id: str, key: str, value: Any) -> None:
        self.model[search_id].values[key] = copy.deepcopy(value)
        self.storage.put_value(search_id, key, value)

    @rule(owner=st.sampled_from(_OWNERS), seconds=st.sampled_from([0, 3600, math.inf]))
    def renew(self, owner: str, seconds: float) -> None:
        self.storage.renew(owner, seconds)
        (self.leases.add if seconds else self.leases.discard)(owner)

    # -- what it says --------------------------------------------------------------------------------------------------

    @rule(job_ids=st.lists(jobs, max_size=4))
    def get(self, job_ids: list[str]) -> None:
        found = self.storage.get(job_ids)
        assert same([fields(record) for record in found], [self._search_of(each).records[each] for each in job_ids])

    @rule(search_id=searches)
    def get_unknown(self, search_id: str) -> None:
        try:
            self.storage.get([f"{search_id}.{len(self.model[search_id].records)}"])
        except UnknownIdError:
            return
        raise AssertionError("a job was found that does not exist")

    @rule(search_id=searches, back=st.integers(0, 3))
    def scan(self, search_id: str, back: int) -> None:
        """Scan from a revision that was given before: the last, or one that is older."""
        search = self.model[search_id]
        since, count = search.revisions[-1 - back] if back < len(search.revisions) else (0, 0)
        records, revision = self.storage.scan(search_id, since)
        expected = [search.records[job_id] for job_id in search.changed_since(count)]
        assert same([fields(record) for record in records], expected)
        assert revision >= since
        revisions = [record.revision for record in records]
        assert revisions == sorted(revisions)
        assert all(since < each <= revision for each in revisions)
        search.revisions.append((revision, len(search.touched)))

    @invariant()
    def it_knows_what_the_model_knows(self) -> None:
        """Compare everything."""
        assert self.storage.search_ids() == list(self.model)
        for search_id, search in self.model.items():
            records, _ = self.storage.scan(search_id)
            assert same(
                [fields(record) for record in records], [search.records[job_id] for job_id in search.changed_since(0)]
            )
            for key, value in search.values.items():
                assert same(self.storage.get_value(search_id, key), value)
        assert self.storage.owners() == self.leases

    def _search_of(self, job_id: str) -> _Search:
        return self.model[job_id.rpartition(".")[0]]
