"""A storage in the memory of one process that other processes of the same machine and user can use.

They reach it over a Unix-domain socket: an abstract one on Linux, which is gone with its process however that ends,
else one in a folder that is closed to other users. What crosses is MessagePack, never pickle.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from paraval.errors import StorageError
from paraval.storage.base import Storage
from paraval.storage.memory import MemoryStorage
from paraval.storage.pipe import PipeStorage
from paraval.storage.records import JobChange, JobRecord
from paraval.storage.shared import sockets
from paraval.storage.shared.sockets import Connections, Server

__all__ = ["SharedMemoryStorage"]


class SharedMemoryStorage(Storage):
    """Keeps everything in the memory of the process that made it; whoever it is sent to uses it there.

    In its own process it is a :class:`~paraval.storage.MemoryStorage`, as fast, and as free in what it keeps. Pickled,
    or taken along by a fork, it is the same store in another process of this machine and user, where each call goes to
    the owner and back. What has to cross must be of the kinds that stores at rest can keep; anything else is an
    :class:`~paraval.storage.UnstorableError` of the call that meets it.

    It lasts as long as the object in its own process: when that is closed or collected, or its process has ended, calls
    from elsewhere raise :class:`~paraval.errors.StorageError`.
    """

    can_travel = True

    def __init__(self) -> None:
        self.by_reference = True
        self._store: Storage = MemoryStorage()
        self._link: Server | Connections = Server(self._store)
        # What ends the server must not keep this object alive; it is called at the exit of the interpreter, too.
        self._finalizer = weakref.finalize(self, self._link.drop)
        with sockets.serving:  # a fork has all of it, or nothing
            _owners.add(self)

    def close(self) -> None:
        """Be of no more use to other processes, until it is sent to one again. What it keeps stays."""
        self._link.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._link, Server):
            self._link.start()
            _known[self._link.address] = self
        return _arrive, (self._link.address,)

    def _be_client(self, address: str) -> None:
        """Be the one that has arrived in another process."""
        self.by_reference = False
        self._link = Connections(address)
        self._store = PipeStorage(self._link.call)
        self._finalizer = weakref.finalize(self, self._link.close)
        _known[address] = self

    def connect(self) -> Self:
        """Make sure that its process is there.

        Raises:
            StorageError: it is gone.
        """
        if isinstance(self._link, Connections):
            self._link.call("is_connected", ())
        return self

    def is_connected(self) -> bool:
        """Whether its process is there."""
        try:
            self.connect()
        except StorageError:
            return False
        return True

    # -- all else is the store's ---------------------------------------------------------------------------------------

    def new_search(self) -> str:
        return self._store.new_search()

    def search_ids(self) -> list[str]:
        return self._store.search_ids()

    def insert(self, search_id: str, records: Sequence[JobRecord]) -> None:
        self._store.insert(search_id, records)

    def update(self, changes: Sequence[JobChange]) -> None:
        self._store.update(changes)

    def get(self, job_ids: Iterable[str]) -> list[JobRecord]:
        return self._store.get(job_ids)

    def scan(self, search_id: str, since: int = 0) -> tuple[list[JobRecord], int]:
        return self._store.scan(search_id, since)

    def put_value(self, search_id: str, key: str, value: Any) -> None:
        self._store.put_value(search_id, key, value)

    def get_value(self, search_id: str, key: str) -> Any:
        return self._store.get_value(search_id, key)

    def renew(self, owner: str, seconds: float) -> None:
        self._store.renew(owner, seconds)

    def owners(self) -> set[str]:
        return self._store.owners()

    def adopt(self, revisions: Mapping[str, int], owner: str) -> set[str]:
        return self._store.adopt(revisions, owner)


_owners: weakref.WeakSet[SharedMemoryStorage] = weakref.WeakSet()
"""The stores that were made in this process."""
_known: weakref.WeakValueDictionary[str, SharedMemoryStorage] = weakref.WeakValueDictionary()
"""By their addresses, the stores of this process that were sent, and those that came from others."""


def _arrive(address: str) -> SharedMemoryStorage:
    """Give the store of this address: the very same where it was made, and where it has arrived before."""
    storage = _known.get(address)
    if storage is None:
        storage = SharedMemoryStorage.__new__(SharedMemoryStorage)
        storage._be_client(address)
    return storage


# -- forks -------------------------------------------------------------------------------------------------------------
# A forked child has all objects of its parent. In it, a store of the parent's becomes a client of that store, so the
# parent must have an address before the fork, and serve after it. And the child must let go of the parent's ends of
# sockets: while it held them, nobody would notice that the parent is gone.


def _before_fork() -> None:
    sockets.serving.acquire()  # so that no connection is half accepted
    for server in _servers():
        server.bind()


def _after_fork_in_parent() -> None:
    sockets.serving.release()
    for server in _servers():
        server.start()


def _servers() -> list[Server]:
    links = [storage._link for storage in list(_owners)]
    return [link for link in links if isinstance(link, Server) and not link.is_closed]


def _after_fork_in_child() -> None:
    sockets.serving = threading.RLock()
    for storage in list(_known.values()):
        if isinstance(storage._link, Connections):
            storage._link.forget()
    inherited = list(_owners)
    _owners.clear()
    for storage in inherited:
        if isinstance(storage._link, Server):
            _abandoned.append(storage._store)
            storage._finalizer.detach()
            storage._link.let_go()
            storage._be_client(storage._link.address)


_abandoned: list[Storage] = []
"""What a child has of its parent's stores. Dropping it would touch, and so copy, all the memory that it takes."""

os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
