"""What every test has: the matrix of event loops, the hypothesis profiles, a check that no thread is left behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from runfunctions import Flags
from support import until
from workers import children

# The same examples on every run: a failure is a change's fault, not chance's. --hypothesis-profile=explore draws more.
# No deadline and no complaint about slowness: the machine may be busy with something else.
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=2000, print_blob=True)
settings.load_profile("ci")

# A shell that runs the tests in its background has them ignore SIGINT and SIGQUIT, nohup SIGHUP, and so would all that
# they start; here they are what they are to a program at a terminal.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

LEAK_GRACE = 2.0  # seconds; a pool that was told to stop may still be on its way out


def _needs(module: str, brought_by: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{module} is not installed ({brought_by})"
    )


def _new_uvloop() -> Any:
    import uvloop

    return uvloop.new_event_loop()


@pytest.fixture(
    scope="module",  # as anyio's own: hypothesis, and async fixtures of modules, may then use it
    params=[
        pytest.param(("asyncio", {"debug": False}), id="asyncio"),
        pytest.param(("asyncio", {"debug": True}), id="asyncio-debug"),
        pytest.param(
            ("asyncio", {"debug": False, "loop_factory": _new_uvloop}),
            id="asyncio+uvloop",
            marks=_needs("uvloop", "dependency group 'test'"),
        ),
        pytest.param(("trio", {}), id="trio", marks=_needs("trio", "extra 'trio'")),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The event loop an async test runs on."""
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    """Fail the test after which a thread of paraval, or any thread that would keep the process alive, lives on."""
    before = set(threading.enumerate())

    def left() -> list[threading.Thread]:
        return [
            thread
            for thread in threading.enumerate()
            if thread not in before and (not thread.daemon or thread.name.startswith("paraval"))
        ]

    yield
    deadline = time.monotonic() + LEAK_GRACE
    for thread in left():
        thread.join(max(0.0, deadline - time.monotonic()))
    if leaked := left():
        pytest.fail(f"threads left behind: {', '.join(sorted(thread.name for thread in leaked))}", pytrace=False)


@pytest.fixture
def no_process_left_behind() -> Iterator[None]:
    """Fail the test after which a process that it started exists."""
    before = children()
    yield
    until(lambda: children() <= before)


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    """Over which jobs in any process and their test talk."""
    return Flags(tmp_path)


# -- stores in files ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["rollback", "wal"])
def journal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to write, whatever the version of SQLite; one process alone may write ahead with every version."""
    monkeypatch.setattr("paraval.storage.sqlite.opening.has_sound_wal", lambda _: request.param == "wal")
    return str(request.param)


@pytest.fixture(scope="session")
def quick_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a sync costs nothing, for what commits very often and is not about power losses."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("quick")
        return
    folder = memory / f"paraval-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def new_path(quick_folder: Path) -> Callable[[], Path]:
    """Give, each time it is called, the path of a store in a folder of its own."""
    return lambda: Path(tempfile.mkdtemp(dir=quick_folder)) / "store.db"
