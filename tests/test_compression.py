"""The model as a compressor: every byte once, whatever the windows."""

import json
import math
import shutil
import subprocess
from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import TEXTS

from nanochat.common import UserError, to_json
from nanochat.config import ModelConfig
from nanochat.evals.compression import COMPRESSORS, compare_compressors, document_nats, tokenized, windows
from nanochat.model.gpt import GPT, build_model
from nanochat.optim import MuonAdamW
from nanochat.scaling import BaseRates
from nanochat.tokenizer import Tokenizer
from scripts import base_loss


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 40))
def test_windows_score_every_token_but_the_first_once_and_fit_the_context(
    tokens: int, context: int, stride: int
) -> None:
    stride = min(stride, context)
    scored = []
    for window in windows(0, tokens, context, stride):
        assert 0 <= window.begin < window.first < window.end <= tokens
        assert window.end - window.begin <= context + 1
        scored += range(window.first, window.end)
    assert scored == list(range(1, tokens))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


def noisy_model(sequence_len: int) -> GPT:
    model = build_model(ModelConfig(sequence_len, 300, 2, 2, 2, 16), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_a_document_within_the_context_costs_what_one_forward_says(tokenizer: Tokenizer) -> None:
    model, documents = noisy_model(2000), ["short", TEXTS[0][:1500], " ", "äöü 你好"]
    nats = document_nats(model, tokenized(tokenizer, documents)[1], batch_size=3)
    for document, cost in zip(documents, nats):
        ids = torch.tensor([tokenizer.encode(document, prepend=tokenizer.bos)])
        with torch.no_grad():
            losses = model.token_losses(ids[:, :-1], ids[:, 1:])
        assert cost == pytest.approx(losses.sum().item(), rel=1e-5)


def cycles() -> list[np.ndarray]:
    """Documents that go round 1 2 3 or 1 3 2: who has seen two tokens knows the rest, one is not enough."""
    return [np.array([0, *(order * 60)], dtype=np.int32) for order in ([1, 2, 3], [1, 3, 2])]


def trained_on_cycles(sequence_len: int) -> GPT:
    model = build_model(ModelConfig(sequence_len, 300, 2, 2, 2, 32), torch.device("cpu"), torch.float32, seed=1)
    optimizer = MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), BaseRates().by_role())
    rows = torch.from_numpy(np.stack([ids[at : at + sequence_len + 1] for ids in cycles() for at in range(4)])).long()
    for _ in range(60):
        (model.loss(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()).backward()
        optimizer.step(1.0, 0.9, 0.0)
        model.zero_grad()
    return model


def test_overlapping_windows_cost_fewer_nats_than_chopping() -> None:
    model = trained_on_cycles(32)
    overlapping, chopped = (document_nats(model, cycles(), stride=stride) for stride in (16, 32))
    # a window of 32 new tokens begins with one token of context, and its next one is anybody's guess
    windows_of_a_document = math.ceil(180 / 32)
    assert (chopped - overlapping > 0.5 * math.log(2) * (windows_of_a_document - 1)).all()
    assert document_nats(model, cycles()) == pytest.approx(overlapping)  # half of the context is the default


def test_windows_go_in_batches_and_progress_is_told(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = noisy_model(32), tokenized(tokenizer, ["ab", *TEXTS[:2]])[1]
    whole = document_nats(model, ids)
    shapes, told = [], []
    forward = model.token_losses
    monkeypatch.setattr(model, "token_losses", lambda *batch: shapes.append(batch[0].shape) or forward(*batch))
    nats = document_nats(model, ids, batch_size=5, on_progress=lambda *counts: told.append(counts))
    assert nats == pytest.approx(whole, rel=1e-5)
    assert max(shapes) == (5, 32) and all(rows == 5 for rows, _ in shapes[:-1])
    total = sum(1 for i, tokens in enumerate(ids) for _ in windows(i, len(tokens), 32, 16))
    assert [done for done, _ in told] == np.cumsum([rows for rows, _ in shapes]).tolist()
    assert told[-1] == (total, total)


def test_documents_are_whole_and_as_many_as_the_tokens_take(tokenizer: Tokenizer) -> None:
    texts, ids = tokenized(tokenizer, repeat("one document"), 50)  # endless: no more is read than needed
    each = len(tokenizer.encode("one document"))
    assert len(texts) == len(ids) == math.ceil(50 / each)
    assert all(document.tolist() == [tokenizer.bos, *tokenizer.encode("one document")] for document in ids)


def test_the_comparison_is_over_the_same_bytes(tokenizer: Tokenizer) -> None:
    documents = TEXTS[:4]
    result = compare_compressors(noisy_model(64), tokenizer, documents)
    together = "".join(documents).encode()
    assert result["bytes"] == len(together)
    bits = document_nats(noisy_model(64), tokenized(tokenizer, documents)[1]).sum() / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / len(together))
    assert result["compressors"].keys() == COMPRESSORS.keys()


@pytest.mark.parametrize("command", ["xz -9 -T1 -c", "zstd -19 -c"])
def test_a_compressor_is_as_good_as_the_program_of_its_name(command: str) -> None:
    name = command.split()[0]
    if not shutil.which(name):
        pytest.skip(f"no {name} here")
    together = "".join(TEXTS).encode()
    packed = subprocess.run(command.split(), input=together, capture_output=True, check=True).stdout
    assert COMPRESSORS[name](together) == pytest.approx(len(packed), rel=1e-3)


def test_odd_documents_are_scored_or_left_out_and_none_at_all_is_told(tokenizer: Tokenizer) -> None:
    odd, plain = (
        compare_compressors(noisy_model(64), tokenizer, documents)
        for documents in (["a\ud800b", "", "plain"], ["a\ufffdb", "plain"])  # half a surrogate pair, and nothing
    )
    assert odd == plain and odd["documents"] == 2
    assert json.loads(to_json(odd)) == odd  # no NaN
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="no text to compare"):
            compare_compressors(noisy_model(64), tokenizer, nothing)


def test_several_ranks_do_not_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    base_loss.parse_args([])
    with pytest.raises(UserError, match="--compare-compressors: the work of one process"):
        base_loss.parse_args(["--compare-compressors"])
