"""The exercises of 06-security/01-capabilities: each wrong state gives its hint, the solution passes."""

import os
import shutil

import pytest

from labs import capabilities, mounts, process, syscalls
from labs.capabilities import FileCaps
from labs.check import security_capabilities as check

READ, OVERRIDE, CHOWN = (capabilities.parse([name]) for name in ("DAC_READ_SEARCH", "DAC_OVERRIDE", "CHOWN"))


@pytest.fixture
def cat():
    with check.cat_with(None) as path:
        yield path


@pytest.mark.parametrize(("caps", "hint"), [
    (None, "`security.capability` が付いていません"),
    (FileCaps(READ, 0, True, 100_000), "rootid が 100000 です"),
    (FileCaps(OVERRIDE, 0, True), "`CAP_DAC_OVERRIDE` は、書くことまで許します"),
    (FileCaps(READ | CHOWN, 0, True), "`CAP_CHOWN` は要りません"),
    (FileCaps(0, READ, True), "`inheritable` だけでは"),
    (FileCaps(), "二つの集合がどちらも空です"),
    (FileCaps(READ), "effective は空のままです"),
])
def test_reads_shadow_hints(caps, hint, cat):
    if caps:
        capabilities.write_file(cat, caps)
    verdict = check.reads_shadow(cat)
    assert not verdict
    assert hint in verdict.message


def test_reads_shadow_looks_at_the_file_first(cat):
    assert not check.reads_shadow(...)
    assert "がありません" in check.reads_shadow("/nothing").message
    os.chmod(cat, 0o4755)
    assert "set-user-ID ビットが立っています" in check.reads_shadow(cat).message
    os.chmod(cat, 0o2755)
    assert "set-group-ID ビットが立っています" in check.reads_shadow(cat).message
    os.chmod(cat, 0o700)
    assert "nobody には実行できません" in check.reads_shadow(cat).message


def test_reads_shadow_wants_what_stands_in_it(cat):
    shutil.copy("/usr/bin/echo", cat)
    capabilities.write_file(cat, FileCaps(READ, 0, True))
    assert "それでも nobody は" in check.reads_shadow(cat).message


def test_reads_shadow_really_reads(cat):
    capabilities.write_file(cat, FileCaps(READ, 0, True))
    folder = os.path.dirname(cat)
    os.chmod(folder, 0o700)
    assert "途中のディレクトリの権限と、`nosuid`" in check.reads_shadow(cat).message
    os.chmod(folder, 0o755)
    with mounts.bind(folder, folder):
        syscalls.mount_setattr(syscalls.AT_FDCWD, folder, attr_set=syscalls.MOUNT_ATTR_NOSUID)
        assert "途中のディレクトリの権限と、`nosuid`" in check.reads_shadow(cat).message
    verdict = check.reads_shadow(cat)
    assert verdict, verdict.message
    assert "この一つのプログラムを通してだけ読めます" in verdict.message


BIND = ["NET_BIND_SERVICE"]
RIGHT = {"bounding": BIND, "permitted": BIND, "inheritable": BIND, "ambient": BIND}


@pytest.mark.parametrize(("change", "hint"), [
    ({"ambiant": BIND}, "`ambiant` という集合はありません"),
    ({"ambient": "NET_BIND_SERVICE"}, "文字列ではなく、名前のリスト"),
    ({"ambient": ["NET_BIND"]}, "`NET_BIND` という capability はありません"),
    ({"ambient": []}, "`ambient` にありません"),
    ({"permitted": [], "inheritable": []}, "`permitted inheritable` が足りません"),
    ({"inheritable": []}, "`inheritable` が足りません"),
    ({"effective": [*BIND, "CHOWN"]}, "effective の `CAP_CHOWN` は、permitted にありません"),
    ({name: [*BIND, "CHOWN"] for name in RIGHT}, "effective が `CAP_CHOWN CAP_NET_BIND_SERVICE` です"),
    ({"bounding": [*BIND, "CHOWN", "KILL"]}, "bounding に 2 個残っています"),
    ({"inheritable": [*BIND, "CHOWN"], "bounding": [*BIND, "CHOWN"]}, "bounding に 1 個残っています"),
    ({"inheritable": [*BIND, "CHOWN"]}, "inheritable の `CAP_CHOWN` は要りません"),
])
def test_for_a_script_hints(change, hint):
    verdict = check.for_a_script(RIGHT | change)
    assert not verdict
    assert hint in verdict.message


def test_for_a_script_cannot_give_what_the_notebook_has_not():
    def in_a_poorer_notebook():
        left = syscalls.capget().permitted & ~capabilities.parse(["KILL"])
        syscalls.capset(syscalls.Capabilities(left, left, 0))
        return check.for_a_script(RIGHT | {"permitted": [*BIND, "KILL"]})

    passed, message = process.call(in_a_poorer_notebook)
    assert not passed
    assert "この集合では始められません（`EPERM`）" in message


def test_for_a_script_passes():
    assert not check.for_a_script(...)
    verdict = check.for_a_script(RIGHT)
    assert verdict, verdict.message
    assert "一つだけ渡りました" in verdict.message


ANSWER = {"a": ["NET_RAW"], "b": [], "c": ["NET_RAW"], "d": ["CHOWN", "NET_RAW"], "e": "EPERM"}


@pytest.mark.parametrize(("change", "hint"), [
    ({"a": []}, "`a` は、カーネルの答えと違います。何も付いていない"),
    ({"a": "NET_RAW"}, "`a`: 文字列ではなく、名前のリスト"),
    ({"a": ["NET_ROW"]}, "`a`: `NET_ROW` という capability はありません"),
    ({"a": "EPERM"}, "`a` は、カーネルの答えと違います"),
    ({"b": ["CHOWN"]}, "`b` は、カーネルの答えと違います。capability の付いたファイルは"),
    ({"c": []}, "`c` は、カーネルの答えと違います。P(inheritable)"),
    ({"d": ["CHOWN"]}, "`d` は、カーネルの答えと違います。root の exec"),
    ({"e": ["CHOWN"]}, "`e` は、カーネルの答えと違います。effective のビット"),
])
def test_foretell_hints(change, hint):
    verdict = check.foretell(ANSWER | change)
    assert not verdict
    assert hint in verdict.message


def test_foretell_passes():
    assert not check.foretell(...)
    assert "`b` の答えがありません" in check.foretell(ANSWER | {"b": ...}).message
    assert "`b e` の答えがありません" in check.foretell({key: ANSWER[key] for key in "acd"}).message
    verdict = check.foretell(ANSWER)
    assert verdict, verdict.message
    assert "カーネルの答えと同じです" in verdict.message
