"""`ModelConfig`: everything needed to rebuild a model, saved beside its weights.

The configuration is frozen and flat. What follows from it (head width, padded vocabulary, each layer's letter and
window) is a property, so it can never disagree with the fields. This module never imports torch.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from nanochat.common import UserError

VOCAB_MULTIPLE = 64  # embedding and head rows are padded to this: tensor cores and 2 to 64-way sharding divide it
WINDOW_MULTIPLE = 128  # short windows are rounded up to the attention kernels' block

RESIDUALS = ("plain", "lambdas")  # the names of model.residual.RESIDUALS, which needs torch
ACTIVATIONS = ("relu2", "gelu")  # and of model.layers.ACTIVATIONS
COUNT_FLAGS = {"sequence_len": "--max-seq-len", "vocab_size": "--vocab-size", "n_layer": "--depth"}
WIDTHS = ("n_head", "n_kv_head", "n_embd")
EVEN_HEAD_DIM = "must be even: rotary positions turn pairs of channels"


def layer_pattern(text: str) -> str:
    """`text`, if it may be one; which letters are known is the model's affair. ValueError says what is allowed."""
    if not re.fullmatch("[A-Za-z]+", text):
        raise ValueError("must be letters, one for each kind of layer, for example A")
    return text


def window_pattern(text: str) -> str:
    """`text`, if it is one. ValueError says what is allowed."""
    if not re.fullmatch("[SL]+", text):
        raise ValueError("must be made of the letters S (short) and L (full), for example SSSL")
    return text


@dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a model. Defaults are the reference's depth 12 (pretraining spec 4.1)."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    layer_pattern: str = "A"  # mixer letters, tiled over the layers; the table is model.mixer.MIXERS
    window_pattern: str = "SSSL"  # S short, L full; tiled over the layers, the last layer is always L
    residual: str = "lambdas"  # scheme name; the table is model.residual.RESIDUALS
    rope_base: float = 100_000.0
    qk_norm: bool = True
    qk_scale: float = 1.2  # q and k are both multiplied by this after their norm
    key_offset: bool = False  # half of each key is the previous position's
    softcap: float = 15.0  # logits become softcap * tanh(logits / softcap); 0 turns it off
    value_embeddings: bool = True
    smear: bool = True
    backout: bool = True
    tied_head: bool = False
    mlp_activation: str = "relu2"
    doc_mask: bool = False  # attention, smear, key offset and positions stop at document borders inside a packed row

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UserError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        """Everything that is wrong, each in the words of the flag that the value comes from."""
        counts = {flag: getattr(self, name) for name, flag in COUNT_FLAGS.items()}
        counts |= {f"{name} (of --aspect-ratio, --head-dim)": getattr(self, name) for name in WIDTHS}
        yield from (f"{name}={value}: must be at least 1" for name, value in counts.items() if value < 1)
        if min(counts.values()) >= 1:
            if self.n_embd % self.n_head:
                yield f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}; give another --head-dim"
            elif self.head_dim % 2:
                yield f"--head-dim={self.head_dim}: {EVEN_HEAD_DIM}"
            elif self.key_offset and self.head_dim % 4:
                yield f"--head-dim={self.head_dim}: must be a multiple of 4, because keys are offset"
            if self.n_head % self.n_kv_head:
                yield f"n_head={self.n_head}: must be a multiple of n_kv_head={self.n_kv_head}"
        for flag, kind, value in (
            ("--layer-pattern", layer_pattern, self.layer_pattern),
            ("--window-pattern", window_pattern, self.window_pattern),
        ):
            try:
                kind(value)
            except ValueError as error:
                yield f"{flag}={value}: {error}"
        if self.softcap < 0:
            yield f"--softcap={self.softcap}: must be 0 (off) or positive"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def layer_letters(self) -> str:
        """One mixer letter per layer."""
        return (self.layer_pattern * self.n_layer)[: self.n_layer]

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many positions back a query may look (itself not counted)."""
        short = min(self.sequence_len, -(-self.sequence_len // 4 // WINDOW_MULTIPLE) * WINDOW_MULTIPLE)
        letters = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return tuple(self.sequence_len if letter == "L" else short for letter in letters)

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, always including the last (pretraining spec 4.2)."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`. Raises UserError naming fields this version does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(f"model configuration has unknown fields {', '.join(unknown)}: saved by a newer version?")
        return cls(**values)
