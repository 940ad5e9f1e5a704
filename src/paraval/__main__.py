"""``python -m paraval`` is the command ``paraval``."""

from __future__ import annotations

import sys

from paraval.cli import main

if __name__ == "__main__":
    sys.exit(main())
