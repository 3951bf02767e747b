"""seccomp: the OCI profile compiled to a classic BPF program, and installed.

seccomp(2), and the OCI runtime specification, config-linux.md, "Seccomp".  The kernel runs the
program at every system call, on struct seccomp_data: the call's number, the architecture, the
instruction pointer and six arguments of 64 bits.  The program's answer is the action.

The program is a section for each architecture; in it, one block for each call of the profile::

    load the number
    if it is not this call: jump behind the block
    for each rule: compare the arguments, 32 bits at a time; all hold: return the rule's action
    return the default action
"""

from __future__ import annotations

import ctypes
import struct

from labs import syscalls
from labs.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

Instruction = tuple[int, int, int, int]

# <linux/seccomp.h>
ACTIONS = {"SCMP_ACT_KILL": 0, "SCMP_ACT_KILL_THREAD": 0, "SCMP_ACT_KILL_PROCESS": 0x80000000, "SCMP_ACT_TRAP": 0x30000,
           "SCMP_ACT_ERRNO": 0x50000, "SCMP_ACT_NOTIFY": 0x7FC00000, "SCMP_ACT_TRACE": 0x7FF00000,
           "SCMP_ACT_LOG": 0x7FFC0000, "SCMP_ACT_ALLOW": 0x7FFF0000}
WITH_NUMBER = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2, "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
         "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32}
NEW_LISTENER, TSYNC_ESRCH = 8, 16
EPERM, ENOSYS = 1, 38
X32_BIT = 0x40000000
# name in the profile: AUDIT_ARCH_* of <linux/audit.h>, and the token of seccomp_syscall_resolve_name_arch(3)
ARCHES = {"SCMP_ARCH_X86": (0x40000003, 0x40000003), "SCMP_ARCH_X86_64": (0xC000003E, 0xC000003E),
          "SCMP_ARCH_X32": (0xC000003E, 0x4000003E), "SCMP_ARCH_ARM": (0x40000028, 0x40000028),
          "SCMP_ARCH_AARCH64": (0xC00000B7, 0xC00000B7)}
NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
OPERATORS = ("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT",
             "SCMP_CMP_MASKED_EQ")

# Opcodes of <linux/bpf_common.h>: class | size or operation | mode or source.
LOAD, AND, JUMP, JEQ, JGT, JGE, RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def action(name: str, number: int | None) -> int:
    """The value that a filter returns for an action; number is the errno or the tracer's message, EPERM by default."""
    return ACTIONS[name] | ((EPERM if number is None else number) & 0xFFFF if name in WITH_NUMBER else 0)


def compile_profile(profile: dict[str, Any], machine: str = syscalls.MACHINE) -> list[Instruction]:
    """The filter of a profile (linux.seccomp of config.json): at most 4096 instructions (code, jt, jf, k)."""
    default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    if machine not in NATIVE:
        raise BadInput("linux.seccomp", machine, "labs knows the calls of x86_64 and aarch64 only")
    arches = list(dict.fromkeys([NATIVE[machine], *(profile.get("architectures") or [])]))
    program: list[Instruction] = [(LOAD, 0, 0, ARCH)]
    for audit in dict.fromkeys(ARCHES[arch][0] for arch in arches):
        section = [(LOAD, 0, 0, NUMBER)]
        same = [arch for arch in arches if ARCHES[arch][0] == audit]
        if audit == ARCHES["SCMP_ARCH_X86_64"][0] and "SCMP_ARCH_X32" not in same:
            section += [(JGE, 0, 1, X32_BIT), (RETURN, 0, 0, ACTIONS["SCMP_ACT_KILL"])]
        for arch in sorted(same, key=lambda arch: arch != "SCMP_ARCH_X32"):
            section += _calls(profile, ARCHES[arch][1], default, bool(len(same) > 1 and arch == "SCMP_ARCH_X32"))
        program += [(JEQ, 1, 0, audit), (JUMP, 0, 0, len(section) + 1), *section, (RETURN, 0, 0, default)]
    program.append((RETURN, 0, 0, ACTIONS["SCMP_ACT_KILL"]))
    if len(program) > 4096:
        raise BadInput("linux.seccomp.syscalls", f"{len(program)} instructions", "a filter has at most 4096")
    return program


def _calls(profile: dict[str, Any], token: int, default: int, x32: bool) -> list[Instruction]:
    """The blocks of one architecture, then ENOSYS for calls newer than all of them: programs then try an older one."""
    rules: dict[int, list[tuple[list[dict[str, Any]], int]]] = {}
    newest = -1
    for entry in profile.get("syscalls") or []:
        answer = action(entry["action"], entry.get("errnoRet"))
        for name in entry["names"]:
            number = resolve(name, token)
            newest = newest if number is None else max(newest, number)
            if number is not None and answer != default:
                rules.setdefault(number, []).extend((each, answer) for each in _alternatives(entry.get("args") or []))
    blocks = [instruction for number, found in rules.items() for instruction in _block(number, found, default)]
    if newest >= 0 and default & 0xFFFF0000 == ACTIONS["SCMP_ACT_ERRNO"] and not x32:
        blocks += [(JGT, 0, 1, newest), (RETURN, 0, 0, ACTIONS["SCMP_ACT_ERRNO"] | ENOSYS)]
    return blocks


def _alternatives(tests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """All tests must hold, but two tests of one argument are alternatives, as libseccomp's callers have it."""
    indexes = [test["index"] for test in tests]
    return [tests] if len(set(indexes)) == len(indexes) else [[test] for test in tests]


def _block(number: int, rules: list[tuple[list[dict[str, Any]], int]], default: int) -> list[Instruction]:
    """One call: its rules with tests in their order, then the rule without tests or the default."""
    last = next((answer for tests, answer in rules if not tests), default)
    body: list[Instruction] = []
    for tests, answer in rules:
        if tests:
            body += _rule(tests, answer)
    body.append((RETURN, 0, 0, last))
    return [(JEQ, 1, 0, number), (JUMP, 0, 0, len(body)), *body]


def _rule(tests: list[dict[str, Any]], answer: int) -> list[Instruction]:
    """Return answer where every test holds; each test that fails jumps behind the rule."""
    code: list[Instruction] = [(RETURN, 0, 0, answer)]
    for test in reversed(tests):
        code = _test(test, len(code)) + code
    return code


def _test(test: dict[str, Any], rest: int) -> list[Instruction]:
    """Compare one 64-bit argument; when it does not hold, jump over the `rest` instructions that follow.

    The high half is compared first; where it decides, the low half is not looked at.
    """
    operator, value = test["op"], test["value"]
    mask = value if operator == "SCMP_CMP_MASKED_EQ" else (1 << 64) - 1
    wanted = test.get("valueTwo", 0) if operator == "SCMP_CMP_MASKED_EQ" else value
    low, high = ARGUMENTS + 8 * test["index"], ARGUMENTS + 8 * test["index"] + 4  # little-endian
    h, l = wanted >> 32, wanted & 0xFFFFFFFF  # noqa: E741
    load_high = [(LOAD, 0, 0, high), *([(AND, 0, 0, mask >> 32)] if mask >> 32 != 0xFFFFFFFF else [])]
    load_low = [(LOAD, 0, 0, low), *([(AND, 0, 0, mask & 0xFFFFFFFF)] if mask & 0xFFFFFFFF != 0xFFFFFFFF else [])]
    size = len(load_low) + 1  # what follows the comparisons of the high half
    if operator in ("SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"):
        return [*load_high, (JEQ, 0, size + rest, h), *load_low, (JEQ, 0, rest, l)]
    if operator == "SCMP_CMP_NE":
        return [*load_high, (JEQ, 0, size, h), *load_low, (JEQ, rest, 0, l)]
    greater = operator in ("SCMP_CMP_GT", "SCMP_CMP_GE")
    above, below = (size + 1, rest + size) if greater else (rest + size + 1, size)
    compare = {"SCMP_CMP_GT": (JGT, 0, rest), "SCMP_CMP_GE": (JGE, 0, rest),
               "SCMP_CMP_LT": (JGE, rest, 0), "SCMP_CMP_LE": (JGT, rest, 0)}[operator]
    return [*load_high, (JGT, above, 0, h), (JEQ, 0, below, h), *load_low, (*compare, l)]


_tables: dict[str, Any] = {}


def resolve(name: str, token: int) -> int | None:
    """The number of a call on an architecture, from libseccomp's tables; None where it has no such call."""
    if not _tables:
        try:
            _tables["resolve"] = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name_arch
        except OSError as error:
            raise BadInput("linux.seccomp", "libseccomp.so.2", "is needed for the numbers of system calls") from error
    number: int = _tables["resolve"](ctypes.c_uint32(token), name.encode())
    return number if number >= 0 else None


def assemble(program: list[Instruction]) -> bytes:
    """The program as the kernel takes it: struct sock_filter, 8 bytes each, <linux/filter.h>."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


class Filter:
    """A profile compiled and assembled, ready for the one call that installs it."""

    def __init__(self, profile: dict[str, Any]) -> None:
        self.listening = any(entry["action"] == "SCMP_ACT_NOTIFY" for entry in profile.get("syscalls") or [])
        self.flags = sum(FLAGS[flag] for flag in set(profile.get("flags") or []))
        if self.listening:
            self.flags |= NEW_LISTENER | (TSYNC_ESRCH if self.flags & FLAGS["SECCOMP_FILTER_FLAG_TSYNC"] else 0)
        self.code = assemble(compile_profile(profile))

    def install(self) -> int:
        """seccomp(2) for the calling process and what it becomes: the listener's file descriptor, or -1."""
        result = syscalls.seccomp(self.code, self.flags)
        return result if self.listening else -1
