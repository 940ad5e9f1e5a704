"""A TCP proxy that does to connections what networks do to them: it cuts, delays, half-closes, loses answers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, Self

__all__ = ["Fate", "Parrot", "Proxy", "Way"]


class Way(Enum):
    """Which way some bytes go."""

    TO_SERVER = auto()
    TO_CLIENT = auto()


class Fate(Enum):
    """What becomes of some bytes."""

    PASS = auto()
    """They are passed on."""
    CUT = auto()
    """They are lost, and so is the connection: both ends see it reset."""
    CUT_AFTER = auto()
    """They are passed on; then the connection is lost. On the way to the server: it gets them all."""
    CUT_WITHIN = auto()
    """Half of them are passed on; then the connection is lost."""
    HALF_CLOSE = auto()
    """They are lost; the receiver sees an orderly end of what comes to it, and may send on."""
    HOLD = auto()
    """They are passed on once the proxy is told to release what it holds, whatever has become of the sender."""


_RESET: Final = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on a free port of the loopback interface, and passes connections on.

    Args:
        port: where to, on the loopback interface.
        tls: to speak TLS with the client.

    Attributes:
        port: where it listens.
        target: where to.
        rule: asked for each piece of data that comes along; it says what becomes of that. It is called in many threads.
        passed: how many connections have been passed on.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.rule: Callable[[Way, bytes], Fate] = pass_all
        self.passed = 0
        self.target = port
        self._tls = tls
        self._released = threading.Event()
        self._pairs: set[_Pair] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0
        self.listen()

    # -- what a test does ----------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Take connections (again)."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def refuse(self) -> None:
        """Take no connections any more, and cut those there are."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # a close alone does not wake who waits in accept()
            listener.close()
        self.cut()

    def cut(self) -> None:
        """Cut all connections."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.cut()

    def once(self, fate: Fate, way: Way, skip: int = 0) -> threading.Event:
        """Do this to the next piece of data that goes this way, but for some; the event says that it has been done."""
        done = threading.Event()
        lock = threading.Lock()
        left = skip

        def rule(this_way: Way, _data: bytes) -> Fate:
            nonlocal left
            with lock:
                if this_way is not way or done.is_set():
                    return Fate.PASS
                if left:
                    left -= 1
                    return Fate.PASS
                done.set()
                return fate

        self.rule = rule
        return done

    def release(self) -> None:
        """Pass on what is held; nothing is held from now on."""
        self._released.set()

    def close(self) -> None:
        """End it."""
        self.refuse()
        self.release()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- how it is done ------------------------------------------------------------------------------------------------

    def _start(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=function, args=args, name="tcp-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # it was closed
                return
            self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        try:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        pair = _Pair(client, server)
        with self._lock:
            self.passed += 1
            self._pairs.add(pair)
        other = threading.Thread(target=self._pump, args=(pair, server, client, Way.TO_CLIENT), daemon=True)
        other.start()
        self._pump(pair, client, server, Way.TO_SERVER)
        other.join()
        with self._lock:
            self._pairs.discard(pair)
        client.close()
        server.close()

    def _pump(self, pair: _Pair, source: socket.socket, sink: socket.socket, way: Way) -> None:
        try:
            while data := source.recv(1 << 16):
                fate = self.rule(way, data)
                match fate:
                    case Fate.CUT:
                        pair.cut()
                    case Fate.CUT_WITHIN:
                        sink.sendall(data[: len(data) // 2])
                        pair.cut()
                    case Fate.CUT_AFTER:
                        sink.sendall(data)
                        pair.cut(reset_server=False)
                    case Fate.HALF_CLOSE:
                        sink.shutdown(socket.SHUT_WR)
                    case Fate.HOLD:
                        self._released.wait()
                        sink.sendall(data)
                    case Fate.PASS:
                        sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):  # it was cut
            pair.cut()


class Parrot:
    """A server that answers everything with the same bytes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed in the end
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    while client.recv(1 << 16):
                        client.sendall(self._answer)


class _Pair:
    """The two ends of a connection that is passed on."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client = client
        self._server = server

    def cut(self, *, reset_server: bool = True) -> None:
        """Reset both; or end the server's in order, so that it reads what has been sent to it."""
        for end, resets in ((self._client, True), (self._server, reset_server)):
            with contextlib.suppress(OSError):
                if resets:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)  # wakes who reads from it; the reset follows at the close


def pass_all(_way: Way, _data: bytes) -> Fate:
    """Do nothing to anything."""
    return Fate.PASS
