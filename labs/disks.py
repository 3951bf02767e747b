"""Filesystems in a file, and limits on what one directory may hold: the disk that a lab can fill without harm.

loop(4), mkfs(8), mount(8); project quotas: quotactl_fd(2), ioctl_fsgetxattr(2), ext4(5) "project".
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from labs import machine, syscalls
from labs.errors import BadInput, ChildFailed

# What makes each filesystem; the smallest that makes sense, in bytes.
MAKERS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-O", "quota,project", "-E", "lazy_itable_init=0"),
    "btrfs": ("mkfs.btrfs", "--quiet", "--force", "--mixed"),
}
SMALLEST = {"ext4": 4 << 20, "btrfs": 32 << 20}
OPTIONS = {"ext4": "prjquota", "btrfs": "defaults"}
# <linux/fs.h>
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
FS_XFLAG_PROJINHERIT = 0x200
FSXATTR = struct.Struct("IIIII8x")  # xflags, extsize, nextents, projid, cowextsize
# <linux/quota.h>
PRJQUOTA, Q_GETQUOTA, Q_SETQUOTA, QIF_BLIMITS = 2, 0x800007, 0x800008, 1
DQBLK = struct.Struct("8QI4x")  # block limits (hard, soft) in KiB, space in bytes, the same of inodes, two times; valid


class Disk(NamedTuple):
    """A mounted filesystem of its own.

    Attributes:
        path: where it is mounted.
        file: what it lies in; as long as the disk is large, and as big as what was written.
        device: the loop device between the two.
    """

    path: str
    file: str
    device: str


class Usage(NamedTuple):
    """What the directories of one project hold, and may hold: bytes, 0 for no limit."""

    used: int
    limit: int


@contextmanager
def disk(size: int, kind: str = "ext4", options: str = "") -> Iterator[Disk]:
    """Make a filesystem of that many bytes, mount it, and remove all of it at the end.

    The kernel itself lets the loop device go with the mount (LO_FLAGS_AUTOCLEAR), so none outlives a program that was
    killed once its mount is gone.
    """
    machine.require()
    if kind not in MAKERS:
        raise BadInput("kind", kind, f"must be one of {', '.join(MAKERS)}")
    if size < SMALLEST[kind]:
        raise BadInput("size", size, f"{kind} needs {SMALLEST[kind]} bytes at least")
    place = f"{machine.DATA}/{machine.new_name('disk')}"
    path, file = f"{place}/mnt", f"{place}/file"
    os.makedirs(path)
    try:
        with open(file, "wb") as sparse:
            sparse.truncate(size)
        _tool(*MAKERS[kind], file)
        chosen = ",".join(filter(None, ["loop", OPTIONS[kind], options]))
        _tool("mount", "--types", kind, "--options", chosen, file, path)
        try:
            yield Disk(path, file, _device(path))
        finally:
            syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    finally:
        shutil.rmtree(place)


def _tool(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildFailed(words[0], detail=(done.stderr or done.stdout).strip().splitlines()[-1])


def _device(path: str) -> str:
    number = os.stat(path).st_dev
    for entry in os.scandir("/sys/class/block"):
        if machine.read_file(f"{entry.path}/dev").strip() == f"{os.major(number)}:{os.minor(number)}":
            return f"/dev/{entry.name}"
    return machine.read_file("/proc/self/mounts").partition(f" {path} ")[0].rpartition("\n")[2]  # btrfs counts its own


def limit(path: str, project: int, size: int) -> None:
    """Let what lies below a directory hold that many bytes: as project number `project`, which what is new inherits.

    The filesystem must have project quotas (ext4 of disk() has them).  0 takes the limit away.
    """
    if not 0 < project < 1 << 32:
        raise BadInput("project", project, "must be 1 to 4294967295")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags, extent, extents, _, cow = FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))
        wanted = FSXATTR.pack(flags | FS_XFLAG_PROJINHERIT, extent, extents, project, cow)
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, wanted)
        block = bytearray(DQBLK.pack(-(-size // 1024), 0, 0, 0, 0, 0, 0, 0, QIF_BLIMITS))
        syscalls.quotactl_fd(fd, _command(Q_SETQUOTA), project, block)
    finally:
        os.close(fd)


def usage(path: str, project: int) -> Usage:
    """What a project of the filesystem at path holds: as the quota counts it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        block = bytearray(DQBLK.size)
        syscalls.quotactl_fd(fd, _command(Q_GETQUOTA), project, block)
    finally:
        os.close(fd)
    hard, _, space, *_ = DQBLK.unpack(block)
    return Usage(space, hard * 1024)


def _command(command: int) -> int:
    """QCMD of <linux/quota.h>."""
    return command << 8 | PRJQUOTA
