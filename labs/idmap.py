"""Id-mapped mounts: one filesystem whose files seem to belong to others, through one mount only.

mount_setattr(2), "ID-mapped mounts"; the kernel's Documentation/filesystems/idmappings.rst.  Nothing on the disk
changes, so a million files cost no more than one: what chown(1) would write into every inode, the kernel
works out at each look.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from labs import machine, mounts, namespaces, process, syscalls
from labs.errors import BadInput, KernelError

Rows = Sequence[namespaces.Map]

# What mount_setattr(2) says of a filesystem that cannot do it.
UNABLE = "the filesystem cannot be id-mapped"
OVERFLOW_ID = 65534  # DEFAULT_OVERFLOWUID, <linux/highuid.h>; proc_sys_kernel(5), overflowuid


def translate(rows: Rows, number: int) -> int:
    """The id that a map makes of this one: OVERFLOW_ID where no row has it, user_namespaces(7)."""
    for first, second, count in rows:
        if first <= number < first + count:
            return second + number - first
    return OVERFLOW_ID


@contextmanager
def user_namespace(uids: Rows, gids: Rows | None = None) -> Iterator[int]:
    """A descriptor of a user namespace with these maps, in which nobody is; gids are as uids where not given."""
    machine.require()
    with process.fork(_stay) as child:
        process.until(lambda: process.readable(child.pidfd, 0) or _own(child.pid))
        if not _own(child.pid):
            child.wait()
        namespaces.write_maps(child.pid, uids, uids if gids is None else gids, setgroups="allow")
        fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    with mounts.opened(fd):
        yield fd


def _stay() -> None:
    """In the child: a namespace needs a process until its map is written."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    signal.pause()


def _own(pid: int) -> bool:
    """Whether a process is in another user namespace than this one; a zombie has one too."""
    return os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")


@contextmanager
def bind(source: str, target: str, uids: Rows, gids: Rows | None = None, readonly: bool = False) -> Iterator[str]:
    """Show source on target, private, each file with the owner that the map says.

    uids, gids: rows of (on the filesystem, through the mount, how many); gids are as uids where not given.  An owner
    in no row shows as OVERFLOW_ID, and nobody writes under that one.
    Raises KernelError, EINVAL, where the filesystem cannot do it.
    """
    if not uids:
        raise BadInput("uids", uids, "must have one row at least")
    with user_namespace(uids, gids) as userns, attach(source, target, userns, readonly):
        yield target


@contextmanager
def attach(source: str, target: str, userns: int, readonly: bool = False) -> Iterator[str]:
    """The same with the maps of a user namespace that is there: one serves any number of mounts."""
    tree = _mapped(source, userns, syscalls.MOUNT_ATTR_RDONLY if readonly else 0)
    with mounts.opened(tree):
        syscalls.move_mount(tree, target)
        syscalls.mount_setattr(tree, propagation=syscalls.MS_PRIVATE)  # it was made shared below a shared one
    with mounts.mounted(target):
        yield target


def answer(path: str) -> str:
    """What the kernel says when the filesystem of path is to be id-mapped: "ok", or the error's name.

    The mount is made and mapped, and never put anywhere.
    """
    try:
        with user_namespace([(0, 1, 1)]) as userns:
            os.close(_mapped(path, userns))
    except KernelError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def _mapped(source: str, userns: int, attributes: int = 0) -> int:
    """A mapped mount of source that is nowhere yet, for syscalls.move_mount."""
    tree = syscalls.open_tree(source)
    try:
        syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_IDMAP | attributes, userns_fd=userns)
    except KernelError as error:
        os.close(tree)
        raise KernelError(f"mount_setattr: {UNABLE}", error.errno or 0, source) from error
    return tree
