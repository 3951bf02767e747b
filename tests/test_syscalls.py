"""labs.syscalls against the headers, and against what mount(8), findmnt(8) and unshare(1) do."""

import errno
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from labs import process, syscalls
from labs.errors import ChildFailed, KernelError

HEADERS = ("mount.h", "sched.h", "prctl.h", "capability.h", "fs.h")


def in_mount_namespace(fn):
    """fn's answer in a child with a private mount namespace."""
    def child():
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        return fn()
    return process.call(child)


def findmnt(path, column):
    command = ["findmnt", "-n", "-o", column, "--mountpoint", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("call", ["pivot_root", "bpf", "open_tree", "move_mount", "clone3", "mount_setattr"])
def test_numbers_are_those_of_the_machines_header(monkeypatch, call, machine):
    header = Path(f"/usr/include/{machine}-linux-gnu/asm/unistd_64.h")
    monkeypatch.setattr(syscalls, "MACHINE", machine)
    assert f"#define __NR_{call} {syscalls.number(call)}\n" in header.read_text(encoding="utf-8")


def test_an_unknown_machine_is_refused_and_not_guessed(monkeypatch):
    monkeypatch.setattr(syscalls, "MACHINE", "m68k")
    with pytest.raises(KernelError, match="clone3 on m68k") as caught:
        syscalls.number("clone3")
    assert caught.value.errno == errno.ENOSYS


def test_clone_flags_are_those_of_the_standard_library():
    names = [name for name in dir(os) if name.startswith("CLONE_NEW")]
    assert len(names) == 8
    assert {name: getattr(os, name) for name in names} == {name: getattr(syscalls, name) for name in names}


def test_mount_and_umount2_are_seen_by_findmnt(tmp_path):
    def child():
        syscalls.mount("labs", tmp_path, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "size=1m")
        mounted = [findmnt(tmp_path, "FSTYPE"), findmnt(tmp_path, "VFS-OPTIONS")]
        syscalls.umount2(tmp_path)
        return [*mounted, findmnt(tmp_path, "FSTYPE")]
    assert in_mount_namespace(child) == ["tmpfs", "rw,nosuid,noexec,relatime", ""]


def test_an_error_names_call_errno_and_path():
    with pytest.raises(KernelError) as caught:
        syscalls.umount2("/nowhere")
    assert (caught.value.step, caught.value.errno, caught.value.path) == ("umount2", errno.ENOENT, "/nowhere")
    assert str(caught.value) == "umount2: No such file or directory"


def test_umount2_detaches_a_busy_mount(tmp_path):
    def child():
        syscalls.mount("labs", tmp_path, "tmpfs")
        busy = os.open(f"{tmp_path}/file", os.O_CREAT | os.O_WRONLY)
        try:
            syscalls.umount2(tmp_path)
        except OSError as error:
            refused = error.errno
        syscalls.umount2(tmp_path, syscalls.MNT_DETACH)
        os.close(busy)
        return [refused, findmnt(tmp_path, "FSTYPE")]
    assert in_mount_namespace(child) == [errno.EBUSY, ""]


def test_pivot_root_makes_another_directory_the_root(tmp_path):
    (tmp_path / "here").write_text("new root")
    def child():
        syscalls.mount(tmp_path, tmp_path, None, syscalls.MS_BIND)
        os.chdir(tmp_path)
        syscalls.pivot_root(".", ".")
        syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")
        return os.listdir("/")
    assert in_mount_namespace(child) == ["here"]


def test_open_tree_mount_setattr_move_mount_give_a_read_only_copy(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    def child():
        tree = syscalls.open_tree(source)
        syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_RDONLY)
        syscalls.move_mount(tree, target)
        try:
            os.mkdir(target / "x")
        except OSError as error:
            return [error.errno, findmnt(target, "VFS-OPTIONS").split(",")[0]]
    assert in_mount_namespace(child) == [errno.EROFS, "ro"]


def test_unshare_and_setns_move_a_child_and_not_the_caller():
    before = os.readlink("/proc/self/ns/uts")
    def child():
        old = os.open("/proc/self/ns/uts", os.O_RDONLY)
        seen = [os.readlink("/proc/self/ns/uts")]
        syscalls.unshare(syscalls.CLONE_NEWUTS)
        syscalls.sethostname("renamed")
        seen += [os.readlink("/proc/self/ns/uts"), socket.gethostname()]
        syscalls.setns(old, syscalls.CLONE_NEWUTS)
        return [*seen, os.readlink("/proc/self/ns/uts")]
    first, unshared, name, back = process.call(child)
    assert (first, name, back) == (before, "renamed", before)
    assert unshared != before
    assert os.readlink("/proc/self/ns/uts") == before
    assert socket.gethostname() != "renamed"


def test_clone3_starts_a_child_in_a_new_pid_namespace():
    def child():
        pid = syscalls.clone3(syscalls.CLONE_NEWPID)
        if pid == 0:
            os._exit(40 + os.getpid())
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert process.call(child) == 41


def test_clone3_refuses_flags_that_exclude_each_other():
    def child():
        syscalls.clone3(syscalls.CLONE_NEWNS | 0x200)  # CLONE_FS
    with pytest.raises(ChildFailed, match="clone3: Invalid argument"):
        process.call(child)


def test_prctl_sets_the_name_that_proc_shows():
    def child():
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        return [syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS), process.status_fields(os.getpid())["NoNewPrivs"]]
    assert process.call(child) == [1, "1"]
    assert syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS) == 0


def test_capget_and_capset_agree_with_proc():
    def child():
        def masks(sets):
            return [sets.effective, sets.permitted, sets.inheritable]
        sets = syscalls.capget()
        syscalls.capset(syscalls.Capabilities(sets.effective & ~1, sets.permitted, sets.inheritable))
        fields = process.status_fields(os.getpid())
        shown = [int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapInh")]
        return [masks(sets), masks(syscalls.capget()), shown]
    before, after, shown = process.call(child)
    assert after == shown
    assert after[0] == before[0] & ~1
    assert before[0] & 1


def test_sethostname_refuses_more_than_64_bytes():
    def child():
        syscalls.unshare(syscalls.CLONE_NEWUTS)
        syscalls.sethostname("x" * 65)
    with pytest.raises(ChildFailed, match="sethostname: Invalid argument"):
        process.call(child)


def test_bpf_refuses_a_program_that_is_none():
    with pytest.raises(KernelError, match="bpf"):
        syscalls.bpf(syscalls.BPF_PROG_LOAD, bytes(64))


def test_constants_are_those_of_the_kernels_headers():
    text = "\n".join(Path("/usr/include/linux", name).read_text(encoding="utf-8") for name in HEADERS)
    defined = dict(re.findall(r"#\s*define\s+(\w+)\s+\(?(0x[0-9a-fA-F]+|\d+)U?L*\)?\s", text))
    known = {name for name in defined if isinstance(getattr(syscalls, name, None), int)}
    assert len(known) > 25, "the headers were not understood"
    assert {n: int(defined[n], 0) for n in known} == {n: getattr(syscalls, n) for n in known}
