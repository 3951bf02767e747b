"""labs.storage: what a volume holds is what findmnt, tar and stat say; nothing half-made bears a name."""

import os
import subprocess
import sys
import tarfile

import pytest

from labs import container, process, storage
from labs.errors import BadInput, ChildFailed


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
truncate -s 1M hole; printf end >> hole; setfattr -n user.note -v hi file; chown -R 1234:2345 deep
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
    assert [one.name for one in volumes.list({"app": "web"})] == ["data"] and volumes.list({"app": "db"}) == []
    assert len(volumes.create().name) == 64 and len(volumes.list()) == 2


@pytest.mark.parametrize("name", ["", "a", "../up", "a/b", ".hidden", "-x", "a b", "a\n"])
def test_names_that_docker_refuses(volumes, name):
    if name:
        with pytest.raises(BadInput, match="volume"):
            volumes.create(name)
    with pytest.raises(BadInput, match="volume"):
        volumes.get(name)
    assert not os.path.exists(volumes.store) or volumes.list() == []


def test_other_labels_are_refused(volumes):
    volumes.create("data", {"app": "web"})
    with pytest.raises(BadInput, match=r"^labels: .*there with \{'app': 'web'\}"):
        volumes.create("data", {"app": "db"})


def test_an_empty_volume_is_filled_with_everything(volumes, source):
    path = volumes.create("data").path
    assert volumes.fill("data", source)
    assert listing(path) == listing(source)
    assert os.stat(f"{path}/hole").st_blocks == os.stat(f"{source}/hole").st_blocks


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
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(ChildFailed, match="tar"):
        volumes.restore("again", str(tar))
    assert [one.name for one in volumes.list()] == ["data"]
    assert sorted(os.listdir(volumes.store)) == [".lock", "data"]


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
    assert volumes.list() == []


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
        with pytest.raises(BadInput, match=r"^volume: .*mounted by process \d+"):
            volumes.remove("data")
        assert volumes.prune() == []
    process.until(lambda: volumes.users("data") == [])
    volumes.remove("data")
    assert volumes.list() == [] and os.listdir(volumes.store) == [".lock"]


def test_a_part_of_a_volume_is_a_use_of_it_and_a_longer_name_is_not(volumes):
    os.makedirs(volumes.create("data").path + "/sub")
    volumes.create("data-2")
    with container.Container(["sleep", "600"], mounts=[(volumes.get("data").path + "/sub", "/data")]):
        assert volumes.users("data") != [] and volumes.users("data-2") == []
        assert volumes.prune() == ["data-2"]


def test_what_outlives_the_container(volumes):
    volume = volumes.create("data")
    container.run(["sh", "-c", "echo kept > /data/word; echo lost > /word"], mounts=[(volume.path, "/data")])
    again = container.run(["sh", "-c", "cat /data/word; cat /word"], mounts=[(volume.path, "/data")])
    assert again.stdout == "kept\n" and "No such file" in again.stderr


KILLED = """
import os, sys
from labs import storage
storage._tar = lambda *words: os.kill(os.getpid(), 9)
storage.Volumes(sys.argv[1]).restore("data", "/dev/null")
"""


def test_a_killed_maker_leaves_no_volume_and_prune_removes_the_rest(volumes, source):
    volumes.create("other")
    done = subprocess.run([sys.executable, "-c", KILLED, volumes.store], check=False)
    assert done.returncode == -9
    assert [one.name for one in volumes.list()] == ["other"] and len(os.listdir(volumes.store)) == 3
    assert volumes.prune() == ["other"]
    assert os.listdir(volumes.store) == [".lock"]
