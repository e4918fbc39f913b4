"""Checkpoints: whole or not at all, never silently replaced, and never loaded when they are not what they claim."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.checkpoint import Checkpoint, find_checkpoint, run_folder, saved_steps
from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.machine import git_commit
from nanochat.model.gpt import GPT, build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates
from nanochat.tokenizer import Tokenizer
from nanochat.train.metrics import JsonlLogger
from nanochat.train.run import Run

RT = Runtime(torch.device("cpu"), torch.float32)
CONFIG = ModelConfig(32, 300, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py"))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


class Position:
    """A loader that is nothing but its state."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"epoch": 3, "waiting": np.arange(5)}

    def state(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state(self, state: dict[str, Any]) -> None:
        self.values = state


def flags(resume: str | int = "no", overwrite: bool = False, **changes: object) -> Namespace:
    given = {"resume": resume, "overwrite": overwrite, "depth": 2, "num_iterations": 10}
    return Namespace(**(given | {"save_every": 1, "keep_last": 2, "keep_every": -1, "grace_period": 25.0} | changes))


def training(config: ModelConfig = CONFIG, seed: int = 0) -> tuple[GPT, MuonAdamW]:
    model = build_model(config, torch.device("cpu"), torch.float32, seed)
    optimizer = MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), BaseRates().by_role())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0, 0.9, 0.0)
    return model, optimizer


Save = Callable[..., Run]


@pytest.fixture
def save(base_dir: Path, tokenizer: Tokenizer) -> Save:
    """Saves checkpoints of a run at the given steps."""

    def save_run(tag: str, *steps: int, config: ModelConfig = CONFIG, finish: bool = False) -> Run:
        run, (model, optimizer) = Run.open("base", tag, flags(), RT), training(config)
        for step in steps:
            run.save(step, model, optimizer, Position(), tokenizer, {"tokens": step}, {"total_batch_tokens": 64})
        if finish:
            run.finish()
        return run

    return save_run


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tied_head=True, residual="plain", smear=False)])
def test_a_restored_run_has_the_same_weights_optimizer_and_position(
    save: Save, tokenizer: Tokenizer, config: ModelConfig
) -> None:
    save("d2", 5, config=config)
    run, (model, optimizer), position = Run.open("base", "d2", flags("auto"), RT), training(config, seed=1), Position()
    position.values = {}
    assert run.restore(model, optimizer, position, tokenizer) == {"tokens": 5}
    assert run.start == 5
    saved_model, saved_optimizer = training(config)
    for name, parameter in saved_model.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter), name
    for name, tensor in saved_optimizer.state_dict().items():
        assert torch.equal(optimizer.state_dict()[name], tensor), name
    assert position.values["epoch"] == 3 and position.values["waiting"].tolist() == [0, 1, 2, 3, 4]
    if config.tied_head:
        assert model.lm_head.weight is model.wte.weight


def test_a_checkpoint_says_what_it_was_made_from_and_by_which_commit(base_dir: Path, tokenizer: Tokenizer) -> None:
    run = Run.open("base", "d2", flags(), RT, {"text": "abc"})
    run.save(3, *training(), Position(), tokenizer, {}, {})
    meta = find_checkpoint("base").meta
    assert meta["inputs"] == {"text": "abc"} and meta["tokenizer"] == tokenizer.fingerprint
    assert meta["commit"] == git_commit()


def test_only_the_newest_checkpoints_are_kept(save: Save) -> None:
    assert saved_steps(save("d2", 1, 2, 3, 4).folder) == [3, 4]


def test_every_nth_checkpoint_and_the_best_one_are_kept_as_well(base_dir: Path, tokenizer: Tokenizer) -> None:
    def go_on(start: int, stop: int) -> list[int]:
        asked = flags("auto", keep_last=1, keep_every=4)
        run, (model, optimizer) = Run.open("base", "d2", asked, RT), training()
        run.restore(model, optimizer, Position(), tokenizer)
        for step in range(start, stop):
            run.save(step, model, optimizer, Position(), tokenizer, {}, {})
            run.note_validation(step, abs(step - 3) + 1.0)
        return saved_steps(run.folder)

    assert go_on(1, 3) == [2]
    assert go_on(3, 7) == [3, 4, 6]
    assert go_on(7, 10) == [3, 4, 8, 9]  # a resumed run still knows its best
    assert json.loads((run_folder("base", "d2") / "run.json").read_text())["best"] == {"step": 3, "val_bpb": 1.0}


def test_a_step_that_was_validated_but_not_saved_is_not_the_best(save: Save) -> None:
    run = save("d2", 5)
    run.note_validation(4, 0.1)
    run.note_validation(5, 0.7)
    assert json.loads((run.folder / "run.json").read_text())["best"] == {"step": 5, "val_bpb": 0.7}


def test_a_disk_too_small_for_the_checkpoints_is_told_before_training(
    base_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = training()
    one = sum(p.numel() * 4 for p in model.parameters()) + optimizer.state_bytes
    assert one == pytest.approx(sum(t.numel() * 4 for t in optimizer.state_dict().values()) + one / 3, rel=0.2)
    usage = shutil.disk_usage(base_dir.parent)
    for free_bytes, keep_last, fits in ((4 * one, 2, True), (4 * one - 1, 2, False), (3 * one, 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free_bytes: usage._replace(free=free))
        run = Run.open("base", "d2", flags(keep_last=keep_last), RT)
        if fits:
            run.restore(model, optimizer, Position(), tokenizer)
        else:
            with pytest.raises(UserError, match=r"4 more checkpoints of .* GB each.*--keep-last=2.*keep fewer"):
                run.restore(model, optimizer, Position(), tokenizer)
            assert not list(base_dir.rglob("*.json"))


def test_what_a_crash_left_half_written_is_not_taken_for_a_checkpoint(save: Save) -> None:
    folder = save("d2", 5).folder
    (folder / ".step_000006.tmp").mkdir()
    (folder / ".step_000006.tmp" / "model.safetensors").write_bytes(b"half")
    assert Run.open("base", "d2", flags("auto"), RT).start == 5


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "loader.safetensors", "meta.json", "tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_checkpoint_is_named_and_not_loaded(save: Save, name: str, damage: str) -> None:
    path = save("d2", 5).folder / "step_000005" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "changed" else content[:-10])
    with pytest.raises(UserError, match=f"{name}: missing or damaged"):
        find_checkpoint("base")


def test_a_checkpoint_without_a_manifest_is_refused(save: Save) -> None:
    folder = save("d2", 5).folder / "step_000005"
    for content in ("{", "{}", "[]", '{"files": 3}', '{"files": {}}', '{"files": {"model.safetensors": {}}}'):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            Checkpoint.open(folder)


def snapshot(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


def test_a_first_checkpoint_that_had_not_yet_its_name_is_found(save: Save) -> None:
    folder = save("d2", 5).folder
    hidden = folder.with_name(".d2.new")
    folder.rename(hidden)  # as a kill between writing it and naming the run leaves it
    (hidden / "run.json").unlink()
    assert Run.open("base", "d2", flags("auto"), RT).start == 5
    assert folder.is_dir() and not hidden.exists()


def test_the_record_of_later_steps_stays_until_an_earlier_ones_branch_has_a_checkpoint(
    save: Save, tokenizer: Tokenizer
) -> None:
    folder = save("d2", 4, 8).folder
    lines = [json.dumps({"step": step}) + "\n" for step in range(9)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for does_save in (False, True):
        run, (model, optimizer) = Run.open("base", "d2", flags(4), RT), training()
        run.restore(model, optimizer, Position(), tokenizer)
        logger = JsonlLogger(run.metrics_path, run.start)
        logger.log({"step": 4, "branch": True})
        assert (folder / "metrics.jsonl").read_text() == "".join(lines)
        if does_save:
            run.save(6, model, optimizer, Position(), tokenizer, {}, {})
            logger.log({"step": 6})
        logger.close()
        del run
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*({"step": step} for step in range(4)), {"step": 4, "branch": True}, {"step": 6}]
    assert not list(folder.glob(".metrics*"))


def test_a_validation_loss_that_is_no_number_is_never_the_best(save: Save) -> None:
    run = save("d2", 5)
    run.note_validation(5, float("nan"))
    assert json.loads((run.folder / "run.json").read_text())["best"] is None
    run.note_validation(5, 2.0)
    assert json.loads((run.folder / "run.json").read_text())["best"] == {"step": 5, "val_bpb": 2.0}


def test_a_run_is_not_replaced_unless_told_so(save: Save) -> None:
    folder = save("d2", 5, finish=True).folder
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"finished run at step 5; replace it with --overwrite.*--model-tag"):
        Run.open("base", "d2", flags(), RT)
    assert snapshot(folder) == before
    save("d3", 5)
    with pytest.raises(UserError, match=r"stopped run at step 5; continue it with --resume=auto"):
        Run.open("base", "d3", flags(), RT)


def test_an_overwritten_run_stays_until_the_new_one_has_a_checkpoint(save: Save, tokenizer: Tokenizer) -> None:
    folder = save("d2", 5, finish=True).folder
    before = snapshot(folder)
    for attempt in range(2):
        run = Run.open("base", "d2", flags(overwrite=True), RT)
        run.restore(*training(), Position(), tokenizer)
        run.metrics_path.write_text("{}")
        run = run if attempt else None  # type: ignore[assignment]  # it dies, the first time
    assert (run.start, run.is_finished) == (0, False)
    assert snapshot(folder) == before and find_checkpoint("base").step == 5
    run.save(2, *training(), Position(), tokenizer, {}, {})
    assert saved_steps(folder) == [2] and run.folder == folder
    assert [path.name for path in folder.parent.glob(".*")] == [".d2.lock"]


def test_a_run_has_one_writer(save: Save, tokenizer: Tokenizer) -> None:
    save("d2", 5)
    first, second = (Run.open("base", "d2", flags("auto"), RT) for _ in range(2))
    first.restore(*training(), Position(), tokenizer)
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing this run"):
        second.restore(*training(), Position(), tokenizer)
    del first
    second.restore(*training(), Position(), tokenizer)


def test_a_finished_run_is_left_alone_by_resume_auto_unless_the_flags_differ(save: Save) -> None:
    save("d2", 5, finish=True)
    assert Run.open("base", "d2", flags("auto"), RT).is_finished
    with pytest.raises(UserError, match=r"finished with other flags .--depth: 2 -> 3"):
        Run.open("base", "d2", flags("auto", depth=3), RT)


def test_a_finished_run_goes_on_to_a_longer_horizon(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    save("d2", 5, finish=True)
    run = Run.open("base", "d2", flags("auto", num_iterations=20), RT)
    assert (run.start, run.is_finished) == (5, False)
    assert "--num-iterations: 10 -> 20" in capsys.readouterr().out


def test_a_refusal_names_only_what_may_not_change(save: Save) -> None:
    save("d2", 5)
    with pytest.raises(UserError, match=r"other flags \(--depth: 2 -> \(not given\)\); give the earlier values"):
        Run.open("base", "d2", flags("auto", num_iterations=20, depth=None), RT)


def test_a_run_goes_on_only_with_the_flags_it_was_started_with(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    save("d2", 5)
    with pytest.raises(UserError, match=r"was started with other flags .--depth: 2 -> 3"):
        Run.open("base", "d2", flags("auto", depth=3), RT)
    assert Run.open("base", "d2", flags("auto", num_iterations=9, eval_every=7), RT).start == 5
    assert "--num-iterations: 10 -> 9" in capsys.readouterr().out


def test_a_run_past_its_new_horizon_is_told_so(save: Save) -> None:
    save("d2", 5)
    run = Run.open("base", "d2", flags("auto"), RT)
    run.check_horizon(5)
    with pytest.raises(UserError, match="at step 5 already"):
        run.check_horizon(4)


def test_continuing_from_an_earlier_step_replaces_the_later_ones(save: Save, tokenizer: Tokenizer) -> None:
    folder = save("d2", 4, 8).folder
    run = Run.open("base", "d2", flags(4), RT)
    assert saved_steps(folder) == [4, 8]
    run.save(6, *training(), Position(), tokenizer, {}, {})
    assert saved_steps(folder) == [4, 6]


def test_resuming_from_a_step_that_is_not_there_lists_those_that_are(save: Save) -> None:
    save("d2", 4, 5)
    assert Run.open("base", "d2", flags(4), RT).start == 4
    with pytest.raises(UserError, match="there are: 4, 5"):
        Run.open("base", "d2", flags(7), RT)
    with pytest.raises(UserError, match="there are: none"):
        Run.open("base", "d3", flags("newest"), RT)


def test_resuming_another_model_names_what_differs(save: Save, tokenizer: Tokenizer) -> None:
    save("d2", 5)
    model, optimizer = training(replace(CONFIG, n_layer=3, smear=False))
    with pytest.raises(UserError, match=r"n_layer: 2 -> 3; smear: True -> False"):
        Run.open("base", "d2", flags("auto"), RT).restore(model, optimizer, Position(), tokenizer)


def test_resuming_with_another_tokenizer_is_refused(save: Save) -> None:
    save("d2", 5)
    other = Tokenizer.train(reversed(TEXTS[:3]), 300)
    with pytest.raises(UserError, match="another tokenizer"):
        Run.open("base", "d2", flags("auto"), RT).restore(*training(), Position(), other)


def test_the_tokenizer_lives_with_the_model(save: Save, tokenizer: Tokenizer) -> None:
    save("d2", 5)
    assert find_checkpoint("base").tokenizer().fingerprint == tokenizer.fingerprint


def test_the_deepest_model_is_found_first_then_the_newest_and_always_what_is_asked_for(save: Save) -> None:
    for tag, step, depth in (("d9", 1, 1), ("big", 2, 3), ("zebra", 3, 3), ("d4", 4, 2)):
        run = save(tag, step, config=replace(CONFIG, n_layer=depth))
        os.utime(run.folder, (step, step))
    assert find_checkpoint("base").step == 3  # whatever the tags say, and though d4 is newer
    assert find_checkpoint("base", "d9").step == 1
    with pytest.raises(UserError, match="big, d4, d9, zebra"):
        find_checkpoint("base", "d3")
    with pytest.raises(UserError, match=r"no sft model is there.*chat_sft.*--source .base"):
        find_checkpoint("sft")
    with pytest.raises(UserError, match="--model-step=9"):
        find_checkpoint("base", "d4", 9)


def test_a_full_disk_leaves_the_previous_checkpoint_as_the_newest(save: Save, base_dir: Path) -> None:
    folder = save("d2", 5).folder
    size = (folder / "step_000005" / "model.safetensors").stat().st_size
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size} // 2, {size} // 2))
run = Run.open("base", "d2", flags("auto"), RT)
model, optimizer = training()
try:
    run.save(6, model, optimizer, Position(), run.checkpoint.tokenizer(), {{}}, {{}})
except UserError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "step_000006: could not be saved" in result.stdout and "step 5" in result.stdout
    assert saved_steps(run_folder("base", "d2")) == [5] and not list(folder.glob(".step*"))
    assert find_checkpoint("base").step == 5


def test_the_saved_configuration_rebuilds_the_model(save: Save) -> None:
    folder = save("d2", 5).folder / "step_000005"
    assert Checkpoint.open(folder).config == CONFIG
    meta = json.loads((folder / "meta.json").read_text())
    with pytest.raises(UserError, match="unknown fields flux"):
        ModelConfig.from_dict({**meta["model_config"], "flux": 1})
