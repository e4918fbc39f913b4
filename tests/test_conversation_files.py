"""What conversations on the terminal leave behind: files that are saved and loaded, and the history."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from talking import converse, new_session, said

from nanochat.chat import check_conversation
from nanochat.common import UserError
from nanochat.terminal import keyboard
from nanochat.terminal.commands import MAX_FILE_BYTES, read_conversation
from nanochat.terminal.keyboard import History

# Files ------------------------------------------------------------------------------------------------------------

TOOLS = [
    {"type": "python", "text": "37*24"},
    {"type": "python_output", "text": "888"},
    {"type": "text", "text": "888."},
]
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be \x1b[1mbrief."},
    {"role": "user", "content": "What is 37*24?\n你好 🙂"},
    {"role": "assistant", "content": TOOLS},
]


def test_a_conversation_that_is_saved_and_loaded_goes_on_as_if_it_had_not_ended(tmp_path: Path) -> None:
    path = tmp_path / "my talk.jsonl"
    session, later = new_session(temperature=0.0), new_session(temperature=0.0)
    converse(session, "/system Be brief.", "Who are you? 你好 🙂", f"/save {path}", "And?", f"/save {path}", "More?")
    (line,) = path.read_text(encoding="utf-8").splitlines()
    check_conversation(json.loads(line))
    assert "你好 🙂" in line
    converse(later, f"/load {path}", "More?")
    assert later.engine.prompts[-1] == session.engine.prompts[-1]
    assert later.conversation == session.conversation


def test_loading_shows_the_conversation_and_answers_what_is_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    open_end = [*TALK, {"role": "user", "content": "And \x1b[2J?"}]
    path.write_text(json.dumps({"messages": open_end, "subject": "sums"}, indent=2), encoding="utf-8")
    session = new_session()
    converse(session, "old words", f"/load {path}", "/system")
    assert said(session) == [TALK[1]["content"], "And \x1b[2J?"] and session.turns[-1]["role"] == "assistant"
    shown = capsys.readouterr().out
    assert shown.count("system: Be \\x1b[1mbrief.\n") == 2 and "you: What is 37*24?\n你好 🙂\n" in shown
    assert "assistant: [37*24] [= 888] 888.\n" in shown and "you: And \\x1b[2J?\n" in shown
    assert session.engine.prompts[-1].startswith("<|bos|><|user_start|>Be \x1b[1mbrief.\n\nWhat is 37*24?")


def test_a_file_that_is_not_this_conversations_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dear.jsonl").write_text("dear")
    session = new_session()
    converse(session, "a", f"/save {tmp_path / 'dear.jsonl'}", f"/save {tmp_path}", f"/save {tmp_path}/none/x.jsonl")
    assert (tmp_path / "dear.jsonl").read_text() == "dear"
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("exists already" in error for error in errors)
    converse(session, "clear", "another talk", f"/save {tmp_path}/none/x.jsonl")
    assert "exists already" in capsys.readouterr().err
    converse(session, f"/save {tmp_path}/{'x' * 5000}", f"/save {tmp_path}/dear.jsonl/below.jsonl")
    assert [line.rpartition("could not be ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "could not be "
    ] * 2
    assert (tmp_path / "none" / "x.jsonl").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"\xff\xfe{",
        b"[" * 100_000,
        b"5",
        b"{}",
        b"[]",
        json.dumps({"messages": [{"role": "assistant", "content": "a"}]}).encode(),
        b"\n".join([json.dumps({"messages": TALK}).encode()] * 2),
        b'{"messages": [{"role": "system", "content": "a"}]}',
    ],
)
def test_a_file_without_one_conversation_is_refused_and_the_talk_goes_on(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_bytes(content)
    session = new_session()
    converse(session, "a", f"/load {path}", "b")
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {path}: ") and said(session) == ["a", "b"]


def test_a_bare_list_of_messages_is_a_conversation_too_and_endless_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(TALK), encoding="utf-8")
    assert read_conversation(path) == {"messages": TALK}
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    for strange in (path, tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="must be a file of at most 16 MB"):
            read_conversation(strange)


def test_half_a_character_from_a_file_can_be_shown_said_and_saved(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text('[{"role": "user", "content": "half \\ud83d"}]')
    session = new_session()
    converse(session, f"/load {path}", f"/save {path}")
    assert json.loads(path.read_text(encoding="utf-8"))["messages"][0]["content"] == "half \ufffd"


# History ----------------------------------------------------------------------------------------------------------


def test_history_keeps_messages_of_several_lines_in_a_file_of_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    messages = ["one", "two\nlines", "你好 \x85\u2028 🙂", "one"]
    history = History(path)
    for message in messages:
        history.add(message)
    history.add("x" * (keyboard.MAX_ENTRY_CHARS + 1))
    assert History(path).messages == messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    history.add("later")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_is_bounded_and_survives_damage_and_a_disk_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "history.jsonl"
    lines = [b"\xff\x00 damage", b"[1]", b"[" * 100_000, *(b'"%d"' % number for number in range(5000)), b'"half']
    path.write_bytes(b"\n".join(lines))
    kept = [str(number) for number in range(4000, 5000)]
    assert History(path).messages == kept
    assert len(path.read_bytes().splitlines()) == keyboard.MAX_ENTRIES and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert History(path).messages == kept
    nowhere = History(path / "below" / "history.jsonl")
    nowhere.add("a")
    nowhere.add("b")
    assert len(capsys.readouterr().err.splitlines()) == 1
