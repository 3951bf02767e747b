"""Storage drivers side by side on loop devices; a volume mounted and filled, saved and restored, beside the real tools.

Each driver has a disk of its own (ext4, btrfs), and a piece of work counts as done when it is on the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count

from bench.table import Row, main, show, side_by_side
from labs import container, drivers, machine, storage

MIB = 1 << 20
BIG, SMALL = 32 * MIB, 500
# What a volume is filled with: a directory of the lab's Debian, and the image that has it at the same place.
FOLDER, IMAGE = "/usr/lib", "debian:lab"


def _quiet(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _delete(path: str) -> None:
    os.unlink(f"{path}/big")
    shutil.rmtree(f"{path}/small")


def _read(path: str) -> None:
    _quiet("tar", "--create", "--file=/dev/null", f"--directory={path}", "small", "big")


# What is done in a layer that was laid on "base" just before.
WORK: Mapping[str, Callable[[str], object]] = {
    f"read everything: {SMALL} small files and {BIG // MIB} MiB": _read,
    f"first byte into a lower file of {BIG // MIB} MiB": drivers.append,
    f"{SMALL} new small files": lambda path: drivers.scatter(f"{path}/new", SMALL),
    f"a new file of {BIG // MIB} MiB": lambda path: drivers.write(f"{path}/large", BIG),
    f"{SMALL + 1} lower files deleted": _delete,
}


def _fill(driver: drivers.Driver) -> None:
    driver.prepare("base")
    with driver.mount("base") as path:
        drivers.write(f"{path}/big", BIG)
        drivers.scatter(f"{path}/small", SMALL)


class Bench:
    """Every driver with a fresh layer on "base", mounted; made anew outside the measured time."""

    def __init__(self, made: Mapping[str, drivers.Driver]) -> None:
        self.made, self.mounted = made, ExitStack()
        self.paths: dict[str, str] = {}

    def fresh(self) -> None:
        """Drop what the last run left, and lay and mount a new layer for each."""
        self.mounted.close()
        for name, driver in self.made.items():
            driver.prepare("top", "base")
            self.mounted.callback(driver.remove, "top")
            self.paths[name] = self.mounted.enter_context(driver.mount("top"))
            driver.sync()

    def do(self, name: str, work: Callable[[str], object]) -> None:
        """One piece of work in the layer of one driver, to the end."""
        work(self.paths[name])
        self.made[name].sync()


def table(runs: int) -> list[Row]:
    """The drivers: layers laid and removed, then every piece of work, in time and in space."""
    with drivers.each(1 << 30) as made:
        for driver in made.values():
            _fill(driver)
        rows = _laying(made, runs)
        bench = Bench(made)
        with bench.mounted:
            for title, work in WORK.items():
                timed = side_by_side({name: partial(bench.do, name, work) for name in made}, runs, before=bench.fresh)
                show(title, timed, ("overlay2",))
                print("space:", _space(made, work, bench), flush=True)
                rows += _titled(timed, title)
                bench.mounted.close()
    return rows


def _space(made: Mapping[str, drivers.Driver], work: Callable[[str], object], bench: Bench) -> str:
    bench.fresh()
    used = {name: drivers.cost(driver, partial(work, bench.paths[name])).space for name, driver in made.items()}
    return ", ".join(f"{name} {size / MIB:.2f} MiB" for name, size in used.items())


def _laying(made: Mapping[str, drivers.Driver], runs: int) -> list[Row]:
    """A layer laid on the last one, again and again; then each removed, the uppermost first."""
    heights = {name: count() for name in made}

    def lay(name: str) -> None:
        number = next(heights[name])
        made[name].prepare(f"l{number}", f"l{number - 1}" if number else "base")
        made[name].sync()

    def remove(name: str) -> None:
        made[name].remove(max(made[name].layers(), key=lambda layer: int(layer[1:]) if layer[0] == "l" else -1))
        made[name].sync()

    before = {name: driver.space() for name, driver in made.items()}
    laid = side_by_side({name: partial(lay, name) for name in made}, runs)
    show("a layer laid on another", laid, ("overlay2",))
    each = {name: (driver.space() - before[name]) / MIB / (runs + 1) for name, driver in made.items()}
    print("space:", ", ".join(f"{name} {size:.2f} MiB" for name, size in each.items()), "a layer")
    gone = side_by_side({name: partial(remove, name) for name in made}, runs)
    show("a layer removed", gone, ("overlay2",))
    return _titled(laid, "laid") + _titled(gone, "removed")


def _titled(rows: Sequence[Row], title: str) -> list[Row]:
    return [row._replace(who=f"{row.who}: {title}") for row in rows]


@contextmanager
def store() -> Iterator[tuple[str, storage.Volumes]]:
    """A directory on the machine's disk with a store of volumes in it."""
    place = f"{machine.DATA}/{machine.new_name('bench')}"
    os.makedirs(place)
    try:
        yield place, storage.Volumes(f"{place}/volumes")
    finally:
        machine.remove_tree(place)


def volumes(runs: int) -> list[Row]:
    """A container without a volume, with a new empty one, and with a new one that is filled from the image."""
    rows = []
    with store() as (_, ours):
        numbers, root = count(), machine.rootfs("debian")
        engines, bare = ("podman", "docker"), partial(container.run, ["true"], rootfs="debian")

        def labs(target: str) -> None:
            volume = ours.create(f"labs-bench-{next(numbers)}")
            if target == FOLDER:
                ours.fill(volume.name, root + FOLDER)
            container.run(["true"], rootfs="debian", mounts=[(volume.path, target)])
            ours.remove(volume.name)

        def engine(name: str, target: str) -> None:
            volume = f"labs-bench-{next(numbers)}"
            mount = (f"--mount=type=volume,src={volume},dst={target}",) if target else ()
            _quiet(name, "run", "--rm", "--network=none", *mount, IMAGE, "true")
            if target:
                _quiet(name, "volume", "rm", volume)

        for title, target in (("a container without a volume", ""), ("a new empty volume", "/srv/data"),
                              (f"a new volume filled with {FOLDER}", FOLDER)):
            ways: dict[str, Callable[[], object]] = {"labs.storage": partial(labs, target) if target else bare}
            ways |= {name: partial(engine, name, target) for name in engines}
            timed = side_by_side(ways, max(1, runs // 2))
            show(title, timed, engines)
            rows += _titled(timed, title)
    return rows


def archive(runs: int) -> list[Row]:
    """One volume written to a tar file, and a new one made from it, beside tar(1) alone."""
    with store() as (place, ours):
        volume, numbers = ours.create("labs-bench"), count()
        ours.fill(volume.name, machine.rootfs("debian") + FOLDER)
        print(f"\na volume of {_size(volume.path) // MIB} MiB")

        def restore() -> None:
            ours.restore(f"labs-bench-{next(numbers)}", f"{place}/labs.tar")

        def extract() -> None:
            os.mkdir(target := f"{place}/{next(numbers)}")
            _quiet("tar", "--extract", f"--file={place}/tar.tar", f"--directory={target}")

        create = partial(_quiet, "tar", "--create", f"--file={place}/tar.tar", f"--directory={volume.path}", ".")
        saved = side_by_side(
            {"labs backup": lambda: ours.backup(volume.name, f"{place}/labs.tar"), "tar --create": create}, runs,
            before=os.sync)
        show("backup", saved, ("tar --create",))
        restored = side_by_side({"labs restore": restore, "tar --extract": extract}, runs, before=os.sync)
        show("restore", restored, ("tar --extract",))
    return saved + restored


def _size(path: str) -> int:
    return sum(os.lstat(f"{folder}/{name}").st_size for folder, _, names in os.walk(path) for name in names)


def measure(runs: int) -> Sequence[Row]:
    """All of it; rows in the order they were printed."""
    began = time.monotonic()
    rows = [*table(min(5, runs)), *volumes(runs), *archive(min(5, runs))]
    print(f"\nmeasured in {time.monotonic() - began:.0f} s")
    return rows


if __name__ == "__main__":
    main("storage", measure)
