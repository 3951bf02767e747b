"""AppArmor: profiles loaded and removed, a process put under one, and the kernel's own record of what it denied.

apparmor(7), apparmor.d(5), apparmor_parser(8), aa_change_profile(2); the kernel's
Documentation/admin-guide/LSM/apparmor.rst.  A profile names paths: what a process under it may do to each.
"""

from __future__ import annotations

import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from labs import machine
from labs.errors import BadInput, KernelError

SECURITYFS = "/sys/kernel/security/apparmor"
ATTRIBUTES = "/proc/thread-self/attr/apparmor"
PARSER = "apparmor_parser"
# "error at line 2: …", or with "for FILE" and "in profile FILE" before "at"
COMPLAINT = re.compile(r"AppArmor parser error.*? at line (\d+): (.+)")

# <linux/netlink.h>, <linux/audit.h>
NETLINK_AUDIT, AUDIT_NLGRP_READLOG = 9, 1
AUDIT_AVC, AUDIT_USER_AVC = 1400, 1107
NLM_F_REQUEST = 1
NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence number, port


def enabled() -> bool:
    """Whether this kernel runs AppArmor."""
    try:
        return machine.read_file("/sys/module/apparmor/parameters/enabled").strip() == "Y"
    except KernelError:
        return False


def profiles() -> dict[str, str]:
    """The profiles in this kernel, each with its mode: {"docker-default": "enforce"}; none without AppArmor."""
    if not enabled():
        return {}
    lines = machine.read_file(f"{SECURITYFS}/profiles").splitlines()
    return {name: mode.rstrip(")") for name, _, mode in (line.rpartition(" (") for line in lines)}


def of(pid: int | str = "self") -> str:
    """What confines a process: "unconfined", or as "docker-default (enforce)"."""
    return machine.read_file(f"/proc/{pid}/attr/apparmor/current").strip("\0\n")


@contextmanager
def load(name: str, text: str, complain: bool = False) -> Iterator[str]:
    """Have a profile in the kernel during the block.

    BadInput names the line and the rule of a profile that does not parse: then none is loaded.  At the end the
    profile is removed, and whoever still runs under it is unconfined from then on.

    Args:
        name: begins with labs-.
        text: of apparmor.d(5); it defines the profile of that name, and those inside it.
        complain: deny nothing, only record what would be denied.
    """
    machine.require()
    if not enabled():
        raise BadInput("AppArmor profile", name, "needs AppArmor, which this kernel does not run")
    if not name.startswith(machine.PREFIX) or _names(text) != [name]:
        rule = f"must begin with {machine.PREFIX} and be the one that the text defines"
        raise BadInput("AppArmor profile", name, rule)
    if name in profiles():
        raise BadInput("AppArmor profile", name, "is in the kernel already")
    _parse(text, "--add", *(["--Complain"] if complain else []))
    try:
        yield name
    finally:
        remove(name)


def remove(name: str) -> None:
    """Take a profile, with those inside it, out of the kernel."""
    machine.write_file(f"{SECURITYFS}/.remove", name)


def _names(text: str) -> list[str]:
    """The profiles that a text defines, without those inside them."""
    return [name for name in _parse(text, "--names").split("\n") if name and "//" not in name]


def _parse(text: str, *options: str) -> str:
    """apparmor_parser(8) on a text; BadInput with its complaint: the line, what stands there, and the rule."""
    command = [PARSER, *options, "--skip-cache"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    if found := COMPLAINT.search(done.stderr):
        lines, number = text.splitlines(), int(found[1])
        raise BadInput(f"profile, line {number}", "".join(lines[number - 1:number]).strip(), found[2].strip())
    complaint = done.stderr.strip().rpartition("\n")[2] or "apparmor_parser failed"
    raise BadInput("profile", next((line for line in text.splitlines() if line.startswith("profile")), ""), complaint)


def on_exec(name: str) -> None:
    """The calling thread's next execve(2) puts it under a profile: aa_change_onexec(3).  BadInput if there is none."""
    _ask("exec", f"exec {name}", name)


def change(name: str) -> None:
    """Put the calling thread under a profile at once: aa_change_profile(3).  BadInput if there is none."""
    _ask("current", f"changeprofile {name}", name)


def _ask(file: str, words: str, name: str) -> None:
    try:
        machine.write_file(f"{ATTRIBUTES}/{file}", words)
    except KernelError as error:
        if error.errno != 2 or not enabled():  # ENOENT
            raise
        raise BadInput("AppArmor profile", name, "is not in the kernel") from error


class Record(NamedTuple):
    """What AppArmor told the kernel's audit system about one request.

    Attributes:
        verdict: "DENIED", or "ALLOWED" in complain mode.
        name: the path, as the profile's rules see it, or "".
        requested: the letters of apparmor.d(5) asked for, "c" is to create.
    """

    verdict: str
    profile: str
    operation: str
    name: str
    requested: str
    denied: str
    comm: str


def record(text: str) -> Record:
    """One audit record taken apart; a value with odd characters comes as hexadecimal digits, without quotes."""
    found = {key: quoted or _plain(bare) for key, quoted, bare in re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', text)}
    keys = ("apparmor", "profile", "operation", "name", "requested_mask", "denied_mask", "comm")
    return Record(*(found.get(key, "") for key in keys))


def _plain(value: str) -> str:
    try:
        return bytes.fromhex(value).decode()
    except ValueError:
        return value


class Log:
    """The audit records since this was made: what `dmesg` shows as type=1400, and auditd would write to its file.

    It listens to the multicast group of audit(7) (CAP_AUDIT_READ), of which nothing is left out: the kernel's log
    keeps ten lines in five seconds.  A context manager.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT)
        self._socket.bind((0, 1 << (AUDIT_NLGRP_READLOG - 1)))
        self._socket.settimeout(30)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def lines(self) -> list[str]:
        """The texts of AppArmor's records since the last call, oldest first.

        We send a record of our own behind them, and read until it comes: then nothing is still on its way.
        """
        mark = machine.new_name("mark")
        text = mark.encode() + b"\0"
        header = NLMSGHDR.pack(NLMSGHDR.size + len(text), AUDIT_USER_AVC, NLM_F_REQUEST, 0, 0)
        self._socket.sendto(header + text, (0, 0))
        found: list[str] = []
        while True:
            data = self._socket.recv(65536)
            line = data[NLMSGHDR.size:].decode(errors="replace").strip("\0\n")
            if mark in line:
                return found
            if NLMSGHDR.unpack_from(data)[1] == AUDIT_AVC and "apparmor=" in line:
                found.append(line)

    def records(self, profile: str) -> list[Record]:
        """What happened under a profile since the last call."""
        found = [record(line) for line in self.lines()]
        return [one for one in found if one.profile == profile and one.verdict in ("DENIED", "ALLOWED")]
