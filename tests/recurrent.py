"""A tiny recurrent mixer, letter R in tests: proof that nothing in the library assumes attention."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nanochat.config import ModelConfig
from nanochat.model.layers import Linear, fan_in_bound, uniform_
from nanochat.model.mixer import LayerContext, LayerCost, Mixer
from nanochat.model.state import LayerState


@dataclass
class RecurrentState(LayerState):
    """What it remembers of a text's beginning is gone, so it cannot be cut."""

    memory: Tensor  # (B, C)

    def cut(self, row: int, length: int) -> None:
        raise AssertionError("cannot go back")


class TinyRecurrent(Mixer):
    """memory = decay * memory + c_in(x); out = c_proj(memory). Forgets everything where a document begins."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.channels = config.n_embd
        self.c_in = Linear(config.n_embd, config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, ctx: LayerContext, state: LayerState | None) -> Tensor:
        decay = torch.linspace(0.3, 0.9, self.channels, dtype=x.dtype, device=x.device)
        memory = state.memory if isinstance(state, RecurrentState) else x.new_zeros(x.size(0), self.channels)
        keeps = (ctx.positions > 0).to(x.dtype).expand(x.size(0), -1)  # (B, T)
        seen = []
        for t, update in enumerate(self.c_in(x).unbind(1)):
            memory = decay * memory * keeps[:, t, None] + update
            seen.append(memory)
        if isinstance(state, RecurrentState):
            state.memory.copy_(memory)
        return self.c_proj(torch.stack(seen, dim=1))

    def new_state(
        self, batch: int, max_len: int, max_chunk: int, device: torch.device, dtype: torch.dtype
    ) -> RecurrentState:
        return RecurrentState(torch.zeros(batch, self.channels, device=device, dtype=dtype))

    def init_weights(self, rng: Generator) -> None:
        uniform_(self.c_in.weight, fan_in_bound(self.c_in.weight), rng)
        torch.nn.init.zeros_(self.c_proj.weight)

    @classmethod
    def cost(cls, config: ModelConfig, layer: int) -> LayerCost:
        return LayerCost({"matrix": 2 * config.n_embd**2}, mixing_flops=6 * config.n_embd)

    def tp_plan(self) -> dict[str, str]:
        return {"c_in": "replicate", "c_proj": "replicate"}
