"""The exercises of 03-image/01-overlay: each wrong state gives its hint, and the kernel agrees with the right one."""

import os
import shutil
import stat
import subprocess

import pytest

from labs import machine, mounts
from labs.check import UNANSWERED
from labs.check import image_overlay as check

OPAQUE = "trusted.overlay.opaque"


@pytest.fixture
def folder():
    """A directory on the lab's disk: overlay wants upper and work on one filesystem that knows trusted attributes."""
    path = f"{machine.DATA}/{machine.new_name('test')}"
    os.makedirs(path)
    yield path
    machine.remove_tree(path)


@pytest.fixture
def site(folder):
    lower, upper = f"{folder}/lower", f"{folder}/upper"
    check.site(lower)
    os.mkdir(upper)
    return lower, upper


def whiteout(path, major=0, minor=0):
    os.mknod(path, stat.S_IFCHR, os.makedev(major, minor))


def solve(upper):
    whiteout(f"{upper}/debug.log")
    os.mkdir(f"{upper}/cache")
    os.setxattr(f"{upper}/cache", OPAQUE, b"y")
    write(f"{upper}/cache/fresh")


def write(path, text="new"):
    with open(path, "w") as file:
        file.write(text)


def test_by_hand_passes(site):
    solve(site[1])
    assert check.by_hand(*site)


def test_by_hand_unanswered():
    assert check.by_hand("lower", ...).message == UNANSWERED


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda lower, upper: os.unlink(f"{lower}/debug.log"), "lower を書き換えました"),
        (lambda lower, upper: write(f"{upper}/.wh.debug.log"), "`.wh.debug.log` は tar の中での書き方"),
        (lambda lower, upper: write(f"{upper}/cache/.wh..wh..opq"), "`cache/.wh..wh..opq` は tar の中での書き方"),
        (lambda lower, upper: os.unlink(f"{upper}/debug.log"), "印がありません"),
        (lambda lower, upper: (os.unlink(f"{upper}/debug.log"), write(f"{upper}/debug.log")), "代わりに見えます"),
        (lambda lower, upper: (os.unlink(f"{upper}/debug.log"), whiteout(f"{upper}/debug.log", 1, 3)), "番号が 1:3"),
        (lambda lower, upper: shutil.rmtree(f"{upper}/cache"), "upper に `cache` がまだない"),
        (lambda lower, upper: (shutil.rmtree(f"{upper}/cache"), whiteout(f"{upper}/cache")), "消えてしまいます"),
        (lambda lower, upper: os.unlink(f"{upper}/cache/fresh"), "`fresh` がありません"),
        (lambda lower, upper: os.setxattr(f"{upper}/cache", "user.overlay.opaque", b"y"), "`userxattr`"),
        (lambda lower, upper: (os.removexattr(f"{upper}/cache", OPAQUE), whiteout(f"{upper}/cache/1"),
                               whiteout(f"{upper}/cache/2")), "一つずつ whiteout"),
        (lambda lower, upper: os.removexattr(f"{upper}/cache", OPAQUE), "混ざっています"),
        (lambda lower, upper: os.setxattr(f"{upper}/cache", OPAQUE, b"yes"), "値が `yes`"),
        (lambda lower, upper: os.setxattr(upper, "trusted.overlay.impure", b"y"), "マウントした跡"),
        (lambda lower, upper: write(f"{upper}/notes"), "余計な名前 `notes`"),
    ],
)
def test_by_hand_hints(site, change, hint):
    solve(site[1])
    change(*site)
    verdict = check.by_hand(*site)
    assert not verdict
    assert hint in verdict.message


def test_by_hand_sees_that_overlay_did_it(site, folder):
    lower, upper = site
    os.mkdir(f"{folder}/work")
    os.mkdir(f"{folder}/merged")
    with mounts.overlay([lower], upper, f"{folder}/work", f"{folder}/merged") as merged:
        script = "rm debug.log; rm -r cache; mkdir cache; touch cache/fresh"
        subprocess.run(["sh", "-e", "-c", script], cwd=merged, check=True)
    assert "マウントした跡" in check.by_hand(lower, upper).message


RIGHT = {"app": "3", "conf/a": "2", "conf/b": "-", "data/log": "5", "data/old": "-", "lib": "4"}


def test_sources_passes(folder):
    assert check.sources(check.stack(folder), RIGHT)


@pytest.mark.parametrize(
    ("name", "given", "hint"),
    [
        ("app", "", "`app` の答えがまだ"),
        ("app", "top", "層の番号でも"),
        ("app", "-", "見えています"),
        ("app", "2", "層 2 に `app` はありません"),
        ("app", "1", "もっと上の層に"),
        ("conf/b", "4", "文字デバイス 0:0"),
        ("conf/b", "1", "上の層の whiteout に"),
        ("data/old", "2", "opaque なディレクトリに"),
        ("lib", "3", "文字デバイス 0:0"),
    ],
)
def test_sources_hints(folder, name, given, hint):
    verdict = check.sources(check.stack(folder), RIGHT | {name: given})
    assert not verdict
    assert hint in verdict.message


def test_sources_unanswered():
    assert check.sources({}, ...).message == UNANSWERED


NAMES = ["cache", "cache/.wh..wh..opq", "cache/3", "etc", "etc/.wh.motd", "log", "log/app"]


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (..., UNANSWERED),
        ("etc/.wh.motd", "リストに並べて"),
        ([*NAMES, "etc/.wh.new"], "下の層にない名前"),
        ([*NAMES, "etc/new"], "下の層にない名前"),
        ([*NAMES, "etc/motd"], "その名前では"),
        ([*NAMES, "cache/.wh.1"], "ディレクトリごと隠す名前"),
        ([*NAMES, ".wh.cache"], "印の付いたディレクトリ"),
        (["cache/.wh..wh..opq"], "`etc/motd` を消したこと"),
        (["etc/.wh.motd"], "混ざってしまいます"),
        (["etc/.wh.motd", "cache/.wh..wh..opq"], "作り直した `cache`"),
        ([name for name in NAMES if name != "log/app"], "`chmod` だけでも"),
        ([name for name in NAMES if name != "etc"], "親のディレクトリ"),
        ([*NAMES, "etc/hosts"], "`etc/hosts` は"),
    ],
)
def test_tar_names_hints(answer, hint):
    verdict = check.tar_names(answer)
    assert not verdict
    assert hint in verdict.message


def test_tar_names_passes():
    assert check.tar_names(["./" + name for name in NAMES])
