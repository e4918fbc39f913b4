"""The engine: `add` a prompt, `step` the model, and tokens come out, until `finish` says why no more do.

Each step is one forward of the model: a chunk of one prompt, or one token for every sequence that runs. The engine is
given a model and knows nothing of what is inside. It is no thread and needs none; one thread at a time may use it.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from typing import Protocol

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.engine.cache import PrefixCache, Saved
from nanochat.engine.sampler import logprobs, pick
from nanochat.engine.scheduler import PREFILL_CHUNK, Scheduler
from nanochat.engine.sequence import Sampling, Sequence, Token, ToolHook
from nanochat.model.state import DecodeState

PREFIX_CACHE_BYTES = 2**28


class LanguageModel(Protocol):
    """What the engine needs of a model."""

    config: ModelConfig

    def new_state(self, batch: int, max_len: int, max_chunk: int) -> DecodeState: ...

    def next_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor: ...

    def all_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor: ...


def never() -> bool:
    """The stop test of a generation that nobody stops."""
    return False


class Engine:
    """Generates from one model.

    stop_ids end a sequence and are not part of it. max_rows: sequences side by side; the others wait.
    prefix_cache_bytes: for the beginnings of texts that were read before, besides the memory of the rows.
    deterministic: tokens and log-probabilities are the same to the bit whatever else runs. A matrix product may round
    differently for another number of rows, so each forward then has one row, which a batch is slow for, and a prompt
    is always read from its beginning.
    """

    def __init__(
        self,
        model: LanguageModel,
        stop_ids: Several[int],
        max_rows: int = 16,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        deterministic: bool = False,
    ) -> None:
        assert max_rows >= 1
        self.model, self.max_rows = model, max_rows
        self.stop_ids = frozenset(stop_ids)
        self.is_deterministic = deterministic
        self.prefixes = PrefixCache(0 if deterministic else prefix_cache_bytes)
        self._scheduler = Scheduler(max_rows, self._move)
        self._memory: DecodeState | None = None
        self._rows: tuple[tuple[int, int], DecodeState] | None = None  # those of the last forward

    # One step at a time --------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Several[int],
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        hook: ToolHook | None = None,
        row: int = 0,
    ) -> Sequence:
        """A new sequence, which waits until a row is free. row: its number among the samples of one request.

        It ends at a stop token, after max_tokens, or where the model's context ends. Raises UserError for an empty
        prompt or one that fills the whole context.
        """
        context = self.model.config.sequence_len
        if not 0 < len(prompt) < context:
            raise UserError(
                f"prompt of {len(prompt)} tokens: needs at least 1 and fewer than the model's context of {context}"
            )
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: must be at least 1")
        sequence = Sequence(tuple(prompt), min(max_tokens, context - len(prompt)), sampling, hook, row)
        self._scheduler.waiting.append(sequence)
        return sequence

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Token]]:
        """One forward. Returns the new tokens, at most one per sequence: a stop token is none, so look at `finish`."""
        beginner = self._scheduler.take()
        if beginner is not None:
            self._begin(beginner)
        chunk = self._scheduler.next_chunk()
        if chunk:
            return self._read(chunk)
        return self._write() if self._scheduler.running else []

    def remove(self, sequence: Sequence) -> None:
        """End a sequence now: its row is free. Harmless when it has ended."""
        if sequence.finish is None:
            sequence.finish = "cancelled"
            self._leave(sequence)

    def _begin(self, sequence: Sequence) -> None:
        """Make the row of a sequence ready that is about to read its prompt, or what is new in it."""
        row, found = len(self._scheduler.running), self.prefixes.find(sequence.prompt)
        if found is None:
            self._state().start(row)
            return
        saved, length = found
        self._state().load(row, saved.state.row(0, length + 1))  # a cut looks at the position behind it
        if length < len(saved.ids):
            self._state().cut(row, length, sequence.prompt[length - 1])
        sequence.num_read = sequence.num_cached = length
        sequence.shortest = saved.shortest

    def _read(self, chunk: tuple[int, ...]) -> list[tuple[Sequence, Token]]:
        """Read a piece of a prompt; behind the last one comes the first token."""
        sequence, row = self._scheduler.reading, len(self._scheduler.running)
        assert sequence is not None
        logits = self._forward([chunk], row, row + 1, sequence.num_read)
        self._scheduler.note_read(len(chunk))
        if sequence.num_read < len(sequence.prompt):
            return []
        if self._state().shortest(sequence.num_read + sequence.limit) > sequence.num_read:
            self._keep(sequence, row)  # a long answer could not be cut back to it
        beginners = self._scheduler.run()
        return self._choose(logits.expand(len(beginners), -1), beginners)

    def _write(self) -> list[tuple[Sequence, Token]]:
        """Read everybody's newest token; the next ones come."""
        running = list(self._scheduler.running)
        newest = [[sequence.tokens[-1].token_id] for sequence in running]
        if self.is_deterministic:
            each = [self._forward([ids], row, row + 1, running[row].num_read) for row, ids in enumerate(newest)]
            logits = torch.cat(each)
        else:
            logits = self._forward(newest, 0, len(running), max(sequence.num_read for sequence in running))
        self._scheduler.note_written()
        return self._choose(logits, running)

    def _forward(self, ids: Several[Several[int]], start: int, stop: int, past: int) -> Tensor:
        """Logits (B, V) after more ids (B, T) in rows start to stop, of which none has more than `past` tokens."""
        if self._rows is None or (start, stop) != self._rows[0]:
            self._rows = (start, stop), self._state().rows(start, stop, past)
        state = self._rows[1]
        state.past = past
        return self.model.next_logits(torch.tensor(ids, device=state.positions.device), state)

    def _choose(self, logits: Tensor, sequences: Several[Sequence]) -> list[tuple[Sequence, Token]]:
        """The next token of each sequence, from its row of logits (B, V)."""
        group = 1 if self.is_deterministic else len(sequences)
        tokens = []
        for start in range(0, len(sequences), group):
            tokens += pick(logits[start : start + group], sequences[start : start + group])
        for sequence, token in zip(sequences, tokens):
            if token.token_id in self.stop_ids and not token.is_forced:
                sequence.finish = "stop"
            else:
                sequence.push(token)
        for sequence in sequences:
            if sequence.finish is not None:
                self._leave(sequence)
        return [(sequence, token) for sequence, token in zip(sequences, tokens) if sequence.finish != "stop"]

    @torch.inference_mode()
    def _leave(self, sequence: Sequence) -> None:
        """A sequence that has ended gives up its place; what was read for it may be of use to another one."""
        if sequence in self._scheduler.running:
            self._keep(sequence, self._scheduler.running.index(sequence))
        self._scheduler.leave(sequence)

    def _keep(self, sequence: Sequence, row: int) -> None:
        """Remember what a row has read."""
        if self.prefixes.max_bytes:
            length = sequence.num_read
            shortest = max(sequence.shortest, self._state().shortest(length))
            self.prefixes.keep(Saved(sequence.ids[:length], self._state().save(row, length), shortest))

    def _state(self) -> DecodeState:
        """The memory of all rows, made when it is first needed."""
        if self._memory is None:
            self._memory = self.model.new_state(self._scheduler.max_rows, self.model.config.sequence_len, PREFILL_CHUNK)
        return self._memory

    @torch.inference_mode()
    def _move(self, source: int, target: int, length: int) -> None:
        """Copy a row of the memory, with so many tokens, onto another one."""
        state = self._state()
        state.load(target, state.row(source, length))

    # Whole texts ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Several[int],
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        num_samples: int = 1,
        hooks: Several[ToolHook] = (),
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[Token]:
        """Yield the tokens of `num_samples` continuations of `prompt` as they come.

        hooks: one per sample, or none. should_stop: asked after every forward, before its tokens are handed out, and
        before the next one; once True, all samples end. So they do when the iterator is closed. Raises as `add`.
        """
        assert len(hooks) in (0, num_samples), "one hook per sample"
        yield from self._all([prompt] * num_samples, max_tokens, sampling, hooks, should_stop)

    def generate_each(
        self,
        prompts: Several[Several[int]],
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        hooks: Several[ToolHook] = (),
    ) -> Iterator[Token]:
        """Like `generate`, for one continuation of each of several prompts; a token's `row` says of which."""
        yield from self._all(prompts, max_tokens, sampling, hooks)

    def _all(
        self,
        prompts: Several[Several[int]],
        max_tokens: int,
        sampling: Sampling,
        hooks: Several[ToolHook],
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[Token]:
        """One sequence per prompt, stepped until all have ended; several such iterators may take turns."""
        assert len(hooks) in (0, len(prompts)), "one hook per sequence"
        sequences: list[Sequence] = []
        try:
            for row, prompt in enumerate(prompts):
                sequences.append(self.add(prompt, max_tokens, sampling, hooks[row] if hooks else None, row))
            told = [0] * len(sequences)
            while True:
                is_over = all(sequence.finish for sequence in sequences)  # and no more tokens come while some are told
                for row, sequence in enumerate(sequences):
                    new, told[row] = sequence.tokens[told[row] :], len(sequence.tokens)
                    yield from new
                if is_over or should_stop():
                    return
                self.step()
                if should_stop():
                    return
        finally:
            for sequence in sequences:
                self.remove(sequence)

    @torch.inference_mode()
    def score(self, ids: Several[int], top_logprobs: int = 0) -> list[Token]:
        """The given text as tokens with log-probabilities; the first has none, for nothing foretells it.

        Reads the whole text at once, outside of the rows. Raises UserError if it is empty or longer than the context.
        """
        context = self.model.config.sequence_len
        if not 0 < len(ids) <= context:
            raise UserError(f"text of {len(ids)} tokens: needs at least 1 and at most the model's context of {context}")
        state = self.model.new_state(1, len(ids), PREFILL_CHUNK)
        tokens = [Token(0, ids[0], is_forced=True)]
        for start in range(1, len(ids), PREFILL_CHUNK):
            targets = ids[start : start + PREFILL_CHUNK]
            before = torch.tensor([ids[start - 1 : start - 1 + len(targets)]], device=state.positions.device)
            told = logprobs(self.model.all_logits(before, state)[0], targets, [top_logprobs] * len(targets))
            tokens += [Token(0, token_id, True, *of_it) for token_id, of_it in zip(targets, told)]
        return tokens
