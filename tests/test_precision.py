"""Compute dtypes, loss scaling, losses that are not finite, and compilers that fail."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import PLAN as RANKS_PLAN
from test_ranks import my_batches, on_ranks, training, weights_of
from test_train import PLAN, RT, batches, tiny_training
from torch import Tensor

from nanochat import parallel, precision
from nanochat.common import UserError
from nanochat.loader import Batch
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime, find_device, runtime
from nanochat.precision import CPU_FEATURES, LossScaler, choose_dtype, features_in, speedup
from nanochat.scaling import BaseRates
from nanochat.train.loop import Loop, Progress
from nanochat.train.step import Skipped, train_step
from scripts import base_train, chat_sft, tok_train

CPU = torch.device("cpu")
HALF = Runtime(CPU, torch.float16)


# The compute dtype ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without any instructions for small types."""
    monkeypatch.setattr(precision, "cpu_features", set)


@pytest.mark.usefixtures("plain_cpu")
def test_a_cpu_without_bfloat16_never_computes_in_it_unless_told() -> None:
    assert choose_dtype(CPU, in_batches=True) == torch.float32


@pytest.mark.parametrize(
    ("features", "chosen"),
    [({"avx2", "avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16), ({"bf16", "i8mm"}, torch.float32)],
)
def test_a_cpu_with_fast_bfloat16_trains_in_it_and_no_clock_is_asked(
    features: set[str], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: features)
    monkeypatch.setattr(precision, "speedup", lambda *_: pytest.fail("a busy moment must not decide"))
    assert choose_dtype(CPU, in_batches=True) == chosen
    assert choose_dtype(CPU) == torch.float32, "decoding casts all weights for every token"


def test_this_machines_choice_is_backed_by_its_clock() -> None:
    if choose_dtype(CPU, in_batches=True) == torch.bfloat16:
        assert speedup(CPU, torch.bfloat16) > 1


def test_instruction_sets_are_read_from_what_linux_tells() -> None:
    x86 = "model name\t: A bf16 chip\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\nbugs\t\t: amx_bf16\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd asimdhp bf16\n"
    assert features_in(x86) == {"fpu", "avx512f", "avx512_bf16", "amx_tile"}
    assert features_in(arm) & CPU_FEATURES[torch.bfloat16] and features_in(arm) & CPU_FEATURES[torch.float16]
    assert features_in("") == set()


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("wish", ["float16", "bfloat16"])
def test_what_a_cpu_only_emulates_works_with_one_warning_of_what_it_costs(
    wish: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", wish)
    assert choose_dtype(CPU) == precision.DTYPES[wish]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and f"warning: NANOCHAT_DTYPE={wish}" in told[0] and "times as long" in told[0]


@pytest.mark.parametrize("wish", ["float32", "float64"])
def test_what_every_cpu_has_needs_no_warning(
    wish: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", wish)
    assert choose_dtype(CPU) == precision.DTYPES[wish]
    assert capsys.readouterr().out == ""


def test_an_unknown_dtype_is_told_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "half")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=half: choose one of float32, bfloat16, float16, float64"):
        choose_dtype(CPU)


def test_a_gpu_from_before_bfloat16_computes_in_float32_and_names_float16_as_next_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    gpu = torch.device("cuda", 0)
    assert choose_dtype(gpu) == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    with pytest.raises(UserError, match=r"NANOCHAT_DTYPE=bfloat16: cuda.*next best is float16"):
        choose_dtype(gpu)


def test_a_gpu_that_has_bfloat16_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_dtype(torch.device("cuda", 0)) == torch.bfloat16


def test_mps_computes_in_float32_and_what_it_cannot_do_names_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    assert choose_dtype(mps) == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "float64")
    with pytest.raises(UserError, match=r"NANOCHAT_DTYPE=float64: mps.*next best is float32"):
        choose_dtype(mps)


def test_a_device_that_is_not_there_is_told_what_is() -> None:
    missing = "xpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(UserError, match=rf"--device-type={missing}: not present here; this machine has .*cpu"):
        find_device(missing, 0)
    assert find_device("cpu", 0) == CPU


@pytest.mark.gpu
def test_a_real_gpu_gets_a_dtype_that_it_computes_in() -> None:
    with runtime("cuda") as rt:
        assert rt.dtype == (torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32)
        ones = torch.ones(16, 16, dtype=rt.dtype, device=rt.device)
        assert (ones @ ones).sum().item() == 16**3


def choices(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """What becomes of ranks that chose differently, and alike."""
    differing = parallel.agreed_dtype(torch.bfloat16 if rt.rank else torch.float32, rt.device)
    alike = [parallel.agreed_dtype(dtype, rt.device) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    return {str(i): torch.zeros((), dtype=dtype) for i, dtype in enumerate([differing, *alike])}


def test_ranks_whose_probes_differ_all_compute_in_float32(tmp_path: Path) -> None:
    for found in on_ranks(2, choices, tmp_path):
        assert [found[i].dtype for i in "0123"] == [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# Loss scaling -----------------------------------------------------------------------------------------------------


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


# Losses that are not finite ---------------------------------------------------------------------------------------


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
    rt = Runtime(CPU, dtype)
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


# Compilers that fail ----------------------------------------------------------------------------------------------


def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    raise OSError("no space left for generated code")


def failing_in_the_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=failing)(graph, inputs)


@pytest.mark.parametrize("backend", [failing, failing_in_the_backward])
def test_where_compilation_fails_training_goes_on_with_one_warning(
    backend: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (model, optimizer), (plain, exact) = tiny_training(), tiny_training()
    torch._dynamo.reset()
    loss_fn, stream, other = RT.compile(model.loss, "on", backend=backend), batches(4), batches(4)
    for i in range(3):
        ours = train_step(loss_fn, stream, optimizer, PLAN.at(i), RT, 2)
        assert ours == train_step(plain.loss, other, exact, PLAN.at(i), RT, 2)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    for part in ("warning: torch.compile failed", "no space left for generated code", "slower", "--compile=off"):
        assert part in told[0]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, on import
def test_without_a_cxx_compiler_training_goes_on_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    from torch._inductor import config as inductor

    model, optimizer = tiny_training()
    torch._dynamo.reset()
    loss_fn = RT.compile(model.loss, "on")
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        for i in range(2):
            assert isinstance(train_step(loss_fn, batches(4), optimizer, PLAN.at(i), RT), float)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "warning: torch.compile failed" in told[0] and "compiler" in told[0].lower()


def test_an_error_of_the_function_itself_is_not_taken_for_the_compilers(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ x  # (2, 3) times (2, 3)

    def refusing(x: Tensor) -> Tensor:
        raise UserError("refused")

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|shapes cannot be multiplied"):
        RT.compile(wrong, "on", backend="eager")(torch.ones(2, 3))
    with pytest.raises(UserError, match="refused"):
        RT.compile(refusing, "on", backend="eager")(torch.ones(2, 3))
    assert capsys.readouterr().out == ""


# In a run ---------------------------------------------------------------------------------------------------------

TINY = ["--depth=2", "--max-seq-len=32", "--device-batch-size=4", "--total-batch-size=128", "--aspect-ratio=32"]
TINY += ["--head-dim=32", "--save-every=3"]
STAGE = ["--eval-every=-1", "--logger=none", "--device-type=cpu"]


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
    losses = [record["loss_raw"] for record in records(base_dir, "sft") if "loss_raw" in record]
    assert len(losses) == 3 and all(map(math.isfinite, losses))


@pytest.mark.usefixtures("tokenizer")
def test_a_run_that_goes_on_in_another_dtype_says_so(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*TINY, *STAGE, f"--data-dir={text}", "--num-iterations=6"]
    for dtype, flags, is_told in (
        ("float32", ["--num-iterations=3"], False),
        ("float32", ["--resume=3"], False),
        ("float16", ["--resume=3"], True),
    ):
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
        base_train.main([*run, *flags])
        assert (
            "note: it was trained in torch.float32 and goes on in torch.float16" in capsys.readouterr().out
        ) is is_told


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
