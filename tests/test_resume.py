"""Runs that end early go on exactly: killed, asked to stop, on another number of ranks, with a rank that dies."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recipes import REPO, TINY, metrics

from nanochat.checkpoint import find_checkpoint, run_folder, saved_steps
from nanochat.common import Stopped, UserError
from nanochat.parallel import Runtime
from nanochat.train.loop import Loop
from nanochat.train.stop import StopRequest
from scripts import base_train, chat_sft

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
STEPS = 200
SAME = ("step", "loss_raw", "val_bpb", "tokens")  # of a record; the others are times


@contextmanager
def started(base_dir: Path, *command: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a group of its own; what is left of it at the end is killed."""
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, *command], cwd=REPO, env=environment, start_new_session=True, **pipes
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(process: subprocess.Popen[str], source: str, tag: str, step: int) -> None:
    """Until the run has recorded a step: in its hidden folder, as long as nothing was saved."""
    folders = [run_folder(source, tag), run_folder(source, f".{tag}.new")]
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        for path in (folder / "metrics.jsonl" for folder in folders):
            if path.is_file() and path.read_text().count("\n") > step:
                return
        time.sleep(0.01)
    pytest.fail(f"the process ended early or hangs: {process.communicate()}")


def assert_same_run(source: str, tag: str, other: str) -> None:
    """Both runs ended with the same files, and every step was recorded once with the same values."""
    folders = [find_checkpoint(source, name).folder for name in (tag, other)]
    for name in ("model.safetensors", "optimizer.safetensors", "loader.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    ours, theirs = ([{key: r.get(key) for key in SAME} for r in metrics(source, name)] for name in (tag, other))
    assert ours == theirs


@pytest.mark.usefixtures("tokenizer")
def test_a_killed_run_goes_on_and_ends_bit_identical(text: Path, base_dir: Path) -> None:
    flags = [*TINY, f"--data-dir={text}", f"--num-iterations={STEPS}", "--eval-every=100", "--save-every=5"]
    base_train.main([*flags, "--model-tag=whole"])
    with started(base_dir, "-m", "scripts.base_train", *flags, "--model-tag=killed") as process:
        wait_for_step(process, "base", "killed", 6)
        process.kill()
        process.wait()
    assert 5 <= saved_steps(run_folder("base", "killed"))[-1] < STEPS
    base_train.main([*flags, "--model-tag=killed", "--resume=auto"])
    assert_same_run("base", "whole", "killed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("source", ["base", "sft"])
@pytest.mark.usefixtures("tokenizer")
def test_a_run_that_is_asked_to_stop_saves_at_the_next_step_and_goes_on_from_there(
    source: str, number: int, code: int, text: Path, chats: Path, base_dir: Path
) -> None:
    flags = [*TINY, f"--data-dir={text}", f"--num-iterations={STEPS}", "--eval-every=100", "--save-every=-1"]
    recipe, run = base_train, "scripts.base_train"
    if source == "sft":
        base_train.main([*flags, "--num-iterations=1"])
        recipe, run = chat_sft, "scripts.chat_sft"  # type: ignore[assignment]
        flags = [f"--data={chats}", f"--num-iterations={STEPS}", "--eval-every=100", "--save-every=-1"]
        flags += ["--device-batch-size=2", "--logger=none"]
    recipe.main([*flags, "--model-tag=whole"])
    with started(base_dir, "-m", run, *flags, "--model-tag=asked") as process:
        wait_for_step(process, source, "asked", 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    [step] = saved_steps(run_folder(source, "asked"))
    assert 2 < step < STEPS
    name = signal.Signals(number).name
    assert f"stopped by {name} at step {step}, all is saved; go on with --resume=auto" in errors
    assert "Traceback" not in errors
    recipe.main([*flags, "--model-tag=asked", "--resume=auto"])
    assert_same_run(source, "whole", "asked")


LONG_STEP = """
import sys, time, torch
from nanochat.common import run
from nanochat.parallel import Runtime
from nanochat.train.loop import Loop

def main():
    loop = Loop(5, 0, Runtime(torch.device("cpu"), torch.float32), grace_s=float(sys.argv[1]))
    for step in loop:
        print("in a step", flush=True)
        if step.over:
            break
        time.sleep(float(sys.argv[2]))
    loop.check_completed()
    print("complete")

run(main)
"""


@pytest.mark.parametrize(
    ("grace_s", "step_s", "signals", "code", "told"),
    [
        (0.3, 60, [signal.SIGTERM], 143, "not done 0.3 s after SIGTERM"),
        (60, 60, [signal.SIGINT, signal.SIGINT], 130, "interrupted"),
        (60, 2, [signal.SIGTERM, signal.SIGTERM], 143, "stopped by SIGTERM at step 1"),
        (60, 2, [signal.SIGINT, signal.SIGTERM], 130, "stopped by SIGINT at step 1"),  # torchrun may add its own
    ],
)
def test_the_grace_time_and_a_second_ctrl_c_end_a_long_step(
    grace_s: float, step_s: float, signals: list[int], code: int, told: str, base_dir: Path
) -> None:
    with started(base_dir, "-c", LONG_STEP, str(grace_s), str(step_s)) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == code and told in errors and "complete" not in output, errors


def test_a_signal_that_comes_while_ranks_agree_is_not_lost() -> None:
    class Busy(Runtime):
        """Ranks whose agreement takes so long that a signal comes meanwhile."""

        def max_number(self, value: float) -> float:
            if not value:
                signal.raise_signal(signal.SIGTERM)
            return value

    loop = Loop(5, 0, Busy(torch.device("cpu"), torch.float32), grace_s=60)
    indices = []
    for step in loop:
        indices.append(step.index)
        if step.over:
            break
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 1"):
        loop.check_completed()
    assert indices == [0, 1] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_record_that_cannot_be_written_at_the_last_step_is_an_error() -> None:
    class Full:
        def log(self, record: dict[str, object]) -> None:
            if record["step"] == 2:
                raise UserError("the disk is full")

        def close(self) -> None:
            pass

    loop = Loop(2, 0, Runtime(torch.device("cpu"), torch.float32), [Full()])
    for step in loop:
        if step.over:
            break
    with pytest.raises(UserError, match="the disk is full"):
        loop.check_completed()


@pytest.mark.usefixtures("tokenizer")
def test_a_run_that_is_stopped_before_its_first_step_leaves_the_one_it_would_replace(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=2", "--eval-every=-1"]
    base_train.main(flags)
    watch = StopRequest.watch

    def signalled(stop: StopRequest) -> None:
        watch(stop)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StopRequest, "watch", signalled)
    with pytest.raises(Stopped, match="before the first step"):
        base_train.main([*flags, "--overwrite", "--seed=7"])
    assert find_checkpoint("base").step == 2 and find_checkpoint("base").meta["args"]["seed"] == 42


# Several ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tokenizer")
def test_two_ranks_train_the_same_model_as_one(text: Path, base_dir: Path) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=6", "--eval-every=3"]
    base_train.main([*flags, "--model-tag=alone"])
    with started(base_dir, *TORCHRUN, "scripts.base_train", "--", *flags, "--model-tag=pair") as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for alone, pair in zip(metrics("base", "alone"), metrics("base", "pair"), strict=True):
        assert pair["tokens"] == alone["tokens"]
        for key in {"loss_raw", "val_bpb"} & alone.keys():
            assert pair[key] == pytest.approx(alone[key], rel=1e-3), (key, alone["step"])


@pytest.mark.usefixtures("tokenizer")
def test_a_run_moves_from_one_rank_to_two_and_back(text: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DTYPE", "float64")
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=12", "--eval-every=-1", "--save-every=4", "--keep-last=9"]
    base_train.main(flags)
    losses = [record["loss_raw"] for record in metrics("base")[:-1]]
    weights = load_file(find_checkpoint("base").folder / "model.safetensors")
    step_8 = run_folder("base", "d2") / "step_000008"
    written_alone = step_8.stat().st_ino
    with started(base_dir, *TORCHRUN, "scripts.base_train", "--", *flags, "--resume=4") as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "2 ranks" in output and "continuing from step 4" in output, errors
    assert step_8.stat().st_ino != written_alone  # the same numbers, since the same sums, but new files
    base_train.main([*flags, "--resume=8"])
    assert [record["loss_raw"] for record in metrics("base")[:-1]] == pytest.approx(losses, rel=1e-9)
    for name, weight in load_file(find_checkpoint("base").folder / "model.safetensors").items():
        assert weight.dtype == torch.float64
        assert (weight - weights[name]).norm() <= 1e-7 * weights[name].norm(), name


def children_of(pid: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.usefixtures("tokenizer")
def test_a_rank_that_dies_brings_the_other_down_with_one_message(victim: int, text: Path, base_dir: Path) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=100000", "--eval-every=-1", "--save-every=5"]
    with started(base_dir, *TORCHRUN, "scripts.base_train", "--", *flags) as process:
        wait_for_step(process, "base", "d2", 6)
        ranks = children_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    told = re.findall("^error: rank .: (.*)$", errors, re.MULTILINE)
    assert len(told) == 1 and "has died" in told[0] and "--resume=auto" in told[0], errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert saved_steps(run_folder("base", "d2"))


@pytest.mark.usefixtures("tokenizer")
def test_a_mistake_that_all_ranks_see_is_told_once(text: Path, base_dir: Path) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=2", "--eval-every=-1", "--resume=7"]
    with started(base_dir, *TORCHRUN, "scripts.base_train", "--", *flags) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(re.findall("^error: ", errors, re.MULTILINE)) == 1 and "no such checkpoint" in errors, errors


def test_a_number_of_ranks_that_cannot_share_the_batch_names_the_nearest_that_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "5"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"5 ranks.*split over 4 or 6 ranks") as told:
        base_train.parse_args(["--max-seq-len=64", f"--total-batch-size={64 * 12}", "--head-dim=2"])
    assert [line.partition(":")[0] for line in str(told.value).splitlines()] == ["--head-dim=2", "--total-batch-size"]
