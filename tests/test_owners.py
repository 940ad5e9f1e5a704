"""Whose process has ended, whatever its lease says."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paraval
from paraval.engine.known.owners import living_owners, new_owner
from paraval.storage import MemoryStorage

SOURCE = str(Path(paraval.__file__).resolve().parents[1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a zombie can be told by /proc alone")
def test_a_process_that_has_ended_owns_nothing_though_nobody_has_reaped_it() -> None:
    program = (
        "import sys, threading; from paraval.engine.known.owners import new_owner\n"
        "threading.Thread(target=sys.stdin.read).start(); print(new_owner(), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    ) as process:
        assert process.stdout is not None
        owner, mine = process.stdout.readline().strip(), new_owner()
        storage = MemoryStorage()
        for name in (owner, mine):
            storage.renew(name, math.inf)
        assert living_owners(storage) == {owner, mine}
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert living_owners(storage) == {mine}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a zombie can be told by /proc alone")
def test_a_process_whose_first_thread_alone_has_ended_lives() -> None:
    program = """if True:
        import ctypes, sys, threading
        from paraval.engine.known.owners import new_owner
        owner, libc = new_owner(), ctypes.CDLL(None)
        main = threading.get_native_id()
        def stay():
            import pathlib
            while pathlib.Path(f"/proc/self/task/{main}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                pass
            print(owner, flush=True)
            sys.stdin.read()
        threading.Thread(target=stay, daemon=True).start()
        ctypes.CDLL(None).syscall(EXIT, 0)
    """
    exit_thread = {"x86_64": 60, "aarch64": 93}.get(os.uname().machine)
    if exit_thread is None:
        pytest.skip("the number of the system call is not known here")
    with subprocess.Popen(
        [sys.executable, "-c", program.replace("EXIT", str(exit_thread))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    ) as process:
        assert process.stdout is not None
        storage = MemoryStorage()
        storage.renew(owner := process.stdout.readline().strip(), math.inf)
        try:
            assert owner
            assert living_owners(storage) == {owner}
        finally:
            process.kill()
