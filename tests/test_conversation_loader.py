"""Conversations become batches: whole, supervised where they should be, resumable on any number of ranks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import (
    equal,
    first_epoch,
    joined,
    pieces_of,
    some_texts,
    targets_of,
    write_shards,
)

from nanochat.chat import Conversation, render_conversation
from nanochat.common import UserError
from nanochat.dataset import open_corpus
from nanochat.loader import ConversationLoader, PretrainLoader
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(some_texts(50, seed=0), 300)


def conversation(question: str, *answers: str) -> Conversation:
    messages: list[Any] = [{"role": "user", "content": question}]
    for i, answer in enumerate(answers):
        messages.append({"role": ("assistant", "user")[i % 2], "content": answer})
    return {"messages": messages}


def some_conversations(count: int, seed: int = 0) -> list[Conversation]:
    texts = some_texts(2 * count, seed, longest=30)
    return [conversation(texts[2 * i], texts[2 * i + 1]) for i in range(count)]


def test_every_supervised_token_is_a_target_once_an_epoch_and_nothing_else_is(tokenizer: Tokenizer) -> None:
    conversations = some_conversations(150)
    loader = ConversationLoader(conversations, tokenizer, 1, 256)
    num_rows = loader.num_rows
    batches = first_epoch(loader)
    assert len(batches) == num_rows and loader.num_dropped == 0
    expected: Counter[int] = Counter()
    for item in conversations:
        ids, mask = render_conversation(tokenizer, item)
        expected.update(token for token, supervised in zip(ids, mask) if supervised)
    assert targets_of(batches, ignore=-1) == expected
    assert all(batch.num_targets() for batch in batches)


def test_a_row_is_whole_conversations_with_their_own_targets_and_ids(tokenizer: Tokenizer) -> None:
    conversations = some_conversations(40)
    rendered = {tuple(ids): mask for ids, mask in (render_conversation(tokenizer, item) for item in conversations)}
    for batch in first_epoch(ConversationLoader(conversations, tokenizer, 1, 400)):
        at = 0
        for piece in pieces_of(batch.inputs[0], batch.targets[0], batch.document_ids[0]):
            expected = [token if m else -1 for token, m in zip(piece, rendered.pop(piece))][1:]
            assert batch.targets[0, at : at + len(expected)].tolist() == expected
            assert (batch.targets[0, at + len(expected) : at + len(piece)] == -1).all()
            at += len(piece)
        assert (batch.targets[0, at:] == -1).all()
    assert not rendered


def test_conversations_are_cut_to_a_row_and_dropped_if_nothing_is_left_to_learn(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    long_answer = conversation("rows", "rank " * 500)
    long_question = conversation("rank " * 500, "rows")
    question_only = conversation("rows")
    loader = ConversationLoader([long_answer, long_question, question_only], tokenizer, 2, 32)
    assert loader.num_dropped == 2 and loader.num_rows == 1
    assert capsys.readouterr().out.count("2 of 3 conversations have no token to learn within 33 tokens") == 1
    batch = next(loader)
    assert (batch.targets[:, -1] >= 0).all() and batch.inputs.shape == (2, 32)


@pytest.mark.parametrize("conversations", [[], [conversation("only a question")] * 3])
def test_conversations_without_anything_to_learn_are_an_error(
    tokenizer: Tokenizer, conversations: list[Conversation]
) -> None:
    with pytest.raises(UserError, match=f"none of the {len(conversations)} conversations has a token to learn"):
        ConversationLoader(conversations, tokenizer, 1, 32)


def test_a_malformed_conversation_is_named_by_its_place(tokenizer: Tokenizer) -> None:
    conversations: list[Any] = [conversation("a", "b"), {"messages": [{"role": "assistant", "content": "b"}]}]
    with pytest.raises(UserError, match=r"^conversation 1 \(from 0\)"):
        ConversationLoader(conversations, tokenizer, 1, 32)


def test_conversations_are_reshuffled_every_epoch(tokenizer: Tokenizer) -> None:
    loader = ConversationLoader(some_conversations(100), tokenizer, 1, 256)
    rows = [batch.inputs for batch in first_epoch(loader)]
    next_rows = [next(loader).inputs for _ in range(5)]
    assert not any(torch.equal(row, other) for row in rows for other in next_rows)
    other_seed = ConversationLoader(some_conversations(100), tokenizer, 1, 256, seed=1)
    assert not torch.equal(next(other_seed).inputs, rows[0])


def test_short_conversations_are_not_left_for_last(tokenizer: Tokenizer) -> None:
    conversations = some_conversations(50)
    emptiest_is_last = []
    for seed in range(8):
        batches = first_epoch(ConversationLoader(conversations, tokenizer, 1, 256, seed=seed))
        padding = [int((batch.inputs == tokenizer.bos).sum()) for batch in batches]
        emptiest_is_last.append(padding[-1] == max(padding))
    assert sum(emptiest_is_last) < 4  # without the last shuffle it nearly always is


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_conversation_ranks_share_one_stream_across_epochs(tokenizer: Tokenizer, world_size: int) -> None:
    conversations = some_conversations(60)
    one = ConversationLoader(conversations, tokenizer, 8, 128)
    size = 8 // world_size
    ranks = [ConversationLoader(conversations, tokenizer, size, 128, rank, world_size) for rank in range(world_size)]
    while one.epoch < 2:
        assert equal(joined([next(rank) for rank in ranks]), next(one))
    assert ranks[0].state() == one.state()


@pytest.mark.parametrize("done", [0, 1, 5, 12])
def test_a_conversation_loader_continues_exactly_on_another_number_of_ranks(tokenizer: Tokenizer, done: int) -> None:
    conversations = some_conversations(100)
    loader = ConversationLoader(conversations, tokenizer, 4, 128, seed=2)
    for _ in range(done):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    pair = [ConversationLoader(conversations, tokenizer, 2, 128, rank, 2, seed=2) for rank in range(2)]
    for rank in pair:
        rank.load_state(state)
    for _ in range(12):
        assert equal(joined([next(rank) for rank in pair]), next(loader))
    assert done < 12 or loader.epoch > 0


def test_a_conversation_state_of_other_conversations_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    state = ConversationLoader(some_conversations(10), tokenizer, 4, 128).state()
    with pytest.raises(UserError, match="data was"):
        ConversationLoader(some_conversations(11), tokenizer, 4, 128).load_state(state)
    with pytest.raises(UserError, match="seed was"):
        ConversationLoader(some_conversations(10), tokenizer, 4, 128, seed=9).load_state(state)
    with pytest.raises(UserError, match="loader was conversations"):
        PretrainLoader(open_corpus(write_shards(tmp_path, ["a"], ["b"])).train, tokenizer, 4, 128).load_state(state)
