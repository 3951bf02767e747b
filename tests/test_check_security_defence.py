"""The exercises of 06-security/05-defence-in-depth: each wrong answer gives its hint, the solution passes."""

import os
from pathlib import Path

import pytest

from labs import mounts, security
from labs.check import security_defence as check
from labs.security import LAYERS, OPEN

HARD = ["--user=1000:1000", "--security-opt=no-new-privileges", "--pids-limit=64"]


@pytest.fixture(scope="module")
def stage():
    with security.stage([*check.TOGETHER]) as made:
        yield made


def matrix():
    """As it is measured in the lab machine, of the attacks that the exercise names."""
    bare = dict.fromkeys(check.TOGETHER, OPEN)
    stops = {"user namespace": ["leaked fd", "ptrace"], "capabilities": ["ptrace"], "seccomp": ["ptrace"],
             "LSM": ["ptrace"], "no_new_privs": ["setuid program"], "non-root": ["leaked fd", "ptrace"]}
    alone = {layer: bare | dict.fromkeys(stops.get(layer, []), "EPERM") for layer in LAYERS}
    return security.Matrix(bare, dict.fromkeys(bare, "EPERM"), alone, {})


def test_the_fewest_layers():
    assert check.fewest(matrix(), check.TOGETHER) == 2
    assert check.fewest(matrix(), ["ptrace"]) == 1
    assert check.fewest(matrix(), []) == 0


@pytest.mark.parametrize(("layers", "hint"), [
    ("seccomp", "層の名前を並べたリスト"),
    (["tinfoil"], "`tinfoil` という層はありません"),
    (["capabilities", "no_new_privs"], "`leaked fd` がまだ通ります"),
    (["non-root"], "`setuid program` がまだ通ります"),
    (["non-root", "no_new_privs", "seccomp"], "3 層も使っています"),
])
def test_smallest_says_what_is_wrong(stage, layers, hint):
    found = check.smallest(stage, matrix(), layers)
    assert not found
    assert hint in found.message


@pytest.mark.parametrize("layers", [["non-root", "no_new_privs"], ["no_new_privs", "user namespace"]])
def test_smallest_passes(stage, layers):
    assert check.smallest(stage, matrix(), layers)


def test_smallest_sees_that_the_app_is_broken(stage, monkeypatch):
    monkeypatch.setattr(check, "TOGETHER", [])
    monkeypatch.setitem(LAYERS, "network policy", lambda: {"annotations": {security.POLICY: "tcp dport 1"}})
    found = check.smallest(stage, matrix(), ["network policy"])
    assert "アプリも `ETIMEDOUT` で" in found.message


@pytest.mark.parametrize(("flags", "hint"), [
    ("--read-only", "オプションを一つずつの文字列"),
    (["--user", "1000"], "オプションを一つずつの文字列"),
    (["--privileged"], "層をまとめて外す"),
])
def test_hardened_reads_its_options(stage, flags, hint):
    assert hint in check.hardened(stage, flags).message


@pytest.mark.machine
@pytest.mark.parametrize(("flags", "hint"), [
    (["--no-such"], "`unknown flag: --no-such`"),
    (["--cap-drop=ALL"], "`docker.sock` が通りました。ソケットの持ち主"),
])
def test_hardened_runs_the_container(stage, flags, hint):
    found = check.hardened(stage, flags)
    assert not found
    assert hint in found.message


@pytest.mark.machine
def test_hardened_passes(stage):
    assert check.hardened(stage, HARD)


@pytest.mark.parametrize(("through", "hint"), [
    ("ARP spoof", "`ARP spoof` が通りました。CAP_NET_RAW"),
    ("docker.sock", "`docker.sock` が通りました。ソケットの持ち主"),
    ("setuid program", "`setuid program` が通りました。`exec` で"),
    ("fork bomb", "`fork bomb` が通りました。cgroup"),
    ("", "アプリも `EACCES` で"),
])
def test_hardened_has_a_hint_for_each(stage, monkeypatch, through, hint):
    found = dict.fromkeys(check.FLAGS_AGAINST, "EPERM") | {"app": "EACCES", through: OPEN}
    monkeypatch.setattr(security.Stage, "engine", lambda *_, **__: found)
    assert hint in check.hardened(stage, []).message


def naive(folder):
    return Path(folder, "logs/report").read_text()


def only_the_last(folder):
    path = Path(folder, "logs/report")
    return "" if path.is_symlink() else path.read_text()


@pytest.mark.parametrize(("reader", "hint"), [
    ("logs/report", "という関数を渡して"),
    (lambda _: "", "ふつうの報告が読めません"),
    (naive, "外へのリンクに替えられ"),
    (only_the_last, "途中の `logs` がリンクでした"),
])
def test_careful_reader_says_how_it_was_led_astray(reader, hint):
    found = check.careful_reader(reader)
    assert not found
    assert hint in found.message


def test_careful_reader_passes():
    def reader(folder):
        with open(mounts.beneath(folder, "logs/report", os.O_RDONLY)) as file:
            return file.read()
    assert check.careful_reader(reader)
    assert not [name for name in os.listdir("/var/tmp") if name.startswith("labs-reader-")]
