"""What this book changes in the tools it is built with.

labs is importable; sphinx-thebe's loader is gone; the themes' last words are Japanese;
lines of Japanese join without a gap.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import locale
from sphinx.application import Sphinx
from sphinx.config import Config

REPOSITORY = Path(__file__).resolve().parents[2]

# Strings that the themes and extensions show a reader and have no (or another) Japanese for, by message catalogue.
JAPANESE = {
    "sphinx": {
        "Back to top": "ページの先頭へ",
        "Color mode": "配色",
        "Dark": "ダーク",
        "Error": "エラー",
        "Light": "ライト",
        "Light/Dark": "ライト / ダーク",
        "light/dark": "ライト / ダーク",
        "Main navigation": "章の一覧",
        "On this page": "このページの内容",
        "Search": "検索",
        "Search Results": "検索結果",
        "Section Navigation": "節の一覧",
        "Site navigation": "サイトの案内",
        "Site Navigation": "サイトの案内",
        "Skip to main content": "本文へ移る",
        "System Settings": "システムの設定",
        "next page": "次のページ",
        "previous page": "前のページ",
        "Breadcrumb": "現在の位置",
    },
    "exercise": {"Exercise": "演習", "Solution to": "解答："},
}


def speak_japanese(app: Sphinx, config: Config) -> None:
    """Put our words over the catalogues' own, before anything is translated."""
    if config.language != "ja":
        return
    for catalogue, words in JAPANESE.items():
        translator = locale.translators.get(("general", catalogue))
        messages = getattr(translator, "_catalog", None)
        if messages is not None:
            messages.update(words)


# One sentence stands on one line of the source; between Japanese characters that line break is no space.
FULL_WIDTH = "\u2014\u2018-\u201d\u2026\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
PUNCTUATION = "\u3001\u3002\uff01\uff09\uff1a\uff1f\u300d\u300f"


def needs_no_space(before: str, after: str) -> bool:
    """Tell whether the text before and after a line break meet without a space."""
    if re.search(f"[{PUNCTUATION}]$", before):
        return True
    return bool(re.search(f"[{FULL_WIDTH}]$", before) and re.match(f"[{FULL_WIDTH}]", after))


def join_lines(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Drop the line breaks that MyST leaves as text nodes of their own, where Japanese stands on both sides."""
    for text in list(doctree.findall(nodes.Text)):
        if text != "\n" or isinstance(text.parent, nodes.FixedTextElement):
            continue
        parent, place = text.parent, text.parent.index(text)
        before = parent[place - 1].astext() if place else ""
        after = parent[place + 1].astext() if place + 1 < len(parent) else ""
        if needs_no_space(before, after):
            parent.remove(text)


def escaped(line: str) -> str:
    """Escape what reStructuredText would take for markup, outside of backquotes."""
    parts = re.split("(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else re.sub(r"\*|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts)


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let labs write docstrings as plain text: a star is a star, a name may end in _, an indented paragraph is code."""
    out: list[str] = []
    last = ""
    for line in lines:
        begins_code = line.startswith("    ") and out and not out[-1].strip()
        if begins_code and last and not last.startswith(" ") and not last.endswith("::"):
            out += ["::", ""]
        out.append(line if line.startswith(" ") else escaped(line))
        last = line if line.strip() else last
    lines[:] = out


def is_thebe(script: Any) -> bool:
    """Tell sphinx-thebe's tags: jupyter-book always loads it, and it logs an error on each page."""
    told = f"{getattr(script, 'filename', '')} {getattr(script, 'attributes', {}).get('body', '')}"
    return "thebe" in told.lower()


def strip_thebe_tags(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Leave sphinx-thebe's scripts and styles out of a page's head."""
    for kind in ("script_files", "css_files"):
        context[kind] = [item for item in context.get(kind, []) if not is_thebe(item)]


def strip_thebe_nodes(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Leave sphinx-thebe's settings out of a page's body."""
    for node in list(doctree.findall(nodes.raw)):
        if "text/x-thebe-config" in node.astext() or node.astext().startswith("<script>kernelName ="):
            node.parent.remove(node)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect all of it."""
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    app.connect("config-inited", speak_japanese, priority=100)
    app.connect("doctree-resolved", join_lines)
    app.connect("doctree-resolved", strip_thebe_nodes, priority=900)
    app.connect("html-page-context", strip_thebe_tags, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
