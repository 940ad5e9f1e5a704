"""What goes wrong with a Redis server, in words: one table for the errors of the client library.

Nothing that a server says while it is being greeted is repeated, as it may be what it was sent: the password.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import Final, NamedTuple

import redis

from paraval.errors import CorruptStoreError, StorageError, StoreAccessError, StoreUnreachableError, WrongStoreError
from paraval.storage.redis.server import Server

__all__ = ["Failure", "failure_of_call", "failure_of_greeting"]


class Failure(NamedTuple):
    """What went wrong.

    Attributes:
        kind: what to raise.
        says: how the sentence goes on that begins with "the Redis server X".
        passes: whether trying again may help; None: if the server was there before.
    """

    kind: type[StorageError]
    says: str
    passes: bool | None = False

    def error(self, server: Server) -> StorageError:
        """Make the error."""
        return self.kind(f"the Redis server {server} {self.says}")


def failure_of_greeting(exc: Exception, server: Server) -> Failure:
    """Explain why a connection could not be made; ``exc`` may be anything, as an answer may be."""
    code = _code(exc)
    if code in {"NOAUTH", "NOPERM"}:
        return Failure(StoreAccessError, _refusal(exc, server))
    if code in _NAMED:
        return _NAMED[code]
    if isinstance(exc, redis.InvalidResponse) or not isinstance(exc, redis.RedisError | OSError):
        return Failure(WrongStoreError, "is none: what answers there speaks another protocol (TLS, perhaps: rediss://)")
    if isinstance(exc, redis.ResponseError):
        is_db = "DB index" in str(exc)
        return Failure(StorageError, f"has no database {server.db}" if is_db else f"refused the greeting ({code})")
    return _tls_failure(exc) or _network_failure(exc, server)


def failure_of_call(exc: Exception, server: Server) -> Failure:  # noqa: PLR0911 - a list of what goes wrong
    """Explain why there was no answer, or none but an error."""
    code = _code(exc)
    if code in _NAMED:
        return _NAMED[code]
    if isinstance(exc, redis.InvalidResponse):
        return Failure(WrongStoreError, "gave an answer that is none of the Redis protocol")
    if not isinstance(exc, redis.ResponseError):
        return _loss(exc, server)
    text = str(exc).replace(server.password or "\0", "***")
    if "non local key" in text:
        return _CLUSTER
    if "unknown command" in text.lower():
        return Failure(StorageError, "runs no scripts (EVAL, EVALSHA), which a storage needs")
    if "script" in text.lower():
        return Failure(CorruptStoreError, f"has something under the keys of this storage that is damaged: {text}")
    return Failure(StorageError, f"refused: {text}")


_CLUSTER: Final = Failure(StorageError, "is a node of a cluster; a storage needs a server of its own")
_NAMED: Final = {
    "ASK": _CLUSTER,
    "BUSY": Failure(StoreUnreachableError, "is busy with a script", passes=True),
    "CLUSTERDOWN": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "LOADING": Failure(StoreUnreachableError, "is loading its data", passes=True),
    "MISCONF": Failure(StorageError, "cannot write to its disk, so it takes nothing more; its log says why"),
    "MOVED": _CLUSTER,
    "NOAUTH": Failure(StoreAccessError, "wants a password (password=, or in the URL)"),
    "NOPERM": Failure(
        StoreAccessError,
        "does not permit what a storage needs: EVAL, EVALSHA, hashes, lists, strings and sorted sets under its prefix",
    ),
    "NOREPLICAS": Failure(StorageError, "has too few replicas to take writes (min-replicas-to-write)"),
    "OOM": Failure(StorageError, "has no memory left (maxmemory), so nothing was written: give it more, or free some"),
    "READONLY": Failure(StorageError, "is a replica, which cannot be written to: give the address of its primary"),
    "WRONGTYPE": Failure(
        WrongStoreError,
        "has something else under the keys of this storage: give a prefix= of its own, or look who overwrote them",
    ),
}
_CODES: Final = {
    redis.exceptions.AskError: "ASK",  # before its subclass: for us they are the same
    redis.exceptions.AuthenticationError: "NOAUTH",
    redis.exceptions.AuthenticationWrongNumberOfArgsError: "NOAUTH",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ClusterCrossSlotError: "CROSSSLOT",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.ReadOnlyError: "READONLY",
}


def _code(exc: Exception) -> str:
    """Give the word that an error begins with; older servers put that of a command behind the script's."""
    for kind, code in _CODES.items():
        if isinstance(exc, kind):
            return code
    if not isinstance(exc, redis.ResponseError):
        return ""
    found = re.search(r"(?:^|[ -])([A-Z]{3,})\b", str(exc))
    return found[1] if found else "ERR"


def _refusal(exc: Exception, server: Server) -> str:
    user = repr(server.username or "default")
    if _code(exc) == "NOPERM":
        return f"does not permit the user {user} to begin (NOPERM)"
    if server.password is None:
        return _NAMED["NOAUTH"].says
    if "without any password" in str(exc) or "no password is set" in str(exc):
        return "has no password, but was given one"
    return f"does not accept the password of the user {user}"


def _tls_failure(exc: Exception) -> Failure | None:
    cause = exc.__context__
    if not isinstance(cause, ssl.SSLError):
        return None
    reason = cause.reason or ""
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = "ssl_ca_certs= names the file of those to trust"
        return Failure(StoreAccessError, f"has a certificate that is not valid: {cause.verify_message} ({advice})")
    if reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
        return Failure(WrongStoreError, "does not speak TLS: then its URL begins with redis://, not rediss://")
    if "ALERT" in reason:
        return Failure(StoreAccessError, f"refused the TLS connection ({reason}); ssl_certfile= says who you are")
    return Failure(StoreUnreachableError, f"broke the TLS connection off ({reason or 'end of file'})", passes=None)


def _network_failure(exc: Exception, server: Server) -> Failure:
    cause = exc.__context__ or exc
    if isinstance(cause, socket.gaierror):
        says = f"is not to be found: no host {server.host!r} is known here"
    elif isinstance(exc, redis.TimeoutError | TimeoutError):
        tls = "; perhaps it does not speak TLS (redis://)" if server.tls else ""
        says = f"did not answer within {server.timeout:g} s (timeout=){tls}"
    elif "max number of clients" in str(exc):
        return Failure(StoreUnreachableError, "has as many connections as it allows (maxclients)", passes=True)
    elif isinstance(cause, OSError) and cause.strerror and not isinstance(cause, ConnectionResetError):
        says = f"is not to be reached ({cause.strerror}); is it running there?"
    else:
        says = f"closed the connection{'' if server.tls else '; perhaps it wants TLS (rediss://)'}"
    return Failure(StoreUnreachableError, says, passes=None)


def _loss(exc: Exception, server: Server) -> Failure:
    cause = exc.__context__ or exc
    if isinstance(exc, redis.TimeoutError | TimeoutError):
        says = f"did not answer within {server.timeout:g} s (timeout=)"
    else:
        why = f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""
        says = f"was lost: the connection broke{why}"
    return Failure(StoreUnreachableError, says, passes=True)
