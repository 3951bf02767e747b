"""The lab machine through Vagrant: the same three calls as labvm, answered by the `vagrant` command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vm.image import REPO
from vm.labvm import RUN
from vm.steps import LabError, step

CONFIG = RUN / "vagrant-ssh-config"


def _vagrant(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["vagrant", *args], cwd=REPO, capture_output=True, text=True)


def running() -> Path | None:
    """Return the ssh_config of the running machine (host name `lab`), or None."""
    done = _vagrant("ssh-config", "--host", "lab")
    if done.returncode:
        return None
    # the labs work as root: the provisioner gave root the same key
    CONFIG.write_text(
        "\n".join("  User root" if line.split()[:1] == ["User"] else line for line in done.stdout.splitlines()) + "\n"
    )
    return CONFIG


def start() -> Path:
    """Bring the machine up, provisioned, and return its ssh_config; LabError with Vagrant's last words otherwise."""
    with step("vagrant up"):
        done = _vagrant("up")
    if done.returncode:
        raise LabError("vagrant up failed: " + " / ".join(done.stderr.strip().splitlines()[-3:]))
    config = running()
    if config is None:
        raise LabError("vagrant up ended, but vagrant ssh-config knows no machine")
    return config


def stop() -> bool:
    """Halt the machine; return whether one ran."""
    ran = running() is not None
    if ran:
        done = _vagrant("halt")
        if done.returncode:
            raise LabError("vagrant halt failed: " + done.stderr.strip())
    CONFIG.unlink(missing_ok=True)
    return ran
