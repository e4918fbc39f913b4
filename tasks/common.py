"""What every task is made of: slices, mixtures, and conversations in JSONL files.

A task is a sequence of conversations, made one at a time when asked for, so a task of a million rows costs nothing
until it is read. `start`, `stop` and `step` give a part of it without touching the rest, as a Python slice would. A
mixture lists tasks; a task that is to be seen twice is listed twice.

    class Capitals(Task):
        def num_examples(self) -> int:
            return len(CAPITALS)

        def get_example(self, index: int) -> Conversation:
            country, capital = CAPITALS[index]
            return {"messages": [{"role": "user", "content": country}, {"role": "assistant", "content": capital}]}

        def evaluate(self, conversation: Conversation, reply: str) -> bool:
            return conversation["messages"][-1]["content"] in reply
"""

import json
import operator
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nanochat import cli
from nanochat.abilities import mixture
from nanochat.chat import Conversation, check_conversation
from nanochat.common import UserError, open_bytes, reading

KINDS = (".jsonl", ".jsonl.gz")
NUM_GENERATED_VAL = 500


class Task(ABC):
    """Conversations `start`, `start + step`, ... before `stop` of what a subclass defines."""

    origin = ""  # the file or folder they come from, for messages

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(f"slice start={start}, stop={stop}, step={step}: need 0 <= start <= stop and step >= 1")
        self._slice = slice(start, stop, step)

    @abstractmethod
    def num_examples(self) -> int:
        """How many conversations there are before slicing."""

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """Conversation `index`, 0 <= index < num_examples(). The caller may change what it gets."""

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        """Whether `reply` answers the conversation rightly."""
        raise UserError(f"{type(self).__name__} is for training only: it has no rule for judging a reply")

    def __len__(self) -> int:
        return len(self._indices())

    def __getitem__(self, index: int) -> Conversation:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__}[{index}]: there are {len(self)} conversations")
        return self.get_example(self._indices()[index])

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))

    def _indices(self) -> range:
        return range(self.num_examples())[self._slice]


class TaskMixture(Task):
    """All conversations of several tasks, shuffled by `seed`; None keeps their order (a curriculum)."""

    def __init__(
        self,
        tasks: Sequence[Task],
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
        seed: int | None = 42,
    ) -> None:
        super().__init__(start, stop, step)
        self._tasks = list(tasks)
        self._ends = list(accumulate(len(task) for task in self._tasks))
        total = self._ends[-1] if self._ends else 0
        self._order = np.arange(total) if seed is None else np.random.default_rng(seed).permutation(total)

    def num_examples(self) -> int:
        return len(self._order)

    def get_example(self, index: int) -> Conversation:
        place = int(self._order[index])
        which = bisect_right(self._ends, place)
        return self._tasks[which][place - (self._ends[which - 1] if which else 0)]


class JSONLTask(Task):
    """Conversations of a .jsonl or .jsonl.gz file: one per line, `{"messages": [...]}` or the bare list of messages.

    Each needs a user message and an answer at least. The whole file is checked when it is opened, so that a mistake in
    its last line is not found hours into a training; the lines stay as bytes and are read anew at every access.
    """

    def __init__(self, path: Path, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        self.origin = str(path)
        self._lines: list[bytes] = []
        for number, line in enumerate(_lines_of(Path(path)), start=1):
            if line.strip():
                _check_line(line, f"{path}, line {number}")
                self._lines.append(line)
        if not self._lines:
            raise UserError(f'{path}: holds no conversation; write one per line as {{"messages": [...]}}')

    def num_examples(self) -> int:
        return len(self._lines)

    def get_example(self, index: int) -> Conversation:
        return _conversation_of(json.loads(self._lines[index]))


def training_conversations(
    source: str, num_generated: int = cli.NUM_GENERATED
) -> tuple[Sequence[Conversation], Sequence[Conversation]]:
    """(training, validation) conversations of a file, of a folder, or of `abilities`: that many generated ones."""
    if source == "abilities":
        return mixture(num_generated), mixture(NUM_GENERATED_VAL, split="val")
    return hold_out(load_conversations(Path(source)), one_in=50)


def load_conversations(path: Path) -> Task:
    """The conversations of one file, or of all .jsonl and .jsonl.gz files of a folder, shuffled together."""
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; give one of conversations, {' or '.join(KINDS)}")
        if not path.is_dir():
            return JSONLTask(path)
        files = sorted(file for file in path.iterdir() if file.name.endswith(KINDS) and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path}: the folder holds no conversations; put them there as {' or '.join(KINDS)} files")
    conversations = TaskMixture([JSONLTask(file) for file in files])
    conversations.origin = str(path)
    return conversations


def _lines_of(path: Path) -> Iterator[bytes]:
    if not path.name.endswith(KINDS):
        raise UserError(f"{path}: not a kind of file that holds conversations; give a {' or '.join(KINDS)} file")
    with open_bytes(path) as file:
        yield from file


def _check_line(line: bytes, where: str) -> None:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); every line must be one whole JSON value") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deep for a conversation") from error
    conversation = _conversation_of(content)
    check_conversation(conversation, where)
    if all(message["role"] != "assistant" for message in conversation["messages"]):
        raise UserError(f"{where}: has no assistant message, so there is nothing to learn from it; add an answer")


def _conversation_of(content: Any) -> Conversation:
    return {"messages": content} if isinstance(content, list) else content


def hold_out(conversations: Task, one_in: int) -> tuple[list[Conversation], list[Conversation]]:
    """(training, validation) parts: about one conversation in `one_in` is held out.

    A hash of the first user message decides, so conversations that begin alike never fall on both sides and a
    conversation stays on its side when others are added. Raises UserError where all begin alike.
    """
    sides: dict[int, list[Conversation]] = {}
    for i in range(len(conversations)):
        conversation = conversations[i]
        opening = next(message for message in conversation["messages"] if message["role"] == "user")
        sides.setdefault(zlib.crc32(str(opening["content"]).encode(errors="replace")), []).append(conversation)
    if len(sides) < 2:
        where = f"{conversations.origin}: " if conversations.origin else ""
        raise UserError(
            f"{where}all conversations begin with the same user message: none can be held out; give more of them"
        )
    held_out = {key for key in sides if key % one_in == 0}
    if len(held_out) in (0, len(sides)):
        held_out = {min(sides)}
    training = [c for key, side in sides.items() if key not in held_out for c in side]
    return training, [c for key, side in sides.items() if key in held_out for c in side]
