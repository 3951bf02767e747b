"""Capabilities: names and numbers, the five sets of a process, those of a file, and what execve(2) makes of them.

capabilities(7), capset(2), prctl(2); the OCI runtime specification, config.md, "process.capabilities".
The sets of a process are a dict: each name in SETS, and a mask, in which bit N is capability N.
"""

from __future__ import annotations

import errno
import os
import struct

from labs import machine, syscalls
from labs.errors import BadInput, KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# <linux/capability.h>: the position is the number.
NAMES = tuple(f"CAP_{name}" for name in (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE"))
SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")
# The lines of /proc/PID/status, proc_pid_status(5), in the order of SETS.
LINES = ("CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb")
ALL = (1 << len(NAMES)) - 1

XATTR = "security.capability"
# <linux/capability.h>: struct vfs_cap_data, vfs_ns_cap_data; sizes in bytes, by revision.
VFS_CAP_REVISION_MASK, VFS_CAP_REVISION_2, VFS_CAP_REVISION_3 = 0xFF000000, 0x02000000, 0x03000000
VFS_CAP_FLAGS_EFFECTIVE = 0x1
XATTR_CAPS_SZ = {0x01000000: 12, VFS_CAP_REVISION_2: 20, VFS_CAP_REVISION_3: 24}

# <linux/prctl.h>, <linux/securebits.h>
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
SECBIT_NOROOT, SECBIT_NO_SETUID_FIXUP, SECBIT_KEEP_CAPS, SECBIT_NO_CAP_AMBIENT_RAISE = 0x1, 0x4, 0x10, 0x40


def mask(names: list[str]) -> int:
    """The bit mask of these names; a name that is not in NAMES has no bit."""
    return sum(1 << NAMES.index(name) for name in set(names) if name in NAMES)


def names(bits: int) -> list[str]:
    """The names of a bit mask, as in the Cap lines of /proc/PID/status."""
    return [name for number, name in enumerate(NAMES) if bits >> number & 1]


def parse(given: Iterable[str]) -> int:
    """The mask of names as people write them: "NET_RAW", "cap_net_raw", "ALL".  BadInput for what is none."""
    found = 0
    for name in given:
        full = f"CAP_{name.upper().removeprefix('CAP_')}"
        if full not in (*NAMES, "CAP_ALL"):
            raise BadInput("capability", name, "must be ALL or a name of capabilities(7), as CAP_NET_RAW")
        found |= ALL if full == "CAP_ALL" else mask([full])
    return found


def of(pid: int | str = "self") -> dict[str, int]:
    """The five sets of a process."""
    return from_status(machine.read_file(f"/proc/{pid}/status"))


def from_status(text: str) -> dict[str, int]:
    """The five sets that the text of a /proc/PID/status tells."""
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return {name: int(fields[line], 16) for name, line in zip(SETS, LINES, strict=True)}


def known(number: int) -> bool:
    """Whether this kernel has capability number: prctl(2), PR_CAPBSET_READ."""
    try:
        return syscalls.prctl(syscalls.PR_CAPBSET_READ, number) >= 0
    except KernelError:
        return False


def limit(bounding: int) -> None:
    """Drop from the bounding set all but these: what no later execve(2) can give back."""
    number = 0
    while known(number):
        if not bounding >> number & 1:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
        number += 1


def become(sets: dict[str, int]) -> None:
    """Take these effective, permitted, inheritable and ambient sets (masks), in the order the kernel wants."""
    available = sum(1 << number for number in range(len(NAMES)) if known(number))
    effective, permitted, inheritable = (sets.get(name, 0) & available for name in SETS[1:4])
    syscalls.capset(syscalls.Capabilities(effective, permitted, inheritable))
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(len(NAMES)):
        if sets.get("ambient", 0) & available & 1 << number:
            _raise_ambient(number)


def _raise_ambient(number: int) -> None:
    """One ambient capability; the kernel refuses what is not both permitted and inheritable, and that is left out."""
    try:
        syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)
    except KernelError as error:
        if error.errno != 1:  # EPERM
            raise


def assume(sets: dict[str, int], uid: int = 0, securebits: int = 0, no_new_privs: bool = False) -> None:
    """Turn a forked child of root into a process with that uid and these sets: what is to be tried begins like this.

    A set that is not given is empty, but for the bounding set, which stays.  The inheritable set comes first, as it
    may keep what the bounding set loses; SECBIT_KEEP_CAPS saves the permitted set over the change of the uid; and
    what is asked for ambient is raised while it is still permitted, and while the securebits still allow it.
    """
    inheritable, rights = sets.get("inheritable", 0), syscalls.capget().permitted
    syscalls.capset(syscalls.Capabilities(rights, rights, inheritable))
    limit(sets.get("bounding", ALL))
    syscalls.prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    everything = {"effective": rights, "permitted": rights, "inheritable": inheritable}
    become(everything | {"ambient": sets.get("ambient", 0)})
    syscalls.prctl(PR_SET_SECUREBITS, securebits)
    syscalls.capset(syscalls.Capabilities(sets.get("effective", 0), sets.get("permitted", 0), inheritable))
    if no_new_privs:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


class FileCaps:
    """The capabilities of a program file: two sets and one bit, which makes its program begin with all of them on.

    rootid: None, or the uid that root of a user namespace has outside; the file gives its capabilities only
    there (revision 3).
    """

    def __init__(self, permitted: int = 0, inheritable: int = 0, effective: bool = False,
                 rootid: int | None = None) -> None:
        self.permitted, self.inheritable, self.effective, self.rootid = permitted, inheritable, effective, rootid

    def __repr__(self) -> str:
        rootid = "" if self.rootid is None else f", rootid={self.rootid}"
        return f"FileCaps({self.permitted:#x}, {self.inheritable:#x}, {self.effective}{rootid})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileCaps) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def to_xattr(caps: FileCaps) -> bytes:
    """The bytes of security.capability: revision 2, or 3 where there is a rootid; all numbers little-endian."""
    revision = VFS_CAP_REVISION_2 if caps.rootid is None else VFS_CAP_REVISION_3
    words = [revision | (VFS_CAP_FLAGS_EFFECTIVE if caps.effective else 0)]
    for shift in (0, 32):
        words += [caps.permitted >> shift & 0xFFFFFFFF, caps.inheritable >> shift & 0xFFFFFFFF]
    words += [] if caps.rootid is None else [caps.rootid]
    return struct.pack(f"<{len(words)}I", *words)


def from_xattr(data: bytes) -> FileCaps:
    """What security.capability says, in any of its three revisions; BadInput where the kernel would not take it."""
    revision = int.from_bytes(data[:4], "little") & VFS_CAP_REVISION_MASK
    if XATTR_CAPS_SZ.get(revision) != len(data):
        raise BadInput(XATTR, data.hex(), "must have 12, 20 or 24 bytes for revision 1, 2 or 3")
    first, *words = struct.unpack(f"<{len(data) // 4}I", data)
    pairs = words[:4] if len(words) > 2 else [*words, 0, 0]
    rootid = words[4] if revision == VFS_CAP_REVISION_3 else None
    return FileCaps(pairs[0] | pairs[2] << 32, pairs[1] | pairs[3] << 32, bool(first & VFS_CAP_FLAGS_EFFECTIVE), rootid)


def read_file(path: str) -> FileCaps | None:
    """The capabilities of a file, or None; getxattr(2) hides a rootid that is root of the caller's user namespace."""
    try:
        return from_xattr(os.getxattr(path, XATTR))
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise KernelError("getxattr", error.errno or 0, path) from error


def write_file(path: str, caps: FileCaps) -> None:
    """Give a file capabilities: needs CAP_SETFCAP; a write to the file takes them away again."""
    try:
        os.setxattr(path, XATTR, to_xattr(caps))
    except OSError as error:
        raise KernelError("setxattr", error.errno or 0, path) from error


def after_exec(before: dict[str, int], file: FileCaps | None = None, *, uid: int = 0, setuid: int | None = None,
               securebits: int = 0, no_new_privs: bool = False) -> dict[str, int]:
    """The sets of a process after execve(2): capabilities(7), "Transformation of capabilities during execve()".

    Raises KernelError, EPERM, for a file that begins with all its capabilities on and would not get all of them.

    Args:
        before: the five sets before.
        file: the capabilities of the program's file, None where it has none (or the mount is nosuid).
        uid: the real and the effective user ID before.
        setuid: the owner of a file with the set-user-ID bit.
        securebits: of the process.
        no_new_privs: whether PR_SET_NO_NEW_PRIVS was set.
    """
    euid = uid if setuid is None or no_new_privs else setuid
    has = file or FileCaps()
    permitted = before["inheritable"] & has.inheritable | has.permitted & before["bounding"]
    if has.effective and has.permitted & ~permitted:
        raise KernelError("execve", errno.EPERM)
    effective = has.effective
    mixed = file and uid and not euid  # a set-user-ID-root file with capabilities of its own: only these count
    if 0 in (uid, euid) and not securebits & SECBIT_NOROOT and not mixed:
        permitted = before["inheritable"] | before["bounding"]
        effective = effective or euid == 0
    if no_new_privs:
        permitted &= before["permitted"]
    ambient = 0 if file or euid != uid else before["ambient"]
    permitted |= ambient
    return before | {"permitted": permitted, "effective": permitted if effective else ambient, "ambient": ambient}


def after_setuid(before: dict[str, int], old: tuple[int, int, int], new: tuple[int, int, int],
                 securebits: int = 0) -> dict[str, int]:
    """The sets after setresuid(2): capabilities(7), "Effect of user ID changes on capabilities".

    old, new: real, effective and saved user ID.
    """
    if securebits & SECBIT_NO_SETUID_FIXUP:
        return dict(before)
    after = dict(before)
    if 0 in old and 0 not in new:
        after["ambient"] = 0
        if not securebits & SECBIT_KEEP_CAPS:
            after["permitted"] = after["effective"] = 0
    if old[1] == 0 and new[1] != 0:
        after["effective"] = 0
    if old[1] != 0 and new[1] == 0:
        after["effective"] = after["permitted"]
    return after
