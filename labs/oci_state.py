"""A container as the runtime keeps it: a directory under --root with state.json, and what the kernel says of it.

runtime.md "State" of the OCI runtime specification.
"""

from __future__ import annotations

import errno
import os

from labs import machine, oci_cgroup, oci_config, oci_json
from labs.errors import BadInput, KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ROOT = "/run/labs/oci"
NAME = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+-."


class Options:
    """What the command line says beside the name: paths, and how the caller wants it done."""

    root, bundle, config, pid_file, console_socket = ROOT, ".", "config.json", "", ""
    manager, preserve_fds, no_pivot, no_new_keyring, detach, keep = "cgroupfs", 0, False, False, False, False
    warn: Callable[[str], object] = staticmethod(lambda message: None)


def check_name(name: str) -> str:
    """A container's id becomes a directory's name, so nothing in it may mean more."""
    if not name or set(name) - set(NAME) or name in (".", "..") or len(name) > 1024:
        raise BadInput("id", name, "must be of letters, digits and _ + - .")
    return name


class OciContainer:
    """A container that has been created, by its directory; what is in state.json, and what the kernel says now."""

    def __init__(self, root: str, name: str) -> None:
        self.name, self.folder = check_name(name), f"{root}/{name}"
        try:
            self.saved: dict[str, Any] = oci_json.loads(machine.read_file(f"{self.folder}/state.json"))
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            raise BadInput("id", name, "no such container") from None
        self.pid: int = self.saved["pid"]
        self.config: dict[str, Any] = self.saved["config"]
        self.cgroup: str = self.saved["cgroup"]

    def alive(self) -> bool:
        """Whether process 1 is there, is still the same process, and has not ended."""
        found = stat_of(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.saved["started"]

    def status(self) -> str:
        """creating, created, running, paused or stopped: runtime.md, "State"."""
        if not self.alive():
            return "stopped"
        if not self.saved["ready"]:
            return "creating"
        if os.path.exists(f"{self.folder}/start"):
            return "created"
        return "paused" if self.saved["manager"] != "disabled" and oci_cgroup.is_frozen(self.cgroup) else "running"

    def state(self) -> dict[str, Any]:
        """The state object of the specification, with what runc's has beside it: rootfs, created, owner."""
        status = self.status()
        more = {key: self.saved[key] for key in ("rootfs", "created", "owner")}
        pid = self.pid if status != "stopped" else 0
        return state_object(self.name, status, pid, self.saved["bundle"], self.config) | more

    def pidfd(self) -> int:
        """A pidfd of process 1, surely of the same process: pidfd_open(2)."""
        fd = os.pidfd_open(self.pid)
        if not self.alive():
            os.close(fd)
            raise ProcessLookupError(errno.ESRCH, "container is not running")
        return fd


def stat_of(pid: int) -> tuple[str, str] | None:
    """The state's letter and the start time of a process, proc_pid_stat(5); None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0].decode(), fields[19].decode()


def state_object(name: str, status: str, pid: int, bundle: str, config: dict[str, Any]) -> dict[str, Any]:
    """The object that hooks and `state` give: runtime.md, "State"."""
    state = {"ociVersion": oci_config.VERSION, "id": name, "status": status, "pid": pid, "bundle": bundle}
    return state | ({"annotations": config["annotations"]} if config.get("annotations") else {})


def save(folder: str, saved: dict[str, Any]) -> None:
    """Write state.json so that a reader sees the old one or the new one."""
    write_whole(f"{folder}/state.json", oci_json.dumps(saved))


def write_whole(path: str, text: str) -> None:
    """Write a file beside it and rename: rename(2) is one step for who reads."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def write_pid_file(path: str, pid: int) -> None:
    """--pid-file: the pid as the caller's PID namespace has it."""
    if path:
        write_whole(path, str(pid))


def read_config(options: Options) -> dict[str, Any]:
    """The bundle's config.json (or --config), checked."""
    path = os.path.join(options.bundle, options.config)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("config.json", path, getattr(error, "strerror", None) or "is not UTF-8") from error
    return oci_config.load(oci_json.loads(text, "config.json"))
