"""The runtime that stays with its container: signals passed on, a terminal carried, the end waited for.

runc run and runc exec without --detach do this; docker and podman do it in their own shim.
"""

from __future__ import annotations

import _signal as signal  # signal itself imports enum, and this is most of what a short run costs
import errno
import os
import select
import sys

from labs import oci_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NOT_PASSED_ON = (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGURG, signal.SIGPIPE, signal.SIGWINCH)


def listen() -> list[int]:
    """From here on a signal does not end us: its number waits in the list until attend passes it on."""
    waiting: list[int] = []
    _on_signals(waiting.append)
    return waiting


def _on_signals(act: Callable[[int], None]) -> None:
    for number in signal.valid_signals():
        if number not in NOT_PASSED_ON:
            signal.signal(number, lambda number, frame: act(number))


def attend(pid: int, console: int, waiting: list[int]) -> int:
    """Wait for the process; its status as a shell shows it.  console is its terminal's main end, or -1."""
    pidfd = os.pidfd_open(pid)
    _on_signals(lambda number: _pass_on(pidfd, number))
    for number in waiting:
        _pass_on(pidfd, number)
    if console >= 0:
        _carry(console, pidfd)
    _, status = os.waitpid(pid, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _pass_on(pidfd: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass  # it has ended: we are about to hear of it


def _carry(console: int, pidfd: int) -> None:
    """Copy between our standard input and output and the terminal, ours in raw mode where it is one: termios(3)."""
    import termios
    import tty
    ours = termios.tcgetattr(0) if os.isatty(0) else None
    signal.signal(signal.SIGWINCH, lambda number, frame: _resize(console))
    try:
        if ours:
            tty.setraw(0)
            _resize(console)
        _copy(console, pidfd)
    finally:
        if ours:
            termios.tcsetattr(0, termios.TCSADRAIN, ours)
        os.close(console)


def _resize(console: int) -> None:
    """The size of our terminal for the container's: ioctl_tty(2), TIOCGWINSZ."""
    from fcntl import ioctl
    if os.isatty(0):
        ioctl(console, oci_process.TIOCSWINSZ, ioctl(0, oci_process.TIOCGWINSZ, b"\0" * 8))


def _copy(console: int, pidfd: int) -> None:
    """Until the terminal's other end is closed by all (EIO)."""
    poll = select.poll()
    poll.register(console, select.POLLIN)
    poll.register(0, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if 0 in ready:
            data = os.read(0, 4096)
            if data:
                os.write(console, data)
            else:
                poll.unregister(0)
        if console in ready:
            try:
                data = os.read(console, 4096)
            except OSError as error:
                if error.errno == errno.EIO:
                    return
                raise
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif pidfd in ready:
            return  # the process has ended, and what it wrote has been read
