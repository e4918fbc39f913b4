"""The list of models is true, and nothing is deleted but what was named, confirmed, and written by nobody."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.checkpoint import find_checkpoint, run_folder, saved_steps, write_checkpoint
from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.model.gpt import build_model
from nanochat.tokenizer import Tokenizer
from scripts import models

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig(32, 265, n_layer=2, n_head=2, n_kv_head=2, n_embd=16)
TOKENIZER = Tokenizer.train(["text"], 265)


def make(tag: str, *steps: int, source: str = "base", status: str = "running", **meta: object) -> Path:
    """A run's folder with checkpoints at the given steps."""
    folder = run_folder(source, tag)
    weights = dict(build_model(CONFIG, torch.device("cpu"), torch.float32).named_parameters())
    for step in steps:
        known = {"step": step, "model_config": CONFIG.to_dict(), "tokenizer": TOKENIZER.fingerprint, **meta}
        tensors = {"model": weights, "optimizer": {"x": torch.zeros(3)}}
        write_checkpoint(folder / f"step_{step:06d}", tensors, {"rows": np.arange(3)}, known, TOKENIZER)
    (folder / "run.json").write_text(json.dumps({"status": status, "args": {}, "inputs": {}}))
    return folder


@pytest.fixture
def listed(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> "Iterator":
    """What the command prints, as lines."""

    def lines(*flags: str) -> list[str]:
        capsys.readouterr()
        models.main(flags)
        return capsys.readouterr().out.splitlines()

    return lines


def names_and_states(lines: list[str]) -> dict[str, str]:
    """Of the table: model -> state."""
    start = lines[1].index("state")
    return {line.split()[0]: line[start:] for line in lines[2:] if "left" not in line}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name}


@contextmanager
def training(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds a run as a training does; killed at the end."""
    program = "import sys, time; from pathlib import Path; from nanochat.runlock import hold\n"
    program += "lock = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# Listing ---------------------------------------------------------------------------------------------------------


def test_every_model_is_listed_with_what_is_known_of_it(listed, base_dir: Path) -> None:
    metrics = [{"step": 0, "val_bpb": 3.5}, {"step": 50, "val_bpb": 1.25}, {"step": 60, "loss": 1.0}]
    folder = make("d2", 50, 100, status="finished")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics) + '{"val_bpb"')
    make("short", 7, source="sft")
    make("taken", 650, source="rl", imported={"val_bpb": 0.81})
    damaged = make("hurt", 1, 2)
    (damaged / "step_000002" / "optimizer.safetensors").unlink()
    lines = listed()
    assert lines[0] == f"{base_dir / 'checkpoints'}: 4 models"
    starts = [line.index("steps") for line in lines[1:2]]
    assert all(line[starts[0] - 1] == " " and line[starts[0]] != " " for line in lines[1:])
    assert names_and_states(lines) == {
        "base/d2": "finished",
        "base/hurt": "damaged (step 2)",
        "sft/short": "stopped, --resume=auto goes on",
        "rl/taken": "imported",
    }
    parameters = sum(p.numel() for p in build_model(CONFIG, torch.device("cpu"), torch.float32).parameters())
    first = lines[2].split()
    assert first[:5] == ["base/d2", "50", "100", "2", f"{parameters:,}"] and "1.2500" in first
    assert "0.8100" in lines[-1] and "650" in lines[-1]


def test_json_has_the_same_facts(listed) -> None:
    folder = make("d2", 50, status="finished")
    hidden = folder / ".step_000060.tmp"
    hidden.mkdir()
    (hidden / "x").write_bytes(b"12345")
    (line,) = listed("--json")
    told = json.loads(line)
    (model,) = told["models"]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (model["source"], model["tag"], model["steps"], model["state"]) == ("base", "d2", [50], "finished")
    assert (model["depth"], model["bytes"], model["val_bpb"], model["pid"]) == (2, size, None, None)
    assert told["leftovers"] == [{"path": str(hidden), "bytes": 5, "keep": ""}]


def test_an_empty_base_folder_has_no_models(listed, base_dir: Path) -> None:
    assert listed() == [f"{base_dir / 'checkpoints'}: no models"]
    assert not base_dir.exists()


def test_a_changed_byte_is_seen_by_verify_alone_and_a_short_file_always(listed) -> None:
    file = make("d2", 5, 6) / "step_000006" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert names_and_states(listed()) == {"base/d2": "stopped, --resume=auto goes on"}
    assert names_and_states(listed("--verify")) == {"base/d2": "damaged (step 6)"}
    file.write_bytes(content[:-1])
    assert names_and_states(listed()) == {"base/d2": "damaged (step 6)"}


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b'{"files": {"a": 3}}'])
def test_whatever_a_file_holds_the_model_is_listed(listed, name: str, content: bytes) -> None:
    folder = make("d2", 5)
    (folder / "step_000005" / name).write_bytes(content)
    (folder / "run.json").write_bytes(content)
    (folder / "metrics.jsonl").write_bytes(content)
    assert names_and_states(listed()) == {"base/d2": "damaged (step 5)"}


def test_a_folder_without_checkpoints_is_listed_as_damaged(listed) -> None:
    run_folder("base", "d2").mkdir(parents=True)
    assert names_and_states(listed()) == {"base/d2": "damaged"}


def test_a_name_of_many_lines_and_colours_is_one_plain_line(listed) -> None:
    make("a\n\x1b[31mb", 5)
    assert names_and_states(listed()) == {r"base/a\n\x1b[31mb": "stopped, --resume=auto goes on"}


def test_sizes_and_steps_are_short() -> None:
    assert [models.size(n) for n in (0, 999, 1000, 1_240_000, 999_600, 35_000_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.2 MB",
        "1.0 MB",
        "35.0 GB",
    ]
    assert models.steps_in_words([1, 2, 3, 4000, 5000]) == "1 ... 4,000 5,000"


# Deleting --------------------------------------------------------------------------------------------------------


def test_a_deleted_run_is_gone_and_no_other(listed, base_dir: Path) -> None:
    folder, other = make("d2", 5, 6), make("d22", 5)
    before = files_in(other)
    assert listed("--delete=base/d2", "--yes") == [f"deleted {folder}"]
    assert sorted(path.name for path in (base_dir / "checkpoints" / "base").iterdir()) == ["d22"]
    assert files_in(other) == before


def test_one_checkpoint_can_be_deleted_but_not_the_only_one(listed) -> None:
    folder = make("d2", 5, 6)
    with pytest.raises(UserError, match=r"--step=7: .* has 5, 6"):
        models.main(["--delete=base/d2", "--step=7", "--yes"])
    assert listed("--delete=base/d2", "--step=6", "--yes") == [f"deleted {folder / 'step_000006'}"]
    assert saved_steps(folder) == [5] and find_checkpoint("base", "d2").step == 5
    with pytest.raises(UserError, match=r"the only checkpoint.*leave --step out"):
        models.main(["--delete=base/d2", "--step=5", "--yes"])
    assert saved_steps(folder) == [5]


def test_a_finished_run_that_loses_its_last_checkpoint_is_to_be_continued(listed) -> None:
    make("d2", 5, 6, 7, status="finished")
    listed("--delete=base/d2", "--step=5", "--yes")
    assert names_and_states(listed()) == {"base/d2": "finished"}
    listed("--delete=base/d2", "--step=7", "--yes")
    assert names_and_states(listed()) == {"base/d2": "stopped, --resume=auto goes on"}


@pytest.mark.parametrize(
    "name", ["d2", "base", "base/", "/d2", "base/..", "base/../base", "base/.d2.old", "base/d2/step_000005", "x/d2", ""]
)
def test_a_name_that_could_lead_elsewhere_is_refused(base_dir: Path, name: str) -> None:
    before = files_in(make("d2", 5).parent)
    with pytest.raises(UserError, match=r"--delete=.*must be"):
        models.main([f"--delete={name}", "--yes"])
    assert files_in(run_folder("base", "d2").parent) == before


def test_a_model_that_is_not_there_is_told_with_those_that_are(base_dir: Path) -> None:
    make("d2", 5)
    with pytest.raises(UserError, match=r"--delete=base/d3: .* has d2$"):
        models.main(["--delete=base/d3", "--yes"])
    with pytest.raises(UserError, match="has no models"):
        models.main(["--delete=rl/d2", "--yes"])


def test_links_out_of_the_base_folder_are_never_followed(base_dir: Path, tmp_path: Path) -> None:
    folder = make("d2", 5, 6)
    (tmp_path / "elsewhere").mkdir()
    outside = folder.rename(tmp_path / "elsewhere" / "d2")
    folder.symlink_to(outside)
    before = files_in(outside)
    with pytest.raises(UserError, match="never deleted"):
        models.main(["--delete=base/d2", "--yes"])
    folder.unlink()
    folder.parent.rename(tmp_path / "emptied")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    for flags in (["--delete=base/d2"], ["--delete=base/d2", "--step=5"]):
        with pytest.raises(UserError, match="never deleted"):
            models.main([*flags, "--yes"])
    assert files_in(outside) == before


@pytest.mark.parametrize(
    "flags", [["--step=5"], ["--delete=base/d2", "--clean"], ["--clean", "--json"], ["--delete=base/d2", "--verify"]]
)
def test_flags_that_do_not_go_together_are_refused(base_dir: Path, flags: list[str]) -> None:
    with pytest.raises(UserError, match=r"only|give one"):
        models.main(flags)


def recipe(*flags: str, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "scripts.models", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_where_nobody_can_be_asked_nothing_is_deleted_without_yes(base_dir: Path) -> None:
    folder = make("d2", 5)
    (folder / ".step_000006.tmp").mkdir()
    for flags in (("--delete=base/d2",), ("--clean",)):
        process = recipe(*flags, stdin=subprocess.DEVNULL)
        _, told = process.communicate(timeout=120)
        assert process.returncode == 2 and "confirm it with --yes" in told
    assert saved_steps(folder) == [5] and (folder / ".step_000006.tmp").exists()


@pytest.mark.parametrize(("answer", "deleted"), [("YES\n", True), ("\n", False)])
def test_on_a_terminal_the_answer_decides(base_dir: Path, answer: str, deleted: bool) -> None:
    folder = make("d2", 5)
    ours, theirs = os.openpty()
    try:
        process = recipe("--delete=base/d2", stdin=theirs)
        os.write(ours, answer.encode())
        out, error = process.communicate(timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert f"delete {folder} (1 checkpoints" in out
    assert (process.returncode, folder.exists()) == ((0, False) if deleted else (2, True))
    assert deleted or "nothing was deleted" in error


def test_a_deletion_that_is_killed_leaves_no_part_of_a_model_under_its_name(base_dir: Path) -> None:
    folder = make("d2", 5, 6)
    program = (
        "import os, shutil; from pathlib import Path; from nanochat import inventory\n"
        "shutil.rmtree = lambda path, **_: Path(path).exists() and os.kill(os.getpid(), 9)\n"
        f"inventory.delete(Path({str(folder)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120)
    assert done.returncode == -9
    assert not folder.exists()


# Running trainings ---------------------------------------------------------------------------------------------------


def test_a_run_that_a_live_process_writes_is_not_touched(listed, base_dir: Path) -> None:
    folder = make("d2", 5, 6)
    (base_dir / "checkpoints" / "base" / ".d2.new").mkdir()
    (folder / ".step_000007.tmp").mkdir()
    before = files_in(base_dir)
    with training(folder) as process:
        assert names_and_states(listed()) == {"base/d2": f"running (process {process.pid})"}
        moved = (folder / "step_000005" / "meta.json").rename(base_dir / "meta.json")
        assert names_and_states(listed()) == {"base/d2": f"running (process {process.pid}), damaged: step 5"}
        moved.rename(folder / "step_000005" / "meta.json")
        for flags in (["--delete=base/d2"], ["--delete=base/d2", "--step=5"]):
            with pytest.raises(UserError, match=f"process {process.pid} is writing this run"):
                models.main([*flags, "--yes"])
        assert listed("--clean", "--yes") == ["nothing to remove"]
        assert (folder / ".step_000007.tmp").exists() and files_in(base_dir) == before
    assert names_and_states(listed())["base/d2"].startswith("stopped")  # killed: the lock is free at once
    models.main(["--delete=base/d2", "--yes"])
    assert not folder.exists()


# What dead processes left --------------------------------------------------------------------------------------------


def test_what_dead_processes_left_is_named_and_cleaned_and_nothing_else(listed, base_dir: Path) -> None:
    folder, other = make("d2", 5), make("d3", 5, source="sft")
    parent = folder.parent
    left = [parent / ".d2.old", parent / ".d2.new", parent / ".gone.new", folder / ".step_000007.tmp"]
    left += [folder / ".step_000004.old", other / ".step_000009.tmp"]
    for path in left:
        path.mkdir()
        (path / "part").write_bytes(b"x" * 1000)
    for path in (parent / ".keys", folder / ".notes"):
        path.mkdir()
    before = files_in(folder / "step_000005") | files_in(other / "step_000005")
    lines = listed()
    named = {line.split()[2] for line in lines if line.startswith("left over:")}
    assert named == set(map(str, left)) and lines[-1] == "remove what is left over with --clean"
    assert listed("--clean", "--yes")[-1] == "removed 6, 6.0 kB"
    assert not any(path.exists() for path in left)
    assert (parent / ".keys").exists() and (folder / ".notes").exists()
    assert files_in(folder / "step_000005") | files_in(other / "step_000005") == before
    assert listed("--clean", "--yes") == ["nothing to remove"]


def test_a_whole_model_whose_name_is_free_is_kept_and_told(listed) -> None:
    """A run was killed between two renamings: the old model hidden, the new one not yet in its place."""
    folder = make("d2", 5)
    hidden = folder.rename(folder.with_name(".d2.old"))
    (line,) = [line for line in listed() if line.startswith("left over")]
    assert "the name d2 is free: rename it" in line
    assert listed("--clean", "--yes")[-1] == "nothing to remove"
    hidden.rename(folder)
    assert find_checkpoint("base", "d2").step == 5
