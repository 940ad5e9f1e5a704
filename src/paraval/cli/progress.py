"""How far the sweep is, on stderr: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import abc
import sys
import time
from typing import TYPE_CHECKING, Final

import click

from paraval.cli.tally import Tally

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

__all__ = ["LiveLine", "NoProgress", "PlainLines", "Progress", "duration", "number", "progress_line", "show_progress"]

PLAIN_INTERVAL: Final = 5.0
"""Seconds between two plain lines."""

BAR_WIDTH: Final = 12
"""Columns of the bar; the line beside it, which says more, gets the others."""


class Progress(abc.ABC):
    """Shows how far a sweep is. It never raises: a terminal that went away costs no results."""

    interval: float = 1.0
    """Seconds after which :meth:`update` is wanted again, though nothing happened."""

    _broken = False

    def update(self, tally: Tally, time_left: float | None) -> None:
        """Show the state; cheap, call it as often as there is news.

        Args:
            tally: the state.
            time_left: seconds of the sweep's budget, None without one.
        """
        self._guarded(tally, time_left, last=False)

    def finish(self, tally: Tally, time_left: float | None) -> None:
        """Show the state for the last time, and leave the terminal as it was."""
        self._guarded(tally, time_left, last=True)

    def say(self, text: str) -> None:
        """Print a line that is no progress, above it."""
        try:
            click.echo(f"paraval: {text}", err=True)
        except (OSError, ValueError):
            self._broken = True

    def restore_terminal(self) -> None:  # noqa: B027 - most have nothing to undo
        """Undo at once what would outlive the process; called from a signal handler."""

    def _guarded(self, tally: Tally, time_left: float | None, *, last: bool) -> None:
        if self._broken:
            return
        try:
            self._show(tally, time_left, last=last)
        except (OSError, ValueError):  # the terminal or the pipe behind stderr went away, or was closed
            self._broken = True

    @abc.abstractmethod
    def _show(self, tally: Tally, time_left: float | None, *, last: bool) -> None: ...


def show_progress(*, quiet: bool) -> Progress:
    """Choose what fits this stderr."""
    if quiet:
        return NoProgress()
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True, markup=False, highlight=False)
        if not console.is_dumb_terminal:
            return LiveLine(console)
    return PlainLines()


def progress_line(tally: Tally, time_left: float | None, *, last: bool = False) -> str:
    """Say it in one line: done/total, best objective so far, failures, rate, time left; or, as the last one, taken."""
    percent = 100 * tally.finished // tally.total
    parts = [f"{tally.finished}/{tally.total} ({percent} %)"]
    if tally.best:
        parts.append(f"best {number(tally.best[0].objectives[0])}")
    elif tally.front:
        parts.append(f"{len(tally.front)} non-dominated")
    parts.append(f"{tally.failed} failed")
    if tally.cancelled:
        parts.append(f"{tally.cancelled} cancelled")
    if tally.restored:
        parts.append(f"{tally.restored} restored")
    if tally.rate:
        parts.append(_rate(tally.rate))
    left = _time_left(tally, time_left)
    if last:
        parts.append(f"{duration(tally.elapsed)} taken")
    elif tally.stopping:
        parts.append("stopping")
    elif left is not None:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


class LiveLine(Progress):
    """One line with a bar, drawn over itself. What run-functions print on the same terminal goes above it."""

    interval = 0.25

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._drawn = 0.0

    def restore_terminal(self) -> None:
        """Show the cursor again."""
        if self._live is not None and self._live.is_started:
            sys.__stderr__.write("\x1b[?25h\n")  # type: ignore[union-attr] # a terminal was there when the line began
            sys.__stderr__.flush()  # type: ignore[union-attr] # likewise

    def _show(self, tally: Tally, time_left: float | None, *, last: bool) -> None:
        now = time.monotonic()
        if not last and now - self._drawn < self.interval:
            return
        self._drawn = now
        if self._live is None:
            from rich.live import Live

            # Drawn by the sweep's own loop, not by a thread of rich's. What goes to stdout is led above the line only
            # when it would reach a terminal anyway: redirected output must stay where it was sent.
            self._live = Live(
                console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(), redirect_stderr=True
            )
            self._live.start()
        self._live.update(_with_bar(tally, progress_line(tally, time_left, last=last)), refresh=True)
        if last:
            self._live.stop()


def _with_bar(tally: Tally, line: str) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(min_width=BAR_WIDTH)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(
        total=tally.total,
        completed=tally.finished,
        width=BAR_WIDTH,
        style="bright_black",
        complete_style="green",
        finished_style="green",
    )
    grid.add_row(bar, Text(line))
    return grid


class PlainLines(Progress):
    """For logs and pipes: at most one line every few seconds, and the last one."""

    def __init__(self) -> None:
        self._written = time.monotonic()

    def _show(self, tally: Tally, time_left: float | None, *, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._written >= PLAIN_INTERVAL:
            self._written = now
            click.echo(f"paraval: {progress_line(tally, time_left, last=last)}", err=True)


class NoProgress(Progress):
    """Says nothing."""

    def _show(self, tally: Tally, time_left: float | None, *, last: bool) -> None:
        pass


def number(value: float) -> str:
    """Write an objective for people."""
    return f"{value:.6g}"


def duration(seconds: float) -> str:
    """Write a time span for people: ``0.42 s``, ``12.3 s``, ``4:05 min``, ``3:04:05 h``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:  # noqa: PLR2004 - beyond, it would be shown as 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def _rate(per_second: float) -> str:
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1:
            return f"{_three_digits(per_second * seconds)}/{unit}"
    return f"{_three_digits(per_second * 3600)}/h"


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):.15g}"  # %g alone would write thousands as 1e+03


def _time_left(tally: Tally, budget: float | None) -> float | None:
    """What the rest will take at the present rate, or what is left of the budget, if that is less."""
    guess = tally.unfinished / tally.rate if tally.rate else None
    known = [seconds for seconds in (guess, budget) if seconds is not None]
    return max(min(known), 0.0) if known else None
