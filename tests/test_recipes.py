"""Every recipe from start to end at depth 2, with and without the recurrent mixer, on this repo's own text."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.checkpoint import find_checkpoint, run_folder, saved_steps
from nanochat.common import UserError, read_record, record_path
from scripts import base_loss, base_train, chat_cli, chat_sft, tok_eval, tok_train

REPO = Path(__file__).resolve().parents[1]
TINY = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=64", "--device-batch-size=2"]
TINY += ["--total-batch-size=256", "--eval-tokens=500", "--logger=none", "--compile=off", "--device-type=cpu"]


def metrics(source: str, tag: str = "d2") -> list[dict[str, float]]:
    lines = (run_folder(source, tag) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("pattern", ["A", "AR"])
@pytest.mark.usefixtures("tokenizer", "recurrent")
def test_the_whole_path_from_text_to_an_answer(
    pattern: str, text: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_train.main([*TINY, f"--data-dir={text}", f"--layer-pattern={pattern}", "--num-iterations=8", "--eval-every=4"])
    bpb = [record["val_bpb"] for record in metrics("base") if "val_bpb" in record]
    assert len(bpb) == 3 and bpb[-1] < bpb[0]
    base_loss.main([f"--data-dir={text}", "--split-tokens=500"])
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["val_bpb"] == pytest.approx(bpb[-1], rel=1e-4) and shown["step"] == 8
    documents = {}
    for num_tokens in (50, 10**6):
        base_loss.main([f"--data-dir={text}", "--compare-compressors", f"--split-tokens={num_tokens}"])
        documents[num_tokens] = json.loads(capsys.readouterr().out.splitlines()[-1])["documents"]
    assert 1 <= documents[50] < documents[10**6]
    chat_sft.main(
        [f"--data={chats}", "--num-iterations=30", "--eval-every=15", "--device-batch-size=2", "--logger=none"]
    )
    losses = [record["loss_raw"] for record in metrics("sft") if "loss_raw" in record]
    assert losses[-1] < losses[0]
    capsys.readouterr()
    for source in ("base", "sft"):
        chat_cli.main([f"--source={source}", "-p", "What is 3 + 1? äöü 你好", "--max-tokens=12"])
        assert capsys.readouterr().out.strip()


SWITCHES = {
    "--doc-mask": {"doc_mask": True},
    "--no-smear": {"smear": False},
    "--no-key-offset": {"key_offset": False},
    "--no-backout": {"backout": False},
    "--no-value-embeddings": {"value_embeddings": False},
    "--no-qk-norm": {"qk_norm": False},
    "--tied-head": {"tied_head": True},
    "--residual=plain": {"residual": "plain"},
    "--mlp-activation=gelu": {"mlp_activation": "gelu"},
    "--softcap=0": {"softcap": 0.0},
    "--window-pattern=L": {"window_pattern": "L"},
    "--laws=reference": {"key_offset": False, "backout": True},
}


# Rows of 64 positions lie within every window and within one long document; models of depth 2 have no backout.
NO_EFFECT_HERE = {"--window-pattern=L", "--doc-mask", "--no-backout"}


@pytest.mark.usefixtures("tokenizer")
def test_every_switch_trains_another_model_that_is_saved_as_such(text: Path) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=6", "--eval-every=-1", "--overwrite"]
    base_train.main(flags)
    plain, plain_losses = find_checkpoint("base").config, [record.get("loss_raw") for record in metrics("base")]
    for switch, change in SWITCHES.items():
        base_train.main([*flags, switch])
        assert find_checkpoint("base").config == replace(plain, **change), switch
        losses = [record["loss_raw"] for record in metrics("base")[:6]]
        assert max(losses) < 7, switch
        if switch not in NO_EFFECT_HERE:
            assert losses != plain_losses[:6], switch


@pytest.mark.usefixtures("tokenizer")
def test_a_finished_run_is_not_taken_for_one_on_other_text_or_another_base(
    text: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [*TINY, "--num-iterations=3", "--eval-every=-1"]
    sft = ["--num-iterations=2", "--eval-every=-1", "--device-batch-size=2", "--resume=auto"]
    base_train.main([*base, f"--data-dir={text}"])
    chat_sft.main([f"--data={chats}", *sft])
    base_train.main([*base, f"--data-dir={text}", "--resume=auto"])
    chat_sft.main([f"--data={chats}", *sft])
    assert capsys.readouterr().out.count("nothing to do") == 2
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Another text, line {number}." for number in range(3000)))
    with pytest.raises(UserError, match=r"was trained on another text than the one given now; start it anew with --ov"):
        base_train.main([*base, f"--data-dir={other}", "--resume=auto"])
    base_train.main([*base, f"--data-dir={text}", "--seed=7", "--overwrite"])
    with pytest.raises(UserError, match="was trained on another base model than the one given now"):
        chat_sft.main([f"--data={chats}", *sft])
    chat_sft.main([f"--data={chats}", *sft, "--resume=no", "--overwrite"])


@pytest.mark.usefixtures("tokenizer")
def test_a_time_budget_is_kept(text: Path) -> None:
    base_train.main([*TINY, f"--data-dir={text}", "--time-budget=2", "--eval-every=-1"])
    records = metrics("base")
    record = read_record(record_path("base_train"))
    longest_s = max(step["step_s"] for step in records[:-1])
    assert record["startup_s"] > 0
    assert 2 - longest_s < record["startup_s"] + record["train_s"] < 2 + record["startup_s"] + 2 * longest_s
    assert records[-2]["lr"] < 0.2 or len(records) < 20  # the schedule came to its end, unless there was no time for it


@pytest.mark.usefixtures("tokenizer")
def test_a_finished_model_is_not_overwritten_and_resume_leaves_it(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=2", "--eval-every=-1"]
    base_train.main(flags)
    with pytest.raises(UserError, match="--overwrite"):
        base_train.main(flags)
    base_train.main([*flags, "--resume=auto"])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        tok_train.main([f"--data-dir={text}", "--vocab-size=400"])


@pytest.mark.usefixtures("tokenizer")
def test_a_prompt_longer_than_the_context_is_shortened_by_rule(
    text: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_train.main([*TINY, f"--data-dir={text}", "--num-iterations=1", "--eval-every=-1"])
    chat_sft.main([f"--data={chats}", "--num-iterations=1", "--eval-every=-1", "--logger=none"])
    capsys.readouterr()
    answers = []
    for beginning in ("", "more words before "):  # only the end of what is too long is read
        chat_cli.main(["-p", beginning * 99 + "far too long " * 500, "--max-tokens=5"])
        answers.append(capsys.readouterr().out)
        chat_cli.main(["--source=base", "-p", beginning * 99 + "far too long " * 500, "--max-tokens=5"])
        answers.append(capsys.readouterr().out[-20:])
    assert answers[:2] == answers[2:]


def test_a_conversation_on_the_terminal_remembers_and_clears(
    base_dir: Path, text: Path, chats: Path, tokenizer: None
) -> None:
    base_train.main([*TINY, f"--data-dir={text}", "--num-iterations=1", "--eval-every=-1"])
    chat_sft.main([f"--data={chats}", "--num-iterations=1", "--eval-every=-1", "--logger=none"])
    result = subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", "--max-tokens=3"],
        input="What is 1 + 1?\n\nAnd ünïcödé?\nclear\nagain\nquit\n",
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=120,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONUTF8": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("assistant:") == 3


def test_the_tokenizer_is_compared_on_every_kind_of_text(
    tokenizer: None, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tok_eval.main([f"--data-dir={text}", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])


# Bad input -----------------------------------------------------------------------------------------------------


def run_recipe(name: str, *flags: str, base: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"scripts.{name}", *flags]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment, timeout=120)


def test_all_mistakes_of_a_command_line_are_told_at_once_and_nothing_is_written(base_dir: Path) -> None:
    flags = ("--depht=4", "--max-seq=5", "--target-param-data-ratio=0", "--depth=0", "--warmdown-ratio=1.5")
    result = run_recipe("base_train", *flags, base=base_dir)
    assert result.returncode == 2
    errors = result.stderr.splitlines()
    assert len(errors) == 5 and all(line.startswith("error: ") for line in errors)
    assert all(any(flag in line for line in errors) for flag in flags)
    assert not base_dir.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--total-batch-size=300"], ["--total-batch-size", "300", "multiple of 128", "256 and 384"]),
        (["--data-dir=nowhere"], ["nowhere"]),
        (["--layer-pattern=AX"], ["AX", "known are"]),
        (["--window-pattern=Q"], ["--window-pattern=Q", "S (short)"]),
        (["--resume=7"], ["--resume=7", "there are"]),
        (["--device-type=cuda"], ["--device-type=cuda", "cpu"]),
        (["--head-dim=15"], ["15", "even"]),
    ],
)
@pytest.mark.usefixtures("tokenizer")
def test_bad_flags_leave_in_one_line_with_code_2(text: Path, base_dir: Path, flags: list[str], told: list[str]) -> None:
    import torch

    if "--device-type=cuda" in flags and torch.cuda.is_available():
        pytest.skip("has CUDA")
    result = run_recipe("base_train", *TINY, f"--data-dir={text}", *flags, base=base_dir)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert all(words in result.stderr for words in told), result.stderr
    assert not (base_dir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", "empty"),
        ("latin.txt", "Grüße\n".encode("latin-1") * 50, "UTF-8"),
        ("cut.parquet", b"PAR1 and then nothing", "cut.parquet"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": 5}\n', "line 2"),
    ],
)
def test_bad_data_files_are_named(base_dir: Path, tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = run_recipe("tok_train", f"--data-dir={tmp_path / name}", "--vocab-size=300", base=base_dir)
    assert result.returncode == 2, result.stderr
    assert name in result.stderr and told in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (base_dir / "tokenizer").exists()


def test_a_corrupt_tokenizer_and_a_missing_model_are_told(base_dir: Path, text: Path, tokenizer: None) -> None:
    (base_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    result = run_recipe("base_train", *TINY, f"--data-dir={text}", base=base_dir)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1) and "tokenizer.json" in result.stderr
    result = run_recipe("chat_cli", "-p", "hi", base=base_dir)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1) and "no sft model is there" in result.stderr


def test_a_damaged_checkpoint_or_one_of_another_tokenizer_is_refused_and_stays(
    base_dir: Path, text: Path, tokenizer: None
) -> None:
    flags = [*TINY, f"--data-dir={text}", "--num-iterations=4", "--eval-every=-1", "--save-every=2"]
    base_train.main(flags)
    (run_folder("base", "d2") / "run.json").unlink()  # as if it had been stopped
    tok_train.main([f"--data-dir={text}", "--vocab-size=400", "--overwrite", "--doc-cap=1000"])
    result = run_recipe("base_train", *flags, "--resume=auto", base=base_dir)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1) and "another tokenizer" in result.stderr
    weights = run_folder("base", "d2") / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for recipe, arguments in (("base_train", [*flags, "--resume=auto"]), ("base_loss", [f"--data-dir={text}"])):
        result = run_recipe(recipe, *arguments, base=base_dir)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
        assert "model.safetensors: missing or damaged" in result.stderr
    assert saved_steps(run_folder("base", "d2")) == [2, 4]
