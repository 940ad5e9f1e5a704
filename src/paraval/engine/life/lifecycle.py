"""The life of an evaluator's engine: opened by submit, closed, opened again; in a thread or in the caller's loop."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import anyio

from paraval.engine.engine import Engine
from paraval.engine.handover import Handover
from paraval.engine.ledger import Ledger
from paraval.engine.life.callers_home import CallersHome
from paraval.engine.life.thread_home import run_in_thread
from paraval.errors import EvaluatorClosedError, ForkedError, ParavalError, UsageError
from paraval.job import Job
from paraval.loops import Loop, call_in_thread, to_the_end
from paraval.outcome import Outcome

__all__ = ["Lifecycle"]

_JOIN_S: Final = 0.8
"""How long a close waits for the thread, or the task, of an engine that has ended."""


class Lifecycle:
    """At most one engine at a time. Usable from any thread.

    Args:
        make_engine: makes an engine for a loop.
        prepare: called with the number of jobs that are to run, before a loop is started for them.
        ledger: outlives the engines.
        patience: seconds that a close may take, at most.
        settles_here: whether this thread is one that settles jobs, other than the loop's.

    Attributes:
        closes: how often an engine was closed, or began to be.
    """

    def __init__(
        self,
        make_engine: Callable[[Loop], Engine],
        prepare: Callable[[int], object],
        ledger: Ledger,
        patience: float,
        settles_here: Callable[[], bool],
    ) -> None:
        self._make_engine = make_engine
        self._prepare = prepare
        self._ledger = ledger
        self._patience = patience
        self._settles_here = settles_here
        self._lock = threading.Lock()  # never held while waiting for a loop that may itself want it
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._is_left = False  # who closes it was interrupted: it stops, and who comes next goes on with the close
        self.closes = 0
        self._home: CallersHome | None = None
        self._pid = os.getpid()

    @property
    def engine(self) -> Engine | None:
        """The engine at work, or None."""
        return self._engine

    @property
    def is_open(self) -> bool:
        """Whether an engine is at work in this process, or has ended with its loop and was not closed."""
        return self._engine is not None and self._pid == os.getpid()

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
        """Raise UsageError where a blocking call would block the very loop that runs the jobs, or what settles them."""
        if self._settles_here():
            raise UsageError(
                f"{call} in on_done() would wait for what it holds up itself: do so after that has returned"
            )
        engine, home = self._engine, self._home
        if engine is not None and not engine.ended:
            loop = engine.loop
        elif home is not None and not home.is_gone:
            loop = home.loop
        else:
            return
        if loop.is_here and loop.is_running:
            raise UsageError(f"{call} would block the event loop that runs the jobs: use 'await {instead}' here")

    # -- opening -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        jobs: Sequence[Job],
        outcomes: Mapping[str, Outcome],
        sources: Mapping[str, str],
        handover: Handover,
    ) -> None:
        """Give jobs to the engine (see :meth:`Engine.submit`); open one if there is none.

        Raises:
            EvaluatorClosedError: the loop is gone, or somebody has closed the evaluator who should not have.
        """
        while not self._submit_unless_closing(jobs, outcomes, sources, handover):
            engine = self._engine
            if engine is not None and _is_abandoned(engine):  # nobody goes on with the close
                self._end_close(engine)
                continue
            self.refuse_on_home("a submit() while the evaluator is being closed", "submit_async()")
            if self._is_left:
                self.close()
            else:
                self._ledger.wait(self._nobody_closes, self.check, despite_failure=True)

    def _submit_unless_closing(
        self,
        jobs: Sequence[Job],
        outcomes: Mapping[str, Outcome],
        sources: Mapping[str, str],
        handover: Handover,
    ) -> bool:
        with self._lock:
            if handover.closes is not None and handover.closes != self.closes:
                raise EvaluatorClosedError("the evaluator was closed before all jobs were submitted")
            if self._closing:
                return False
            handover.closes = self.closes
            self._open(len(jobs) - len(outcomes) - len(sources)).submit(jobs, outcomes, sources, handover)
            return True

    async def wait_until_closed(self) -> None:
        """Where somebody closes the evaluator at this moment, wait for that without blocking the loop."""
        while self._closing:
            if self._is_left:
                await to_the_end(functools.partial(self.aclose, []))
            else:
                await self._ledger.wait_async(self._nobody_closes, despite_failure=True)

    def _nobody_closes(self) -> bool:
        return self._is_left or not self._closing

    def _open(self, jobs: int) -> Engine:
        engine = self._engine
        if engine is not None and self._home is None and not engine.ended and not engine.loop.is_closed:
            return engine  # as nearly always
        if engine is not None and _is_abandoned(engine):
            engine.give_up(closing=False)
        if engine is not None and (engine.ended or engine.loop.is_closed):  # its loop ended without a close
            self._engine = engine = self._thread = None
        if self._home is not None and self._home.is_gone:
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

    def drop(self) -> None:
        """Stop everything without waiting: nobody holds the evaluator any more."""
        engine, home = self._engine, self._home
        with contextlib.suppress(ParavalError):
            if engine is not None:
                engine.stop()
        if home is not None:
            home.drop()

    def close(self) -> list[Job]:
        """Stop everything; block until it has stopped, or does not within the grace. Idempotent.

        Returns:
            The jobs that were cancelled by it.

        Raises:
            UsageError: called on the loop that runs the jobs.
        """
        self.refuse_on_home("close()", "aclose()")
        while (engine := self._begin_close()) is None:
            self._ledger.wait(self._nobody_closes, despite_failure=True, timeout=self._patience)
            if not self._is_left:
                return []
        try:
            with contextlib.suppress(EvaluatorClosedError):  # the loop is gone; what it left is settled here
                self._ledger.wait(lambda: engine.ended, engine.check, self._patience, despite_failure=True)
            thread = self._end_close(engine)
        except BaseException:  # Ctrl-C
            self._leave(engine)
            raise
        if thread is not None:
            thread.join(_JOIN_S)
        return engine.given_back

    async def aclose(self, cancelled: list[Job]) -> None:
        """Do as :meth:`close` does, on any loop; the jobs that were cancelled by it are added to the list.

        Nobody cancels this but a loop that ends: it is called by ``to_the_end``.
        """
        while (engine := self._begin_close()) is None:
            with anyio.move_on_after(self._patience):
                await self._ledger.wait_async(self._nobody_closes, despite_failure=True)
            if not self._is_left:
                return
        thread = None
        try:
            with anyio.move_on_after(self._patience):
                await self._ledger.wait_async(lambda: engine.ended, despite_failure=True)
        finally:
            thread = self._end_close(engine)
            cancelled += engine.given_back
        if thread is not None:
            await call_in_thread(thread.join, _JOIN_S)

    def _begin_close(self) -> Engine | None:
        """Ask the engine to stop; None when there is none, or when another thread closes it already."""
        mine: Engine | None = None
        try:
            with self._lock:
                engine = self._engine
                if engine is None:
                    return None
                if not self._closing:
                    self.closes += 1
                elif not self._is_left and not _is_abandoned(engine):  # else nobody goes on with the close
                    return None
                self._is_left = False
                self._closing = True
                mine = engine
            with contextlib.suppress(EvaluatorClosedError):  # the loop is gone; what it left is settled by _end_close
                engine.stop()
        except BaseException:  # Ctrl-C
            if mine is not None:
                with contextlib.suppress(EvaluatorClosedError):
                    mine.stop()
                self._leave(mine)
            raise
        return engine

    def _leave(self, engine: Engine) -> None:
        """Let another go on with a close that was interrupted: the engine stops, but may need its time for that."""
        with self._lock:
            if self._engine is engine:  # else another was quicker
                self._is_left = True
        self._ledger.look_again()

    def _end_close(self, engine: Engine) -> threading.Thread | None:
        if not engine.ended:
            engine.give_up()
        with self._lock:
            if self._engine is not engine:  # another thread was quicker, and it may be open again
                return None
            thread, self._thread = self._thread, None
            self._engine = None
            self._is_left = self._closing = False
        self._ledger.reopen()  # what was saved at the second try can be gathered
        self._ledger.look_again()
        return thread if engine.ended else None

    # -- the caller's loop as the home ---------------------------------------------------------------------------------

    async def enter(self) -> None:
        """Make the running loop the home, until :meth:`exit`.

        Raises:
            UsageError: it is entered already, or jobs are at work in the thread of our own.
        """
        self._refuse_second_home()
        if self._engine is not None:
            at_work = self._ledger.submitted - self._ledger.settled
            if at_work:
                raise UsageError(
                    f"{at_work} jobs were submitted before 'async with' and run in a thread of "
                    "their own: gather them or close() first, or submit inside the block"
                )
            await to_the_end(functools.partial(self.aclose, []))
        with self._lock:
            self._refuse_second_home()  # another task may have come meanwhile
            self._home = CallersHome()

    def _refuse_second_home(self) -> None:
        if self._home is not None and not self._home.is_gone:
            raise UsageError("this evaluator was entered with 'async with' already; leave that block first")

    async def exit(self) -> None:
        """Leave the home, after :meth:`aclose`; in any task, whatever else was entered meanwhile."""
        with self._lock:
            home, self._home = self._home, None
        if home is not None:
            if self._engine is not None and self._engine.loop is home.loop:  # somebody submitted after the close
                await self.aclose([])
            await home.leave(_JOIN_S)


def _is_abandoned(engine: Engine) -> bool:
    """Whether its loop was closed under it."""
    return engine.loop.is_closed and not engine.ended
