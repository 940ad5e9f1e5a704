"""RedisStorage and who answers it: what is no Redis server, who may come in, URLs, TLS. And no secret is ever told."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import redis_server as real
from paraval.errors import (
    BadValueError,
    ParavalError,
    StorageError,
    StoreAccessError,
    StoreUnreachableError,
    WrongStoreError,
    WrongTypeError,
)
from paraval.storage import RedisStorage
from redis_server import RedisServer, check_everything, do_everything, insert, needs_redis, new_prefix, reopened
from support import in_threads
from tcp_proxy import Fate, Parrot, Proxy, Way

redis_server = real.redis_server  # the fixtures
prefix = real.prefix
storage = real.storage
search_id = real.search_id
proxy = real.proxy
far = real.far

SECRET = "s3cret/4me#@%"  # noqa: S105 - of servers that live for a test
QUOTED_SECRET = "s3cret%2F4me%23%40%25"  # noqa: S105 - likewise

# -- what else may be at an address ------------------------------------------------------------------------------------


def is_refused(storage: RedisStorage, kind: type[StorageError], match: str) -> None:
    """It cannot be used, and says why at once, in one line, without the password."""
    with pytest.raises(kind, match=match) as caught:
        storage.connect()
    message = str(caught.value)
    assert "\n" not in message
    assert type(caught.value) is kind
    assert isinstance(caught.value, ParavalError)
    assert not storage.is_connected()
    holds_no_secret("".join(traceback.format_exception(caught.value)), repr(caught.value), repr(storage))
    assert caught.value.__context__ is None, "what the client library raised may have the password in it"
    storage.close()


def holds_no_secret(*texts: str) -> None:
    for text in texts:
        for piece in (SECRET, QUOTED_SECRET, "s3cret", "4me"):
            assert piece not in text


def test_nothing_is_there() -> None:
    needs_redis()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    is_refused(RedisStorage(f"redis://127.0.0.1:{port}"), StoreUnreachableError, r"Connection refused.*is it running")
    is_refused(RedisStorage("redis://nowhere.invalid"), StoreUnreachableError, "no host 'nowhere.invalid' is known")
    is_refused(RedisStorage("unix:///nowhere/redis.sock"), StoreUnreachableError, "No such file")


@pytest.mark.parametrize(
    ("answer", "kind", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n<html>", WrongStoreError, "another protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", WrongStoreError, "another protocol"),
        (b"\x15\x03\x03\x00\x02\x02\x28\r\n", WrongStoreError, "TLS, perhaps: rediss://"),
        (b"-NOAUTH Authentication required.\r\n", StoreAccessError, "password"),
        (b"-ERR max number of clients reached\r\n", StoreUnreachableError, "as many connections as it allows"),
        (b"-MISCONF Redis is configured to save RDB snapshots, but\r\n", StorageError, "cannot write to its disk"),
        (b"-NOREPLICAS Not enough good replicas to write.\r\n", StorageError, "too few replicas"),
        (b"-CLUSTERDOWN Hash slot not served\r\n", StorageError, "cluster"),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", StorageError, "cluster"),
        (b"+OK\r\n", StorageError, "makes no sense"),
    ],
)
@pytest.mark.parametrize("password", [None, SECRET])
def test_something_else_is_there(answer: bytes, kind: type[StorageError], match: str, password: str | None) -> None:
    needs_redis()
    with Parrot(answer) as parrot:
        storage = RedisStorage(f"redis://127.0.0.1:{parrot.port}/0", password=password, retry_for=0.1, timeout=2)
        is_refused(storage, kind, match)


def test_what_says_nothing_is_given_up() -> None:
    needs_redis()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        storage = RedisStorage(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1)
        is_refused(storage, StoreUnreachableError, "did not answer within 0.1 s")


def test_a_server_that_loads_its_data_is_waited_for(proxy: Proxy, far: RedisStorage, redis_server: RedisServer) -> None:
    with Parrot(b"-LOADING Redis is loading the dataset in memory\r\n") as parrot:
        proxy.target = parrot.port
        impatient = RedisStorage(f"redis://127.0.0.1:{proxy.port}", retry_for=0.1)
        is_refused(impatient, StoreUnreachableError, r"is loading its data; tried for 0.1 s")
        asked = proxy.once(Fate.PASS, Way.TO_CLIENT, skip=4)

        def loaded() -> None:
            assert asked.wait(20)
            proxy.target = redis_server.port

        in_threads(far.connect, loaded)
    assert far.new_search() == "0"


def test_a_server_without_scripts(tmp_path: Path) -> None:
    needs_redis()
    with RedisServer(tmp_path, rename_command='EVALSHA ""') as server:
        is_refused(RedisStorage(server.url), StorageError, "runs no scripts")


def test_a_server_with_too_few_databases(redis_server: RedisServer) -> None:
    is_refused(RedisStorage(redis_server.url[:-1] + "1234"), StorageError, "has no database 1234")


# -- who may come in ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that wants a password."""
    needs_redis()
    with RedisServer(tmp_path_factory.mktemp("guarded"), requirepass=f'"{SECRET}"') as server:
        yield server


def test_a_password_lets_in(guarded: RedisServer) -> None:
    for storage in (
        RedisStorage(guarded.url, password=SECRET),
        RedisStorage(guarded.url, username="default", password=SECRET),
        RedisStorage(guarded.url.replace("//", f"//:{QUOTED_SECRET}@")),
        RedisStorage(guarded.url.replace("//", f"//default:{QUOTED_SECRET}@")),
    ):
        with contextlib.closing(reopened(storage.connect())) as copied:
            assert copied.is_connected()
        holds_no_secret(repr(storage), str(storage), repr(storage._server), f"{storage._server}", repr(vars(storage)))
        assert ":***@127.0.0.1" in repr(storage)
        storage.close()


def test_a_wrong_password_does_not(guarded: RedisServer, redis_server: RedisServer) -> None:
    is_refused(RedisStorage(guarded.url), StoreAccessError, r"wants a password \(password=, or in the URL\)")
    is_refused(
        RedisStorage(guarded.url, password=f"no {SECRET}"), StoreAccessError, "the password of the user 'default'"
    )
    nobody = RedisStorage(guarded.url, username="nobody", password=SECRET)
    is_refused(nobody, StoreAccessError, "does not accept the password of the user 'nobody'")
    assert issubclass(StoreAccessError, PermissionError)
    needless = RedisStorage(redis_server.url, password=SECRET)
    is_refused(needless, StoreAccessError, "has no password, but was given one")


def test_a_user_needs_permissions(guarded: RedisServer, prefix: str) -> None:
    guarded.call("ACL", "SETUSER", "guest", "on", f">{SECRET}", "~*", "+hget", password=SECRET)
    is_refused(RedisStorage(guarded.url, username="guest", password=SECRET), StoreAccessError, "does not permit .*EVAL")
    rights = [
        "resetkeys",
        "~test-*",
        "+eval",
        "+evalsha",
        "+@hash",
        "+@list",
        "+@sortedset",
        "+@string",
        "+exists",
        "+time",
    ]
    guarded.call("ACL", "SETUSER", "guest", *rights, password=SECRET)
    storage = RedisStorage(guarded.url, username="guest", password=SECRET, prefix=prefix)
    for operation in do_everything(storage):
        operation()
    storage.close()


def test_the_log_holds_no_password(guarded: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    with Proxy(guarded.port) as proxy, caplog.at_level(logging.DEBUG):
        url = f"redis://:{QUOTED_SECRET}@127.0.0.1:{proxy.port}/0"
        storage = RedisStorage(url, prefix=new_prefix(), retry_for=0.2).connect()
        proxy.once(Fate.CUT, Way.TO_CLIENT)
        storage.new_search()
        proxy.refuse()
        with pytest.raises(StoreUnreachableError) as caught:
            storage.new_search()
        assert "trying again" in caplog.text
        holds_no_secret(caplog.text, "".join(traceback.format_exception(caught.value)))


def test_a_server_that_repeats_what_it_was_sent_is_not_quoted(tmp_path: Path) -> None:
    needs_redis()
    with RedisServer(tmp_path, rename_command='AUTH ""') as server:
        is_refused(RedisStorage(server.url, password=SECRET), StorageError, r"refused the greeting \(ERR\)")
    with Parrot(f"-ERR unknown command 'AUTH', with args beginning with: '{SECRET}'\r\n".encode()) as parrot:
        storage = RedisStorage(f"redis://127.0.0.1:{parrot.port}/0", password=SECRET)
        is_refused(storage, StorageError, r"refused the greeting \(ERR\)")


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@localhost:6379/0",
        "redis://:s3cret/4me@localhost:6379/0",
        "redis://:s3cret?4me@localhost:6379/0",
        "redis://:s3cret#4me@localhost:6379/0",
        "redis://localhost:6379/s3cret",
        "redis://localhost:6379/0?password=s3cret",
        "redis://localhost:s3cret/0",
        "redis://localhost:0/0",
        "redis://localhost:99999/0",
        "redis://[s3cret/0",
        "http://:s3cret@localhost",
        "s3cret@localhost",
        "",
        "unix://s3cret/run/redis.sock",
        "unix:///run/redis.sock?password=s3cret",
        "unix:",
    ],
)
def test_a_bad_url_is_refused_without_being_quoted(url: str) -> None:
    needs_redis()
    with pytest.raises(BadValueError, match="URL") as caught:
        RedisStorage(url)
    assert isinstance(caught.value, ValueError)
    holds_no_secret("".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "redis://localhost:6379/0"),
        ("redis://example.org/7", "redis://example.org:6379/7"),
        ("valkey://example.org:1234", "redis://example.org:1234/0"),
        ("rediss://example.org", "rediss://example.org:6379/0"),
        ("valkeys://example.org", "rediss://example.org:6379/0"),
        ("redis://[::1]:1234/0", "redis://[::1]:1234/0"),
        ("REDIS://u%40x:s3cret@h", "redis://u%40x:***@h:6379/0"),
        ("redis://:s3cret@h", "redis://:***@h:6379/0"),
        ("unix:///run/re%20dis.sock?db=2", "unix:///run/re%20dis.sock?db=2"),
        ("unix://:s3cret@/run/redis.sock", "unix://:***@/run/redis.sock?db=0"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    needs_redis()
    assert repr(RedisStorage(url, prefix="p")) == f"RedisStorage('{shown}', prefix='p')"


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": ""},
        {"prefix": None},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"retry_for": -1},
        {"retry_for": float("nan")},
        {"username": "me"},
        {"ssl_ca_certs": "ca.pem"},
        {"url": "redis://:a@h", "password": "b"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    needs_redis()
    with pytest.raises(BadValueError):
        RedisStorage(**options)
    with pytest.raises(WrongTypeError):
        RedisStorage(b"redis://")  # type: ignore[arg-type] # that is the point


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Any:
    trustme = pytest.importorskip("trustme", reason="trustme is not installed (dependency group 'test')")
    return trustme.CA()


@pytest.fixture
def secure(redis_server: RedisServer, authority: Any, tmp_path: Path) -> Iterator[tuple[Proxy, str, str]]:
    """A TLS server for ``localhost``, the file of its authority, and one of a client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusted, own = tmp_path / "ca.pem", tmp_path / "own.pem"
    authority.cert_pem.write_to_path(str(trusted))
    authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(str(own))
    with Proxy(redis_server.port, tls=context) as proxy:
        yield proxy, str(trusted), str(own)


def test_tls(secure: tuple[Proxy, str, str], prefix: str) -> None:
    proxy, trusted, _ = secure
    storage = RedisStorage(f"rediss://localhost:{proxy.port}/0", ssl_ca_certs=Path(trusted), prefix=prefix)
    answers = [operation() for operation in do_everything(storage)]
    check_everything(storage, answers)
    insert(storage, "0", 1, out=b"x" * 3_000_000)
    proxy.cut()
    with contextlib.closing(reopened(storage)) as copied:
        assert len(copied.get(["0.3"])[0].out) == 3_000_000
    storage.close()


def test_tls_that_is_not_to_be_trusted(secure: tuple[Proxy, str, str], redis_server: RedisServer) -> None:
    proxy, trusted, _ = secure
    url = f"rediss://localhost:{proxy.port}/0"
    is_refused(RedisStorage(url, password=SECRET), StoreAccessError, r"certificate that is not valid.*ssl_ca_certs=")
    by_address = RedisStorage(url.replace("localhost", "127.0.0.1"), ssl_ca_certs=trusted)
    is_refused(by_address, StoreAccessError, "certificate that is not valid: .*127.0.0.1")
    unchecked = RedisStorage(by_address._server.host and url, ssl_ca_certs=trusted, ssl_check_hostname=False)
    assert unchecked.is_connected()
    unchecked.close()
    with pytest.raises(StorageError, match=r"TLS.*rediss://"):  # an alert, or the end of the connection
        RedisStorage(f"redis://127.0.0.1:{proxy.port}", timeout=1).connect()
    plain = RedisStorage(f"rediss://127.0.0.1:{redis_server.port}", timeout=0.3)
    is_refused(plain, StoreUnreachableError, "did not answer .* does not speak TLS")
    with Parrot(b"HTTP/1.1 400 Bad Request\r\n\r\n") as parrot:
        is_refused(RedisStorage(f"rediss://127.0.0.1:{parrot.port}"), WrongStoreError, "does not speak TLS")


def test_tls_with_a_certificate_of_ones_own(
    redis_server: RedisServer, authority: Any, secure: tuple[Proxy, str, str], prefix: str
) -> None:
    _, trusted, own = secure
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with Proxy(redis_server.port, tls=context) as proxy:
        url = f"rediss://localhost:{proxy.port}/0"
        storage = RedisStorage(url, ssl_ca_certs=trusted, ssl_certfile=own, ssl_keyfile=own, prefix=prefix)
        assert storage.new_search() == "0"
        storage.close()
        anonymous = RedisStorage(url, ssl_ca_certs=trusted)
        with pytest.raises(StorageError):
            anonymous.connect()
