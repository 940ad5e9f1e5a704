"""Storages in another process: made there to be used here, and used there when they were made here."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from typing import Any, Self

from paraval.storage import SharedMemoryStorage, Storage
from paraval.storage.pipe import PipeStorage
from support import WAIT_S

PROGRAM = """
import pickle, sys
from paraval.storage import SharedMemoryStorage

kept = {}

def make():
    storage = SharedMemoryStorage()
    data = pickle.dumps(storage)
    kept[data] = storage
    return data

def drop(data):
    del kept[data]

def call(data, method, *args):
    value = getattr(kept.setdefault(data, pickle.loads(data)), method)(*args)
    return [record.id for record in args[1]] if method == "insert" else value

while True:
    try:
        name, args = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        reply = (None, globals()[name](*args))
    except Exception as exc:
        reply = (exc, None)
    pickle.dump(reply, sys.stdout.buffer)
    sys.stdout.flush()
"""


class Elsewhere:
    """Another process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()

    def make(self) -> SharedMemoryStorage:
        """Make a storage there; give it as it arrives here."""
        storage = pickle.loads(self.call("make"))  # noqa: S301 - from our own process
        assert isinstance(storage, SharedMemoryStorage)
        return storage

    def drop(self, storage: Storage) -> None:
        """Forget it there."""
        self.call("drop", pickle.dumps(storage))

    def client(self, storage: Storage) -> Storage:
        """Send a storage there, and give what has every call made there."""
        data = pickle.dumps(storage)
        return PipeStorage(lambda method, args: self.call("call", data, method, *args))

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the program; give what it returns or raise what it raises."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            pickle.dump((name, args), self._process.stdin)
            self._process.stdin.flush()
            error, value = pickle.load(self._process.stdout)  # noqa: S301 - from our own process
        if error is not None:
            raise error
        return value

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; wait for its end if that ends it, and until it is stopped if that stops it."""
        os.kill(self._process.pid, number)
        if number is signal.SIGSTOP:
            os.waitpid(self._process.pid, os.WUNTRACED)
        if number is signal.SIGKILL:
            self._process.wait(WAIT_S)
