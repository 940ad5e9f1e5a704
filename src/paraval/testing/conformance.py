"""The suite of tests that every storage passes: the contract of :class:`paraval.storage.Storage`, by examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from paraval.storage import JobChange, JobRecord, Storage, UnstorableError
from paraval.testing.asking import AskingTests
from paraval.testing.keeping import KeepingTests
from paraval.testing.sharing import SharingTests

__all__ = ["StorageConformance"]


class StorageConformance(KeepingTests, AskingTests, SharingTests):
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
