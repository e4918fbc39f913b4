"""Tasks: slices, mixtures, and conversations read from files with every mistake named."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from nanochat.chat import Conversation, check_conversation, render_conversation
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer
from tasks.common import JSONLTask, Task, TaskMixture, hold_out, load_conversations


class Echo(Task):
    """Conversation i: the user says the name and i, the assistant repeats it."""

    def __init__(self, name: str, size: int, **part: int) -> None:
        super().__init__(**part)
        self.name, self.size = name, size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return chat(f"{self.name}{index}")

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        return reply == conversation["messages"][-1]["content"]


def chat(text: str) -> Conversation:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}


def texts(task: Task) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in task]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# Slices and mixtures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [(0, None, 1), (2, None, 3), (0, 4, 1), (3, 9, 2), (5, 5, 1), (8, None, 5), (0, 99, 1)]
)
def test_a_part_of_a_task_is_what_a_python_slice_is(part: tuple) -> None:
    start, stop, step = part
    task = Echo("a", 10, start=start, stop=stop, step=step)
    expected = [f"a{i}" for i in range(10)][start:stop:step]
    assert texts(task) == expected and len(task) == len(expected)


@pytest.mark.parametrize("part", [{"start": -1}, {"start": 3, "stop": 2}, {"step": 0}])
def test_an_impossible_slice_is_refused(part: dict) -> None:
    with pytest.raises(UserError, match="0 <= start <= stop and step >= 1"):
        Echo("a", 10, **part)


def test_an_index_must_be_a_whole_number_in_range() -> None:
    task = Echo("a", 10, start=5)
    assert task[np.int64(4)] == chat("a9")
    for index in (-1, 5):
        with pytest.raises(IndexError, match="there are 5"):
            task[index]
    with pytest.raises(TypeError):
        task[1.0]


def test_a_task_judges_a_reply_and_one_without_a_rule_says_so(tmp_path: Path) -> None:
    task = Echo("a", 1)
    assert (task.evaluate(task[0], "a0"), task.evaluate(task[0], "a1")) == (True, False)
    data = JSONLTask(write(tmp_path / "a.jsonl", chat("a")))
    with pytest.raises(UserError, match="JSONLTask is for training only"):
        data.evaluate(data[0], "a")


def test_a_mixture_has_every_conversation_once_in_a_fixed_shuffled_order() -> None:
    def mixture(**options: int | None) -> TaskMixture:
        return TaskMixture([Echo("a", 20), Echo("none", 0), Echo("b", 30, step=2)], **options)

    whole = [f"a{i}" for i in range(20)] + [f"b{i}" for i in range(0, 30, 2)]
    assert sorted(texts(mixture())) == sorted(whole) and texts(mixture()) != whole
    assert texts(mixture()) == texts(mixture()) != texts(mixture(seed=7))
    assert texts(mixture(seed=None)) == whole
    assert texts(mixture(start=5, stop=12)) == texts(mixture())[5:12]
    assert len(TaskMixture([])) == 0


def test_a_task_listed_twice_is_seen_twice() -> None:
    task = Echo("a", 3)
    assert sorted(texts(TaskMixture([task, task]))) == ["a0", "a0", "a1", "a1", "a2", "a2"]


# Files ----------------------------------------------------------------------------------------------------------


def test_objects_and_bare_lists_are_read_with_their_extras(tmp_path: Path) -> None:
    lines = [chat("a"), chat("b")["messages"], chat("c") | {"subject": "law"}]
    task = JSONLTask(write(tmp_path / "a.jsonl", *lines))
    assert list(task) == [chat("a"), chat("b"), {**chat("c"), "subject": "law"}]
    assert texts(JSONLTask(tmp_path / "a.jsonl", start=1)) == ["b", "c"]


def test_what_the_caller_does_to_a_conversation_does_not_reach_the_task(tmp_path: Path) -> None:
    task = JSONLTask(write(tmp_path / "a.jsonl", chat("a")))
    task[0]["messages"].clear()
    assert task[0] == chat("a")


def test_gzip_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(chat("zażółć"), ensure_ascii=False) + "\r\n\n  \n" + json.dumps(chat("b"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert texts(JSONLTask(tmp_path / "a.jsonl.gz")) == ["zażółć", "b"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"messages": [', "not JSON"),
        (b"hello", "not JSON"),
        (b'"hello"', "a conversation is"),
        (b"[" * 100_000, "not JSON|nested too deep"),
        (b"caf\xe9", "byte 4 is not UTF-8"),
        (b'{"text": "a document"}', "a conversation is"),
        (b"[]", "at least one message"),
        (b'[{"role": "user", "content": "a"}]', "no assistant message"),
        (b'[{"role": "human", "content": "a"}]', r"messages\[0\]: role 'human' is unknown"),
        (b'[{"role": "assistant", "content": "a"}]', r"messages\[0\] has role 'assistant' where 'user' is due"),
        (b'[{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]', "must be a string"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_line_and_rule(tmp_path: Path, line: bytes, rule: str) -> None:
    good = json.dumps(chat("a")).encode()
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(UserError, match=rf"bad\.jsonl, line 3: .*({rule})"):
        JSONLTask(tmp_path / "bad.jsonl")


def test_a_file_that_is_missing_empty_damaged_or_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file or folder"):
        load_conversations(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no conversation"):
        load_conversations(tmp_path / "empty.jsonl")
    whole = gzip.compress(json.dumps(chat("a" * 1000)).encode())
    for damaged in (b"not gzip", whole[:-10], whole[:20] + b"\xff" * 20 + whole[40:]):
        (tmp_path / "bad.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"bad\.jsonl\.gz: cannot be read"):
            load_conversations(tmp_path / "bad.jsonl.gz")
    (tmp_path / "chats.json").write_text("[]")
    with pytest.raises(UserError, match=r"chats\.json: not a kind of file.*\.jsonl or \.jsonl\.gz"):
        load_conversations(tmp_path / "chats.json")


def test_a_folder_is_all_its_files_and_an_empty_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no conversations"):
        load_conversations(tmp_path)
    write(tmp_path / "b.jsonl", *[chat(f"b{i}") for i in range(10)])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(chat("a")).encode()))
    task = load_conversations(tmp_path)
    assert sorted(texts(task)) == ["a", *[f"b{i}" for i in range(10)]]
    assert texts(task) == texts(load_conversations(tmp_path))
    write(tmp_path / "c.jsonl", chat("c"), {})
    with pytest.raises(UserError, match=r"c\.jsonl, line 2"):
        load_conversations(tmp_path)


def test_a_path_that_cannot_be_looked_at_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\); check the path"):
        load_conversations(tmp_path / ("n" * 300))


def test_holding_out_needs_two_beginnings_and_names_the_file_that_has_one(tmp_path: Path) -> None:
    path = write(tmp_path / "same.jsonl", *[chat("a")] * 3)
    for source in (path, tmp_path):
        with pytest.raises(UserError, match=rf"^{source}: all conversations begin with the same user message"):
            hold_out(load_conversations(source), one_in=2)
    write(path, chat("a"), chat("b"), chat("a"))
    training, held_out = hold_out(load_conversations(path), one_in=10**9)
    assert sorted(len(side) for side in (training, held_out)) == [1, 2]


def test_real_conversations_are_read_and_rendered(real_data: Path) -> None:
    task = load_conversations(real_data / "sft")
    tokenizer = Tokenizer.train([], 265)
    for i in range(0, len(task), len(task) // 50):
        check_conversation(task[i])
        ids, mask = render_conversation(tokenizer, task[i], max_tokens=100_000)
        supervised = [token_id for token_id, learned in zip(ids, mask) if learned]
        assert supervised[-1] == tokenizer.special("<|assistant_end|>")
