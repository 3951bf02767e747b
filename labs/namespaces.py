"""The eight namespaces: which one a process is in, keeping one alive, entering one, and ID maps.

namespaces(7), user_namespaces(7), setns(2).  The caller's own process never enters anything: a
forked child does.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

from labs import machine, mounts, process, syscalls
from labs.errors import BadInput

T = TypeVar("T")
Map = tuple[int, int, int]
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # <linux/sockios.h>, <linux/if.h>

FLAGS = {
    "uts": syscalls.CLONE_NEWUTS,
    "pid": syscalls.CLONE_NEWPID,
    "mnt": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "user": syscalls.CLONE_NEWUSER,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "time": syscalls.CLONE_NEWTIME,
}
KINDS = tuple(FLAGS)


class Namespace(NamedTuple):
    """One namespace; the inode number on nsfs tells it from all others of this machine."""

    kind: str
    inode: int


def flags(kinds: Sequence[str]) -> int:
    """The CLONE_NEW* bits of these kinds."""
    total = 0
    for kind in kinds:
        if kind not in FLAGS:
            raise BadInput("kind", kind, f"must be one of {' '.join(KINDS)}")
        total |= FLAGS[kind]
    return total


def of(pid: int | str = "self") -> dict[str, Namespace]:
    """The namespaces of a process, from the links in /proc/PID/ns."""
    return {kind: Namespace(kind, _inode(os.readlink(f"/proc/{pid}/ns/{kind}"))) for kind in KINDS}


def _inode(link: str) -> int:
    """The number in a link such as "uts:[4026531838]"."""
    return int(link.partition("[")[2].rstrip("]"))


def same(pid_a: int | str, pid_b: int | str) -> dict[str, bool]:
    """For each kind, whether the two processes share the namespace."""
    a, b = of(pid_a), of(pid_b)
    return {kind: a[kind] == b[kind] for kind in KINDS}


@contextmanager
def hold(pid: int, kind: str) -> Iterator[str]:
    """Keep a namespace alive without any process: bind-mount its link on a file, and give that path.

    The mount stands on a private mount, because a mount namespace must not be propagated into
    another one: mount_namespaces(7).
    """
    flags([kind])
    machine.require()
    folder = f"{machine.STATE}/ns/{machine.new_name('ns')}"
    path = f"{folder}/{kind}"
    os.makedirs(folder)
    with ExitStack() as undo:
        undo.callback(os.rmdir, folder)
        undo.enter_context(mounts.bind(folder, folder))
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o444))
        undo.callback(os.unlink, path)
        undo.enter_context(mounts.bind(f"/proc/{pid}/ns/{kind}", path))
        yield path


def enter(pid: int, kinds: Sequence[str]) -> None:
    """setns(2) into namespaces of a process.  For a forked child only; a new pid namespace is for its children."""
    pidfd = os.pidfd_open(pid)
    try:
        syscalls.setns(pidfd, flags(kinds))
    finally:
        os.close(pidfd)


def call_in(pid: int, kinds: Sequence[str], fn: Callable[..., T], *args: object) -> T:
    """What fn(*args) returns in a child that has entered these namespaces of a process."""
    def visit() -> T:
        enter(pid, kinds)
        return process.call(fn, *args) if "pid" in kinds else fn(*args)
    return process.call(visit)


def loopback_up() -> None:
    """Set lo up in the network namespace that a forked child is in: netdevice(7)."""
    request = struct.pack("16sH14x", b"lo", IFF_UP | IFF_RUNNING)
    with process.step("lo up"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


class Maps(NamedTuple):
    """ID maps of a user namespace: rows of (first inside, first outside, how many)."""

    uid: list[Map]
    gid: list[Map]
    setgroups: str


def maps(pid: int | str = "self") -> Maps:
    """The maps of a process's user namespace: user_namespaces(7)."""
    with open(f"/proc/{pid}/setgroups", encoding="utf-8") as file:
        setgroups = file.read().strip()
    return Maps(_read_map(f"/proc/{pid}/uid_map"), _read_map(f"/proc/{pid}/gid_map"), setgroups)


def _read_map(path: str) -> list[Map]:
    with open(path, encoding="utf-8") as file:
        rows = (line.split() for line in file)
        return [(int(inside), int(outside), int(count)) for inside, outside, count in rows]


def write_maps(pid: int, uid_map: Sequence[Map], gid_map: Sequence[Map], setgroups: str = "deny") -> None:
    """Write the maps of a process's user namespace, once; setgroups must be denied before an unprivileged gid_map."""
    machine.write_file(f"/proc/{pid}/setgroups", setgroups)
    for name, rows in (("uid_map", uid_map), ("gid_map", gid_map)):
        machine.write_file(f"/proc/{pid}/{name}", "\n".join(" ".join(map(str, row)) for row in rows))
