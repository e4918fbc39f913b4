"""A visitor of the page: real Chromium, driven by Playwright; and the sizes of its window."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

IS_REQUIRED = os.environ.get("NANOCHAT_REQUIRE_BROWSER") == "1"  # set by runs/test_all.sh: no browser is a failure then
if IS_REQUIRED:
    import playwright.sync_api as playwright_api
else:
    playwright_api = pytest.importorskip(
        "playwright.sync_api", reason="the extra `browser` is missing: bash runs/install_browser.sh"
    )

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@contextmanager
def running_browser() -> Iterator[Any]:
    """Chromium, without a window."""
    if CHROMIUM is None:
        (pytest.fail if IS_REQUIRED else pytest.skip)("no Chromium here: bash runs/install_browser.sh")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


class Page:
    """A fresh visitor; whatever the page's console complains about or loads from elsewhere is noted."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{**DESKTOP, **settings})
        self.complaints: list[str] = []
        self.open()

    def open(self) -> None:
        """A window; a second one shares what the browser keeps for the first."""
        self.at = self.context.new_page()
        self.at.set_default_timeout(15_000)
        self.at.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.at.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.at.on("request", lambda request: self.complain_of_elsewhere(request.url))
        self.at.goto(self.url, wait_until="networkidle")
        self.box, self.stop = self.at.get_by_label("Your message"), self.button("Stop")
        self.send, self.error = self.button("Send"), self.at.get_by_role("alert")
        self.questions, self.answers = self.at.locator(".question .body"), self.at.locator(".answer .body")

    def complain_of_elsewhere(self, address: str) -> None:
        if not address.startswith((self.url, "blob:")):
            self.complaints.append(f"asked for {address}")

    def button(self, name: str) -> Any:
        return self.at.get_by_role("button", name=name, exact=True)

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def ask_and_wait(self, *questions: str) -> None:
        for text in questions:
            before = self.answers.count()
            self.ask(text)
            self.wait_until(f"document.querySelectorAll('.answer').length > {before}")
            self.wait_until_done()

    def wait_until(self, claim: str, timeout_s: float = 15) -> None:
        """Wait until a JavaScript expression holds. (The page's policy forbids Playwright's own wait_for_function.)"""
        deadline = time.monotonic() + timeout_s
        while not self.at.evaluate(claim):
            assert time.monotonic() < deadline, f"never came true: {claim}"
            self.at.wait_for_timeout(10)

    def wait_until_done(self) -> None:
        self.wait_until("!document.body.classList.contains('is-running')")

    def wait_until_writing(self, num_characters: int = 60) -> None:
        self.wait_until(f"document.querySelector('.is-writing .body')?.textContent.length >= {num_characters}")

    def shoot(self, name: str) -> None:
        """A screenshot for people, in $NANOCHAT_SCREENSHOTS if that is set."""
        folder = os.environ.get("NANOCHAT_SCREENSHOTS")
        if folder:
            self.at.screenshot(path=str(Path(folder) / f"{name}.png"))
