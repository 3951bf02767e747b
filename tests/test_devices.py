"""The device program: read by a small interpreter of its own, verified by the kernel, and tried in a cgroup."""

import contextlib
import itertools
import os
import struct
import subprocess

import pytest

from labs import devices, machine
from labs.errors import BadInput

M, R, W = devices.MKNOD, devices.READ, devices.WRITE
BLOCK, CHARACTER = 1, 2


def asked(rules, kind, number, access):
    """What the program answers, by <linux/bpf.h>: the opcodes that it consists of, on registers of 32 bits and more."""
    registers = dict.fromkeys(range(11), 0)
    context = struct.pack("=III", access << 16 | kind, *number)
    program = list(struct.iter_unpack("=BBhi", devices.assemble(rules)))
    at = 0
    while True:
        code, both, offset, value = program[at]
        to, source = both & 15, both >> 4
        at += 1
        if code == 0x61:
            registers[to] = struct.unpack_from("=I", context, offset)[0]
        elif code == 0xB7:
            registers[to] = value
        elif code == 0xBF:
            registers[to] = registers[source]
        elif code == 0x57:
            registers[to] &= value
        elif code == 0x77:
            registers[to] >>= value
        elif code in (0x55, 0x15):
            at += offset if (registers[to] == value) == (code == 0x15) else 0
        else:
            assert code == 0x95, hex(code)
            return bool(registers[0])


def test_the_default_allows_what_every_container_has():
    for number in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 7)):
        assert asked(devices.DEFAULT, CHARACTER, number, R | W)
    for kind, number in ((CHARACTER, (1, 1)), (CHARACTER, (10, 229)), (BLOCK, (8, 0)), (BLOCK, (1, 3))):
        assert asked(devices.DEFAULT, kind, number, M)
        assert not asked(devices.DEFAULT, kind, number, R)


def test_a_rule_allows_no_more_than_its_letters():
    for letters, access in itertools.product(("r", "w", "m", "rw", "rwm"), range(1, 8)):
        allowed = sum(devices.LETTERS[letter] for letter in letters)
        assert asked((f"c 10:229 {letters}",), CHARACTER, (10, 229), access) == (access & ~allowed == 0)


def test_a_star_is_any_number_and_nothing_else_is():
    rules = ("c 10:* r", "b *:1 w")
    assert asked(rules, CHARACTER, (10, 5), R)
    assert asked(rules, BLOCK, (77, 1), W)
    others = ((CHARACTER, (11, 5), R), (BLOCK, (77, 2), W), (BLOCK, (10, 5), R), (CHARACTER, (10, 1), W))
    for kind, number, access in others:
        assert not asked(rules, kind, number, access)


def test_a_refusal_takes_back_what_a_later_rule_gives():
    refuse = devices.Rule(CHARACTER, 10, 229, W, allow=False)
    everything = devices.Rule(None, None, None, M | R | W)
    assert not asked([refuse, everything], CHARACTER, (10, 229), R | W)
    assert asked([refuse, everything], CHARACTER, (10, 229), R)
    assert asked([refuse, everything], BLOCK, (10, 229), W)
    assert asked([everything, refuse], CHARACTER, (10, 229), W)


@pytest.mark.parametrize("text", [
    "", "c 1:3", "x 1:3 rwm", "c 1 rwm", "c 1:x rwm", "c 1:3 rwx", "c 1:3:4 r", "c 1:3 r w"])
def test_a_rule_of_another_form_is_refused_with_its_text(text):
    with pytest.raises(BadInput, match="must look like"):
        devices.parse(text)


@contextlib.contextmanager
def group():
    path = f"{machine.CGROUP_ROOT}/{machine.new_name('d')}"
    os.mkdir(path)
    try:
        yield path
    finally:
        os.rmdir(path)


def use(path, number):
    """A shell in the cgroup makes a node and reads from it: what it could do."""
    script = (f"echo $$ > {path}/cgroup.procs; d=$(mktemp -d -p /var/tmp); mknod $d/n c {number} && echo made; "
              "(: < $d/n) && echo read; rm -r $d")
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False).stdout.split()


def test_the_kernel_asks_the_program():
    with group() as path:
        assert use(path, "1 11") == ["made", "read"]
        fd = os.open(path, os.O_RDONLY)
        program = devices.load_rules(["c *:* m", "c 1:3 rwm"])
        devices.attach(program, fd)
        assert use(path, "1 11") == ["made"]
        assert use(path, "1 3") == ["made", "read"]
        os.close(program)
        os.close(fd)
