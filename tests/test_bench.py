"""scripts.bench: each mode at a tiny size says what it measured, in figures that fit together, as its last line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.evals.machine import matmul_peak_flops, spread
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
    assert min(result["matmul_peak_gflops"].values()) > 0 and result["threads"] == torch.get_num_threads()
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
        best = 1e9 * max(result["matmul_peak_gflops"].values())
        assert figures["matmul_peak_share"][name] == pytest.approx(flops / best)
    assert figures["tokens_per_s"]["max"] == pytest.approx(128 / figures["step_s"]["min"])
    assert figures["matmul_peak_share"]["max"] < 1


def test_loader_figures_are_shares_of_what_was_read(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    flags = [f"--data-dir={text}", "--vocab-size=300", "--max-seq-len=64", "--device-batch-size=2"]
    figures = measured(capsys, "loader", *flags, "--batches=5", "--repeats=2")["figures"]
    assert figures["tokens_per_s"]["min"] > 0 and figures["first_batch_s"] > 0
    assert 0.9 < figures["real_places_frac"] <= 1
    assert figures["tokens_kept_frac"] == 1  # the packer loses none
    assert figures["tokens"] == (1 + 3 * 5) * 2 * 64  # first batch, warm-up and two repeats


def test_lost_tokens_and_padding_would_be_seen() -> None:
    from nanochat.packing import BestFitPacker

    packer = BestFitPacker(8, "cut", buffer_size=2)
    for ids in ([0] + [1] * 18, [0, 2, 2]):  # three parts, the last two behind an added BOS
        packer.push(ids)
    packer.next_row()
    assert bench.kept_frac(packer.state()) == 1
    assert bench.kept_frac({**packer.state(), "packer_tokens_kept": packer.tokens_kept - 4}) == 0.5


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


def test_time_to_bpb_trains_every_seed_in_a_folder_of_its_own(
    capsys: pytest.CaptureFixture[str], text: Path, base_dir: Path
) -> None:
    flags = [*TINY, f"--data-dir={text}", "--budget=0.5", "--seeds=2", "--seed=7", "--eval-every=8"]
    flags += ["--eval-tokens=500", "--train-flags=--total-batch-size=128 --device-batch-size=2 --logger=none"]
    result = measured(capsys, "time-to-bpb", *flags)
    runs = result["figures"]["runs"]
    assert [run["seed"] for run in runs] == [7, 8]
    for run in runs:
        curve = run["over_time"]
        assert curve[0]["step"] == 0 and curve[-1]["val_bpb"] == run["val_bpb"] < curve[0]["val_bpb"]
        assert [point["train_s"] for point in curve] == sorted(point["train_s"] for point in curve)
        assert run["tokens"] == 128 * run["steps"] and run["train_s"] < run["wall_s"]
    assert runs[0]["val_bpb"] != runs[1]["val_bpb"]
    assert result["figures"]["val_bpb"]["min"] == min(run["val_bpb"] for run in runs)
    assert not base_dir.exists()


def test_a_recipe_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tok_train: left with code 2"):
        bench.run_recipe(tmp_path, "tok_train", "--no-such-flag")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--only=core"], "--only=core: not there yet; choose one of train"),
        (["--only=serve"], "--only=serve: not there yet; choose one of train"),
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


def test_the_matmul_peak_counts_two_operations_per_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat.evals import machine

    monkeypatch.setattr(machine, "CPU_SHAPES", ((64, 64, 64),))
    clock = SimpleNamespace(perf_counter=iter(range(100)).__next__)  # each run takes one second
    monkeypatch.setattr(machine, "time", clock)
    assert matmul_peak_flops(torch.device("cpu"), seconds_per_shape=0) == 2 * 64**3


def test_a_spread_is_median_least_and_most() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0]) == {"median": 2.5, "min": 1.0, "max": 4.0}
