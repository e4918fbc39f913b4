"""Linear layers in FP8: the arithmetic is the definition's, and nothing but training is changed by it."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import batches
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.kernels import fp8
from nanochat.kernels.fp8 import Recipe, find_recipe, fp8_linear, quantize
from nanochat.model.gpt import GPT, build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates, TrainingPlan
from nanochat.train.step import train_step
from scripts import base_train, chat_sft

CPU = torch.device("cpu")
CONFIG = ModelConfig(32, 97, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="L")
EMULATED = {name: find_recipe(name, CPU, emulate=True) for name in ("tensorwise", "rowwise")}
BY_NAME = pytest.mark.parametrize("name", ["tensorwise", "rowwise"])


# The definition, written once more --------------------------------------------------------------------------------


def rounded(x: np.ndarray, digits: int, least_exponent: int) -> np.ndarray:
    """The nearest number with so many binary digits behind the first; ties go to the even one."""
    exponents = np.maximum(np.floor(np.log2(np.abs(np.where(x == 0, 1, x)))), least_exponent)
    step = 2.0 ** (exponents - digits)
    return np.round(x / step) * step


def operand(x: np.ndarray, kind: str, axis: int | None) -> np.ndarray:
    """What is left of x after eight bits. Scale and scaled numbers are fp32, all else is float64.

    axis: that shares a scale; None: all of x does.
    """
    digits, least_exponent, largest = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}[kind]
    scale = np.float32(largest / np.maximum(np.abs(x).max(axis=axis, keepdims=axis is not None), 1e-12))
    scaled = (np.float32(x) * scale).astype(np.float64)
    return rounded(np.clip(scaled, -largest, largest), digits, least_exponent) / scale.astype(np.float64)


def layer(x: np.ndarray, w: np.ndarray, g: np.ndarray, is_rowwise: bool) -> dict[str, np.ndarray]:
    """The three products of a layer. x: (M, K), w: (N, K), g: (M, N)."""

    def product(a: np.ndarray, a_kind: str, b: np.ndarray) -> np.ndarray:
        return operand(a, a_kind, 1 if is_rowwise else None) @ operand(b, "e4m3", 0 if is_rowwise else None)

    return {"out": product(x, "e4m3", w.T), "grad_x": product(g, "e5m2", w), "grad_w": product(g.T, "e5m2", x)}


def run_layer(x: Tensor, w: Tensor, g: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    out = fp8_linear(x, w, recipe)
    out.backward(g)
    assert x.grad is not None and w.grad is not None
    return {"out": out.detach(), "grad_x": x.grad, "grad_w": w.grad}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal, but with rows and columns of very different size."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(shape[-1], generator=rng)) * torch.exp(torch.randn(shape[-2], 1, generator=rng))
    return (torch.randn(shape, generator=rng) * sizes).to(device, dtype)


def apart(ours: Tensor, theirs: Tensor | np.ndarray) -> float:
    ours, theirs = ours.double().cpu(), torch.as_tensor(theirs).double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


# Arithmetic -------------------------------------------------------------------------------------------------------


@BY_NAME
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(32, 128, 256), (48, 256, 128), (7, 144, 128)])
def test_forward_and_both_gradients_are_those_of_the_definition(name: str, rows: int, n_in: int, n_out: int) -> None:
    x, w, g = numbers(rows, n_in), numbers(n_out, n_in, seed=1), numbers(rows, n_out, seed=2) * 1e-4
    found = run_layer(x, w, g, EMULATED[name])
    for what, expected in layer(*(t.double().numpy() for t in (x, w, g)), name == "rowwise").items():
        assert apart(found[what], expected) < 1e-6, what
    exact = {"out": x @ w.T, "grad_x": g @ w, "grad_w": g.T @ x}
    for what, plain in exact.items():
        assert 0.01 < apart(found[what], plain) < 0.2, f"{what}: eight bits are few, but not none"


@BY_NAME
def test_in_bfloat16_only_the_result_is_rounded_once_more(name: str) -> None:
    x, w, g = numbers(32, 128).bfloat16(), numbers(128, 128, seed=1), numbers(32, 128, seed=2).bfloat16()
    found = run_layer(x, w, g, EMULATED[name])
    assert [t.dtype for t in found.values()] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for what, expected in layer(*(t.double().numpy() for t in (x, w, g)), name == "rowwise").items():
        assert apart(found[what], expected) < 2**-8, what


@BY_NAME
def test_leading_dims_are_rows(name: str) -> None:
    x, w, g = numbers(4, 8, 128), numbers(128, 128, seed=1), numbers(4, 8, 128, seed=2)
    flat = run_layer(x.flatten(0, 1), w, g.flatten(0, 1), EMULATED[name])
    deep = run_layer(x, w, g, EMULATED[name])
    assert deep["out"].shape == deep["grad_x"].shape == (4, 8, 128)
    assert all(torch.equal(deep[what].flatten(), flat[what].flatten()) for what in flat)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_largest_number_is_kept_exactly_and_nothing_goes_beyond_it(name: str, dtype: torch.dtype) -> None:
    for size in (1e-30, 1e-3, 1.0, 3.3e38):
        x = numbers(16, 64).abs().clamp(max=1) * size
        eight, step = quantize(x, dtype, 1, EMULATED[name])
        assert eight.float().abs().max() == torch.finfo(dtype).max if size > 1e-12 else eight.float().isfinite().all()
        assert size < 1e-12 or (eight.float() * step - x).abs().max() <= 2**-3 * x.max()
    assert quantize(torch.full((2, 2), 1e9), dtype, 1, EMULATED[name])[0].float().isfinite().all()


@BY_NAME
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(name: str) -> None:
    x, w, g = torch.zeros(16, 128), numbers(128, 128), torch.zeros(16, 128)
    assert all(not t.any() for t in run_layer(x, w, g, EMULATED[name]).values())
    for fault in (math.nan, math.inf):
        x[3, 5] = fault
        assert not run_layer(x, w, g, EMULATED[name])["out"].isfinite().all()


def test_rowwise_an_outlier_spoils_its_own_row_only() -> None:
    x, w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)), numbers(128, 128, seed=1)
    x[0, 0] = 1e5
    errors = {name: apart(fp8_linear(x, w, recipe)[1:], (x @ w.T)[1:]) for name, recipe in EMULATED.items()}
    assert errors["rowwise"] < 0.04 and errors["tensorwise"] > 0.1


# The fast path ----------------------------------------------------------------------------------------------------


def check_fast_path(device: str, recipe: Recipe) -> None:
    for rows in (32, 7):  # 7: not a multiple of what the hardware sums over
        x, g = (numbers(rows, n, seed=n, dtype=torch.bfloat16, device=device) for n in (128, 256))
        w = numbers(256, 128, seed=1, device=device)
        fast, emulated = run_layer(x, w, g, recipe), run_layer(x, w, g, replace(recipe, is_emulated=True))
        for what, expected in emulated.items():
            assert fast[what].dtype == expected.dtype
            assert apart(fast[what], expected) < 0.005, (what, rows)  # one rounding to bfloat16, and a faster sum


@BY_NAME
def test_torchs_scaled_product_on_this_cpu_gives_the_emulated_numbers(name: str) -> None:
    recipe = Recipe(is_rowwise=name == "rowwise")
    if not fp8.runs(recipe, CPU):
        pytest.skip("this version of torch has no scaled product on a CPU")
    check_fast_path("cpu", recipe)


@pytest.mark.gpu
@BY_NAME
def test_the_hardware_gives_the_emulated_numbers(name: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8")
    check_fast_path("cuda", find_recipe(name, torch.device("cuda")))


@pytest.mark.gpu
@BY_NAME
def test_a_model_learns_in_fp8_on_a_gpu_through_the_compiler(name: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8")
    rt = Runtime(torch.device("cuda", 0), torch.bfloat16)
    losses = {fp8_name: learn(rt, fp8_name, "on", steps=60) for fp8_name in ("", name)}
    assert losses[name] == pytest.approx(losses[""], rel=0.03)


@pytest.mark.gpu
@BY_NAME
def test_a_gpu_has_fp8_exactly_where_its_makers_say_so(name: str) -> None:
    if torch.cuda.get_device_capability() >= (8, 9):
        assert find_recipe(name, torch.device("cuda")).is_emulated is False
    else:
        with pytest.raises(UserError, match="bfloat16 or float32"):
            find_recipe(name, torch.device("cuda"))


# In a model -------------------------------------------------------------------------------------------------------


def fp8_model(name: str, dtype: torch.dtype = torch.float32) -> GPT:
    model = build_model(CONFIG, CPU, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if name:
        model.use_fp8(EMULATED[name])
    return model


def learn(rt: Runtime, name: str, compile_mode: str = "off", steps: int = 25) -> float:
    """The loss at the end of learning eight rows by heart."""
    model = build_model(CONFIG, rt.device, rt.dtype)
    if name:
        model.use_fp8(find_recipe(name, rt.device, emulate=rt.device.type == "cpu"))
    optimizer = MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), BaseRates().by_role(0.2), rt)
    plan, batch = TrainingPlan(steps, 256, 1.0, 1.0, 0.0), next(batches(8, ignored=0.0))
    loss_fn = rt.compile(model.loss, compile_mode)
    losses = [train_step(loss_fn, iter([batch]), optimizer, plan.at(i), rt) for i in range(steps)]
    assert isinstance(losses[-1], float)
    return losses[-1]


def test_large_layers_are_in_fp8_the_head_included_and_gates_are_not() -> None:
    model = fp8_model("tensorwise")
    chosen = {path for path, module in model.named_modules() if getattr(module, "fp8", None) is not None}
    assert "lm_head" in chosen and {"blocks.0.mlp.c_fc", "blocks.1.mlp.c_proj"} <= chosen
    assert not any("gate" in path for path in chosen)
    weights = dict(model.named_parameters())
    assert all(min(weights[f"{path}.weight"].shape) >= 128 for path in chosen)
    model.use_fp8(None)
    assert all(getattr(module, "fp8", None) is None for module in model.modules())


@BY_NAME
def test_evaluation_is_the_same_bit_for_bit_and_training_is_not(name: str) -> None:
    plain, model = fp8_model(""), fp8_model(name)
    batch = next(batches(4))
    with torch.no_grad():
        assert torch.equal(
            model.token_losses(batch.inputs, batch.targets), plain.token_losses(batch.inputs, batch.targets)
        )
    assert torch.equal(model.eval()(batch.inputs), plain.eval()(batch.inputs))
    losses = [m.train().loss(batch.inputs, batch.targets) for m in (model, plain)]
    assert losses[0] != losses[1] and losses[0].item() == pytest.approx(losses[1].item(), rel=0.05)


@BY_NAME
def test_parameters_and_what_a_checkpoint_holds_bear_the_same_names(name: str) -> None:
    plain, model = fp8_model(""), fp8_model(name)
    assert list(model.state_dict()) == list(plain.state_dict()) == [n for n, _ in plain.named_parameters()]
    assert model.parameter_roles() == plain.parameter_roles()
    plain.load_state_dict(model.state_dict())


@BY_NAME
def test_the_model_compiles_as_one_graph_with_the_same_gradients(name: str) -> None:
    model, batch = fp8_model(name), next(batches(4))
    gradients = []
    for loss_fn in (model.loss, torch.compile(model.loss, fullgraph=True, dynamic=False, backend="aot_eager")):
        loss_fn(batch.inputs, batch.targets, batch.document_ids).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-4)


@BY_NAME
def test_learning_by_heart_in_fp8_ends_near_where_bfloat16_does(name: str) -> None:
    rt = Runtime(CPU, torch.bfloat16)
    assert learn(rt, name) == pytest.approx(learn(rt, ""), rel=0.05)


class CountedProducts(TorchDispatchMode):
    """Adds up the FLOPs of all matrix products that are really done."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        if name in ("aten::mm", "aten::bmm"):
            self.flops += 2 * args[0].numel() * args[1].size(-1)
        elif name == "nanochat::quantized_linear":
            self.flops += 2 * args[0].numel() * args[1].size(0)
        else:
            assert name not in ("aten::addmm", "aten::baddbmm", "aten::mv", "aten::dot", "aten::_scaled_mm"), name
        return out


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, ""),
        (torch.bfloat16, ""),
        (torch.float16, ""),
        (torch.float32, "tensorwise"),
        (torch.bfloat16, "tensorwise"),
        (torch.float32, "rowwise"),
        (torch.bfloat16, "rowwise"),
    ],
)
def test_flops_per_token_are_the_same_in_every_precision_and_those_really_done(dtype: torch.dtype, name: str) -> None:
    model, batch = fp8_model(name, dtype), next(batches(4))
    with CountedProducts() as counted, sdpa_kernel(SDPBackend.MATH):
        model.loss(batch.inputs, batch.targets).backward()
    assert (
        counted.flops / batch.inputs.numel()
        == model.flops_per_token()
        == build_model(CONFIG, CPU, dtype).flops_per_token()
    )


# In a run ---------------------------------------------------------------------------------------------------------

TINY = ["--depth=2", "--max-seq-len=32", "--num-iterations=4", "--device-batch-size=4", "--total-batch-size=128"]
STAGE = ["--eval-every=-1", "--logger=none", "--device-type=cpu"]


def records(base_dir: Path, source: str) -> Iterator[dict[str, Any]]:
    (metrics,) = base_dir.glob(f"checkpoints/{source}/*/metrics.jsonl")
    return (json.loads(line) for line in metrics.read_text().splitlines())


@pytest.mark.usefixtures("tokenizer")
def test_both_stages_train_in_emulated_fp8_and_a_run_goes_on_without_it(
    text: Path, chats: Path, base_dir: Path
) -> None:
    emulated = ["--fp8", "--fp8-emulate", "--fp8-recipe=rowwise"]
    base_train.main([*TINY, *STAGE, f"--data-dir={text}", *emulated])
    chat_sft.main(["--num-iterations=2", *STAGE, f"--data={chats}", *emulated])
    base_train.main([*TINY, *STAGE, f"--data-dir={text}", "--num-iterations=6", "--resume=auto"])
    losses = [record["loss_raw"] for record in records(base_dir, "base") if "loss_raw" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert sum("loss_raw" in record for record in records(base_dir, "sft")) == 2


@pytest.mark.usefixtures("tokenizer")
def test_without_the_hardware_fp8_is_refused_and_told_what_would_do(text: Path) -> None:
    with pytest.raises(UserError, match=r"--fp8: cpu here has no FP8.*bfloat16 or float32.*--fp8-emulate"):
        base_train.main([*TINY, *STAGE, f"--data-dir={text}", "--fp8"])
    for flag in ("--fp8-emulate", "--fp8-recipe=rowwise"):
        with pytest.raises(UserError, match="only with --fp8"):
            chat_sft.parse_args([flag])
