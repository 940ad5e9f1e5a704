"""Who owns jobs in a storage: an evaluator, named so that others can tell whether its process is still there."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from paraval.storage import Storage

__all__ = ["living_owners", "new_owner"]


def new_owner() -> str:
    """Make a name for an evaluator of this process: nobody has had it before."""
    return f"{uuid.uuid4().hex}@{_machine()}/{os.getpid()}/{_started(os.getpid())}"


def living_owners(storage: Storage) -> set[str]:
    """Give the owners that hold a lease, but for those on this machine whose process has ended all the same."""
    return {owner for owner in storage.owners() if not _has_ended(owner)}


def _has_ended(owner: str) -> bool:
    _, _, where = owner.partition("@")
    machine, _, process = where.partition("/")
    pid, _, started = process.partition("/")
    if not pid.isdigit() or machine != _machine():
        return False  # who can tell?
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return _started(int(pid)) != started or _is_zombie(int(pid))


def _machine() -> str:
    """Name this boot of this machine, and this space of process ids: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """Tell two processes apart that had the same id one after the other; "" where that cannot be seen."""
    return _stat(pid, 19) or ""


def _is_zombie(pid: int) -> bool:
    """Whether the process has ended, and only its parent has not asked how; False where that cannot be seen."""
    # A process whose first thread alone has ended looks the same, but for the number of its threads.
    return _stat(pid, 0) in {"Z", "X"} and _stat(pid, 17) in {"0", "1"}


def _stat(pid: int, index: int) -> str | None:
    """Give a field of ``/proc/PID/stat``, counted from the one after the name; None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[index]
    except (OSError, IndexError):
        return None
