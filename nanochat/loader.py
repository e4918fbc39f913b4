"""Rows become batches: pretraining, validation and conversations.

All three loaders share one idea: there is one global stream of rows, the same on every rank and for every world size.
A global micro-batch is the next `world_size * batch_size` rows, and rank r gets the r-th `batch_size` of them. So the
position in the stream says nothing about ranks, and a run stopped on 8 of them goes on exactly on 2.

A row has `sequence_len + 1` tokens; the first `sequence_len` are inputs, the last are targets. A target of -1 is
ignored. `document_ids` numbers the documents within a row, so that attention can stay within one; padding counts as
one more document.

Pretraining (`PretrainLoader`, endless). Every epoch shuffles the order of the blocks and the documents in each block,
and packs all of them ("cut": see packing); the last rows are packed from what still waits, so every epoch holds every
token as a target exactly once, and only its last row may be padded much. Rows leave in shuffled windows of four
million tokens (see windows); a state is where the window began and the place in it. The last token of a document has
the BOS behind it as its target: that is how a model learns where texts end.

Validation (`validation_batches`, one pass). The first `max_tokens` tokens in file order, each scored exactly once,
whatever the batch size, sequence length and number of ranks. BOS stands for no bytes and is never a target.

Conversations (`ConversationLoader`, endless). Each is rendered and cut to a row once; those without a supervised token
left are dropped. Per epoch they are shuffled, packed whole ("pad"), and the finished rows are shuffled again, since
the packer's choice by length would otherwise leave short ones for last. Every row, hence every micro-batch of every
rank, has a supervised target.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.chat import Conversation, check_conversation, render_conversation
from nanochat.common import UserError, print0
from nanochat.dataset import Split
from nanochat.packing import BestFitPacker, Row, chop
from nanochat.tokenizer import Tokenizer
from nanochat.windows import TOKENIZE_DOCUMENTS, Windows

WINDOW_TOKENS = 2**22  # rows of so many tokens are shuffled among each other: 17 MB, an epoch of the Python library


@dataclass(frozen=True)
class Batch:
    """inputs, targets: (B, T) int64, a target of -1 is ignored; document_ids: (B, T) int32, 0, 1, ... in each row."""

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor
    target_count: int | None = None  # if counted already, on the CPU: to ask a GPU is to wait for it

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`, itself if it is there. `prefetch` brings it without making anybody wait."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with each of its tensors changed; `change` must keep the number of targets."""
        return Batch(change(self.inputs), change(self.targets), change(self.document_ids), self.target_count)

    def num_targets(self) -> int:
        """Targets that count."""
        return int((self.targets >= 0).sum()) if self.target_count is None else self.target_count


def batch_of(rows: Sequence[Row], batch_size: int, capacity: int, pad: int) -> Batch:
    """Up to `batch_size` rows as a batch (B, T = capacity - 1); rows that are missing hold padding only."""
    ids = np.full((batch_size, capacity), pad, dtype=np.int64)
    mask = np.zeros((batch_size, capacity), dtype=bool)
    document_ids = np.zeros((batch_size, capacity), dtype=np.int32)
    for b, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row.pieces):
            end = start + len(piece)
            ids[b, start:end] = piece.ids
            mask[b, start:end] = True if piece.mask is None else piece.mask
            document_ids[b, start:end] = number
            start = end
        document_ids[b, start:] = len(row.pieces)
    targets = np.where(mask[:, 1:], ids[:, 1:], -1)
    inputs = np.ascontiguousarray(ids[:, :-1])
    documents = np.ascontiguousarray(document_ids[:, :-1])
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(documents))


class _RankRows:
    """Which rows of the global stream are this rank's, and how they become its batch."""

    def __init__(self, batch_size: int, sequence_len: int, rank: int, world_size: int, pad: int) -> None:
        assert batch_size > 0 and sequence_len > 0 and 0 <= rank < world_size
        self.capacity = sequence_len + 1
        self._rank, self._world_size, self._pad = rank, world_size, pad
        self.resize(batch_size)

    def resize(self, batch_size: int) -> None:
        """Other rows become this rank's, by the same rule."""
        self.batch_size = batch_size
        self.global_rows = batch_size * self._world_size
        self._mine = slice(self._rank * batch_size, (self._rank + 1) * batch_size)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """This rank's part of a global micro-batch."""
        return batch_of(rows[self._mine], self.batch_size, self.capacity, self._pad)


def _check_same(state: dict[str, Any], own: dict[str, Any]) -> None:
    """A state continues only where data, seed, tokenizer and sequence length are those it was saved with."""
    for key, value in own.items():
        if state.get(key) != value:
            raise UserError(
                f"cannot continue the data stream: {key.replace('_', ' ')} was {state.get(key)!s:.16} when the "
                f"checkpoint was saved and is {value!s:.16} now; use the same one, or start a new run"
            )


# Pretraining ---------------------------------------------------------------------------------------------------


class PretrainLoader:
    """Endless batches over a split's documents. `epoch` counts from 0."""

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self._rank_rows = _RankRows(batch_size, sequence_len, rank, world_size, tokenizer.bos)
        self._identity = {
            "loader": "pretrain",
            "data": split.fingerprint(),
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "sequence_len": sequence_len,
            "window_tokens": WINDOW_TOKENS,
        }
        self._windows = Windows(split, tokenizer, sequence_len + 1, seed, WINDOW_TOKENS)
        self._window: list[Row] = []
        self._row = 0  # place in the window
        self._draws_ahead = True  # the next window
        self._window_start = self._windows.position()

    @property
    def epoch(self) -> int:
        return int(self._window_start["epoch"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._rank_rows.batch([self._next_row() for _ in range(self._rank_rows.global_rows)])

    def resize(self, batch_size: int) -> None:
        """Batches of so many rows from now on; the stream of rows is the same."""
        self._rank_rows.resize(batch_size)

    def state(self) -> dict[str, Any]:
        """Where the current window of rows began, and the place in it; independent of ranks and batch size.

        Cheap, and good for ever: nothing that it refers to is changed by what is drawn later.
        """
        return {**self._identity, **self._window_start, "row": self._row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state()` was taken: draw the same window again."""
        _check_same(state, self._identity)
        self._windows.go_back(state)
        self._window_start, self._window, self._row = self._windows.position(), [], 0
        if state["row"]:
            self._take_window()
            self._row = int(state["row"])

    def _next_row(self) -> Row:
        if self._row == len(self._window):
            self._take_window()
        if self._draws_ahead:
            try:
                self._draws_ahead = self._windows.draw_row()
            except UserError:  # the rows before the fault come first; `take` meets it again
                self._draws_ahead = False
        self._row += 1
        return self._window[self._row - 1]

    def _take_window(self) -> None:
        self._window_start, self._window = self._windows.take()
        self._row, self._draws_ahead = 0, True


# Validation ----------------------------------------------------------------------------------------------------


def validation_batches(
    split: Split,
    tokenizer: Tokenizer,
    batch_size: int,
    sequence_len: int,
    max_tokens: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """One pass over the first `max_tokens` tokens. Every rank gets equally many batches; the last may be empty."""
    rank_rows = _RankRows(batch_size, sequence_len, rank, world_size, tokenizer.bos)
    rows = _validation_rows(split, tokenizer, rank_rows.capacity, max_tokens)
    while global_batch := list(islice(rows, rank_rows.global_rows)):
        yield rank_rows.batch(global_batch)


def _validation_rows(split: Split, tokenizer: Tokenizer, capacity: int, max_tokens: int) -> Iterator[Row]:
    """Documents packed whole, or chopped where longer than a row; padding is cheaper here than cut context."""
    packer = BestFitPacker(capacity, "pad", bos=tokenizer.bos)
    for ids in _first_tokens(split, tokenizer, max_tokens):
        for piece in chop(ids, capacity, tokenizer.bos, mask=[0] + [1] * (len(ids) - 1)):
            packer.push(piece.ids, piece.mask)
        while packer.is_full:
            yield packer.next_row()
    yield from packer.flush()


def _first_tokens(split: Split, tokenizer: Tokenizer, max_tokens: int) -> Iterator[list[int]]:
    """Documents, each behind a BOS, until they hold `max_tokens` tokens (BOS not counted); the last is shortened."""
    left = max_tokens
    documents = split.documents()
    while left > 0 and (texts := list(islice(documents, TOKENIZE_DOCUMENTS))):
        for ids in tokenizer.encode_batch(texts, prepend=tokenizer.bos):
            if left > 0:
                yield ids[: left + 1]
                left -= min(left, len(ids) - 1)
    if left == max_tokens:
        where = ", ".join(source.path.name for source in split.sources[:3])
        raise UserError(f"{where}: no text to validate on (of at most {max_tokens} tokens); give more text")


# Conversations -------------------------------------------------------------------------------------------------


class Conversations(Protocol):
    """A list of conversations, or a task."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Conversation: ...


class ConversationLoader:
    """Endless batches over conversations. `epoch` and `row` count from 0, `num_dropped` are those left out."""

    def __init__(
        self,
        conversations: Conversations,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        self._rank_rows = _RankRows(batch_size, sequence_len, rank, world_size, tokenizer.bos)
        self._seed = seed
        self._bos = tokenizer.bos
        self._rendered = _render_supervised(conversations, tokenizer, sequence_len + 1)
        self.num_dropped = len(conversations) - len(self._rendered)
        if self.num_dropped:
            print0(
                f"note: {self.num_dropped} of {len(conversations)} conversations have no token to learn within "
                f"{sequence_len + 1} tokens and are left out"
            )
        digest = hashlib.sha256()
        for ids, mask in self._rendered:
            digest.update(ids)
            digest.update(mask)
        self.fingerprint = digest.hexdigest()  # of everything that is learned, as tokens
        self._identity = {
            "loader": "conversations",
            "data": self.fingerprint,
            "seed": seed,
            "sequence_len": sequence_len,
        }
        self._go_to(epoch=0, row=0)

    @property
    def num_rows(self) -> int:
        """Rows of the current epoch."""
        return len(self._epoch_rows)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._rank_rows.batch([self._next_row() for _ in range(self._rank_rows.global_rows)])

    def one_pass(self, max_tokens: int) -> Iterator[Batch]:
        """Rows of the current epoch from its start, about `max_tokens` tokens; as many batches on every rank."""
        rows = self._epoch_rows[: -(-max_tokens // (self._rank_rows.capacity - 1))]
        for start in range(0, len(rows), self._rank_rows.global_rows):
            yield self._rank_rows.batch(rows[start : start + self._rank_rows.global_rows])

    def resize(self, batch_size: int) -> None:
        """Batches of so many rows from now on; the stream of rows is the same."""
        self._rank_rows.resize(batch_size)

    def state(self) -> dict[str, Any]:
        """Position; independent of rank, world size and batch size."""
        return {**self._identity, "epoch": self.epoch, "row": self.row}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state()` was taken."""
        _check_same(state, self._identity)
        self._go_to(int(state["epoch"]), int(state["row"]))

    def _go_to(self, epoch: int, row: int) -> None:
        """Pack an epoch and stand before one of its rows."""
        self.epoch = epoch
        self.row = row
        random = Random(f"{self._seed} {epoch}")
        order = list(range(len(self._rendered)))
        random.shuffle(order)
        packer = BestFitPacker(self._rank_rows.capacity, "pad", bos=self._bos)
        self._epoch_rows: list[Row] = []
        for index in order:
            packer.push(*self._rendered[index])
            if packer.is_full:
                self._epoch_rows.append(packer.next_row())
        self._epoch_rows.extend(packer.flush())
        random.shuffle(self._epoch_rows)

    def _next_row(self) -> Row:
        if self.row == self.num_rows:
            self._go_to(self.epoch + 1, 0)
        self.row += 1
        return self._epoch_rows[self.row - 1]


def _render_supervised(
    conversations: Conversations, tokenizer: Tokenizer, max_tokens: int
) -> list[tuple["array[int]", "array[int]"]]:
    """(ids, mask) of every conversation that has a supervised token, cut to `max_tokens`. The first is no target."""
    rendered = []
    for index in range(len(conversations)):
        conversation = conversations[index]
        check_conversation(conversation, f"conversation {index} (from 0)")
        ids, mask = render_conversation(tokenizer, conversation, max_tokens=max_tokens)
        if any(mask[1:]):
            rendered.append((array("i", ids), array("B", mask)))
    if not rendered:
        raise UserError(
            f"none of the {len(conversations)} conversations has a token to learn within {max_tokens} tokens; give "
            "conversations with answers of the assistant, or allow longer sequences"
        )
    return rendered
