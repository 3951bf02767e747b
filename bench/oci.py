"""One bundle by labs-runtime, runc and crun: a whole run, its steps apart, memory, and Podman with each.

All three get the same bundle: the lab's busybox root, read-only, `true`, the namespaces and masks of `runc spec`.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from bench.container import bundle
from bench.table import Row, main, show, side_by_side
from labs import cgroup

LABS = str(Path(__file__).resolve().parent.parent / "bin" / "labs-runtime")
RUNTIMES = {"labs-runtime": LABS, "runc": "runc", "crun": "crun"}
AGAINST = ("runc", "crun")


def _quiet(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def whole(place: str, runs: int) -> list[Row]:
    """`run`: create, start, wait, delete."""
    numbers = count()

    def way(path: str) -> Callable[[], object]:
        return lambda: _quiet(path, "run", "--bundle", place, f"labs-o-{next(numbers)}")

    rows = side_by_side({who: way(path) for who, path in RUNTIMES.items()}, runs)
    show("run", rows, AGAINST)
    return rows


def steps(place: str, runs: int) -> list[Row]:
    """create, start and delete apart; each round makes its own container."""
    rows: list[Row] = []
    commands = {"create": ("create", "--bundle", place), "start": ("start",), "delete": ("delete", "--force")}
    for step, argv in commands.items():
        timed = side_by_side({who: _each(who, path, argv) for who, path in RUNTIMES.items()}, runs)
        show(step, timed, AGAINST)
        rows += [row._replace(who=f"{row.who} {step}") for row in timed]
    return rows


def _each(who: str, path: str, argv: Sequence[str]) -> Callable[[], object]:
    """A command on the first container, the next time on the second, and so on."""
    numbers = count()
    return lambda: _quiet(path, *argv, f"labs-s-{who}-{next(numbers)}")


def memory(place: str) -> None:
    """Memory in KiB: resident in process 1 while it waits for start, and the most that the whole of `run` held."""
    print(f"\nmemory, KiB{'':<17}{'waiting':>10}{'run':>10}")
    for who, path in RUNTIMES.items():
        name = f"labs-m-{who}"
        pid_file = Path(place, "pid")
        _quiet(path, "create", "--bundle", place, "--pid-file", str(pid_file), name)
        status = Path(f"/proc/{pid_file.read_text().strip()}/status").read_text(encoding="utf-8")
        waiting = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
        _quiet(path, "delete", "--force", name)
        print(f"{who:<28}{waiting:>10}{_most(path, 'run', '--bundle', place, name):>10}")


def _most(*argv: str) -> int:
    """The most memory a command and its children held at once, in KiB: memory.peak of a cgroup of its own."""
    with cgroup.create() as group:
        if (ended := group.spawn(argv).wait()).code:
            raise SystemExit(f"{' '.join(argv)}: ended with {ended}")
        return int(group.read("memory.peak")) // 1024


def podman(runs: int) -> list[Row]:
    """`podman run` with each runtime: what the choice matters within the whole."""

    def way(path: str) -> Callable[[], object]:
        return lambda: _quiet("podman", "--runtime", path, "run", "--rm", "--network=none", "busybox:lab", "true")

    rows = side_by_side({f"podman {who}": way(path) for who, path in RUNTIMES.items()}, max(1, runs // 2))
    show("podman run", rows, ("podman runc", "podman crun"))
    return rows


def measure(runs: int) -> Sequence[Row]:
    """All of it; rows in the order they were printed."""
    began = time.monotonic()
    with bundle("runc") as place:
        rows = [*whole(place, runs), *steps(place, runs)]
        memory(place)
    rows += podman(runs)
    print(f"\nmeasured in {time.monotonic() - began:.0f} s")
    return rows


if __name__ == "__main__":
    main("oci", measure)
