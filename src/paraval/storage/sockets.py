"""Calls of a storage over Unix-domain sockets: the server where the storage is, and the connections of who calls it.

A frame is a length (8 bytes) and MessagePack: ``[method, arguments]`` one way; ``[None, result]``, or the name of an
exception and its message, the other. Records and values are in it as bytes, each written by the codec on its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self

from paraval import errors
from paraval.storage import base
from paraval.storage.base import Storage
from paraval.storage.codec import decode, decode_change, decode_record, encode, encode_change, encode_record
from paraval.storage.records import JobChange

__all__ = ["Connections", "Server", "serving"]

serving = threading.RLock()
"""Held whenever a socket of a server comes or goes, and during a fork. Reentrant, as a collection may end a server."""

_HAS_ABSTRACT: Final = sys.platform == "linux"
_MOST_IDLE: Final = 4
"""How many connections are kept for calls to come; more are made where more threads call at once."""
_BACKLOG: Final = 128
_PAUSE_S: Final = 0.05
"""Where no connection can be accepted, as there are no file descriptors left, say."""
_SMALL: Final = 1 << 16
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_GONE: Final = "the process that holds this SharedMemoryStorage is gone, or has closed it"


class Server:
    """Lets other processes of this machine and user call a storage. One thread accepts; each connection has one.

    Args:
        storage: answers at once.

    Attributes:
        address: of the socket; empty while there is none. On Linux it begins with a null character: it is no file.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.address = ""
        self._folder: str | None = None
        self._listener: socket.socket | None = None
        self._bell: socket.socket | None = None
        self._connections: set[socket.socket] = set()

    def bind(self) -> None:
        """Have an address; whoever calls it waits until ``start``."""
        with serving:
            if self._listener is not None:
                return
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.setblocking(False)
                name = f"paraval-{os.urandom(16).hex()}"
                if _HAS_ABSTRACT:
                    address = f"\0{name}"
                else:
                    import tempfile  # here: only some systems need it

                    self._folder = tempfile.mkdtemp(prefix="paraval-")  # closed to other users
                    address = f"{self._folder}/storage"
                listener.bind(address)
                listener.listen(_BACKLOG)
            except BaseException:
                listener.close()
                self._remove_folder()
                raise
            self._listener, self.address = listener, address

    def start(self) -> str:
        """Answer from now on; give the address."""
        with serving:
            self.bind()
            if self._bell is None and self._listener is not None:
                self._bell, ringing = socket.socketpair()
                arguments = (self._listener, ringing)
                threading.Thread(target=self._accept, args=arguments, name="paraval-shared", daemon=True).start()
            return self.address

    def close(self) -> None:
        """Answer no more. It may be started again, at another address."""
        with serving:
            listener, self._listener = self._listener, None
            bell, self._bell = self._bell, None
            if listener is not None:
                _shut(listener)  # a child that was forked behind our back may hold it
                if bell is None:
                    listener.close()
                else:
                    bell.send(b"!")  # the thread wakes, and closes what it polls
                    bell.close()
            for connection in self._connections:
                _shut(connection)  # likewise
            self.address = ""
            self._remove_folder()

    def let_go(self) -> None:
        """In a forked child: close the child's copies of the sockets, of which the parent shall know nothing."""
        for held in (self._listener, self._bell, *self._connections):
            if held is not None and (number := held.detach()) >= 0:  # to close it would wait for whoever reads from it
                os.close(number)

    def _remove_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            import shutil  # as above

            shutil.rmtree(folder, ignore_errors=True)

    def _accept(self, listener: socket.socket, ringing: socket.socket) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(ringing, select.POLLIN)
        with listener, ringing:
            while True:
                poll.poll()
                with serving:
                    if self._listener is not listener:
                        return
                    accepted = self._take(listener)
                if not accepted:
                    time.sleep(_PAUSE_S)

    def _take(self, listener: socket.socket) -> bool:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # whoever it was has gone again
            return True
        except OSError:
            return False
        connection.settimeout(None)  # a program may have set another default
        if not _is_same_user(connection):
            connection.close()
            return True
        self._connections.add(connection)
        try:
            threading.Thread(target=self._answer, args=(connection,), name="paraval-shared", daemon=True).start()
        except RuntimeError:  # there can be no more threads
            self._connections.discard(connection)
            connection.close()
            return False
        return True

    def _answer(self, connection: socket.socket) -> None:
        try:
            with _Stream(connection) as stream:
                while (request := stream.receive()) is not None:
                    stream.send(_answer(self._storage, request))
        except (OSError, MemoryError, OverflowError):  # the other end has gone in the middle, or is none of ours
            pass
        finally:
            with serving:
                self._connections.discard(connection)


def _shut(held: socket.socket) -> None:
    with contextlib.suppress(OSError):
        held.shutdown(socket.SHUT_RDWR)


class Connections:
    """Calls a storage in another process. A call has a connection to itself; several threads may call at once.

    Args:
        address: of the server.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._idle: list[_Stream] = []

    def call(self, method: str, args: tuple[Any, ...]) -> Any:
        """Call a method of the storage; give what it returns or raise what it raises.

        Raises:
            StorageError: nobody is there.
        """
        request = encode([method, _PACK.get(method, list)(args)], "request")
        stream = self._idle_stream() or _connected(self.address)
        try:
            stream.send(request)
            reply = stream.receive()
        except OSError as exc:
            stream.close()
            raise errors.StorageError(_GONE) from exc
        except BaseException:  # an interrupt: the reply would be taken for that of the next call
            stream.close()
            raise
        if reply is None:
            stream.close()
            raise errors.StorageError(_GONE)
        self._keep(stream)
        error, value = decode(reply)
        if error is not None:
            raise _exception(error, value)
        return _UNPACK_RESULT.get(method, _as_it_is)(value)

    def close(self) -> None:
        """Hang up. The next call connects again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for stream in idle:
            stream.close()

    def forget(self) -> None:
        """In a forked child: make connections of its own, as the parent goes on with these."""
        self._lock = threading.Lock()  # a thread of the parent's may have held it
        self.close()

    def _idle_stream(self) -> _Stream | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _keep(self, stream: _Stream) -> None:
        with self._lock:
            if len(self._idle) < _MOST_IDLE:
                self._idle.append(stream)
                return
        stream.close()


class _Stream:
    """Frames over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = connection.makefile("rb", buffering=_SMALL)

    def send(self, data: bytes) -> None:
        head = len(data).to_bytes(8, "little")
        if len(data) < _SMALL:
            self._socket.sendall(head + data)
        else:
            self._socket.sendall(head)
            self._socket.sendall(data)

    def receive(self) -> bytes | None:
        """Give the next frame; None when there is none, as the other end is gone."""
        head = self._reader.read(8)
        if len(head) < 8:  # noqa: PLR2004 - the length of a length
            return None
        size = int.from_bytes(head, "little")
        data = self._reader.read(size)
        return data if len(data) == size else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._reader.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _connected(address: str) -> _Stream:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(None)  # a program may have set another default
        connection.connect(address)
        is_ours = _is_same_user(connection)
    except OSError as exc:
        connection.close()
        raise errors.StorageError(_GONE) from exc
    if not is_ours:
        connection.close()
        raise errors.StorageError("the process that holds this SharedMemoryStorage runs under another user")
    return _Stream(connection)


def _is_same_user(connection: socket.socket) -> bool:
    """Whether the other end runs under our user. Only an abstract socket can be opened by everybody."""
    if not _HAS_ABSTRACT:
        return True
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())


# -- calls -------------------------------------------------------------------------------------------------------------

_METHODS: Final = frozenset({*Storage.__abstractmethods__, "is_connected"})
_EXCEPTIONS: Final[dict[str, type[errors.ParavalError]]] = {
    cls.__name__: cls
    for module in (errors, base)
    for cls in vars(module).values()
    if isinstance(cls, type) and issubclass(cls, errors.ParavalError) and not issubclass(cls, ExceptionGroup)
}


def _answer(storage: Storage, request: bytes) -> bytes:
    try:
        return encode([None, _result(storage, request)], "reply")
    except Exception as exc:  # noqa: BLE001 - it is raised again where it belongs
        return encode([type(exc).__name__, str(exc)], "reply")


def _result(storage: Storage, request: bytes) -> Any:
    method, packed = decode(request)
    if method not in _METHODS:
        raise errors.UsageError(f"a storage that is called from another process has no method {method!r}")
    args = _UNPACK.get(method, _as_it_is)(packed)
    value = getattr(storage, method)(*args)
    if method == "insert":
        return [record.id for record in args[1]]
    return _PACK_RESULT.get(method, _as_it_is)(value)


def _exception(name: str, message: str) -> errors.ParavalError:
    cls = _EXCEPTIONS.get(name)
    if cls is None:
        return errors.StorageError(f"the process that holds this SharedMemoryStorage raised {name}: {message}")
    return cls(message)


def _pack_change(change: JobChange) -> list[Any]:
    return [change.id, change.by, encode_change(change)]


def _unpack_change(packed: list[Any]) -> JobChange:
    job_id, by, data = packed
    change = decode_change(data)
    change.id, change.by = job_id, by
    return change


def _as_it_is(value: Any) -> Any:
    return value


_Translation = dict[str, Callable[[Any], Any]]
_PACK: Final[_Translation] = {
    "insert": lambda args: [args[0], [encode_record(record) for record in args[1]]],
    "update": lambda args: [[_pack_change(change) for change in args[0]]],
    "put_value": lambda args: [args[0], args[1], encode(args[2], "value of the search")],
}
_UNPACK: Final[_Translation] = {
    "insert": lambda args: [args[0], [decode_record(data) for data in args[1]]],
    "update": lambda args: [[_unpack_change(packed) for packed in args[0]]],
    "put_value": lambda args: [args[0], args[1], decode(args[2])],
}
_PACK_RESULT: Final[_Translation] = {
    "get": lambda records: [encode_record(record) for record in records],
    "scan": lambda result: [[encode_record(record) for record in result[0]], result[1]],
    "get_value": lambda value: encode(value, "value of the search"),
    "owners": sorted,
    "adopt": sorted,
}
_UNPACK_RESULT: Final[_Translation] = {
    "get": lambda records: [decode_record(data) for data in records],
    "scan": lambda result: ([decode_record(data) for data in result[0]], result[1]),
    "get_value": decode,
}
