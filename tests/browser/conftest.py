"""A browser, and what it talks to."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusionroute.http_server import serving_http
from tests.browser.fake_api import FakeApi
from tests.browser.page import Page

START_SECONDS = 30


@contextmanager
def in_a_thread(app: Any) -> Iterator[str]:
    """An application served on a loop of its own; gives its URL."""
    ready, stop = threading.Event(), threading.Event()
    addresses: list[str] = []

    async def serve() -> None:
        async with serving_http(app, "127.0.0.1", 0, port_field="http_port") as address:
            addresses.append(address)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(START_SECONDS)
    try:
        yield f"http://{addresses[0]}/"
    finally:
        stop.set()
        thread.join(START_SECONDS)


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """Headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver", reason="pip install 'fusionroute[browser]'")
    chromium, chromedriver = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if not chromium or not chromedriver:
        pytest.skip("chromium and chromedriver are not here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(chromedriver))
    driver.set_script_timeout(30)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def fake() -> FakeApi:
    """An API that does as told."""
    return FakeApi()


@pytest.fixture
def page(driver: Any, fake: FakeApi) -> Iterator[Page]:
    """The page over the fake, at desktop width, with nothing kept from another test."""
    with in_a_thread(fake.app()) as url:
        page = Page(driver, url)
        page.size(1440, 900)
        yield page
        page.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where screenshots go: --basetemp, or a folder that pytest makes."""
    return tmp_path_factory.mktemp("pictures")
