"""The map of a container's mounts: what it says agrees with findmnt(8), and with what becomes of a write."""

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from labs import container, machine, mountmap, mounts, process, syscalls
from labs.container import Bind, Container
from labs.errors import BadInput, KernelError
from labs.syscalls import CLONE_NEWNS, MS_BIND, MS_PRIVATE, MS_SHARED, MS_SLAVE

CONF = "/etc/app.conf"


@pytest.fixture
def place(tmp_path):
    """A tmpfs of its own: data/, file and a second file system in data/usb."""
    with mounts.tmpfs(str(tmp_path)), ExitStack() as stack:
        (tmp_path / "data" / "usb").mkdir(parents=True)
        (tmp_path / "file").write_text("old\n")
        stack.enter_context(mounts.tmpfs(str(tmp_path / "data" / "usb")))
        yield tmp_path


@pytest.fixture
def box(place):
    """A container that has data twice, once read-only, and the file."""
    binds = [Bind(f"{place}/data", "/data"), Bind(f"{place}/data", "/safe", readonly=True), Bind(f"{place}/file", CONF)]
    with Container(["sleep", "1000"], mounts=binds) as box:
        process.until(lambda: box.exec(["test", "-s", CONF]).code == 0)
        yield box


def by_target(pid):
    return {place.row.target: place for place in mountmap.places(pid)}


def test_origins(box, place):
    found = by_target(box.pid)
    told = {target: (found[target].kind, found[target].origin, found[target].readonly)
            for target in ("/", "/data", "/data/usb", "/safe", "/safe/usb", CONF, "/dev/shm", "/proc", "/sys")}
    assert told == {
        "/": (mountmap.LAYER, box.upper, False),
        "/data": (mountmap.HOST, f"{place}/data", False), "/data/usb": (mountmap.HOST, f"{place}/data/usb", False),
        "/safe": (mountmap.HOST, f"{place}/data", True), "/safe/usb": (mountmap.HOST, f"{place}/data/usb", True),
        CONF: (mountmap.HOST, f"{place}/file", False), "/dev/shm": (mountmap.MEMORY, "", False),
        "/proc": (mountmap.KERNEL, "", False), "/sys": (mountmap.KERNEL, "", True)}
    assert found["/proc/keys"].kind == mountmap.COVER
    assert found["/data/usb"].depth == found["/data"].depth + 1 == found["/"].depth + 2


def test_every_mount_is_there_once(box):
    listed = subprocess.run(["findmnt", "--task", str(box.pid), "--list", "--noheadings", "--output", "TARGET"],
                            capture_output=True, text=True, check=True).stdout.split()
    assert sorted(place.row.target for place in mountmap.places(box.pid)) == sorted(listed)


@pytest.mark.parametrize("path", ["/tmp/x", "/data/x", "/data/usb/x", "/link/x", "/data/out", CONF])
def test_a_write_lands_where_the_map_says(box, place, path):
    box.exec(["ln", "-s", "/data", "/link"])
    os.symlink("/tmp/out", f"{place}/data/out")
    told = mountmap.lands(box.pid, path)
    assert told.where
    assert box.exec(["sh", "-c", f"echo written > {path}"]).code == 0
    assert Path(told.where).read_text() == "written\n"
    assert mountmap.lands(box.pid, path).where == told.where


@pytest.mark.parametrize("path", ["/safe/x", "/safe/usb/x", "/proc/sys/kernel/hostname", "/sys/x"])
def test_a_write_that_is_refused(box, path):
    assert mountmap.lands(box.pid, path)[2:4] == (mountmap.REFUSED, "")
    assert "Read-only file system" in box.exec(["sh", "-c", f"echo > {path}"]).stderr


def test_a_read_only_root():
    with Container(["sleep", "1000"], readonly=True) as box:
        process.until(lambda: by_target(box.pid)["/"].readonly)
        assert mountmap.lands(box.pid, "/tmp/x").kind == mountmap.REFUSED


def test_memory_is_the_containers_own(box):
    assert mountmap.lands(box.pid, "/dev/shm/x") == ("/dev/shm/x", "/dev/shm", mountmap.MEMORY, "", False)


def test_no_such_directory(box):
    with pytest.raises(KernelError, match="openat2: No such file"):
        mountmap.lands(box.pid, "/no/such")


def test_a_file_that_was_replaced(box, place):
    (place / "new").write_text("new\n")
    (place / "new").rename(place / "file")
    assert by_target(box.pid)[CONF].origin == f"{place}/file (deleted)"
    assert mountmap.lands(box.pid, CONF).where == f"{place}/file (deleted)"
    assert f"← {place}/file (deleted)" in mountmap.draw(box.pid).alt


def test_a_host_path_that_something_else_covers_is_not_named(box, place):
    with mounts.tmpfs(str(place / "data")):
        assert by_target(box.pid)["/data"].origin == ""
    assert by_target(box.pid)["/data"].origin == f"{place}/data"


def test_a_write_that_the_host_does_not_see(box, place):
    os.mkdir(place / "data" / "late")
    with mounts.tmpfs(str(place / "data" / "late")):
        told = mountmap.lands(box.pid, "/data/late/x")
        assert (told.where, told.covered) == (f"{place}/data/late/x", True)
        assert mountmap.draw(box.pid, ["/data/late/x"]).alt.endswith("/late/x (under another mount there)")
        assert box.exec(["touch", "/data/late/x"]).code == 0
        assert os.listdir(place / "data" / "late") == []
    assert os.listdir(place / "data" / "late") == ["x"]
    assert not mountmap.lands(box.pid, "/data/late/x").covered


def test_draw(box, place):
    picture = mountmap.draw(box.pid, ["/tmp/x", "/safe/x", "/dev/shm/x"])
    lines = picture.alt.splitlines()
    assert lines[1] == f"/ (overlay, rw) ← {machine.DATA}/labs-c-…/upper [private]"
    assert f"  /safe (tmpfs, ro) ← {place}/data [private]" in lines
    assert not any(line.lstrip().startswith("/proc") for line in lines)
    assert lines[-4:] == ["Where a write lands",
                          f"/tmp/x → the container's own layer: {machine.DATA}/labs-c-…/upper/tmp/x",
                          "/safe/x → refused: read-only", "/dev/shm/x → memory, gone with the container"]
    assert all(part in picture.html for part in ("<strong>/safe</strong>", f"← {place}/data/usb", "refused"))
    assert picture == mountmap.draw(box.pid, ["/tmp/x", "/safe/x", "/dev/shm/x"])
    whole = mountmap.draw(box.pid, whole=True).alt
    assert "  /proc (proc, rw) ← the kernel [private]" in whole.splitlines()
    assert "of the kernel's own" not in whole


def test_names_are_escaped(place):
    (place / "<b>").mkdir()
    with Container(["sleep", "1000"], mounts=[(f"{place}/<b>", "/<i>")]) as box:
        process.until(lambda: "/<i>" in by_target(box.pid))
        assert "<i>" not in mountmap.draw(box.pid, ["/<i>/x"]).html


def test_a_process_without_mounts():
    def jailed():
        os.chroot(machine.ROOTFS["busybox"])
        signal.pause()

    with process.fork(jailed) as child:
        process.until(lambda: not mounts.table(child.pid))
        with pytest.raises(BadInput, match="^pid: "):
            mountmap.places(child.pid)


@pytest.fixture
def rooms(place):
    """A shared mount, and children in mount namespaces of their own in which it is shared, slave and private."""
    path = str(place / "data")
    with ExitStack() as stack:
        syscalls.mount(path, path, None, MS_BIND)
        stack.callback(syscalls.umount2, path, syscalls.MNT_DETACH)
        syscalls.mount(None, path, None, MS_SHARED)
        pids = {}
        for name, kind in (("shared", MS_SHARED), ("slave", MS_SLAVE), ("private", MS_PRIVATE)):
            def steps(kind=kind):
                syscalls.unshare(CLONE_NEWNS)
                syscalls.mount(None, path, None, kind)
                signal.raise_signal(signal.SIGSTOP)

            child = stack.enter_context(process.fork(steps))
            process.until(lambda child=child: process.status(child.pid).state == "T")
            pids[name] = child.pid
        yield path, pids


def test_propagation(rooms):
    path, pids = rooms
    assert mountmap.propagation(path, {"host": os.getpid(), **pids}).alt.splitlines() == [
        "Mount propagation", "host, shared A → shared, shared A", "host, shared A → slave, slave of A",
        "shared, shared A → host, shared A", "shared, shared A → slave, slave of A"]


def test_propagation_is_what_the_kernel_does(rooms):
    path, pids = rooms
    os.mkdir(f"{path}/late")
    with mounts.tmpfs(f"{path}/late"):
        seen = [name for name, pid in pids.items() if any(row.target == f"{path}/late" for row in mounts.table(pid))]
    assert seen == ["shared", "slave"]


def test_a_slave_is_told_with_its_master_on_the_host(rooms):
    path, pids = rooms
    (line,) = [line for line in mountmap.draw(pids["slave"]).alt.splitlines() if line.lstrip().startswith(f"{path} ")]
    assert line.endswith(f"(with the host's {path})]")
    assert "[slave of " in line


def test_a_target_that_is_a_link_is_followed_inside_the_container(place):
    evil = place / "layer"
    (evil / "aim").mkdir(parents=True)
    (evil / "aim.conf").write_text("")
    os.symlink("../../../aim", evil / "target")
    os.symlink("/aim.conf", evil / "conf")
    binds = [(f"{place}/data", "/target"), (f"{place}/file", "/conf")]
    shown = container.run(["sh", "-c", "ls /aim; cat /aim.conf"], rootfs=["busybox", str(evil)], mounts=binds)
    assert (shown.stdout, shown.stderr) == ("usb\nold\n", "")
