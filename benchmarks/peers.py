"""Who takes part: paraval, DeepHyper, joblib and the bare executors, each used as its own documentation does.

Run-functions stand in a module, as DeepHyper wants them; each side gets the same work to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from typing import Any, Literal, Protocol, Self

from run_functions import noop, noop_async

__all__ = [
    "BareLoky",
    "BareProcessPool",
    "BareThreadPool",
    "Contestant",
    "Evaluator",
    "Joblib",
    "Method",
    "deephyper",
    "noop",
    "noop_async",
    "paraval",
]

Method = Literal["serial", "thread", "process", "loky"]


def run_function(method: Method) -> Callable[..., Any]:
    """Give the run-function that does nothing, of the kind that the method wants."""
    return noop_async if method == "serial" else noop


class Contestant(Protocol):
    """What is timed."""

    def flood(self, jobs: int) -> float:
        """Submit all jobs at once, then wait for all results; return the seconds per job."""

    def loop(self, jobs: int) -> float:
        """Take what is done, submit as many anew, until so many are done; return the seconds per job."""

    def close(self) -> None:
        """Stop the workers."""


class Evaluator:
    """An evaluator, paraval's or DeepHyper's: for what is done here they have the same face.

    Args:
        evaluator: with nothing in flight.
        workers: how many it has; the loop keeps so many jobs in flight.
    """

    def __init__(self, evaluator: Any, workers: int) -> None:
        self.evaluator = evaluator
        self._workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def flood(self, jobs: int) -> float:  # noqa: D102 - documented on Contestant; so are the others here
        configurations = [{"x": number} for number in range(jobs)]
        start = time.perf_counter()
        self.evaluator.submit(configurations)
        done = self.evaluator.gather("ALL")
        seconds = time.perf_counter() - start
        _expect(jobs, len(done))
        return seconds / jobs

    def loop(self, jobs: int) -> float:  # noqa: D102
        evaluator = self.evaluator
        evaluator.submit([{"x": number} for number in range(self._workers)])
        count = 0
        start = time.perf_counter()
        while count < jobs:
            done = evaluator.gather("BATCH", 1)
            evaluator.submit([{"x": count}] * len(done))
            count += len(done)
        seconds = time.perf_counter() - start
        _expect(self._workers, len(evaluator.gather("ALL")))
        return seconds / count

    def close(self) -> None:  # noqa: D102
        self.evaluator.close()


def paraval(method: Method, workers: int = 2, function: Callable[..., Any] | None = None, **settings: Any) -> Evaluator:
    """Make a paraval evaluator with its defaults, but for some settings."""
    from paraval import Evaluator as ParavalEvaluator

    made = ParavalEvaluator.create(function or run_function(method), method, {"num_workers": workers, **settings})
    return Evaluator(made, workers)


def deephyper(method: Method, workers: int = 2, function: Callable[..., Any] | None = None) -> Evaluator:
    """Make a DeepHyper evaluator with its defaults. Its import takes seconds and is heavy: only where it is needed."""
    from deephyper.evaluator import Evaluator as DeepHyperEvaluator

    made = DeepHyperEvaluator.create(function or run_function(method), method, {"num_workers": workers})
    return Evaluator(made, workers)


class _BareExecutor:
    """A ``concurrent.futures`` executor with nothing around it."""

    def __init__(self, executor: Executor, workers: int) -> None:
        self._executor = executor
        self._workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def flood(self, jobs: int) -> float:
        configurations = [{"x": number} for number in range(jobs)]
        submit = self._executor.submit
        start = time.perf_counter()
        futures = [submit(noop, configuration) for configuration in configurations]
        results = [future.result() for future in futures]
        seconds = time.perf_counter() - start
        _expect(jobs, len(results))
        return seconds / jobs

    def loop(self, jobs: int) -> float:
        submit = self._executor.submit
        pending: set[Future[float]] = {submit(noop, {"x": number}) for number in range(self._workers)}
        count = 0
        start = time.perf_counter()
        while count < jobs:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for _ in done:
                pending.add(submit(noop, {"x": count}))
            count += len(done)
        seconds = time.perf_counter() - start
        _expect(self._workers, len(wait(pending).done))
        return seconds / count

    def close(self) -> None:
        self._executor.shutdown()


class BareThreadPool(_BareExecutor):
    """``concurrent.futures.ThreadPoolExecutor``."""

    def __init__(self, workers: int = 2) -> None:
        super().__init__(ThreadPoolExecutor(workers), workers)


class BareProcessPool(_BareExecutor):
    """``concurrent.futures.ProcessPoolExecutor``, with the start method that is the platform's own."""

    def __init__(self, workers: int = 2) -> None:
        super().__init__(ProcessPoolExecutor(workers), workers)


class BareLoky(_BareExecutor):
    """Loky's executor."""

    def __init__(self, workers: int = 2) -> None:
        from loky import ProcessPoolExecutor as LokyExecutor

        super().__init__(LokyExecutor(workers), workers)


class Joblib:
    """``joblib.Parallel`` with its defaults: processes of loky, and batches that size themselves.

    Args:
        workers: how many processes.
        anew: call ``Parallel(n_jobs=…)(…)`` each time, as its documentation does in nearly all its examples: the
            workers stay for the next call, how large a batch should be does not. False: use one as a context.
    """

    def __init__(self, workers: int = 2, *, anew: bool = False) -> None:
        from joblib import Parallel

        self._workers, self._anew = workers, anew
        self._parallel = Parallel(n_jobs=workers).__enter__()

    def flood(self, jobs: int) -> float:  # noqa: D102
        from joblib import Parallel, delayed

        configurations = [{"x": number} for number in range(jobs)]
        call = delayed(noop)
        start = time.perf_counter()
        parallel = Parallel(n_jobs=self._workers) if self._anew else self._parallel
        results = parallel(call(configuration) for configuration in configurations)
        seconds = time.perf_counter() - start
        _expect(jobs, len(results))
        return seconds / jobs

    def loop(self, jobs: int) -> float:
        """Joblib has no such loop: it gives results when all are there."""
        raise NotImplementedError

    def close(self) -> None:  # noqa: D102
        executor = self._parallel._backend._workers
        self._parallel.__exit__(None, None, None)
        executor.terminate()  # it would live on, and be cleaned away at an exit that these interpreters do not have


def _expect(wanted: int, got: int) -> None:
    """A figure for work that was not done is worth nothing."""
    if got != wanted:
        raise RuntimeError(f"{got} jobs came back where {wanted} were in flight")
