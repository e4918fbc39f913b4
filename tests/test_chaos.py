"""The chaos harness: its faults truly strike, its checks truly see what is lost, and the trainer survives it all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.chaos.faults import KINDS, build_shim, shim_environment
from nanochat.chaos.lives import read_environment
from nanochat.chaos.trials import COMMON, NUM_STEPS, SHAPE, draw_trial, usable_kinds, write_data
from nanochat.chaos.verify import End, Lost, Tolerance, check_after_death, check_end, open_newest
from nanochat.checkpoint import describe_file, saved_steps
from nanochat.common import UserError
from nanochat.parallel import Runtime
from nanochat.train.run import Run
from scripts import base_train, chaos, tok_train

EXACT = Tolerance()
RT = Runtime(torch.device("cpu"), torch.float32)


# The failing disk --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    return library


PROGRAM = """
import os, sys
folder = sys.argv[1]
handle = os.open(f"{folder}/file", os.O_WRONLY | os.O_CREAT)
done = []
for call in (*[lambda: os.write(handle, b"12345678")] * 4, lambda: os.fsync(handle), lambda: os.fsync(handle),
             lambda: os.rename(f"{folder}/file", f"{folder}/moved")):
    try:
        done.append(call())
    except OSError as error:
        done.append(os.strerror(error.errno))
print(done)
"""


def run_program(shim: Path, folder: Path, calls: str, at: int, does: str, below: str = "") -> tuple[int, str, str]:
    """(exit code, what the seven calls came to, what the library told)."""
    log = folder / "log"
    environment = shim_environment(shim, Path(below or folder / "disk"), log, calls, at, does)
    (folder / "disk").mkdir(exist_ok=True)
    command = ["env", *environment, sys.executable, "-c", PROGRAM, str(folder / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip(), log.read_text() if log.exists() else ""


FULL, BROKEN = "'No space left on device'", "'Input/output error'"


@pytest.mark.parametrize(
    ("calls", "at", "does", "expected"),
    [
        ("write", 3, "full", f"[8, 8, {FULL}, {FULL}, None, None, None]"),
        ("write", 2, "short", f"[8, 4, {FULL}, {FULL}, None, None, None]"),
        ("write", 2, "part", "[8, 4, 8, 8, None, None, None]"),
        ("sync", 1, "error", f"[8, 8, 8, 8, {BROKEN}, None, None]"),
        ("rename", 1, "error", f"[8, 8, 8, 8, None, None, {BROKEN}]"),
        ("any", 9, "error", "[8, 8, 8, 8, None, None, None]"),
    ],
)
def test_the_disk_fails_at_the_call_it_was_told_to_fail_at(
    shim: Path, tmp_path: Path, calls: str, at: int, does: str, expected: str
) -> None:
    code, output, told = run_program(shim, tmp_path, calls, at, does)
    assert (code, output) == (0, expected)
    assert told.startswith(f"struck {calls} {at} ") == (calls != "any")


def test_a_kill_comes_before_the_call_is_made_and_is_told(shim: Path, tmp_path: Path) -> None:
    code, output, told = run_program(shim, tmp_path, "any", 3, "kill")
    assert (code, output) == (-signal.SIGKILL, "")
    assert (tmp_path / "disk" / "file").read_bytes() == b"12345678" * 2
    assert told == f"struck write 3 {tmp_path}/disk/file\n"


def test_calls_are_counted_and_other_folders_are_left_alone(shim: Path, tmp_path: Path) -> None:
    counted = run_program(shim, tmp_path, "any", 0, "none")[2]
    assert counted == "count write 4\ncount sync 2\ncount rename 1\ncount other 0\n"
    (tmp_path / "other").mkdir()
    code, output, _ = run_program(shim, tmp_path / "other", "write", 1, "full", below=str(tmp_path / "disk"))
    assert (code, output) == (0, "[8, 8, 8, 8, None, None, None]")


# The checks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the harness's own tiny size."""
    base = tmp_path_factory.mktemp("finished")
    write_data(base / "text", base / "chats.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        tok_train.main([f"--data-dir={base / 'text'}", "--vocab-size=300"])
        base_train.main([f"--data-dir={base / 'text'}", *SHAPE, *COMMON, "--model-tag=run"])
    return base / "checkpoints" / "base" / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "checkpoints" / "base" / "run"))


def rewrite_model(folder: Path, change: float) -> None:
    """Other weights, with a manifest that agrees with them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[0] += change * tensors[name].abs().max()
    save_file(tensors, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name] = describe_file(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_an_equal_end_passes(copied: Path, finished: Path) -> None:
    check_end(copied, End.of(finished), EXACT)
    assert check_after_death(copied, NUM_STEPS) == NUM_STEPS
    assert check_after_death(copied.parent / "never", -1) == -1


@pytest.mark.parametrize("name", ["model", "optimizer", "loader"])
def test_a_damaged_checkpoint_is_seen(copied: Path, name: str) -> None:
    path = copied / f"step_{NUM_STEPS:06d}" / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Lost, match=f"unreadable checkpoints: .*{name}"):
        check_after_death(copied, -1)


def test_other_weights_are_seen_unless_within_the_tolerance(copied: Path, finished: Path) -> None:
    rewrite_model(copied / f"step_{NUM_STEPS:06d}", 1e-4)
    open_newest(copied)
    with pytest.raises(Lost, match=r"weights differing: .*model\.safetensors: "):
        check_end(copied, End.of(finished), EXACT)
    with pytest.raises(Lost, match=r"of its largest value away"):
        check_end(copied, End.of(finished), Tolerance(weights=1e-5))
    check_end(copied, End.of(finished), Tolerance(weights=1e-3))


@pytest.mark.parametrize("damage", ["missing", "twice", "cut", "other order", "other loss", "last missing", "garbage"])
def test_records_that_are_not_those_of_an_undisturbed_run_are_seen(copied: Path, finished: Path, damage: str) -> None:
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    match damage:
        case "missing":
            del lines[5]
        case "twice":
            lines.insert(5, lines[5])
        case "other loss":
            lines[5] = lines[5].replace('"loss_raw": ', '"loss_raw": 1')
        case "cut":
            lines[5] = lines[5][:20] + "\n"
        case "last missing":
            del lines[-1]
        case "garbage":
            lines.insert(5, "{\n")
        case "other order":
            lines[4], lines[5] = lines[5], lines[4]
    path.write_text("".join(lines))
    with pytest.raises(Lost, match="metrics wrong"):
        check_end(copied, End.of(finished), EXACT)
    if damage in ("missing", "twice", "cut", "other order"):  # the others show at the end only
        with pytest.raises(Lost, match="metrics wrong"):
            check_after_death(copied, -1)


def test_another_best_step_is_seen(copied: Path, finished: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"best": None}))
    with pytest.raises(Lost, match=r"metrics wrong: .*the best step is None"):
        check_end(copied, End.of(finished), EXACT)


def test_a_step_that_stood_before_must_stand_after(copied: Path) -> None:
    steps = saved_steps(copied)
    shutil.rmtree(copied / f"step_{steps[-1]:06d}")
    assert check_after_death(copied, steps[-2]) == steps[-2]
    with pytest.raises(Lost, match=f"steps lost: .*step {steps[-1]} stood before, now the newest is {steps[-2]}"):
        check_after_death(copied, steps[-1])
    shutil.rmtree(copied)
    with pytest.raises(Lost, match="lost runs"):
        check_after_death(copied, steps[-2])


def test_a_replaced_run_stands_until_the_new_one_does_and_never_comes_back(copied: Path) -> None:
    assert check_after_death(copied, 20, previous_step=20) == NUM_STEPS  # the new run has fewer steps, but is newer
    with pytest.raises(Lost, match="steps lost"):
        check_after_death(copied, 3, previous_step=NUM_STEPS)


def test_a_run_that_does_not_say_it_has_finished_is_seen(copied: Path, finished: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(Lost, match="not marked as finished"):
        check_end(copied, End.of(finished), EXACT)


# Trials ------------------------------------------------------------------------------------------------------------


def test_the_seed_decides_a_trial_and_every_kind_of_fault_has_its_turn() -> None:
    kinds, stages = list(KINDS.values()), ["base", "sft"]
    trials = [draw_trial(5, number, stages, kinds) for number in range(len(kinds))]
    assert trials == [draw_trial(5, number, stages, kinds) for number in range(len(kinds))]
    assert trials != [draw_trial(6, number, stages, kinds) for number in range(len(kinds))]
    assert {trial.faults[0].kind.name for trial in trials} == set(KINDS)
    assert {trial.stage.name for trial in trials} == set(stages)
    assert all(trial.num_ranks == (2, 1, 2) for trial in trials if trial.faults[0].kind.num_ranks == 2)


def test_without_a_compiler_the_kinds_that_need_one_are_left_out() -> None:
    assert {kind.name for kind in usable_kinds(None)} == {name for name, kind in KINDS.items() if not kind.shim}


def number_of(kind: str) -> int:
    """A trial of series 1 that is struck by this kind in mid-course, and by nothing else."""
    for number in range(1000):
        trial = draw_trial(1, number, ["base"], usable_kinds(Path()))
        fault = trial.faults[0]
        if fault.kind.name == kind and len(trial.faults) == 1 and not trial.replaces and 0.4 < fault.place < 0.8:
            return number
    raise AssertionError(f"no trial of {kind} alone")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the harness makes its folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_two_trials_lose_nothing_and_leave_nothing_behind(
    shim: Path, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chaos.main(["--trials=2", "--seed=4", "--json"])
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (summary["trials"], summary["failed"]) == (2, 0)
    assert sum(planned for _, planned in summary["faults"].values()) >= 2
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("shim")
def test_a_trainer_that_loses_something_is_found_out(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy of the sources that forgets the optimizer's state when it goes on."""
    for name in ("nanochat", "scripts", "tasks"):
        shutil.copytree(chaos.REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "nanochat" / "train" / "run.py"
    line = "        self.checkpoint.load_optimizer(optimizer)\n"
    assert line in source.read_text()
    source.write_text(source.read_text().replace(line, ""))
    monkeypatch.setattr(chaos, "REPOSITORY", tmp_path)
    number = number_of("kill-at-call")
    with pytest.raises(SystemExit) as left:
        chaos.main(["--stages=base", "--seed=1", f"--only-trial={number}", "--keep-failures", "--json"])
    assert left.value.code == 1
    output = capfd.readouterr().out
    assert f"python -m scripts.chaos --seed=1 --stages=base --only-trial={number} --keep-failures" in output
    summary = json.loads(output.splitlines()[-1])
    assert summary["failed"] == summary["metrics_wrong"] + summary["weights_differing"] == 1
    (kept,) = temporary.glob(f"nanochat-chaos-*/trial_{number:03}")
    assert str(kept) in output and (kept / "log.txt").stat().st_size > 0


def test_an_interrupted_harness_ends_its_processes_and_removes_its_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.chaos", "--trials=9"]
    process = subprocess.Popen(
        command, cwd=chaos.REPOSITORY, stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("nanochat-chaos-*/references/checkpoints")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (root,) = tmp_path.iterdir()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert b"Traceback" not in process.communicate()[1]
    assert list(tmp_path.iterdir()) == []
    environments = [read_environment(entry) for entry in Path("/proc").glob("[0-9]*")]
    assert not [words for words in environments if str(root) in words.get("NANOCHAT_BASE_DIR", "")]


def test_an_unknown_stage_is_refused(temporary: Path) -> None:
    with pytest.raises(UserError, match=r"--stages=base,nowhere: nowhere unknown; there are base, sft"):
        chaos.main(["--stages=base,nowhere"])
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("shim")
def test_every_kind_of_fault_is_survived(temporary: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chaos.main([f"--trials={len(KINDS)}", "--seed=9", "--json", "--strict-exits"])
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(summary["faults"]) == set(KINDS)
    assert summary["kills_in_a_save"] > 0
    assert list(temporary.iterdir()) == []


# What the harness found --------------------------------------------------------------------------------------------


def flags(resume: str = "auto", overwrite: bool = False) -> Namespace:
    return Namespace(resume=resume, overwrite=overwrite)


@pytest.fixture
def run_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(copied.parents[2]))
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"status": "running", "args": {}, "inputs": {}}))
    return copied


def test_a_replacement_that_died_between_its_two_renames_is_undone_by_the_next_start(run_folder: Path) -> None:
    shutil.copytree(run_folder, run_folder.with_name(".run.new"))
    run_folder.rename(run_folder.with_name(".run.old"))
    assert check_after_death(run_folder, NUM_STEPS) == NUM_STEPS
    with pytest.raises(UserError, match=f"stopped run at step {NUM_STEPS}"):
        Run.open("base", "run", flags("no"), RT)
    assert saved_steps(run_folder)[-1] == NUM_STEPS


def test_a_start_removes_what_a_dead_one_left_half_deleted(run_folder: Path) -> None:
    for name in (".step_000009.old", ".step_000012.tmp"):
        (run_folder / name).mkdir()
        (run_folder / name / "model.safetensors").write_bytes(b"half")
    (run_folder / ".run.json.1.1.tmp").write_text("{")
    Run.open("base", "run", flags(), RT).claim()
    assert not list(run_folder.glob(".*"))
    assert saved_steps(run_folder)[-1] == NUM_STEPS


TRAIN_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_chaos import *
run = Run.open("base", "run", flags(), RT)
run.claim()
print("open", flush=True)
sys.stdin.read()
"""


def test_two_processes_never_train_one_run_and_a_dead_one_frees_it(run_folder: Path) -> None:
    command = [sys.executable, "-c", TRAIN_ALONE, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=chaos.REPOSITORY) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"open\n"
            with pytest.raises(UserError, match=f"process {other.pid} is writing this run"):
                Run.open("base", "run", flags(), RT).claim()
        finally:
            other.kill()
    Run.open("base", "run", flags(), RT).claim()
    assert Run.open("base", "run", flags(), RT).start == NUM_STEPS
