"""Writes the notebooks beside it: one good one, and for each rule one which breaks just that rule.

python -m tests.lint.bad.make
"""

import base64
import copy
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.lint.normalise import METADATA, dumps, normalise

HERE = Path(__file__).parent
PIXEL = base64.b64encode(b"\x89PNG").decode()

OPENING = """# 名前を見る

:::{admonition} この実験で確かめること
:class: goal

- だれの名前か。

**時間**: 約 1 分
:::"""
STEP = """## 名前を聞く

::::{admonition} 予想
:class: predict

何が出るでしょうか。

:::{dropdown} 答え
`one` です。
:::
::::"""
EXERCISE = """## 演習

:::{exercise}
:label: ex-name

名前を入れてください。
:::"""
SOLUTION = """:::{solution} ex-name
:class: dropdown

`print` を使います。
:::"""
ENDING = """## まとめ

- 一つ。
- 二つ。
- 三つ。

## 参考資料

- [uname(2)](https://man7.org/linux/man-pages/man2/uname.2.html)"""


def code(source="print('one')", text="one\n", **metadata):
    outputs = [new_output("stream", name="stdout", text=text)] if text else []
    return new_code_cell(source, outputs=outputs, execution_count=1, metadata=metadata)


def shown(**data):
    data = {name.replace("_", "/"): value for name, value in data.items()}
    return [new_output("display_data", data=data)]


def failure():
    return [new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])]


def good():
    folded = {"source_hidden": True, "outputs_hidden": True}
    cells = [
        *(new_markdown_cell(text) for text in (OPENING, STEP)),
        code(),
        *(
            new_markdown_cell(text)
            for text in ("## Docker / Podman では\n\n同じです。", "## 本物との違い\n\nありません。", EXERCISE)
        ),
        code("answer = None", ""),
        new_markdown_cell(SOLUTION),
        code("print('two')", "two\n", tags=["hide-cell"], jupyter=folded),
        new_markdown_cell(ENDING),
    ]
    return normalise(new_notebook(cells=cells, metadata=METADATA))


# Each takes the good notebook and breaks one rule; the name up to the first dash is the rule's.
BAD = {}


def bad(function):
    BAD[function.__name__.replace("_", "-")] = function
    return function


def cell(source, outputs=None, text="one\n", **metadata):
    """A break which replaces the step's code cell."""

    def broken(book):
        book.cells[2] = code(source, text, **metadata)
        if outputs is not None:
            book.cells[2].outputs = outputs

    return broken


def prose(text):
    """A break which replaces a paragraph."""

    def broken(book):
        book.cells[3].source = f"## Docker / Podman では\n\n{text}"

    return broken


LONG_HELPER = "def helper():\n    one = 'one'\n    two = one\n    return two\n\nprint(helper())"
BAD |= {
    "alt": cell("1", shown(image_png=PIXEL, text_plain="<Figure>")),
    "alt-svg": cell("1", shown(text_html="<svg><path/></svg>", text_plain="a tree")),
    "comment": cell("print('one')  # says one"),
    "comment-shell": cell("%%bash\n# says one\necho one"),
    "error": cell("raise ValueError('no')", failure()),
    "error-missing": cell("print('one')", tags=["raises-exception"]),
    "fails": cell("raise ValueError('no')", failure(), tags=["raises-exception"]),
    "helper": cell(LONG_HELPER),
    "helper-class": cell("class Helper: pass"),
    "html": prose("<b>同じ</b>です。"),
    "html-remote": prose("![図](https://example.org/a.png)"),
    "ignore": cell("print('one')", tags=["nbval-ignore-output"]),
    "length": cell("\n".join(f"print({number})" for number in range(16))),
    "sentence": prose("同じです。違いはありません。"),
    "skip": cell("print('one')", tags=["nbval-skip"]),
    "syntax": cell("print('one'"),
    "volatile": cell("object()", text="<object object at 0x7f3a5c0d1e20>\n"),
    "volatile-path": cell("print('one')", text="/home/me/one\n"),
    "words": cell("print('名前')"),
    "words-sentence": cell("print('This is a whole sentence that somebody must translate')"),
}


@bad
def counts(book):
    book.cells[2].execution_count = 7


@bad
def exercise(book):
    del book.cells[7]


@bad
def exercise_open(book):
    book.cells[8].metadata = {}


@bad
def form(book):
    book.cells[2].outputs.append(new_output("stream", name="stdout", text="more\n"))


@bad
def metadata(book):
    book.metadata["authors"] = ["me"]


@bad
def metadata_cell(book):
    book.cells[2].metadata["collapsed"] = True


@bad
def order(book):
    book.cells[3], book.cells[4] = book.cells[4], book.cells[3]


@bad
def order_goal(book):
    book.cells[0].source = "# 名前を見る"


@bad
def predict(book):
    book.cells[1].source = STEP.replace(":::{dropdown} 答え\n`one` です。\n:::\n", "`one` です。\n")


@bad
def predict_none(book):
    book.cells[1].source = "## 名前を聞く"


@bad
def summary(book):
    book.cells[9].source = ENDING.replace("- 三つ。\n", "")


@bad
def toc(book):
    """Good, and the only one which _toc.yml leaves out."""


@bad
def unexecuted(book):
    book.cells[2].execution_count = None
    book.cells[2].outputs = []


def renumbered(book):
    """Counts as after a run; what a break changed on purpose stays."""
    for number, cell in enumerate((cell for cell in book.cells if cell.cell_type == "code"), 1):
        if cell.execution_count == 1:
            cell.execution_count = number
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
    return book


def main():
    books = {"good": good()}
    for name, function in BAD.items():
        books[name] = copy.deepcopy(good())
        function(books[name])
    for name, book in books.items():
        nbformat.validate(book)
        (HERE / f"{name}.ipynb").write_text(dumps(renumbered(book)), encoding="utf-8")
    listed = "".join(f"- file: {name}\n" for name in sorted(books) if name not in ("toc", "good"))
    (HERE / "_toc.yml").write_text(f"format: jb-book\nroot: good\nchapters:\n{listed}", encoding="utf-8")


if __name__ == "__main__":
    main()
