"""`Mixer`: the slot for a layer that mixes information along the sequence, and what it may read.

Attention is the first mixer. Others (a state-space layer, sparse attention) are new files with a class of their own
and one letter in `nanochat.model.gpt.MIXERS`; nothing else in the model knows which kind sits in a block.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from nanochat.config import ModelConfig
from nanochat.kernels.attention_ladder import Kernel
from nanochat.kernels.decode import Decoder
from nanochat.kernels.flash_attention import Visibility, attention
from nanochat.model.state import LayerState


@dataclass
class LayerContext:
    """What any layer may read besides its input; built once per forward.

    token_ids: (B, T). positions: (B or 1, T), restarting at each document under document masks.
    document_ids: (B, T) when document masks are on, else None. windows: per layer, see `ModelConfig.windows`.
    past: with a decode state, at least as many tokens as any of its rows has behind it.
    attention: the kernel for tokens that look at each other, not at a cache.
    """

    token_ids: Tensor
    positions: Tensor
    document_ids: Tensor | None
    windows: tuple[int, ...]
    attention: Kernel = attention
    past: int = 0
    _visibility: dict[object, Visibility] = field(default_factory=dict, repr=False)
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def visibility(self, layer: int) -> Visibility:
        """Who sees whom among the tokens of this forward (no cache), shared by layers of one window."""
        window = self.windows[layer]
        if window not in self._visibility:
            self._visibility[window] = Visibility(
                self.positions, self.positions, window, self.document_ids, is_row=True
            )
        return self._visibility[window]

    def ring_visibility(self, layer: int, num_slots: int) -> Visibility:
        """Who of this forward's tokens, already written, sees which of a layer's slots, as many as can be filled.

        Slot s holds the last position that has come by and leaves the remainder s.
        """
        window, used = self.windows[layer], min(num_slots, self.past + self.token_ids.size(1))
        if (window, num_slots) not in self._visibility:
            last = self.positions[:, -1:]  # (B, 1)
            slots = torch.arange(used, device=last.device)
            self._visibility[window, num_slots] = Visibility(self.positions, last - (last - slots) % num_slots, window)
        return self._visibility[window, num_slots]

    def rotary(self, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of each position's angles, (B or 1, T, 1, D / 2), computed in fp32 or better."""
        if (head_dim, base) not in self._rotary:
            exact = torch.promote_types(dtype, torch.float32)
            exponents = torch.arange(0, head_dim, 2, device=self.positions.device, dtype=exact) / head_dim
            angles = self.positions.to(exact)[:, :, None, None] * base**-exponents
            self._rotary[head_dim, base] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._rotary[head_dim, base]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs by its configuration alone.

    params: parameters by role. mixing_flops: training FLOPs per token beyond 6 per matrix weight (scores, scans).
    """

    params: dict[str, int]
    mixing_flops: int


class Mixer(nn.Module, ABC):
    """A sequence layer: (B, T, C) to (B, T, C), causal, with a state for decoding."""

    @abstractmethod
    def forward(self, x: Tensor, ctx: LayerContext, state: LayerState | None) -> Tensor:
        """x: (B, T, C) normalised input. With a state, x continues the rows it remembers, and extends it in place."""

    @abstractmethod
    def new_state(
        self, batch: int, max_len: int, max_chunk: int, device: torch.device, dtype: torch.dtype
    ) -> LayerState:
        """An empty state with room for `max_len` positions, which come in at most `max_chunk` at a time."""

    def use_decoder(self, decoder: Decoder, is_int8: bool) -> None:
        """Compute single tokens with the decoder from now on; a mixer that cannot stays as it is."""

    @abstractmethod
    def init_weights(self, rng: Generator) -> None:
        """Fill every parameter of this layer."""

    @classmethod
    @abstractmethod
    def cost(cls, config: ModelConfig, layer: int) -> LayerCost:
        """Parameters and FLOPs of this layer, predicted without building it."""

    @abstractmethod
    def tp_plan(self) -> dict[str, str]:
        """How each projection is cut over tensor-parallel ranks: submodule name -> colwise, rowwise or replicate."""
