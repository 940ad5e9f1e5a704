"""A storage in a SQLite file: durable, with nothing to install and no server to run.

``storage``: the storage itself. ``database``: one file as this process has it open: whose turn it is, transactions,
forks. ``opening``: what is at a path, and journal modes. ``layout``: the tables, their versions. ``rows``: the
statements. ``entries``: what is written of jobs. ``failures``: SQLite's errors in our words.
"""

from paraval.storage.sqlite.storage import SqliteStorage

__all__ = ["SqliteStorage"]
