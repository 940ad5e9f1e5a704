"""Whether a file lies on another machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

__all__ = ["network_file_system"]

_NETWORK: Final = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gcsfuse", "glusterfs", "gpfs", "juicefs", "lustre"),
    *(
        "ncpfs",
        "nfs",
        "nfs4",
        "orangefs",
        "panfs",
        "pvfs2",
        "rclone",
        "s3fs",
        "smb2",
        "smb3",
        "smbfs",
        "sshfs",
        "vboxsf",
    ),
}
"""As ``/proc`` calls them, but for a leading ``fuse.``."""
_MOUNTS: Final = Path("/proc/self/mountinfo")
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


def network_file_system(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Give the kind of the network file system that a path is on; None if it is on none, or nobody says.

    Args:
        path: absolute; the file need not exist.
        mounts: the table of what is mounted, as Linux has it.
    """
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return None
    folder = path.parent.resolve()
    deepest, kind = -1, ""
    for line in lines:  # of several on one place, the last hides the others
        before, _, after = line.partition(b" - ")
        place = Path(
            _ESCAPE.sub(lambda code: bytes([int(code[1], 8)]), before.split()[4]).decode(errors="surrogateescape")
        )
        if len(place.parts) >= deepest and folder.is_relative_to(place):
            deepest, kind = len(place.parts), after.split()[0].decode()
    return kind if kind.removeprefix("fuse.") in _NETWORK else None
