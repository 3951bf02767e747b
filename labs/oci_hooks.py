"""Hooks: programs of the caller's at six points of a container's life; config.md, "POSIX-platform Hooks"."""

from __future__ import annotations

import errno
import os
import select

from labs import oci_json
from labs.errors import ChildFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SIGKILL = 9


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
    if not readable(pidfd, timeout if timeout > 0 else 1 << 20):
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


def readable(fd: int, seconds: float) -> bool:
    """Whether poll(2) finds fd readable (a pidfd: the process has ended) within so many seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
