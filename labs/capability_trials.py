"""What each capability is for, found by trying: one call a capability, which the kernel refuses without it.

capabilities(7).  A trial prepares with every right and returns the call to be made with few.  It runs as process 1
of new namespaces over a file system of its own, so that whatever it makes is gone with it; and where the call would
change the machine, its arguments are such that the kernel asks for the right first and then finds them wrong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

from labs import capabilities, machine, namespaces, process, syscalls
from labs.errors import ChildFailed, KernelError

Act = Callable[[], object]
OTHER = 1  # somebody else's uid and gid
PLACE = machine.ROOTFS["busybox"]
WORLD = ("mnt", "uts", "ipc", "net", "pid")

# <asm/unistd_64.h> for x86-64, <asm-generic/unistd.h> for aarch64.
NUMBERS = {"x86_64": {"init_module": 175, "reboot": 169, "perf_event_open": 298,
                      "add_key": 248, "keyctl": 250},
           "aarch64": {"init_module": 105, "reboot": 142, "perf_event_open": 241, "add_key": 217, "keyctl": 219}}
F_SETLEASE, MAP_LOCKED, EPOLLWAKEUP = 1024, 0x2000, 1 << 29  # <asm-generic/fcntl.h>, mman.h, <linux/eventpoll.h>
FIBMAP, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL = 1, 0x40086602, 0x10  # <linux/fs.h>
IPC_PRIVATE, IPC_CREAT = 0, 0o1000  # <linux/ipc.h>
SYSLOG_ACTION_SIZE_UNREAD = 9  # syslog(2)
CLOCK_BOOTTIME_ALARM = 9  # <linux/time.h>
ADJ_TICK, TIMEX_SIZE, TIMEX_TICK = 0x4000, 208, 88  # <linux/timex.h>: the size of struct timex, where tick stands
NETLINK_AUDIT, AUDIT_USER, NLM_F_REQUEST_ACK, AUDIT_NLGRP_READLOG = 9, 1005, 0x5, 1  # <linux/netlink.h>, audit.h
BPF_MAP_CREATE, BPF_MAP_TYPE_QUEUE = 0, 22  # <linux/bpf.h>
PERF_TYPE_SOFTWARE, PERF_ATTR_SIZE_VER0 = 1, 64  # <linux/perf_event.h>

_libc = ctypes.PyDLL(None, use_errno=True)


class Trial(NamedTuple):
    """One capability, what is tried for it (as a short label), and the function that prepares it."""

    capability: str
    what: str
    prepare: Callable[[], Act]


def checked(name: str, *args: object) -> int:
    """A function of the C library that Python lacks; -1 becomes a KernelError."""
    result = int(getattr(_libc, name)(*args))
    if result == -1:
        raise KernelError(name, ctypes.get_errno())
    return result


def system_call(name: str, *args: object) -> int:
    """syscall(2) by a name in NUMBERS: integers are passed as C longs, the rest as they are."""
    return checked("syscall", *(ctypes.c_long(arg) if isinstance(arg, int) else arg
                                for arg in (NUMBERS[syscalls.MACHINE][name], *args)))


def _file(owner: int = 0, group: int = 0, mode: int = 0o600) -> str:
    with open("file", "wb") as file:
        os.fchmod(file.fileno(), mode)
        os.fchown(file.fileno(), owner, group)
    return "file"


def _neighbour() -> int:
    """A process of somebody else; it ends with the trial's PID namespace."""
    def become_other() -> None:
        os.setresuid(OTHER, OTHER, OTHER)
        signal.pause()
    pid = process.fork(become_other).pid
    process.until(lambda: process.status(pid).uid[1] == OTHER)
    return pid


def _sets_group_bit() -> Act:
    name = _file(0, OTHER, 0o755)
    def change() -> str | None:
        os.chmod(name, stat.S_ISGID | 0o755)  # noqa: S103  in a file system of its own
        return None if os.stat(name).st_mode & stat.S_ISGID else "bit lost"
    return change


def _locks_memory() -> Act:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    return lambda: mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_LOCKED)


def _attaches_memory() -> Act:
    segment = checked("shmget", IPC_PRIVATE, 4096, IPC_CREAT)  # mode 0: not even for its owner
    _libc.shmat.restype = ctypes.c_ssize_t
    return lambda: checked("shmat", segment, None, 0)


def _makes_immutable() -> Act:
    fd, flags = os.open(_file(), os.O_RDWR), struct.pack("l", FS_IMMUTABLE_FL)
    return lambda: fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags)


def _asks_for_block() -> Act:
    fd = os.open(_file(), os.O_RDONLY)
    return lambda: fcntl.ioctl(fd, FIBMAP, bytes(4))


def _binds_low_port() -> Act:
    return lambda: socket.socket().bind(("0.0.0.0", 80))  # noqa: S104  in a network of its own


def _looks_at_neighbour() -> Act:
    pid = _neighbour()
    return lambda: os.readlink(f"/proc/{pid}/cwd")


def _signals_neighbour() -> Act:
    pid = _neighbour()
    return lambda: os.kill(pid, 0)


def _raises_hard_limit() -> Act:
    resource.setrlimit(resource.RLIMIT_NPROC, (100, 100))
    return lambda: resource.prlimit(0, resource.RLIMIT_NPROC, (200, 200))


def sets_tick() -> Act:
    """The length of the clock's tick, set to what it is: adjtimex(2)."""
    timex = ctypes.create_string_buffer(TIMEX_SIZE)
    checked("adjtimex", timex)
    tick = timex.raw[TIMEX_TICK:TIMEX_TICK + 8]
    same = bytearray(TIMEX_SIZE)
    struct.pack_into("I", same, 0, ADJ_TICK)
    same[TIMEX_TICK:TIMEX_TICK + 8] = tick
    return lambda: checked("adjtimex", ctypes.create_string_buffer(bytes(same)))


def _hangs_up() -> Act:
    os.setsid()  # no terminal of our own: nobody is hung up
    return lambda: checked("vhangup")


def _takes_lease() -> Act:
    fd = os.open(_file(OTHER, OTHER, 0o644), os.O_RDONLY)
    return lambda: fcntl.fcntl(fd, F_SETLEASE, fcntl.F_RDLCK)


def _writes_audit() -> Act:
    request = b"labs".ljust(8, b"\0")
    message = struct.pack("=IHHII", 16 + len(request), AUDIT_USER, NLM_F_REQUEST_ACK, 1, 0) + request
    def send() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT) as audit:
            audit.sendto(message, (0, 0))
            (failed,) = struct.unpack_from("=i", audit.recv(4096), 16)
        if failed:
            raise KernelError("audit", -failed)
    return send


def _reads_audit() -> Act:
    audit = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT)
    return lambda: audit.bind((0, AUDIT_NLGRP_READLOG))


def _sets_loginuid() -> Act:
    def write() -> None:
        machine.write_file("/proc/self/loginuid", "0")
    write()  # the first time anybody may
    return write


def _sets_file_caps() -> Act:
    name = _file()
    return lambda: capabilities.write_file(name, capabilities.FileCaps(1))


def _keeps_awake() -> Act:
    poll, pipe = select.epoll(), os.pipe()
    def register() -> str | None:
        poll.register(pipe[0], select.EPOLLIN | EPOLLWAKEUP)
        words = machine.read_file(f"/proc/self/fdinfo/{poll.fileno()}").partition("events:")[2].split()
        return None if int(words[0], 16) & EPOLLWAKEUP else "flag lost"
    return register


def _profiles_kernel() -> Act:
    attr = struct.pack("=IIQ", PERF_TYPE_SOFTWARE, PERF_ATTR_SIZE_VER0, 0).ljust(PERF_ATTR_SIZE_VER0, b"\0")
    return lambda: system_call("perf_event_open", attr, -1, 0, -1, 0)


def _makes_bpf_map() -> Act:
    return lambda: syscalls.bpf(BPF_MAP_CREATE, struct.pack("=5I", BPF_MAP_TYPE_QUEUE, 0, 4, 1, 0))


def _simply(call: Act) -> Callable[[], Act]:
    """A trial without anything to prepare."""
    return lambda: call


def _on_file(act: Callable[[str], object], owner: int = 0, mode: int = 0o600) -> Callable[[], Act]:
    """A trial with a file of that owner."""
    def prepare() -> Act:
        name = _file(owner, owner, mode)
        return lambda: act(name)
    return prepare


TRIALS = [Trial(f"CAP_{name}", what, prepare) for name, what, prepare in (
    ("CHOWN", "give a file away", _on_file(lambda name: os.chown(name, OTHER, OTHER))),
    ("DAC_OVERRIDE", "write another's file", _on_file(lambda name: os.open(name, os.O_WRONLY), OTHER)),
    ("DAC_READ_SEARCH", "read another's file", _on_file(lambda name: os.open(name, os.O_RDONLY), OTHER)),
    ("FOWNER", "chmod another's file", _on_file(lambda name: os.chmod(name, 0o640), OTHER)),
    ("FSETID", "chmod g+s, another's group", _sets_group_bit),
    ("KILL", "signal another's process", _signals_neighbour),
    ("SETGID", "setgid", _simply(lambda: os.setgid(OTHER))),
    ("SETUID", "setuid", _simply(lambda: os.setuid(OTHER))),
    ("SETPCAP", "drop from bounding", _simply(lambda: syscalls.prctl(syscalls.PR_CAPBSET_DROP, 0))),
    ("LINUX_IMMUTABLE", "chattr +i", _makes_immutable),
    ("NET_BIND_SERVICE", "bind port 80", _binds_low_port),
    ("NET_ADMIN", "set lo up", _simply(namespaces.loopback_up)),
    ("NET_RAW", "raw socket", _simply(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))),
    ("IPC_LOCK", "lock memory over the limit", _locks_memory),
    ("IPC_OWNER", "attach memory of mode 0", _attaches_memory),
    ("SYS_MODULE", "init_module, no module", _simply(lambda: system_call("init_module", None, 0, b""))),
    ("SYS_RAWIO", "ask for a disk block", _asks_for_block),
    ("SYS_CHROOT", "chroot", _simply(lambda: os.chroot("."))),
    ("SYS_PTRACE", "look at another's cwd", _looks_at_neighbour),
    ("SYS_PACCT", "acct, no such file", _simply(lambda: checked("acct", b"nothing"))),
    ("SYS_ADMIN", "mount a tmpfs", _simply(lambda: syscalls.mount("tmpfs", ".", "tmpfs"))),
    ("SYS_BOOT", "reboot, wrong magic", _simply(lambda: system_call("reboot", 0, 0, 0, 0))),
    ("SYS_NICE", "nice -1", _simply(lambda: os.setpriority(os.PRIO_PROCESS, 0, -1))),
    ("SYS_RESOURCE", "raise a hard limit", _raises_hard_limit),
    ("SYS_TIME", "adjtimex, the same tick", sets_tick),
    ("SYS_TTY_CONFIG", "vhangup, no terminal", _hangs_up),
    ("MKNOD", "make a device node", _simply(lambda: os.mknod("node", stat.S_IFCHR | 0o600, os.makedev(1, 3)))),
    ("LEASE", "lease on another's file", _takes_lease),
    ("AUDIT_WRITE", "write to the audit log", _writes_audit),
    ("AUDIT_CONTROL", "set loginuid again", _sets_loginuid),
    ("SETFCAP", "give a file capabilities", _sets_file_caps),
    ("SYSLOG", "ask the kernel log", _simply(lambda: checked("klogctl", SYSLOG_ACTION_SIZE_UNREAD, None, 0))),
    ("WAKE_ALARM", "timer that wakes from sleep", _simply(lambda: checked("timerfd_create", CLOCK_BOOTTIME_ALARM, 0))),
    ("BLOCK_SUSPEND", "EPOLLWAKEUP", _keeps_awake),
    ("AUDIT_READ", "listen to the audit log", _reads_audit),
    ("PERFMON", "perf_event_open, whole CPU", _profiles_kernel),
    ("BPF", "make a BPF map", _makes_bpf_map),
    ("CHECKPOINT_RESTORE", "write ns_last_pid", _simply(
        lambda: machine.write_file("/proc/sys/kernel/ns_last_pid", "100"))),
)]


def attempt(trial: Trial, allowed: int) -> str:
    """What a trial comes to for root with these capabilities (a mask) alone: "ok", an errno's name, or what is lost."""
    machine.require()
    def inside() -> str:
        syscalls.unshare(namespaces.flags(WORLD))
        return process.call(_attempt, trial, allowed)
    return process.call(inside)


def _attempt(trial: Trial, allowed: int) -> str:
    """In process 1 of the new namespaces: prepare, keep only what is allowed, and make the call."""
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("proc", "/proc", "proc")
    syscalls.mount("tmpfs", PLACE, "tmpfs")
    os.chdir(PLACE)
    call = trial.prepare()
    allowed &= syscalls.capget().permitted
    capabilities.become({"effective": allowed, "permitted": allowed})
    return outcome(call)


def outcome(call: Act) -> str:
    """What a call comes to: "ok", the name of its errno, "?" for one that has none, or what it says was lost."""
    try:
        lost = call()
    except (OSError, ChildFailed) as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return lost if isinstance(lost, str) and lost.endswith("lost") else "ok"
