"""The exercises of 02-oci-and-runtime/04-docker-vs-podman: each wrong state gives its hint, the solution passes."""

import fcntl
import os
import signal

import pytest

from labs import process, syscalls
from labs.check import oci_engines as check
from labs.syscalls import CLONE_NEWUSER

CONTENT = b"\x7fELF a small program"
ALL = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "runtime"
    path.write_bytes(CONTENT)
    return str(path)


def memfd(content=CONTENT, seals=ALL | fcntl.F_SEAL_SEAL, flags=os.MFD_ALLOW_SEALING):
    fd = os.memfd_create("copy", os.MFD_CLOEXEC | flags)
    os.write(fd, content)
    if flags:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda path: os.open(path, os.O_RDONLY), "memfd_create"),
        (lambda path: memfd(flags=0), "MFD_ALLOW_SEALING"),
        (lambda path: memfd(b""), "中身が元のファイルと違います"),
        (lambda path: memfd(seals=ALL), "`F_SEAL_SEAL` がありません"),
        (lambda path: memfd(seals=fcntl.F_SEAL_WRITE), "`F_SEAL_GROW F_SEAL_SHRINK F_SEAL_SEAL`"),
    ],
)
def test_sealed_copy_hints(make, hint, original):
    fd = make(original)
    verdict = check.sealed_copy(fd, original)
    os.close(fd)
    assert not verdict
    assert hint in verdict.message


def test_sealed_copy_passes(original):
    fd = memfd()
    assert check.sealed_copy(fd, original)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    os.close(fd)


def in_user_namespace(become):
    """A child in a user namespace with the map of a rootless container, as user `become` of it (None: as it is)."""
    ready, done = os.pipe(), os.pipe()

    def main():
        syscalls.unshare(CLONE_NEWUSER)
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os.setuid(become)
        os.write(ready[1], b".")
        signal.pause()

    child = process.fork(main)
    os.read(ready[0], 1)
    with open(f"/proc/{child.pid}/uid_map", "w") as file:
        file.write("0 1000 1\n1 100000 65536")
    os.write(done[1], b".")
    os.read(ready[0], 1)
    for fd in (*ready, *done):
        os.close(fd)
    return child


@pytest.mark.parametrize(
    ("user", "hint"), [(0, "中では root です"), (7, "中の番号は 7 です"), (1000, None)]
)
def test_ordinary_user(user, hint):
    with in_user_namespace(user) as child:
        verdict = check.ordinary_user(child.pid)
    assert bool(verdict) == (hint is None)
    assert hint is None or hint in verdict.message


def test_ordinary_user_of_the_host():
    with process.fork(signal.pause) as child:
        assert "ホストと同じです" in check.ordinary_user(child.pid).message
    assert "もうありません" in check.ordinary_user(child.pid).message


def test_unanswered():
    assert "まだ答えが" in check.ordinary_user(...).message
    assert "まだ答えが" in check.sealed_copy(..., "/bin/sh").message
