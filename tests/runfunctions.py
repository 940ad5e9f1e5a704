"""Run-functions for jobs in other processes. Light, as every worker imports it.

A job and its test talk through files: a flag is raised once, with a text, and can be waited for in any process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paraval import RunningJob

WAIT_S = 20.0


class Flags:
    """Flags in a folder."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = str(folder)

    def put(self, name: str, text: object = "") -> None:
        """Raise a flag. Whoever sees it sees its whole text."""
        path = Path(self.folder, name)
        draft = path.with_name(f".{name}.{os.getpid()}")
        draft.write_text(str(text), encoding="utf-8")
        draft.replace(path)

    def up(self, name: str) -> bool:
        return Path(self.folder, name).exists()

    def text(self, name: str) -> str:
        return Path(self.folder, name).read_text(encoding="utf-8")

    def wait(self, *names: str) -> list[str]:
        """Wait for flags; give their texts."""
        deadline = time.monotonic() + WAIT_S
        while not all(self.up(name) for name in names):
            assert time.monotonic() < deadline, f"no flag {names}; there are {self.names('')}"
            time.sleep(0.002)
        return [self.text(name) for name in names]

    def names(self, prefix: str) -> list[str]:
        return sorted(path.name for path in Path(self.folder).iterdir() if path.name.startswith(prefix))

    def count(self, name: str) -> int:
        """Count calls, over all processes (one at a time): 1, 2, …"""
        path = Path(self.folder, f"count-{name}")
        number = int(path.read_text(encoding="utf-8")) + 1 if path.exists() else 1
        path.write_text(str(number), encoding="utf-8")
        return number


def double(job: RunningJob) -> Any:
    return job["x"] * 2


def echo(job: RunningJob) -> Any:
    return job["x"]


def scaled(job: RunningJob, scale: float, offset: float = 0.0) -> float:
    return float(job["x"] * scale + offset)


async def async_double(job: RunningJob) -> Any:
    return job["x"] * 2


class Scaler:
    """A callable object, and an object with methods."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, job: RunningJob) -> float:
        return float(job["x"] * self.scale)

    def method(self, job: RunningJob) -> float:
        return float(job["x"] * self.scale)

    @classmethod
    def of_class(cls, job: RunningJob) -> float:
        return cls(2).method(job)

    @staticmethod
    def static(job: RunningJob) -> float:
        return float(job["x"] * 2)


class AsyncScaler(Scaler):
    async def __call__(self, job: RunningJob) -> float:  # type: ignore[override] # the asynchronous form of it
        return float(job["x"] * self.scale)


def pid(job: RunningJob) -> int:
    return os.getpid()


def append_one(job: RunningJob) -> list[Any]:
    """Change what was given, and give it back."""
    job["items"].append(1)
    job["deep"]["list"].append(1)
    job["x"] = "changed"
    return [job["items"], job["deep"]["list"], job["items"] is job["deep"]["items"]]


def hold_the_gil(seconds: float) -> None:
    """Sleep in C without letting any other thread of this process run."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def ignore_requests() -> None:
    """Do what a job can to survive."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})


def start_sleeper() -> int:
    """Start another program, which does not end by itself in time; give its process id."""
    import subprocess

    return subprocess.Popen(["sleep", "60"]).pid  # it shall outlive this call


def open_files(job: RunningJob) -> list[str]:
    """Give what this process has open, beside stdin, stdout and stderr."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:  # that of the folder itself
            continue
        if int(entry.name) > 2:
            found.append(target)
    return found


def open_files_of_a_program(job: RunningJob) -> list[str]:
    """Give what a program that this job starts has open, beside stdin, stdout and stderr."""
    import subprocess

    source = "import runfunctions; print(*runfunctions.open_files(None), sep='\\n')"
    done = subprocess.run(  # noqa: PLW1510 - its return code is looked at by the output
        [sys.executable, "-c", source], stdout=subprocess.PIPE, encoding="utf-8", close_fds=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    return done.stdout.split()


def chatter(job: RunningJob) -> Any:
    print("out", job["x"])
    print("err", job["x"], file=sys.stderr)
    import subprocess

    subprocess.run(["echo", f"below {job['x']}"], check=True)
    if job["x"] == 1:
        print("last words")
        go_wrong("segfault")
    return job["x"]


class Patience:
    """A stopper: it stops a job at its third record."""

    def __init__(self) -> None:
        self.job: Any = None
        self.seen: list[float] = []

    def observe(self, budget: float, objective: float) -> None:
        self.seen.append(objective)
        self.job.storage.store_job_metadata(self.job.id, "seen", len(self.seen))

    def stop(self) -> bool:
        return len(self.seen) >= 3

    @property
    def objective(self) -> float:
        return self.seen[-1]


# -- what goes wrong ---------------------------------------------------------------------------------------------------

EXIT_CODE = 7


def go_wrong(kind: str) -> Any:
    """End this process, or raise, in the way that ``kind`` names."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    match kind:
        case "exit":
            os._exit(EXIT_CODE)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            import ctypes

            ctypes.string_at(0)
        case "raise":
            raise ValueError("it went wrong")
        case "sys.exit":
            sys.exit("it went wrong")
        case "interrupt":
            raise KeyboardInterrupt("it went wrong")


class WrongWhenUnpickled:
    """Goes wrong where it is unpickled."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return go_wrong, (self.kind,)


class WrongWhenPickled:
    """Goes wrong where it is pickled."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return go_wrong(self.kind)


class NotForTheDriver:
    """Made in a worker, and cannot be unpickled in the process that started it."""

    def __reduce__(self) -> Any:
        return _refuse_in, (os.getppid(),)


def _refuse_in(pid: int) -> NotForTheDriver:
    if os.getpid() == pid:
        raise LookupError("not in this house")
    return NotForTheDriver()


def sometimes_wrong(job: RunningJob) -> Any:
    """Double, or go wrong where the arguments say."""
    if job.get("wrong") == "running":
        go_wrong(job["kind"])
    if job.get("wrong") == "result":
        return WrongWhenPickled(job["kind"])
    return job["x"] * 2


def wrong_configuration(place: str, kind: str) -> dict[str, Any]:
    """Make the arguments with which :func:`sometimes_wrong` goes wrong."""
    if place == "argument":
        return {"x": WrongWhenUnpickled(kind)}
    return {"x": 0, "wrong": place, "kind": kind}


def wrong_for_the_driver(job: RunningJob) -> Any:
    """Give something that goes wrong where the result is unpickled."""
    return WrongWhenUnpickled(job["back"]) if "back" in job else job["x"]


class SlowWhenUnpickled:
    def __reduce__(self) -> Any:
        return time.sleep, (60,)


class SlowWhenPickled:
    def __reduce__(self) -> Any:
        time.sleep(60)
        return int, ()


class DeadlyFunction:
    """A run-function that goes wrong where it is unpickled."""

    def __init__(self, kind: str = "exit") -> None:
        self.kind = kind

    def __call__(self, job: RunningJob) -> None:
        raise AssertionError("it can never be called")

    def __reduce__(self) -> Any:
        return go_wrong, (self.kind,)


# -- exceptions that are hard to send ----------------------------------------------------------------------------------


class NeedsArgumentsError(Exception):
    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"code {code} in {where}")


class HoldsLockError(Exception):
    def __init__(self) -> None:
        import threading

        super().__init__("locked")
        self.lock = threading.Lock()


class BrokenTextError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class ExitingTextError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Text(str):
    __slots__ = ()

    def __reduce__(self) -> Any:
        raise TypeError("this text stays here")


class OwnTextError(Exception):
    def __str__(self) -> str:
        text: str = Text("a text of its own kind")
        return text


def _raise(exc: BaseException) -> Any:
    raise exc


def _chain() -> Any:
    try:
        raise KeyError("the first")
    except KeyError as exc:
        error = RuntimeError("the second")
        error.add_note("a note")
        raise error from exc


def _recurse() -> Any:
    return _recurse()


def _local() -> Any:
    class LocalError(Exception):
        pass

    raise LocalError("of a local class")


def _cancelled() -> Any:
    import asyncio

    raise asyncio.CancelledError("by itself")


# What to call; the name of the exception's type; what is in its message.
EXCEPTIONS: dict[str, tuple[Any, str, str]] = {
    "needs-arguments": (lambda: _raise(NeedsArgumentsError(5, "here")), "NeedsArgumentsError", "code 5 in here"),
    "holds-lock": (lambda: _raise(HoldsLockError()), "HoldsLockError", "locked"),
    "broken-text": (lambda: _raise(BrokenTextError()), "BrokenTextError", "failed"),
    "exiting-text": (lambda: _raise(ExitingTextError()), "ExitingTextError", "failed"),
    "own-text": (lambda: _raise(OwnTextError()), "OwnTextError", "a text of its own kind"),
    "surrogate": (lambda: _raise(ValueError("\ud800")), "ValueError", "\ud800"),
    "long": (lambda: _raise(ValueError("x" * 5_000_000)), "ValueError", "x" * 100),
    "empty": (lambda: _raise(ValueError()), "ValueError", ""),
    "os-error": (lambda: _raise(FileNotFoundError(2, "No such file", "name")), "FileNotFoundError", "name"),
    "chain": (_chain, "RuntimeError", "the second"),
    "group": (
        lambda: _raise(ExceptionGroup("several", [ValueError("one"), KeyError("two")])),
        "ExceptionGroup",
        "several",
    ),
    "recursion": (_recurse, "RecursionError", "maximum recursion depth"),
    "local": (_local, "LocalError", "of a local class"),
    "interrupt": (lambda: _raise(KeyboardInterrupt("by itself")), "KeyboardInterrupt", "by itself"),
    "sys.exit": (lambda: sys.exit("good-bye"), "SystemExit", "good-bye"),
    "generator-exit": (lambda: _raise(GeneratorExit("odd")), "GeneratorExit", "odd"),
    "stop-iteration": (lambda: _raise(StopIteration(1)), "StopIteration", "1"),
    "cancelled": (_cancelled, "CancelledError", "by itself"),
    "memory": (lambda: _raise(MemoryError("full")), "MemoryError", "full"),
    "unicode": (lambda: b"\xff".decode("utf-8"), "UnicodeDecodeError", "invalid start byte"),
}


def raise_by_name(job: RunningJob) -> Any:
    return EXCEPTIONS[job["name"]][0]() if job["name"] != "none" else 1


class Unhashable(type):
    """Its classes cannot be in a set."""

    __hash__ = None  # type: ignore[assignment] # that is what it is for


class OfUnhashableClass(metaclass=Unhashable):
    """One of its classes: what looks up types, as pickle does, cannot cope with it."""
