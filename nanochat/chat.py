"""Conversations: what they may look like, how they become tokens, and how tokens become text again.

A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`: an optional system message, then user and
assistant in turn, a user first. Content is a string; an assistant's may also be a list of parts `{"type", "text"}`:
`text`, `python` (a tool call) and `python_output` (what the tool answered).

Rendering writes each piece between its special tokens, and a mask says which tokens the model is to learn:

    start                            bos                                   0
    user message                     user_start, text, user_end            0
    assistant opening                assistant_start                       0
    assistant string or text part    text                                  1
    python part                      python_start, text, python_end        1
    python_output part               output_start, text, output_end        0
    assistant closing                assistant_end                         1

Nothing stands between the pieces and every text is tokenized alone, so no token spans two of them. A system message
has no token of its own: its text and a blank line go before the first user message.

Too long for `max_tokens`? The oldest exchanges (a user message and its answer) are dropped whole until the rest fits;
the system text moves to the user message that is now first. If the last exchange alone is too long, what is cut depends
on the use: `render_conversation` (training) cuts at the end, so the answer loses its tail; `render_for_completion`
(asking the model) cuts the beginning of the last user text, where a question is least likely to stand, so that a prompt
always ends in user_end, assistant_start.
"""

import codecs
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict

from nanochat.common import UserError, printable
from nanochat.tokenizer import Tokenizer

SHORTEST_PROMPT = 4  # bos, user_start, user_end, assistant_start
Tokens = tuple[list[int], list[int]]  # ids and mask, of one length


PartType = Literal["text", "python", "python_output"]


class Part(TypedDict):
    """A piece of an assistant message."""

    type: PartType
    text: str


class Message(TypedDict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class _Messages(TypedDict):
    messages: list[Message]


class Conversation(_Messages, total=False):
    """Messages, and what some tasks need to judge an answer."""

    letters: list[str]  # multiple choice: the allowed answers
    subject: str
    entry_point: str  # programs: the function under test, and the test's source
    test: str


def conversation_text(conversation: Conversation) -> str:
    """Everything that is said, a line for each message or part of one."""
    contents = [message["content"] for message in conversation["messages"]]
    return "\n".join(
        content if isinstance(content, str) else "\n".join(part["text"] for part in content) for content in contents
    )


# Checking -------------------------------------------------------------------------------------------------------


def check_conversation(conversation: object, where: str = "conversation") -> None:
    """Raise UserError, beginning with `where`, if this is not a conversation as the module docstring says."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: a conversation is {{"messages": [...]}} with at least one message')
    for i, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{i}]")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise UserError(f"{where}: a user message must follow the system message")
    for i, role in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if role != expected:
            raise UserError(
                f"{where}: messages[{len(roles) - len(turns) + i}] has role {role!r} where {expected!r} is due; "
                "after an optional system message, user and assistant take turns, a user first"
            )


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f'{where}: a message is {{"role": ..., "content": ...}}')
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise UserError(f"{where}: role {role!r} is unknown; use system, user or assistant")
    if isinstance(content, str):
        return
    if role != "assistant":
        raise UserError(f"{where}: the content of a {role} message must be a string")
    if not isinstance(content, list):
        raise UserError(f"{where}: the content of an assistant message must be a string or a list of parts")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UserError(f'{where}: part {i} must be {{"type": ..., "text": a string}}')
        if part.get("type") not in ("text", "python", "python_output"):
            raise UserError(f"{where}: part {i} has type {part.get('type')!r}; use text, python or python_output")


# Rendering ------------------------------------------------------------------------------------------------------


def render_conversation(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = None) -> Tokens:
    """(ids, mask) for training, at most `max_tokens` long: mask 1 where the model is to learn the token."""
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: must be at least 1")
    check_conversation(conversation)
    ids, mask = _newest_exchanges(tokenizer, conversation["messages"], max_tokens)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int) -> list[int]:
    """The prompt for the next assistant message, at most `max_tokens` long; it ends in user_end, assistant_start.

    If the last message is the assistant's, that is the one to be written anew: it is left out.
    """
    if max_tokens < SHORTEST_PROMPT:
        raise UserError(
            f"max_tokens={max_tokens}: must be at least {SHORTEST_PROMPT}, which frame an empty user message"
        )
    check_conversation(conversation)
    messages = conversation["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    room = max_tokens - 1
    prompt = _newest_exchanges(tokenizer, messages, room)[0]
    if len(prompt) > room:  # one user message: bos, user_start, text, user_end
        prompt = prompt[:2] + prompt[len(prompt) - (room - 2) :]
    return [*prompt, tokenizer.special("<|assistant_start|>")]


def prompt_room(context: int, max_tokens: int, shortest: int = SHORTEST_PROMPT) -> int:
    """How many tokens of a context a prompt may take: what an answer of `max_tokens` leaves, but half of it at least.

    shortest: the fewest it can have. Raises UserError where the context has no room for that and an answer.

    >>> prompt_room(2048, 512), prompt_room(2048, 4096)
    (1536, 1024)
    """
    if context <= shortest:
        raise UserError(f"the model's context of {context} tokens is too short to chat; --source=base continues a text")
    return max(shortest, context // 2, context - max_tokens)


def _newest_exchanges(tokenizer: Tokenizer, messages: list[Message], max_tokens: int | None) -> Tokens:
    """bos and as many of the last exchanges as fit, at least one even if that does not fit."""
    has_system = messages[0]["role"] == "system"
    prefix = f"{messages[0]['content']}\n\n" if has_system else ""
    turns = messages[has_system:]
    exchanges = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    kept: Tokens = [], []
    newer: Tokens = [], []  # the same without the system text, which goes to whatever comes first
    for exchange in reversed(exchanges):
        longer = _joined(_render_exchange(tokenizer, exchange, prefix), newer)
        if newer[0] and max_tokens is not None and 1 + len(longer[0]) > max_tokens:
            break
        kept = longer
        newer = _joined(_render_exchange(tokenizer, exchange, ""), newer) if prefix else kept
    return _joined(([tokenizer.bos], [0]), kept)


def _joined(first: Tokens, second: Tokens) -> Tokens:
    return first[0] + second[0], first[1] + second[1]


def _render_exchange(tokenizer: Tokenizer, exchange: list[Message], prefix: str) -> Tokens:
    """A user message, `prefix` before its text, and its answer if there is one."""
    ids: list[int] = []
    mask: list[int] = []
    for new_ids, supervised in _pieces(tokenizer, exchange, prefix):
        ids += new_ids
        mask += [supervised] * len(new_ids)
    return ids, mask


def _pieces(tokenizer: Tokenizer, exchange: list[Message], prefix: str) -> Iterator[tuple[list[int], int]]:
    """The table of the module docstring: pieces of ids, each with its mask."""

    def framed(name: str, text: object) -> list[int]:
        start, end = tokenizer.special(f"<|{name}_start|>"), tokenizer.special(f"<|{name}_end|>")
        return tokenizer.encode(str(text), prepend=start, append=end)

    yield framed("user", f"{prefix}{exchange[0]['content']}"), 0
    if len(exchange) == 1:
        return
    content = exchange[1]["content"]
    parts: list[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    yield [tokenizer.special("<|assistant_start|>")], 0
    for part in parts:
        if part["type"] == "text":
            yield tokenizer.encode(part["text"]), 1
        elif part["type"] == "python":
            yield framed("python", part["text"]), 1
        else:
            yield framed("output", part["text"]), 0
    yield [tokenizer.special("<|assistant_end|>")], 1


# Showing --------------------------------------------------------------------------------------------------------


class TextStream:
    """Token ids to text while they arrive, never splitting a character.

    A token may end inside a character: its bytes wait until the rest comes, or until it is clear that they are none.
    All pushes and the flush together give exactly `tokenizer.decode` of all the ids, whatever they are; a special token
    comes out as its name (a caller who does not want it shown does not push it).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete with this token."""
        return self._decoder.decode(self._tokenizer.bytes_of(token_id))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the stream is as new afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class ReplyReader:
    """The ids of an assistant's answer to message parts, while they arrive: rendering's inverse.

    `push` and `flush` return what is new, as parts whose texts continue those of the same type before them; `parts` is
    the whole message content so far. A part that generation cut short counts as it stands.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.parts: list[Part] = []
        self._stream = TextStream(tokenizer)
        self._kind: PartType = "text"
        self._opens: dict[int, PartType] = {
            tokenizer.special("<|python_start|>"): "python",
            tokenizer.special("<|python_end|>"): "text",
            tokenizer.special("<|output_start|>"): "python_output",
            tokenizer.special("<|output_end|>"): "text",
        }

    def push(self, token_id: int) -> list[Part]:
        """The parts that this token adds to or begins."""
        if token_id not in self._opens:
            return self._add(self._stream.push(token_id))
        finished = self.flush()
        self._kind = self._opens[token_id]
        if self._kind == "text":
            return finished
        self.parts.append({"type": self._kind, "text": ""})
        return [*finished, {"type": self._kind, "text": ""}]

    def flush(self) -> list[Part]:
        """The rest of a character that was never finished."""
        return self._add(self._stream.flush())

    def _add(self, text: str) -> list[Part]:
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self._kind:
            self.parts.append({"type": self._kind, "text": ""})
        self.parts[-1]["text"] += text
        return [{"type": self._kind, "text": text}]


class StopStrings:
    """Text while it arrives, up to the first of some strings; what may be the beginning of one is held back.

    The string that is complete first ends the text, so the end does not depend on how the text was cut into pieces.

    >>> stop = StopStrings(["\\n\\n"])
    >>> stop.push("one\\n"), stop.push("two\\n"), stop.push("\\nthree"), stop.is_found
    ('one', '\\ntwo', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty string would be found at once"
        self.is_found = False
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain to stand before a stop string. Nothing more comes once one is found."""
        if not self._stops or self.is_found:
            return "" if self.is_found else text
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        self.is_found = bool(ends)
        certain = min(ends)[1] if ends else self._certain(text)
        self._held = "" if ends else text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, where the text has ended by itself."""
        held, self._held = self._held, ""
        return held

    def _certain(self, text: str) -> int:
        """Where the longest end of `text` begins that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


def terminal_text(text: str) -> str:
    """`text` without power over a terminal: what moves the cursor, changes the colour or turns the direction of writing
    is an escape such as \\x1b. Newlines, tabs and every kind of space stay, and the joiners that emoji are made with.
    """
    return "".join(c if c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs" else printable(c) for c in text)


def visualize_tokens(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """The tokens joined by |, for a terminal: green where the mask is 1 (learned), red where it is 0.

    Characters that would move the cursor or change the colour are shown as escapes such as \\n.
    """
    pieces = []
    for token_id, supervised in zip(ids, mask, strict=True):
        pieces.append(f"\033[{32 if supervised else 31}m{printable(tokenizer.decode([token_id]))}\033[0m")
    return "|".join(pieces)
