"""Conversations on the terminal: what is said, which answers are drawn, what Ctrl-C and a full context do."""

import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talking import DEFAULTS, INTERRUPT, TOKENIZER, Recorder, answers, converse, new_session, reader, said

from nanochat.chat import check_conversation, render_conversation
from nanochat.common import UserError
from nanochat.terminal.commands import COMMANDS
from nanochat.terminal.keyboard import read_message
from nanochat.terminal.session import Session
from nanochat.terminal.settings import SETTINGS
from scripts import chat_cli

# Lines and messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one line", "next"], "one line"),
        (["first\\", "second\\", "third", "next"], "first\nsecond\nthird"),
        (["first\\"], "first\n"),
        (['"""', "a", "", '  b "quoted" \\', ' """ ', "next"], 'a\n\n  b "quoted" \\'),
        (['"""', "a"], "a"),
        (['"""'], ""),
        (['"""docstring""" is what?', "next"], '"""docstring""" is what?'),
        (["pasted\n\n  lines", "next"], "pasted\n\n  lines"),
        (["first\\", INTERRUPT, "next"], ""),
        (['"""', "a", INTERRUPT, "next"], ""),
    ],
)
def test_a_message_is_a_line_or_lines_that_belong_together(lines: list[object], message: str) -> None:
    assert read_message(reader(lines)) == message


@pytest.mark.parametrize("end", [EOFError(), INTERRUPT])
def test_the_end_and_an_interrupt_before_a_message_are_the_callers(end: BaseException) -> None:
    with pytest.raises(type(end)):
        read_message(reader([end]))


def test_blanks_around_a_line_go_and_those_inside_a_text_stay() -> None:
    session = new_session()
    converse(session, "  Who are you? ", '"""', "", "    indented", "code  ", "", '"""', "   ", "")
    assert said(session) == ["Who are you?", "    indented\ncode"]


# What was said ----------------------------------------------------------------------------------------------------


def test_the_model_sees_all_that_was_said_and_after_clear_nothing() -> None:
    session = new_session()
    converse(session, "Who are you?", "I am a test.", "clear", "again", "/clear", "once more", "quit", "never")
    prompts = session.engine.prompts
    answer = "<|assistant_start|>"
    assert prompts[0] == f"<|bos|><|user_start|>Who are you?<|user_end|>{answer}"
    assert prompts[1].startswith(prompts[0]) and prompts[1].endswith(f"<|user_start|>I am a test.<|user_end|>{answer}")
    assert prompts[2] == f"<|bos|><|user_start|>again<|user_end|>{answer}"
    assert prompts[3] == f"<|bos|><|user_start|>once more<|user_end|>{answer}"


@pytest.mark.parametrize("word", ["quit", "exit", "/quit", "/exit", " quit "])
def test_words_that_leave(word: str) -> None:
    assert converse(new_session(), word, "never read") == ["never read"]


def test_the_system_text_comes_first_from_the_next_message_on() -> None:
    session = new_session()
    converse(session, "Who?", "/system Be\n brief.", "And?", "/system", "clear", "Then?", "/system off", "Last?")
    starts = [prompt.removeprefix("<|bos|><|user_start|>").split("<|")[0] for prompt in session.engine.prompts]
    assert starts == ["Who?", "Be\n brief.\n\nWho?", "Be\n brief.\n\nThen?", "Then?"]


def test_retry_draws_another_answer_and_undo_takes_an_exchange_back(capsys: pytest.CaptureFixture[str]) -> None:
    session = new_session(temperature=2.0, top_k=0)
    converse(session, "Who are you?")
    first = answers(session)
    converse(session, "/retry")
    assert said(session) == ["Who are you?"] and answers(session) != first
    assert session.engine.prompts[0] == session.engine.prompts[1]
    converse(session, "More?", "/undo")
    assert said(session) == ["Who are you?"] and len(answers(session)) == 1
    converse(session, "/undo")
    capsys.readouterr()
    converse(session, "/undo", "/retry", "/save x.jsonl")
    assert capsys.readouterr().err.splitlines() == [
        "error: /undo: nothing was said yet",
        "error: /retry: there is no message to answer yet",
        "error: /save: nothing was said yet",
    ]


# Seeds and settings -----------------------------------------------------------------------------------------------


def drawn(*typed: object, **settings: Any) -> list[str]:
    session = new_session(temperature=2.0, top_k=0, **settings)
    converse(session, *typed)
    return answers(session)


def test_the_same_seed_and_words_give_the_same_answers_and_another_seed_gives_others() -> None:
    words = ["Who are you?", "And?", "More!"]
    first = drawn(*words)
    assert len(set(first)) == 3
    assert drawn(*words) == first
    assert (
        drawn("/seed 2", *words)
        == drawn("junk", "clear", *words)
        == drawn("junk", "/clear", "/seed 2", *words)
        == first
    )
    assert drawn("/seed 3", *words) == drawn(*words, seed=3)
    assert drawn(*words, seed=3)[0] != first[0]


def test_the_seed_is_said_at_the_start_and_with_every_answer(capsys: pytest.CaptureFixture[str]) -> None:
    converse(new_session(seed=7), "Who?", "Who?", "/tokens", "/seed", "/seed 40", "And?", "/tokens")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("seed 7")
    told = [line for line in lines if line.startswith(("last answer: ", "seed: "))]
    assert [line.split()[-1] for line in told] == ["8", "7", "40", "40"]


VALUES = {"temperature": "0.25", "topk": "3", "topp": "0.5", "minp": "0.1", "repeat": "1.5", "max": "5", "seed": "9"}


def test_every_setting_is_a_command_and_a_flag_and_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(VALUES) == sorted(setting.word for setting in SETTINGS)
    session = new_session(temperature=1.0)
    asked: list[tuple[int, Any]] = []
    generate = session.engine.generate
    monkeypatch.setattr(
        session.engine,
        "generate",
        lambda p, n, sampling, **o: asked.append((n, sampling)) or generate(p, n, sampling, **o),
    )
    converse(session, *(f"/{word} {value}" for word, value in VALUES.items()), "Who are you?")
    ((max_tokens, sampling),) = asked
    flags = [f"{setting.flag}={VALUES[setting.word]}" for setting in SETTINGS]
    args = vars(chat_cli.parse_args(flags))
    for setting in SETTINGS:
        value = max_tokens if setting.word == "max" else getattr(sampling, setting.name)
        assert value == args[setting.name] == float(VALUES[setting.word])
    assert all(vars(chat_cli.parse_args([]))[name] == value for name, value in DEFAULTS.items())


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/temperature 3", "/temperature 3: must be a number of at least 0 and at most 2"),
        ("/topp 0", "/topp 0: must be a number of at least 0.001 and at most 1"),
        ("/topk -1", "/topk -1: must be a whole number of at least 0 and at most 1000000000000"),
        ("/max nan", "/max nan: must be a whole number of at least 1 and at most 1000000000000"),
        ("/seed \x1b[2J", "/seed \\x1b[2J: must be a whole number"),
        ("/foo", "/foo: unknown; /help lists what there is"),
        ("/undo it", "/undo: takes nothing behind it"),
        ("/save", "/save: name a file"),
        ("/load", "/load: name a file"),
        ("/load a\0b", "/load: name a file"),
        ("/load nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("/load " + "x" * 5000, "cannot be read (File name too long)"),
        ("/load ~nobody-of-that-name/x", "cannot be read"),
        ("/load /dev", "/dev: must be a file"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_and_changes_nothing(
    command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session = new_session()
    before = dict(session.settings)
    converse(session, command)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and len(error.splitlines()) == 1
    assert session.settings == before and not session.engine.prompts


def test_commands_are_known_in_any_case_and_with_dashes() -> None:
    session = new_session()
    converse(session, "/Top-K 7", "/TOP_P 0.5")
    assert (session.settings["top_k"], session.settings["top_p"]) == (7, 0.5)


@pytest.mark.parametrize("text", ["/etc/hosts is what?", "// a comment", "/* another */", "/2", " /clear", "/"])
def test_what_only_looks_like_a_command_is_said(text: str) -> None:
    session = new_session()
    converse(session, "before", text)
    assert said(session) == ["before", text.strip()]


def test_help_lists_every_command_with_its_value_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    converse(new_session(top_k=17), "/help")
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines if line.startswith("  /")] == [f"/{name}" for name in COMMANDS]
    assert any("/topk" in line and "(now 17)" in line for line in lines)
    assert max(map(len, lines)) <= 90


def test_tokens_tells_how_full_the_context_is(capsys: pytest.CaptureFixture[str]) -> None:
    session = new_session(context=64)
    converse(session, "/tokens", "a", "/tokens")
    length = len(render_conversation(TOKENIZER, session.conversation)[0])
    converse(session, "/undo", "/tokens")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("context: ")]
    assert told == [f"context: {n} of 64 tokens" for n in (0, length, 0)]


# A full context ---------------------------------------------------------------------------------------------------


def test_forgotten_turns_are_told_each_time_that_there_are_more(capsys: pytest.CaptureFixture[str]) -> None:
    session = new_session(context=64)
    converse(session, *["Who are you?"] * 6)
    notes = capsys.readouterr().err.splitlines()
    assert notes and all(note.startswith("note: the context of 64 tokens has no room for the oldest") for note in notes)
    counts = [int(note.split("oldest ")[1].split()[0]) for note in notes]
    assert counts == sorted(set(counts))
    kept = session.engine.prompts[-1].count("<|user_start|>")
    assert counts[-1] == 6 - kept and len(said(session)) == 6
    converse(session, "/retry")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("context", [5, 6, 16, 64])
def test_a_message_that_had_to_be_shortened_is_answered_with_one_note(
    context: int, capsys: pytest.CaptureFixture[str]
) -> None:
    session = new_session(context)
    converse(session, "far too long " * 50)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and "the beginning of what you said" in note
    assert session.engine.prompts[0].endswith("<|user_end|><|assistant_start|>") and len(answers(session)) == 1


@pytest.mark.parametrize("context", [2, 3, 4])
def test_a_context_too_short_to_chat_is_told_and_a_text_is_continued_in_it(
    context: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"context of {context} tokens is too short to chat"):
        new_session(context)
    engine = Recorder(context)
    for prompt, notes in (("Who are you? " * 9, 1), ("", 0)):
        chat_cli.continue_text(engine, TOKENIZER, prompt, {**DEFAULTS, "max_tokens": 8})
        told = capsys.readouterr()
        assert len(told.err.splitlines()) == notes and told.out.startswith(prompt)
        assert engine.prompts[-1].startswith("<|bos|>")


# Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_an_answer_keeps_what_was_said_and_prompts_again(capsys: pytest.CaptureFixture[str]) -> None:
    session = new_session(context=128, stops_after=3)
    assert converse(session, "Who are you?", "I am a test.", "quit", "never read") == ["never read"]
    first, second = capsys.readouterr().out.split("assistant: ")[1:]
    shown = first.split("\n(stopped)\n")[0]
    assert "(stopped)" not in second
    assert session.engine.prompts[1] == (
        f"<|bos|><|user_start|>Who are you?<|user_end|><|assistant_start|>{shown}<|assistant_end|>"
        "<|user_start|>I am a test.<|user_end|><|assistant_start|>"
    )
    assert shown and not session.engine.has_work


def test_an_answer_that_is_stopped_before_a_word_was_never_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    session = new_session(stops_after=0)
    converse(session, "Who are you?")
    assert session.turns == [] and "(stopped before a word came" in capsys.readouterr().out
    converse(session, "And you?")
    assert len(session.turns) == 2
    before = list(session.turns)
    session.engine.prompts.clear()
    converse(session, "/retry")
    assert session.turns == before


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_in_a_row_leaves() -> None:
    session = new_session()
    typed = [INTERRUPT, "Who are you?", INTERRUPT, "", INTERRUPT, "a\\", INTERRUPT, INTERRUPT, INTERRUPT, "never read"]
    assert converse(session, *typed) == ["never read"]
    assert said(session) == ["Who are you?"]


def test_ctrl_c_that_comes_too_late_for_an_answer_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session()
    monkeypatch.setattr(session, "_remember", lambda *a: (signal.raise_signal(2), Session._remember(session, *a)))
    converse(session, "Who are you?", "And?")
    assert len(session.turns) == 4


def test_ctrl_c_pressed_again_and_again_loses_what_was_asked_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session()
    converse(session, "Who are you?")
    with monkeypatch.context() as patch:
        patch.setattr(session, "_prompt", lambda: [signal.raise_signal(2) for _ in range(2)])
        converse(session, "lost", "quit")
    converse(session, "And you?")
    assert said(session) == ["Who are you?", "And you?"] and len(session.turns) == 4


# Anything at all --------------------------------------------------------------------------------------------------

WORDS = [
    *(f"/{name}" for name in COMMANDS if name not in ("save", "load")),
    "clear",
    '"""',
    "\\",
    "Who are you?",
    "0",
    "-1",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=9), max_size=3).map(" ".join), max_size=6))
def test_whatever_is_typed_the_conversation_stays_one(capsys: pytest.CaptureFixture[str], typed: list[str]) -> None:
    session = new_session(context=96)
    converse(session, *(line for line in typed if "/max" not in line))
    if session.turns:
        check_conversation(session.conversation)
    assert "Traceback" not in capsys.readouterr().err
