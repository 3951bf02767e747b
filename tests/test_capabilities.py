"""Capabilities: names and masks against capsh, and what a process becomes against the kernel's own account of it."""

import errno
import json
import os
import re
import subprocess
from random import Random

import pytest

from labs import capabilities, machine, mounts, namespaces, process, syscalls
from labs.capabilities import FileCaps
from labs.check.security_capabilities import cat_with
from labs.errors import BadInput, ChildFailed, KernelError

LINES = {"CapBnd": "bounding", "CapEff": "effective", "CapPrm": "permitted", "CapInh": "inheritable",
         "CapAmb": "ambient"}
SOME = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]


def sets(pid="self"):
    found = re.findall(r"(Cap\w+):\t(\w+)", machine.read_file(f"/proc/{pid}/status"))
    return {LINES[name]: int(bits, 16) for name, bits in found}


def of_a_child(action):
    """The five sets of a child after the action, and whether it was able to carry it out."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writer, json.dumps(sets()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as said:
        text = said.read()
    os.waitpid(child, 0)
    assert text, "the child failed"
    return {name: capabilities.names(bits) for name, bits in json.loads(text).items()}


def test_names_are_in_the_order_of_capsh():
    assert len(capabilities.NAMES) == 41
    for number, name in enumerate(capabilities.NAMES):
        assert capabilities.names(1 << number) == [name]
    everything = (1 << len(capabilities.NAMES)) - 1
    done = subprocess.run(["capsh", f"--decode={everything:x}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().partition("=")[2].upper().split(",") == list(capabilities.NAMES)


def test_a_mask_and_its_names_are_the_same_thing():
    assert capabilities.mask(SOME) == 1 << 0 | 1 << 5 | 1 << 10
    assert capabilities.names(capabilities.mask(SOME)) == SOME
    assert capabilities.mask(["CAP_OF_NOTHING", *SOME, *SOME]) == capabilities.mask(SOME)


def test_the_kernel_knows_the_capabilities_up_to_its_last():
    last = int(machine.read_file("/proc/sys/kernel/cap_last_cap"))
    assert capabilities.known(last)
    assert not capabilities.known(last + 1)


def test_what_is_dropped_from_the_bounding_set_is_gone():
    had = set(capabilities.names(sets()["bounding"]))
    found = of_a_child(lambda: capabilities.limit(capabilities.mask(SOME)))
    assert set(found["bounding"]) == had & set(SOME)


@pytest.mark.parametrize(("given", "ambient"), [
    ({"effective": SOME, "permitted": SOME, "inheritable": SOME, "ambient": SOME}, SOME),
    ({"effective": SOME[:1], "permitted": SOME, "inheritable": [], "ambient": []}, []),
    ({"effective": SOME, "permitted": SOME, "inheritable": SOME[:2], "ambient": SOME}, SOME[:2]),
    ({}, [])])
def test_a_process_has_the_sets_that_it_took(given, ambient):
    masks = {name: capabilities.mask(names) for name, names in given.items()}
    found = of_a_child(lambda: capabilities.become(masks))
    wanted = {name: given.get(name, []) for name in ("effective", "permitted", "inheritable")}
    assert {name: found[name] for name in wanted} == wanted
    assert found["ambient"] == ambient


def test_a_right_given_up_is_refused_by_the_kernel():
    def unshare_without_the_right():
        capabilities.become({})
        try:
            syscalls.unshare(syscalls.CLONE_NEWUTS)
        except OSError:
            return
        os._exit(1)

    assert of_a_child(unshare_without_the_right)["effective"] == []


@pytest.mark.parametrize(("given", "found"), [
    (["NET_RAW"], ["CAP_NET_RAW"]), (["cap_net_raw", "Chown"], ["CAP_CHOWN", "CAP_NET_RAW"]), ([], []),
    (["CAP_KILL", "ALL"], list(capabilities.NAMES))])
def test_names_as_people_write_them(given, found):
    assert capabilities.names(capabilities.parse(given)) == found


@pytest.mark.parametrize("name", ["NET_ROW", "", "CAP_", "ALL_OF_THEM"])
def test_an_unknown_capability_is_named(name):
    with pytest.raises(BadInput, match=f"^capability: '{name}': must be ALL or a name of capabilities"):
        capabilities.parse(["CHOWN", name])


def test_the_sets_of_a_process_are_those_of_getpcaps():
    with process.spawn(["setpriv", "--inh-caps=-all,+kill,+chown", "sleep", "100"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        found = capabilities.of(child.pid)
        text = subprocess.run(["getpcaps", "--iab", str(child.pid)], capture_output=True, text=True, check=True).stdout
    assert capabilities.names(found["inheritable"]) == ["CAP_CHOWN", "CAP_KILL"]
    assert "cap_chown" in text and "cap_kill" in text  # inherited ones are named, in the order of the bits
    assert found == sets() | {"inheritable": found["inheritable"]}


# The capabilities of files.


@pytest.fixture
def program():
    """A copy of cat that anybody may execute, where no mount is nosuid."""
    with cat_with(None) as path:
        yield path


TEXTS = {
    "cap_net_raw=ep": FileCaps(1 << 13, 0, True),
    "cap_chown,cap_kill=p": FileCaps(0b100001, 0, False),
    "cap_net_raw=i": FileCaps(0, 1 << 13, False),
    "cap_checkpoint_restore=ep": FileCaps(1 << 40, 0, True),
    "cap_chown=ei": FileCaps(0, 1, True),
    "cap_syslog,cap_chown=eip": FileCaps(1 << 34 | 1, 1 << 34 | 1, True),
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_setcap_writes_we_read_and_the_other_way_round(text, program):
    subprocess.run(["setcap", text, program], check=True)
    written = os.getxattr(program, "security.capability")
    assert capabilities.read_file(program) == capabilities.from_xattr(written) == TEXTS[text]
    told = subprocess.run(["getcap", program], capture_output=True, check=True).stdout
    os.removexattr(program, "security.capability")
    assert capabilities.read_file(program) is None
    capabilities.write_file(program, TEXTS[text])
    assert os.getxattr(program, "security.capability") == written
    assert subprocess.run(["getcap", program], capture_output=True, check=True).stdout == told != b""


def test_a_rootid_as_setcap_writes_it(program):
    subprocess.run(["setcap", "-n", "100000", "cap_net_raw=ep", program], check=True)
    caps = FileCaps(1 << 13, 0, True, 100_000)
    assert capabilities.read_file(program) == caps
    assert os.getxattr(program, "security.capability") == capabilities.to_xattr(caps)
    assert len(capabilities.to_xattr(caps)) == 24
    capabilities.write_file(program, caps)
    told = subprocess.run(["getcap", "-n", program], capture_output=True, text=True, check=True).stdout
    assert told == f"{program} cap_net_raw=ep [rootid=100000]\n"


def test_the_first_revision_is_read_and_no_longer_written(program):
    old = bytes.fromhex("01000001 21000000 01000000")
    assert capabilities.from_xattr(old) == FileCaps(0b100001, 1, True)
    with pytest.raises(OSError) as failed:
        os.setxattr(program, "security.capability", old)
    assert failed.value.errno == errno.EINVAL


@pytest.mark.parametrize("data", [b"", b"\0" * 20, bytes.fromhex("00000002"), bytes.fromhex("00000003") + bytes(16),
                                  bytes.fromhex("00000002") + bytes(20), bytes.fromhex("00000004") + bytes(16)])
def test_an_attribute_of_the_wrong_size_is_refused(data):
    with pytest.raises(BadInput, match=r"^security\.capability: .* must have 12, 20 or 24 bytes"):
        capabilities.from_xattr(data)


def test_a_file_that_is_not_there():
    with pytest.raises(KernelError, match=r"^getxattr: No such file"):
        capabilities.read_file("/nothing")
    with pytest.raises(KernelError, match=r"^setxattr: No such file"):
        capabilities.write_file("/nothing", FileCaps(1))


def test_a_write_takes_a_files_capabilities_away(program):
    capabilities.write_file(program, FileCaps(1))
    with open(program, "ab") as file:
        file.write(b"\0")
    assert capabilities.read_file(program) is None


def in_a_user_namespace(action):
    """What the action returns for root of a user namespace that is uid 100000 outside."""
    there, go = os.pipe(), os.pipe()

    def inside():
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(there[1], b".")
        os.read(go[0], 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.write(there[1], repr(action()).encode())

    with process.fork(inside) as child:
        os.read(there[0], 1)
        namespaces.write_maps(child.pid, [(0, 100_000, 10)], [(0, 100_000, 10)])
        os.write(go[1], b".")
        child.wait(30)
        said = os.read(there[0], 1000)
    for fd in (*there, *go):
        os.close(fd)
    return said.decode()


def test_root_of_a_user_namespace_writes_the_second_revision_and_the_kernel_the_third(program):
    os.chown(program, 100_000, 100_000)

    def write_and_read():
        capabilities.write_file(program, FileCaps(1 << 13, 0, True))
        return capabilities.read_file(program)

    assert in_a_user_namespace(write_and_read) == repr(FileCaps(1 << 13, 0, True))
    assert capabilities.read_file(program) == FileCaps(1 << 13, 0, True, 100_000)
    before = dict.fromkeys(capabilities.SETS, 0) | {"bounding": sets()["bounding"]}
    assert after(program, before, uid=NOBODY)["permitted"] == 0  # this file gives nothing out here


# execve(2): the formula, and the kernel.

NOBODY = 65534
A, B, C = (1 << number for number in (0, 10, 13))  # CHOWN, NET_BIND_SERVICE, NET_RAW


def exec_as(program, state):
    capabilities.assume(**state)
    return subprocess.check_output([program, "/proc/self/status"], text=True)


def after(program, before, **state):
    """The five sets of a real program, or the name of the errno of execve(2)."""
    try:
        return capabilities.from_status(process.call(exec_as, program, {"sets": before, **state}))
    except ChildFailed as error:
        return errno.errorcode[error.errno]


def foretold(before, file, **state):
    try:
        return capabilities.after_exec(before, file, **state)
    except KernelError as error:
        return errno.errorcode[error.errno]


def begin(bounding=0, permitted=0, effective=0, inheritable=0, ambient=0):
    return {"bounding": bounding, "effective": effective, "permitted": permitted, "inheritable": inheritable,
            "ambient": ambient}


NOROOT = capabilities.SECBIT_NOROOT
TABLE = {
    "root gets the bounding set": (begin(A | B), None, {}, (A | B, A | B, 0)),
    "and the inheritable set": (begin(A, B, 0, B), None, {}, (A | B, A | B, 0)),
    "root with noroot": (begin(A | B, A, A), None, {"securebits": NOROOT}, (0, 0, 0)),
    "noroot and ambient": (begin(A | B, A, 0, A, A), None, {"securebits": NOROOT}, (A, A, A)),
    "root that gets no more": (begin(A | B, A, A), None, {"no_new_privs": True}, (A, A, 0)),
    "nobody": (begin(A | B, A, A, A), None, {"uid": NOBODY}, (0, 0, 0)),
    "ambient": (begin(A | B, A, 0, A, A), None, {"uid": NOBODY}, (A, A, A)),
    "file": (begin(A | B), FileCaps(A), {"uid": NOBODY}, (A, 0, 0)),
    "file, on": (begin(A | B), FileCaps(A, 0, True), {"uid": NOBODY}, (A, A, 0)),
    "file over bounding": (begin(B), FileCaps(A | B), {"uid": NOBODY}, (B, 0, 0)),
    "file over bounding, on": (begin(B), FileCaps(A | B, 0, True), {"uid": NOBODY}, "EPERM"),
    "file, no new": (begin(A | B), FileCaps(A, 0, True), {"uid": NOBODY, "no_new_privs": True}, (0, 0, 0)),
    "file, none new": (begin(A | B, A), FileCaps(A, 0, True), {"uid": NOBODY, "no_new_privs": True}, (A, A, 0)),
    "inherited": (begin(A, B, 0, B), FileCaps(A, B, True), {"uid": NOBODY}, (A | B, A | B, 0)),
    "inherited over bounding": (begin(0, B, 0, B), FileCaps(0, B | C, True), {"uid": NOBODY}, (B, B, 0)),
    "a file ends ambient": (begin(A | B, A, 0, A, A), FileCaps(B), {"uid": NOBODY}, (B, 0, 0)),
    "an empty file ends ambient": (begin(A | B, A, 0, A, A), FileCaps(), {"uid": NOBODY}, (0, 0, 0)),
    "root overrules a file": (begin(A | B), FileCaps(A), {}, (A | B, A | B, 0)),
    "setuid root": (begin(A | B), None, {"uid": NOBODY, "setuid": 0}, (A | B, A | B, 0)),
    "setuid root ends ambient": (begin(A | B, A, 0, A, A), None, {"uid": NOBODY, "setuid": 0}, (A | B, A | B, 0)),
    "setuid root with a file": (begin(A | B), FileCaps(A), {"uid": NOBODY, "setuid": 0}, (A, 0, 0)),
    "setuid root, no new": (begin(A | B), None, {"uid": NOBODY, "setuid": 0, "no_new_privs": True}, (0, 0, 0)),
    "setuid root, no new, ambient": (
        begin(A | B, A, 0, A, A), None, {"uid": NOBODY, "setuid": 0, "no_new_privs": True}, (A, A, A)),
    "root becomes nobody": (begin(A | B, A, A), None, {"setuid": NOBODY}, (A | B, 0, 0)),
}


def prepared(program, file, setuid):
    if setuid is not None:
        os.chown(program, setuid, 0)
        os.chmod(program, 0o4755)
    if file:
        capabilities.write_file(program, file)


@pytest.mark.parametrize("name", TABLE)
def test_the_sets_after_execve(name, program):
    before, file, state, wanted = TABLE[name]
    prepared(program, file, state.get("setuid"))
    found = after(program, before, **{key: value for key, value in state.items() if key != "setuid"})
    assert found == foretold(before, file, **state)
    if isinstance(found, dict):
        assert (found["permitted"], found["effective"], found["ambient"]) == wanted
        assert (found["bounding"], found["inheritable"]) == (before["bounding"], before["inheritable"])
    else:
        assert found == wanted


def some(random):
    return random.getrandbits(3) * A & A | random.getrandbits(1) * B | random.getrandbits(1) * C


def test_the_sets_after_execve_in_a_hundred_states(program):
    random = Random(6)
    for _ in range(100):
        permitted, inheritable = some(random), some(random)
        before = begin(some(random), permitted, permitted & some(random), inheritable,
                       permitted & inheritable & some(random))
        file = FileCaps(some(random), some(random), random.random() < 0.5) if random.random() < 0.7 else None
        state = {"uid": random.choice([0, NOBODY]), "securebits": random.choice([0, NOROOT]),
                 "no_new_privs": random.random() < 0.3}
        setuid = random.choice([None, None, 0, NOBODY])
        os.chown(program, setuid or 0, 0)
        os.chmod(program, 0o755 if setuid is None else 0o4755)
        if file:
            capabilities.write_file(program, file)
        assert after(program, before, **state) == foretold(before, file, setuid=setuid, **state), (before, file, state)


def test_a_nosuid_mount_makes_a_files_capabilities_count_for_nothing(program, tmp_path):
    capabilities.write_file(program, FileCaps(A, 0, True))
    folder = os.path.dirname(program)
    with mounts.bind(folder, str(tmp_path)):
        syscalls.mount_setattr(syscalls.AT_FDCWD, str(tmp_path), attr_set=syscalls.MOUNT_ATTR_NOSUID)
        before = begin(A | B, B, 0, B, B)
        state = {"sets": before, "uid": NOBODY}

        def from_there():
            # nobody may not walk through pytest's folder
            return exec_by(os.open(f"{tmp_path}/cat", os.O_RDONLY), state)

        found = capabilities.from_status(process.call(from_there))
    assert found == capabilities.after_exec(before, None, uid=NOBODY)
    assert found["permitted"] == B


def exec_by(fd, state):
    capabilities.assume(**state)
    return subprocess.check_output([f"/proc/self/fd/{fd}", "/proc/self/status"], text=True, pass_fds=[fd])


def test_a_start_as_setpriv_makes_it(program):
    told = subprocess.check_output(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all,+net_bind_service,+chown",
         "--inh-caps=-all,+net_bind_service", "--ambient-caps=-all,+net_bind_service", program, "/proc/self/status"],
        text=True)
    assert capabilities.from_status(told) == after(program, begin(A | B, B, 0, B, B), uid=NOBODY)


@pytest.mark.parametrize("securebits", [0, NOROOT, capabilities.SECBIT_NO_CAP_AMBIENT_RAISE,
                                        capabilities.SECBIT_NO_SETUID_FIXUP, NOROOT | capabilities.SECBIT_KEEP_CAPS])
def test_a_process_begins_as_it_was_asked_to(securebits):
    state = begin(A | B, B, B, B | C, B)

    def look():
        capabilities.assume(state, NOBODY, securebits, no_new_privs=True)
        bits = syscalls.prctl(capabilities.PR_GET_SECUREBITS)
        return capabilities.of(), bits, syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS), os.getresuid(), os.getresgid()

    assert process.call(look) == [state, securebits, 1, [NOBODY] * 3, [NOBODY] * 3]


def test_what_cannot_be_put_on_is_an_error_and_nothing_is_run(tmp_path):
    ran = tmp_path / "ran"
    state = begin(A, 0, B)  # effective beyond permitted
    with pytest.raises(ChildFailed, match=r"^capset: Operation not permitted$"):
        process.spawn(["touch", str(ran)], first=lambda: capabilities.assume(state))
    assert not ran.exists()


# What a change of the uid does.

KEEP, NO_FIXUP = capabilities.SECBIT_KEEP_CAPS, capabilities.SECBIT_NO_SETUID_FIXUP


def change_ids(before, old, new, securebits):
    capabilities.assume(before)
    syscalls.prctl(capabilities.PR_SET_SECUREBITS, securebits | NO_FIXUP)
    os.setresuid(*old)
    syscalls.prctl(capabilities.PR_SET_SECUREBITS, securebits)
    os.setresuid(*new)
    return capabilities.of()


@pytest.mark.parametrize("securebits", [0, KEEP, NO_FIXUP])
@pytest.mark.parametrize(("old", "new"), [
    ((0, 0, 0), (1, 1, 1)), ((0, 0, 0), (0, 1, 0)), ((0, 1, 0), (0, 0, 0)), ((0, 1, 1), (1, 1, 1)),
    ((0, 0, 0), (1, 0, 1)), ((1, 0, 1), (1, 1, 1)), ((1, 1, 1), (2, 2, 2)), ((1, 1, 1), (0, 0, 0))])
def test_the_sets_after_setresuid(old, new, securebits):
    base = capabilities.parse(["SETUID", "SETPCAP", "CHOWN"])
    before = begin(sets()["bounding"], base, base, A, A)
    found = process.call(change_ids, before, old, new, securebits)
    assert found == capabilities.after_setuid(before, old, new, securebits)
