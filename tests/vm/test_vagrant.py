"""The Vagrantfile, offline: valid, provider blocks included, and the check sees a typo in them."""

import os
import subprocess
from pathlib import Path

import pytest

from vm.image import REPO


@pytest.fixture
def vagrant(tmp_path):
    """Run `vagrant` on a copy of the Vagrantfile with a VirtualBox that only tells its version."""
    stub = tmp_path / "bin/VBoxManage"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 7.0.20r163906\n")
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_DEFAULT_PROVIDER": "virtualbox"}

    def run(text: str, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "Vagrantfile").write_text(text)
        return subprocess.run(["vagrant", *args], cwd=tmp_path, env={**env, **extra}, capture_output=True, text=True)

    return run


TEXT = (REPO / "Vagrantfile").read_text()


def test_valid_with_the_provider_block(vagrant):
    done = vagrant(TEXT, "validate")
    assert (done.returncode, "validated successfully" in done.stdout) == (0, True), done.stderr


def test_a_typo_in_the_provider_block_is_seen(vagrant):
    done = vagrant(TEXT.replace("machine.memory =", "machine.memorry ="), "validate")
    assert done.returncode == 1 and "memorry" in done.stderr


def test_the_other_providers_are_valid_too(vagrant):
    done = vagrant(TEXT, "validate", "--ignore-provider", VAGRANT_DEFAULT_PROVIDER="")
    assert done.returncode == 0, done.stderr


def test_a_bad_port_is_refused(vagrant):
    done = vagrant(TEXT, "validate", LAB_JUPYTER_PORT="many")
    assert done.returncode == 1 and "many" in done.stderr


def test_the_box_comes_from_the_environment(vagrant, tmp_path):
    """`vagrant up` asks for exactly the box, address and checksum that LABS_BOX* name."""
    catalogue = tmp_path / "catalogue.json"
    catalogue.write_text('{"name": "own/box", "versions": []}')
    done = vagrant(TEXT, "up", "--no-provision", LABS_BOX="own/box", LABS_BOX_URL=f"file://{catalogue}")
    assert done.returncode == 1
    assert "own/box" in done.stdout + done.stderr and Path(catalogue).name in done.stdout + done.stderr
