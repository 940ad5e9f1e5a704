"""A thread with an event loop, for an engine whose caller has none to offer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import anyio

from paraval.engine.engine import Engine
from paraval.engine.ledger import Gate
from paraval.loops import Loop

__all__ = ["run_in_thread"]

_logger = logging.getLogger("paraval")


def run_in_thread(make_engine: Callable[[Loop], Engine]) -> tuple[Engine, threading.Thread]:
    """Start an engine on an asyncio loop in a thread of its own; return when it takes submissions.

    The thread is a daemon: a program that forgets to close its evaluator must end all the same.
    """
    opened = Gate()
    engine: Engine | None = None
    failure: BaseException | None = None

    async def live() -> None:
        nonlocal engine
        engine = make_engine(Loop.running())
        await engine.run(opened.open)

    def main() -> None:
        nonlocal failure
        try:
            anyio.run(live, backend="asyncio")
        except BaseException as exc:  # a thread has nobody above it; the ledger has told who waits
            failure = exc
            _logger.exception("the evaluator's event loop ended with an error")
        finally:
            opened.open()

    thread = threading.Thread(target=main, name="paraval-loop", daemon=True)
    thread.start()
    opened.wait()
    if engine is None:
        raise failure if failure is not None else RuntimeError("the evaluator's event loop did not start")
    return engine, thread
