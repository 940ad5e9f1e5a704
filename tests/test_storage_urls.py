"""Storages by URL: ours, those of other packages, and what is said of a URL that is none."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from paraval import ParavalError
from paraval.errors import BadValueError
from paraval.storage import MemoryStorage, NullStorage, SharedMemoryStorage, SqliteStorage, Storage, open_storage
from paraval.storage.urls import sqlite_path

SECRET = "hunter2"  # noqa: S105 - it opens nothing


def install(folder: Path, name: str, module: str, entry_points: dict[str, str]) -> None:
    """Install a package of one module, as pip would leave it."""
    (folder / f"{name}.py").write_text(module, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = "\n".join(f"{scheme} = {value}" for scheme, value in entry_points.items())
    (info / "entry_points.txt").write_text(f"[paraval.storages]\n{lines}\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder whose packages are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


GOOD = """
from paraval.storage import MemoryStorage

class Named(MemoryStorage):
    def __init__(self, url):
        super().__init__()
        self.url = url

def wrong(url):
    return url
"""


# -- ours --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "cls"),
    [
        ("memory:", MemoryStorage),
        ("memory://", MemoryStorage),
        ("Memory:", MemoryStorage),
        ("null:", NullStorage),
        ("shared:", SharedMemoryStorage),
    ],
)
def test_what_lives_in_the_process_is_new_each_time(url: str, cls: type[Storage]) -> None:
    with open_storage(url) as first, open_storage(url) as second:
        assert type(first) is type(second) is cls
        assert first is not second
        first.new_search()
        assert second.search_ids() == []


def test_a_storage_is_itself() -> None:
    storage = MemoryStorage()
    assert open_storage(storage) is storage


def test_a_sqlite_file_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_storage("sqlite:///campaign é.db") as relative:
        assert type(relative) is SqliteStorage
        search_id = relative.new_search()
    with open_storage(f"SQLite:///{tmp_path}/campaign é.db") as absolute:
        assert absolute.search_ids() == [search_id]
    assert [path.name for path in tmp_path.glob("*.db")] == ["campaign é.db"]


@pytest.mark.parametrize(
    ("url", "path"),
    [("sqlite:///a/b.db", "a/b.db"), ("sqlite:////a/b.db", "/a/b.db"), ("sqlite:///a%20b@c.db", "a%20b@c.db")],
)
def test_the_path_of_a_sqlite_url_is_as_it_is_written(url: str, path: str) -> None:
    assert sqlite_path(url) == Path(path)
    assert sqlite_path("redis://host") is None


@pytest.mark.parametrize(
    "url",
    ["redis://localhost:1/0", "valkey://localhost:1/0", "rediss://localhost:1", "unix:///nowhere/redis.sock?db=0"],
)
def test_redis_urls(url: str) -> None:
    pytest.importorskip("redis", reason="redis is not installed (extra 'redis')")
    from paraval.storage import RedisStorage

    with open_storage(url) as storage:  # nothing is connected before the first use
        assert type(storage) is RedisStorage


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
def test_a_scheme_whose_extra_is_missing_names_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "redis" else find_spec(name))
    with pytest.raises(ImportError, match=r"pip install 'paraval\[redis\]'") as caught:
        open_storage(f"{scheme}://user:{SECRET}@host")
    assert isinstance(caught.value, ParavalError)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match=rf"{scheme}: \(needs: pip install 'paraval\[redis\]'\)"):
        open_storage("nope:")


# -- no URLs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nope://host", "unknown storage scheme 'nope:'; the schemes are: memory:, null:, shared:, sqlite:, redis:"),
        ("", "no URL"),
        (":", "no URL"),
        ("campaign.db", "'sqlite:///campaign.db'"),
        ("/data/campaign.sqlite", "'sqlite:////data/campaign.sqlite'"),
        (Path("campaign.db"), "'sqlite:///campaign.db'"),
        (Path("/data/c.db"), "'sqlite:////data/c.db'"),
        ("memory", "'memory:' is"),
        ("shared", "'shared:' is"),
        ("memory:mine", "'memory:' is the whole URL"),
        ("shared://mine", "'shared:' is the whole URL"),
        ("null:#", "'null:' is the whole URL"),
        ("sqlite:", "sqlite:///campaign.db (three slashes)"),
        ("sqlite://", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:campaign.db", "three slashes"),
        ("sqlite://campaign.db", "three slashes"),
        ("sqlite:/campaign.db", "three slashes"),
        ("sqlite:///:memory:", "'memory:'"),
        ("sqlite:///c.db?timeout=3", "takes no options"),
        ("sqlite:///c.db#x", "takes no options"),
    ],
)
def test_what_is_no_url_is_told_what_would_be(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        open_storage(value)
    assert isinstance(caught.value, ParavalError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [3, None, b"memory:", MemoryStorage])
def test_another_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="Storage or a URL") as caught:
        open_storage(value)
    assert isinstance(caught.value, ParavalError)


@pytest.mark.parametrize(
    "url",
    [
        f"redys://user:{SECRET}@host/0",
        f"user:{SECRET}@host",
        f"//user:{SECRET}@host",
        f":{SECRET}@host:6379",
        f"{SECRET}@host",
        f"sqlite://user:{SECRET}@host/c.db",
        f"memory://user:{SECRET}@host",
        f"nope://host?password={SECRET}",
    ],
)
def test_no_message_shows_a_secret(url: str) -> None:
    with pytest.raises(BadValueError) as caught:
        open_storage(url)
    assert SECRET not in str(caught.value)


# -- those of other packages -------------------------------------------------------------------------------------------


def test_another_package_brings_a_scheme(site: Path) -> None:
    install(site, "named_storage", GOOD, {"elsewhere": "named_storage:Named", "memory": "named_storage:Named"})
    storage: Any = open_storage("Elsewhere://host/path")
    assert (type(storage).__name__, storage.url) == ("Named", "Elsewhere://host/path")
    assert type(open_storage("memory:")) is MemoryStorage, "it does not replace ours"
    with pytest.raises(ValueError, match=r"unix:.*, elsewhere:"):
        open_storage("nope:")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("raise SystemExit('it gives up')", "it gives up"),
        ("x = 1", "Named"),
        ("Named = 3", "callable; it is int"),
    ],
)
def test_a_broken_package_is_marked_and_harms_no_other(
    site: Path, module: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broken_storage", raising=False)
    install(site, "broken_storage", module, {"broken": "broken_storage:Named"})
    with pytest.raises(ImportError, match=r"'broken:' cannot be used here") as caught:
        open_storage(f"broken://{SECRET}")
    assert isinstance(caught.value, ParavalError)
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match=reason):
        open_storage("nope:")
    assert type(open_storage("memory:")) is MemoryStorage


def test_another_package_is_not_imported_for_a_scheme_of_ours(site: Path) -> None:
    install(site, "costly_storage", GOOD, {"costly": "costly_storage:Named"})
    open_storage("memory:")
    assert "costly_storage" not in sys.modules


def test_what_gives_no_storage_is_told(site: Path) -> None:
    install(site, "strange_storage", GOOD, {"strange": "strange_storage:wrong"})
    with pytest.raises(TypeError, match=r"strange_storage:wrong .* gave str") as caught:
        open_storage(f"strange:{SECRET}")
    assert SECRET not in str(caught.value)
