"""What memory the forecast foretells is what a training step holds: exactly, to 15 % or to 25 %, part by part."""

import json
from dataclasses import replace

import pytest
import torch

from nanochat import scaling
from nanochat.checkpoint import num_bytes
from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.evals.memory import SHAPES, LiveBytes, Shape, measure, measure_alone
from nanochat.forecast import USABLE, Setup, divisors, exact_sizes, forecast, in_passes, largest_rows
from nanochat.model.gpt import build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates, model_config
from scripts import bench

CPU = torch.device("cpu")
ODD = ModelConfig(32, 97, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)
CONFIGS = {
    "depth 2": model_config(2, 400, 64),
    "depth 4": model_config(4, 4096, 512),
    "depth 3, width 384": model_config(3, 1000, 64, 128, 64),
    "shared heads, odd vocabulary": ODD,
    "plain, tied, without extras": replace(
        ODD, residual="plain", tied_head=True, smear=False, value_embeddings=False, backout=False
    ),
}
GPU = Setup(model_config(12), rows=32, ranks=8, dtype="bfloat16", is_gpu=True, is_compiled=True)
WHOLE_LOGITS = 10**9  # positions, as the ancestor has them


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_and_every_ranks_share_of_the_optimizers_state_are_exact(name: str, ranks: int) -> None:
    config = CONFIGS[name]
    model = build_model(config, CPU, torch.float32)
    parameters, roles = dict(model.named_parameters()), model.parameter_roles()
    shares = []
    for rank in range(ranks):
        rt = Runtime(CPU, torch.float32, rank, ranks)
        optimizer = MuonAdamW(parameters, roles, BaseRates().by_role(), rt)
        states = [adam.state for adam in optimizer.adam.values()] + [group.state for group in optimizer.muon]
        shares.append(num_bytes(tensor for state in states for tensor in state.values()))
        sizes = exact_sizes(config, ranks, rank)
        assert (sizes.weights, sizes.state) == (num_bytes(parameters.values()), shares[-1])
    assert shares[0] == max(shares), "the forecast is that of rank 0"
    live = forecast(Setup(config, 2, ranks=ranks)).live
    assert (live["weights"], live["optimizer state"]) == (num_bytes(parameters.values()), shares[0])


def test_storages_are_counted_once_while_they_live() -> None:
    given = torch.zeros(1000)
    with LiveBytes() as live:
        live.add(given)
        live.add(given[10:])
        made = given + 1
        view = made.view(10, 100).t()
        assert live.now == 8000
        del made
        assert live.now == 8000 and view is not None
        del view
        assert (live.now, live.peak) == (4000, 8000)
        live.restart_peak()
        given.add_(1)
        torch.empty(5000, device="meta")
        assert live.peak == 4000


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tensors_of_a_step_are_foretold_within_15_percent(shape: Shape) -> None:
    """The promise is 15 %. It is held to 8, so that a part that is forgotten is seen."""
    assert forecast(shape.setup()).live_bytes == pytest.approx(measure(shape)["live_bytes"], rel=0.08)


def test_the_shapes_differ_in_everything_and_are_not_all_tiny() -> None:
    assert len(SHAPES) == 6
    for name in ("depth", "vocab_size", "sequence_len", "rows"):
        assert len({getattr(shape, name) for shape in SHAPES}) >= 4, name
    assert len({shape.setup().config.n_embd for shape in SHAPES}) >= 3
    assert {forecast(shape.setup()).moment for shape in SHAPES} == {"loss", "backward"}
    assert any(shape.vocab_size == 32768 for shape in SHAPES)
    assert {shape.dtype for shape in SHAPES} == {"float32", "bfloat16"}
    mapped_at_most = 2**25  # by glibc's own rule, larger tensors would lie outside of its heap
    assert any(4 * 4 * s.rows * s.sequence_len * s.setup().config.n_embd > mapped_at_most for s in SHAPES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["", "tensorwise", "rowwise"])
def test_precision_and_recipe_are_in_the_forecast(recipe: str, dtype: str) -> None:
    """Uncompiled, tensorwise FP8 keeps eight-bit copies of what layers are given, and rowwise all of it."""
    shape = Shape(4, 1024, 512, 4, dtype=dtype, fp8=recipe)
    assert forecast(shape.setup()).live_bytes == pytest.approx(measure(shape)["live_bytes"], rel=0.08)


SWITCHES = [
    {"residual": "plain"},
    {"qk_norm": False, "key_offset": False},
    {"softcap": 0.0, "tied_head": True},
    {"value_embeddings": False, "smear": False, "backout": False},
    {"mlp_activation": "gelu", "doc_mask": True},
    {"laws": "reference", "window_pattern": "L"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: ",".join(switches))
def test_switches_of_the_model_are_in_the_forecast(switches: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(scaling.model_config(4, 1000, 256, 64, 64, **switches), rows=4)
    monkeypatch.setattr(Shape, "setup", lambda self: setup)
    measured = measure(Shape(4, 1000, 256, 4))["live_bytes"]
    assert forecast(setup).live_bytes == pytest.approx(measured, rel=0.15)


# Width 512 at 16 positions: what the optimizer makes is more than what the backward keeps.
@pytest.mark.parametrize("shape", [Shape(4, 300, 16, 1, 128), Shape(2, 16384, 16, 1, passes=2)], ids=["muon", "tables"])
def test_where_few_tokens_are_trained_on_the_optimizer_decides(shape: Shape) -> None:
    expected = forecast(shape.setup())
    assert expected.moment in ("update", "end")
    assert expected.live_bytes == pytest.approx(measure(shape)["live_bytes"], rel=0.15)


def assert_resident_memory_is_foretold(shape: Shape) -> None:
    """The promise is 25 %. It is held to 20, so that holes in the heap that are forgotten are seen."""
    measured = measure_alone(shape)["rss_bytes"]
    assert forecast(shape.setup()).total_bytes == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_memory_of_the_process_is_foretold_within_25_percent(shape: Shape) -> None:
    assert_resident_memory_is_foretold(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(4, 4096, 512, 32), Shape(8, 1024, 128, 1)], ids=["activations", "weights"])
def test_the_memory_of_a_larger_process_is_foretold(shape: Shape) -> None:
    assert_resident_memory_is_foretold(shape)


@pytest.mark.slow
def test_the_benchmark_compares_both_for_all_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--only=memory", "--device-type=cpu", "--peak-seconds=0"])
    shapes = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]["shapes"]
    assert [shape["depth"] for shape in shapes] == [shape.depth for shape in SHAPES]
    for shape in shapes:
        for name, most in (("live", 0.15), ("rss", 0.25)):
            ratio = shape["forecast"][f"{name}_bytes"] / shape["measured"][f"{name}_bytes"]
            assert ratio == pytest.approx(shape["forecast_to_measured"][name]) == pytest.approx(1, abs=most), shape


def test_the_benchmark_of_memory_has_shapes_of_its_own() -> None:
    with pytest.raises(UserError, match=r"^--depth: --only=memory does not use it; leave it out$"):
        bench.parse_args(["--only=memory", "--depth=4"])


# GPUs: the ancestor's figures, the only ones there are (pretraining spec 8.2, 11.2)


def test_the_ancestors_34_gb_at_depth_12_are_about_what_is_foretold() -> None:
    assert forecast(replace(GPU, logit_positions=WHOLE_LOGITS)).total_bytes == pytest.approx(34e9, rel=0.2)


@pytest.mark.parametrize(
    ("depth", "rows", "fits"),
    [(12, 32, True), (18, 32, True), (20, 32, False), (20, 16, True), (26, 16, True), (28, 16, False), (28, 8, True)],
)
def test_on_80_gb_cards_the_device_batches_fit_that_fitted_the_ancestor(depth: int, rows: int, fits: bool) -> None:
    setup = replace(GPU, config=model_config(depth), logit_positions=WHOLE_LOGITS)
    assert (largest_rows(setup, USABLE * 80 * 2**30, rows_per_step=64) >= rows) == fits


def test_fp8_saves_about_what_it_saved_the_ancestor() -> None:
    setup = replace(GPU, config=model_config(26), rows=16, passes=2)
    for recipe in ("tensorwise", "rowwise"):
        saved = forecast(setup).total_bytes - forecast(replace(setup, fp8_recipe=recipe)).total_bytes
        assert saved == pytest.approx(9e9, rel=0.25)


# Rules


def test_logits_in_chunks_cost_what_the_chunk_costs() -> None:
    cut = Setup(model_config(4, 32768, 512), rows=8)
    whole = replace(cut, logit_positions=WHOLE_LOGITS)
    assert forecast(whole).live["logits and loss"] == 4 * 4 * 8 * 512 * 32768
    assert forecast(cut).live_bytes < 0.35 * forecast(whole).live_bytes
    assert forecast(GPU).total_bytes < forecast(replace(GPU, logit_positions=WHOLE_LOGITS)).total_bytes - 6e9


def test_layers_keep_copies_of_their_weights_as_they_multiply_with_them() -> None:
    setup = Setup(model_config(4, 4096, 64), rows=8, passes=2, dtype="bfloat16")
    recipes = [replace(setup, fp8_recipe=recipe) for recipe in (None, "tensorwise", "rowwise")]
    assert {forecast(each).moment for each in recipes} == {"loss"}
    in_16, in_8, anew = (forecast(each).live.get("cast weights", 0) for each in recipes)
    assert in_16 == 2 * in_8 > 0 == anew


def test_compiled_logits_take_the_bytes_of_their_dtype() -> None:
    setup = replace(GPU, logit_positions=WHOLE_LOGITS)
    in_16, in_32 = (forecast(replace(setup, dtype=dtype)).live["logits and loss"] for dtype in ("bfloat16", "float32"))
    assert in_32 == 2 * in_16 == 2 * 4 * 32 * 2048 * 32768


def test_more_of_anything_needs_more_memory() -> None:
    small = Setup(model_config(4, 4096, 512), rows=4, passes=2)
    least = forecast(small).total_bytes
    for more in (
        replace(small, rows=5),
        replace(small, config=model_config(5, 4096, 512)),
        replace(small, config=model_config(4, 8192, 512)),
        replace(small, config=model_config(4, 4096, 1024)),
    ):
        assert forecast(more).total_bytes > least
    assert forecast(replace(small, passes=1)).total_bytes < least, "one pass has no gradients to begin with"
    assert forecast(replace(GPU, is_compiled=False)).total_bytes > forecast(GPU).total_bytes
    assert forecast(replace(GPU, ranks=1)).live["optimizer state"] > 7 * forecast(GPU).live["optimizer state"]


@pytest.mark.parametrize("free_bytes", [0.9e9, 1.2e9, 2e9])
def test_the_largest_device_batch_fits_and_the_next_that_divides_a_step_does_not(free_bytes: float) -> None:
    setup = Setup(model_config(4, 4096, 512), rows=1)
    rows = largest_rows(setup, free_bytes, rows_per_step=1000)
    place = divisors(1000).index(rows)
    more = divisors(1000)[place - 1]
    fitting, too_many = (in_passes(setup, n, 1000).total_bytes <= free_bytes for n in (rows, more))
    assert 0 < rows < more <= 1000 and fitting and not too_many
    assert largest_rows(setup, 1e12, 1000, at_most=rows) == largest_rows(setup, 1e12, 1000, at_most=more - 1) == rows
    assert largest_rows(setup, free_bytes, rows_per_step=1) == 1
    assert largest_rows(setup, 1e6, rows_per_step=1000) == 0


def test_a_single_pass_is_found_where_halves_of_it_need_more() -> None:
    """Two passes of one row each hold gradients while the second one runs; one pass of two rows does not."""
    setup = Setup(model_config(2, 32768, 128), rows=1)
    whole, halves = (in_passes(setup, rows, 2).total_bytes for rows in (2, 1))
    assert whole < halves
    assert largest_rows(setup, whole, rows_per_step=2) == 2
