"""Serve a built site on 127.0.0.1 and open it in one headless Chromium.

LAB_SITE names the built site (default: book/_build/html); LAB_CHROMIUM the browser (default: /usr/bin/chromium).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]
# look.py beside this file, and the book's own extensions, whatever way pytest imports the tests.
sys.path[:0] = [str(REPOSITORY / "tests/site"), str(REPOSITORY / "book/_ext")]

from look import serve  # noqa: E402


@pytest.fixture(scope="session")
def site_dir() -> Path:
    site = Path(os.environ.get("LAB_SITE", REPOSITORY / "book/_build/html"))
    if not (site / "index.html").is_file():
        pytest.fail(f"no built site in {site}: run ./lab book, or set LAB_SITE")
    return site


@pytest.fixture(scope="session")
def site(site_dir: Path) -> Iterator[str]:
    server = serve(site_dir)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The lab and CI run as root, where Chromium's own sandbox cannot start; every page is our own.
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("LAB_CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each HTML page that the site holds, so that a failure names its page."""
    if "page_path" not in metafunc.fixturenames:
        return
    site = Path(os.environ.get("LAB_SITE", REPOSITORY / "book/_build/html"))
    pages = sorted(
        str(page.relative_to(site)) for page in site.rglob("*.html") if "_static" not in page.relative_to(site).parts
    )
    metafunc.parametrize("page_path", pages)
