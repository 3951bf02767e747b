"""The search's cut: the same in Python, for the index, and in the JavaScript that cuts a query."""

from __future__ import annotations

import pytest
from bigram_search import SPLITTER_JS, BigramJapanese, cut
from playwright.sync_api import Browser

CUTS = {
    "名前空間": ["名前", "前空", "空間"],
    "pivot_root": ["pivot_root"],
    "層": ["層"],
    "cgroup v2 のファイル": ["cgroup", "v2", "のフ", "ファ", "ァイ", "イル"],
    "memory.max、サーバー": ["memory", "max", "サー", "ーバ", "バー"],
    "Docker・Podmanでは": ["Docker", "Podman", "では"],
    "": [],
}


@pytest.mark.parametrize("text", list(CUTS))
def test_cut(text: str) -> None:
    assert cut(text) == CUTS[text]


def test_query_is_cut_as_the_index_is(browser: Browser) -> None:
    page = browser.new_page()
    cuts = page.evaluate(f"(texts) => {{ {SPLITTER_JS}; return texts.map((text) => splitQuery(text)); }}", list(CUTS))
    page.close()
    assert cuts == list(CUTS.values())


def test_index_keeps_single_kanji_and_hiragana_pairs() -> None:
    language = BigramJapanese({})
    assert set(language.split("層のまとめ")) == {"層の", "のま", "まと", "とめ", "層"}
    assert all(language.word_filter(term) for term in ("まと", "層", "c"))
