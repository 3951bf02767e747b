"""User namespaces: which maps the kernel takes, who owns a namespace, and what root in one may do, found by trying.

user_namespaces(7), subuid(5), ioctl_nsfs(2).  A capability is never held as such: it is held in a user namespace, and
every check names the one it asks about.  A trial here is made with such rights as an ordinary user gives himself, so
that the machine stays as it is whatever the kernel says.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from labs import capability_trials, machine, mounts, namespaces, process, syscalls
from labs.errors import BadInput
from labs.namespaces import Map

LEARNER = 1000
LAST_ID = 2**32 - 2  # 2**32 - 1 means "no id": setresuid(2), user_namespaces(7)
MOST_ROWS = 340  # UID_GID_MAP_MAX_EXTENTS, <linux/user_namespace.h>
NS_GET_USERNS, NS_GET_PARENT, NS_GET_OWNER_UID = 0xB701, 0xB702, 0xB704  # <linux/nsfs.h>
OWN = ("mnt", "uts", "ipc", "net", "pid")


def check(rows: Sequence[Map], field: str = "uid_map") -> list[Map]:
    """The rows, or BadInput with the row and the rule it breaks, where the kernel would only say EINVAL.

    user_namespaces(7), "Defining user and group ID mappings"; rows of (first inside, first outside, how many).
    """
    if not 0 < len(rows) <= MOST_ROWS:
        raise BadInput(field, f"{len(rows)} rows", f"must have 1 to {MOST_ROWS}")
    for number, row in enumerate(rows):
        _check_row(row, field)
        for other in rows[:number]:
            for side, place in enumerate(("inside", "outside")):
                if row[side] < other[side] + other[2] and other[side] < row[side] + row[2]:
                    raise BadInput(field, _line(row), f"overlaps {_line(other)!r} {place}")
    return list(rows)


def _check_row(row: Map, field: str) -> None:
    if row[2] < 1:
        raise BadInput(field, _line(row), "the third number, how many, must be 1 or more")
    for first in row[:2]:
        if not 0 <= first <= first + row[2] - 1 <= LAST_ID:
            raise BadInput(field, _line(row), f"ids must lie from 0 to {LAST_ID}")


def _line(row: Map) -> str:
    return " ".join(map(str, row))


class Range(NamedTuple):
    """Ids lent to a user: the first one, and how many."""

    first: int
    size: int


def lent(user: str, path: str = "/etc/subuid") -> list[Range]:
    """What a file lends to a user, by name or by UID: subuid(5), subgid(5).  BadInput names a line that is none."""
    found = []
    for number, line in enumerate(machine.read_file(path).splitlines(), 1):
        fields = line.split(":")
        if not line.strip() or line.startswith("#"):
            continue
        if len(fields) != 3 or not (fields[1] + fields[2]).isdecimal():
            raise BadInput(f"{os.path.basename(path)} line {number}", line, "must be NAME:FIRST:COUNT")
        if fields[0] in (user, str(pwd.getpwnam(user).pw_uid)):
            found.append(Range(int(fields[1]), int(fields[2])))
    return found


def rootless_map(user: str, path: str = "/etc/subuid") -> list[Map]:
    """The map that rootless engines make: root inside is the user, and from 1 on come the ids lent."""
    info = pwd.getpwnam(user)
    rows, inside = [(0, info.pw_gid if path.endswith("gid") else info.pw_uid, 1)], 1
    for first, size in lent(user, path):
        rows.append((inside, first, size))
        inside += size
    return check(rows)


def become(uid: int, gid: int, groups: Sequence[int] = ()) -> None:
    """In a child: be an ordinary user, who may look at himself in /proc as after execve(2): PR_SET_DUMPABLE."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


@contextmanager
def held(uid: int = LEARNER, gid: int = LEARNER, groups: Sequence[int] = (), new: bool = True) -> Iterator[int]:
    """The pid of a sleeping process of that user, in a user namespace of its own (new) whose maps are still empty."""
    def sleep() -> None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        become(uid, gid, groups)
        if new:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(writer, b"!")
        signal.pause()
    machine.require()
    reader, writer = os.pipe()
    with mounts.opened(reader), process.fork(sleep) as child:
        os.close(writer)
        if not os.read(reader, 1):
            child.wait()
        yield child.pid


class Owner(NamedTuple):
    """A user namespace that owns another namespace: its inode number, and the UID of who made it."""

    inode: int
    uid: int


def owner(pid: int | str, kind: str) -> Owner:
    """Which user namespace owns one of a process's namespaces: ioctl_nsfs(2); of a user namespace, the one around it.

    KernelError, EPERM, where that one is not the caller's nor below it.
    """
    namespaces.flags([kind])
    with (mounts.opened(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)) as fd,
          mounts.opened(fcntl.ioctl(fd, NS_GET_USERNS)) as found):
        return Owner(os.fstat(found).st_ino, _made_by(found))


def maker(pid: int | str) -> int:
    """The UID, as the caller sees it, of who made a process's user namespace: NS_GET_OWNER_UID."""
    with mounts.opened(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return _made_by(fd)


def _made_by(userns: int) -> int:
    word = bytearray(4)
    fcntl.ioctl(userns, NS_GET_OWNER_UID, word)
    return int(struct.unpack("=I", word)[0])


Prepare = Callable[[], Callable[[], object]]
UNMAPPED = 4_000_000  # in no map of this book


class Trial(NamedTuple):
    """What is tried, whose word the kernel asks for it, and the function that prepares it and returns the call."""

    what: str
    asks: str
    prepare: Callable[[], Callable[[], object]]


def _simply(call: Callable[[], object]) -> Prepare:
    return lambda: call


def _neighbour() -> int:
    return int(machine.read_file("neighbour"))


def _rewrites(name: str) -> Prepare:
    """Write to a file of /proc/sys what stands in it."""
    path = f"/proc/sys/{name}"
    return _simply(lambda: machine.write_file(path, machine.read_file(path)))


def _mounts(fstype: str, source: str = "none", data: str | None = None) -> Prepare:
    return _simply(lambda: syscalls.mount(source, "mnt", fstype, data=data))


INITIAL, SELF, FILE, MAP = "initial userns", "own userns", "file's owner", "the map"
# The trials of labs.capability_trials that need nothing but themselves.
ASKED = {"SYS_CHROOT": SELF, "SETUID": SELF, "NET_RAW": "owner of net", "NET_ADMIN": "owner of net",
         "NET_BIND_SERVICE": "owner of net", "SYS_BOOT": "owner of pid", "MKNOD": INITIAL, "SYS_MODULE": INITIAL,
         "SYS_TIME": INITIAL, "SYS_RESOURCE": INITIAL, "SYSLOG": INITIAL, "SYS_NICE": INITIAL}
_TRIALS = [Trial(trial.what, ASKED[trial.capability[4:]], trial.prepare)
           for trial in capability_trials.TRIALS if trial.capability[4:] in ASKED] + [
    Trial(what, asks, prepare) for what, asks, prepare in (
        ("setuid to an unmapped id", MAP, _simply(lambda: os.setuid(UNMAPPED))),
        ("chown own file to a mapped id", FILE, _simply(lambda: os.chown("mine", 1, 1))),
        ("chown own file to an unmapped id", MAP, _simply(lambda: os.chown("mine", UNMAPPED, -1))),
        ("chmod a file of the host's root", FILE, _simply(lambda: os.chmod("roots", 0o644))),
        ("read a file of the host's root", FILE, _simply(lambda: os.open("roots", os.O_RDONLY))),
        ("look into own uid's process", "process's userns",
         _simply(lambda: os.readlink(f"/proc/{_neighbour()}/cwd"))),
        ("signal own uid's process", "its uid", _simply(lambda: os.kill(_neighbour(), 0))),
        ("sethostname", "owner of uts", _simply(lambda: syscalls.sethostname(os.uname().nodename))),
        ("write net.ipv4.ip_default_ttl", "owner of net", _rewrites("net/ipv4/ip_default_ttl")),
        ("write kernel.panic", FILE, _rewrites("kernel/panic")),
        ("mount tmpfs", "owner of mnt", _mounts("tmpfs")),
        ("mount overlay", "owner of mnt", _mounts("overlay", data="lowerdir=mnt:upper")),
        ("mount proc", "owner of mnt", _mounts("proc")),
        ("mount ext4", INITIAL, _mounts("ext4", "/dev/null")),
    )]
_ORDER = (SELF, "owner of uts", "owner of mnt", "owner of net", "owner of pid", FILE, MAP, "process's userns",
          "its uid", INITIAL)
TRIALS = sorted(_TRIALS, key=lambda trial: _ORDER.index(trial.asks))


def attempt(prepare: Callable[[], Callable[[], object]], pid: int | None = None, kinds: Sequence[str] = ()) -> str:
    """What a trial comes to: "ok", or the name of an errno.

    prepare: the trial's.  pid: try as root of that process's user namespace; without, as learner, who has none.
    kinds: in new namespaces of these kinds, which that user namespace then owns.
    """
    machine.require()
    with _scene() as folder:
        return process.call(_attempt, prepare, folder, pid, kinds)


@contextmanager
def _scene() -> Iterator[str]:
    """A directory of learner's with what the trials touch, and the pid of another process of learner's."""
    folder = f"{machine.STATE}/{machine.new_name('scene')}"
    with held(new=False) as neighbour:
        try:
            for name in ("mnt", "upper"):
                os.makedirs(f"{folder}/{name}")
            for name, uid in {"neighbour": LEARNER, "mine": LEARNER, "roots": 0}.items():
                with open(f"{folder}/{name}", "w", encoding="utf-8") as file:
                    file.write(str(neighbour))
                    os.fchmod(file.fileno(), 0o600)
                    os.fchown(file.fileno(), uid, uid)
            os.chown(folder, LEARNER, LEARNER)
            yield folder
        finally:
            machine.remove_tree(folder)


def _attempt(prepare: Prepare, folder: str, pid: int | None, kinds: Sequence[str]) -> str:
    os.chdir(folder)
    if pid is None:
        become(LEARNER, LEARNER)
    else:
        enter(pid)
    if not kinds:
        return _outcome(prepare)
    syscalls.unshare(namespaces.flags(kinds))
    return process.call(_outcome, prepare)


def _outcome(prepare: Prepare) -> str:
    def tried() -> object:
        return prepare()()
    return capability_trials.outcome(tried)


def enter(pid: int) -> None:
    """In a child: be root of a process's user namespace, in which 0 must have a row; all else stays as it is."""
    os.setgroups(())
    namespaces.enter(pid, ["user"])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


REFUSED = ("EPERM", "EACCES", "ECONNREFUSED", "flag lost")  # ECONNREFUSED: audit, outside the initial user namespace

UNFAIR = ("CAP_SYS_PTRACE",)  # its neighbour belongs to the user namespace in which it called execve(2): ptrace(2)


def in_vain(pid: int) -> dict[str, str]:
    """The capabilities that root of a process's user namespace holds in vain: what each one's trial comes to.

    The trials are those of labs.capability_trials, in new namespaces that the user namespace owns.
    """
    def with_proc(prepare: Prepare) -> Callable[[], object]:
        syscalls.mount("proc", "/proc", "proc")
        return prepare()
    answers = {trial.capability: attempt(partial(with_proc, trial.prepare), pid, OWN)
               for trial in capability_trials.TRIALS if trial.capability not in UNFAIR}
    return {name: answer for name, answer in answers.items() if answer in REFUSED}


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Another value in /proc/sys during the block: setting("kernel/unprivileged_userns_clone", "0")."""
    machine.require()
    path = f"/proc/sys/{name}"
    before = machine.read_file(path)
    machine.write_file(path, value)
    try:
        yield
    finally:
        machine.write_file(path, before)


@contextmanager
def remapping_dockerd(user: str) -> Iterator[str]:
    """A second Docker daemon, with --userns-remap, during the block; gives the address for `docker --host`.

    It lies in a network namespace of its own: with --bridge=none it would take the first daemon's docker0 away.
    Where containerd runs already, both use it, each in a namespace (containerd's word) of its own.
    """
    machine.require()
    name = machine.new_name("dockerd")
    data, state = f"{machine.DATA}/{name}", f"{machine.STATE}/{name}"
    os.makedirs(data, 0o711)
    os.makedirs(state)
    words = [*DOCKERD, f"--userns-remap={user}", f"--data-root={data}", f"--exec-root={state}/exec",
             f"--pidfile={state}/pid", f"--host=unix://{state}/socket"]
    try:
        with process.spawn(words, first=lambda: _write_to(f"{state}/log")) as child:
            process.until(lambda: process.readable(child.pidfd, 0) or _answers(f"{state}/socket"), 120, "dockerd")
            try:
                yield f"unix://{state}/socket"
            finally:
                child.stop(grace=60)
    finally:
        for row in mounts.table():
            if row.target.startswith(f"{data}/"):
                syscalls.umount2(row.target, syscalls.MNT_DETACH)
        machine.remove_tree(data)
        machine.remove_tree(state)


DOCKERD = ["unshare", "--net", "dockerd", "--config-file=/dev/null", "--bridge=none", "--iptables=false",
           "--ip6tables=false", "--ip-forward=false"]


def _write_to(path: str) -> None:
    """In a child: let standard output and error go to a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def _answers(path: str) -> bool:
    """Whether a daemon listens there: it does so when all else is ready."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0
