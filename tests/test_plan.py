"""scripts.plan: what it foretells is what the run then does; its figures fit together; its page is its own output."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import planning
from nanochat.checkpoint import run_folder
from nanochat.common import UserError, plural, read_record, record_path
from nanochat.costs import cpu_machine
from nanochat.download import CHARS_PER_TOKEN, KNOWN, Wish, tokens_of_depth
from nanochat.hardware import core_flops
from nanochat.hub import Listing, RemoteShard
from nanochat.scaling import Schedule
from scripts import base_train, plan

REPO = Path(__file__).resolve().parents[1]
GIB = 2**30


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The JSON object that ends a plan, behind a table for people."""
    plan.main([*flags, "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20 and max(map(len, lines[:-1])) < 120
    return json.loads(lines[-1])


RUNS = {
    "steps": ["--num-iterations=3", "--total-batch-size=1024", "--device-batch-size=4"],
    "derived batch": ["--num-iterations=2", "--head-dim=64", "--window-pattern=L"],
    "FLOPs": ["--target-flops=2e9", "--laws=reference", "--total-batch-size=512"],
    "ratio": ["--target-param-data-ratio=0.01", "--no-value-embeddings", "--tied-head"],
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
@pytest.mark.usefixtures("tokenizer")
def test_a_run_does_what_was_planned(flags: list[str], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*flags, "--depth=2", "--aspect-ratio=16", "--max-seq-len=64", f"--data-dir={text}"]
    flags += ["--eval-every=-1", "--logger=none", "--compile=off", "--device-type=cpu"]
    flags += [] if any("head-dim" in flag for flag in flags) else ["--head-dim=16"]
    base_train.main(flags)
    out = capsys.readouterr().out
    record = read_record(record_path("base_train"))
    expected = planned(capsys, *flags, "--gpus=cpu", "--vocab-size=400")
    training, memory = expected["training"], expected["memory"]
    assert expected["model"] == record["model"]
    assert expected["parameters"]["total"] == record["parameters"]
    assert [training[name] for name in ("steps", "tokens", "flops")] == [
        record[name] for name in ("steps", "tokens", "flops")
    ]
    assert memory["rows"] == record["device_batch_size"]
    assert (
        f"{training['batch_tokens']:,} tokens" in out
        and f"{plural(memory['rows'], 'row')} x {plural(memory['passes'], 'pass')}" in out
    )
    written = sorted((run_folder("base", "d2")).glob("step_*"))
    assert len(written) == expected["disk"]["most_at_once"] == 1
    on_disk = sum((written[0] / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer"))
    assert on_disk == pytest.approx(expected["disk"]["checkpoint_bytes"], rel=0.02, abs=20_000)  # names of tensors


def test_depth_20_on_8_gpus_is_the_model_and_the_memory_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(capsys, "--depth=20", "--gpus=8xH100")
    assert run["parameters"]["total"] == 896_533_746 and run["parameters"]["scaling"] == 435_160_240
    assert run["training"]["flops"] == pytest.approx(1.507e19, rel=0.001)
    memory, training = run["memory"], run["training"]
    assert sum(memory["parts_bytes"].values()) == memory["total_bytes"] <= memory["usable_bytes"] < 80 * GIB
    assert memory["rows"] * memory["passes"] * 8 * 2048 == training["batch_tokens"]
    assert memory["rows"] <= memory["largest_rows"] and memory["fits"]
    assert training["steps"] * training["batch_tokens"] == training["tokens"]
    time, money = run["time"], run["money"]
    assert time["training_hours"] * 3600 == pytest.approx(training["flops"] / (8 * 0.4 * 989e12))
    assert money["dollars"] == pytest.approx(8 * money["price_per_device_hour"] * time["hours"])
    assert run["disk"]["checkpoint_bytes"] == pytest.approx(4 * 896_533_746 + 8 * 503e6 + 4 * 393.5e6, rel=0.01)


def test_shards_are_counted_as_the_download_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    for depth in (4, 20):
        shards = planned(capsys, f"--depth={depth}")["text"]["train_shards"]
        listing = Listing("a/b", "0" * 40, None, tuple(RemoteShard(f"{i}", f"{i}", 1, None) for i in range(200)))
        wish = Wish(None, tokens_of_depth(depth, None) * CHARS_PER_TOKEN, KNOWN["climbmix"].chars_per_shard)
        assert shards == len(wish.train_shards(listing))
        capsys.readouterr()


def test_price_utilisation_and_horizon_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depth=12", "--gpus=2xH800", "--eval-every=-1"]
    unpriced = planned(capsys, *flags)
    assert unpriced["money"] == {"price_per_device_hour": None, "price_is": None, "dollars": None}
    run = planned(capsys, *flags, "--price=2", "--utilisation=0.2")
    assert run["time"]["hours"] == pytest.approx(2 * unpriced["time"]["hours"])
    assert run["money"]["dollars"] == pytest.approx(4 * run["time"]["hours"]) and run["money"]["price_is"] == "given"
    budget = planned(capsys, *flags, "--time-budget=7200")
    assert budget["time"]["hours"] == 2
    assert budget["training"]["flops"] == pytest.approx(7200 * 2 * 0.4 * 756e12, rel=0.01)


def test_the_schedule_is_that_of_the_flags() -> None:
    flags = ["--warmup-steps=3", "--warmdown-ratio=0.5", "--final-lr-frac=0.1", "--weight-decay=0"]
    training = planning.base_plan(planning.request_of(plan.parse_args(flags)), 4096, 1, 1.0).training
    assert (training.schedule, training.weight_decay) == (Schedule(3, 0.5, 0.1), 0)


def test_gpus_compute_in_the_dtype_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert planned(capsys, "--depth=12", "--gpus=H200")["memory"]["dtype"] == "float16"
    monkeypatch.setenv("NANOCHAT_DTYPE", "int4")
    for machine in ("cpu", "H200"):
        with pytest.raises(UserError, match=r"^NANOCHAT_DTYPE=int4: choose one of .*bfloat16"):
            plan.main(["--depth=12", f"--gpus={machine}"])


def test_checkpoints_are_counted_by_what_the_flags_keep(capsys: pytest.CaptureFixture[str]) -> None:
    def at_once(*flags: str) -> int:
        run = planned(capsys, "--depth=4", "--gpus=cpu", "--max-seq-len=128", "--num-iterations=1000", *flags)
        assert run["disk"]["bytes"] == run["disk"]["most_at_once"] * run["disk"]["checkpoint_bytes"]
        return run["disk"]["most_at_once"]

    assert at_once("--save-every=-1") == 1
    assert at_once("--save-every=500") == 2
    assert at_once() == 4  # the last two, the best one, and one that is being written
    assert at_once("--eval-every=-1") == 3
    assert at_once("--keep-every=250") == 4  # all there are
    assert at_once("--save-every=100", "--keep-every=200") == 8
    assert at_once("--save-every=30", "--keep-every=20") == 20  # 990 and 1,000, 16 multiples of 60, and two
    # so many steps that a list of them would fill the memory
    assert at_once("--num-iterations=4000000000", "--save-every=1", "--keep-every=1000") == 4_000_003


def test_a_model_that_is_too_narrow_for_a_gpu_is_said_to_get_less(capsys: pytest.CaptureFixture[str]) -> None:
    for depth, warned in ((4, True), (11, False), (20, False)):
        plan.main([f"--depth={depth}", "--gpus=H200"])
        out = capsys.readouterr().out
        assert "40% of the bf16 peak, assumed" in out and ("a small model gets less" in out) == warned


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--depth=12", "--gpus=RTX4090", "--device-batch-size=128"])
    out = capsys.readouterr().out
    rows = int(out.splitlines()[-1].removeprefix("does not fit: give --device-batch-size="))
    assert planned(capsys, "--depth=12", "--gpus=RTX4090", f"--device-batch-size={rows}")["memory"]["fits"]
    plan.main(["--depth=32", "--gpus=L4"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("does not fit: not even one row a pass")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpus=TPU"], "--gpus=TPU: not a machine that is known; give NAME or 8xNAME of cpu, GB200, "),
        (["--gpus=8xh1000"], "--gpus=8xh1000: not a machine that is known; did you mean H100? Known are cpu, GB200, "),
        (["--gpus=0xH100"], "--gpus=0xH100: the number of devices must be at least 1"),
        (["--gpus=2xcpu"], "--gpus=2xcpu: cpu is this machine with all its cores; there is one of it"),
        (["--gpus=cpu", "--utilisation=0.5"], "--utilisation: of a GPU's peak; leave it out with --gpus=cpu"),
        (["--gpus=cpu", "--fp8"], "--fp8: a CPU has no FP8 products; leave it out, or add --fp8-emulate"),
        (["--gpus=8xA100", "--fp8"], "--fp8: A100 has no FP8 products; leave it out, or add --fp8-emulate"),
        (["--gpus=3xH100", "--total-batch-size=4096"], "--total-batch-size: 4096 must be a multiple of 6144 tokens"),
        (["--num-iterations=3", "--time-budget=3"], "--num-iterations, --time-budget: give one of them"),
        (["--table", "--json"], "--table, --json: give one of them"),
        (["--price=-1"], "--price=-1: must be a number of at least 0"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(flags: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        plan.parse_args(flags)
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_hours_follow_the_dtype_and_one_without_a_known_speed_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = {}
    for dtype in ("bfloat16", "float16", "float32"):
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
        hours[dtype] = planned(capsys, "--depth=12", "--gpus=H100")["time"]["training_hours"]
    assert hours["float32"] == pytest.approx(2 * hours["bfloat16"]) and hours["float16"] == hours["bfloat16"]
    monkeypatch.setenv("NANOCHAT_DTYPE", "float64")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=float64: no speed of GPUs is known; choose one of bfloat16"):
        plan.main(["--depth=12", "--gpus=H100"])


def test_tokens_of_a_time_budget_are_those_that_the_given_utilisation_makes_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for share in (0.2, 0.5):
        told = planned(capsys, "--depth=12", "--gpus=H100", "--time-budget=7200", f"--utilisation={share}")
        assert told["training"]["tokens"] == pytest.approx(7200 * told["time"]["tokens_per_s"], rel=0.01)


def test_a_dtype_that_a_cpu_emulates_makes_it_slower() -> None:
    native, emulated = (cpu_machine(2, 2**34, "bfloat16", is_emulated=flag).flops for flag in (False, True))
    assert emulated < 2 * core_flops("float32") < native


def test_as_a_process_it_refuses_an_unknown_gpu_with_code_2() -> None:
    command = [sys.executable, "-m", "scripts.plan", "--depth=20", "--gpus=8xH1000"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --gpus=8xH1000: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
@pytest.mark.usefixtures("tokenizer")
def test_a_plan_for_the_cpu_has_the_dtype_and_the_rows_that_a_run_takes_here(
    dtype: str | None, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    if dtype:
        monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    flags = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--num-iterations=1"]
    base_train.main([*flags, f"--data-dir={text}", "--eval-every=-1", "--logger=none", "--device-type=cpu"])
    device = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  device  "))
    expected = planned(capsys, *flags, "--gpus=cpu", "--vocab-size=400")
    assert f"cpu, {expected['memory']['dtype']}  (" in device
    assert dtype in (expected["memory"]["dtype"], None)
    assert expected["memory"]["rows"] == read_record(record_path("base_train"))["device_batch_size"]


def test_a_plan_for_the_cpu_counts_the_threads_that_a_run_has(capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(capsys, "--depth=4", "--gpus=cpu")
    assert 0 < run["machine"]["cores"] <= torch.get_num_threads()
    assert run["time"]["flops_per_s"] == run["machine"]["cores"] * core_flops(run["memory"]["dtype"])
    assert 0 < run["memory"]["usable_bytes"] < run["machine"]["memory_bytes"]


def test_the_page_holds_exactly_what_the_tables_say_whatever_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float64")
    plan.main(["--table"])
    table = capsys.readouterr().out
    page = (REPO / "docs" / "plan.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 5 * (1 + len(plan.TABLE_DEPTHS))
    assert table in page, "python -m scripts.plan --table prints something else: put it into docs/plan.md"


def test_a_plan_for_text_of_ones_own_asks_for_no_shards(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depth=2", "--gpus=cpu", "--max-seq-len=64", "--num-iterations=10"]
    own, fetched = (planned(capsys, *flags, *more) for more in ([f"--data-dir={text}"], []))
    assert (
        own["text"]["characters"] == fetched["text"]["characters"] == int(own["training"]["tokens"] * CHARS_PER_TOKEN)
    )
    assert (own["text"]["train_shards"], own["text"]["bytes"], own["text"]["data_dir"]) == (0, 0, str(text))
    assert fetched["text"]["train_shards"] > 0
    assert "ClimbMix" not in plan.disk_rows(own)[0][1] and "ClimbMix" in plan.disk_rows(fetched)[0][1]


def test_parts_of_a_small_models_memory_are_told_in_mebibytes_and_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(capsys, "--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--gpus=cpu")
    rows = dict(plan.memory_rows(run))
    assert rows["at its peak"].split()[1] == "MiB"
    sizes = [float(value.split()[0]) for name, value in rows.items() if name.startswith("  ")]
    assert sum(sizes) == pytest.approx(run["memory"]["total_bytes"] / 2**20, abs=0.5)
    assert {name.strip() for name in rows} >= {"weights", "optimizer state", "activations"}
