"""Where searches and their jobs are kept. One module for each store."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from paraval.storage.base import Storage, UnknownIdError, UnstorableError
from paraval.storage.memory import MemoryStorage
from paraval.storage.null import NullStorage
from paraval.storage.records import JobChange, JobRecord

if TYPE_CHECKING:
    from paraval.storage.redis import RedisStorage as RedisStorage
    from paraval.storage.shared import SharedMemoryStorage as SharedMemoryStorage
    from paraval.storage.sqlite import SqliteStorage as SqliteStorage
    from paraval.storage.urls import open_storage as open_storage

# What most programs never use is imported when it is first asked for.
_MODULES: Final = {
    "RedisStorage": "paraval.storage.redis",
    "SharedMemoryStorage": "paraval.storage.shared",
    "SqliteStorage": "paraval.storage.sqlite",
    "open_storage": "paraval.storage.urls",
}

# What needs an extra is imported by name: a star must work with the base install.
_NEED_AN_EXTRA: Final[frozenset[str]] = frozenset()
__all__ = [  # noqa: PLE0604 - the names of the table above
    "JobChange",
    "JobRecord",
    "MemoryStorage",
    "NullStorage",
    "Storage",
    "UnknownIdError",
    "UnstorableError",
    *(name for name in _MODULES if name not in _NEED_AN_EXTRA),
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'paraval.storage' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
