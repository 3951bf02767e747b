"""One `true` in a container, by labs and by the real tools: same root filesystem, same namespaces, one run.

unshare(1) has the same namespaces, changes root and mounts /proc, and nothing more: no cgroup, no overlay, no /dev.
crun and runc get a bundle whose config.json is their own `spec` with the same root; podman and docker have an image of
that root to find too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from bench.table import Row, main, show, side_by_side
from labs import container, machine

ROOT = machine.rootfs("busybox")


def _command(*argv: str) -> Callable[[], object]:
    return lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def bundle(runtime: str) -> Iterator[str]:
    """A bundle around the lab's own root: the runtime's `spec`, read-only root, `true`, no terminal."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([runtime, "spec"], cwd=place, check=True)
        path = Path(place, "config.json")
        config = json.loads(path.read_text())
        config["root"] = {"path": ROOT, "readonly": True}
        config["process"].update(args=["true"], terminal=False)
        path.write_text(json.dumps(config))
        yield place


def start_cost(runs: int) -> list[Row]:
    """One container at a time; podman and docker last, for they still tidy up when their command has answered."""
    numbers = count()

    def runtime(name: str, place: str) -> None:
        subprocess.run([name, "run", "--bundle", place, f"labs-b-{next(numbers)}"], check=True)

    with bundle("crun") as for_crun, bundle("runc") as for_runc:
        rows = side_by_side(
            {
                "labs.container.run": lambda: container.run(["true"]),
                "unshare": _command(
                    "unshare",
                    "--fork",
                    "--pid",
                    "--mount",
                    "--uts",
                    "--ipc",
                    "--net",
                    "--cgroup",
                    f"--root={ROOT}",
                    "--mount-proc",
                    "true",
                ),
                "crun run": lambda: runtime("crun", for_crun),
                "runc run": lambda: runtime("runc", for_runc),
            },
            runs,
        )
    daemons = side_by_side(
        {
            "podman run": _command("podman", "run", "--rm", "--network=none", "busybox:lab", "true"),
            "docker run": _command("docker", "run", "--rm", "--network=none", "busybox:lab", "true"),
        },
        runs,
    )
    show("one container, `true`", rows + daemons, against=("crun run", "unshare"))
    return rows + daemons


def growth(runs: int) -> list[Row]:
    """1, 10 and 50 containers at once: seconds for all of them, ours and crun's."""
    numbers, rows = count(), []
    with bundle("crun") as place:
        ways = {
            "labs": lambda _: container.run(["true"]),
            "crun": lambda _: subprocess.run(["crun", "run", "--bundle", place, f"labs-g-{next(numbers)}"], check=True),
        }
        for at_once in (1, 10, 50):
            with ThreadPoolExecutor(at_once) as pool:
                timed = side_by_side(
                    {
                        f"{who} × {at_once}": lambda way=way, n=at_once: list(pool.map(way, range(n)))
                        for who, way in ways.items()
                    },
                    max(1, runs // 2),
                )
            show(f"{at_once} at once", timed, against=(f"crun × {at_once}",))
            rows += timed
    return rows


def first_cell(runs: int) -> list[Row]:
    """From asking for a kernel to the answer of a notebook's first cell, `from labs import container`."""
    from jupyter_client.manager import start_new_kernel

    def once() -> None:
        manager, client = start_new_kernel(startup_timeout=300)
        try:
            client.execute_interactive("from labs import container", timeout=300)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)

    rows = side_by_side(
        {"first cell of a notebook": once, "python -c pass": _command(sys.executable, "-c", "pass")},
        min(3, runs),
        warmup=1,
    )
    show("a notebook's first cell", rows)
    return rows


def measure(runs: int) -> Sequence[Row]:
    """All three measurements; rows in the order they were printed."""
    os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
    began = time.monotonic()
    rows = [*start_cost(runs), *growth(runs), *first_cell(runs)]
    print(f"\nmeasured in {time.monotonic() - began:.0f} s")
    return rows


if __name__ == "__main__":
    main("container", measure)
