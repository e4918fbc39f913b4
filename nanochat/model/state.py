"""What a model remembers between two calls while it writes.

`DecodeState` holds one state per layer plus the position of each row. A layer reads and extends its own state and never
touches the position: the model advances it, once per call. Rows are independent and each has a position of its own, so
states can be forked (prefill a prompt once, sample many answers), thinned out (drop the rows that are done) and joined
(decode different prompts side by side).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class LayerState(ABC):
    """A layer's memory of its rows."""

    @abstractmethod
    def select(self, rows: Tensor) -> "LayerState":
        """A new state whose row i is a copy of row `rows[i]`. rows: (N,) int64."""

    @abstractmethod
    def join(self, others: "Sequence[Any]") -> "LayerState":
        """A new state with this state's rows, then those of the others, all of one layer."""


class KVState(LayerState):
    """Keys and values of the positions seen so far: slot s of row b holds position s of that row."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, last_key: Tensor, used: int = 0) -> None:
        """keys, values: (B, S, H_kv, D); positions: (B, S), -1 where empty; used: slots that may be filled.

        last_key: (B, H_kv, D), the last position's key of its own, where `ModelConfig.key_offset` mixes it into the
        next one's.
        """
        self.keys, self.values, self.positions, self.last_key, self.used = keys, values, positions, last_key, used

    @classmethod
    def empty(
        cls, batch: int, max_len: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> "KVState":
        shape = (batch, max_len, heads, head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        positions = torch.full((batch, max_len), -1, device=device, dtype=torch.int64)
        return cls(keys, values, positions, last_key=keys.new_zeros(batch, heads, head_dim))

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v (B, T, H_kv, D) at `positions` (B, T); return keys, values and positions up to the last slot."""
        self.used += k.size(1)
        assert self.used <= self.keys.size(1), "the engine must not decode past the state it asked for"
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        self.keys[rows, positions] = k
        self.values[rows, positions] = v
        self.positions[rows, positions] = positions
        return self.keys[:, : self.used], self.values[:, : self.used], self.positions[:, : self.used]

    def select(self, rows: Tensor) -> "KVState":
        return KVState(self.keys[rows], self.values[rows], self.positions[rows], self.last_key[rows], self.used)

    def join(self, others: "Sequence[KVState]") -> "KVState":
        states = [self, *others]
        longest = max(state.keys.size(1) for state in states)
        keys, values, positions = (
            torch.cat([grow(getattr(state, name), longest, fill) for state in states])
            for name, fill in (("keys", 0), ("values", 0), ("positions", -1))
        )
        last_key = torch.cat([state.last_key for state in states])
        return KVState(keys, values, positions, last_key, max(state.used for state in states))


def grow(tensor: Tensor, length: int, fill: int) -> Tensor:
    """`tensor` (B, S, ...) with dim 1 extended to `length` by `fill`."""
    shape = (tensor.size(0), length - tensor.size(1), *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=1)


@dataclass
class DecodeState:
    """Everything needed to continue a row.

    layers: one state per layer. stem: (B, C) un-smeared embedding of the last token, or None before the first one.
    positions: (B,) position of the next token. max_len: positions there is room for.
    """

    layers: list[LayerState]
    positions: Tensor
    max_len: int
    stem: Tensor | None = None

    def fork(self, n: int) -> "DecodeState":
        """n copies of each row, side by side: rows 0..n-1 continue row 0, and so on."""
        rows = torch.arange(self.positions.size(0), device=self.positions.device).repeat_interleave(n)
        return self.select(rows)

    def select(self, rows: Tensor) -> "DecodeState":
        """The given rows only, as copies. rows: (N,) int64."""
        stem = None if self.stem is None else self.stem[rows]
        return DecodeState([layer.select(rows) for layer in self.layers], self.positions[rows], self.max_len, stem)

    def join(self, others: "Sequence[DecodeState]") -> "DecodeState":
        """This state's rows, then those of the others; every one must have seen at least one token."""
        states = [self, *others]
        layers = [first.join([other.layers[i] for other in others]) for i, first in enumerate(self.layers)]
        stems = [state.stem for state in states if state.stem is not None]
        assert len(stems) == len(states), "only states with a past can be joined"
        positions = torch.cat([state.positions for state in states])
        return DecodeState(layers, positions, max(state.max_len for state in states), torch.cat(stems))
