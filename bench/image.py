"""A layered image of over 200 MB: unpacked, pulled, pushed and built beside umoci, skopeo, podman, buildah and tar.

Every way gets the same gzip layers: the lab's Debian and two layers made from this machine's own programs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from bench.table import Row, main, show, side_by_side
from labs import build, image, layer, machine, registry, registry_server

IMAGES = "/opt/labs/images"
PROGRAMS = ("/usr/lib/python3.13", "/usr/sbin")
SMALLEST = 200 << 20


def _quiet(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory on the machine's disk, with layout/ holding the image "big"."""
    os.makedirs(machine.DATA, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=machine.PREFIX, dir=machine.DATA))
    try:
        _make(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def _make(folder: Path) -> None:
    layout = image.Layout.create(folder / "layout")
    image.copy(image.Layout(IMAGES), "debian", layout)
    base = image.load(layout, "debian")
    layers = [*zip(base.layers, base.diff_ids, strict=True)]
    layers += [image.add_layer(layout, place, epoch=0) for place in PROGRAMS]
    image.add_image(layout, layers, name="big", epoch=0)
    layout.untag("debian")
    layout.gc()


class Ways:
    """The ways to unpack one image, each into a directory that is removed again outside the measured time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout = folder, image.Layout(folder / "layout")
        self.image = image.load(self.layout, "big")
        self.blobs = [self.layout.blob(one.digest) for one in self.image.layers]
        self.target = folder / "target"

    def fresh(self) -> Path:
        """An empty place; what the last run left goes first."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir()
        os.sync()
        return self.target

    def labs_layers(self) -> None:
        """A directory a layer, each verified."""
        image.unpack_layers(self.layout, self.image, f"{self.target}/layers")

    def labs_rootfs(self) -> None:
        """One tree, each layer verified."""
        image.unpack(self.layout, self.image, f"{self.target}/rootfs")

    def tar(self) -> None:
        """The limit: nothing is verified, whiteouts stay files."""
        self._tar(self.blobs)

    def _tar(self, blobs: Sequence[str]) -> None:
        for number, blob in enumerate(blobs):
            os.mkdir(f"{self.target}/{number}")
            _quiet("tar", "xzf", blob, "-C", f"{self.target}/{number}")

    def skopeo_tar(self) -> None:
        """Skopeo verifies while it copies, tar unpacks."""
        _quiet("skopeo", "copy", f"oci:{self.folder}/layout:big", f"dir:{self.target}/dir")
        self._tar([f"{self.target}/dir/{one.digest.partition(':')[2]}" for one in self.image.layers])

    def umoci(self) -> None:
        """One tree."""
        _quiet("umoci", "raw", "unpack", "--image", f"{self.folder}/layout:big", f"{self.target}/rootfs")

    def podman(self) -> None:
        """Into a store of its own."""
        store = ("--root", f"{self.target}/store", "--runroot", f"{self.target}/run")
        _quiet("podman", *store, "pull", "--quiet", f"oci:{self.folder}/layout:big")
        _quiet("podman", *store, "rmi", "--all", "--force")


def unpack(folder: Path, runs: int) -> list[Row]:
    """Every way to unpack, in turn."""
    ways = Ways(folder)
    tries = {"labs, layers": ways.labs_layers, "labs, one tree": ways.labs_rootfs, "tar xzf": ways.tar,
             "skopeo and tar": ways.skopeo_tar, "umoci unpack": ways.umoci, "podman pull": ways.podman}
    rows = side_by_side(tries, runs, before=ways.fresh)
    show("unpack", rows, ("tar xzf", "umoci unpack"))
    ways.fresh()
    return rows


def transfer(folder: Path, runs: int) -> list[Row]:
    """Pull into an empty layout and push into an empty registry, ours and skopeo's; a new registry each time."""
    ways, numbers, place, now = Ways(folder), count(), f"oci:{folder}/layout:big", ExitStack()
    insecure = ("--src-tls-verify=false", "--dest-tls-verify=false")
    hosts: list[str] = []

    def fresh(filled: bool) -> None:
        now.close()
        hosts[:] = [now.enter_context(registry_server.serve()).host]
        if filled:
            _quiet("skopeo", "copy", *insecure, place, f"docker://{hosts[0]}/big:lab")
        ways.fresh()

    def pull() -> None:
        with registry.Registry(hosts[0]) as client:
            registry.pull(client, "big", "lab", image.Layout.create(f"{folder}/target/{next(numbers)}"))

    def push() -> None:
        with registry.Registry(hosts[0]) as client:
            registry.push(client, "big", "lab", ways.layout, "big")

    def skopeo_pull() -> None:
        _quiet("skopeo", "copy", *insecure, f"docker://{hosts[0]}/big:lab", f"oci:{folder}/target/{next(numbers)}:big")

    def skopeo_push() -> None:
        _quiet("skopeo", "copy", *insecure, place, f"docker://{hosts[0]}/big:lab")

    with now:
        pulls = side_by_side({"labs pull": pull, "skopeo pull": skopeo_pull}, runs, before=partial(fresh, True))
        show("pull", pulls, ("skopeo pull",))
        pushes = side_by_side({"labs push": push, "skopeo push": skopeo_push}, runs, before=partial(fresh, False))
        show("push", pushes, ("skopeo push",))
    return pulls + pushes


DOCKERFILE = """\
FROM debian
WORKDIR /app
COPY . .
RUN tar cf /app/all.tar /app/python3.13 && sha256sum /app/all.tar >/app/sum
RUN rm /app/all.tar
CMD ["cat", "/app/sum"]
"""


def building(folder: Path, runs: int) -> list[Row]:
    """One Dockerfile without a cache: a tree of small files copied, a command that writes, one that removes."""
    context, numbers = folder / "context", count()
    context.mkdir()
    shutil.copytree(PROGRAMS[0], context / "python3.13", symlinks=True)
    (context / "Dockerfile").write_text(DOCKERFILE)
    bases = image.Layout(IMAGES)

    def labs() -> None:
        made = image.Layout.create(f"{folder}/target/{next(numbers)}")
        build.build(str(context), made, "made", cache=False, bases=bases)

    store = ("--root", f"{folder}/store", "--runroot", f"{folder}/run")
    _quiet("podman", *store, "pull", "--quiet", f"oci:{IMAGES}:debian")
    name = subprocess.check_output(["podman", *store, "images", "--quiet"], text=True).split()[0]
    (context / "Containerfile").write_text(DOCKERFILE.replace("FROM debian", f"FROM {name}"))

    def buildah() -> None:
        tag = f"made-{next(numbers)}"
        limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")  # may be more than the machine allows
        options = ("--isolation=chroot", "--layers", "--no-cache", "--pull=never", f"--tag={tag}")
        _quiet("buildah", *store, "build", *limits, *options, f"--file={context}/Containerfile", str(context))
        _quiet("buildah", *store, "push", "--quiet", tag, f"oci:{folder}/target/{tag}")

    try:
        rows = side_by_side({"labs build": labs, "buildah build and push": buildah}, runs, before=Ways(folder).fresh)
    finally:
        _quiet("podman", *store, "rmi", "--all", "--force")
    show("build, into an image layout", rows, ("buildah build and push",))
    return rows


def memory(folder: Path) -> None:
    """The most memory that unpacking a layer takes, for layers of growing size: it must not grow with them."""
    program = (
        "import resource, sys; from labs import layer;"
        "done = layer.unpack(open(sys.argv[1], 'rb'), sys.argv[2]);"
        "print(done.unpacked >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    ways = Ways(folder)
    print("\nunpacking one layer: MiB of its tar, MiB of memory at most")
    for blob in ways.blobs:
        argv = [sys.executable, "-c", program, blob, str(ways.fresh())]
        answer = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        print("".join(f"{word:>10}" for word in answer.split()))
    ways.fresh()


def measure(runs: int) -> Sequence[Row]:
    """All of it; rows in the order they were printed."""
    began = time.monotonic()
    with workplace() as folder:
        size = sum(_unpacked(folder))
        if size < SMALLEST:
            raise SystemExit(f"the image unpacks to {size >> 20} MiB only")
        print(f"an image of {size >> 20} MiB unpacked")
        rows = unpack(folder, min(3, runs))
        rows += [*transfer(folder, min(3, runs)), *building(folder, min(3, runs))]
        memory(folder)
    print(f"\nmeasured in {time.monotonic() - began:.0f} s")
    return rows


def _unpacked(folder: Path) -> Iterator[int]:
    """Bytes of each layer's tar."""
    layout = image.Layout(folder / "layout")
    for one in image.load(layout, "big").layers:
        with layout.open(one.digest) as file:
            yield sum(map(len, iter(partial(layer.decompressed(file).read, layer.BLOCK), b"")))


if __name__ == "__main__":
    main("image", measure)
