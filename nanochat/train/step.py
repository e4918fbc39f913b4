"""One optimizer step: gather the micro-batches, add up their gradients, update once.

The loss is the mean over every target of the step, over all micro-batches and ranks. So one batch of 8 rows equals
eight batches of one row, and a sparse micro-batch weighs no more than its targets.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanochat.loader import Batch
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import Multipliers

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, targets, document ids -> summed nats


def train_step(
    loss_fn: LossFn,
    loader: Iterator[Batch],
    optimizer: MuonAdamW,
    multipliers: Multipliers,
    rt: Runtime,
    micro_batches: int = 1,
) -> float | None:
    """Returns the mean loss in nats per target, or None where the step had no target and was skipped.

    loss_fn: summed nats of a batch. Raises FloatingPointError, before anything is updated, if the loss is not finite.
    """
    batches = [next(loader) for _ in range(micro_batches)]
    num_targets = rt.sum_number(sum(batch.num_targets() for batch in batches))
    if num_targets == 0:
        return None
    total = torch.zeros((), device=rt.device)
    for i, batch in enumerate(batches):
        batch = batch.to(rt.device)
        if i == micro_batches - 1:
            optimizer.begin_reduction()
        loss = loss_fn(batch.inputs, batch.targets, batch.document_ids) / num_targets
        loss.backward()
        total = total + loss.detach()
    mean_loss = rt.sum(total).item()
    if not math.isfinite(mean_loss):
        optimizer.zero_grad()
        raise FloatingPointError(
            f"the loss is {mean_loss}; nothing was updated, the last checkpoint is intact: lower the learning rates, "
            "or look at the data of this step"
        )
    optimizer.step(multipliers.lr, multipliers.momentum, multipliers.weight_decay)
    optimizer.zero_grad()
    return mean_loss
