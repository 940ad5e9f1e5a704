"""A search in the classic form: ask, submit, gather, tell. It keeps every worker busy and starts from random points.

The optimiser here is as plain as can be: half of its points are drawn anywhere, half of them near the best so far. Any
other optimiser that can be asked for configurations and told their objectives fits in its place.
"""

from __future__ import annotations

import math
import random
from typing import Any

from paraval import Evaluator, HPOJob, RunningJob

WORKERS = 4
EVALUATIONS = 200


def run(job: RunningJob) -> float:
    """Evaluate a function with many local maxima (Ackley's, turned over); its best value is 0, at the origin."""
    x, y = job["x"], job["y"]
    slope = 20 * math.exp(-0.2 * math.sqrt((x**2 + y**2) / 2))
    waves = math.exp((math.cos(2 * math.pi * x) + math.cos(2 * math.pi * y)) / 2)
    return slope + waves - 20 - math.e


class RandomSearch:
    """Draws configurations, and remembers the best one."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.best: tuple[dict[str, float], float] = ({}, -math.inf)

    def ask(self, number: int) -> list[dict[str, Any]]:
        """Give the next ``number`` configurations."""
        return [self.near() if self.best[0] and self.draw.random() < 0.5 else self.anywhere() for _ in range(number)]

    def tell(self, configuration: dict[str, float], objective: float) -> None:
        """Take the objective of a configuration."""
        if objective > self.best[1]:
            self.best = (configuration, objective)

    def anywhere(self) -> dict[str, float]:
        """Draw from the whole space."""
        return {name: self.draw.uniform(-5, 5) for name in ("x", "y")}

    def near(self) -> dict[str, float]:
        """Draw close to the best so far."""
        return {name: self.draw.gauss(value, 0.3) for name, value in self.best[0].items()}


def main() -> None:
    """Run the search and print what it found."""
    search = RandomSearch(seed=1)
    with Evaluator.create(run, "thread", {"num_workers": WORKERS, "job_class": HPOJob}) as evaluator:
        evaluator.submit(search.ask(WORKERS))
        while evaluator.num_jobs_gathered < EVALUATIONS:
            jobs = evaluator.gather("BATCH", size=1)
            for job in jobs:
                # The objective of a failure is a string.
                if isinstance(job, HPOJob) and isinstance(job.objective, float):
                    search.tell(job.args, job.objective)
            evaluator.submit(search.ask(min(len(jobs), EVALUATIONS - evaluator.num_jobs_submitted)))
    configuration, objective = search.best
    print(f"best of {EVALUATIONS}: {objective:.4f} at x = {configuration['x']:.3f}, y = {configuration['y']:.3f}")


if __name__ == "__main__":
    main()
