"""A language model as a compressor: bits per byte of held-out documents, beside xz and zstd on the very same bytes.

Every byte is scored exactly once. A document longer than the context is read in windows that overlap: each scores only
its new part and reads what came before as context, as a user's text would be read.
"""

import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nanochat.common import UserError
from nanochat.model.gpt import GPT, IGNORED
from nanochat.tokenizer import Tokenizer, replace_surrogates

TOKENIZE_DOCUMENTS = 128  # at a time, so that little more is tokenised than is scored


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


def tokenized(
    tokenizer: Tokenizer, documents: Iterable[str], max_tokens: float = math.inf
) -> tuple[list[str], list[np.ndarray]]:
    """As many documents, from the first on, as it takes to have `max_tokens` tokens, and their ids behind a BOS.

    The texts are as they can be written in UTF-8; those without a character are left out.
    """
    texts: list[str] = []
    ids: list[np.ndarray] = []
    rest = (replace_surrogates(document) for document in documents if document)
    left = max_tokens
    while left > 0 and (some := list(islice(rest, TOKENIZE_DOCUMENTS))):
        for text, tokens in zip(some, tokenizer.encode_batch(some, prepend=tokenizer.bos)):
            if left > 0:
                texts.append(text)
                ids.append(np.array(tokens, dtype=np.int32))
                left -= len(tokens) - 1
    return texts, ids


@torch.no_grad()
def document_nats(
    model: GPT,
    ids: Sequence[np.ndarray],
    batch_size: int = 32,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Nats the model needs for each document after its first token, a BOS. Returns (len(ids),) float64.

    batch_size: windows in a forward pass. stride: new tokens per window of a long document, at most the context;
    default half of it. on_progress hears of windows done and all.
    """
    length, device = model.config.sequence_len, model.wte.weight.device
    todo = [w for i, tokens in enumerate(ids) for w in windows(i, len(tokens), length, stride or max(1, length // 2))]
    todo.sort(key=lambda window: window.begin - window.end)  # longest first: little padding in a batch
    nats = np.zeros(len(ids))
    done = 0
    while done < len(todo):
        width = todo[done].end - todo[done].begin - 1
        batch = todo[done : done + batch_size]
        inputs = torch.zeros((len(batch), width), dtype=torch.long)
        targets = torch.full((len(batch), width), IGNORED)
        for row, w in enumerate(batch):
            tokens = torch.from_numpy(ids[w.document][w.begin : w.end]).long()
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, w.first - w.begin - 1 : len(tokens) - 1] = tokens[w.first - w.begin :]
        document_ids = torch.zeros_like(inputs).to(device)
        losses = model.token_losses(inputs.to(device), targets.to(device), document_ids).sum(dim=1).double().cpu()
        np.add.at(nats, [w.document for w in batch], losses.numpy())
        done += len(batch)
        on_progress(done, len(todo))
    return nats


COMPRESSORS = {
    "xz": lambda data: len(lzma.compress(data, preset=9)),  # xz -9
    "zstd": lambda data: len(pa.Codec("zstd", compression_level=19).compress(data, asbytes=True)),  # zstd -19
}


def compare_compressors(
    model: GPT,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    max_tokens: float = math.inf,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Bits per byte of the model and of the compressors, over all documents together and in the mean over documents.

    Together: the compressors see the documents concatenated and may learn from one for the next; the model reads each
    alone. Per document: everybody sees each alone. Documents are the first ones that have `max_tokens` tokens, whole.
    Raises UserError where there is no text.
    """
    texts, ids = tokenized(tokenizer, documents, max_tokens)
    if not texts:
        raise UserError("no text to compare the model with compressors on; give text that is not empty")
    encoded = [text.encode() for text in texts]
    sizes = np.array([len(data) for data in encoded])
    bits = document_nats(model, ids, batch_size, on_progress=on_progress) / math.log(2)
    together = b"".join(encoded)
    alone = {name: np.array([size_of(data) for data in encoded]) * 8 for name, size_of in COMPRESSORS.items()}
    return {
        "bytes": int(sizes.sum()),
        "documents": len(texts),
        "val_bpb": float(bits.sum() / sizes.sum()),
        "compressors": {name: size_of(together) * 8 / len(together) for name, size_of in COMPRESSORS.items()},
        "per_document": {
            "val_bpb": float((bits / sizes).mean()),
            **{name: float((total / sizes).mean()) for name, total in alone.items()},
        },
    }
