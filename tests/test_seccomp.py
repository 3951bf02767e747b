"""seccomp: the compiled filter against libseccomp's for the same profile, answer by answer, and in the kernel."""

import ctypes
import errno
import itertools
import os
import struct
import tempfile

import pytest

from labs import seccomp, syscalls
from labs.errors import BadInput

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
    with_it, without = profile(call("mkdir no_such_call")), profile(call("mkdir"))
    assert seccomp.compile_profile(with_it, "x86_64") == seccomp.compile_profile(without, "x86_64")


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
