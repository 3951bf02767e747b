"""A monitor: a small process between the caller and a command, as containerd-shim or conmon is.

It starts the command, waits for it and undoes what was made for it.  It watches one socket: when
the caller closes its end, or is killed and the kernel closes it, the monitor ends the command and
cleans up.  So nothing stays behind, whatever happens to the caller.
"""

from __future__ import annotations

import array  # noqa: F401  socket.send_fds imports it, which must not happen after a fork
import fcntl
import io
import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from labs import process
from labs.errors import ChildFailed, Timeout

PIPE_BYTES = 1 << 20
LAST_FD = 1 << 30
FROM_OUTSIDE = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
F_SETPIPE_SZ = 1031  # <linux/fcntl.h>


class Report(NamedTuple):
    """What a monitor says when its command has ended; status is that of wait(2)."""

    status: int
    cpu_seconds: float
    peak_bytes: int | None
    oom: bool


class Channels(NamedTuple):
    """The monitor's ends: the control socket, and the error pipe that execve(2) in the command closes."""

    control: socket.socket
    errors: int


def close_all_but(*keep: int) -> None:
    """Close every file descriptor but 0, 1, 2 and these: close_range(2)."""
    start = 3
    for fd in sorted(keep):
        if fd > start:
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, LAST_FD)


def watch(pid: int, channels: Channels, end: Callable[[], object]) -> tuple[int, resource.struct_rusage]:
    """In the monitor: wait for the command, and call end() if the caller goes first; wait(2)'s status and usage."""
    control, errors = channels
    pidfd = os.pidfd_open(pid)
    with suppress(BrokenPipeError):
        socket.send_fds(control, [b"%d" % pid], [pidfd])
    os.dup2(control.fileno(), errors)  # the pipe's end is the command's alone now; later errors take the socket
    os.closerange(0, 3)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control, select.POLLIN)
    if control.fileno() in (fd for fd, _ in poll.poll()):
        end()
    _, status, usage = os.wait4(pid, 0)
    return status, usage


def tell(channels: Channels, report: Report) -> None:
    """In the monitor: send the report, if the caller is still there."""
    with suppress(BrokenPipeError):
        channels.control.send(json.dumps(report._asdict()).encode())


class Monitor:
    """The caller's side: fork a monitor, read its report and the command's output.

    supervise runs in the monitor; keep holds file descriptors that it needs.  The control socket
    keeps message boundaries: first the pid with a pidfd, then the report, then maybe an error.
    """

    def __init__(self, supervise: Callable[[Channels], object], stdin: bytes = b"", keep: Sequence[int] = ()) -> None:
        self._supervise, self._stdin, self._keep = supervise, stdin, keep
        self.pid = self.pidfd = self._monitor = -1
        self._report: Report | None = None
        self._open = ExitStack()
        self._output: dict[int, bytearray] = {}
        self._poll = select.poll()

    def start(self) -> None:
        """Fork, and return when the command runs; what stops it before is raised."""
        try:
            with ExitStack() as theirs:
                errors = self._fork(theirs)
            failure = errors.readall()
            self._receive_pid()
        except BaseException:
            self.close()
            raise
        if failure:
            self.close()
            raise process.revive(failure)

    def _fork(self, theirs: ExitStack) -> io.FileIO:
        """Fork; gives our end of the error pipe.  theirs closes the ends that only the monitor keeps."""
        pipes = [_pipe() for _ in range(3)]
        for ours, end in pipes:
            self._open.enter_context(ours)
            theirs.enter_context(end)
        (errors, errors_end), (out, out_end), (err, err_end) = pipes
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._open.enter_context(self._control)
        theirs.enter_context(control)
        stdin = theirs.enter_context(_stdin_file(self._stdin))
        self._listen(out.fileno(), err.fileno())
        channels = Channels(control, errors_end.fileno())
        stdio = (stdin.fileno(), out_end.fileno(), err_end.fileno())
        self._monitor = _fork_masked(lambda: self._main(channels, stdio), channels.errors)
        return errors

    def _listen(self, *outputs: int) -> None:
        for fd in outputs:
            os.set_blocking(fd, False)
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES)
            self._output[fd] = bytearray()
            self._poll.register(fd, select.POLLIN)
        self._poll.register(self._control, select.POLLIN)

    def _main(self, channels: Channels, stdio: Sequence[int]) -> None:
        """The monitor: in its own session, where no Ctrl-C reaches it, and without the caller's files."""
        os.setsid()
        os.umask(0o022)
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        close_all_but(channels.control.fileno(), channels.errors, *self._keep)
        self._supervise(channels)

    def _receive_pid(self) -> None:
        message, fds, _, _ = socket.recv_fds(self._control, 64, 1)
        if fds:
            self.pid, self.pidfd = int(message), fds[0]
            self._open.callback(os.close, self.pidfd)

    def wait(self, timeout: float | None = None) -> Report:
        """The report, once the command has ended; Timeout after timeout seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._report is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = self._poll.poll(left)
            if not ready:
                raise Timeout("the end of the command", timeout or 0)
            self._drain()
            if self._control.fileno() in (fd for fd, _ in ready):
                self._report = self._read_report()
                self._drain()
        return self._report

    def _read_report(self) -> Report:
        message = self._control.recv(4096)
        if not message:
            raise ChildFailed("monitor", detail="it was killed")
        values = json.loads(message)
        if isinstance(values, dict):
            return Report(**values)
        raise process.revive(message)

    def _drain(self) -> None:
        """Move what stands in the pipes to memory."""
        for fd, data in self._output.items():
            with suppress(BlockingIOError):
                while chunk := os.read(fd, 65536):
                    data.extend(chunk)
                with suppress(KeyError):  # end of file, perhaps seen before
                    self._poll.unregister(fd)

    def logs(self) -> tuple[str, str]:
        """What the command has written so far: stdout, stderr."""
        if self._monitor != -1:
            self._drain()
        out, err = (written.decode("utf-8", "replace") for written in self._output.values())
        return out, err

    def close(self) -> None:
        """End the command if it still runs, and wait until the monitor has undone everything."""
        with self._open:
            if self._monitor == -1:
                return
            self._control.shutdown(socket.SHUT_WR)
            _, status = os.waitpid(self._monitor, 0)
            self._drain()
            self._monitor = -1
            if status:
                self._raise_leftover()

    def _raise_leftover(self) -> None:
        """The monitor failed while it undid things: raise what it said."""
        while message := self._control.recv(4096):
            if message.startswith(b"["):
                raise process.revive(message)


def _pipe() -> tuple[io.FileIO, io.FileIO]:
    """A pipe as two files that close themselves."""
    reader, writer = os.pipe()
    return io.FileIO(reader, "rb"), io.FileIO(writer, "wb")


def _stdin_file(data: bytes) -> io.FileIO:
    """A file that reads as data: /dev/null, or memory (memfd_create(2))."""
    if not data:
        return io.FileIO("/dev/null", "rb")
    file = io.FileIO(os.memfd_create("stdin"), "r+b")
    file.write(data)
    file.seek(0)
    return file


def _fork_masked(main: Callable[[], object], errors: int) -> int:
    """fork(2) with the signals blocked in the child that a terminal or a shutdown sends to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_OUTSIDE)
    try:
        pid = os.fork()
        if pid == 0:
            process.child_main(main, errors)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
