"""Storages by URL: our own, and those of third parties (entry points in ``paraval.storages``).

The name of an entry point is the scheme of the URL; its value is a class or a function that takes the URL as a string
and gives a :class:`~paraval.storage.Storage`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from paraval.errors import BadValueError, MissingExtraError, WrongTypeError
from paraval.storage.base import Storage

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["hide_secrets", "open_storage", "sqlite_path", "without_secrets"]


def open_storage(value: str | Storage) -> Storage:
    """Give the storage that a URL names.

    =============================== ====================================================================================
    ``memory:``                     a new :class:`~paraval.storage.MemoryStorage`, each time
    ``null:``                       a new :class:`~paraval.storage.NullStorage`, each time
    ``shared:``                     a new :class:`~paraval.storage.SharedMemoryStorage`, each time
    ``sqlite:///campaign.db``       the SQLite file of this path, relative to the working directory, as it is written
    ``sqlite:////data/campaign.db`` likewise, absolute
    ``redis://host:6379/0``         a Redis or Valkey server; ``rediss:`` with TLS, ``unix:`` through a local socket;
                                    ``valkey:`` and ``valkeys:`` mean the same
    =============================== ====================================================================================

    Other packages may bring more schemes, under the entry-point group ``paraval.storages``.

    Args:
        value: the URL; a storage is given back as it is.

    Raises:
        ValueError: it is no URL, or one of an unknown scheme (the message lists those there are), or one that its
            scheme does not allow.
        ImportError: what the scheme needs is not installed.
        TypeError: it is neither a string nor a storage.
        OSError: the storage cannot be opened.
    """
    if isinstance(value, Storage):
        return value
    if isinstance(value, os.PathLike):
        raise BadValueError(f"a storage is named by its URL, and a SQLite file by {_suggestion(os.fspath(value))}")
    if not isinstance(value, str):
        raise WrongTypeError(f"storage must be a paraval.storage.Storage or a URL, not {type(value).__name__}")
    return _scheme(value).open(value)


def sqlite_path(url: str) -> Path | None:
    """Give the path that a ``sqlite:`` URL names, as it is written there; None for a URL of another scheme.

    Raises:
        ValueError: it names none, or more than that.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "sqlite":
        return None
    shown = repr(url) if "@" not in url else "a URL with a user"  # who takes it for a server's may give a password
    path = rest.removeprefix("///")
    if path == rest or not path:
        raise BadValueError(
            f"{shown} names no file; it should look like sqlite:///campaign.db (three slashes) for a relative path, "
            "sqlite:////data/campaign.db for an absolute one"
        )
    if path == ":memory:":
        raise BadValueError(f"{shown}: what need not last is kept by 'memory:', or 'shared:' for several processes")
    if "?" in path or "#" in path:
        raise BadValueError(
            f"{shown}: the URL takes no options; SqliteStorage(path) takes them, and any character in the path"
        )
    return Path(path)


def without_secrets(url: str) -> str:
    """Give a URL as it may be shown: no user, no password, no options; of an unknown scheme nothing but that."""
    scheme, _, rest = url.partition(":")
    kind = scheme.lower()
    if kind == "sqlite":  # who takes it for a server's may give a password
        return f"{scheme}:///…@{rest.rpartition('@')[2]}" if "@" in rest else url
    if kind in _SERVERS and rest.startswith("//"):
        return f"{scheme}://{rest.partition('?')[0].removeprefix('//').rpartition('@')[2]}"
    return f"{scheme}:" if rest in {"", "//"} else f"{scheme}:…"


def hide_secrets(text: str, url: str) -> str:
    """Give a text, such as the message of another package's error, without those parts of a URL that are not shown."""
    shown = without_secrets(url)
    if shown == url:
        return text
    text = text.replace(url, shown)
    parts = {part for each in (url, unquote(url)) for part in _parts(each)} - set(_parts(shown))
    for part in sorted(parts, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "…", text)
    return text


def _parts(url: str) -> list[str]:
    """Give what stands between the marks of a URL."""
    return [part for part in re.split(r"[:/@?&=#;,]+", url) if part]


# -- schemes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scheme:
    """One kind of URL.

    Attributes:
        name: what stands before the colon.
        missing: None when it can be used here; else what to do about it.
        open: gives the storage that a URL names.
    """

    name: str
    missing: str | None
    open: Callable[[str], Storage]

    @property
    def label(self) -> str:
        """The name, marked when the scheme cannot be used here."""
        return f"{self.name}:" if self.missing is None else f"{self.name}: (needs: {self.missing})"


@dataclass(frozen=True)
class _BuiltIn:
    """What opens the URLs of a scheme of ours, and the import that its extra brings."""

    open: Callable[[str], Storage]
    requires: str | None = None
    extra: str | None = None


def _without_rest(module: str, cls: str) -> Callable[[str], Storage]:
    def make(url: str) -> Storage:
        scheme, _, rest = url.partition(":")
        if rest not in {"", "//"}:
            raise BadValueError(f"'{scheme}:' is the whole URL: it names a new storage, which nothing else can name")
        return _load(module, cls)()

    return make


def _open_sqlite(url: str) -> Storage:
    return _load("paraval.storage.sqlite", "SqliteStorage")(sqlite_path(url))


def _open_redis(url: str) -> Storage:
    return _load("paraval.storage.redis", "RedisStorage")(url)


def _load(module: str, cls: str) -> Callable[..., Storage]:
    loaded: Callable[..., Storage] = getattr(importlib.import_module(module), cls)
    return loaded


_SERVERS: Final = ("redis", "rediss", "valkey", "valkeys", "unix")
_BUILT_IN: Final = {
    "memory": _BuiltIn(_without_rest("paraval.storage.memory", "MemoryStorage")),
    "null": _BuiltIn(_without_rest("paraval.storage.null", "NullStorage")),
    "shared": _BuiltIn(_without_rest("paraval.storage.shared", "SharedMemoryStorage")),
    "sqlite": _BuiltIn(_open_sqlite),
    **dict.fromkeys(_SERVERS, _BuiltIn(_open_redis, requires="redis", extra="redis")),
}
_GROUP: Final = "paraval.storages"
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")  # RFC 3986


def _scheme(url: str) -> _Scheme:
    name, colon, _ = url.partition(":")
    if not colon or not _NAME.fullmatch(name):
        raise BadValueError(_no_url(url))
    name = name.lower()  # as in all URLs
    found = None
    if name in _BUILT_IN:
        found = _own(name, _BUILT_IN[name])
    elif name in (entries := _entries()):
        found = _foreign(entries[name])
    if found is None:
        raise BadValueError(f"unknown storage scheme '{name}:'; the schemes are: {_valid()}")
    if found.missing is not None:
        raise MissingExtraError(f"a storage '{name}:' cannot be used here; it needs: {found.missing}")
    return found


def _valid() -> str:
    known = {name: _own(name, scheme) for name, scheme in _BUILT_IN.items()}
    for name, entry in _entries().items():
        known.setdefault(name, _foreign(entry))
    return ", ".join(scheme.label for scheme in known.values())


def _no_url(text: str) -> str:
    """Say so; what has an @ may hold a password."""
    if text.lower() in {"memory", "null", "shared"}:
        return f"{text!r} is no URL, but '{text.lower()}:' is"
    if "@" in text:
        return f"this is no URL of a storage; the schemes are: {_valid()}"
    return f"{text!r} is no URL of a storage; a SQLite file is {_suggestion(text)}; the schemes are: {_valid()}"


def _suggestion(path: str | bytes) -> str:
    return repr(f"sqlite:///{os.fsdecode(path) or 'campaign.db'}")


def _entries() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # here: it takes a while to import, and only this needs it

    return {entry.name.lower(): entry for entry in entry_points(group=_GROUP)}


def _own(name: str, built_in: _BuiltIn) -> _Scheme:
    missing = None
    if built_in.requires is not None and importlib.util.find_spec(built_in.requires) is None:
        missing = f"pip install 'paraval[{built_in.extra}]'"
    return _Scheme(name, missing, built_in.open)


def _foreign(entry: EntryPoint) -> _Scheme:
    def make(url: str) -> Storage:
        storage: object = entry.load()(url)
        if not isinstance(storage, Storage):
            raise WrongTypeError(
                f"{entry.value} should give a paraval.storage.Storage; it gave {type(storage).__name__}"
            )
        return storage

    try:
        factory: object = entry.load()
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - another package's module may fail to import in any way
        return _Scheme(entry.name, f"{entry.value} cannot be imported: {type(exc).__name__}: {exc}", make)
    if not callable(factory):
        return _Scheme(entry.name, f"{entry.value} to be callable; it is {type(factory).__name__}", make)
    return _Scheme(entry.name, None, make)
