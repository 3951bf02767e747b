"""Bring projects up and down: 1, 5 and 20 services of one busybox each, by labs, docker compose and podman-compose.

Each tool reads the same file, has the image already, and brings everything down again before the next one begins.
Then two shapes of eight services that get ready in half a second: a chain, in which each waits for the one before it,
and a star, in which seven wait for one: what a graph lets start side by side, should.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.table import Row, main, show, side_by_side
from labs import compose_file, compose_run

IDLE = '{image: "busybox:lab", command: sleep 1000, stop_signal: SIGKILL'
READY = IDLE.replace("sleep 1000", '"sh -c \'sleep 0.5; touch /ready; exec sleep 1000\'"') + \
    ', healthcheck: {test: "test -e /ready", interval: 100ms, retries: 600}'
OTHERS = {"docker compose": ["docker", "compose"], "podman-compose": ["podman-compose"]}


@contextmanager
def _file(rows: Sequence[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="labs-bench-") as folder:
        path = Path(folder, "compose.yaml")
        path.write_text("\n".join(["name: labs-bench", "services:", *(f"  {row}" for row in rows)]), encoding="utf-8")
        yield str(path)


def _quiet(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def _ways(file: str) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Who → how it brings the file up, and down."""
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "labs": (lambda: compose_run.up(compose_file.load(file)), lambda: compose_run.down("labs-bench"))}
    for who, line in OTHERS.items():
        words = [*line, "-f", file, "-p", "labs-bench"]
        ways[who] = (lambda words=words: _quiet(*words, "up", "-d"),  # type: ignore[misc]
                     lambda words=words: _quiet(*words, "down", "-t", "1"))  # type: ignore[misc]
    return ways


def _up_and_down(title: str, file: str, runs: int) -> list[Row]:
    times: dict[str, list[float]] = {}
    for _ in range(runs):
        for who, (up, down) in _ways(file).items():
            for what, work in (("up", up), ("down", down)):
                began = time.perf_counter()
                work()
                times.setdefault(f"{who} {what}", []).append(time.perf_counter() - began)
    rows = [Row(who, sorted(taken)[len(taken) // 2], min(taken), len(taken)) for who, taken in sorted(times.items())]
    for what in ("up", "down"):
        show(f"{title}: {what}", [row for row in rows if row.who.endswith(f" {what}")],
             tuple(f"{who} {what}" for who in OTHERS))
    return rows


def sizes(runs: int) -> list[Row]:
    """1, 5 and 20 services that wait for nobody; 20 once, as the three together take minutes."""
    rows = []
    for count in (1, 5, 20):
        with _file([f"s{number}: {IDLE}}}" for number in range(count)]) as file:
            rows += _up_and_down(f"{count} services", file, runs if count < 20 else 1)
    return rows


def shapes(runs: int) -> list[Row]:
    """A chain and a star of eight, under labs."""
    gate = ", depends_on: {{s{}: {{condition: service_healthy}}}}"
    chain = [f"s{n}: {READY}{gate.format(n - 1) if n else ''}}}" for n in range(8)]
    star = [f"s{n}: {READY}{gate.format(0) if n else ''}}}" for n in range(8)]
    with _file(chain) as first, _file(star) as second:
        rows = side_by_side({"chain of 8": lambda: compose_run.up(compose_file.load(first), wait=True),
                             "star of 8": lambda: compose_run.up(compose_file.load(second), wait=True)}, runs, warmup=0,
                            before=lambda: compose_run.down("labs-bench"))
        compose_run.down("labs-bench")
    show("as parallel as the graph", rows, ("star of 8",))
    return rows


def measure(runs: int) -> Sequence[Row]:
    """All of it; rows in the order they were printed."""
    return [*sizes(min(3, runs)), *shapes(min(3, runs))]


if __name__ == "__main__":
    main("compose", measure)
