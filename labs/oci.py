"""The life of a container by the OCI runtime specification: create, start, state, kill, delete, exec.

runtime.md "Lifecycle" and "Operations".  What is in config.json is carried out in
``oci_config`` (read and checked), ``oci_root`` (mounts), ``oci_cgroup`` (resources) and ``oci_process``
(the process object).  The left column below is this module, the right one is ``oci_init``::

    runtime (create)                            process 1 of the container
      clone3(2) ──────────────────────────────→ waits
      ID maps, cgroup, device program, "go" ───→ host name, sysctl, mounts, devices
      hooks prestart, createRuntime ←─ "hooks"
                                       "go" ──→ hooks createContainer, pivot_root(2), masks, terminal
      rlimits, state, pid file ←────── "ready"
      ends                                      accept(2) on the socket "start"
    runtime (start) connect(2) ───────────────→ hooks startContainer, user, capabilities, seccomp, execve(2)
      end of file, or the error ←──────         (the connection closes on exec)
      hooks poststart

A container is a directory under --root with state.json and, until it is started, the socket.
"""

from __future__ import annotations

import os
import time
from _signal import pidfd_send_signal
from _socket import AF_UNIX, SOCK_SEQPACKET, socket, socketpair

from labs import machine, oci_cgroup, oci_config, oci_process, syscalls
from labs.errors import BadInput, ChildFailed, LabError
from labs.oci_config import namespaces
from labs.oci_hooks import SIGKILL, hooks, readable
from labs.oci_init import Init, compile_filter, connect_listener, host_proc, join_container
from labs.oci_spawn import FLAGS, hand_over, id_maps, receive, revive, send, spawn, spawn_from
from labs.oci_state import (
    ROOT,
    OciContainer,
    Options,
    check_name,
    read_config,
    save,
    stat_of,
    state_object,
    write_pid_file,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

__all__ = ["ROOT", "OciContainer", "Options", "create", "delete", "execute", "kill", "names", "pause", "pids", "start"]


def create(options: Options, name: str) -> tuple[int, int]:
    """Create the container: its pid, and the terminal's main end where the caller is to keep it (else -1)."""
    folder = f"{options.root}/{check_name(name)}"
    options.bundle = os.path.realpath(options.bundle)
    config = read_config(options)
    rootfs = os.path.realpath(os.path.join(options.bundle, config["root"]["path"]))
    if not os.path.isdir(rootfs):
        raise BadInput("root.path", config["root"]["path"], "no such directory")
    _check_terminal(config["process"], options)
    oci_cgroup.files(config["linux"].get("resources") or {})
    where = oci_cgroup.place(options.manager, config["linux"].get("cgroupsPath") or "", name)
    os.makedirs(options.root, 0o711, exist_ok=True)
    try:
        os.mkdir(folder, 0o711)
    except FileExistsError:
        raise BadInput("id", name, "a container of that id is already there") from None
    saved = {"id": name, "pid": 0, "started": "", "ready": False, "bundle": options.bundle, "rootfs": rootfs,
             "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "owner": "root", "config": config,
             "manager": options.manager, "cgroup": where[0], "unit": where[2], "preserve_fds": options.preserve_fds}
    creation = _Creation(options, folder, saved, where)
    try:
        return creation.run()
    except BaseException:
        creation.undo()
        raise


def _check_terminal(process: dict[str, Any], options: Options) -> None:
    """A terminal goes to the caller's console socket, or to a runtime that stays."""
    wants, stays = bool(process.get("terminal")), not options.detach
    if wants and not stays and not options.console_socket:
        raise BadInput("process.terminal", True, "needs --console-socket when the runtime does not stay")
    if options.console_socket and not wants:
        raise BadInput("--console-socket", options.console_socket, "needs process.terminal")


def _end(pid: int) -> None:
    """SIGKILL, and wait until the process has ended; reap it where it is ours."""
    try:
        fd = os.pidfd_open(pid)
        os.kill(pid, SIGKILL)
        readable(fd, 10)
        os.close(fd)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


class _Creation:
    """The runtime's half of create: the left column of the drawing above."""

    def __init__(self, options: Options, folder: str, saved: dict[str, Any], where: tuple[str, str, str]) -> None:
        self.options, self.folder, self.saved, self.where = options, folder, saved, where
        self.config = saved["config"]
        self.linux = self.config["linux"]
        self.console, self.made = -1, False

    def run(self) -> tuple[int, int]:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        init = Init(self.config, self.saved, self.options, theirs, _listen(self.folder))
        group = self._group()
        self.saved["pid"] = pid = spawn(self.config, init.main, group)
        theirs.close()
        self.saved["started"] = (stat_of(pid) or ("", ""))[1]
        save(self.folder, self.saved)
        if namespaces(self.config).get("user") == "":
            id_maps(pid, self.linux["uidMappings"], self.linux["gidMappings"])
        oom_score_adj(self.config["process"], pid)
        if group < 0 and self.options.manager != "disabled":
            self._move_in(pid)
        send(ours, b"go")
        while (message := self._receive(ours)) != b"ready":
            if message == b"hooks":
                self._hooks("prestart", "createRuntime")
                send(ours, b"go")
        oci_process.rlimits(self.config["process"], pid)
        self.saved["ready"] = True
        save(self.folder, self.saved)
        write_pid_file(self.options.pid_file, pid)
        return pid, self.console

    def undo(self) -> None:
        """After a failed create: no process, no cgroup, no directory."""
        if self.saved["pid"]:
            _end(self.saved["pid"])
        if self.made:
            oci_cgroup.delete(self.where[0], self.options.manager)
        machine.remove_tree(self.folder)

    def _group(self) -> int:
        """The cgroup, made with its limits before anybody is in it; its directory, or -1 where it comes later.

        systemd makes a scope around a process that is there; a user namespace that is entered has no
        right to be cloned into a group of the host.
        """
        if self.options.manager != "cgroupfs":
            return -1
        oci_cgroup.make(self.where[0], self._files())
        self.made = True
        self._devices()
        if namespaces(self.config).get("user"):
            return -1
        return os.open(self.where[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _files(self) -> dict[str, str]:
        return oci_cgroup.files(self.linux.get("resources") or {})

    def _devices(self) -> None:
        rules = (self.linux.get("resources") or {}).get("devices") or []
        oci_cgroup.devices(self.where[0], rules, self.linux.get("devices") or [])

    def _move_in(self, pid: int) -> None:
        if self.options.manager == "systemd":
            path, *unit = self.where
            oci_cgroup.make_scope(unit[0], unit[1], pid, self._files())
            self.made = True
            oci_cgroup.set_limits(path, self._files())
            self._devices()
        machine.write_file(f"{self.where[0]}/cgroup.procs", str(pid))

    def _receive(self, ours: socket) -> bytes:
        """A message of process 1: a word, its terminal, or what stopped it."""
        message, fds = receive(ours)
        if fds:
            self.console = hand_over(fds[0], self.options.console_socket)
        if message[:1] == b"{":
            raise revive(message)
        if not message:
            raise ChildFailed("process 1 of the container", 0, None, "ended before it was ready")
        return message

    def _hooks(self, *kinds: str) -> None:
        state = state_object(self.saved["id"], "creating", self.saved["pid"], self.saved["bundle"], self.config)
        for kind in kinds:
            hooks(self.config, kind, state)


def _listen(folder: str) -> socket:
    """The socket on which process 1 waits for start."""
    start = socket(AF_UNIX, SOCK_SEQPACKET)
    _at_start(folder, start.bind)
    start.listen(1)
    return start


def _at_start(folder: str, call: Callable[[str], object]) -> None:
    """bind(2) or connect(2) on "start", from its directory: a socket's path has 108 bytes at most, unix(7)."""
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(folder)
    try:
        call("start")
    finally:
        os.fchdir(here)
        os.close(here)


def oom_score_adj(process: dict[str, Any], pid: int) -> None:
    """process.oomScoreAdj: proc_pid_oom_score_adj(5)."""
    if process.get("oomScoreAdj") is not None:
        machine.write_file(f"/proc/{pid}/oom_score_adj", str(process["oomScoreAdj"]))


def start(options: Options, name: str) -> None:
    """Let process 1 go on to its command; returns when execve(2) has been called, raises what stopped it."""
    container = OciContainer(options.root, name)
    if (status := container.status()) != "created":
        raise BadInput("start", name, f"cannot start a container that is {status}")
    gate = socket(AF_UNIX, SOCK_SEQPACKET)
    _at_start(container.folder, gate.connect)
    os.unlink(f"{container.folder}/start")
    try:
        message = gate.recv(1 << 16)
    except ConnectionResetError:
        message = b""
    gate.close()
    if message:
        raise revive(message)
    try:
        hooks(container.config, "poststart", container.state())
    except LabError as error:
        options.warn(str(error))


def kill(options: Options, name: str, number: int, everyone: bool = False) -> None:
    """Send process 1 (or every process of the cgroup) a signal."""
    container = OciContainer(options.root, name)
    if everyone and container.saved["manager"] != "disabled":
        for pid in oci_cgroup.members(container.cgroup) if os.path.isdir(container.cgroup) else []:
            os.kill(pid, number)
        return
    try:
        pidfd_send_signal(container.pidfd(), number)
    except ProcessLookupError:
        raise BadInput("kill", name, "container not running") from None


def delete(options: Options, name: str, force: bool = False) -> None:
    """Remove what create made; a running container only by force.  Then the hooks poststop."""
    try:
        container = OciContainer(options.root, name)
    except BadInput:
        if force:
            machine.remove_tree(f"{options.root}/{check_name(name)}")
            return
        raise
    status = container.status()
    if status not in ("stopped", "created") and not force:
        raise BadInput("delete", name, f"cannot delete a container that is {status}; stop it, or use --force")
    if status != "stopped":
        _end(container.pid)
    if (manager := container.saved["manager"]) != "disabled":
        oci_cgroup.delete(container.cgroup, manager)
    state = container.state()
    machine.remove_tree(container.folder)
    try:
        hooks(container.config, "poststop", state)
    except LabError as error:
        options.warn(str(error))


def pause(options: Options, name: str, frozen: bool) -> None:
    """Freeze or thaw the container's cgroup."""
    container, wanted = OciContainer(options.root, name), "running" if frozen else "paused"
    if (status := container.status()) != wanted:
        raise BadInput("pause" if frozen else "resume", name, f"the container is {status}, not {wanted}")
    oci_cgroup.freeze(container.cgroup, frozen)


def names(options: Options) -> list[str]:
    """Every container under --root."""
    found = sorted(os.listdir(options.root)) if os.path.isdir(options.root) else []
    return [name for name in found if os.path.exists(f"{options.root}/{name}/state.json")]


def pids(options: Options, name: str) -> list[int]:
    """Every process of the container, as the host numbers them."""
    return oci_cgroup.members(OciContainer(options.root, name).cgroup)


def execute(options: Options, name: str, process: dict[str, Any], ignore_paused: bool = False) -> tuple[int, int]:
    """Start a further process in a running container: its pid, and the terminal's main end or -1."""
    container = OciContainer(options.root, name)
    status = container.status()
    if status not in ("running", "created") and not (status == "paused" and ignore_paused):
        raise BadInput("exec", name, f"cannot exec in a container that is {status}")
    oci_config.process(process)
    _check_terminal(process, options)
    have = namespaces(container.config)
    pidfd, flags = container.pidfd(), sum(FLAGS[kind] for kind in have)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    proc, program = host_proc(process), compile_filter(container.config)
    listener = connect_listener(container.config["linux"].get("seccomp"))
    state = container.state()
    def join() -> None:
        oom_score_adj(process, os.getpid())
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # as in create: the container may be hostile by now
        syscalls.setns(pidfd, flags & ~syscalls.CLONE_NEWCGROUP)  # from outside it no group could be given
        if "mnt" not in have:
            os.chroot(container.saved["rootfs"])
    group = _group_of(container)
    def main() -> NoReturn:
        join_container(container, pidfd, process, options, theirs, proc, program, listener, state)
    pid = spawn_from(join, 0, main, group)
    theirs.close()
    try:
        if group < 0 and container.saved["manager"] != "disabled":
            machine.write_file(f"{container.cgroup}/cgroup.procs", str(pid))
        console = _bring_in(process, options, pid, ours)
    except BaseException:
        _end(pid)
        raise
    write_pid_file(options.pid_file, pid)
    return pid, console


def _group_of(container: OciContainer) -> int:
    """The container's cgroup to clone into; -1 where a user namespace has no right to, or there is none."""
    if container.saved["manager"] == "disabled" or "user" in namespaces(container.config):
        return -1
    return os.open(container.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _bring_in(process: dict[str, Any], options: Options, pid: int, ours: socket) -> int:
    """The runtime's half of exec: wait for the command to run."""
    oci_process.rlimits(process, pid)
    send(ours, b"go")
    console = -1
    while True:
        message, fds = receive(ours)
        if fds:
            console = hand_over(fds[0], options.console_socket)
        elif message:
            raise revive(message)
        else:
            return console
