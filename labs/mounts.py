"""Mounts: the mount table, bind, tmpfs and overlay mounts, and what a container finds mounted.

proc_pid_mountinfo(5), mount(2), mount_namespaces(7); the OCI runtime specification's default
filesystems, devices, masked and read-only paths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from labs import machine, syscalls
from labs.errors import BadInput, KernelError
from labs.syscalls import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_RDONLY, MS_REC, MS_STRICTATIME


class Mount(NamedTuple):
    """One line of /proc/PID/mountinfo, proc_pid_mountinfo(5)."""

    id: int
    parent: int
    dev: str
    root: str
    target: str
    options: str
    propagation: str
    fstype: str
    source: str
    super_options: str


def table(pid: int | str = "self") -> list[Mount]:
    """The mounts that a process sees, in the kernel's order.

    Since Linux 6.8 that is the order in which the mounts were made, and one that open_tree(2) made
    may be attached much later: the lines do not tell which mount is the root. See root.
    """
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [_parse(line) for line in file]


def root(rows: Sequence[Mount]) -> Mount | None:
    """The mount that is the root of the process, which is the one whose parent it does not see.

    Another may lie over it on / (pivot_root(2) of "." to "." puts the old root there): a path that begins
    with / does not cross into that one. None after a chroot(2) into a plain directory.
    """
    seen = {row.id for row in rows}
    return next((row for row in rows if row.target == "/" and row.parent not in seen), None)


def holding(path: str, pid: int | str = "self") -> Mount:
    """The mount that a path of a process lies on, links followed, whatever was mounted there before."""
    with opened(o_path(path) if pid == "self" else beneath(f"/proc/{pid}/root", path)) as fd:
        return holding_fd(fd, pid)


def holding_fd(fd: int, pid: int | str = "self") -> Mount:
    """The mount that an open file lies on, which pid sees: mnt_id in proc_pid_fdinfo(5)."""
    fields = dict(line.split(":", 1) for line in machine.read_file(f"/proc/self/fdinfo/{fd}").splitlines())
    return next(row for row in table(pid) if row.id == int(fields["mnt_id"]))


def beneath(root: str, path: str, flags: int = os.O_PATH) -> int:
    """A descriptor of a path as a process sees it whose / is root: no link leads out (openat2(2), RESOLVE_IN_ROOT).

    With O_PATH it opens nothing.  It stays what it is whatever is put in the path's place afterwards.
    """
    with opened(o_path(root)) as top:
        return syscalls.openat2(top, path.lstrip("/") or ".", flags, syscalls.RESOLVE_IN_ROOT)


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close a descriptor at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def o_path(path: str) -> int:
    """A descriptor that stands for a path and opens nothing: open(2), O_PATH.  KernelError with the path."""
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError("open", error.errno or 0, path) from error


def within(row: Mount, path: str) -> str:
    """A path on that mount as its filesystem knows it: what stands in the root field when it is bound elsewhere."""
    inside = os.path.relpath(os.path.realpath(path), row.target)
    return os.path.normpath(os.path.join(row.root, inside))


def peers(row: Mount) -> dict[str, int]:
    """The propagation of a mount: {"shared": 3, "master": 1}, {"unbindable": 0} or {}, mount_namespaces(7)."""
    tags = (tag.partition(":") for tag in row.propagation.split(" ") if tag != "private")
    return {kind: int(number or 0) for kind, _, number in tags}


def _parse(line: str) -> Mount:
    left, _, right = line.rstrip("\n").partition(" - ")
    number, parent, dev, root, target, options, *tags = left.split(" ")
    fstype, source, super_options = right.split(" ")
    return Mount(int(number), int(parent), dev, _unescape(root), _unescape(target), options,
                 " ".join(tags) or "private", fstype, _unescape(source), super_options)


def _unescape(text: str) -> str:
    r"""Space, tab, newline and backslash stand as \040, \011, \012 and \134."""
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escaped, plain)
    return text


@contextmanager
def mounted(target: str) -> Iterator[str]:
    """Take the mount off target on the way out, even while someone still uses it."""
    try:
        yield target
    finally:
        syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


@contextmanager
def bind(source: str, target: str, readonly: bool = False, recursive: bool = False) -> Iterator[str]:
    """A private bind mount of source on target.

    Read-only needs a second call: a bind mount ignores every flag but MS_REC (mount(2)).
    """
    machine.require()
    deep = MS_REC if recursive else 0
    syscalls.mount(source, target, None, MS_BIND | deep)
    with mounted(target):
        syscalls.mount(None, target, None, MS_PRIVATE | deep)
        if readonly:
            make_readonly(target, recursive)
        yield target


@contextmanager
def bind_beneath(root: str, source: str, target: str, readonly: bool = False) -> Iterator[str]:
    """A private bind mount of source, with all that is mounted below it, on a target that is looked up beneath root.

    The target is opened once and the finished mount attached to what is open, move_mount(2): no link leads it out of
    root, nobody can put another one there in between, and it is at no time writable when it should not be.
    """
    machine.require()
    with ExitStack() as held:
        onto = beneath(root, target)
        held.callback(os.close, onto)
        tree = syscalls.open_tree(source, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_RECURSIVE)
        held.callback(os.close, tree)
        read_only = syscalls.MOUNT_ATTR_RDONLY if readonly else 0
        syscalls.mount_setattr(tree, attr_set=read_only, propagation=MS_PRIVATE, recursive=True)
        syscalls.move_mount(tree, target_fd=onto)
        held.callback(syscalls.umount2, f"/proc/self/fd/{tree}", syscalls.MNT_DETACH)
        yield os.readlink(f"/proc/self/fd/{tree}")


def make_readonly(target: str, recursive: bool = False) -> None:
    """Make a mount (not its filesystem) read-only and leave its other options: mount_setattr(2)."""
    syscalls.mount_setattr(syscalls.AT_FDCWD, target, attr_set=syscalls.MOUNT_ATTR_RDONLY, recursive=recursive)


@contextmanager
def tmpfs(target: str, size: int | str = "16m", mode: int = 0o755) -> Iterator[str]:
    """A tmpfs of that size (bytes, or with k, m, g) on target: tmpfs(5)."""
    machine.require()
    syscalls.mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode={mode:o}")
    with mounted(target):
        syscalls.mount(None, target, None, MS_PRIVATE)
        yield target


@contextmanager
def overlay(lower: Sequence[str], upper: str | None, work: str | None, target: str) -> Iterator[str]:
    """An overlay of read-only lower directories (uppermost first) and a writable upper one."""
    machine.require()
    syscalls.mount("overlay", target, "overlay", 0, overlay_options(lower, upper, work))
    with mounted(target):
        yield target


def overlay_tree(lower: Sequence[str], upper: str, work: str) -> int:
    """A detached overlay mount (for syscalls.move_mount) of any number of layers, uppermost first, volatile.

    Each layer is an option of its own, "lowerdir+" (Linux 6.8), so no page has to hold them all: fsconfig(2).
    """
    context = syscalls.fsopen("overlay")
    try:
        for path in lower:
            syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, "lowerdir+", path)
        syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, "upperdir", upper)
        syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, "workdir", work)
        syscalls.fsconfig(context, syscalls.FSCONFIG_SET_FLAG, "volatile")
        syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(context)
    finally:
        os.close(context)


def overlay_options(lower: Sequence[str], upper: str | None = None, work: str | None = None,
                    extra: str = "") -> str:
    """The data of an overlay mount; colons, commas and backslashes in paths are escaped.

    mount(2) takes one page, so many long paths do not fit; the kernel's word is in its
    Documentation/filesystems/overlayfs.rst.
    """
    if isinstance(lower, str) or not lower:
        raise BadInput("lower", lower, "must be a list of directories")
    if (upper is None) != (work is None):
        raise BadInput("work", work, "upper and work must be given together")
    options = "lowerdir=" + ":".join(map(_escape, lower))
    if upper is not None and work is not None:
        options += f",upperdir={_escape(upper)},workdir={_escape(work)}"
    if len(options := options + extra) >= 4096:
        raise BadInput("lower", f"{len(lower)} directories", "options must be shorter than a page, 4096 bytes")
    return options


def _escape(path: str) -> str:
    for special in "\\:,":
        path = path.replace(special, "\\" + special)
    return path


class ApiMount(NamedTuple):
    """A filesystem through which the kernel speaks to programs, where a container expects it."""

    target: str
    fstype: str
    flags: int
    data: str | None = None


def api_filesystems() -> list[ApiMount]:
    """What an OCI runtime mounts by default, in this order (config-linux.md, "Default Filesystems")."""
    usual = MS_NOSUID | MS_NOEXEC | MS_NODEV
    return [
        ApiMount("/proc", "proc", usual),
        ApiMount("/dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"),
        ApiMount("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ApiMount("/dev/shm", "tmpfs", usual, "mode=1777,size=65536k"),  # noqa: S108  the container's own
        ApiMount("/dev/mqueue", "mqueue", usual),
        ApiMount("/sys", "sysfs", usual | MS_RDONLY),
        ApiMount("/sys/fs/cgroup", "cgroup2", usual | MS_RDONLY),
    ]


class Device(NamedTuple):
    """A character device node, readable and writable by all."""

    path: str
    major: int
    minor: int


DEVICES = [
    Device("/dev/null", 1, 3),
    Device("/dev/zero", 1, 5),
    Device("/dev/full", 1, 7),
    Device("/dev/random", 1, 8),
    Device("/dev/urandom", 1, 9),
    Device("/dev/tty", 5, 0),
]

DEV_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/ptmx": "pts/ptmx",
}

# Docker's defaults, as `docker inspect` prints them under HostConfig.
MASKED = [
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
