"""On a GPU training gives the same losses as where it is exact, compiled or not, and says what memory it took.

Every test is also run on a CPU, at a toy's size, so that the tests themselves are tested where there is no GPU.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import pytest
import torch

from nanochat.config import ModelConfig
from nanochat.dataset import Corpus, open_corpus
from nanochat.loader import PretrainLoader
from nanochat.machine import describe_machine
from nanochat.model.gpt import build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates, Multipliers, model_config
from nanochat.tokenizer import Tokenizer
from nanochat.train.metrics import read_metrics
from nanochat.train.step import train_step
from scripts import bench

pytestmark = pytest.mark.filterwarnings("default")  # compilers and drivers warn as they like: the numbers count here

REPO = Path(__file__).resolve().parents[1]
STEPS = 20
LR = 0.1  # of the base rates; at 0.5 the first steps leap, and leaps of 4 % between dtypes mean nothing
LEAST_FALL = 0.4  # nats: else there is nothing to compare


@dataclass(frozen=True)
class Size:
    """How large a test is on a device."""

    depth: int
    width: int
    length: int
    rows: int

    def config(self, vocab_size: int) -> ModelConfig:
        head_dim = min(128, self.width)
        return model_config(self.depth, vocab_size, self.length, self.width // self.depth, head_dim)


SIZES = {"cpu": Size(2, 128, 64, 8), "cuda": Size(6, 384, 512, 16)}
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return open_corpus(Path("stdlib"))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return Tokenizer.train(islice(corpus.train.documents(), 40), 512)


def losses(corpus: Corpus, tokenizer: Tokenizer, device: str, dtype: torch.dtype, compile_mode: str) -> list[float]:
    """Of the first steps of a training, always from the same weights on the same text."""
    size, rt = SIZES[device], Runtime(torch.device(device, 0) if device == "cuda" else torch.device(device), dtype)
    model = build_model(size.config(tokenizer.vocab_size), rt.device, rt.dtype, seed=0)
    optimizer = MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), BaseRates().by_role(), rt)
    loader = PretrainLoader(corpus.train, tokenizer, size.rows, size.length, seed=0)
    loss_fn = rt.compile(model.loss, compile_mode)
    found = [train_step(loss_fn, loader, optimizer, Multipliers(LR, 0.9, 0.0), rt) for _ in range(STEPS)]
    assert all(isinstance(loss, float) for loss in found)
    return [float(loss or 0) for loss in found]


def largest_difference(some: list[float], others: list[float]) -> float:
    """Between two curves, relative."""
    return max(abs(a - b) / b for a, b in zip(some, others, strict=True))


def assert_same_curve(found: list[float], exact: list[float], at_first: float) -> None:
    """Both fall, and together. A difference of one rounding grows by half in each step, so the first ones must agree
    best."""
    assert exact[-1] < exact[0] - LEAST_FALL
    assert largest_difference(found[:5], exact[:5]) < at_first
    assert largest_difference(found, exact) < 0.02


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_bfloat16_learns_as_float32_does(device: str, corpus: Corpus, tokenizer: Tokenizer) -> None:
    exact = losses(corpus, tokenizer, device, torch.float32, "off")
    found = losses(corpus, tokenizer, device, torch.bfloat16, "off")
    assert found != exact
    assert_same_curve(found, exact, at_first=0.005)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), ON_GPU])
def test_compiled_it_learns_as_it_does_uncompiled(device: str, corpus: Corpus, tokenizer: Tokenizer) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain, compiled = (losses(corpus, tokenizer, device, dtype, mode) for mode in ("off", "on"))
    # bfloat16 rounds less often where operations are fused
    assert_same_curve(compiled, plain, at_first=0.005 if device == "cuda" else 1e-4)


# The recipes -----------------------------------------------------------------------------------------------------

TOY = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--device-batch-size=8"]
RUNS = {
    "cpu": (40, 400, [*TOY, "--total-batch-size=512", "--eval-tokens=2000"]),
    "cuda": (
        200,
        4096,
        [
            "--depth=12",
            "--max-seq-len=1024",
            "--total-batch-size=16384",
            "--device-batch-size=16",
            "--eval-tokens=65536",
        ],
    ),
}


def run_recipe(base: Path, name: str, *flags: str) -> None:
    """As a user starts it: what a driver does to its process is not done to the tests'."""
    command = [sys.executable, "-m", f"scripts.{name}", "--data-dir=stdlib", "--offline", *flags]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(base)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_the_loss_falls_on_pythons_own_library_and_is_always_a_number(device: str, tmp_path: Path) -> None:
    """Two hundred steps of depth 12 on a GPU: tokenizer, loader, prefetching, compiler, optimizer, checkpoint."""
    steps, vocab_size, flags = RUNS[device]
    run_recipe(tmp_path, "tok_train", f"--vocab-size={vocab_size}", "--max-chars=2000000")
    run_recipe(
        tmp_path,
        "base_train",
        *flags,
        f"--num-iterations={steps}",
        f"--device-type={device}",
        "--run=check",
        "--logger=none",
    )
    records = read_metrics(tmp_path / "checkpoints" / "base" / "check" / "metrics.jsonl")
    curve = [record["loss_raw"] for record in records if "loss_raw" in record]
    assert len(curve) == steps and all(map(math.isfinite, curve))
    tenth = steps // 10
    assert mean(curve[-tenth:]) < mean(curve[:tenth]) - 0.5
    bpb = [record["val_bpb"] for record in records if "val_bpb" in record]
    assert len(bpb) >= 2 and bpb[-1] < 0.9 * bpb[0]


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_the_peak_of_memory_is_counted(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds at least weights, gradients and the optimizer's state, and no more than there is."""
    size = SIZES[device]
    flags = [
        f"--depth={size.depth}",
        f"--aspect-ratio={size.width // size.depth}",
        f"--head-dim={min(128, size.width)}",
    ]
    flags += [f"--max-seq-len={size.length}", f"--device-batch-size={size.rows}", "--vocab-size=512", "--repeats=2"]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench.main(["--only=train", f"--device-type={device}", "--compile=off", "--peak-seconds=0", *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    least = 12 * result["figures"]["parameters"]  # of Muon's parameters, float32
    if device == "cuda":
        most = torch.cuda.get_device_properties(0).total_memory
        assert least < result["figures"]["peak_device_bytes"] < most
    else:
        assert result["figures"]["peak_device_bytes"] is None
        assert least < result["peak_rss_bytes"] < describe_machine()["memory_bytes"]
