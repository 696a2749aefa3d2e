"""A headless Chromium, driven by Selenium; nothing is fetched: browser and driver are those of the machine."""

from __future__ import annotations

import base64
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.harness.commands import wait_until

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = None if BROWSER and DRIVER else "no chromium and chromedriver here: apt-get install chromium chromium-driver"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


@contextlib.contextmanager
def chromium() -> Iterator[Chrome]:
    """A new browser with a profile of its own."""
    with tempfile.TemporaryDirectory() as profile:
        options = ChromeOptions()
        options.binary_location = BROWSER or ""
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options=options, service=Service(DRIVER))
        browser.set_page_load_timeout(60)
        try:
            yield browser
        finally:
            browser.quit()


def resize(browser: Chrome, width: int, height: int, dark: bool = False) -> None:
    """Give the window a width and height in CSS pixels, and a preference of colours."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    metrics |= {"screenWidth": width, "screenHeight": height}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_page(browser: Chrome, url: str) -> None:
    """Load a page; back when it has the width of the window, which comes a moment after the page itself."""
    browser.get(url)
    as_wide = "return window.innerWidth === screen.width"
    wait_until(lambda: bool(browser.execute_script(as_wide)), f"the width of {url}", timeout_s=30)


def screenshot(browser: Chrome, path: Path) -> None:
    """Write what is in the window as PNG."""
    found = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    path.write_bytes(base64.b64decode(found["data"]))


_CLIPPED = """
const pen = document.createElement('canvas').getContext('2d');
const textOf = field => field.value && field.tagName === 'INPUT' ? field.value
  : field.placeholder || (field.selectedOptions ? field.selectedOptions[0].text : '');
const isClipped = field => {
  const style = getComputedStyle(field);
  const arrows = field.type === 'number' && style.appearance !== 'textfield' ? 16 : 0;
  const room = field.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - arrows;
  pen.font = style.font;
  return pen.measureText(textOf(field)).width > room || field.scrollWidth > field.clientWidth;
};
return [...document.querySelectorAll('input, select, button, label, legend')].filter(isClipped)
  .map(field => textOf(field) || field.textContent.trim());
"""


def clipped_fields(browser: Chrome) -> list[str]:
    """Texts of fields, buttons and labels that are wider than their box; the arrows of a number take some of it."""
    return [str(text) for text in browser.execute_script(_CLIPPED)]


def overflow(browser: Chrome) -> int:
    """By how many pixels the page is wider than the window."""
    return int(
        browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    )
