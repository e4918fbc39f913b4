"""Small parts of the model: norm, linear, embedding, MLP, and the smear that mixes in the previous token.

Every parameter is born with a role (`wte`, `matrix`, ...), which later decides its optimizer and learning rate. Master
weights stay in fp32; each layer casts them to its input's dtype on use, so there is no autocast anywhere.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nanochat.kernels.decode import MAX_ROWS, Decoder, Matrix
from nanochat.kernels.fp8 import Recipe, fp8_linear

SMEAR_CHANNELS = 24  # the smear gate reads this many leading channels (pretraining spec 4.2)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": lambda x: F.relu(x).square(), "gelu": F.gelu}


def rms_norm(x: Tensor) -> Tensor:
    """x / rms(x) over the last dim, no learnable scale. Any shape."""
    return F.rms_norm(x, (x.size(-1),))


class Role(nn.Module):
    """A module that names the role of each parameter it owns itself, in `self.roles`."""

    roles: dict[str, str]


class Linear(Role):
    """Bias-free projection of the last dim; the weight (out, in) is cast to the input's dtype.

    fp8: how it computes in training, that is in training mode with gradients wanted. It changes nothing else: neither
    evaluation and decoding, nor parameters and their names.
    """

    def __init__(self, in_features: int, out_features: int, role: str = "matrix") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.roles = {"weight": role}
        self.fp8: Recipe | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        if self.fp8 is not None and self.training and torch.is_grad_enabled():
            return fp8_linear(x, self.weight, self.fp8)
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(Role):
    """Table (rows, C) with an fp32 master; looked-up rows are returned as they are stored."""

    def __init__(self, rows: int, channels: int, role: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, channels))
        self.roles = {"weight": role}

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...). Returns (..., C)."""
        return F.embedding(ids, self.weight)


class MLP(nn.Module):
    """C -> 4C -> C with an activation from `ACTIVATIONS`. quick: how it computes single tokens, if not as others."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.c_fc = Linear(channels, 4 * channels)
        self.c_proj = Linear(4 * channels, channels)
        self.activation_name, self.activation = activation, ACTIVATIONS[activation]
        self.quick: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C). Returns (B, T, C)."""
        if self.quick is not None and is_single_token(x):
            return self.quick(x)
        return self.c_proj(self.activation(self.c_fc(x)))

    def use_decoder(self, decoder: Decoder, is_int8: bool) -> None:
        """Compute single tokens with the decoder from now on."""
        fc, proj = (Matrix.of(linear.weight, is_int8) for linear in (self.c_fc, self.c_proj))
        self.quick = lambda x: decoder.mlp(fc, proj, self.activation_name, x)

    def init_weights(self, rng: Generator) -> None:
        uniform_(self.c_fc.weight, 0.4 * fan_in_bound(self.c_fc.weight), rng)
        nn.init.zeros_(self.c_proj.weight)


def is_single_token(x: Tensor) -> bool:
    """Whether x is (B, 1, C) or (B, C) of few rows, and no gradient is wanted."""
    is_single = x.dim() == 2 or x.size(1) == 1
    return is_single and x.size(0) <= MAX_ROWS and not torch.is_grad_enabled()


def shifted(x: Tensor, positions: Tensor, previous: Tensor | None) -> Tensor:
    """What stands one position earlier, 0 at every position 0.

    x: (B, T, ...); positions: (B or 1, T); previous: (B, ...), what stands before x, None at the very start.
    """
    first = torch.zeros_like(x[:, :1]) if previous is None else previous[:, None]
    follows = (positions > 0).view(*positions.shape, *[1] * (x.dim() - 2))
    return torch.cat([first, x[:, :-1]], dim=1) * follows.to(x.dtype)


class Smear(Role):
    """Adds a gated share of the previous token's embedding to each token's own.

    x_t += scale * sigmoid(gate(x_t[:24])) * x_(t-1), where x_(t-1) is the un-smeared embedding; a position 0 has no
    predecessor and stays as it is (pretraining spec 4.2).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = Linear(min(SMEAR_CHANNELS, channels), 1, role="smear")
        self.scale = nn.Parameter(torch.empty(1))
        self.roles = {"scale": "smear"}

    def forward(self, x: Tensor, positions: Tensor, previous: Tensor | None) -> Tensor:
        """x: (B, T, C); positions: (B or 1, T); previous: (B, C), the embedding before x, None at the very start."""
        gate = torch.sigmoid(self.gate(x[..., : self.gate.weight.size(1)]))  # (B, T, 1)
        return x + self.scale.to(x.dtype) * gate * shifted(x, positions, previous)

    def init_weights(self, rng: Generator) -> None:
        nn.init.uniform_(self.gate.weight, 0.0, 0.02, generator=rng)
        nn.init.zeros_(self.scale)


def fan_in_bound(weight: Tensor) -> float:
    """Bound of the uniform distribution whose standard deviation is 1 / sqrt(fan in)."""
    return (3.0 / weight.size(1)) ** 0.5


def uniform_(weight: Tensor, bound: float, rng: Generator) -> None:
    """Fill with uniform(-bound, bound)."""
    nn.init.uniform_(weight, -bound, bound, generator=rng)
