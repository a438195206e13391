"""A real browser for tests of web pages: the system's Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""Options that provide WebGL 2 without a graphics card."""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


@dataclass
class Watched:
    """A page and the complaints and requests that it made."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Errors, warnings and dialogs."""
    requests: list[str] = field(default_factory=list)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Open a headless browser."""
    # Chromium's sandbox does not start as root, for example in containers.
    options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*SOFTWARE_GL, *options])
        yield browser
        browser.close()


def watch(browser: Browser, *, width: int = 1200, height: int = 900, dark: bool = False) -> Watched:
    """Open a new page and record its complaints and requests."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    watched = Watched(page)

    def dismiss(dialog: Dialog) -> None:
        watched.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on(
        "console", lambda message: watched.complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    # Without a listener, Playwright dismisses dialogs silently.
    page.on("dialog", dismiss)
    page.on("request", lambda request: watched.requests.append(request.url))
    return watched
