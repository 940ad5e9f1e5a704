"""Tests of a storage that several use: drivers that come and go, threads, other clients, who comes after a crash."""

from __future__ import annotations

import math
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import pytest

from paraval.storage import JobChange, JobRecord, Storage, UnknownIdError
from paraval.testing.comparing import fields, same
from paraval.testing.examples import ERROR

__all__ = ["SharingTests"]

T = TypeVar("T")

_WAIT_S: Final = 30.0
"""How long anything may take on a busy machine."""


class SharingTests:
    """Nobody gets what another has, and nobody misses anything."""

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
        done = JobRecord(status=2, out=0.0, error=ERROR, owner="them", attempts=2)
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

    def test_jobs_that_are_durable_soon_are_there_at_once(
        self, storage: Storage, peer: Storage, search_id: str
    ) -> None:
        records = [JobRecord(args=(number,), owner="me") for number in range(3)]
        storage.insert_soon(search_id, records[:2])
        storage.insert_soon(search_id, records[2:])
        assert [record.id for record in records] == [f"{search_id}.{number}" for number in range(3)]
        assert [record.args for record in storage.get([record.id for record in records])] == [(0,), (1,), (2,)]
        storage.insert_soon(search_id, [late := JobRecord(owner="me")])
        storage.update([JobChange(late.id, status=2, out=1.5, by="me")])
        assert peer.get([late.id])[0].out == 1.5
        storage.insert_soon(search_id, [last := JobRecord(owner="me")])
        storage.flush()
        assert peer.get([last.id])[0].owner == "me"
        assert peer.create_new_job(search_id) == f"{search_id}.5"

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
        records = [JobRecord(args=({"x": number},), owner="me", error=ERROR) for number in range(5)]
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
