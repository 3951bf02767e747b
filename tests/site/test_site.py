"""The built site in a real browser: every page on a phone and a desk, light and dark; search, folds, copy buttons."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from look import DESK, PHONE, faults, opened
from playwright.sync_api import Browser, expect


def test_page(browser: Browser, site: str, page_path: str) -> None:
    """No console error, no remote request, nothing too wide, no serious barrier, no picture without words."""
    assert faults(browser, f"{site}/{page_path}", listing=page_path.startswith("_modules/")) == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("名前空間", {"appendix/glossary.html", "01-container/02-namespaces.html"}),
        ("pivot_root", {"appendix/glossary.html", "01-container/03-rootfs.html"}),
        ("cgroup", {"appendix/glossary.html", "01-container/04-cgroups.html"}),
        ("まとめ", {"01-container/01-process.html"}),
        ("層", {"03-image/index.html"}),
    ],
)
def test_search_finds(browser: Browser, site: str, query: str, expected: set[str]) -> None:
    complaints: list[str] = []
    with opened(browser, f"{site}/search.html?q={quote(query)}", DESK, "light", complaints) as page:
        links = page.locator("#search-results ul.search li a")
        expect(links.first).to_be_visible(timeout=10_000)
        expect(page.locator("#search-results .search-summary")).not_to_be_empty(timeout=10_000)
        expect(page.locator("#search-results .search-summary")).to_contain_text("件見つかりました")
        found = {
            link.split("#")[0].split("?")[0].removeprefix(f"{site}/")
            for link in links.evaluate_all("all => all.map((a) => a.href)")
        }
        assert expected <= found, f"{query}: {sorted(found)}"
        assert complaints == []


def test_search_says_when_nothing_is_found(browser: Browser, site: str) -> None:
    with opened(browser, f"{site}/search.html?q={quote('量子力学')}", DESK, "light", []) as page:
        expect(page.locator("#search-results .search-summary")).not_to_be_empty(timeout=10_000)
        expect(page.locator("#search-results .search-summary")).to_contain_text("見つかりませんでした")
        assert page.locator("#search-results ul.search li").count() == 0


def test_search_box_leads_to_results(browser: Browser, site: str) -> None:
    """A reader opens the box from a page, types, and lands on a page that holds the term."""
    with opened(browser, f"{site}/index.html", DESK, "light", []) as page:
        page.locator("button.search-button-field, button.search-button").first.click()
        box = page.locator("input[name=q]:visible").first
        box.fill("名前空間")
        box.press("Enter")
        page.locator("#search-results ul.search li a").first.click()
        expect(page.locator("article")).to_contain_text("名前空間")


def test_folded_answers_open_by_click(browser: Browser, site: str) -> None:
    with opened(browser, f"{site}/01-container/quiz.html", PHONE, "light", []) as page:
        answers = page.locator("details.sd-dropdown")
        assert answers.count() >= 10
        for answer in answers.all():
            inside = answer.locator(".sd-summary-content")
            expect(inside).to_be_hidden()
            answer.locator("summary").click()
            expect(inside).to_be_visible()


def test_solutions_open_by_click(browser: Browser, site: str) -> None:
    """A solution's text and its executed code are folded apart, and each opens."""
    with opened(browser, f"{site}/01-container/01-process.html", DESK, "light", []) as page:
        solution = page.locator(".solution.dropdown").first
        text = solution.locator("section, p:not(.admonition-title)").first
        expect(text).to_be_hidden()
        solution.locator("button.toggle-button").click()
        expect(text).to_be_visible()
        code = page.locator("details.hide").first
        expect(code.locator("pre").first).to_be_hidden()
        code.locator("summary").click()
        expect(code.locator("pre").first).to_be_visible()


def test_copy_buttons(browser: Browser, site: str) -> None:
    for path in ("index.html", "01-container/01-process.html"):
        with opened(browser, f"{site}/{path}", DESK, "light", []) as page:
            listings = page.locator("div.highlight pre").count()
            expect(page.locator("button.copybtn").first).to_be_attached()
            assert 0 < page.locator("button.copybtn").count() == listings, path


def test_copied_commands_have_no_prompt(browser: Browser, site: str) -> None:
    with opened(browser, f"{site}/index.html", DESK, "light", []) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site)
        block = page.locator("div.highlight").first
        block.hover()
        block.locator("button.copybtn").click()
        assert page.evaluate("navigator.clipboard.readText()").split("\n")[0] == "./lab up"


def test_theme_switch(browser: Browser, site: str) -> None:
    """The button walks through light, dark and automatic, and the choice outlives a reload."""
    with opened(browser, f"{site}/index.html", DESK, "light", []) as page:
        button = page.locator("button.theme-switch-button").first
        for _ in range(3):
            if page.evaluate("document.documentElement.dataset.theme") == "dark":
                break
            button.click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_map_leads_to_every_chapter(browser: Browser, site: str) -> None:
    with opened(browser, f"{site}/index.html", PHONE, "light", []) as page:
        hrefs = page.locator(".descent a").evaluate_all("all => all.map((a) => a.getAttribute('href'))")
        chapters = {href.split("/")[0] for href in hrefs}
        assert {chapter[:2] for chapter in chapters} == {"01", "02", "03", "04", "05", "06", "07"}
        for href in sorted(set(hrefs)):
            assert page.request.get(f"{site}/{href}").status == 200, href
