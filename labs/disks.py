"""Filesystems in a file, and limits on what one directory may hold: the disk that a lab can fill without harm.

loop(4), mkfs(8), mount(2); project quotas: quotactl_fd(2), ioctl_fsgetxattr(2), ext4(5) "project".
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from labs import machine, mounts, syscalls
from labs.errors import BadInput, ChildFailed, KernelError

# What makes each filesystem, and what makes it count the space of projects.
MAKERS = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "btrfs": ("mkfs.btrfs", "--quiet", "--force", "--mixed"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}
COUNTED = {"ext4": ("-O", "quota,project"), "xfs": ()}
SMALLEST = {"ext4": 4 << 20, "btrfs": 32 << 20, "xfs": 300 << 20}  # bytes; xfs: mkfs.xfs(8), since xfsprogs 5.19
# <linux/loop.h>; struct loop_config: the file, its block size, struct loop_info64 (only the flags of it), eight words
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LO_FLAGS_AUTOCLEAR = 0x4C82, 0x4C0A, 4
LOOP_CONFIG = struct.Struct("II 40x 12xI 64x64x32x16x 64x")
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
def disk(size: int, kind: str = "ext4", quota: bool = False, options: str = "",
         store: str = machine.DATA) -> Iterator[Disk]:
    """Make a filesystem of that many bytes, mount it, and remove all of it at the end.

    quota: with project quotas, for limit() (ext4 and xfs).  options: those of mount(2).  store: where its file lies.
    Raises BadInput, ChildFailed (mkfs) or KernelError (the loop device, mount); in every case nothing is left.
    """
    machine.require()
    _check(size, kind, quota)
    place = f"{store}/{machine.new_name('disk')}"
    path, file = f"{place}/mnt", f"{place}/file"
    os.makedirs(path)
    try:
        make(file, size, kind, quota)
        with mounted(file, path, kind, ",".join(filter(None, ["prjquota" * quota, options]))) as device:
            yield Disk(path, file, device)
    finally:
        machine.remove_tree(place)


def _check(size: int, kind: str, quota: bool) -> None:
    if kind not in MAKERS:
        raise BadInput("kind", kind, f"must be one of {', '.join(MAKERS)}")
    if size < SMALLEST[kind]:
        raise BadInput("size", size, f"{kind} needs {SMALLEST[kind]} bytes at least")
    if quota and kind not in COUNTED:
        raise BadInput("quota", quota, f"{kind} has no project quotas: take {' or '.join(COUNTED)}")


def make(file: str, size: int, kind: str = "ext4", quota: bool = False) -> None:
    """Make a filesystem in a sparse file of that many bytes: truncate(2), mkfs(8); a failure leaves no file."""
    try:
        with open(file, "wb") as sparse:
            sparse.truncate(size)
        _format(*MAKERS[kind], *(COUNTED[kind] if quota else ()), file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(file)
        raise


def _format(*words: str) -> None:
    """Run mkfs(8); what it said last, without its name and the file's, becomes the error."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).replace(words[-1], "the disk").strip().splitlines()
        raise ChildFailed(words[0], path=words[-1], detail=said[-1] if said else f"ended with {done.returncode}")


@contextmanager
def mounted(file: str, path: str, kind: str = "ext4", options: str = "") -> Iterator[str]:
    """Mount the filesystem in a file, through a loop device; the device.

    The kernel lets the loop device go with its last user (LO_FLAGS_AUTOCLEAR): none outlives its mount, not even when
    the program is killed and somebody takes the mount away later.
    """
    machine.require()
    _check_whole(file)
    device, fd = attach(file)
    with mounts.opened(fd):
        syscalls.mount(device, path, kind, 0, options or None)
    with mounts.mounted(path):
        yield device


def attach(file: str) -> tuple[str, int]:
    """Put a free loop device before a file, loop(4): the device, and the descriptor that holds it."""
    with mounts.opened(os.open(file, os.O_RDWR | os.O_CLOEXEC)) as backing:
        while True:
            device = f"/dev/loop{_free()}"
            if (fd := _configure(device, backing)) is not None:
                return device, fd


def _configure(device: str, backing: int) -> int | None:
    """Put a loop device before an open file: the device's descriptor, or None where somebody else has just taken it."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, LOOP_CONFIGURE, LOOP_CONFIG.pack(backing, 0, LO_FLAGS_AUTOCLEAR))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            return None
        raise KernelError("ioctl LOOP_CONFIGURE", error.errno or 0, device) from error
    return fd


def _free() -> int:
    """The number of a loop device that nobody uses; the kernel makes one where all are taken."""
    with mounts.opened(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)


def _check_whole(file: str) -> None:
    """Refuse a file that is shorter than the filesystem in it says: blkid(8), FSBLOCKSIZE and FSLASTBLOCK."""
    words = ("blkid", "--probe", "--output", "export", file)
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    fields = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    needed = int(fields.get("FSBLOCKSIZE", 0)) * int(fields.get("FSLASTBLOCK", 0))
    if os.stat(file).st_size < needed:
        raise BadInput("file", os.path.basename(file), f"is shorter than its filesystem of {needed} bytes")


def limit(path: str, project: int, size: int) -> None:
    """Let what lies below a directory hold that many bytes: as project number `project`, which what is new inherits.

    The filesystem must have project quotas: disk(..., quota=True).  0 takes the limit away.  What was there before
    keeps its project.  ext4 does not stop a process with CAP_SYS_RESOURCE, capabilities(7); xfs does.
    """
    if not 0 < project < 1 << 32:
        raise BadInput("project", project, "must be 1 to 4294967295")
    if size < 0:
        raise BadInput("size", size, "must be a number of bytes, or 0")
    with mounts.opened(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        flags, extent, extents, _, cow = _attributes(fd)
        wanted = FSXATTR.pack(flags | FS_XFLAG_PROJINHERIT, extent, extents, project, cow)
        fcntl.ioctl(fd, FS_IOC_FSSETXATTR, wanted)
        block = bytearray(DQBLK.pack(-(-size // 1024), 0, 0, 0, 0, 0, 0, 0, QIF_BLIMITS))
        syscalls.quotactl_fd(fd, _command(Q_SETQUOTA), project, block)


def project(path: str) -> int:
    """The project that a file or directory belongs to, 0 without one: ioctl_fsgetxattr(2)."""
    with mounts.opened(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return _attributes(fd)[3]


def _attributes(fd: int) -> tuple[int, ...]:
    """The fields of struct fsxattr."""
    return FSXATTR.unpack(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))


def usage(path: str, project: int) -> Usage:
    """What a project of the filesystem at path holds: as the quota counts it."""
    block = bytearray(DQBLK.size)
    with mounts.opened(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        syscalls.quotactl_fd(fd, _command(Q_GETQUOTA), project, block)
    hard, _, space, *_ = DQBLK.unpack(block)
    return Usage(space, hard * 1024)


def _command(command: int) -> int:
    """QCMD of <linux/quota.h>."""
    return command << 8 | PRJQUOTA
