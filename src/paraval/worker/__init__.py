"""The child side of a worker process. Light: it imports no anyio, no msgspec, no asyncio unless a job needs them."""
