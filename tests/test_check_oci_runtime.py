"""The exercises of 02-oci-and-runtime/02-labs-runtime: each wrong container gives its hint, the solution passes."""

import json
import os

import pytest

from labs.check import oci_runtime as check
from tests import oci

TMP = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}
MKDIR = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}
BOUNDING = {"bounding": ["CAP_KILL"]}


def answer(exercise, patch):
    """What the exercise says of a container made from the base configuration with the patch."""
    with oci.bundle("exec sleep 1000", patch) as made:
        made.detached()
        return exercise(json.loads(made.good("state", made.name))["pid"])


def mounted(kind, *options):
    return {"mounts+": [TMP | {"type": kind, "options": list(options)}]}


@pytest.mark.parametrize(("patch", "hint"), [
    ({}, "`/tmp` にマウントがありません"),
    (mounted("ramfs", "noexec"), "`/tmp` は ramfs です"),
    (mounted("tmpfs", "size=1m"), "実行を止める属性"),
    (mounted("tmpfs", "noexec"), "大きさの上限がありません"),
    (mounted("tmpfs", "noexec", "size=2m"), "size=2048k"),
])
def test_scratch_says_what_is_missing(patch, hint):
    found = answer(check.scratch, patch)
    assert not found
    assert hint in found.message


def test_scratch_passes():
    assert answer(check.scratch, mounted("tmpfs", "noexec", "size=1m"))


@pytest.mark.parametrize(("patch", "hint"), [
    ({"process.capabilities": BOUNDING, "linux.seccomp": MKDIR}, "`CapBnd` だけが残っています"),
    ({"linux.seccomp": MKDIR}, "`CapPrm CapEff CapBnd` が空ではありません"),
    ({"process.capabilities": {}}, "`Seccomp` がまだ 0"),
])
def test_confined_says_what_is_left(patch, hint):
    found = answer(check.confined, patch)
    assert not found
    assert hint in found.message


def test_confined_passes():
    assert answer(check.confined, {"process.capabilities": {}, "linux.seccomp": MKDIR})


@pytest.mark.parametrize("exercise", [check.scratch, check.confined])
def test_a_process_of_the_host_is_no_container(exercise):
    assert "PID 1 ではありません" in exercise(os.getpid()).message
    assert "もう終わっています" in exercise(4194305).message
