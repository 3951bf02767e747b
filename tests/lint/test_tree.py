"""The tree itself is clean: code, types, scripts, notebooks, prose. One test a tool, its findings in the failure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = ["lab", "vm/native.sh", "vm/provision.sh", "vm/images/build.sh", ".ci/run"]
TOOLS = {
    "code": ["-m", "ruff", "check", "."],
    "types": ["-m", "mypy"],
    "notebooks": ["-m", "tests.lint.notebooks"],
    "prose": ["-m", "tests.lint.prose"],
}


@pytest.mark.parametrize("what", TOOLS)
def test_clean(what):
    done = subprocess.run([sys.executable, *TOOLS[what]], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
    done = subprocess.run(["shellcheck", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_every_script_is_checked():
    found = {str(p.relative_to(REPO)) for p in REPO.rglob("*.sh") if not {"_build", ".lab"} & set(p.parts)}
    assert found <= set(SCRIPTS)


def test_every_notebook_is_in_the_book():
    toc = set(re.findall(r"file: (\S+)", (REPO / "book/_toc.yml").read_text()))
    notebooks = {str(p.relative_to(REPO / "book").with_suffix("")) for p in REPO.glob("book/*/*.ipynb")}
    assert notebooks and notebooks <= toc


def test_imports_in_labs_go_down_only():
    floors = [
        ["errors"], ["machine", "oci_json"], ["syscalls"],
        ["process", "mounts", "devices", "capabilities"], ["seccomp", "landlock", "apparmor"],
        ["namespaces", "cgroup", "oci_config", "oci_hooks", "layer", "dockerfile", "disks"],
        ["monitor", "oci_root", "oci_cgroup", "oci_process", "oci_spawn", "oci_schema", "strace", "engine", "netns",
         "drivers", "storage", "idmap", "capability_trials", "seccomp_notify"],
        ["container", "microvm", "oci_state", "oci_attend", "image", "netlink", "firewall", "volume_plugin", "userns",
         "attacks"],
        ["oci_init", "registry", "registry_server", "ipam", "dns"],
        ["oci", "supply", "build_config", "build_root", "network", "security", "controller"],
        ["oci_cli", "build_cache", "build_copy", "links", "cni"], ["build"],
        ["compose_yaml"], ["compose_env"], ["compose_forms"], ["compose_file"], ["compose"],
        ["compose_bundle", "compose_unit", "compose_refuse"], ["compose_supervisor"], ["compose_run"],
        ["compose_three"],
        ["show", "lab"], ["explore", "topology", "capture", "mountmap", "compose_show"], ["check"],
    ]
    level = {name: number for number, names in enumerate(floors) for name in names}
    modules = {p.stem: p for p in (REPO / "labs").glob("*.py") if p.stem != "__init__"}
    assert set(modules) | {"check"} == set(level)
    for name, path in modules.items():
        text = path.read_text()
        imported = set(re.findall(r"^from labs\.(\w+)", text, re.MULTILINE))
        for line in re.findall(r"^from labs import (.+)$", text, re.MULTILINE):
            imported |= {part.split(" as ")[0].strip() for part in line.split(",")}
        assert all(level[other] < level[name] for other in imported), (name, imported)
