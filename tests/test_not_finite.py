"""A loss that is not finite ends the run before anything is updated, and says where it was."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import PLAN as RANKS_PLAN
from test_ranks import my_batches, on_ranks, training, weights_of
from test_train import PLAN, batches, tiny_training
from torch import Tensor

from nanochat.loader import Batch
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates
from nanochat.train.step import train_step


class Stream:
    """Batches with a position, the third of which has a fault."""

    def __init__(self, faulty: int) -> None:
        self._stream, self.row, self._faulty = batches(4), 40, faulty

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, self.row = next(self._stream), self.row + 4
        if self.row == 44 + 4 * self._faulty:
            batch.inputs[0, 0] = 96
        return batch

    def state(self) -> dict[str, Any]:
        return {"loader": "test", "epoch": 2, "row": self.row}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_not_finite_tells_step_and_batch_and_what_to_do(dtype: torch.dtype) -> None:
    model, _ = tiny_training(dtype=dtype)
    rt = Runtime(torch.device("cpu"), dtype)
    optimizer = MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), BaseRates().by_role(), rt)
    with torch.no_grad():
        model.wte.weight[96] = math.nan
    before = weights_of(model)

    def loss_fn(inputs: Tensor, *rest: Tensor) -> Tensor:  # token 96 appears where it was put, and nowhere else
        has_fault = bool(inputs[0, 0] == 96)
        return model.loss(inputs if has_fault else inputs.clamp(max=95), *rest)

    with pytest.raises(FloatingPointError) as told:
        train_step(loss_fn, Stream(faulty=2), optimizer, PLAN.at(0), rt, micro_batches=4, step=120)
    for part in (
        "step 120: the loss is nan",
        "first in micro-batch 3 of 4 on rank 0",
        "rows begin at epoch 2, row 40",
        "Nothing was updated and every checkpoint is intact",
        "lower learning rates",
        "--resume=auto",
    ):
        assert part in str(told.value)
    assert all(torch.equal(p, before[name]) or name == "wte.weight" for name, p in model.named_parameters())
    moments = [t for name, t in optimizer.state_dict().items() if not name.startswith("loss_scaler")]
    assert all(p.grad is None for p in model.parameters()) and not any(t.any() for t in moments)


def faulty(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """The message on each rank where rank 1's second micro-batch has no finite loss."""
    model, optimizer = training(rt, torch.float32)
    calls = iter(range(2))
    loss_fn = lambda *batch: model.loss(*batch) * (math.inf if next(calls) == rt.rank == 1 else 1)  # noqa: E731
    with pytest.raises(FloatingPointError) as told:
        train_step(loss_fn, my_batches(rt), optimizer, RANKS_PLAN.at(0), rt, 2, step=7)
    return {"text": torch.tensor(list(str(told.value).encode()), dtype=torch.uint8)}


def test_every_rank_can_tell_on_which_rank_it_was(tmp_path: Path) -> None:
    for found in on_ranks(2, faulty, tmp_path):
        told = bytes(found["text"].tolist()).decode()
        assert "step 7: the loss is inf, first in micro-batch 2 of 2 on rank 1" in told
