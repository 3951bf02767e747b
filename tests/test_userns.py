"""labs.userns: maps against the kernel's own answer, lent ranges against getsubids(1), trials against who is asked."""

import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from labs import machine, namespaces, process, syscalls, userns
from labs.errors import BadInput, ChildFailed, KernelError

AS_LEARNER = ["setpriv", "--reuid=learner", "--regid=learner", "--clear-groups", "env", "USER=learner"]


def kernel(rows):
    """What the kernel says to a map written by the host's root: "ok" or an errno's name."""
    with userns.held() as pid:
        try:
            namespaces.write_maps(pid, rows, [(0, 0, 1)], setgroups="allow")
        except KernelError as error:
            return errno.errorcode[error.errno]
    return "ok"


@pytest.mark.parametrize(("rows", "said"), [
    ([], "uid_map: '0 rows': must have 1 to 340"),
    ([(n, n, 1) for n in range(341)], "'341 rows': must have"),
    ([(0, 1000, 0)], "'0 1000 0': the third number, how many, must be 1 or more"),
    ([(-1, 1000, 1)], "'-1 1000 1': ids must lie from 0 to 4294967294"),
    ([(0, 2**32 - 1, 1)], "'0 4294967295 1': ids must lie"),
    ([(0, 2**32 - 2, 2)], "'0 4294967294 2': ids must lie"),
    ([(0, 1000, 2), (1, 5000, 1)], "'1 5000 1': overlaps '0 1000 2' inside"),
    ([(0, 1000, 2), (2, 1001, 1)], "'2 1001 1': overlaps '0 1000 2' outside"),
    ([(5, 5000, 10), (20, 6000, 1), (0, 7000, 6)], "'0 7000 6': overlaps '5 5000 10' inside"),
])
def test_what_check_refuses_the_kernel_refuses(rows, said):
    with pytest.raises(BadInput) as caught:
        userns.check(rows)
    assert said in str(caught.value)
    assert kernel(rows) == "EINVAL"


@pytest.mark.parametrize("rows", [
    [(0, 0, 2**32 - 1)], [(0, 2**32 - 2, 1)], [(0, 1000, 1), (1, 100_000, 65_536)], [(n, n, 1) for n in range(340)],
])
def test_what_check_takes_the_kernel_takes(rows):
    assert userns.check(rows) == rows
    assert kernel(rows) == "ok"


def test_check_and_kernel_agree_on_random_maps():
    dice = random.Random(6)
    for _ in range(60):
        rows = [(dice.randrange(20), dice.randrange(20), dice.randrange(8)) for _ in range(dice.randrange(1, 4))]
        try:
            own = "ok" if userns.check(rows) else ""
        except BadInput:
            own = "EINVAL"
        assert own == kernel(rows), rows


def test_lent_is_what_getsubids_lists():
    for option, path in ((), "/etc/subuid"), (("-g",), "/etc/subgid"):
        listed = subprocess.run(["getsubids", *option, "learner"], capture_output=True, text=True, check=True).stdout
        expected = [tuple(map(int, line.split()[2:])) for line in listed.splitlines()]
        assert userns.lent("learner", path) == expected != []


def test_lent_by_name_and_by_number(tmp_path):
    file = tmp_path / "subuid"
    file.write_text("# lent\n\nlearner:100000:10\nroot:5:5\n1000:300000:20\n")
    assert userns.lent("learner", str(file)) == [(100_000, 10), (300_000, 20)]
    assert userns.rootless_map("learner", str(file)) == [(0, 1000, 1), (1, 100_000, 10), (11, 300_000, 20)]
    assert userns.lent("daemon", str(file)) == []


@pytest.mark.parametrize("line", ["learner:100000", "learner;100000;65536", "learner:100000:many", "learner:-1:5"])
def test_a_line_that_lends_nothing_is_named(line, tmp_path):
    file = tmp_path / "subuid"
    file.write_text(f"root:1:1\n{line}\n")
    with pytest.raises(BadInput, match=r"subuid line 2: .*must be NAME:FIRST:COUNT"):
        userns.lent("learner", str(file))


@pytest.mark.machine
def test_rootless_map_is_what_podman_makes():
    podman = [*AS_LEARNER, f"HOME={os.path.expanduser('~learner')}", "XDG_RUNTIME_DIR=/run/user/1000", "podman"]
    try:
        for kind in ("uid", "gid"):
            words = [*podman, "unshare", "cat", f"/proc/self/{kind}_map"]
            said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            rows = [tuple(map(int, line.split())) for line in said.splitlines()]
            assert userns.rootless_map("learner", f"/etc/sub{kind}") == rows
    finally:
        subprocess.run([*podman, "system", "migrate"], check=True)


def test_newuidmap_writes_the_rootless_map_and_not_one_id_more():
    rows = userns.rootless_map("learner")
    words = [str(number) for row in rows for number in row]
    with userns.held() as pid:
        ask = [*AS_LEARNER, "newuidmap", str(pid)]
        more = subprocess.run([*ask, *words[:-1], "65537"], capture_output=True, text=True)
        assert "not allowed" in more.stderr and namespaces.maps(pid).uid == []
        subprocess.run([*ask, *words], check=True)
        assert namespaces.maps(pid).uid == rows


def test_held_is_the_users_and_ends():
    with userns.held(groups=[60]) as pid:
        status = process.status_fields(pid)
        assert status["Uid"].split() == ["1000"] * 4 and status["Groups"] == "60"
        assert namespaces.maps(pid) == ([], [], "allow")
        assert not namespaces.same("self", pid)["user"]
        assert os.stat(f"/proc/{pid}/uid_map").st_uid == 1000
    assert not os.path.exists(f"/proc/{pid}")
    with userns.held(new=False) as pid:
        assert namespaces.same("self", pid)["user"]


def test_held_says_what_the_kernel_refused():
    def inside():
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        with pytest.raises(ChildFailed) as caught, userns.held():
            pass
        return str(caught.value)
    assert "Operation not permitted" in process.call(inside)


def test_owner_of_namespaces():
    here = os.stat("/proc/self/ns/user").st_ino
    with userns.held() as pid:
        assert userns.maker(pid) == 1000
        assert userns.owner(pid, "user").inode == here
        assert userns.owner(pid, "net") == userns.owner("self", "net")
        assert userns.owner("self", "uts").inode == here
        namespaces.write_maps(pid, [(0, 1000, 1)], [(0, 1000, 1)])

        def inside():
            userns.enter(pid)
            syscalls.unshare(syscalls.CLONE_NEWNET)
            return [userns.owner("self", "net"), userns.maker("self"), os.stat("/proc/self/ns/user").st_ino]
        (inode, uid), maker, own = process.call(inside)
        assert (inode, uid, maker) == (own, 0, 0)  # as root inside sees its own maker


def test_owner_above_ones_own_is_nobodys_business():
    with userns.held() as pid:
        namespaces.write_maps(pid, [(0, 1000, 1)], [(0, 1000, 1)])

        def inside():
            userns.enter(pid)
            return userns.owner("self", "net")
        with pytest.raises(ChildFailed, match="Operation not permitted"):
            process.call(inside)


@pytest.fixture(scope="module")
def root():
    """A process whose user namespace has the map of rootless engines."""
    rows = userns.rootless_map("learner")
    with userns.held() as pid:
        namespaces.write_maps(pid, rows, rows, setgroups="allow")
        yield pid


NEVER = ("EPERM", "EPERM", "EPERM")
OWNED = ("EPERM", "EPERM", "ok")
# what is tried → as learner, as root of his user namespace, and there in namespaces of its own
ANSWERS = {
    "setuid": ("EPERM", "ok", "ok"),
    "chroot": ("EPERM", "ok", "ok"),
    "raw socket": OWNED,
    "set lo up": OWNED,
    "bind port 80": ("EACCES", "EACCES", "ok"),
    "write net.ipv4.ip_default_ttl": ("EACCES", "EACCES", "ok"),
    "sethostname": OWNED,
    "mount tmpfs": OWNED,
    "mount overlay": OWNED,
    "mount proc": OWNED,
    "reboot, wrong magic": ("EPERM", "EPERM", "EINVAL"),
    "mount ext4": NEVER,
    "make a device node": NEVER,
    "adjtimex, the same tick": NEVER,
    "raise a hard limit": NEVER,
    "ask the kernel log": NEVER,
    "nice -1": ("EACCES", "EACCES", "EACCES"),
    "write kernel.panic": ("EACCES", "EACCES", "EACCES"),
    "chmod a file of the host's root": NEVER,
    "read a file of the host's root": ("EACCES", "EACCES", "EACCES"),
    "chown own file to a mapped id": ("EPERM", "ok", "ok"),
    "chown own file to an unmapped id": ("EPERM", "EINVAL", "EINVAL"),
    "setuid to an unmapped id": ("EPERM", "EINVAL", "EINVAL"),
    "look into own uid's process": ("ok", "EACCES", "EACCES"),
    "signal own uid's process": ("ok", "ok", "ESRCH"),
}
MODULE = "init_module, no module"


def answers(trial, root):
    return (userns.attempt(trial.prepare), userns.attempt(trial.prepare, root),
            userns.attempt(trial.prepare, root, userns.OWN))


@pytest.mark.parametrize("trial", [one for one in userns.TRIALS if one.what != MODULE], ids=lambda one: one.what)
def test_trial(trial, root):
    assert answers(trial, root) == ANSWERS[trial.what]


@pytest.mark.machine
def test_no_module_is_loaded(root):
    trial, = [one for one in userns.TRIALS if one.what == MODULE]
    assert answers(trial, root) == NEVER


def test_what_is_asked_fits_the_answers():
    """Whoever asks the initial user namespace never says yes; an owner says it where the namespace is one's own."""
    for trial in userns.TRIALS:
        _, alone, own = ANSWERS.get(trial.what, NEVER)
        if trial.asks == userns.INITIAL:
            assert {alone, own} <= set(userns.REFUSED), trial.what
        if trial.asks.startswith("owner of "):
            assert alone in userns.REFUSED and own not in userns.REFUSED, trial.what


def test_the_host_s_root_is_not_refused_where_it_can_be_tried():
    """An answer is about who asks: root in namespaces of his own may do what no user namespace gives."""
    def as_root(what):
        trial, = [one for one in userns.TRIALS if one.what == what]
        folder = f"{machine.STATE}/{machine.new_name('t')}"
        os.makedirs(f"{folder}/mnt")
        def inside():
            os.chdir(folder)
            syscalls.unshare(namespaces.flags(userns.OWN))
            try:
                trial.prepare()()
            except OSError as error:
                return errno.errorcode[error.errno]
            return "ok"
        try:
            return process.call(inside)
        finally:
            shutil.rmtree(folder)
    assert as_root("make a device node") == "ok"
    assert as_root("mount ext4") not in userns.REFUSED


VAIN = {"LINUX_IMMUTABLE", "IPC_LOCK", "SYS_RAWIO", "SYS_PACCT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
        "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND",
        "AUDIT_READ", "PERFMON", "BPF"}


def test_in_vain(root):
    """SYS_MODULE is one of them where the kernel has modules."""
    found = {name[4:]: answer for name, answer in userns.in_vain(root).items()}
    assert set(found) - {"SYS_MODULE"} == VAIN
    assert found["AUDIT_WRITE"] == "ECONNREFUSED" and found["BLOCK_SUSPEND"] == "flag lost"


@pytest.mark.machine
def test_setting_comes_back():
    path = Path("/proc/sys/user/max_user_namespaces")
    before = path.read_text()
    with pytest.raises(KeyError), userns.setting("user/max_user_namespaces", "0"):
        assert path.read_text() == "0\n"
        with pytest.raises(ChildFailed, match="No space left on device"), userns.held():
            pass
        raise KeyError
    assert path.read_text() == before


@pytest.mark.machine
def test_a_daemon_that_remaps_and_leaves_the_other_one_alone():
    with userns.remapping_dockerd("learner") as address:
        words = ["docker", "--host", address, "info", "--format", "{{.DockerRootDir}} {{.SecurityOptions}}"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "/100000.100000 " in said and "name=userns" in said
    assert not Path(address.removeprefix("unix://")).exists()
    assert "docker0" in os.listdir("/sys/class/net")
