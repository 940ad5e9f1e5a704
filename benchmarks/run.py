"""Measure paraval beside its peers: one run, one table, ratios.

python benchmarks/run.py [--only NAME …] [--quick] [--strict] [--json FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import measures
import process_measures
import storage_measures
from report import Row, environment, show, write_json

MEASURES = {**measures.MEASURES, **process_measures.MEASURES, **storage_measures.MEASURES}


def main() -> int:
    """Run the measures; return the exit code.

    Returns:
        0; 1 when a measure could not be made, or with ``--strict`` when a row was not reached.
    """
    options = parse()
    where = environment(quick=options.quick)
    rows: list[tuple[str, Row]] = []
    failures: dict[str, str] = {}
    for name in options.only or MEASURES:
        start = time.monotonic()
        try:
            rows += [(name, row) for row in measured(name, quick=options.quick)]
            result = "done"
        except Exception as exc:  # noqa: BLE001 - the other measures are still wanted; this one is reported below
            failures[name] = result = f"failed: {type(exc).__name__}: {exc}"
        print(f"{name}: {result} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        write_json(options.json, where, rows, failures)  # each time: an interrupted run keeps what it has
    show([row for _, row in rows], where)
    print("Medians, in brackets the least and the most. A ratio is ours over theirs, measured right after one another.")
    print(f"Every sample: {options.json}")
    for name, failure in failures.items():
        print(f"NOT MEASURED: {name} {failure}")
    missed = options.strict and any(row.reached is False for _, row in rows)
    return 1 if failures or missed else 0


def measured(name: str, *, quick: bool) -> list[Row]:
    """Make one measure in an interpreter of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as interpreter:
        return interpreter.submit(MEASURES[name], quick).result()


def parse() -> argparse.Namespace:
    """Read the command line; exit with code 2 when it makes no sense."""
    parser = argparse.ArgumentParser(description="Measure paraval beside its peers.")
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a first impression in about a minute")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a row is not reached")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results.json"), metavar="FILE")
    options = parser.parse_args()
    if not options.json.parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.parent}")
    return options


if __name__ == "__main__":
    sys.exit(main())
