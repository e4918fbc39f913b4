"""The page in a real Chromium, desktop and phone: ask, stop, tools, errors, hostile text, keyboard only."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import HOSTILE, LEARNED, ROOT, TOGETHER, UNICODE, running_server, stats, wait_until_idle

IS_REQUIRED = os.environ.get("NANOCHAT_REQUIRE_BROWSER") == "1"  # set by runs/test_all.sh: no browser is a failure then
if IS_REQUIRED:
    import playwright.sync_api as playwright_api
else:
    playwright_api = pytest.importorskip(
        "playwright.sync_api", reason="the extra `browser` is missing: bash runs/install_browser.sh"
    )
pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync"]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        (pytest.fail if IS_REQUIRED else pytest.skip)("no Chromium here: bash runs/install_browser.sh")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(together=True) as url:
        yield url


class Page:
    """A fresh visitor; whatever the page's console complains about or loads from elsewhere is noted."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(**{**DESKTOP, **settings})
        self.at = self.context.new_page()
        self.at.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.at.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.at.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.url = url
        self.at.goto(url, wait_until="networkidle")
        self.box, self.stop = self.at.get_by_label("Your message"), self.at.get_by_role("button", name="Stop")
        self.send = self.at.get_by_role("button", name="Send")
        self.error = self.at.get_by_role("alert")
        self.answers = self.at.locator(".assistant .body")

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_until(self, claim: str, timeout_s: float = 15) -> None:
        """Wait until a JavaScript expression holds. (The page's policy forbids Playwright's own wait_for_function.)"""
        deadline = time.monotonic() + timeout_s
        while not self.at.evaluate(claim):
            assert time.monotonic() < deadline, f"never came true: {claim}"
            self.at.wait_for_timeout(10)

    def wait_until_done(self) -> None:
        self.wait_until("!document.querySelector('.is-writing')")

    def wait_until_writing(self) -> None:
        self.wait_until("document.querySelector('.is-writing .body')?.textContent.length > 60")

    def shoot(self, name: str) -> None:
        """A screenshot for people, in $NANOCHAT_SCREENSHOTS if that is set."""
        folder = os.environ.get("NANOCHAT_SCREENSHOTS")
        if folder:
            self.at.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def page(browser: Any, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    page = Page(browser, url, **getattr(request, "param", {}))
    yield page
    page.context.close()
    assert page.complaints == []


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 error"), ("", "1 skipped")])
def test_a_missing_browser_is_a_failure_where_one_is_required(required: str, outcome: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "the_keyboard_alone"]
    environment = {**os.environ, "PATH": str(tmp_path), "NANOCHAT_REQUIRE_BROWSER": required}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == int(required or 0) and outcome in done.stdout, done.stdout + done.stderr
    assert not required or "no Chromium here: bash runs/install_browser.sh" in done.stdout


def test_a_typed_question_is_answered_in_a_growing_text(page: Page) -> None:
    page.at.evaluate(
        """() => {
            window.lengths = new Set();
            const note = () => window.lengths.add(document.querySelector('.assistant .body')?.textContent.length ?? 0);
            new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.box.press_sequentially("Who are you?", delay=5)
    page.box.press("Enter")
    page.wait_until_done()
    assert page.answers.all_text_contents() == [LEARNED["Who are you?"]]
    assert page.at.locator(".user .body").all_text_contents() == ["Who are you?"]
    assert page.at.evaluate("window.lengths.size") > 3, "the answer came all at once"
    assert page.box.input_value() == "" and page.at.evaluate("document.activeElement.id") == "question"
    assert page.send.is_disabled() and page.stop.is_hidden()


def test_a_conversation_goes_on_and_a_new_chat_begins_empty(page: Page) -> None:
    sent: list[Any] = []
    page.at.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    for question in ("What is 37*24?", "Say hello in many scripts"):
        page.ask(question)
        page.wait_until_done()
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in sent[1]["messages"][1]["content"]] == ["text", "python", "python_output", "text"]
    page.at.get_by_role("button", name="New chat").click()
    assert page.answers.count() == 0 and page.at.get_by_text("What shall we talk about?").is_visible()
    page.ask("Say hello in many scripts")
    page.wait_until_done()
    assert len(sent[2]["messages"]) == 1 and page.answers.all_text_contents() == [UNICODE]


def test_a_tool_call_and_its_result_are_shown_as_such(page: Page) -> None:
    page.ask("What is 37*24?")
    page.wait_until_done()
    assert page.at.locator(".tool .name").all_text_contents() == ["calculator", "result"]
    assert page.at.locator(".tool code").all_text_contents() == ["37*24", "888"]
    assert page.answers.inner_text().startswith("Let me see:") and page.answers.inner_text().endswith("it is 888.")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_a_long_answer_on_screen_and_in_the_engine(page: Page, how: str) -> None:
    use_many_tokens(page)
    page.box.press_sequentially("Never stop", delay=5)
    page.box.press("Enter")
    page.wait_until_writing()
    page.shoot(f"writing-{how}")
    before = stats(page.url)["cancelled"]
    page.stop.click() if how == "button" else page.at.keyboard.press("Escape")
    assert wait_until_idle(page.url) < 0.5
    page.wait_until_done()
    stopped = page.answers.inner_text()
    time.sleep(0.5)
    assert page.answers.inner_text() == stopped and "la la" in stopped
    assert page.at.locator(".note").inner_text() == "Stopped."
    assert stats(page.url)["cancelled"] == before + 1
    assert page.at.evaluate("document.activeElement.id") == "question"
    page.shoot(f"stopped-{how}")
    page.at.unroute_all()
    page.ask("Who are you?")
    page.wait_until("document.querySelectorAll('.assistant:not(.is-writing)').length === 2")


def use_many_tokens(page: Page) -> None:
    """Make the page ask for the longest answers, so that there is something to stop."""
    longer = lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "max_tokens": 4096}))  # noqa: E731
    page.at.route("**/v1/chat/completions", longer)


def test_a_new_chat_and_a_closed_page_free_the_engine_too(page: Page) -> None:
    use_many_tokens(page)
    for leave in (page.at.get_by_role("button", name="New chat").click, page.at.close):
        page.ask("Never stop")
        page.wait_until_writing()
        leave()
        assert wait_until_idle(page.url) < 0.5


def test_shift_enter_begins_a_line_and_the_box_grows(page: Page) -> None:
    low = page.box.bounding_box()["height"]
    page.box.press("Shift+Enter")
    page.box.press_sequentially("two")
    for _ in range(30):
        page.box.press("Shift+Enter")
    assert page.box.input_value().startswith("\ntwo\n")
    assert low * 2 < page.box.bounding_box()["height"] <= 14 * 16 + 2
    assert page.at.locator(".message").count() == 0


def test_a_suggestion_leaves_what_was_being_typed(page: Page) -> None:
    page.box.press_sequentially("half a thought")
    page.at.get_by_role("button", name="Who are you?").click()
    page.wait_until_done()
    assert page.answers.all_text_contents() == [LEARNED["Who are you?"]]
    assert page.box.input_value() == "half a thought" and page.send.is_enabled()


def test_limits_that_could_not_be_fetched_are_asked_for_again(browser: Any, url: str) -> None:
    page = Page(browser, url)
    sent: list[Any] = []
    page.at.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    small = {"data": [{"nanochat": {"limits": {"max_total_chars": 20, "max_messages": 500}}}]}
    replies = iter([lambda route: route.abort(), lambda route: route.fulfill(json=small)])
    page.at.route("**/v1/models", lambda route: next(replies)(route))
    for _ in range(3):
        page.ask("Who are you?")
        page.wait_until_done()
    assert [len(body["messages"]) for body in sent] == [1, 1, 1], "an earlier exchange is longer than the limit"
    assert page.answers.all_text_contents() == [LEARNED["Who are you?"]] * 3
    assert next(replies, None) is None, "once known, limits are not asked for again"
    page.context.close()


def test_text_of_people_and_models_stays_inert(page: Page) -> None:
    asked = "<img src=x onerror=\"document.title='owned'\"> </script><script>document.title='owned'</script> &amp;"
    for question in ("Show me some HTML", asked):
        page.ask(question)
        page.wait_until_done()
    assert page.at.locator(".user .body").last.text_content() == asked
    assert page.answers.first.text_content() == HOSTILE
    assert page.at.locator(".message img, .message script, .message b").count() == 0
    time.sleep(0.2)
    assert page.at.title() == "nanochat"


def test_the_policy_blocks_inline_code_and_markup_from_strings(browser: Any, url: str) -> None:
    page = Page(browser, url)
    blocked = page.at.evaluate(
        """() => {
            const script = document.createElement('script');
            try { script.textContent = "document.title = 'owned'"; document.body.append(script); } catch {}
            try { document.body.innerHTML = '<p>owned</p>'; return false; } catch { return document.title; }
        }"""
    )
    assert blocked == "nanochat" and len(page.complaints) >= 1
    page.context.close()


def test_a_refusal_is_said_in_words_and_the_question_is_kept(browser: Any, url: str) -> None:
    page = Page(browser, url)
    page.ask("x" * 8001)
    page.error.get_by_text("8,001 characters").wait_for()
    assert len(page.box.input_value()) == 8001 and page.at.locator(".message").count() == 0
    page.shoot("error-desktop")
    page.ask("Who are you?")
    page.wait_until_done()
    assert page.error.is_hidden() and page.answers.all_text_contents() == [LEARNED["Who are you?"]]
    page.context.close()


def test_a_busy_and_a_vanished_server_are_said_in_words(browser: Any) -> None:
    with running_server(max_waiting=0) as url:
        first, second = Page(browser, url), Page(browser, url)
        use_many_tokens(first)
        first.ask("Never stop")
        first.wait_until_writing()
        second.ask("Who are you?")
        second.error.get_by_text("busy with other conversations").wait_for()
        assert second.box.input_value() == "Who are you?"
        second.shoot("busy")
    first.error.get_by_text("The server is stopping").wait_for()
    assert first.at.locator(".note").inner_text() == "The answer broke off here." and first.answers.count() == 1
    first.shoot("broken-off")
    second.box.press("Enter")
    second.error.get_by_text("cannot be reached").wait_for()
    assert second.box.input_value() == "Who are you?"
    first.context.close()
    second.context.close()


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    names = []
    for _ in range(8):
        page.at.keyboard.press("Tab")
        names.append(page.at.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"new-chat", "What is 37*24?", "Who are you?", "question"} <= set(names), names
    while page.at.evaluate("document.activeElement.textContent") != "Who are you?":
        page.at.keyboard.press("Tab")
    page.at.keyboard.press("Enter")
    page.wait_until_done()
    assert page.answers.all_text_contents() == [LEARNED["Who are you?"]]
    assert page.at.evaluate("document.activeElement.id") == "question"


def test_every_control_has_a_name_and_answers_are_announced_whole(page: Page) -> None:
    page.ask("Who are you?")
    page.wait_until_done()
    assert LEARNED["Who are you?"] in page.at.get_by_role("status").inner_text()
    unnamed = page.at.evaluate(
        "[...document.querySelectorAll('button, textarea')].filter(e => "
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length"
    )
    assert unnamed == 0 and page.at.locator("html[lang=en]").count() == 1


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_the_page_fits_a_phone(page: Page) -> None:
    page.shoot("welcome-phone")
    for question in (*TOGETHER[:2], "y" * 300):
        page.ask(question)
        page.wait_until_done()
    assert page.at.evaluate("document.documentElement.scrollWidth") == 390
    for control in (page.at.get_by_role("button", name="New chat"), page.send, page.box):
        box = control.bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
    assert float(page.box.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 16, "iOS would zoom in"
    page.shoot("conversation-phone")


@pytest.mark.parametrize(
    ("page", "name"),
    [({"color_scheme": "light"}, "light"), ({"color_scheme": "dark"}, "dark")],
    indirect=["page"],
)
def test_both_themes_are_readable(page: Page, name: str) -> None:
    page.shoot(f"welcome-{name}")
    for question in TOGETHER:
        page.ask(question)
        page.wait_until_done()
    page.shoot(f"conversation-{name}")
    low = page.at.evaluate(CONTRASTS)
    assert low == [], "text with a contrast below 4.5 : 1"


# Every element that has text of its own: its colour against the nearest background behind it (WCAG 2's formula).
CONTRASTS = """() => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const light = (color) => {
        const [r, g, b] = numbers(color).map((value) => linear(value / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const backdrop = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if (numbers(color)[3] !== 0) return color;
        }
        return 'rgb(255, 255, 255)';
    };
    const ratio = (element) => {
        const [low, high] = [light(getComputedStyle(element).color), light(backdrop(element))].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const hasText = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const shown = [...document.body.querySelectorAll('*')].filter((e) => hasText(e) && e.checkVisibility());
    const found = shown.filter((e) => !e.disabled && ratio(e) < 4.5);
    return found.map((e) => [e.className || e.tagName, ratio(e)]);
}"""
