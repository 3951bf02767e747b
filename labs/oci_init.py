"""Process 1 of a container from clone3(2) to execve(2), and the same for a process that joins one.

It stands inside, beside whatever the image holds: it imports nothing, loads no library and trusts no
path of the image; what it needs of the host was opened or compiled before it began.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from _socket import AF_INET, AF_UNIX, SOCK_DGRAM, SOCK_STREAM, socket

from labs import machine, oci_config, oci_json, oci_process, oci_root, syscalls
from labs.errors import BadInput, KernelError
from labs.oci_config import namespaces
from labs.oci_hooks import hooks
from labs.oci_spawn import describe, send, send_fd, user_namespace
from labs.oci_state import OciContainer, Options, state_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1  # <linux/sockios.h>, <linux/if.h>
PERSONALITIES = {"LINUX": 0, "LINUX32": 8}  # <linux/personality.h>


class Init:
    """Process 1's half of create and start: the right column.  What it needs of the host is opened before it begins."""

    def __init__(self, config: dict[str, Any], saved: dict[str, Any], options: Options, sync: socket,
                 start: socket) -> None:
        self.config, self.saved, self.options, self.sync, self.start = config, saved, options, sync, start
        self.process, self.linux = config["process"], config["linux"]
        self.have = namespaces(config)
        self.root = oci_root.Root(saved["rootfs"])
        self.trees = oci_root.sources(config, options.bundle, user_namespace)
        self.proc = host_proc(config["process"])
        self.filter = compile_filter(config)
        self.listener = connect_listener(self.linux.get("seccomp"))
        self.report = sync

    def main(self) -> NoReturn:
        """All of it; what stops it goes to the runtime that waits."""
        try:
            seal()
            self._prepare()
            self._wait_for_start()
            self._finish()
        except BaseException as error:  # noqa: BLE001  all of it belongs to the runtime
            send(self.report, describe(error))
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
        send(self.sync, b"hooks")
        self.sync.recv(16)
        hooks(self.config, "createContainer", self._state("creating"))
        self._settle()
        if self.process.get("terminal"):
            self._terminal()
        os.umask(0o022)
        self._command()
        send(self.sync, b"ready")
        self.sync.close()

    def _state(self, status: str) -> dict[str, Any]:
        return state_object(self.saved["id"], status, os.getpid(), self.saved["bundle"], self.config)

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
        fd, _ = self.start._accept()  # type: ignore[attr-defined]  # noqa: SLF001  all of accept(2) there is in _socket
        self.report = socket(fileno=fd)
        self.start.close()

    def _finish(self) -> None:
        hooks(self.config, "startContainer", self._state("created"))
        state = {"ociVersion": oci_config.VERSION, "fds": ["seccompFd"], "pid": self.saved["pid"],
                 "state": self._state("creating")}
        become(self.config, self.process, self.proc, self.filter, self.listener, state)
        oci_process.execute(self.process, self.path, self.env)


def become(config: dict[str, Any], process: dict[str, Any], proc: int, program: Any, listener: int,
           state: dict[str, Any]) -> None:
    """The last steps before execve(2).  seccomp(2) needs CAP_SYS_ADMIN or no_new_privs: its place depends on which."""
    profile = config["linux"].get("seccomp") or {}
    message = oci_json.dumps(state | {"metadata": profile.get("listenerMetadata", "")}).encode()
    oci_process.scheduler(process)
    oci_process.io_priority(process)
    personality(config["linux"].get("personality"))
    apparmor_profile(process, proc)
    if not process.get("noNewPrivileges"):
        oci_process.seccomp(program, listener, message)
    oci_process.user_and_capabilities(process)
    oci_process.no_new_privileges(process)
    if process.get("noNewPrivileges"):
        oci_process.seccomp(program, listener, message)


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


def become_root() -> None:
    """Id 0 of the user namespace: until now the process has no mapped id."""
    try:
        os.setgroups([])
    except PermissionError:
        pass  # setgroups is denied in this namespace
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def keyring(name: str) -> None:
    """A session keyring of its own, session-keyring(7); left out where the kernel has none, or no quota."""
    try:
        syscalls.keyctl(syscalls.KEYCTL_JOIN_SESSION_KEYRING, f"_ses.{name}")
    except KernelError as error:
        if error.errno not in (errno.ENOSYS, errno.EDQUOT, errno.EPERM):
            raise


def host_names(config: dict[str, Any]) -> None:
    """The fields hostname and domainname: sethostname(2), setdomainname(2)."""
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
    """linux.sysctl: the host's /proc/sys shows the namespaces of who opens it, and no image can forge it."""
    machine.write_file(f"/proc/sys/{name.replace('.', '/')}", value)


def personality(given: dict[str, Any] | None) -> None:
    """linux.personality: personality(2)."""
    if given:
        if given.get("flags"):
            raise BadInput("linux.personality.flags", given["flags"], "has no flag in the specification yet")
        syscalls.personality(PERSONALITIES[given["domain"]])


def host_proc(process: dict[str, Any]) -> int:
    """The host's /proc: inside, our own attributes are reached through it, not through the image's; or -1."""
    if not process.get("apparmorProfile"):
        return -1
    try:
        if machine.read_file("/sys/module/apparmor/parameters/enabled").strip() == "Y":
            return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except KernelError:
        pass  # no such module
    profile = process["apparmorProfile"]
    raise BadInput("process.apparmorProfile", profile, "needs AppArmor, which this kernel does not run")


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
            profile = process["apparmorProfile"]
            raise BadInput("process.apparmorProfile", profile, error.strerror or "refused") from error
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


def join_container(container: OciContainer, pidfd: int, process: dict[str, Any], options: Options, sync: socket,
                   proc: int, program: Any, listener: int, state: dict[str, Any]) -> NoReturn:
    """The joining process's half of exec."""
    try:
        seal()
        sync.recv(16)
        os.setsid()
        if "cgroup" in namespaces(container.config):
            syscalls.setns(pidfd, syscalls.CLONE_NEWCGROUP)
        if "user" in namespaces(container.config):
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
        become(container.config, process, proc, program, listener, message)
        oci_process.execute(process, path, env)
    except BaseException as error:  # noqa: BLE001  all of it belongs to the runtime
        send(sync, describe(error))
    finally:
        os._exit(1)
