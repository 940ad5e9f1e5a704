"""A storage in the memory of one process that others of the machine can use.

``storage``: the storage itself. ``sockets``: the server and the connections to it. ``calls``: how a call and its reply
are written.
"""

from paraval.storage.shared.storage import SharedMemoryStorage

__all__ = ["SharedMemoryStorage"]
