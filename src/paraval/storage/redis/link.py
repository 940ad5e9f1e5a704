"""The way to a Redis server: its connections, and what to do when one is lost."""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
import warnings
from collections import deque
from typing import Any, Final

from paraval.errors import MissingExtraError, StorageError
from paraval.storage.redis.scripts import Script
from paraval.storage.redis.server import Server

try:
    import redis
except ImportError as exc:
    raise MissingExtraError("RedisStorage needs the Redis client: pip install 'paraval[redis]'") from exc

from paraval.storage.redis.errors import failure_of_call, failure_of_greeting

__all__ = ["Link"]

_logger = logging.getLogger("paraval")

_PIECE: Final = 1 << 20
"""Bytes sent at once: the timeout is for each."""
_PAUSES_S: Final = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Between one try and the next; the last one from then on."""
_REMEMBERED_S: Final = 600.0
"""How long the server remembers a write beyond the time for which it may be repeated."""
_CALLS: Final = 6
"""So many calls, each with its ``retry_for``, may repeat one write."""
_SOON_S: Final = 10.0
"""The same call, when it comes so soon after one that was given up, is another try of it."""


class Link:
    """Runs scripts on a server. Usable from any thread, and after a fork.

    Args:
        server: which.
        prefix: of all keys.
        known: whether the server has answered before, in the process that sent this here, say. One that has is waited
            for when it cannot be reached; an address that never answered is an error at once.

    Attributes:
        known: whether it has answered by now.
    """

    def __init__(self, server: Server, prefix: bytes, *, known: bool = False) -> None:
        self.known = known
        self._server = server
        self._prefix = prefix
        self._span = (_CALLS - 1) * server.retry_for
        self._remembered_ms = int(1000 * (_REMEMBERED_S + _CALLS * server.retry_for))
        # Idle connections. A deque needs no lock, which in a forked child might be held by a thread that is not there.
        self._idle: deque[_Lane] = deque()
        self._given_up_here = _GivenUp()
        self._pid = os.getpid()

    def run(self, script: Script, *args: bytes, patient: bool = True) -> list[Any]:
        """Run a script; give its answer.

        Args:
            script: which.
            args: its arguments.
            patient: whether to try again when the connection is lost. What had been executed is not executed twice,
                nor is it when the thread that got an error makes the very same call again soon, and no other write
                before.

        Raises:
            StorageError: it was not possible, and trying again did not help, or would not have.
        """
        if self._pid != os.getpid():  # what the parent has open belongs to it
            self._idle, self._given_up_here, self._pid = deque(), _GivenUp(), os.getpid()
        idle = self._idle
        lane = self._given_up_here.take(script, args) if script.writes else None
        if lane is None:
            try:
                lane = idle.pop()
            except IndexError:
                lane = _Lane(self._server)
        try:
            answer = self._run(lane, script, args, patient=patient)
        except BaseException:
            lane.connection.disconnect()  # an answer may still come, and would be taken for that of the next call
            raise
        lane.repeats_since = None
        idle.append(lane)
        return answer

    def close(self) -> None:
        """Close the idle connections; others are opened when they are needed."""
        while self._pid == os.getpid():
            try:
                self._idle.pop().connection.disconnect()
            except IndexError:
                return

    def _run(self, lane: _Lane, script: Script, args: tuple[bytes, ...], *, patient: bool) -> list[Any]:
        given = args
        if script.writes:
            lane.turn += 1
            args = (lane.session, b"%d" % lane.turn, b"%d" % self._remembered_ms, *args)
        began, pauses, was_sent = time.monotonic(), iter(_PAUSES_S), False
        pause = next(pauses)
        while True:
            try:
                lane.connection.connect()
            except Exception as exc:  # noqa: BLE001 - what is no Redis server may make the library stumble in any way
                failure = failure_of_greeting(exc, self._server)
            else:
                was_sent = True
                try:
                    if not self.known:
                        self._meet(lane)
                    return lane.run(script, self._prefix, args)
                except (redis.RedisError, OSError) as exc:
                    failure = failure_of_call(exc, self._server)
            # Out of the handlers: the errors of the library are no context of ours, as they may hold a password.
            lane.connection.disconnect()
            passes = self.known if failure.passes is None else failure.passes
            if not passes or not patient or time.monotonic() - began + pause > self._server.retry_for:
                was_sent = was_sent or lane.repeats_since is not None  # by this call, or by the one before
                if was_sent and script.exact:
                    self._given_up_here.keep(lane, script, given, began, _REMEMBERED_S / 2 + self._span)
                raise self._given_up(failure.error(self._server), passes and patient, was_sent and script.writes)
            if not pause:
                _logger.warning("%s; trying again for %g s", failure.error(self._server), self._server.retry_for)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = next(pauses, pause)

    def _given_up(self, error: StorageError, was_tried_again: bool, may_be_done: bool) -> StorageError:
        text = str(error)
        if was_tried_again:
            text += f"; tried for {self._server.retry_for:g} s (retry_for=)"
        if was_tried_again and may_be_done:
            text += "; what was sent last may have been executed or not"
        return type(error)(text)

    def _meet(self, lane: _Lane) -> None:
        """See whether a server that is met for the first time keeps what it is given."""
        try:
            text = lane.call(b"INFO", b"memory")
        except redis.ResponseError:  # not everyone may ask
            text = b""
        if not isinstance(text, bytes):
            return  # no Redis server says this; what it says to a script will be refused
        self.known = True
        says = dict(re.findall(r"^(\w+):([^\r\n]*)", str(text, "utf-8", "replace"), re.MULTILINE))
        policy = says.get("maxmemory_policy", "noeviction")
        if says.get("maxmemory", "0") != "0" and policy != "noeviction":
            warnings.warn(
                f"the Redis server {self._server} may drop what it keeps when its memory is full (maxmemory-policy "
                f"{policy}); for a storage it should be 'noeviction'",
                RuntimeWarning,
                stacklevel=6,  # who called the storage
            )


class _Lane:
    """One connection, for one thread at a time.

    Attributes:
        connection: the library's.
        session: what the server knows it by, also when it is connected anew.
        turn: the number of its last write.
        repeats_since: when that was sent for the first time, if calls repeat it.
    """

    __slots__ = ("connection", "repeats_since", "session", "turn")

    def __init__(self, server: Server) -> None:
        self.connection = server.connection()
        self.session = os.urandom(12).hex().encode()
        self.turn = 0
        self.repeats_since: float | None = None

    def run(self, script: Script, prefix: bytes, args: tuple[bytes, ...]) -> list[Any]:
        """Run a script, which the server knows by its hash from the second time on."""
        answer: list[Any]
        try:
            answer = self.call(b"EVALSHA", script.sha, b"1", prefix, *args)
        except redis.exceptions.NoScriptError:
            answer = self.call(b"EVAL", script.text, b"1", prefix, *args)
        return answer

    def call(self, *command: bytes) -> Any:
        """Send a command and wait for the answer."""
        connection = self.connection
        connection.send_packed_command(_in_pieces(connection.pack_command(*command)))
        return connection.read_response()


class _GivenUp(threading.local):
    """The write of this thread that was given up last, and may have been executed or not.

    Storages are called again by whoever has more patience. Under a new number, what had been executed would be executed
    twice: a second record of a job, say. So the lane does not go back to the idle ones, and keeps its turn. The same
    call takes it again, and the server answers what it has executed already; any other write drops it. As nobody uses
    the lane in between, no other write has this turn.

    Each thread has its own, as who tries again does so in the same thread, while others write other things. One that
    meant the same once more, and not another try, is told that it is done, as it is: the first call came to nothing.
    """

    lane: _Lane | None = None
    write: tuple[Script, tuple[bytes, ...]] | None = None
    until = 0.0

    def keep(self, lane: _Lane, script: Script, args: tuple[bytes, ...], began: float, span: float) -> None:
        """Keep a lane whose last write began then, and is remembered by the server for longer than this span."""
        if lane.repeats_since is None:
            lane.repeats_since = began
        lane.turn -= 1  # so that the next write has the same number
        self.lane, self.write = lane, (script, args)
        self.until = min(time.monotonic() + _SOON_S, lane.repeats_since + span)

    def take(self, script: Script, args: tuple[bytes, ...]) -> _Lane | None:
        """Give the lane for this write, if it is the one that was given up; forget it in any case."""
        lane, write = self.lane, self.write
        if lane is None:
            return None
        self.lane = self.write = None
        return lane if write == (script, args) and time.monotonic() < self.until else None


def _in_pieces(packed: list[bytes]) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    for item in packed:
        if len(item) <= _PIECE:
            pieces.append(item)
        else:
            whole = memoryview(item)
            pieces += [whole[start : start + _PIECE] for start in range(0, len(item), _PIECE)]
    return pieces
