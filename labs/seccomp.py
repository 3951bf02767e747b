"""seccomp: the OCI profile compiled to a classic BPF program, and installed.

seccomp(2), and the OCI runtime specification, config-linux.md, "Seccomp".  The kernel runs the
program at every system call, on struct seccomp_data: the call's number, the architecture, the
instruction pointer and six arguments of 64 bits.  The program's answer is the action.

The program is a section for each architecture; in it, one block for each call of the profile::

    load the number
    if it is not this call: jump behind the block
    for each rule: compare the arguments, 32 bits at a time; all hold: return the rule's action
    return the default action

Or, with search, the numbers are cut into ranges with one answer, and the program halves them.
disassemble() prints a program, trace() runs it here, and installed() reads it back from the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from labs import capabilities, syscalls
from labs.errors import BadInput, KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
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
LONGEST = 4096  # BPF_MAXINSNS, <linux/bpf_common.h>
PODMANS_PROFILE = "/usr/share/containers/seccomp.json"  # containers-seccomp.json(5), in Docker's format
X32_BIT = 0x40000000
# name in the profile: AUDIT_ARCH_* of <linux/audit.h>, and the token of seccomp_syscall_resolve_name_arch(3)
ARCHES = {"SCMP_ARCH_X86": (0x40000003, 0x40000003), "SCMP_ARCH_X86_64": (0xC000003E, 0xC000003E),
          "SCMP_ARCH_X32": (0xC000003E, 0x4000003E), "SCMP_ARCH_ARM": (0x40000028, 0x40000028),
          "SCMP_ARCH_AARCH64": (0xC00000B7, 0xC00000B7)}
X86 = 0x40000003
NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}  # as Docker's profile writes them
AUDIT = ARCHES[NATIVE[syscalls.MACHINE]][0] if syscalls.MACHINE in NATIVE else 0  # this machine's AUDIT_ARCH_*
OPERATORS = ("SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT",
             "SCMP_CMP_MASKED_EQ")

# Opcodes of <linux/bpf_common.h>: class | size or operation | mode or source.
LOAD, AND, JUMP, JEQ, JGT, JGE, JSET, RETURN = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
FIELDS = {NUMBER: "nr", ARCH: "arch", 8: "ip low", 12: "ip high"} | {
    ARGUMENTS + 8 * index + 4 * half: f"args[{index}] {word}" for index in range(6) for half, word in enumerate(
        ("low", "high"))}
TESTS: dict[int, tuple[str, Callable[[int, int], object]]] = {
    JEQ: ("==", lambda value, k: value == k), JGT: (">", lambda value, k: value > k),
    JGE: (">=", lambda value, k: value >= k), JSET: ("&", lambda value, k: value & k)}


def action(name: str, number: int | None) -> int:
    """The value that a filter returns for an action; number is the errno or the tracer's message, EPERM by default."""
    return ACTIONS[name] | ((EPERM if number is None else number) & 0xFFFF if name in WITH_NUMBER else 0)


def precedence(answer: int) -> int:
    """The rank of an answer: of several filters the lowest one counts, seccomp(2).  KILL_PROCESS is negative."""
    rank = answer & 0xFFFF0000
    return rank - (1 << 32) if rank & 1 << 31 else rank


def compile_profile(profile: dict[str, Any], machine: str = syscalls.MACHINE,
                    search: bool = False, strict: bool = True) -> list[Instruction]:
    """The filter of a profile (linux.seccomp of config.json): at most LONGEST instructions (code, jt, jf, k).

    search: halve the numbers instead of comparing one after the other; the answers are the same.
    strict: a name that no architecture has is an error where it refuses; where it only allows more it is left out.
    """
    default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
    if machine not in NATIVE:
        raise BadInput("linux.seccomp", machine, "labs knows the calls of x86_64 and aarch64 only")
    if strict:
        _check_names(profile, default, ARCHES[NATIVE[machine]][1])
    arches = list(dict.fromkeys([NATIVE[machine], *(profile.get("architectures") or [])]))
    program: list[Instruction] = [(LOAD, 0, 0, ARCH)]
    for audit in dict.fromkeys(ARCHES[arch][0] for arch in arches):
        section = [(LOAD, 0, 0, NUMBER)]
        same = [arch for arch in arches if ARCHES[arch][0] == audit]
        if audit == ARCHES["SCMP_ARCH_X86_64"][0] and "SCMP_ARCH_X32" not in same:
            section += [(JGE, 0, 1, X32_BIT), (RETURN, 0, 0, ACTIONS["SCMP_ACT_KILL"])]
        section += _section(profile, [ARCHES[arch][1] for arch in same], default, search)
        program += [(JEQ, 1, 0, audit), (JUMP, 0, 0, len(section)), *section]
    program.append((RETURN, 0, 0, ACTIONS["SCMP_ACT_KILL"]))
    if len(program) > LONGEST:
        raise BadInput("linux.seccomp.syscalls", f"{len(program)} instructions", f"a filter has at most {LONGEST}")
    return program


def _check_names(profile: dict[str, Any], default: int, token: int) -> None:
    """BadInput for a name that is to be refused and that libseccomp has never heard of."""
    for index, entry in enumerate(profile.get("syscalls") or []):
        if precedence(action(entry["action"], None)) < precedence(default):
            for name in entry["names"]:
                if _number(name, token) == -1:
                    rule = "is no system call that libseccomp knows: what it should refuse would go through"
                    raise BadInput(f"linux.seccomp.syscalls[{index}].names", name, rule)


def _section(profile: dict[str, Any], tokens: list[int], default: int, search: bool) -> list[Instruction]:
    """All calls of one AUDIT_ARCH; x32 shares it with x86-64, and its calls come first."""
    bodies: dict[int, list[Instruction]] = {}
    newest = -1
    for token in sorted(tokens, key=lambda token: token != ARCHES["SCMP_ARCH_X32"][1]):
        rules, last = _rules(profile, token, default)
        bodies |= {number: _body(found, default) for number, found in rules.items()}
        if token != ARCHES["SCMP_ARCH_X32"][1] or len(tokens) == 1:
            newest = last if default & 0xFFFF0000 == ACTIONS["SCMP_ACT_ERRNO"] else -1
    return (_search(_ranges(bodies, default, newest)) if search else _chain(bodies, default, newest))


def _rules(profile: dict[str, Any], token: int, default: int) -> tuple[dict[int, list[Any]], int]:
    """Number → its rules (tests, answer) where they differ from the default; and the newest call that is named."""
    rules: dict[int, list[Any]] = {}
    newest = -1
    for entry in profile.get("syscalls") or []:
        answer = action(entry["action"], entry.get("errnoRet"))
        for number, tests in _places(entry, token):
            newest = max(newest, number)
            if answer != default:
                rules.setdefault(number, []).extend((each, answer) for each in _alternatives(tests))
    return rules, newest


def _places(entry: dict[str, Any], token: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The numbers of an entry's calls with their tests; on x86 also where socketcall(2) and ipc(2) contain them.

    libseccomp numbers those -100 - N and -200 - N, where N is the first argument of socketcall(2) or ipc(2).
    """
    tests = entry.get("args") or []
    for name in entry["names"]:
        number = _number(name, token)
        if number >= 0:
            yield number, tests
        elif token == X86 and -300 < number < -100:
            if name in _direct():
                yield _direct()[name], tests
            if not tests:
                inside = "socketcall" if number > -200 else "ipc"
                test = {"index": 0, "op": "SCMP_CMP_EQ", "value": -number % 100}
                yield _number(inside, token), [test]


def _direct() -> dict[str, int]:
    """The numbers on x86 of calls that once were only a part of socketcall(2) or ipc(2)."""
    if "direct" not in _tables:
        _tables["direct"] = {found: number for number in range(320, 512) if (found := name(number, X86))}
    numbers: dict[str, int] = _tables["direct"]
    return numbers


def _chain(bodies: dict[int, list[Instruction]], default: int, newest: int) -> list[Instruction]:
    """A block for each call, then ENOSYS for calls newer than all of them: programs then try an older one."""
    blocks: list[Instruction] = []
    for number, body in bodies.items():
        blocks += [(JEQ, 1, 0, number), (JUMP, 0, 0, len(body)), *body]
    if newest >= 0:
        blocks += [(JGT, 0, 1, newest), (RETURN, 0, 0, ACTIONS["SCMP_ACT_ERRNO"] | ENOSYS)]
    return [*blocks, (RETURN, 0, 0, default)]


def _ranges(bodies: dict[int, list[Instruction]], default: int, newest: int) -> list[tuple[int, list[Instruction]]]:
    """(first number, what to do from there on) in their order; neighbours with the same single answer are one."""
    rest = {first: [(RETURN, 0, 0, answer)] for first, answer in (
        (0, default), *([(newest + 1, ACTIONS["SCMP_ACT_ERRNO"] | ENOSYS)] if newest >= 0 else []))}
    found: list[tuple[int, list[Instruction]]] = []
    for first in sorted({*rest, *bodies, *(number + 1 for number in bodies)}):
        body = bodies.get(first) or rest[max(start for start in rest if start <= first)]
        if not found or len(body) > 1 or body != found[-1][1]:
            found.append((first, body))
    return found


def _search(ranges: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Binary search: jump to the upper half where the number is not below its first."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    lower, upper = _search(ranges[:middle]), _search(ranges[middle:])
    if len(lower) < 256:  # jt and jf have 8 bits
        return [(JGE, len(lower), 0, ranges[middle][0]), *lower, *upper]
    return [(JGE, 0, 1, ranges[middle][0]), (JUMP, 0, 0, len(lower)), *lower, *upper]


def _alternatives(tests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """All tests must hold, but two tests of one argument are alternatives, as libseccomp's callers have it."""
    indexes = [test["index"] for test in tests]
    return [tests] if len(set(indexes)) == len(indexes) else [[test] for test in tests]


def _body(rules: list[tuple[list[dict[str, Any]], int]], default: int) -> list[Instruction]:
    """One call: its rules with tests in their order, then the rule without tests or the default."""
    last = next((answer for tests, answer in rules if not tests), default)
    body: list[Instruction] = []
    for tests, answer in rules:
        if tests:
            body += _rule(tests, answer)
    return [*body, (RETURN, 0, 0, last)]


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


def _library() -> Any:
    """libseccomp, for the numbers of system calls: loaded when it is first needed."""
    if not _tables:
        try:
            _tables["library"] = ctypes.CDLL("libseccomp.so.2")
        except OSError as error:
            raise BadInput("linux.seccomp", "libseccomp.so.2", "is needed for the numbers of system calls") from error
        _tables["library"].seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
    return _tables["library"]


def _number(name: str, token: int) -> int:
    """seccomp_syscall_resolve_name(3): -1 for an unknown name, another negative number for one of other machines."""
    number: int = _library().seccomp_syscall_resolve_name_arch(ctypes.c_uint32(token), name.encode())
    return number


def resolve(name: str, token: int = 0) -> int | None:
    """The number of a call on an architecture (this machine's: 0), from libseccomp's tables; None where it has none."""
    number = _number(name, token or ARCHES[NATIVE[syscalls.MACHINE]][1])
    return number if number >= 0 else None


def name(number: int, audit: int = 0) -> str:
    """The call with that number under an AUDIT_ARCH_* (this machine's: 0); "" where there is none."""
    audit = audit or AUDIT
    x32 = audit == ARCHES["SCMP_ARCH_X86_64"][0] and number & X32_BIT
    token = ARCHES["SCMP_ARCH_X32"][1] if x32 else audit
    found = _library().seccomp_syscall_resolve_num_arch(ctypes.c_uint32(token), ctypes.c_int(number))
    if not found:
        return ""
    text = ctypes.string_at(found).decode()
    _library().free(ctypes.c_void_p(found))  # malloc(3) of seccomp_syscall_resolve_num_arch(3)
    return text


def assemble(program: Sequence[Instruction]) -> bytes:
    """The program as the kernel takes it: struct sock_filter, 8 bytes each, <linux/filter.h>."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def parse(code: bytes) -> list[Instruction]:
    """The instructions of an assembled program."""
    return list(struct.iter_unpack("=HBBI", code))


def trace(program: Sequence[Instruction], number: int, arguments: Sequence[int] = (), audit: int = 0) -> list[int]:
    """Run the program here for one call, as bpf(4) says: the instructions it comes by, the last one a RETURN."""
    data = struct.pack("=iIQ6Q", number, audit or AUDIT, 0, *arguments, *[0] * (6 - len(arguments)))
    words = struct.unpack("=16I", data)
    path, at, value = [0], 0, 0
    while (step := program[at])[0] != RETURN:
        code, yes, no, k = step
        if code in TESTS:
            at += yes if TESTS[code][1](value, k) else no
        elif code == LOAD:
            value = words[k // 4]
        elif code == JUMP:
            at += k
        elif code == AND:
            value &= k
        else:
            raise BadInput(f"instruction {at}", hex(code), "is none that compilers for seccomp use")
        at += 1
        path.append(at)
    return path


def answer(program: Sequence[Instruction], number: int, arguments: Sequence[int] = (), audit: int = 0) -> int:
    """What the program returns for one call; audit is AUDIT_ARCH_*, this machine's by default."""
    return program[trace(program, number, arguments, audit)[-1]][3]


def describe(answer: int) -> str:
    """An answer in words, as ALLOW, ERRNO EPERM or KILL_THREAD."""
    kind, number = answer & 0xFFFF0000, answer & 0xFFFF
    known = {value: name.removeprefix("SCMP_ACT_") for name, value in ACTIONS.items() if name != "SCMP_ACT_KILL"}
    word = known.get(kind, "unknown")
    if word == "ERRNO":
        return f"ERRNO {errno.errorcode.get(number, number)}"
    return f"{word} {number}" if number else word


def disassemble(program: Sequence[Instruction]) -> str:
    """One line an instruction: its place, and what it does, with the names of calls, arguments and answers.

    What the accumulator holds at each place is what the ways to it agree on.
    """
    held: dict[int, tuple[str, int]] = {0: ("", 0)}
    lines = []
    for at, (code, yes, no, k) in enumerate(program):
        field, audit = held.get(at, ("", 0))
        targets = {at + 1 + skip: (field, audit) for skip in _skips(code, yes, no, k)}
        if code == LOAD:
            targets[at + 1] = (FIELDS.get(k, f"[{k}]"), audit)
        elif code == JEQ and field == "arch":
            targets[at + 1 + yes] = (field, k)
        for target, state in targets.items():
            held[target] = state if held.get(target, state) == state else ("", 0)
        lines.append(f"{at:4}  {_words(at, (code, yes, no, k), field, audit)}")
    return "\n".join(lines)


def _skips(code: int, yes: int, no: int, k: int) -> list[int]:
    """How many instructions each way on leaves out."""
    if code == RETURN:
        return []
    return [k] if code == JUMP else [yes, no] if code in TESTS else [0]


def _words(at: int, instruction: Instruction, field: str, audit: int) -> str:
    code, yes, no, k = instruction
    if code in TESTS:
        return f"if {field or 'A'} {TESTS[code][0]} {_value(k, field, audit)}: {at + 1 + yes} else {at + 1 + no}"
    words = {LOAD: f"load {FIELDS.get(k, f'[{k}]')}", AND: f"and {_value(k, field, audit)}", JUMP: f"goto {at + 1 + k}",
             RETURN: f"return {describe(k)}"}
    return words.get(code, f"code {code:#x} {yes} {no} {k}")


def _value(k: int, field: str, audit: int) -> str:
    if field == "arch":
        return next((name.removeprefix("SCMP_ARCH_").lower() for name, arch in ARCHES.items() if arch[0] == k), str(k))
    if field == "nr" and k == X32_BIT:
        return "X32_BIT"
    return (field == "nr" and audit and name(k, audit)) or str(k)


def oci_profile(profile: dict[str, Any], caps: Sequence[str] = (), machine: str = syscalls.MACHINE,
                kernel: str = "") -> dict[str, Any]:
    """The linux.seccomp that a profile in Docker's format becomes for a container with these capabilities.

    Docker's format adds archMap, and for each entry the conditions includes and excludes: caps, arches and
    minKernel, which the engine decides before the runtime sees the profile.  kernel: this one's release.
    """
    check_profile(profile)
    native = NATIVE[machine]
    below = [entry.get("subArchitectures") or [] for entry in profile.get("archMap") or []
             if entry["architecture"] == native]
    found: dict[str, Any] = {"defaultAction": profile["defaultAction"], "syscalls": []}
    if "defaultErrnoRet" in profile:
        found["defaultErrnoRet"] = profile["defaultErrnoRet"]
    found["architectures"] = profile.get("architectures") or [native, *(below[0] if below else [])]
    for entry in profile.get("syscalls") or []:
        if _applies(entry, caps, GO_NAMES[machine], _release(kernel or os.uname().release)):
            found["syscalls"].append({key: entry[key] for key in ("names", "action", "errnoRet", "args")
                                      if entry.get(key) is not None})
    return found


def _applies(entry: dict[str, Any], caps: Sequence[str], arch: str, kernel: tuple[int, ...]) -> bool:
    """All capabilities that includes names, and none that excludes names; the same for the other two."""
    wanted, unwanted = entry.get("includes") or {}, entry.get("excludes") or {}
    return (set(wanted.get("caps") or []) <= set(caps) and not set(unwanted.get("caps") or []) & set(caps)
            and arch in (wanted.get("arches") or [arch]) and arch not in (unwanted.get("arches") or [])
            and kernel >= _release(wanted.get("minKernel") or "0.0")
            and not ("minKernel" in unwanted and kernel >= _release(unwanted["minKernel"])))


def _release(text: str) -> tuple[int, ...]:
    """The first two numbers of a kernel's release: "6.12.38+deb13" is (6, 12)."""
    return tuple(int(word) for word in text.replace("-", ".").split(".")[:2])


def check_profile(profile: Any) -> None:
    """BadInput, with the field and its value, unless it is a profile that can be compiled."""
    def need(holds: bool, field: str, value: object, rule: str) -> None:
        if not holds:
            raise BadInput(field, value, rule)
    need(isinstance(profile, dict), "profile", profile, "must be an object")
    default = profile.get("defaultAction")
    need(default in ACTIONS, "defaultAction", default, "must be an action, as SCMP_ACT_ERRNO")
    for index, entry in enumerate(profile.get("syscalls") or []):
        field = f"syscalls[{index}]"
        need(isinstance(entry, dict), field, entry, "must be an object")
        names = entry.get("names")
        named = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
        need(named, f"{field}.names", names, "must be a list of names")
        need(entry.get("action") in ACTIONS, f"{field}.action", entry.get("action"), "must be an action")
        tests = entry.get("args") or []
        listed = isinstance(tests, list) and all(isinstance(test, dict) for test in tests)
        need(listed, f"{field}.args", tests, "must be a list of objects")
        for number, test in enumerate(tests):
            argument, op = test.get("index"), test.get("op")
            need(argument in range(6), f"{field}.args[{number}].index", argument, "must be 0 to 5")
            need(op in OPERATORS, f"{field}.args[{number}].op", op, "must be one of " + " ".join(OPERATORS))
            for key, value in (("value", test.get("value")), ("valueTwo", test.get("valueTwo", 0))):
                need(isinstance(value, int) and 0 <= value < 1 << 64, f"{field}.args[{number}].{key}", value,
                     "must have 64 bits")
        for where in ("includes", "excludes"):
            need(isinstance(entry.get(where) or {}, dict), f"{field}.{where}", entry.get(where), "must be an object")
            for cap in (entry.get(where) or {}).get("caps") or []:
                need(cap in capabilities.NAMES, f"{field}.{where}.caps", cap, "is no capability")


def installed(pid: int) -> list[list[Instruction]]:
    """The filters of a process as the kernel keeps them, the oldest first: PTRACE_SECCOMP_GET_FILTER, ptrace(2).

    The process is stopped for that moment.  Needs CAP_SYS_ADMIN, and no filter on the caller itself.
    """
    syscalls.ptrace(syscalls.PTRACE_SEIZE, pid)
    try:
        syscalls.ptrace(syscalls.PTRACE_INTERRUPT, pid)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        programs: list[list[Instruction]] = []
        while program := _filter_of(pid, len(programs)):
            programs.append(program)
        return programs
    finally:
        syscalls.ptrace(syscalls.PTRACE_DETACH, pid)


def _filter_of(pid: int, index: int) -> list[Instruction]:
    try:
        length = syscalls.ptrace(syscalls.PTRACE_SECCOMP_GET_FILTER, pid, index)
        code = ctypes.create_string_buffer(length * 8)
        syscalls.ptrace(syscalls.PTRACE_SECCOMP_GET_FILTER, pid, index, ctypes.addressof(code))
        return parse(code.raw)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # no further filter; no filter at all
            return []
        raise


class Filter:
    """A profile compiled and assembled, ready for the one call that installs it.

    Not strict, it leaves out names that nobody knows, as runc and crun do.
    """

    def __init__(self, profile: dict[str, Any], strict: bool = False) -> None:
        self.listening = any(entry["action"] == "SCMP_ACT_NOTIFY" for entry in profile.get("syscalls") or [])
        self.flags = sum(FLAGS[flag] for flag in set(profile.get("flags") or []))
        if self.listening:
            self.flags |= NEW_LISTENER | (TSYNC_ESRCH if self.flags & FLAGS["SECCOMP_FILTER_FLAG_TSYNC"] else 0)
        self.code = assemble(compile_profile(profile, search=True, strict=strict))

    def install(self) -> int:
        """seccomp(2) for the calling process and what it becomes: the listener's file descriptor, or -1."""
        result = syscalls.seccomp(self.code, self.flags)
        return result if self.listening else -1
