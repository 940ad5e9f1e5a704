"""A driver that works on a search with others: the program of ``test_sharing.py``.

``sharing.py URL JOBS OTHERS``: runs so many jobs, and waits until it has seen so many of the others'.
"""

from __future__ import annotations

import json
import sys
import time

from paraval import Evaluator, RunningJob


def function(job: RunningJob) -> float:
    if job["x"] % 10 == 7:
        raise ValueError("it went wrong")
    return job["x"] * 0.5 if job["x"] % 10 else False


def main() -> None:
    url, jobs, others = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with Evaluator.create(function, "thread", {"num_workers": 2, "storage": url, "search_id": "0"}) as evaluator:
        mine = []
        seen = []
        for first in range(0, jobs, 50):  # one after the other, so that the drivers meet
            evaluator.submit([{"x": x} for x in range(first, first + 50)])
            mine += evaluator.gather("ALL")
            seen += evaluator.gather_other_jobs_done()
        deadline = time.monotonic() + 30
        while len(seen) < others and time.monotonic() < deadline:
            seen += evaluator.gather_other_jobs_done()
            time.sleep(0.01)  # the others are processes of their own, and tell nobody
    print(json.dumps({"mine": [job.id for job in mine], "seen": {job.id: [job.args["x"], job.output] for job in seen}}))


if __name__ == "__main__":
    main()
