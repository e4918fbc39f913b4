"""Models of the ancestor compute the same numbers here, or are refused; and nothing in their files is ever run."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from ancestral import HEAD_SIZES, OLD_SIZES, VOCAB, ancestor_logits, weights
from torch import Tensor

from nanochat.ancestor import ERAS, OCTOBER, parameter_shapes, read_model, read_tokenizer
from nanochat.checkpoint import Checkpoint, find_checkpoint, run_folder
from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from scripts import chat_sft, import_model

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
MANY_SCRIPTS = (
    "Hello, World! it's 2026, isn't it?  12345 \t\n\n Größe naïve Привет мир 안녕하세요 세계 你好，世界 こんにちは "
    "مرحبا بالعالم नमस्ते שלום Γειά σου 🙂👩‍👩‍👧 e\u0301 \u200b\ufeff \r\n def f(x):\n    return x**2  # ½ Ⅷ"
)


# Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS, MANY_SCRIPTS], VOCAB)


def encoding_of(tokenizer: Tokenizer, **changes: object) -> tiktoken.Encoding:
    """A tokenizer as the ancestor has it: tiktoken's own, from the ranks alone."""
    ordinary = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    parts = {
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": {tokenizer.bytes_of(i): i for i in range(ordinary)},
        "special_tokens": {name: ordinary + i for i, name in enumerate(SPECIAL_TOKENS)},
    }
    return tiktoken.Encoding("rustbpe", **{**parts, **changes})


def write_model(
    folder: Path, w: dict[str, Tensor], sizes: dict[str, int], step: int = 650, pattern: str = "", **meta: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(w, folder / f"model_{step:06d}.pt")
    config = {**sizes, **({"window_pattern": pattern} if pattern else {})}
    content = {"step": step, "val_bpb": 0.81, "model_config": config, "user_config": {"matrix_lr": 0.03}, **meta}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(content))
    return folder


def write_tokenizer(folder: Path, tokenizer: Tokenizer, lengths: Tensor | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding_of(tokenizer)))
    found = torch.tensor(tokenizer.token_bytes) if lengths is None else lengths
    torch.save(found, folder / "token_bytes.pt")
    return folder


@pytest.fixture
def head_model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "chatsft_checkpoints" / "d5"
    write_model(folder, weights(HEAD_SIZES, is_head=True), HEAD_SIZES, pattern="SSSL")
    return write_tokenizer(folder, tokenizer)


@pytest.fixture
def old_model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    saved = {f"_orig_mod.{name}": tensor for name, tensor in weights(OLD_SIZES, is_head=False).items()}
    return write_tokenizer(write_model(tmp_path / "d3", saved, OLD_SIZES), tokenizer)


def taken_over(folder: Path, *flags: str) -> Checkpoint:
    import_model.main([f"--from={folder}", "--tag=taken", *flags])
    return find_checkpoint("sft", "taken")


# The same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["SSSL", "L"])
def test_a_model_of_the_last_version_computes_the_same_logits(
    pattern: str, tmp_path: Path, base_dir: Path, tokenizer: Tokenizer
) -> None:
    w = weights(HEAD_SIZES, is_head=True)
    folder = write_tokenizer(write_model(tmp_path / "d5", w, HEAD_SIZES, pattern=pattern), tokenizer)
    model = taken_over(folder, "--source=sft").build_model(torch.device("cpu"), torch.float64)
    ids = torch.randint(VOCAB, (200,), generator=torch.Generator().manual_seed(1))
    expected = ancestor_logits(w, HEAD_SIZES, pattern, ids, is_head=True)
    assert expected.std() > 1 and expected.abs().max() < 15
    torch.testing.assert_close(model(ids[None])[0].detach(), expected, atol=1e-8, rtol=0)


def test_a_model_of_october_2025_computes_the_same_logits(old_model: Path, base_dir: Path) -> None:
    model = taken_over(old_model, "--source=sft").build_model(torch.device("cpu"), torch.float64)
    ids = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(1))
    expected = ancestor_logits(weights(OLD_SIZES, is_head=False), OLD_SIZES, "L", ids, is_head=False)
    torch.testing.assert_close(model(ids[None])[0].detach(), expected, atol=1e-8, rtol=0)


def test_scalars_of_january_2026_alone_are_used(tmp_path: Path, base_dir: Path, tokenizer: Tokenizer) -> None:
    plain = weights(OLD_SIZES, is_head=False)
    doubled = {**plain, "resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3)}
    write_tokenizer(write_model(tmp_path / "d3", doubled, OLD_SIZES, pattern="L"), tokenizer)
    model = taken_over(tmp_path / "d3", "--source=sft").build_model(torch.device("cpu"), torch.float64)
    ids = torch.arange(40)
    expected = ancestor_logits(plain, OLD_SIZES, "L", ids, is_head=False)
    torch.testing.assert_close(model(ids[None])[0].detach(), expected, atol=1e-8, rtol=0)
    assert model.config.residual == "lambdas" and not model.config.smear


def gates_of_32(w: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 32) if name.endswith("ve_gate.weight") else tensor for name, tensor in w.items()}


def without(w: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in w.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (gates_of_32, r"17 January to 8 March 2026, which is not supported.*read 32 channels.*softcap"),
        (lambda w: without(w, "ve_gate"), r"17 January to 8 March 2026"),
        (lambda w: without(w, "smear", "backout"), r"9 to 13 March 2026.*a third of the context.*1\.15"),
        (lambda w: without(w, "smear", "backout", "value_embeds", "ve_gate"), "11 to 16 January.*half the context"),
        (lambda w: without(w, "smear", "backout", "ve_gate", "value_embeds", "lambda"), "10 January.*half the context"),
    ],
)
def test_an_era_that_computes_otherwise_is_refused_with_its_name(
    change: object, told: str, head_model: Path, base_dir: Path
) -> None:
    write_model(head_model, change(weights(HEAD_SIZES, is_head=True)), HEAD_SIZES, pattern="SSSL")
    with pytest.raises(UserError, match=told):
        taken_over(head_model)
    assert not (base_dir / "checkpoints").exists()


def test_every_era_either_says_what_differs_or_builds_a_model() -> None:
    assert [era.name for era in ERAS if not era.unlike] == [
        "13 October 2025 to 10 January 2026",
        "11 to 16 January 2026",
        "14 March 2026 and later",
    ]


# What is wrong with the files is told -------------------------------------------------------------------------------


def test_all_weights_that_are_missing_unknown_or_misshapen_are_named(head_model: Path, base_dir: Path) -> None:
    w = weights(HEAD_SIZES, is_head=True)
    w["bigram.weight"] = w["transformer.h.9.attn.c_q.weight"] = torch.zeros(2)
    w["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(4, 48)
    write_model(head_model, without(w, "smear_gate", "h.3.attn.c_v"), HEAD_SIZES, pattern="SSSL")
    with pytest.raises(UserError) as caught:
        taken_over(head_model)
    assert str(caught.value).endswith(
        "missing: smear_gate.weight, transformer.h.3.attn.c_v.weight; "
        "unknown: bigram.weight, transformer.h.9.attn.c_q.weight; "
        "shape: transformer.h.1.mlp.c_fc.weight: [4, 48] instead of [192, 48]"
    )


def test_a_missing_or_damaged_meta_is_named(head_model: Path, base_dir: Path) -> None:
    meta = head_model / "meta_000650.json"
    for content, told in (
        ("{", "damaged"),
        ("[]", "no model_config"),
        ('{"model_config": {"n_layer": 5, "flux": 1}}', r"unknown: flux; missing: sequence_len, .*n_embd$"),
        (json.dumps({"model_config": {**HEAD_SIZES, "n_head": 2.5}}), "not a size: n_head"),
        (json.dumps({"model_config": {**HEAD_SIZES, "n_layer": 10**6}}), "n_layer=1000000"),
        (json.dumps({"model_config": {**HEAD_SIZES, "n_head": 0}}), r"model_000650\.pt: .*n_head.*at least 1"),
    ):
        meta.write_text(content)
        with pytest.raises(UserError, match=told):
            taken_over(head_model)
    meta.unlink()
    with pytest.raises(UserError, match=r"meta_000650\.json: cannot be read"):
        taken_over(head_model)


@pytest.mark.parametrize("length", [0, 100, 5_000, -1_000, -1])
def test_a_truncated_model_is_refused(length: int, head_model: Path, base_dir: Path) -> None:
    file = head_model / "model_000650.pt"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model_000650\.pt: cannot be read"):
        taken_over(head_model)


def test_a_changed_byte_in_the_numbers_is_noticed(head_model: Path, base_dir: Path) -> None:
    file = head_model / "model_000650.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"data/\d+: cannot be read \(Bad CRC"):
        taken_over(head_model)
    assert not list(base_dir.rglob("step_*"))


def test_weights_that_are_no_numbers_are_refused(head_model: Path, base_dir: Path) -> None:
    w = weights(HEAD_SIZES, is_head=True)
    w["resid_lambdas"][1] = float("nan")
    write_model(head_model, w, HEAD_SIZES, pattern="SSSL")
    with pytest.raises(UserError, match=r"residual\.resid holds infinities or NaN"):
        taken_over(head_model)
    assert not list(base_dir.rglob("*taken*.new"))


def test_a_tokenizer_of_another_size_is_refused(head_model: Path, base_dir: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other", Tokenizer.train(TEXTS, 290))
    with pytest.raises(UserError, match=r"knows 300 tokens, its tokenizer 290.*--tokenizer"):
        taken_over(head_model, f"--tokenizer={other}")


def test_what_the_command_line_lacks_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--from: not given.*\n--tag: not given"):
        import_model.parse_args([])
    with pytest.raises(UserError, match=r"--source: not given.*base, mid, sft, rl"):
        import_model.parse_args([f"--from={tmp_path}", "--tag=x"])
    with pytest.raises(UserError, match="no such folder"):
        import_model.main([f"--from={tmp_path / 'none'}", "--tag=x", "--source=sft"])
    with pytest.raises(UserError, match=r"no model_NNNNNN\.pt is there"):
        import_model.main([f"--from={tmp_path}", "--tag=x", "--source=sft"])


def test_the_newest_step_is_taken_unless_one_is_given(head_model: Path, base_dir: Path) -> None:
    write_model(head_model, weights(HEAD_SIZES, is_head=True, seed=1), HEAD_SIZES, step=700, pattern="SSSL")
    assert read_model(head_model).step == 700
    assert taken_over(head_model, "--step=650").step == 650
    with pytest.raises(UserError, match=r"--step=1: .*there are 650, 700"):
        read_model(head_model, 1)


def test_a_name_that_is_taken_is_not_replaced(head_model: Path, base_dir: Path) -> None:
    fingerprint = taken_over(head_model).fingerprint
    with pytest.raises(UserError, match=r"exists already.*--delete=sft/taken"):
        taken_over(head_model)
    assert find_checkpoint("sft").fingerprint == fingerprint


def test_the_ancestors_base_folder_is_understood_as_it_is(head_model: Path, base_dir: Path) -> None:
    shared = head_model.parent.parent / "tokenizer"
    shared.mkdir()
    for name in ("tokenizer.pkl", "token_bytes.pt"):
        shutil.move(head_model / name, shared / name)
    assert taken_over(head_model).folder.parent.parent.name == "sft"


# What comes after -----------------------------------------------------------------------------------------------


def run_recipe(base_dir: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_chat_answers_with_an_imported_model(head_model: Path, base_dir: Path) -> None:
    done = run_recipe(base_dir, "scripts.import_model", f"--from={head_model}", "--tag=taken")
    assert (done.returncode, done.stderr) == (0, "")
    assert "14 March 2026 and later" in done.stdout and "val bpb 0.8100" in done.stdout
    done = run_recipe(base_dir, "scripts.chat_cli", "-p", "hi", "--max-tokens=8", "--device-type=cpu")
    model = run_folder("sft", "taken").relative_to(base_dir)
    assert done.returncode == 0 and done.stdout.strip()
    assert re.fullmatch(rf"model: .*{model}/step_\d+\n", done.stderr), "which one it took, as none was named"


def test_fine_tuning_starts_from_an_imported_base_model(old_model: Path, base_dir: Path, tmp_path: Path) -> None:
    import_model.main([f"--from={old_model}", "--tag=taken", "--source=base"])
    plan = find_checkpoint("base").meta["plan"]
    assert plan["base_rates"]["matrix"] == 0.03 and plan["total_batch_tokens"] == 2**19
    with (tmp_path / "talk.jsonl").open("w") as file:
        for i in range(60):
            messages = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ho"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    flags = ("--num-iterations=1", "--total-batch-size=128", "--eval-every=-1", "--device-type=cpu", "--logger=none")
    chat_sft.main([f"--data={tmp_path / 'talk.jsonl'}", *flags])
    assert find_checkpoint("sft", "taken").step == 1


def test_training_does_not_go_on_from_an_imported_model(old_model: Path, base_dir: Path) -> None:
    with pytest.raises(UserError, match="an imported model has no optimizer state"):
        taken_over(old_model, "--source=sft").load_optimizer(None)


# The tokenizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [265, VOCAB, 1000])
def test_every_text_has_the_ids_that_tiktoken_gives_it(vocab_size: int, tmp_path: Path) -> None:
    trained = Tokenizer.train([*TEXTS, MANY_SCRIPTS * 3], vocab_size)
    theirs = encoding_of(trained)
    ours = read_tokenizer(write_tokenizer(tmp_path, trained))
    for text in (MANY_SCRIPTS, "".join(SPECIAL_TOKENS), f"a {' '.join(SPECIAL_TOKENS)} b", "", *TEXTS[:3]):
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.vocab_size == theirs.n_vocab == vocab_size
    assert [ours.special(name) for name in SPECIAL_TOKENS] == [
        theirs.encode_single_token(name) for name in SPECIAL_TOKENS
    ]
    assert [ours.bytes_of(i) for i in range(vocab_size)] == [
        theirs.decode_single_token_bytes(i) for i in range(vocab_size)
    ]


def test_lengths_of_tokens_may_be_of_before_july_2026_but_not_of_another_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shown = [len(tokenizer.bytes_of(i).decode(errors="replace").encode()) for i in range(VOCAB)]
    old = torch.tensor(shown, dtype=torch.int32)
    old[-9:] = 0
    assert old.tolist() != tokenizer.token_bytes.tolist()
    write_tokenizer(tmp_path, tokenizer, old)
    assert read_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    write_tokenizer(tmp_path, tokenizer, old.bfloat16())  # small numbers: exact in any type
    assert read_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    old[256:290] += 1
    write_tokenizer(tmp_path, tokenizer, old)
    with pytest.raises(UserError, match=r"token_bytes\.pt: 34 lengths are not those"):
        read_tokenizer(tmp_path)
    write_tokenizer(tmp_path, tokenizer, old[:5])
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        read_tokenizer(tmp_path)


def long_token() -> dict[str, object]:
    ranks = {bytes([i]): i for i in range(256)} | {b"a" * 5_000: 256}
    return {"mergeable_ranks": ranks, "special_tokens": {name: 257 + i for i, name in enumerate(SPECIAL_TOKENS)}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pat_str": r"\S+|\s+"}, "splits text by another pattern"),
        ({"special_tokens": {"<|endoftext|>": 291}}, "special tokens are not"),
        ({"mergeable_ranks": {bytes([i]): 255 - i for i in range(256)}}, "special tokens are not"),
        (long_token(), r"a token of 5,000 bytes"),
    ],
)
def test_a_tokenizer_that_would_give_other_ids_is_refused(
    changes: dict[str, object], told: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding_of(tokenizer, **changes)))
    with pytest.raises(UserError, match=told):
        read_tokenizer(tmp_path)


def test_a_table_of_merges_that_is_not_one_is_refused() -> None:
    raw = {bytes([i]): i for i in range(256)}
    for ranks, told in (
        ({**raw, b"abc": 256}, "cannot be reached"),
        ({**raw, b"ab": 257}, "without a gap"),
        ({bytes([i]): 255 - i for i in range(256)}, "not the bytes in order"),
    ):
        with pytest.raises(ValueError, match=told):
            Tokenizer.from_ranks(ranks)


def test_the_renaming_covers_every_parameter_that_the_last_version_has(head_model: Path) -> None:
    model = read_model(head_model)
    assert model.stored.keys() == parameter_shapes(model.config).keys()
    assert not re.search(OCTOBER.name, model.era.name)
