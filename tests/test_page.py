"""The chat page against a scripted server, the short form: what must never break. Its long form: test_page_chat.py."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from browsing import PHONE, Page
from hostile import ACTIVE, PAYLOADS
from scripted import MARKDOWN, Scripted, scripted_server


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def url(server: Scripted) -> str:
    server.go_on.clear()
    return server.url


def test_an_answer_grows_stays_after_a_reload_and_is_told_to_the_model(page: Page, server: Scripted) -> None:
    page.ask("Wait")
    page.wait_until_writing(8)
    assert page.answers.inner_text() == "First half, " or page.answers.inner_text() == "First half,"
    server.go_on.set()
    page.wait_until_done()
    page.ask_and_wait("Count words", "What is 37*24?", "Count words")
    assert page.at.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight") < 2, "not at the end"
    before = page.at.locator("#log").inner_text()
    page.at.reload(wait_until="networkidle")
    assert page.at.locator("#log").inner_text() == before
    assert page.at.locator(".text table td").count() == 12 and page.at.locator(".text pre code").count() == 2
    page.ask_and_wait("And now?")
    sent = server.requests[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant"] * 4 + ["user"]
    assert sent[3]["content"] == [{"type": "text", "text": MARKDOWN}]


def test_stop_ends_an_answer_that_grows_no_more(page: Page, server: Scripted) -> None:
    left = server.num_left
    page.ask("Wait")
    page.wait_until_writing(8)
    page.stop.click()
    page.wait_until_done()
    server.go_on.set()
    page.at.wait_for_timeout(200)
    assert page.answers.inner_text().strip() == "First half," and page.at.locator(".note").inner_text() == "Stopped."
    assert server.num_left == left + 1, "the server was not told"


def test_hostile_text_stays_text(page: Page) -> None:
    page.at.locator("#file").set_input_files(
        {"name": "hostile.json", "mimeType": "application/json", "buffer": hostile_file(PAYLOADS)}
    )
    page.at.locator("#told").get_by_text("Imported 1 conversation").wait_for()
    page.at.locator("#conversations .open").first.click()
    assert page.questions.all_text_contents() == PAYLOADS
    assert page.at.evaluate(ACTIVE) == []
    page.at.wait_for_timeout(300)  # colours come later
    assert page.at.evaluate(ACTIVE) == [] and page.at.title() == "nanochat"


def hostile_file(payloads: list[str]) -> bytes:
    answer = {"model": "<b>m</b>", "note": "<img src=x onerror=window.owned=1>", "seed": "<script>", "parts": []}
    exchanges: list[Any] = []
    for text in payloads:
        parts = [{"type": kind, "text": text} for kind in ("text", "python", "python_output")]
        exchanges.append({"question": text, "answers": [{**answer, "parts": parts}, {**answer, "parts": parts}]})
    one = {"title": f"{payloads[0]}", "id": "<img src=x onerror=window.owned=1>", "exchanges": exchanges}
    return json.dumps({"format": "nanochat-conversations", "version": 1, "conversations": [one]}).encode()


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_the_page_fits_a_phone(page: Page) -> None:
    page.ask_and_wait("Count words", "What is 37*24?", "y" * 300)
    assert page.at.evaluate("document.documentElement.scrollWidth") == 390
    controls = [page.send, page.box, page.button("Settings"), page.button("Conversations")]
    for control in controls:
        box = control.bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 844
    assert float(page.box.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 16, "iOS would zoom in"


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    press = page.at.keyboard.press
    page.at.keyboard.type("Count words")
    press("Enter")
    page.wait_until_done()
    press("ArrowUp")  # in an empty box: the last question again
    press("Control+A")
    page.at.keyboard.type("What is 37*24?")
    press("Enter")
    page.wait_until_done()
    assert page.questions.all_text_contents() == ["What is 37*24?"]
    reach(page, "Settings")
    press("Enter")
    assert page.at.locator("#settings").is_visible()
    reach(page, "set-temperature")
    page.at.keyboard.type("0.5")
    press("Escape")
    assert not page.at.locator("#settings").is_visible()
    reach(page, "New chat")
    press("Enter")
    assert page.answers.count() == 0 and page.at.evaluate("document.activeElement.id") == "question"
    press("Control+k")
    page.at.keyboard.type("888")
    reach(page, "What is 37*24?")
    press("Enter")
    assert page.questions.all_text_contents() == ["What is 37*24?"]
    reach(page, "Answer again")
    press("Enter")
    page.wait_until_done()
    reach(page, "Rename What is 37*24?")
    press("Enter")
    page.at.keyboard.type("A sum")
    press("Enter")
    assert page.at.locator("h1").inner_text() == "A sum"
    reach(page, "Delete A sum")
    press("Enter")
    reach(page, "Undo")
    press("Enter")
    assert page.questions.all_text_contents() == ["What is 37*24?"]


def reach(page: Page, name: str) -> None:
    """Press Tab until the focus is on the control of that name or id, and can be seen to be there."""
    for _ in range(60):
        page.at.keyboard.press("Tab")
        names = page.at.evaluate(
            """() => {
                const at = document.activeElement;
                return [at.id, at.ariaLabel, (at.querySelector('.title') ?? at).textContent.trim()];
            }"""
        )
        if name in names:
            assert page.at.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"{name!r} is not reached by Tab")
