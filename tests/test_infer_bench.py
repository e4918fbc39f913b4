"""The card and the sweep of scripts.infer_bench: a JSON object on the last line, with numbers that fit together."""

import json

import pytest
import torch

from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.evals.decode import past_bytes_per_token
from nanochat.model.gpt import GPT
from scripts import infer_bench

SHORT = ["--depth=1", "--max-seq-len=256", "--prompt-tokens=40", "--decode-tokens=4", "--batch-sizes=1,3"]


def test_the_last_line_has_the_card_the_prefill_and_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    infer_bench.main([*SHORT, "--device-type=cpu"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["source"] == "random weights" and told["model_config"]["n_layer"] == 1
    card, rows = told["bytes"], told["sweep"]
    assert card["ceiling_tokens_per_s"] == pytest.approx(
        card["read_bytes_per_s"] / (card["weight_bytes_per_token"] + card["kv_bytes_read_per_token_mid_context"])
    )
    assert [(row["batch"], row["steps"]) for row in rows] == [(1, 3), (3, 3)]
    assert all(row["tokens_per_s"] > 0 and row["step_s"] > 0 and row["memory_bound_frac"] > 0 for row in rows)
    assert told["prefill"]["first_token_s"] == min(row["first_token_s"] for row in rows)


def test_a_windowed_layer_looks_at_no_more_than_its_window() -> None:
    model = GPT(ModelConfig(2048, 97, n_layer=4, n_head=2, n_kv_head=1, n_embd=32))  # windows of 512, the last full
    assert past_bytes_per_token(model, 100) == 2 * 16 * 4 * 4 * 100
    assert past_bytes_per_token(model, 1000) == 2 * 16 * 4 * (3 * 512 + 1000)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--batch-sizes=1,x"], "--batch-sizes=1,x"),
        (["--batch-sizes=0"], "from 1 to 4096"),
        (["--decode-tokens=300"], "--decode-tokens=300: with 3 rows needs a context above 303"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(flags: list[str], told: str, capsys) -> None:
    with pytest.raises((UserError, SystemExit)) as refusal:
        infer_bench.main([*SHORT, "--device-type=cpu", *flags])
    assert told in str(refusal.value) + capsys.readouterr().err


def test_the_peer_has_the_models_shape_and_as_many_weights_in_its_matrices() -> None:
    pytest.importorskip("transformers")
    from nanochat.evals.peer import Peer
    from nanochat.evals.speed import weight_bytes_per_token

    config = ModelConfig(64, 512, n_layer=2, n_head=3, n_kv_head=3, n_embd=96, value_embeddings=False)
    peer, model = Peer(config, torch.device("cpu"), torch.float32, seed=1), GPT(config)
    weights = sum(p.numel() for name, p in peer.model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert weights == pytest.approx(weight_bytes_per_token(model) / 4, rel=0.01)
    stamps = peer.stamps([[1, 2, 3], [4, 5, 6]], 5, temperature=1.0, top_k=10)
    assert len(stamps) == 5 and stamps == sorted(stamps) and stamps[0] > 0
