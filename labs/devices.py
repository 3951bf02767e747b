"""The device controller of cgroup v2: a tiny BPF program that says which device nodes may be used.

cgroup v2 has no device file.  A program of type BPF_PROG_TYPE_CGROUP_DEVICE, attached to a cgroup,
is asked at every mknod(2) and open(2) of a device: 1 allows, 0 refuses with EPERM.  bpf(2),
<linux/bpf.h>, and the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import ctypes
import struct

from labs import syscalls
from labs.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MKNOD, READ, WRITE = 1, 2, 4
TYPES = {"b": 1, "c": 2}
LETTERS = {"m": MKNOD, "r": READ, "w": WRITE}

# What runc and crun allow by default: make any node; use null, zero, full, random, urandom, tty, ptmx, pts.
DEFAULT = ("c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm",
           "c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm")

# Opcodes: class | operation | source, as in <linux/bpf_common.h> and <linux/bpf.h>.
LOAD, MOVE, MOVE_REG, AND, SHIFT_RIGHT, JUMP_NE, JUMP_EQ, EXIT = 0x61, 0xB7, 0xBF, 0x57, 0x77, 0x55, 0x15, 0x95
R0, R1, TYPE, ACCESS, MAJOR, MINOR, REST = range(7)


class Rule:
    """Devices of a type (1 block, 2 character) that may or may not be used in the ways of access; None is any."""

    def __init__(self, kind: int | None, major: int | None, minor: int | None, access: int, allow: bool = True) -> None:
        self.kind, self.major, self.minor, self.access, self.allow = kind, major, minor, access, allow


def parse(text: str) -> Rule:
    """A rule as `docker run --device-cgroup-rule` writes it: "c 1:3 rwm", "b *:* m"."""
    try:
        kind, numbers, letters = text.split()
        major, minor = (None if n == "*" else int(n) for n in numbers.split(":"))
        return Rule(TYPES[kind], major, minor, sum(LETTERS[letter] for letter in set(letters)))
    except (KeyError, ValueError) as error:
        rule = 'must look like "c 1:3 rwm": c or b, MAJOR:MINOR or *, letters of r w m'
        raise BadInput("devices", text, rule) from error


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """Struct bpf_insn: 8 bytes."""
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


def _test(rule: Rule) -> bytes:
    """Answer when every test holds; each failing test jumps behind the rule, to the next one.

    Allowed is what asks for nothing beyond access; refused is what asks for any of it.
    """
    pairs = ((TYPE, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor))
    tests = [(register, number) for register, number in pairs if number is not None]
    size = len(tests) + 5
    code = [_instruction(JUMP_NE, r, value=n, offset=size - 1 - at) for at, (r, n) in enumerate(tests)]
    code += [_instruction(MOVE_REG, REST, ACCESS),
             _instruction(AND, REST, value=~rule.access if rule.allow else rule.access),
             _instruction(JUMP_NE if rule.allow else JUMP_EQ, REST, offset=2),
             _instruction(MOVE, R0, value=int(rule.allow)),
             _instruction(EXIT)]
    return b"".join(code)


def assemble(rules: Sequence[Rule | str]) -> bytes:
    """The program: load the question (struct bpf_cgroup_dev_ctx), try the rules in turn, else refuse."""
    prologue = [_instruction(LOAD, TYPE, R1, offset=0), _instruction(MOVE_REG, ACCESS, TYPE),
                _instruction(AND, TYPE, value=0xFFFF), _instruction(SHIFT_RIGHT, ACCESS, value=16),
                _instruction(LOAD, MAJOR, R1, offset=4), _instruction(LOAD, MINOR, R1, offset=8)]
    refuse = [_instruction(MOVE, R0, value=0), _instruction(EXIT)]
    return b"".join(prologue + [_test(parse(rule) if isinstance(rule, str) else rule) for rule in rules] + refuse)


_loaded: dict[tuple[str, ...], int] = {}


def load(rules: tuple[str, ...] = DEFAULT) -> int:
    """A file descriptor of the program for rules as text; the same rules are loaded once a process."""
    if rules not in _loaded:
        _loaded[rules] = load_rules(rules)
    return _loaded[rules]


def load_rules(rules: Sequence[Rule | str]) -> int:
    """A file descriptor of the program, verified by the kernel; the first rule that decides counts."""
    code, licence = ctypes.create_string_buffer(assemble(rules)), ctypes.create_string_buffer(b"GPL")
    attr = struct.pack("=IIQQIIQII16s", syscalls.BPF_PROG_TYPE_CGROUP_DEVICE, (len(code) - 1) // 8,
                       ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0, 0, b"labs_devices")
    return syscalls.bpf(syscalls.BPF_PROG_LOAD, attr)


def attach(program: int, cgroup_fd: int) -> None:
    """Attach a loaded program to a cgroup; it goes when the cgroup goes."""
    attr = struct.pack("=IIII", cgroup_fd, program, syscalls.BPF_CGROUP_DEVICE, 0)
    syscalls.bpf(syscalls.BPF_PROG_ATTACH, attr)
