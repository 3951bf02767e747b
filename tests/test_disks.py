"""labs.disks: small disks as df, findmnt and losetup see them; full ones, and limits that hold."""

import errno
import os
import subprocess
import sys

import pytest

from labs import disks, machine, mounts, process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError

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


@pytest.mark.parametrize(("kind", "size"), [("ext4", 16 * MIB), ("btrfs", 64 * MIB), ("xfs", 320 * MIB)])
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
        assert write(f"{small.path}/more", MIB)[1] == errno.ENOSPC
        assert write(f"{other.path}/some", MIB) == (MIB, None)


@pytest.mark.machine
@pytest.mark.parametrize(("kind", "size"), [("ext4", 32 * MIB), ("xfs", 320 * MIB)])
def test_a_project_holds_what_it_may_and_the_rest_of_the_disk_is_free(kind, size):
    with disks.disk(size, kind, quota=True) as disk:
        for name in ("a", "b"):
            os.mkdir(f"{disk.path}/{name}")
        disks.limit(f"{disk.path}/a", 1, 2 * MIB)
        disks.limit(f"{disk.path}/b", 2, 4 * MIB)
        os.makedirs(f"{disk.path}/a/deep/er")
        written, why = process.call(held, f"{disk.path}/a/deep/er/file", 8 * MIB)
        assert why == (errno.EDQUOT if kind == "ext4" else errno.ENOSPC) and MIB < written <= 2 * MIB
        assert process.call(held, f"{disk.path}/b/file", 3 * MIB) == [3 * MIB, None]
        assert disks.usage(disk.path, 1).limit == 2 * MIB >= disks.usage(disk.path, 1).used >= written
        blocks = int(said("df", "--block-size=1", "--output=size", f"{disk.path}/b").split()[-1])
        assert blocks == 4 * MIB == disks.usage(disk.path, 2).limit  # statfs(2) of a limited directory
        assert reported(disk.path) == {number: disks.usage(disk.path, number) for number in (1, 2)}
        disks.limit(f"{disk.path}/a", 1, 0)
        assert process.call(held, f"{disk.path}/a/again", 8 * MIB) == [8 * MIB, None]


def held(path, size):
    """The same as a container's root without CAP_SYS_RESOURCE, capabilities(7): in a child."""
    sets = syscalls.capget()
    sets.effective &= ~(1 << 24)
    syscalls.capset(sets)
    return write(path, size)


@pytest.mark.machine
def test_who_has_the_capability_for_it_is_not_held_on_ext4():
    with disks.disk(16 * MIB, quota=True) as disk:
        os.mkdir(f"{disk.path}/a")
        disks.limit(f"{disk.path}/a", 1, 2 * MIB)
        assert write(f"{disk.path}/a/file", 4 * MIB) == (4 * MIB, None)
        assert disks.usage(disk.path, 1).used > disks.usage(disk.path, 1).limit


def reported(path):
    """The same from repquota(8): project -> used and limit in bytes."""
    rows = [line.split() for line in said("repquota", "-P", "-n", "-v", path).splitlines() if line.startswith("#")]
    return {int(row[0][1:]): (int(row[2]) * 1024, int(row[4]) * 1024) for row in rows if row[0] != "#0"}


@pytest.mark.machine
def test_what_was_there_before_the_limit_is_not_counted():
    with disks.disk(16 * MIB, quota=True) as disk:
        os.mkdir(f"{disk.path}/a")
        assert write(f"{disk.path}/a/old", 4 * MIB) == (4 * MIB, None)
        disks.limit(f"{disk.path}/a", 7, 2 * MIB)
        assert disks.usage(disk.path, 7).used < MIB
        assert write(f"{disk.path}/a/new", MIB) == (MIB, None)


def test_a_disk_without_quotas_refuses_a_limit():
    with disks.disk(8 * MIB) as disk:
        os.mkdir(f"{disk.path}/a")
        with pytest.raises(OSError):
            disks.limit(f"{disk.path}/a", 1, MIB)


@pytest.mark.parametrize(("options", "line"), [
    ({"size": 100}, r"^size: 100: ext4 needs 4194304 bytes at least$"),
    ({"size": 8 * MIB, "kind": "fat"}, r"^kind: 'fat': must be one of ext4, btrfs, xfs$"),
    ({"size": 64 * MIB, "kind": "btrfs", "quota": True},
     r"^quota: True: btrfs has no project quotas: take ext4 or xfs$"),
])
def test_bad_input(options, line):
    with pytest.raises(BadInput, match=line), disks.disk(**options):
        pass


@pytest.mark.parametrize("project", [0, -1, 1 << 32])
def test_a_project_is_a_number_of_32_bits(tmp_path, project):
    with pytest.raises(BadInput, match=f"^project: {project}: must be 1 to 4294967295$"):
        disks.limit(str(tmp_path), project, MIB)


@pytest.fixture
def nothing_left():
    before = loops()
    yield
    assert loops() == before
    assert [name for name in os.listdir(machine.DATA) if name.startswith("labs-disk")] == []


def test_a_mount_that_is_refused_leaves_nothing(nothing_left):
    with pytest.raises(KernelError, match="^mount ext4: Invalid argument$"), \
            disks.disk(8 * MIB, options="nosuchoption"):
        pass


def test_a_store_that_is_full_in_the_middle_of_mkfs(nothing_left, tmp_path):
    with mounts.tmpfs(str(tmp_path), "64k"):
        with pytest.raises(ChildFailed, match=r"^mkfs\.ext4: "), disks.disk(64 * MIB, store=str(tmp_path)):
            pass
        assert os.listdir(tmp_path) == []


def test_a_block_that_fails_leaves_nothing(nothing_left):
    with pytest.raises(ZeroDivisionError), disks.disk(8 * MIB) as disk:
        write(f"{disk.path}/some", MIB)
        raise ZeroDivisionError


@pytest.mark.parametrize(("kind", "size"), [("ext4", 8 * MIB), ("btrfs", 64 * MIB)])
def test_a_file_that_is_shorter_than_its_filesystem_is_refused(nothing_left, tmp_path, kind, size):
    file, target = str(tmp_path / "file"), str(tmp_path / "mnt")
    os.mkdir(target)
    disks.make(file, size, kind)
    os.truncate(file, size // 2)
    with pytest.raises(BadInput, match=f"^file: 'file': is shorter than its filesystem of {size} bytes$"), \
            disks.mounted(file, target, kind):
        pass
    assert not os.path.ismount(target)


def test_a_file_without_a_filesystem_is_refused(nothing_left, tmp_path):
    (tmp_path / "file").write_bytes(bytes(MIB))
    (tmp_path / "mnt").mkdir()
    with pytest.raises(KernelError, match="^mount ext4: Invalid argument$"), \
            disks.mounted(str(tmp_path / "file"), str(tmp_path / "mnt")):
        pass


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
