"""labs.mounts against findmnt(8) and the filesystem itself."""

import errno
import json
import os
import subprocess
import sys

import pytest

from labs import mounts
from labs.errors import BadInput, KernelError


def findmnt(*arguments):
    shown = subprocess.run(["findmnt", "-J", *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(shown)["filesystems"]


def test_table_agrees_with_findmnt():
    listed = findmnt("--list", "-o", "ID,PARENT,TARGET,FSTYPE,MAJ:MIN,PROPAGATION")
    assert [m.id for m in mounts.table()] == [row["id"] for row in listed]
    by_id = {m.id: m for m in mounts.table()}
    for row in listed:
        mount = by_id[row["id"]]
        assert (mount.parent, mount.target, mount.fstype) == (row["parent"], row["target"], row["fstype"])
        assert mount.dev == row["maj:min"]
        assert ("shared:" in mount.propagation) == ("shared" in row["propagation"])


def test_table_undoes_the_escapes(tmp_path):
    odd = tmp_path / "a space\tand\\040"
    odd.mkdir()
    with mounts.tmpfs(str(odd)):
        assert str(odd) in [m.target for m in mounts.table()]
    assert str(odd) not in [m.target for m in mounts.table()]


def test_bind_shows_the_source_until_the_end(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_text("seen")
    with mounts.bind(str(source), str(target)):
        assert (target / "file").read_text() == "seen"
        assert findmnt("-o", "PROPAGATION", str(target))[0]["propagation"] == "private"
        (target / "new").write_text("written")
    assert os.listdir(target) == []
    assert (source / "new").read_text() == "written"


def test_a_read_only_bind_refuses_writes_and_keeps_other_options(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    with mounts.tmpfs(str(source)), mounts.bind(str(source), str(target), readonly=True):
        with pytest.raises(OSError, match="Read-only") as caught:
            (target / "new").write_text("x")
        assert caught.value.errno == errno.EROFS
        options = findmnt("-o", "VFS-OPTIONS", str(target))[0]["vfs-options"].split(",")
        assert {"ro", "nosuid", "nodev"} <= set(options)
        (source / "new").write_text("the source is writable")


ROOTS = """
import os, sys
from labs import mounts, syscalls
def same():
    found, dev = mounts.root(mounts.table()), os.stat("/").st_dev
    return found and found.dev == f"{os.major(dev)}:{os.minor(dev)}"
early = syscalls.open_tree(sys.argv[1])
syscalls.mount("none", sys.argv[1], "tmpfs", 0)
os.makedirs(sys.argv[1] + "/plain/proc")
syscalls.move_mount(early, "/")
told = [same()]
syscalls.mount("proc", sys.argv[1] + "/plain/proc", "proc", 0)
os.mkdir(sys.argv[1] + "/proc")
syscalls.mount("proc", sys.argv[1] + "/proc", "proc", 0)
os.chroot(sys.argv[1])
told.append(same())
os.chroot("/plain")
print(*told, mounts.root(mounts.table()))
"""


def test_root_is_what_the_process_sees_at_the_slash_under_a_cover_and_after_chroot(tmp_path):
    shown = subprocess.run(["unshare", "--mount", sys.executable, "-c", ROOTS, tmp_path],
                           capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True", "True", "None"]


def test_recursive_binds_carry_what_is_mounted_below(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "below").mkdir(parents=True)
    target.mkdir()
    with mounts.tmpfs(str(source / "below")):
        (source / "below" / "file").write_text("x")
        with mounts.bind(str(source), str(target)):
            assert os.listdir(target / "below") == []
        with mounts.bind(str(source), str(target), recursive=True, readonly=True):
            assert os.listdir(target / "below") == ["file"]
            with pytest.raises(OSError, match="Read-only"):
                (target / "below" / "new").write_text("x")


def test_everything_is_undone_when_the_block_fails_or_the_mount_is_busy(tmp_path):
    before = mounts.table()
    with pytest.raises(ZeroDivisionError), mounts.tmpfs(str(tmp_path)), open(tmp_path / "held", "w"):
        raise ZeroDivisionError
    assert mounts.table() == before


def test_tmpfs_has_its_size(tmp_path):
    with mounts.tmpfs(str(tmp_path), size="64k", mode=0o700):
        assert (tmp_path / "fits").write_bytes(bytes(32768)) == 32768
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "big").write_bytes(bytes(65536))
        assert os.stat(tmp_path).st_mode & 0o777 == 0o700


def test_overlay_with_awkward_names(tmp_path):
    names = ["lower:one", "lower,two", "lower\\three", "upper:,\\", "work:,\\"]
    one, two, three, upper, work = (tmp_path / name for name in names)
    for folder in (one, two, three, upper, work, tmp_path / "merged"):
        folder.mkdir()
    for folder, text in ((three, "lowest"), (two, "middle"), (one, "top")):
        (folder / "same").write_text(text)
        (folder / text).write_text("")
    merged = tmp_path / "merged"
    with mounts.tmpfs(str(tmp_path / "lower,two")), mounts.overlay([str(one), str(three)], None, None, str(merged)):
        assert sorted(os.listdir(merged)) == ["lowest", "same", "top"]
    with mounts.overlay([str(one), str(two), str(three)], str(upper), str(work), str(merged)):
        assert sorted(os.listdir(merged)) == ["lowest", "middle", "same", "top"]
        assert (merged / "same").read_text() == "top"
        (merged / "same").write_text("changed")
    assert (upper / "same").read_text() == "changed"
    assert (one / "same").read_text() == "top"


@pytest.mark.parametrize(("lower", "upper", "work", "field"), [
    ([], None, None, "lower"), ("/a", None, None, "lower"), (["/a"], "/u", None, "work"), (["/a"], None, "/w", "work"),
    ([f"/a/{i:0100}" for i in range(50)], None, None, "lower")])
def test_overlay_options_refuse(lower, upper, work, field):
    with pytest.raises(BadInput, match=f"^{field}: ") as caught:
        mounts.overlay_options(lower, upper, work)
    assert caught.value.field == field


def test_a_refused_mount_leaves_nothing(tmp_path):
    before = mounts.table()
    with pytest.raises(KernelError, match="mount: No such file"), mounts.bind(str(tmp_path / "nothing"), str(tmp_path)):
        pass
    with pytest.raises(KernelError, match="mount overlay: "), \
            mounts.overlay([str(tmp_path / "nothing")], None, None, str(tmp_path)):
        pass
    assert mounts.table() == before


def test_api_filesystems_devices_and_paths_are_those_of_runcs_spec(tmp_path):
    subprocess.run(["runc", "spec"], cwd=tmp_path, check=True)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = [(m["destination"], m["type"].replace("cgroup", "cgroup2")) for m in config["mounts"]]
    assert sorted((m.target, m.fstype) for m in mounts.api_filesystems()) == sorted(expected)
    assert set(config["linux"]["readonlyPaths"]) == set(mounts.READONLY)
    assert set(config["linux"]["maskedPaths"]) <= {*mounts.MASKED, "/sys/devices/virtual/powercap"}


def test_the_devices_are_the_hosts():
    for path, major, minor in mounts.DEVICES:
        assert os.stat(path).st_rdev == os.makedev(major, minor)


HOLDING = """
import sys
from labs import syscalls
syscalls.mount("tmpfs", sys.argv[1] + "/only", "tmpfs")
print("ready", flush=True)
sys.stdin.read()
"""


def test_holding_is_asked_of_another_process_too(tmp_path):
    (tmp_path / "only").mkdir()
    os.symlink("only", tmp_path / "link")
    with subprocess.Popen(["unshare", "--mount", sys.executable, "-c", HOLDING, tmp_path],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        row = mounts.holding(f"{tmp_path}/link", child.pid)
        assert (row.target, row.root, row.fstype) == (f"{tmp_path}/only", "/", "tmpfs")
        assert mounts.holding(f"{tmp_path}/link").target != row.target
        assert mounts.holding(f"{tmp_path}/link", os.getpid()) == mounts.holding(f"{tmp_path}/link")
        child.stdin.close()


@pytest.fixture
def image(tmp_path):
    """A root file system with links of all kinds at /data, and what they lead to: inside of it, and outside."""
    with mounts.tmpfs(str(tmp_path)):
        for folder in ("aim", "source/below", "root/aim", "root/plain", "root/a"):
            (tmp_path / folder).mkdir(parents=True)
        for name, link in (("relative", "../../../../aim"), ("absolute", "/aim"), ("through", "a/../../aim")):
            os.symlink(link, tmp_path / "root" / name)
        yield tmp_path


@pytest.mark.parametrize(("target", "lands"), [
    ("/plain", "plain"), ("plain", "plain"), ("/../plain", "plain"), ("/", ""), ("/relative", "aim"),
    ("/absolute", "aim"), ("/through", "aim"), ("/../../aim", "aim")])
def test_bind_beneath_stays_inside(image, target, lands):
    with mounts.bind_beneath(str(image / "root"), str(image / "source"), target) as where:
        assert where == os.path.normpath(image / "root" / lands)
        assert os.listdir(where) == ["below"]
        assert os.listdir(image / "aim") == []
        assert findmnt("-o", "PROPAGATION", where)[0]["propagation"] == "private"
    assert mounts.holding(where).target == str(image)


def test_bind_beneath_finds_no_target_outside(image):
    before = mounts.table(), os.listdir("/proc/self/fd")
    os.symlink(str(image / "aim"), image / "root" / "host")
    for target in ("/host", "/none"):
        with pytest.raises(KernelError, match="openat2: No such file"), \
                mounts.bind_beneath(str(image / "root"), str(image / "source"), target):
            pass
    with pytest.raises(KernelError, match="open_tree: No such file"), \
            mounts.bind_beneath(str(image / "root"), str(image / "none"), "/plain"):
        pass
    assert before == (mounts.table(), os.listdir("/proc/self/fd"))


def test_bind_beneath_is_read_only_as_a_whole_and_undone_by_what_it_is_not_by_its_name(image):
    with mounts.tmpfs(str(image / "source/below")), \
            mounts.bind_beneath(str(image / "root"), str(image / "source"), "/plain", readonly=True) as where:
        for folder in (where, f"{where}/below"):
            with pytest.raises(OSError, match="Read-only"):
                os.mkdir(f"{folder}/new")
        (image / "source/below/new").write_text("")
        os.rename(image / "root", image / "moved")
        os.mkdir(image / "root")
    assert mounts.holding(str(image / "moved/plain")).target == str(image)


def test_beneath_holds_what_it_opened(image):
    fd = mounts.beneath(str(image / "root"), "/plain")
    os.rename(image / "root/plain", image / "root/old")
    os.symlink("../aim", image / "root/plain")
    try:
        assert os.path.samefile(f"/proc/self/fd/{fd}", image / "root/old")
    finally:
        os.close(fd)
