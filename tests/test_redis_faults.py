"""RedisStorage when things break: lost connections, a server that ends or is in trouble, damaged and hostile data."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import redis_server as real
from paraval.errors import (
    CorruptStoreError,
    StorageError,
    StoreUnreachableError,
    WrongStoreError,
)
from paraval.storage import JobChange, RedisStorage, UnknownIdError
from redis_server import RedisServer, check_everything, do_everything, insert, needs_redis, reopened
from support import in_threads, run_program, until
from tcp_proxy import Fate, Proxy, Way, pass_all

redis_server = real.redis_server  # the fixtures
prefix = real.prefix
storage = real.storage
search_id = real.search_id
proxy = real.proxy
far = real.far


# -- lost connections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("fate", [Fate.CUT, Fate.CUT_AFTER, Fate.CUT_WITHIN, Fate.HALF_CLOSE])
def test_what_was_interrupted_is_done_once(
    proxy: Proxy, far: RedisStorage, storage: RedisStorage, fate: Fate, way: Way
) -> None:
    far.connect()
    answers = []
    for operation in do_everything(far):
        lost = proxy.once(fate, way)
        answers.append(operation())
        assert lost.is_set()
    check_everything(storage, answers)


def test_an_answer_that_is_lost_several_times_is_given_at_last(
    proxy: Proxy, far: RedisStorage, storage: RedisStorage
) -> None:
    far.connect()
    answers = []
    for operation in do_everything(far):
        lost, was_asked = 0, False

        def rule(way: Way, data: bytes) -> Fate:
            nonlocal lost, was_asked
            if way is Way.TO_SERVER:
                was_asked = b"EVAL" in data
            elif was_asked and lost < 2:
                lost += 1
                return Fate.CUT
            return Fate.PASS

        proxy.rule = rule
        answers.append(operation())
        assert lost == 2
    check_everything(storage, answers)


def test_a_copy_that_comes_late_changes_nothing(proxy: Proxy, prefix: str, storage: RedisStorage) -> None:
    """A request lies somewhere in the network; the client gives it up, and sends it again on another connection."""
    far = RedisStorage(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, timeout=0.2)
    far.connect()
    insert(far, far.new_search(), 1)
    held = proxy.once(Fate.HOLD, Way.TO_SERVER)
    change = JobChange("0.0", intermediate=(1.0, 1.0))
    far.update([change])
    assert held.is_set()
    far.update([change])
    insert(far, "0", 1)
    before = storage.scan("0")
    passed = threading.Event()

    def rule(way: Way, _data: bytes) -> Fate:
        if way is Way.TO_CLIENT:
            passed.set()
        return Fate.PASS

    proxy.rule = rule
    proxy.release()
    assert passed.wait(20), "the server has answered the late copy"
    assert storage.scan("0") == before
    assert storage.get(["0.0"])[0].budgets == [1.0, 1.0]
    far.close()


def test_it_waits_for_a_server_that_comes_back(
    proxy: Proxy, far: RedisStorage, caplog: pytest.LogCaptureFixture
) -> None:
    far.new_search()
    proxy.refuse()
    back = threading.Timer(0.3, proxy.listen)
    back.start()
    with caplog.at_level(logging.WARNING, "paraval"):
        assert insert(far, "0", 2) == ["0.0", "0.1"]
    back.join()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the Redis server redis://127.0.0.1:{proxy.port}/0 was lost: the connection broke")
    assert said.endswith("; trying again for 30 s")


def test_it_does_not_wait_for_ever(proxy: Proxy, prefix: str) -> None:
    far = RedisStorage(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, retry_for=0.3, timeout=1)
    far.new_search()
    proxy.refuse()
    with pytest.raises(StoreUnreachableError, match=r"redis://127.0.0.1:\d+/0 is not to be reached .*tried for 0.3 s"):
        insert(far, "0", 1)
    assert not far.is_connected()
    proxy.listen()
    assert far.is_connected()
    assert insert(far, "0", 1) == ["0.0"]
    proxy.rule = lambda way, _data: Fate.CUT if way is Way.TO_CLIENT else Fate.PASS
    with pytest.raises(StoreUnreachableError, match=r"tried for 0\.3 s") as caught:
        insert(far, "0", 1)
    assert isinstance(caught.value, ConnectionError)
    far.close()


def test_it_does_not_wait_for_ever_for_an_answer(proxy: Proxy, prefix: str) -> None:
    far = RedisStorage(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, retry_for=0.2, timeout=0.1)
    far.new_search()
    proxy.rule = lambda way, _data: Fate.HOLD if way is Way.TO_SERVER else Fate.PASS
    with pytest.raises(StoreUnreachableError, match=r"did not answer within 0.1 s \(timeout=\).*tried for 0.2 s"):
        insert(far, "0", 1)
    far.close()


@pytest.fixture
def hasty(proxy: Proxy, prefix: str) -> Iterator[RedisStorage]:
    """A storage at the end of a bad line that gives up soon."""
    hasty = RedisStorage(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, retry_for=0.05, timeout=5)
    yield hasty
    hasty.close()


def is_given_up(proxy: Proxy, call: Callable[[], object], times: int = 1) -> None:
    """Have a call executed, its answer lost, and the line down until it, and some like it, were given up."""
    was_asked = is_down = False

    def rule(way: Way, data: bytes) -> Fate:
        nonlocal was_asked, is_down
        if way is Way.TO_SERVER:
            was_asked = was_asked or b"EVALSHA" in data
        elif was_asked:
            is_down = True
        return Fate.CUT if is_down else Fate.PASS

    proxy.rule = rule
    for _ in range(times):
        with pytest.raises(StoreUnreachableError, match="may have been executed or not"):
            call()
    assert is_down
    proxy.rule = pass_all


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["new_search", "insert", "update", "adopt"])
def test_a_write_that_was_given_up_and_is_made_again_is_done_once(
    proxy: Proxy, hasty: RedisStorage, storage: RedisStorage, name: str, times: int
) -> None:
    insert(storage, storage.new_search(), 1)
    storage.update([JobChange("0.0", out=1)])  # the server knows the scripts
    hasty.connect()
    call: Callable[[], object] = {
        "new_search": hasty.new_search,
        "insert": lambda: insert(hasty, "0", 1, args=({"x": 1},)),
        "update": lambda: hasty.update([JobChange("0.0", intermediate=(1.0, 1.0))]),
        "adopt": lambda: hasty.adopt({"0.0": 2}, "you"),
    }[name]
    is_given_up(proxy, call, times)
    before = storage.scan("0"), storage.search_ids()
    answer = {"new_search": "1", "insert": ["0.1"], "update": None, "adopt": {"0.0"}}[name]
    assert call() == answer
    assert (storage.scan("0"), storage.search_ids()) == before
    if name != "adopt":  # which has a condition
        assert call() == {"new_search": "2", "insert": ["0.2"], "update": None}[name], "it is another one"
        assert (storage.scan("0"), storage.search_ids()) != before


def test_what_was_given_up_is_another_one_after_another_write(
    proxy: Proxy, hasty: RedisStorage, storage: RedisStorage
) -> None:
    insert(storage, storage.new_search(), 1)
    change, other = JobChange("0.0", out=1), JobChange("0.0", out=2)
    storage.update([other])
    hasty.connect()
    is_given_up(proxy, lambda: hasty.update([change]))
    hasty.update([other])
    hasty.update([change])
    assert storage.get(["0.0"])[0].out == 1


def test_another_thread_does_not_disturb_who_tries_again(
    proxy: Proxy, hasty: RedisStorage, storage: RedisStorage
) -> None:
    insert(storage, storage.new_search(), 1)
    hasty.connect()
    is_given_up(proxy, lambda: insert(hasty, "0", 1, args=({"x": 1},)))
    in_threads(lambda: insert(hasty, "0", 3, args=({"x": 2},)))
    assert insert(hasty, "0", 1, args=({"x": 1},)) == ["0.1"]
    assert len(storage.scan("0")[0]) == 5


def test_a_lease_that_was_given_up_runs_from_when_it_is_taken_again(
    proxy: Proxy, hasty: RedisStorage, storage: RedisStorage
) -> None:
    storage.renew("me", 100)
    hasty.connect()
    is_given_up(proxy, lambda: hasty.renew("me", 100))
    storage.renew("me", 0)
    hasty.renew("me", 100)
    assert storage.owners() == {"me"}


def test_a_child_does_not_try_again_what_its_parent_gave_up(
    proxy: Proxy, hasty: RedisStorage, storage: RedisStorage
) -> None:
    insert(storage, storage.new_search(), 1)
    hasty.connect()
    is_given_up(proxy, lambda: insert(hasty, "0", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the proxy has threads, which the child does not need
        pid = os.fork()
    if pid == 0:
        os._exit(insert(hasty, "0", 1) != ["0.2"])
    assert os.waitpid(pid, 0)[1] == 0
    assert insert(hasty, "0", 1) == ["0.1"]


def test_an_address_that_never_answered_is_an_error_at_once(proxy: Proxy, prefix: str) -> None:
    proxy.refuse()
    far = RedisStorage(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, retry_for=3600)
    with pytest.raises(StoreUnreachableError, match="is it running there"):
        far.connect()


def test_the_server_may_forget_its_scripts(storage: RedisStorage, search_id: str, redis_server: RedisServer) -> None:
    redis_server.call("SCRIPT", "FLUSH")
    assert insert(storage, search_id, 2) == ["0.0", "0.1"]
    assert storage.scan(search_id)[1] == 2


def test_what_it_remembers_of_connections_goes_away(
    storage: RedisStorage, search_id: str, redis_server: RedisServer
) -> None:
    insert(storage, search_id, 1)
    sessions = redis_server.call("KEYS", f"{storage._prefix}:session:*")
    assert len(sessions) == 1
    assert 0 < redis_server.call("PTTL", sessions[0]) <= 1000 * 3600


# -- the server ends, and comes back -----------------------------------------------------------------------------------


def test_nothing_acknowledged_is_lost_when_a_durable_server_is_killed(tmp_path: Path) -> None:
    needs_redis()
    with RedisServer(tmp_path, appendonly="yes", appendfsync="always") as server:
        storage = RedisStorage(server.url)
        search_id = storage.new_search()
        acknowledged: list[str] = []
        enough = threading.Event()

        def work() -> None:
            client = reopened(storage)
            while not enough.is_set():
                made = insert(client, search_id, 3, status=1)
                client.update([JobChange(job_id, status=2, intermediate=(1.0, 1.0)) for job_id in made])
                acknowledged.extend(made)
            client.close()

        def trouble() -> None:
            for _ in range(3):
                count = len(acknowledged)
                while len(acknowledged) < count + 60:
                    enough.wait(0.001)
                server.kill()
                server.start()
            enough.set()

        in_threads(work, work, trouble)
        found = {record.id: record for record in storage.scan(search_id)[0]}
        assert len(acknowledged) == len(set(acknowledged)) >= 180
        assert sorted(found) == sorted(acknowledged), "no job that nobody was told of"
        assert all((found[job_id].status, found[job_id].budgets) == (2, [1.0]) for job_id in acknowledged)
        storage.close()


# -- a server in trouble -----------------------------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may spoil."""
    needs_redis()
    with RedisServer(tmp_path) as server:
        yield server


def refuses_writes(storage: RedisStorage, match: str) -> None:
    """Nothing is written, in part or in whole, but what is there can be read."""
    before = storage.scan("0")
    for operation in (
        storage.new_search,
        lambda: insert(storage, "0", 2),
        lambda: storage.update([JobChange("0.0", out=1), JobChange("0.1", out="x" * 20_000)]),
        lambda: storage.adopt({"0.0": 1}, "you"),
        lambda: storage.put_value("0", "k", 1),
    ):
        with pytest.raises(StorageError, match=match) as caught:
            operation()
        assert type(caught.value) is StorageError
        assert caught.value.__context__ is None
    assert storage.scan("0") == before
    assert storage.search_ids() == ["0"]


def test_a_server_without_memory(own_server: RedisServer) -> None:
    storage = RedisStorage(own_server.url)
    insert(storage, storage.new_search(), 2)
    own_server.call("CONFIG", "SET", "maxmemory", "1")
    refuses_writes(storage, "has no memory left")
    own_server.call("CONFIG", "SET", "maxmemory", "0")
    assert insert(storage, "0", 1) == ["0.2"]
    storage.close()


def test_a_replica(own_server: RedisServer) -> None:
    storage = RedisStorage(own_server.url)
    insert(storage, storage.new_search(), 2)
    own_server.call("CONFIG", "SET", "replica-serve-stale-data", "yes")
    own_server.call("REPLICAOF", "127.0.0.1", "1")
    refuses_writes(storage, "is a replica, .* its primary")
    storage.close()


def test_a_server_that_cannot_save(tmp_path: Path) -> None:
    needs_redis()
    away = tmp_path / "away"
    away.mkdir()
    with RedisServer(away, save="3600 1") as server:
        storage = RedisStorage(server.url)
        insert(storage, storage.new_search(), 2)
        shutil.rmtree(away)
        with contextlib.suppress(Exception):
            server.call("BGSAVE")
        until(lambda: b"rdb_last_bgsave_status:err" in said(server, "INFO persistence"))
        refuses_writes(storage, "cannot write to its disk")
        storage.close()
        server.kill()  # it would not end before it has saved


def said(server: RedisServer, command: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{command}\r\n".encode())
        return connection.recv(1 << 16)


def test_a_server_that_drops_what_it_keeps_is_told_of_once(own_server: RedisServer) -> None:
    own_server.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    RedisStorage(own_server.url).connect().close()  # without a limit it drops nothing
    own_server.call("CONFIG", "SET", "maxmemory", "1gb")
    storage = RedisStorage(own_server.url)
    with pytest.warns(RuntimeWarning, match=r"may drop what it keeps .*allkeys-lru.*'noeviction'") as caught:
        storage.connect()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        insert(storage, storage.new_search(), 1)
        copied = reopened(storage)
        insert(copied, "0", 1)
    storage.close()
    copied.close()


# -- what is under the keys --------------------------------------------------------------------------------------------


@pytest.fixture
def keys(storage: RedisStorage, search_id: str) -> dict[str, str]:
    """The keys of a search with two jobs, one of them with many changes."""
    insert(storage, search_id, 2, owner="me")
    storage.update([JobChange("0.1", metadata={str(x): "x" * 20_000}) for x in range(2)])
    storage.put_value(search_id, "k", 1)
    names = ["", ":searches", ":leases", *(f":search:0:{name}" for name in ("new", "jobs", "parts", "log", "values"))]
    return {name.rpartition(":")[2]: f"{storage._prefix}{name}" for name in names}


def uses(storage: RedisStorage) -> dict[str, Callable[[], Any]]:
    return {
        "insert": lambda: insert(storage, "0", 1),
        "update": lambda: storage.update([JobChange("0.0", out=1), JobChange("0.1", out=1)]),
        "adopt": lambda: storage.adopt({"0.0": 1, "0.1": 4}, "you"),
        "get": lambda: storage.get(["0.0", "0.1"]),
        "scan": lambda: storage.scan("0"),
    }


def is_named(storage: RedisStorage, kind: type[StorageError], match: str, *names: str) -> None:
    for name, use in uses(storage).items():
        if name in names:
            with pytest.raises(kind, match=match):
                use()


def test_a_later_release_wrote_it(storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer) -> None:
    redis_server.call("HSET", keys[""], "schema", "2")
    is_named(storage, WrongStoreError, r"later release of paraval \(schema 2; this one knows 1\)", *uses(storage))
    for use in (
        storage.connect,
        storage.search_ids,
        storage.new_search,
        storage.owners,
        lambda: storage.get_value("0", "k"),
    ):
        with pytest.raises(WrongStoreError, match="install that release, or give another prefix="):
            use()
    redis_server.call("HSET", keys[""], "schema", "new\nest")
    with pytest.raises(CorruptStoreError, match="schema") as caught:
        storage.connect()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "searches", "new", "jobs", "log", "parts"])
def test_something_else_is_under_a_key(
    storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer, name: str
) -> None:
    before = {key: redis_server.call("DUMP", key) for key in keys.values() if key != keys[name]}
    redis_server.call("DEL", keys[name])
    redis_server.call("SADD", keys[name], "something else")
    used = set(uses(storage)) - {"jobs": {"insert"}, "parts": {"insert"}}.get(name, set())
    is_named(storage, WrongStoreError, r"something else under the keys .*prefix=", *used)
    assert before == {key: redis_server.call("DUMP", key) for key in before}, "all or none"
    if name == "":
        with pytest.raises(WrongStoreError):
            RedisStorage(redis_server.url, prefix=storage._prefix).connect()
    assert redis_server.call("TYPE", keys[name]) == b"set"


@pytest.mark.parametrize("name", ["new", "jobs", "log", "parts"])
def test_a_key_is_missing(storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer, name: str) -> None:
    redis_server.call("DEL", keys[name])
    used = ["get", "scan"] if name == "parts" else list(uses(storage))
    is_named(storage, CorruptStoreError, "some of search '0' is missing .*noeviction", *used)
    assert redis_server.call("EXISTS", keys[name]) == 0, "nothing is made anew"


def test_the_list_of_searches_is_missing(
    storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer
) -> None:
    redis_server.call("DEL", keys["searches"])
    with pytest.raises(UnknownIdError):
        storage.scan("0")
    with pytest.raises(CorruptStoreError, match="some of search '0' is missing"):
        storage.new_search()


def test_a_job_is_missing(storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer) -> None:
    changed = redis_server.call("HGET", keys["jobs"], "1")
    redis_server.call("HDEL", keys["jobs"], "1")
    redis_server.call("HSET", keys["jobs"], "5", "x")
    is_named(storage, CorruptStoreError, "some of search '0' is missing", "scan")
    redis_server.call("HSET", keys["jobs"], "1", changed)
    redis_server.call("HDEL", keys["new"], "0")
    redis_server.call("HSET", keys["new"], "5", "x")
    is_named(storage, CorruptStoreError, "some of search '0' is missing", "get", "scan", "update", "adopt")


def test_a_log_that_is_too_short_is_named(
    storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer
) -> None:
    log = redis_server.call("GET", keys["log"])
    assert len(log) == 6 * storage.scan("0")[1]
    for short in (log[:-1], log[:6]):
        redis_server.call("SET", keys["log"], short)
        is_named(storage, CorruptStoreError, "some of search '0' is missing", *uses(storage))
    insert(storage, storage.new_search(), 3)
    redis_server.call("SET", keys["log"].replace(":0:", ":1:"), log[:12])
    with pytest.raises(CorruptStoreError, match="some of search '1' is missing"):
        storage.scan("1")


class _Trap:
    def __reduce__(self) -> Any:
        return os.putenv, ("PARAVAL_CANARY", "dead")


CANARY = pickle.dumps(_Trap())


@pytest.mark.parametrize("name", ["new", "jobs"])
@pytest.mark.parametrize("junk", [b"", b"x", b"\xff" * 40, bytes(40), CANARY, bytes(6) + b"R\0\0\0\5\1\x81" + bytes(9)])
def test_a_damaged_job_is_named(
    storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer, junk: bytes, name: str
) -> None:
    """What is damaged are the changes of one job, or all that was inserted."""
    redis_server.call("HSET", keys[name], "0" if name == "new" else "1", junk)
    is_named(storage, CorruptStoreError, "damaged|missing", "get", "scan")
    before = redis_server.call("DUMP", keys["jobs"])
    try:
        storage.update([JobChange("0.0", out=1), JobChange("0.1", out=1)])
    except CorruptStoreError:
        assert redis_server.call("DUMP", keys["jobs"]) == before, "all or none"
    else:
        assert redis_server.call("HLEN", keys["jobs"]) == 2, "a change reads no more of a job than its head"
    is_named(storage, CorruptStoreError, "damaged|missing", "get", "scan")


@pytest.mark.parametrize(("name", "head"), [("new", 6 + 2 + 2 + len("=me") + 2 * 4), ("jobs", 4 + 2 + len("=me"))])
def test_a_record_that_was_cut_or_changed_is_named(
    storage: RedisStorage, search_id: str, redis_server: RedisServer, name: str, head: int
) -> None:
    insert(storage, search_id, 1, args=({"x": 1.5, "name": "adam"},), owner="me", out=[1, 2, {"a": b"b" * 90}])
    storage.update([JobChange("0.0", out="some text"), JobChange("0.0", metadata={"a": [1, 2]})])
    key = f"{storage._prefix}:search:0:{name}"
    whole = redis_server.call("HGET", key, "0")
    records = storage.get(["0.0"])
    revisions = [whole.find((2).to_bytes(6)), len(whole) - 6] if name == "jobs" else []  # the only thing not checked
    places = [
        place
        for place in range(head, len(whole))
        if not any(revision <= place < revision + 6 for revision in revisions)
    ]
    damages = [whole[:cut] for cut in range(0, len(whole), 5)]
    damages += [whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :] for place in places]
    for damaged in damages:
        redis_server.call("HSET", key, "0", damaged)
        with pytest.raises(CorruptStoreError):
            storage.get(["0.0"])
    redis_server.call("HSET", key, "0", whole)
    assert storage.get(["0.0"]) == records


def test_hostile_bytes_are_never_executed(
    storage: RedisStorage, keys: dict[str, str], redis_server: RedisServer
) -> None:
    """A pickle that would leave a trace in every value, in turn, under an audit hook that sees unpickling."""
    redis_server.call("ZADD", keys["leases"], "+inf", CANARY)
    inner = b"\xc6" + struct.pack(">I", len(CANARY)) + CANARY
    program = run_program(f"""
        import pickle, sys, zlib
        import redis
        from paraval.errors import ParavalError
        from paraval.storage import JobChange, JobRecord, RedisStorage

        # all imports are done before: importing compiles and executes
        storage = RedisStorage({redis_server.url!r}, prefix={storage._prefix!r}).connect()
        storage.get(["0.0", "0.1"])
        client = redis.Redis(port={redis_server.port})
        client.ping()
        seen = []
        hostile = ("pickle.", "marshal.", "exec", "compile", "import", "os.putenv", "os.system", "subprocess", "ctypes")
        sys.addaudithook(lambda event, args: seen.append((event, args)) if event.startswith(hostile) else None)
        canary, inner, refused = {CANARY!r}, {inner!r}, 0

        def use():
            global refused
            for call in (
                lambda: storage.get(["0.0", "0.1"]), lambda: storage.scan("0"), lambda: storage.get_value("0", "k"),
                lambda: storage.update([JobChange("0.1", out=1)]), lambda: storage.adopt({{"0.1": 4}}, "you"),
                lambda: storage.insert("0", [JobRecord()]), storage.owners, storage.search_ids, storage.connect,
            ):
                try:
                    call()
                except ParavalError:
                    refused += 1

        def frame(kind, data):
            return kind + len(data).to_bytes(4) + data + zlib.crc32(data).to_bytes(4) + bytes(6)

        keys, head = {keys!r}, bytes(6)
        values = [
            canary, head + canary, head + frame(b"C", canary), head + frame(b"C", b"\\x81\\xa3out" + inner + canary),
            head + frame(b"C", b"\\x81\\xa3out" + inner) + frame(b"A", canary),
            head + frame(b"C", b"\\x81\\xa5error\\x81\\xa4kind" + inner), head + frame(canary[:1], canary),
        ]
        runs = [canary]
        for inserted in (canary, frame(b"R", canary), frame(b"R", b"\\x01" + canary), frame(b"C", canary)):
            ends = bytes(4) + 2 * len(inserted[:-6]).to_bytes(4)
            runs.append((1).to_bytes(6) + b"\\0\\2" + bytes(2) + ends + inserted[:-6])
        for name, field, value in [("jobs", "1", each) for each in values] + [("new", "0", each) for each in runs]:
            before = client.hget(keys[name], field)
            client.hset(keys[name], field, value)
            use()
            client.hset(keys[name], field, before)
        for name, field in (("parts", "1.0"), ("values", "k"), ("searches", "0"), ("", "schema")):
            key = keys[name]
            before = client.hget(key, field)
            client.hset(key, field, canary)
            use()
            client.hset(key, field, before)
        for session in client.keys(keys[""] + ":session:*"):
            client.set(session, canary)
            use()
        client.set(keys["log"], canary * 6)
        use()
        print(refused >= 12 * 2 + 5, seen)
        pickle.loads(canary)
        print(*[event for event, _ in seen])
        storage.close()
        client.close()
    """)
    assert program.stdout == ["True []", "pickle.find_class os.putenv"], program.stderr
