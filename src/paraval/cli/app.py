"""The commands, and how each of them ends when something is wrong."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final, TextIO

import click

from paraval.cli.messages import EXIT_FAILED, FailedError, drop_stdout, interrupted, say_error
from paraval.cli.run import run
from paraval.cli.storages import export, jobs, searches
from paraval.errors import ParavalError

__all__ = ["run_command_line"]

_UNWRITABLE: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""What a full disk, a limit, a broken device and a stream opened for reading alone say; a pipe has its own error."""


def run_command_line() -> int:
    """Parse ``sys.argv`` and run the command. What is wrong with the input is one line on stderr, and exit code 2."""
    _make_printable()
    try:
        code = cli.main(prog_name="paraval", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:
        return interrupted()
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "paraval"
        return say_error(f"{exc.format_message()} (see '{command} --help')")
    except (click.ClickException, ParavalError) as exc:
        code = say_error(exc.format_message() if isinstance(exc, click.ClickException) else str(exc))
        return EXIT_FAILED if isinstance(exc, FailedError) else code
    except BrokenPipeError:  # of --help or backends, into a pager that was left
        drop_stdout()
        return EXIT_FAILED
    except OSError as exc:
        if exc.errno not in _UNWRITABLE or exc.filename is not None:
            raise
        drop_stdout()
        say_error(f"stdout cannot be written: {exc.strerror}")
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
    paraval jobs campaign.db
    paraval backends
    """  # noqa: D301 - \b is the character by which click knows lines that must not be joined
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (run, jobs, searches, export):
    cli.add_command(command)


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


def _make_printable() -> None:
    """Let no character that the terminal's encoding lacks, and no closed stream, end a sweep."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: or the next file that is opened would be taken for it, here and in worker processes
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = _writer_to(1)
    if sys.stderr is None:
        sys.stderr = _writer_to(2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _writer_to(number: int) -> TextIO:
    return os.fdopen(number, "w", encoding="utf-8", closefd=False)
