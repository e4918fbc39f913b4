"""Colours for code: the right kinds, never another text, and never more time or text than allowed."""

import asyncio
import time

import pytest

pytest.importorskip("pygments", reason="the server's extra is missing: bash runs/setup.sh dev")

from nanochat.serve import highlight as module
from nanochat.serve.highlight import LANGUAGES, MAX_CODE_CHARS, Highlighter, highlight, parse_highlight_request
from nanochat.serve.lexing import colour
from nanochat.serve.requests import RequestError

PYTHON = 'def f(x: int) -> str:  # why\n\treturn f"{x}" + str(3.5)\n'


def test_code_comes_back_in_pieces_with_their_kinds() -> None:
    pieces = highlight("Python", PYTHON)
    assert "".join(text for _, text in pieces) == PYTHON
    kinds = {text: kind for kind, text in pieces}
    expected = {"def": "keyword", "f": "function", "int": "type", "# why": "comment", "3.5": "number"}
    assert {text: kinds[text] for text in expected} == expected


@pytest.mark.parametrize("language", sorted(set(LANGUAGES.values())))
def test_every_language_is_known_and_keeps_every_character(language: str) -> None:
    code = "\n\n  \t<b>&amp;</b> \u202e ü🙂 'unclosed \"quotes /* \x00 \x7f\n\r\n +a\n-b\n\n"
    assert "".join(text for _, text in colour(language, code.replace("\r", ""))) == code.replace("\r", "")


@pytest.mark.parametrize(("language", "code"), [("klingon", "x"), ("", "x"), ("python", ""), ("../../etc", "x")])
def test_what_has_no_colours_is_one_piece(language: str, code: str) -> None:
    assert highlight(language, code) == [("text", code)]


def test_a_text_that_comes_back_changed_is_shown_without_colours() -> None:
    assert highlight("python", "a\r\nb") == [("text", "a\r\nb")]


def test_code_that_takes_too_long_is_left_without_colours_in_time() -> None:
    started = time.monotonic()
    assert highlight("python", PYTHON, max_seconds=0.0001) == [("text", PYTHON)]
    assert time.monotonic() - started < 5, "the process was not ended"


def test_a_missing_or_broken_helper_leaves_code_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", "/nonexistent/python")
    assert highlight("python", PYTHON) == [("text", PYTHON)]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must be"),
        (b'{"code": "x"}', "language: must be a string"),
        (b'{"language": "python", "code": ["x"]}', "code: must be a string"),
        (b'{"language": "python", "code": "\\ud800"}', "half of a character"),
        (b'{"language": "python", "code": "' + b"x" * (MAX_CODE_CHARS + 1) + b'"}', "at most 20,000"),
    ],
)
def test_what_is_no_request_is_refused_in_words(body: bytes, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        parse_highlight_request(body)


def test_more_than_may_wait_are_answered_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    body = b'{"language": "python", "code": "def f(): pass"}'

    async def ask() -> list[bool]:
        highlighter = Highlighter()
        replies = await asyncio.gather(*(highlighter.answer(body) for _ in range(6)))
        replies.append(await highlighter.answer(body))  # everybody has gone: there is room again
        return [len(reply["tokens"]) > 1 for reply in replies]

    assert asyncio.run(ask()) == [True] * 3 + [False] * 3 + [True]
