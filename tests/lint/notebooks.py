"""The rules of a notebook, checked without running it: `python -m tests.lint.notebooks [PATH…]`.

One line a finding, `path: cell N: rule: message`; cells are counted from 1, Markdown included, and 0 is the
whole file. Each rule is a function of this module with the decorator `rule`; its name is the function's.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from tests.lint.normalise import CELL_METADATA, METADATA, ROOT, dumps, normalise, notebooks

LONGEST_CELL = 15
LONGEST_HELPER = 3
# The arc of a page: after the steps, these headings, in this order and in these words.
ENDING = ("Docker / Podman では", "本物との違い", "演習", "まとめ", "参考資料")
FENCE = re.compile(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
# A full stop with more behind it than closing brackets, emphasis or a footnote's mark.
TWO_SENTENCES = re.compile(r"。(?![」』）)*_\s]*(\[\^\w+\])?$)(?![」』）)])")
VOLATILE = {
    "a memory address": re.compile(r"\b0x[0-9a-f]{8,16}\b"),
    "a directory of one machine": re.compile(r"(?<![\w.])/(home|root|Users|srv|work|lab|mnt/c)/[\w.]+"),
    "a temporary name": re.compile(r"/tmp/tmp\w{6,}"),
    "a random name (labs.show.stable cuts it)": re.compile(r"\blabs-[a-z]+-[0-9a-f]{6}\b"),
}

Hits: TypeAlias = Iterator[tuple[int, str]]


class Finding(NamedTuple):
    """One broken rule."""

    path: Path
    cell: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: cell {self.cell}: {self.rule}: {self.message}"


@dataclass
class Page:
    """A notebook, as the rules look at it."""

    path: Path
    text: str
    book: NotebookNode

    @cached_property
    def cells(self) -> list[tuple[int, NotebookNode]]:
        """All cells with their numbers."""
        return list(enumerate(self.book.cells, 1))

    @cached_property
    def code(self) -> list[tuple[int, NotebookNode]]:
        """The code cells with their numbers."""
        return [(number, cell) for number, cell in self.cells if cell.cell_type == "code"]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """The Markdown cells: number and text, code blocks blanked (so that lines keep their numbers)."""
        return [(number, _without_code(cell.source)) for number, cell in self.cells if cell.cell_type == "markdown"]

    @cached_property
    def python(self) -> list[tuple[int, str]]:
        """The code cells that are Python, as the kernel reads them: magics turned into calls."""
        transform = TransformerManager().transform_cell
        return [(number, transform(cell.source)) for number, cell in self.code if not cell.source.startswith("%%")]

    @property
    def has_arc(self) -> bool:
        """Whether this is a lesson: the appendix only lists."""
        return "appendix" not in self.path.parts


RULES: dict[str, Callable[[Page], Hits]] = {}


def rule(function: Callable[[Page], Hits]) -> Callable[[Page], Hits]:
    """Make a function a rule of that name."""
    RULES[function.__name__] = function
    return function


def _without_code(source: str) -> str:
    """Blank fenced code and code spans; directives with colon fences stay, their text is prose."""
    blank = FENCE.sub(lambda found: "\n" * found[0].count("\n"), source)
    return CODE_SPAN.sub(lambda found: "`" * len(found[0]), blank)


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", ()))


def _shell(source: str) -> Iterator[str]:
    """Lines that a shell reads: cells with %%bash or %%sh, and lines with `!`."""
    lines = source.splitlines()
    whole = bool(lines) and re.match(r"%%(bash|sh|script)\b", lines[0]) is not None
    return (line for line in lines[whole:] if whole or re.match(r"\s*(\w+\s*=\s*)?!", line))


@rule
def order(page: Page) -> Hits:
    """Title, goal box, steps with predictions, then the fixed headings."""
    if not page.has_arc:
        return
    headings = [
        (number, len(mark), words.strip())
        for number, text in page.prose
        for mark, words in re.findall(r"^(#+)\s+(.*)$", text, re.MULTILINE)
    ]
    yield from _opening(page, headings)
    yield from ((number, f"heading deeper than ###: {words}") for number, depth, words in headings if depth > 3)
    seconds = [words for _, depth, words in headings if depth == 2]
    if [words for words in seconds if words in ENDING] != list(ENDING) or seconds[-len(ENDING) :] != list(ENDING):
        yield headings[-1][0] if headings else 0, f"the page must end with the headings {' → '.join(ENDING)}"
    elif len(seconds) == len(ENDING):
        yield headings[-1][0], "there is no step before the ending"


def _opening(page: Page, headings: list[tuple[int, int, str]]) -> Hits:
    if [number for number, depth, _ in headings if depth == 1] != [1] or headings[0][1] != 1:
        yield 1, "the first cell must begin with the page's one # title"
    early = "\n".join(text for number, text in page.prose if number <= 2)
    if not re.search(r"^:{3,}\{admonition\} この実験で確かめること\n:class: goal$", early, re.MULTILINE):
        yield 1, "the box この実験で確かめること (:class: goal) must follow the title"


@rule
def predict(page: Page) -> Hits:
    """At least one prediction, and the answer of each is folded."""
    boxes = [
        (number, box)
        for number, text in page.prose
        for box in re.findall(
            r"^(:{4,})\{admonition\}[^\n]*\n:class: predict$(.*?)^\1$", text, re.MULTILINE | re.DOTALL
        )
    ]
    told = sum(text.count(":class: predict") for _, text in page.prose)
    if page.has_arc and not told:
        yield 0, "no prediction box (:class: predict)"
    if told != len(boxes):
        yield 0, "a prediction box needs :::: around it, to hold its folded answer"
    yield from (
        (number, "the answer of a prediction must be in a {dropdown}")
        for number, box in boxes
        if "{dropdown}" not in box[1]
    )


@rule
def exercise(page: Page) -> Hits:
    """Each exercise has a folded solution with a folded, executed cell that ends in its check."""
    text = "\n".join(text for _, text in page.prose)
    asked = re.findall(r"^:{3,}\{exercise\}[^\n]*\n:label: (\S+)$", text, re.MULTILINE)
    solved = re.findall(r"^:{3,}\{solution\} (\S+)\n:class: dropdown$", text, re.MULTILINE)
    if page.has_arc and not asked:
        yield 0, "no exercise"
    yield from ((0, f"exercise {label} has no folded solution") for label in asked if label not in solved)
    folded = [
        cell
        for _, cell in page.code
        if "hide-cell" in _tags(cell) and cell.metadata.get("jupyter", {}).get("source_hidden")
    ]
    if len(folded) < len(asked):
        yield 0, "a solution needs a code cell folded on the site (hide-cell) and in JupyterLab (source_hidden)"


@rule
def summary(page: Page) -> Hits:
    """まとめ has three lines."""
    for number, text in page.prose:
        found = re.search(r"^## まとめ\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if found and (lines := len(re.findall(r"^- ", found[1], re.MULTILINE))) != 3:
            yield number, f"まとめ has {lines} list items, not 3"


@rule
def unexecuted(page: Page) -> Hits:
    """nbval does not compare a cell that was never run: it would pass whatever it prints."""
    for number, cell in page.code:
        if cell.execution_count is None:
            yield number, "never executed: record the notebook" if cell.source.strip() else "empty code cell"


@rule
def counts(page: Page) -> Hits:
    """Execution counts are 1, 2, 3 …, as after one run from the top."""
    for expected, (number, cell) in enumerate(page.code, 1):
        if cell.execution_count not in (None, expected):
            yield number, f"execution count {cell.execution_count}, not {expected}: record the notebook"


@rule
def metadata(page: Page) -> Hits:
    """The same few lines of metadata in every notebook."""
    if page.book.metadata != METADATA:
        yield 0, "notebook metadata is not the one of all notebooks"
    for number, cell in page.cells:
        if extra := sorted(set(cell.metadata) - set(CELL_METADATA)):
            yield number, f"cell metadata nobody reads: {', '.join(extra)}"


@rule
def form(page: Page) -> Hits:
    """The file is in the recorder's normal form."""
    again = normalise(nbformat.reads(page.text, as_version=4))
    if dumps(again) != page.text and not (list(metadata(page)) or list(counts(page)) or list(alt(page))):
        yield 0, "not in normal form: python -m tests.lint.normalise"


@rule
def length(page: Page) -> Hits:
    """A reader takes in a short cell at a glance."""
    for number, cell in page.code:
        if (lines := len(cell.source.splitlines())) > LONGEST_CELL:
            yield number, f"{lines} lines, more than {LONGEST_CELL}"


@rule
def comment(page: Page) -> Hits:
    """Prose belongs into Markdown, where it is translated."""
    for number, text in page.python:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        try:
            yield from ((number, token.string) for token in tokens if token.type == tokenize.COMMENT)
        except (tokenize.TokenError, SyntaxError):
            continue  # the rule `syntax` says it
    for number, cell in page.code:
        yield from ((number, line.strip()) for line in _shell(cell.source) if re.search(r"(^|\s)#(?!!)", line))


@rule
def syntax(page: Page) -> Hits:
    """A cell that is no Python must be tagged as one that fails."""
    for number, text in page.python:
        if _parsed(text) is None and "raises-exception" not in _tags(page.book.cells[number - 1]):
            yield number, "not Python"


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def _nodes(page: Page) -> Iterator[tuple[int, Any]]:
    for number, text in page.python:
        if (tree := _parsed(text)) is not None:
            yield from ((number, node) for node in ast.walk(tree))


@rule
def helper(page: Page) -> Hits:
    """Helper code lives in labs/, where it is tested."""
    for number, node in _nodes(page):
        if isinstance(node, ast.ClassDef):
            yield number, f"class {node.name} belongs into labs/"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_HELPER:
                yield number, f"{node.name} has {lines} lines, more than {LONGEST_HELPER}: it belongs into labs/"


@rule
def words(page: Page) -> Hits:
    """Strings in code are short ASCII labels: what is a sentence belongs into Markdown."""
    for number, node in _nodes(page):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not node.value.isascii():
                yield number, f"not ASCII: {node.value!r}"
            elif re.search(r"([A-Za-z']+[,.]? ){7}[A-Za-z]", node.value):
                yield number, f"a sentence in code: {node.value!r}"
    for number, cell in page.code:
        yield from ((number, f"not ASCII: {line.strip()}") for line in _shell(cell.source) if not line.isascii())


@rule
def error(page: Page) -> Hits:
    """A stored error is there on purpose, tagged, and only then."""
    for number, cell in page.code:
        raised = [output.ename for output in cell.outputs if output.output_type == "error"]
        tagged = "raises-exception" in _tags(cell)
        if raised and not tagged:
            yield number, f"stored {raised[0]} without the tag raises-exception"
        if tagged and not raised and cell.execution_count is not None:
            yield number, "tagged raises-exception, and no error is stored"


@rule
def fails(page: Page) -> Hits:
    """The reader is told before a cell that fails on purpose."""
    for number, cell in page.code:
        before = page.book.cells[number - 2].source if number > 1 else ""
        raised = any(output.output_type == "error" for output in cell.outputs)
        if raised and "raises-exception" in _tags(cell) and ":class: fails" not in before:
            yield number, "the Markdown before a cell that fails must say so (:class: fails)"


@rule
def skip(page: Page) -> Hits:
    """Every cell is run by the tests."""
    for number, cell in page.code:
        if "nbval-skip" in _tags(cell) or "NBVAL_SKIP" in cell.source:
            yield number, "nbval-skip: a skipped cell proves nothing"


@rule
def ignore(page: Page) -> Hits:
    """An output that is not compared needs a reason, in metadata.nbval.reason."""
    for number, cell in page.code:
        reason = cell.metadata.get("nbval", {}).get("reason", "")
        if "nbval-ignore-output" in _tags(cell) and len(reason) < 10:
            yield number, 'nbval-ignore-output needs {"nbval": {"reason": "…"}} in the cell\'s metadata'
        if "NBVAL_" in cell.source and "NBVAL_SKIP" not in cell.source:
            yield number, "nbval is told by tags, not by comments"


@rule
def alt(page: Page) -> Hits:
    """A picture can be read by those who do not see it."""
    for number, cell in page.code:
        for data in (output.get("data", {}) for output in cell.outputs):
            if any(mime.startswith("image/") for mime in data) and not cell.metadata.get("mystnb", {}).get(
                "image", {}
            ).get("alt"):
                yield number, "image without alt text (metadata.mystnb.image.alt)"
            if not _described("".join(data.get("text/html", ""))):
                yield number, "a picture in HTML needs <title> (svg role=img) or alt (img)"
    for number, text in page.prose:
        if "![](" in text:
            yield number, "image without alt text"


def _described(markup: str) -> bool:
    drawn = re.findall(r"<svg\b.*?</svg>", markup, re.DOTALL)
    titled = all('role="img"' in svg and re.search(r"<title[^>]*>[^<]", svg) for svg in drawn)
    return titled and all(re.search(r'\balt="[^"]', img) for img in re.findall(r"<img\b[^>]*>", markup))


@rule
def volatile(page: Page) -> Hits:
    """Nothing of one machine or one run stands in a notebook."""
    for number, cell in page.code:
        ignored = "nbval-ignore-output" in _tags(cell)
        text = cell.source + ("" if ignored else "\n".join(_texts(cell)))
        for what, pattern in VOLATILE.items():
            if found := pattern.search(text):
                yield number, f"{what}: {found[0]}"


def _texts(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        yield "".join(output.get("text", ""))
        yield output.get("evalue", "")
        yield "\n".join(output.get("traceback", ()))
        yield from ("".join(data) for mime, data in output.get("data", {}).items() if mime.startswith("text/"))


@rule
def sentence(page: Page) -> Hits:
    """One sentence a line: changes and translations are then seen sentence by sentence."""
    for number, text in page.prose:
        written = page.book.cells[number - 1].source.splitlines()
        for line, original in zip(text.splitlines(), written, strict=False):
            if TWO_SENTENCES.search(line) and not line.lstrip().startswith("|"):
                yield number, f"more than one sentence in a line: {original.strip()}"


@rule
def html(page: Page) -> Hits:
    """Raw HTML is lost in translation, and remote pictures are lost without a network."""
    for number, text in page.prose:
        if found := re.search(r"<(?!https?://)/?[A-Za-z][^>\n]*>", text):
            yield number, f"raw HTML: {found[0]}"
        if found := re.search(r"!\[[^\]]*\]\(https?://[^)]*\)", text):
            yield number, f"remote picture: {found[0]}"


@rule
def toc(page: Page) -> Hits:
    """A notebook that the table of contents leaves out is read by nobody."""
    path = page.path.resolve()
    folder = next((parent for parent in path.parents if (parent / "_toc.yml").exists()), None)
    if folder is None:
        return
    listed = set(_files(yaml.safe_load((folder / "_toc.yml").read_text(encoding="utf-8"))))
    name = path.relative_to(folder).with_suffix("").as_posix()
    if not {name, f"{name}.ipynb"} & listed:
        yield 0, f"not in {folder.name}/_toc.yml"


def _files(entry: Any) -> Iterator[str]:
    """Every page that a table of contents names."""
    if isinstance(entry, dict):
        yield from (str(value) for key, value in entry.items() if key in ("root", "file"))
    children = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
    for child in children:
        yield from _files(child)


def lint(path: Path) -> list[Finding]:
    """Everything that is wrong with one notebook."""
    text = path.read_text(encoding="utf-8")
    try:
        book = nbformat.reads(text, as_version=4)
        nbformat.validate(book)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        return [Finding(path, 0, "notebook", str(error).splitlines()[0])]
    page = Page(path, text, book)
    return [Finding(path, number, name, message) for name, check in RULES.items() for number, message in check(page)]


def main(arguments: list[str] | None = None) -> int:
    """Lint the notebooks named, or the whole book; 1 if anything was found."""
    names = sys.argv[1:] if arguments is None else arguments
    paths = [Path(name) for name in names] or [ROOT / "book"]
    if missing := [path for path in paths if not path.exists()]:
        print(*(f"{path}: no such file or directory" for path in missing), sep="\n", file=sys.stderr)
        return 2
    pages = list(notebooks(paths))
    found = [finding for path in pages for finding in lint(path)]
    print(*found, f"{len(pages)} notebooks, {len(found)} findings", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
