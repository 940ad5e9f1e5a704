"""The command ``paraval run``: its options, what it refuses before the first job runs, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import click

from paraval.cli.messages import EXIT_FAILED, drop_stdout, interrupted, say, say_error
from paraval.errors import BadValueError, ParavalError

if TYPE_CHECKING:
    from paraval.cli.configs import Configs
    from paraval.cli.output import OutputGuard
    from paraval.cli.sweep import Ending
    from paraval.cli.tally import Tally
    from paraval.csvlog import CSVLog
    from paraval.evaluator import Evaluator
    from paraval.storage import Storage

__all__ = ["run"]


_OPTIONS: Final = {
    "num_workers": "--num-workers",
    "job_timeout": "--job-timeout",
    "run_function_kwargs": "--set",
    "storage": "--storage",
    "search_id": "--search",
    "resume": "--resume",
}
"""Arguments of evaluators, and the options that give them."""
_FOR_PROGRAMS: Final = frozenset({"run_function", "job_class", "callbacks"})


def _seconds(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    """Read a positive number of seconds."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is not a number of seconds") from None
    if not (math.isfinite(seconds) and seconds > 0):
        raise click.BadParameter(f"'{text}' must be a positive number of seconds")
    return seconds


def _settings(_context: click.Context, _option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """Read ``key=value``: the value is JSON if it can be read as JSON, else a string."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"'{text}' must be KEY=VALUE, and KEY the name of an argument")
        try:
            settings[key] = json.loads(value)
        except (ValueError, RecursionError):
            settings[key] = value
    return settings


@click.command(short_help="Evaluate a function on every configuration of a file.")
@click.argument("target")
@click.option(
    "-c", "--configs", "file", metavar="FILE", required=True, help="CSV, JSON (a list) or JSON Lines; - for stdin."
)
@click.option(
    "-m", "--method", help="See 'paraval backends'. [default: serial for an async function, else the strongest here]"
)
@click.option(
    "-n", "--num-workers", type=click.IntRange(min=1), metavar="N", help="Jobs at a time. [default: the usable CPUs]"
)
@click.option("--timeout", callback=_seconds, metavar="S", help="Seconds for the sweep; then the rest is cancelled.")
@click.option("--job-timeout", callback=_seconds, metavar="S", help="Seconds for each job.")
@click.option(
    "-o",
    "--output",
    metavar="CSV",
    default="results.csv",
    show_default=True,
    help="One row per job, as it ends; - for stdout, all at the end.",
)
@click.option(
    "-s",
    "--set",
    "settings",
    callback=_settings,
    metavar="KEY=VALUE",
    multiple=True,
    help="Argument of every call. JSON or a string; repeatable.",
)
@click.option(
    "-e",
    "--evaluator",
    "arguments",
    callback=_settings,
    metavar="KEY=VALUE",
    multiple=True,
    help="Argument of the evaluator, such as max_attempts=3. JSON or a string; repeatable.",
)
@click.option("--storage", metavar="URL", help="Where jobs are recorded as well, such as sqlite:///campaign.db.")
@click.option("--search", metavar="ID", help="The search in the storage to submit to. [default: a new one]")
@click.option("--resume", is_flag=True, help="Go on with a search: what has a result there is not run again.")
@click.option("--strict", is_flag=True, help="Exit 1 unless every configuration succeeded.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def run(**options: Any) -> int:
    """Evaluate TARGET on every configuration of FILE, in parallel.

    TARGET is path/to/file.py:function or package.module:function. The function takes a job, finds its configuration in
    job.parameters, and returns its objective: a number (larger is better), several, or "F_reason" for a failure.

    \b
    paraval run train.py:run --configs configs.jsonl --num-workers 4 --output results.csv
    paraval run train.py:run --configs - --set epochs=3 < configs.csv
    paraval run train.py:run --configs configs.csv --storage sqlite:///campaign.db --resume

    A file that is in the way of the output is kept beside it. Ctrl-C ends the sweep: what is finished is in the output
    and in the summary; a second Ctrl-C ends it at once.

    Exit codes: 0 the sweep came to its end, or to the end of its --timeout, and something succeeded; 1 nothing
    succeeded, or not everything under --strict, or the output could not be written; 2 bad input; 130 Ctrl-C; 143
    SIGTERM.
    """  # noqa: D301 - \b is the character by which click knows lines that must not be joined
    from paraval.cli.output import OutputGuard, is_stdout

    asked = _Options(**options)
    results_on_stdout = is_stdout(asked.output)
    if results_on_stdout and sys.__stdout__ is None:
        raise click.UsageError("--output names stdout, which is closed")
    with OutputGuard(results_on_stdout=results_on_stdout) as guard:
        try:
            sweep = _prepare(asked, results_on_stdout=results_on_stdout)
        except KeyboardInterrupt:
            return interrupted(" before the first job was started")
        code, at_once = _carry_out(sweep, guard)
    if at_once:
        _exit_now(code)
    return code


class _Options(NamedTuple):
    """The command's parameters, as click has read them."""

    target: str
    file: str
    method: str | None
    num_workers: int | None
    timeout: float | None
    job_timeout: float | None
    output: str
    settings: dict[str, Any]
    arguments: dict[str, Any]
    storage: str | None
    search: str | None
    resume: bool
    strict: bool
    quiet: bool


class _Prepared(NamedTuple):
    """All that a sweep needs; nothing has run yet."""

    options: _Options
    configs: Configs
    evaluator: Evaluator
    method: str
    log: CSVLog
    results: _Results
    storage: str | None


class _Results:
    """Where the rows are on disk, and where they are to be in the end.

    Rows for stdout are in a file of their own until the sweep is over, so that a crash loses none of them.
    """

    def __init__(self, output: str, *, on_stdout: bool) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="paraval-results-")) if on_stdout else None
        self.path = output if self._folder is None else str(self._folder / "results.csv")

    def deliver(self, guard: OutputGuard, rows: int) -> str:
        """Write to stdout what is for stdout; say where the results are."""
        if self._folder is None or not rows:
            self.discard()
            return self.path
        try:
            guard.write_results(Path(self.path))
        except OSError as exc:
            why = "its reader left" if isinstance(exc, BrokenPipeError) else exc.strerror
            return f"{self.path}, as stdout did not take all of them: {why}"
        except KeyboardInterrupt:
            say(f"the results are in {self.path}")
            raise
        self.discard()
        return "stdout"

    def discard(self) -> None:
        """Remove the file that was made on the way to stdout."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _prepare(options: _Options, *, results_on_stdout: bool) -> _Prepared:
    """Read and check everything, the output included.

    Raises:
        ParavalError: bad input; one line says what.
        click.UsageError: likewise.
    """
    from paraval import registry
    from paraval.cli.configs import read_configs
    from paraval.cli.target import check_call, file_of, load_target
    from paraval.csvlog import CSVLog

    if options.method is not None:
        _refuse_what_needs_a_program(registry.method(options.method))  # first, as it takes no time
    if not results_on_stdout:
        _refuse_to_replace(options.output, "--configs", "/dev/stdin" if options.file == "-" else options.file)
        _refuse_to_replace(options.output, "stdout", "/dev/stdout")
    configs = read_configs(options.file)
    run_function = load_target(options.target)
    if not results_on_stdout and (source := file_of(run_function)) is not None:
        _refuse_to_replace(options.output, "TARGET", source)
    check_call(options.target, run_function, options.settings)
    _refuse_what_is_not_for_here(options.arguments)
    kwargs, storage = _storage(options, results_on_stdout=results_on_stdout)
    method = options.method or registry.default_method(run_function)
    evaluator = _evaluator(
        run_function,
        method,
        num_workers=options.num_workers or _usable_cpus(),
        run_function_kwargs=options.settings,
        job_timeout=options.job_timeout,
        storage_url=options.storage,
        **kwargs,
        **options.arguments,
    )
    if storage is not None:
        storage = f"{storage}, search {evaluator.search_id}"
    results = _Results(options.output, on_stdout=results_on_stdout)
    try:
        # Every parameter gets a column, also one that the first configurations lack. The path is checked here.
        parameters = dict.fromkeys(key for config in configs for key in config)
        log = CSVLog(results.path, error_column=True, parameters=parameters, late_columns=True)
    except BaseException:
        results.discard()
        raise
    return _Prepared(options, configs, evaluator, method, log, results, storage)


def _carry_out(sweep: _Prepared, guard: OutputGuard) -> tuple[int, bool]:
    """Run the sweep and show what it came to.

    Returns:
        The exit code, and whether only ``os._exit`` gets past what may still run.
    """
    from paraval.cli.progress import show_progress
    from paraval.cli.summary import print_summary
    from paraval.cli.sweep import run_sweep
    from paraval.cli.tally import Tally
    from paraval.storage.urls import hide_secrets, sqlite_path

    options, evaluator, log = sweep.options, sweep.evaluator, sweep.log
    evaluator.timeout = options.timeout
    tally = Tally(len(sweep.configs), options.job_timeout)
    progress = show_progress(quiet=options.quiet)
    ending = run_sweep(evaluator, sweep.configs, log, tally, progress, on_signal=guard.hurry)
    if ending.error is not None and options.storage is not None and sqlite_path(options.storage) is None:
        ending = ending._replace(error=hide_secrets(ending.error, options.storage))
    code = _exit_code(ending, tally, strict=options.strict)
    where = sweep.results.deliver(guard, tally.finished)
    try:
        print_summary(
            tally,
            method=sweep.method,
            num_workers=evaluator.num_workers,
            wall_time=ending.wall_time,
            utilisation=ending.utilisation,
            storage=sweep.storage,
            ending=_why_early(ending, tally, options.timeout),
            results=_and_how_many(where, tally, log.kept_as),
        )
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough; the results are on disk
        drop_stdout()
    except OSError as exc:
        drop_stdout()
        say_error(f"the summary could not be written: {exc.strerror or exc}; the results are in {where}")
        code = code or EXIT_FAILED
    if ending.error is not None:
        say_error(ending.error)
    if ending.closed:
        evaluator.storage.close()
    return code, ending.signal is not None or not ending.closed or tally.stopped > 0


def _refuse_what_needs_a_program(method: Any) -> None:
    if method.argument is not None:
        raise BadValueError(
            f"the method '{method.name}' cannot be used from the command line: it needs the argument "
            f"'{method.argument}', which only a program can give it; see 'paraval backends' for the others"
        )


def _refuse_what_is_not_for_here(arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name in _OPTIONS:
            raise click.UsageError(f"--evaluator {name}=…: there is an option for it, {_OPTIONS[name]}")
        if name in _FOR_PROGRAMS:
            raise click.UsageError(f"--evaluator {name}=…: a sweep has its own; only a program can choose")


def _refuse_to_replace(output: str, what: str, path: str) -> None:
    """Refuse an output that is in use: it would be renamed, and a file of results would take its place."""
    from paraval.cli.stored import is_same_file

    if is_same_file(output, path) and not Path(output).is_char_device():
        raise BadValueError(f"--output {output} is the file of {what}: name another file for the results")


def _storage(options: _Options, *, results_on_stdout: bool) -> tuple[dict[str, Any], str | None]:
    """Open the storage.

    Returns:
        Keyword arguments for the evaluator, and the storage as it may be shown.
    """
    if options.storage is None:
        for name in ("search", "resume"):
            if getattr(options, name):
                raise click.UsageError(f"--{name} needs --storage URL, which says where the search is kept")
        return {}, None
    from paraval.cli.stored import files_at, open_existing, told_of_storage
    from paraval.storage.urls import open_storage, sqlite_path, without_secrets

    path = sqlite_path(options.storage)
    if path is not None and not results_on_stdout:
        for file in files_at(path):
            _refuse_to_replace(options.output, "--storage", str(file))
    shown = options.storage if path is not None else without_secrets(options.storage)
    with told_of_storage(options.storage, "opened"):
        # Where a search is named, there is one: at a mistyped path no empty store shall be made.
        of_search = path is not None and options.search is not None
        storage = (open_existing if of_search else open_storage)(options.storage)
    search = options.search
    if options.resume and search is None:
        with told_of_storage(options.storage, "read"):
            search, is_new = _only_search(storage)
        if is_new:
            say(f"there is nothing to resume in {shown} yet: a search begins there")
    return {"storage": storage, "search_id": search, "resume": options.resume and search is not None}, shown


def _only_search(storage: Storage) -> tuple[str | None, bool]:
    """Give the search to go on with where none is named, and whether it begins now.

    It is the only one that has jobs. Where none has, it is the oldest: of several programs that begin at the same
    moment each may make one, and all of them take the same. It is None where the storage keeps none.

    Raises:
        ValueError: there are several.
    """
    from paraval.cli.stored import not_empty

    known = storage.search_ids()
    if len(known) == 1:
        return known[0], False
    found = not_empty(storage, known, 2)
    if len(found) > 1:
        raise BadValueError(
            f"the storage holds {len(known)} searches ({', '.join(known[:8])}{', …' if len(known) > 8 else ''}): "  # noqa: PLR2004 - enough to choose from
            "name the one to go on with by --search ID"
        )
    if found:
        return found[0], False
    if not known:
        storage.new_search()
    return next(iter(storage.search_ids()), None), True


def _evaluator(run_function: Any, method: str, *, storage_url: str | None, **kwargs: Any) -> Evaluator:
    from paraval import Evaluator, HPOJob
    from paraval.cli.stored import told_of_storage

    try:
        return Evaluator.create(run_function, method=method, method_kwargs={"job_class": HPOJob, **kwargs})
    except ParavalError:
        raise
    except Exception as exc:
        if storage_url is not None and not type(kwargs["storage"]).__module__.startswith("paraval."):
            with told_of_storage(storage_url, f"used (by the method '{method}')"):
                raise
        if not isinstance(exc, ImportError | OSError | TypeError | ValueError):
            raise
        # of a method that another package brought
        raise click.UsageError(f"the method '{method}' cannot be used: {type(exc).__name__}: {exc}") from exc


def _usable_cpus() -> int:
    """CPUs that this process may use, which in a container or under a batch system is less than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _why_early(ending: Ending, tally: Tally, timeout: float | None) -> str | None:
    if ending.signal is not None:
        return "Ctrl-C" if ending.signal.name == "SIGINT" else ending.signal.name
    if ending.error is not None:
        return ending.error
    if timeout is not None and tally.succeeded + tally.failed < tally.total:
        return f"--timeout {timeout:g} ran out"
    return None


def _and_how_many(where: str, tally: Tally, kept_as: object) -> str:
    rows = f"{tally.finished} row{'s' if tally.finished != 1 else ''}"
    return f"{where} ({rows}{f'; the file that was there is now {kept_as}' if kept_as else ''})"


def _exit_code(ending: Ending, tally: Tally, *, strict: bool) -> int:
    if ending.signal is not None:
        return 128 + ending.signal
    if ending.error is not None or tally.succeeded == 0 or (strict and tally.succeeded < tally.total):
        return EXIT_FAILED
    return 0


def _exit_now(code: int) -> NoReturn:
    """End the process although jobs that were stopped may still run.

    A call in a thread cannot be killed, and whatever it started itself (its own pools, threads that are no daemons)
    would be waited for by the interpreter's ordinary exit, for as long as it likes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
