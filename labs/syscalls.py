"""System calls that Python's os module lacks; each wrapper bears its call's name.

A call that fails raises KernelError, an OSError with the call's name and the path it was given.
Constants have the kernel's names; the header stands above each group.
"""

from __future__ import annotations

import ctypes
import errno
import os

from labs.errors import KernelError

# <linux/mount.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC = 0x20, 0x1000, 0x2000, 0x4000
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 0x20000, 0x40000, 0x80000, 0x100000
MS_RELATIME, MS_STRICTATIME = 0x200000, 0x1000000
OPEN_TREE_CLONE = 0x1
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_STRICTATIME = 0x70, 0x10, 0x20
MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_IDMAP, MOUNT_ATTR_NOSYMFOLLOW = 0x80, 0x100000, 0x200000
# <linux/openat2.h>
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x2, 0x4, 0x8, 0x10
# <sys/mount.h>
MNT_FORCE, MNT_DETACH, MNT_EXPIRE, UMOUNT_NOFOLLOW = 0x1, 0x2, 0x4, 0x8
# <fcntl.h>
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
# <linux/sched.h>
CLONE_VM, CLONE_VFORK, CLONE_PIDFD, CLONE_PARENT = 0x100, 0x4000, 0x1000, 0x8000
CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWCGROUP = 0x80, 0x20000, 0x2000000
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
CLONE_INTO_CGROUP = 0x200000000
# <linux/prctl.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS = 1, 4, 8
PR_SET_NAME, PR_CAPBSET_READ, PR_CAPBSET_DROP = 15, 23, 24
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
# <linux/capability.h>
LINUX_CAPABILITY_VERSION_3 = 0x20080522
# <linux/seccomp.h>
SECCOMP_SET_MODE_FILTER = 1
# <sys/ptrace.h>
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_SECCOMP_GET_FILTER = 17, 0x4206, 0x4207, 0x420C
# <linux/keyctl.h>
KEYCTL_JOIN_SESSION_KEYRING = 1
# <linux/landlock.h>
LANDLOCK_CREATE_RULESET_VERSION = 0x1
LANDLOCK_RULE_PATH_BENEATH, LANDLOCK_RULE_NET_PORT = 1, 2
# <linux/bpf.h>
BPF_PROG_LOAD, BPF_PROG_ATTACH = 5, 8
BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE = 15, 6

# <asm/unistd_64.h> for x86-64, <asm-generic/unistd.h> for aarch64; from 424 on all machines agree.
_NUMBERS = {
    "x86_64": {"pivot_root": 155, "bpf": 321, "seccomp": 317, "keyctl": 250, "ioprio_set": 251, "sched_setattr": 314},
    "aarch64": {"pivot_root": 41, "bpf": 280, "seccomp": 277, "keyctl": 219, "ioprio_set": 30, "sched_setattr": 274},
}
MACHINE = os.uname().machine
_COMMON = {"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "clone3": 435,
           "openat2": 437, "mount_setattr": 442, "quotactl_fd": 443,
           "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446}

# PyDLL keeps the interpreter's lock during a call: no other thread runs between a call and its errno.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_ulong, ctypes.c_void_p)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)

Path = str | bytes | os.PathLike[str]


def _check(result: int, call: str, path: Path | None = None) -> int:
    """The call's result, or its errno raised with the call's name and the path."""
    if result == -1:
        raise KernelError(call, ctypes.get_errno(), None if path is None else os.fsdecode(path))
    return result


def _encode(text: Path | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def number(call: str) -> int:
    """The call's number on this machine; ENOSYS where labs does not know it."""
    if MACHINE not in _NUMBERS:
        raise KernelError(f"{call} on {MACHINE}", errno.ENOSYS)
    return _COMMON.get(call) or _NUMBERS[MACHINE][call]


def _syscall(call: str, *args: object, path: Path | None = None) -> int:
    """syscall(2) by name: integers are passed as C longs, the rest as they are."""
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _check(_libc.syscall(ctypes.c_long(number(call)), *longs), call, path)


def mount(source: Path | None, target: Path, fstype: str | None = None, flags: int = 0,
          data: str | None = None) -> None:
    """mount(2): attach a filesystem, or change a mount, as the MS_* flags say."""
    done = _libc.mount(_encode(source), _encode(target), _encode(fstype), flags, _encode(data))
    _check(done, f"mount {fstype}" if fstype else "mount", target)


def umount2(target: Path, flags: int = 0) -> None:
    """umount2(2): detach a mount; MNT_DETACH lets its users finish."""
    _check(_libc.umount2(_encode(target), flags), "umount2", target)


def pivot_root(new_root: Path, put_old: Path) -> None:
    """pivot_root(2): make new_root the root mount, and hang the old one at put_old."""
    _syscall("pivot_root", _encode(new_root), _encode(put_old), path=new_root)


def open_tree(path: Path, flags: int = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC, dirfd: int = AT_FDCWD) -> int:
    """open_tree(2): a file descriptor of the mount at path; with OPEN_TREE_CLONE, of a detached copy."""
    return _syscall("open_tree", dirfd, _encode(path), flags, path=path)


def move_mount(tree: int, target: Path = "", target_fd: int = AT_FDCWD) -> None:
    """move_mount(2): attach the detached mount that open_tree or fsmount gave, at a path or on an open target."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    _syscall("move_mount", tree, b"", target_fd, _encode(target), flags, path=target or None)


def fsopen(fstype: str) -> int:
    """fsopen(2): begin a new filesystem of that type; fsconfig gives its options."""
    return _syscall("fsopen", _encode(fstype), FSOPEN_CLOEXEC, path=fstype)


def fsconfig(context: int, command: int, key: str | None = None, value: str | None = None) -> None:
    """fsconfig(2): one option of a filesystem, or the command that makes it."""
    _syscall("fsconfig", context, command, _encode(key), _encode(value), 0, path=key)


def fsmount(context: int, attributes: int = 0) -> int:
    """fsmount(2): a detached mount of what fsconfig made, with the MOUNT_ATTR_* given."""
    return _syscall("fsmount", context, FSMOUNT_CLOEXEC, attributes)


def openat2(dirfd: int, path: Path, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): open a path with limits on how it is resolved, RESOLVE_*."""
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, resolve)
    return _syscall("openat2", dirfd, _encode(path), ctypes.byref(how), ctypes.sizeof(how), path=path)


class _MountAttr(ctypes.Structure):
    """struct mount_attr, <linux/mount.h>."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def mount_setattr(tree: int, path: Path = "", attr_set: int = 0, attr_clr: int = 0, propagation: int = 0,
                  userns_fd: int = 0, recursive: bool = False) -> None:
    """mount_setattr(2) on the open tree (or on path beneath it); recursive: on all mounts under it too."""
    attr = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    flags = (0 if path else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    _syscall("mount_setattr", tree, _encode(path), flags, ctypes.byref(attr), ctypes.sizeof(attr), path=path)


def quotactl_fd(fd: int, command: int, number: int, block: bytearray) -> None:
    """quotactl_fd(2): ask or set the quota of one user, group or project on the filesystem of an open file."""
    _syscall("quotactl_fd", fd, command, number, (ctypes.c_char * len(block)).from_buffer(block))


def syncfs(fd: int) -> None:
    """syncfs(2): write out all that is unwritten of the filesystem of an open file."""
    _check(_libc.syncfs(fd), "syncfs")


def unshare(flags: int) -> None:
    """unshare(2): leave the namespaces that the CLONE_NEW* flags name, for new ones."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int = 0) -> None:
    """setns(2): enter the namespace fd stands for; for a pidfd, those of its process that flags name."""
    _check(_libc.setns(fd, flags), "setns")


class _CloneArgs(ctypes.Structure):
    """struct clone_args, <linux/sched.h>."""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls",
        "set_tid", "set_tid_size", "cgroup")]


def clone3(flags: int = 0, cgroup_fd: int | None = None) -> int:
    """clone3(2) as a fork: the child's pid in the parent, 0 in the child; SIGCHLD at its end.

    With cgroup_fd the child begins its life in that cgroup (CLONE_INTO_CGROUP).  Only for a process
    with one thread: other threads are not copied, and the locks they hold stay held in the child.
    Inside process.call and process.fork that is so.
    """
    args = _CloneArgs(flags=flags, exit_signal=0 if flags & CLONE_PARENT else 17)  # SIGCHLD on both machines
    if cgroup_fd is not None:
        args.flags |= CLONE_INTO_CGROUP
        args.cgroup = cgroup_fd
    return _syscall("clone3", ctypes.byref(args), ctypes.sizeof(args))


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2): change or ask something about the calling process."""
    longs = [ctypes.c_ulong(a) for a in (arg2, arg3, arg4, arg5)]
    return _check(_libc.prctl(option, *longs), "prctl")


def sethostname(name: str) -> None:
    """sethostname(2): the UTS namespace's host name, at most 64 bytes."""
    encoded = os.fsencode(name)
    _check(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))), "sethostname", name)


def setdomainname(name: str) -> None:
    """setdomainname(2): the UTS namespace's NIS domain name, at most 64 bytes."""
    encoded = os.fsencode(name)
    _check(_libc.setdomainname(encoded, ctypes.c_size_t(len(encoded))), "setdomainname", name)


class Capabilities:
    """Three sets of a process, each a bit mask: bit N is capability N of <linux/capability.h>."""

    def __init__(self, effective: int, permitted: int, inheritable: int) -> None:
        self.effective, self.permitted, self.inheritable = effective, permitted, inheritable

    def __repr__(self) -> str:
        return f"Capabilities({self.effective:#x}, {self.permitted:#x}, {self.inheritable:#x})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Capabilities) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def capget(pid: int = 0) -> Capabilities:
    """capget(2): the sets of a process, 0 for the calling one."""
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, pid)
    data = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, data), "capget")
    return Capabilities(*(data[i] | data[i + 3] << 32 for i in range(3)))


def capset(sets: Capabilities) -> None:
    """capset(2): give the calling process these sets, within what it may have."""
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    masks = (sets.effective, sets.permitted, sets.inheritable)
    words = [mask & 0xFFFFFFFF for mask in masks] + [mask >> 32 for mask in masks]
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)(*words)), "capset")


def bpf(command: int, attr: bytes) -> int:
    """bpf(2): attr is the packed union bpf_attr of that command; gives a file descriptor or 0."""
    return _syscall("bpf", command, ctypes.create_string_buffer(attr, len(attr)), len(attr))


def seccomp(program: bytes, flags: int = 0) -> int:
    """seccomp(2), SECCOMP_SET_MODE_FILTER: install a BPF program of 8-byte struct sock_filter; 0 or a listener."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = (ctypes.c_uint64 * 2)(len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    return _syscall("seccomp", SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog))


def landlock_create_ruleset(attr: bytes | None, flags: int = 0) -> int:
    """landlock_create_ruleset(2): a descriptor of an empty ruleset, attr is a packed struct landlock_ruleset_attr.

    With LANDLOCK_CREATE_RULESET_VERSION, and no attr: the version of the ABI instead.
    """
    return _syscall("landlock_create_ruleset", attr, ctypes.c_size_t(len(attr or b"")), flags)


def landlock_add_rule(ruleset: int, rule: int, attr: bytes, path: Path | None = None) -> None:
    """landlock_add_rule(2): attr is the packed struct of that LANDLOCK_RULE_*; path is only for the error."""
    _syscall("landlock_add_rule", ruleset, rule, attr, 0, path=path)


def landlock_restrict_self(ruleset: int) -> None:
    """landlock_restrict_self(2): the calling thread, and all that it starts, obey the ruleset from now on."""
    _syscall("landlock_restrict_self", ruleset, 0)


# push rbx; eax, ebx, ecx = edi, esi, edx; int 0x80; pop rbx; sign-extend; ret
_INT80 = bytes.fromhex("53 89f8 89f3 89d1 cd80 5b 4898 c3")


def int80(number: int, text: str, argument: int = 0) -> int:
    """A system call of 32-bit x86 from a 64-bit process, with a text in low memory: the number is of unistd_32.h."""
    if MACHINE != "x86_64":
        raise KernelError(f"int 0x80 on {MACHINE}", errno.ENOSYS)
    import mmap  # for this one alone

    low = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40  # MAP_32BIT, <asm/mman.h>
    with mmap.mmap(-1, mmap.PAGESIZE, low, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_INT80.ljust(64) + os.fsencode(text) + b"\0")
        word = ctypes.c_char.from_buffer(page)
        start = ctypes.addressof(word)
        result = ctypes.PYFUNCTYPE(ctypes.c_long, *[ctypes.c_long] * 3)(start)(number, start + 64, argument)
        del word
    if result < 0:
        raise KernelError("int 0x80", -result)
    return int(result)


def ptrace(request: int, pid: int, address: int = 0, data: int | None = None) -> int:
    """ptrace(2): one request about a traced process; data is an address of the caller's."""
    return _check(_libc.ptrace(request, pid, address, data), "ptrace")


def keyctl(operation: int, text: str) -> int:
    """keyctl(2) with one text argument: KEYCTL_JOIN_SESSION_KEYRING gives the new keyring's id."""
    return _syscall("keyctl", operation, _encode(text))


def ioprio_set(which: int, who: int, priority: int) -> None:
    """ioprio_set(2): class and level of a process's input and output."""
    _syscall("ioprio_set", which, who, priority)


def sched_setattr(pid: int, attr: bytes) -> None:
    """sched_setattr(2): attr is the packed struct sched_attr."""
    _syscall("sched_setattr", pid, ctypes.create_string_buffer(attr, len(attr)), 0)


def personality(domain: int) -> None:
    """personality(2): the execution domain, as PER_LINUX32."""
    _check(_libc.personality(ctypes.c_ulong(domain)), "personality")
