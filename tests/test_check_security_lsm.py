"""The exercises of 06-security/04-lsm: each wrong answer gives its hint, the solution passes, nothing is left."""

import os

import pytest

from labs import apparmor, machine, mounts, process, syscalls
from labs.check import security_lsm as check


@pytest.fixture
def folder(tmp_path):
    check.workplace(str(tmp_path))
    return str(tmp_path)


def least(folder, **changes):
    right = {"read": ["in", "report"], "write": ["out"], "execute": ["/usr"], "connect": []}
    paths = ("read", "write")
    given = {name: value for name, value in (right | changes).items() if value is not None}
    return {name: [os.path.join(folder, path) for path in value] if name in paths and isinstance(value, list) else value
            for name, value in given.items()}


@pytest.mark.parametrize(("changes", "hint"), [
    ({"reads": ["in"]}, "`reads` という引数はありません"),
    ({"read": "/usr"}, "`read` は、パスの文字列ではなく"),
    ({"read": ["nowhere"]}, "ルールセットができませんでした（`open: No such file"),
    ({"scoped": ["HOST"]}, "Landlock right: 'HOST': must be a name"),
    ({"execute": None}, "`report` が動きません（`/bin/sh: Permission denied`）。`sh` と"),
    ({"read": ["in"]}, "シェルがスクリプト自身を読むことと"),
    ({"write": []}, "`report` が動きません（`report: 2: cannot create out/count: Permission denied`）"),
    ({"read": [""]}, "`keys/secret` を読むことまでできます。`read` のパスを"),
    ({"read": ["/"]}, "`keys/secret` を読む"),
    ({"write": ["in", "out"]}, "`in/orders` を書き換えることまでできます。`write` のパスを"),
    ({"write": ["report", "out"]}, "`report` 自身を書き換える"),
    ({"read": ["in", "report", "/etc"]}, "`/etc/shadow` を読む"),
    ({"write": ["out", "/etc/passwd"]}, "`/etc/passwd` を書き換える"),
    ({"connect": None}, "TCP で外へ送ることまでできます。ポートを一つも許さない"),
])
def test_least_says_what_is_missing_and_what_is_too_much(folder, changes, hint):
    found = check.least(least(folder, **changes), folder)
    assert not found
    assert hint in found.message


def test_least_passes(folder):
    assert check.least(least(folder), folder)


def test_least_sees_a_port_that_was_left_open(folder, monkeypatch):
    monkeypatch.setattr(check, "_dial", lambda port: None)
    assert "`connect` は空のリストで" in check.least(least(folder), folder).message


def test_least_sees_a_program_that_lies(folder, monkeypatch):
    monkeypatch.setattr(check, "SCRIPT", "#!/bin/sh\ntrue\n")
    assert "数が書かれていません" in check.least(least(folder), folder).message


RULES = """
  include <abstractions/base>
  /usr/bin/* rmix,
  {folder}/report r,
  {folder}/in/orders r,
  {folder}/out/count w,
"""


@pytest.fixture
def place():
    """A short path, as the notebook has it."""
    os.makedirs(machine.DATA, exist_ok=True)
    path = f"{machine.DATA}/labs-lsm-check"
    check.workplace(path)
    yield path
    machine.remove_tree(path)
    assert check.PROFILE not in apparmor.profiles()


@pytest.mark.machine
@pytest.mark.parametrize(("change", "hint"), [
    (("in/orders r,", "in/orders r"), "/labs-lsm-check/out/count w,': missing an end of line character"),
    (("in/orders r,", "in/orders q,"), "`profile, line 4: '/var/lib/labs/labs-lsm-check/in/orders q,': syntax"),
    (("  {folder}/in/orders r,\n", ""), "カーネルの記録では、`in/orders` への `r` が断られています"),
    (("  {folder}/out/count w,\n", ""), "`out/count` への `wc`"),
    (("  {folder}/report r,\n", ""), "`report` への `r`"),
    (("/usr/bin/* rmix", "/usr/bin/dash rmix"), "`report` が動きません（`report: 2: wc: Permission denied`）"),
    (("in/orders r", "** r"), "`keys/secret` を読むことまでできます"),
    (("{folder}/report r,", "{folder}/report r,\n  /etc/* w,"), "`/etc/passwd` を書き換える"),
])
def test_rules_says_what_the_kernel_denied_or_let_pass(place, change, hint):
    found = check.rules(RULES.replace(*change).format(folder=place), place)
    assert not found
    assert hint in found.message


@pytest.mark.machine
def test_rules_passes(place):
    found = check.rules(RULES.format(folder=place), place)
    assert found
    assert "断られた 5 件" in found.message


@pytest.mark.machine
def test_rules_sees_a_program_that_lies(place, monkeypatch):
    monkeypatch.setattr(check, "SCRIPT", "#!/bin/sh\ntrue\n")
    assert "数が書かれていません" in check.rules(RULES.format(folder=place), place).message


def test_rules_wants_text(folder):
    assert "規則を並べた文字列" in check.rules([RULES], folder).message


@pytest.fixture
def container(tmp_path):
    """A process whose mounts are a few: two that can be written, a read-only one, /proc."""
    for name in ("a", "b", "shut", "proc"):
        (tmp_path / name).mkdir()

    def first():
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", str(tmp_path / "a"), "tmpfs")
        syscalls.mount("tmpfs", str(tmp_path / "b"), "tmpfs")
        syscalls.mount("tmpfs", str(tmp_path / "shut"), "tmpfs", syscalls.MS_RDONLY)
        syscalls.mount("/proc", str(tmp_path / "proc"), None, syscalls.MS_BIND)

    with process.spawn(["sleep", "60"], first=first) as child:
        yield child.pid


def everything(pid):
    return process.call(check._try_all, pid, [row.target for row in mounts.table(pid)])


def test_writable_reacts_to_each_mistake(container, tmp_path):
    right = everything(container)
    assert {str(tmp_path / "a"), str(tmp_path / "b")} <= set(right)
    assert "リストにしてください" in check.writable(container, "/").message
    assert "このコンテナのマウントの行にありません" in check.writable(container, ["/nowhere"]).message
    assert "読み取り専用のマウントです" in check.writable(container, [*right, str(tmp_path / "shut")]).message
    assert "新しい名前を受け付けません" in check.writable(container, [*right, str(tmp_path / "proc")]).message
    assert "まだ 1 か所" in check.writable(container, right[1:]).message
    assert check.writable(container, [*right, right[0] + "/"])
    assert os.listdir(tmp_path / "a") == []


def test_nothing_is_not_an_answer(folder):
    assert not check.least(..., folder)
    assert not check.writable(1, None)
