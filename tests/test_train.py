"""The training step and the loop around it."""

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.loader import Batch
from nanochat.model.gpt import GPT, build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates, TrainingPlan
from nanochat.train.loop import Loop, Progress
from nanochat.train.metrics import JsonlLogger
from nanochat.train.step import Skipped, train_step

RT = Runtime(torch.device("cpu"), torch.float32)
PLAN = TrainingPlan(50, 8 * 32, 0.1, 1.0, 0.1)


class RecordingOptimizer(MuonAdamW):
    """Keeps the gradients that each step was given."""

    gradients: dict[str, Tensor]

    def step(self, lr: float, momentum: float, weight_decay: float) -> bool:
        self.gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        return super().step(lr, momentum, weight_decay)


def add_noise(model: GPT) -> None:
    """Leave the initial point, where many gradients are exactly zero and would make every comparison pass."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter.dtype))


def tiny_training(pattern: str = "A", dtype: torch.dtype = torch.float32) -> tuple[GPT, RecordingOptimizer]:
    config = ModelConfig(32, 97, n_layer=3, n_head=2, n_kv_head=2, n_embd=16, layer_pattern=pattern)
    model = build_model(config, torch.device("cpu"), dtype)
    return model, RecordingOptimizer(dict(model.named_parameters()), model.parameter_roles(), BaseRates().by_role())


def batches(rows: int, ignored: float = 0.3, num: int = 10**6) -> Iterator[Batch]:
    """An endless stream of rows, the same whatever the rows per batch; a share of the targets is ignored."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(num):
        ids, skip = [], []
        for _ in range(rows):
            ids.append(torch.randint(0, 97, (33,), generator=rng))
            skip.append(torch.rand(32, generator=rng) < ignored)
        tokens = torch.stack(ids)
        targets = tokens[:, 1:].masked_fill(torch.stack(skip), -1)
        yield Batch(tokens[:, :-1], targets, torch.zeros(rows, 32, dtype=torch.int32))


@pytest.mark.parametrize("pattern", ["A", "AR"])
@pytest.mark.parametrize(("micro_batches", "rows"), [(2, 4), (8, 1)])
def test_accumulated_gradients_equal_those_of_one_batch(
    pattern: str, micro_batches: int, rows: int, recurrent: str
) -> None:
    model, whole = tiny_training(pattern)
    add_noise(model)
    train_step(model.loss, batches(8), whole, PLAN.at(0), RT, 1)
    model, parts = tiny_training(pattern)
    add_noise(model)
    train_step(model.loss, batches(rows), parts, PLAN.at(0), RT, micro_batches)
    assert whole.gradients.keys() == parts.gradients.keys() == whole.parameters.keys()
    for name, gradient in whole.gradients.items():
        assert gradient.norm() > 0
        assert (parts.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name  # scalars are sums that cancel
    flat, other = (torch.cat([g.flatten() for g in o.gradients.values()]) for o in (whole, parts))
    assert (other - flat).norm() <= 1e-6 * flat.norm()


@pytest.mark.parametrize(("micro_batches", "rows"), [(2, 4), (8, 1)])
def test_fifty_accumulated_steps_end_where_fifty_whole_ones_do(micro_batches: int, rows: int) -> None:
    def train(micro_batches: int, rows: int) -> tuple[float, dict[str, Tensor]]:
        model, optimizer = tiny_training(dtype=torch.float64)
        add_noise(model)
        stream = batches(rows)
        losses = [train_step(model.loss, stream, optimizer, PLAN.at(i), RT, micro_batches) for i in range(50)]
        assert losses[-1] is not None
        return losses[-1], {name: p.detach() for name, p in model.named_parameters()}

    (loss, weights), (other_loss, other_weights) = train(1, 8), train(micro_batches, rows)
    assert other_loss == pytest.approx(loss, rel=1e-9)
    for name, weight in weights.items():
        assert (other_weights[name] - weight).norm() <= 1e-7 * weight.norm(), name


def test_training_learns_a_sequence_by_heart() -> None:
    model, optimizer = tiny_training()
    batch = next(batches(4, ignored=0.0))
    plan = TrainingPlan(120, 128, 1.0, 1.0, 0.0)
    losses = [train_step(model.loss, iter([batch]), optimizer, plan.at(i), RT) for i in range(120)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.05)
    assert losses[-1] is not None and losses[-1] < 0.3


def test_a_step_draws_nothing_from_the_global_generators_so_that_a_resumed_run_needs_none_of_their_states() -> None:
    model, optimizer = tiny_training()
    stream = batches(4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    for i in range(3):
        train_step(model.loss, stream, optimizer, PLAN.at(i), RT, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]


def test_masked_targets_give_no_gradient() -> None:
    model, optimizer = tiny_training()
    inputs = torch.arange(32)[None]  # token i at position i
    targets = torch.full((1, 32), -1)
    targets[0, :20] = torch.arange(1, 21)
    train_step(model.loss, iter([Batch(inputs, targets, torch.zeros(1, 32))]), optimizer, PLAN.at(0), RT)
    rows = optimizer.gradients["wte.weight"].abs().sum(dim=1)
    head = optimizer.gradients["lm_head.weight"]
    assert (rows[:20] > 0).any() and (rows[20:] == 0).all()
    model, other = tiny_training()
    short = Batch(inputs[:, :20], targets[:, :20], torch.zeros(1, 20))
    train_step(model.loss, iter([short]), other, PLAN.at(0), RT)
    torch.testing.assert_close(other.gradients["lm_head.weight"], head)


def test_a_step_without_any_target_is_skipped_and_changes_nothing() -> None:
    model, optimizer = tiny_training()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert train_step(model.loss, batches(4, ignored=1.1), optimizer, PLAN.at(0), RT, 2) == Skipped("no targets")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_micro_batch_without_targets_does_not_spoil_its_step() -> None:
    full, empty = next(batches(4)), next(batches(4, ignored=1.1))
    model, alone = tiny_training()
    loss = train_step(model.loss, iter([full]), alone, PLAN.at(0), RT, 1)
    model, mixed = tiny_training()
    assert train_step(model.loss, iter([full, empty]), mixed, PLAN.at(0), RT, 2) == pytest.approx(loss)
    for name, gradient in alone.gradients.items():
        torch.testing.assert_close(mixed.gradients[name], gradient)


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated() -> None:
    model, optimizer = tiny_training()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    before = model.wte.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="nan"):
        train_step(model.loss, batches(4), optimizer, PLAN.at(0), RT)
    assert torch.equal(model.wte.weight, before)
    assert all(p.grad is None for p in model.parameters())


# The loop ------------------------------------------------------------------------------------------------------


def test_the_loop_comes_by_once_more_after_the_last_update() -> None:
    steps = [(step.index, step.last, step.due(3), step.due(3, at_start=True)) for step in Loop(4, 0, RT)]
    assert steps == [
        (0, False, False, True),
        (1, False, False, False),
        (2, False, False, False),
        (3, False, True, True),
        (4, True, True, True),
    ]


def test_a_cadence_of_minus_one_is_never_due() -> None:
    assert not any(step.due(-1, at_start=True) for step in Loop(3, 0, RT))


def test_every_step_leaves_a_record_also_the_last_one_that_the_recipe_breaks_out_of(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    loop = Loop(3, 0, RT, [JsonlLogger(path, 0)], tokens_per_step=100, flops_per_token=7)
    for step in loop:
        if step.last:
            step.log(val_bpb=1.5)
            break
        step.log(loss=3.0 - step.index)
    loop.check_completed()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record.get("loss_raw") for record in records] == [3.0, 2.0, 1.0, None]
    assert records[0]["loss"] == pytest.approx(3.0) and 1.0 < records[2]["loss"] < 3.0
    assert (records[3]["val_bpb"], records[3]["tokens"]) == (1.5, 300)
    assert records[1]["flops"] == 1400


def test_a_resumed_log_holds_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in Loop(5, 0, RT, [JsonlLogger(path, 0)]):
        pass
    path.write_text(path.read_text() + '{"step": 6, "cut sho')  # killed while writing
    for _ in Loop(6, 3, RT, [JsonlLogger(path, 3)], Progress(tokens=3)):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5, 6]


def test_paused_time_is_not_training_time() -> None:
    progress = Progress()
    for step in Loop(2, 0, RT, progress=progress):
        if step.index == 0:
            with step.paused():
                time.sleep(0.2)
    assert progress.elapsed_s - progress.train_s >= 0.2
    assert progress.train_s < 0.1


def test_a_time_budget_ends_the_run_when_it_is_used_up() -> None:
    progress, indices = Progress(), []
    for step in Loop(10**9, 0, RT, progress=progress, time_budget_s=0.2):
        indices.append(step.index)
        assert step.total >= step.index
        _ = torch.randn(300, 300) @ torch.randn(300, 300)
    assert len(indices) > 5
    assert progress.train_s == pytest.approx(0.2, rel=0.5)


def test_a_resumed_budget_goes_on_at_its_pace_and_a_spent_one_is_over() -> None:
    halfway = Progress(steps=100, train_s=5.0)
    step = next(iter(Loop(10**6, 100, RT, progress=halfway, time_budget_s=10.0)))
    assert (step.index, step.total) == (100, 200)
    spent = Progress(steps=100, train_s=10.5)
    step = next(iter(Loop(10**6, 100, RT, progress=spent, time_budget_s=10.0)))
    assert step.last


def test_a_damaged_line_of_the_metrics_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo\n[]\n{"step": 2}\n{"step": 3}\n')
    JsonlLogger(path, 3).close()
    assert path.read_text() == '{"step": 0}\n{"step": 2}\n'


# Compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.parametrize("pattern", ["A", "AR"])
def test_the_loss_compiles_as_one_graph_with_equal_gradients(pattern: str, doc_mask: bool, recurrent: str) -> None:
    config = ModelConfig(32, 97, 2, 2, 2, 16, layer_pattern=pattern, doc_mask=doc_mask)
    model = build_model(config, torch.device("cpu"), torch.float32)
    add_noise(model)
    batch = next(batches(2))
    documents = (torch.arange(32) // 10).expand(2, -1)
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = []
    for loss_fn in (model.loss, compiled):
        loss_fn(batch.inputs, batch.targets, documents).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
