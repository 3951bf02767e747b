"""labs.storage: what a volume holds is what findmnt, tar and stat say; nothing half-made bears a name."""

import os
import subprocess
import sys
import tarfile

import pytest

from labs import container, mounts, process, storage
from labs.errors import BadInput, ChildFailed, KernelError


@pytest.fixture
def volumes(tmp_path):
    return storage.Volumes(str(tmp_path / "store"))


def shell(command, where):
    return subprocess.run(["sh", "-euc", command], cwd=where, capture_output=True, text=True, check=True).stdout


def listing(folder):
    """Everything below a directory and the directory itself, as find(1) sees it."""
    facts = shell("find . -printf '%p %y %m %U %G %l %T@ %n\\n' | sort", folder)
    facts += shell("find . -type f -o -type d | sort | xargs -d '\\n' getfattr -d -m -", folder)
    return facts + shell("find . -type f -exec sha256sum {} + | sort", folder)


SPECIAL = """
printf abc > file; ln file hard; ln -s ../../etc/passwd soft; ln -s missing dangling; mkfifo pipe
mkdir -m 1777 open; mkdir -m 750 deep; mkdir deep/er; printf x > deep/er/x; printf y > .wh.odd; mknod zero c 1 5
truncate -s 1M hole; printf end >> hole; setfattr -n user.note -v hi file
setfattr -n trusted.note -v hi file; chown -R 1234:2345 deep
chmod 2755 deep/er; chown 7:8 .; chmod 711 .; touch -d @1000000000 deep/er/x deep/er deep .
"""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    shell(SPECIAL, folder)
    return str(folder)


def test_a_volume_is_a_directory_with_a_name(volumes):
    volume = volumes.create("data", {"app": "web"})
    assert volume == volumes.get("data") == volumes.create("data") == volumes.create("data", {"app": "web"})
    assert volume.path == f"{volumes.store}/data/_data" and os.listdir(volume.path) == []
    assert [one.name for one in volumes.find({"app": "web"})] == ["data"] and volumes.find({"app": "db"}) == []
    assert len(volumes.create().name) == 64 and len(volumes.find()) == 2


@pytest.mark.parametrize("name", ["", "a", "../up", "a/b", ".hidden", "-x", "a b", "a\n"])
def test_names_that_docker_refuses(volumes, name):
    if name:
        with pytest.raises(BadInput, match="volume"):
            volumes.create(name)
    with pytest.raises(BadInput, match="volume"):
        volumes.get(name)
    assert not os.path.exists(volumes.store) or volumes.find() == []


def test_other_labels_are_refused(volumes):
    volumes.create("data", {"app": "web"})
    with pytest.raises(BadInput, match=r"^labels: .*there with \{'app': 'web'\}"):
        volumes.create("data", {"app": "db"})


def test_an_empty_volume_is_filled_with_everything(volumes, source):
    path = volumes.create("data").path
    assert volumes.fill("data", source)
    assert listing(path) == listing(source)
    assert os.stat(f"{path}/hole").st_blocks == os.stat(f"{source}/hole").st_blocks


def test_the_path_is_the_containers_and_no_link_leads_out_of_the_image(volumes, source, tmp_path):
    shell("mkdir -p root/srv secret; cp -a source root/srv/data; touch secret/key", tmp_path)
    shell(f"ln -s {tmp_path}/secret root/absolute; ln -s ../../secret root/climbs; ln -s /srv/data root/fine", tmp_path)
    root = str(tmp_path / "root")
    path = volumes.create("data").path
    assert not volumes.fill("data", root, "/absolute") and not volumes.fill("data", root, "/climbs")
    assert not volumes.fill("data", root, "/../../secret") and not volumes.fill("data", root, "/srv/nothing")
    assert os.listdir(path) == []
    assert volumes.fill("data", root, "/fine") and listing(path) == listing(source)
    with pytest.raises(BadInput, match=r"^path: '/srv/data/file': is no directory of the image"):
        volumes.fill("data", root, "/srv/data/file")


def test_an_empty_volume_in_use_is_not_replaced_under_its_users(volumes, source):
    volume = volumes.create("data")
    with container.Container(["sleep", "600"], mounts=[(volume.path, "/data")]) as running:
        assert not volumes.fill("data", source)
        assert running.exec(["touch", "/data/word"]).code == 0
    assert os.listdir(volume.path) == ["word"]


def test_a_volume_that_holds_anything_is_left_alone(volumes, source):
    path = volumes.create("data").path
    shell("touch mine", path)
    assert not volumes.fill("data", source)
    assert os.listdir(path) == ["mine"]


def test_saved_and_restored_it_is_the_same(volumes, source, tmp_path):
    path = volumes.create("data").path
    volumes.fill("data", source)
    size = volumes.backup("data", str(tmp_path / "data.tar"))
    assert size == (tmp_path / "data.tar").stat().st_size
    with tarfile.open(tmp_path / "data.tar") as tar:
        assert "./deep/er/x" in tar.getnames()
    restored = volumes.restore("again", str(tmp_path / "data.tar"), {"from": "data"})
    assert listing(restored.path) == listing(path) and restored.labels == {"from": "data"}
    with pytest.raises(BadInput, match="is there already"):
        volumes.restore("again", str(tmp_path / "data.tar"))


def test_a_broken_tar_gives_no_volume(volumes, tmp_path):
    shell("head -c 100000 /dev/urandom > random", volumes.create("data").path)
    tar = tmp_path / "data.tar"
    volumes.backup("data", str(tar))
    with open(tar, "r+b") as file:
        file.write(b"?" * 600)
    with pytest.raises(ChildFailed, match=r"^tar: This does not look like a tar archive$"):
        volumes.restore("again", str(tar))
    assert [one.name for one in volumes.find()] == ["data"]
    assert sorted(os.listdir(volumes.store)) == [".lock", "data"]


@pytest.mark.parametrize("keep", [0, 512, 1024, -1024, -512, -1])
def test_a_tar_cut_short_anywhere_gives_no_volume(volumes, tmp_path, keep):
    shell("echo word > word", volumes.create("data").path)
    size = volumes.backup("data", tar := str(tmp_path / "data.tar"))
    shell(f"truncate -s {(keep if keep >= 0 else size - 9216 + keep)} data.tar", tmp_path)
    with pytest.raises((BadInput, ChildFailed), match=r"no whole tar|^tar: "):
        volumes.restore("again", tar)
    assert sorted(os.listdir(volumes.store)) == [".lock", "data"]


def test_files_that_cannot_be_named(volumes, tmp_path):
    volumes.create("data")
    with pytest.raises(KernelError, match="No such file"):
        volumes.restore("again", str(tmp_path / "missing.tar"))
    with pytest.raises(BadInput, match="no such directory"):
        volumes.backup("data", str(tmp_path / "missing/data.tar"))
    with pytest.raises(BadInput, match="no such volume"):
        storage.Volumes(str(tmp_path / "nowhere")).remove("data")
    assert storage.Volumes(str(tmp_path / "nowhere")).prune() == []


@pytest.fixture
def small(tmp_path):
    """A disk of 256 KiB, and a directory with more than that."""
    (tmp_path / "small").mkdir()
    (tmp_path / "much").mkdir()
    (tmp_path / "much" / "a").write_bytes(b"x" * 100_000)
    (tmp_path / "much" / "b").write_bytes(b"x" * 300_000)
    with mounts.tmpfs(str(tmp_path / "small"), size="256k") as folder:
        yield storage.Volumes(f"{folder}/store"), str(tmp_path / "much")


def test_a_disk_that_gets_full_leaves_nothing_of_a_copy(small, volumes, tmp_path):
    on_small, much = small
    path = on_small.create("data").path
    with pytest.raises(ChildFailed, match="No space left on device") as refused:
        on_small.fill("data", much)
    assert on_small.store not in str(refused.value)
    volumes.create("data")
    volumes.fill("data", much)
    volumes.backup("data", tar := str(tmp_path / "data.tar"))
    with pytest.raises(ChildFailed, match="No space left on device"):
        on_small.restore("again", tar)
    with pytest.raises(ChildFailed, match="No space left on device"):
        volumes.backup("data", f"{tmp_path}/small/data.tar")
    assert os.listdir(path) == [] and os.listdir(tmp_path / "small") == ["store"]
    assert sorted(os.listdir(on_small.store)) == [".lock", "data"]


def test_what_is_no_volume_is_not_listed(volumes):
    volumes.create("data")
    shell("mkdir lost+found other; touch plain", volumes.store)
    assert [one.name for one in volumes.find()] == ["data"]
    with pytest.raises(BadInput, match="no such volume"):
        volumes.get("other")


@pytest.mark.parametrize(("change", "found"), [
    ("true", {}),
    ("chmod 600 file", {"file": ("mode",), "hard": ("mode",)}),
    ("chown -h 1:2 soft", {"soft": ("owner",)}),
    ("setfattr -x user.note file", {"file": ("attributes",), "hard": ("attributes",)}),
    ("touch -d @1000000001 deep/er/x", {"deep/er/x": ("time",)}),
    ("rm hard; cp -a file hard", {"file": ("links",), "hard": ("links",)}),
    ("rm dangling; ln -s mixing dangling; touch -hr ../source/dangling dangling", {"dangling": ("content",)}),
    ("rm zero; mknod zero c 1 3; touch -r ../source/zero zero", {"zero": ("content",)}),
    ("printf z > .wh.odd; touch -r ../source/.wh.odd .wh.odd", {".wh.odd": ("content",)}),
    ("rm pipe; touch more; touch -r ../source .", {"more": ("added",), "pipe": ("missing",)}),
    ("chmod 700 .", {".": ("mode",)})])
def test_compare_names_what_was_lost(source, tmp_path, change, found):
    shell(f"cp -a source copy; cd copy; {change}; touch -r ../source .", tmp_path)
    assert storage.compare(source, str(tmp_path / "copy")) == found


def test_a_tar_that_climbs_out_stays_in(volumes, tmp_path):
    os.mkdir(volumes.store)
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        link = tarfile.TarInfo("out")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("out/planted"))
        tar.addfile(tarfile.TarInfo("../planted"))
    with pytest.raises(ChildFailed):
        volumes.restore("bad", str(tmp_path / "bad.tar"))
    assert not (tmp_path / "planted").exists() and not os.path.exists(f"{volumes.store}/planted")
    assert volumes.find() == []


def test_a_backup_that_fails_leaves_no_file(volumes, tmp_path):
    volumes.create("data")
    os.rmdir(volumes.get("data").path)
    with pytest.raises(ChildFailed, match="tar"):
        volumes.backup("data", str(tmp_path / "data.tar"))
    assert os.listdir(tmp_path) == ["store"]


def test_a_mounted_volume_is_in_use_and_an_unmounted_one_is_not(volumes):
    volume = volumes.create("data")
    assert volumes.users("data") == []
    with container.Container(["sleep", "600"], mounts=[(volume.path, "/data")]) as running:
        assert running.pid in volumes.users("data")
        with pytest.raises(BadInput, match=r"^volume: 'data': a process has it mounted$"):
            volumes.remove("data")
        assert volumes.prune() == []
    process.until(lambda: volumes.users("data") == [])
    volumes.remove("data")
    assert volumes.find() == [] and os.listdir(volumes.store) == [".lock"]


def test_a_part_of_a_volume_is_a_use_of_it_and_a_longer_name_is_not(volumes):
    os.makedirs(volumes.create("data").path + "/sub")
    volumes.create("data-2")
    with container.Container(["sleep", "600"], mounts=[(volumes.get("data").path + "/sub", "/data")]):
        assert volumes.users("data") != [] and volumes.users("data-2") == []
        assert volumes.prune() == ["data-2"]


def test_shows_compares_directories_and_not_names(volumes):
    volume, other = volumes.create("data"), volumes.create("other")
    with container.Container(["sleep", "600"], mounts=[(volume.path, "/data")]) as running:
        assert storage.shows(running.pid, "/data", volume.path)
        assert not storage.shows(running.pid, "/data", other.path)
        assert not storage.shows(running.pid, "/date", volume.path)


def test_what_outlives_the_container(volumes):
    volume = volumes.create("data")
    container.run(["sh", "-c", "echo kept > /data/word; echo lost > /word"], mounts=[(volume.path, "/data")])
    again = container.run(["sh", "-c", "cat /data/word; cat /word"], mounts=[(volume.path, "/data")])
    assert again.stdout == "kept\n" and "No such file" in again.stderr


KILLED = """
import os, sys
from labs import storage
storage._run = lambda *words, **files: os.kill(os.getpid(), 9)
storage.Volumes(sys.argv[1]).restore("data", sys.argv[2])
"""


def test_a_killed_maker_leaves_no_volume_and_prune_removes_the_rest(volumes, tmp_path):
    volumes.create("other")
    volumes.backup("other", tar := str(tmp_path / "other.tar"))
    done = subprocess.run([sys.executable, "-c", KILLED, volumes.store, tar], check=False)
    assert done.returncode == -9
    assert [one.name for one in volumes.find()] == ["other"] and len(os.listdir(volumes.store)) == 3
    assert volumes.prune() == ["other"]
    assert os.listdir(volumes.store) == [".lock"]
