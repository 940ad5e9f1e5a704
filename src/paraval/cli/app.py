"""The commands: what they accept, and what their exit codes are."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from paraval.errors import ParavalError

if TYPE_CHECKING:
    from paraval.cli.sweep import Ending
    from paraval.cli.tally import Tally
    from paraval.evaluator import Evaluator

__all__ = ["run_command_line"]

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_command_line() -> int:
    """Parse ``sys.argv`` and run the command. What is wrong with the input is one line on stderr, and exit code 2."""
    _make_printable()
    try:
        code = cli.main(prog_name="paraval", standalone_mode=False)
    except click.Abort:
        return EXIT_INTERRUPTED
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "paraval"
        return _error(f"{exc.format_message()} (see '{command} --help')")
    except (click.ClickException, ParavalError) as exc:
        return _error(exc.format_message() if isinstance(exc, click.ClickException) else str(exc))
    except BrokenPipeError:  # of --help or backends, into a pager that was left
        _drop_stdout()
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, wanted: _print_version(context) if wanted else None,
    help="Show the version and exit.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Run expensive functions in parallel, and lose no result.

    \b
    paraval run sweep.py:train --configs configs.csv --num-workers 4
    paraval backends
    """  # noqa: D301 - \b is the character by which click knows lines that must not be joined
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


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


@cli.command(short_help="Evaluate a function on every configuration of a file.")
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
    "-o", "--output", metavar="CSV", default="results.csv", show_default=True, help="One row per job, as it ends."
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
@click.option("--strict", is_flag=True, help="Exit 1 unless every configuration succeeded.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def run(
    target: str,
    file: str,
    method: str | None,
    num_workers: int | None,
    timeout: float | None,
    job_timeout: float | None,
    output: str,
    settings: dict[str, Any],
    strict: bool,
    quiet: bool,
) -> int:
    """Evaluate TARGET on every configuration of FILE, in parallel.

    TARGET is path/to/file.py:function or package.module:function. The function takes a job, finds its configuration in
    job.parameters, and returns its objective: a number (larger is better), several, or "F_reason" for a failure.

    \b
    paraval run train.py:run --configs configs.jsonl --num-workers 4 --output results.csv
    paraval run train.py:run --configs - --set epochs=3 < configs.csv

    A file that is in the way of the output is kept beside it. Ctrl-C ends the sweep: what is finished is in the output
    and in the summary; a second Ctrl-C ends it at once.

    Exit codes: 0 the sweep came to its end, or to the end of its --timeout, and something succeeded; 1 nothing
    succeeded, or not everything under --strict, or the output could not be written; 2 bad input; 130 Ctrl-C; 143
    SIGTERM.
    """  # noqa: D301 - as above
    from paraval import registry
    from paraval.cli.configs import read_configs
    from paraval.cli.progress import show_progress
    from paraval.cli.summary import print_summary
    from paraval.cli.sweep import run_sweep
    from paraval.cli.tally import Tally
    from paraval.cli.target import check_call, load_target
    from paraval.csvlog import CSVLog

    if method is not None:
        registry.method(method)  # first, as it takes no time
    configs = read_configs(file)
    run_function = load_target(target)
    check_call(target, run_function, settings)
    if method is None:
        method = registry.default_method(run_function)
    num_workers = num_workers or _usable_cpus()
    evaluator = _evaluator(
        run_function, method, num_workers=num_workers, run_function_kwargs=settings, job_timeout=job_timeout
    )
    # Every parameter gets a column, also one that the first configurations lack. The path is checked here.
    log = CSVLog(output, error_column=True, parameters=dict.fromkeys(key for config in configs for key in config))
    evaluator.timeout = timeout
    tally = Tally(len(configs), job_timeout)
    ending = run_sweep(evaluator, configs, log, tally, show_progress(quiet=quiet))
    try:
        print_summary(
            tally,
            method=method,
            num_workers=num_workers,
            wall_time=ending.wall_time,
            utilisation=ending.utilisation,
            ending=_why_early(ending, tally, timeout),
            results=_where(output, tally, log.kept_as),
        )
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough; the results are on disk
        _drop_stdout()
    if ending.error is not None:
        _error(ending.error)
    code = _exit_code(ending, tally, strict=strict)
    if ending.signal is not None or not ending.closed or tally.stopped:
        _exit_now(code)
    return code


@cli.command(short_help="List the methods, and what each can do.")
def backends() -> None:
    """List every method: whether it is ready here, what to install when not, and what it can do."""
    from paraval.cli.backends import print_backends

    print_backends()


def _print_version(context: click.Context) -> None:
    import importlib.metadata

    try:
        version = importlib.metadata.version("paraval")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        version = "(not installed, so without a version)"
    click.echo(f"paraval {version}")
    context.exit()


def _evaluator(run_function: Any, method: str, **kwargs: Any) -> Evaluator:
    from paraval import Evaluator, HPOJob

    try:
        return Evaluator.create(run_function, method=method, method_kwargs={"job_class": HPOJob, **kwargs})
    except ParavalError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as exc:  # of a method that another package brought
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


def _where(output: str, tally: Tally, kept_as: object) -> str:
    rows = f"{tally.finished} row{'s' if tally.finished != 1 else ''}"
    return f"{output} ({rows}{f'; the file that was there is now {kept_as}' if kept_as else ''})"


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


def _error(message: str) -> int:
    """Print it as one line, whatever line ends are in it."""
    click.echo(f"paraval: error: {'; '.join(filter(None, map(str.strip, message.splitlines())))}", err=True)
    return EXIT_BAD_INPUT


def _make_printable() -> None:
    """Let no character that the terminal's encoding lacks, and no closed stream, end a sweep."""
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _drop_stdout() -> None:
    # The interpreter flushes stdout once more when it exits, and would complain about the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
