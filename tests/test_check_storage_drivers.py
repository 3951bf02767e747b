"""The exercises of 05-storage/03-storage-drivers: each wrong state gives its hint, the right one none."""

import os
import shutil
import stat

import pytest

from labs import disks, drivers
from labs.check import UNANSWERED
from labs.check import storage_drivers as check

MIB = 1 << 20
RIGHT = ["append", "chmod", "rename"]


@pytest.fixture(scope="module")
def driver():
    with disks.disk(64 * MIB) as disk:
        made = drivers.Overlay(disk.path)
        made.prepare("base")
        with made.mount("base") as path:
            drivers.write(f"{path}/big", 4 * MIB)
            drivers.scatter(f"{path}/small", 3)
        check.image(made)
        yield made


def test_copied_passes(driver):
    assert check.copied(driver, RIGHT)
    assert driver.layers() == ["base", "build", "clean"]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (..., UNANSWERED),
        ("append", "リストに並べて"),
        (["touch"], "`touch` という操作はありません"),
        ([*RIGHT, "read"], "`read` を実際に動かしても"),
        ([*RIGHT, "truncate"], "写すべき中身がありません"),
        ([*RIGHT, "delete"], "隠すための印だけ"),
        (["chmod", "rename"], "`append` を実際に動かすと、その層は 4 MiB を超えました"),
        (["append", "rename"], "変えた権限の置き場"),
        (["append", "chmod"], "名前を変えられません"),
    ],
)
def test_copied_hints(driver, answer, hint):
    verdict = check.copied(driver, answer)
    assert not verdict
    assert hint in verdict.message


@pytest.fixture
def cleared(driver):
    yield driver
    if "slim" in driver.layers():
        driver.remove("slim")


def solve(driver, parent="base"):
    driver.prepare("slim", parent)
    copy(driver, "app")


def copy(driver, name, source="build"):
    shutil.copytree(f"{driver.store}/{source}/diff/{name}", f"{driver.store}/slim/diff/{name}")


def test_slim_passes(cleared):
    solve(cleared)
    assert check.slim(cleared)


def whiteout(driver):
    solve(driver)
    os.mknod(f"{driver.store}/slim/diff/cache.bin", stat.S_IFCHR, 0)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda driver: None, "まだありません"),
        (lambda driver: driver.prepare("slim", "build"), "`cache.bin` が見えています"),
        (lambda driver: driver.prepare("slim", "base"), "`app/program` がありません"),
        (lambda driver: driver.prepare("slim", "clean"), "`slim` の下に `build`"),
        (lambda driver: (driver.prepare("slim"), copy(driver, "app")), "`slim` の下に `base` がありません"),
        (lambda driver: (solve(driver), os.mknod(f"{driver.store}/slim/diff/big", stat.S_IFCHR, 0)),
         "`clean` に見える `big`"),
        (lambda driver: (solve(driver), drivers.write(f"{driver.store}/slim/diff/notes", 1)), "`clean` にない `notes`"),
        (whiteout, "`cache.bin` の whiteout"),
        (lambda driver: (solve(driver), drivers.write(f"{driver.store}/slim/diff/app/program", 1)), "大きさか権限"),
    ],
)
def test_slim_hints(cleared, make, hint):
    make(cleared)
    verdict = check.slim(cleared)
    assert not verdict
    assert hint in verdict.message


@pytest.fixture
def folder():
    with disks.disk(16 * MIB, quota=True) as disk:
        check.shares(disk.path)
        yield disk.path


def fence(folder, size=4 * MIB):
    disks.limit(f"{folder}/log", 5, size)


def again(folder):
    """A copy is new, and inherits."""
    shutil.copy(f"{folder}/log/old", f"{folder}/log/new")
    os.replace(f"{folder}/log/new", f"{folder}/log/old")


@pytest.mark.machine
def test_fenced_passes(folder):
    fence(folder)
    again(folder)
    assert check.fenced(folder)
    assert os.listdir(f"{folder}/web") == []


@pytest.mark.machine
@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda folder: None, "番号がまだありません"),
        (lambda folder: (fence(folder), disks.limit(f"{folder}/web", 5, 4 * MIB)), "同じ project"),
        (lambda folder: fence(folder, 0), "限りなし"),
        (lambda folder: fence(folder, 2 * MIB), "上限は 2048 KiB"),
        (lambda folder: (fence(folder), os.unlink(f"{folder}/log/old")), "消してしまいました"),
        (lambda folder: (fence(folder), os.truncate(f"{folder}/log/old", MIB)), "欠けました"),
        (fence, "数に入っていません"),
        (lambda folder: (fence(folder), again(folder), drivers.write(f"{folder}/rest", 8 * MIB)), "`web` に書けたのは"),
    ],
)
def test_fenced_hints(folder, make, hint):
    make(folder)
    verdict = check.fenced(folder)
    assert not verdict
    assert hint in verdict.message
