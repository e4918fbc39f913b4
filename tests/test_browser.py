"""The page and the real server together in Chromium, with a model that was really trained."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import Page
from hostile import ACTIVE
from serving import HOSTILE, LEARNED, ROOT, TOGETHER, UNICODE, running_server, stats, wait_until_idle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(together=True) as url:
        yield url


def use_many_tokens(page: Page) -> None:
    """Make the page ask for the longest answers, so that there is something to stop."""
    page.ask("/tokens 4096")


@pytest.mark.parametrize(("required", "outcome"), [("1", "1 error"), ("", "1 skipped")])
def test_a_missing_browser_is_a_failure_where_one_is_required(required: str, outcome: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "a_suggestion"]
    environment = {**os.environ, "PATH": str(tmp_path), "NANOCHAT_REQUIRE_BROWSER": required}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == int(required or 0) and outcome in done.stdout, done.stdout + done.stderr
    assert not required or "no Chromium here: bash runs/install_browser.sh" in done.stdout


def test_a_typed_question_is_answered_in_a_growing_text(page: Page) -> None:
    page.at.evaluate(
        """() => {
            window.lengths = new Set();
            const note = () => window.lengths.add(document.querySelector('.answer .body')?.textContent.length ?? 0);
            new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.box.press_sequentially("Who are you?", delay=5)
    page.box.press("Enter")
    page.wait_until("document.querySelector('.answer')")
    page.wait_until_done()
    assert page.answers.all_text_contents() == [LEARNED["Who are you?"]]
    assert page.questions.all_text_contents() == ["Who are you?"]
    assert page.at.evaluate("window.lengths.size") > 3, "the answer came all at once"
    assert page.box.input_value() == "" and page.at.evaluate("document.activeElement.id") == "question"
    assert page.send.is_disabled() and page.stop.is_hidden()
    assert LEARNED["Who are you?"] in page.at.locator("#status").inner_text(), "screen readers hear it whole"


def test_a_conversation_goes_on_and_a_new_chat_begins_empty(page: Page) -> None:
    sent: list[Any] = []
    page.at.on("request", lambda request: "/chat/" in request.url and sent.append(request.post_data_json))
    page.ask_and_wait("What is 37*24?", "Say hello in many scripts")
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert [part["type"] for part in sent[1]["messages"][1]["content"]] == ["text", "python", "python_output", "text"]
    page.button("New chat").click()
    assert page.answers.count() == 0 and page.at.get_by_text("What shall we talk about?").is_visible()
    page.ask_and_wait("Say hello in many scripts")
    assert len(sent[2]["messages"]) == 1 and page.answers.all_text_contents() == [UNICODE]


def test_one_conversation_with_all_its_answers(page: Page) -> None:
    page.ask_and_wait(*TOGETHER)
    assert page.at.locator(".tool code").all_text_contents() == ["37*24", "888"]
    texts = [text.strip() for text in page.answers.all_inner_texts()]
    assert texts[0] == LEARNED["Who are you?"] and texts[2:] == [UNICODE, HOSTILE]
    assert texts[1].startswith("Let me see:") and texts[1].endswith("it is 888.")
    assert page.at.evaluate(ACTIVE) == [] and page.at.title() == "nanochat"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_a_long_answer_on_screen_and_in_the_engine(page: Page, how: str) -> None:
    use_many_tokens(page)
    page.box.press_sequentially("Never stop", delay=5)
    page.box.press("Enter")
    page.wait_until_writing()
    before = stats(page.url)["cancelled"]
    page.stop.click() if how == "button" else page.at.keyboard.press("Escape")
    wait_until_idle(page.url)
    page.wait_until_done()
    stopped = page.answers.inner_text()
    time.sleep(0.5)
    assert page.answers.inner_text() == stopped and "la la" in stopped
    assert page.at.locator(".note").inner_text() == "Stopped."
    assert stats(page.url)["cancelled"] == before + 1
    assert page.at.evaluate("document.activeElement.id") == "question"


def test_a_new_chat_a_reload_and_a_closed_page_free_the_engine_too(page: Page) -> None:
    use_many_tokens(page)
    for leave in (page.button("New chat").click, page.at.reload, page.at.close):
        before = stats(page.url)["cancelled"]
        page.ask("Never stop")
        page.wait_until_writing()
        leave()
        wait_until_idle(page.url)
        assert stats(page.url)["cancelled"] == before + 1


def test_shift_enter_begins_a_line_and_the_box_grows(page: Page) -> None:
    low = page.box.bounding_box()["height"]
    page.box.press("Shift+Enter")
    page.box.press_sequentially("two")
    for _ in range(30):
        page.box.press("Shift+Enter")
    assert page.box.input_value().startswith("\ntwo\n")
    assert low * 2 < page.box.bounding_box()["height"] <= 14 * 16 + 2
    assert page.answers.count() == 0


def test_a_suggestion_leaves_what_was_being_typed(page: Page) -> None:
    page.box.press_sequentially("half a thought")
    page.button("Who are you?").click()
    page.wait_until("document.querySelector('.answer')")
    page.wait_until_done()
    assert page.answers.all_text_contents() == [LEARNED["Who are you?"]]
    assert page.box.input_value() == "half a thought" and page.send.is_enabled()


def test_a_model_that_could_not_be_asked_for_is_asked_for_again(browser: Any, url: str) -> None:
    page = Page(browser, url)
    asked: list[str] = []

    def refuse_once(route: Any) -> None:
        asked.append(route.request.url)
        route.abort() if len(asked) == 1 else route.continue_()

    page.at.route("**/v1/models", refuse_once)
    page.at.reload(wait_until="networkidle")
    page.ask_and_wait("Who are you?", "What is 37*24?")
    assert page.answers.first.inner_text() == LEARNED["Who are you?"]
    assert len(asked) == 2, "once known, it is not asked for again"
    page.context.close()


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
    assert len(page.box.input_value()) == 8001 and page.answers.count() == 0
    page.ask_and_wait("Who are you?")
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
    first.error.get_by_text("The server is stopping").wait_for()
    assert first.at.locator(".note").inner_text() == "The answer broke off here." and first.answers.count() == 1
    second.box.press("Enter")
    second.error.get_by_text("cannot be reached").wait_for()
    assert second.box.input_value() == "Who are you?"
    first.context.close()
    second.context.close()


def test_code_is_coloured_by_the_real_server(page: Page) -> None:
    reply = page.at.evaluate(
        """async () => (await fetch('/highlight', {method: 'POST', headers: {'Content-Type': 'application/json'},
            body: JSON.stringify({language: 'python', code: 'def f(): pass'})})).json()"""
    )
    assert reply["tokens"][0] == ["keyword", "def"]
    assert "".join(text for _, text in reply["tokens"]) == "def f(): pass"
    assert json.dumps(reply).count("<") == 0
