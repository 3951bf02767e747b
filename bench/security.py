"""What each layer costs at the start; seccomp: Docker's profile compiled by labs and libseccomp, and paid for at calls.

A start is fork, the layers, execve of `true`, and its end; the layers are what labs puts on, in the order of a runtime.

libseccomp is called as crun calls it (a chain of comparisons) and with its own tree (SCMP_FLTATR_CTL_OPTIMIZE 2).
A call is os.getppid(), which does next to nothing in the kernel.  A filter that allows it without looking at its
arguments is not even run (the kernel's bitmap of such calls, Linux 5.11); so the filters here test an argument.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from bench.table import Row, main, show, side_by_side
from labs import capabilities, namespaces, process, seccomp, syscalls

# What Docker leaves to a container.
DEFAULT = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP")
DEFAULT += ("NET_BIND_SERVICE", "NET_RAW", "SYS_CHROOT", "MKNOD", "AUDIT_WRITE", "SETFCAP")
CALLS = 100_000
STARTS = 20  # a run: one takes a few milliseconds, and what a layer adds is less than one
SIZES = (10, 100, 250)
# What a child does between the filter and its end.
NEEDED = ("exit_group", "futex", "clock_gettime", "openat", "newfstatat", "getrandom", "gettid", "tgkill", "prlimit64")
OPTIMIZE = 8  # SCMP_FLTATR_CTL_OPTIMIZE, <seccomp.h>
IDS = (0, 100_000, 65536)


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp, <seccomp.h>."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def _comparisons(tests: Sequence[dict[str, Any]]) -> Any:
    rows = [
        Comparison(test["index"], seccomp.OPERATORS.index(test["op"]) + 1, test["value"], test.get("valueTwo", 0))
        for test in tests
    ]
    return (Comparison * max(len(rows), 1))(*rows)


def by_libseccomp(profile: dict[str, Any], optimize: int = 1) -> bytes:
    """The assembled program that libseccomp makes of a linux.seccomp."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    default = seccomp.action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(default)))
    lib.seccomp_attr_set(context, OPTIMIZE, ctypes.c_uint32(optimize))
    for arch in profile.get("architectures", []):
        lib.seccomp_arch_add(context, ctypes.c_uint32(seccomp.ARCHES[arch][1]))
    for entry in profile["syscalls"]:
        answer = seccomp.action(entry["action"], entry.get("errnoRet"))
        tests = entry.get("args") or []
        for name in entry["names"] if answer != default else ():
            number = lib.seccomp_syscall_resolve_name(name.encode())
            lib.seccomp_rule_add_array(context, ctypes.c_uint32(answer), number, len(tests), _comparisons(tests))
    with tempfile.TemporaryFile() as file:
        if lib.seccomp_export_bpf(context, file.fileno()):
            raise RuntimeError("seccomp_export_bpf")
        lib.seccomp_release(context)
        file.seek(0)
        return file.read()


def default_profile() -> dict[str, Any]:
    """Podman's copy of Docker's default profile, for a container with Docker's default capabilities."""
    with open(seccomp.PODMANS_PROFILE, encoding="utf-8") as file:
        return seccomp.oci_profile(json.load(file), [f"CAP_{name}" for name in DEFAULT])


def compiling(runs: int) -> list[Row]:
    """That profile to bytes."""
    profile = default_profile()
    ways: dict[str, Callable[[], bytes]] = {
        "labs, search": lambda: seccomp.assemble(seccomp.compile_profile(profile, search=True)),
        "labs, chain": lambda: seccomp.assemble(seccomp.compile_profile(profile)),
        "libseccomp, chain": lambda: by_libseccomp(profile),
        "libseccomp, tree": lambda: by_libseccomp(profile, 2),
    }
    codes = {who: way() for who, way in ways.items()}
    rows = side_by_side(ways, runs)
    show("compile Docker's default profile", rows, ["libseccomp, chain"])
    print(", ".join(f"{who}: {len(code) // 8} instructions" for who, code in codes.items()))
    alone = side_by_side({who: lambda code=code: _in_child(code, 0) for who, code in codes.items()}, runs)
    show("fork, install it, exit", alone, ["libseccomp, chain"])
    return [row._replace(who=f"{row.who}, compile") for row in rows] + [
        row._replace(who=f"{row.who}, install") for row in alone
    ]


def _in_child(code: bytes, calls: int) -> float:
    """Seconds that so many calls take behind the filter (none: b"")."""

    def work() -> float:
        if code:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            syscalls.seccomp(code)
        ask, many = os.getppid, range(calls)
        start = perf_counter()
        for _ in many:
            ask()
        return perf_counter() - start

    return process.call(work)


def user_namespace(gate: socket.socket) -> None:
    """In the child: a user namespace, and root in it as soon as the parent has written the maps."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    gate.send(b"!")
    gate.recv(1)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def no_new_privs() -> None:
    """The one call of it."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def few_capabilities() -> None:
    """Docker's set, in the bounding, the effective and the permitted one."""
    kept = capabilities.parse(DEFAULT)
    capabilities.limit(kept)
    capabilities.become({"effective": kept, "permitted": kept})


def start(layers: Sequence[Callable[[], object]], mapped: bool = False) -> None:
    """`true` behind these layers, from fork to its end; mapped: in a user namespace."""
    ours, theirs = socket.socketpair()

    def work() -> None:
        if mapped:
            user_namespace(theirs)
        for layer in layers:
            layer()
        process.execute(["/bin/true"])

    with ours, process.fork(work) as child:
        theirs.close()
        if mapped:
            ours.recv(1)
            namespaces.write_maps(child.pid, [IDS], [IDS], setgroups="allow")
            ours.send(b"!")
        if child.wait(30).code != 0:
            raise RuntimeError("true did not end well")


def starting(runs: int) -> list[Row]:
    """Each layer alone, and all of them."""
    profile = default_profile()
    made = seccomp.Filter(profile)
    ways: dict[str, Callable[[], object]] = {
        "no layer": lambda: start([]),
        "no_new_privs": lambda: start([no_new_privs]),
        "capabilities": lambda: start([few_capabilities]),
        "seccomp, made before": lambda: start([made.install]),
        "seccomp, compiled too": lambda: start([lambda: seccomp.Filter(profile).install()]),
        "user namespace": lambda: start([], mapped=True),
        "all, filter made before": lambda: start([no_new_privs, few_capabilities, made.install], mapped=True),
    }
    rows = side_by_side(ways, runs * STARTS)
    show("start `true` behind a layer", rows, ["no layer"])
    return [row._replace(who=f"{row.who}, start") for row in rows]


def refusing(size: int, *, tested: bool) -> dict[str, Any]:
    """A profile that refuses so many other calls; with tested, getppid comes last, with a test that does not hold."""
    names = [name for number in range(130, 460) if (name := seccomp.name(number)) and name not in NEEDED]
    test = {"index": 5, "op": "SCMP_CMP_EQ", "value": 0x123456789}
    last = {"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "args": [test]}
    others = {"names": names[:size], "action": "SCMP_ACT_ERRNO"}
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [others, *[last] * tested]}


def calling(runs: int) -> list[Row]:
    """CALLS calls behind filters of growing size."""
    rows = []
    for size in SIZES:
        codes = {
            "no filter": b"",
            "chain, no test": seccomp.assemble(seccomp.compile_profile(refusing(size, tested=False))),
            "chain": seccomp.assemble(seccomp.compile_profile(refusing(size, tested=True))),
            "search": seccomp.assemble(seccomp.compile_profile(refusing(size, tested=True), search=True)),
        }
        times: dict[str, list[float]] = {who: [] for who in codes}
        for _ in range(runs):
            for who, code in codes.items():
                times[who].append(_in_child(code, CALLS))
        part = [Row(who, statistics.median(taken), min(taken), runs) for who, taken in times.items()]
        show(f"{CALLS} calls, {size} others refused", part, ["no filter", "search"])
        rows += [row._replace(who=f"{row.who}, {size} others") for row in part]
    return rows


def measure(runs: int) -> Sequence[Row]:
    """All of it; rows in the order they were printed."""
    return [*starting(runs), *compiling(runs), *calling(runs)]


if __name__ == "__main__":
    main("security", measure)
