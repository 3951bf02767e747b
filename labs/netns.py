"""Network namespaces with a name, as ip-netns(8) makes them, and what is done inside one.

A name is a file in /run/netns on which the namespace's link in /proc/PID/ns is bind-mounted: the
mount keeps the namespace alive without any process.  So `ip -n labs-web addr` finds it too.  The
caller's own process never enters one: a forked child does.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, TypeVar

from labs import machine, namespaces, process, syscalls
from labs.errors import BadInput, ChildFailed, CommandNotFound, KernelError, Timeout

T = TypeVar("T")
DIRECTORY = "/run/netns"
NS_GET_NSTYPE = 0xB703  # <linux/nsfs.h>
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Netns(NamedTuple):
    """A network namespace: its name, and a path that setns(2) can enter."""

    name: str
    path: str

    @classmethod
    def of_pid(cls, pid: int, name: str = "") -> Netns:
        """The network namespace of a running process, a container's for one."""
        return cls(name or f"pid {pid}", f"/proc/{pid}/ns/net")

    @contextmanager
    def open(self) -> Iterator[int]:
        """A file descriptor of the namespace; BadInput when it is gone."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise BadInput("namespace", self.name, "no such network namespace: is it gone?") from None
        try:
            if _kind(descriptor) != syscalls.CLONE_NEWNET:
                raise BadInput("namespace", self.name, "is no network namespace: is it gone?")
            yield descriptor
        finally:
            os.close(descriptor)

    def call(self, fn: Callable[..., T], *args: object) -> T:
        """What fn(*args) returns (as JSON carries it) in a forked child that has entered the namespace."""
        def visit() -> T:
            enter(descriptor)
            return fn(*args)
        with self.open() as descriptor:
            return process.call(visit)

    def run(self, argv: Sequence[str], *, check: bool = True, stdin: str = "", timeout: float = 60) -> str:
        """What a command writes to its standard output, run as `nsenter --net` does: /sys stays the caller's.

        Raises ChildFailed with the command's own words when check is true and it fails, CommandNotFound, and
        Timeout after timeout seconds.
        """
        process.check_argv(argv)
        with self.open() as descriptor:
            try:
                done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout,
                                      preexec_fn=lambda: begin(descriptor))
            except FileNotFoundError as error:
                raise CommandNotFound(f"execve {argv[0]}", error.errno or 0, argv[0], "command not found") from None
            except subprocess.TimeoutExpired:
                raise Timeout(f"the end of {argv[0]}", timeout) from None
        if check and done.returncode != 0:
            words = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            raise ChildFailed(argv[0], detail=words)
        return done.stdout

    def spawn(self, argv: Sequence[str], first: Callable[[], object] = bool) -> process.Child:
        """Start a command in the namespace; a context manager whose end kills it, as does the end of the caller.

        first is called in the child, inside the namespace, before the command.
        """
        process.check_argv(argv)
        def inside() -> None:
            begin(descriptor)
            first()
        with self.open() as descriptor:
            return process.spawn(argv, first=inside)

    def open_socket(self, family: int, kind: int, protocol: int, prepare: Callable[[socket.socket], object]
                    ) -> socket.socket:
        """A socket(2) of the namespace, made and prepared in a child that has entered it; the caller stays.

        It belongs to the namespace for ever, whoever holds it.  The child sends it back: SCM_RIGHTS, unix(7).
        """
        ours, theirs = socket.socketpair()
        def send() -> None:
            with socket.socket(family, kind, protocol) as made:
                prepare(made)
                socket.send_fds(theirs, [b"x"], [made.fileno()])
        with ours, theirs:
            self.call(send)
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=descriptors[0])

    def sysctl(self, name: str, value: object = None) -> str:
        """Write a setting of the namespace, as "net.ipv4.ip_forward", if a value is given; what it is then."""
        path = "/proc/sys/" + name.replace(".", "/")
        if value is not None:
            self.call(machine.write_file, path, str(value))
        return self.call(machine.read_file, path).strip()


def _kind(descriptor: int) -> int:
    """The CLONE_NEW* bit of a namespace's file, 0 for any other file: ioctl_nsfs(2)."""
    try:
        return fcntl.ioctl(descriptor, NS_GET_NSTYPE)
    except OSError:  # ENOTTY; a name whose mount is gone is an empty file
        return 0


def enter(descriptor: int) -> None:
    """setns(2) into a network namespace.  For a forked child only."""
    syscalls.setns(descriptor, syscalls.CLONE_NEWNET)


def begin(descriptor: int) -> None:
    """The first thing in a forked child: enter the namespace, and end when the caller ends, even by a kill -9."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    enter(descriptor)


@contextmanager
def namespace(name: str) -> Iterator[Netns]:
    """A new network namespace labs-NAME with lo up, gone at the end of the block: `ip netns add`, ip-netns(8).

    The kernel gives it IPv4 settings (net.ipv4.ip_forward for one) as they are on the machine:
    net.core.devconf_inherit_init_net.
    """
    machine.require()
    made = Netns(machine.PREFIX + check_name(name), f"{DIRECTORY}/{machine.PREFIX}{name}")
    _share_directory()
    with ExitStack() as undo:
        try:
            os.close(os.open(made.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
        except FileExistsError:
            raise BadInput("namespace", made.name, "is there already; lab.clean() removes what was left") from None
        undo.callback(_remove, made.path)
        process.call(_make, made.path)
        yield made


def check_name(name: str) -> str:
    """The part of a namespace's name after labs-."""
    if not NAME.fullmatch(name):
        raise BadInput("namespace", name, "must have 1 to 64 letters, digits, and after the first . _ -")
    return name


def _share_directory() -> None:
    """/run/netns as a shared mount, so that every mount namespace loses a name together: mount_namespaces(7)."""
    os.makedirs(DIRECTORY, 0o755, exist_ok=True)
    shared = syscalls.MS_SHARED | syscalls.MS_REC
    try:
        syscalls.mount(None, DIRECTORY, None, shared)
    except KernelError:  # EINVAL: not a mount point yet
        syscalls.mount(DIRECTORY, DIRECTORY, None, syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount(None, DIRECTORY, None, shared)


def _make(path: str) -> None:
    """In a child: the new namespace, and the mount that keeps it when the child has ended."""
    syscalls.unshare(syscalls.CLONE_NEWNET)
    namespaces.loopback_up()
    syscalls.mount("/proc/self/ns/net", path, None, syscalls.MS_BIND)


def _remove(path: str) -> None:
    """`ip netns delete`; the block may have done it before."""
    with suppress(KernelError):
        syscalls.umount2(path, syscalls.MNT_DETACH)
    with suppress(FileNotFoundError):
        os.unlink(path)
