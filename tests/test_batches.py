"""A worker's jobs of one message, and what is said of them, without a process around it."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import pytest

from paraval.worker.batches import Batches
from paraval.worker.forks import mark_of_this_process
from support import until

_Result = tuple[tuple[Any, ...] | None, Any]


class Heard:
    """The worker's end of a socket, and what was said there."""

    def __init__(self) -> None:
        self.frames: list[tuple[Any, ...]] = []
        self._said = threading.Condition()

    def send(self, frame: tuple[Any, ...]) -> None:
        with self._said:
            self.frames.append(frame)
            self._said.notify_all()

    def wait_for(self, condition: Callable[[list[tuple[Any, ...]]], bool]) -> None:
        with self._said:
            assert self._said.wait_for(lambda: condition(self.frames), timeout=10.0)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of a guard that gave up: it would have ended the worker."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def batches_on(heard: Heard, run: Callable[[str, Any], _Result], board: Any = None) -> Batches:
    return Batches(cast("Any", heard), board, run)


def ids(count: int) -> list[str]:
    return [f"0.{number}" for number in range(count)]


class Board:
    """One that refuses the job at a place."""

    def __init__(self, refused: int) -> None:
        self.refused = refused
        self.began: list[int] = []

    def begin(self, place: int, _now: float) -> bool:
        self.began.append(place & 0xFFFF_FFFF)
        return self.began[-1] != self.refused

    def end(self) -> None:
        self.began.append(-1)


@pytest.mark.parametrize("why", ["asked to stop", "the board"])
def test_a_guard_outlives_a_message_that_was_given_back_in_part(why: str, ends: list[int]) -> None:
    heard = Heard()

    def run(job_id: str, _args: Any) -> _Result:
        if batches._number == 1 and why == "asked to stop":
            batches.is_asked_to_stop = True
        if job_id == "0.3":  # of the second message: until the guard has spoken
            heard.wait_for(lambda frames: ("back", 2, 4) in [frame[:3] for frame in frames])
        return None, job_id

    batches = batches_on(heard, run, Board(1) if why == "the board" else None)
    assert batches.run(1, ids(3), [{}] * 3, 0.02) is (why == "asked to stop")
    assert [frame[:3] for frame in heard.frames] == [("done", 1, 0), ("back", 1, 1)]
    assert heard.frames[0][5] == ["0.0"]
    until(lambda: bool(ends) or batches._guard_looks == math.inf)  # it has looked when there was nothing more to do
    if isinstance(batches._board, Board):
        batches._board.refused = -1
    batches.run(2, ids(6), [{}] * 6, 0.02)
    assert ends == []
    ran = [value for frame in heard.frames if frame[:2] == ("done", 2) for value in frame[5]]
    assert ran == ["0.0", "0.1", "0.2", "0.3"]


@pytest.mark.parametrize("seed", range(5))
def test_of_each_job_one_thing_is_said_whatever_the_guard_does_meanwhile(seed: int, ends: list[int]) -> None:
    rng = random.Random(seed)
    heard = Heard()
    ran: list[str] = []

    def run(job_id: str, args: Any) -> _Result:
        ran.append(job_id)
        if args["seconds"]:
            time.sleep(args["seconds"])  # it stands for work
        return (None, job_id) if args["returns"] else ((job_id,), None)

    batches = batches_on(heard, run)
    for number in range(60):
        count = rng.choice([2, 3, 20, 60])
        all_args = [
            {"seconds": rng.choice([0.0] * 12 + [0.001, 0.003, 0.007]), "returns": rng.random() < 0.8}
            for _ in range(count)
        ]
        ran.clear()
        heard.frames.clear()
        batches.run(number, ids(count), all_args, rng.choice([0.0, 0.001, 0.004]))
        backs = [frame for frame in heard.frames if frame[0] == "back" and frame[1] == number]
        begun = min([frame[2] for frame in backs], default=count)
        assert ran == ids(begun)
        said = 0
        last = -math.inf
        for _, _, at, times, errors, values in [frame for frame in heard.frames if frame[:2] == ("done", number)]:
            assert at == said
            moments = struct.unpack(f"{len(values) + 1}d", times)
            for place, (started, ended) in enumerate(itertools.pairwise(moments)):
                job_id, args = f"0.{said}", all_args[said]
                assert values[place] == (job_id if args["returns"] else None)
                assert errors.get(place) == (None if args["returns"] else (job_id,))
                assert last <= started <= ended
                assert ended - started >= args["seconds"]
                last = ended
                said += 1
        assert said == begun
    assert ends == []


class Paused(deque[Any]):
    """A deque whose length is 1 for the guard, and by the time that the guard goes on, the last job has begun."""

    main = -1
    last_may_begin = threading.Event()
    last_has_begun = threading.Event()

    def __len__(self) -> int:
        length = super().__len__()
        if length == 1 and threading.get_ident() != self.main and not self.last_may_begin.is_set():
            self.last_may_begin.set()
            assert self.last_has_begun.wait(10)
        return length


def test_a_guard_does_not_overlook_a_job_that_begins_as_it_looks(
    monkeypatch: pytest.MonkeyPatch, ends: list[int]
) -> None:
    heard = Heard()
    Paused.main = threading.get_ident()
    monkeypatch.setattr("paraval.worker.batches.deque", Paused)
    monkeypatch.setattr(
        "paraval.worker.batches._HOLD_S", 60.0
    )  # for its report, the first job would wait for the guard

    def run(job_id: str, _args: Any) -> _Result:
        if job_id == "0.0":
            assert Paused.last_may_begin.wait(10)
        else:
            Paused.last_has_begun.set()
            heard.wait_for(lambda frames: ("back", 1, 2) in [frame[:3] for frame in frames])
        return None, job_id

    batches_on(heard, run).run(1, ids(2), [{}] * 2, 0.01)
    assert [frame[:3] for frame in heard.frames] == [("done", 1, 0), ("back", 1, 2), ("done", 1, 1)]
    assert ends == []


# -- forks -------------------------------------------------------------------------------------------------------------


def in_child(fork: Callable[[], int], see: Callable[[], object]) -> bool:
    pid = fork()
    if pid == 0:
        os._exit(bool(see()))
    _, status = os.waitpid(pid, 0)
    return bool(os.waitstatus_to_exitcode(status))


@pytest.mark.parametrize("kind", ["the kernel tells", "by its id"])
@pytest.mark.parametrize("how", ["os", "libc"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_mark_holds_in_the_process_that_made_it_alone(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "by its id":
        monkeypatch.delattr(mmap, "mmap")
    mark = mark_of_this_process()
    fork = os.fork if how == "os" else ctypes.CDLL(None).fork
    assert mark[0]
    assert not in_child(fork, lambda: mark[0])
    assert not in_child(fork, lambda: in_child(fork, lambda: mark[0]))
    assert mark[0]
