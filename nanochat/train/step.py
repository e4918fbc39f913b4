"""One optimizer step: gather the micro-batches, add up their gradients, update once.

The loss is the mean over every target of the step, over all micro-batches and ranks. So one batch of 8 rows equals
eight batches of one row, and a sparse micro-batch weighs no more than its targets.

A loss that is not finite ends the run before anything is updated. Only in float16 the gradients may overflow now and
then: that step is skipped, and the loss scale is halved (`precision.LossScaler`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nanochat.loader import Batch
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.precision import LAST_SCALE
from nanochat.scaling import Multipliers

LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # inputs, targets, document ids -> summed nats


@dataclass(frozen=True)
class Skipped:
    """A step that changed nothing, and why."""

    reason: str


NO_TARGETS = Skipped("no targets")  # nothing was computed; all other skipped steps went through forward and backward


@runtime_checkable
class Positioned(Protocol):
    """Batches with a position, as all loaders have one."""

    def state(self) -> dict[str, Any]: ...


def train_step(
    loss_fn: LossFn,
    loader: Iterator[Batch],
    optimizer: MuonAdamW,
    multipliers: Multipliers,
    rt: Runtime,
    micro_batches: int = 1,
    step: int | None = None,
) -> float | Skipped:
    """Returns the mean loss in nats per target, or why the step was skipped.

    loss_fn: summed nats of a batch; the backward begins with `optimizer.loss_scale` / number of targets, fixed by then.
    step: its number, for messages. Raises FloatingPointError, before anything is updated, if the loss is not finite.
    """
    rows_from = describe_position(loader)
    batches = [next(loader) for _ in range(micro_batches)]
    num_targets = rt.sum_number(sum(batch.num_targets() for batch in batches))
    if num_targets == 0:
        return NO_TARGETS
    losses: list[Tensor] = []
    for i, batch in enumerate(batches):
        batch = batch.to(rt.device)
        if i == micro_batches - 1:
            optimizer.begin_reduction()
        loss = loss_fn(batch.inputs, batch.targets, batch.document_ids) / num_targets
        (loss * optimizer.loss_scale).backward()
        losses.append(loss.detach())
    mean_loss = rt.sum(sum(losses, torch.zeros((), device=rt.device))).item()
    if not math.isfinite(mean_loss):  # whatever the loss scale: only gradients depend on it
        optimizer.zero_grad()
        raise diverged(step, f"the loss is {mean_loss}, {first_fault(losses, rt)}", rows_from)
    scale = optimizer.loss_scale
    is_updated = optimizer.step(multipliers.lr, multipliers.momentum, multipliers.weight_decay)
    optimizer.zero_grad()
    if is_updated:
        return mean_loss
    if scale <= LAST_SCALE:
        what = f"gradients overflow in float16 at the smallest loss scale (the loss is {mean_loss})"
        raise diverged(step, what, rows_from)
    return Skipped(f"gradients overflowed at loss scale {scale:g}")


def describe_position(loader: Iterator[Batch]) -> str:
    """Where the next rows come from: the numbers of the loader's state that move."""
    state = loader.state() if isinstance(loader, Positioned) else {}
    moving = {name: state[name] for name in ("epoch", "block", "document", "row") if name in state}
    return ", ".join(f"{name} {value}" for name, value in moving.items()) or "a place that the loader does not tell"


def first_fault(losses: Sequence[Tensor], rt: Runtime) -> str:
    """In which micro-batch a loss is not finite, the earliest of all ranks."""
    faulty = [i for i, loss in enumerate(losses) if not math.isfinite(loss.item())]
    place = faulty[0] * rt.world_size + rt.rank if faulty else math.inf
    earliest = -rt.max_number(-place)
    if earliest == math.inf:
        return "only in the sum over all micro-batches and ranks"
    micro_batch, rank = divmod(int(earliest), rt.world_size)
    return f"first in micro-batch {micro_batch + 1} of {len(losses)} on rank {rank}"


def diverged(step: int | None, what: str, rows_from: str) -> FloatingPointError:
    """The error of a run that cannot go on."""
    return FloatingPointError(
        f"{'this step' if step is None else f'step {step}'}: {what}; its rows begin at {rows_from}. Nothing was "
        "updated and every checkpoint is intact. Resumed as it is, the run would come here again: start anew with "
        "lower learning rates, go on with --resume=auto and NANOCHAT_DTYPE=float32, or look at these rows"
    )
