"""Answers of a chat model, judged. Questions are decoded side by side; a rate comes with its interval."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanochat.chat import Conversation, Part, ReplyReader, prompt_room, render_for_completion
from nanochat.common import UserError
from nanochat.engine import Engine, Sampling
from nanochat.tokenizer import Tokenizer
from nanochat.tools import CalculatorHook

GREEDY = Sampling(temperature=0.0)


class Judge(Protocol):
    """Tells whether a reply answers a conversation rightly."""

    def __call__(self, conversation: Conversation, reply: list[Part], /) -> bool: ...


@dataclass(frozen=True)
class Answer:
    """A question, what the model said, and whether that is right."""

    conversation: Conversation
    reply: list[Part]
    is_right: bool

    @property
    def text(self) -> str:
        """The reply with its tool calls and their outputs in brackets."""
        return "".join(part["text"] if part["type"] == "text" else f"[{part['text']}]" for part in self.reply)


def answer_all(
    engine: Engine,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    judge: Judge,
    max_tokens: int = 64,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Greedy answers to every conversation's last user message (a final assistant message is the reference).

    Prompts of similar length are decoded together; answers come back in the given order. Raises UserError if a question
    would have to be cut: what is asked then is another question.
    """
    context = engine.model.config.sequence_len
    room = prompt_room(context, max_tokens)
    prompts = [render_for_completion(tokenizer, c, sys.maxsize) for c in conversations]
    longest = max(map(len, prompts), default=0)
    if longest > room:
        raise UserError(
            f"a question of {longest} tokens and an answer of {max_tokens} do not fit into the model's context of "
            f"{context}; ask for shorter answers (--max-new-tokens) or take a model with a longer context"
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        readers = [ReplyReader(tokenizer) for _ in batch]
        hooks = [CalculatorHook(tokenizer) for _ in batch]
        for token in engine.generate_each([prompts[i] for i in batch], max_tokens, GREEDY, hooks):
            readers[token.row].push(token.token_id)
        for i, reader in zip(batch, readers):
            reader.flush()
            answers[i] = Answer(conversations[i], reader.parts, judge(conversations[i], reader.parts))
        on_progress(len(answers))
    return [answers[i] for i in range(len(conversations))]


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927): right also near 0 and 1, where the normal one is not.

    >>> [round(x, 3) for x in wilson_interval(45, 50)]
    [0.786, 0.957]
    """
    if n == 0:
        return 0.0, 1.0
    rate, spread = successes / n, z * z / n
    centre = rate + spread / 2
    half = (rate * (1 - rate) * spread + spread * spread / 4) ** 0.5
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))
