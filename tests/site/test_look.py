"""The rules of look.py can fail: one tiny bad page a rule, and a good one that passes them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from look import faults, serve
from playwright.sync_api import Browser

GOOD = "<p>名前空間</p>"
WIDE = "data:image/svg+xml,<svg xmlns=%22http://www.w3.org/2000/svg%22 width=%22640%22 height=%22320%22/>"
BAD = [
    ("console: ", "<script>console.error('broken')</script>"),
    ("script: ", "<script>nowhere()</script>"),
    ("remote request: ", "<img alt='x' src='http://192.0.2.1/x.png'>"),
    ("light: page wider", "<div style='width: 900px'>広い</div>"),
    ("light: picture without words", "<article><div class='cell_output'><svg></svg></div></article>"),
    (
        "dark: axe serious color-contrast",
        "<style>@media (prefers-color-scheme: dark) { body { background: #111 } }</style><p style='color: #333'>暗</p>",
    ),
    ("light: axe serious color-contrast", "<p style='color: #ccc; background: #fff'>読めない字</p>"),
    (
        "light: axe serious color-contrast",
        "<div class='highlight'><pre>" + "<span class='k'>if</span> " * 3 + "<span class='c' style='color: #ddd'>"
        "# 読めない注</span></pre></div>",
    ),
    ("light: picture squeezed", f"<img alt='x' src='{WIDE}' style='width: 640px; height: 320px; max-width: 100%'>"),
    ("light: axe critical image-alt", "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' width='9' height='9'>"),
]
PAGE = (
    "<!DOCTYPE html><html lang='ja'><head><title>t</title><link rel='icon' href='data:,'></head>"
    "<body><main><h1>見出し</h1>{}</main></body></html>"
)


@pytest.fixture(scope="module")
def bad_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = tmp_path_factory.mktemp("bad")
    for i, body in enumerate([GOOD, *(body for _, body in BAD)]):
        (root / f"{i}.html").write_text(PAGE.format(body), encoding="utf-8")
    server = serve(root)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_good_page_passes(browser: Browser, bad_site: str) -> None:
    assert faults(browser, f"{bad_site}/0.html") == []


@pytest.mark.parametrize(("number", "complaint"), list(enumerate((text for text, _ in BAD), start=1)))
def test_bad_page_is_refused(browser: Browser, bad_site: str, number: int, complaint: str) -> None:
    found = faults(browser, f"{bad_site}/{number}.html")
    assert any(line.startswith(complaint) for line in found), found
