"""A thread with an event loop, for an engine whose caller has none to offer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

import anyio

from paraval.engine.engine import Engine
from paraval.engine.ledger import Gate
from paraval.errors import EvaluatorClosedError
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
    is_wanted = True

    async def live() -> None:
        nonlocal engine
        engine = make_engine(Loop.running())
        if not is_wanted:  # looked at after the engine is there, as below it is written before it is looked for
            engine.stop()
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
    try:
        thread.start()
        opened.wait()
    except BaseException:  # Ctrl-C: nobody will ever have the engine
        is_wanted = False
        if engine is not None:
            with contextlib.suppress(EvaluatorClosedError):
                engine.stop()
        raise
    if engine is None:
        raise failure if failure is not None else RuntimeError("the evaluator's event loop did not start")
    return engine, thread
