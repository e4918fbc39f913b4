"""Batches: one global stream of rows for every world size, every token once, exact resume, honest validation."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import (
    assert_same_state,
    equal,
    first_epoch,
    joined,
    pieces_of,
    some_texts,
    targets_of,
    tokens_of,
    write_shards,
)

from nanochat.common import UserError
from nanochat.dataset import Split, open_corpus
from nanochat.loader import Batch, PretrainLoader, validation_batches
from nanochat.packing import BestFitPacker
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(some_texts(50, seed=0), 300)


@pytest.fixture(scope="session")
def corpus_texts() -> tuple[list[str], list[str]]:
    return some_texts(1100, seed=1) + some_texts(5, seed=2, longest=2000), some_texts(300, seed=3)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus_texts: tuple[list[str], list[str]]) -> Path:
    train, val = corpus_texts
    return write_shards(tmp_path_factory.mktemp("corpus"), train[:600], train[600:] + [""], val)


@pytest.fixture
def train(folder: Path) -> Split:
    return open_corpus(folder).train


# Pretraining


def test_an_epoch_holds_every_token_as_a_target_exactly_once(
    train: Split, tokenizer: Tokenizer, corpus_texts: tuple[list[str], list[str]]
) -> None:
    batches = first_epoch(PretrainLoader(train, tokenizer, 1, 128))
    assert targets_of(batches, tokenizer.bos) == tokens_of(corpus_texts[0], tokenizer)
    assert sum(batch.num_targets() for batch in batches[:-1]) > 0.98 * 128 * len(batches[:-1])


def test_every_row_and_every_document_in_it_starts_with_bos(train: Split, tokenizer: Tokenizer) -> None:
    batch = next(PretrainLoader(train, tokenizer, 32, 128))
    assert (batch.inputs.shape, batch.targets.shape, batch.document_ids.shape) == ((32, 128),) * 3
    assert (batch.inputs.dtype, batch.targets.dtype, batch.document_ids.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert (batch.inputs[:, 0] == tokenizer.bos).all() and (batch.document_ids[:, 0] == 0).all()
    steps = batch.document_ids.diff(dim=1)
    assert set(steps.unique().tolist()) == {0, 1}
    begins = batch.targets[:, :-1] != -1
    assert ((batch.inputs[:, 1:] == tokenizer.bos) == (steps == 1))[begins].all()


def test_a_target_is_the_next_input_or_ignored(train: Split, tokenizer: Tokenizer) -> None:
    for batch in first_epoch(PretrainLoader(train, tokenizer, 1, 128)):
        inputs, targets = batch.inputs[0, 1:], batch.targets[0, :-1]
        assert torch.equal(inputs[targets >= 0], targets[targets >= 0])
        assert (inputs[targets < 0] == tokenizer.bos).all()  # padding


def test_bos_is_a_target_only_where_a_document_ends(train: Split, tokenizer: Tokenizer) -> None:
    """A document that was cut is never followed by another's BOS."""
    seen = 0
    for batch in first_epoch(PretrainLoader(train, tokenizer, 1, 128)):
        ends = (batch.targets[0] == tokenizer.bos).nonzero().flatten().tolist()
        for end in ends:
            assert tokenizer.decode(batch.inputs[0, : end + 1].tolist()).endswith("!")
        seen += len(ends)
    assert seen > 500


def test_epochs_and_seeds_have_orders_of_their_own(train: Split, tokenizer: Tokenizer) -> None:
    first, again, other_seed = (next(PretrainLoader(train, tokenizer, 8, 64, seed=seed)) for seed in (1, 1, 2))
    assert equal(first, again) and not equal(first, other_seed)
    loader = PretrainLoader(train, tokenizer, 1, 64)
    rows = [batch.inputs for batch in first_epoch(loader)]
    next_rows = [next(loader).inputs for _ in range(20)]
    assert not any(torch.equal(row, other) for row in rows[1:21] for other in next_rows)


def test_documents_are_shuffled_across_files_and_within_blocks(
    train: Split, tokenizer: Tokenizer, corpus_texts: tuple[list[str], list[str]]
) -> None:
    loader = PretrainLoader(train, tokenizer, 4, 512, seed=1)
    text = tokenizer.decode(next(loader).inputs.flatten().tolist())
    found = [(text.find(f"<|bos|>{known}"), i) for i, known in enumerate(corpus_texts[0])]
    order = [i for place, i in sorted(found) if place >= 0]
    assert len(order) > 5 and order != sorted(order)
    assert min(order) < 600 < max(order)  # the first file has 600


def test_the_parts_of_a_long_document_do_not_fill_a_batch_of_their_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    letters = "abcdefghijkl"
    split = open_corpus(write_shards(tmp_path / "long", [f"{letter} " * 600 for letter in letters], ["val"])).train
    batch = next(PretrainLoader(split, tokenizer, 16, 32))
    owners = {tokenizer.decode(row).replace("<|bos|>", "").strip()[0] for row in batch.inputs.tolist()}
    assert len(owners) >= 6


def test_files_of_one_document_each_are_shuffled_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = open_corpus(write_shards(tmp_path / "many", *([text] for text in some_texts(20, seed=4)))).train
    text = tokenizer.decode(next(PretrainLoader(split, tokenizer, 1, 4096)).inputs[0].tolist())
    assert text.split("<|bos|>")[1] != some_texts(20, seed=4)[0]  # the oldest piece begins the row


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranks_share_one_stream_of_rows(train: Split, tokenizer: Tokenizer, world_size: int) -> None:
    one = PretrainLoader(train, tokenizer, 8, 64)
    size = 8 // world_size
    ranks = [PretrainLoader(train, tokenizer, size, 64, rank, world_size) for rank in range(world_size)]
    for _ in range(3):
        assert equal(joined([next(rank) for rank in ranks]), next(one))
    assert_same_state(ranks[-1].state(), one.state())


@pytest.mark.parametrize("done", [0, 1, 7, 40, 250])
def test_a_loader_continues_bit_exactly_from_its_state(train: Split, tokenizer: Tokenizer, done: int) -> None:
    loader = PretrainLoader(train, tokenizer, 4, 128, seed=5)
    for _ in range(done):
        next(loader)
    state = loader.state()
    for value in state.values():
        assert isinstance(value, str | int) or (isinstance(value, np.ndarray) and value.ndim == 1)
    resumed = PretrainLoader(train, tokenizer, 4, 128, seed=5)
    resumed.load_state(state)
    assert_same_state(resumed.state(), state)
    assert all(equal(next(loader), next(resumed)) for _ in range(60))
    assert loader.epoch == resumed.epoch and (done < 250 or loader.epoch > 0)


def test_a_window_is_packed_row_by_row_while_the_one_before_it_is_handed_out(
    train: Split, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.loader.WINDOW_TOKENS", 3000)
    packed, make_row = [], BestFitPacker.next_row
    monkeypatch.setattr(BestFitPacker, "next_row", lambda packer: packed.append(1) or make_row(packer))
    loader = PretrainLoader(train, tokenizer, 4, 64)
    next(loader)
    assert len(packed) == 47 + 4  # the whole first window, and as many of the second as were handed out
    for _ in range(60):
        before = len(packed)
        next(loader)
        assert len(packed) - before <= 4


def test_a_state_continues_on_another_number_of_ranks(train: Split, tokenizer: Tokenizer) -> None:
    pair = [PretrainLoader(train, tokenizer, 4, 64, rank, 2) for rank in range(2)]
    for _ in range(5):
        for rank in pair:
            next(rank)
    four = [PretrainLoader(train, tokenizer, 2, 64, rank, 4) for rank in range(4)]
    for rank in four:
        rank.load_state(pair[0].state())
    assert equal(joined([next(rank) for rank in four]), joined([next(rank) for rank in pair]))


def test_a_state_of_other_data_or_settings_is_refused(train: Split, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = PretrainLoader(train, tokenizer, 4, 64).state()
    other = open_corpus(write_shards(tmp_path / "other", ["one text"], ["val"])).train
    other_tokenizer = Tokenizer.train(some_texts(50, seed=0), 299)
    for loader, what in (
        (PretrainLoader(train, tokenizer, 4, 64, seed=3), "seed was 0 .* 3 now"),
        (PretrainLoader(other, tokenizer, 4, 64), "data was"),
        (PretrainLoader(train, other_tokenizer, 4, 64), "tokenizer was"),
        (PretrainLoader(train, tokenizer, 4, 32), "sequence len was 64 .* 32 now"),
    ):
        with pytest.raises(UserError, match=what):
            loader.load_state(state)
        next(loader)  # still usable


def test_data_without_a_document_is_an_error_not_an_endless_loop(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = open_corpus(write_shards(tmp_path / "empty", ["", ""], ["val"])).train
    with pytest.raises(UserError, match=r"0\.jsonl: no documents on the train side"):
        next(PretrainLoader(split, tokenizer, 1, 8))


def test_a_corpus_smaller_than_a_batch_goes_round(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = open_corpus(write_shards(tmp_path / "tiny", ["a rank"], ["val"])).train
    loader = PretrainLoader(split, tokenizer, 4, 16)
    batch = next(loader)
    assert loader.epoch == 3
    assert batch.num_targets() == 4 * len(tokenizer.encode("a rank"))


def test_a_batch_moves_to_a_device_and_counts_its_targets(train: Split, tokenizer: Tokenizer) -> None:
    batch = next(PretrainLoader(train, tokenizer, 2, 16))
    assert equal(batch.to("cpu"), batch)
    assert batch.num_targets() == int((batch.targets != -1).sum()) > 0
    assert batch.to(torch.device("meta")).inputs.device.type == "meta"


@pytest.mark.gpu
def test_a_batch_arrives_whole_on_a_gpu(train: Split, tokenizer: Tokenizer) -> None:
    loader = PretrainLoader(train, tokenizer, 8, 256)
    batches = [next(loader) for _ in range(10)]
    moved = [batch.to("cuda") for batch in batches]
    assert all(equal(there.to("cpu"), here) for there, here in zip(moved, batches))


# Validation


def validation(folder: Path, tokenizer: Tokenizer, b: int, t: int, max_tokens: int, world_size: int) -> list[Batch]:
    """What every rank sees, rank after rank; all must see equally many batches."""
    val = open_corpus(folder).val
    ranks = [list(validation_batches(val, tokenizer, b, t, max_tokens, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    return [batch for batches in ranks for batch in batches]


@pytest.mark.parametrize(("b", "t", "world_size"), [(1, 64, 1), (4, 64, 2), (3, 17, 1), (32, 500, 4), (2, 7, 3)])
@pytest.mark.parametrize("max_tokens", [1, 500, 4001])
def test_validation_scores_the_same_first_tokens_once_whatever_the_shapes(
    folder: Path,
    tokenizer: Tokenizer,
    corpus_texts: tuple[list[str], list[str]],
    b: int,
    t: int,
    world_size: int,
    max_tokens: int,
) -> None:
    batches = validation(folder, tokenizer, b, t, max_tokens, world_size)
    stream = [token for text in corpus_texts[1] for token in tokenizer.encode(text)]
    assert targets_of(batches, ignore=-1) == Counter(stream[:max_tokens])
    assert tokenizer.bos not in targets_of(batches, ignore=-1)
    assert {batch.inputs.shape for batch in batches} == {(b, t)}


def test_validation_rows_do_not_depend_on_ranks_or_batch_size(folder: Path, tokenizer: Tokenizer) -> None:
    def rows(b: int, world_size: int) -> set[bytes]:
        batches = validation(folder, tokenizer, b, 64, 3000, world_size)
        return {r.numpy().tobytes() for batch in batches for r in batch.targets if (r >= 0).any()}

    assert rows(1, 1) == rows(8, 1) == rows(2, 4) == rows(3, 3)


def test_validation_keeps_documents_whole_where_they_fit_and_repeats_exactly(
    folder: Path, tokenizer: Tokenizer, corpus_texts: tuple[list[str], list[str]]
) -> None:
    first = validation(folder, tokenizer, 4, 512, 10**9, 1)
    rows = (row for batch in first for row in zip(batch.inputs, batch.targets, batch.document_ids))
    seen = {piece for row in rows for piece in pieces_of(*row)}
    for text in corpus_texts[1]:
        ids = tokenizer.encode(text, prepend=tokenizer.bos)
        assert tuple(ids) in seen
    assert all(equal(a, b) for a, b in zip(first, validation(folder, tokenizer, 4, 512, 10**9, 1)))


def test_validation_without_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = open_corpus(write_shards(tmp_path / "empty", ["train"], [""])).val
    with pytest.raises(UserError, match=r"1\.jsonl: no text to validate on"):
        next(validation_batches(split, tokenizer, 1, 8, 100))


# Real text


@pytest.mark.parametrize("sequence_len", [512, 2048])
def test_rows_of_real_text_are_full_and_documents_that_fit_stay_whole(
    real_data: Path, tmp_path: Path, sequence_len: int
) -> None:
    texts = open_corpus(real_data / "pretrain").val.blocks()[0].read()[:500]
    tokenizer = Tokenizer.train(texts[:50], 1000)
    split = open_corpus(write_shards(tmp_path / "real", texts, ["val"])).train
    loader = PretrainLoader(split, tokenizer, 1, sequence_len)
    batches = first_epoch(loader)
    assert sum(batch.num_targets() for batch in batches) > 0.995 * sequence_len * len(batches)
    whole = map(tuple, tokenizer.encode_batch(texts, prepend=tokenizer.bos))
    fitting = {ids for ids in whole if len(ids) <= sequence_len + 1}
    rows = (row for batch in batches for row in zip(batch.inputs, batch.targets, batch.document_ids))
    kept = fitting & {piece for row in rows for piece in pieces_of(*row)}
    assert len(kept) >= 0.95 * len(fitting) > 0
