"""A real browser for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. Skipped where there is none, unless SAKD_REQUIRE_BROWSER=1."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        _missing("chromium and chromedriver, Debian's packages chromium and chromium-driver")
    try:
        from selenium import webdriver
    except ImportError:
        _missing("selenium, of the extra test")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1440,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def _missing(what: str) -> None:
    if os.environ.get("SAKD_REQUIRE_BROWSER") == "1":
        pytest.fail(f"found no {what}")
    pytest.skip(f"needs {what}")
