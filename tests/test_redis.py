"""RedisStorage on a real server: the contract, much data, several processes."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

import redis_server as real
from paraval import Evaluator, RunningJob
from paraval.errors import (
    MissingExtraError,
)
from paraval.storage import JobChange, JobRecord, MemoryStorage, RedisStorage, Storage, UnknownIdError, UnstorableError
from paraval.storage.redis.scripts import Script
from paraval.testing import StorageConformance, storage_machine
from redis_server import RedisServer, insert, new_prefix, reopened
from support import Program, double, ids, make, run_program
from tcp_proxy import Fate, Proxy, Way

redis_server = real.redis_server  # the fixtures
prefix = real.prefix
storage = real.storage
search_id = real.search_id
proxy = real.proxy
far = real.far


# -- the contract ------------------------------------------------------------------------------------------------------


class TestRedisStorage(StorageConformance):
    server: ClassVar[RedisServer]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def a_server(cls, redis_server: RedisServer) -> None:
        cls.server = redis_server

    def make_storage(self) -> Storage:
        return RedisStorage(self.server.url, prefix=new_prefix())

    def make_peer(self, storage: Storage) -> Storage:
        assert isinstance(storage, RedisStorage)
        return reopened(storage)

    def reopen(self, storage: Storage) -> Storage:
        return self.make_peer(storage)


class Unlucky(RedisStorage):
    """Something happens to its line during its next write."""

    luck: ClassVar[list[Callable[[], object]]] = []

    def _run(self, script: Script, *args: bytes) -> list[Any]:
        if script.writes and self.luck:
            self.luck.pop()()
        return super()._run(script, *args)


def test_redis_at_random_on_a_bad_line(redis_server: RedisServer) -> None:
    """Operations are done once, whatever becomes of the connection, the client and what the server has cached."""
    fates = st.sampled_from([Fate.CUT, Fate.CUT_AFTER, Fate.CUT_WITHIN, Fate.HALF_CLOSE])
    with Proxy(redis_server.port) as proxy:

        def make() -> Unlucky:
            return Unlucky(f"redis://127.0.0.1:{proxy.port}/0", prefix=new_prefix()).connect()

        class BadLine(storage_machine(make, reopened)):  # type: ignore[misc] # a class made at run time
            @rule(fate=fates, way=st.sampled_from(Way), skip=st.integers(0, 1))
            def lose_something(self, fate: Fate, way: Way, skip: int) -> None:
                Unlucky.luck[:] = [partial(proxy.once, fate, way, skip)]

            @rule()
            def lose_the_connection(self) -> None:
                proxy.cut()

            @rule()
            def forget_the_scripts(self) -> None:
                redis_server.call("SCRIPT", "FLUSH")

        run_state_machine_as_test(BadLine, settings=settings(max_examples=25, stateful_step_count=20))


def test_it_is_as_memory_is(storage: RedisStorage) -> None:
    memory = MemoryStorage()
    for each in (storage, memory):
        search_id = each.new_search()
        made = insert(each, search_id, 3, owner="me", status=1)
        each.update([JobChange(made[1], out=1.5), JobChange(made[1], metadata={"a": 1}, by="me")])
        assert each.adopt({made[0]: 1, made[2]: 99}, "you") == {made[0]}
    assert storage.scan("0") == memory.scan("0")
    assert storage.scan("0", 3) == memory.scan("0", 3)
    assert storage.scan("0", sys.maxsize) == memory.scan("0", sys.maxsize) == ([], 6)


def test_evaluators_share_it(storage: RedisStorage) -> None:
    with (
        make("serial", double, storage=storage) as first,
        make("thread", double, storage=reopened(storage), search_id=first.search_id) as second,
    ):
        first.submit([{"x": x} for x in range(50)])
        second.submit([{"x": x} for x in range(50)])
        mine, theirs = first.gather("ALL"), second.gather("ALL")
        assert not {job.id for job in mine} & {job.id for job in theirs}
        assert ids(first.gather_other_jobs_done()) == ids(theirs)
        assert first.gather_other_jobs_done() == []
        assert ids(second.gather_other_jobs_done()) == ids(mine)
    assert len(storage.load_out_from_all_jobs(first.search_id)) == 100


def test_prefixes_are_apart(storage: RedisStorage, redis_server: RedisServer) -> None:
    storage.new_search()
    other = RedisStorage(redis_server.url, prefix=new_prefix())
    assert other.search_ids() == []
    assert {key.split(b":")[0] for key in redis_server.call("KEYS", f"{storage._prefix}*")} == {
        storage._prefix.encode()
    }
    other.close()


def test_a_local_socket_will_do(redis_server: RedisServer, prefix: str) -> None:
    storage = RedisStorage(f"unix://{redis_server.socket_path}?db=3", prefix=prefix)
    assert repr(storage) == f"RedisStorage('unix://{redis_server.socket_path}?db=3', prefix='{prefix}')"
    assert storage.new_search() == "0"
    assert redis_server.call("HLEN", f"{prefix}:searches") == 0, "that was database 0"
    storage.close()


def test_a_close_is_no_end(storage: RedisStorage) -> None:
    storage.new_search()
    storage.close()
    storage.close()
    assert storage.search_ids() == ["0"]


# -- much --------------------------------------------------------------------------------------------------------------


def test_jobs_are_found_however_they_were_inserted(storage: RedisStorage, redis_server: RedisServer) -> None:
    """One by one, in large batches, over the multiples of 32, large ones, those of several owners; beside a model."""
    memory = MemoryStorage()
    chance = random.Random(1)
    for each in (storage, memory):
        each.new_search()
    made: list[str] = []
    for size in [1, 1, 29, 2, 31, 1, 33, 200, 3, 64, 1, 1]:
        big = size in {29, 200}
        for each in (storage, memory):
            records = [
                JobRecord(out="x" * 20_000 if big else number, owner=[None, "me", "you"][number // 5 % 3])
                for number in range(size)
            ]
            each.insert("0", records)
            assert [record.id for record in records] == [f"0.{len(made) + number}" for number in range(size)]
        made += [f"0.{len(made) + number}" for number in range(size)]
        changed = chance.sample(made, min(len(made), 20))
        changes = [
            JobChange(job_id, metadata={"n": n}, by=chance.choice([None, "me", "you"]))
            for n, job_id in enumerate(changed + changed[:3])
        ]
        for each in (storage, memory):
            each.update(changes)
        revisions = {record.id: record.revision for record in memory.get(chance.sample(made, min(len(made), 3)))}
        assert storage.adopt(revisions, "heir") == memory.adopt(revisions, "heir") == set(revisions)
    assert storage.scan("0") == memory.scan("0")
    _, revision = memory.scan("0")
    for since in (revision - 1, revision - 40, revision // 2):
        assert storage.scan("0", since) == memory.scan("0", since)
    chance.shuffle(made)
    assert storage.get(made) == memory.get(made)
    runs = redis_server.call("HGETALL", f"{storage._prefix}:search:0:new")
    assert max(len(run) for run in (runs.values() if isinstance(runs, dict) else runs[1::2])) < 80_000


def test_a_long_record_is_kept_in_parts(storage: RedisStorage, search_id: str, redis_server: RedisServer) -> None:
    (job_id,) = insert(storage, search_id, 1, owner="me", status=1)
    for first in range(0, 4000, 400):
        storage.update([JobChange(job_id, intermediate=(x, -x), by="me") for x in range(first, first + 400)])
    storage.update([JobChange(job_id, metadata={"big": "x" * 100_000}), JobChange(job_id, out=1.5)])
    (record,) = storage.get([job_id])
    assert record.budgets == list(range(4000))
    assert record.objectives == [-x for x in range(4000)]
    assert (record.out, record.revision, len((record.metadata or {})["big"])) == (1.5, 4003, 100_000)
    assert storage.scan(search_id) == ([record], 4003)
    assert redis_server.call("HLEN", f"{storage._prefix}:search:0:parts") > 3
    assert redis_server.call("HSTRLEN", f"{storage._prefix}:search:0:jobs", "0") < 20_000, "what a change must read"
    assert storage.adopt({job_id: 4003}, "you") == {job_id}
    storage.update([JobChange(job_id, out=2.5, by="me"), JobChange(job_id, kwargs={}, by="you")])
    (record,) = storage.get([job_id])
    assert (record.out, record.owner, record.attempts, record.kwargs, len(record.budgets or ())) == (
        None,
        "you",
        1,
        {},
        4000,
    )


def test_a_large_output_is_kept(far: RedisStorage) -> None:
    (job_id,) = insert(far, far.new_search(), 1)
    far.update([JobChange(job_id, out=b"x" * 20_000_000)])
    far.update([JobChange(job_id, status=2)])
    (record,) = far.get([job_id])
    assert (record.status, len(record.out)) == (2, 20_000_000)


def test_what_is_too_much_is_refused(storage: RedisStorage, search_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paraval.storage.redis.storage._MOST_BYTES", 1 << 20)
    (job_id,) = insert(storage, search_id, 1)
    for call in (
        partial(storage.insert, search_id, [JobRecord(out="x" * (1 << 20))]),
        partial(storage.update, [JobChange(job_id, out="x" * (1 << 20))]),
        partial(storage.put_value, search_id, "k", "x" * (1 << 20)),
    ):
        with pytest.raises(UnstorableError, match="give the path"):
            call()
    assert storage.scan(search_id)[1] == 1


def test_much_is_written_and_read_in_several_steps(
    storage: RedisStorage, search_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paraval.storage.redis.storage._MUCH", 1000)
    monkeypatch.setattr("paraval.storage.redis.storage._CHANGES", (7, 7))
    monkeypatch.setattr("paraval.storage.redis.storage._JOBS", 7)
    made = insert(storage, search_id, 50)
    storage.update([JobChange(job_id, out=number) for number, job_id in enumerate(made)] * 2)
    records, revision = storage.scan(search_id)
    assert [record.id for record in records] == made
    assert [record.revision for record in records] == list(range(101, 151))
    assert revision == 150
    assert storage.get(reversed(made)) == records[::-1]
    with pytest.raises(UnknownIdError, match=r"no job '0\.50'"):
        storage.update([JobChange(job_id, out=0) for job_id in [*made, f"{search_id}.50"]])
    with pytest.raises(UnstorableError):
        storage.update([JobChange(job_id, out=print if job_id == made[-1] else 0) for job_id in made])
    assert storage.scan(search_id, 150) == ([], 150)


def test_a_scan_in_several_steps_is_that_of_the_last(
    storage: RedisStorage, search_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paraval.storage.redis.storage._CHANGES", (10, 10))
    made = insert(storage, search_id, 40)
    peer = reopened(storage)
    steps = 0
    run = storage._run

    def disturbed(*args: Any) -> list[Any]:
        nonlocal steps
        answer = run(*args)
        steps += 1
        if steps == 2:  # one that was read, one that was not yet, and a new one
            peer.update([JobChange(made[3], out="late"), JobChange(made[30], out="late")])
            insert(peer, search_id, 1)
        return answer

    monkeypatch.setattr(storage, "_run", disturbed)
    records, revision = storage.scan(search_id)
    assert (records, revision) == peer.scan(search_id)
    assert [record.id for record in records][-3:] == [made[3], made[30], f"{search_id}.40"]
    assert len(records) == 41
    peer.close()


# -- processes ---------------------------------------------------------------------------------------------------------


def test_two_drivers_get_each_id_once(storage: RedisStorage, search_id: str, tmp_path: Path) -> None:
    sent = tmp_path / "storage"
    sent.write_bytes(pickle.dumps(storage))
    source = f"""
        import pickle
        from pathlib import Path
        from paraval import Evaluator

        async def run(job):
            return job["x"]

        storage = pickle.loads(Path({str(sent)!r}).read_bytes())
        options = {{"num_workers": 4, "storage": storage, "search_id": {search_id!r}}}
        with Evaluator.create(run, "serial", options) as evaluator:
            for first in range(0, 1000, 100):
                evaluator.submit([{{"x": x}} for x in range(first, first + 100)])
            print(*[job.id for job in evaluator.gather("ALL")])
        storage.close()
    """
    with Program(source) as first, Program(source) as second:
        first.wait()
        second.wait()
        assert (first.code, first.complaints, second.code, second.complaints) == (0, [], 0, [])
        made = [each.stdout[0].split() for each in (first, second)]
    assert [len(each) for each in made] == [1000, 1000]
    assert sorted(made[0] + made[1]) == sorted(storage.load_all_job_ids(search_id))
    records, _ = storage.scan(search_id)
    assert len({record.id for record in records}) == len(records) == 2000
    assert all(record.status == 2 for record in records)


def test_a_fork_takes_its_own_connection(redis_server: RedisServer, prefix: str) -> None:
    program = run_program(f"""
        import os
        from paraval.storage import JobRecord, RedisStorage

        storage = RedisStorage({redis_server.url!r}, prefix={prefix!r})
        search_id = storage.new_search()
        child = os.fork()
        records = [JobRecord() for _ in range(200)]
        for record in records:
            storage.insert(search_id, [record])
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert len(set(storage.load_all_job_ids(search_id))) == 400
            assert len({{record.id for record in records}}) == 200
            print("good")
        storage.close()
    """)
    assert (program.code, program.complaints, program.stdout) == (0, [], ["good"])


def test_it_reaches_jobs_in_processes(storage: RedisStorage) -> None:
    with Evaluator.create(note, "process", {"num_workers": 1, "storage": storage}) as evaluator:
        evaluator.submit([{"x": x} for x in range(6)])
        jobs = evaluator.gather("ALL")
    assert sorted(job.output for job in jobs) == [0, 1, 2, 3, 4, 5]
    records, _ = storage.scan(evaluator.search_id)
    assert all((record.metadata or {})["noted"] == (record.args or ())[0]["x"] for record in records)


def note(job: RunningJob) -> Any:
    assert job.id is not None
    job.storage.store_job_metadata(job.id, "noted", job["x"])
    return job["x"]


def test_importing_the_storages_does_not_import_the_client() -> None:
    program = run_program("""
        import sys
        import paraval.storage
        assert "redis" not in sys.modules
        from paraval.storage import RedisStorage
        assert "redis" not in sys.modules
    """)
    assert (program.code, program.complaints) == (0, [])


def test_a_missing_client_is_named() -> None:
    program = run_program("""
        import sys
        sys.modules["redis"] = None
        from paraval.storage import RedisStorage
        try:
            RedisStorage()
        except ImportError as exc:
            print(type(exc).__name__, exc)
    """)
    assert program.stdout == [
        f"{MissingExtraError.__name__} RedisStorage needs the Redis client: pip install 'paraval[redis]'"
    ]
