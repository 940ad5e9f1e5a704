"""What options can be. It is light: every command, and its help, has it."""

from __future__ import annotations

from typing import Final

__all__ = ["FORMATS", "STATUSES"]

FORMATS: Final = ("csv", "json", "jsonl", "parquet")
"""In which jobs are exported."""
STATUSES: Final = ("ready", "running", "done", "cancelling", "cancelled", "failed")
"""What jobs can be asked for by: their status, or that they failed."""
