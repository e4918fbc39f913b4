"""Causal, windowed, document-aware attention.

Who may look at whom is described once, by `Visibility`: positions and document ids of queries and keys, and how far
back a query may look. `attention_reference` reads that description literally; `attention` is the fast path and only
falls back to a dense mask where the device's kernel cannot take the structure.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Visibility:
    """Which keys each query sees: same document, not later, at most `window` positions back.

    query_positions: (B or 1, T), key_positions: (B or 1, S); a key position of -1 marks an empty cache slot.
    documents: (B, T) ids when masks are asked for (then S == T and keys are the queries' own row), else None.
    is_full_causal: the caller's promise that S == T and plain causality is all there is.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int
    documents: Tensor | None = None
    is_full_causal: bool = False
    _mask: Tensor | None = field(default=None, repr=False)

    def mask(self) -> Tensor:
        """(B or 1, 1, T, S) bool, True where the key is visible. Built once."""
        if self._mask is None:
            distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]  # (B, T, S)
            visible = (distance >= 0) & (distance <= self.window) & (self.key_positions >= 0)[:, None, :]
            if self.documents is not None:
                visible = visible & (self.documents[:, :, None] == self.documents[:, None, :])
            self._mask = visible[:, None]
        return self._mask


def attention_reference(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """Softmax attention as written in a textbook, scores in at least fp32.

    q: (B, T, H, D); k, v: (B, S, H_kv, D) with H_kv dividing H. Returns (B, T, H, D) in q's dtype.
    """
    repeats = q.size(2) // k.size(2)
    exact = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.repeat_interleave(repeats, dim=2).to(exact) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(exact), keys) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~visibility.mask(), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), values).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """Same contract as `attention_reference`, through torch's fused kernels."""
    mask = None if visibility.is_full_causal else visibility.mask()
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(2) != k.size(2),
    )
    return out.transpose(1, 2)  # (B, T, H, D)
