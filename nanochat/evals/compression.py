"""A language model as a compressor: bits per byte of held-out documents, beside xz and zstd on the very same bytes.

Every byte is scored exactly once. A document longer than the context is read in windows that overlap: each scores only
its new part and reads what came before as context, as a user's text would be read.
"""

import lzma
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nanochat.model.gpt import GPT, IGNORED
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """A stretch of a document's tokens: it reads begin..end and scores the targets from `first` on."""

    document: int
    begin: int
    first: int
    end: int


def windows(document: int, num_tokens: int, sequence_len: int, stride: int) -> Iterator[Window]:
    """Windows of at most `sequence_len` inputs that score tokens 1..num_tokens-1, `stride` new ones at a time."""
    first = 1
    while first < num_tokens:
        end = min(num_tokens, first + sequence_len if first == 1 else first + stride)
        yield Window(document, max(0, end - sequence_len - 1), first, end)
        first = end


@torch.no_grad()
def document_nats(
    model: GPT, tokenizer: Tokenizer, documents: Sequence[str], batch_size: int = 16, stride: int | None = None
) -> np.ndarray:
    """Nats the model needs for each document after a BOS. Returns (len(documents),) float64.

    stride: new tokens per window of a long document, at most the context; default half of it.
    """
    length = model.config.sequence_len
    ids = tokenizer.encode_batch(documents, prepend=tokenizer.bos)
    todo = [w for i, tokens in enumerate(ids) for w in windows(i, len(tokens), length, stride or max(1, length // 2))]
    todo.sort(key=lambda window: window.begin - window.end)  # longest first: little padding in a batch
    nats = np.zeros(len(documents))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        width = batch[0].end - batch[0].begin - 1
        inputs = torch.full((len(batch), width), tokenizer.bos)
        targets = torch.full((len(batch), width), IGNORED)
        for row, w in enumerate(batch):
            tokens = torch.tensor(ids[w.document][w.begin : w.end])
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, w.first - w.begin - 1 : len(tokens) - 1] = tokens[w.first - w.begin :]
        device = model.wte.weight.device
        document_ids = torch.zeros_like(inputs).to(device)
        losses = model.token_losses(inputs.to(device), targets.to(device), document_ids).sum(dim=1).double().cpu()
        np.add.at(nats, [w.document for w in batch], losses.numpy())
    return nats


COMPRESSORS = {
    "xz": lambda data: len(lzma.compress(data, preset=9)),  # xz -9
    "zstd": lambda data: len(pa.Codec("zstd", compression_level=19).compress(data, asbytes=True)),  # zstd -19
}


def compare_compressors(model: GPT, tokenizer: Tokenizer, documents: Sequence[str]) -> dict[str, Any]:
    """Bits per byte of the model and of the compressors, over all documents together and in the mean over documents.

    Together: the compressors see the documents concatenated and may learn from one for the next; the model reads each
    alone. Per document: everybody sees each alone.
    """
    encoded = [document.encode() for document in documents]
    sizes = np.array([len(data) for data in encoded])
    bits = document_nats(model, tokenizer, documents) / math.log(2)
    together = b"".join(encoded)
    alone = {name: np.array([size_of(data) for data in encoded]) * 8 for name, size_of in COMPRESSORS.items()}
    return {
        "bytes": int(sizes.sum()),
        "documents": len(documents),
        "val_bpb": float(bits.sum() / sizes.sum()),
        "compressors": {name: size_of(together) * 8 / len(together) for name, size_of in COMPRESSORS.items()},
        "per_document": {
            "val_bpb": float((bits / sizes).mean()),
            **{name: float((total / sizes).mean()) for name, total in alone.items()},
        },
    }
