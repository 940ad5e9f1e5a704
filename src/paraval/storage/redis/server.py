"""Where a Redis server is, and how to get in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from paraval.errors import BadValueError, WrongTypeError

__all__ = ["Server", "parse"]

_TLS_OF_SCHEME: Final = {"redis": False, "valkey": False, "rediss": True, "valkeys": True, "unix": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where a server is, and how to get in. As a text it is its URL, without the password.

    Attributes:
        host: its name or address.
        port: where it listens.
        path: of its socket, which is then used instead of host and port.
        db: number of the database.
        username: None: the default user.
        password: None: it wants none.
        tls: whether to speak TLS; the options that begin with ``ssl_`` are for that.
        ssl_ca_certs: file of the certificates to trust; None: those of the system.
        ssl_certfile: file of a certificate to show.
        ssl_keyfile: its key.
        ssl_check_hostname: whether the server's certificate must be for this host.
        timeout: seconds to connect, and to wait for the next part of an answer.
        retry_for: seconds for which to try again what a lost connection has interrupted.
    """

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ssl_ca_certs: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_check_hostname: bool = True
    timeout: float = 10.0
    retry_for: float = 30.0

    def __str__(self) -> str:
        user = quote(self.username or "", safe="") + (":***" if self.password is not None else "")
        user += "@" if user else ""
        if self.path is not None:
            return f"unix://{user}{quote(self.path)}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' if self.tls else ''}://{user}{host}:{self.port}/{self.db}"

    def connection(self) -> Any:
        """Make a connection of the client library's; it connects when it is told to."""
        import redis  # here, as all of this module works without it

        common: dict[str, Any] = {
            "db": self.db,
            "credential_provider": None if self.password is None else _Credentials(self.username, self.password),
            "protocol": 2,
            "socket_timeout": self.timeout,
            "socket_connect_timeout": self.timeout,
        }
        if self.path is not None:
            local: Any = redis.UnixDomainSocketConnection
            return local(path=self.path, **common)
        common |= {"host": self.host, "port": self.port, "socket_keepalive": True}
        if not self.tls:
            return redis.Connection(**common)  # type: ignore[no-untyped-call] # likewise
        return redis.SSLConnection(
            ssl_cert_reqs="required",
            ssl_check_hostname=self.ssl_check_hostname,
            ssl_ca_certs=self.ssl_ca_certs,
            ssl_certfile=self.ssl_certfile,
            ssl_keyfile=self.ssl_keyfile,
            **common,
        )


class _Credentials:
    """What to log in with, as an object that does not show it: the library's credential provider."""

    def __init__(self, username: str | None, password: str) -> None:
        self._known = (password,) if username is None else (username, password)

    def get_credentials(self) -> tuple[str, ...]:
        return self._known


def parse(url: str) -> Server:
    """Take a URL apart. No message repeats any of it, since anything may be a piece of a password.

    Raises:
        ValueError: it is not the URL of a Redis server.
    """
    if not isinstance(url, str):
        raise WrongTypeError(f"url must be a text, not {type(url).__name__}")
    how = (
        "it should look like redis://host:6379/0 "
        "(a password must be percent-encoded where it stands in a URL; password= takes it as it is)"
    )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        port, parts = 0, urlsplit("redis:")
    if port == 0:
        raise BadValueError(f"the host and port in the URL of the Redis server cannot be read; {how}")
    if parts.scheme not in _TLS_OF_SCHEME:
        raise BadValueError(f"the URL of a Redis server begins with redis://, rediss:// (TLS) or unix://; {how}")
    common: dict[str, Any] = {
        "username": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else None,
        "tls": _TLS_OF_SCHEME[parts.scheme],
    }
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.hostname or parts.fragment:
            raise BadValueError("the URL of a local socket should look like unix:///run/redis.sock?db=0")
        return Server(path=unquote(parts.path), db=_database(parts.query.removeprefix("db="), how), **common)
    if parts.query or parts.fragment:
        raise BadValueError(f"the URL of a Redis server takes no options; {how}")
    host = parts.hostname or "localhost"
    return Server(host=host, port=port or 6379, db=_database(parts.path.lstrip("/"), how), **common)


def _database(text: str, how: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise BadValueError(f"the URL of a Redis server ends with the number of a database; {how}")
    return int(text)
