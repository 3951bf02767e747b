"""The exercises of 01-container/03-rootfs: each wrong state gives its hint, the solution passes."""

import os

import pytest

from labs import devices, machine, syscalls
from labs.check import container as check
from labs.syscalls import CLONE_NEWNS, MNT_DETACH, MS_BIND, MS_PRIVATE, MS_REC

JAIL = machine.ROOTFS["busybox"]


def unshare():
    syscalls.unshare(CLONE_NEWNS)
    syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)


def bind():
    syscalls.mount(JAIL, JAIL, None, MS_BIND)
    os.chdir(JAIL)


def pivot():
    syscalls.pivot_root(".", ".")


def detach():
    syscalls.umount2(".", MNT_DETACH)


def new_proc():
    syscalls.mount("proc", "/proc", "proc")


def jail():
    os.chroot(JAIL)


def inside():
    os.chdir("/")


def nobody():
    os.setuid(65534)


def keep():
    os.open("/", os.O_PATH)


@pytest.mark.parametrize(
    ("calls", "hint"),
    [
        ([lambda: os.chroot("/no/such")], "途中で止まりました"),
        ([], "まだホストの"),
        ([lambda: os.chroot("/usr")], "rootfs の外"),
        ([jail], "作業ディレクトリ"),
        ([keep, jail, inside], "fd が残っています"),
        ([jail, inside], "CAP_SYS_CHROOT"),
    ],
)
def test_a_jail_with_a_way_out_gets_its_hint(calls, hint):
    verdict = check.sealed(calls)
    assert not verdict
    assert hint in verdict.message


def test_a_sealed_jail_passes():
    assert check.sealed([jail, inside, nobody])


@pytest.mark.parametrize(
    ("calls", "hint"),
    [
        ([unshare, pivot], "途中で止まりました"),
        ([jail], "まだホストの mount namespace"),
        ([unshare, jail], "ルートがマウントではありません"),
        ([unshare, bind], "ルートがまだホストのまま"),
        ([unshare, bind, pivot], "古いルートが `/` に残って"),
        ([unshare, bind, pivot, detach], "`/proc` が空"),
    ],
)
def test_a_root_not_quite_new_gets_its_hint(calls, hint):
    verdict = check.new_root(calls)
    assert not verdict
    assert hint in verdict.message


def test_a_new_root_passes():
    assert check.new_root([unshare, bind, pivot, detach, new_proc])


@pytest.mark.parametrize(
    ("rules", "hint"),
    [
        ([], "`/dev/null`"),
        (["c 1:3 r"], "`/dev/null`"),
        (["c *:* rwm"], "`/dev/zero`"),
        (devices.DEFAULT, "`/dev/zero`"),
        (["c 1:3 rw"], "`/dev/fuse`（10:229）が読めません"),
        (["c 1:3 rw", "c 10:229 rw"], "文字は `r` だけ"),
        (["c 1:3 rwm", "c 10:229 r"], "`mknod` が通って"),
    ],
)
def test_rules_that_allow_too_little_or_too_much_get_their_hint(rules, hint):
    verdict = check.device_rules(rules)
    assert not verdict
    assert hint in verdict.message


def test_the_rules_asked_for_pass():
    assert check.device_rules(["c 1:3 rw", "c 10:229 r"])
