"""The lab machine: its marker, the places labs may write to, and the names it gives."""

from __future__ import annotations

import os

from labs.errors import BadInput, KernelError, NotALab

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MARKER = "/etc/labs-machine"
STATE = "/run/labs"
DATA = "/var/lib/labs"
CGROUP_ROOT = "/sys/fs/cgroup"
CGROUP = CGROUP_ROOT + "/labs"
PREFIX = "labs-"
LONG_PATH = 2000
ROOTFS = {name: f"/opt/labs/rootfs/{name}" for name in ("busybox", "debian")}


def require() -> None:
    """Raise NotALab unless this machine bears the marker and its cgroups are version 2 alone."""
    if not os.path.exists(MARKER):
        raise NotALab(f"{MARKER} is not there")
    if not os.path.exists(CGROUP_ROOT + "/cgroup.controllers"):
        raise NotALab(f"{CGROUP_ROOT} is {_cgroup_version()}, not cgroup v2")


def _cgroup_version() -> str:
    """What is mounted instead of cgroup v2: cgroups(7), "cgroups v2 unified hierarchy"."""
    if os.path.exists(CGROUP_ROOT + "/unified/cgroup.controllers"):
        return "hybrid (v1 with v2 in unified/)"
    if os.path.exists(CGROUP_ROOT + "/memory/memory.limit_in_bytes"):
        return "cgroup v1"
    return "not a cgroup mount"


def new_name(kind: str) -> str:
    """A fresh name under the prefix: new_name("c") is like "labs-c-3fa94e"."""
    return f"{PREFIX}{kind}-{os.urandom(3).hex()}"


def rootfs(name: str) -> str:
    """The directory of a root filesystem: a name in ROOTFS, or an absolute path."""
    path = ROOTFS.get(name, name)
    if not path.startswith("/"):
        raise BadInput("rootfs", name, f"must be one of {', '.join(ROOTFS)} or an absolute path")
    if not os.path.isdir(path):
        raise BadInput("rootfs", name, "no such directory")
    return path


def read_file(path: str) -> str:
    """The text of a kernel file, which says nothing about its size; a refusal is a KernelError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = list(iter(lambda: os.read(descriptor, 65536), b""))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError(f"read {os.path.basename(path)}", error.errno or 0, path) from error
    return os.fsdecode(b"".join(parts))


def write_file(path: str, text: str) -> None:
    """One write(2) of the text to a kernel file; a refusal is a KernelError with the file and the text."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KernelError(f"write {os.path.basename(path)}", error.errno or 0, path, text) from error


def remove_tree(path: str) -> None:
    """Remove a directory and all in it, following no link; somebody else may be removing it too.

    A program may nest directories deeper than a path can be long: such ones are first moved up.
    """
    doomed = [path]
    for folder in doomed:
        for entry in _entries(folder):
            if not entry.is_dir(follow_symlinks=False):
                _gone(os.unlink, entry.path)
                continue
            doomed.append(entry.path)
            if len(entry.path) > LONG_PATH:
                doomed[-1] = f"{path}/{os.urandom(8).hex()}"
                os.rename(entry.path, doomed[-1])
    for folder in reversed(doomed):
        _gone(os.rmdir, folder)


def _gone(remove: Callable[[str], object], path: str) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        pass  # contextlib.suppress would cost the OCI runtime an import


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
