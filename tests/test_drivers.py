"""labs.drivers: the same tree four ways, compared with each other, with containerd's snapshotters and btrfs-progs."""

import contextlib
import os
import re
import stat
import subprocess

import pytest

from labs import disks, drivers, layer, machine, mounts, process
from labs.errors import BadInput, ChildFailed, KernelError

MIB = 1 << 20
NAMES = [make.name for make in drivers.DRIVERS]
SHARING = [name for name in NAMES if name != "vfs"]


@pytest.fixture(scope="module")
def stores():
    with drivers.each(64 * MIB) as made:
        yield made


@pytest.fixture
def driver(stores, request):
    made = stores[request.param]
    yield made
    while names := made.layers():
        made.remove(next(name for name in names if name not in map(made.parent, names)))


every = pytest.mark.parametrize("driver", NAMES, indirect=True)


def said(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def write(path, data=b"some\n"):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def tree(path):
    """Path -> kind, mode, owner and content of everything in it, as one who looks at it sees it."""
    found = {}
    for name, status in layer.walk(path):
        content = b""
        if stat.S_ISREG(status.st_mode):
            with open(f"{path}/{name}", "rb") as file:
                content = file.read()
        found[name] = (oct(status.st_mode), status.st_uid, status.st_gid, content)
    return found


def base(driver):
    driver.prepare("base")
    with driver.mount("base") as path:
        write(f"{path}/keep")
        write(f"{path}/gone")
        write(f"{path}/dir/a")
        write(f"{path}/dir/b")
        os.chown(f"{path}/keep", 12, 34)
        os.chmod(f"{path}/keep", 0o4750)


@every
def test_a_layer_shows_its_parent_and_changes_stay_in_it(driver):
    base(driver)
    with driver.mount("base") as path:
        before = tree(path)
    driver.prepare("top", "base")
    with driver.mount("top") as path:
        assert tree(path) == before
        os.unlink(f"{path}/gone")
        subprocess.run(["rm", "-r", f"{path}/dir"], check=True)
        write(f"{path}/dir/c")
        write(f"{path}/keep", b"other\n")
    with driver.mount("base") as path:
        assert tree(path) == before
    with driver.mount("top") as path:
        assert sorted(tree(path)) == ["dir", "dir/c", "keep"]
        assert tree(path)["keep"] == ("0o104750", 12, 34, b"other\n")
    assert (driver.layers(), driver.parent("top"), driver.parent("base")) == (["base", "top"], "base", None)


@every
def test_twenty_layers_and_two_on_one_parent(driver):
    driver.prepare("l0")
    for number in range(1, 20):
        driver.prepare(f"l{number}", f"l{number - 1}")
        with driver.mount(f"l{number}") as path:
            write(f"{path}/f{number}", b"%d" % number)
    driver.prepare("side", "l10")
    with driver.mount("l19") as path, driver.mount("side") as side:
        assert len(os.listdir(path)) == 19 and len(os.listdir(side)) == 10


@every
def test_what_a_layer_costs(driver):
    """A copy costs all of it; a layer of the others next to nothing, until a file is written."""
    driver.prepare("base")
    with driver.mount("base") as path:
        write(f"{path}/big", os.urandom(8 * MIB))
    laid = drivers.cost(driver, lambda: driver.prepare("top", "base")).space
    def append():
        with driver.mount("top") as path, open(f"{path}/big", "ab") as file:
            file.write(b"x")
    first, second = (drivers.cost(driver, append).space for _ in range(2))
    assert (laid > 8 * MIB) == (driver.name == "vfs") and laid < 9 * MIB
    assert (first > 8 * MIB) == ("overlay" in driver.name) and first < 9 * MIB
    assert abs(second) < MIB


@every
def test_deleting_in_a_layer_frees_nothing_below(driver):
    driver.prepare("base")
    with driver.mount("base") as path:
        write(f"{path}/big", os.urandom(8 * MIB))
    driver.prepare("top", "base")
    def delete():
        with driver.mount("top") as path:
            os.unlink(f"{path}/big")
    freed = -drivers.cost(driver, delete).space
    assert (freed > 7 * MIB) == (driver.name == "vfs")
    assert drivers.cost(driver, lambda: driver.remove("top")).space <= 4096
    driver.remove("base")


@every
def test_a_bad_layer_is_refused_and_nothing_is_made(driver):
    base(driver)
    for call, line in [
        (lambda: driver.prepare("base"), "^layer: 'base': is there already$"),
        (lambda: driver.prepare("top", "nothing"), "^parent: 'nothing': no such layer$"),
        (lambda: driver.prepare("../top"), r"^layer: '\.\./top': must be letters"),
        (lambda: driver.prepare("top", "../x"), r"^layer: '\.\./x': must be letters"),
        (lambda: driver.remove("top"), "^layer: 'top': no such layer$"),
        (lambda: driver.mount("top").__enter__(), "^layer: 'top': no such layer$"),
    ]:
        with pytest.raises(BadInput, match=line):
            call()
    driver.prepare("top", "base")
    with pytest.raises(BadInput, match="^layer: 'base': is below top$"):
        driver.remove("base")
    assert driver.layers() == ["base", "top"]


def test_a_copy_for_which_there_is_no_room_is_taken_back(tmp_path):
    with disks.disk(8 * MIB) as disk:
        driver = drivers.Vfs(disk.path)
        driver.prepare("base")
        with driver.mount("base") as path:
            write(f"{path}/big", os.urandom(5 * MIB))
        before = driver.space()
        with pytest.raises(ChildFailed, match="^cp: No space left on device$"):
            driver.prepare("top", "base")
        assert driver.layers() == ["base"] and os.listdir(disk.path).count("top") == 0
        assert driver.space() - before < MIB


def test_btrfs_needs_btrfs():
    with disks.disk(8 * MIB) as disk:
        driver = drivers.Btrfs(disk.path)
        with pytest.raises(KernelError, match="^ioctl on a subvolume: Inappropriate ioctl for device$"):
            driver.prepare("base")
        assert driver.layers() == []


def test_a_fuse_server_that_cannot_start_is_told(stores):
    driver = stores["fuse-overlayfs"]
    driver.prepare("a")
    driver.prepare("b", "a")
    machine.remove_tree(f"{driver.store}/b/work")
    with pytest.raises(ChildFailed, match="^fuse-overlayfs: ended with status 1$"), driver.mount("b"):
        pass
    driver.remove("b")
    driver.remove("a")


def test_a_fuse_mount_is_served_by_a_process_and_the_kernels_own_is_not(stores):
    for name, fstype in (("overlay2", "overlay"), ("fuse-overlayfs", "fuse.fuse-overlayfs")):
        driver = stores[name]
        driver.prepare("a")
        driver.prepare("b", "a")
        with driver.mount("b") as path:
            assert said("findmnt", "-no", "FSTYPE", path).strip() == fstype
            servers = [pid for pid in process.children(os.getpid()) if process.status(pid).name == "fuse-overlayfs"]
            assert len(servers) == (name == "fuse-overlayfs")
        driver.remove("b")
        driver.remove("a")


@pytest.mark.parametrize("driver", ["overlay2", "fuse-overlayfs"], indirect=True)
def test_the_two_overlays_write_the_same_marks(driver):
    """What one of them wrote, the kernel's shows."""
    base(driver)
    driver.prepare("top", "base")
    with driver.mount("top") as path:
        os.unlink(f"{path}/gone")
        seen = sorted(tree(path))
    diff = f"{driver.store}/top/diff"
    assert os.lstat(f"{diff}/gone").st_rdev == 0 and stat.S_ISCHR(os.lstat(f"{diff}/gone").st_mode)
    os.mkdir(target := f"{driver.store}/look")
    with mounts.overlay([diff, f"{driver.store}/base/diff"], None, None, target):
        assert sorted(tree(target)) == seen
    os.rmdir(target)


@pytest.mark.parametrize("driver", ["btrfs"], indirect=True)
def test_a_snapshot_is_one_to_btrfs_too(driver):
    base(driver)
    driver.prepare("top", "base")
    told = said("btrfs", "subvolume", "list", "-q", "-u", driver.store)
    rows = {line.split()[-1]: line.split() for line in told.splitlines()}
    parent_of = {name: row[row.index("parent_uuid") + 1] for name, row in rows.items()}
    uuid_of = {name: row[row.index("uuid") + 1] for name, row in rows.items()}
    assert parent_of == {"base/tree": "-", "top/tree": uuid_of["base/tree"]}


@contextlib.contextmanager
def containerd(root, place):
    """A containerd of our own, with its root on that disk: a function that runs ctr on it."""
    def ctr(*words):
        return said("ctr", "--address", f"{place}/sock", "--namespace", "labs-drivers", "snapshots", *words)
    (place / "config.toml").write_text(
        f'version = 2\nroot = "{root}"\nstate = "{place}/state"\n[grpc]\naddress = "{place}/sock"\n')
    with open(place / "log", "wb") as log, \
            subprocess.Popen(["containerd", "--config", str(place / "config.toml")], stdout=log, stderr=log) as daemon:
        try:
            process.until(lambda: os.path.exists(place / "sock"), 60, "containerd")
            yield ctr
        finally:
            daemon.terminate()


@contextlib.contextmanager
def mounted_by(line, target):
    """Run the mount(8) line that ctr prints, and undo it."""
    subprocess.run(line.split(), check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


WORK = "rm gone; rm -r dir; mkdir dir; echo new >dir/c; echo other >keep"
SNAPSHOTTERS = {"vfs": "native", "overlay2": "overlayfs", "btrfs": "btrfs"}


def test_containerds_snapshotters_show_and_store_the_same(stores, tmp_path):
    target = str(tmp_path / "target")
    os.mkdir(target)
    with disks.disk(64 * MIB, "btrfs") as disk, containerd(f"{disk.path}/root", tmp_path) as ctr:
        for ours, theirs in SNAPSHOTTERS.items():
            compare(stores[ours], lambda *words, name=theirs: ctr("--snapshotter", name, *words), target)


def compare(driver, ctr, target):
    base(driver)
    with driver.mount("base") as path:
        ctr("prepare", "filling")
        with mounted_by(ctr("mounts", target, "filling"), target):
            subprocess.run(["cp", "--archive", f"{path}/.", target], check=True)
        ctr("commit", "base", "filling")
    driver.prepare("top", "base")
    ctr("prepare", "top", "base")
    line = ctr("mounts", target, "top")
    assert ("lowerdir=" in line) == (driver.name == "overlay2")
    with driver.mount("top") as path, mounted_by(line, target):
        for place in (path, target):
            subprocess.run(["sh", "-e", "-c", WORK], cwd=place, check=True)
        assert tree(path) == tree(target)
    if driver.name == "overlay2":
        upper = re.search(r"upperdir=([^,]+)", line)[1]
        assert dict.fromkeys(n for n, _ in layer.walk(f"{driver.store}/top/diff")) == dict.fromkeys(
            n for n, _ in layer.walk(upper))
    for name in ("top", "base"):
        driver.remove(name)
