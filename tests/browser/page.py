"""The page as a person uses it: types, presses keys, looks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 20.0


class Page:
    """The playground in a browser.

    Args:
        driver: a Selenium driver of Chromium.
        url: of the page.
    """

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self) -> Page:
        """Loads the page and waits until it knows what is served."""
        for kind in ("performance", "browser"):  # of earlier pages
            self.driver.get_log(kind)
        self.driver.get(self.url)
        self.wait(lambda: self.js("return !document.getElementById('send').disabled"), "connected")
        return self

    def close(self) -> None:
        """Leaves the page's tab, and with it what the page has kept, for a new one."""
        old = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        new = self.driver.current_window_handle
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)

    def size(self, width: int, height: int) -> None:
        """Sets the size of the window's inside, pixels of CSS."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def emulate(self, **features: str) -> None:
        """Preferences of the person, for example prefers_color_scheme="dark"; the others are as usual."""
        chosen = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": chosen})

    def js(self, script: str, *arguments: Any) -> Any:
        """The result of a script."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
        """Waits until a condition holds; its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not {what} within {seconds} s; the page logs {self.logs()}"
            time.sleep(0.02)
        return value

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def type(self, text: str) -> None:
        """Types into the prompt."""
        self.js("document.getElementById('prompt').focus()")
        self.press(text)

    def click(self, selector: str) -> None:
        """Clicks on an element as a person would: it must be seen and nothing may lie over it."""
        self.driver.find_element("css selector", selector).click()

    def ask(self, prompt: str) -> None:
        """Types a prompt and sends it with Enter."""
        from selenium.webdriver.common.keys import Keys

        self.type(prompt)
        self.press(Keys.ENTER)

    def until_answered(self) -> None:
        """Waits until the answer is complete."""
        self.wait(lambda: not self.is_writing, "answered")

    @property
    def is_writing(self) -> bool:
        """Whether an answer is under way."""
        return bool(self.js("return !document.getElementById('stop').hidden"))

    @property
    def num_tokens(self) -> int:
        """Tokens on the page."""
        return int(self.js("return document.querySelectorAll('.token').length"))

    def text(self, selector: str) -> str:
        """The text of the first element that a selector finds, as it is seen."""
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def choose(self, selector: str, value: str) -> None:
        """Chooses an option of a list."""
        self.js(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            selector,
            value,
        )

    def logs(self) -> list[str]:
        """What the browser complained of since the last look, refused scripts and styles among it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requested_urls(self) -> set[str]:
        """Every address that was asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return {event["params"]["request"]["url"] for event in sent}

    def save_picture(self, path: Path) -> None:
        """Writes a screenshot as PNG."""
        self.driver.save_screenshot(str(path))
