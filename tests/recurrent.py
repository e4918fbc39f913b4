"""A tiny recurrent mixer, letter R in tests: proof that nothing in the library assumes attention."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from nanochat.config import ModelConfig
from nanochat.model.layers import Linear, fan_in_bound, uniform_
from nanochat.model.mixer import LayerContext, LayerCost, Mixer
from nanochat.model.state import LayerState


class RecurrentState(LayerState):
    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # (B, C)

    def select(self, rows: Tensor) -> "RecurrentState":
        return RecurrentState(self.memory[rows])

    def join(self, others: "Sequence[RecurrentState]") -> "RecurrentState":
        return RecurrentState(torch.cat([self.memory, *(other.memory for other in others)]))


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
            state.memory = memory
        return self.c_proj(torch.stack(seen, dim=1))

    def new_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        return RecurrentState(torch.zeros(batch, self.channels, device=device, dtype=dtype))

    def init_weights(self, rng: Generator) -> None:
        uniform_(self.c_in.weight, fan_in_bound(self.c_in.weight), rng)
        torch.nn.init.zeros_(self.c_proj.weight)

    @classmethod
    def cost(cls, config: ModelConfig, layer: int) -> LayerCost:
        return LayerCost({"matrix": 2 * config.n_embd**2}, mixing_flops=6 * config.n_embd)

    def tp_plan(self) -> dict[str, str]:
        return {"c_in": "replicate", "c_proj": "replicate"}
