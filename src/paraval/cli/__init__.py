"""The command line, ``paraval``. It needs the extra ``cli``."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; the exit code is what it returns."""
    missing = [name for name in ("click", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"paraval: error: the command line needs {' and '.join(missing)}: pip install 'paraval[cli]'\n"
        )
        return 2
    try:
        from paraval.cli.app import run_command_line

        return run_command_line()
    except KeyboardInterrupt:  # while it was starting
        sys.stderr.write("paraval: interrupted\n")
        return 130
