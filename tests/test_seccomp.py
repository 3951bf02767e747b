"""seccomp: the compiled filter against libseccomp's for the same profile, answer by answer, and in the kernel."""

import ctypes
import errno
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from labs import process, seccomp, syscalls
from labs.errors import BadInput, KernelError
from tests import oci

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
X86_64, X86, ARM = 0xC000003E, 0x40000003, 0x40000028
KILL_THREAD, ALLOW = 0, 0x7FFF0000
ERRNO = "SCMP_ACT_ERRNO"
TOKENS = {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0x4000003E}
COMPARE = {name: number for number, name in enumerate(seccomp.OPERATORS, 1)}
EDGES = [0, 1, 0xFF, 0x100, 0xFFFFFFFF, 0x100000000, 0x100000001, 0x1000000FF, 1 << 63, (1 << 64) - 1]


class Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of <seccomp.h>"""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def by_libseccomp(profile):
    """The instructions that libseccomp makes of the same profile: an independent compiler."""
    lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(seccomp.action(profile["defaultAction"], None))))
    for arch in profile.get("architectures", []):
        assert lib.seccomp_arch_add(context, ctypes.c_uint32(TOKENS[arch])) in (0, -errno.EEXIST)
    for entry in profile["syscalls"]:
        tests = entry.get("args", [])
        array = (Comparison * max(len(tests), 1))(*[
            Comparison(test["index"], COMPARE[test["op"]], test["value"], test.get("valueTwo", 0)) for test in tests])
        answer = ctypes.c_uint32(seccomp.action(entry["action"], entry.get("errnoRet")))
        for name in entry["names"]:
            number = lib.seccomp_syscall_resolve_name(name.encode())
            assert lib.seccomp_rule_add_array(context, answer, number, len(tests), array) == 0
    with tempfile.TemporaryFile() as file:
        assert lib.seccomp_export_bpf(context, file.fileno()) == 0
        lib.seccomp_release(context)
        file.seek(0)
        return list(struct.iter_unpack("=HBBI", file.read()))


def answer(program, number, arguments=(), arch=X86_64):
    """What a classic BPF program returns for a call: bpf(4), the opcodes that seccomp filters consist of."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    at = value = 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x20:
            value = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            value &= k
        elif code == 0x05:
            at += k
        elif code in (0x15, 0x25, 0x35, 0x45):
            holds = {0x15: value == k, 0x25: value > k, 0x35: value >= k, 0x45: bool(value & k)}[code]
            at += if_true if holds else if_false
        else:
            assert code == 0x06, hex(code)
            return k


def profile(*calls, default="SCMP_ACT_ALLOW", **more):
    return {"defaultAction": default, "syscalls": [*calls]} | more


def call(names, action=ERRNO, *tests, **more):
    return {"names": names.split(), "action": action, "args": [*tests]} | more


def that(index, operator, value, two=0):
    return {"index": index, "op": f"SCMP_CMP_{operator}", "value": value, "valueTwo": two}


def number(name):
    return seccomp.resolve(name, X86_64)


@pytest.mark.parametrize("operator", ["NE", "LT", "LE", "EQ", "GE", "GT"])
def test_a_comparison_of_64_bits_answers_as_libseccomps(operator):
    for value in EDGES:
        given = profile(call("ftruncate", ERRNO, that(1, operator, value), errnoRet=28))
        ours, theirs = seccomp.compile_profile(given, "x86_64"), by_libseccomp(given)
        near = {(value + step) % (1 << 64) for step in (-1, 0, 1)} | set(EDGES)
        for argument in near:
            words = number("ftruncate"), (9, argument)
            assert answer(ours, *words) == answer(theirs, *words)
        answers = {answer(ours, number("ftruncate"), (9, argument)) for argument in near}
        assert answers <= {ALLOW, 0x50000 | 28}


def test_a_masked_comparison_answers_as_libseccomps():
    masks = (0xFF, 0x1000000FF, 0xFFFFFFFF00000000, 1 << 63)
    for mask, wanted in itertools.product(masks, (0, 1, 0x100000001, 1 << 63)):
        given = profile(call("ftruncate", ERRNO, that(5, "MASKED_EQ", mask, wanted & mask)))
        ours, theirs = seccomp.compile_profile(given, "x86_64"), by_libseccomp(given)
        for argument in EDGES:
            words = (0, 0, 0, 0, 0, argument)
            assert answer(ours, number("ftruncate"), words) == answer(theirs, number("ftruncate"), words)


def test_several_tests_must_all_hold_as_with_libseccomp():
    both = call("kill", ERRNO, that(0, "EQ", 1), that(1, "GT", 20))
    given = profile(both, call("tkill", "SCMP_ACT_KILL_PROCESS"))
    ours, theirs = seccomp.compile_profile(given, "x86_64"), by_libseccomp(given)
    found = {}
    for name, one, two in itertools.product(("kill", "tkill", "read"), (0, 1, 1 << 32 | 1), (20, 21)):
        found[name, one, two] = answer(ours, number(name), (one, two))
        assert found[name, one, two] == answer(theirs, number(name), (one, two))
    assert found["kill", 1, 21] == 0x50001
    assert [key for key, value in found.items() if value != ALLOW and key[0] == "kill"] == [("kill", 1, 21)]


@pytest.mark.parametrize(("action", "value"), [
    ("SCMP_ACT_KILL", 0), ("SCMP_ACT_KILL_THREAD", 0), ("SCMP_ACT_KILL_PROCESS", 0x80000000),
    ("SCMP_ACT_TRAP", 0x30000), ("SCMP_ACT_ERRNO", 0x50001), ("SCMP_ACT_TRACE", 0x7FF00001),
    ("SCMP_ACT_LOG", 0x7FFC0000), ("SCMP_ACT_NOTIFY", 0x7FC00000)])
def test_an_action_has_the_kernels_number(action, value):
    program = seccomp.compile_profile(profile(call("mkdir", action)), "x86_64")
    assert answer(program, number("mkdir")) == value
    assert answer(program, number("rmdir")) == ALLOW


def test_each_architecture_has_its_own_numbers():
    arches = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    given = profile(call("mkdir"), architectures=arches)
    ours, theirs = seccomp.compile_profile(given, "x86_64"), by_libseccomp(given)
    refused = []
    for name, call_number, arch in (("x86_64", 83, X86_64), ("x86", 39, X86), ("x32", 83 | 1 << 30, X86_64),
                                    ("none", 83, X86), ("none", 39, X86_64), ("foreign", 83, ARM)):
        assert answer(ours, call_number, (), arch) == answer(theirs, call_number, (), arch), name
        refused += [name] * (answer(ours, call_number, (), arch) == 0x50001)
    assert refused == ["x86_64", "x86", "x32"]
    assert answer(ours, 83, (), ARM) == KILL_THREAD


def test_x32_is_no_way_around_a_profile_without_it():
    given = profile(call("mkdir"))
    for program in (seccomp.compile_profile(given, "x86_64"), by_libseccomp(given)):
        assert answer(program, 83 | 1 << 30) == KILL_THREAD


def test_the_first_of_two_rules_that_holds_answers():
    given = profile(call("kill", ERRNO, that(1, "EQ", 17)), call("kill", ERRNO, that(1, "GE", 17), errnoRet=28))
    program = seccomp.compile_profile(given, "x86_64")
    assert [answer(program, number("kill"), (1, n)) for n in (16, 17, 18)] == [ALLOW, 0x50001, 0x50000 | 28]


def test_two_tests_of_one_argument_are_alternatives():
    either = call("kill", ERRNO, that(1, "EQ", 17), that(1, "EQ", 28))
    program = seccomp.compile_profile(profile(either), "x86_64")
    assert [answer(program, number("kill"), (1, n)) for n in (17, 18, 28)] == [0x50001, ALLOW, 0x50001]


def test_a_list_of_allowed_calls_says_of_newer_ones_that_they_are_not_there():
    given = profile(call("read write", "SCMP_ACT_ALLOW"), default=ERRNO)
    program = seccomp.compile_profile(given, "x86_64")
    assert answer(program, number("read")) == ALLOW
    assert answer(program, number("write") + 1) == 0x50000 | errno.ENOSYS
    assert answer(seccomp.compile_profile(profile(call("getpid", "SCMP_ACT_ALLOW"), default=ERRNO), "x86_64"),
                  number("read")) == 0x50000 | errno.EPERM


def test_a_name_that_an_architecture_lacks_is_left_out():
    assert seccomp.resolve("no_such_call", X86_64) is None
    assert seccomp.resolve("arm_fadvise64_64", X86_64) is None
    with_it, without = profile(call("mkdir arm_fadvise64_64")), profile(call("mkdir"))
    assert seccomp.compile_profile(with_it, "x86_64") == seccomp.compile_profile(without, "x86_64")


def test_an_unknown_name_is_an_error_only_where_it_should_refuse():
    with pytest.raises(BadInput, match=r"linux.seccomp.syscalls\[1\].names: 'mkdri': is no system call"):
        seccomp.compile_profile(profile(call("rmdir"), call("mkdir mkdri")), "x86_64")
    runtime = seccomp.Filter(profile(call("mkdir mkdri")))
    assert runtime.code == seccomp.Filter(profile(call("mkdir"))).code
    allowed = call("read of_the_future", "SCMP_ACT_ALLOW")
    program = seccomp.compile_profile(profile(allowed, default=ERRNO), "x86_64")
    assert answer(program, number("read")) == ALLOW


def test_what_cannot_be_compiled_is_an_error_with_its_name():
    with pytest.raises(BadInput, match="riscv64"):
        seccomp.compile_profile(profile(), "riscv64")
    many = [call("kill", ERRNO, that(1, "EQ", value)) for value in range(2000)]
    with pytest.raises(BadInput, match="4096"):
        seccomp.compile_profile(profile(*many), "x86_64")


def in_a_child(made, action):
    """A child with no_new_privs and the filter, then the action: its exit status, or minus its signal."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            made.install()
            status = action()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forbidden():
    """The errno of a mkdir(2) that cannot succeed anyway."""
    try:
        os.mkdir("/")
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize(("action", "status"), [
    ("SCMP_ACT_ALLOW", errno.EEXIST), ("SCMP_ACT_LOG", errno.EEXIST), (ERRNO, 77), ("SCMP_ACT_KILL_PROCESS", -31),
    ("SCMP_ACT_TRAP", -31)])
def test_the_kernel_does_what_the_profile_says(action, status):
    entry = call("mkdir mkdirat", action) | ({"errnoRet": 77} if action == ERRNO else {})
    assert in_a_child(seccomp.Filter(profile(entry)), forbidden) == status


def test_the_kernel_compares_the_argument():
    made = seccomp.Filter(profile(call("kill", ERRNO, that(1, "EQ", 17), errnoRet=77)))

    def sent():
        os.kill(os.getpid(), 0)
        try:
            os.kill(os.getpid(), 17)
        except OSError as error:
            return error.errno
        return 0

    assert in_a_child(made, sent) == 77


# --- the same answers by halving ---


TESTED = call("kill", ERRNO, that(1, "EQ", 17), errnoRet=28)
SHAPES = {
    "nothing": profile(),
    "the first": profile(call("read")),
    "neighbours": profile(call("read write open close"), TESTED, call("mkdir", "SCMP_ACT_KILL_PROCESS")),
    "allowed": profile(call("read write kill", "SCMP_ACT_ALLOW"), default=ERRNO),
    "the newest refused": profile(call("read", "SCMP_ACT_ALLOW"), call("kill"), default=ERRNO),
    "three": profile(call("mkdir socket semget"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
    "two that say nothing new": profile(call("read", "SCMP_ACT_ALLOW"), call("kill")),
}
X32 = 1 << 30


@pytest.mark.parametrize("shape", SHAPES)
def test_halving_the_numbers_changes_no_answer(shape):
    chain, halved = (seccomp.compile_profile(SHAPES[shape], "x86_64", search) for search in (False, True))
    for arch, at in itertools.product((X86_64, X86, ARM), (*range(470), *range(X32, X32 + 550))):
        for words in ((0, 17), (1,)) if at % X32 < 120 else [()]:
            assert answer(chain, at, words, arch) == answer(halved, at, words, arch), (at, words, arch)


def test_halving_is_shorter_and_finds_a_call_in_a_few_steps():
    found = seccomp.oci_profile(docker_profile(), [], "x86_64")
    chain, halved = (seccomp.compile_profile(found, "x86_64", search) for search in (False, True))
    assert len(halved) * 3 < len(chain)
    assert max(len(seccomp.trace(halved, at)) for at in range(470)) < 32
    assert max(len(seccomp.trace(chain, at)) for at in range(470)) > 500


# --- what a program says and does ---


def test_a_program_is_printed_with_names():
    made = seccomp.compile_profile(profile(call("mkdir", errnoRet=28), call("kill", "SCMP_ACT_LOG", that(1, "EQ", 9))),
                                   "x86_64")
    lines = [line.split(maxsplit=1)[1] for line in seccomp.disassemble(made).splitlines()]
    assert lines == [
        "load arch", "if arch == x86_64: 3 else 2", "goto 18",
        "load nr", "if nr >= X32_BIT: 5 else 6", "return KILL_THREAD",
        "if nr == mkdir: 8 else 7", "goto 9", "return ERRNO ENOSPC",
        "if nr == kill: 11 else 10", "goto 17", "load args[1] high", "if args[1] high == 0: 13 else 16",
        "load args[1] low", "if args[1] low == 9: 15 else 16", "return LOG", "return ALLOW",
        "return ALLOW", "return KILL_THREAD"]


def test_a_place_that_is_reached_in_two_ways_claims_no_name():
    program = [(seccomp.LOAD, 0, 0, seccomp.ARCH), (seccomp.JEQ, 1, 0, X86_64), (seccomp.LOAD, 0, 0, seccomp.NUMBER),
               (seccomp.JEQ, 0, 1, 83), (seccomp.RETURN, 0, 0, 0), (0x87, 0, 0, 0), (seccomp.RETURN, 0, 0, 0x12340000)]
    lines = seccomp.disassemble(program).splitlines()
    assert lines[3].endswith("if A == 83: 4 else 5")
    assert lines[5].endswith("code 0x87 0 0 0")
    assert lines[6].endswith("return unknown")


def test_every_answer_has_its_word():
    words = {seccomp.describe(value): name for name, value in seccomp.ACTIONS.items() if name != "SCMP_ACT_KILL"}
    assert all(name == "SCMP_ACT_" + word.split()[0] for word, name in words.items())
    assert seccomp.describe(0x50001) == "ERRNO EPERM"
    assert seccomp.describe(0x7FF00007) == "TRACE 7"


def test_numbers_and_names_are_those_of_the_headers():
    header = re.findall(r"#define __NR_(\w+) (\d+)", Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").read_text())
    known = [(name, int(at)) for name, at in header if seccomp.resolve(name, X86_64) is not None]
    assert len(known) > 350
    for name, at in known:
        assert (seccomp.resolve(name, X86_64), seccomp.name(at, X86_64)) == (at, name)
    assert seccomp.name(9999, X86_64) == ""
    assert seccomp.name(83 | X32, X86_64) == "mkdir"


def test_a_trace_ends_at_the_return_whose_answer_the_interpreter_of_the_tests_gives():
    program = seccomp.compile_profile(SHAPES["neighbours"], "x86_64", search=True)
    for at, words in itertools.product(range(100), ((), (0, 17))):
        path = seccomp.trace(program, at, words, X86_64)
        assert path[0] == 0
        assert path == sorted(set(path))
        assert program[path[-1]] == (seccomp.RETURN, 0, 0, answer(program, at, words))
        assert seccomp.answer(program, at, words, X86_64) == answer(program, at, words)
    with pytest.raises(BadInput, match="instruction 0: '0x87'"):
        seccomp.trace([(0x87, 0, 0, 0)], 1)


def test_a_program_survives_being_assembled():
    program = seccomp.compile_profile(SHAPES["three"], "x86_64")
    assert seccomp.parse(seccomp.assemble(program)) == program
    assert len(seccomp.assemble(program)) == 8 * len(program)


# --- the kernel's own account of it ---


def test_the_kernel_gives_every_filter_back_the_oldest_first():
    made = [seccomp.Filter(profile(call(name))) for name in ("mkdir", "rmdir", "chdir")]
    reader, writer = os.pipe()

    def confined():
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        for each in made:
            each.install()
        os.write(writer, b"!")
        signal.pause()

    with process.fork(confined) as child:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        found = seccomp.installed(child.pid)
        assert [seccomp.assemble(program) for program in found] == [each.code for each in made]
        assert process.until(lambda: process.status(child.pid).state == "S")


def test_a_process_without_a_filter_has_none_and_goes_on():
    with process.spawn(["sleep", "1000"]) as child:
        assert seccomp.installed(child.pid) == []
        process.until(lambda: process.status(child.pid).state == "S")
        assert process.status_fields(child.pid)["TracerPid"] == "0"
    with pytest.raises(KernelError, match="ptrace"):
        seccomp.installed(child.pid)


STRONGEST = ["KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "NOTIFY", "TRACE", "LOG", "ALLOW"]


def test_actions_have_a_rank():
    assert sorted(STRONGEST, key=lambda word: seccomp.precedence(seccomp.ACTIONS[f"SCMP_ACT_{word}"])) == STRONGEST


@pytest.mark.parametrize("first", ["KILL_PROCESS", "TRAP", "ERRNO", "TRACE", "LOG", "ALLOW"])
def test_of_two_filters_the_stronger_action_is_the_kernels(first):
    ends = {"KILL_PROCESS": -31, "TRAP": -31, "ERRNO": errno.EPERM, "TRACE": errno.ENOSYS, "LOG": errno.EEXIST,
            "ALLOW": errno.EEXIST}
    for second in ends:
        stronger = min(first, second, key=lambda word: seccomp.precedence(seccomp.ACTIONS[f"SCMP_ACT_{word}"]))

        class Both:
            def install(self):
                for word in (first, second):  # noqa: B023
                    seccomp.Filter(profile(call("mkdir mkdirat", f"SCMP_ACT_{word}"))).install()

        assert in_a_child(Both(), forbidden) == ends[stronger], (first, second)


def test_an_int_is_compared_in_its_low_half_by_the_kernel_and_not_by_a_64_bit_test():
    made = seccomp.Filter(profile(call("kill", ERRNO, that(1, "EQ", 0), errnoRet=77)))
    low = seccomp.Filter(profile(call("kill", ERRNO, that(1, "MASKED_EQ", 0xFFFFFFFF, 0), errnoRet=77)))

    def sent():
        return raw(number("kill"), os.getpid(), 1 << 32)

    assert in_a_child(made, sent) == 0
    assert in_a_child(low, sent) == 77


def raw(call_number, *words):
    """The errno of a system call with these 64-bit arguments, 0 where it succeeds."""
    longs = [ctypes.c_long(word - (1 << 64) if word >> 63 else word) for word in (call_number, *words)]
    return ctypes.get_errno() if libc.syscall(*longs) == -1 else 0


def behind(program, action):
    """What the action returns in a child with no_new_privs and the program."""
    def confined():
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        syscalls.seccomp(seccomp.assemble(program))
        return action()
    return process.call(confined)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("operator", ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"])
def test_the_kernel_compares_64_bits_as_the_trace_does(operator, search):
    """getppid(2) looks at no argument: what it answers is the filter's word alone."""
    for value in EDGES[::2]:
        given = profile(call("getppid", ERRNO, that(3, operator, value, value & 0xFFFF0000FFFF0000), errnoRet=77))
        program = seccomp.compile_profile(given, search=search)
        found = behind(program, lambda: [raw(number("getppid"), 0, 0, 0, word) for word in EDGES])
        assert found == [answer(program, number("getppid"), (0, 0, 0, word)) & 0xFF for word in EDGES], value


def test_the_kernel_refuses_each_call_that_dockers_profile_refuses():
    """Only calls that are refused are made, so nothing happens; gaps in the table and newer calls are among them.

    Not uretprobe(2) and uprobe(2), 335 and 336: the kernel keeps them out of every filter, and ends who calls them.
    """
    program = seccomp.compile_profile(seccomp.oci_profile(docker_profile()), search=True)
    numbers = [at for at in range(520) if at not in (335, 336)]
    refused = {at: found & 0xFFFF for at in numbers if (found := answer(program, at)) & 0xFFFF0000 == 0x50000}
    assert len(refused) > 100
    assert set(refused.values()) == {errno.EPERM, errno.ENOSYS}
    assert behind(program, lambda: [raw(at, *[0] * 6) for at in refused]) == list(refused.values())


# --- profiles in Docker's format ---


def docker_profile():
    return json.loads(Path(seccomp.PODMANS_PROFILE).read_text())


def entry(names, action="SCMP_ACT_ALLOW", **more):
    return {"names": names.split(), "action": action} | more


@pytest.mark.parametrize(("conditions", "there"), [
    ({}, True), ({"includes": {"caps": ["CAP_CHOWN"]}}, True),
    ({"includes": {"caps": ["CAP_CHOWN", "CAP_BPF"]}}, False),
    ({"excludes": {"caps": ["CAP_BPF"]}}, True), ({"excludes": {"caps": ["CAP_BPF", "CAP_CHOWN"]}}, False),
    ({"includes": {"arches": ["arm64"]}}, False), ({"includes": {"arches": ["x86", "amd64"]}}, True),
    ({"excludes": {"arches": ["amd64"]}}, False), ({"includes": {"minKernel": "4.8"}}, True),
    ({"includes": {"minKernel": "6.12"}}, True), ({"includes": {"minKernel": "6.13"}}, False),
    ({"excludes": {"minKernel": "6.12"}}, False), ({"excludes": {"minKernel": "7.0"}}, True)])
def test_an_entry_is_there_when_its_conditions_hold(conditions, there):
    given = {"defaultAction": ERRNO, "syscalls": [entry("mkdir", comment="", **conditions)]}
    found = seccomp.oci_profile(given, ["CAP_CHOWN"], "x86_64", "6.12.38+deb13-amd64")
    assert found["syscalls"] == [{"names": ["mkdir"], "action": "SCMP_ACT_ALLOW"}] * there


def test_the_architectures_are_those_below_the_native_one():
    found = seccomp.oci_profile(docker_profile(), [], "x86_64")
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert found["defaultErrnoRet"] == errno.ENOSYS
    assert seccomp.oci_profile({"defaultAction": ERRNO}, [], "aarch64")["architectures"] == ["SCMP_ARCH_AARCH64"]


@pytest.mark.parametrize(("broken", "line"), [
    ([], "profile: \\[\\]: must be an object"),
    ({}, "defaultAction: None: must be an action"),
    ({"defaultAction": "DENY"}, "defaultAction: 'DENY'"),
    ({"defaultAction": ERRNO, "syscalls": ["read"]}, r"syscalls\[0\]: 'read': must be an object"),
    ({"defaultAction": ERRNO, "syscalls": [{"action": ERRNO}]}, r"syscalls\[0\].names: None"),
    ({"defaultAction": ERRNO, "syscalls": [entry("read", "ALLOW")]}, r"syscalls\[0\].action: 'ALLOW'"),
    ({"defaultAction": ERRNO, "syscalls": [entry("read"), entry("kill", args=[that(6, "EQ", 1)])]},
     r"syscalls\[1\].args\[0\].index: 6: must be 0 to 5"),
    ({"defaultAction": ERRNO, "syscalls": [entry("kill", args=[that(1, "ABOUT", 1)])]}, "op: 'SCMP_CMP_ABOUT'"),
    ({"defaultAction": ERRNO, "syscalls": [entry("kill", args=[that(1, "EQ", 1 << 64)])]}, "value: 184467440737"),
    ({"defaultAction": ERRNO, "syscalls": [entry("kill", args=[that(1, "EQ", 1) | {"valueTwo": -1}])]}, "valueTwo: -1"),
    ({"defaultAction": ERRNO, "syscalls": [entry("kill", args=that(1, "EQ", 1))]}, "args: .* must be a list"),
    ({"defaultAction": ERRNO, "syscalls": [entry("kill", includes=["CAP_KILL"])]}, "includes: .* must be an object"),
    ({"defaultAction": ERRNO, "syscalls": [entry("kill", excludes={"caps": ["CAP_SYS_ADMNI"]})]},
     r"syscalls\[0\].excludes.caps: 'CAP_SYS_ADMNI': is no capability")])
def test_a_broken_profile_is_refused_with_the_field_and_the_rule(broken, line):
    with pytest.raises(BadInput, match=line):
        seccomp.oci_profile(broken)


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize("caps", [[], ["CAP_SYS_ADMIN", "CAP_AUDIT_WRITE"]])
def test_a_runtime_installs_what_gives_the_same_answers_as_ours(runtime, caps):
    """crun and runc compile with libseccomp; what they installed is read back from the kernel."""
    given = seccomp.oci_profile(docker_profile(), caps, "x86_64")
    ours = seccomp.compile_profile(given, "x86_64", search=True)
    with oci.bundle("echo begun; exec sleep 1000", {"linux.seccomp": given}) as made:
        line = [*made.line(runtime), "run", made.name]
        with subprocess.Popen(line, cwd=made.path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
            try:
                assert running.stdout.readline() == b"begun\n"
                (theirs,) = seccomp.installed(json.loads(made.call("state", made.name, runtime=runtime).stdout)["pid"])
            finally:
                made.call("kill", made.name, "KILL", runtime=runtime)
    words = [(), (8,), (0x20008,), (16, 0, 9), (16, 0, 8), (1, 0, 9), (0xFFFFFFFF,), (0x7E020000,)]
    for arch, numbers in ((X86_64, (*range(470), *range(X32, X32 + 550))), (X86, range(470)), (ARM, range(5))):
        for at in numbers:
            tested = seccomp.name(at, arch) in ("personality", "socket", "clone", "socketcall")
            for arguments in words if tested else [()]:
                assert answer(ours, at, arguments, arch) == answer(theirs, at, arguments, arch), (at, arguments, arch)


def test_a_call_inside_socketcall_is_refused_as_libseccomp_refuses_it():
    given = profile(call("connect semget"), architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])
    ours, theirs = seccomp.compile_profile(given, "x86_64"), by_libseccomp(given)
    refused = []
    for at, first in [*((at, 0) for at in range(470)), *itertools.product((102, 117), range(25))]:
        found = answer(ours, at, (first,), X86)
        assert found == answer(theirs, at, (first,), X86), (at, first)
        refused += [(at, first)] * (found != ALLOW)
    assert {(102, 3), (117, 2), (362, 0), (393, 0)} <= set(refused)


def test_libseccomps_python_binding_makes_a_program_with_the_same_answers():
    script = ("import seccomp as s; f = s.SyscallFilter(s.ALLOW); "
              "f.add_rule(s.ERRNO(28), 'mkdir'); f.export_bpf(__import__('sys').stdout)")
    done = subprocess.run(["/usr/bin/python3", "-c", script], capture_output=True, check=True)
    theirs, ours = seccomp.parse(done.stdout), seccomp.compile_profile(profile(call("mkdir", errnoRet=28)), "x86_64")
    assert "if nr == mkdir" in seccomp.disassemble(theirs)
    assert all(seccomp.answer(ours, at) == seccomp.answer(theirs, at) for at in range(470))


def test_the_32_bit_gate_has_its_own_numbers_and_a_filter_sees_its_arch():
    by_number = [(seccomp.LOAD, 0, 0, seccomp.NUMBER), (seccomp.JEQ, 0, 1, number("mkdir")),
                 (seccomp.RETURN, 0, 0, 0x50000 | 28), (seccomp.RETURN, 0, 0, ALLOW)]

    def through(gate, program):
        def tried():
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            syscalls.seccomp(seccomp.assemble(program))
            with pytest.raises(OSError) as caught:
                gate()
            return caught.value.errno
        return process.call(tried)

    def gate():
        return syscalls.int80(39, "/", 0o755)

    both = seccomp.compile_profile(profile(call("mkdir", errnoRet=28),
                                           architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]), "x86_64")
    assert through(lambda: os.mkdir("/"), by_number) == errno.ENOSPC
    assert through(gate, by_number) == errno.EEXIST
    assert through(gate, both) == errno.ENOSPC
