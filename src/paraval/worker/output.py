"""What a worker process and its jobs print."""

from __future__ import annotations

import io
import sys
from typing import Any, Final

__all__ = ["flush_output", "unbuffer_output"]

_IONBF: Final = 2
"""C's name for a stream without a buffer."""


class _Unbuffered(io.TextIOWrapper):
    """Text that is out when ``write`` returns; ``write_through`` would leave it in the buffer below."""

    def write(self, text: str, /) -> int:
        count = super().write(text)
        self.flush()
        return count


def unbuffer_output() -> None:
    """Have all that is printed go out at once, also by C libraries, as the interpreter's own option ``-u`` does."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        stream.reconfigure(line_buffering=True)  # who has it already may go on with it
        # A file object of its own, as in a worker of loky's the first was opened on what was another file then.
        file = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 - open for the whole life
        setattr(sys, name, _Unbuffered(file, encoding=stream.encoding, errors=stream.errors))
    try:
        import ctypes  # here: few workers need it

        libc = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "__stdoutp" if sys.platform == "darwin" else "stdout")
        libc.setvbuf(stdout, None, _IONBF, 0)
    except (ImportError, OSError, ValueError, AttributeError):  # a Python without it, or a C library of another kind
        return


def flush_output() -> None:
    """Have what was printed go out, as far as the streams are still there."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or gone: a job may do that
            continue
