"""What tests of pages need: the data in one, and a headless Chromium; they are skipped where none is installed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def read_data(page: str) -> Any:
    """The data of a page."""
    return json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test, and says why, without playwright or Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(
    browser: Any, path: Path, scheme: str = "light", width: int = 1200, motion: str = "reduce", at: str = ""
) -> tuple[Any, list[str]]:
    """The page of a file, and a list that fills with what a page must not do: errors, dialogs, requests elsewhere.

    `motion`: what the system asks of pages, "reduce" or "no-preference". `at`: the address's part after #.
    """
    faults: list[str] = []
    page = browser.new_page(color_scheme=scheme, reduced_motion=motion, viewport={"width": width, "height": 800})
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda one: faults.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
    page.goto(path.resolve().as_uri() + (f"#{at}" if at else ""))
    return page, faults
