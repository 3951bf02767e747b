"""The exercises of 06-security/03-rootless: each wrong answer gives its hint, the solution passes."""

from pathlib import Path

import pytest

from labs.check import security_rootless as check

KEEP = [(0, 100_000, 1000), (1000, 1000, 1), (1001, 101_000, 64_536)]


@pytest.mark.parametrize(("rows", "hint"), [
    ("0 1000 1", "行は `(中の先頭, 外の先頭, 個数)` という三つの整数の組です"),
    ([(0, 1000)], "行は `(中の先頭, 外の先頭, 個数)`"),
    ([], "カーネルは EINVAL で断ります（`0 rows`: must have 1 to 340）"),
    ([(0, 100_000, 65_536), (1000, 1000, 1)], "`1000 1000 1`: overlaps '0 100000 65536' inside"),
    ([(0, 1000, 1), (1, 100_000, 65_536)], "中の 1000 番は、外では 100999 番です"),
    ([(1000, 1000, 1)], "中の 0 番が、どの行にもありません"),
    ([(0, 100_000, 1000), (1000, 1000, 1)], "中の 1001 番が、どの行にもありません"),
    ([(0, 100_000, 1000), (1000, 1000, 1), (1001, 101_001, 64_536)], "`newuidmap` が断りました（`newuidmap: uid range"),
])
def test_keeps_hints(rows, hint):
    verdict = check.keeps(rows)
    assert not verdict
    assert hint in verdict.message


def test_keeps_passes():
    assert not check.keeps(...)
    verdict = check.keeps(KEEP)
    assert verdict, verdict.message
    assert "中の root は外の 100000 番、中の 1000 番が `learner` です" in verdict.message


RIGHT = {"kinds": ["mnt", "uts"], "uid_map": [(0, 1000, 1), (33, 100_000, 1)]}


@pytest.mark.parametrize(("change", "hint"), [
    ({"kinds": ["mnt", "user"]}, "`user` は選べません"),
    ({"kinds": ["uts"]}, "`mount tmpfs` が `EPERM` になりました。マウントの表の持ち主"),
    ({"kinds": ["mnt"]}, "`sethostname` が `EPERM` になりました"),
    ({"kinds": ["mnt", "uts", "net"]}, "`raw socket` が `ok` になりました。ネットワークまで"),
    ({"kinds": ["mnt", "uts", "pid"]}, "`signal own uid's process` が `ESRCH`"),
    ({"kinds": ["mnt", "uts", "ipc"]}, "願いに要らない namespace があります（`ipc`）"),
    ({"uid_map": [(0, 1000)]}, "三つの整数の組です"),
    ({"uid_map": [(0, 100_000, 1)]}, "中の 0 番を `learner`"),
    ({"uid_map": [(0, 1000, 2)]}, "`newuidmap` が断りました"),
    ({"uid_map": [(0, 1000, 1)]}, "中の root は 33 番になれません（`EINVAL`）"),
    ({"uid_map": [(0, 1000, 1), (1, 100_000, 65_536)]}, "番号が 65537 個あります"),
])
def test_reaches_hints(change, hint):
    verdict = check.reaches(RIGHT | change)
    assert not verdict
    assert hint in verdict.message


def test_reaches_passes():
    assert not check.reaches(...)
    assert "`uid_map` の答えがありません" in check.reaches({"kinds": []}).message
    verdict = check.reaches(RIGHT)
    assert verdict, verdict.message
    assert "ホストが持ったままです" in verdict.message


LENT = "learner:100000:65536\nbackup:165536:65536\n"


@pytest.mark.parametrize(("text", "hint"), [
    (check.BROKEN, "`learner:100000` は読めない行です"),
    ("", "`learner` の行がありません"),
    ("learner:100000:65536\nbakcup:165536:65536\n", "`backup` の行がありません"),
    ("learner:100000:6553\nbackup:165536:65536\n", "`learner` に貸す番号は 6553 個です"),
    ("learner:1000:65536\nbackup:165536:65536\n", "`learner` に 1000 番から貸しています"),
    ("learner:100000:65536\nbackup:165535:65536\n", "165535 番が二人に貸されています"),
    ("learner:100000:65536\nbackup:100000:65536\n", "100000 番が二人に貸されています"),
    ("learner:100000:65536\nbackup:4294960000:65536\n", "`backup` に 4295025535 番まで貸しています"),
])
def test_lends_hints(text, hint):
    verdict = check.lends(text)
    assert not verdict
    assert hint in verdict.message


def test_lends_passes_and_the_machine_s_own_file_is_as_it_was():
    assert not check.lends(...)
    before = Path(check.SUBUID).read_text()
    verdict = check.lends(LENT)
    assert verdict, verdict.message
    assert Path(check.SUBUID).read_text() == before
