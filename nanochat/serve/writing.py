"""From an engine's tokens to pieces of an answer: parts, stop strings, and which tokens show which text.

A token does not show at once: it may end inside a character, or begin what may be a stop string. So what the reader
makes of it waits in `StopStrings`, and the token itself, where log-probabilities are asked for, until the first of its
characters goes out. Stop strings count in text only, not in tool calls; they never reach from one part into the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nanochat.chat import Part, PartType, StopStrings, TextStream
from nanochat.engine import Token
from nanochat.tokenizer import Tokenizer

Reason = Literal["stop", "length", "cancelled", "error", "unread"]


@dataclass(frozen=True)
class Delta:
    """Text that was added to part number `index` of an answer; a new index begins a new part.

    choice: which of a request's answers. tokens: those that show with this text, where asked for.
    """

    choice: int
    index: int
    type: PartType
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer. cached_tokens: of the prompt, known from before; seconds: from first token to last."""

    choice: int
    reason: Reason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0


class Reader(Protocol):
    """Ids to message parts: `chat.ReplyReader`, or `PlainReader` where there are none but text."""

    parts: list[Part]

    def push(self, token_id: int) -> list[Part]: ...

    def flush(self) -> list[Part]: ...


class PlainReader:
    """The continuation of a text: one part, in which special tokens show as their names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.parts: list[Part] = [{"type": "text", "text": ""}]
        self._stream = TextStream(tokenizer)

    def push(self, token_id: int) -> list[Part]:
        return self._read(self._stream.push(token_id))

    def flush(self) -> list[Part]:
        return self._read(self._stream.flush())

    @staticmethod
    def _read(text: str) -> list[Part]:
        return [{"type": "text", "text": text}] if text else []


class Writer:
    """One answer in the making: `push` its tokens and `flush` in the end; both return what may be shown by now."""

    def __init__(self, choice: int, reader: Reader, stop: Sequence[str] = (), keeps_tokens: bool = False) -> None:
        self._choice, self._reader, self._stops = choice, reader, StopStrings(stop)
        self._keeps_tokens = keeps_tokens
        self._tokens: list[tuple[int, Token]] = []  # not shown yet, each with the place of its first character
        self._read = self._shown = 0  # characters
        self._open: tuple[int, PartType] = (-1, "text")  # the part that text held back belongs to

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come: nothing after it will be shown."""
        return self._stops.is_found

    def push(self, token: Token) -> list[Delta]:
        """What this token lets out."""
        if self._keeps_tokens:
            self._tokens.append((self._read, token))
        return self._write(self._reader.push(token.token_id))

    def flush(self) -> list[Delta]:
        """The rest. Tokens that never had text of their own come with the last of it."""
        deltas = self._write(self._reader.flush())
        deltas += self._release()
        if self._tokens and not self.is_stopped:
            left, self._tokens = tuple(token for _, token in self._tokens), []
            deltas.append(Delta(self._choice, max(0, self._open[0]), self._open[1], "", left))
        return deltas

    def _write(self, new: Sequence[Part]) -> list[Delta]:
        """Deltas of what the reader just returned; the last of it belongs to its last part."""
        deltas: list[Delta] = []
        for index, part in enumerate(new, start=len(self._reader.parts) - len(new)):
            if self.is_stopped:
                break
            if index != self._open[0]:
                deltas += self._release()
            is_new, self._open = index != self._open[0], (index, part["type"])
            self._read += len(part["text"])
            text = self._stops.push(part["text"]) if part["type"] == "text" else part["text"]
            if text or (is_new and part["type"] != "text"):
                deltas.append(self._delta(text))
        return deltas

    def _release(self) -> list[Delta]:
        held = self._stops.flush()
        return [self._delta(held)] if held else []

    def _delta(self, text: str) -> Delta:
        self._shown += len(text)
        num_out = sum(start < self._shown for start, _ in self._tokens)
        out, self._tokens = tuple(token for _, token in self._tokens[:num_out]), self._tokens[num_out:]
        return Delta(self._choice, *self._open, text, out)
