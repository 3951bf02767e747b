"""Search that finds Japanese compounds, by cutting both text and query into bigrams.

Sphinx cuts the text into dictionary words when it builds the index but leaves the query whole,
so 名前空間 meets 名前 + 空間 and finds nothing.
Here one rule cuts both, in Python for the index and in JavaScript for the query:

- a run of Japanese characters becomes its overlapping pairs; a run of one stands for itself;
- everything else becomes words of letters, digits and underscores (``pivot_root`` stays one word).

The index also holds every single kanji, so that a query of one character finds its pages.
"""

from __future__ import annotations

import re
from itertools import pairwise

from sphinx.application import Sphinx
from sphinx.search import SearchLanguage, languages

# Iteration mark, hiragana, katakana with the long-vowel mark, kanji (with extension A and compatibility forms).
JAPANESE = "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
KANJI = re.compile("[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
PIECES = re.compile(f"[{JAPANESE}]+|[^\\W{JAPANESE}]+")

SPLITTER_JS = r"""
var splitQuery = (query) => {
  const japanese = /^[JAPANESE]/;
  const pieces = query.match(/[JAPANESE]+|(?:(?![JAPANESE])[\p{Letter}\p{Number}_])+/gu) || [];
  return pieces.flatMap((piece) => {
    const letters = [...piece];
    if (!japanese.test(piece) || letters.length === 1) return [piece];
    return letters.slice(1).map((letter, i) => letters[i] + letter);
  });
};
""".replace("JAPANESE", JAPANESE.encode("ascii", "backslashreplace").decode())


def cut(text: str) -> list[str]:
    """Cut a query the way SPLITTER_JS cuts it."""
    terms: list[str] = []
    for piece in PIECES.findall(text):
        if re.match(f"[{JAPANESE}]", piece) and len(piece) > 1:
            terms += [a + b for a, b in pairwise(piece)]
        else:
            terms.append(piece)
    return terms


class BigramJapanese(SearchLanguage):
    """The index side: the query's terms, and each single kanji."""

    lang = "ja"
    language_name = "Japanese"
    js_splitter_code = SPLITTER_JS

    def split(self, input: str) -> list[str]:  # noqa: A002 (the base class calls it so)
        """Cut a text for the index."""
        return cut(input) + KANJI.findall(input)

    def word_filter(self, word: str) -> bool:
        """Keep every term."""
        # The base class drops short words that begin with hiragana: half of the bigrams.
        return bool(word)


def setup(app: Sphinx) -> dict[str, bool]:
    """Take the place of Sphinx's own Japanese."""
    languages["ja"] = BigramJapanese
    return {"parallel_read_safe": True, "parallel_write_safe": True}
