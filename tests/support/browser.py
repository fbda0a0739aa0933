"""A real Chromium for tests of pages; tests that need one are skipped with a reason where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
HAS_PLAYWRIGHT = find_spec("playwright") is not None
WHY_NOT = (
    "no Chromium is installed" if PROGRAM is None else "playwright is not installed" if not HAS_PLAYWRIGHT else None
)
"""Why no test can use a browser; None when they can."""
TIMEOUT_MS = 60_000
_QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
"""What keeps it from asking other hosts of its own accord."""


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has none
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=[*_QUIET, *sandbox], timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page on a server, and what went wrong on it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.foreign: list[str] = []
        """Addresses on other hosts that were asked for."""
        self.errors: list[str] = []
        """Exceptions, and messages of the console, such as of what the content security policy has blocked."""
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", self._asked)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._said)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.foreign.append(request.url)

    def _said(self, message: Any) -> None:
        if message.type == "error" and "the server responded with a status of" not in message.text:
            self.errors.append(message.text)


@contextmanager
def visiting(browser: Browser, url: str, **options: Any) -> Iterator[Visit]:
    """A page of a fresh profile; it must load nothing from other hosts, and nothing on it may fail."""
    context = browser.new_context(**options)
    try:
        visit = Visit(context.new_page(), url)
        yield visit
        assert not visit.foreign
        assert not visit.errors
    finally:
        context.close()
