"""Tests of what a storage keeps, and of how it is changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from paraval.outcome import JobError
from paraval.storage import JobChange, JobRecord, Storage, UnknownIdError, UnstorableError
from paraval.testing.comparing import fields, same
from paraval.testing.examples import BLANK, ERROR, ODD_VALUES, VALUES

__all__ = ["KeepingTests"]


class KeepingTests:
    """What is kept comes back as it was, and a change changes what it names."""

    # -- what is kept --------------------------------------------------------------------------------------------------

    def test_a_new_job_is_blank(self, storage: Storage, search_id: str) -> None:
        job_id = storage.create_new_job(search_id)
        assert fields(storage.get([job_id])[0]) == fields(JobRecord(job_id))
        assert storage.load_job(job_id) == BLANK

    def test_every_field_is_kept(self, storage: Storage, search_id: str) -> None:
        record = JobRecord(
            status=1,
            args=({"x": 0, "y": "é"}, 2),
            kwargs={"k": [1]},
            out=0.0,
            error=ERROR,
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

    @pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
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

    @pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
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
        record = JobRecord(args=(1,), kwargs={"k": 1}, out=5, error=ERROR, metadata={"a": 1}, function="f", owner="me")
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
            (JobChange(record.id, error=ERROR), {"error": ERROR}),
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
