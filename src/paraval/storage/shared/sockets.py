"""Calls of a storage over Unix-domain sockets: the server where the storage is, and the connections of who calls it.

A frame is a length (8 bytes) and what :mod:`paraval.storage.shared.calls` makes of a call, or of its reply.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import socket
import struct
import sys
import threading
import time
from typing import Any, Final, Self

from paraval.errors import StorageError
from paraval.storage.base import Storage
from paraval.storage.shared import calls

__all__ = ["Connections", "Server", "serving"]

serving = threading.RLock()
"""Held whenever a socket of a server comes or goes, and during a fork. Reentrant, as a collection may end a server."""

_HAS_ABSTRACT: Final = sys.platform == "linux"
_MOST_IDLE: Final = 4
"""How many connections are kept for calls to come; more are made where more threads call at once."""
_LONG_PATH: Final = 70
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
        is_closed: whether it was closed, and not started since.
        address: of the socket; empty while there is none. On Linux it begins with a null character: it is no file.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.address = ""
        self.is_closed = False
        self._folder: str | None = None
        self._listener: socket.socket | None = None
        self._bell: socket.socket | None = None
        self._connections: set[socket.socket] = set()

    def bind(self) -> socket.socket:
        """Have an address; whoever calls it waits until ``start``. Give the socket."""
        with serving:
            if self._listener is not None:
                return self._listener
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.setblocking(False)
                address = self._new_address()
                listener.bind(address)
                listener.listen(_BACKLOG)
            except BaseException:
                listener.close()
                self._remove_folder()
                raise
            self._listener, self.address = listener, address
            return listener

    def start(self) -> None:
        """Answer from now on.

        Raises:
            StorageError: there can be no more sockets or threads.
        """
        with serving:
            try:
                listener = self.bind()
                if self._bell is None:
                    self._start_accepting(listener)
            except (OSError, RuntimeError) as exc:
                self.close()
                raise StorageError(f"a SharedMemoryStorage cannot be shared: {exc}") from exc
            self.is_closed = False

    def close(self) -> None:
        """Answer no more. It may be started again, at another address."""
        with serving:
            self.is_closed = True
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

    def drop(self) -> None:
        """Close it, now or soon: the garbage collector may call this anywhere, even where the lock is waited for."""
        if serving.acquire(blocking=False):
            try:
                self.close()
            finally:
                serving.release()
            return
        try:
            _thread.start_new_thread(self.close, ())  # threading.Thread would wait until it has started
        except RuntimeError:  # the interpreter ends, or there can be no more threads
            self.close()

    def let_go(self) -> None:
        """In a forked child: close the child's copies of the sockets, of which the parent shall know nothing."""
        for held in (self._listener, self._bell, *self._connections):
            if held is not None and (number := held.detach()) >= 0:  # to close it would wait for whoever reads from it
                os.close(number)

    def _new_address(self) -> str:
        if _HAS_ABSTRACT:
            return f"\0paraval-{os.urandom(16).hex()}"
        import tempfile  # here: only some systems need it

        # Closed to other users. The path of a socket has some 100 characters at most.
        where = tempfile.gettempdir()
        if len(where) > _LONG_PATH:
            where = "/tmp"  # noqa: S108 - mkdtemp makes a folder of our own in it
        self._folder = tempfile.mkdtemp(prefix="paraval-", dir=where)
        return f"{self._folder}/storage"

    def _start_accepting(self, listener: socket.socket) -> None:
        bell, ringing = socket.socketpair()
        try:
            arguments = (listener, ringing)
            threading.Thread(target=self._accept, args=arguments, name="paraval-shared", daemon=True).start()
        except BaseException:
            bell.close()
            ringing.close()
            raise
        self._bell = bell

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
                    stream.send(calls.answer(self._storage, request))
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
        request = calls.request(method, args)
        stream = self._idle_stream() or _connected(self.address)
        try:
            stream.send(request)
            reply = stream.receive()
        except OSError as exc:
            stream.close()
            raise StorageError(_GONE) from exc
        except BaseException:  # an interrupt: the reply would be taken for that of the next call
            stream.close()
            raise
        if reply is None:
            stream.close()
            raise StorageError(_GONE)
        self._keep(stream)
        return calls.result(method, reply)

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
        raise StorageError(_GONE) from exc
    if not is_ours:
        connection.close()
        raise StorageError("the process that holds this SharedMemoryStorage runs under another user")
    return _Stream(connection)


def _is_same_user(connection: socket.socket) -> bool:
    """Whether the other end runs under our user. Only an abstract socket can be opened by everybody."""
    if not _HAS_ABSTRACT:
        return True
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())
