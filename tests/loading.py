"""Texts, and what the tests of loaders ask of batches."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from nanochat.loader import Batch
from nanochat.tokenizer import Tokenizer

SENTENCE = "a stream of rows that every rank sees is cut into batches and nothing in it may ever get lost"
WORDS = SENTENCE.split()


def some_texts(count: int, seed: int, longest: int = 60) -> list[str]:
    """Texts that end in the only "!" they have."""
    random = Random(seed)
    return [f"{' '.join(random.choices(WORDS, k=random.randint(1, longest)))} {i}!" for i in range(count)]


def write_shards(folder: Path, *shards: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, texts in enumerate(shards):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{i}.jsonl").write_text(lines)
    return folder


def equal(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("inputs", "targets", "document_ids")
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one below the other."""
    return Batch(*(torch.cat([getattr(b, n) for b in batches]) for n in ("inputs", "targets", "document_ids")))


def targets_of(batches: Iterable[Batch], ignore: int) -> Counter[int]:
    counts: Counter[int] = Counter()
    for batch in batches:
        counts.update(batch.targets[(batch.targets >= 0) & (batch.targets != ignore)].tolist())
    return counts


def pieces_of(inputs: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor) -> list[tuple[int, ...]]:
    """The pieces of a row; the row's last token is a target only. Padding is left out."""
    last = targets[-1:][targets[-1:] >= 0].tolist()
    ids = inputs.tolist() + last
    numbers = documents.tolist() + documents[-1:].tolist()
    pieces = [tuple(t for t, n in zip(ids, numbers) if n == number) for number in range(max(numbers) + 1)]
    return [piece for piece in pieces if set(piece) != {ids[0]}]


def tokens_of(texts: Iterable[str], tokenizer: Tokenizer) -> Counter[int]:
    return Counter(token for text in texts for token in tokenizer.encode(text))


def first_epoch(loader: Any) -> list[Batch]:
    """The batches of epoch 0 of a loader with one row per batch."""
    batches = []
    while True:
        batch = next(loader)
        if loader.epoch == 1:
            return batches
        batches.append(batch)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
