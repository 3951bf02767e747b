"""User notification: the filter stops a call, and a process outside, the supervisor, says what it answers.

seccomp_unotify(2).  The kernel's side of it is a file descriptor that seccomp(2) gives to the process which installs
the filter, and which that process hands to the supervisor::

    the caller                         the kernel                          the supervisor
    mkdir("/tmp/a") ───────────────→   filter: USER_NOTIF  ────────────→   receive(): id, pid, number, arguments
       sleeps                                                              looks at /proc/PID/mem, is it valid()?
    0, or an errno  ←────────────────  wakes the caller    ←────────────   reply(), proceed() or add_fd()

proceed() lets the kernel carry the call out, and the kernel then reads the caller's memory again: what the
supervisor saw there may have been changed.  So proceed() is no decision about what a pointer leads to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from labs import mounts, process, seccomp, syscalls
from labs.errors import BadInput, KernelError, Timeout

# <linux/seccomp.h>: _IOWR('!', 0, struct seccomp_notif) and so on
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID, SECCOMP_IOCTL_NOTIF_ADDFD = 0x40082102, 0x40182103
SECCOMP_USER_NOTIF_FLAG_CONTINUE, SECCOMP_ADDFD_FLAG_SEND = 1, 2
NOTIF = struct.Struct("=QII iIQ6Q")  # struct seccomp_notif: id, pid, flags, then struct seccomp_data
RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
ADDFD = struct.Struct("=QIIII")  # struct seccomp_notif_addfd: id, flags, srcfd, newfd, newfd_flags
LONGEST_TEXT = 4096  # PATH_MAX, <linux/limits.h>
LONGEST_STATE = 1 << 20  # a runtime sends it in one piece
HANDOVER = ("sendmsg", "close", "exit", "exit_group")  # what a process does after it has installed the filter


class Call(NamedTuple):
    """A call that waits for its answer: id is the kernel's cookie, pid the calling thread as we number it."""

    id: int
    pid: int
    number: int
    audit: int
    arguments: tuple[int, ...]

    @property
    def name(self) -> str:
        """The call's name on the caller's architecture."""
        return seccomp.name(self.number, self.audit)


class Listener:
    """The supervisor's end of a filter, to be used in a with statement."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def receive(self, timeout: float = 30.0) -> Call | None:
        """The next call, or None when nobody is left behind the filter; Timeout after timeout seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        events = poll.poll(timeout * 1000)
        if not events:
            raise Timeout("a call that the filter reports", timeout)
        if not events[0][1] & select.POLLIN:
            return None
        given = bytearray(NOTIF.size)
        with suppress(FileNotFoundError):  # ENOENT: a signal took the caller away in the meantime
            _ioctl(self.fd, SECCOMP_IOCTL_NOTIF_RECV, given)
            number, pid, _, call, audit, _, *arguments = NOTIF.unpack(given)
            return Call(number, pid, call, audit, tuple(arguments))
        return self.receive(timeout)

    def calls(self, timeout: float = 30.0) -> Iterator[Call]:
        """One call after the other, until nobody is left behind the filter."""
        while call := self.receive(timeout):
            yield call

    def valid(self, call: Call) -> bool:
        """Whether that very call still waits: if not, its pid may already be somebody else's."""
        try:
            _ioctl(self.fd, SECCOMP_IOCTL_NOTIF_ID_VALID, bytearray(struct.pack("=Q", call.id)))
        except FileNotFoundError:
            return False
        return True

    def reply(self, call: Call, value: int = 0, error: int = 0) -> None:
        """Answer with a value, or with an errno; the kernel itself does nothing of what was asked."""
        self._send(call, value, -error, 0)

    def proceed(self, call: Call) -> None:
        """Let the kernel carry the call out as if there were no filter: it reads pointers anew."""
        self._send(call, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)

    def _send(self, call: Call, value: int, error: int, flags: int) -> None:
        _ioctl(self.fd, SECCOMP_IOCTL_NOTIF_SEND, bytearray(RESPONSE.pack(call.id, value, error, flags)))

    def add_fd(self, call: Call, fd: int, flags: int = os.O_CLOEXEC) -> int:
        """Answer with a descriptor: put a copy of ours into the caller, who gets its number (Linux 5.14)."""
        request = bytearray(ADDFD.pack(call.id, SECCOMP_ADDFD_FLAG_SEND, fd, 0, flags))
        return _ioctl(self.fd, SECCOMP_IOCTL_NOTIF_ADDFD, request)

    def text(self, call: Call, argument: int) -> str:
        """The string that an argument points to, read from /proc/PID/mem; KernelError when the call is gone."""
        with open_memory(call.pid) as memory:
            if not self.valid(call):  # only now is it certain whose memory was opened
                raise KernelError("seccomp notification", errno.ENOENT)
            return os.fsdecode(os.pread(memory.fileno(), LONGEST_TEXT, call.arguments[argument]).partition(b"\0")[0])


def _ioctl(fd: int, request: int, argument: bytearray) -> int:
    """ioctl(2) on a listener, begun again after a signal: a FileNotFoundError says that the call is gone."""
    while True:
        try:
            return int(fcntl.ioctl(fd, request, argument))
        except InterruptedError:
            continue


def open_memory(pid: int) -> Any:
    """A process's memory as a file, proc_pid_mem(5)."""
    return open(f"/proc/{pid}/mem", "rb", buffering=0)


@contextmanager
def supervised(names: Sequence[str], fn: Callable[[], object]) -> Iterator[tuple[process.Child, Listener]]:
    """Run fn in a child; the calls named wait for the listener's answer.  At the end the child is killed."""
    if bad := [name for name in names if name in HANDOVER]:
        raise BadInput("names", bad[0], "is needed to hand the listener over")
    entry = {"names": [*names], "action": "SCMP_ACT_NOTIFY"}
    made = seccomp.Filter({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [entry]}, strict=True)
    ours, theirs = socket.socketpair()
    with ours, process.fork(lambda: _confined(made, theirs, fn)) as child:
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if not fds:
            child.wait()
        with Listener(fds[0]) as listener:
            yield child, listener


def _confined(made: seccomp.Filter, parent: socket.socket, fn: Callable[[], object]) -> object:
    """no_new_privs, the filter, and the listener to the parent; then fn: in the child."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    fd = made.install()
    socket.send_fds(parent, [b"!"], [fd])
    os.close(fd)
    parent.close()
    return fn()


class Agent:
    """Who waits at linux.seccomp.listenerPath for the listeners that an OCI runtime hands over.

    config-linux.md, "The Container Process State": the runtime sends the state as JSON, and the descriptor.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Agent:
        try:
            self.socket.bind(self.path)
            self.socket.listen()
        except OSError as error:
            self.socket.close()
            raise KernelError("bind", error.errno or 0, self.path) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()
        os.unlink(self.path)

    def accept(self, timeout: float = 30.0) -> tuple[dict[str, Any], Listener]:
        """The state of the next container, and its listener; Timeout after timeout seconds."""
        if not process.readable(self.socket.fileno(), timeout):
            raise Timeout("a runtime with a listener", timeout)
        with self.socket.accept()[0] as runtime:
            text, fds, _, _ = socket.recv_fds(runtime, LONGEST_STATE, 1)
        if not fds:
            raise BadInput("listenerPath", self.path, "got a message without a descriptor")
        return json.loads(text), Listener(fds[0])


def make_node(root: str, path: str, mode: int, device: int) -> None:
    """mknod(2) beneath a root directory as a process in it would see the path: no link leads out, openat2(2)."""
    folder, name = os.path.split(path)
    with mounts.opened(mounts.beneath(root, folder, os.O_PATH | os.O_DIRECTORY)) as parent:
        os.mknod(name, mode, device, dir_fd=parent)
