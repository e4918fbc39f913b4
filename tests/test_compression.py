"""The model as a compressor: every byte once, whatever the windows."""

import lzma
import math
import shutil
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import TEXTS

from nanochat.config import ModelConfig
from nanochat.evals.compression import compare_compressors, document_nats, windows
from nanochat.model.gpt import GPT, build_model
from nanochat.tokenizer import Tokenizer


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
    nats = document_nats(model, tokenizer, documents, batch_size=3)
    for document, cost in zip(documents, nats):
        ids = torch.tensor([tokenizer.encode(document, prepend=tokenizer.bos)])
        with torch.no_grad():
            losses = model.token_losses(ids[:, :-1], ids[:, 1:])
        assert cost == pytest.approx(losses.sum().item(), rel=1e-5)


def test_overlapping_windows_give_more_context_than_chopping(tokenizer: Tokenizer) -> None:
    model = noisy_model(32)
    overlapping, chopped = (document_nats(model, tokenizer, TEXTS[:2], stride=stride) for stride in (8, 32))
    assert (overlapping != chopped).all()
    assert overlapping == pytest.approx(chopped, rel=0.2)


def test_the_comparison_is_over_the_same_bytes(tokenizer: Tokenizer) -> None:
    documents = TEXTS[:4]
    result = compare_compressors(noisy_model(64), tokenizer, documents)
    together = "".join(documents).encode()
    assert result["bytes"] == len(together)
    assert result["compressors"]["xz"] == pytest.approx(len(lzma.compress(together, preset=9)) * 8 / len(together))
    bits = document_nats(noisy_model(64), tokenizer, documents).sum() / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / len(together))
    if shutil.which("zstd"):
        packed = subprocess.run(["zstd", "-19", "-c"], input=together, capture_output=True, check=True).stdout
        assert result["compressors"]["zstd"] == pytest.approx(len(packed) * 8 / len(together), rel=1e-3)
