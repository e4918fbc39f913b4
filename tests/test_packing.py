"""Packing: nothing is lost, nothing is hoarded, rows begin with BOS, and a packer can be stopped and continued."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.packing import BestFitPacker, Row, chop

BOS = 0


def documents(lengths: Sequence[int], first_token: int = 1) -> list[list[int]]:
    """Documents of these lengths, BOS included; every other token is a number of its own."""
    tokens = iter(range(first_token, first_token + sum(lengths)))
    return [[BOS, *(next(tokens) for _ in range(length - 1))] for length in lengths]


def pack(packer: BestFitPacker, docs: Sequence[Sequence[int]]) -> list[Row]:
    rows = []
    for ids in docs:
        packer.push(ids)
        while packer.is_full:
            rows.append(packer.next_row())
    return rows + list(packer.flush())


def plain(rows: Sequence[Row]) -> list[list[tuple[list[int], Any, bool]]]:
    return [[(list(p.ids), None if p.mask is None else list(p.mask), p.is_part) for p in row.pieces] for row in rows]


lengths_of_documents = st.lists(st.one_of(st.integers(2, 30), st.integers(2, 200)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(lengths_of_documents, st.integers(2, 60), st.integers(1, 20))
def test_cutting_loses_no_token_and_makes_each_a_target_once(lengths: list[int], capacity: int, buffer: int) -> None:
    docs = documents(lengths)
    packer = BestFitPacker(capacity, "cut", buffer, BOS)
    rows = pack(packer, docs)
    pieces = [piece for row in rows for piece in row.pieces]
    assert all(piece.ids[0] == BOS and BOS not in piece.ids[1:] for piece in pieces)
    targets = Counter(token for piece in pieces for token in piece.ids[1:])
    assert targets == Counter(token for ids in docs for token in ids[1:])
    assert sum(not piece.is_part for piece in pieces) == len(docs)
    assert packer.tokens_in == packer.tokens_kept == sum(lengths)


@settings(max_examples=200, deadline=None)
@given(lengths_of_documents, st.integers(16, 60), st.integers(1, 20))
def test_a_piece_that_stops_inside_its_document_stops_where_its_row_does(
    lengths: list[int], capacity: int, buffer: int
) -> None:
    docs = documents(lengths)
    ends = {ids[-1] for ids in docs}
    for row in pack(BestFitPacker(capacity, "cut", buffer, BOS), docs):
        assert all(piece.ids[-1] in ends for piece in row.pieces[:-1])
        if row.padding:
            assert row.pieces[-1].ids[-1] in ends


@settings(max_examples=200, deadline=None)
@given(lengths_of_documents, st.integers(2, 60), st.integers(1, 20))
def test_only_tiny_gaps_stay_empty_while_pieces_wait(lengths: list[int], capacity: int, buffer: int) -> None:
    packer = BestFitPacker(capacity, "cut", buffer, BOS)
    for ids in documents(lengths):
        packer.push(ids)
    while len(packer):
        padding = packer.next_row().padding
        only_full_rows_wait = (packer.state()["packer_lengths"] == capacity).all()
        assert 0 <= padding < max(2, min(16, capacity // 8)) or only_full_rows_wait


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60), st.integers(1, 20))
def test_padding_keeps_every_piece_whole(lengths: list[int], capacity: int, buffer: int) -> None:
    docs = documents(lengths)
    rows = pack(BestFitPacker(capacity, "pad", buffer, BOS), docs)
    assert sorted(list(piece.ids) for row in rows for piece in row.pieces) == sorted(docs)
    assert all(row.padding >= 0 for row in rows)


def test_rows_follow_the_rule_oldest_then_longest_that_fits() -> None:
    packer = BestFitPacker(100, "cut", 10, BOS)
    for ids in documents([40, 30, 50, 20, 10, 60]):
        packer.push(ids)
    assert [[len(piece) for piece in row.pieces] for row in packer.flush()] == [[40, 60], [30, 50, 20], [10]]


def test_the_oldest_of_equally_long_pieces_is_taken() -> None:
    packer = BestFitPacker(100, "pad", 10, BOS)
    docs = documents([60, 40, 40, 40])
    for ids in docs:
        packer.push(ids)
    assert [list(piece.ids) for piece in packer.next_row().pieces] == docs[:2]


def test_a_gap_is_filled_by_the_shortest_part_before_any_whole_document() -> None:
    packer = BestFitPacker(100, "cut", 10, BOS)
    docs = documents([60, 150, 45, 70])  # 150 is chopped into a full row and a part of 51
    for ids in docs:
        packer.push(ids)
    row = packer.next_row()
    assert [list(piece.ids) for piece in row.pieces] == [docs[0], [BOS, *docs[1][100:139]]]
    assert packer.cut_pieces == 0


def test_a_whole_document_is_cut_only_when_no_part_waits() -> None:
    packer = BestFitPacker(100, "cut", 10, BOS)
    docs = documents([60, 80, 70])
    for ids in docs:
        packer.push(ids)
    first, second, *_ = packer.flush()
    assert [list(piece.ids) for piece in first.pieces] == [docs[0], docs[2][:40]]
    assert packer.cut_pieces == 1
    assert list(second.pieces[1].ids) == [BOS, *docs[2][40:59]]


def test_chopping_starts_every_later_part_with_an_unsupervised_bos() -> None:
    pieces = chop(list(range(10)), 4, bos=99, mask=[0] + [1] * 9)
    assert [piece.ids for piece in pieces] == [[0, 1, 2, 3], [99, 4, 5, 6], [99, 7, 8, 9]]
    assert [piece.mask for piece in pieces] == [[0, 1, 1, 1]] * 3
    assert [piece.is_part for piece in pieces] == [False, True, True]


def test_masks_travel_with_their_tokens() -> None:
    packer = BestFitPacker(20, "cut", 5, BOS)
    docs = documents([7, 50, 33, 18, 12, 90, 15])
    supervised = {token for ids in docs for token in ids if token % 3 == 0 and token != BOS}
    for ids in docs:
        packer.push(ids, [int(token in supervised) for token in ids])
    seen = Counter(
        token for row in packer.flush() for piece in row.pieces for token, m in zip(piece.ids, piece.mask or ()) if m
    )
    assert seen == Counter(supervised)


def test_a_piece_longer_than_a_padded_row_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="a piece of 11 tokens does not fit a row of 10"):
        BestFitPacker(10, "pad").push(list(range(11)))


@pytest.mark.parametrize("arguments", [(1, "cut"), (10, "drop"), (10, "cut", 0)])
def test_senseless_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        BestFitPacker(*arguments)


@pytest.mark.parametrize("on_misfit", ["cut", "pad"])
def test_a_packer_continues_exactly_from_its_state_at_any_point(on_misfit: str) -> None:
    random = Random(3)
    longest = 120 if on_misfit == "cut" else 40
    docs = documents([random.randint(2, longest) for _ in range(300)])
    masks = [[token % 2 for token in ids] if i % 3 else None for i, ids in enumerate(docs)]

    def rows_of(packer: BestFitPacker, start: int, states: list[tuple[int, int, dict[str, Any]]]) -> list[Row]:
        rows: list[Row] = []
        for i in range(start, len(docs)):
            packer.push(docs[i], masks[i])
            while packer.is_full:
                rows.append(packer.next_row())
                states.append((i + 1, len(rows), packer.state()))
        return rows + list(packer.flush())

    states: list[tuple[int, int, dict[str, Any]]] = []
    original = BestFitPacker(40, on_misfit, 25, BOS)
    rows = rows_of(original, 0, states)
    for done, num_rows, state in states[:: len(states) // 7]:
        packer = BestFitPacker(40, on_misfit, 25, BOS)
        packer.push([BOS, 5, 5])  # loading replaces what waited before
        packer.load_state(state)
        assert state.keys() == packer.state().keys()
        for key, value in packer.state().items():
            np.testing.assert_array_equal(value, state[key])
        rest: list[Row] = []
        while packer.is_full:
            rest.append(packer.next_row())
        assert plain(rest + rows_of(packer, done, [])) == plain(rows[num_rows:])
        counters = ("tokens_in", "tokens_kept", "cut_pieces")
        assert [getattr(packer, name) for name in counters] == [getattr(original, name) for name in counters]


def test_a_state_is_flat_and_ready_to_be_saved() -> None:
    packer = BestFitPacker(10, "cut")
    packer.push([BOS] * 25)
    for value in packer.state().values():
        assert type(value) is int or (isinstance(value, np.ndarray) and value.ndim == 1)


def test_the_same_documents_give_the_same_rows() -> None:
    random = Random(5)
    docs = documents([random.randint(2, 100) for _ in range(200)])
    assert plain(pack(BestFitPacker(50, buffer_size=20), docs)) == plain(pack(BestFitPacker(50, buffer_size=20), docs))


def test_nothing_is_hoarded_and_the_buffer_does_not_grow() -> None:
    """A row's cost is a few bisections in the buffer: bounded for good if the buffer and every wait are."""
    random = Random(1)
    packer = BestFitPacker(64, "cut", 50, BOS)
    arrived: dict[int, int] = {}  # a document's second token -> rows made when it arrived
    longest_wait = made = largest = 0
    for _ in range(4000):
        (ids,) = documents([min(640, 2 + int(random.lognormvariate(3.5, 1.2)))], 1 + 1000 * len(arrived))
        arrived[ids[1]] = made
        packer.push(ids)
        largest = max(largest, len(packer), len(packer._by_length), len(packer._parts))
        while packer.is_full:
            for piece in packer.next_row().pieces:
                if not piece.is_part:
                    longest_wait = max(longest_wait, made - arrived[piece.ids[1]])
            made += 1
    assert largest <= 50 + 640 // 63 + 1
    assert longest_wait <= largest
    assert made > 3000


def test_a_row_compares_as_few_lengths_after_many_rows_as_after_few() -> None:
    class CountingLength(int):
        comparisons = 0

        def __lt__(self, other: object) -> bool:
            CountingLength.comparisons += 1
            return int.__lt__(self, other)  # type: ignore[operator]

        def __eq__(self, other: object) -> bool:
            CountingLength.comparisons += 1
            return int.__eq__(self, other)  # type: ignore[arg-type]

        __hash__ = int.__hash__

    class CountingPacker(BestFitPacker):
        def _longest_within(self, space: int) -> int | None:
            return super()._longest_within(CountingLength(space))

    random = Random(2)
    packer = CountingPacker(2049, "cut", 1000, BOS)
    costs = []
    while len(costs) < 1200:
        while not packer.is_full:
            packer.push([BOS] * min(20_000, 2 + int(random.lognormvariate(7, 1))))
        CountingLength.comparisons = 0
        row = packer.next_row()
        costs.append(CountingLength.comparisons / len(row.pieces))
    assert max(costs[-200:]) <= 40  # 2 * log2(1000) and the ties, for each piece
    assert sum(costs[-400:]) <= 1.2 * sum(costs[:400])
