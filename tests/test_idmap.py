"""labs.idmap: owners through the mount and on the filesystem, as stat(1) sees them from both sides."""

import errno
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from labs import container, idmap, machine, mounts, process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError

ROWS = [(0, 1000, 1), (1, 100_000, 65_536)]
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


@contextmanager
def unchanged():
    """No mount and no open file more than before."""
    before = mounts.table(), process.descriptors(os.getpid())
    yield
    assert (mounts.table(), process.descriptors(os.getpid())) == before


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
    with unchanged(), pytest.raises(KernelError, match=r"cannot be id-mapped") as caught, \
            idmap.bind("/proc/sys", str(disk / "seen"), [(0, 0, 1)]):
        pass
    assert caught.value.errno == errno.EINVAL


def test_a_shared_mount_is_shown_as_a_private_one(disk):
    """Below a shared mount it would be shared: mount_namespaces(7)."""
    syscalls.mount(None, str(disk), None, syscalls.MS_SHARED)
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(0, 0, 1)]):
        assert mounts.peers(mounts.holding(str(disk / "seen"))) == {}


@pytest.mark.parametrize(("rows", "said"), [
    ([], "must have one row at least"),
    ([(0, 0, 0)], "write uid_map '0 0 0': Invalid argument"),
    ([(0, 0, 1), (0, 5, 1)], "write uid_map"),
    ([(-1, 0, 1)], "write uid_map"),
])
def test_a_map_the_kernel_refuses(disk, rows, said):
    with unchanged(), pytest.raises((BadInput, KernelError), match=said), \
            idmap.bind(str(disk / "files"), str(disk / "seen"), rows):
        pass


@pytest.mark.parametrize(("source", "target", "said"), [
    ("missing", "seen", "open_tree: No such file"),
    ("files", "missing", "move_mount: No such file"),
    ("files", "seen/missing", "move_mount: No such file"),
    ("files", "files/mine", "move_mount: Invalid argument"),
    ("files/mine", "seen", "move_mount: Invalid argument"),
])
def test_nothing_to_mount_or_nowhere_to_mount_it(disk, source, target, said):
    with unchanged(), pytest.raises(KernelError, match=said), \
            idmap.bind(str(disk / source), str(disk / target), [(0, 1, 1)]):
        pass


def test_a_link_as_target_is_not_followed(disk):
    (disk / "link").symlink_to("seen")
    with unchanged(), pytest.raises(KernelError, match="move_mount"), \
            idmap.bind(str(disk / "files"), str(disk / "link"), [(0, 1, 1)]):
        pass


def test_a_user_namespace_that_cannot_be_made_says_so_at_once():
    """Whoever has no id in the user namespace around gets none of its own: unshare(2), EPERM."""
    def said():
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        try:
            with idmap.user_namespace([(0, 0, 1)]):
                return "made"
        except ChildFailed as error:
            return str(error)

    assert process.call(said) == "unshare: Operation not permitted"


def test_groups_have_a_map_of_their_own(disk):
    os.chown(disk / "files/mine", 1000, 20)
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(1000, 5, 1)], [(20, 6, 1)]):
        assert owners(disk / "seen")["mine"] == (5, 6)
    options = "X-mount.idmap=u:1000:5:1 g:20:6:1"
    subprocess.run(["mount", "--bind", "-o", options, disk / "files", disk / "seen"], check=True)
    try:
        assert owners(disk / "seen")["mine"] == (5, 6)
    finally:
        syscalls.umount2(str(disk / "seen"))


def test_one_namespace_serves_many_mounts(disk):
    (disk / "again").mkdir()
    with idmap.user_namespace([(1000, 5000, 1)]) as userns, \
            idmap.attach(str(disk / "files"), str(disk / "seen"), userns), \
            idmap.attach(str(disk / "files"), str(disk / "again"), userns, readonly=True):
        assert owners(disk / "seen") == owners(disk / "again") == {"mine": (5000, 5000), "roots": (65534, 65534)}


def test_a_file_can_be_shown_alone(disk):
    with idmap.bind(str(disk / "files/mine"), str(disk / "files/roots"), [(1000, 5000, 1)]):
        assert owners(disk / "files") == {"mine": (1000, 1000), "roots": (5000, 5000)}


@pytest.mark.parametrize("number", [0, 1, 33, 1000, 65_536, 65_537, 100_000])
def test_translate_counts_as_the_kernel_does(disk, number):
    os.chown(disk / "files/mine", number, number)
    with idmap.bind(str(disk / "files"), str(disk / "seen"), ROWS):
        assert owners(disk / "seen")["mine"][0] == idmap.translate(ROWS, number)


def test_answer_is_what_a_mount_would_meet(disk):
    assert idmap.answer(str(disk)) == "ok"
    assert idmap.answer("/proc/sys") == "EINVAL"
    (disk / "upper").mkdir(), (disk / "work").mkdir()
    with mounts.overlay([str(disk / "files")], str(disk / "upper"), str(disk / "work"), str(disk / "seen")):
        assert idmap.answer(str(disk / "seen")) == "EINVAL"


def test_a_container_with_its_own_ids_sees_its_owner(disk):
    """The files of host user 1000 belong to the user 1000 of a container that is 101000 outside."""
    look = ["stat", "-c", "%u", "/data/mine"]
    plain = container.run(look, user=True, mounts=[(str(disk / "files"), "/data")])
    assert plain.stdout == "65534\n"
    with idmap.bind(str(disk / "files"), str(disk / "seen"), [(0, 100_000, 65_536)]):
        mapped = container.run(look, user=True, mounts=[(str(disk / "seen"), "/data")])
    assert mapped.stdout == "1000\n"
