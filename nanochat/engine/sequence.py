"""`Sequence`: one text in the making, from its prompt to its last token."""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nanochat.common import UserError


class ToolHook(Protocol):
    """Watches a sequence's tokens and answers tool calls."""

    def push(self, token_id: int) -> list[int]:
        """Tokens to force after this one; usually none."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. What is not at its default is done in this order.

    repetition_penalty: the logit of every id that has occurred, in the prompt too, is divided by it, or multiplied
    where it is negative (Keskar et al. 2019); 1 changes nothing. temperature: 0 is greedy. top_k: only the k likeliest;
    0 takes all. top_p: only the likeliest that together have this probability. min_p: only those with at least this
    share of the likeliest's probability. seed: with a sample's row and the position it decides every draw.
    top_logprobs: None for no log-probabilities; n for the chosen token's and those of the n likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 42
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for is_allowed, told in (
            (self.temperature >= 0, f"temperature={self.temperature}: must be 0 or more"),
            (self.top_k >= 0, f"top_k={self.top_k}: must be 0 (all) or more"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: must be from 0 to 1"),
            (self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty}: must be above 0"),
            ((self.top_logprobs or 0) >= 0, f"top_logprobs={self.top_logprobs}: must be 0 or more"),
        ):
            if not is_allowed:
                raise UserError(told)


@dataclass(frozen=True)
class Token:
    """One token of a text.

    row: which sample of its request. is_forced: put there by a tool or given, not chosen by the model. logprob: natural
    logarithm of its probability under the model's own distribution, temperature 1 and nothing cut, if asked for.
    top: (id, logprob) of the likeliest, likeliest first.
    """

    row: int
    token_id: int
    is_forced: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """A prompt and the at most `limit` tokens that follow it.

    row: which sample of its request, which its random numbers depend on. finish: why it has ended, None while it runs.
    num_cached: prompt tokens that need not be read, because they were before. num_read: tokens that the model has read,
    of the prompt and then of the answer; the newest token is not among them. shortest: its row cannot be cut to fewer
    tokens, as the one that it was begun from could not.
    """

    prompt: tuple[int, ...]
    limit: int
    sampling: Sampling
    hook: ToolHook | None = None
    row: int = 0
    tokens: list[Token] = field(default_factory=list)
    finish: Literal["stop", "length", "cancelled"] | None = None
    num_cached: int = 0
    num_read: int = 0
    shortest: int = 0
    forced: deque[int] = field(default_factory=deque)

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return (*self.prompt, *(token.token_id for token in self.tokens))

    @property
    def position(self) -> int:
        """Of the next token."""
        return len(self.prompt) + len(self.tokens)

    def push(self, token: Token) -> None:
        """Add a token, ask the hook what it makes of it, and end where the limit is reached."""
        self.tokens.append(token)
        if self.hook is not None and not token.is_forced:
            self.forced.extend(self.hook.push(token.token_id))
        if len(self.tokens) >= self.limit:
            self.finish = "length"
