"""`Residual`: how the outputs of the sublayers add up along the depth.

A scheme owns its stream. `expand` makes it from the embeddings, each sublayer `read`s its input from it and `write`s
its output back, `collapse` turns it into the final hidden state. Sublayers are numbered by their site: 2 * layer for
the mixer, 2 * layer + 1 for the MLP. The model's forward knows nothing of what a stream is.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.config import ModelConfig
from nanochat.model.layers import Role


class Residual(Role, ABC):
    """A scheme. Streams are opaque to everybody else."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.roles = {}

    @abstractmethod
    def expand(self, x: Tensor) -> Any:
        """x: (B, T, C) embeddings. Returns the first stream."""

    @abstractmethod
    def read(self, stream: Any, site: int) -> tuple[Any, Tensor]:
        """What `write` will need, and the sublayer's (B, T, C) input."""

    @abstractmethod
    def write(self, carry: Any, output: Tensor, site: int) -> Any:
        """The stream after the sublayer's (B, T, C) output."""

    @abstractmethod
    def collapse(self, stream: Any) -> Tensor:
        """The final (B, T, C) hidden state, before the last norm."""

    @abstractmethod
    def init_weights(self) -> None:
        """Fill every parameter of the scheme (all are constants at the start)."""

    @classmethod
    @abstractmethod
    def cost(cls, config: ModelConfig) -> dict[str, int]:
        """Parameters by role, predicted without building the scheme."""


class PlainResidual(Residual):
    """x + sublayer(x), as in GPT-2. The stream is x."""

    def expand(self, x: Tensor) -> Tensor:
        return x

    def read(self, stream: Tensor, site: int) -> tuple[Tensor, Tensor]:
        return stream, stream

    def write(self, carry: Tensor, output: Tensor, site: int) -> Tensor:
        return carry + output

    def collapse(self, stream: Tensor) -> Tensor:
        return stream

    def init_weights(self) -> None:
        pass

    @classmethod
    def cost(cls, config: ModelConfig) -> dict[str, int]:
        return {}


LambdaStream = tuple[Tensor, Tensor, Tensor]  # x, the embeddings x0, x after the middle layer; each (B, T, C)


class LambdaResidual(Residual):
    """Per-layer scalars on the stream and on the embeddings, and a share of the middle layer taken out at the end.

    Before layer i: x = resid[i] * x + x0[i] * embeddings. At the end: x -= backout * (x after layer L // 2), unless
    `config.backout` is off (pretraining spec 4.2 and 4.3).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.resid = nn.Parameter(torch.empty(config.n_layer))
        self.x0 = nn.Parameter(torch.empty(config.n_layer))
        self.roles = {"resid": "resid_scalar", "x0": "x0_scalar"}
        self.backout = nn.Parameter(torch.empty(1)) if config.backout else None
        if config.backout:
            self.roles["backout"] = "smear"
        self.middle_site = 2 * (config.n_layer // 2) + 1

    def expand(self, x: Tensor) -> LambdaStream:
        return x, x, x

    def read(self, stream: LambdaStream, site: int) -> tuple[LambdaStream, Tensor]:
        x, x0, middle = stream
        layer, is_mlp = divmod(site, 2)
        if not is_mlp:
            x = self.resid[layer].to(x.dtype) * x + self.x0[layer].to(x.dtype) * x0
        return (x, x0, middle), x

    def write(self, carry: LambdaStream, output: Tensor, site: int) -> LambdaStream:
        x, x0, middle = carry
        x = x + output
        return x, x0, x if site == self.middle_site else middle

    def collapse(self, stream: LambdaStream) -> Tensor:
        x, _, middle = stream
        return x if self.backout is None else x - self.backout.to(x.dtype) * middle

    def init_weights(self) -> None:
        layers = torch.arange(self.config.n_layer, dtype=torch.float32) / max(self.config.n_layer - 1, 1)
        with torch.no_grad():
            self.resid.copy_(1.15 - 0.10 * layers)
            self.x0.copy_(0.20 - 0.15 * layers)
            if self.backout is not None:
                self.backout.fill_(0.2)

    @classmethod
    def cost(cls, config: ModelConfig) -> dict[str, int]:
        return {"resid_scalar": config.n_layer, "x0_scalar": config.n_layer, "smear": int(config.backout)}


RESIDUALS: dict[str, type[Residual]] = {"plain": PlainResidual, "lambdas": LambdaResidual}
