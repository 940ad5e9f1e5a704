"""The life of an evaluator's engine: opened by submit, closed, opened again; in a thread or in the caller's loop."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from paraval.engine.engine import Engine
from paraval.engine.ledger import Ledger
from paraval.engine.thread_home import run_in_thread
from paraval.errors import EvaluatorClosedError, ForkedError, UsageError
from paraval.job import Job
from paraval.loops import Loop
from paraval.outcome import Outcome

__all__ = ["Lifecycle"]

_JOIN_S: Final = 0.8
"""How long a close waits for the thread of a loop that has ended."""


class Lifecycle:
    """At most one engine at a time. Usable from any thread.

    Args:
        make_engine: makes an engine for a loop.
        prepare: called with the number of jobs that are to run, before a loop is started for them.
        ledger: outlives the engines.
        patience: seconds that a close may take, at most.
    """

    def __init__(
        self, make_engine: Callable[[Loop], Engine], prepare: Callable[[int], object], ledger: Ledger, patience: float
    ) -> None:
        self._make_engine = make_engine
        self._prepare = prepare
        self._ledger = ledger
        self._patience = patience
        self._lock = threading.Lock()  # never held while waiting for a loop that may itself want it
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._home: _CallersLoop | None = None
        self._pid = os.getpid()

    @property
    def engine(self) -> Engine | None:
        """The engine at work, or None."""
        return self._engine

    @property
    def is_open_in_thread(self) -> bool:
        """Whether a thread of our own is at work in this process."""
        return self._thread is not None and self._pid == os.getpid()

    @property
    def check_from_here(self) -> Callable[[], object] | None:
        """What a task that waits should call now and then; None on the engine's own loop, which is there."""
        engine = self._engine
        return None if engine is None or engine.loop.is_here else self.check

    def check(self) -> None:
        """Raise when what we wait for cannot come any more."""
        engine = self._engine
        if engine is not None:
            engine.check()

    def refuse_after_fork(self) -> None:
        """Raise ForkedError in a child of the process that made the evaluator."""
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this evaluator belongs to process {self._pid} and cannot be used in its fork {os.getpid()}: "
                "its threads and its event loop did not come along. Make an evaluator in the child"
            )

    def refuse_on_home(self, call: str, instead: str) -> None:
        """Raise UsageError where a blocking call would block the very loop that runs the jobs."""
        engine = self._engine
        home = engine.loop if engine is not None else self._home.loop if self._home is not None else None
        if home is not None and home.is_here and home.is_running:
            raise UsageError(f"{call} would block the event loop that runs the jobs: use 'await {instead}' here")

    # -- opening -------------------------------------------------------------------------------------------------------

    def submit(self, jobs: Sequence[Job], outcomes: Mapping[str, Outcome], sources: Mapping[str, str]) -> None:
        """Give jobs to the engine (see :meth:`Engine.submit`); open one if there is none.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        while not self._submit_unless_closing(jobs, outcomes, sources):
            self.refuse_on_home("a submit() while the evaluator is being closed", "submit_async()")
            self._ledger.wait(lambda: not self._closing, self.check, despite_failure=True)

    def _submit_unless_closing(
        self, jobs: Sequence[Job], outcomes: Mapping[str, Outcome], sources: Mapping[str, str]
    ) -> bool:
        with self._lock:
            if self._closing:
                return False
            self._open(len(jobs) - len(outcomes) - len(sources)).submit(jobs, outcomes, sources)
            return True

    async def wait_until_closed(self) -> None:
        """Where somebody closes the evaluator at this moment, wait for that without blocking the loop."""
        if self._closing:
            await self._ledger.wait_async(lambda: not self._closing, despite_failure=True)

    def _open(self, jobs: int) -> Engine:
        engine = self._engine
        if engine is not None and engine.loop.is_closed and not engine.ended:
            engine.give_up(closing=False)
        if engine is not None and (engine.ended or engine.loop.is_closed):  # its loop ended without a close
            self._engine = engine = self._thread = None
        if self._home is not None and self._home.loop.is_closed:
            self._home = None
        if engine is None:
            self._ledger.reopen()
            if self._home is None:
                self._prepare(jobs)
                engine, self._thread = run_in_thread(self._make_engine)
            else:
                engine = self._make_engine(self._home.loop)
                self._home.run(engine)
            self._engine = engine
        return engine

    # -- closing -------------------------------------------------------------------------------------------------------

    def close(self) -> list[Job]:
        """Stop everything; block until it has stopped, or does not within the grace. Idempotent.

        Returns:
            The jobs that were cancelled by it.

        Raises:
            UsageError: called on the loop that runs the jobs.
        """
        self.refuse_on_home("close()", "aclose()")
        engine = self._begin_close()
        if engine is None:
            self._ledger.wait(lambda: not self._closing, despite_failure=True, timeout=self._patience)
            return []
        try:
            self._ledger.wait(lambda: engine.ended, engine.check, self._patience, despite_failure=True)
        except EvaluatorClosedError:
            pass  # the loop is gone; what it left is settled below
        finally:
            thread = self._end_close(engine)
        if thread is not None:
            thread.join(_JOIN_S)
        return engine.given_back

    async def aclose(self) -> list[Job]:
        """Do as :meth:`close` does, on any loop; a cancellation does not cut it short."""
        with anyio.CancelScope(shield=True):
            engine = self._begin_close()
            thread = None
            try:
                with anyio.move_on_after(self._patience):
                    done = (lambda: not self._closing) if engine is None else (lambda: engine.ended)
                    await self._ledger.wait_async(done, despite_failure=True)
            finally:  # asyncio's own task.cancel() goes through any shield
                if engine is not None:
                    thread = self._end_close(engine)
            if thread is not None:
                await anyio.to_thread.run_sync(thread.join, _JOIN_S)
        return [] if engine is None else engine.given_back

    def _begin_close(self) -> Engine | None:
        """Ask the engine to stop; None when there is none, or when another thread closes it already."""
        with self._lock:
            engine = self._engine
            if engine is None or self._closing:
                return None
            self._closing = True
        with contextlib.suppress(EvaluatorClosedError):  # the loop is gone; what it left is settled by _end_close
            engine.stop()
        return engine

    def _end_close(self, engine: Engine) -> threading.Thread | None:
        if not engine.ended:
            engine.give_up()
        with self._lock:
            thread, self._thread = self._thread, None
            self._engine = None
            self._closing = False
        self._ledger.reopen()  # what was saved at the second try can be gathered
        self._ledger.look_again()
        return thread if engine.ended else None

    # -- the caller's loop as the home ---------------------------------------------------------------------------------

    async def enter(self) -> None:
        """Make the running loop the home, until :meth:`exit`.

        Raises:
            UsageError: it is entered already, or jobs are at work in the thread of our own.
        """
        if self._home is not None:
            raise UsageError("this evaluator was entered with 'async with' already; leave that block first")
        if self._engine is not None:
            if self._ledger.in_flight:
                raise UsageError(
                    f"{self._ledger.in_flight} jobs were submitted before 'async with' and run in a thread of "
                    "their own: gather them or close() first, or submit inside the block"
                )
            await self.aclose()
        home = _CallersLoop()
        await home.open()
        self._home = home

    async def exit(self, exc: BaseException | None, traceback: TracebackType | None) -> bool:
        """Leave the home, after :meth:`aclose`; tell whether the exception ends here."""
        home, self._home = self._home, None
        if home is None:
            return False
        return await home.close(exc, traceback)


class _CallersLoop:
    """The loop of an ``async with`` block, and the task group in which a keeper runs one engine after the other."""

    def __init__(self) -> None:
        self.loop = Loop.running()
        self._group: TaskGroup = anyio.create_task_group()
        self._engines: deque[Engine] = deque()
        self._wanted = self.loop.event()

    async def open(self) -> None:
        await self._group.__aenter__()
        self._group.start_soon(self._keep, name="paraval engine")

    async def close(self, exc: BaseException | None, traceback: TracebackType | None) -> bool:
        """Close the group. The engine has ended."""
        # The group gets to see only a cancellation, which may be its own: another exception of the caller's block would
        # come out wrapped in a group, though nothing else failed.
        self._group.cancel_scope.cancel()
        if isinstance(exc, anyio.get_cancelled_exc_class()):
            return bool(await self._group.__aexit__(type(exc), exc, traceback))
        await self._group.__aexit__(None, None, None)
        return False

    def run(self, engine: Engine) -> None:
        """Have the keeper run an engine; from any thread, from inside a task or not.

        Raises:
            EvaluatorClosedError: the loop is gone.
        """
        self._engines.append(engine)
        if not self.loop.call_soon(self._want):
            raise EvaluatorClosedError("the event loop that runs the jobs is gone: it was closed or has ended")

    def _want(self) -> None:
        self._wanted.set()  # the event of that moment: the keeper makes a new one for each wait

    async def _keep(self) -> None:
        while True:
            while self._engines:
                # A cancellation from outside ends the caller's block, and the block's end closes the engine: in order,
                # with the grace that its jobs have.
                with anyio.CancelScope(shield=True):
                    await self._engines.popleft().run(_do_nothing)
            self._wanted = self.loop.event()
            if not self._engines:
                await self._wanted.wait()


def _do_nothing() -> None:
    pass
