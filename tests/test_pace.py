"""A time budget on a CPU is planned at the pace that a pass has here, and a run that goes on keeps its plan."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_ranks import on_ranks, weights_of
from test_train import RT, tiny_training
from torch import Tensor

from nanochat import planning
from nanochat.checkpoint import read_json, saved_steps
from nanochat.config import ModelConfig
from nanochat.hardware import UNKNOWN_FLOPS
from nanochat.model.gpt import build_model
from nanochat.parallel import Runtime
from nanochat.planning import BasePlan
from nanochat.train import pace
from nanochat.train.pace import TOKENS, timed_flops
from scripts import base_train

COLD_S = 100.0  # of a first pass


def clock(*durations_s: float) -> SimpleNamespace:
    """Stands for `time`: what happens between its 1st and 2nd look, its 3rd and 4th, ... takes so long."""
    looks = iter(accumulate(s for duration_s in durations_s for s in (0.0, duration_s)))
    return SimpleNamespace(perf_counter=lambda: next(looks))


def pass_flops(config: ModelConfig, seconds: float) -> float:
    """FLOP/s where a pass of `TOKENS` takes so long."""
    return TOKENS * build_model(config, RT.device, RT.dtype).flops_per_token() / seconds


@pytest.mark.parametrize("sequence_len", [32, TOKENS, 3 * TOKENS])
def test_the_pace_is_that_of_the_second_pass_since_the_first_finds_cold_caches(
    sequence_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "time", clock(COLD_S, 0.5))
    model = build_model(ModelConfig(sequence_len, 97, 2, 2, 2, 16), RT.device, RT.dtype)
    tokens = max(TOKENS, sequence_len)  # at least a row
    assert timed_flops(model, RT) == pytest.approx(tokens * model.flops_per_token() / 0.5)


def test_the_real_clock_tells_a_pace() -> None:
    assert 0 < timed_flops(tiny_training()[0], RT) < float("inf")


def test_what_is_timed_is_a_pass_forward_and_backward_and_it_leaves_nothing_behind() -> None:
    model, _ = tiny_training()
    before, made = weights_of(model), []
    model.lm_head.weight.register_hook(lambda gradient: made.append(gradient.shape))
    timed_flops(model, RT)
    assert made == [model.lm_head.weight.shape] * 2
    assert all(torch.equal(weight, before[name]) and weight.grad is None for name, weight in model.named_parameters())


def test_other_devices_are_guessed_and_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "time", clock())
    other = Runtime(torch.device("mps"), torch.float32)
    assert timed_flops(tiny_training()[0], other) == other.expected_flops


def two_paces(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """What ranks expect of which the second takes four times as long."""
    model, _ = tiny_training()
    pace.time = clock(COLD_S, 4.0**rt.rank)  # type: ignore[assignment]
    return {"flops": torch.tensor(timed_flops(model, rt), dtype=torch.float64)}


def test_ranks_add_up_their_paces_and_expect_the_same(tmp_path: Path) -> None:
    alone = pass_flops(tiny_training()[0].config, 1.0)
    assert [found["flops"].item() for found in on_ranks(2, two_paces, tmp_path)] == pytest.approx([1.25 * alone] * 2)


# In a run


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BasePlan]]:
    """The plans that runs make, as they make them."""
    made: list[BasePlan] = []
    plan = planning.base_plan
    monkeypatch.setattr(planning, "base_plan", lambda *given: made.append(plan(*given)) or made[-1])
    return made


TRAIN = ["--depth=2", "--max-seq-len=64", "--aspect-ratio=32", "--head-dim=32", "--device-batch-size=4"]
TRAIN += ["--eval-every=-1", "--logger=none", "--device-type=cpu"]


def saved_pace(base_dir: Path, tag: str) -> float:
    folder = base_dir / "checkpoints" / "base" / tag
    return float(read_json(folder / f"step_{saved_steps(folder)[-1]:06d}" / "meta.json")["plan"]["expected_flops"])


@pytest.mark.usefixtures("tokenizer")
def test_a_time_budget_is_planned_at_the_pace_and_a_run_that_goes_on_keeps_it(
    text: Path, base_dir: Path, plans: list[BasePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*TRAIN, f"--data-dir={text}", "--time-budget=0.3"]
    for tag, pass_s in (("fast", 1e-3), ("slow", 1e-2)):
        monkeypatch.setattr(pace, "time", clock(COLD_S, pass_s))
        base_train.main([*run, f"--model-tag={tag}"])
        assert saved_pace(base_dir, tag) == pytest.approx(pass_flops(plans[-1].config, pass_s))
    fast, slow = (plan.training for plan in plans)
    tokens, fewer = (plan.num_steps * plan.total_batch_tokens for plan in (fast, slow))
    assert tokens == pytest.approx(0.3 * TOKENS / 1e-3, rel=0.1)
    assert fewer == pytest.approx(0.3 * TOKENS / 1e-2, rel=0.1)
    monkeypatch.setattr(pace, "time", clock())  # nobody asks
    last = saved_steps(base_dir / "checkpoints" / "base" / "fast")[-1]
    base_train.main([*run, "--model-tag=fast", f"--resume={last}"])
    assert plans[2] == plans[0] != plans[1]


@pytest.mark.usefixtures("tokenizer")
def test_without_a_time_budget_no_pass_is_timed(text: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "time", clock())
    base_train.main([*TRAIN, f"--data-dir={text}", "--num-iterations=1", "--total-batch-size=256"])
    assert saved_pace(base_dir, "d2") == UNKNOWN_FLOPS
