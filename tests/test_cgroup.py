"""labs.cgroup and labs.devices against the files that the kernel writes.

The classes named Limits need the controllers; the rest runs wherever cgroup v2 is mounted.
"""

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from labs import cgroup, container, devices, machine, process
from labs.errors import BadInput, KernelError, Timeout


@pytest.mark.parametrize(("text", "size"), [
    (4096, 4096), ("4096", 4096), ("64M", 67108864), ("64m", 67108864), ("64MB", 67108864), ("64MiB", 67108864),
    ("1.5k", 1536), ("2G", 2 << 30), ("0", 0), ("10B", 10)])
def test_sizes(text, size):
    assert cgroup.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "64Q", "-1", "sixty", "6 4", "inf", "nan", None])
def test_sizes_that_are_none(text):
    with pytest.raises(BadInput, match=r"^memory: ") as caught:
        cgroup.parse_size(text, "memory")
    assert (caught.value.field, caught.value.value) == ("memory", text)


def test_limits_become_files():
    assert cgroup.limits("64M", "1k", 0.5, 7) == {"memory.max": "67108864", "memory.swap.max": "1024",
                                                  "cpu.max": "50000 100000", "pids.max": "7"}
    assert cgroup.limits(memory=4096) == {"memory.max": "4096", "memory.swap.max": "0"}
    assert cgroup.limits() == {}


@pytest.mark.parametrize("cpus", [0, -1, "two"])
def test_cpus_must_be_a_number_above_zero(cpus):
    with pytest.raises(BadInput, match="cpus"):
        cgroup.limits(cpus=cpus)


def test_create_makes_a_directory_and_delete_removes_it():
    with cgroup.create("labs-g-test") as group:
        assert os.path.isdir("/sys/fs/cgroup/labs/labs-g-test")
        assert group.procs() == []
        assert group.events() == {"populated": 0, "frozen": 0}
        with pytest.raises(BadInput, match="already there"):
            cgroup.create("labs-g-test")
    assert not os.path.exists(group.path)
    group.delete()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x"])
def test_a_name_must_stay_in_its_directory(name):
    with pytest.raises(BadInput, match="name"):
        cgroup.create(name)


def test_of_finds_the_group_of_a_process():
    with cgroup.create() as group, process.spawn(["sleep", "100"]) as child:
        group.add(child.pid)
        assert cgroup.of(child.pid).path == group.path
        assert group.procs() == [child.pid]
        assert group.events()["populated"] == 1


def test_delete_kills_what_is_left_also_in_groups_below():
    with process.spawn(["sleep", "100"]) as one, process.spawn(["sleep", "100"]) as two:
        with cgroup.create() as group, cgroup.create("below", group) as below:
            group.add(one.pid)
            below.add(two.pid)
            assert [child.name for child in group.children()] == ["below"]
            group.delete()
        assert one.wait(20).signal == two.wait(20).signal == signal.SIGKILL
    assert not os.path.exists(group.path)


def test_freeze_stands_still_and_kill_works_on_the_frozen():
    count = "i=0; while :; do i=$((i+1)); echo $i > $0; done"
    ticks = Path(f"/run/{machine.new_name('t')}")
    try:
        with process.spawn(["sh", "-c", count, str(ticks)]) as child, cgroup.create() as group:
            group.add(child.pid)
            process.until(lambda: ticks.exists() and ticks.read_text().strip())
            group.freeze()
            assert group.events()["frozen"] == 1
            before = group.keyed("cpu.stat")["usage_usec"]
            time.sleep(0.2)
            assert group.keyed("cpu.stat")["usage_usec"] == before
            group.thaw()
            process.until(lambda: group.keyed("cpu.stat")["usage_usec"] > before)
            group.freeze()
            group.kill()
            assert child.wait(20).signal == signal.SIGKILL
    finally:
        ticks.unlink()


def test_waiting_for_an_event_has_a_deadline():
    with cgroup.create() as group, pytest.raises(Timeout, match="populated 1"):
        group.wait_event("populated", 1, 0.05)


def test_a_refused_write_names_file_and_value_and_leaves_no_group():
    with pytest.raises(KernelError, match=r"^write cgroup.max.depth 'deep': Invalid argument$") as caught:
        cgroup.create("labs-g-refused", files={"cgroup.max.depth": "deep"})
    assert caught.value.path == "/sys/fs/cgroup/labs/labs-g-refused/cgroup.max.depth"
    assert (caught.value.errno, caught.value.value) == (errno.EINVAL, "deep")
    assert not os.path.exists("/sys/fs/cgroup/labs/labs-g-refused")


def test_reading_what_is_not_there():
    with cgroup.create() as group, pytest.raises(KernelError, match=r"read no\.file: No such file"):
        group.read("no.file")


def test_pressure_has_the_files_numbers():
    with cgroup.create() as group:
        shown = group.read("cpu.pressure").splitlines()
        pressure = group.pressure("cpu")
        assert [line.split()[0] for line in shown] == list(pressure)
        assert f"some avg10={pressure['some'].avg10:.2f} avg60=" in shown[0]


def test_device_number_is_that_of_the_whole_disk():
    number = cgroup.device_number("/")
    assert os.path.exists(f"/sys/dev/block/{number}")
    assert not os.path.exists(f"/sys/dev/block/{number}/partition")


@pytest.mark.parametrize("rule", ["", "c", "c 1:3", "x 1:3 rwm", "c 1 rwm", "c 1:3 rwx", "c a:b r"])
def test_a_broken_device_rule(rule):
    with pytest.raises(BadInput, match="devices"):
        devices.parse(rule)


def test_device_rules_are_parsed():
    assert vars(devices.parse("c 1:3 rwm")) == {"kind": 2, "major": 1, "minor": 3, "access": 7, "allow": True}
    assert vars(devices.parse("b *:* m")) == {"kind": 1, "major": None, "minor": None, "access": 1, "allow": True}


def open_devices(group, attempts):
    """The errnos (0 for success) of opening devices in a child in the group."""
    def child():
        group.add(os.getpid())
        answers = []
        for path, flags in attempts:
            try:
                os.close(os.open(path, flags))
                answers.append(0)
            except OSError as error:
                answers.append(error.errno)
        return answers
    return process.call(child)


def test_devices_allow_what_the_rules_say_and_nothing_else():
    attempts = [("/dev/null", os.O_RDWR), ("/dev/zero", os.O_RDONLY), ("/dev/zero", os.O_RDWR),
                ("/dev/full", os.O_RDONLY)]
    with cgroup.create() as group:
        assert open_devices(group, attempts) == [0, 0, 0, 0]
        group.devices(["c 1:3 rw", "c 1:5 r", "b 1:7 rwm"])
        assert open_devices(group, attempts) == [0, 0, errno.EPERM, errno.EPERM]
    with cgroup.create() as group:
        group.devices(["c 1:* rw"])
        assert open_devices(group, attempts) == [0, 0, 0, 0]
    with cgroup.create() as group:
        group.devices([])
        assert open_devices(group, attempts) == [errno.EPERM] * 4


def test_mknod_is_asked_for_too(tmp_path):
    node = tmp_path / "node"
    def make(group):
        def child():
            group.add(os.getpid())
            os.mknod(node, 0o020600, os.makedev(1, 3))
            os.unlink(node)
        return process.call(child)
    with cgroup.create() as group:
        group.devices(["c *:* m"])
        make(group)
    with cgroup.create() as group:
        group.devices(["c 1:5 m", "c 1:3 rw"])
        with pytest.raises(Exception, match="Operation not permitted"):
            make(group)


def test_the_default_rules_are_those_of_runc():
    with container.Container(["sleep", "1000"]) as box:
        answers = {}
        for path in ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/tty", "/dev/ptmx"):
            answers[path] = box.exec(["sh", "-c", f"exec 3<{path}"]).stderr
        refused = box.exec(["sh", "-c", "mknod /kmsg c 1 11 && exec 3</kmsg"])
    assert "not permitted" in refused.stderr
    assert {path for path, error in answers.items() if "not permitted" in error} == set()


@pytest.mark.machine
class TestLimits:
    """What the controllers do."""

    def test_top_offers_the_controllers_to_its_children(self):
        cgroup.top()
        for group in ("/sys/fs/cgroup", machine.CGROUP):
            enabled = Path(group, "cgroup.subtree_control").read_text(encoding="utf-8").split()
            assert set(cgroup.CONTROLLERS) <= set(enabled)
        assert Path(machine.CGROUP, "cgroup.procs").read_text(encoding="utf-8") == ""

    def test_limits_stand_in_the_files(self):
        with cgroup.create(memory="32M", swap="8M", cpus=0.25, pids=9, files={"cpu.weight": 50}) as group:
            files = ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cpu.weight")
            shown = [Path(group.path, name).read_text(encoding="utf-8").strip() for name in files]
            assert shown == ["33554432", "8388608", "25000 100000", "9", "50"]

    def test_a_group_with_a_domain_controller_below_takes_no_process(self):
        with cgroup.create() as group, process.spawn(["sleep", "100"]) as child:
            group.enable(["memory"])
            with pytest.raises(KernelError, match=r"write cgroup\.procs .*busy") as caught:
                group.add(child.pid)
            assert caught.value.errno == errno.EBUSY

    @pytest.mark.parametrize(("limits", "text"), [
        ({"pids": -5}, "write pids.max '-5': Invalid argument"),
        ({"cpus": 0.00001}, "write cpu.max '1 100000': Invalid argument"),
        ({"files": {"memory.max": "much"}}, "write memory.max 'much': Invalid argument")])
    def test_limits_that_the_kernel_refuses(self, limits, text):
        with pytest.raises(KernelError) as caught:
            cgroup.create("labs-g-refused", **limits)
        assert str(caught.value) == text
        assert not os.path.exists("/sys/fs/cgroup/labs/labs-g-refused")

    def test_pids_max_stops_a_fork(self):
        def child(path):
            cgroup.Cgroup(path).add(os.getpid())
            return subprocess.run(["true"], check=False).returncode
        with cgroup.create(pids=1) as group:
            with pytest.raises(Exception, match="Resource temporarily unavailable"):
                process.call(child, group.path)
            assert group.keyed("pids.events")["max"] >= 1
