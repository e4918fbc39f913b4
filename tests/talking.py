"""Conversations for the tests of the terminal: a model that knows nothing, and a user whose lines are given."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nanochat.config import ModelConfig
from nanochat.engine import Engine, Token
from nanochat.model.gpt import build_model
from nanochat.terminal.session import Session
from nanochat.terminal.settings import SETTINGS
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli

TOKENIZER = Tokenizer.train(["Who are you? I am a test. How many r are in strawberry?"], 280)
DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


class Recorder(Engine):
    """An engine that keeps the prompts it gets; while it writes the first answer, its user presses Ctrl-C."""

    def __init__(self, context: int, stops_after: int | None = None) -> None:
        """stops_after: tokens of that answer."""
        config = ModelConfig(context, TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
        super().__init__(build_model(config, torch.device("cpu"), torch.float32, seed=1), stop_ids=[])
        self.stops_after = stops_after
        self.prompts: list[str] = []

    def generate(self, prompt: list[int], *args: Any, **options: Any) -> Iterator[Token]:
        self.prompts.append(TOKENIZER.decode(prompt))
        if len(self.prompts) == 1 and self.stops_after == 0:
            signal.raise_signal(signal.SIGINT)
        for number, token in enumerate(super().generate(prompt, *args, **options), start=1):
            yield token
            if len(self.prompts) == 1 and number == self.stops_after:
                signal.raise_signal(signal.SIGINT)


class Caller(Recorder):
    """An engine whose model writes one call of Python and ends."""

    def generate(self, prompt: list[int], *args: Any, hooks: Any, **options: Any) -> Iterator[Token]:
        call = TOKENIZER.encode("f()", TOKENIZER.special("<|python_start|>"), TOKENIZER.special("<|python_end|>"))
        for token_id in call:
            yield Token(0, token_id, is_forced=False)
            yield from (Token(0, forced, is_forced=True) for forced in hooks[0].push(token_id))


def new_session(context: int = 512, stops_after: int | None = None, **settings: Any) -> Session:
    return Session(Recorder(context, stops_after), TOKENIZER, {"max_tokens": 8, "seed": 2, **settings})


def reader(typed: Iterable[object]) -> Callable[[str], str]:
    """Reads these lines, one after the other, and then the end of input. Errors among them are raised."""
    left = iter(typed)

    def read(prompt: str) -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return read


def converse(session: Session, *typed: object) -> list[str]:
    """Hold a conversation in which these lines are typed; returns those that were never read."""
    left = list(typed)
    chat_cli.converse(session, reader(left.pop(0) for _ in typed))
    return [str(line) for line in left]


def said(session: Session) -> list[str]:
    return [str(turn["content"]) for turn in session.turns if turn["role"] == "user"]


def answers(session: Session) -> list[str]:
    """What was answered, tool calls and all, as it would be saved."""
    return [json.dumps(turn["content"]) for turn in session.turns if turn["role"] == "assistant"]


INTERRUPT = KeyboardInterrupt()
