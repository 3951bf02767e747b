"""The lab machine's file system on this machine's kernel: what a command sees there, and that nothing of it stays."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from vm import native
from vm.image import image

LOOK = """
ps -o comm= 1; hostname; uname -r; . /etc/os-release; echo $VERSION_CODENAME; cat /proc/self/cgroup | grep ^0:
stat -fc %T /sys/fs/cgroup; ip -br link; ls lab /etc/labs-machine; findmnt -no propagation /
"""


@pytest.fixture(scope="module")
def place():
    with native.native(image()) as made:
        if os.geteuid():
            assert made is None  # every test goes to the lab machine
            pytest.skip("only root runs it")
        assert made
        yield made
    assert not made.disk.parent.exists()


def run(place, *argv):
    with place.tree.open("rb") as tree:
        return subprocess.run(place.command(*argv), stdin=tree, capture_output=True, text=True)


def traces():
    """The loop devices, the cgroups and the mounts that a run makes."""
    loops = subprocess.run(["losetup", "--all", "--list", "-nO", "BACK-FILE"], capture_output=True, text=True).stdout
    groups = [str(path) for path in Path("/sys/fs/cgroup").rglob("labs-native.*")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if "/loop" in line]
    return [line for line in loops.splitlines() if f"native-{os.getpid()}-" in line], groups, mounts


def test_it_is_the_machines_file_system_on_our_kernel(place):
    before = traces()
    done = run(place, "sh", "-euc", LOOK)
    lines = done.stdout.splitlines()
    assert lines[:6] == ["catatonit", "lab", os.uname().release, "trixie", "0::/tests", "cgroup2fs"], done.stderr
    assert lines[6].split()[:1] == ["lo"] and lines[7:] == ["/etc/labs-machine", "lab", "shared"]
    assert traces() == before


def test_a_commands_status_is_ours_and_what_it_leaves_ends_with_it(place):
    before = traces()
    done = run(place, "sh", "-c", "mkdir /sys/fs/cgroup/left; setsid sleep 600 >/dev/null 2>&1 & exit 7")
    assert done.returncode == 7, done.stderr
    assert traces() == before


def test_what_a_killed_run_leaves_is_removed_by_the_next(place):
    before = traces()
    argv = place.command("sh", "-c", "echo here; exec sleep 600")
    how = {"stdin": place.tree.open("rb"), "stdout": subprocess.PIPE, "start_new_session": True}
    with how["stdin"], subprocess.Popen(argv, **how) as process:
        assert process.stdout.read(5) == b"here\n"
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while traces()[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert traces()[1] != before[1]
    assert run(place, "true").returncode == 0
    assert traces() == before


def test_what_is_collected_for_the_machine_comes_with_everybodys_bytecode(place):
    files, bytecode = place.collect("tests/test_cgroup.py", "tests/test_mounts.py")
    assert files == ["tests/test_cgroup.py"]
    names = subprocess.run(["tar", "-tf", "-"], input=bytecode, capture_output=True, check=True).stdout.decode().split()
    assert any(name.startswith("./tests/__pycache__/test_mounts.cpython-") for name in names)


def test_what_cannot_be_collected_is_told(place):
    with pytest.raises(native.LabError, match=r"cannot be collected:\n.*no_such_test"):
        place.collect("tests/no_such_test.py")


def test_where_the_kernel_does_not_run_it_the_machine_does(tmp_path, capsys):
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    with native.native(tmp_path) as made:
        assert made is None
    assert os.geteuid() or "every test goes to the lab machine" in capsys.readouterr().out
