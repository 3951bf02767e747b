"""The exercises of 05-storage/01-bind-mount: each wrong state gives its hint, the solution passes."""

import os
from contextlib import ExitStack

import pytest

from labs import mounts, syscalls
from labs.check import storage_bind as check
from labs.syscalls import (
    AT_RECURSIVE,
    CLONE_NEWNS,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SHARED,
    MS_SLAVE,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tmpfs of its own: data with another one below it, view and other."""
    with mounts.tmpfs(str(tmp_path)), ExitStack() as stack:
        for name in ("data/usb", "view", "other"):
            os.makedirs(tmp_path / name)
        stack.enter_context(mounts.tmpfs(str(tmp_path / "data")))
        os.mkdir(tmp_path / "data/usb")
        stack.enter_context(mounts.tmpfs(str(tmp_path / "data/usb")))
        monkeypatch.chdir(tmp_path)
        yield tmp_path
        os.chdir("/")


def bind(source="data", flags=MS_REC):
    return lambda: syscalls.mount(source, "view", None, MS_BIND | flags)


def remount(flags=MS_BIND):
    return lambda: syscalls.mount(None, "view", None, MS_REMOUNT | MS_RDONLY | flags)


def deep():
    mounts.make_readonly("view", recursive=True)


def below():
    mounts.make_readonly("view/usb")


@pytest.mark.parametrize(("calls", "hint"), [
    ([], "マウントポイントではありません"),
    ([bind("other")], "見えているのは `data` ではありません"),
    ([bind(flags=0)], "`view/usb` の下にあるはずのマウントが見えず"),
    ([bind(), remount(0)], "`data` のほうまで書けなくなりました"),
    ([bind()], "`view` に、まだ書けます"),
    ([bind(flags=MS_REC | MS_RDONLY)], "`view` に、まだ書けます"),
    ([bind(), remount()], "`view/usb` には、まだ書けます"),
    ([bind(), remount(), below], "`nosuid` が消えました"),
])
def test_readonly_hints(place, calls, hint):
    for call in calls:
        call()
    verdict = check.readonly("data", "view")
    assert not verdict
    assert hint in verdict.message


def test_readonly_passes(place):
    bind()()
    deep()
    assert check.readonly("data", "view")
    assert os.listdir("data") == ["usb"]


def unshare():
    syscalls.unshare(CLONE_NEWNS)


def change(kind, where="/"):
    return lambda: syscalls.mount(None, where, None, kind)


@pytest.mark.parametrize(("calls", "hint"), [
    (lambda folder: [], "まだホストの mount namespace"),
    (lambda folder: [unshare, change(MS_SLAVE, "/no/such")], "途中で止まりました（`mount: No such file"),
    (lambda folder: [unshare, lambda: os._exit(0)], "途中で止まりました"),
    (lambda folder: [unshare], "ホストに出ていきました"),
    (lambda folder: [unshare, change(MS_PRIVATE, folder)], "入ってきません"),
    (lambda folder: [unshare, change(MS_REC | MS_PRIVATE)], "入ってきません"),
    (lambda folder: [unshare, change(MS_SLAVE, folder)], "のマウントが shared のままです"),
])
def test_one_way_hints(tmp_path, calls, hint):
    with mounts.tmpfs(str(tmp_path)):
        syscalls.mount(None, str(tmp_path), None, MS_SHARED)
        verdict = check.one_way(calls)
    assert not verdict
    assert hint in verdict.message


def test_one_way_passes():
    assert check.one_way(lambda folder: [unshare, change(MS_REC | MS_SLAVE)])


def by_path(root, source, target):
    syscalls.mount(source, root + target, None, MS_BIND)


def by_last_name(root, source, target):
    syscalls.move_mount(syscalls.open_tree(source), root + target)


def outside(root, source, target):
    syscalls.mount(source, f"{root}/../outside", None, MS_BIND)


def on_the_root(root, source, target):
    syscalls.move_mount(syscalls.open_tree(source), f"{root}/inside")


def by_fd(root, source, target):
    tree = syscalls.open_tree(source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE)
    syscalls.mount_setattr(tree, attr_set=MOUNT_ATTR_NOSUID | MOUNT_ATTR_RDONLY)
    syscalls.move_mount(tree, target_fd=mounts.beneath(root, target))


@pytest.mark.parametrize(("attach", "hint"), [
    (lambda *_: None, "マウントが一つも増えていません"),
    (outside, "`outside` （ルートの外）にマウントされました"),
    (by_path, "`../outside` へのリンクのとき、`outside` （ルートの外）"),
    (by_last_name, "`../outside` へのリンクのとき、`move_mount: Invalid argument` で終わりました"),
    (on_the_root, "`root/inside` にマウントされました"),
])
def test_inside_hints(attach, hint):
    verdict = check.inside(attach)
    assert not verdict
    assert hint in verdict.message


def test_inside_passes():
    assert check.inside(by_fd)


@pytest.mark.parametrize("check_of", [check.readonly, check.one_way, check.inside])
def test_no_answer_yet(check_of):
    assert "まだ答え" in check_of(...).message
