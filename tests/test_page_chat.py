"""All that the chat page can do, against a scripted server. The short form is test_page.py."""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from browsing import DESKTOP, PHONE, Page
from hostile import ACTIVE, PAYLOADS
from scripted import BREAK, MARKDOWN, WAIT, Scripted, scripted_server

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def url(server: Scripted) -> str:
    return server.url


def messages_of(asked: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in asked["messages"]]


# Asking again ----------------------------------------------------------------------------------------------------


def test_an_edited_question_takes_the_place_of_what_came_after_it(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one", "two", "three")
    page.at.locator(".exchange").nth(1).hover()
    page.button("Edit the question").nth(1).click()
    page.at.locator(".editor textarea").fill("two, in other words")
    page.button("Send again").click()
    page.wait_until_done()
    assert page.questions.all_text_contents() == ["one", "two, in other words"]
    assert page.answers.all_inner_texts() == ["You said: one", "You said: two, in other words"]
    assert [role for role, _ in messages_of(server.requests[-1])] == ["user", "assistant", "user"]
    page.at.reload(wait_until="networkidle")
    assert page.questions.all_text_contents() == ["one", "two, in other words"]


def test_an_edit_that_is_given_up_or_refused_changes_nothing(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one", "two")
    for how in ("Escape", "Cancel", "refused"):
        page.at.locator(".exchange").first.hover()
        page.button("Edit the question").first.click()
        field = page.at.locator(".editor textarea")
        field.fill("something else")
        if how == "Escape":
            field.press("Escape")
        elif how == "Cancel":
            page.button("Cancel").click()
        else:
            server.refuse(429, "busy", **{"Retry-After": "1"})
            field.press("Enter")
            page.error.get_by_text("Try again in a second").wait_for()
            assert field.input_value() == "something else", "what was written is kept"
            page.button("Try again").click()
            page.wait_until_done()
            assert page.questions.all_text_contents() == ["something else"]
            page.complaints.clear()  # of the refusal
            return
        assert page.questions.all_text_contents() == ["one", "two"] and page.answers.count() == 2


def test_an_answer_is_written_again_with_another_seed_or_the_one_that_is_set(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one", "two")
    for _ in range(2):
        page.button("Answer again").last.click()
        page.wait_until_done()
    assert page.questions.all_text_contents() == ["one", "two"] and page.answers.count() == 2
    seeds = [asked["seed"] for asked in server.requests]
    assert len(set(seeds)) == 4
    assert [messages_of(asked) for asked in server.requests[1:]] == [messages_of(server.requests[1])] * 3
    page.ask("/seed 7")
    page.button("Answer again").last.click()
    page.wait_until_done()
    assert server.requests[-1]["seed"] == 7 and page.at.locator(".facts").last.inner_text().endswith("seed 7")


def test_an_answer_that_cannot_be_written_again_stays(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one")
    server.refuse(503, "no worker is running")
    page.button("Answer again").click()
    page.error.get_by_text("No worker is running.").wait_for()
    assert page.answers.all_inner_texts() == ["You said: one"]
    page.complaints.clear()


# What is kept ----------------------------------------------------------------------------------------------------


def test_a_reload_in_the_middle_of_an_answer_loses_nothing_that_was_shown(page: Page, server: Scripted) -> None:
    page.ask("Wait")
    page.wait_until_writing(8)
    shown = page.answers.inner_text()
    page.at.reload(wait_until="networkidle")
    assert page.questions.all_text_contents() == ["Wait"]
    assert page.answers.inner_text() == shown.strip()
    assert page.at.locator(".note").inner_text() == "The page was left while this was being written."
    server.go_on.set()
    page.button("Answer again").click()
    page.wait_until_done()
    assert page.answers.inner_text() == "First half, second half." and page.at.locator(".note").is_hidden()


def test_a_reload_before_the_first_word_keeps_the_question(page: Page, server: Scripted) -> None:
    server.script["Wait at once"] = [WAIT, {"type": "text", "text": "Here."}]
    page.ask("Wait at once")
    page.wait_until("document.querySelector('.is-writing')")
    page.at.reload(wait_until="networkidle")
    assert page.questions.all_text_contents() == ["Wait at once"]
    server.go_on.set()
    page.ask_and_wait("and now?")
    assert [role for role, _ in messages_of(server.requests[-1])] == ["user"], "no answer, so nothing was said yet"


def test_another_chat_stops_the_answer_and_keeps_what_is_there(page: Page, server: Scripted) -> None:
    page.ask("Wait")
    page.wait_until_writing(8)
    page.button("New chat").click()
    assert page.answers.count() == 0
    page.ask_and_wait("meanwhile")
    page.at.locator("#conversations .open").nth(1).click()
    assert page.answers.inner_text() == "First half,"
    assert page.at.locator(".note").inner_text() == "Stopped." and server.num_left == 1


def test_conversations_are_found_renamed_deleted_and_brought_back(page: Page) -> None:
    for text in ("Of apples", "Of pears\nand more", "Of plums"):
        page.ask_and_wait(text)
        page.button("New chat").click()
    titles = page.at.locator("#conversations .title")
    assert titles.all_inner_texts() == ["Of plums", "Of pears", "Of apples"]
    search = page.at.get_by_label("Search conversations")
    search.fill("SAID pears")
    assert titles.all_inner_texts() == ["Of pears"]
    assert "You said: Of pears" in page.at.locator("#conversations small").inner_text()
    search.fill("bananas")
    assert titles.count() == 0 and page.at.get_by_text("Nothing found.").is_visible()
    search.fill("")
    titles.nth(1).click()
    page.button("Rename Of pears").click()
    page.at.get_by_label("New title").fill("Fruit")
    page.at.get_by_label("New title").press("Enter")
    assert "Fruit" in titles.all_inner_texts() and page.at.locator("h1").inner_text() == "Fruit"
    page.at.reload(wait_until="networkidle")
    assert "Fruit" in titles.all_inner_texts() and page.at.locator("h1").inner_text() == "Fruit"
    page.button("Delete Fruit").click()
    assert "Fruit" not in titles.all_inner_texts() and page.answers.count() == 0
    page.button("Undo").click()
    assert "Fruit" in titles.all_inner_texts() and page.questions.all_text_contents() == ["Of pears\nand more"]
    page.button("Delete Fruit").click()
    page.at.reload(wait_until="networkidle")
    assert sorted(titles.all_inner_texts()) == ["Of apples", "Of plums"]


def test_what_is_deleted_while_it_is_written_stays_deleted(page: Page, server: Scripted) -> None:
    page.ask("Wait")
    page.wait_until_writing(8)
    page.button("Delete Wait").click()
    page.wait_until_done()
    server.go_on.set()
    page.at.reload(wait_until="networkidle")
    assert page.at.locator("#conversations li").count() == 0


def test_exported_conversations_come_back_word_for_word(page: Page, server: Scripted, tmp_path: Path) -> None:
    page.ask_and_wait("Count words", "What is 37*24?")
    page.button("New chat").click()
    page.ask_and_wait("Another")
    with page.at.expect_download() as download:
        page.button("Export all").click()
    file = tmp_path / "all.json"
    download.value.save_as(file)
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert [len(one["exchanges"]) for one in kept["conversations"]] == [1, 2]
    assert kept["conversations"][1]["exchanges"][0]["answers"][0]["parts"] == [{"type": "text", "text": MARKDOWN}]
    page.at.locator("#file").set_input_files(file)
    page.at.get_by_text("Imported 0 conversations; 2 were here already.").wait_for()
    for _ in range(2):
        page.at.locator("#conversations li").first.hover()
        page.at.locator("#conversations li").first.get_by_role("button", name="Delete").click()
    page.at.locator("#file").set_input_files(file)
    page.at.get_by_text("Imported 2 conversations.").wait_for()
    page.at.locator("#conversations .open").nth(1).click()
    assert page.at.locator(".text table td").count() == 6 and page.at.locator(".tool code").count() == 2
    page.at.locator("#conversations li").nth(1).hover()
    with page.at.expect_download() as download:
        page.button("Export Count words").click()
    assert len(json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["conversations"]) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no JSON", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "no conversations of this page"),
        (b'{"format": "nanochat-conversations", "conversations": [{"exchanges": 3}]}', "no conversations"),
        (b'{"format": "nanochat-conversations", "conversations": [null]}', "no conversations"),
        (b'{"format": "nanochat-conversations", "conversations": [{"exchanges": [{"question": 1}]}]}', "no conv"),
        (b'{"format": "nanochat-conversations", "conversations": {"__proto__": []}}', "no conversations"),
    ],
)
def test_a_file_that_is_no_export_is_refused_in_words(page: Page, content: bytes, told: str) -> None:
    page.at.locator("#file").set_input_files({"name": "x.json", "mimeType": "application/json", "buffer": content})
    page.error.get_by_text(told).wait_for()
    assert page.at.locator("#conversations li").count() == 0


def test_two_windows_see_each_others_conversations(page: Page) -> None:
    first = page.at
    page.open()
    page.ask_and_wait("From the second window")
    first.get_by_role("button", name="From the second window", exact=True).click()
    assert first.locator(".question .body").inner_text() == "From the second window"
    page.ask_and_wait("And more")
    first.get_by_text("You said: And more").wait_for()


def test_a_browser_without_room_goes_on_and_says_so(page: Page) -> None:
    page.at.evaluate(
        "() => { for (let i = 0; i < 6; i++) try { localStorage.setItem('x' + i, 'x'.repeat(1e6)) } catch {} }"
    )
    page.at.evaluate(
        "() => { try { for (let n = 5e5; n > 10; n /= 2) localStorage.setItem('y' + n, 'y'.repeat(n)) } catch {} }"
    )
    page.at.evaluate(
        "() => { for (let i = 0; ; i++) try { localStorage.setItem('z' + i, 'z'.repeat(100)) } catch { return } }"
    )
    page.ask_and_wait("Is there room?")
    assert page.answers.inner_text() == "You said: Is there room?"
    page.error.get_by_text("no room left").wait_for()


def test_a_browser_that_keeps_nothing_can_chat(page: Page, server: Scripted) -> None:
    page.at.add_init_script(
        "for (const area of ['localStorage', 'sessionStorage'])"
        "    Object.defineProperty(window, area, { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page.at.reload(wait_until="networkidle")
    page.ask_and_wait("one", "two")
    assert page.answers.all_inner_texts() == ["You said: one", "You said: two"]
    assert page.at.locator("#conversations li").count() == 1 and len(server.requests[-1]["messages"]) == 3


# Settings ---------------------------------------------------------------------------------------------------------


def test_what_is_set_is_asked_for_and_outlasts_the_window(page: Page, server: Scripted) -> None:
    page.ask_and_wait("before")
    assert set(server.requests[-1]) == {"messages", "model", "seed", "stream"}
    page.button("Settings").click()
    wanted = {"temperature": 0.3, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    wanted |= {"max_tokens": 99, "seed": 5}
    for name, value in wanted.items():
        page.at.locator(f"#set-{name}").fill(str(value))
    page.at.get_by_label("Stop at").fill("END\nand so on")
    page.at.get_by_label("System prompt").fill("Be brief.")
    page.button("Close the settings").click()
    page.at.reload(wait_until="networkidle")
    page.ask_and_wait("after")
    asked = server.requests[-1]
    assert {name: asked[name] for name in wanted} == wanted
    assert asked["stop"] == ["END", "and so on"] and messages_of(asked)[0] == ("system", "Be brief.")
    page.button("Settings").click()
    page.button("Back to the server's choice").click()
    page.button("Close the settings").click()
    page.ask_and_wait("again")
    assert set(server.requests[-1]) == {"messages", "model", "seed", "stream"} and server.requests[-1]["seed"] != 5


def test_a_number_out_of_bounds_is_told_and_not_used(page: Page, server: Scripted) -> None:
    page.button("Settings").click()
    field = page.at.get_by_label("Temperature")
    for text in ("3", "-1"):
        field.fill(text)
        field.press("Tab")
        assert page.at.get_by_text("Temperature is a number from 0 to 2.").is_visible()
        assert field.get_attribute("aria-invalid") == "true"
    page.at.keyboard.press("Escape")
    page.ask_and_wait("one")
    assert "temperature" not in server.requests[-1]


def test_what_the_server_does_not_tell_of_is_not_offered(browser: Any) -> None:
    with scripted_server() as server:
        known = ("max_temperature", "max_top_k", "max_tokens")
        server.limits = {name: value for name, value in server.limits.items() if name in known}
        page = Page(browser, server.url)
        page.button("Settings").click()
        fields = page.at.locator(".field label").all()
        assert [field.inner_text() for field in fields if field.is_visible()] == [
            "Temperature",
            "Top-k",
            "Longest answer",
            "Seed",
        ]
        assert page.at.locator("#show-tokens").is_hidden() and page.at.locator("#model").is_hidden()
        page.context.close()


def test_a_system_prompt_belongs_to_its_conversation(page: Page, server: Scripted) -> None:
    page.at.evaluate("() => document.getElementById('settings').showModal()")
    page.at.get_by_label("System prompt").fill("Speak like a pirate.")
    page.at.keyboard.press("Escape")
    page.ask_and_wait("Ahoy")
    page.button("New chat").click()
    page.button("Settings").click()
    page.at.get_by_label("System prompt").fill("")
    page.at.keyboard.press("Escape")
    page.ask_and_wait("Hello")
    assert [role for role, _ in messages_of(server.requests[-1])] == ["user"]
    page.at.locator("#conversations .open").nth(1).click()
    page.ask_and_wait("And now?")
    assert messages_of(server.requests[-1])[0] == ("system", "Speak like a pirate.")


def test_a_theme_is_the_systems_until_one_is_chosen(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page.at.emulate_media(color_scheme="light")
    light = page.at.evaluate(background)
    page.at.emulate_media(color_scheme="dark")
    dark = page.at.evaluate(background)
    assert light != dark
    page.button("Settings").click()
    page.at.get_by_label("Light").check()
    assert page.at.evaluate(background) == light
    page.at.reload()
    assert page.at.evaluate(background) == light
    page.button("Settings").click()
    page.at.get_by_label("System", exact=True).check()
    assert page.at.evaluate(background) == dark


def test_slash_commands_are_answered_by_the_page_and_never_sent(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one")
    remarks = page.at.locator(".remark")
    for text, told in (
        ("/temperature 0.5", "Temperature: 0.5."),
        ("/temperature", "Temperature: 0.5."),
        ("/temperature 7", "Temperature is a number from 0 to 2."),
        ("/temperature hot", "Temperature is a number from 0 to 2."),
        ("/topk 0", "Top-k: 0."),
        ("/topk default", "Top-k: 50."),
        ("/help", "/temperature NUMBER"),
        ("/tempreature 1", "/tempreature is no command."),
    ):
        page.ask(text)
        assert told in remarks.last.inner_text() and page.box.input_value() == ""
    assert len(server.requests) == 1
    page.button("Answer again").click()
    page.wait_until_done()
    assert server.requests[-1]["temperature"] == 0.5, "remarks do not disturb what is asked again"
    page.ask_and_wait(" /help me", "/etc/passwd is what?")
    assert [messages_of(asked)[-1][1] for asked in server.requests[-2:]] == [" /help me", "/etc/passwd is what?"]
    page.ask("/clear")
    assert page.answers.count() == 0 and remarks.count() == 0
    assert page.at.locator("#conversations li").count() == 1, "the old one stays in the list"


# What is shown ----------------------------------------------------------------------------------------------------


def test_a_tool_call_and_its_result_are_one_box(page: Page) -> None:
    page.ask_and_wait("What is 37*24?")
    assert page.at.locator(".tool").count() == 1
    assert page.at.locator(".tool .name").all_text_contents() == ["tool call", "result"]
    assert page.at.locator(".tool code").all_text_contents() == ["37*24", "888"]


def test_speed_context_and_a_cut_answer_are_told(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one")
    assert page.at.locator(".facts").inner_text().startswith("42 tokens/s")
    assert page.at.locator("#meter").inner_text() == "small · 123 of 2,048 tokens of context"
    server.finish, server.context_used = "length", 2048
    page.ask_and_wait("two")
    assert "longest allowed answer" in page.at.locator(".note").last.inner_text()
    assert page.at.locator("#meter").inner_text().endswith("the oldest turns are forgotten")
    page.ask_and_wait("Say nothing")
    assert page.at.locator(".note").last.inner_text() == "The model had nothing to say." or server.finish == "length"


def test_what_the_server_would_refuse_as_too_long_is_not_sent(page: Page, server: Scripted) -> None:
    server.limits["max_total_chars"] = 50
    page.at.reload(wait_until="networkidle")
    page.ask_and_wait("first question", "second question")
    assert len(server.requests[-1]["messages"]) == 1
    assert page.at.locator("#meter").inner_text().endswith("the oldest turns are forgotten")


def test_texts_are_copied_as_they_were_written(browser: Any, server: Scripted) -> None:
    page = Page(browser, server.url, permissions=["clipboard-read", "clipboard-write"])
    page.ask_and_wait("Count words")
    clipboard = "navigator.clipboard.readText()"
    page.button("Copy the answer").click()
    assert page.at.evaluate(clipboard) == MARKDOWN
    page.at.locator(".question").hover()
    page.button("Copy the question").click()
    assert page.at.evaluate(clipboard) == "Count words"
    page.button("Copy the code").click()
    assert page.at.evaluate(clipboard) == MARKDOWN.split("```python\n")[1].split("\n```")[0]
    page.context.close()


def test_code_gets_its_colours_from_the_server(page: Page) -> None:
    page.ask_and_wait("Count words")
    page.at.locator("pre .is-keyword").first.wait_for()
    assert page.at.locator("pre .is-keyword").all_text_contents()[:2] == ["from", "import"]
    assert page.at.locator("pre code").text_content() == MARKDOWN.split("```python\n")[1].split("\n```")[0]


def test_tokens_are_shown_with_what_could_have_stood_there(page: Page, server: Scripted) -> None:
    page.button("Settings").click()
    page.at.get_by_label("Show tokens").check()
    page.at.keyboard.press("Escape")
    page.ask_and_wait("hello", "What is 37*24?")
    assert server.requests[-1]["logprobs"] is True and server.requests[-1]["top_logprobs"] == 5
    tokens, card = page.at.locator(".answer").first.locator(".token"), page.at.locator("#token-card")
    assert "".join(tokens.all_text_contents()) == "You said: hello"
    tokens.nth(1).hover()
    assert "50 %" in card.inner_text() and "other" in card.inner_text()
    page.at.mouse.move(0, 0)
    page.at.locator(".tokens").first.focus()
    for expected in ("You", "␣sa"):
        page.at.keyboard.press("ArrowRight")
        assert card.locator("p").inner_text().startswith(expected)
        assert expected in page.at.locator("#status").inner_text()
    page.at.keyboard.press("Escape")
    assert card.is_hidden()
    page.at.reload(wait_until="networkidle")
    assert "".join(tokens.all_text_contents()) == "You said: hello"
    page.button("Settings").click()
    page.at.get_by_label("Show tokens").uncheck()
    page.at.keyboard.press("Escape")
    assert tokens.count() == 0 and page.answers.first.inner_text() == "You said: hello"


def test_two_models_answer_side_by_side_with_one_seed_and_go_on_each_with_its_own(browser: Any) -> None:
    with scripted_server("small", "large") as server:
        page = Page(browser, server.url)
        page.button("Settings").click()
        page.at.get_by_label("Side by side with").select_option("large")
        page.at.keyboard.press("Escape")
        page.ask_and_wait("one", "two")
        first, second = sorted(server.requests[-2:], key=lambda asked: asked["model"], reverse=True)
        assert (first["model"], second["model"]) == ("small", "large") and first["seed"] == second["seed"]
        assert "to small" in first["messages"][1]["content"][0]["text"]
        assert "to large" in second["messages"][1]["content"][0]["text"]
        assert page.at.locator(".answer .model").all_text_contents() == ["small", "large"] * 2
        left, right = (page.answers.nth(i).bounding_box() for i in (0, 1))
        assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]
        shown = page.at.locator("#log").inner_text()
        page.at.reload(wait_until="networkidle")
        assert page.at.locator("#log").inner_text() == shown
        page.at.set_viewport_size({"width": 390, "height": 844})
        left, right = (page.answers.nth(i).bounding_box() for i in (0, 1))
        assert left["y"] + left["height"] <= right["y"]
        page.at.set_viewport_size({"width": 1280, "height": 800})
        page.button("Settings").click()
        page.at.get_by_label("Answers", exact=True).select_option("large")
        assert page.at.get_by_label("Side by side with").input_value() == "", "no model is compared with itself"
        page.at.keyboard.press("Escape")
        page.ask_and_wait("three")
        assert server.requests[-1]["model"] == "large" and page.answers.count() == 5
        assert page.complaints == []
        page.context.close()


# When something is wrong --------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_with_a_click(page: Page, server: Scripted) -> None:
    server.refuse(429, "busy", **{"Retry-After": "7"})
    page.ask("one")
    page.error.get_by_text("The model is busy with other conversations. Try again in 7 seconds.").wait_for()
    assert page.box.input_value() == "one" and page.at.locator(".exchange").count() == 0
    page.button("Try again").click()
    page.wait_until_done()
    assert page.answers.all_inner_texts() == ["You said: one"] and page.error.is_hidden()
    page.complaints.clear()


def test_a_full_context_is_said_and_a_new_chat_is_offered(page: Page, server: Scripted) -> None:
    page.ask_and_wait("one")
    server.refuse(400, "the conversation has 3,000 tokens; at most 2,048 fit", code="context_length_exceeded")
    page.ask("two")
    page.error.get_by_text("The conversation has 3,000 tokens; at most 2,048 fit.").wait_for()
    page.error.get_by_role("button", name="New chat").click()
    assert page.answers.count() == 0 and page.error.is_hidden() and page.box.input_value() == "two"
    page.complaints.clear()


def test_a_server_that_comes_back_is_noticed(browser: Any) -> None:
    with scripted_server() as server:
        page = Page(browser, server.url)
    page.ask("Anyone there?")
    page.error.get_by_text("The server cannot be reached.").wait_for()
    assert page.box.input_value() == "Anyone there?"
    with scripted_server(port=int(server.url.rsplit(":", 1)[1])):
        page.error.wait_for(state="hidden")
        page.box.press("Enter")
        page.answers.get_by_text("You said: Anyone there?").wait_for()
    page.context.close()


def test_a_connection_that_breaks_leaves_what_was_shown(browser: Any) -> None:
    with scripted_server() as server:
        page = Page(browser, server.url)
        server.script["Break"] = [{"type": "text", "text": "So far "}, WAIT, BREAK]
        page.ask("Break")
        page.wait_until_writing(6)
        server.go_on.set()
        page.error.get_by_text("Is the server running?").wait_for()
        assert page.answers.inner_text().strip() == "So far"
        assert page.at.locator(".note").inner_text() == "The answer broke off here."
        page.context.close()


def test_a_key_is_asked_for_where_the_server_wants_one(page: Page, server: Scripted) -> None:
    asked: list[str | None] = []
    page.at.on("request", lambda request: asked.append(request.headers.get("authorization")))
    page.button("Settings").click()
    assert page.at.locator("#key").is_hidden()
    page.at.keyboard.press("Escape")
    server.refuse(401, "this server asks for a key")
    page.ask("one")
    page.button("Enter the key").click()
    assert page.at.evaluate("document.activeElement.id") == "key"
    page.at.keyboard.type("secret-of-sixteen")
    page.at.keyboard.press("Enter")
    page.error.wait_for(state="hidden")
    page.box.press("Enter")
    page.answers.get_by_text("You said: one").wait_for()
    assert asked[-1] == "Bearer secret-of-sixteen"
    assert "secret" not in page.at.evaluate("JSON.stringify(localStorage)")
    page.complaints.clear()


# Hostile text ------------------------------------------------------------------------------------------------------


def test_hostile_answers_and_questions_stay_text_while_they_stream(page: Page, server: Scripted) -> None:
    assert len(PAYLOADS) >= 40
    for i, text in enumerate(PAYLOADS):
        server.script[f"Payload {i}"] = [{"type": kind, "text": text} for kind in ("text", "python", "python_output")]
        page.ask_and_wait(f"Payload {i}")
        page.ask_and_wait(text if not text.startswith("/") else f" {text}")
        assert page.at.evaluate(ACTIVE) == [], text
        page.button("New chat").click()
    page.at.wait_for_timeout(300)
    assert page.at.evaluate(ACTIVE) == [] and page.at.title() == "nanochat"


def test_hostile_titles_stay_text(page: Page) -> None:
    page.ask_and_wait("one")
    for text in PAYLOADS:
        row = page.at.locator("#conversations li").first
        row.hover()
        row.get_by_role("button", name="Rename").click()
        page.at.get_by_label("New title").fill(text)
        page.at.get_by_label("New title").press("Enter")
        assert page.at.evaluate(ACTIVE) == [], text
        shown = page.at.locator("h1").text_content()
        assert "".join(shown.split()) == "".join(text.split())[:200], "a field of one line has no line breaks"


def answering(reply: str) -> Callable[[Any], None]:
    """A route that gives this reply."""
    return lambda route: route.fulfill(body=reply, content_type="application/json")


def test_hostile_colours_stay_text(page: Page, server: Scripted) -> None:
    for i, text in enumerate(PAYLOADS):
        code = text.replace("```", "'''").replace("\r", "")
        kinds = [["keyword", code[:5]], [f'x" onclick="{code}', code[5:9]], [code, code[9:]]]
        reply = json.dumps({"tokens": kinds})
        page.at.route("**/highlight", answering(reply))
        server.script[f"Code {i}"] = [{"type": "text", "text": f"```python\n{code}\n```"}]
        page.ask_and_wait(f"Code {i}")
        page.at.locator("pre .is-keyword").last.wait_for()
        assert page.at.evaluate(ACTIVE) == [], text
        assert page.at.locator("pre code").last.text_content() == code
        page.at.unroute_all()
        page.button("New chat").click()


def test_colours_that_are_not_the_code_are_not_shown(page: Page, server: Scripted) -> None:
    for tokens in ([["keyword", "other code"]], [["keyword"]], "code", None, [[1, 2]], {"length": 1}):
        reply = json.dumps({"tokens": tokens})
        page.at.route("**/highlight", answering(reply))
        server.script["Code"] = [{"type": "text", "text": "```python\nthe code\n```"}]
        page.ask_and_wait("Code")
        page.at.wait_for_timeout(100)
        assert page.at.locator("pre code").last.inner_html() == "the code"
        page.at.unroute_all()
        page.button("New chat").click()
        page.at.reload(wait_until="networkidle")


# For everybody -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_nothing_serious(browser: Any, theme: str, size: str) -> None:
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    with scripted_server("small", "large") as server:
        page = Page(browser, server.url, color_scheme=theme, **(PHONE if size == "phone" else DESKTOP))
        page.at.evaluate(axe)

        def check(state: str) -> None:
            page.at.wait_for_timeout(200)  # transitions
            found = page.at.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
            bad = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found if is_bad(one)]
            assert bad == [], state
            page.shoot(f"{state}-{theme}-{size}")

        check("empty")
        page.ask_and_wait("Count words", "What is 37*24?")
        page.at.locator("pre .is-keyword").first.wait_for()
        check("conversation")
        page.at.locator("#settings-button").click()
        page.at.get_by_label("Side by side with").select_option("large")
        page.at.get_by_label("Show tokens").check()
        page.at.get_by_label("Temperature").fill("9")
        page.at.get_by_label("Temperature").press("Tab")
        check("settings")
        page.at.keyboard.press("Escape")
        page.ask_and_wait("Who are you?")
        page.at.locator(".token").nth(1).click()
        check("compared")
        page.ask("/help")
        server.refuse(429, "busy")
        server.refuse(429, "busy")
        page.ask("Now?")
        page.error.get_by_text("busy").wait_for()
        check("refused")
        page.at.locator(".question").last.hover()
        page.button("Edit the question").last.click()
        check("edit")
        if size == "phone":
            page.at.locator("#toggle").click()
        page.at.get_by_label("Search conversations").fill("words")
        check("list")
        page.button("Rename Count words").click()
        check("rename")
        page.context.close()


def is_bad(violation: dict[str, Any]) -> bool:
    return violation["impact"] in ("serious", "critical")


@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_on_a_phone_the_list_lies_over_the_page_and_goes_when_it_is_done(page: Page) -> None:
    sidebar = page.at.locator("#sidebar")
    assert sidebar.is_hidden()
    page.ask_and_wait("one")
    page.button("Conversations").tap()
    assert sidebar.is_visible() and page.at.locator("#stage[inert]").count() == 1
    page.at.keyboard.press("Escape")
    assert sidebar.is_hidden()
    page.button("Conversations").tap()
    page.button("New chat").tap()
    assert sidebar.is_hidden() and page.answers.count() == 0
    page.button("Conversations").tap()
    page.at.locator("#conversations .open").first.tap()
    assert sidebar.is_hidden() and page.answers.all_inner_texts() == ["You said: one"]
    page.button("Conversations").tap()
    page.at.touchscreen.tap(380, 400)
    assert sidebar.is_hidden()


def test_who_reads_above_is_not_pulled_to_the_end(page: Page, server: Scripted) -> None:
    long = "\n\n".join(f"Line {i}" for i in range(60))
    server.script["Long"] = [{"type": "text", "text": long}, WAIT, {"type": "text", "text": long}]
    page.ask("Long")
    page.wait_until_writing(400)
    at_end = "scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
    page.wait_until(f"document.querySelector('.text')?.lastChild.textContent === 'Line 59' && {at_end} < 48")
    page.at.evaluate("scroller.scrollTop = 100")
    server.go_on.set()
    page.wait_until_done()
    assert page.at.evaluate("scroller.scrollTop") == 100
