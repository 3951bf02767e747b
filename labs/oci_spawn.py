"""The new process and the namespaces it begins in; and what it and the runtime say to each other.

namespaces(7), clone(2), setns(2), user_namespaces(7), time_namespaces(7), unix(7).
"""

from __future__ import annotations

import os
import struct
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET, socket, socketpair

from labs import machine, oci_json, syscalls
from labs.errors import BadInput, ChildFailed, LabError
from labs.oci_config import namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

FLAGS = {"pid": syscalls.CLONE_NEWPID, "net": syscalls.CLONE_NEWNET, "mnt": syscalls.CLONE_NEWNS,
         "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS, "user": syscalls.CLONE_NEWUSER,
         "cgroup": syscalls.CLONE_NEWCGROUP, "time": syscalls.CLONE_NEWTIME}


def spawn(config: dict[str, Any], main: Callable[[], NoReturn], group: int) -> int:
    """Start main in the namespaces of linux.namespaces, in the cgroup of that directory: clone3(2) makes the new ones.

    Those given by path are entered first, by a helper that then makes the process our child
    (CLONE_PARENT); so is a new time namespace, which takes its offsets before anybody is in it.
    """
    have = namespaces(config)
    new = sum(FLAGS[kind] for kind, path in have.items() if not path and kind not in ("cgroup", "time"))
    paths = {kind: _open_namespace(path) for kind, path in have.items() if path}
    offsets = config["linux"].get("timeOffsets") or {} if have.get("time") == "" else None
    if not paths and offsets is None:
        pid = syscalls.clone3(new, group if group >= 0 else None)
        if pid == 0:
            main()
        return pid
    def join() -> None:
        enter(paths)
        if offsets is not None:
            time_offsets(offsets)
    return spawn_from(join, new, main, group)


def spawn_from(join: Callable[[], None], new: int, main: Callable[[], NoReturn], group: int) -> int:
    """Start main as our child from a helper that has called join: setns(2) for a pid namespace is for children only."""
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    helper = os.fork()
    if helper == 0:
        try:
            join()
            pid = syscalls.clone3(new | syscalls.CLONE_PARENT, group if group >= 0 else None)
            if pid == 0:
                main()
            theirs.send(b"%d" % pid)
        except BaseException as error:  # noqa: BLE001  all of it belongs to the parent
            theirs.send(describe(error))
        finally:
            os._exit(0)
    theirs.close()
    message = ours.recv(1 << 16)
    os.waitpid(helper, 0)
    ours.close()
    if not message.isdigit():
        raise revive(message)
    return int(message)


def _open_namespace(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadInput("linux.namespaces.path", path, error.strerror or "cannot be opened") from error


def enter(paths: dict[str, int]) -> None:
    """setns(2), the user namespace in the middle: before it, what it has no rights over; after it, the rest."""
    later = {kind: fd for kind, fd in paths.items() if kind == "user" or not _may_enter(fd, kind)}
    for kind in sorted(later, key=lambda kind: kind != "user"):
        syscalls.setns(later[kind], FLAGS[kind])


def _may_enter(fd: int, kind: str) -> bool:
    try:
        syscalls.setns(fd, FLAGS[kind])
    except PermissionError:
        return False
    return True


def time_offsets(offsets: dict[str, dict[str, int]]) -> None:
    """linux.timeOffsets: time_namespaces(7)."""
    syscalls.unshare(syscalls.CLONE_NEWTIME)
    for clock, offset in offsets.items():
        text = f"{clock} {offset.get('secs', 0)} {offset.get('nanosecs', 0)}\n"
        machine.write_file("/proc/self/timens_offsets", text)


def id_maps(pid: int | str, uid_map: list[dict[str, int]], gid_map: list[dict[str, int]]) -> None:
    """linux.uidMappings and gidMappings: user_namespaces(7)."""
    for file, rows in (("uid_map", uid_map), ("gid_map", gid_map)):
        text = "".join(f"{row['containerID']} {row['hostID']} {row['size']}\n" for row in rows)
        machine.write_file(f"/proc/{pid}/{file}", text)


def user_namespace(uid_map: list[dict[str, int]] | None, gid_map: list[dict[str, int]] | None) -> int:
    """A user namespace of its own for an ID-mapped mount: a child makes it, waits, and goes."""
    if not uid_map or not gid_map:
        raise BadInput("mounts.uidMappings", uid_map, "must be given together with gidMappings")
    wait, stay = os.pipe()
    pid = syscalls.clone3(syscalls.CLONE_NEWUSER)
    if pid == 0:
        os.close(stay)
        os.read(wait, 1)
        os._exit(0)
    try:
        id_maps(pid, uid_map, gid_map)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(stay)
        os.close(wait)
        os.waitpid(pid, 0)


def send(to: socket, message: bytes) -> None:
    """One message; nobody may be there to read it any more."""
    try:
        to.send(message)
    except BrokenPipeError:
        pass  # process 1 has ended; what it said last is read next


def receive(ours: socket) -> tuple[bytes, list[int]]:
    """One message and the file descriptors that came with it: unix(7), SCM_RIGHTS."""
    message, ancillary, _, _ = ours.recvmsg(1 << 16, 64)
    return message, [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("i", data)]


def send_fd(to: socket, message: bytes, fd: int) -> None:
    """Send a file descriptor, and close ours: unix(7), SCM_RIGHTS."""
    to.sendmsg([message], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", fd))])
    os.close(fd)


def hand_over(terminal: int, console_socket: str) -> int:
    """Send the terminal's main end to the caller's socket; without one it stays with us."""
    if not console_socket:
        return terminal
    to = socket(AF_UNIX, SOCK_STREAM)
    try:
        to.connect(console_socket)
        send_fd(to, b"/dev/ptmx", terminal)
    finally:
        to.close()
    return -1


def describe(error: BaseException) -> bytes:
    """An error as one message: JSON, as what it will be raised as."""
    number = getattr(error, "errno", None) or 0
    step = getattr(error, "step", None) or type(error).__name__
    detail = str(error) if isinstance(error, BadInput) or not number else getattr(error, "detail", None)
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    said = {"kind": type(error).__name__, "step": step, "errno": number, "path": path and os.fsdecode(path)}
    return oci_json.dumps(said | {"detail": detail}).encode()


def revive(message: bytes) -> LabError:
    """The error that describe() wrote down."""
    said = oci_json.loads(message.decode())
    if said["kind"] == "BadInput":
        return LabError(said["detail"])
    step = f"{said['step']} ({said['path']})" if said["path"] and said["path"] not in said["step"] else said["step"]
    return ChildFailed(step, said["errno"], said["path"], said["detail"])
