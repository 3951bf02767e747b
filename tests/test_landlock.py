"""Landlock as the kernel does it, against setpriv(1), and that a wall which cannot be had is not built half."""

import errno
import os
import signal
import socket
import subprocess

import pytest

from labs import capabilities, landlock, process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError
from labs.landlock import ALL, TRIALS

EVERYWHERE = ["/usr", "/lib", "/lib64", "/bin"]
SETPRIV = {"EXECUTE": "execute", "WRITE_FILE": "write-file", "READ_FILE": "read-file", "READ_DIR": "read-dir",
           "REMOVE_FILE": "remove-file", "REMOVE_DIR": "remove-dir", "MAKE_DIR": "make-dir", "MAKE_REG": "make-reg",
           "MAKE_SYM": "make-sym", "MAKE_FIFO": "make-fifo", "REFER": "refer", "TRUNCATE": "truncate"}
# What a shell does for each, in a folder that landlock.prepare made.
SHELL = {"EXECUTE": "./program", "WRITE_FILE": ": >>file", "READ_FILE": "read x <file", "READ_DIR": "ls .",
         "REMOVE_FILE": "rm file", "REMOVE_DIR": "rmdir empty", "MAKE_DIR": "mkdir new", "MAKE_REG": ": >new",
         "MAKE_SYM": "ln -s file new", "MAKE_FIFO": "mkfifo new", "REFER": "ln file empty/file",
         "TRUNCATE": "truncate -s 0 file"}


def tried(confine, *acts):
    """What each act ends with in a child that has confined itself."""
    def child():
        confine()
        return [landlock.outcome(act) for act in acts]
    return process.call(child)


def test_names_have_the_bits_of_the_header():
    assert landlock.mask(["LANDLOCK_ACCESS_FS_REFER"]) == landlock.mask(["REFER"]) == 1 << 13
    assert landlock.mask(["IOCTL_DEV", "EXECUTE"]) == 1 << 15 | 1
    assert landlock.names(3, landlock.NET) == ["BIND_TCP", "CONNECT_TCP"]
    assert landlock.names(3, landlock.SCOPE) == ["ABSTRACT_UNIX_SOCKET", "SIGNAL"]
    header = subprocess.run(["cpp", "-dM", "-include", "linux/landlock.h", "/dev/null"], capture_output=True, text=True,
                            check=True).stdout
    defined = {words[1] for words in map(str.split, header.splitlines()) if "(1ULL" in words[2:]}
    assert defined == {*landlock.FS, *landlock.NET, *landlock.SCOPE}
    for family in (landlock.FS, landlock.NET, landlock.SCOPE):
        for name in family:
            assert f"#define {name} (1ULL << {family.index(name)})" in " ".join(header.split())


@pytest.mark.parametrize("name", ["FILE", "read_file", "", "LANDLOCK_ACCESS_FS_", "MAKE"])
def test_what_is_no_right_is_refused(name):
    with pytest.raises(BadInput, match="must be a name of <linux/landlock.h>"):
        landlock.mask([name])


def test_the_versions_of_the_interface():
    counts = [(landlock.known(version).bit_count(), landlock.known(version, landlock.NET).bit_count(),
               landlock.known(version, landlock.SCOPE).bit_count()) for version in range(1, 8)]
    assert counts == [(13, 0, 0), (14, 0, 0), (15, 0, 0), (15, 2, 0), (16, 2, 0), (16, 2, 2), (16, 2, 2)]


def test_every_right_of_the_file_system_has_a_trial():
    assert [trial.right for trial in TRIALS] == [landlock.short(name) for name in landlock.FS]


@pytest.mark.parametrize("trial", TRIALS, ids=[trial.right for trial in TRIALS])
def test_each_right_is_a_door_of_its_own(trial, tmp_path):
    folder, own = str(tmp_path / "made"), landlock.mask([trial.right])
    refused = "EXDEV" if trial.right == "REFER" else "EACCES"
    assert landlock.attempt(trial, ALL, ALL, folder) == "ok"
    assert landlock.attempt(trial, ALL, ALL & ~own, folder) == refused
    assert landlock.attempt(trial, own, 0, folder) == refused
    # A right that is handled nowhere stays free, but for REFER, which every ruleset denies: landlock(7).
    assert landlock.attempt(trial, ALL & ~own, ALL & ~own, folder) == ("EXDEV" if trial.right == "REFER" else "ok")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("right", SETPRIV)
def test_setpriv_builds_the_same_wall(right, tmp_path):
    """A ruleset of one right, with and without the rule that allows it, ours and util-linux's."""
    def theirs(folder, *rule):
        landlock.prepare(folder)
        command = ["setpriv", "--no-new-privs", f"--landlock-access=fs:{SETPRIV[right]}", *rule,
                   "sh", "-c", f"cd {folder}; {SHELL[right]}"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def ours(folder, *allowed):
        def confined():
            with landlock.Ruleset(landlock.mask([right])) as ruleset:
                for path in allowed:
                    ruleset.allow(path, landlock.mask([right]))
                syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
                ruleset.restrict()
            os.chdir(folder)
            return subprocess.run(["/bin/sh", "-c", SHELL[right]], capture_output=True, check=False).returncode == 0

        landlock.prepare(folder)
        return process.call(confined)

    folder, programs = str(tmp_path / "made"), ["/usr"] if right in ("EXECUTE", "READ_FILE") else []
    rules = [f"--landlock-rule=path-beneath:{SETPRIV[right]}:{path}" for path in programs]
    assert not theirs(folder, *rules)
    assert not ours(folder, *programs)
    rules.append(f"--landlock-rule=path-beneath:{SETPRIV[right]}:{tmp_path}")
    assert theirs(folder, *rules)
    assert ours(folder, *programs, str(tmp_path))


def test_restrict_leaves_only_what_was_asked_for(tmp_path):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    read, write = str(tmp_path / "in"), str(tmp_path / "out")

    def acts():
        yield (tmp_path / "in/file").read_text
        yield lambda: (tmp_path / "in/file").write_text("y")
        yield lambda: (tmp_path / "out/new").write_text("y")
        yield lambda: (tmp_path / "out/new").rename(tmp_path / "out/old")
        yield lambda: (tmp_path / "out/old").rename(tmp_path / "in/old")
        yield lambda: os.listdir("/")
        yield lambda: process.spawn(["/bin/true"]).wait()

    confine = lambda: landlock.restrict(read=[read], write=[write], execute=EVERYWHERE)  # noqa: E731
    assert tried(confine, *acts()) == ["ok", "EACCES", "ok", "ok", "EACCES", "EACCES", "ok"]
    assert (tmp_path / "in/file").read_text() == "x"


def test_one_file_may_be_given(tmp_path):
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").write_text("x")
    acts = [(tmp_path / name).read_text for name in ("one", "two")] + [lambda: (tmp_path / "one").write_text("y")]
    assert tried(lambda: landlock.restrict(read=[str(tmp_path / "one")]), *acts) == ["ok", "EACCES", "EACCES"]
    assert tried(lambda: landlock.restrict(write=[str(tmp_path / "one")]), *acts) == ["ok", "EACCES", "ok"]


def test_children_inherit_and_a_second_ruleset_only_takes_away(tmp_path):
    (tmp_path / "file").write_text("x")
    read = (tmp_path / "file").read_text

    def child():
        landlock.restrict(execute=EVERYWHERE)
        first = landlock.outcome(read)
        landlock.restrict(read=["/"], execute=EVERYWHERE)  # which by itself would allow it
        cat = subprocess.run(["/bin/cat", str(tmp_path / "file")], capture_output=True, check=False)
        return first, landlock.outcome(read), cat.returncode

    assert process.call(child) == ["EACCES", "EACCES", 1]
    assert tried(lambda: landlock.restrict(read=["/"]), read) == ["ok"]


def test_rights_of_different_heights_add_up_in_one_ruleset(tmp_path):
    (tmp_path / "file").write_text("x")

    def confine():
        with landlock.Ruleset(ALL) as ruleset:
            ruleset.allow(str(tmp_path.parent), landlock.mask(["READ_FILE"]))
            ruleset.allow(str(tmp_path), landlock.mask(["WRITE_FILE"]))
            ruleset.restrict()

    flags = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
    acts = [lambda flag=flag: os.close(os.open(tmp_path / "file", flag)) for flag in flags]
    assert tried(confine, *acts, lambda: os.listdir(tmp_path)) == ["ok", "ok", "ok", "EACCES"]


def test_what_was_open_before_stays_open(tmp_path):
    (tmp_path / "file").write_text("x")
    with (tmp_path / "file").open() as file:
        assert tried(landlock.restrict, lambda: os.read(file.fileno(), 1), (tmp_path / "file").read_text) == [
            "ok", "EACCES"]


def test_what_has_no_right_stays_free_and_mounts_are_denied(tmp_path):
    (tmp_path / "file").write_text("x")
    acts = [lambda: os.stat(tmp_path / "file"), lambda: os.chmod(tmp_path / "file", 0o600),
            lambda: syscalls.mount("tmpfs", tmp_path, "tmpfs")]
    assert tried(landlock.restrict, *acts) == ["ok", "ok", "EPERM"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_without_no_new_privs_an_ordinary_process_may_not():
    def as_nobody(no_new_privs):
        capabilities.assume({}, uid=65534, no_new_privs=no_new_privs)
        with landlock.Ruleset(ALL) as ruleset:
            return landlock.outcome(ruleset.restrict)

    assert process.call(as_nobody, False) == "EPERM"
    assert process.call(as_nobody, True) == "ok"


def dial(port, host="127.0.0.1"):
    with socket.socket() as caller:
        caller.connect((host, port))


def test_ports_of_tcp():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [server.getsockname()[1] for server in (one, two)]
        acts = [lambda port=port: dial(port) for port in ports]
        bind = lambda: socket.create_server(("127.0.0.1", 0)).close()  # noqa: E731
        assert tried(lambda: landlock.restrict(connect=ports[:1]), *acts, bind) == ["ok", "EACCES", "ok"]
        assert tried(lambda: landlock.restrict(bind=[]), *acts, bind) == ["ok", "ok", "EACCES"]
        assert tried(lambda: landlock.restrict(bind=[0]), bind) == ["ok"]
        udp = lambda: socket.socket(type=socket.SOCK_DGRAM).connect(("127.0.0.1", ports[1]))  # noqa: E731
        assert tried(lambda: landlock.restrict(connect=[]), udp) == ["ok"]


@pytest.mark.machine  # version 6, Linux 6.12
def test_signals_and_abstract_sockets_outside_the_domain():
    with socket.socket(socket.AF_UNIX) as server, process.spawn(["sleep", "60"]) as other:
        server.bind("\0labs-landlock")
        server.listen()
        def call():
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect("\0labs-landlock")
        acts = [call, lambda: os.kill(other.pid, 0), lambda: os.kill(os.getpid(), 0)]
        assert tried(lambda: landlock.restrict(scoped=["SIGNAL"]), *acts) == ["ok", "EPERM", "ok"]
        assert tried(lambda: landlock.restrict(scoped=["ABSTRACT_UNIX_SOCKET"]), *acts) == ["EPERM", "ok", "ok"]
        assert other.stop(signal.SIGKILL).signal == signal.SIGKILL


def test_a_process_outside_the_domain_cannot_be_traced():
    with process.spawn(["sleep", "60"]) as other:
        look = lambda: os.readlink(f"/proc/{other.pid}/root")  # noqa: E731
        assert tried(lambda: landlock.restrict(read=["/"]), look) == ["EACCES"]
        assert tried(bool, look) == ["ok"]


def test_nothing_is_given_up_when_a_path_is_not_there():
    def child():
        with pytest.raises(KernelError) as caught:
            landlock.restrict(read=["/nonexistent"])
        return caught.value.errno, landlock.outcome(lambda: os.listdir("/")), syscalls.prctl(
            syscalls.PR_GET_NO_NEW_PRIVS)

    assert process.call(child) == [errno.ENOENT, "ok", 0]


@pytest.mark.parametrize(("version", "given", "said"), [
    (3, {"connect": [80]}, "'CONNECT_TCP': needs version 4 of Landlock, this kernel has 3"),
    (5, {"scoped": ["SIGNAL"]}, "'SIGNAL': needs version 6 of Landlock, this kernel has 5"),
    (0, {"read": ["/"]}, "needs version 1 of Landlock, this kernel has 0"),
])
def test_an_older_kernel_is_told_apart_before_anything_is_given_up(monkeypatch, version, given, said):
    monkeypatch.setattr(landlock, "abi", lambda: version)

    def child():
        with pytest.raises(BadInput) as caught:
            landlock.restrict(**given)
        return str(caught.value).replace("LANDLOCK_ACCESS_NET_", "").replace("LANDLOCK_SCOPE_", ""), syscalls.prctl(
            syscalls.PR_GET_NO_NEW_PRIVS), landlock.outcome(lambda: os.listdir("/"))

    told, no_new_privs, listed = process.call(child)
    assert said in told
    assert (no_new_privs, listed) == (0, "ok")


def test_an_older_kernel_is_asked_only_for_the_rights_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(landlock, "abi", lambda: 1)
    (tmp_path / "file").write_text("text")
    truncate = lambda: os.truncate(tmp_path / "file", 0)  # noqa: E731
    write = lambda: landlock.restrict(write=[str(tmp_path)])  # noqa: E731
    assert tried(write, truncate, lambda: os.listdir("/")) == ["ok", "EACCES"]
    assert tried(lambda: landlock.restrict(read=[str(tmp_path)]), truncate) == ["ok"]  # a right of version 3


def test_what_may_be_written_may_be_moved_within(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/file").write_text("x")
    move = lambda: (tmp_path / "a/file").rename(tmp_path / "b/file")  # noqa: E731
    assert tried(lambda: landlock.restrict(write=[str(tmp_path)]), move) == ["ok"]


def test_a_kernel_without_landlock_has_version_0(monkeypatch):
    def refuse(number):
        def call(*_):
            raise KernelError("landlock_create_ruleset", number)
        return call
    for number in (errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(syscalls, "landlock_create_ruleset", refuse(number))
        assert landlock.abi() == 0
    monkeypatch.setattr(syscalls, "landlock_create_ruleset", refuse(errno.EPERM))
    with pytest.raises(KernelError):
        landlock.abi()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(port):
    with pytest.raises(BadInput, match="must be from 0 to 65535"), landlock.Ruleset(0, 3) as ruleset:
        ruleset.allow_port(port, 1)


def test_what_the_kernel_refuses_of_a_ruleset(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(KernelError, match="landlock_create_ruleset: No message"):
        landlock.Ruleset()
    with landlock.Ruleset(landlock.READ) as ruleset:
        with pytest.raises(KernelError, match="landlock_add_rule: Invalid argument"):
            ruleset.allow(str(tmp_path), landlock.mask(["WRITE_FILE"]))  # not handled
        with pytest.raises(KernelError, match="landlock_add_rule: Invalid argument"):
            ruleset.allow(str(tmp_path / "file"), landlock.mask(["READ_DIR"]))  # of a directory
        with pytest.raises(KernelError, match="landlock_add_rule: No message"):
            ruleset.allow(str(tmp_path), 0)


def test_a_confined_program_does_not_start_when_its_wall_cannot_be_built():
    with pytest.raises((KernelError, ChildFailed)):
        process.spawn(["true"], first=lambda: landlock.restrict(read=["/nonexistent"]))
