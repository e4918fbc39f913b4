"""From prompts' ids to new ids: prefill once, then decode any number of samples side by side.

The engine is given a model; it knows nothing of what is inside. Each sample is a row: it draws its own random numbers
from (seed, row, position) alone, so its text does not depend on its neighbours, and it may carry a tool hook that
forces tokens in. Finished rows leave the batch.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as IdSequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.model.state import DecodeState

MASK64 = (1 << 64) - 1
PREFILL_CHUNK = 512  # prompt tokens per forward; bounds the memory of a long prompt's attention


class LanguageModel(Protocol):
    """What the engine needs of a model."""

    config: ModelConfig

    def new_state(self, batch: int, max_len: int) -> DecodeState: ...

    def next_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor: ...


class ToolHook(Protocol):
    """Watches a row's tokens and answers tool calls."""

    def push(self, token_id: int) -> list[int]:
        """Tokens to force after this one; usually none."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. temperature 0 is greedy; top_k 0 considers every token."""

    temperature: float = 1.0
    top_k: int = 0
    seed: int = 42


@dataclass(frozen=True)
class Token:
    """One generated token. row: which sample; is_forced: put there by a tool, not chosen by the model."""

    row: int
    token_id: int
    is_forced: bool


@dataclass
class Sample:
    """A sample in the making: it starts at position `start` and has at most `limit` tokens."""

    index: int
    start: int
    limit: int
    hook: ToolHook | None
    length: int = 0
    forced: list[int] = field(default_factory=list)


def never() -> bool:
    """The stop test of a generation that nobody stops."""
    return False


class Engine:
    """Generates from one model. stop_ids end a row and are not part of it."""

    def __init__(self, model: LanguageModel, stop_ids: IdSequence[int]) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompt: IdSequence[int],
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        num_samples: int = 1,
        hooks: IdSequence[ToolHook] = (),
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[Token]:
        """Yield the tokens of `num_samples` continuations of `prompt` as they come, row after row at each position.

        hooks: one per sample, or none. A row ends at a stop token, after max_tokens, or where the model's context ends.
        should_stop: asked after every chunk of the prompt and before every later forward; once True, all rows end.
        Raises UserError for an empty prompt or one that fills the whole context.
        """
        rows = self._rows([prompt] * num_samples, max_tokens, hooks)
        logits, state = self._prefill(prompt, len(prompt) + rows[0].limit, should_stop)
        if should_stop():
            return
        yield from self._decode(rows, logits.expand(num_samples, -1), state.fork(num_samples), sampling, should_stop)

    @torch.inference_mode()
    def generate_each(
        self,
        prompts: IdSequence[IdSequence[int]],
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        hooks: IdSequence[ToolHook] = (),
    ) -> Iterator[Token]:
        """Like `generate`, for one continuation of each of several prompts, decoded side by side."""
        rows = self._rows(prompts, max_tokens, hooks)
        max_len = max(row.start for row in rows) + max(row.limit for row in rows)
        prefilled = [self._prefill(prompt, max_len) for prompt in prompts]
        logits = torch.cat([logits for logits, _ in prefilled])
        states = [state for _, state in prefilled]
        yield from self._decode(rows, logits, states[0].join(states[1:]), sampling)

    def _rows(self, prompts: IdSequence[IdSequence[int]], max_tokens: int, hooks: IdSequence[ToolHook]) -> list[Sample]:
        """One row per prompt, each with the room that its prompt leaves."""
        assert len(hooks) in (0, len(prompts)), "one hook per row"
        context, rows = self.model.config.sequence_len, []
        for index, prompt in enumerate(prompts):
            room = context - len(prompt)
            if not prompt or room < 1:
                raise UserError(
                    f"prompt of {len(prompt)} tokens: needs at least 1 and fewer than the model's context of {context}"
                )
            rows.append(Sample(index, len(prompt), min(max_tokens, room), hooks[index] if hooks else None))
        return rows

    def _prefill(
        self, prompt: IdSequence[int], max_len: int, should_stop: Callable[[], bool] = never
    ) -> tuple[Tensor, DecodeState]:
        """Logits (1, V) after the prompt, and the state of its row; both useless once `should_stop` is true."""
        state = self.model.new_state(1, max_len)
        device = state.positions.device
        for start in range(0, len(prompt), PREFILL_CHUNK):
            ids = torch.tensor([prompt[start : start + PREFILL_CHUNK]], device=device)
            logits = self.model.next_logits(ids, state)
            if should_stop():
                break
        return logits, state

    def _decode(
        self,
        rows: list[Sample],
        logits: Tensor,
        state: DecodeState,
        sampling: Sampling,
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[Token]:
        """Sample, yield, feed back, until every row has left. logits: (B, V), one row each."""
        while True:
            chosen = sample(logits, rows, sampling)
            alive: list[int] = []  # places in the batch that go on
            for place, row in enumerate(rows):
                token = self._advance(row, chosen[place])
                if token is None:
                    continue
                yield token
                chosen[place] = token.token_id
                if row.length < row.limit:
                    alive.append(place)
            if not alive or should_stop():
                return
            if len(alive) < len(rows):
                state = state.select(torch.tensor(alive, device=logits.device))
                rows = [rows[place] for place in alive]
            ids = torch.tensor([[chosen[place]] for place in alive], device=logits.device)  # (B, 1)
            logits = self.model.next_logits(ids, state)

    def _advance(self, row: Sample, sampled: int) -> Token | None:
        """The row's next token, forced or sampled; None where it stops."""
        is_forced = bool(row.forced)
        token_id = row.forced.pop(0) if is_forced else sampled
        if not is_forced and token_id in self.stop_ids:
            return None
        row.length += 1
        if row.hook is not None and not is_forced:
            row.forced.extend(row.hook.push(token_id))
        return Token(row.index, token_id, is_forced)


def sample(logits: Tensor, rows: IdSequence[Sample], sampling: Sampling) -> list[int]:
    """One token id per row from logits (B, V), each from its own random number."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    k = min(sampling.top_k or logits.size(-1), logits.size(-1))
    values, ids = logits.topk(k, dim=-1) if k < logits.size(-1) else (logits, None)
    values = values.cpu().double()  # on the CPU, for MPS has no f64
    below = values - values.amax(dim=-1, keepdim=True)  # at most 0: divided by a tiny temperature, none becomes inf
    cumulative = (below / sampling.temperature).softmax(dim=-1).cumsum(dim=-1)  # (B, K)
    draws = [uniform(sampling.seed, row.index, row.start + row.length) for row in rows]
    u = torch.tensor(draws, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, u, right=True).clamp_max(k - 1)  # (B, 1)
    return (places if ids is None else ids.cpu().gather(1, places)).squeeze(1).tolist()


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments only (SplitMix64's finaliser over a counter)."""
    x = seed & MASK64
    for counter in (row, position):
        x = (x + (counter + 1) * 0x9E3779B97F4A7C15) & MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        x ^= x >> 31
    return (x >> 11) / (1 << 53)
