"""The exercises of 05-storage/04-ownership: each wrong state gives its hint, and the right one passes."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from labs import idmap, machine, mounts
from labs.check import UNANSWERED
from labs.check import storage_ownership as check


@pytest.fixture
def top():
    """A directory that learner may enter, which pytest's own is not."""
    path = Path(machine.STATE, machine.new_name("t"))
    path.mkdir(parents=True)
    yield path
    machine.remove_tree(str(path))


class TestBorrowed:
    @pytest.fixture
    def disk(self, top):
        check.foreign(str(top / "disk"))
        (top / "seen").mkdir()
        return str(top / "disk"), str(top / "seen")

    def verdict(self, disk, uids, gids=None, **more):
        with idmap.bind(*disk, uids, gids, **more):
            return check.borrowed(*disk)

    def test_passes_and_leaves_the_disk_as_it_was(self, disk):
        assert self.verdict(disk, [(501, 1000, 1)], [(20, 1000, 1)])
        assert sorted(os.listdir(disk[0])) == ["notes", "system"]
        assert os.listdir(f"{disk[0]}/notes") == ["todo"]

    def test_passes_however_it_was_mounted(self, disk):
        options = "X-mount.idmap=u:501:1000:1 g:20:1000:1"
        subprocess.run(["mount", "--bind", "-o", options, *disk], check=True)
        try:
            assert check.borrowed(*disk)
        finally:
            subprocess.run(["umount", disk[1]], check=True)

    @pytest.mark.parametrize(("uids", "gids", "hint"), [
        ([(1000, 501, 1)], None, "65534 番に見えます。ディスクの 501 番が、どの行の範囲にもない"),
        ([(501, 1001, 1)], None, "1001 番に見えます。行の二つめの数"),
        ([(501, 1000, 1)], None, "UID は合いました。GID は 65534 番に見えます。ディスクの 20 番が"),
        ([(501, 1000, 1)], [(20, 100, 1)], "GID は 100 番に見えます。行の二つめの数"),
        ([(501, 1000, 1), (0, 0, 1)], [(20, 1000, 1)], "root のファイルまで 0 番に"),
    ])
    def test_hints(self, disk, uids, gids, hint):
        verdict = self.verdict(disk, uids, gids)
        assert not verdict
        assert hint in verdict.message

    def test_read_only(self, disk):
        verdict = self.verdict(disk, [(501, 1000, 1)], [(20, 1000, 1)], readonly=True)
        assert "書けません（Read-only file system）" in verdict.message

    def test_no_mount(self, disk):
        assert "まだマウントの入り口では" in check.borrowed(*disk).message
        assert check.borrowed(disk[0], ...).message == UNANSWERED

    def test_a_plain_bind_mount(self, disk):
        with mounts.bind(*disk):
            assert "ふつうの bind mount" in check.borrowed(*disk).message

    def test_changed_on_the_disk(self, disk):
        os.chown(f"{disk[0]}/notes/todo", 1000, 1000)
        with mounts.bind(*disk):
            assert "書き換わっています" in check.borrowed(*disk).message

    def test_another_disk(self, disk, top):
        check.foreign(str(top / "other"))
        with mounts.bind(str(top / "other"), disk[1]):
            assert f"`{disk[0]}` ではありません" in check.borrowed(*disk).message


class TestServed:
    @pytest.fixture
    def site(self, top):
        for name in ("site", "seen"):
            (top / name).mkdir()
        os.chown(top / "site", 1000, 1000)
        return str(top / "site"), str(top / "seen")

    def test_passes(self, site):
        with idmap.bind(*site, [(1000, 100_033, 1)]):
            assert check.served(*site)
        assert os.listdir(site[0]) == []

    @pytest.mark.parametrize(("uids", "gids", "readonly", "hint"), [
        ([(1000, 33, 1)], None, False, "中では 65534 番です。コンテナの `uid_map` にある外の番号は 100000 から"),
        ([(0, 100_000, 65_536)], None, False, "中では 1000 番です。中の 33 番は、ホストの 100033 番"),
        ([(1000, 100_033, 1)], None, True, "書き込めません"),
        ([(1000, 100_033, 1)], [(1000, 100_034, 1), (5, 100_033, 1)], False, "1000:5 のもの"),
    ])
    def test_hints(self, site, uids, gids, readonly, hint):
        with idmap.bind(*site, uids, gids, readonly=readonly):
            verdict = check.served(*site)
        assert not verdict
        assert hint in verdict.message

    def test_no_mount(self, site):
        assert "まだマウントの入り口では" in check.served(*site).message

    def test_chown_is_no_answer(self, site):
        os.chown(site[0], 100_033, 100_033)
        with mounts.bind(*site):
            assert "`chown` を使わずに" in check.served(*site).message


class TestUndone:
    @pytest.fixture
    def tree(self, top):
        check.moved(str(top))
        return top

    def back(self, tree, *without, chown=os.lchown):
        for name in check.MOVED:
            path = tree / "tree" / name
            owner = os.lstat(path).st_uid - check.STEP
            if name not in without:
                chown(path, owner, owner)

    def test_passes(self, tree):
        self.back(tree)
        os.chmod(tree / "tree/tool", 0o4755)
        assert check.undone(str(tree))

    def test_nothing_done(self, tree):
        assert "`.` はまだ `100000:100000` のもの" in check.undone(str(tree)).message

    def test_chown_all_to_one(self, tree):
        subprocess.run(["chown", "-R", "0:0", tree / "tree"], check=True)
        assert "みな 0 番に" in check.undone(str(tree)).message

    def test_the_link_was_followed(self, tree):
        self.back(tree, chown=os.chown)
        assert "`letter` まで 33 番に" in check.undone(str(tree)).message

    def test_one_forgotten(self, tree):
        self.back(tree, "cache/page")
        assert "`cache/page` はまだ `100033:100033` のもの" in check.undone(str(tree)).message

    def test_the_mode_is_lost(self, tree):
        self.back(tree)
        assert "`tool` のモードが 755" in check.undone(str(tree)).message

    def test_a_tree_that_has_gone(self, tree):
        machine.remove_tree(str(tree / "tree"))
        assert "消えていないか" in check.undone(str(tree)).message


def test_the_moved_tree_is_what_a_map_shows(top):
    """Seen through a map that takes the step away, the owners are those of before."""
    check.moved(str(top))
    (top / "seen").mkdir()
    with ExitStack() as stack:
        stack.enter_context(idmap.bind(str(top / "tree"), str(top / "seen"), [(check.STEP, 0, 65_536)]))
        assert {name: os.lstat(top / "seen" / name).st_uid for name in check.MOVED} == check.MOVED
