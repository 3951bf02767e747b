"""Steps with a name and a time: what `./lab` shows while it works, and the errors it ends with."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

MOVING = True  # a line that moves while a step runs; two steps at once cannot share a terminal's line


class LabError(Exception):
    """Ends `./lab` with one clear line and exit status 1."""


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Name a step, keep a line moving on a terminal while it runs, and print its time in seconds at the end."""
    start = time.monotonic()
    done = threading.Event()
    moving = threading.Thread(target=_spin, args=(name, start, done), daemon=True)
    if MOVING and sys.stdout.isatty():
        moving.start()
    mark = "✗"
    try:
        yield
        mark = "✓"
    finally:
        done.set()
        if moving.ident:
            moving.join()
        print(f"\r{mark} {name:<58}{time.monotonic() - start:7.1f} s", flush=True)


def _spin(name: str, start: float, done: threading.Event) -> None:
    width = 12
    while not done.wait(0.2):
        elapsed = time.monotonic() - start
        at = int(elapsed * 5) % width
        bar = " " * at + "━━━" + " " * (width - at)
        print(f"\r  {name:<42} {bar}{elapsed:7.1f} s", end="", flush=True)


def run(
    argv: Sequence[str | Path],
    log: Path,
    env: Mapping[str, str] | None = None,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
) -> None:
    """Run a command, its output appended to `log`; on failure raise LabError with the last lines and the log's name."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        out.write(("\n$ " + " ".join(map(str, argv)) + "\n").encode())
        out.flush()
        status = subprocess.run([str(a) for a in argv], stdin=stdin, stdout=out, stderr=out, env=env).returncode
    if status:
        tail = "\n".join("    " + line for line in log.read_text(errors="replace").splitlines()[-12:])
        raise LabError(
            f"{Path(str(argv[0])).name} ended with status {status}; its last lines:\n{tail}\n  the whole log: {log}"
        )
