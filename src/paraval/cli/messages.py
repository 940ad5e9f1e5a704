"""What commands say on stderr, and their exit codes."""

from __future__ import annotations

import os
import sys
from typing import Final

import click

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "FailedError",
    "drop_stdout",
    "interrupted",
    "printable",
    "say",
    "say_error",
]

EXIT_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130


class FailedError(click.ClickException):
    """What was asked for could not be done, though nothing is wrong with the input: exit code 1."""


def say(message: str) -> None:
    """Print it as one line, whatever line ends are in it."""
    click.echo(f"paraval: {printable('; '.join(filter(None, map(str.strip, message.splitlines()))))}", err=True)


def printable(text: str) -> str:
    """Write what a terminal would obey, or what would break a line, as its escape: a store may hold anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say_error(message: str) -> int:
    """Print it as an error; give the exit code of bad input."""
    say(f"error: {message}")
    return EXIT_BAD_INPUT


def interrupted(what: str = "") -> int:
    """Say that Ctrl-C ended the command, on a line of its own; give the exit code."""
    if sys.stderr.isatty():
        click.echo(err=True)  # after the ^C that the terminal shows
    say(f"interrupted{what}")
    return EXIT_INTERRUPTED


def drop_stdout() -> None:
    """Lead stdout to nowhere: the interpreter flushes it when it exits, and would complain about the broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
