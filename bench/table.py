"""Measure several ways of doing one thing in turn, and print them as a table of ratios."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One way of doing it: who, and its median and fastest time in seconds over `runs` runs."""

    who: str
    median_s: float
    min_s: float
    runs: int


def side_by_side(
    ways: Mapping[str, Callable[[], object]], runs: int, warmup: int = 1, before: Callable[[], object] = bool
) -> list[Row]:
    """Time every way `runs` times, in turn (A B C, A B C, …), so that a machine that drifts drifts for all of them.

    `before` is called, unmeasured, before each.
    """
    times: dict[str, list[float]] = {who: [] for who in ways}
    for round_ in range(-warmup, runs):
        for who, way in ways.items():
            before()
            start = time.perf_counter()
            way()
            if round_ >= 0:
                times[who].append(time.perf_counter() - start)
    return [Row(who, statistics.median(t), min(t), len(t)) for who, t in times.items()]


def show(title: str, rows: Sequence[Row], against: Sequence[str] = ()) -> None:
    """Print rows in milliseconds, with the ratio of the medians to each of `against`."""
    base = {row.who: row.median_s for row in rows}
    columns = [who for who in against if who in base]
    print(f"\n{title}\n{'':<28}{'median':>10}{'min':>10}{'runs':>6}" + "".join(f"{'× ' + who:>18}" for who in columns))
    for row in rows:
        ratios = "".join(f"{row.median_s / base[who]:>18.2f}" for who in columns)
        print(
            f"{row.who:<28}{row.median_s * 1000:>7.1f} ms{row.min_s * 1000:>7.1f} ms{row.runs:>6}{ratios}", flush=True
        )


def host() -> str:
    """Return what the figures were measured on: kernel, architecture, CPUs."""
    return f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs"


def main(name: str, measure: Callable[[int], Sequence[Row]]) -> None:
    """Run `measure(runs)` from the command line: --runs N, --json FILE."""
    parser = argparse.ArgumentParser(prog=f"bench.{name}")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error(f"--runs: {options.runs}: must be at least 1")
    print(f"{name}: {host()}")
    rows = measure(options.runs)
    if options.json:
        data: dict[str, Any] = {"name": name, "host": host(), "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
