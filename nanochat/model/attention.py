"""Letter A: causal attention with rotary positions, QK-norm, sliding windows, grouped heads and value embeddings.

Order of operations (pretraining spec 4.2, where keys are not offset): project, add the gated value embedding to v,
rotate q and k, normalise them over the head, scale both by `qk_scale`, offset keys, attend within the layer's window,
project back.

Offset keys: half of each key, the pairs that rotate slowest, is the previous position's. A query for the current token
then finds the position after its last occurrence, so one layer can copy what came next, which otherwise takes two and
is learned late. Known from the speed runs of modded-nanogpt ("partial key offset"); effect here: dev/LOG.md 2026-11-21.
"""

import torch
from torch import Generator, Tensor, nn

from nanochat.config import ModelConfig
from nanochat.kernels.decode import LANES, AttentionCall, Decoder, Matrix
from nanochat.kernels.flash_attention import attention
from nanochat.model.layers import Embedding, Linear, fan_in_bound, is_single_token, rms_norm, shifted, uniform_
from nanochat.model.mixer import LayerContext, LayerCost, Mixer
from nanochat.model.state import KVState, LayerState

GATE_CHANNELS = 12  # the value-embedding gate reads this many leading channels
GATE_SCALE = 3.0  # and ranges from 0 to this


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of each head by minus their angle.

    x: (B, T, H, D); cos, sin: (B or 1, T, 1, D / 2).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def offset(k: Tensor, previous: Tensor) -> Tensor:
    """Keys whose slower half of rotary pairs (D/4 <= i < D/2 of i, i + D/2) is the previous position's. (B, T, H, D)"""
    quarters, earlier = k.chunk(4, dim=-1), previous.chunk(4, dim=-1)
    return torch.cat([quarters[0], earlier[1], quarters[2], earlier[3]], dim=-1)


class Attention(Mixer):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.decoder: tuple[Decoder, AttentionCall] | None = None
        self.value_embedding: Embedding | None = None
        if config.has_value_embedding(layer):
            self.value_embedding = Embedding(config.padded_vocab_size, kv_dim, role="value_embedding")
            self.value_gate = Linear(min(GATE_CHANNELS, config.n_embd), config.n_kv_head)

    def forward(self, x: Tensor, ctx: LayerContext, state: LayerState | None) -> Tensor:
        if self.decoder is not None and isinstance(state, KVState) and is_single_token(x):
            return self._decode(x, ctx, state, *self.decoder)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.c_q, self.c_k, self.c_v)
        )  # (B, T, H or H_kv, D)
        if self.value_embedding is not None:
            v = v + self._gated_values(x, ctx.token_ids)
        cos, sin = ctx.rotary(self.head_dim, self.config.rope_base, x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.config.qk_norm:
            q, k = rms_norm(q) * self.config.qk_scale, rms_norm(k) * self.config.qk_scale
        if self.config.key_offset:
            k = self._offset_keys(k, ctx.positions, state)
        if state is None:
            mixed = ctx.attention(q, k, v, ctx.visibility(self.layer))
        else:
            assert isinstance(state, KVState)
            mixed = self._attend_to_past(q, k, v, ctx, state)
        return self.c_proj(mixed.flatten(2))

    def _attend_to_past(self, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext, state: KVState) -> Tensor:
        """Write k, v (B, T, H_kv, D) into the state, and look at what is in it. Returns (B, T, H, D)."""
        if ctx.past == 0:
            state.begin(k, v)
            return attention(q, k, v, ctx.visibility(self.layer))  # the model's own kernel may compile for each length
        state.append(k, v, ctx.positions)
        visibility = ctx.ring_visibility(self.layer, state.num_slots)
        used = visibility.key_positions.size(1)
        return attention(q, state.keys[:, :used], state.values[:, :used], visibility)

    def use_decoder(self, decoder: Decoder, is_int8: bool) -> None:
        config, names = self.config, ("c_q", "c_k", "c_v", "c_proj")
        if self.head_dim % LANES:
            return
        matrices = [Matrix.of(getattr(self, name).weight, is_int8) for name in names]
        gate = Matrix.of(None if self.value_embedding is None else self.value_gate.weight)
        call = AttentionCall(*matrices, gate, config.n_head, config.n_kv_head, self.head_dim)
        call.window, call.gate_scale, call.has_offset = config.windows[self.layer], GATE_SCALE, config.key_offset
        call.qk_scale = config.qk_scale if config.qk_norm else 0.0
        call.matrices = (*matrices, gate)  # ctypes copies what it is given, and drops what keeps the tensors alive
        self.decoder = decoder, call

    def _decode(self, x: Tensor, ctx: LayerContext, state: KVState, decoder: Decoder, call: AttentionCall) -> Tensor:
        """The same for one token of each row. x: (B, 1, C)."""
        assert state.keys.is_contiguous() and x.is_contiguous()
        embedded = None if self.value_embedding is None else self.value_embedding(ctx.token_ids)
        angles = ctx.rotary(self.head_dim, self.config.rope_base, x.dtype)
        return decoder.attend(call, x, embedded, angles, ctx.positions, state.keys, state.values, state.last_key)

    def _gated_values(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x: (B, T, C), token_ids: (B, T). Returns (B, T, H_kv, D)."""
        assert self.value_embedding is not None
        values = self.value_embedding(token_ids).to(x.dtype).unflatten(-1, (-1, self.head_dim))
        gate = GATE_SCALE * torch.sigmoid(self.value_gate(x[..., : self.value_gate.weight.size(1)]))  # (B, T, H_kv)
        return gate.unsqueeze(-1) * values

    def _offset_keys(self, k: Tensor, positions: Tensor, state: LayerState | None) -> Tensor:
        """k: (B, T, H_kv, D) rotated keys of their own; the last of them stays in the state for the next call."""
        if state is None:
            return offset(k, shifted(k, positions, None))
        assert isinstance(state, KVState)
        mixed = offset(k, shifted(k, positions, state.last_key))
        state.last_key.copy_(k[:, -1])
        return mixed

    def new_state(self, batch: int, max_len: int, max_chunk: int, device: torch.device, dtype: torch.dtype) -> KVState:
        window = self.config.windows[self.layer]
        slots = min(max_len, window + max_chunk)  # the first query of a chunk still sees its whole window
        return KVState.empty(batch, slots, self.config.n_kv_head, self.head_dim, window, device, dtype)

    def init_weights(self, rng: Generator) -> None:
        for projection in (self.c_q, self.c_k, self.c_v):
            uniform_(projection.weight, fan_in_bound(projection.weight), rng)
        nn.init.zeros_(self.c_proj.weight)
        if self.value_embedding is not None:
            uniform_(self.value_embedding.weight, fan_in_bound(self.c_q.weight), rng)
            nn.init.uniform_(self.value_gate.weight, 0.0, 0.02, generator=rng)

    @classmethod
    def cost(cls, config: ModelConfig, layer: int) -> LayerCost:
        kv_dim = config.n_kv_head * config.head_dim
        params = {"matrix": 2 * config.n_embd**2 + 2 * config.n_embd * kv_dim}
        if config.has_value_embedding(layer):
            params["value_embedding"] = config.padded_vocab_size * kv_dim
            params["matrix"] += min(GATE_CHANNELS, config.n_embd) * config.n_kv_head
        keys = min(config.windows[layer], config.sequence_len)
        return LayerCost(params, mixing_flops=12 * config.n_embd * keys)  # 2 products, 2 FLOPs, 3 passes

    def tp_plan(self) -> dict[str, str]:
        plan = {"c_q": "colwise", "c_k": "colwise", "c_v": "colwise", "c_proj": "rowwise"}
        if self.value_embedding is not None:
            plan |= {"value_embedding": "colwise", "value_gate": "colwise"}
        return plan
