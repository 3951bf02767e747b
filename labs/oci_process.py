"""The process object of config.json: each field is one function, in the order the kernel wants them.

config.md "Process" and "POSIX process" of the OCI runtime specification.  All of it is done by the
container's own process, inside its namespaces, after the root is in place and before execve(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal
from _socket import SCM_RIGHTS, SOL_SOCKET, socket

from labs import capabilities, syscalls
from labs.errors import CommandNotFound, KernelError, NotExecutable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# <asm-generic/ioctls.h>
TIOCSPTLCK, TIOCGPTPEER, TIOCSWINSZ, TIOCGWINSZ, TIOCSCTTY = 0x40045431, 0x5441, 0x5414, 0x5413, 0x540E
POLICIES = {"SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5,
            "SCHED_DEADLINE": 6}  # <linux/sched.h>
SCHED_FLAGS = ("RESET_ON_FORK", "RECLAIM", "DL_OVERRUN", "KEEP_POLICY", "KEEP_PARAMS", "UTIL_CLAMP_MIN",
               "UTIL_CLAMP_MAX")
IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}  # <linux/ioprio.h>
RLIMIT_LOCKS = 10  # the one that Python does not name
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def terminal(process: dict[str, Any], pty: int) -> tuple[int, int]:
    """A pseudoterminal of the container's own devpts: pts(4), ioctl_tty(2).  The main and the other end."""
    if os.fstat(pty).st_rdev != os.makedev(5, 2):
        raise KernelError("open /dev/pts/ptmx: not a terminal multiplexer", errno.ENOTTY)
    fcntl.ioctl(pty, TIOCSPTLCK, struct.pack("i", 0))
    peer = fcntl.ioctl(pty, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    size = process.get("consoleSize") or {}
    if size.get("height") or size.get("width"):
        fcntl.ioctl(peer, TIOCSWINSZ, struct.pack("HHHH", size["height"], size["width"], 0, 0))
    return pty, peer


def controlling_terminal(fd: int) -> None:
    """Make the terminal standard input, output and error, and the session's own: credentials(7), TIOCSCTTY."""
    for standard in range(3):
        os.dup2(fd, standard)
    fcntl.ioctl(0, TIOCSCTTY, 0)


def cwd(process: dict[str, Any]) -> None:
    """chdir(2); where it leads outside the root the container must not start (CVE-2024-21626)."""
    os.chdir(process["cwd"])
    try:
        inside = os.getcwd().startswith("/")
    except FileNotFoundError:  # the kernel says "(unreachable)/…", which the C library makes ENOENT: getcwd(3)
        inside = False
    if not inside:
        raise KernelError("process.cwd leads out of the root", errno.EPERM, process["cwd"])


def rlimits(process: dict[str, Any], pid: int) -> None:
    """prlimit(2) for each of process.rlimits, by the runtime: it may raise them; 2^64-1 is no limit."""
    if process.get("rlimits"):
        import resource
    for limit in process.get("rlimits") or []:
        soft, hard = (-1 if limit[key] >= (1 << 64) - 1 else limit[key] for key in ("soft", "hard"))  # RLIM_INFINITY
        number = getattr(resource, limit["type"], None)
        try:
            resource.prlimit(pid, number or RLIMIT_LOCKS, (soft, hard))
        except (ValueError, OSError) as error:
            raise KernelError(f"prlimit {limit['type']}", getattr(error, "errno", None) or errno.EINVAL) from error


def scheduler(process: dict[str, Any]) -> None:
    """sched_setattr(2): policy, nice value, priority, or the three times of SCHED_DEADLINE in nanoseconds."""
    if given := process.get("scheduler"):
        flags = sum(1 << SCHED_FLAGS.index(name.removeprefix("SCHED_FLAG_")) for name in given.get("flags") or [])
        syscalls.sched_setattr(0, struct.pack(
            "=IIQiIQQQ", 48, POLICIES[given["policy"]], flags, given.get("nice", 0), given.get("priority", 0),
            given.get("runtime", 0), given.get("deadline", 0), given.get("period", 0)))


def io_priority(process: dict[str, Any]) -> None:
    """ioprio_set(2): class and level."""
    if given := process.get("ioPriority"):
        syscalls.ioprio_set(1, 0, IO_CLASSES[given["class"]] << 13 | given.get("priority", 0))


def no_new_privileges(process: dict[str, Any]) -> None:
    """prctl(2), PR_SET_NO_NEW_PRIVS: from now on no execve(2) gives more rights."""
    if process.get("noNewPrivileges"):
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def user_and_capabilities(process: dict[str, Any]) -> None:
    """process.user and process.capabilities: the bounding set while we may, the ids, then the other four sets.

    PR_SET_KEEPCAPS keeps the permitted set over the change of the uid: capabilities(7).
    """
    sets = {name: capabilities.mask(names or []) for name, names in (process.get("capabilities") or {}).items()}
    capabilities.limit(sets.get("bounding", 0))
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)
    user(process)
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 0)
    capabilities.become(sets)


def user(process: dict[str, Any]) -> None:
    """setgroups(2), setresgid(2), setresuid(2), umask(2)."""
    given = process.get("user") or {}
    gid, uid = given.get("gid") or 0, given.get("uid") or 0
    groups = given.get("additionalGids") or []
    if groups or not _setgroups_denied():
        os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.umask(0o022 if given.get("umask") is None else given["umask"])


def _setgroups_denied() -> bool:
    try:
        with open("/proc/self/setgroups", encoding="utf-8") as file:
            return file.read().strip() == "deny"
    except OSError:
        return False


def seccomp(program: Any, listener: int, state: bytes) -> None:
    """linux.seccomp: seccomp(2).  With NOTIFY the listener's descriptor goes to the agent with the state."""
    if program and (fd := program.install()) >= 0:
        socket(fileno=listener).sendmsg([state], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", fd))])
        os.close(fd)


def environment(process: dict[str, Any]) -> dict[str, str]:
    """process.env, the last of a name counts; HOME from passwd(5) of the image where it is not given."""
    found = dict(item.partition("=")[::2] for item in process.get("env") or [] if "=" in item)
    if not found.get("HOME"):
        found["HOME"] = _home((process.get("user") or {}).get("uid") or 0)
    return found


def _home(uid: int) -> str:
    try:
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a FIFO nobody would ever wake us
        with open(fd, encoding="utf-8", errors="replace") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return "/"
            for fields in (line.rstrip("\n").split(":") for line in file):
                if len(fields) > 5 and fields[2] == str(uid):
                    return fields[5] or "/"
    except OSError:
        pass
    return "/"


def find(process: dict[str, Any], env: dict[str, str]) -> str:
    """The file that process.args names: on PATH as execvp(3) looks, or CommandNotFound, NotExecutable."""
    name = process["args"][0]
    folders = [""] if "/" in name else env.get("PATH", PATH).split(":")
    found = ""
    for folder in folders:
        path = f"{folder or '.'}/{name}" if "/" not in name else name
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            found = path
        elif os.path.isdir(path) and "/" in name:
            raise NotExecutable(f"exec {name}", errno.EACCES, path, "is a directory")
    if found:
        raise NotExecutable(f"exec {name}", errno.EACCES, found)
    raise CommandNotFound(f"exec {name}", errno.ENOENT, name, "no such file or directory" if "/" in name
                          else "executable file not found in $PATH")


def execute(process: dict[str, Any], path: str, env: dict[str, str]) -> NoReturn:
    """execve(2), with the default action of the two signals that Python ignores: signal(7)."""
    for number in (SIGPIPE, SIGXFSZ):
        signal(number, SIG_DFL)
    try:
        os.execve(path, process["args"], env)
    except OSError as error:
        raise NotExecutable(f"exec {process['args'][0]}", error.errno or 0, path) from error
