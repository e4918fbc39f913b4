"""FlexAttention: torch's compiler makes a kernel for the rule of who sees whom, which skips blocks that see nothing.

The rule is a function of two positions. Beside it the kernel wants a list, for each block of 128 queries, of the blocks
of keys in which it must ask the rule, and of those in which every pair is visible. Both lists follow from the window
and from the lowest and highest document id of each block, so no mask of the whole row is ever made.

Inside a compiled model the call is traced like everything else. Outside it is compiled on its own, since as plain
Python it would write all scores to memory. Rows are padded to whole blocks, with keys that come too late to be seen:
then lengths are few, and each is compiled once.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.flash_attention import Visibility

BLOCK = 128  # what the kernel skips is a block of so many queries by so many keys


class FlexAttention:
    """The contract of `attention_reference`, where the keys are the queries' own row."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.traced = flex_attention

    @cached_property
    def compiled(self) -> Any:
        return torch.compile(self.traced)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        assert visibility.is_row
        length = q.size(1)
        blocks = visibility.once("flex", lambda: block_mask(visibility, length))
        is_grouped = q.size(2) != k.size(2)
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, -length % BLOCK)).transpose(1, 2) for t in (q, k, v))
        function = self.traced if torch.compiler.is_compiling() else self.compiled
        out = function(q, k, v, block_mask=blocks, enable_gqa=is_grouped)
        return out.transpose(1, 2)[:, :length]


def block_mask(visibility: Visibility, length: int) -> Any:
    """torch's BlockMask of a row of `length`: the rule, and the blocks in which it is asked or need not be."""
    from torch.nn.attention.flex_attention import BlockMask

    window, documents = visibility.window, padded_documents(visibility, length)

    def rule(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (query >= key) & (query - key <= window)
        return visible if documents is None else visible & (documents[b, query] == documents[b, key])

    some, every = blocks_in_sight(window, documents, length, visibility.query_positions.device)
    return BlockMask.from_kv_blocks(*listed(some & ~every), *listed(every), BLOCK_SIZE=BLOCK, mask_mod=rule)


def blocks_in_sight(window: int, documents: Tensor | None, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (B or 1, N, N) bool over N blocks of queries and of keys: may a pair be visible, is every pair visible."""
    first = torch.arange(0, length, BLOCK, device=device)
    last = first + BLOCK - 1
    some = (last[:, None] >= first) & (first[:, None] - last <= window)
    every = (first[:, None] >= last) & (last[:, None] - first <= window)
    if documents is None:
        return some[None], every[None]
    in_blocks = documents.unflatten(1, (-1, BLOCK))
    low, high = in_blocks.amin(dim=-1), in_blocks.amax(dim=-1)  # (B, N)
    may_share = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    share_one = (low[:, :, None] == high[:, None]) & (low[:, None] == high[:, :, None])
    return some & may_share, every & share_one


def padded_documents(visibility: Visibility, length: int) -> Tensor | None:
    """Document ids (B, N * BLOCK); what was added is a document of its own."""
    if visibility.documents is None:
        return None
    return F.pad(visibility.documents, (0, -length % BLOCK), value=-1)


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys are True (B or 1, 1, N), and which ones (B or 1, 1, N, N): theirs come first."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()
