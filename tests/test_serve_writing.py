"""From tokens to what a client sees: stop strings, and which tokens come with which text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import trained

from nanochat.chat import ReplyReader, StopStrings
from nanochat.engine import Token
from nanochat.serve.writing import Delta, PlainReader, Writer

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def cut(stops: list[str], *pieces: str) -> tuple[str, bool]:
    """What comes out of pieces of text, and whether a stop string ended it."""
    stop = StopStrings(stops)
    out = "".join(stop.push(piece) for piece in pieces)
    is_found = stop.is_found
    return out + ("" if is_found else stop.flush()), is_found


@given(st.lists(LETTERS, max_size=6), STOPS)
def test_a_text_ends_at_its_stop_string_however_it_was_cut_into_pieces(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert cut(stops, *pieces) == cut(stops, *text) == (expected, bool(ends))


@given(st.lists(LETTERS, max_size=6), STOPS)
def test_nothing_that_may_be_the_beginning_of_a_stop_string_is_let_out(pieces: list[str], stops: list[str]) -> None:
    stop, out, text = StopStrings(stops), "", ""
    for piece in pieces:
        out, text = out + stop.push(piece), text + piece
        held = text[len(out) :]
        assert text.startswith(out)
        if not stop.is_found:
            longest = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
            assert len(held) == longest, "no more than that is held back"


def test_a_text_without_stop_strings_passes_as_it_comes() -> None:
    stop = StopStrings([])
    assert [stop.push(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"] and stop.flush() == ""


# Tokens and parts ---------------------------------------------------------------------------------------------------


def written(ids: list[int], reader: Any, **settings: Any) -> tuple[list[Delta], Writer]:
    writer = Writer(0, reader, keeps_tokens=True, **settings)
    deltas = [delta for token_id in ids for delta in writer.push(Token(0, token_id, False, -0.5))]
    return deltas + writer.flush(), writer


def test_every_token_comes_once_in_order_with_the_text_it_begins() -> None:
    _, tokenizer = trained(together=False)
    ids = tokenizer.encode("Grüße, 你好, привет und 🙂! I am a tiny model")
    deltas, _ = written(ids, PlainReader(tokenizer), stop=["never there"])
    assert [token.token_id for delta in deltas for token in delta.tokens] == ids
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
    assert not any("\ufffd" in delta.text for delta in deltas)


def test_tokens_of_a_stop_string_are_not_shown() -> None:
    _, tokenizer = trained(together=False)
    ids = tokenizer.encode("I am a tiny model that was trained")
    deltas, writer = written(ids, PlainReader(tokenizer), stop=["tiny"])
    text = "".join(delta.text for delta in deltas)
    assert text == "I am a " and writer.is_stopped
    shown = [token.token_id for delta in deltas for token in delta.tokens]
    assert shown == ids[: len(shown)] and tokenizer.decode(shown).startswith(text)
    assert not tokenizer.decode(shown).startswith("I am a tiny")


def test_a_stop_string_does_not_reach_across_a_tool_call_and_holds_back_no_part() -> None:
    _, tokenizer = trained(together=False)
    call = [tokenizer.special("<|python_start|>"), *tokenizer.encode("6*7"), tokenizer.special("<|python_end|>")]
    output = [tokenizer.special("<|output_start|>"), *tokenizer.encode("42"), tokenizer.special("<|output_end|>")]
    ids = [*tokenizer.encode("see: a"), *call, *output, *tokenizer.encode("bc 6*7")]
    reader = ReplyReader(tokenizer)
    deltas, writer = written(ids, reader, stop=["ab", "42", "6*7"])
    parts: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.index == len(parts):
            parts.append((delta.type, ""))
        parts[delta.index] = (delta.type, parts[delta.index][1] + delta.text)
    assert parts == [("text", "see: a"), ("python", "6*7"), ("python_output", "42"), ("text", "bc ")]
    assert writer.is_stopped and [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)


@pytest.mark.parametrize("name", ["<|python_start|>", "<|output_end|>"])
def test_a_lone_special_token_still_has_its_log_probability(name: str) -> None:
    _, tokenizer = trained(together=False)
    deltas, _ = written([tokenizer.special(name)], ReplyReader(tokenizer))
    assert [token.token_id for delta in deltas for token in delta.tokens] == [tokenizer.special(name)]
