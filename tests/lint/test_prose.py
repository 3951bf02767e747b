"""The prose lint finds a bad sentence wherever one may stand, and says where that is."""

import json
import os
from pathlib import Path

import pytest

from tests.lint import prose

CACHE = Path(os.environ.get("LAB_PROSE_CACHE", prose.CACHE))

BOX = """::::{admonition} 予想
:class: predict

ネームスペースを見ます。

:::{dropdown} 答え
見れます。
:::
::::
"""
NOTEBOOK = [("markdown", "# 題\n\n正しい文です。\n"), ("code", "print('ユーザ')"), ("markdown", BOX)]


@pytest.fixture
def lint(tmp_path, capsys):
    def run(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        status = prose.main(["--cache", str(CACHE), str(path)])
        lines = capsys.readouterr().out.splitlines()
        assert status == (1 if len(lines) > 1 else 0)
        return [line.removeprefix(f"{path}: ") for line in lines[:-1]]

    return run


def test_a_notebook_is_linted_in_its_boxes_and_not_in_its_code(lint):
    cells = [{"cell_type": kind, "source": source.splitlines(keepends=True)} for kind, source in NOTEBOOK]
    found = lint("a.ipynb", json.dumps({"cells": cells}))
    assert [line.partition(": ")[0] for line in found] == ["cell 3 line 4", "cell 3 line 7"]
    assert "prh: ネームスペース => namespace" in found[0]
    assert "no-dropping-the-ra" in found[1]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("ユーザが実行します。", "prh"),
        ("サーバを起動します。", "prh"),
        ("control groupではなくCgroupと書く人がいます。", "prh"),
        ("PIDは番号です。", "ja-spacing/ja-space-between-half-and-full-width"),
        ("終了するのは`init`です。", "ja-spacing/ja-space-around-code"),
        ("これは例である。\n\nここは本文です。\n\nそれも本文です。", "no-mix-dearu-desumasu"),
        ("これは例かもしれません。", "ja-no-weak-phrase"),
        ("子を作りますが、親は待ちますが、終わりません。", "no-doubled-conjunctive-particle-ga"),
        ("すごい！", "no-exclamation-question-mark"),
        ("(target)=\n\n下さい。", "prh"),
    ],
)
def test_a_bad_sentence_is_found(lint, text, rule):
    found = lint("a.md", text + "\n")
    assert any(rule in line for line in found), found


def test_the_house_style_is_clean(lint):
    text = """# 八つの namespace を見る

:::{admonition} この実験で確かめること
:class: goal

- 一つの PID が、二つの番号を持つか

**時間**: 約 25 分　**必要なもの**: ラボの JupyterLab だけ
:::

uts、pid、mnt、net、ipc の五つを、`unshare` で替えます。
[unshare(2)](https://man7.org/linux/man-pages/man2/unshare.2.html) が、その入口です。

## Docker / Podman では

`docker run` も、同じ呼び出しを使います。

:::{glossary}
cgroup（コントロールグループ）
  プロセスの組に、使える量を割り当てる仕組みである。
:::
"""
    assert lint("a.md", text) == []


def test_every_line_keeps_its_number():
    source = "(here)=\n:::{note}\n:class: x\n\ntext\n:::\n% remark\nend".splitlines()
    assert list(prose.prose(source)) == ["", "", "", "", "text", "", "", "end"]


def test_a_missing_page_is_an_error(capsys):
    assert prose.main(["/nowhere.md"]) == 2
    assert "no such file" in capsys.readouterr().err
