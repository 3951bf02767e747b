"""linux.resources on cgroup v2: where the container's group is, its files, and its device controller.

config-linux.md "Control groups" of the OCI runtime specification; the kernel's
Documentation/admin-guide/cgroup-v2.rst; systemd.resource-control(5).  The specification speaks in the
terms of cgroup v1; conversion is by the formulas that runc and crun use.
"""

from __future__ import annotations

import errno
import os
import time

from labs import machine
from labs.errors import BadInput, KernelError, Timeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ROOT = machine.CGROUP_ROOT
UNLIMITED = -1
THROTTLES = {"throttleReadBpsDevice": "rbps", "throttleWriteBpsDevice": "wbps", "throttleReadIOPSDevice": "riops",
             "throttleWriteIOPSDevice": "wiops"}
# Files that systemd has a property of the same meaning for; its "max" is the greatest number.
PROPERTIES = {"memory.max": "MemoryMax", "memory.high": "MemoryHigh", "memory.low": "MemoryLow",
              "memory.min": "MemoryMin", "memory.swap.max": "MemorySwapMax", "pids.max": "TasksMax",
              "cpu.weight": "CPUWeight", "io.weight": "IOWeight"}
INFINITY = (1 << 64) - 1
NOT_LOADED = 5  # how `systemctl stop` ends where there is no such unit, systemctl(1) "Exit status"
# What the default rules of a runtime allow beyond the configuration: the default devices, terminals, making any node.
ALWAYS = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, -1)]


def place(manager: str, path: str, name: str) -> tuple[str, str, str]:
    """Where the group is (its directory), and for systemd the slice and the unit: linux.cgroupsPath."""
    if manager != "systemd":
        return os.path.normpath(f"{ROOT}/{path or f'labs/{name}'}"), "", ""
    parts = path.split(":") if path else ["system.slice", "labs", name]
    if len(parts) != 3 or not parts[2]:
        raise BadInput("linux.cgroupsPath", path, "must be SLICE:PREFIX:NAME with systemd")
    slice_name, prefix, last = parts[0] or "system.slice", parts[1], parts[2]
    unit = last if last.endswith(".slice") else f"{prefix}-{last}.scope" if prefix else f"{last}.scope"
    inside = _slice_path(slice_name)
    return ROOT + (_slice_path(unit) if unit.endswith(".slice") else f"{inside}/{unit}"), slice_name, unit


def _slice_path(name: str) -> str:
    """a-b.slice stands in a.slice: systemd.slice(5)."""
    if not name.endswith(".slice") or "/" in name:
        raise BadInput("linux.cgroupsPath", name, "must begin with the name of a slice")
    parts = name.removesuffix(".slice").split("-")
    return "" if parts == [""] else "".join(f"/{'-'.join(parts[:n])}.slice" for n in range(1, len(parts) + 1))


def make(path: str, wanted: dict[str, str]) -> None:
    """Make the group with its limits; where the kernel refuses one, nothing is left of it."""
    _require_empty(path)
    _folders(path, wanted)
    try:
        set_limits(path, wanted)
    except BaseException:
        delete(path)
        raise


def set_limits(path: str, wanted: dict[str, str]) -> None:
    """Write each file of a group that is there, or that systemd is about to make: 30 seconds at most."""
    _wait(lambda: os.path.isdir(path), 30, f"the group {path}")
    for file, value in wanted.items():
        _write(path, file, value)


def _require_empty(path: str) -> None:
    """A group with processes belongs to somebody else; so does a frozen one."""
    try:
        if machine.read_file(f"{path}/cgroup.procs"):
            raise BadInput("linux.cgroupsPath", path, "the group has processes")
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise


def _folders(path: str, wanted: dict[str, str]) -> None:
    """The group and those above it, each offering its controllers to the one below: cgroup.subtree_control."""
    if not os.path.exists(f"{ROOT}/cgroup.controllers"):
        raise BadInput("linux.cgroupsPath", path, f"needs cgroup v2 on {ROOT}")
    above = ROOT
    for part in os.path.relpath(path, ROOT).split("/"):
        there = machine.read_file(f"{above}/cgroup.controllers").split()
        offered = machine.read_file(f"{above}/cgroup.subtree_control").split()
        for name in there:
            if name not in offered:
                _offer(above, name, wanted)
        above = f"{above}/{part}"
        if not os.path.isdir(above):
            os.mkdir(above, 0o755)


def _offer(group: str, controller: str, wanted: dict[str, str]) -> None:
    """Offer one controller; a refusal matters only where a limit needs it."""
    try:
        machine.write_file(f"{group}/cgroup.subtree_control", f"+{controller}")
    except KernelError:
        if any(file.startswith(controller + ".") for file in wanted):
            raise


def _write(path: str, file: str, value: str) -> None:
    """One file, one line a write: io.max takes one device at a time."""
    for line in value.split("\n"):
        try:
            machine.write_file(f"{path}/{file}", line)
        except KernelError as error:
            rule = "needs a controller that is not there" if error.errno == errno.ENOENT else error.strerror
            raise BadInput(f"linux.resources ({file})", line, rule or "the kernel refuses it") from error


def properties(wanted: dict[str, str]) -> list[str]:
    """The limits as systemd's own, systemd.resource-control(5): what it is not told, it writes over when it likes."""
    given: dict[str, int] = {}
    for file, name in PROPERTIES.items():
        if (value := wanted.get(file, "")) == "max" or value.isdigit():
            given[name] = INFINITY if value == "max" else int(value)
    if "cpu.max" in wanted:
        quota, _, period = wanted["cpu.max"].partition(" ")
        per_second = INFINITY if quota == "max" else int(quota) * 1_000_000 // int(period or 100_000)
        given |= {"CPUQuotaPerSecUSec": per_second, "CPUQuotaPeriodUSec": int(period or 100_000)}
    return [word for name, value in given.items() for word in (name, "t", str(value))]


def make_scope(slice_name: str, unit: str, pid: int, wanted: dict[str, str]) -> None:
    """Ask systemd for a scope with the process in it: org.freedesktop.systemd1(5), StartTransientUnit."""
    limits = properties(wanted)
    words = ["Description", "s", f"labs container {unit}", "DefaultDependencies", "b", "false",
             "CollectMode", "s", "inactive-or-failed", *limits]
    total = 3 + len(limits) // 3
    if unit.endswith(".scope"):
        words += ["Slice", "s", slice_name, "PIDs", "au", "1", str(pid), "Delegate", "b", "true"]
    else:
        words += ["Wants", "as", "1", slice_name]
    total += 3 if unit.endswith(".scope") else 1
    call(["StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "replace", str(total), *words, "0"])


def call(arguments: list[str]) -> None:
    """One call of systemd's manager object, by busctl(1)."""
    _systemd(["busctl", "--quiet", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
              "org.freedesktop.systemd1.Manager", *arguments], arguments[2])


def _systemd(command: list[str], unit: str, fine: tuple[int, ...] = (0,)) -> None:
    """One command to the manager of the system (a user's own would not let the device program in)."""
    import subprocess
    if machine.read_file("/proc/self/uid_map").split() != ["0", "0", "4294967295"]:
        raise BadInput("--systemd-cgroup", unit, "needs root of the machine, not of a user namespace")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in fine:
        raise BadInput("linux.cgroupsPath", unit, f"systemd: {done.stderr.strip()}")


def _wait(condition: Callable[[], bool], seconds: float, name: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Timeout(name, seconds)
        time.sleep(0.002)


def files(resources: dict[str, Any]) -> dict[str, str]:
    """The group's files and what to write to them, for linux.resources."""
    wanted: dict[str, str] = {}
    for subject in (memory, cpu, pids, block_io, hugepage_limits, rdma):
        wanted.update(subject(resources))
    wanted.update(resources.get("unified") or {})
    for name in resources.get("unified") or {}:
        if "/" in name or "." not in name:
            raise BadInput(f"linux.resources.unified.{name}", name, "must be the name of a file of the group")
    return wanted


def _limit(value: int) -> str:
    return "max" if value == UNLIMITED else str(value)


def memory(resources: dict[str, Any]) -> dict[str, str]:
    """memory.max, memory.low, and memory.swap.max, which counts swap alone where the field counts both."""
    given, wanted = resources.get("memory") or {}, {}
    limit, swap = given.get("limit"), given.get("swap")
    if swap:
        if swap != UNLIMITED and (not limit or limit == UNLIMITED or swap < limit):
            raise BadInput("linux.resources.memory.swap", swap, "must be memory and swap together, not below limit")
        wanted["memory.swap.max"] = _limit(swap if swap == UNLIMITED else swap - limit)
    elif limit == UNLIMITED:
        wanted["memory.swap.max"] = "max"
    if limit:
        wanted["memory.max"] = _limit(limit)
    if given.get("reservation"):
        wanted["memory.low"] = _limit(given["reservation"])
    return wanted


def cpu(resources: dict[str, Any]) -> dict[str, str]:
    """cpu.weight, cpu.max, cpu.max.burst, cpu.idle, cpuset.cpus and cpuset.mems."""
    given, wanted = resources.get("cpu") or {}, {}
    if given.get("shares"):
        wanted["cpu.weight"] = str(1 + (max(2, min(given["shares"], 262144)) - 2) * 9999 // 262142)
    if given.get("quota") or given.get("period"):
        quota = given.get("quota") or 0
        wanted["cpu.max"] = f"{quota if quota > 0 else 'max'} {given.get('period') or 100000}"
    for field, file in {"burst": "cpu.max.burst", "idle": "cpu.idle", "cpus": "cpuset.cpus",
                        "mems": "cpuset.mems"}.items():
        if given.get(field):
            wanted[file] = str(given[field])
    return wanted


def pids(resources: dict[str, Any]) -> dict[str, str]:
    """pids.max; 0 says nothing, below it there is no limit."""
    limit = (resources.get("pids") or {}).get("limit") or 0
    return {"pids.max": str(limit) if limit > 0 else "max"} if limit else {}


def block_io(resources: dict[str, Any]) -> dict[str, str]:
    """io.weight (or io.bfq.weight) and io.max."""
    given, wanted = resources.get("blockIO") or {}, {}
    if given.get("weight"):
        weight = given["weight"]
        wanted["io.weight"] = str(1 + (max(10, min(weight, 1000)) - 10) * 9999 // 990)
    lines = [f"{each['major']}:{each['minor']} {key}={each['rate'] or 'max'}"
             for field, key in THROTTLES.items() for each in given.get(field) or []]
    weights = [f"{each['major']}:{each['minor']} {each['weight']}" for each in given.get("weightDevice") or []
               if each.get("weight")]
    if weights:
        wanted["io.bfq.weight"] = "\n".join(weights)
    if lines:
        wanted["io.max"] = "\n".join(lines)
    return wanted


def hugepage_limits(resources: dict[str, Any]) -> dict[str, str]:
    """hugetlb.SIZE.max."""
    return {f"hugetlb.{each['pageSize']}.max": str(each["limit"]) for each in resources.get("hugepageLimits") or []}


def rdma(resources: dict[str, Any]) -> dict[str, str]:
    """rdma.max, a line a device."""
    lines = [f"{name} hca_handle={limits.get('hcaHandles', 'max')} hca_object={limits.get('hcaObjects', 'max')}"
             for name, limits in (resources.get("rdma") or {}).items()]
    return {"rdma.max": "\n".join(lines)} if lines else {}


def devices(path: str, rules: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> None:
    """The device controller: a BPF program on the group, made of the rules, the last that matches first."""
    from labs import devices as controller
    parsed = [_rule(rule) for rule in rules]
    terminal = controller.TYPES["c"]
    parsed += [controller.Rule(terminal, major, None if minor < 0 else minor, 7) for major, minor in ALWAYS]
    parsed += [controller.Rule(kind, None, None, controller.MKNOD) for kind in controller.TYPES.values()]
    parsed += [controller.Rule(controller.TYPES["b" if node["type"] == "b" else "c"], node.get("major", 0),
                           node.get("minor", 0), 7) for node in nodes if node["type"] != "p"]
    group = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        controller.attach(controller.load_rules(list(reversed(parsed))), group)
    finally:
        os.close(group)


def _rule(rule: dict[str, Any]) -> Any:
    """One rule of linux.resources.devices: no type is every type, no number is any number, no access all three."""
    from labs import devices as controller
    letters = rule.get("access") or "rwm"
    if set(letters) - set(controller.LETTERS):
        raise BadInput("linux.resources.devices.access", letters, "must be of the letters r w m")
    kind = controller.TYPES.get(rule.get("type") or "a")
    major, minor = (None if rule.get(name) in (None, -1) else rule[name] for name in ("major", "minor"))
    access = sum(controller.LETTERS[letter] for letter in set(letters))
    return controller.Rule(kind, major, minor, access, rule["allow"])


def freeze(path: str, frozen: bool) -> None:
    """Stop or go on, and wait until it is so: cgroup.freeze, cgroup.events."""
    machine.write_file(f"{path}/cgroup.freeze", str(int(frozen)))
    wanted = f"frozen {int(frozen)}"
    _wait(lambda: wanted in machine.read_file(f"{path}/cgroup.events"), 10, wanted)


def is_frozen(path: str) -> bool:
    """Whether cgroup.freeze asks the group to stand still."""
    try:
        return machine.read_file(f"{path}/cgroup.freeze").strip() == "1"
    except KernelError:
        return False


def members(path: str) -> list[int]:
    """Every process of the group and of those below it."""
    found = []
    for folder, _, _ in os.walk(path):
        found += [int(line) for line in machine.read_file(f"{folder}/cgroup.procs").split()]
    return sorted(found)


def delete(path: str, manager: str = "cgroupfs") -> None:
    """Kill what is left (cgroup.kill) and remove the group with those below it; a missing one is fine.

    A group that systemd made is systemd's to end, and is waited for: removed behind its back, it may be made again.
    """
    if manager == "systemd":
        _end_unit(path)
    deadline = time.monotonic() + 30
    while os.path.isdir(path):
        try:
            for folder, _, _ in os.walk(path, topdown=False):
                os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline:
                raise
            machine.write_file(f"{path}/cgroup.kill", "1")
            time.sleep(0.005)


def _end_unit(path: str) -> None:
    """A scope ends with its last process; one that missed that, and a slice, has to be stopped."""
    unit = os.path.basename(path)
    try:
        machine.write_file(f"{path}/cgroup.kill", "1")
        if unit.endswith(".scope"):
            _wait(lambda: not os.path.isdir(path), 2, unit)
    except (KernelError, Timeout):
        pass  # it is gone, or it is stopped now
    if unit.endswith(".slice") or os.path.isdir(path):
        _systemd(["systemctl", "stop", "--quiet", unit], unit, (0, NOT_LOADED))
