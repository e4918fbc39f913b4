"""The GPT: embeddings with smear, blocks of (mixer, MLP) around a residual scheme, one head.

    token ids -> embedding -> norm -> smear -> [ read, norm, mixer, write, read, norm, MLP, write ] x L
              -> collapse -> norm -> head -> softcap -> logits

The forward has no branch for a layer kind: `MIXERS` and `RESIDUALS` hold the variants. Counts follow from the
configuration alone (`predict_parameters`, `flops_per_token`), so they are the same in every precision.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn

from nanochat.common import UserError, print0
from nanochat.config import ModelConfig
from nanochat.kernels.attention_ladder import AttentionCase, Kernel, choose_attention
from nanochat.kernels.cross_entropy import IGNORED as IGNORED  # a target that is not scored
from nanochat.kernels.cross_entropy import softcapped, summed_loss, token_losses
from nanochat.kernels.decode import LANES, Matrix, find_decoder
from nanochat.kernels.flash_attention import attention as sdpa_attention
from nanochat.kernels.fp8 import Recipe, is_eligible
from nanochat.model.attention import Attention
from nanochat.model.layers import (
    ACTIVATIONS,
    MLP,
    SMEAR_CHANNELS,
    Embedding,
    Linear,
    Role,
    Smear,
    is_single_token,
    rms_norm,
)
from nanochat.model.mixer import LayerContext, Mixer
from nanochat.model.residual import RESIDUALS, Residual
from nanochat.model.state import DecodeState, LayerState

MIXERS: dict[str, type[Mixer]] = {"A": Attention}


class Block(nn.Module):
    """One layer: a mixer and an MLP, each reading from and writing to the residual scheme's stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.mixer = MIXERS[config.layer_letters[layer]](config, layer)
        self.mlp = MLP(config.n_embd, config.mlp_activation)

    def forward(self, stream: object, residual: Residual, ctx: LayerContext, state: LayerState | None) -> object:
        carry, x = residual.read(stream, 2 * self.layer)
        stream = residual.write(carry, self.mixer(rms_norm(x), ctx, state), 2 * self.layer)
        carry, x = residual.read(stream, 2 * self.layer + 1)
        return residual.write(carry, self.mlp(rms_norm(x)), 2 * self.layer + 1)

    def init_weights(self, rng: Generator) -> None:
        self.mixer.init_weights(rng)
        self.mlp.init_weights(rng)


class GPT(nn.Module):
    """A language model over token ids.

    dtype: the compute dtype. Parameters are fp32 masters (float64 when computing in float64, which tests use).
    attention: the kernel for rows that are read whole, see kernels/attention_ladder.py.
    Raises UserError for letters, schemes or activations that no table knows.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, attention: Kernel = sdpa_attention
    ) -> None:
        super().__init__()
        check_tables(config)
        self.config, self.dtype, self.attention = config, dtype, attention
        self.wte = Embedding(config.padded_vocab_size, config.n_embd, role="wte")
        self.smear = Smear(config.n_embd) if config.smear else None
        self.residual = RESIDUALS[config.residual](config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.quick_head: Callable[[Tensor], Tensor] | None = None
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, role="lm_head")
        self.to(torch.promote_types(dtype, torch.float32))
        self.tie()

    def tie(self) -> None:
        """Make head and embedding share one weight if the configuration says so; it learns at the head's rate."""
        if self.config.tied_head:
            self.lm_head.weight, self.lm_head.roles = self.wte.weight, {}
            self.wte.roles = {"weight": "lm_head"}

    def use_fp8(self, recipe: Recipe | None) -> None:
        """Train the layers that gain by it in FP8, the head included; None: no longer. UserError where none does."""
        eligible = [m for m in self.modules() if isinstance(m, Linear) and is_eligible(m.weight)]
        if not eligible:
            raise UserError("--fp8: every layer of this model is too narrow for it (128 at least); leave it out")
        for module in eligible:
            module.fp8 = recipe

    def for_decoding(self, is_int8: bool = False) -> "GPT":
        """Make this model ready to write, and no longer to be trained. Returns it.

        Weights are cast to the compute dtype once instead of at every use, which changes no number. On a CPU in
        float32 single tokens go through kernels/decode.py, with is_int8 through weights of a byte each, which are
        read four times as fast and round each weight to 1/254 of the largest in its row. Raises UserError where int8
        cannot be had; of float32 a warning says so.
        """
        self.requires_grad_(False).to(self.dtype)
        is_plain = (
            self.dtype == torch.float32 and self.wte.weight.device.type == "cpu" and self.config.n_embd % LANES == 0
        )
        decoder, reason = (
            find_decoder() if is_plain else (None, f"not for {self.dtype} on {self.wte.weight.device.type}")
        )
        if decoder is not None:
            for block in self._blocks():
                block.mixer.use_decoder(decoder, is_int8)
                block.mlp.use_decoder(decoder, is_int8)
            matrix = Matrix.of(self.lm_head.weight, is_int8)
            self.quick_head = lambda hidden: decoder.linear(matrix, hidden, self.config.softcap)
        elif is_int8:
            raise UserError(f"int8 weights: {reason}")
        elif is_plain:
            print0(f"warning: single tokens take longer, for {reason}")
        return self

    # Forward -------------------------------------------------------------------------------------------------------

    def hidden(self, token_ids: Tensor, document_ids: Tensor | None = None, state: DecodeState | None = None) -> Tensor:
        """Final hidden states (B, T, C) of token_ids (B, T).

        document_ids: (B, T), used only under `config.doc_mask`. state: continue its rows and advance them by T.
        """
        ctx = self._context(token_ids, document_ids, state)
        x = rms_norm(self.wte(token_ids).to(self.dtype))  # (B, T, C)
        if self.smear is not None:
            x = self.smear(x, ctx.positions, None if state is None else rms_norm(self.wte(state.last_ids).to(x.dtype)))
        stream = self.residual.expand(x)
        for block, layer_state in zip(self.blocks, [None] * len(self.blocks) if state is None else state.layers):
            stream = block(stream, self.residual, ctx, layer_state)
        if state is not None:
            state.advance(token_ids)
        return rms_norm(self.residual.collapse(stream))

    def head(self, hidden: Tensor) -> Tensor:
        """Softcapped logits (..., V) of hidden states (..., C), in fp32 or better."""
        if self.quick_head is not None and is_single_token(hidden):
            return self.quick_head(hidden)[..., : self.config.vocab_size]
        return softcapped(self.lm_head(hidden)[..., : self.config.vocab_size], self.config.softcap)

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of every position of token_ids (B, T)."""
        return self.head(self.hidden(token_ids, document_ids))

    def next_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor:
        """Logits (B, V) after the last of token_ids (B, T), which extend the rows of `state`."""
        return self.head(self.hidden(token_ids, state=state)[:, -1])

    def all_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor:
        """Logits (B, T, V) after each of token_ids (B, T), which extend the rows of `state`."""
        return self.head(self.hidden(token_ids, state=state))

    def token_losses(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of every target (B, T); 0 where the target is ignored. inputs: (B, T)."""
        hidden = self.hidden(inputs, document_ids).flatten(0, 1)  # (B * T, C)
        losses = token_losses(hidden, targets.flatten(), self.lm_head, self.config.vocab_size, self.config.softcap)
        return losses.view_as(targets)

    def loss(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Summed nats of all targets, a scalar. Dividing by their number is the training step's job."""
        hidden = self.hidden(inputs, document_ids).flatten(0, 1)  # (B * T, C)
        return summed_loss(hidden, targets.flatten(), self.lm_head, self.config.vocab_size, self.config.softcap)

    def _context(self, token_ids: Tensor, document_ids: Tensor | None, state: DecodeState | None) -> LayerContext:
        documents = document_ids if self.config.doc_mask and state is None else None
        steps = torch.arange(token_ids.size(1), device=token_ids.device)[None]  # (1, T)
        if state is not None:
            positions = state.positions[:, None] + steps
        elif documents is not None:
            positions = positions_in_documents(documents)
        else:
            positions = steps
        past = 0 if state is None else state.past
        return LayerContext(token_ids, positions, documents, self.config.windows, self.attention, past)

    # State and weights ---------------------------------------------------------------------------------------------

    def new_state(self, batch: int, max_len: int, max_chunk: int | None = None) -> DecodeState:
        """An empty decode state for `batch` rows of at most `max_len` positions.

        max_chunk: the most tokens of a row in one forward, else any number; the fewer, the less memory windows need.
        """
        device, chunk = self.wte.weight.device, max_chunk or max_len
        layers = [block.mixer.new_state(batch, max_len, chunk, device, self.dtype) for block in self._blocks()]
        positions, last_ids = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        return DecodeState(layers, positions, last_ids)

    def init_weights(self, seed: int) -> None:
        """Fill every parameter (pretraining spec 4.3). The same seed and device give the same weights."""
        rng = torch.Generator(device=self.wte.weight.device).manual_seed(seed)
        std = 0.02 if self.config.tied_head else 0.8  # tied: as a head it must start with small logits
        nn.init.normal_(self.wte.weight, std=std, generator=rng)
        if not self.config.tied_head:
            nn.init.normal_(self.lm_head.weight, std=0.001, generator=rng)
        if self.smear is not None:
            self.smear.init_weights(rng)
        self.residual.init_weights()
        for block in self._blocks():
            block.init_weights(rng)

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    # Counts --------------------------------------------------------------------------------------------------------

    def parameter_roles(self) -> dict[str, str]:
        """Role of every parameter by its name; each parameter has exactly one."""
        roles: dict[str, str] = {}
        for path, module in self.named_modules():
            if isinstance(module, Role):
                roles |= {f"{path}.{name}".lstrip("."): role for name, role in module.roles.items()}
        names = {name for name, _ in self.named_parameters()}
        assert roles.keys() == names, f"parameters and roles differ: {sorted(roles.keys() ^ names)}"
        return roles

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by role, counted on the built model."""
        counts: Counter[str] = Counter()
        sizes = {name: parameter.numel() for name, parameter in self.named_parameters()}
        for name, role in self.parameter_roles().items():
            counts[role] += sizes[name]
        return dict(counts)

    def flops_per_token(self) -> int:
        """Training FLOPs per token, see `flops_per_token`."""
        return flops_per_token(self.config)


def check_tables(config: ModelConfig) -> None:
    """Raise UserError where the configuration names something that no table has."""
    unknown = "".join(sorted(set(config.layer_letters) - set(MIXERS)))
    if unknown:
        known = ", ".join(MIXERS)
        raise UserError(f"--layer-pattern={config.layer_pattern}: unknown letters {unknown!r}; known are {known}")
    for value, table, name in (
        (config.residual, RESIDUALS, "--residual"),
        (config.mlp_activation, ACTIVATIONS, "--mlp-activation"),
    ):
        if value not in table:
            raise UserError(f"{name}={value}: unknown; known are {', '.join(table)}")


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Position of each token within its run of equal ids. document_ids: (B, T). Returns (B, T) int64."""
    steps = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(dim=1).values


def predict_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by role, from the configuration alone. Equals `GPT(config).parameter_counts()`."""
    check_tables(config)
    table = config.padded_vocab_size * config.n_embd
    counts = Counter({"lm_head": table, "wte": 0 if config.tied_head else table})
    if config.smear:
        counts["smear"] += min(SMEAR_CHANNELS, config.n_embd) + 1
    counts.update(RESIDUALS[config.residual].cost(config))
    for layer, letter in enumerate(config.layer_letters):
        counts.update(MIXERS[letter].cost(config, layer).params)
        counts["matrix"] += 8 * config.n_embd**2  # the MLP
    return {role: count for role, count in counts.items() if count}


def scaling_parameters(config: ModelConfig) -> int:
    """N of the scaling laws: block matrices plus head (pretraining spec 4.5)."""
    counts = predict_parameters(config)
    return counts["matrix"] + counts["lm_head"]


def flops_per_token(config: ModelConfig) -> int:
    """Training FLOPs per token: 6 per weight of every linear layer, plus what the mixers add (pretraining spec 4.5)."""
    linear = scaling_parameters(config) + (min(SMEAR_CHANNELS, config.n_embd) if config.smear else 0)
    mixing = sum(MIXERS[letter].cost(config, layer).mixing_flops for layer, letter in enumerate(config.layer_letters))
    return 6 * linear + mixing


def attention_case(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionCase:
    """What a model of this configuration asks of its attention kernel."""
    has_windows = min(config.windows) < config.sequence_len - 1
    groups = config.n_head // config.n_kv_head
    return AttentionCase(device, dtype, config.head_dim, groups, has_windows, config.doc_mask)


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, attention: Kernel | None = None) -> GPT:
    """A model on `device` whose weights hold whatever the memory held; never more than one copy of it exists.

    attention: without one, the kernels are tried now (`choose_attention`), once per process and kind of model.
    """
    kernel = attention or choose_attention(attention_case(config, device, dtype)).kernel
    with torch.device("meta"):
        model = GPT(config, dtype, kernel)
    model.to_empty(device=device)
    model.tie()  # to_empty gives every module a tensor of its own
    return model


def build_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 42, attention: Kernel | None = None
) -> GPT:
    """A model with fresh weights on `device`; attention: as in `empty_model`."""
    model = empty_model(config, device, dtype, attention)
    model.init_weights(seed)
    return model
