r"""What strace(1) writes, as Python values: the system calls of a running engine, read and shortened.

    with strace.attach(containerd) as calls:       # follows every process that containerd begins
        ...                                        # docker run
    print(*strace.story(strace.runtime(calls)), sep="\n")

Asked for is only what changes the world of a process (`CALLS`): namespaces, mounts, names, rights, programs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from labs import process

CALLS = (
    "clone", "clone3", "unshare", "setns",
    "mount", "umount2", "pivot_root", "chroot",
    "open_tree", "move_mount", "mount_setattr", "fsopen", "fsconfig", "fsmount",
    "sethostname", "setsid", "prctl", "capset", "setuid", "setresuid", "setgroups", "seccomp", "bpf",
    "execve", "execveat",
)  # fmt: skip
# 1234  mount("proc", …) = 0, or in two halves when another process came between: strace(1), "unfinished ...".
LINE = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<args>.*)\) += (?P<result>.*)")
BEGUN = re.compile(r"(?P<pid>\d+) +(?P<text>\w+\(.*?) *<unfinished \.\.\.>$")
ENDED = re.compile(r"(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<text>.*)$")
# Go's threads and vforks, and questions to the kernel: how a program runs, not what it does to a container.
PLUMBING = re.compile(r"CLONE_VM|PR_GET_|PR_CAPBSET_READ|PR_CAP_AMBIENT_IS_SET|SECCOMP_GET_|^BPF_(?!PROG_ATTACH)")
DULL_FLAG = re.compile(
    r"SIGCHLD|CLONE_CHILD_\w+|(OPEN_TREE|FSOPEN|FSMOUNT)_CLOEXEC|(AT|MOVE_MOUNT_[FT])_EMPTY_PATH|AT_FDCWD|0|NULL"
)
PREFIX = re.compile(r"^(CLONE|MS|MNT|MOUNT_ATTR|PR|SECCOMP|OPEN_TREE|FSCONFIG|BPF|AT)_")
# Names that an engine makes up: a path is cut after the last of them.
MADE_UP = re.compile(r"^.*/[0-9a-f]{12,64}/")
# What follows is one of many capabilities, or an array of arguments.
ONLY_FIRST = re.compile(r"PR_CAPBSET_DROP|PR_CAP_AMBIENT|execve|BPF_PROG_ATTACH")


class Call(NamedTuple):
    """A finished system call.

    Attributes:
        pid: the thread that made it, as the tracer's PID namespace numbers it.
        name: as in section 2 of the manual.
        args: as strace writes them.
        result: what it returned, with the name of the error.
    """

    pid: int
    name: str
    args: tuple[str, ...]
    result: str

    @property
    def failed(self) -> bool:
        """Whether it returned an error."""
        return self.result.startswith("-1 ")

    @property
    def made(self) -> int:
        """The process or thread it made, or 0."""
        found = re.match(r"\d+", self.result) if self.name in ("clone", "clone3", "fork", "vfork") else None
        return int(found[0]) if found else 0

    def __str__(self) -> str:
        """The name with its main arguments: unshare(NEWNS|NEWUTS), without numbers of descriptors and addresses."""
        if self.name == "capset":
            return f"capset({self.args[1].partition('permitted=')[0].count('CAP_')} effective)"
        first = self.name == "execve" or any(map(ONLY_FIRST.match, self.args[:1]))
        return f"{self.name}({', '.join(filter(None, map(_short, self.args[:1] if first else self.args)))})"


def parse(lines: Iterable[str]) -> list[Call]:
    """The finished calls that `strace -f` wrote, in the order in which they ended; signals and exits are left out.

    Of a call that makes a process the beginning counts: what the child does may come before its end.
    """
    calls: list[tuple[int, Call]] = []
    begun: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        if half := BEGUN.match(line):
            begun[half["pid"]] = number, half["text"]
            continue
        start, joined = number, line
        if (rest := ENDED.match(line)) and rest["pid"] in begun:
            start, text = begun.pop(rest["pid"])
            joined = f"{rest['pid']} {text}{rest['text']}"
        if whole := LINE.match(joined):
            call = Call(int(whole["pid"]), whole["name"], split(whole["args"]), whole["result"].strip())
            calls.append((start if call.made else number, call))
    return [call for _, call in sorted(calls, key=lambda entry: entry[0])]


def split(text: str) -> tuple[str, ...]:
    """Arguments apart: at the commas that stand in no string, list or structure."""
    pieces = re.findall(r'"(?:\\.|[^"\\])*"|.', text)
    found, depth = [""], 0
    for piece in pieces:
        depth += (piece in "[{(") - (piece in ")}]")
        if piece == "," and depth == 0:
            found.append("")
        else:
            found[-1] += piece
    return tuple(word.strip() for word in found) if text.strip() else ()


def family(calls: Sequence[Call], pid: int) -> list[Call]:
    """The calls of a process and of all that it made: threads, children, their children."""
    maker = {call.made: call.pid for call in calls if call.made}

    def belongs(one: int) -> bool:
        return one == pid or (one in maker and belongs(maker[one]))

    return [call for call in calls if belongs(call.pid)]


def runtime(calls: Sequence[Call], verb: str = "create") -> list[Call]:
    """The calls of the OCI runtime that was started with `verb`, and of all that it made; empty if there is none."""
    for number, call in enumerate(calls):
        if call.name == "execve" and not call.failed and f'"{verb}"' in split(call.args[1][1:-1]):
            # Before this, the same process was still a copy of the one that started it.
            return [one for one in family(calls, call.pid) if one.pid != call.pid or one in calls[number:]]
    return []


def story(calls: Iterable[Call]) -> list[str]:
    """What changed something, shortened; equal lines in a row are one line with their number."""
    told = (str(call) for call in calls if not call.failed and not PLUMBING.search(" ".join(call.args)))
    groups = ((line, len(list(group))) for line, group in groupby(told))
    return [line if times == 1 else f"{line} ×{times}" for line, times in groups]


@contextmanager
def attach(pid: int, names: Iterable[str] = CALLS) -> Iterator[list[Call]]:
    """Follow a process and all that it begins; the list is filled when the block ends.

    strace is on every thread of the process when the block begins, and lets go of them at its end.
    """
    calls: list[Call] = []
    with tempfile.TemporaryDirectory(prefix="labs-strace-") as folder:
        output = Path(folder, "calls")
        command = ["strace", "-f", "-qq", "-s", "200", "-e", "signal=none", "-e", "trace=" + ",".join(names)]
        tracer = subprocess.Popen([*command, "-o", output, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        try:
            process.until(lambda: tracer.poll() is not None or _traced(pid, tracer.pid), what="strace to attach")
            yield calls
        finally:
            tracer.send_signal(signal.SIGTERM)
            _, words = tracer.communicate()
        if not output.exists() or not (text := output.read_text(errors="replace")):
            raise OSError(f"strace wrote nothing: {words.strip()}")
        calls.extend(parse(text.splitlines()))


def _traced(pid: int, tracer: int) -> bool:
    """Whether every thread has this tracer: TracerPid in proc_pid_status(5)."""
    tasks = os.listdir(f"/proc/{pid}/task")
    return all(f"TracerPid:\t{tracer}\n" in Path(f"/proc/{pid}/task/{task}/status").read_text() for task in tasks)


def _short(arg: str) -> str:
    """One argument without what differs from run to run, and without what says nothing; may be empty."""
    if arg.startswith('"'):
        text = MADE_UP.sub("", re.sub(r"^/proc/\d+/", "/proc/N/", arg.removesuffix("...").strip('"')))
        return "" if re.match(r"/proc/self/fd/\d+$", text) else text
    if arg.startswith("{"):
        arg = "|".join(re.findall(r"\b(?:flags|attr_set|propagation)=([A-Z][\w|]*)", arg))
    flags = [PREFIX.sub("", flag) for flag in arg.removeprefix("flags=").split("|") if not DULL_FLAG.fullmatch(flag)]
    return "|".join(flag for flag in flags if re.match("[A-Z]", flag))
