"""The lab machine's file system on this machine's own kernel, for the tests that ask for no more than that.

Most tests of `labs` need a Linux kernel, root and Debian's tools, but neither the machine's daemons nor its cgroup
controllers; those that do bear the marker `machine`. An emulated machine takes some twenty times as long for the same
test, so where this machine is Linux and we are root, the others run here, in namespaces of their own (native.sh).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vm.guest import packing
from vm.labvm import RUN
from vm.steps import LabError, run, step

# what is collected once need not be compiled again in every machine: their Python is the same
_COLLECT = """
python -m pytest --collect-only -qq -m machine "$@" >collected || [ $? = 5 ] || { cat collected >&2; exit 1; }
find . -name __pycache__ -print0 | tar --null -cf - collected -T -
"""


class Native(NamedTuple):
    """A copy of the machine's disk and of this clone, ready for commands."""

    disk: Path
    tree: Path

    def command(self, *argv: str) -> list[str]:
        """Return the command line that runs `argv` there, in /lab; its standard input is to be `tree`."""
        return [str(Path(__file__).with_name("native.sh")), str(self.disk), *argv]

    def collect(self, *arguments: str) -> tuple[list[str], bytes]:
        """Return the files that have tests for the machine, and the bytecode of all of them as a tar file."""
        with self.tree.open("rb") as tree:
            argv = self.command("sh", "-euc", _COLLECT, "sh", *arguments)
            done = subprocess.run(argv, stdin=tree, capture_output=True)
        if done.returncode:
            raise LabError(f"tests: they cannot be collected:\n{done.stderr.decode(errors='replace')}")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            lines = (tar.extractfile("collected") or io.BytesIO()).read().decode().splitlines()
        return [line.rpartition(": ")[0] for line in lines if line.startswith("tests/")], done.stdout


@contextlib.contextmanager
def native(image: Path) -> Iterator[Native | None]:
    """The image's file system with this clone in it; None where this machine or this user cannot run it."""
    for killed in RUN.glob("native-*"):
        if not Path("/proc", killed.name.split("-")[1]).exists():
            shutil.rmtree(killed)
    here = Path(tempfile.mkdtemp(prefix=f"native-{os.getpid()}-", dir=RUN))
    place = Native(here / "disk.raw", here / "tree.tar")
    try:
        yield place if os.geteuid() == 0 and _ready(place, image) else None
    finally:
        shutil.rmtree(here, ignore_errors=True)


def _ready(place: Native, image: Path) -> bool:
    log = RUN / "native.log"
    with step("the lab's file system for this kernel"):
        run(["cp", "--sparse=always", "--reflink=auto", image / "disk.raw", place.disk], log)
        run(packing(str(place.tree)), log)
    try:
        with place.tree.open("rb") as tree:
            run(place.command("true"), log, stdin=tree)
    except LabError as error:
        print(f"  this kernel does not run it, every test goes to the lab machine: {error}", flush=True)
        return False
    return True
