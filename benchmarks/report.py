"""What a measure gives, how it is judged, and how all of it is shown."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

__all__ = ["Goal", "Row", "Sample", "environment", "show", "write_json"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was measured right after one another, in the row's unit.

    Attributes:
        ours: paraval.
        peer: what it is compared with; None where there is nothing.
    """

    ours: float
    peer: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return None if self.peer is None else self.ours / self.peer


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a row must reach.

    Attributes:
        sense: on which side of the limit the good is.
        limit: the limit itself, which may be met.
        of: what is judged, the median of the ratios or the median of our own figures.
    """

    sense: Literal["at most", "at least"]
    limit: float
    of: Literal["ratio", "ours"] = "ratio"

    def is_met_by(self, value: float) -> bool:
        """Whether the value is on the right side."""
        return value <= self.limit if self.sense == "at most" else value >= self.limit

    def __str__(self) -> str:
        fraction = Fraction(self.limit).limit_denominator(100)
        exact = fraction.numerator == 1 and fraction.denominator > 1
        return f"{self.of} {self.sense} {fraction if exact else _figure(self.limit)}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        title: what was measured, on our side.
        unit: of the figures.
        peer: what it is compared with; None where there is nothing.
        goal: what it must reach; None where the row is only shown.
        samples: everything that was measured, warm-ups excepted.
    """

    title: str
    unit: str
    peer: str | None
    goal: Goal | None
    samples: list[Sample]

    @property
    def ours(self) -> list[float]:
        """Our figures."""
        return [sample.ours for sample in self.samples]

    @property
    def peers(self) -> list[float]:
        """The peer's figures."""
        return [sample.peer for sample in self.samples if sample.peer is not None]

    @property
    def ratios(self) -> list[float]:
        """The ratio of each pair."""
        return [sample.ratio for sample in self.samples if sample.ratio is not None]

    @property
    def reached(self) -> bool | None:
        """Whether the median is where it must be; None where there is no goal."""
        if self.goal is None:
            return None
        return self.goal.is_met_by(statistics.median(self.ratios if self.goal.of == "ratio" else self.ours))

    def as_dict(self) -> dict[str, Any]:
        """Give everything, every single sample included."""
        return {
            "row": self.title,
            "unit": self.unit,
            "peer": self.peer,
            "goal": None if self.goal is None else dataclasses.asdict(self.goal),
            "reached": self.reached,
            "ours": _summary(self.ours),
            "theirs": _summary(self.peers),
            "ratio": _summary(self.ratios),
            "samples": [{**dataclasses.asdict(sample), "ratio": sample.ratio} for sample in self.samples],
        }


def environment(*, quick: bool) -> dict[str, Any]:
    """Say where and with what the figures were made."""
    packages = ("paraval", "anyio", "msgspec", "deephyper", "numpy", "joblib", "loky", "trio")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "python": sys.version,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "versions": {package: _version(package) for package in packages},
    }


def write_json(path: Path, where: dict[str, Any], rows: Iterable[tuple[str, Row]], failures: dict[str, str]) -> None:
    """Write all that is known: the environment, each row under the name of its measure, the measures that failed."""
    document = {
        **where,
        "rows": [{"measure": measure, **row.as_dict()} for measure, row in rows],
        "failed_measures": failures,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def show(rows: Sequence[Row], where: dict[str, Any]) -> None:
    """Print the table: with rich where it is installed, else as plain text."""
    versions = where["versions"]
    print(
        f"paraval {versions['paraval'] or '(not installed: from source)'} beside deephyper {versions['deephyper']}, "
        f"joblib {versions['joblib']}, loky {versions['loky']} and concurrent.futures; "
        f"Python {platform.python_version()}, {where['cpu_count']} CPUs"
    )
    lines = [_cells(row) for row in rows]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _show_plainly(lines)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for head, justify in _COLUMNS:
        table.add_column(head, justify=justify)
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*line, style="bold red" if row.reached is False else None)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: nothing is to be cut or wrapped
        console.width = 200
    console.print(table)


_COLUMNS: Final[tuple[tuple[str, Literal["left", "right"]], ...]] = (
    ("measure", "left"),
    ("ours", "right"),
    ("peer", "left"),
    ("theirs", "right"),
    ("ratio", "right"),
    ("to reach", "left"),
    ("reached", "left"),
)


def _show_plainly(lines: Sequence[Sequence[str]]) -> None:
    grid = [tuple(head for head, _ in _COLUMNS), *lines]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    for line in grid:
        cells = (
            cell.rjust(width) if justify == "right" else cell.ljust(width)
            for cell, width, (_, justify) in zip(line, widths, _COLUMNS, strict=True)
        )
        print("  ".join(cells).rstrip())


def _cells(row: Row) -> tuple[str, ...]:
    reached = {True: "yes", False: "NO", None: ""}[row.reached]
    return (
        row.title,
        _spread(row.ours, row.unit),
        row.peer or "",
        _spread(row.peers, row.unit),
        _spread(row.ratios),
        "" if row.goal is None else str(row.goal),
        reached,
    )


def _spread(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return ""
    median = f"{_figure(statistics.median(values))} {unit}".rstrip()
    return f"{median} ({_figure(min(values))}–{_figure(max(values))})" if len(values) > 1 else median  # noqa: RUF001 - a dash between two numbers


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"  # noqa: PLR2004 - more digits than anyone reads


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)} if values else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
