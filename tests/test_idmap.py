"""labs.idmap: owners through the mount and on the filesystem, as stat(1) sees them from both sides."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from labs import container, idmap, machine, mounts
from labs.errors import BadInput, KernelError

AS_5000 = ("setpriv", "--reuid=5000", "--regid=5000", "--clear-groups")


@pytest.fixture
def disk():
    """A directory of files that belong to 1000 and to root, and an empty one to mount on; everybody may pass."""
    top = Path(machine.STATE, machine.new_name("t"))
    top.mkdir(parents=True)
    with mounts.tmpfs(str(top)):
        for name, owner in {"files": 0, "files/mine": 1000, "files/roots": 0, "seen": 0}.items():
            path = top / name
            path.mkdir() if "/" not in name else path.write_text(name)
            os.chown(path, owner, owner)
        yield top
    top.rmdir()


def owners(folder):
    words = ["stat", "-c", "%n %u %g", *sorted(os.listdir(folder))]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    return {name: (int(uid), int(gid)) for name, uid, gid in map(str.split, said.splitlines())}


def test_the_map_shows_on_this_mount_and_not_on_the_filesystem(disk):
    before = owners(disk / "files")
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(1000, 100_000, 1)]):
        assert owners(disk / "seen") == {"mine": (100_000, 100_000), "roots": (65534, 65534)}
        assert owners(disk / "files") == before == {"mine": (1000, 1000), "roots": (0, 0)}
        rows = [row for row in mounts.table() if row.target == str(disk / "seen")]
        assert "idmapped" in rows[0].options and rows[0].propagation == "private"
    assert os.listdir(disk / "seen") == []


def test_what_is_made_through_it_belongs_to_the_other_side(disk):
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(0, 0, 1), (1000, 5000, 1)]):
        os.chown(disk / "files", 1000, 1000)
        subprocess.run([*AS_5000, "touch", disk / "seen/new"], check=True)
        assert os.stat(disk / "seen/new").st_uid == 5000
    assert os.stat(disk / "files/new").st_uid == 1000


def test_who_is_in_no_row_cannot_write(disk):
    """Not even where everybody may: whose file would it be?  And a directory of nobody known takes no new name."""
    os.chmod(disk / "files", 0o777)
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(1000, 5000, 1)]):
        refused = subprocess.run([*AS_5000, "touch", disk / "seen/new"], check=False, capture_output=True, text=True)
        assert "Permission denied" in refused.stderr
        os.chown(disk / "files", 1000, 1000)
        subprocess.run([*AS_5000, "touch", disk / "seen/new"], check=True)
        with pytest.raises(OSError) as caught:
            (disk / "seen/newer").touch()
        assert caught.value.errno == errno.EOVERFLOW


def test_read_only(disk):
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(0, 0, 65536)], readonly=True), \
            pytest.raises(OSError) as caught:
        (disk / "seen/new").touch()
    assert caught.value.errno == errno.EROFS


def test_a_filesystem_that_cannot_says_so_and_nothing_is_mounted(disk):
    before = mounts.table()
    with pytest.raises(KernelError, match=r"cannot be id-mapped") as caught, \
            idmap.bind("/proc/sys", str(disk / "seen"), [(0, 0, 1)]):
        pass
    assert caught.value.errno == errno.EINVAL and mounts.table() == before


@pytest.mark.parametrize("rows", [[], [(0, 0, 0)], [(0, 0, 1), (0, 5, 1)]])
def test_a_map_the_kernel_refuses(disk, rows):
    before = mounts.table()
    with pytest.raises((BadInput, KernelError)), idmap.bind(str(disk / "files"), str(disk / "seen"), rows):
        pass
    assert mounts.table() == before


def test_a_container_with_its_own_ids_sees_its_owner(disk):
    """The files of host user 1000 belong to the user 1000 of a container that is 101000 outside."""
    look = ["stat", "-c", "%u", "/data/mine"]
    plain = container.run(look, user=True, mounts=[(str(disk / "files"), "/data")])
    assert plain.stdout == "65534\n"
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(0, 100_000, 65_536)]):
        mapped = container.run(look, user=True, mounts=[(str(disk / "seen"), "/data")])
    assert mapped.stdout == "1000\n"
