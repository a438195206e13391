"""A real browser for the tests that look at pages: Chromium, as the system has it, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""WebGL 2 where there is no graphics card."""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")


@dataclass
class Watched:
    """A page, and what it complained of and asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window."""
    # As root, as in containers, Chromium's sandbox does not start.
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*SOFTWARE_GL, *root])
        yield browser
        browser.close()


def watch(browser: Browser, *, width: int = 1200, height: int = 900, dark: bool = False) -> Watched:
    """A new page whose complaints and requests are kept."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    watched = Watched(page)

    def refuse(dialog: Dialog) -> None:
        watched.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on(
        "console", lambda message: watched.complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    # Without a listener Playwright dismisses dialogs, and nobody would know.
    page.on("dialog", refuse)
    page.on("request", lambda request: watched.requests.append(request.url))
    return watched
