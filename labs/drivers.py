"""Storage drivers: four ways to lay a writable layer on another one, behind the same three calls.

What Docker calls a graph driver and containerd a snapshotter.  Each keeps a directory a layer::

    STORE/NAME/parent     the name of the layer below; empty for the first one
    STORE/NAME/…          what the driver needs: diff and work (overlay), tree (vfs, btrfs)

overlayfs: Documentation/filesystems/overlayfs.rst; fuse-overlayfs(1); cp(1); <linux/btrfs.h>, btrfs-subvolume(8).
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple

from labs import disks, machine, mounts, process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
# <linux/btrfs.h>; struct btrfs_ioctl_vol_args_v2 (fd, transid, flags, unused, name) and btrfs_ioctl_vol_args (fd, name)
BTRFS_IOC_SNAP_DESTROY, BTRFS_IOC_SNAP_CREATE_V2, BTRFS_IOC_SUBVOL_CREATE_V2 = 0x5000940F, 0x50009417, 0x50009418
VOL_ARGS_V2, VOL_ARGS = struct.Struct("qQQ32x4040s"), struct.Struct("q4088s")


class Driver:
    """The layers in one directory; the classes below say how one is laid on another.

    store: a directory on the filesystem that the driver needs.
    """

    name = ""

    def __init__(self, store: str) -> None:
        machine.require()
        self.store = store

    def prepare(self, layer: str, parent: str | None = None) -> None:
        """Make a writable layer that shows what its parent holds, or an empty one.

        Raises BadInput for a name that is bad, taken or not there; a failure leaves no layer.
        """
        place = self._place(_check_name(layer))
        if os.path.lexists(place):
            raise BadInput("layer", layer, "is there already")
        below = self._place(parent) if parent else None
        if below and not os.path.isdir(below):
            raise BadInput("parent", parent, "no such layer")
        os.mkdir(place)
        try:
            with open(f"{place}/parent", "w", encoding="ascii") as file:
                file.write(parent or "")
            self._lay(place, below)
        except BaseException:
            self._clear(place)
            raise

    @contextmanager
    def mount(self, layer: str) -> Iterator[str]:
        """Show a layer as one tree that can be written to: its path."""
        place = self._place(layer)
        if not os.path.isdir(place):
            raise BadInput("layer", layer, "no such layer")
        with self._show(place) as path:
            yield path

    def remove(self, layer: str) -> None:
        """Remove a layer; BadInput while another one lies on it."""
        place = self._place(layer)
        if not os.path.isdir(place):
            raise BadInput("layer", layer, "no such layer")
        if above := [other for other in self.layers() if self.parent(other) == layer]:
            raise BadInput("layer", layer, f"is below {above[0]}")
        self._clear(place)

    def layers(self) -> list[str]:
        """The names of all layers."""
        return sorted(name for name in os.listdir(self.store) if os.path.exists(f"{self.store}/{name}/parent"))

    def parent(self, layer: str) -> str | None:
        """The layer below, None for the first one."""
        return machine.read_file(f"{self._place(layer)}/parent") or None

    def space(self) -> int:
        """Bytes of the filesystem that are in use, when all is written out: statvfs(3)."""
        self.sync()
        told = os.statvfs(self.store)
        return (told.f_blocks - told.f_bfree) * told.f_frsize

    def sync(self) -> None:
        """Write out what is only in memory yet: syncfs(2)."""
        with mounts.opened(os.open(self.store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            syscalls.syncfs(fd)

    def _place(self, layer: str) -> str:
        return f"{self.store}/{_check_name(layer)}"

    def _chain(self, place: str) -> Iterator[str]:
        """The places of a layer and of all below it, uppermost first."""
        layer: str | None = os.path.basename(place)
        while layer:
            yield self._place(layer)
            layer = self.parent(layer)

    def _lay(self, place: str, below: str | None) -> None:
        raise NotImplementedError

    def _show(self, place: str) -> AbstractContextManager[str]:
        raise NotImplementedError

    def _clear(self, place: str) -> None:
        machine.remove_tree(place)


class Overlay(Driver):
    """overlay2: an empty directory; the kernel puts the trees together while the layer is mounted."""

    name = "overlay2"

    def _lay(self, place: str, below: str | None) -> None:
        for part in ("diff", "work", "merged"):
            os.mkdir(f"{place}/{part}")

    def _show(self, place: str) -> AbstractContextManager[str]:
        top, *lower = self._chain(place)
        if not lower:
            return nullcontext(f"{top}/diff")
        return self._overlay([f"{one}/diff" for one in lower], f"{top}/diff", f"{top}/work", f"{top}/merged")

    def _overlay(self, lower: list[str], upper: str, work: str, target: str) -> AbstractContextManager[str]:
        return mounts.overlay(lower, upper, work, target)


class FuseOverlay(Overlay):
    """fuse-overlayfs: the same directories, put together by a program that the kernel asks for every name, fuse(4)."""

    name = "fuse-overlayfs"

    @contextmanager
    def _overlay(self, lower: list[str], upper: str, work: str, target: str) -> Iterator[str]:
        options = mounts.overlay_options(lower, upper, work)
        with tempfile.TemporaryFile() as log, process.spawn(
                ["fuse-overlayfs", "-f", "-o", options, target], first=lambda: os.dup2(log.fileno(), 2)) as server:
            process.until(lambda: os.path.ismount(target) or process.readable(server.pidfd, 0), what="the mount")
            if not os.path.ismount(target):
                raise ChildFailed("fuse-overlayfs", detail=f"ended with status {server.wait().shell}")
            try:
                yield target
            finally:
                syscalls.umount2(target, syscalls.UMOUNT_NOFOLLOW)
                server.wait(30)


class Vfs(Driver):
    """vfs: a copy of all that the parent holds; any filesystem will do."""

    name = "vfs"

    def _lay(self, place: str, below: str | None) -> None:
        words = ["cp", "--archive", f"{below}/tree", f"{place}/tree"] if below else ["mkdir", f"{place}/tree"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildFailed(words[0], detail=done.stderr.strip().splitlines()[-1].rpartition(": ")[2])

    def _show(self, place: str) -> AbstractContextManager[str]:
        return nullcontext(f"{place}/tree")


class Btrfs(Driver):
    """btrfs: a snapshot of the parent's subvolume; both share every block until one of them writes it anew."""

    name = "btrfs"

    def _lay(self, place: str, below: str | None) -> None:
        if below is None:
            _subvolume(place, BTRFS_IOC_SUBVOL_CREATE_V2, VOL_ARGS_V2.pack(0, 0, 0, b"tree"))
            return
        with mounts.opened(os.open(f"{below}/tree", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as parent:
            _subvolume(place, BTRFS_IOC_SNAP_CREATE_V2, VOL_ARGS_V2.pack(parent, 0, 0, b"tree"))

    def _show(self, place: str) -> AbstractContextManager[str]:
        return nullcontext(f"{place}/tree")

    def _clear(self, place: str) -> None:
        if os.path.exists(f"{place}/tree"):
            _subvolume(place, BTRFS_IOC_SNAP_DESTROY, VOL_ARGS.pack(0, b"tree"))
        machine.remove_tree(place)


def _subvolume(folder: str, command: int, arguments: bytes) -> None:
    """One ioctl(2) on the directory that the subvolume lies in."""
    with mounts.opened(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        try:
            fcntl.ioctl(fd, command, bytearray(arguments))  # bytes may be 1024 at most
        except OSError as error:
            raise KernelError("ioctl on a subvolume", error.errno or 0, folder) from error


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadInput("layer", name, "must be letters, digits, _ . and -, and begin with a letter or a digit")
    return name


DRIVERS: tuple[type[Driver], ...] = (Overlay, Vfs, FuseOverlay, Btrfs)


@contextmanager
def each(size: int = 256 << 20) -> Iterator[dict[str, Driver]]:
    """Every driver by its name, each on a disk of that many bytes of its own: ext4, and btrfs for the last one."""
    with ExitStack() as stack:
        yield {make.name: make(stack.enter_context(disks.disk(size, "btrfs" if make is Btrfs else "ext4")).path)
               for make in DRIVERS}


class Cost(NamedTuple):
    """What a piece of work took: seconds, and bytes of the disk (less than 0: it became free)."""

    seconds: float
    space: int


def cost(driver: Driver, work: Callable[[], object]) -> Cost:
    """Do something once and measure it, with all of it on the disk at the end."""
    before, start = driver.space(), time.perf_counter()
    work()
    driver.sync()
    seconds = time.perf_counter() - start
    return Cost(seconds, driver.space() - before)


def inside(driver: Driver, layer: str, work: Callable[[str], object]) -> Cost:
    """The same for work on a layer that is mounted already: work gets the path."""
    with driver.mount(layer) as path:
        return cost(driver, lambda: work(path))


def write(path: str, size: int) -> None:
    """A file of that many bytes, none of them zero; the directories above it are made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"x" * size)


def scatter(folder: str, count: int, size: int = 1000) -> None:
    """That many small files."""
    for number in range(count):
        write(f"{folder}/{number}", size)


def append(path: str, name: str = "big") -> None:
    """Add one byte to a file of a mounted layer."""
    with open(f"{path}/{name}", "ab") as file:
        file.write(b"x")
