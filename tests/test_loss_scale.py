"""float16: the loss scale lifts gradients, an overflow skips a step and halves it, and a run goes on with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_precision import STAGE, TINY
from test_ranks import PLAN as RANKS_PLAN
from test_ranks import my_batches, on_ranks, training, weights_of
from test_train import PLAN, RT, batches, tiny_training
from torch import Tensor

from nanochat import precision
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.precision import LossScaler
from nanochat.scaling import BaseRates
from nanochat.train.loop import Loop, Progress
from nanochat.train.step import Skipped, train_step
from scripts import base_train, chat_sft, tok_train

HALF = Runtime(torch.device("cpu"), torch.float16)


def half_training() -> tuple[Any, MuonAdamW]:
    model, _ = tiny_training(dtype=torch.float16)
    rates = BaseRates().by_role()
    return model, MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), rates, HALF)


def bits(model: Any, optimizer: MuonAdamW) -> dict[str, Tensor]:
    return weights_of(model) | {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}


def test_the_scale_is_halved_by_an_overflow_and_doubled_by_many_good_steps() -> None:
    scaler = LossScaler()
    assert scaler.scale == 2.0**16
    scaler.update(overflowed=True)
    assert scaler.scale == 2.0**15
    for _ in range(precision.GROWTH_STEPS - 1):
        scaler.update(overflowed=False)
    assert scaler.scale == 2.0**15
    scaler.update(overflowed=True)
    for _ in range(precision.GROWTH_STEPS):
        assert scaler.scale == 2.0**14, "an overflow begins the count anew"
        scaler.update(overflowed=False)
    assert scaler.scale == 2.0**15
    for _ in range(40 * precision.GROWTH_STEPS):
        scaler.update(overflowed=False)
    assert scaler.scale == precision.LARGEST_SCALE


def test_gradients_that_would_vanish_in_float16_are_lifted_over_its_smallest_number() -> None:
    """A loss that counts little: its gradients are 2^-20 of the usual, below what float16 can hold."""
    found = {}
    for scale in (1.0, 2.0**20):
        model, optimizer = half_training()
        assert optimizer.loss_scaler is not None
        optimizer.loss_scaler.scale = scale
        batch = next(batches(8))
        loss = model.loss(batch.inputs, batch.targets, batch.document_ids) / batch.num_targets() * 2.0**-20
        (loss * optimizer.loss_scale).backward()
        found[scale] = model.lm_head.weight.grad / scale * 2.0**20
    exact, _ = tiny_training()
    batch = next(batches(8))
    (exact.loss(batch.inputs, batch.targets) / batch.num_targets()).backward()
    gradient = exact.lm_head.weight.grad
    assert (found[2.0**20] - gradient).norm() < 0.01 * gradient.norm()
    assert (found[1.0] - gradient).norm() > 0.1 * gradient.norm()


def test_training_in_float16_follows_float32() -> None:
    def losses(model: Any, optimizer: MuonAdamW, rt: Runtime) -> list[float | Skipped]:
        stream = batches(8)
        return [train_step(model.loss, stream, optimizer, PLAN.at(i), rt, 2) for i in range(20)]

    (half, optimizer), (full, other) = half_training(), tiny_training()
    ours, exact = losses(half, optimizer, HALF), losses(full, other, RT)
    assert ours == pytest.approx(exact, rel=0.01)
    assert ours != exact
    expected = other.state_dict()
    for name, moment in optimizer.state_dict().items():  # which Adam and Muon would not feel if they were scaled
        if name.endswith(("head.weight.mean", "c_fc.weight.momentum")):
            assert 0.3 < moment.norm() / expected[name].norm() < 3, name


def test_an_overflow_skips_the_step_and_changes_nothing_but_the_scale() -> None:
    model, optimizer = half_training()
    assert optimizer.loss_scaler is not None
    optimizer.loss_scaler.scale = 2.0**30
    before, stream = bits(model, optimizer), batches(8)
    skipped = train_step(model.loss, stream, optimizer, PLAN.at(0), HALF, 2)
    assert skipped == Skipped("gradients overflowed at loss scale 1.07374e+09")
    after = bits(model, optimizer)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"loss_scaler.scale"}
    assert optimizer.loss_scale == 2.0**29
    assert all(p.grad is None for p in model.parameters())
    steps = [train_step(model.loss, stream, optimizer, PLAN.at(i), HALF, 2) for i in range(25)]
    first = next(i for i, step in enumerate(steps) if isinstance(step, float))
    assert all(isinstance(step, Skipped) for step in steps[:first]) and isinstance(steps[-1], float)


def test_one_gradient_that_is_not_finite_is_enough() -> None:
    model, optimizer = half_training()
    model.smear.scale.register_hook(lambda gradient: gradient * math.inf)
    before = weights_of(model)
    assert isinstance(train_step(model.loss, batches(8), optimizer, PLAN.at(0), HALF), Skipped)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_skipped_step_is_on_record_and_leaves_the_mean_loss_alone() -> None:
    progress, seen = Progress(), []

    class Notes:
        def log(self, record: dict[str, Any]) -> None:
            seen.append(record)

        def close(self) -> None: ...

    for step in Loop(3, 0, RT, [Notes()], progress):
        if not step.over:
            step.log(loss=Skipped("gradients overflowed at loss scale 4") if step.index == 1 else 2.0)
    assert [record.get("skipped") for record in seen] == [None, "gradients overflowed at loss scale 4", None, None]
    assert [record.get("loss") for record in seen] == pytest.approx([2.0, None, 2.0, None])


def test_a_scale_that_falls_to_its_minimum_ends_the_run() -> None:
    model, optimizer = half_training()
    before = weights_of(model)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    steps = []
    with pytest.raises(
        FloatingPointError, match=r"step 16: gradients overflow in float16 at the smallest loss scale \(the loss is 4"
    ):
        for i in range(20):
            steps.append(train_step(model.loss, batches(8), optimizer, PLAN.at(i), HALF, step=i))
    assert len(steps) == 16 and all(isinstance(step, Skipped) for step in steps)
    assert optimizer.loss_scaler is not None and optimizer.loss_scaler.scale == 1.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_float16_run_continues_bit_for_bit_with_the_scale_it_was_saved_at() -> None:
    model, optimizer = half_training()
    assert optimizer.loss_scaler is not None
    optimizer.loss_scaler.scale = 2.0**11
    stream = batches(8)
    for i in range(3):
        train_step(model.loss, stream, optimizer, PLAN.at(i), HALF)
    saved = bits(model, optimizer)
    assert saved["loss_scaler.scale"] == 2.0**11 and saved["loss_scaler.good_steps"] == 3
    other, resumed = half_training()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(saved.pop(name))
    resumed.load_state_dict(saved)
    following = [next(stream) for _ in range(3)]
    for m, o in ((model, optimizer), (other, resumed)):
        rest = iter(following)
        for i in range(3, 6):
            assert isinstance(train_step(m.loss, rest, o, PLAN.at(i), HALF), float)
    ours, theirs = bits(model, optimizer), bits(other, resumed)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_states_from_before_there_was_a_scale_load_and_those_with_one_load_elsewhere() -> None:
    (model, half), (_, full) = half_training(), tiny_training()
    train_step(model.loss, batches(8), half, PLAN.at(0), HALF)
    without = {name: t for name, t in half.state_dict().items() if not name.startswith("loss_scaler")}
    _, fresh = half_training()
    fresh.load_state_dict(without)
    assert fresh.loss_scaler == LossScaler()
    full.load_state_dict(half.state_dict())
    assert full.loss_scaler is None and full.state_dict().keys() == without.keys()


def overflowing(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """Three float16 steps; in the second, one gradient overflows, whose sum a single rank sees."""
    rt = Runtime(rt.device, torch.float16, rt.rank, rt.world_size, rt.mesh)
    model, optimizer = training(rt, torch.float16)
    step, stream, found = 0, my_batches(rt), []
    assert model.smear is not None
    model.smear.scale.register_hook(lambda gradient: gradient * (math.inf if step == rt.rank == 1 else 1.0))
    for step in range(3):
        found.append(train_step(model.loss, stream, optimizer, RANKS_PLAN.at(step), rt, 2))
    skipped = torch.tensor([isinstance(loss, Skipped) for loss in found])
    scale = torch.tensor(optimizer.loss_scale)
    return {"skipped": skipped, "scale": scale} | {f"weights/{n}": w for n, w in weights_of(model).items()}


def test_all_ranks_skip_together_where_one_overflows(tmp_path: Path) -> None:
    ours, theirs = on_ranks(2, overflowing, tmp_path)
    for found in (ours, theirs):
        assert found["skipped"].tolist() == [False, True, False]
        assert found["scale"] == 2.0**15
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# In a run ---------------------------------------------------------------------------------------------------------


def records(base_dir: Path, source: str) -> list[dict[str, Any]]:
    (metrics,) = base_dir.glob(f"checkpoints/{source}/*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.usefixtures("tokenizer")
def test_both_stages_train_in_float16_and_a_resumed_run_is_the_uninterrupted_one(
    text: Path, chats: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    run = [*TINY, *STAGE, f"--data-dir={text}", "--num-iterations=6"]
    base_train.main(run)
    whole = [record.get("loss_raw") for record in records(base_dir, "base")]
    base_train.main([*run, "--resume=3"])
    assert [record.get("loss_raw") for record in records(base_dir, "base")] == whole
    chat_sft.main(["--num-iterations=3", *STAGE, f"--data={chats}"])
    steps = records(base_dir, "sft")[:3]  # one whose gradients overflow is skipped, and says so
    assert all(math.isfinite(step["loss_raw"]) for step in steps if "overflowed" not in step.get("skipped", ""))
    assert any("loss_raw" in step for step in steps)


@pytest.mark.slow
def test_loss_curves_in_float16_and_float32_agree_within_one_percent(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tok_train.main(["--data-dir=stdlib", "--vocab-size=512"])
    shape = ["--depth=2", "--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=8"]
    horizon = ["--total-batch-size=1024", "--num-iterations=100", "--data-dir=stdlib"]
    curves: dict[str, dict[int, float]] = {}
    for dtype in ("float32", "float16"):
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
        base_train.main([*shape, *horizon, *STAGE, f"--model-tag={dtype}"])
        lines = (base_dir / "checkpoints" / "base" / dtype / "metrics.jsonl").read_text().splitlines()
        curves[dtype] = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    common = curves["float16"].keys() & curves["float32"].keys()
    assert len(common) > 90
    for step in common:
        assert curves["float16"][step] == pytest.approx(curves["float32"][step], rel=0.01), step
