"""A browser, and what it talks to."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from fusionroute.http_server import serving_http
from tests.browser.fake_api import FakeApi
from tests.browser.page import Page

START_SECONDS = 60


T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Elsewhere(Generic[T]):
    """What runs on the loop of another thread, while this one drives the browser."""

    value: T
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """Has something done over there."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(START_SECONDS)


@contextmanager
def in_a_thread(context: AbstractAsyncContextManager[T]) -> Iterator[Elsewhere[T]]:
    """Enters a context on a loop of its own, and leaves it there."""
    ready, stop = threading.Event(), threading.Event()
    made: list[Elsewhere[T]] = []

    async def hold() -> None:
        async with context as value:
            made.append(Elsewhere(value, asyncio.get_running_loop()))
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(hold()), daemon=True)
    thread.start()
    assert ready.wait(START_SECONDS), "it has not started"
    try:
        yield made[0]
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
    with in_a_thread(serving_http(fake.app(), "127.0.0.1", 0, port_field="http_port")) as served:
        page = Page(driver, f"http://{served.value}/")
        page.size(1440, 900)
        yield page
        page.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where screenshots go: --basetemp, or a folder that pytest makes."""
    return tmp_path_factory.mktemp("pictures")
