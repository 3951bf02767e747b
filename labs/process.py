"""Processes: fork with an error pipe, wait status, pidfds, a ten-line init, and /proc/PID read.

The notebook's process has threads, so the child of a fork makes only calls that are already
imported.  Whatever stops a child reaches the parent as (step, errno, path) through a pipe that
execve(2) closes.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, NoReturn, TypeVar

from labs.errors import BadInput, ChildFailed, CommandNotFound, KernelError, NotExecutable, Timeout

T = TypeVar("T")
ALL_SIGNALS = signal.valid_signals()
# Ignored from the start, by whoever started us or by Python, or handled by Python.
CHANGED_SIGNALS = [n for n in ALL_SIGNALS if signal.getsignal(n) not in (signal.SIG_DFL, None)]
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class WaitStatus(NamedTuple):
    """How a process ended: exit code or signal (the other is None), and the status a shell shows."""

    code: int | None
    signal: int | None
    shell: int


def wait_status(status: int) -> WaitStatus:
    """Take apart the 16 bits that wait(2) gives: exit code << 8, or the signal's number."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return WaitStatus(None, number, 128 + number)
    code = os.WEXITSTATUS(status)
    return WaitStatus(code, None, code)


def wait(pidfd: int, timeout: float | None = None) -> WaitStatus:
    """Wait for a child through its pidfd and reap it: pidfd_open(2), waitid(2).  Seconds."""
    if not readable(pidfd, timeout):
        raise Timeout("the end of the process", timeout or 0)
    end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert end is not None  # None is only for WNOHANG
    if end.si_code == os.CLD_EXITED:
        return WaitStatus(end.si_status, None, end.si_status)
    return WaitStatus(None, end.si_status, 128 + end.si_status)


def readable(fd: int, timeout: float | None) -> bool:
    """Whether poll(2) finds fd readable (a pidfd: the process has ended) within timeout seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0, timeout) * 1000))


def kill(pidfd: int, number: int) -> None:
    """pidfd_send_signal(2): a signal to exactly this process, never to a later one of the same pid."""
    signal.pidfd_send_signal(pidfd, number)


def stop(pidfd: int, number: int = signal.SIGTERM, grace: float = 10.0) -> WaitStatus:
    """End a child as `docker stop` does: the signal, up to grace seconds, then SIGKILL."""
    kill(pidfd, number)
    try:
        return wait(pidfd, grace)
    except Timeout:
        kill(pidfd, signal.SIGKILL)
        return wait(pidfd)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Name what a child is doing: an OSError inside becomes ChildFailed(name, errno, path)."""
    try:
        yield
    except OSError as error:
        raise ChildFailed(name, error.errno or 0, _path_of(error)) from error


def _path_of(error: OSError) -> str | None:
    path = getattr(error, "path", None) or error.filename
    return None if path is None else os.fsdecode(path)


def describe(error: BaseException) -> bytes:
    """An error as one JSON line for the error pipe."""
    kind, value = type(error).__name__, None
    if isinstance(error, ChildFailed):
        where, number, path, detail = error.step, error.errno, error.path, error.detail
    elif isinstance(error, OSError):
        where, number, path = getattr(error, "step", kind), error.errno or 0, _path_of(error)
        detail, value = error.strerror or str(error), getattr(error, "value", None)
    else:
        where, number, path, detail = kind, 0, None, str(error)
    return json.dumps([kind, where, number, path, detail, value]).encode()


def revive(line: bytes) -> ChildFailed | KernelError:
    """The exception that describe() wrote down."""
    kind, where, number, path, detail, value = json.loads(line)
    if kind == "KernelError" and where.startswith("write "):
        return KernelError(where, number, path, value)
    classes = {"CommandNotFound": CommandNotFound, "NotExecutable": NotExecutable}
    return classes.get(kind, ChildFailed)(where, number, path, detail)


def fresh_signals() -> None:
    """Give back the default actions and the empty mask."""
    for number in CHANGED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def child_main(fn: Callable[[], object], errors: int) -> NoReturn:
    """Run fn in a forked child, write what stops it to the error pipe, and never return."""
    gc.disable()  # a collection would touch, and so copy, every page shared with the parent
    try:
        code = fn()
        os._exit(code if type(code) is int else 0)
    except BaseException as error:  # noqa: BLE001  all of it belongs to the parent
        os.write(errors, describe(error))
    finally:
        os._exit(1)


def read_all(fd: int) -> bytes:
    """Everything up to the end of file; closes fd."""
    with open(fd, "rb", buffering=0) as file:
        return file.readall() or b""


class Child:
    """A forked child: pid, pidfd, and what it said on its error pipe.

    As a context manager it is killed and reaped on the way out, if it has not ended before.
    """

    def __init__(self, pid: int, errors: int) -> None:
        self.pid, self._errors = pid, errors
        self.pidfd = os.pidfd_open(pid)
        self.ended: WaitStatus | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.ended is None:
            kill(self.pidfd, signal.SIGKILL)
            self.ended = wait(self.pidfd)
        os.close(self.pidfd)
        if self._errors >= 0:
            os.close(self._errors)

    def check(self) -> None:
        """Raise what stopped the child; returns when it has called execve(2) or ended well."""
        errors, self._errors = self._errors, -1
        line = read_all(errors) if errors >= 0 else b""
        if line:
            raise revive(line)

    def wait(self, timeout: float | None = None) -> WaitStatus:
        """How the child ended; an error that it reported is raised instead."""
        if self.ended is None:
            self.ended = wait(self.pidfd, timeout)
            self.check()
        return self.ended

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the child a signal."""
        kill(self.pidfd, number)

    def stop(self, number: int = signal.SIGTERM, grace: float = 10.0) -> WaitStatus:
        """The signal, up to grace seconds, then SIGKILL."""
        self.ended = stop(self.pidfd, number, grace)
        return self.ended


def fork(fn: Callable[[], object]) -> Child:
    """Run fn in a child: fork(2).  An int that fn returns is the exit code."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        fresh_signals()
        child_main(fn, writer)
    os.close(writer)
    return Child(pid, reader)


def spawn(argv: Sequence[str], env: Mapping[str, str] | None = None,
          first: Callable[[], object] = bool) -> Child:
    """fork(2) and execve(2); returns once the command runs, raises CommandNotFound if it cannot.

    first is called in the child, before the command.
    """
    child = fork(lambda: (first(), execute(argv, env)))
    try:
        child.check()
    except BaseException:
        child.__exit__()
        raise
    return child


def call(fn: Callable[..., T], *args: object) -> T:
    """What fn(*args) returns in a child of its own (as JSON carries it): the caller stays as it is."""
    reader, writer = os.pipe()
    def answer() -> None:
        value = json.dumps(fn(*args)).encode()
        with open(writer, "wb", buffering=0) as pipe:
            _write_all(pipe.fileno(), value)
    with fork(answer) as child:
        os.close(writer)
        value = read_all(reader)
        child.wait()
        return json.loads(value) if value else None  # type: ignore[return-value]


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def execute(argv: Sequence[str], env: Mapping[str, str] | None = None) -> NoReturn:
    """execve(2) with a search of PATH as execvp(3) does it, in the environment given (or this one)."""
    environment = dict(os.environ if env is None else env)
    name = argv[0]
    folders = [""] if "/" in name else environment.get("PATH", DEFAULT_PATH).split(":")
    failed: OSError | None = None
    for folder in folders:
        try:
            os.execve(f"{folder}/{name}" if folder else name, list(argv), environment)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failed = error
    if failed is None:
        raise CommandNotFound(f"execve {name}", errno.ENOENT, name, "command not found")
    raise NotExecutable(f"execve {name}", failed.errno or 0, name)


def reap(argv: Sequence[str], env: Mapping[str, str] | None = None,
         started: Callable[[], object] = bool) -> int:
    """A ten-line init: run argv, forward every signal to it, reap every orphan; its status for a shell.

    started is called when argv runs.

    sigwait(3) takes signals that are blocked, so the rule that process 1 ignores signals without a
    handler (pid_namespaces(7)) does not bite.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    child = spawn(argv, env)
    started()
    while True:
        number = signal.sigwait(ALL_SIGNALS)
        if number != signal.SIGCHLD:
            os.kill(child.pid, number)
        for pid, status in iter(_reap_one, (0, 0)):
            if pid == child.pid:
                return wait_status(status).shell


def _reap_one() -> tuple[int, int]:
    """One ended child, or (0, 0) when none has ended: waitpid(2) with WNOHANG."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


class Status(NamedTuple):
    """Fields of /proc/PID/status, proc_pid_status(5)."""

    name: str
    state: str
    pid: int
    ppid: int
    nspid: tuple[int, ...]
    uid: tuple[int, ...]
    gid: tuple[int, ...]
    threads: int


def status(pid: int) -> Status:
    """One process as /proc/PID/status shows it; state is one letter (R S D T Z), uid is real, effective, saved, fs."""
    fields = status_fields(pid)
    def numbers(field: str) -> tuple[int, ...]:
        return tuple(int(n) for n in fields.get(field, "").split())
    return Status(fields["Name"], fields["State"][0], pid, int(fields["PPid"]), numbers("NSpid"),
                  numbers("Uid"), numbers("Gid"), int(fields.get("Threads", "0")))


def status_fields(pid: int) -> dict[str, str]:
    """Every line of /proc/PID/status as a dict of text."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def cmdline(pid: int) -> list[str]:
    """The arguments the process was started with; empty for a kernel thread and for a zombie."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return os.fsdecode(file.read()).split("\0")[:-1]


def descriptors(pid: int) -> dict[int, str]:
    """What each open file of a process is, as the links in /proc/PID/fd say it."""
    found: dict[int, str] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed while we were reading
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def pids() -> list[int]:
    """Every process that this /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def children(pid: int) -> list[int]:
    """Direct children, in order of pid: /proc/PID/task/TID/children."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="utf-8") as file:
                found += (int(word) for word in file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended while we were reading
    return sorted(found)


class Process(NamedTuple):
    """A node of a process tree."""

    pid: int
    name: str
    state: str
    children: tuple[Process, ...]


def tree(pid: int) -> Process:
    """The process and all its descendants, as they are now."""
    below: list[Process] = []
    for child in children(pid):
        try:
            below.append(tree(child))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we were reading
    now = status(pid)
    return Process(pid, now.name, now.state, tuple(below))


def zombies(pid: int) -> list[int]:
    """Descendants that have ended and that nobody has waited for yet."""
    def walk(node: Process) -> Iterator[int]:
        for child in node.children:
            if child.state == "Z":
                yield child.pid
            yield from walk(child)
    return list(walk(tree(pid)))


def until(condition: Callable[[], T], timeout: float = 30.0, what: str = "the condition") -> T:
    """Ask again and again until condition() is true, and return it; Timeout after timeout seconds."""
    deadline, pause = time.monotonic() + timeout, 0.001
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Timeout(what, timeout)
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return value


def check_argv(argv: Sequence[str]) -> list[str]:
    """The command as a list of text, or BadInput."""
    if isinstance(argv, (str, bytes)) or not argv or not all(isinstance(a, str) for a in argv):
        raise BadInput("argv", argv, 'must be a list of strings, as ["echo", "hello"]')
    return list(argv)
