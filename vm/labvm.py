"""The lab machine without Vagrant: restored from the image's snapshot, as often and as many as wanted.

    run/NAME/                one running machine: its own overlay disk and where its other files are

Each start is a new overlay over the same snapshot, so every machine is clean and several can run side by side.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

from vm.image import NEED_MEMORY, REPO, image, memory_available, require_free
from vm.qemu import Machine, accelerator
from vm.steps import run, step

RUN = REPO / ".lab"


def machine(name: str) -> Machine | None:
    """Return the running machine called `name` of this clone, or None."""
    try:
        state = json.loads((RUN / name / "vm.json").read_text())
    except (OSError, ValueError):
        return None
    vm = Machine(Path(state["place"]), Path(state["image"]), RUN / name / "disk.qcow2")
    return vm if vm.alive() else None


def start(name: str, forwards: dict[int, int]) -> Machine:
    """Restore a clean machine called `name`, or return the one that runs; builds the image first where needed."""
    running = machine(name)
    if running:
        return running
    require_free("memory", memory_available(), NEED_MEMORY)
    source = image()
    stop(name)
    here = RUN / name
    here.mkdir(parents=True, exist_ok=True)
    # a unix socket's path has 108 bytes at most, and a clone may lie deeper
    place = Path(tempfile.mkdtemp(prefix="labvm-"))
    vm = Machine(place, source, here / "disk.qcow2")
    (here / "vm.json").write_text(json.dumps({"place": str(place), "image": str(source)}))
    with step(f"restore the machine ({accelerator()})"):
        run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", source / "boot.qcow2", vm.disk],
            place / "qemu.log",
        )
        try:
            vm.launch(forwards, incoming=f"exec:zstd -qdc '{source / 'ram.zst'}'")
            vm.resume()
            vm.wait_ssh(120)
        except BaseException:
            stop(name)
            raise
    return vm


def stop(name: str) -> bool:
    """End the machine called `name` and remove its files; return whether one ran."""
    running = machine(name)
    if running:
        running.kill()
    with contextlib.suppress(OSError, ValueError, KeyError):
        shutil.rmtree(json.loads((RUN / name / "vm.json").read_text())["place"])
    shutil.rmtree(RUN / name, ignore_errors=True)
    return running is not None
