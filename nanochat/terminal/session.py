"""A conversation: what was said, how answers are drawn, and the answers as they appear.

The seed is that of the first answer, each later one has the next number: the same words after the same seed get the
same answers, and an answer that is asked for again (`retry`) is another one. Ctrl-C while the model writes is noted and
looked at between two tokens, so that neither the answer so far nor the engine is left half done.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.chat import (
    Conversation,
    Message,
    Part,
    ReplyReader,
    prompt_room,
    render_conversation,
    render_for_completion,
    terminal_text,
)
from nanochat.common import plural
from nanochat.engine import Engine, Sampling
from nanochat.terminal.settings import SAMPLING, SETTINGS
from nanochat.tokenizer import Tokenizer
from nanochat.tools import CalculatorHook


@dataclass(frozen=True)
class Drawn:
    """Facts about an answer. tokens_per_s is that of all tokens after the first; None where there are none."""

    num_tokens: int
    tokens_per_s: float | None
    context_used: int
    seed: int
    is_stopped: bool  # by Ctrl-C
    is_cut: bool  # because it had become as long as it may


class Session:
    """Says what the user says to the model and prints what it answers."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: dict[str, Any] | None = None,
        python: Callable[[str], str] | None = None,
    ) -> None:
        """settings: values of `SETTINGS` by name, else their defaults. python: the Python tool, if the model has it.

        Raises UserError for a model whose context is too short to chat.
        """
        self.engine, self.tokenizer, self._python = engine, tokenizer, python
        self.settings = {setting.name: setting.default for setting in SETTINGS} | (settings or {})
        self.context = engine.model.config.sequence_len
        prompt_room(self.context, self.settings["max_tokens"])
        self.system = ""
        self.turns: list[Message] = []  # user and assistant
        self.last: Drawn | None = None
        self.files: set[Path] = set()  # that it was loaded from or saved to
        self._num_drawn = 0  # since the seed was set
        self._num_forgotten = 0  # turns that the last note told of

    @property
    def conversation(self) -> Conversation:
        return {"messages": self._system + self.turns}

    @property
    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def clear(self, turns: list[Message] | None = None) -> None:
        """Forget all that was said, or replace it. The system text and the settings stay."""
        self.turns = turns or []
        self.files = set()
        self.last = None
        self._num_drawn = self._num_forgotten = 0

    def set(self, name: str, value: Any) -> None:
        """Change a setting. A seed counts from the next answer on."""
        self.settings[name] = value
        if name == "seed":
            self._num_drawn = 0

    def undo(self) -> Message | None:
        """Take the last user message and its answer back; returns the message."""
        self._drop_last("assistant")
        self._num_forgotten = 0
        return self._drop_last("user")

    def say(self, text: str) -> None:
        """A user message, for `answer`."""
        self._drop_last("user")  # without an answer there is none
        self.turns.append({"role": "user", "content": text})

    def answer(self) -> Drawn:
        """Answer the last user message, anew if it has an answer, and print it as it comes, tool calls in brackets.

        An answer that Ctrl-C stops counts as far as it came; if nothing came, it is as if nothing had been asked.
        """
        prompt = self._prompt()
        limit = min(self.settings["max_tokens"], self.context - len(prompt))
        sampling = self._next_sampling()
        reply, show, times = ReplyReader(self.tokenizer), PartPrinter(), list[float]()
        hook = CalculatorHook(self.tokenizer, self._python)
        is_stopped = True
        try:
            with interruptible() as pressed:
                for token in self.engine.generate(prompt, limit, sampling, hooks=[hook], should_stop=pressed):
                    times.append(time.perf_counter())
                    show(reply.push(token.token_id))
                is_stopped = pressed()
        except KeyboardInterrupt:  # pressed twice
            pass
        show(reply.flush())
        show.end()
        self._remember(reply.parts, is_stopped)
        seconds = times[-1] - times[0] if times else 0.0
        rate = (len(times) - 1) / seconds if seconds else None
        is_cut = len(times) == limit and not is_stopped
        self.last = Drawn(len(times), rate, len(prompt) + len(times), sampling.seed, is_stopped, is_cut)
        return self.last

    def _remember(self, parts: list[Part], is_stopped: bool) -> None:
        if parts or not is_stopped:
            self._drop_last("assistant")
            self.turns.append({"role": "assistant", "content": _plainest(parts)})
        else:
            self._drop_last("user")

    def _drop_last(self, role: str) -> Message | None:
        """Forget the last turn if it is this one's."""
        return self.turns.pop() if self.turns and self.turns[-1]["role"] == role else None

    def _next_sampling(self) -> Sampling:
        seed = self.settings["seed"] + self._num_drawn
        self._num_drawn += 1
        return Sampling(seed=seed, **{name: self.settings[name] for name in SAMPLING})

    def _prompt(self) -> list[int]:
        """The conversation's ids, shortened so that the answer has room: what it may want, or half of the context."""
        room = prompt_room(self.context, self.settings["max_tokens"])
        prompt = self._rendered(self.turns, sys.maxsize)
        if len(prompt) <= room:
            return prompt
        prompt = self._rendered(self.turns, room)
        questions = [turn for turn in self.turns if turn["role"] == "user"]
        num_forgotten = len(questions) - prompt.count(self.tokenizer.special("<|user_start|>"))
        if num_forgotten > self._num_forgotten:
            self._tell(f"the oldest {plural(num_forgotten, 'turn')} of this conversation")
        if len(self._rendered(questions[-1:], sys.maxsize)) > room:
            self._tell("the beginning of what you said")
        self._num_forgotten = num_forgotten
        return prompt

    def _rendered(self, turns: list[Message], room: int) -> list[int]:
        return render_for_completion(self.tokenizer, {"messages": self._system + turns}, room)

    def _tell(self, forgotten: str) -> None:
        told = f"note: the context of {self.context} tokens has no room for {forgotten}: the model does not see it"
        print(told, file=sys.stderr)

    def count_tokens(self) -> int:
        """How much of the context the conversation takes."""
        return len(render_conversation(self.tokenizer, self.conversation)[0]) if self.turns else 0


def _plainest(parts: list[Part]) -> str | list[Part]:
    """The content of an answer: a string where it is text alone."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """While the block runs Ctrl-C only makes the function that it gets return True; a second one interrupts as ever."""
    pressed: list[bool] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class PartPrinter:
    """Prints message parts as they grow: text as it is (but no escape sequences), tool calls as [37*24] [= 888]."""

    def __init__(self) -> None:
        self._kind = "text"
        self._openings = {"text": "", "python": "[", "python_output": "[= "}

    def __call__(self, parts: list[Part]) -> None:
        for part in parts:
            if part["type"] != self._kind:
                self._close()
                self._kind = part["type"]
                print(self._openings[self._kind], end="")
            print(terminal_text(part["text"]), end="", flush=True)

    def end(self) -> None:
        self._close()
        print(flush=True)

    def _close(self) -> None:
        if self._kind != "text":
            print("] ", end="")
        self._kind = "text"
