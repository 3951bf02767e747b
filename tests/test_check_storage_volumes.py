"""The exercises of 05-storage/02-volumes: each wrong state gives its hint, and the kernel agrees with the right one."""

import shutil
import subprocess

import pytest

from labs import process, storage, volume_plugin
from labs.check import UNANSWERED
from labs.check import storage_volumes as check

RIGHT = {"/data/orders": "volume", "/data/cache/page": "tmpfs", "/data/spool/job": "layer", "/opt/orders": "volume",
         "/conf/app.ini": "bind", "/var/note": "layer"}


@pytest.fixture
def volumes(tmp_path):
    return storage.Volumes(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    volumes = storage.Volumes(str(tmp_path_factory.mktemp("puzzle") / "store"))
    with check.puzzle(volumes, str(tmp_path_factory.mktemp("conf"))) as box:
        process.until(lambda: box.exec(["test", "-e", "/tmp/ready"]).code == 0)
        yield volumes, box


class TestFates:
    def test_passes(self, running):
        assert check.fates(*running, RIGHT)

    def test_the_files_lie_where_the_answer_says(self, running, tmp_path):
        volumes, box = running
        assert sorted(path.name for path in (tmp_path / volumes.get("puzzle").path).iterdir()) == [
            "cache", "orders", "spool"]
        upper = subprocess.run(["find", box.upper, "-type", "f"], capture_output=True, text=True, check=True).stdout
        assert {name.removeprefix(box.upper) for name in upper.split()} == {"/var/note", "/tmp/job", "/tmp/ready"}

    def test_unanswered(self, running):
        assert check.fates(*running, ...).message == UNANSWERED

    @pytest.mark.parametrize(("path", "given", "hint"), [
        ("/data/orders", "", "`/data/orders` の答えがまだ"),
        ("/data/orders", "disk", "`/data/orders` の答え `disk` は"),
        ("/data/orders", "layer", "`/data/orders` は `layer` にありません。`mounts.table"),
        ("/data/cache/page", "volume", "`/data/cache/page` は `volume` にありません。`mounts.table"),
        ("/data/spool/job", "volume", "`/data/spool/job` は `volume` にありません。シンボリックリンク"),
        ("/opt/orders", "layer", "`/opt/orders` は `layer` にありません。シンボリックリンク"),
        ("/conf/app.ini", "volume", "`/conf/app.ini` は `volume` にありません。`mounts.table"),
        ("/var/note", "tmpfs", "`/var/note` は `tmpfs` にありません。`mounts.table"),
    ])
    def test_hints(self, running, path, given, hint):
        verdict = check.fates(*running, RIGHT | {path: given})
        assert not verdict
        assert hint in verdict.message


COPY = 'cp -a "$OLD/." "$NEW"'
FIX = '; touch -r "$OLD" "$NEW"'


class TestMoved:
    def copy(self, volumes, command):
        old, new = check.original(volumes), volumes.create("ledger-2").path
        subprocess.run(["sh", "-euc", command], env={"OLD": old, "NEW": new, "PATH": "/usr/bin:/bin"}, check=True)
        return check.moved(volumes, "ledger-2")

    def test_backup_and_restore_pass(self, volumes, tmp_path):
        check.original(volumes)
        volumes.backup("ledger-1", str(tmp_path / "tar"))
        volumes.restore("ledger-2", str(tmp_path / "tar"))
        assert check.moved(volumes, "ledger-2")

    def test_cp_passes_too(self, volumes):
        assert self.copy(volumes, COPY)

    def test_unanswered_and_none(self, volumes):
        check.original(volumes)
        assert check.moved(volumes, ...).message == UNANSWERED
        assert "`ledger-2` がありません" in check.moved(volumes, "ledger-2").message
        assert "そのものです" in check.moved(volumes, "ledger-1").message

    def test_copytree_loses_the_owner(self, volumes):
        source = check.original(volumes)
        shutil.copytree(source, volumes.create("ledger-2").path, dirs_exist_ok=True, symlinks=True)
        assert "`.` の持ち主の番号" in check.moved(volumes, "ledger-2").message

    @pytest.mark.parametrize(("command", "hint"), [
        ("true", "`archive` が写っていません"),
        (COPY + '; touch "$NEW/more"', "元にはない `more`"),
        ('cp -aL "$OLD/." "$NEW"', "`current` の中身が違います"),
        (COPY + '; chown 0:0 "$NEW"', "`.` の持ち主の番号"),
        (COPY + '; chmod 755 "$NEW"', "`.` の権限"),
        (COPY + '; rm "$NEW/ledger.today"; cp -a "$OLD/ledger" "$NEW/ledger.today"', "二つの名前を持つ"),
        (COPY + '; setfattr -x user.origin "$NEW/ledger"', "`ledger` の拡張属性が落ちました"),
        (COPY + '; touch "$NEW/archive/1"', "`archive/1` の変更時刻"),
    ])
    def test_hints(self, volumes, command, hint):
        verdict = self.copy(volumes, command)
        assert not verdict
        assert hint in verdict.message


STEPS = [("Create", {}), ("Mount", {"ID": "a"}), ("Mount", {"ID": "b"}), ("Unmount", {"ID": "a"}), ("Remove", {})]


class TestShared:
    def ask(self, volumes, steps):
        driver = volume_plugin.Driver(volumes)
        for method, more in steps:
            driver.answer(f"VolumeDriver.{method}", {"Name": "cart", **more})
        return check.shared(driver, "cart")

    def test_passes(self, volumes):
        assert self.ask(volumes, STEPS)

    def test_unanswered(self, volumes):
        assert check.shared(volume_plugin.Driver(volumes), ...).message == UNANSWERED

    @pytest.mark.parametrize(("steps", "hint"), [
        ([], "まだ一つも来ていません"),
        ([("Mount", {"ID": "a"})], "作られていません。最後の断りは「volume: 'cart': no such volume」"),
        (STEPS[:1], "`Mount` がまだありません"),
        (STEPS[:2], "`ID` が一つだけ"),
        ([*STEPS[:2], STEPS[1]], "`ID` が一つだけ"),
        (STEPS[:3], "まだ終わっていません"),
        ([*STEPS[:3], ("Unmount", {"ID": "c"})], "どれとも合いません"),
        ([*STEPS[:4], ("Unmount", {"ID": "b"})], "両方とも `Unmount`"),
        (STEPS[:4], "最後に、使用中のまま"),
        ([*STEPS[:4], ("Unmount", {"ID": "b"}), ("Remove", {}), ("Create", {})], "両方とも `Unmount`"),
    ])
    def test_hints(self, volumes, steps, hint):
        verdict = self.ask(volumes, steps)
        assert not verdict
        assert hint in verdict.message
