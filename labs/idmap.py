"""Id-mapped mounts: one filesystem whose files seem to belong to others, through one mount only.

mount_setattr(2), "ID-mapped mounts"; the kernel's Documentation/filesystems/idmappings.rst.  Nothing on the disk
changes, so a million files cost no more than one: what chown(1) would write into every inode, the kernel
works out at each look.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from labs import machine, namespaces, process, syscalls
from labs.errors import BadInput, KernelError

# What mount_setattr(2) says of a filesystem that cannot do it.
UNABLE = "the filesystem cannot be id-mapped"


@contextmanager
def user_namespace(rows: Sequence[namespaces.Map]) -> Iterator[int]:
    """A descriptor of a user namespace that has this map, for uids and gids alike, and in which nobody is."""
    machine.require()
    with process.fork(_stay) as child:
        process.until(lambda: not namespaces.same("self", child.pid)["user"])
        namespaces.write_maps(child.pid, rows, rows, setgroups="allow")
        fd = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        child.kill()
    try:
        yield fd
    finally:
        os.close(fd)


def _stay() -> None:
    """In the child: a namespace needs a process until its map is written."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    signal.pause()


@contextmanager
def bind(source: str, target: str, rows: Sequence[namespaces.Map], readonly: bool = False) -> Iterator[str]:
    """Show source on target, each file with the owner that the map says.

    rows: (on the filesystem, through the mount, how many).  An owner in no row shows as the overflow id 65534, and
    nobody writes under that one.  Raises KernelError, EINVAL, where the filesystem cannot do it.
    """
    if not rows:
        raise BadInput("rows", rows, "must have one row at least")
    tree = syscalls.open_tree(source)
    try:
        with user_namespace(rows) as userns:
            read_only = syscalls.MOUNT_ATTR_RDONLY if readonly else 0
            attributes = syscalls.MOUNT_ATTR_IDMAP | read_only
            try:
                syscalls.mount_setattr(tree, attr_set=attributes, propagation=syscalls.MS_PRIVATE, userns_fd=userns)
            except KernelError as error:
                raise KernelError(f"mount_setattr: {UNABLE}", error.errno or 0, source) from error
        syscalls.move_mount(tree, target)
    finally:
        os.close(tree)
    try:
        yield target
    finally:
        syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
