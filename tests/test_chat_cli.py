"""The command line as its users have it: a process in a real terminal, or between pipes."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from talking import TOKENIZER, Caller, answers, converse
from terminals import BACKSPACE, CTRL_C, CTRL_D, ENTER, LEFT, TAB, UP, Terminal, pasted

from nanochat.common import UserError
from nanochat.engine import Engine, Token
from nanochat.terminal.commands import read_conversation
from nanochat.terminal.session import PartPrinter, Session
from scripts import base_train, chat_cli, chat_sft

REPO = Path(__file__).resolve().parents[1]
# As a process -----------------------------------------------------------------------------------------------------

TALKER = """
import sys
import torch
from nanochat.cli import run
from nanochat.config import ModelConfig
from nanochat.engine import Engine
from nanochat.model.gpt import build_model
from nanochat.terminal.session import Session
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_cli, chat_sft

def main():
    tokenizer = Tokenizer.train(["Who are you? I am a test."], 270)
    config = ModelConfig(16384, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    engine = Engine(build_model(config, torch.device("cpu"), torch.float32, seed=1), stop_ids=[])
    chat_cli.start_conversation(Session(engine, tokenizer, {"max_tokens": int(sys.argv[1])}))

run(main)
"""


@pytest.fixture
def talker(tmp_path: Path) -> list[str]:
    """The command line of a conversation with a model that knows nothing and never ends by itself."""
    path = tmp_path / "talker.py"
    path.write_text(TALKER, encoding="utf-8")
    program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-c", program, str(path)]


def messages_of(path: Path) -> list[Any]:
    return [message["content"] for message in read_conversation(path)["messages"]]


def test_lines_are_edited_pasted_texts_are_one_message_and_days_are_remembered(
    talker: list[str], base_dir: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    with Terminal([*talker, "2"], REPO, NANOCHAT_BASE_DIR=str(base_dir)) as terminal:
        terminal.see("seed 42")
        terminal.see("\x1b[?2004hyou: ")  # pasted text is to be marked
        terminal.type("helo", LEFT, "l", ENTER)
        terminal.see("assistant: ")
        terminal.see("(2 tokens")
        terminal.see("you: ")
        terminal.type("你好ü", BACKSPACE, BACKSPACE, "🙂", ENTER)
        terminal.see("(2 tokens")
        terminal.see("you: ")
        terminal.type(UP, UP, ENTER)
        terminal.see("(2 tokens")
        terminal.see("you: ")
        terminal.type(UP, ENTER)
        terminal.see("(2 tokens")
        terminal.see("you: ")
        terminal.type(pasted("def f():\n    return 1\n"))
        terminal.type("what?", ENTER)
        terminal.see("(2 tokens")
        terminal.see("you: ")
        terminal.type("first\\", ENTER)
        terminal.see("...: ")
        terminal.type("second", ENTER)
        terminal.see("(2 tokens")
        terminal.see("you: ")
        terminal.type("/sa", TAB, str(saved), ENTER)
        terminal.see("(saved: ")
        terminal.type("last words", ENTER)
        terminal.see("(2 tokens")
        terminal.process.kill()  # as when the window is closed; nothing is lost
    expected = ["hello", "你🙂", "hello", "hello", "def f():\n    return 1\nwhat?", "first\nsecond"]
    assert messages_of(saved)[::2] == expected
    history = base_dir / "chat_history.jsonl"
    del expected[3]  # two in a row are remembered once
    assert [json.loads(line) for line in history.read_text().splitlines()] == [
        *expected,
        f"/save {saved}",
        "last words",
    ]
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    with Terminal([*talker, "2"], REPO, NANOCHAT_BASE_DIR=str(base_dir)) as terminal:
        terminal.see("you: ")
        terminal.type(UP, UP, UP, UP, ENTER)
        terminal.see("(2 tokens")
        terminal.type(f"/save {tmp_path / 'again.jsonl'}", ENTER)
        terminal.see("(saved: ")
        terminal.see("you: ")
        terminal.type(CTRL_D)
        assert terminal.leave_code() == 0
    assert messages_of(tmp_path / "again.jsonl")[0] == "def f():\n    return 1\nwhat?"


def test_ctrl_c_in_a_terminal_stops_the_answer_and_keeps_the_conversation(
    talker: list[str], base_dir: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    with Terminal([*talker, "8000"], REPO, NANOCHAT_BASE_DIR=str(base_dir)) as terminal:
        terminal.see("you: ")
        terminal.type("Who are you?", ENTER)
        terminal.see("assistant: ")
        terminal.see("e")  # some word of the answer
        terminal.type(CTRL_C)
        terminal.see("(stopped)")
        terminal.see("you: ")
        terminal.type("/max 2", ENTER)
        terminal.see("max: 2")
        terminal.see("you: ")
        terminal.type("dropped")
        terminal.see("dropped")
        terminal.interrupt()
        terminal.see("you: ")
        terminal.type("And you?", ENTER)
        terminal.see("(2 tokens")
        terminal.type(f"/save {saved}", ENTER)
        terminal.see("(saved: ")
        terminal.see("you: ")
        terminal.interrupt()
        terminal.see("you: ")
        terminal.interrupt()
        assert terminal.leave_code() == 0
    assert "Traceback" not in terminal.shown.decode(errors="replace")
    question, answer, second, _ = messages_of(saved)
    assert (question, second) == ("Who are you?", "And you?") and answer


def test_broken_bytes_on_a_terminal_are_said_as_such(talker: list[str], base_dir: Path, tmp_path: Path) -> None:
    with Terminal([*talker, "2"], REPO, NANOCHAT_BASE_DIR=str(base_dir)) as terminal:
        terminal.see("you: ")
        terminal.type("a\udcff\udce4\udcbdb", ENTER)  # bytes FF, E4, BD
        terminal.see("(2 tokens")
        terminal.type(f"/save {tmp_path / 'talk.jsonl'}", ENTER)
        terminal.see("(saved: ")
    message = messages_of(tmp_path / "talk.jsonl")[0]
    assert message[0] == "a" and message[-1] == "b" and set(message[1:-1]) == {"\ufffd"}


def piped(command: list[str], base: Path, typed: bytes) -> tuple[int, str, str]:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, input=typed, capture_output=True, cwd=REPO, timeout=120, env=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_through_pipes_every_line_is_a_message_and_nothing_is_remembered(
    talker: list[str], base_dir: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = ["ünïcödé 你好".encode(), b"half \xe4\xbd", b"\xff\xfe\x00\x1b[2J", b"a\\", b"b", b'"""', b"c", b'"""']
    lines += [f"/save {saved}".encode(), b"no line feed at the end"]
    code, shown, told = piped([*talker, "40"], base_dir, b"\n".join(lines))
    assert (code, told) == (0, "")
    assert shown.count("\nassistant: ") == 6 and "\x1b" not in shown
    assert messages_of(saved)[::2] == ["ünïcödé 你好", "half \ufffd", "\ufffd\ufffd\x00\x1b[2J", "a\nb", "c"]
    assert not (base_dir / "chat_history.jsonl").exists()


@pytest.mark.usefixtures("tokenizer")
def test_a_single_question_is_answered_or_stopped_by_ctrl_c(
    text: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--num-iterations=1", "--eval-every=-1", "--logger=none", "--device-type=cpu", "--device-batch-size=2"]
    tiny = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--total-batch-size=256"]
    base_train.main([*quick, *tiny, f"--data-dir={text}", "--compile=off"])
    chat_sft.main([*quick, f"--data={chats}"])
    question = ["-p", "Who are you?", "--max-tokens=9", "--temperature=0"]
    capsys.readouterr()
    chat_cli.main(question)
    whole = capsys.readouterr().out

    class Interrupted(Engine):
        def generate(self, *args: Any, **options: Any) -> Iterator[Token]:
            for token in super().generate(*args, **options):
                yield token
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("nanochat.engine.Engine", Interrupted)
    with pytest.raises(KeyboardInterrupt):  # for `common.run`, which leaves with 130
        chat_cli.main(question)
    part = capsys.readouterr().out
    assert whole.endswith("\n") and part.endswith("\n") and whole.startswith(part[:-1]) and len(part) < len(whole)


# The Python tool --------------------------------------------------------------------------------------------------


def test_the_python_tool_is_off_unless_asked_for() -> None:
    assert chat_cli.parse_args([]).python_tool is False
    assert chat_cli.parse_args(["--python-tool"]).python_tool is True
    with pytest.raises(UserError, match="--python-tool: a base model calls no tools"):
        chat_cli.parse_args(["--python-tool", "--source=base"])


def test_calls_go_to_the_python_tool_of_the_session(capsys: pytest.CaptureFixture[str]) -> None:
    programs: list[str] = []
    session = Session(Caller(64), TOKENIZER, {"max_tokens": 30}, lambda program: programs.append(program) or "done")
    converse(session, "Do something")
    assert programs == ["f()"] and "[f()] [= done] " in capsys.readouterr().out
    assert json.loads(answers(session)[0]) == [
        {"type": "python", "text": "f()"},
        {"type": "python_output", "text": "done"},
    ]


# Shown ------------------------------------------------------------------------------------------------------------


def test_a_models_escape_sequences_are_shown_as_text_and_calls_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    show = PartPrinter()
    show([{"type": "text", "text": "a\x1b[2J\n"}, {"type": "python", "text": "1\r"}])
    show.end()
    assert capsys.readouterr().out == "a\\x1b[2J\n[1\\r] \n"
