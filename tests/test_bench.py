"""scripts.bench: each mode at a tiny size says what it measured, in figures that fit together, as its last line."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import machine
from nanochat.common import UserError
from nanochat.dataset import open_corpus
from nanochat.evals.time_to_bpb import Recipes
from nanochat.machine import matmul_peak_flops, spread
from nanochat.packing import BestFitPacker, Row
from nanochat.parallel import Runtime
from nanochat.tokenizer import Tokenizer
from scripts import bench

REPO = Path(__file__).resolve().parents[1]
QUICK = ["--device-type=cpu", "--peak-seconds=0"]
TINY = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--vocab-size=300", "--max-seq-len=64"]
ALWAYS = {"bench", "figures", "matmul_peak_gflops", "flags", "threads", "device", "machine", "commit", "wall_s"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the project's own sources as documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    sources = [file.read_text(encoding="utf-8") for file in sorted((REPO / "nanochat").glob("*.py"))]
    documents = [part for source in sources for part in source.split("\n\n") if part.strip()]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def measured(capsys: pytest.CaptureFixture[str], mode: str, *flags: str) -> dict[str, Any]:
    """The JSON object that a mode ends with, after checking what all of them must say."""
    bench.main([f"--only={mode}", *QUICK, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3  # progress before the result
    result = json.loads(lines[-1])
    assert result.keys() >= ALWAYS and result["bench"] == result["flags"]["only"] == mode
    assert result["matmul_peak_gflops"].keys() == {"before", "after"}
    for peaks in result["matmul_peak_gflops"].values():
        assert peaks.keys() == {"float32", result["matmul_peak_dtype"]} and min(peaks.values()) > 0
    assert result["threads"] == torch.get_num_threads()
    assert result["machine"]["cores"] > 0 and result["peak_rss_bytes"] > 0 and result["wall_s"] > 0
    assert_spreads(result["figures"])
    return result


def assert_spreads(value: Any) -> None:
    """Every spread below `value` is positive and in order."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_spreads(part)
    if isinstance(value, dict) and "median" in value:
        assert 0 < value["min"] <= value["median"] <= value["max"]


def test_training_speed_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(capsys, "train", *TINY, "--device-batch-size=2", "--repeats=3")
    figures = result["figures"]
    assert figures["tokens_per_step"] == 128
    for name in ("median", "min", "max"):
        flops = figures["flops_per_s"][name]
        assert flops == pytest.approx(figures["tokens_per_s"][name] * figures["flops_per_token"])
        best = 1e9 * max(peaks[result["matmul_peak_dtype"]] for peaks in result["matmul_peak_gflops"].values())
        assert figures["matmul_peak_share"][name] == pytest.approx(flops / best)
    assert figures["tokens_per_s"]["max"] == pytest.approx(128 / figures["step_s"]["min"])
    assert figures["matmul_peak_share"]["max"] < 1


def test_a_server_is_timed_idle_nearly_full_and_full(capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(capsys, "serve", "--depth=2", "--repeats=2")
    figures, kinds = result["figures"], {"first_token_idle_s", "abort_idle_s", "first_token_busy_s", "abort_busy_s"}
    assert result["flags"]["depth"] == 2 and figures.keys() == kinds | {"refusal_s"}
    assert 0 < figures["refusal_s"]["p50"] <= figures["refusal_s"]["p99"] <= figures["refusal_s"]["max"]


BUDGET_S = 6.0  # start-up included
LOADER = [*TINY, "--device-batch-size=2", "--repeats=2"]


def test_the_loader_is_timed_from_text_to_batch(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    figures = measured(capsys, "loader", f"--data-dir={text}", *LOADER)["figures"]
    documents = list(open_corpus(text).train.documents())
    tokenizer = Tokenizer.train(documents, 300)
    began = time.perf_counter()
    encoded = tokenizer.encode_batch(documents, prepend=tokenizer.bos)
    encode_s = time.perf_counter() - began
    num_tokens = sum(map(len, encoded))
    assert figures["tokens_per_s"]["max"] < 3 * num_tokens / encode_s  # tokenising is a part of it
    assert figures["first_batch_s"]["max"] > 0.2 * num_tokens / figures["tokens_per_s"]["max"]  # packs a window
    assert figures["step_wait_frac"]["drawn_by_step"]["max"] < 1
    assert figures["step_wait_frac"]["prefetched"]["max"] < 1
    assert figures["tokens_kept_frac"] == 1 and 0.9 < figures["real_places_frac"] <= 1
    # an epoch, the window here: every token is a target but a row's first, and the last batches may be cut off
    rows = 2 * figures["batches"]
    assert num_tokens - 3 * 64 < figures["tokens"] + rows <= num_tokens + rows
    assert figures["tokens"] <= rows * 64


def test_lost_tokens_would_be_seen(
    capsys: pytest.CaptureFixture[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_row = BestFitPacker.next_row

    def lossy(packer: BestFitPacker) -> Row:
        row = make_row(packer)
        if len(packer):
            packer._take(packer._oldest())
        return row

    monkeypatch.setattr(BestFitPacker, "next_row", lossy)
    figures = measured(capsys, "loader", f"--data-dir={text}", *LOADER)["figures"]
    assert 0.1 < figures["tokens_kept_frac"] < 0.99


def test_padding_would_be_seen(capsys: pytest.CaptureFixture[str], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short_row(packer: BestFitPacker) -> Row:
        piece = packer._take(packer._oldest())
        packer.tokens_kept += len(piece) - piece.is_part
        return Row((piece,), packer.capacity)

    monkeypatch.setattr(BestFitPacker, "next_row", short_row)
    figures = measured(capsys, "loader", f"--data-dir={text}", *LOADER)["figures"]
    assert figures["tokens_kept_frac"] == 1 and 0.5 < figures["real_places_frac"] < 0.95


def test_text_of_less_than_a_batch_cannot_be_measured(text: Path) -> None:
    with pytest.raises(UserError, match="the text holds less than a batch of 10000 rows"):
        bench.main(["--only=loader", f"--data-dir={text}", *QUICK, *LOADER, "--device-batch-size=10000"])


def test_tokenizer_figures_hold_for_both_thread_counts(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    flags = [f"--data-dir={text}", "--vocab-size=300", "--max-chars=20000", "--repeats=2"]
    figures = measured(capsys, "tokenizer", *flags)["figures"]
    assert figures["train_mb_per_s"]["min"] > 0 and figures["decode_tokens_per_s"]["min"] > 0
    assert figures["encode_mb_per_s"].keys() == {"1", "2"}
    assert figures["round_trip"] is True
    assert figures["train_mb"] == pytest.approx(0.02, rel=0.05)  # characters of more than one byte
    assert 1 < figures["bytes_per_token"] < 4  # 300 ids are few


def test_decoding_is_measured_at_three_batch_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt-tokens=4", "--new-tokens=4", "--long-prompt-tokens=80", "--repeats=2"]
    figures = measured(capsys, "decode", *TINY, *flags)["figures"]
    assert figures["tokens_per_s"].keys() == {"1", "4", "16"}
    assert figures["sequence_len"] == 81  # the context grows with the long prompt
    first = figures["first_token_s"]
    assert figures["prefill_tokens_per_s"]["max"] == pytest.approx(80 / first["min"])
    assert figures["weight_bytes_per_token"]["ours"] >= 4 * (2 * 12 * 32**2 + 32 * 320)  # matrices and head
    assert figures["memory_bound_frac"]["ours"]["median"] > 0


def test_time_to_bpb_trains_every_seed_in_a_folder_of_its_own(
    capsys: pytest.CaptureFixture[str], text: Path, base_dir: Path
) -> None:
    flags = [*TINY, f"--data-dir={text}", f"--budget={BUDGET_S}", "--seeds=2", "--seed=7", "--eval-every=100"]
    flags += ["--eval-tokens=500", "--train-flags=--total-batch-size=128 --device-batch-size=2 --logger=none"]
    result = measured(capsys, "time-to-bpb", *flags)
    runs = result["figures"]["runs"]
    assert [run["seed"] for run in runs] == [7, 8]
    for run in runs:
        curve = run["over_time"]
        assert run["val_bpb"].keys() == {"first_tokens", "reference_rows", "whole_documents"}
        assert curve[0]["step"] == 0 and curve[-1]["val_bpb"] == run["val_bpb"]["first_tokens"] < curve[0]["val_bpb"]
        assert run["seconds"] == run["startup_s"] + run["train_s"] > 0.9 * BUDGET_S
        assert [point["train_s"] for point in curve] == sorted(point["train_s"] for point in curve)
        assert run["tokens"] == 128 * run["steps"] and run["train_s"] < run["wall_s"]
    assert runs[0]["val_bpb"] != runs[1]["val_bpb"]
    for name, spread_of in result["figures"]["val_bpb"].items():
        assert spread_of["min"] == min(run["val_bpb"][name] for run in runs)
    assert result["peak_rss_bytes"] == max(run["peak_rss_bytes"] for run in runs)
    assert result["cpu_s"] > 0.5 * sum(run["train_s"] for run in runs)  # the runs' own, not the waiting parent's
    assert not base_dir.exists()


def test_a_recipe_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tok_train: left with code 2"):
        Recipes(tmp_path, ()).run("tok_train", "--no-such-flag")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--only=core"], "--only=core: choose one of train"),
        (["--only=serve", "--vocab-size=512"], "--vocab-size: --only=serve does not use it"),
        (["--only=disk"], "--only=disk: choose one of train"),
        ([], "--only: needed; choose one of train"),
        (["--only=train", "--budget=3"], "--budget: --only=train does not use it"),
        (["--only=decode", "--data-dir=x"], "--data-dir: --only=decode does not use it"),
        (["--only=time-to-bpb", "--train-flags='"], "--train-flags=': No closing quotation"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(flags: list[str], told: str) -> None:
    with pytest.raises(UserError) as raised:
        bench.parse_args(flags)
    assert str(raised.value).startswith(told) and "\n" not in str(raised.value)


def test_as_a_process_it_refuses_with_code_2() -> None:
    command = [sys.executable, "-m", "scripts.bench", "--only=core"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --only=core") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matmul_peak_counts_two_operations_per_product_in_the_dtype_asked_for(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, used = torch.mm, set()
    monkeypatch.setattr(torch, "mm", lambda a, b, out: used.add(a.dtype) or multiply(a, b, out=out))
    monkeypatch.setattr(machine, "CPU_SHAPES", ((64, 64, 64),))
    clock = SimpleNamespace(perf_counter=iter(range(100)).__next__)  # each run takes one second
    monkeypatch.setattr(machine, "time", clock)
    assert matmul_peak_flops(Runtime(torch.device("cpu"), torch.float64), dtype, seconds_per_shape=0) == 2 * 64**3
    assert used == {dtype}


def test_a_spread_is_median_least_and_most() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0]) == {"median": 2.5, "min": 1.0, "max": 4.0}
