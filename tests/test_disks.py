"""labs.disks: small disks as df, findmnt and losetup see them; full ones, and limits that hold."""

import errno
import os
import subprocess
import sys

import pytest

from labs import disks, machine, process
from labs.errors import BadInput, ChildFailed

MIB = 1 << 20


def said(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def loops():
    return said("losetup", "--list", "--noheadings", "--output=BACK-FILE").split()


def write(path, size):
    """Write until it is done or refused: the bytes written, and the error."""
    done = 0
    try:
        with open(path, "wb", buffering=0) as file:
            while done < size:
                done += file.write(bytes(min(64 << 10, size - done)))
            os.fsync(file.fileno())
    except OSError as error:
        return done, error.errno
    return done, None


@pytest.mark.parametrize(("kind", "size"), [("ext4", 16 * MIB), ("btrfs", 64 * MIB)])
def test_a_disk_is_mounted_and_gone(kind, size):
    with disks.disk(size, kind) as disk:
        assert said("findmnt", "-no", "FSTYPE,SOURCE", disk.path).split() == [kind, disk.device]
        assert said("losetup", "-nO", "BACK-FILE", disk.device) == disk.file
        assert os.stat(disk.file).st_size == size
        assert write(f"{disk.path}/some", MIB) == (MIB, None)
    assert not os.path.exists(os.path.dirname(disk.file))
    process.until(lambda: disk.file not in loops())


def test_one_that_is_full_says_so_and_another_does_not_notice():
    with disks.disk(8 * MIB) as small, disks.disk(8 * MIB) as other:
        written, why = write(f"{small.path}/all", 64 * MIB)
        assert why == errno.ENOSPC and 0 < written < 8 * MIB
        assert write(f"{small.path}/more", 1) == (0, errno.ENOSPC)
        assert write(f"{other.path}/some", MIB) == (MIB, None)


def test_a_project_holds_what_it_may_and_the_rest_of_the_disk_is_free():
    with disks.disk(32 * MIB) as disk:
        for name in ("a", "b"):
            os.mkdir(f"{disk.path}/{name}")
        disks.limit(f"{disk.path}/a", 1, 2 * MIB)
        disks.limit(f"{disk.path}/b", 2, 4 * MIB)
        os.makedirs(f"{disk.path}/a/deep/er")
        written, why = write(f"{disk.path}/a/deep/er/file", 8 * MIB)
        assert why == errno.ENOSPC and MIB < written <= 2 * MIB
        assert write(f"{disk.path}/b/file", 3 * MIB) == (3 * MIB, None)
        assert disks.usage(disk.path, 1).limit == 2 * MIB >= disks.usage(disk.path, 1).used >= written
        size = int(said("df", "--block-size=1", "--output=size", f"{disk.path}/b").split()[-1])
        assert size == 4 * MIB == disks.usage(disk.path, 2).limit  # statfs(2) of a limited directory
        disks.limit(f"{disk.path}/a", 1, 0)
        assert write(f"{disk.path}/a/again", 8 * MIB) == (8 * MIB, None)


@pytest.mark.parametrize(("options", "line"), [
    ({"size": 100}, r"^size: 100: ext4 needs 4194304 bytes at least$"),
    ({"size": 8 * MIB, "kind": "fat"}, r"^kind: 'fat': must be one of ext4, btrfs$")])
def test_bad_input(options, line):
    with pytest.raises(BadInput, match=line), disks.disk(**options):
        pass


def test_a_mount_that_is_refused_leaves_nothing():
    before = loops()
    with pytest.raises(ChildFailed, match="mount"), disks.disk(8 * MIB, options="nosuchoption"):
        pass
    assert loops() == before
    assert [name for name in os.listdir(machine.DATA) if name.startswith("labs-disk")] == []


KILLED = """
import os
from labs import disks
with disks.disk(8 << 20) as disk:
    print(disk.path, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_program_leaves_a_mount_that_takes_its_loop_device_along():
    path = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False).stdout.strip()
    file = f"{os.path.dirname(path)}/file"
    assert file in loops()
    subprocess.run(["umount", path], check=True)
    process.until(lambda: file not in loops())
    machine.remove_tree(os.path.dirname(path))
