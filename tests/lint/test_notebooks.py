"""Every rule is broken by a tiny notebook of its own, and by no other."""

from pathlib import Path

import pytest

from tests.lint import notebooks
from tests.lint.bad import make

BAD = Path(__file__).parent / "bad"


@pytest.mark.parametrize("name", sorted(make.BAD))
def test_a_bad_notebook_breaks_just_its_rule(name):
    found = {finding.rule for finding in notebooks.lint(BAD / f"{name}.ipynb")}
    assert found == {name.partition("-")[0]}


def test_every_rule_has_a_bad_notebook():
    assert {name.partition("-")[0] for name in make.BAD} == set(notebooks.RULES)
    assert {path.stem for path in BAD.glob("*.ipynb")} == {*make.BAD, "good"}


def test_the_good_one_is_clean(capsys):
    assert notebooks.main([str(BAD / "good.ipynb")]) == 0
    assert capsys.readouterr().out == "1 notebooks, 0 findings\n"


def test_a_finding_is_one_clear_line(capsys):
    path = BAD / "unexecuted.ipynb"
    assert notebooks.main([str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"{path}: cell 3: unexecuted: never executed: record the notebook"


def test_what_is_no_notebook_is_a_finding(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    assert [finding.rule for finding in notebooks.lint(tmp_path / "x.ipynb")] == ["notebook"]


def test_a_missing_path_is_an_error(capsys):
    assert notebooks.main(["/nowhere.ipynb"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_appendix_has_no_arc(tmp_path):
    (tmp_path / "appendix").mkdir()
    page = tmp_path / "appendix" / "versions.ipynb"
    book = make.good()
    book.cells = book.cells[2:3]
    page.write_text(make.dumps(make.renumbered(book)))
    assert notebooks.lint(page) == []


@pytest.mark.parametrize(
    "line", ["「同じです。」と答えます。", "終わりです。", "（同じです。）", "**同じです。**", "| 一。 | 二。 |"]
)
def test_one_sentence_may_hold_a_quotation(line):
    page = notebooks.Page(Path("x"), "", make.nbformat.v4.new_notebook(cells=[make.new_markdown_cell(line)]))
    assert list(notebooks.sentence(page)) == []
