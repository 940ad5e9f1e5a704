"""A storage in a SQLite file: durable, with nothing to install and no server to run.

``storage``: the storage itself. ``sharing``: one database for a file in this process; forks. ``database``: that file:
whose turn it is, transactions. ``opening``: what is at a path, and journal modes. ``layout``: the tables, and their
versions. ``rows``: the statements. ``entries``: what is written of jobs. ``owners``: who has them. ``values``: what is
kept beside them. ``failures``: SQLite's errors in our words.
"""

from paraval.storage.sqlite.storage import SqliteStorage

__all__ = ["SqliteStorage"]
