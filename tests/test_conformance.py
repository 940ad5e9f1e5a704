"""The suite that a third party's storage runs, on ours; test_redis.py has it for RedisStorage."""

from __future__ import annotations

import itertools
import pickle
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from elsewhere import Elsewhere
from paraval.storage import JobChange, MemoryStorage, SharedMemoryStorage, SqliteStorage, Storage
from paraval.storage.pipe import PipeStorage
from paraval.testing import StorageConformance, storage_machine
from support import run_program

AT_RANDOM = settings(max_examples=30, stateful_step_count=20)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    with Elsewhere() as elsewhere:
        yield elsewhere


class TestMemoryStorage(StorageConformance):
    def make_storage(self) -> Storage:
        return MemoryStorage()


TestMemoryStorageAtRandom = storage_machine(MemoryStorage).TestCase
TestMemoryStorageAtRandom.settings = AT_RANDOM


class TestSharedMemoryStorageInItsProcess(StorageConformance):
    """Its peer makes every call from another process."""

    elsewhere: ClassVar[Elsewhere]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def other_process(cls, elsewhere: Elsewhere) -> None:
        cls.elsewhere = elsewhere

    def make_storage(self) -> Storage:
        return SharedMemoryStorage()

    def make_peer(self, storage: Storage) -> Storage:
        return self.elsewhere.client(storage)


class TestSharedMemoryStorageInAnotherProcess(StorageConformance):
    """It is made in another process, and used in this one."""

    @pytest.fixture
    def storage(self, elsewhere: Elsewhere) -> Iterator[Storage]:
        storage = elsewhere.make()
        yield storage
        elsewhere.drop(storage)


def test_shared_memory_at_random(elsewhere: Elsewhere) -> None:
    machine = storage_machine(elsewhere.make)
    run_state_machine_as_test(machine, settings=settings(AT_RANDOM, max_examples=10))


class TestSqliteStorage(StorageConformance):
    """Its peer has a connection of its own, in another process."""

    elsewhere: ClassVar[Elsewhere]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def other_process(cls, elsewhere: Elsewhere) -> None:
        cls.elsewhere = elsewhere

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        with SqliteStorage(tmp_path / "store.db") as storage:
            yield storage

    def make_peer(self, storage: Storage) -> Storage:
        return self.elsewhere.client(storage)

    def reopen(self, storage: Storage) -> Storage:
        return crashed(storage)


def crashed(storage: Storage) -> Storage:
    """Give a SQLite store as the next program finds it: what its file and its journal hold at this moment."""
    assert isinstance(storage, SqliteStorage)
    path = storage._path
    copied = path.with_name(f"{path.name}+")
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, f"{copied}{file.name.removeprefix(path.name)}")
    return SqliteStorage(copied)


def test_sqlite_at_random(tmp_path: Path) -> None:
    numbers = itertools.count()
    machine = storage_machine(lambda: SqliteStorage(tmp_path / f"{next(numbers)}.db"), crashed)
    run_state_machine_as_test(machine, settings=settings(AT_RANDOM, max_examples=10))


class Careless(MemoryStorage):
    """It gives jobs away that have changed, changes what is another's, and stores what was to be refused."""

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        return super().adopt({record.id: record.revision for record in self.get(revisions)}, owner)

    def update(self, changes: Sequence[JobChange]) -> None:
        for change in changes:
            change.by = None
            super().update([change])


@pytest.mark.parametrize(
    "test",
    [
        StorageConformance.test_a_job_that_has_changed_is_not_adopted,
        StorageConformance.test_a_change_by_another_than_the_owner_is_left_out,
        StorageConformance.test_changes_are_made_all_or_none,
    ],
)
def test_the_suite_catches_a_careless_storage(test: Any) -> None:
    storage = Careless()
    with pytest.raises(AssertionError):
        test(StorageConformance(), storage, storage.new_search())


def test_the_machine_catches_a_careless_storage() -> None:
    quickly = settings(max_examples=100, stateful_step_count=20, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(storage_machine(Careless), settings=quickly)


@pytest.mark.parametrize(("name", "module"), [("StorageConformance", "pytest"), ("storage_machine", "hypothesis")])
def test_without_what_it_needs_it_names_the_extra(name: str, module: str) -> None:
    program = run_program(
        f"""
        import sys
        sys.modules[{module!r}] = None  # as if it were not installed
        try:
            from paraval.testing import {name}
        except ImportError as exc:
            print(type(exc).__name__, exc)
        """
    )
    assert program.stdout == [
        f"MissingExtraError paraval.testing.{name} needs {module}: pip install 'paraval[testing]'"
    ]


class TestPipeStorage(StorageConformance):
    """What a job in a worker process has of its driver's storage."""

    def make_storage(self) -> Storage:
        return in_worker(MemoryStorage())


def in_worker(storage: Storage) -> PipeStorage:
    """Give a storage as a worker process has it."""
    calling = threading.Lock()

    def call(method: str, sealed: tuple[Any, ...]) -> Any:
        with calling:
            args = pickle.loads(pickle.dumps(sealed))  # noqa: S301 - made in the line itself
            value = getattr(storage, method)(*args)
            value = [record.id for record in args[1]] if method == "insert" else value
            return pickle.loads(pickle.dumps(value))  # noqa: S301 - likewise

    return PipeStorage(call)
