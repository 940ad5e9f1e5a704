"""The life of an engine, and whose event loop is its home."""
