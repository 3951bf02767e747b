"""Capabilities: names and numbers, the five sets of a process, and giving up what is not wanted.

capabilities(7), capset(2), prctl(2); the OCI runtime specification, config.md, "process.capabilities".
"""

from __future__ import annotations

from labs import syscalls
from labs.errors import KernelError

# <linux/capability.h>: the position is the number.
NAMES = tuple(f"CAP_{name}" for name in (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE"))
SETS = ("bounding", "effective", "permitted", "inheritable", "ambient")


def mask(names: list[str]) -> int:
    """The bit mask of these names; a name that is not in NAMES has no bit."""
    return sum(1 << NAMES.index(name) for name in set(names) if name in NAMES)


def names(bits: int) -> list[str]:
    """The names of a bit mask, as in the Cap lines of /proc/PID/status."""
    return [name for number, name in enumerate(NAMES) if bits >> number & 1]


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
