"""Rows in the ancestor's way: best fit from a buffer, the rest of a cropped document thrown away."""

from itertools import islice
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.dataset import Split, open_corpus
from nanochat.evals.reference_rows import REFILL_DOCUMENTS, best_fit_cropped_rows, reference_batches, refills
from nanochat.tokenizer import Tokenizer
from scripts import base_loss


@pytest.fixture(scope="module")
def learned(text: Path) -> Tokenizer:
    return Tokenizer.train(open_corpus(text).train.documents(), 300)


def document(number: int, length: int) -> list[int]:
    return [number] * length


def test_the_longest_that_fits_goes_first_and_the_shortest_is_cropped() -> None:
    lengths = (4, 9, 3, 6, 5)
    waiting = iter([[document(n, length) for n, length in enumerate(lengths)]])
    rows = best_fit_cropped_rows(waiting, capacity=8, buffer_documents=1)
    # 6 is the longest within 8; nothing fits the 2 places left, so the shortest, 3, is cut and the rest of it is gone
    assert next(rows) == [3] * 6 + [2] * 2
    assert next(rows) == [4] * 5 + [0] * 3
    assert next(rows) == [1] * 8  # longer than a row: cropped when nothing else waits


def test_a_document_that_fits_exactly_is_kept_whole() -> None:
    rows = best_fit_cropped_rows(iter([[document(1, 3), document(2, 5)]]), capacity=5, buffer_documents=1)
    assert next(rows) == [2] * 5


def test_the_buffer_is_filled_up_before_every_choice() -> None:
    batches = iter([[document(1, 2)], [document(2, 2)], [document(3, 4)]])
    rows = best_fit_cropped_rows(batches, capacity=4, buffer_documents=2)
    # while two wait, the longest of them is 2; taking it lets the document of 4 in, too late for this row
    assert next(rows) == [1, 1, 2, 2]


def test_refills_do_not_cross_blocks_and_go_on_for_ever(text: Path, learned: Tokenizer) -> None:
    val = open_corpus(text).val
    total = len(list(val.documents()))
    sizes, seen = [], 0
    for refill in refills(val, learned):
        assert all(ids[0] == learned.bos for ids in refill)
        sizes.append(len(refill))
        seen += len(refill)
        if seen >= 2 * total:
            break
    assert seen == 2 * total and max(sizes) <= REFILL_DOCUMENTS


def test_a_side_without_documents_is_an_error(learned: Tokenizer) -> None:
    with pytest.raises(UserError, match="the val side holds no document"):
        next(refills(Split("val", ()), learned))


def test_batches_score_every_place_of_full_rows(text: Path, learned: Tokenizer) -> None:
    val = open_corpus(text).val
    batches = list(reference_batches(val, learned, sequence_len=16, max_tokens=16 * 7 + 5, batch_size=3))
    assert [len(batch.inputs) for batch in batches] == [3, 3, 1]
    assert sum(batch.num_targets() for batch in batches) == 16 * 7
    rows = list(islice(best_fit_cropped_rows(refills(val, learned), 17), 3))
    assert batches[0].inputs.tolist() == [row[:-1] for row in rows]
    assert batches[0].targets.tolist() == [row[1:] for row in rows]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reference-rows", "--compare-compressors"], "--compare-compressors, --reference-rows: give one of them"),
        (["--num-documents=3"], "--num-documents: only --compare-compressors keeps documents whole"),
        (["--reference-rows", "--num-documents=3"], "--num-documents: only --compare-compressors"),
    ],
)
def test_ways_of_scoring_exclude_each_other(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        base_loss.parse_args(flags)
