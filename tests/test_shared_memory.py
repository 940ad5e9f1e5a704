"""A memory storage that other processes use: it is one store for all of them, and it ends with its owner."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from elsewhere import Elsewhere
from paraval.errors import ParavalError, StorageError
from paraval.storage import JobChange, JobRecord, SharedMemoryStorage, UnknownIdError, UnstorableError
from paraval.storage.shared import sockets
from support import in_threads, run_program, until

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks:DeprecationWarning")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    with Elsewhere() as elsewhere:
        yield elsewhere


@pytest.fixture
def doomed() -> Iterator[Elsewhere]:
    """Give a process of the test's own, to be stopped and killed."""
    with Elsewhere() as elsewhere:
        yield elsewhere


@pytest.fixture
def storage() -> Iterator[SharedMemoryStorage]:
    storage = SharedMemoryStorage()
    yield storage
    storage.close()


@pytest.fixture(autouse=True)
def older() -> Iterator[None]:
    """Leave threads of earlier tests out of account: one that failed may keep its storage, and so its threads."""
    _older.update(serving_threads())
    yield
    _older.clear()


def serving_threads() -> list[threading.Thread]:
    """Give the threads that answer for storages of this test."""
    found = [thread for thread in threading.enumerate() if thread.name == "paraval-shared"]
    return [thread for thread in found if thread not in _older]


_older: set[threading.Thread] = set()


def in_fork(function: Any) -> Any:
    """Call a function in a forked child, and give what it returns or raise what it raises."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            reply: Any = (None, function())
        except BaseException as exc:  # noqa: BLE001 - it is raised in the parent
            reply = (exc, None)
        os.write(writer, pickle.dumps(reply))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        error, value = pickle.loads(file.read())  # noqa: S301 - from our own child
    os.waitpid(pid, 0)
    if error is not None:
        raise error
    return value


# -- one store for all -------------------------------------------------------------------------------------------------


def test_it_is_the_very_same_in_its_own_process(storage: SharedMemoryStorage) -> None:
    assert storage.by_reference
    assert storage.can_travel
    data = pickle.dumps(storage)
    assert pickle.loads(data) is storage  # noqa: S301 - made in the line above
    assert copy.deepcopy(storage) is storage
    assert pickle.dumps(storage) == data


def test_it_serves_nobody_before_it_is_sent(storage: SharedMemoryStorage) -> None:
    storage.new_search()
    assert serving_threads() == []
    pickle.dumps(storage)
    assert len(serving_threads()) == 1
    pickle.dumps(storage)
    assert len(serving_threads()) == 1


def test_several_processes_share_it(storage: SharedMemoryStorage, elsewhere: Elsewhere) -> None:
    search_id = storage.new_search()
    client = elsewhere.client(storage)
    job_id = client.create_new_job(search_id)
    client.update([JobChange(job_id, status=2, out={"a": (1, b"x")}, metadata={"n": 2**70})])
    with Elsewhere() as third:
        assert third.client(storage).load_job(job_id)["out"] == {"a": [1, b"x"]}
        assert third.client(storage).create_new_job(search_id) == f"{search_id}.1"
    assert storage.load_job(job_id)["metadata"] == {"n": 2**70}


def test_what_has_arrived_can_be_sent_on(elsewhere: Elsewhere) -> None:
    arrived = elsewhere.make()
    assert not arrived.by_reference
    assert arrived.can_travel
    search_id = arrived.new_search()
    data = pickle.dumps(arrived)
    assert pickle.loads(data) is arrived  # noqa: S301 - made in the line above
    with Elsewhere() as third:
        assert third.call("call", data, "search_ids") == [search_id]
    assert in_fork(arrived.search_ids) == [search_id]


def test_what_is_large_crosses(storage: SharedMemoryStorage, elsewhere: Elsewhere) -> None:
    client = elsewhere.client(storage)
    search_id = storage.new_search()
    client.put_value(search_id, "large", b"x" * 30_000_000)
    assert len(client.get_value(search_id, "large")) == 30_000_000


def test_its_owner_keeps_anything_and_others_are_told_what_cannot_cross(
    storage: SharedMemoryStorage, elsewhere: Elsewhere
) -> None:
    search_id = storage.new_search()
    strange = object()
    good, bad = JobRecord(out=1), JobRecord(out=[strange])
    storage.insert(search_id, [good, bad])
    assert storage.get([bad.id])[0].out == [strange]
    client = elsewhere.client(storage)
    assert client.get([good.id])[0].out == 1
    with pytest.raises(UnstorableError, match="object"):
        client.get([bad.id])
    with pytest.raises(UnstorableError, match="object"):
        elsewhere.make().put_value("0", "key", strange)
    assert client.get([good.id])[0].out == 1, "the connection is as good as before"


def test_errors_are_those_of_the_store(
    storage: SharedMemoryStorage, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = elsewhere.make()
    with pytest.raises(UnknownIdError, match="no search '9'") as caught:
        arrived.scan("9")
    assert isinstance(caught.value, KeyError)
    with pytest.raises(ParavalError, match="no method 'close'"):
        arrived._link.call("close", ())  # type: ignore[union-attr] # it is a client

    def fail(_self: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(type(storage._store), "search_ids", fail)
    with pytest.raises(StorageError, match="ZeroDivisionError: oh"):
        elsewhere.client(storage).search_ids()


# -- threads and forks -------------------------------------------------------------------------------------------------


def test_threads_of_a_client_do_not_wait_for_one_another(elsewhere: Elsewhere) -> None:
    arrived = elsewhere.make()
    search_id = arrived.new_search()
    made = in_threads(*[lambda: [arrived.create_new_job(search_id) for _ in range(50)]] * 8)
    assert len({job_id for job_ids in made for job_id in job_ids}) == 400
    assert len(arrived._link._idle) <= 4  # type: ignore[union-attr] # it is a client


def test_a_forked_child_uses_the_store_of_its_parent(storage: SharedMemoryStorage) -> None:
    search_id = storage.new_search()

    def work() -> tuple[bool, str]:
        job_id = storage.create_new_job(search_id)
        grandchild = in_fork(partial(storage.create_new_job, search_id))
        return storage.by_reference, f"{job_id} {grandchild}"

    assert in_fork(work) == (False, "0.0 0.1")
    assert in_fork(work) == (False, "0.2 0.3")
    assert storage.load_all_job_ids(search_id) == ["0.0", "0.1", "0.2", "0.3"]
    assert storage.by_reference


def test_a_process_of_multiprocessing_uses_it(storage: SharedMemoryStorage) -> None:
    search_id = storage.new_search()
    process = multiprocessing.get_context("fork").Process(target=storage.create_new_job, args=(search_id,))
    process.start()
    process.join(30)
    assert storage.load_all_job_ids(search_id) == ["0.0"]


def test_a_pool_of_processes_uses_it(storage: SharedMemoryStorage) -> None:
    search_id = storage.new_search()
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        made = list(pool.map(_make_jobs, [(storage, search_id)] * 4))
    assert sorted(job_id for job_ids in made for job_id in job_ids) == sorted(storage.load_all_job_ids(search_id))
    assert len(storage.load_all_job_ids(search_id)) == 80


def _make_jobs(given: tuple[SharedMemoryStorage, str]) -> list[str]:
    storage, search_id = given
    return [storage.create_new_job(search_id) for _ in range(20)]


def test_a_fork_while_others_come_and_go_harms_nobody(storage: SharedMemoryStorage, elsewhere: Elsewhere) -> None:
    search_id = storage.new_search()
    arrived = elsewhere.make()
    arrived.new_search()
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            elsewhere.client(storage).create_new_job(search_id)
            arrived.create_new_job("0")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            assert in_fork(lambda: (storage.search_ids(), arrived.search_ids())) == (["0"], ["0"])
    finally:
        ended.set()
        for thread in threads:
            thread.join()


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_calls_fail_when_the_owner_is_gone(doomed: Elsewhere, number: signal.Signals) -> None:
    arrived = doomed.make()
    assert arrived.connect() is arrived
    doomed.signal(number)
    until(lambda: not arrived.is_connected())
    for _ in range(2):
        with pytest.raises(StorageError, match="is gone") as caught:
            arrived.new_search()
        assert isinstance(caught.value, OSError)
        assert "\n" not in str(caught.value)


def test_a_call_under_way_fails_when_the_owner_is_gone(doomed: Elsewhere) -> None:
    arrived = doomed.make()
    arrived.new_search()
    doomed.signal(signal.SIGSTOP)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            arrived.new_search()
        except StorageError as exc:
            errors.append(exc)

    thread = threading.Thread(target=call)
    thread.start()
    doomed.signal(signal.SIGKILL)
    thread.join(30)
    assert len(errors) == 1


def test_children_that_were_forked_do_not_hide_that_the_owner_is_gone() -> None:
    program = """
        import os, pickle, sys, time
        from paraval.storage import SharedMemoryStorage
        storage = SharedMemoryStorage()
        print(pickle.dumps(storage).hex(), flush=True)
        sys.stdin.readline()
        if os.fork():
            os.kill(os.getpid(), 9)
        os.close(1)
        try:
            storage.new_search()
        except OSError:
            time.sleep(60)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert owner.stdout is not None
        assert owner.stdin is not None
        arrived = pickle.loads(bytes.fromhex(owner.stdout.readline()))  # noqa: S301 - from our own process
        arrived.new_search()
        owner.communicate("go\n")
        with pytest.raises(StorageError, match="is gone"):
            arrived.new_search()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)


def test_a_store_that_is_collected_serves_no_more(elsewhere: Elsewhere) -> None:
    storage = SharedMemoryStorage()
    client = elsewhere.client(storage)
    client.new_search()
    assert len(serving_threads()) == 2
    del storage
    gc.collect()
    until(lambda: not serving_threads())
    with pytest.raises(StorageError, match="is gone"):
        client.new_search()


def test_a_store_that_was_closed_is_not_served_by_a_fork(storage: SharedMemoryStorage) -> None:
    storage.new_search()
    storage.close()
    with pytest.raises(StorageError, match="has closed it"):
        in_fork(storage.search_ids)
    assert serving_threads() == []
    pickle.dumps(storage)
    assert in_fork(storage.search_ids) == ["0"]


def test_a_store_that_was_closed_can_be_sent_again(storage: SharedMemoryStorage, elsewhere: Elsewhere) -> None:
    storage.close()
    old = elsewhere.client(storage)
    search_id = old.new_search()
    storage.close()
    storage.close()
    until(lambda: not serving_threads())
    with pytest.raises(StorageError, match="has closed it"):
        old.search_ids()
    assert storage.search_ids() == [search_id]
    assert elsewhere.client(storage).search_ids() == [search_id]


def test_a_program_ends_while_others_are_connected() -> None:
    program = run_program(
        """
        import pickle, subprocess, sys
        from paraval.storage import SharedMemoryStorage
        storage = SharedMemoryStorage()
        code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).new_search())"
        command = [sys.executable, "-c", code, pickle.dumps(storage).hex()]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    assert program.code == 0
    assert program.stdout[0] == "0"
    assert program.stderr == ""


def test_where_there_can_be_no_more_threads_it_cannot_be_sent(
    storage: SharedMemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(StorageError, match="can't start new thread"):
        pickle.dumps(storage)
    monkeypatch.undo()
    assert pickle.loads(pickle.dumps(storage)) is storage  # noqa: S301 - made in the line itself


# -- who may come ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sockets._HAS_ABSTRACT, reason="abstract sockets are Linux's")
def test_on_linux_there_is_no_file(storage: SharedMemoryStorage) -> None:
    pickle.dumps(storage)
    assert storage._link.address.startswith("\0paraval-")
    unguessable = storage._link.address.removeprefix("\0paraval-")
    assert len(unguessable) == 32


@pytest.mark.skipif(not sockets._HAS_ABSTRACT, reason="elsewhere the folder is closed to others")
def test_another_user_is_refused(
    storage: SharedMemoryStorage, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = elsewhere.client(storage)
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with pytest.raises(StorageError, match="is gone"):  # to whom we do not talk, we say nothing
        client.new_search()
    arrived = elsewhere.make()
    with pytest.raises(StorageError, match="another user"):
        arrived.new_search()
    monkeypatch.undo()
    assert storage.search_ids() == []
    assert client.new_search() == "0"


def test_without_abstract_sockets_there_is_a_folder_closed_to_others(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(sockets, "_HAS_ABSTRACT", False)
        monkeypatch.setattr("tempfile.tempdir", short)
        look_at_folder(elsewhere, Path(short))


def look_at_folder(elsewhere: Elsewhere, tmp_path: Path) -> None:
    storage = SharedMemoryStorage()
    client = elsewhere.client(storage)
    assert client.new_search() == "0"
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert in_fork(storage.search_ids) == ["0"]
    assert folder.exists(), "a child that ends does not take it away"
    storage.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="is gone"):
        client.new_search()


@pytest.mark.parametrize("said", [b"", b"\x05", (3).to_bytes(8, "little") + b"\xc1\xc1\xc1", b"\xff" * 7, b"x" * 200])
def test_who_does_not_speak_the_language_harms_nobody(
    storage: SharedMemoryStorage, elsewhere: Elsewhere, said: bytes
) -> None:
    client = elsewhere.client(storage)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(storage._link.address)
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(30)
        while stranger.recv(1000):
            pass
    assert client.new_search() == "0"
    until(lambda: len(serving_threads()) == 2)


def test_a_default_timeout_of_the_program_does_not_hold(doomed: Elsewhere) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        arrived = doomed.make()
        arrived.new_search()
        doomed.signal(signal.SIGSTOP)
        thread = threading.Thread(target=arrived.new_search)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "it did not wait for the reply"
        doomed.signal(signal.SIGCONT)
        thread.join(30)
        assert arrived.search_ids() == ["0", "1"]
    finally:
        socket.setdefaulttimeout(before)
