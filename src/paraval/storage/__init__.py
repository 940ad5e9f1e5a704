"""Where searches and their jobs are kept. One module for each store."""

from paraval.storage.base import Storage, UnknownIdError, UnstorableError
from paraval.storage.memory import MemoryStorage
from paraval.storage.null import NullStorage
from paraval.storage.records import JobChange, JobRecord

__all__ = ["JobChange", "JobRecord", "MemoryStorage", "NullStorage", "Storage", "UnknownIdError", "UnstorableError"]
