"""Tests of what can be asked of a storage."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from paraval.errors import ParavalError
from paraval.storage import JobChange, JobRecord, Storage, UnknownIdError
from paraval.testing.examples import BLANK

__all__ = ["AskingTests"]


class AskingTests:
    """Whoever asks gets what is there, in order, and is told what is not."""

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
        assert storage.load_jobs([other, job_id]) == {other: BLANK, job_id: expected}
        assert storage.load_search(search_id) == {"0": expected, "1": BLANK}
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
        assert storage.load_job(job_id) == BLANK
