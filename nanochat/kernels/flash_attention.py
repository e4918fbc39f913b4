"""Causal, windowed, document-aware attention: who sees whom, the textbook's way, and torch's fused kernels.

Who may look at whom is described once, by `Visibility`: positions and document ids of queries and keys, and how far
back a query may look. `attention_reference` reads that description literally. `attention` does the same through
`scaled_dot_product_attention` and runs on every device; faster kernels stand above it in kernels/attention_ladder.py.

A row that looks at itself never needs a T x T mask. Plain causality is a flag of the kernel. Within a window, queries
go in blocks of C: those from s on see the keys s - w to s + C, and as all blocks look alike, one (C, w + C) mask serves
them all. Memory and work grow with T * w. On a CPU, forward and backward of 4,096 tokens in 4 heads of 64, windows of
T / 4, took 58, 81 and 133 ms of processor time at T = 512, 1,024 and 2,048 in blocks of 128; 98, 198 and 404 ms under a
mask over the whole row, and 99, 140 and 225 ms with full causality. So there are blocks everywhere but against a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE = slice(None)
CPU_BLOCK = 128  # queries at a time: 64 to 256 are equally fast
GPU_BLOCK = 512  # not measured: fewer and larger kernels


@dataclass
class Visibility:
    """Which keys each query sees: same document, not later, at most `window` positions back.

    query_positions: (B or 1, T), key_positions: (B or 1, S); a key position of -1 marks an empty cache slot.
    documents: (B, T) ids when masks are asked for (then S == T and keys are the queries' own row), else None.
    is_row: the caller's promise that S == T, key i stands where query i stands, and positions count up by 1 from one
    token to the next, or restart where a document does.
    """

    query_positions: Tensor
    key_positions: Tensor
    window: int
    documents: Tensor | None = None
    is_row: bool = False
    _made: dict[object, Any] = field(default_factory=dict, repr=False)

    @property
    def is_full_causal(self) -> bool:
        """Whether plain causality is all there is."""
        return self.is_row and self.documents is None and self.window >= self.query_positions.size(1) - 1

    def mask(self, queries: slice = WHOLE, keys: slice = WHOLE) -> Tensor:
        """(B or 1, 1, T, S) bool, True where the key is visible; of the given queries and keys only."""
        key_positions = self.key_positions[:, keys]
        distance = self.query_positions[:, queries, None] - key_positions[:, None, :]  # (B, T, S)
        visible = (distance >= 0) & (distance <= self.window) & (key_positions >= 0)[:, None, :]
        if self.documents is not None:
            visible = visible & (self.documents[:, queries, None] == self.documents[:, None, keys])
        return visible[:, None]

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` made under this key, when it was first asked for: layers of one window share their masks."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


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
    """Same contract as `attention_reference`, through torch's fused kernels.

    Against a cache there are few queries, one token or a piece of a prompt, and the mask is (T, S) as it stands.
    """
    if visibility.is_full_causal:
        return sdpa(q, k, v, None)
    if not visibility.is_row:
        return sdpa(q, k, v, visibility.once("mask", visibility.mask))
    size = CPU_BLOCK if q.device.type == "cpu" else GPU_BLOCK
    blocks = []
    for start in range(0, q.size(1), size):
        queries = slice(start, min(start + size, q.size(1)))
        keys = slice(max(0, start - visibility.window), queries.stop)
        bias = block_bias(visibility, queries, keys, size, q.dtype)
        blocks.append(sdpa(q[:, queries], k[:, keys], v[:, keys], bias))
    return torch.cat(blocks, dim=1)


def block_bias(visibility: Visibility, queries: slice, keys: slice, size: int, dtype: torch.dtype) -> Tensor:
    """(B or 1, 1, C, K) to add to the scores of a block: 0 where the key is visible, else -inf.

    Numbers, not booleans: of those each call would make, and keep for its backward, numbers of its own.
    """
    if visibility.documents is not None:
        visible = lambda: visibility.mask(queries, keys)  # noqa: E731
        return visibility.once((queries.start, dtype), lambda: as_bias(visible(), dtype))
    window = visibility.window
    band = visibility.once(dtype, lambda: band_bias(size, window, visibility.query_positions.device, dtype))
    first = window - (queries.start - keys.start)  # the earliest blocks have fewer keys before them
    return band[:, :, : queries.stop - queries.start, first : window + queries.stop - queries.start]


def band_bias(size: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 1, C, w + C): what each of C queries sees of the w keys before the first of them and the C beside them."""
    queries = torch.arange(window, window + size, device=device)
    distance = queries[:, None] - torch.arange(window + size, device=device)  # (C, w + C)
    return as_bias((distance >= 0) & (distance <= window), dtype)[None, None]


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's own. q: (B, T, H, D); k, v: (B, S, H_kv, D); mask: (B or 1, 1, T, S), None is causal. As q."""
    is_grouped = q.size(2) != k.size(2)
    if is_grouped and mask is not None and q.device.type != "cpu":
        # On GPUs the only kernel that takes groups and a mask is the one that writes all scores to memory.
        k, v = (t.repeat_interleave(q.size(2) // k.size(2), dim=2) for t in (k, v))
        is_grouped = False
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped)
    return out.transpose(1, 2)  # (B, T, H, D)
