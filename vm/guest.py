"""The running lab machine, whatever runs it: commands, files and clones in and out of it by ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vm import labvm, vagrant
from vm.image import REPO
from vm.steps import LabError, step

GUEST_REPO = "/lab"
GUEST_PYTHON = "/opt/labs/venv/bin/python"
LEFT_OUT = (
    ".git",
    ".lab",
    "_build",
    "__pycache__",
    ".ipynb_checkpoints",
    "node_modules",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
)
UP = "up"


def packing(target: str) -> list[str]:
    """Return the command line that writes this clone, as a machine gets it, to a tar file."""
    excludes = [f"--exclude={name}" for name in LEFT_OUT]
    return ["tar", "-C", str(REPO), *excludes, "--owner=0", "--group=0", "-cf", target, "."]


class Guest(NamedTuple):
    """A running lab machine, whatever runs it: the ssh command line that reaches its root shell."""

    ssh: list[str]

    @classmethod
    def by_config(cls, path: Path) -> Guest:
        """Return the machine that an ssh_config(5) calls lab."""
        return cls(["ssh", "-F", str(path), "lab"])

    def call(self, command: str, terminal: bool = False) -> int:
        """Run a shell command in the guest with our own input and output; return its exit status."""
        return subprocess.run([*self.ssh[:-1], *(["-t"] if terminal else []), self.ssh[-1], command]).returncode

    def push(self) -> None:
        """Copy this clone to the guest's /lab, replacing what was there."""
        unpack = f"mkdir -p {GUEST_REPO} && cd {GUEST_REPO} && find . -mindepth 1 -delete && tar -xf - && touch .pushed"
        with subprocess.Popen(packing("-"), stdout=subprocess.PIPE) as tar:
            status = subprocess.run([*self.ssh, unpack], stdin=tar.stdout).returncode
        if tar.returncode or status:
            raise LabError("the repository could not be copied into the lab machine")

    def pull(self, command: str, target: Path) -> list[str]:
        """Unpack what a guest command writes as a tar stream (run in /lab) below `target`; return the names."""
        data = subprocess.run([*self.ssh, f"cd {GUEST_REPO} && {command}"], stdout=subprocess.PIPE, check=True).stdout
        target.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["tar", "-C", str(target), "-xvf", "-", "--no-same-owner"], input=data, capture_output=True
        )
        if done.returncode:
            raise LabError(f"the lab machine's files could not be unpacked: {done.stderr.decode().strip()}")
        return done.stdout.decode().split()


def backend() -> str:
    """Return LAB_BACKEND; `./lab` has checked it."""
    return os.environ.get("LAB_BACKEND", "qemu")


@contextlib.contextmanager
def fresh_guest(name: str) -> Iterator[Guest]:
    """A lab machine for one job with this clone in it; ended afterwards (Vagrant's one machine is left as it was)."""
    if backend() == "vagrant":
        yield Guest.by_config(vagrant.start())
        return
    name = f"{name}-{os.getpid()}"
    try:
        guest = Guest(labvm.start(name, {}).ssh())
        with step("the book into the machine"):
            guest.push()
        yield guest
    finally:
        labvm.stop(name)


def running_guest() -> Guest | None:
    """Return the machine that `up` started, or None."""
    if backend() == "vagrant":
        config = vagrant.running()
        return Guest.by_config(config) if config else None
    vm = labvm.machine(UP)
    return Guest(vm.ssh()) if vm else None
