"""Pages in a headless Chromium with the network off: what a page asked for and complained of is kept, pictures too."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"
WIDE, NARROW = (1280, 900), (390, 844)

# texts, and what a table that is saved holds for them: a spreadsheet runs what begins like a formula
FORMULAS = {
    "=1+1": "'=1+1", "+2": "+2", "-3.5": "-3.5", "-.5": "-.5", "-12%": "-12%", "-x": "'-x", "-1-1": "'-1-1",
    "@SUM(A1)": "'@SUM(A1)", ' "quoted", text': ' "quoted", text', " =HYPERLINK(1)": "' =HYPERLINK(1)",
    "\t=2": "'\t=2", "a=b": "a=b",
}  # fmt: skip


@dataclass
class Watched:
    """A page, with what it did that it should not have done."""

    page: Any
    asked: list[str] = field(default_factory=list)
    """addresses it requested, but for the page itself and what it made of its own data"""
    complaints: list[str] = field(default_factory=list)
    """console errors and warnings, uncaught errors, dialogs"""

    def shoot(self, name: str, **how: Any) -> Path:
        """Keep a picture of the page as it stands."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=str(path), **how)
        return path

    def clean(self) -> None:
        assert self.complaints == []
        assert self.asked == []


def until(page: Any, expression: str, arg: Any = None, seconds: float = 20.0) -> None:
    """Wait for a JavaScript expression to hold; wait_for_function would be refused by the pages' own policy."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        if time.monotonic() > end:
            pytest.fail(f"after {seconds:g} s not yet: {expression}")
        page.wait_for_timeout(50)


@contextmanager
def launched() -> Iterator[Any]:
    """Chromium; a machine without one skips the test, but CI fails."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: apt-get install chromium")
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # root has no sandbox in a container; the pages are our own
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, size: tuple[int, int] = WIDE, **context: Any) -> Iterator[Watched]:
    """A file opened from disk, offline, as a user opens it; `context` is playwright's, as color_scheme="dark"."""
    address = path.resolve().as_uri()
    inside = browser.new_context(
        offline=True, viewport={"width": size[0], "height": size[1]}, accept_downloads=True, **context
    )
    page = inside.new_page()
    watched = Watched(page)
    own = ("data:", "blob:", "about:")

    def note(request: Any) -> None:
        if request.url.split("#")[0] != address and not request.url.startswith(own):
            watched.asked.append(request.url)

    page.on("request", note)
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    page.on(
        "console",
        lambda said: said.type in ("error", "warning") and watched.complaints.append(f"{said.type}: {said.text}"),
    )

    def dialog(asked: Any) -> None:
        watched.complaints.append(f"dialog: {asked.message}")
        asked.dismiss()

    page.on("dialog", dialog)
    page.goto(address)
    try:
        yield watched
    finally:
        inside.close()
