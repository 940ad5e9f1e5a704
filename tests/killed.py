"""A driver that is killed again and again, and goes on each time: the program of ``test_kill_loop.py``.

It reads lines ``method url history`` and forks a driver for each, so that a life costs no start of an interpreter. The
driver submits the same configurations in each of its lives, and writes what it gathers to the history, which no storage
knows of: whatever is in there was acknowledged.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid

from paraval import Evaluator, RunningJob
from paraval.engine.known import recall  # noqa: F401 - imported before the forks, as is all that a driver needs
from paraval.storage import sqlite  # noqa: F401 - likewise

CONFIGURATIONS = 60
PARTS = 12


def unique(job: RunningJob) -> str:
    """Give what no other run gives, so that a result that was lost cannot be made again."""
    if job["x"] % 20 == 7:
        raise ValueError(f"{job['x']} {uuid.uuid4().hex}")
    return f"{job['x']} {uuid.uuid4().hex}"


async def unique_async(job: RunningJob) -> str:
    return unique(job)


unique_async.__qualname__ = unique.__qualname__  # so that one method can go on with what another left


def drive(method: str, url: str, history: str) -> None:
    """Live once."""
    file = os.open(history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, b"\n")  # the last life may have been ended within a line
    evaluator = Evaluator.create(
        unique_async if method == "serial" else unique,
        method,
        {"storage": url, "search_id": "0", "resume": True, "num_workers": 2, "max_attempts": 1_000_000},
    )
    with evaluator:
        parts = [[{"x": x} for x in range(part, CONFIGURATIONS, PARTS)] for part in range(PARTS)]
        left = CONFIGURATIONS
        while left:
            if parts:  # some of it when some is done already
                evaluator.submit(parts.pop(0))
            jobs = evaluator.gather("BATCH", 1)
            left -= len(jobs)
            lines = [f"{job.id} {job.args['x']} {job.output or (job.error and job.error.message)} .\n" for job in jobs]
            os.write(file, "".join(lines).encode())
    os.write(file, b"end\n")


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                drive(*line.split())
                code = 0
            except BaseException:  # noqa: BLE001 - it is the end of this process
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
