"""The device controller of cgroup v2: a tiny BPF program that says which device nodes may be used.

cgroup v2 has no device file.  A program of type BPF_PROG_TYPE_CGROUP_DEVICE, attached to a cgroup,
is asked at every mknod(2) and open(2) of a device: 1 allows, 0 refuses with EPERM.  bpf(2),
<linux/bpf.h>, and the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from labs import syscalls
from labs.errors import BadInput

MKNOD, READ, WRITE = 1, 2, 4
TYPES = {"b": 1, "c": 2}
LETTERS = {"m": MKNOD, "r": READ, "w": WRITE}

# What runc and crun allow by default: make any node; use null, zero, full, random, urandom, tty, ptmx, pts.
DEFAULT = ("c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm",
           "c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm")

# Opcodes: class | operation | source, as in <linux/bpf_common.h> and <linux/bpf.h>.
LOAD, MOVE, MOVE_REG, AND, SHIFT_RIGHT, JUMP_NE, EXIT = 0x61, 0xB7, 0xBF, 0x57, 0x77, 0x55, 0x95
R0, R1, TYPE, ACCESS, MAJOR, MINOR, REST = range(7)


class Rule(NamedTuple):
    """Devices of a type (1 block, 2 character) that may be used in the ways of access; None is any number."""

    type: int
    major: int | None
    minor: int | None
    access: int


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
    """Return 1 when every test holds; each failing test jumps behind the rule, to the next one."""
    tests = [(TYPE, rule.type)]
    tests += [(r, n) for r, n in ((MAJOR, rule.major), (MINOR, rule.minor)) if n is not None]
    size = len(tests) + 5
    code = [_instruction(JUMP_NE, r, value=n, offset=size - 1 - at) for at, (r, n) in enumerate(tests)]
    code += [_instruction(MOVE_REG, REST, ACCESS),
             _instruction(AND, REST, value=~rule.access),
             _instruction(JUMP_NE, REST, offset=2),
             _instruction(MOVE, R0, value=1),
             _instruction(EXIT)]
    return b"".join(code)


def assemble(rules: Sequence[str]) -> bytes:
    """The program: load the question (struct bpf_cgroup_dev_ctx), try the rules in turn, else refuse."""
    prologue = [_instruction(LOAD, TYPE, R1, offset=0), _instruction(MOVE_REG, ACCESS, TYPE),
                _instruction(AND, TYPE, value=0xFFFF), _instruction(SHIFT_RIGHT, ACCESS, value=16),
                _instruction(LOAD, MAJOR, R1, offset=4), _instruction(LOAD, MINOR, R1, offset=8)]
    refuse = [_instruction(MOVE, R0, value=0), _instruction(EXIT)]
    return b"".join(prologue + [_test(parse(rule)) for rule in rules] + refuse)


@cache
def load(rules: tuple[str, ...] = DEFAULT) -> int:
    """A file descriptor of the program, verified by the kernel; the same rules are loaded once a process."""
    code, licence = ctypes.create_string_buffer(assemble(rules)), ctypes.create_string_buffer(b"GPL")
    attr = struct.pack("=IIQQIIQII16s", syscalls.BPF_PROG_TYPE_CGROUP_DEVICE, (len(code) - 1) // 8,
                       ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0, 0, b"labs_devices")
    return syscalls.bpf(syscalls.BPF_PROG_LOAD, attr)


def attach(program: int, cgroup_fd: int) -> None:
    """Attach a loaded program to a cgroup; it goes when the cgroup goes."""
    attr = struct.pack("=IIII", cgroup_fd, program, syscalls.BPF_CGROUP_DEVICE, 0)
    syscalls.bpf(syscalls.BPF_PROG_ATTACH, attr)
