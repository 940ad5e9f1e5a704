"""Profiled functions that processes find by their names."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

from paraval import RunningJob, profile
from runfunctions import Flags

MIB = 1 << 20
LIMIT = 150 * MIB
"""More than any worker takes by itself, less than what the greedy take."""
LOOK_S = 0.01


class Picky(Exception):  # noqa: N818 - its name is short to be looked for in a job's error
    """Its ``__init__`` wants other arguments than the exception keeps."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{detail} ({code})")
        self.code = code


class Unsendable(Exception):  # noqa: N818 - likewise
    """It cannot cross to another process."""

    def __init__(self) -> None:
        super().__init__("with a lock")
        self.lock = threading.Lock()


def take(mebibytes: int) -> bytes:
    return b"x" * (mebibytes * MIB)


def hoard() -> str:
    """Take memory until the limit must have been noticed, then wait for what is to come."""
    held = [take(10) for _ in range(40)]
    threading.Event().wait(20)
    return f"kept {len(held)}"


@profile
def timed(job: RunningJob) -> Any:
    return job["x"]


@profile
async def async_timed(job: RunningJob) -> Any:
    return job["x"]


@profile(memory=True)
def spike(job: RunningJob) -> Any:
    return len(take(job["mebibytes"]))


@profile(memory=True)
async def async_spike(job: RunningJob, extra: int = 0) -> Any:
    await asyncio.sleep(0)
    return len(take(job["mebibytes"])) + extra


@profile(memory=True)
def with_child(job: RunningJob) -> int:
    """Return while a child holds memory; it ends when this process does."""
    code = f"held = b'x' * {job['mebibytes'] * MIB}; print('.', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child.pid


@profile(memory=True, memory_limit=LIMIT, memory_tracing_interval=LOOK_S)
def greedy(job: RunningJob) -> str:
    return hoard()


@profile(memory=True, memory_limit=LIMIT, memory_tracing_interval=LOOK_S)
async def async_greedy(job: RunningJob) -> str:
    return hoard()


@profile(memory_limit=LIMIT, memory_tracing_interval=LOOK_S, raise_exception=True)
def greedy_raising(job: RunningJob) -> str:
    return hoard()


@profile(memory=True)
def fails(job: RunningJob) -> Any:
    match job["how"]:
        case "value":
            raise ValueError("a bad value")
        case "picky":
            raise Picky(7, "so picky")
        case "unsendable":
            raise Unsendable
        case "exit":
            sys.exit(3)
        case "die":
            os._exit(4)
        case "result":
            return threading.Lock()


@profile(memory=True)
async def async_fails(job: RunningJob) -> Any:
    await asyncio.sleep(0)
    match job["how"]:
        case "cancelled":
            raise asyncio.CancelledError
        case "value":
            raise ValueError("a bad value")


@profile(memory=True)
def recording(job: RunningJob) -> Any:
    job.record(budget=1, objective=job["x"])
    job.storage.store_job_metadata(str(job.id), "seen", [job["job_id"], dict(job)])
    return job.objective


@profile(memory=True)
def process_id(job: RunningJob) -> int:
    return os.getpid()


@profile(memory=True)
@profile
def twice(job: RunningJob) -> int:
    return os.getpid()


class Model:
    """Its method is profiled."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @profile(memory=True)
    def run(self, job: RunningJob, offset: float = 0.0) -> float:
        return float(job["x"] * self.scale + offset)


# -- run-functions without the decorator -------------------------------------------------------------------------------


def mixed(job: RunningJob, folder: str = "") -> Any:
    """Do what the job says; ``"hoard"`` counts how often it was begun."""
    match job["x"]:
        case "hoard":
            if folder:
                Flags(folder).count("hoard")
            return hoard()
        case "in C":
            held = [take(10) for _ in range(40)]
            ctypes.PyDLL(None).usleep(20_000_000)  # it holds the GIL: no other thread of this process runs
            return len(held)
        case "rlimit":
            resource.setrlimit(resource.RLIMIT_AS, (400 * MIB, resource.RLIM_INFINITY))
            return len(take(1000))
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
            return threading.Event().wait(20)
        case "spike":
            return len(take(100))
        case x:
            return x


async def async_mixed(job: RunningJob, folder: str = "") -> Any:
    await asyncio.sleep(0)
    return mixed(job, folder)


_left: list[bytes] = []


def leaving(job: RunningJob, folder: str) -> int:
    """The first job leaves memory behind; the second holds some, at first until it is killed for it."""
    if job["x"] == "leave":
        _left.append(take(100))
    else:
        tries = Flags(folder).count("tries")
        held = take(80)
        if tries == 1:
            threading.Event().wait(20)
        assert held
    return os.getpid()


@profile(memory_limit=LIMIT, memory_tracing_interval=1000)
def filling(job: RunningJob) -> int:
    """Leave more behind than is allowed, which nobody sees in time."""
    _left.append(take(200))
    return os.getpid()


@profile(memory=True, memory_limit=LIMIT)
def process_id_with_limit(job: RunningJob) -> int:
    return os.getpid()


@profile(memory=True)
def polite(job: RunningJob, folder: str) -> str:
    """Wait until asked to stop."""
    Flags(folder).put("runs", os.getpid())
    while not job.stopped():
        threading.Event().wait(0.005)
    return "stopped early"


@profile(memory=True)
def deaf(job: RunningJob, folder: str) -> int:
    """Job 0 does not listen."""
    if job["x"] == 0:
        Flags(folder).put("runs", os.getpid())
        threading.Event().wait(20)
    return int(job["x"])


@profile(memory=True)
async def async_deaf(job: RunningJob, folder: str) -> int:
    Flags(folder).put("runs", os.getpid())
    threading.Event().wait(20)
    return 0


@profile(memory=True)
def second_time_lucky(job: RunningJob, folder: str) -> int:
    """Fail at first, in the way that the job says."""
    tries = Flags(folder).count("tries")
    if tries == 1:
        if job["x"] == "die":
            os._exit(1)
        raise ValueError("unlucky")
    return tries
