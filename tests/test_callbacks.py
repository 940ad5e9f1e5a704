from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import paraval.callback
from paraval import Evaluator, RunningJob
from paraval.callback import Callback, CSVLoggerCallback, LoggerCallback, SearchEarlyStopping, TqdmCallback
from paraval.errors import MissingExtraError, ParavalError
from paraval.job import HPOJob, Job
from paraval.outcome import JobError, Outcome
from support import until

J = TypeVar("J", bound=Job)
RAISED = JobError("exception", "bad\nvalue", type="ValueError")
CANCELLED = JobError("cancelled", "the evaluator was closed")

needs_tqdm = pytest.mark.skipif(
    importlib.util.find_spec("tqdm") is None, reason="tqdm is not installed (extra 'progress')"
)
needs_moocore = pytest.mark.skipif(
    importlib.util.find_spec("moocore") is None, reason="moocore is not installed (extra 'moo')"
)


def settled(job: J, result: Any) -> J:
    """End a job with a result, or with a failure when the result is a JobError."""
    job.settle(Outcome(error=result) if isinstance(result, JobError) else Outcome(result))
    return job


def hpo(result: Any, number: int = 0) -> HPOJob:
    return settled(HPOJob(f"0.{number}", {"x": number}), result)


def plain(result: Any, number: int = 0) -> Job:
    return settled(Job(f"0.{number}", {"x": number}), result)


def without(module: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python where a module cannot be imported."""
    source = str(Path(paraval.callback.__file__).parents[1])
    code = f"import sys; sys.modules[{module!r}] = None\n" + code
    environment = os.environ | {"PYTHONPATH": source}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "make",
    [
        Callback,
        LoggerCallback,
        pytest.param(TqdmCallback, marks=needs_tqdm),
        lambda: SearchEarlyStopping(patience=2),
        CSVLoggerCallback,
    ],
)
@pytest.mark.parametrize("job_class", [Job, HPOJob])
def test_every_callback_takes_every_kind_of_job(
    make: Callable[[], Callback], job_class: type[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = make()
    results = [1.0, "F_oom", RAISED, CANCELLED, (1.0, 2.0), ("F", 1.0), {"objective": 3}, None]
    jobs = [settled(job_class(f"0.{number}", {"x": number}), result) for number, result in enumerate(results)]
    for job in jobs:
        callback.on_launch(job_class(job.id, job.args))
        callback.on_done(job)
        callback.on_done_other(job)
    callback.on_gather(jobs, [])
    callback.on_gather([], jobs)
    callback.on_close()


# -- LoggerCallback ----------------------------------------------------------------------------------------------------


def logged(capsys: pytest.CaptureFixture[str], *jobs: Job) -> list[str]:
    callback = LoggerCallback()
    for job in jobs:
        callback.on_done(job)
    return capsys.readouterr().out.splitlines()


def test_logger_shows_the_best_so_far_and_failures_with_their_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, hpo(RAISED), hpo(0.5), hpo("F_oom"), hpo(-1), hpo(CANCELLED), hpo(0.75)) == [
        "[00001] -- Last Failure: F_ValueError -- bad value",
        "[00002] -- Maximum Objective: 0.50000 -- Last Objective: 0.50000",
        "[00003] -- Last Failure: F_oom",
        "[00004] -- Maximum Objective: 0.50000 -- Last Objective: -1.00000",
        "[00005] -- Last Failure: F_cancelled -- the evaluator was closed",
        "[00006] -- Maximum Objective: 0.75000 -- Last Objective: 0.75000",
    ]


def test_logger_shows_the_output_of_plain_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    lines = logged(capsys, plain({"a": 1}), plain(RAISED), plain("x\n" * 1000))
    assert lines[0] == "[00001] -- Last Output: {'a': 1}"
    assert lines[1] == "[00002] -- Last Failure: F_ValueError -- bad value"
    assert len(lines) == 3
    assert len(lines[2]) < 80


@needs_moocore
def test_logger_shows_the_hypervolume_of_several_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    # Above the worst of each objective, (0, 0), the union of 3x1 and 1x2 has the area 4; above (-1, -1) it is 10.
    jobs = [hpo(value) for value in ((0, 0), (3, 1), (1, 2), ("F", 1.0), (0.5, 0.123456), (-1, -1))]
    assert logged(capsys, *jobs) == [
        "[00001] -- HVI Objective: 0.00000 -- Last Objective: (0.0, 0.0)",
        "[00002] -- HVI Objective: 3.00000 -- Last Objective: (3.0, 1.0)",
        "[00003] -- HVI Objective: 4.00000 -- Last Objective: (1.0, 2.0)",
        "[00004] -- Last Failure: ('F', 1.0)",
        "[00005] -- HVI Objective: 4.00000 -- Last Objective: (0.5, 0.12346)",
        "[00006] -- HVI Objective: 10.00000 -- Last Objective: (-1.0, -1.0)",
    ]


WITHOUT_MOOCORE = """
from paraval.callback import LoggerCallback, SearchEarlyStopping
from paraval.job import HPOJob
from paraval.outcome import Outcome

logger, stopping = LoggerCallback(), SearchEarlyStopping(2)
threshold = SearchEarlyStopping(1, threshold=1, verbose=False)
for objectives in [(0, 0), (3, 1), (1, 2), (1, 1), (3, 3), (3, 3), (3, 2)]:
    job = HPOJob("0.0", {})
    job.settle(Outcome(objectives))
    logger.on_done(job)
    stopping.on_done(job)
assert stopping.search_stopped
try:
    threshold.on_done(job)
    threshold.on_done(job)
except ImportError as exc:
    print(type(exc).__name__, exc)
"""


def test_without_moocore_the_front_is_counted() -> None:
    child = without("moocore", WITHOUT_MOOCORE)
    assert child.stderr == ""
    assert child.stdout.splitlines() == [
        "[00001] -- Front: 1 non-dominated -- Last Objective: (0.0, 0.0)",
        "[00002] -- Front: 1 non-dominated -- Last Objective: (3.0, 1.0)",
        "Objective has improved from 1 non-dominated -> 1 non-dominated",
        "[00003] -- Front: 2 non-dominated -- Last Objective: (1.0, 2.0)",
        "Objective has improved from 1 non-dominated -> 2 non-dominated",
        "[00004] -- Front: 2 non-dominated -- Last Objective: (1.0, 1.0)",
        "[00005] -- Front: 1 non-dominated -- Last Objective: (3.0, 3.0)",
        "Objective has improved from 2 non-dominated -> 1 non-dominated",
        "[00006] -- Front: 1 non-dominated -- Last Objective: (3.0, 3.0)",
        "[00007] -- Front: 1 non-dominated -- Last Objective: (3.0, 2.0)",
        "Stopping the search because it did not improve for the last 2 evaluations!",
        "MissingExtraError the hypervolume needs moocore, which is not installed: pip install 'paraval[moo]'",
    ]


def test_logger_counts_right_from_several_threads(capsys: pytest.CaptureFixture[str]) -> None:
    callback = LoggerCallback()
    jobs = [hpo(float(number)) for number in range(50)]

    def report() -> None:
        for job in jobs:
            callback.on_done(job)

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = [int(line[1:6]) for line in capsys.readouterr().out.splitlines()]
    assert numbers == list(range(1, 201))


# -- TqdmCallback ------------------------------------------------------------------------------------------------------


@needs_tqdm
def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    callback = TqdmCallback("digits")
    callback.set_max_evals(3)
    for job in (hpo(0.25), hpo("F_oom")):
        callback.on_done(job)
    callback.on_done_other(hpo(0.5))
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert shown.endswith("\n")  # full, so it was closed
    assert shown.startswith("digits: 100%")
    assert "3/3" in shown
    assert "objective=0.50000, failures=1" in shown

    callback.set_max_evals(-1)  # no limit; what is counted in the bar begins anew
    callback.on_done(hpo(0.75))
    callback.on_close()
    callback.on_close()
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert shown.startswith("digits: 1it")
    assert "objective=0.75000, failures=1" in shown


@needs_tqdm
def test_progress_bar_of_plain_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    callback = TqdmCallback()
    callback.on_done(plain({"a": 1}))
    callback.on_done(plain(RAISED))
    callback.on_close()
    shown = capsys.readouterr().err.rpartition("\r")[2]
    assert shown.startswith("2it")
    assert "failures=1" in shown
    assert "objective" not in shown


def test_a_missing_tqdm_is_an_error_that_names_the_extra() -> None:
    child = without(
        "tqdm",
        "from paraval.callback import TqdmCallback\n"
        "try: TqdmCallback()\n"
        "except ImportError as exc: print(type(exc).__name__, exc)",
    )
    assert child.stderr == ""
    assert child.stdout == (
        "MissingExtraError TqdmCallback needs tqdm, which is not installed: pip install 'paraval[progress]'\n"
    )
    assert issubclass(MissingExtraError, ImportError)


# -- SearchEarlyStopping -----------------------------------------------------------------------------------------------


def stopped_after(callback: SearchEarlyStopping, results: list[Any]) -> int | None:
    """Count the jobs after which the search stopped."""
    for count, result in enumerate(results, 1):
        callback.on_done(result if isinstance(result, Job) else hpo(result))
        if callback.search_stopped:
            return count
    return None


@pytest.mark.parametrize(
    ("results", "count"),
    [
        ([1, 0, 0, 0, 0], 4),
        ([1, 0, 0, 2, 0, 0, 0], 7),
        ([1, 1, 1, 1], 4),  # as good is no better
        ([1, "F", RAISED, "F"], 4),
        (["F", "F", "F", "F"], 4),  # the first does not count
        (["F", "F", "F", -5, 0, 1], None),
        ([1, 0, 0, *[CANCELLED] * 5], None),
        ([plain(0)] * 9, None),
        ([(1, 1), (0, 0), (1, 1), (1, 0)], 4),
        ([(1, 1), (0, 2), (0, 3), (0, 4), (2, 0)], None),
        ([(1, 1), 5, (6, 6, 6), 7], 4),  # another number of objectives cannot be compared
    ],
)
def test_the_search_stops_when_patience_ends(results: list[Any], count: int | None) -> None:
    assert stopped_after(SearchEarlyStopping(patience=3, verbose=False), results) == count


def test_the_search_does_not_stop_below_the_threshold() -> None:
    assert stopped_after(SearchEarlyStopping(2, threshold=5.0), [4, 0, 0, 0, 0, 5, 0, 0, 0]) is None
    assert stopped_after(SearchEarlyStopping(2, threshold=5.0), [4, 0, 0, 0, 0, 6, 0, 0, 0]) == 8
    assert stopped_after(SearchEarlyStopping(2, threshold=5.0), ["F"] * 9) is None


@needs_moocore
def test_a_threshold_for_several_objectives_is_a_hypervolume() -> None:
    results = [(0, 0), (3, 1), (0, 0), (0, 0)]
    assert stopped_after(SearchEarlyStopping(1, threshold=2.9), results) == 3
    assert stopped_after(SearchEarlyStopping(1, threshold=3.1), results) is None


def test_an_objective_function_decides_and_takes_plain_jobs() -> None:
    callback = SearchEarlyStopping(2, objective_func=lambda job: None if job.error else -job.output["loss"])
    jobs = [plain({"loss": loss}) for loss in (3, 2, 2, 2)]
    assert stopped_after(callback, [jobs[0], plain(RAISED), *jobs[1:]]) == 5


def test_early_stopping_says_what_it_does_once(capsys: pytest.CaptureFixture[str]) -> None:
    callback = SearchEarlyStopping(patience=1)
    for result in ("F", 1, 2.5, 0, 0, 0):
        callback.on_done(hpo(result))
    assert capsys.readouterr().out.splitlines() == [
        "Objective has improved from -inf -> 1.00000",
        "Objective has improved from 1.00000 -> 2.50000",
        "Stopping the search because it did not improve for the last 1 evaluations!",
    ]
    with pytest.raises(ValueError, match="patience must be at least 1, not 0"):
        SearchEarlyStopping(0)


# -- CSVLoggerCallback -------------------------------------------------------------------------------------------------


def ids(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    column = lines[0].split(",").index("job_id")
    return [line.split(",")[column] for line in lines[1:]]


def test_csv_on_its_default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = CSVLoggerCallback()
    callback.on_gather([hpo(1.0, 0)], [hpo(2.0, 1)])
    assert callback.path == str(tmp_path / "results.csv")
    assert Path("results.csv").read_bytes() == b"p:x,objective,job_id,job_status\r\n0,1.0,0,DONE\r\n1,2.0,1,DONE\r\n"


def test_csv_writes_each_job_once_and_the_ungathered_at_the_close(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    callback = CSVLoggerCallback(path)
    jobs = [hpo(float(number), number) for number in range(4)]
    for job in jobs[:3]:
        callback.on_done(job)
    callback.on_done_other(jobs[3])
    callback.on_gather([jobs[1]], [])
    assert ids(path) == ["1"]
    callback.on_close()
    callback.on_close()
    assert ids(path) == ["1", "0", "2", "3"]


def test_csv_of_several_evaluators_has_each_job_once(tmp_path: Path) -> None:
    """The close of the first writes what the others have done and nobody has gathered yet."""
    path = tmp_path / "r.csv"
    callback = CSVLoggerCallback(path)
    evaluators = [Evaluator.create(lambda job: job["x"], "thread", {"callbacks": [callback]}) for _ in range(3)]
    for number, evaluator in enumerate(evaluators):
        evaluator.submit([{"x": 10 * number + x} for x in range(3)])
    until(lambda: all(evaluator.statistics().done == 3 for evaluator in evaluators))
    for evaluator in evaluators:
        evaluator.gather("ALL")
        evaluator.close()
    column = path.read_text().splitlines()[0].split(",").index("p:x")
    rows = [int(line.split(",")[column]) for line in path.read_text().splitlines()[1:]]
    assert sorted(rows) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_csv_keeps_an_existing_file_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("precious")
    callback = CSVLoggerCallback(path)
    callback.on_gather([hpo(1.0)], [])
    assert callback.kept_as == f"{path}.1"
    assert Path(callback.kept_as).read_text() == "precious"


def test_csv_into_a_missing_directory_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist") as caught:
        CSVLoggerCallback(tmp_path / "nowhere" / "r.csv")
    assert isinstance(caught.value, ParavalError)


# -- in a real evaluator, and the module itself ------------------------------------------------------------------------


def test_in_an_evaluator(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    def run(job: RunningJob) -> float:
        if job["x"] == 2:
            raise ValueError("two is bad")
        return float(job["x"])

    path = tmp_path / "r.csv"
    callbacks = [LoggerCallback(), SearchEarlyStopping(2), CSVLoggerCallback(path)]
    options = {"num_workers": 2, "callbacks": callbacks, "job_class": HPOJob}
    with caplog.at_level(logging.WARNING), Evaluator.create(run, "thread", options) as evaluator:
        evaluator.submit([{"x": x} for x in range(10)])
        assert len(evaluator.gather("ALL")) == 10
        assert sorted(map(int, ids(path))) == list(range(10))
    assert not caplog.records  # no callback raised
    assert "F_ValueError" in path.read_text()
    lines = capsys.readouterr().out.splitlines()
    assert [line[10:] for line in lines if "Failure" in line] == [" Last Failure: F_ValueError -- two is bad"]


def test_importing_the_module_is_cheap() -> None:
    heavy = {"anyio", "csv", "moocore", "numpy", "tqdm"}
    assert without("rich", f"import paraval.callback; print({heavy} & set(sys.modules))").stdout == "set()\n"


@pytest.mark.parametrize("method", ["thread", "process"])
def test_close_gives_back_what_it_cancelled_however_long_callbacks_take(method: str) -> None:
    heard = threading.Event()
    go_on = threading.Event()

    class Slow(Callback):
        def on_done(self, job: Job) -> None:
            if job.timing.started is None:
                heard.set()
                go_on.wait(30)

    function: Callable[[RunningJob], Any] = sleep_until_stopped
    evaluator = Evaluator.create(function, method, {"num_workers": 1, "kill_grace": 0.1, "callbacks": [Slow()]})
    evaluator.submit([{}] * 20)
    until(lambda: evaluator.statistics().running == 1)
    given_back = evaluator.close()
    assert heard.is_set()
    go_on.set()
    assert len({job.id for job in given_back}) == 20
    until(lambda: evaluator.statistics().cancelled == 20)


def sleep_until_stopped(job: RunningJob) -> None:
    while not job.stopped():
        time.sleep(0.005)


def test_to_gather_while_jobs_are_announced_is_refused() -> None:
    refused: list[str] = []

    class Gathers(Callback):
        def on_launch(self, job: Job) -> None:
            if job.args["x"] == 3:  # which need not wait for those that are announced
                assert len(evaluator.gather("BATCH", 2)) == 2
            if job.args["x"] == 4:  # nothing that a gather would wait for
                assert evaluator.gather("ALL") == []
                return
            with pytest.raises(ParavalError, match=r"gather\(\) in on_launch\(\) would wait") as caught:
                evaluator.gather("ALL")
            refused.append(str(caught.value))

    with Evaluator.create(lambda job: job["x"], "thread", {"callbacks": [Gathers()]}) as evaluator:
        evaluator.submit([{"x": 1}, {"x": 2}])
        evaluator.submit([{"x": 3}])
        assert [job.output for job in evaluator.gather("ALL")] == [3]
        assert evaluator.evaluate({"x": 4}).output == 4
    assert len(refused) == 3
