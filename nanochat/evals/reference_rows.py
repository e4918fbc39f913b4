"""Validation rows exactly as the ancestor makes them, so that its published figures can be compared with ours.

Its loader fills rows from a buffer of waiting documents by best fit and crops what does not fit; the rest of a cropped
document is thrown away (pretraining spec 3.2). So it scores other bytes than `loader.validation_batches` does, with
other contexts, and a figure on one kind of rows says little about the other.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from nanochat.common import UserError
from nanochat.dataset import Split
from nanochat.loader import Batch
from nanochat.tokenizer import Tokenizer

BUFFER_DOCUMENTS = 1000  # that wait at least, before a piece is chosen
REFILL_DOCUMENTS = 128


def reference_batches(
    split: Split, tokenizer: Tokenizer, sequence_len: int, max_tokens: int, batch_size: int = 16
) -> Iterator[Batch]:
    """The first max_tokens // sequence_len rows of a split as batches (B, T), every target scored."""
    rows = best_fit_cropped_rows(refills(split, tokenizer), sequence_len + 1)
    left = max_tokens // sequence_len
    while left > 0:
        ids = torch.tensor(list(islice(rows, min(batch_size, left))))
        left -= len(ids)
        inputs = ids[:, :-1].contiguous()
        yield Batch(inputs, ids[:, 1:].contiguous(), torch.zeros_like(inputs, dtype=torch.int32))


def refills(split: Split, tokenizer: Tokenizer) -> Iterator[list[list[int]]]:
    """Documents behind a BOS in file order, again and again, 128 at a time; no refill crosses a block of a file."""
    is_empty = True
    while True:
        for block in split.blocks():
            documents = iter(block.read())
            while some := list(islice(documents, REFILL_DOCUMENTS)):
                is_empty = False
                yield tokenizer.encode_batch(some, prepend=tokenizer.bos)
        if is_empty:
            raise UserError(f"the {split.name} side holds no document to score; give text that is not empty")


def best_fit_cropped_rows(
    refills: Iterator[list[list[int]]], capacity: int, buffer_documents: int = BUFFER_DOCUMENTS
) -> Iterator[list[int]]:
    """Rows of `capacity` tokens: the longest waiting document that fits, and again; then the head of the shortest."""
    waiting: list[Sequence[int]] = []
    while True:
        row: list[int] = []
        while len(row) < capacity:
            while len(waiting) < buffer_documents:
                waiting += next(refills)
            room = capacity - len(row)
            fitting = [place for place, document in enumerate(waiting) if len(document) <= room]
            if fitting:
                row += waiting.pop(max(fitting, key=lambda place: len(waiting[place])))
            else:
                row += waiting.pop(min(range(len(waiting)), key=lambda place: len(waiting[place])))[:room]
        yield row
