"""The life of a container by the OCI runtime specification: create, start, state, kill, delete, exec.

runtime.md "Lifecycle" and "Operations".  What is in config.json is carried out in
``oci_config`` (read and checked), ``oci_root`` (mounts), ``oci_cgroup`` (resources) and ``oci_process``
(the process object); here is who does it, and when::

    runtime (create)                            process 1 of the container
      clone3(2) ──────────────────────────────→ waits
      ID maps, cgroup, device filter, "go" ───→ host name, sysctl, mounts, devices
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

import errno
import fcntl
import os
import select
import struct
import sys
import time
from _socket import (
    AF_INET,
    AF_UNIX,
    SCM_RIGHTS,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
    socketpair,
)

from labs import machine, oci_cgroup, oci_config, oci_json, oci_process, oci_root, syscalls
from labs.errors import BadInput, ChildFailed, KernelError, LabError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

ROOT = "/run/labs/oci"
FLAGS = {"pid": syscalls.CLONE_NEWPID, "net": syscalls.CLONE_NEWNET, "mnt": syscalls.CLONE_NEWNS,
         "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS, "user": syscalls.CLONE_NEWUSER,
         "cgroup": syscalls.CLONE_NEWCGROUP, "time": syscalls.CLONE_NEWTIME}
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # <linux/sockios.h>, <linux/if.h>
PERSONALITIES = {"LINUX": 0, "LINUX32": 8}  # <linux/personality.h>
SIGKILL = 9
NAME = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+-."


class Options:
    """What the command line says beside the name: paths, and how the caller wants it done."""

    root, bundle, config, pid_file, console_socket = ROOT, ".", "config.json", "", ""
    manager, preserve_fds, no_pivot, no_new_keyring, detach, keep = "cgroupfs", 0, False, False, False, False
    warn: Callable[[str], object] = staticmethod(lambda message: None)


# --- state ---


def check_name(name: str) -> str:
    """A container's id becomes a directory's name, so nothing in it may mean more."""
    if not name or set(name) - set(NAME) or name in (".", "..") or len(name) > 1024:
        raise BadInput("id", name, "must be of letters, digits and _ + - .")
    return name


class Container:
    """A container that has been created, by its directory; what is in state.json, and what the kernel says now."""

    def __init__(self, root: str, name: str) -> None:
        self.name, self.folder = check_name(name), f"{root}/{name}"
        try:
            self.saved: dict[str, Any] = oci_json.loads(machine.read_file(f"{self.folder}/state.json"))
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            raise BadInput("id", name, "no such container") from None
        self.pid: int = self.saved["pid"]
        self.config: dict[str, Any] = self.saved["config"]
        self.cgroup: str = self.saved["cgroup"]

    def alive(self) -> bool:
        """Whether process 1 is there, is still the same process, and has not ended."""
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.saved["started"]

    def status(self) -> str:
        """creating, created, running, paused or stopped: runtime.md, "State"."""
        if not self.alive():
            return "stopped"
        if not self.saved["ready"]:
            return "creating"
        if os.path.exists(f"{self.folder}/start"):
            return "created"
        return "paused" if self.saved["manager"] != "disabled" and oci_cgroup.is_frozen(self.cgroup) else "running"

    def state(self) -> dict[str, Any]:
        """The state object of the specification, with what runc's has beside it: rootfs, created, owner."""
        status = self.status()
        more = {key: self.saved[key] for key in ("rootfs", "created", "owner")}
        return _state(self.name, status, self.pid if status != "stopped" else 0, self.saved["bundle"], self.config) | more

    def pidfd(self) -> int:
        """A pidfd of process 1, surely of the same process: pidfd_open(2)."""
        fd = os.pidfd_open(self.pid)
        if not self.alive():
            os.close(fd)
            raise ProcessLookupError(errno.ESRCH, "container is not running")
        return fd


def _stat(pid: int) -> tuple[str, str] | None:
    """The state's letter and the start time of a process, proc_pid_stat(5); None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0].decode(), fields[19].decode()


def _state(name: str, status: str, pid: int, bundle: str, config: dict[str, Any]) -> dict[str, Any]:
    state = {"ociVersion": oci_config.VERSION, "id": name, "status": status, "pid": pid, "bundle": bundle}
    return state | ({"annotations": config["annotations"]} if config.get("annotations") else {})


def _save(folder: str, saved: dict[str, Any]) -> None:
    """Write state.json so that a reader sees the old one or the new one."""
    _write_whole(f"{folder}/state.json", oci_json.dumps(saved))


def _write_whole(path: str, text: str) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def read_config(options: Options) -> dict[str, Any]:
    """The bundle's config.json (or --config), checked."""
    path = os.path.join(options.bundle, options.config)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("config.json", path, getattr(error, "strerror", None) or "is not UTF-8") from error
    return oci_config.load(oci_json.loads(text, "config.json"))


# --- create ---


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
        _readable(fd, 10)
        os.close(fd)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class _Creation:
    """The runtime's half of create: the left column of the drawing above."""

    def __init__(self, options: Options, folder: str, saved: dict[str, Any], where: tuple[str, str, str]) -> None:
        self.options, self.folder, self.saved, self.where = options, folder, saved, where
        self.config = saved["config"]
        self.linux = self.config["linux"]
        self.console, self.made = -1, False

    def run(self) -> tuple[int, int]:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        init = _Init(self.config, self.saved, self.options, theirs, _listen(self.folder))
        group = self._group()
        self.saved["pid"] = pid = spawn(self.config, init.main, group)
        theirs.close()
        self.saved["started"] = (_stat(pid) or ("", ""))[1]
        _save(self.folder, self.saved)
        if _namespaces(self.config).get("user") == "":
            id_maps(pid, self.linux["uidMappings"], self.linux["gidMappings"])
        oom_score_adj(self.config["process"], pid)
        if group < 0 and self.options.manager != "disabled":
            self._move_in(pid)
        _send(ours, b"go")
        while (message := self._receive(ours)) != b"ready":
            if message == b"hooks":
                self._hooks("prestart", "createRuntime")
                _send(ours, b"go")
        oci_process.rlimits(self.config["process"], pid)
        self.saved["ready"] = True
        _save(self.folder, self.saved)
        write_pid_file(self.options.pid_file, pid)
        return pid, self.console

    def undo(self) -> None:
        """After a failed create: no process, no cgroup, no directory."""
        if self.saved["pid"]:
            _end(self.saved["pid"])
        if self.made:
            oci_cgroup.delete(self.where[0])
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
        if _namespaces(self.config).get("user"):
            return -1
        return os.open(self.where[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _files(self) -> dict[str, str]:
        return oci_cgroup.files(self.linux.get("resources") or {})

    def _devices(self) -> None:
        rules = (self.linux.get("resources") or {}).get("devices") or []
        oci_cgroup.devices(self.where[0], rules, self.linux.get("devices") or [])

    def _move_in(self, pid: int) -> None:
        if self.options.manager == "systemd":
            oci_cgroup.make_scope(*self.where, pid, self._files())
            self.made = True
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
        state = _state(self.saved["id"], "creating", self.saved["pid"], self.saved["bundle"], self.config)
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


def _send(to: socket, message: bytes) -> None:
    try:
        to.send(message)
    except BrokenPipeError:
        pass  # process 1 has ended; what it said last is read next


def receive(ours: socket) -> tuple[bytes, list[int]]:
    """One message and the file descriptors that came with it: unix(7), SCM_RIGHTS."""
    message, ancillary, _, _ = ours.recvmsg(1 << 16, 64)
    return message, [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("i", data)]


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


def write_pid_file(path: str, pid: int) -> None:
    """--pid-file: the pid as the caller's PID namespace has it."""
    if path:
        _write_whole(path, str(pid))


def id_maps(pid: int | str, uid_map: list[dict[str, int]], gid_map: list[dict[str, int]]) -> None:
    """linux.uidMappings and gidMappings: user_namespaces(7)."""
    for file, rows in (("uid_map", uid_map), ("gid_map", gid_map)):
        text = "".join(f"{row['containerID']} {row['hostID']} {row['size']}\n" for row in rows)
        machine.write_file(f"/proc/{pid}/{file}", text)


def oom_score_adj(process: dict[str, Any], pid: int) -> None:
    """process.oomScoreAdj: proc_pid_oom_score_adj(5)."""
    if process.get("oomScoreAdj") is not None:
        machine.write_file(f"/proc/{pid}/oom_score_adj", str(process["oomScoreAdj"]))


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


# --- the new process, and the namespaces it begins in ---


def _namespaces(config: dict[str, Any]) -> dict[str, str]:
    return oci_config.namespaces(config)


def spawn(config: dict[str, Any], main: Callable[[], NoReturn], group: int) -> int:
    """Start main in the namespaces of linux.namespaces, in the cgroup of that directory: clone3(2) makes the new ones.

    Those given by path are entered first, by a helper that then makes the process our child
    (CLONE_PARENT); so is a new time namespace, which takes its offsets before anybody is in it.
    """
    have = _namespaces(config)
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
    later = {}
    for kind, fd in paths.items():
        try:
            if kind == "user":
                raise PermissionError
            syscalls.setns(fd, FLAGS[kind])
        except PermissionError:
            later[kind] = fd
    for kind in sorted(later, key=lambda kind: kind != "user"):
        syscalls.setns(later[kind], FLAGS[kind])


def time_offsets(offsets: dict[str, dict[str, int]]) -> None:
    """linux.timeOffsets: time_namespaces(7)."""
    syscalls.unshare(syscalls.CLONE_NEWTIME)
    for clock, offset in offsets.items():
        text = f"{clock} {offset.get('secs', 0)} {offset.get('nanosecs', 0)}\n"
        machine.write_file("/proc/self/timens_offsets", text)


def describe(error: BaseException) -> bytes:
    """An error as one message: JSON, as what it will be raised as."""
    number = getattr(error, "errno", None) or 0
    step = getattr(error, "step", None) or type(error).__name__
    detail = str(error) if isinstance(error, BadInput) or not number else getattr(error, "detail", None)
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    return oci_json.dumps({"kind": type(error).__name__, "step": step, "errno": number, "path": path and os.fsdecode(path),
                           "detail": detail}).encode()


def revive(message: bytes) -> LabError:
    """The error that describe() wrote down."""
    said = oci_json.loads(message.decode())
    if said["kind"] == "BadInput":
        return LabError(said["detail"])
    step = f"{said['step']} ({said['path']})" if said["path"] and said["path"] not in said["step"] else said["step"]
    return ChildFailed(step, said["errno"], said["path"], said["detail"])


# --- process 1 ---


class _Init:
    """Process 1's half of create and start: the right column.  What it needs of the host is opened before it begins."""

    def __init__(self, config: dict[str, Any], saved: dict[str, Any], options: Options, sync: socket,
                 start: socket) -> None:
        self.config, self.saved, self.options, self.sync, self.start = config, saved, options, sync, start
        self.process, self.linux = config["process"], config["linux"]
        self.have = _namespaces(config)
        self.root = oci_root.Root(saved["rootfs"])
        self.trees = oci_root.sources(config, options.bundle, user_namespace)
        self.proc = host_proc(config["process"])
        self.filter = compile_filter(config)
        self.listener = connect_listener(self.linux.get("seccomp"))
        self.report = sync

    def main(self) -> NoReturn:
        try:
            seal()
            self._prepare()
            self._wait_for_start()
            self._finish()
        except BaseException as error:  # noqa: BLE001  all of it belongs to the runtime
            _send(self.report, describe(error))
        finally:
            os._exit(1)

    def _prepare(self) -> None:
        """Up to "ready": everything but what the process itself becomes."""
        self.sync.recv(16)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # nobody inside reads our memory or files: proc(5)
        os.setsid()
        if "user" in self.have:
            become_root()
        if self.have.get("cgroup") == "":
            syscalls.unshare(syscalls.CLONE_NEWCGROUP)
        elif self.have.get("cgroup"):
            pass  # entered by the helper
        if not self.options.no_new_keyring:
            keyring(self.saved["id"])
        host_names(self.config)
        if self.have.get("net") == "":
            loopback()
        for name, value in (self.linux.get("sysctl") or {}).items():
            sysctl(name, value)
        os.umask(0)
        self._mount()
        _send(self.sync, b"hooks")
        self.sync.recv(16)
        hooks(self.config, "createContainer", self._state("creating"))
        self._settle()
        if self.process.get("terminal"):
            self._terminal()
        self._command()
        os.umask(0o022)
        _send(self.sync, b"ready")
        self.sync.close()

    def _state(self, status: str) -> dict[str, Any]:
        return _state(self.saved["id"], status, os.getpid(), self.saved["bundle"], self.config)

    def _mount(self) -> None:
        """The mounts and devices, in the order of config.json, beneath the root."""
        if "mnt" not in self.have:
            return
        self.root.enter(self.linux.get("rootfsPropagation") or "")
        covered = False
        for mount, tree in zip(self.config.get("mounts") or [], self.trees, strict=True):
            self.root.mount(mount, tree, self.saved["cgroup"])
            covered = covered or (tree >= 0 and oci_config.clean(mount["destination"]) == "/dev")
        if not covered:
            self.root.devices(self.linux.get("devices") or [], bind="user" in self.have)

    def _settle(self) -> None:
        """Into the root, and what is closed there."""
        if "mnt" not in self.have:
            self.root.chroot()
            return
        for path in self.linux.get("readonlyPaths") or []:
            self.root.readonly(path)
        for path in self.linux.get("maskedPaths") or []:
            self.root.mask(path)
        self.root.pivot(self.options.no_pivot)
        self.root.finish(bool(self.config["root"].get("readonly")), self.linux.get("rootfsPropagation") or "")

    def _terminal(self) -> None:
        """A terminal, also as /dev/console; its main end goes to the runtime."""
        pty = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW)
        pty, peer = oci_process.terminal(self.process, pty)
        if "mnt" in self.have:
            self.root.console(peer)
        oci_process.controlling_terminal(peer)
        send_fd(self.sync, b"terminal", pty)

    def _command(self) -> None:
        """Where the command begins, and which file it is: asked now, so that create can say that it is not there."""
        try:
            os.makedirs(self.process["cwd"], 0o755, exist_ok=True)
        except OSError:
            pass  # chdir says what is wrong
        oci_process.cwd(self.process)
        self.env = listen_environment(oci_process.environment(self.process), self.options.preserve_fds)
        self.path = oci_process.find(self.process, self.env)

    def _wait_for_start(self) -> None:
        fd, _ = self.start._accept()
        self.report = socket(fileno=fd)
        self.start.close()

    def _finish(self) -> None:
        hooks(self.config, "startContainer", self._state("created"))
        state = {"ociVersion": oci_config.VERSION, "fds": ["seccompFd"], "pid": self.saved["pid"],
                 "state": self._state("creating")}
        become(self.config, self.process, self.proc, self.filter, self.listener, state)
        oci_process.execute(self.process, self.path, self.env)


def become(config: dict[str, Any], process: dict[str, Any], proc: int, filter: Any, listener: int,
           state: dict[str, Any]) -> None:
    """The last steps before execve(2).  seccomp(2) needs CAP_SYS_ADMIN or no_new_privs: its place depends on which."""
    profile = config["linux"].get("seccomp") or {}
    message = oci_json.dumps(state | {"metadata": profile.get("listenerMetadata", "")}).encode()
    oci_process.scheduler(process)
    oci_process.io_priority(process)
    personality(config["linux"].get("personality"))
    apparmor_profile(process, proc)
    if not process.get("noNewPrivileges"):
        oci_process.seccomp(filter, listener, message)
    oci_process.user_and_capabilities(process)
    oci_process.no_new_privileges(process)
    if process.get("noNewPrivileges"):
        oci_process.seccomp(filter, listener, message)


def seal() -> None:
    """No import from here on: Python would look for modules in the image.  All that is needed is loaded."""
    sys.meta_path.clear()
    sys.path_hooks.clear()


def compile_filter(config: dict[str, Any]) -> Any:
    """linux.seccomp as a program, made by the runtime: the table of calls is a library of the host's."""
    if not config["linux"].get("seccomp"):
        return None
    from labs import seccomp
    return seccomp.Filter(config["linux"]["seccomp"])


def send_fd(to: socket, message: bytes, fd: int) -> None:
    """Send a file descriptor, and close ours: unix(7), SCM_RIGHTS."""
    to.sendmsg([message], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", fd))])
    os.close(fd)


def become_root() -> None:
    """Id 0 of the user namespace: until now the process has no mapped id."""
    try:
        os.setgroups([])
    except PermissionError:
        pass  # setgroups is denied in this namespace
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def keyring(name: str) -> None:
    """A session keyring of its own: session-keyring(7); where the kernel has none or no quota is left, it is left out."""
    try:
        syscalls.keyctl(syscalls.KEYCTL_JOIN_SESSION_KEYRING, f"_ses.{name}")
    except KernelError as error:
        if error.errno not in (errno.ENOSYS, errno.EDQUOT, errno.EPERM):
            raise


def host_names(config: dict[str, Any]) -> None:
    """hostname and domainname: sethostname(2), setdomainname(2)."""
    if config.get("hostname"):
        syscalls.sethostname(config["hostname"])
    if config.get("domainname"):
        syscalls.setdomainname(config["domainname"])


def loopback() -> None:
    """Set lo up in a new network namespace: netdevice(7)."""
    any_socket = socket(AF_INET, SOCK_DGRAM)
    fcntl.ioctl(any_socket.fileno(), SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    any_socket.close()


def sysctl(name: str, value: str) -> None:
    """linux.sysctl: the host's /proc/sys shows the namespaces of who opens it, and no image can forge it; proc_sys(5)."""
    machine.write_file(f"/proc/sys/{name.replace('.', '/')}", value)


def personality(given: dict[str, Any] | None) -> None:
    """linux.personality: personality(2)."""
    if given:
        if given.get("flags"):
            raise BadInput("linux.personality.flags", given["flags"], "has no flag in the specification yet")
        syscalls.personality(PERSONALITIES[given["domain"]])


def host_proc(process: dict[str, Any]) -> int:
    """The host's /proc, to reach our own attributes from inside where the image's cannot be trusted; -1 if not needed."""
    if not process.get("apparmorProfile"):
        return -1
    try:
        if machine.read_file("/sys/module/apparmor/parameters/enabled").strip() == "Y":
            return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except KernelError:
        pass  # no such module
    raise BadInput("process.apparmorProfile", process["apparmorProfile"], "needs AppArmor, which this kernel does not run")


def apparmor_profile(process: dict[str, Any], proc: int) -> None:
    """process.apparmorProfile: the profile for the next execve(2), apparmor(7)."""
    if proc < 0:
        return
    for path in ("self/attr/apparmor/exec", "self/attr/exec"):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        except FileNotFoundError:
            continue
        try:
            os.write(fd, b"exec " + process["apparmorProfile"].encode())
        except OSError as error:
            raise BadInput("process.apparmorProfile", process["apparmorProfile"], error.strerror or "refused") from error
        os.close(fd)
        return


def connect_listener(profile: dict[str, Any] | None) -> int:
    """A connection to linux.seccomp.listenerPath, made while its path can be reached; -1 without one."""
    path = (profile or {}).get("listenerPath")
    if not path:
        return -1
    agent = socket(AF_UNIX, SOCK_STREAM)
    try:
        agent.connect(path)
    except OSError as error:
        raise BadInput("linux.seccomp.listenerPath", path, error.strerror or "cannot be reached") from error
    return agent.detach()


def listen_environment(env: dict[str, str], preserve_fds: int) -> dict[str, str]:
    """Sockets handed over by systemd: sd_listen_fds(3)."""
    handed = os.environ.get("LISTEN_FDS", "")
    return env | {"LISTEN_FDS": handed, "LISTEN_PID": "1"} if handed and preserve_fds else env


# --- hooks ---


def hooks(config: dict[str, Any], kind: str, state: dict[str, Any]) -> None:
    """Run the hooks of one kind in their order, the state on standard input: config.md, "POSIX-platform Hooks"."""
    for at, hook in enumerate((config.get("hooks") or {}).get(kind) or []):
        _hook(f"hooks.{kind}[{at}]", hook, oci_json.dumps(state).encode())


def _hook(field: str, hook: dict[str, Any], state: bytes) -> None:
    """One hook: fork(2), execve(2); a status other than 0 is an error, and so is the end of its timeout (seconds)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(reader, 0)
            env = dict(item.partition("=")[::2] for item in hook.get("env") or [])
            os.execve(hook["path"], hook.get("args") or [hook["path"]], env)
        finally:
            os._exit(127)
    os.close(reader)
    pidfd = os.pidfd_open(pid)
    try:
        os.write(writer, state)
    except BrokenPipeError:
        pass  # a hook need not read it
    os.close(writer)
    timeout = hook.get("timeout") or 0
    if not _readable(pidfd, timeout if timeout > 0 else 1 << 20):
        os.kill(pid, SIGKILL)
        os.waitpid(pid, 0)
        raise ChildFailed(field, errno.ETIMEDOUT, hook["path"], f"not done within {timeout} s")
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    if status:
        raise ChildFailed(field, 0, hook["path"], f"{hook['path']} ended with {_code(status)}")


def _code(status: int) -> int:
    """The status a shell shows: wait(2)."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# --- the other operations ---


def start(options: Options, name: str) -> None:
    """Let process 1 go on to its command; returns when execve(2) has been called, raises what stopped it."""
    container = Container(options.root, name)
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
    from _signal import pidfd_send_signal
    container = Container(options.root, name)
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
        container = Container(options.root, name)
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
    if container.saved["manager"] != "disabled":
        oci_cgroup.delete(container.cgroup)
    state = container.state()
    machine.remove_tree(container.folder)
    try:
        hooks(container.config, "poststop", state)
    except LabError as error:
        options.warn(str(error))


def pause(options: Options, name: str, frozen: bool) -> None:
    """Freeze or thaw the container's cgroup."""
    container, wanted = Container(options.root, name), "running" if frozen else "paused"
    if (status := container.status()) != wanted:
        raise BadInput("pause" if frozen else "resume", name, f"the container is {status}, not {wanted}")
    oci_cgroup.freeze(container.cgroup, frozen)


def names(options: Options) -> list[str]:
    """Every container under --root."""
    found = sorted(os.listdir(options.root)) if os.path.isdir(options.root) else []
    return [name for name in found if os.path.exists(f"{options.root}/{name}/state.json")]


def pids(options: Options, name: str) -> list[int]:
    """Every process of the container, as the host numbers them."""
    return oci_cgroup.members(Container(options.root, name).cgroup)


def execute(options: Options, name: str, process: dict[str, Any], ignore_paused: bool = False) -> tuple[int, int]:
    """Start a further process in a running container: its pid, and the terminal's main end or -1."""
    container = Container(options.root, name)
    status = container.status()
    if status not in ("running", "created") and not (status == "paused" and ignore_paused):
        raise BadInput("exec", name, f"cannot exec in a container that is {status}")
    oci_config.process(process)
    _check_terminal(process, options)
    have = _namespaces(container.config)
    pidfd, flags = container.pidfd(), sum(FLAGS[kind] for kind in have)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    proc, filter = host_proc(process), compile_filter(container.config)
    listener = connect_listener(container.config["linux"].get("seccomp"))
    state = container.state()
    def join() -> None:
        oom_score_adj(process, os.getpid())
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # as in create: the container may be hostile by now
        syscalls.setns(pidfd, flags & ~syscalls.CLONE_NEWCGROUP)  # from outside it no group could be given
        if "mnt" not in have:
            os.chroot(container.saved["rootfs"])
    group = _group_of(container)
    pid = spawn_from(join, 0, lambda: _join(container, pidfd, process, options, theirs, proc, filter, listener, state), group)
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


def _group_of(container: Container) -> int:
    """The container's cgroup to clone into; -1 where a user namespace has no right to, or there is none."""
    if container.saved["manager"] == "disabled" or "user" in _namespaces(container.config):
        return -1
    return os.open(container.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _bring_in(process: dict[str, Any], options: Options, pid: int, ours: socket) -> int:
    """The runtime's half of exec: wait for the command to run."""
    oci_process.rlimits(process, pid)
    _send(ours, b"go")
    console = -1
    while True:
        message, fds = receive(ours)
        if fds:
            console = hand_over(fds[0], options.console_socket)
        elif message:
            raise revive(message)
        else:
            return console


def _join(container: Container, pidfd: int, process: dict[str, Any], options: Options, sync: socket, proc: int,
          filter: Any, listener: int, state: dict[str, Any]) -> NoReturn:
    """The joining process's half of exec."""
    try:
        seal()
        sync.recv(16)
        os.setsid()
        if "cgroup" in _namespaces(container.config):
            syscalls.setns(pidfd, syscalls.CLONE_NEWCGROUP)
        if "user" in _namespaces(container.config):
            become_root()
        if process.get("terminal"):
            pty, peer = oci_process.terminal(process, os.open(
                "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW))
            oci_process.controlling_terminal(peer)
            send_fd(sync, b"terminal", pty)
        oci_process.cwd(process)
        env = listen_environment(oci_process.environment(process), options.preserve_fds)
        path = oci_process.find(process, env)
        message = {"ociVersion": oci_config.VERSION, "fds": ["seccompFd"], "pid": os.getpid(), "state": state}
        become(container.config, process, proc, filter, listener, message)
        oci_process.execute(process, path, env)
    except BaseException as error:  # noqa: BLE001  all of it belongs to the runtime
        _send(sync, describe(error))
    finally:
        os._exit(1)
