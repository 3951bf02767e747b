"""Open a page and say what is wrong with it: the rules that every page of the site is held to."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Route

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
GRAVE = ("serious", "critical")
AXE = Axe()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def serve(directory: Path) -> http.server.ThreadingHTTPServer:
    """Serve a directory on a free port of 127.0.0.1 until shutdown() is called."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextmanager
def opened(browser: Browser, url: str, viewport: dict[str, int], theme: str, complaints: list[str]) -> Iterator[Page]:
    """A page in a fresh context; console errors and requests to anywhere else are added to complaints (and blocked)."""
    origin = "/".join(url.split("/")[:3])
    context = browser.new_context(viewport=viewport, color_scheme=theme, locale="ja-JP", reduced_motion="reduce")
    try:
        page = context.new_page()

        def heard(message: ConsoleMessage) -> None:
            if message.type == "error":
                complaints.append(f"console: {message.text}")

        def asked(route: Route) -> None:
            if route.request.url.startswith((origin + "/", "data:", "blob:")):
                route.continue_()
            else:
                complaints.append(f"remote request: {route.request.url}")
                route.abort()

        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
        page.route("**/*", asked)
        page.goto(url, wait_until="load")
        yield page
    finally:
        context.close()


def overflow(page: Page) -> list[str]:
    """What makes the page wider than its window: empty when nothing scrolls sideways."""
    return page.evaluate(
        """() => {
          const wide = document.documentElement.clientWidth;
          if (document.documentElement.scrollWidth <= wide && document.body.scrollWidth <= wide) return [];
          const out = [...document.querySelectorAll('main *')]
            .filter((e) => e.getBoundingClientRect().right > wide + 1)
            .map((e) => e.tagName + '.' + e.className);
          return ['page wider than the window: ' + out.slice(0, 3).join(', ')];
        }"""
    )


def unfold(page: Page) -> None:
    """Open everything that is folded, so that its inside is judged too."""
    page.evaluate(
        """() => {
          document.querySelectorAll('details').forEach((d) => { d.open = true; });
          document.querySelectorAll('.admonition.toggle-hidden .toggle-button').forEach((b) => b.click());
        }"""
    )


WORDS = ":is(.highlight, .sig) span[class]:not(a *)"


@contextmanager
def without_repeated(page: Page) -> Iterator[None]:
    """Hide the words of listings that stand in the colours of two before them: a page has thousands of them."""
    page.evaluate(
        """(words) => {
          const seen = {};
          document.querySelectorAll(words).forEach((e) => {
            const block = e.closest('.highlight, .sig');
            const kind = [e, e.parentElement, block, block.parentElement].map((x) => x.className).join('|');
            seen[kind] = (seen[kind] || 0) + 1;
            e.hidden = seen[kind] > 2;
          });
        }""",
        WORDS,
    )
    yield
    page.evaluate("(words) => document.querySelectorAll(words).forEach((e) => { e.hidden = false; })", WORDS)


def barriers(page: Page) -> list[str]:
    """Serious and critical findings of axe-core, one line each."""
    # preload would make axe fetch style sheets itself, by wrong paths, and log what is not there.
    options = {"resultTypes": ["violations"], "preload": False}
    with without_repeated(page):
        found: list[dict[str, Any]] = AXE.run(page, options=options).response["violations"]
    return [
        f"axe {rule['impact']} {rule['id']}: {node['html'][:160]} ({node['failureSummary']})"
        for rule in found
        if rule["impact"] in GRAVE
        for node in rule["nodes"][:4]
    ]


def unnamed(page: Page) -> list[str]:
    """Pictures in the outputs of cells that do not say in words what they show."""
    return page.evaluate(
        """() => [...document.querySelectorAll('article .cell_output :is(img, svg):not(button svg)')]
          .filter((e) => e.tagName === 'IMG'
            ? !e.alt || /_images\\//.test(e.alt)
            : e.getAttribute('role') !== 'img' || !(e.querySelector('title') || e.getAttribute('aria-label')))
          .map((e) => 'picture without words: ' + e.outerHTML.slice(0, 120))"""
    )


def squeezed(page: Page) -> list[str]:
    """Pictures that are not shown in their own proportions: a narrow window takes width and leaves the height."""
    return page.evaluate(
        """() => [...document.querySelectorAll('main img')]
          .filter((e) => {
            const style = getComputedStyle(e);
            const wide = e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
            const high = e.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
            return e.naturalWidth && high && Math.abs((wide * e.naturalHeight) / (high * e.naturalWidth) - 1) > 0.02;
          })
          .map((e) => 'picture squeezed: ' + e.outerHTML.slice(0, 120))"""
    )


def faults(browser: Browser, url: str, listing: bool = False) -> list[str]:
    """Everything wrong with one page: on a phone in the light theme, then on a desk in the dark one.

    listing: the page holds one long source text and is looked through for barriers once, in the light theme.
    """
    complaints: list[str] = []
    with opened(browser, url, PHONE, "light", complaints) as page:
        unfold(page)
        for viewport, theme in ((PHONE, "light"), (DESK, "dark")):
            page.set_viewport_size(viewport)
            page.emulate_media(color_scheme=theme)
            themed = page.locator("html[data-theme]").count() > 0
            if themed:
                page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
            found = overflow(page) + unnamed(page) + squeezed(page)
            if theme == "light" or not listing:
                found += barriers(page)
            complaints += [f"{theme}: {line}" for line in found]
    return complaints
