"""A storage in this process's memory: the default.

``storage``: the storage itself. ``search``: the records of one search. ``entries``: what stands for records that nobody
has asked for.
"""

from paraval.storage.memory.storage import MemoryStorage

__all__ = ["MemoryStorage"]
