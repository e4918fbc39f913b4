"""The dial: the reference's laws number for number, ours where they differ, and schedules that are complete."""

from itertools import pairwise

import pytest
import torch

from nanochat.common import UserError
from nanochat.model.gpt import GPT, flops_per_token, predict_parameters, scaling_parameters
from nanochat.scaling import (
    LAWS,
    BaseRates,
    Horizon,
    MicroBatch,
    Schedule,
    TrainingPlan,
    device_batch_rows,
    model_config,
    sft_plan,
    training_plan,
    vocab_size_for,
)

# The ancestor's miniseries at ratio 12, length 2,048, vocabulary 32,768 (pretraining spec 5.3).
# depth: width, wte, value embeddings, matrices, scalars, total, N, batch, steps, LR x, width x, decay, FLOPs per token
REFERENCE = {
    4: (256, 8388608, 16777216, 3145776, 34, 36700242, 11534384, 2**18, 528, 0.7071, 1.7321, 1.8899, 8.022e7),
    6: (384, 12582912, 37748736, 10616940, 38, 73531538, 23199852, 2**18, 1062, 0.7071, 1.4142, 0.9396, 1.675e8),
    12: (768, 25165824, 150994944, 84935088, 50, 286261730, 110100912, 2**19, 2520, 1.0, 1.0, 0.2800, 7.597e8),
    20: (1280, 41943040, 419430400, 393217200, 66, 896533746, 435160240, 2**20, 4980, 1.4142, 0.7746, 0.1002, 2.886e9),
    24: (1536, 50331648, 603979776, 679478976, 74, 1384122122, 729810624, 2**20, 8352, 1.4142, 0.7071, 0.0597, 4.775e9),
    26: (
        1664,
        54525952,
        708837376,
        863897580,
        78,
        1681786938,
        918423532,
        2**20,
        10510,
        1.4142,
        0.6794,
        0.0475,
        5.991e9,
    ),
    32: (
        2048,
        67108864,
        1073741824,
        1610615808,
        90,
        2818575450,
        1677724672,
        2**21,
        9600,
        2.0,
        0.6124,
        0.0368,
        1.0771e10,
    ),
}


def plan_of(depth: int, laws: str, horizon: Horizon = Horizon(), **given: int) -> TrainingPlan:  # noqa: B008
    config, reference = model_config(depth, laws=laws), model_config(12, laws=laws)
    counts = scaling_parameters(config), scaling_parameters(reference), flops_per_token(config), config.n_embd
    return training_plan(*counts, horizon, MicroBatch(config.sequence_len), laws=laws, **given)


@pytest.mark.parametrize("depth", REFERENCE)
def test_the_reference_laws_give_the_ancestors_table(depth: int) -> None:
    config, plan = model_config(depth, laws="reference"), plan_of(depth, "reference")
    counts = predict_parameters(config)
    scalars = counts["resid_scalar"] + counts["x0_scalar"] + counts["smear"]
    exact = (config.n_embd, counts["wte"], counts["value_embedding"], counts["matrix"], scalars, sum(counts.values()))
    assert exact == REFERENCE[depth][:6]
    assert (scaling_parameters(config), plan.total_batch_tokens, plan.num_steps) == REFERENCE[depth][6:9]
    derived = (plan.lr_scale, plan.width_scale, plan.weight_decay, flops_per_token(config))
    assert derived == pytest.approx(REFERENCE[depth][9:], rel=2e-3)


@pytest.mark.parametrize("laws", ["reference", "nanochat"])
@pytest.mark.parametrize("depth", [*REFERENCE, 5, 11])
def test_a_model_of_every_depth_has_the_predicted_parameters(depth: int, laws: str) -> None:
    config = model_config(depth, laws=laws)
    with torch.device("meta"):
        assert GPT(config).parameter_counts() == predict_parameters(config)


@pytest.mark.parametrize(
    ("depth", "rates"),
    [
        (4, {"wte": 0.3674, "value_embedding": 0.1837, "lm_head": 0.0098, "matrix": 0.01414, "x0_scalar": 0.354}),
        (
            20,
            {"wte": 0.3286, "value_embedding": 0.1643, "lm_head": 0.00876, "matrix": 0.02828, "resid_scalar": 0.00707},
        ),
        (32, {"wte": 0.3674, "value_embedding": 0.1837, "lm_head": 0.0098, "matrix": 0.04, "smear": 0.2}),
    ],
)
def test_the_reference_laws_give_the_ancestors_learning_rates(depth: int, rates: dict[str, float]) -> None:
    plan = plan_of(depth, "reference")
    derived = BaseRates().by_role(plan.lr_scale, plan.width_scale)
    assert {role: derived[role] for role in rates} == pytest.approx(rates, rel=2e-3)


def test_vocabulary_grows_with_depth_unless_the_reference_laws_are_asked_for() -> None:
    assert [vocab_size_for(depth) for depth in (2, 4, 6, 8, 10, 12, 32)] == [2048, 4096, 8192, 16384] + [32768] * 3
    assert [vocab_size_for(depth, "reference") for depth in (2, 32)] == [32768, 32768]


def test_our_batch_and_decay_follow_the_real_horizon_and_the_reference_ones_do_not() -> None:
    short, long = Horizon(ratio=3), Horizon(ratio=48)
    assert plan_of(12, "reference", short).total_batch_tokens == plan_of(12, "reference", long).total_batch_tokens
    assert plan_of(12, "nanochat", short).total_batch_tokens < plan_of(12, "nanochat", long).total_batch_tokens
    assert plan_of(12, "nanochat", short).weight_decay > plan_of(12, "nanochat", long).weight_decay


def test_learning_rates_are_flat_over_common_batches_and_follow_the_root_of_tiny_and_large_ones() -> None:
    ours, reference = LAWS["nanochat"], LAWS["reference"]
    assert {ours.lr_scale(2**power) for power in range(11, 20)} == {1.0}
    assert ours.lr_scale(2**9) == 0.5
    assert ours.lr_scale(2**21) == reference.lr_scale(2**21) == 2.0
    assert reference.lr_scale(2**19) == 1.0 and reference.lr_scale(2**11) == 2**-4


def test_fine_tuning_has_a_law_of_its_own_for_small_batches() -> None:
    assert sft_plan(100, 2**12, 128).lr_scale == pytest.approx(2**-0.7)
    assert sft_plan(100, 2**12, 128, "reference").lr_scale == pytest.approx(2**-3.5)
    assert sft_plan(100, 2**21, 128).lr_scale == 2.0


def test_backout_is_left_out_where_the_middle_layer_is_the_last_unless_asked_for() -> None:
    assert [model_config(depth).backout for depth in (1, 2, 3, 4, 12)] == [False, False, True, True, True]
    assert model_config(2, laws="reference").backout and model_config(2, backout=True).backout
    assert not model_config(12, backout=False).backout


def test_at_the_reference_point_both_laws_agree() -> None:
    ours, reference = plan_of(12, "nanochat"), plan_of(12, "reference")
    assert (ours.num_steps, ours.total_batch_tokens) == (reference.num_steps, reference.total_batch_tokens)
    assert ours.weight_decay == pytest.approx(reference.weight_decay, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 10, 500, 5000])
def test_a_batch_derived_from_a_number_of_steps_obeys_the_power_law(steps: int) -> None:
    plan = plan_of(12, "nanochat", Horizon(num_steps=steps))
    assert plan.num_steps == steps
    if plan.total_batch_tokens > 2 * 2048:  # one row is the least there is
        tokens, reference_tokens = steps * plan.total_batch_tokens, 12 * scaling_parameters(model_config(12))
        ideal = 2**19 * (tokens / reference_tokens) ** 0.383
        assert 0.6 < plan.total_batch_tokens / ideal < 1.7  # rounding to a power of two


@pytest.mark.parametrize("depth", range(1, 33))
def test_no_depth_lacks_a_plan(depth: int) -> None:
    plan = plan_of(depth, "nanochat")
    assert plan.num_steps >= 50
    assert plan.total_batch_tokens % 2048 == 0
    assert 0 < plan.weight_decay <= 2.0


def test_a_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    with pytest.raises(UserError, match="nearest totals are 4096 and 6144"):
        plan_of(4, "nanochat", total_batch_tokens=5000)


def test_the_schedule_warms_up_holds_and_cools_down() -> None:
    schedule = Schedule()
    lrs = [schedule.lr(step, 2000) for step in range(2001)]
    assert lrs[0] == 1 / 40 and lrs[39] == lrs[700] == 1.0 and lrs[701] < 1.0
    assert lrs[2000] == pytest.approx(0.05)
    assert all(a >= b for a, b in pairwise(lrs[40:]))
    momenta = [schedule.momentum(step, 2000) for step in range(2001)]
    assert (momenta[0], momenta[400], momenta[2000]) == pytest.approx((0.85, 0.97, 0.90))


@pytest.mark.parametrize("num_steps", [1, 2, 30, 300, 528])
def test_our_schedule_is_complete_and_continuous_in_short_runs_too(num_steps: int) -> None:
    plan = TrainingPlan(num_steps, 2048, 1.0, 1.0, 1.0)
    steps = [plan.at(step) for step in range(num_steps)]
    assert max(step.lr for step in steps) == 1.0
    jumps = [abs(a.momentum - b.momentum) for a, b in pairwise(steps)]
    assert all(jump < 0.13 / max(1, num_steps // 5) for jump in jumps)
    assert plan.at(num_steps).weight_decay == pytest.approx(0.0)


def test_the_reference_momentum_jumps_where_the_ancestors_did() -> None:
    plan = plan_of(4, "reference")
    assert plan.at(399).momentum == pytest.approx(0.97, abs=1e-3)
    assert plan.at(400).momentum == pytest.approx(0.926, abs=1e-3)


def test_rows_per_pass_are_the_most_that_divide_a_step() -> None:
    assert [device_batch_rows(rows, at_most=32) for rows in (1, 7, 32, 48, 64, 66, 67)] == [1, 7, 32, 24, 32, 22, 1]


def test_our_batch_follows_its_law_closely_so_that_learning_rates_do_not_jump_between_depths() -> None:
    plans = [plan_of(depth, "nanochat") for depth in range(4, 33, 2)]
    batches = [plan.total_batch_tokens for plan in plans]
    assert batches == sorted(batches)
    assert max(b.lr_scale / a.lr_scale for a, b in pairwise(plans)) < 1.2
    steep = [plan_of(depth, "reference").lr_scale for depth in range(4, 33, 2)]
    assert max(b / a for a, b in pairwise(steep)) == pytest.approx(2**0.5)


@pytest.mark.parametrize("laws", LAWS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8, 16, 64])
def test_every_depth_has_a_plan_on_any_number_of_ranks(world_size: int, laws: str) -> None:
    for depth in range(2, 33):
        config, reference = model_config(depth, laws=laws), model_config(12, laws=laws)
        counts = scaling_parameters(config), scaling_parameters(reference), flops_per_token(config), config.n_embd
        plan = training_plan(*counts, Horizon(), MicroBatch(2048, world_size), laws=laws)
        rows = plan.total_batch_tokens // (2048 * world_size)
        assert rows * 2048 * world_size == plan.total_batch_tokens
        if laws == "nanochat":
            assert rows // device_batch_rows(rows, at_most=32) <= max(1, rows / 8), "passes of a few rows are slow"
            if world_size in (1, 2, 4, 8) and depth >= 6:  # below, a step is but a few rows of this length
                assert plan == plan_of(depth, laws), "the run is the same, whatever runs it"


def test_a_batch_that_ranks_cannot_share_names_totals_and_numbers_of_ranks_that_would_do() -> None:
    MicroBatch(512, 4, 2).check(8192)
    with pytest.raises(
        UserError, match=r"^the run's batch: 8192 must be.*x 3 ranks.*; it can be split over 2 or 4 ranks$"
    ):
        MicroBatch(512, 3).check(8192, is_given=False)
    with pytest.raises(UserError, match=r"over 2 ranks, or give a smaller --device-batch-size$"):
        MicroBatch(512, 3, 8).check(8192, is_given=False)
    with pytest.raises(UserError, match=r"10240 tokens.*nearest total is 10240"):
        MicroBatch(512, 5, 4).check(8192)
    with pytest.raises(UserError, match=r"nearest totals are 7680 and 10240; it can be split over 4 or 8 ranks"):
        MicroBatch(512, 5, 1).check(8192)
    with pytest.raises(UserError, match=r"multiple of 512 tokens") as told:
        MicroBatch(512).check(8000)
    assert "ranks:" not in str(told.value) and "split" not in str(told.value)
