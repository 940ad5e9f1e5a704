"""A thread with an event loop, for an engine whose caller has none to offer."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Final

import anyio

from paraval.engine.engine import Engine
from paraval.engine.ledger import Gate
from paraval.errors import EvaluatorClosedError
from paraval.loops import Loop

__all__ = ["run_in_thread"]

_logger = logging.getLogger("paraval")

_END_S: Final = 1.0
"""How long an engine that nobody wants any more may take to end."""


def run_in_thread(make_engine: Callable[[Loop], Engine]) -> tuple[Engine, threading.Thread]:
    """Start an engine on an asyncio loop in a thread of its own; return when it takes submissions.

    The thread is a daemon: a program that forgets to close its evaluator must end all the same.
    """
    opened, ended = Gate(), Gate()
    engine: Engine | None = None
    failure: BaseException | None = None
    is_wanted = True

    async def live() -> None:
        nonlocal engine
        engine = make_engine(Loop.running())
        if is_wanted:  # looked at after the engine is there, as below it is written before that is looked for
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
            ended.open()

    thread = threading.Thread(target=main, name="paraval-loop", daemon=True)
    try:
        thread.start()
        opened.wait()
    except BaseException:  # Ctrl-C: nobody will ever have the engine
        is_wanted = False
        if engine is not None:
            with contextlib.suppress(EvaluatorClosedError):
                engine.stop()
            ended.wait(timeout=_END_S)  # or it would meet the next one at the same workers
        raise
    if engine is None:
        raise failure if failure is not None else RuntimeError("the evaluator's event loop did not start")
    return engine, thread
