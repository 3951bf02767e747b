"""labs.namespaces against lsns(8), nsenter(1), unshare(1)."""

import json
import os
import socket
import subprocess

import pytest

from labs import machine, mounts, namespaces, process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError

LONG = {"uts": "uts", "pid": "pid", "mnt": "mount", "net": "net", "ipc": "ipc", "user": "user", "cgroup": "cgroup",
        "time": "time"}


@pytest.fixture
def stranger():
    """A sleeping process in namespaces of its own, all but pid, user and time."""
    with process.spawn(["unshare", "--uts", "--mount", "--net", "--ipc", "--cgroup", "sleep", "1000"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        yield child.pid


def test_of_agrees_with_lsns(stranger):
    shown = json.loads(subprocess.run(["lsns", "-J", "-o", "NS,TYPE", "-p", str(stranger)], capture_output=True,
                                      text=True, check=True).stdout)["namespaces"]
    assert {row["type"]: row["ns"] for row in shown} == {k: n.inode for k, n in namespaces.of(stranger).items()}


def test_same_tells_what_is_shared(stranger):
    shared = {kind for kind, same in namespaces.same("self", stranger).items() if same}
    assert shared == {"pid", "user", "time"}
    assert all(namespaces.same(os.getpid(), "self").values())


@pytest.mark.parametrize("kind", ["uts", "mnt", "net", "ipc", "cgroup"])
def test_hold_keeps_a_namespace_after_its_last_process(kind):
    with process.spawn(["unshare", f"--{LONG[kind]}", "sleep", "1000"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        inode = namespaces.of(child.pid)[kind].inode
        with namespaces.hold(child.pid, kind) as path:
            child.stop(grace=20)
            assert os.stat(path).st_ino == inode
            entered = subprocess.run(["nsenter", f"--{LONG[kind]}={path}", "readlink", f"/proc/self/ns/{kind}"],
                                     capture_output=True, text=True, check=True)
            assert entered.stdout == f"{kind}:[{inode}]\n"
    assert not [m for m in mounts.table() if m.target.startswith(machine.STATE)]
    assert os.listdir(f"{machine.STATE}/ns") == []


def test_two_holds_at_a_time(stranger):
    with namespaces.hold(stranger, "uts") as first, namespaces.hold(stranger, "ipc") as second:
        assert os.stat(first).st_ino == namespaces.of(stranger)["uts"].inode
        assert os.stat(second).st_ino == namespaces.of(stranger)["ipc"].inode


def test_hold_refuses_a_mount_namespace_that_would_make_a_loop():
    with pytest.raises(KernelError, match="mount: Invalid argument"), namespaces.hold(os.getpid(), "mnt"):
        pass
    assert os.listdir(f"{machine.STATE}/ns") == []


def test_call_in_sees_what_nsenter_sees(stranger):
    before = namespaces.of()
    subprocess.run(["nsenter", "-t", str(stranger), "--uts", "hostname", "stranger"], check=True)
    assert namespaces.call_in(stranger, ["uts"], socket.gethostname) == "stranger"
    assert socket.gethostname() != "stranger"
    links = [name for _, name in namespaces.call_in(stranger, ["net"], socket.if_nameindex)]
    enter = ["nsenter", "-t", str(stranger), "--net", "ip", "-br", "link"]
    shown = subprocess.run(enter, capture_output=True, text=True, check=True).stdout.splitlines()
    assert links == [line.split()[0].split("@")[0] for line in shown]
    assert namespaces.of() == before


def test_call_in_a_pid_namespace_needs_a_further_fork():
    command = ["unshare", "--pid", "--fork", "--mount-proc", "sleep", "1000"]
    with process.spawn(command) as child:
        sleeper = process.until(lambda: [c.pid for c in process.tree(child.pid).children if c.name == "sleep"])[0]
        pids = namespaces.call_in(sleeper, ["pid", "mnt"], process.pids)
        assert pids == [1, 2]
        assert namespaces.call_in(sleeper, ["pid", "mnt"], process.cmdline, 1) == ["sleep", "1000"]
        os.kill(sleeper, 9)
        child.wait(20)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(BadInput, match="kind: 'mount': must be one of uts pid mnt net ipc user cgroup time"):
        namespaces.flags(["mount"])


def test_a_process_that_is_gone():
    with process.spawn(["true"]) as child:
        child.wait(20)
    with pytest.raises(FileNotFoundError):
        namespaces.of(child.pid)
    with pytest.raises(ChildFailed, match="No such process"):
        namespaces.call_in(child.pid, ["uts"], os.getpid)


def test_flags_are_the_bits_that_unshare_takes():
    def child():
        syscalls.unshare(namespaces.flags(["uts", "ipc"]))
        return [kind for kind, same in namespaces.same("self", os.getppid()).items() if not same]
    assert process.call(child) == ["uts", "ipc"]


def test_write_maps_make_root_inside_another_user_outside():
    reader, writer = os.pipe()
    def child():
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(writer, b"!")
        process.until(lambda: os.getuid() == 0)
        process.execute(["sleep", "1000"])
    with process.fork(child) as sleeper:
        assert os.read(reader, 1) == b"!"
        namespaces.write_maps(sleeper.pid, [(0, 0, 1), (1, 100_000, 10)], [(0, 0, 1)])
        process.until(lambda: process.status(sleeper.pid).name == "sleep")
        assert namespaces.maps(sleeper.pid) == ([(0, 0, 1), (1, 100_000, 10)], [(0, 0, 1)], "deny")
        inside = subprocess.run(["nsenter", "-t", str(sleeper.pid), "-U", "cat", "/proc/self/uid_map"],
                                capture_output=True, text=True, check=True)
        assert [line.split() for line in inside.stdout.splitlines()] == [["0", "0", "1"], ["1", "100000", "10"]]
        with pytest.raises(KernelError, match=r"write .*: Operation not permitted"):
            namespaces.write_maps(sleeper.pid, [(0, 0, 1)], [(0, 0, 1)])
    os.close(reader)
    os.close(writer)


def test_maps_of_this_machine():
    assert namespaces.maps().uid[0] == (0, 0, 4294967295)
