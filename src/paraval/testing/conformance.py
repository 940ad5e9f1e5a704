"""The suite of tests that every storage passes: the contract of :class:`paraval.storage.Storage`, by examples."""

from __future__ import annotations

import math
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
import pytest

from paraval.errors import ParavalError
from paraval.outcome import JobError
from paraval.storage import JobChange, JobRecord, Storage, UnknownIdError, UnstorableError
from paraval.testing.comparing import fields, same

__all__ = ["StorageConformance"]

T = TypeVar("T")

_BLANK: Final[dict[str, Any]] = {
    "status": 0,
    "in": None,
    "out": None,
    "metadata": {},
    "intermediate": {"budget": [], "objective": []},
}
_ERROR: Final = JobError(
    "exception",
    "it is too hot: 90 °C",
    type="ValueError",
    traceback="Traceback …\n",
    host="here",
    pid=2**22,
    attempts=2,
    history=(JobError("worker_died", "", exit_code=-9, signal=9),),
)
_VALUES: Final[list[Any]] = [
    None,
    0,
    0.0,
    -0.0,
    False,
    True,
    1.0,
    "",
    "F_reason",
    "naïve ☂ \U0001f980 \x00 \n",
    b"",
    b"\x00\xff\x80",
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1.7976931348623157e308,
    0.1 + 0.2,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    2**64,
    -(10**40),
    [],
    {},
    (),
    (1.0, "F_x"),
    [1, [2.0, [None, {"a": (True, [b"x"])}]]],
    {"": 0, "a": {"b": {"c": [math.nan, {"d": None}]}}, "é": [[]]},
    "x" * 100_000,
]
_ODD_VALUES: Final[list[Any]] = [
    "\udc80 of a file name",
    {1: 2},
    {1.5: None, True: 1, None: 2},
    {(1, 2): 3},
    {b"a": 1, "a": 2},
    print,
    [{"deep": [print]}],
]
_WAIT_S: Final = 30.0
"""How long anything may take on a busy machine."""


class StorageConformance:
    """Derive a class from it whose name begins with ``Test``, say how a storage is made, and have pytest collect it.

    A storage that needs pytest's own fixtures (``tmp_path``, say) is given by a fixture ``storage`` in the derived
    class. It is closed in the end.
    """

    def make_storage(self) -> Storage:
        """Give a storage that is empty. To be defined, unless the fixture ``storage`` is."""
        raise NotImplementedError(f"{type(self).__name__} must define make_storage, or the fixture 'storage'")

    def make_peer(self, storage: Storage) -> Storage:
        """Give another client of the same storage, as another driver would have it; by default it is itself."""
        return storage

    def reopen(self, storage: Storage) -> Storage | None:  # noqa: ARG002 - for those that define it
        """Give the storage as it is found by whoever comes after this client is gone; None: it does not last so long.

        The client is to be given up the way a crash would: without a word to it, or as much as is needed.
        """
        return None

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        """Give the storage under test."""
        storage = self.make_storage()
        yield storage
        storage.close()

    @pytest.fixture
    def search_id(self, storage: Storage) -> str:
        """Give the id of a search in it."""
        return storage.new_search()

    @pytest.fixture
    def peer(self, storage: Storage) -> Iterator[Storage]:
        """Give another client of it."""
        peer = self.make_peer(storage)
        yield peer
        if peer is not storage:
            peer.close()

    @pytest.fixture
    def reopened(self, storage: Storage) -> Iterator[Callable[[], Storage]]:
        """Give a function that reopens the storage; skip the test where that means nothing."""
        made: list[Storage] = []

        def reopened() -> Storage:
            found = self.reopen(made[-1] if made else storage)
            if found is None:
                pytest.skip("this storage ends with its process")
            made.append(found)
            return found

        yield reopened
        for found in made:
            found.close()

    # -- searches and ids ----------------------------------------------------------------------------------------------

    def test_it_can_be_used(self, storage: Storage) -> None:
        assert isinstance(storage, Storage)
        assert storage.connect() is storage
        assert storage.is_connected() is True

    def test_it_can_be_closed_and_used_again(self, storage: Storage, search_id: str) -> None:
        job_id = storage.create_new_job(search_id)
        for _ in range(2):
            storage.close()
            storage.close()
            assert storage.load_all_job_ids(search_id) == [job_id]
        with storage as entered:
            assert entered is storage
            storage.update([JobChange(job_id, out=1)])
        assert storage.get([job_id])[0].out == 1

    def test_it_begins_empty(self, storage: Storage) -> None:
        assert storage.search_ids() == []
        assert storage.owners() == set()

    def test_searches_are_told_apart(self, storage: Storage) -> None:
        made = [storage.new_search() for _ in range(12)]
        assert len(set(made)) == 12
        assert all(type(search) is str for search in made)
        assert storage.search_ids() == made, "oldest first"
        for search in made:
            assert storage.scan(search) == ([], storage.scan(search)[1]), "no jobs yet"

    def test_jobs_are_numbered_in_their_search(self, storage: Storage) -> None:
        first, second = storage.new_search(), storage.new_search()
        several = [JobRecord() for _ in range(3)]
        storage.insert(first, several)
        assert [record.id for record in several] == [f"{first}.{number}" for number in range(3)]
        other = JobRecord()
        storage.insert(second, [other])
        assert other.id == f"{second}.0"
        storage.insert(first, [])
        more = [JobRecord(), JobRecord()]
        storage.insert(first, more)
        assert [record.id for record in more] == [f"{first}.3", f"{first}.4"]

    def test_inserting_is_all_or_none(self, storage: Storage, search_id: str) -> None:
        try:
            storage.insert(search_id, [JobRecord(out=1), JobRecord(out=[print])])
        except UnstorableError as exc:
            assert isinstance(exc, TypeError)  # noqa: PT017 - whether it is raised is for the storage to say
            assert storage.load_all_job_ids(search_id) == []
        else:
            assert storage.load_out_from_all_jobs(search_id) == [1, [print]]
        record = JobRecord(out=2)
        storage.insert(search_id, [record])
        assert storage.get([record.id])[0].out == 2

    # -- what is kept --------------------------------------------------------------------------------------------------

    def test_a_new_job_is_blank(self, storage: Storage, search_id: str) -> None:
        job_id = storage.create_new_job(search_id)
        assert fields(storage.get([job_id])[0]) == fields(JobRecord(job_id))
        assert storage.load_job(job_id) == _BLANK

    def test_every_field_is_kept(self, storage: Storage, search_id: str) -> None:
        record = JobRecord(
            status=1,
            args=({"x": 0, "y": "é"}, 2),
            kwargs={"k": [1]},
            out=0.0,
            error=_ERROR,
            metadata={"a": False, "b": None},
            budgets=[1, 2.5],
            objectives=[0.5, None],
            function="module.run",
            owner="me",
            attempts=3,
            is_private=True,
            extra={"mine": [1]},
        )
        expected = fields(msgspec.structs.replace(record))
        storage.insert(search_id, [record])
        expected["id"] = record.id
        for found in (storage.get([record.id])[0], storage.scan(search_id)[0][0]):
            assert same(fields(found), expected)
            assert type(found.args) is tuple
            assert type(found.error) is JobError
            assert type(found.error.history[0]) is JobError

    @pytest.mark.parametrize("value", _VALUES, ids=lambda value: repr(value)[:30])
    def test_a_value_is_kept_as_it_is(self, storage: Storage, search_id: str, value: Any) -> None:
        record = JobRecord(args=({"x": value},), kwargs={"k": value}, out=value)
        storage.insert(search_id, [record, other := JobRecord()])
        change = JobChange(
            other.id, args=(value,), out=value, metadata={"m": value}, intermediate=(1.5, value), extra={"e": value}
        )
        storage.update([change])
        storage.put_value(search_id, "v", value)
        inserted, updated = storage.get([record.id, other.id])
        assert same((inserted.args, inserted.kwargs, inserted.out), (({"x": value},), {"k": value}, value))
        assert same((updated.args, updated.out, updated.metadata), ((value,), value, {"m": value}))
        assert same((updated.budgets, updated.objectives, updated.extra), ([1.5], [value], {"e": value}))
        assert same(storage.get_value(search_id, "v"), value)

    @pytest.mark.parametrize("value", _ODD_VALUES, ids=repr)
    def test_an_odd_value_is_kept_or_refused(self, storage: Storage, search_id: str, value: Any) -> None:
        job_id = storage.create_new_job(search_id)
        ways: list[tuple[Callable[[Any], object], Callable[[], Any]]] = [
            (partial(storage.put_value, search_id, "v"), lambda: storage.get_value(search_id, "v")),
            (partial(storage.store_job_out, job_id), lambda: storage.get([job_id])[0].out),
        ]
        for store, load in ways:
            store(0)
            try:
                store(value)
            except UnstorableError as exc:
                assert isinstance(exc, TypeError)  # noqa: PT017 - as above
                assert "\n" not in str(exc)  # noqa: PT017 - likewise
                assert load() == 0, "what was refused changes nothing"
            else:
                assert load() == value

    def test_large_batches_are_kept(self, storage: Storage, search_id: str) -> None:
        records = [JobRecord(args=({"x": number},)) for number in range(1500)]
        storage.insert(search_id, records)
        storage.update([JobChange(record.id, status=2, out=number) for number, record in enumerate(records)])
        found, _ = storage.scan(search_id)
        assert [(record.id, record.out) for record in found] == [
            (f"{search_id}.{number}", number) for number in range(1500)
        ]
        assert [record.out for record in storage.get(record.id for record in records)] == list(range(1500))

    def test_what_it_gives_can_be_changed_without_changing_it(self, storage: Storage, search_id: str) -> None:
        record = JobRecord(metadata={"a": 1}, budgets=[1.0], objectives=[2])
        storage.insert(search_id, [record])
        before = fields(storage.get([record.id])[0])
        for found in (storage.get([record.id])[0], storage.scan(search_id)[0][0]):
            assert found.metadata is not None
            assert found.objectives is not None
            found.status = 4
            found.out = "changed"
            found.metadata["b"] = 2
            found.objectives.append(9)
        loaded = storage.load_job(record.id)
        loaded["metadata"]["b"] = 2
        loaded["intermediate"]["budget"].append(9)
        assert fields(storage.get([record.id])[0]) == before == fields(storage.scan(search_id)[0][0])

    # -- changes -------------------------------------------------------------------------------------------------------

    def test_a_change_leaves_the_rest_as_it_is(self, storage: Storage, search_id: str) -> None:
        record = JobRecord(args=(1,), kwargs={"k": 1}, out=5, error=_ERROR, metadata={"a": 1}, function="f", owner="me")
        storage.insert(search_id, [record])
        expected = fields(storage.get([record.id])[0])
        changes: list[tuple[JobChange, dict[str, Any]]] = [
            (JobChange(record.id), {}),
            (JobChange(record.id, status=1), {"status": 1}),
            (JobChange(record.id, out=None), {"out": None}),
            (JobChange(record.id, error=None), {"error": None}),
            (JobChange(record.id, args=None), {"args": None}),
            (JobChange(record.id, kwargs=None), {"kwargs": None}),
            (JobChange(record.id, args=(2, 3)), {"args": (2, 3)}),
            (JobChange(record.id, kwargs={"other": 2}), {"kwargs": {"other": 2}}),
            (JobChange(record.id, error=_ERROR), {"error": _ERROR}),
            (JobChange(record.id, metadata={"b": None, "a": 2}), {"metadata": {"a": 2, "b": None}}),
            (JobChange(record.id, metadata={"c": 3}), {"metadata": {"a": 2, "b": None, "c": 3}}),
            (JobChange(record.id, extra={"e": 1}), {"extra": {"e": 1}}),
            (JobChange(record.id, extra={"f": 3}), {"extra": {"e": 1, "f": 3}}),
            (JobChange(record.id, extra={"e": 2}), {"extra": {"e": 2, "f": 3}}),
            (JobChange(record.id, intermediate=(1.0, 0.5)), {"budgets": [1.0], "objectives": [0.5]}),
            (JobChange(record.id, intermediate=(2.0, None)), {"budgets": [1.0, 2.0], "objectives": [0.5, None]}),
        ]
        for change, changed in changes:
            storage.update([change])
            expected |= changed
            assert same(fields(storage.get([record.id])[0]), expected)

    def test_changes_are_applied_in_their_order(self, storage: Storage, search_id: str) -> None:
        first, second = storage.create_new_job(search_id), storage.create_new_job(search_id)
        changes = [
            JobChange(first, out=1, metadata={"a": 1}, intermediate=(1, 1)),
            JobChange(second, out=2),
            JobChange(first, out=3, metadata={"a": 2, "b": 2}, intermediate=(2, 2)),
        ]
        storage.update(changes)
        one, two = storage.get([first, second])
        assert (one.out, one.metadata, one.budgets, two.out) == (3, {"a": 2, "b": 2}, [1, 2], 2)
        assert [record.id for record in storage.scan(search_id)[0]] == [second, first]

    def test_changes_are_made_all_or_none(self, storage: Storage, search_id: str) -> None:
        job_id = storage.create_new_job(search_id)
        before, revision = storage.scan(search_id)
        with pytest.raises(UnknownIdError):
            storage.update([JobChange(job_id, status=2), JobChange(f"{search_id}.9", status=2)])
        assert storage.scan(search_id) == (before, revision)
        try:
            storage.update([JobChange(job_id, status=2), JobChange(job_id, metadata={"a": {"b": print}})])
        except UnstorableError:
            assert storage.scan(search_id) == (before, revision)
        else:
            assert storage.get([job_id])[0].metadata == {"a": {"b": print}}

    def test_a_change_by_another_than_the_owner_is_left_out(self, storage: Storage, search_id: str) -> None:
        mine, theirs, nobodys = JobRecord(owner="me"), JobRecord(owner="them"), JobRecord()
        storage.insert(search_id, [mine, theirs, nobodys])
        _, revision = storage.scan(search_id)
        storage.update([JobChange(record.id, out=1, by="me") for record in (theirs, mine, nobodys)])
        assert [record.out for record in storage.get([mine.id, theirs.id, nobodys.id])] == [1, None, None]
        assert [record.id for record in storage.scan(search_id, revision)[0]] == [mine.id], "the others did not change"
        storage.update([JobChange(record.id, out=2) for record in (mine, theirs, nobodys)])
        assert [record.out for record in storage.get([mine.id, theirs.id, nobodys.id])] == [2, 2, 2]

    # -- what is asked for ---------------------------------------------------------------------------------------------

    def test_jobs_come_in_the_order_asked_for(self, storage: Storage) -> None:
        first, second = storage.new_search(), storage.new_search()
        made = [storage.create_new_job(search) for search in (first, second, first)]
        asked = [made[2], made[0], made[1], made[0]]
        assert [record.id for record in storage.get(asked)] == asked
        assert [record.id for record in storage.get(iter(asked))] == asked
        assert storage.get([]) == []

    def test_a_scan_gives_what_changed_since(self, storage: Storage, search_id: str) -> None:
        records, start = storage.scan(search_id)
        assert records == []
        made = [storage.create_new_job(search_id) for _ in range(4)]
        records, revision = storage.scan(search_id, start)
        assert [record.id for record in records] == made
        assert storage.scan(search_id, revision) == ([], revision)
        storage.update([JobChange(made[2], out=1.0)])
        storage.update([JobChange(made[0], out=2.0)])
        storage.update([JobChange(made[2], status=2)])
        records, newer = storage.scan(search_id, revision)
        assert [record.id for record in records] == [made[0], made[2]]
        assert newer > revision
        assert all(revision < record.revision <= newer for record in records)
        assert storage.scan(search_id, newer)[0] == []
        assert [record.id for record in storage.scan(search_id)[0]] == [made[1], made[3], made[0], made[2]]
        assert storage.scan(search_id, revision)[0] == records, "it can be asked again"
        assert storage.scan(search_id, sys.maxsize)[0] == []

    def test_searches_have_revisions_of_their_own(self, storage: Storage) -> None:
        first, second = storage.new_search(), storage.new_search()
        storage.create_new_job(second)
        _, revision = storage.scan(second)
        storage.insert(first, [JobRecord() for _ in range(10)])
        assert storage.scan(second, revision) == ([], revision)
        assert len(storage.scan(first)[0]) == 10

    def test_search_values(self, storage: Storage) -> None:
        first, second = storage.new_search(), storage.new_search()
        for key in ("a", "", "é \x00.'\"%_*:[", "x" * 300):
            storage.put_value(first, key, {"deep": [key]})
            assert storage.get_value(first, key) == {"deep": [key]}
        storage.put_value(first, "a", 2)
        assert storage.get_value(first, "a") == 2
        storage.put_value(first, "none", None)
        assert storage.get_value(first, "none") is None
        with pytest.raises(KeyError, match="no such") as caught:
            storage.get_value(first, "no such")
        assert isinstance(caught.value, ParavalError)
        with pytest.raises(KeyError):
            storage.get_value(second, "a")
        assert storage.scan(first)[0] == [], "values are no jobs"

    # -- owners --------------------------------------------------------------------------------------------------------

    def test_a_lease_lasts_as_long_as_was_said(self, storage: Storage) -> None:
        storage.renew("me", math.inf)
        storage.renew("them", 600)
        storage.renew("short", 0.05)
        assert storage.owners() >= {"me", "them"}
        storage.renew("long", 0.01)
        storage.renew("long", 600)
        _wait_until(lambda: "short" not in storage.owners())
        assert storage.owners() == {"me", "them", "long"}
        storage.renew("me", 0)
        storage.renew("nobody", 0)
        assert storage.owners() == {"them", "long"}
        storage.renew("me", 600)
        assert storage.owners() == {"me", "them", "long"}

    def test_an_adopted_job_is_as_new(self, storage: Storage, search_id: str) -> None:
        ready = JobRecord(args=(1,), owner="them", function="f", is_private=True, metadata={"a": 1}, attempts=1)
        running = JobRecord(status=1, owner="them", budgets=[1.0], objectives=[2], extra={"e": 1})
        done = JobRecord(status=2, out=0.0, error=_ERROR, owner="them", attempts=2)
        storage.insert(search_id, [ready, running, done])
        seen, revision = storage.scan(search_id)
        assert storage.adopt({record.id: record.revision for record in seen}, "me") == {record.id for record in seen}
        fresh: dict[str, Any] = {"status": 0, "out": None, "error": None, "owner": "me"}
        for before, attempts in zip(seen, (1, 1, 2), strict=True):
            (after,) = storage.get([before.id])
            assert same(fields(after), fields(before) | fresh | {"attempts": attempts})
        assert {record.id for record in storage.scan(search_id, revision)[0]} == {record.id for record in seen}
        storage.update([JobChange(ready.id, status=2, out=1, by="them")])
        assert storage.get([ready.id])[0].out is None, "who has lost a job cannot end it"
        storage.update([JobChange(ready.id, status=2, out=1, by="me")])
        assert storage.get([ready.id])[0].out == 1

    def test_a_job_that_has_changed_is_not_adopted(self, storage: Storage, search_id: str) -> None:
        still, changed = JobRecord(owner="them"), JobRecord(owner="them")
        storage.insert(search_id, [still, changed])
        revisions = {record.id: record.revision for record in storage.scan(search_id)[0]}
        storage.update([JobChange(changed.id, status=2, out=1, by="them")])
        before = storage.get([changed.id])
        assert storage.adopt(revisions, "me") == {still.id}
        assert storage.get([changed.id]) == before
        assert storage.adopt(revisions, "another") == set(), "the first to come has it"
        assert storage.get([still.id])[0].owner == "me"
        assert storage.adopt({}, "me") == set()

    def test_adopting_an_unknown_job_adopts_none(self, storage: Storage, search_id: str) -> None:
        job_id = storage.create_new_job(search_id)
        ((record,), _) = storage.scan(search_id)
        with pytest.raises(UnknownIdError):
            storage.adopt({job_id: record.revision, f"{search_id}.9": 1}, "me")
        assert storage.get([job_id])[0].owner is None

    # -- the named methods ---------------------------------------------------------------------------------------------

    def test_the_named_methods(self, storage: Storage) -> None:
        search_id = storage.create_new_search()
        assert storage.load_all_search_ids() == [search_id]
        job_id, other = storage.create_new_job(search_id), storage.create_new_job(search_id)
        storage.store_job_in(job_id, args=(1, 2), kwargs={"k": 3})
        storage.store_job_out(job_id, 0.0)
        storage.store_job_metadata(job_id, "a", False)
        storage.store_job_metadata(job_id, "b", [1])
        storage.store_job_status(job_id, 2)
        storage.store_job_intermediate(job_id, 1, 0.5)
        storage.store_job_intermediate(job_id, 2, 0.75)
        storage.store_job(job_id, "metadata", {"c": 0})
        storage.store_job(job_id, "mine", [1, 2])
        expected = {
            "status": 2,
            "in": {"args": (1, 2), "kwargs": {"k": 3}},
            "out": 0.0,
            "metadata": {"a": False, "b": [1], "c": 0},
            "intermediate": {"budget": [1, 2], "objective": [0.5, 0.75]},
            "mine": [1, 2],
        }
        assert storage.load_job(job_id) == expected
        assert storage.load_job_status(job_id) == 2
        assert storage.load_jobs([other, job_id]) == {other: _BLANK, job_id: expected}
        assert storage.load_search(search_id) == {"0": expected, "1": _BLANK}
        assert storage.load_all_job_ids(search_id) == [job_id, other], "in the order of their numbers"
        storage.store_job(other, "in", {"args": (1,), "kwargs": None})
        storage.store_job(other, "out", False)
        storage.store_job(other, "status", 4)
        storage.store_job_metadata(other, "a", None)
        assert storage.load_out_from_all_jobs(search_id) == [0.0, False]
        assert storage.load_metadata_from_all_jobs(search_id, "a") == [False]
        storage.store_search_value(search_id, "key", {"a": 1})
        assert storage.load_search_value(search_id, "key") == {"a": 1}

    @pytest.mark.parametrize(
        "call",
        [
            lambda storage: storage.insert("77", [JobRecord()]),
            lambda storage: storage.scan("77"),
            lambda storage: storage.scan("no such search"),
            lambda storage: storage.put_value("77", "k", 1),
            lambda storage: storage.get_value("77", "k"),
            lambda storage: storage.get(["0.77"]),
            lambda storage: storage.get(["77.0"]),
            lambda storage: storage.get(["no job id"]),
            lambda storage: storage.get(["0.one"]),
            lambda storage: storage.get([""]),
            lambda storage: storage.update([JobChange("0.77", out=1)]),
            lambda storage: storage.update([JobChange("77.0", out=1)]),
            lambda storage: storage.update([JobChange("no job id", out=1)]),
            lambda storage: storage.update([JobChange("0.77", out=1, by="me")]),
            lambda storage: storage.adopt({"0.77": 1}, "me"),
            lambda storage: storage.load_search("77"),
            lambda storage: storage.load_job_status("0.77"),
        ],
    )
    def test_an_unknown_id_is_told(self, storage: Storage, call: Callable[[Storage], object]) -> None:
        job_id = storage.create_new_job(storage.new_search())
        with pytest.raises(UnknownIdError) as caught:
            call(storage)
        assert isinstance(caught.value, KeyError)
        message = str(caught.value)
        assert message
        assert "\n" not in message
        assert storage.load_job(job_id) == _BLANK

    # -- many at once --------------------------------------------------------------------------------------------------

    def test_ids_never_collide(self, storage: Storage, peer: Storage, search_id: str) -> None:
        def allocate(client: Storage) -> list[int]:
            numbers: list[int] = []
            for count in range(1, 10):
                records = [JobRecord() for _ in range(count)]
                client.insert(search_id, records)
                fresh = [int(record.id.rpartition(".")[2]) for record in records]
                assert fresh == list(range(fresh[0], fresh[0] + count)), "they follow one another"
                numbers += fresh
            return numbers

        given = _in_threads(*[partial(allocate, client) for client in [storage, peer] * 3])
        everything = sorted(number for numbers in given for number in numbers)
        assert everything == list(range(6 * 45))
        assert [f"{search_id}.{number}" for number in everything] == peer.load_all_job_ids(search_id)

    def test_searches_never_collide(self, storage: Storage, peer: Storage) -> None:
        made = _in_threads(*[partial(_call_often, client.new_search, 10) for client in [storage, peer] * 3])
        everything = [search for searches in made for search in searches]
        assert len(set(everything)) == 60
        assert sorted(storage.search_ids()) == sorted(everything)
        assert storage.search_ids() == peer.search_ids()

    def test_changes_of_many_are_all_kept(self, storage: Storage, peer: Storage, search_id: str) -> None:
        job_id = storage.create_new_job(search_id)

        def change(client: Storage, thread: int) -> None:
            for number in range(15):
                client.update(
                    [JobChange(job_id, metadata={f"{thread}.{number}": number}, intermediate=(thread, number))]
                )
                client.put_value(search_id, f"{thread}", number)

        _in_threads(*[partial(change, client, thread) for thread, client in enumerate([storage, peer] * 2)])
        (record,) = peer.get([job_id])
        assert record.metadata == {f"{thread}.{number}": number for thread in range(4) for number in range(15)}
        assert record.budgets is not None
        assert record.objectives is not None
        for thread in range(4):
            noted = zip(record.budgets, record.objectives, strict=True)
            assert [objective for budget, objective in noted if budget == thread] == list(range(15))
            assert storage.get_value(search_id, f"{thread}") == 14

    def test_a_job_is_adopted_by_one(self, storage: Storage, peer: Storage, search_id: str) -> None:
        storage.insert(search_id, [JobRecord(owner="gone") for _ in range(30)])
        revisions = {record.id: record.revision for record in storage.scan(search_id)[0]}
        gained = _in_threads(
            *[partial(client.adopt, revisions, f"heir {number}") for number, client in enumerate([storage, peer] * 3)]
        )
        assert sorted(job_id for job_ids in gained for job_id in job_ids) == sorted(revisions)
        for number, job_ids in enumerate(gained):
            assert {record.owner for record in storage.get(job_ids)} <= {f"heir {number}"}

    def test_who_scans_while_others_write_misses_nothing(self, storage: Storage, peer: Storage, search_id: str) -> None:
        ended = threading.Event()

        def write(client: Storage) -> None:
            for _ in range(10):
                records = [JobRecord() for _ in range(3)]
                client.insert(search_id, records)
                client.update([JobChange(record.id, status=2) for record in records])

        def scan() -> dict[str, int]:
            picture: dict[str, int] = {}
            revision, last = 0, False
            while True:
                records, newer = storage.scan(search_id, revision)
                assert newer >= revision
                picture |= {record.id: record.status for record in records}
                revision = newer
                if last:
                    return picture
                last = ended.is_set()

        with ThreadPoolExecutor(1) as pool:
            picture = pool.submit(scan)
            try:
                _in_threads(*[partial(write, client) for client in (storage, peer, peer)])
            finally:
                ended.set()
            assert picture.result(_WAIT_S) == {f"{search_id}.{number}": 2 for number in range(90)}

    def test_what_one_client_writes_another_sees(self, storage: Storage, peer: Storage) -> None:
        search_id = storage.new_search()
        job_id = peer.create_new_job(search_id)
        storage.update([JobChange(job_id, status=2, out=0.0)])
        assert peer.get([job_id])[0].out == 0.0
        records, revision = peer.scan(search_id)
        assert storage.scan(search_id) == (records, revision)
        peer.put_value(search_id, "k", 1)
        assert storage.get_value(search_id, "k") == 1
        peer.renew("me", 600)
        assert storage.owners() == {"me"} == peer.owners()

    def test_one_that_travels_is_the_same_when_it_arrives(self, storage: Storage, search_id: str) -> None:
        if not storage.can_travel:
            pytest.skip("it does not travel")
        job_id = storage.create_new_job(search_id)
        arrived = pickle.loads(pickle.dumps(storage))  # noqa: S301 - made in the line itself
        try:
            assert isinstance(arrived, Storage)
            assert arrived.can_travel
            arrived.update([JobChange(job_id, out=1)])
            assert storage.get([job_id])[0].out == 1
            assert arrived.search_ids() == [search_id]
        finally:
            if arrived is not storage:
                arrived.close()

    # -- what outlives the client --------------------------------------------------------------------------------------

    def test_what_was_stored_is_found_again(self, storage: Storage, reopened: Callable[[], Storage]) -> None:
        first, second = storage.new_search(), storage.new_search()
        records = [JobRecord(args=({"x": number},), owner="me", error=_ERROR) for number in range(5)]
        storage.insert(first, records)
        storage.update([JobChange(records[1].id, status=2, out=math.nan, metadata={"a": b"b"}, by="me")])
        storage.put_value(second, "k", (1, 2))
        storage.renew("me", math.inf)
        before, revision = storage.scan(first)

        found = reopened()
        assert found.search_ids() == [first, second]
        after, same_revision = found.scan(first)
        assert same([fields(record) for record in after], [fields(record) for record in before])
        assert [record.revision for record in after] == [record.revision for record in before]
        assert same_revision == revision
        assert same(found.get_value(second, "k"), (1, 2))
        assert found.owners() == {"me"}

    def test_it_goes_on_where_it_was(self, storage: Storage, reopened: Callable[[], Storage]) -> None:
        search_id = storage.new_search()
        storage.insert(search_id, [JobRecord(), JobRecord()])
        seen, revision = storage.scan(search_id)
        found = reopened()
        assert found.create_new_job(search_id) == f"{search_id}.2"
        assert found.new_search() != search_id
        found.update([JobChange(seen[0].id, out=1)])
        assert [record.id for record in found.scan(search_id, revision)[0]] == [f"{search_id}.2", seen[0].id]
        assert found.adopt({record.id: record.revision for record in seen}, "me") == {seen[1].id}
        found = reopened()
        assert found.create_new_job(search_id) == f"{search_id}.3"


def _call_often(function: Callable[[], T], times: int) -> list[T]:
    return [function() for _ in range(times)]


def _in_threads(*functions: Callable[[], T]) -> list[T]:
    """Call functions at the same moment, each in a thread; give what they return."""
    barrier = threading.Barrier(len(functions))

    def call(function: Callable[[], T]) -> T:
        barrier.wait(_WAIT_S)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(call, function) for function in functions]
        return [future.result(_WAIT_S) for future in futures]


def _wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that announces itself in no other way."""
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.005)
