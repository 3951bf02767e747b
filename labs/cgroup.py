"""cgroup v2: make a group with its limits, read it, freeze it, kill it, delete it.

cgroups(7) and the kernel's Documentation/admin-guide/cgroup-v2.rst, where each file is explained.
Groups stand directly under /sys/fs/cgroup/labs, which holds no process itself (the
no-internal-process rule).
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from labs import devices, machine, process
from labs.errors import BadInput, Timeout

UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids")
CPU_PERIOD = 100_000


def parse_size(value: int | str, field: str = "size") -> int:
    """Bytes from 1048576, "64M", "512k", "1.5GiB": powers of 1024."""
    text = str(value).strip().upper().removesuffix("IB")
    if len(text) > 1 and text[-1] == "B" and text[-2] in UNITS:
        text = text[:-1]
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS and text else (text, "")
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise BadInput(field, value, 'must be bytes, as 67108864 or "64M" (units K M G T)')
    return size


class Pressure(NamedTuple):
    """One line of a *.pressure file: share of time stalled (percent, over 10, 60, 300 s), total microseconds."""

    avg10: float
    avg60: float
    avg300: float
    total: int


class Cgroup:
    """One group, by its directory.  As a context manager it is killed and deleted on the way out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = os.path.basename(path)

    def __repr__(self) -> str:
        return f"Cgroup({self.path!r})"

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.delete()

    def read(self, file: str) -> str:
        """The text of one of the group's files."""
        return machine.read_file(f"{self.path}/{file}").rstrip("\n")

    def write(self, file: str, value: object) -> None:
        """Write one of the group's files; a refusal is a KernelError with the file and the value."""
        machine.write_file(f"{self.path}/{file}", str(value))

    def keyed(self, file: str) -> dict[str, int]:
        """A flat keyed file (memory.events, cpu.stat …) as a dict of numbers."""
        return {key: int(value) for key, value in (line.split() for line in self.read(file).splitlines())}

    def procs(self) -> list[int]:
        """The processes in the group itself, not below it."""
        return [int(line) for line in self.read("cgroup.procs").split()]

    def add(self, pid: int) -> None:
        """Move a process, with all its threads, into the group."""
        self.write("cgroup.procs", pid)

    def spawn(self, argv: Sequence[str]) -> process.Child:
        """Start a command in the group: the child moves itself in ("0" is the writer) before execve(2)."""
        return process.spawn(argv, first=lambda: self.add(0))

    def children(self) -> list[Cgroup]:
        """The groups directly below, by name."""
        with os.scandir(self.path) as entries:
            return [Cgroup(path) for path in sorted(e.path for e in entries if e.is_dir())]

    def enable(self, controllers: Sequence[str]) -> None:
        """Offer these controllers to the groups below: cgroup.subtree_control."""
        self.write("cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))

    def events(self) -> dict[str, int]:
        """cgroup.events: populated and frozen, each 0 or 1."""
        return self.keyed("cgroup.events")

    def wait_event(self, key: str, value: int, timeout: float = 30.0) -> None:
        """Wait until cgroup.events says key value; the kernel announces a change by POLLPRI."""
        deadline = time.monotonic() + timeout
        with open(f"{self.path}/cgroup.events", encoding="utf-8") as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while f"{key} {value}\n" not in file.read():
                if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                    raise Timeout(f"{key} {value}", timeout)
                file.seek(0)

    def freeze(self) -> None:
        """Stop every process in the group and below, and wait until all stand still."""
        self.write("cgroup.freeze", 1)
        self.wait_event("frozen", 1)

    def thaw(self) -> None:
        """Let the processes of a frozen group go on."""
        self.write("cgroup.freeze", 0)
        self.wait_event("frozen", 0)

    def kill(self) -> None:
        """SIGKILL to every process in the group and below, at once."""
        self.write("cgroup.kill", 1)

    def pressure(self, resource: str) -> dict[str, Pressure]:
        """PSI of "cpu", "memory" or "io": the lines some and (where there is one) full."""
        lines = (line.split() for line in self.read(f"{resource}.pressure").splitlines())
        values = {kind: [item.partition("=")[2] for item in items] for kind, *items in lines}
        return {kind: Pressure(float(a), float(b), float(c), int(total)) for kind, (a, b, c, total) in values.items()}

    def devices(self, rules: Sequence[str] = devices.DEFAULT) -> None:
        """Allow the processes of the group these devices and no others."""
        group = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            devices.attach(devices.load(tuple(rules)), group)
        finally:
            os.close(group)

    def delete(self) -> None:
        """Kill what is left in the group, then remove it and the groups below; a missing group is fine."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            self._kill_and_remove()

    def _kill_and_remove(self) -> None:
        self.kill()
        self.wait_event("populated", 0)
        for folder, _, _ in os.walk(self.path, topdown=False):
            os.rmdir(folder)


def root() -> Cgroup:
    """/sys/fs/cgroup itself."""
    return Cgroup(machine.CGROUP_ROOT)


def top() -> Cgroup:
    """/sys/fs/cgroup/labs, made where it is missing, with the kernel's controllers offered to its children."""
    group = Cgroup(machine.CGROUP)
    with suppress(FileExistsError):
        os.mkdir(group.path)
    there = root().read("cgroup.controllers").split()
    wanted = [name for name in CONTROLLERS if name in there]
    if group.read("cgroup.subtree_control").split() != wanted:
        root().enable(wanted)
        group.enable(wanted)
    return group


def limits(memory: int | str | None = None, swap: int | str | None = None, cpus: float | None = None,
           pids: int | None = None) -> dict[str, str]:
    """The files, and what to write to them, for limits as `docker run` names them; memory alone means no swap."""
    files: dict[str, str] = {}
    if memory is not None:
        files["memory.max"] = str(parse_size(memory, "memory"))
        swap = 0 if swap is None else swap
    if swap is not None:
        files["memory.swap.max"] = str(parse_size(swap, "swap"))
    if cpus is not None:
        if not isinstance(cpus, (int, float)) or cpus <= 0:
            raise BadInput("cpus", cpus, "must be a number of processors above 0, as 0.5")
        files["cpu.max"] = f"{round(cpus * CPU_PERIOD)} {CPU_PERIOD}"
    if pids is not None:
        files["pids.max"] = str(pids)
    return files


def create(name: str | None = None, parent: Cgroup | None = None, memory: int | str | None = None,
           swap: int | str | None = None, cpus: float | None = None, pids: int | None = None,
           files: Mapping[str, object] | None = None) -> Cgroup:
    """A new group under parent (default: labs) with its limits set before any process is in it.

    memory and swap (beyond memory, 0 where only memory is given) in bytes or as "64M", cpus in
    processors, pids in tasks; files holds further files to write, as {"cpu.weight": 50}.  A limit that the
    kernel refuses leaves no group behind.
    """
    machine.require()
    settings: dict[str, object] = {**limits(memory, swap, cpus, pids), **(files or {})}
    name = machine.new_name("g") if name is None else name
    if "/" in name or name in ("", ".", ".."):
        raise BadInput("name", name, "must be one directory name")
    group = Cgroup(f"{(parent or top()).path}/{name}")
    try:
        os.mkdir(group.path)
    except FileExistsError:
        raise BadInput("name", name, "a group of that name is already there") from None
    try:
        for file, value in settings.items():
            group.write(file, value)
    except BaseException:
        group.delete()
        raise
    return group


def of(pid: int | str = "self") -> Cgroup:
    """The group of a process, from the line 0:: of /proc/PID/cgroup."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        path = next(line[3:].rstrip("\n") for line in file if line.startswith("0::"))
    return Cgroup(machine.CGROUP_ROOT + path.rstrip("/"))


def device_number(path: str) -> str:
    """MAJOR:MINOR of the disk that holds path, as io.max wants it: the whole disk, not its partition."""
    number = os.stat(path).st_dev
    found = f"{os.major(number)}:{os.minor(number)}"
    disk = os.path.dirname(os.path.realpath(f"/sys/dev/block/{found}"))
    if os.path.exists(f"/sys/dev/block/{found}/partition"):
        with open(f"{disk}/dev", encoding="utf-8") as file:
            return file.read().strip()
    return found
