"""The loss of a head over a large vocabulary, without its logits ever existing as a whole.

Logits are by far the largest tensor of a step: 32 rows of 2,048 tokens over 32,768 entries are 8.6 GB in fp32, several
times over, for a loss that is one number. `summed_loss` goes through the positions in chunks instead. Of each chunk it
makes logits and losses, and at once the gradients of the hidden states and of the head's weight, since those of a
softmax are known as soon as it is: p - 1 at the target, p elsewhere, times the slope of the softcap. Then the logits
are forgotten. What the backward receives later, a scale, is multiplied with the finished gradients. In fp16 that loses
nothing: before it, the slopes of the summed loss lie between -1 and 1, where fp16 is at its best; after it, the numbers
are those that the rest of the backward would have seen anyway. The weight's gradient adds up over chunks in fp32, but
what a single chunk gives to it is fp16, and of a frequent token the sum of thousands of hidden states; where that could
pass 65,504, the slopes are made smaller for as long as it takes (`gradients`). No loss scale could mend that later.

The head is called as the module it is, once per chunk, and differentiated by autograd: whatever it does with its
weight (a cast, fp8) is its own affair. Per-token losses with a gradient (`token_losses`) take the plain way, since what
they will be multiplied with is not known yet; without a gradient they go in chunks, too.

Under torch.compile the chunks stand outside of the model's graph, which ends before them, and the arithmetic on a
chunk's logits is compiled on its own.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -1  # a target that is not scored


@dataclass(frozen=True)
class Chunking:
    """When and how positions are cut, in logits: chunks from `least` on, of `chunk` each, worked on `block` by block.

    A block stays in the cache of a CPU between the passes of a softmax; on GPUs one kernel does all passes.
    """

    least: int
    chunk: int
    block: int

    def pays(self, num_positions: int, vocab_size: int) -> bool:
        """Whether to cut at all."""
        return num_positions * vocab_size >= self.least

    def positions(self, vocab_size: int) -> tuple[int, int]:
        """How many positions make a chunk, and how many a block."""
        return max(1, self.chunk // vocab_size), max(1, self.block // vocab_size)


# Forward and backward of head and loss, 8 x 512 positions, width 256, fp32, one CPU core, seconds of processor time,
# median of 5: vocabulary 32,768 takes 3.41 in chunks and 5.10 the plain way (463 MB and 2,322 MB at most), 4,096 takes
# 0.39 and 0.67. 2,048 positions of a vocabulary of 1,024 take 0.05 either way. At 32,768, chunks of 128 positions cost
# 10 % more than 512 (the weight's gradient is added up more often); at 4,096, chunks without blocks cost 30 % more.
# GPUs: not measured. There the point is memory, and 2^27 logits are products large enough to fill the device.
CPU = Chunking(least=2**22, chunk=2**24, block=2**18)
GPU = Chunking(least=2**28, chunk=2**27, block=2**27)


def chunking_for(device: torch.device) -> Chunking:
    return CPU if device.type == "cpu" else GPU


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits if it is 0; in fp32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def token_losses_reference(hidden: Tensor, targets: Tensor, head: nn.Module, vocab_size: int, softcap: float) -> Tensor:
    """Cross-entropy in nats (N,) of targets (N,), 0 where ignored, by way of all logits. hidden: (N, C).

    head: (N, C) to logits (N, V or more); those behind `vocab_size` are padding.
    """
    return losses_of(head(hidden)[:, :vocab_size], targets, softcap)


def losses_of(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Cross-entropy (N,) of raw logits (N, V)."""
    return F.cross_entropy(softcapped(logits, softcap), targets, ignore_index=IGNORED, reduction="none")


def token_losses(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    vocab_size: int,
    softcap: float,
    chunking: Chunking | None = None,
) -> Tensor:
    """Same contract as `token_losses_reference`; in chunks where no gradient is wanted."""
    chunking = chunking or chunking_for(hidden.device)
    if torch.is_grad_enabled() or not chunking.pays(len(hidden), vocab_size):
        return token_losses_reference(hidden, targets, head, vocab_size, softcap)
    chunk, block = chunking.positions(vocab_size)

    def losses_in_blocks(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)[:, :vocab_size]
        return torch.cat([losses_of(*some, softcap) for some in zip(logits.split(block), targets.split(block))])

    return torch.cat([losses_in_blocks(*part) for part in zip(hidden.split(chunk), targets.split(chunk))])


def summed_loss_reference(hidden: Tensor, targets: Tensor, head: nn.Module, vocab_size: int, softcap: float) -> Tensor:
    """The sum of `token_losses_reference`, a scalar."""
    return token_losses_reference(hidden, targets, head, vocab_size, softcap).sum()


def summed_loss(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    vocab_size: int,
    softcap: float,
    chunking: Chunking | None = None,
) -> Tensor:
    """Same contract as `summed_loss_reference`; in chunks, with the gradients made beside the losses, where it pays."""
    chunking = chunking or chunking_for(hidden.device)
    if not torch.is_grad_enabled() or not chunking.pays(len(hidden), vocab_size):
        return token_losses(hidden, targets, head, vocab_size, softcap, chunking).sum()
    plan = ChunkedHead(head, vocab_size, softcap, *chunking.positions(vocab_size))
    if torch.compiler.is_compiling():
        return outside_of_graphs(hidden, targets, plan, True)
    return chunked_loss(hidden, targets, plan, False)


@dataclass(frozen=True)
class ChunkedHead:
    """A head and how it is gone through: `chunk` positions at a time, and of their logits `block` at a time."""

    head: nn.Module
    vocab_size: int
    softcap: float
    chunk: int
    block: int


def chunked_loss(hidden: Tensor, targets: Tensor, plan: ChunkedHead, is_compiled: bool) -> Tensor:
    """The summed loss. is_compiled: whether the model is, and the arithmetic on logits shall be."""
    weights = [weight for weight in plan.head.parameters() if weight.requires_grad]
    return ChunkedLoss.apply(hidden, targets, plan, is_compiled, *weights)


# No compiler looks into it. This is torch.compiler.disable without its import of the compiler, which takes 2 s.
outside_of_graphs = torch._disable_dynamo(chunked_loss)


class ChunkedLoss(torch.autograd.Function):
    """Summed loss of hidden (N, C) and targets (N,), with the gradients of hidden and weights made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, plan: ChunkedHead, is_compiled: bool, *weights: Tensor
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_weights: list[Tensor] = []
        for start in range(0, len(hidden), plan.chunk):
            part = slice(start, start + plan.chunk)
            chunk = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = plan.head(chunk)
            losses[part], slopes = losses_and_slopes(logits.detach(), targets[part], plan, is_compiled)
            of_chunk, *more = gradients(logits, slopes, chunk, weights)
            of_hidden[part] = of_chunk
            of_weights = [a.add_(b) for a, b in zip(of_weights, more)] or more
            del logits, slopes, more  # before the next chunk's are made
        ctx.save_for_backward(of_hidden, *of_weights)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # In place: at a second backward through the same loss autograd says so, instead of scaling twice.
        of_hidden, *of_weights = (gradient.mul_(scale) for gradient in ctx.saved_tensors)
        return (of_hidden, None, None, None, *of_weights)


def gradients(logits: Tensor, slopes: Tensor, hidden: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Of hidden states (n, C) and of the head's weights, by the slopes (n, V or more) of its logits."""
    if slopes.dtype != torch.float16:
        return list(torch.autograd.grad(logits, [hidden, *weights], slopes))
    room = headroom(hidden)
    return [part.div_(room) for part in torch.autograd.grad(logits, [hidden, *weights], slopes.mul_(room))]


def headroom(hidden: Tensor) -> Tensor:
    """The power of two, at most 1, times which no sum over fp16 hidden states (n, C), each times 1 or less, overflows.

    A tensor, since a GPU would have to be waited for. Half of what fp16 holds is left to roundings on the way.
    """
    largest = hidden.abs().sum(0, dtype=torch.float32).max()
    return torch.exp2(-(largest / 2**15).log2().ceil().clamp_min(0))


def losses_and_slopes(logits: Tensor, targets: Tensor, plan: ChunkedHead, is_compiled: bool) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, V or more), and what each loss changes by with each logit, as logits.

    Without a compiler the slopes take the place of the logits, block by block.
    """
    if is_compiled:
        return compiled_block()(logits, targets, plan.vocab_size, plan.softcap)
    losses = []
    for block, block_targets in zip(logits.split(plan.block), targets.split(plan.block)):
        some, slopes = block_losses_and_slopes(block, block_targets, plan.vocab_size, plan.softcap)
        losses.append(some)
        block.copy_(slopes)
    return torch.cat(losses), logits


@functools.cache
def compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(block_losses_and_slopes)


def block_losses_and_slopes(logits: Tensor, targets: Tensor, vocab_size: int, softcap: float) -> tuple[Tensor, Tensor]:
    """Losses (n,) in fp32 or better, and slopes (n, V or more) in the logits' dtype, 0 for padding and ignored rows."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bent = torch.tanh(exact / softcap) if softcap else exact
    capped = bent * softcap if softcap else exact.clone()
    capped[:, vocab_size:] = float("-inf")
    log_p = capped.log_softmax(dim=-1)
    is_scored = targets != IGNORED
    target = targets.clamp_min(0)[:, None]  # (n, 1)
    losses = -log_p.gather(1, target)[:, 0]
    slopes = log_p.exp_()
    slopes.scatter_add_(1, target, torch.full_like(losses, -1.0)[:, None])
    if softcap:
        slopes.mul_(bent.square_().neg_().add_(1))
    slopes.masked_fill_(~is_scored[:, None], 0)
    return losses.masked_fill(~is_scored, 0), slopes.to(logits.dtype)
