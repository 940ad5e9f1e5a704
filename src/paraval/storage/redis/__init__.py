"""A storage in a Redis or Valkey server, for drivers on several machines.

``storage``: the storage itself. ``server``: a URL and its options. ``link``: the connection, tries and pipelines.
``scripts``: what the server runs, and the layout of the data. ``arguments`` and ``frames``: what goes there and comes
back. ``errors``: the server's errors in our words.
"""

from paraval.storage.redis.storage import RedisStorage

__all__ = ["RedisStorage"]
