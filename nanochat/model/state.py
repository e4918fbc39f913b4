"""What a model remembers while it writes: rows of memory, one for each text in the making.

`DecodeState` has one `LayerState` per layer, the position of each row's next token, and the token before that. Rows are
independent, each with a position of its own. The memory is allocated once, for a number of rows, and everything works
on it in place, so that no row costs another one a copy: a layer writes what is new into it, `rows` gives neighbouring
rows as a state that shares their memory, `start` makes a row ready for another text, `save` and `load` take one text
out and put it back, and `cut` takes back its end.

A layer may keep less than all that a row has seen. Attention with a window keeps a ring of slots, position p in slot
p modulo the number of slots, so that new positions overwrite those that no query can see any more. That is why a cut
cannot always go back as far as one would like: `shortest` says how far.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State", bound="LayerState")


@dataclass
class LayerState(ABC):
    """A layer's memory of its rows. In every field that is a tensor the rows are the first dim."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def changed(self: State, change: Callable[[Tensor], Tensor]) -> State:
        """This state with other tensors in its fields."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def rows(self: State, start: int, stop: int) -> State:
        """Rows start to stop, sharing their memory."""
        return self.changed(lambda tensor: tensor[start:stop])

    def row(self: State, row: int, length: int) -> State:
        """One row, sharing its memory: at least what its first `length` tokens left."""
        return self.rows(row, row + 1)

    def load(self: State, row: int, saved: State) -> None:
        """Make a row what `saved`, the state of one row, is."""
        for mine, theirs in zip(self.tensors().values(), saved.tensors().values()):
            mine[row].copy_(theirs[0])

    def start(self, row: int) -> None:
        """Make a row ready for its position 0, so that nothing is left of the text before."""
        for tensor in self.tensors().values():
            tensor[row].zero_()

    def shortest(self, length: int) -> int:
        """The fewest tokens that a row of `length` can be cut to."""
        return length

    @abstractmethod
    def cut(self, row: int, length: int) -> None:
        """Forget a row's tokens from position `length` on; never asked to go below `shortest`."""


@dataclass
class KVState(LayerState):
    """Keys and values (B, R, H_kv, D) of the last positions of each row: position p is in slot p % R.

    last_key: (B, H_kv, D), the last position's key of its own, where `ModelConfig.key_offset` mixes it into the next
    one's. window: how many positions back a query looks.
    """

    keys: Tensor
    values: Tensor
    last_key: Tensor
    window: int

    @classmethod
    def empty(
        cls, batch: int, slots: int, heads: int, head_dim: int, window: int, device: torch.device, dtype: torch.dtype
    ) -> "KVState":
        keys, values = (torch.zeros(batch, slots, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
        return cls(keys, values, keys.new_zeros(batch, heads, head_dim), window)

    @property
    def num_slots(self) -> int:
        return self.keys.size(1)

    def begin(self, k: Tensor, v: Tensor) -> None:
        """Write k, v (B, T, H_kv, D) at positions 0 to T - 1."""
        self.keys[:, : k.size(1)] = k
        self.values[:, : v.size(1)] = v

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write k, v (B, T, H_kv, D) at `positions` (B, T)."""
        slots = positions % self.num_slots
        rows = torch.arange(k.size(0), device=k.device)[:, None]
        self.keys[rows, slots] = k
        self.values[rows, slots] = v

    def row(self, row: int, length: int) -> "KVState":
        one = self.rows(row, row + 1)
        return replace(one, keys=one.keys[:, :length], values=one.values[:, :length])

    def load(self, row: int, saved: "KVState") -> None:
        self.keys[row, : saved.num_slots] = saved.keys[0]
        self.values[row, : saved.num_slots] = saved.values[0]
        self.last_key[row] = saved.last_key[0]

    def start(self, row: int) -> None:
        """Nothing to do: a slot counts from when its position is reached."""

    def shortest(self, length: int) -> int:
        """As long as nothing is overwritten that the window of the next position reaches."""
        return 0 if length <= self.num_slots else length - (self.num_slots - self.window)

    def cut(self, row: int, length: int) -> None:
        self.last_key[row] = self.keys[row, length % self.num_slots]  # the half of it that is used: the offset one


@dataclass
class DecodeState:
    """Everything needed to continue some rows.

    layers: one state per layer. positions: (B,) position of the next token. last_ids: (B,) the token before it, of no
    meaning at position 0. past: no row has more tokens than this, which tells how many slots need to be looked at.
    """

    layers: list[LayerState]
    positions: Tensor
    last_ids: Tensor
    past: int = 0

    def advance(self, token_ids: Tensor) -> None:
        """Every row has read its token_ids (B, T)."""
        self.positions += token_ids.size(1)
        self.last_ids.copy_(token_ids[:, -1])
        self.past += token_ids.size(1)

    def rows(self, start: int, stop: int, past: int) -> "DecodeState":
        """Rows start to stop, none with more than `past` tokens, sharing their memory."""
        layers = [layer.rows(start, stop) for layer in self.layers]
        return DecodeState(layers, self.positions[start:stop], self.last_ids[start:stop], past)

    def row(self, row: int, length: int) -> "DecodeState":
        """A row of `length` tokens, sharing its memory."""
        layers = [layer.row(row, length) for layer in self.layers]
        return DecodeState(layers, self.positions[row : row + 1], self.last_ids[row : row + 1], length)

    def save(self, row: int, length: int) -> "DecodeState":
        """A copy of a row of `length` tokens."""
        one = self.row(row, length)
        layers = [layer.changed(torch.clone) for layer in one.layers]
        return DecodeState(layers, one.positions.clone(), one.last_ids.clone(), length)

    def load(self, row: int, saved: "DecodeState") -> None:
        """Make a row what was saved of one, or a `row` other than itself."""
        for mine, theirs in zip(self.layers, saved.layers):
            mine.load(row, theirs)
        self.positions[row] = saved.positions[0]
        self.last_ids[row] = saved.last_ids[0]

    def start(self, row: int) -> None:
        """Make a row ready for a text from its beginning."""
        for layer in self.layers:
            layer.start(row)
        self.positions[row] = self.last_ids[row] = 0

    def shortest(self, length: int) -> int:
        """The fewest tokens that a row of `length` can be cut to."""
        return max((layer.shortest(length) for layer in self.layers), default=0)

    def cut(self, row: int, length: int, last_id: int) -> None:
        """Forget a row's tokens from position `length` on, of which `last_id` is the one before."""
        for layer in self.layers:
            layer.cut(row, length)
        self.positions[row] = length
        self.last_ids[row] = last_id

    def num_bytes(self) -> int:
        """Of all tensors."""
        held = [tensor for layer in self.layers for tensor in layer.tensors().values()]
        return sum(tensor.nbytes for tensor in [*held, self.positions, self.last_ids])
