"""The exercises of 02-oci-and-runtime/01-bundle, and the schema behind them: each wrong state gives its hint."""

import json
import os
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest

from labs import machine, process
from labs.check import UNANSWERED
from labs.check import oci_bundle as check
from labs.oci_schema import errors
from tests import oci

GOOD = {
    "ociVersion": "1.2.0",
    "root": {"path": "rootfs", "readonly": True},
    "process": {"args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"]},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
               {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
    "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}], "cgroupsPath": "/labs/check-bundle"},
}


def changed(path, value):
    config = deepcopy(GOOD)
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


def test_schema_names_the_field():
    assert errors({}) == ["$: 'ociVersion' is a required property"]
    assert errors(changed(("process", "args"), "sh")) == ["process.args: 'sh' is not of type 'array'"]
    assert errors(changed(("linux", "namespaces", 0, "type"), "mnt"))[0].startswith("linux.namespaces[0].type: 'mnt'")
    assert errors(GOOD) == []


def test_schema_of_the_other_files():
    state = {"ociVersion": "1.2.0", "id": "a", "status": "paused", "bundle": "/b"}
    assert errors(state, "state-schema.json")[0].startswith("status: 'paused'")
    assert "$: 'layers' is a required property" in errors({}, "image-manifest-schema.json", "image-spec")
    layer = {"mediaType": "nonsense", "size": "1", "digest": "sha256:" + "0" * 64}
    manifest = {"schemaVersion": 2, "config": layer, "layers": [layer]}
    found = errors(manifest, "image-manifest-schema.json", "image-spec")
    assert any(line.startswith("layers[0].size: ") for line in found)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (None, UNANSWERED),
        (changed(("process", "args"), "sh"), "`process.args: 'sh' is not of type 'array'`"),
        (changed(("root",), {"path": "rootfs", "readOnly": True}), "大文字と小文字"),
        (changed(("root",), {"path": "rootfs", "readonly": False}), "大文字と小文字"),
        (changed(("linux", "namespaces"), [{"type": "pid"}]), "mount namespace がありません"),
        (changed(("mounts",), []), "`/proc` がマウントされません"),
    ],
)
def test_legal_hints(config, hint):
    verdict = check.legal(config)
    assert not verdict
    assert hint in verdict.message


def test_legal_passes():
    assert check.legal(GOOD)


@pytest.fixture
def create(tmp_path):
    """Create a container from a config, and delete it afterwards; gives its pid and its fifo."""
    runc = ["runc", "--root", tmp_path / "state"]

    def make(**linux):
        config = changed(("root", "path"), machine.rootfs("busybox"))
        config["linux"] |= linux
        (tmp_path / "config.json").write_text(json.dumps(config))
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "check": True}
        subprocess.run([*runc, "create", "-b", tmp_path, "check-bundle"], **quiet)
        state = json.loads((tmp_path / "state/check-bundle/state.json").read_text())
        made.append(state["init_process_pid"])
        return made[0], tmp_path / "state/check-bundle/exec.fifo"

    made = []
    yield make
    oci.kill(made[0])
    subprocess.run([*runc, "delete", "--force", "check-bundle"], check=True)


def test_by_hand(create):
    pid, fifo = create()
    assert "fifo の前で待って" in check.by_hand(pid, fifo).message
    fifo.read_bytes()
    assert "残っています" in check.by_hand(pid, fifo).message
    fifo.unlink()
    assert check.by_hand(pid, fifo)
    os.kill(pid, 9)
    process.until(lambda: not Path(f"/proc/{pid}").exists())
    assert "もうありません" in check.by_hand(pid, fifo).message


def test_by_hand_with_the_fifo_removed_too_early(create):
    pid, fifo = create()
    fifo.unlink()
    assert "読み側を開けません" in check.by_hand(pid, fifo).message


@pytest.mark.parametrize(
    ("linux", "hint"),
    [
        ({}, "まだ読めます。隠すパス"),
        ({"readonlyPaths": ["/proc/version", "/proc/irq"]}, "別の項目"),
        ({"maskedPaths": ["/proc/version"]}, "まだ何も重なっていません"),
        ({"maskedPaths": ["/proc/version", "/proc/irq"]}, "空になりました"),
        ({"maskedPaths": ["/proc/version"], "readonlyPaths": ["/proc/irq"]}, ""),
    ],
)
def test_guarded(create, linux, hint):
    pid, _ = create(**linux)
    verdict = check.guarded(json.dumps({"pid": pid}))
    assert verdict.passed is not bool(hint)
    assert hint in verdict.message


def test_guarded_without_a_container():
    assert "断り" in check.guarded("container does not exist").message
