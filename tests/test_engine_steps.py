"""Many sequences in one engine: they come and go at any time, and each reads and writes as if it were alone."""

import random
from dataclasses import replace

import pytest
import torch
from engines import CONTEXT, EXACT, GREEDY, PATTERNS, VOCAB, Recorder, noisy_model, run_all, told_alike

from nanochat.common import UserError
from nanochat.engine import PREFILL_CHUNK, Engine, Sampling, Token

pytestmark = pytest.mark.usefixtures("recurrent")


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]


def random_sampling(rng: random.Random) -> Sampling:
    if rng.random() < 0.3:
        return replace(GREEDY, top_logprobs=rng.choice([None, 0, 3]))
    return Sampling(
        temperature=rng.choice([0.5, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 7]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        seed=rng.randrange(2**40),
        top_logprobs=rng.choice([None, 2]),
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
def test_sequences_that_join_and_leave_at_random_have_the_logits_and_text_of_each_alone(
    pattern: str, seed: int
) -> None:
    rng, model = random.Random(seed), noisy_model(pattern)
    engine = Engine(model, stop_ids=[0, 1], max_rows=rng.choice([1, 3, 8]))
    sequences, removed = [], []
    while len(sequences) < 25 or engine.has_work:
        if len(sequences) < 25 and rng.random() < 0.4:
            prompt = random_prompt(rng, rng.choice([5, 100, CONTEXT - 1]))
            for row in range(rng.choice([1, 1, 1, 4])):
                sequences.append(engine.add(prompt, rng.randint(1, 40), random_sampling(rng), row=row))
        if sequences and rng.random() < 0.05:
            removed.append(rng.choice(sequences))
            engine.remove(removed[-1])
        engine.step()
    assert any(sequence.finish == "cancelled" for sequence in removed)
    num_undecided = 0
    for sequence in sequences:
        alone = Engine(model, stop_ids=[0, 1], max_rows=1)
        same = alone.add(sequence.prompt, sequence.limit, sequence.sampling, row=sequence.row)
        run_all(alone)
        if sequence.finish == "cancelled":
            same.tokens, same.finish = same.tokens[: len(sequence.tokens)], "cancelled"
        num_undecided += told_alike(sequence, same)
    assert num_undecided <= 1  # of some 35


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_deterministic_text_and_log_probabilities_are_the_same_to_the_bit_beside_any_others(
    pattern: str, seed: int
) -> None:
    rng, model = random.Random(seed), noisy_model(pattern)
    engine, sequences = Engine(model, stop_ids=[0, 1], max_rows=5, deterministic=True), []
    while len(sequences) < 20 or engine.has_work:
        if len(sequences) < 20 and rng.random() < 0.4:
            prompt = random_prompt(rng, rng.choice([5, 100, CONTEXT - 1]))
            sequences.append(engine.add(prompt, rng.randint(1, 40), random_sampling(rng), row=rng.randint(0, 3)))
        engine.step()
    for sequence in sequences:
        alone = Engine(model, stop_ids=[0, 1], max_rows=1, deterministic=True)
        same = alone.add(sequence.prompt, sequence.limit, sequence.sampling, row=sequence.row)
        run_all(alone)
        assert (sequence.finish, sequence.tokens) == (same.finish, same.tokens)


def test_a_long_prompt_holds_up_the_others_by_no_more_than_a_chunk_a_token() -> None:
    recorder = Recorder(noisy_model("A", context=4 * PREFILL_CHUNK))
    engine = Engine(recorder, [])
    first = engine.add([5], 100, GREEDY)
    engine.step()
    second = engine.add([7] * (3 * PREFILL_CHUNK + 1), 100, GREEDY)
    while not second.tokens:
        engine.step()
    kinds = [length for _, length in recorder.forwards[1:]]
    assert kinds == [1, PREFILL_CHUNK, 1, PREFILL_CHUNK, 1, PREFILL_CHUNK, 1, 1]
    assert len(first.tokens) == 5


def test_short_prompts_are_read_together_between_two_tokens() -> None:
    recorder = Recorder(noisy_model("A"))
    engine = Engine(recorder, [])
    engine.add([5], 100, GREEDY)
    engine.step()
    for i in range(4):
        engine.add([7 + i] * 200, 100, GREEDY)
    for _ in range(6):
        engine.step()
    assert recorder.forwards[1:] == [(1, 200), (1, 200), (3, 1), (1, 200), (1, 200), (5, 1)]


def test_samples_of_one_prompt_read_it_once() -> None:
    recorder = Recorder(noisy_model("AR"))
    list(Engine(recorder, []).generate([5] * 50, 2, GREEDY, num_samples=5))
    assert recorder.forwards == [(1, 50), (5, 1)]


def test_a_sequence_that_is_removed_frees_its_row_at_once_wherever_it_stands() -> None:
    model = noisy_model("AR", context=2 * PREFILL_CHUNK)
    engine = Engine(model, [], max_rows=2)
    running, reading = engine.add([1, 2], 50, GREEDY), engine.add([3] * (PREFILL_CHUNK + 9), 50, GREEDY)
    waiting, last = engine.add([4], 50, GREEDY), engine.add([6], 50, GREEDY)
    for _ in range(3):
        engine.step()
    assert running.tokens and not reading.tokens and 0 < reading.num_read < len(reading.prompt)
    for sequence in (running, reading, waiting):
        engine.remove(sequence)
        engine.remove(sequence)
        assert sequence.finish == "cancelled"
    assert [sequence for sequence, _ in engine.step()] == [last]
    engine.remove(last)
    assert not engine.has_work and engine.step() == []


def test_an_iterator_that_is_closed_frees_its_rows() -> None:
    engine = Engine(noisy_model("A"), [], max_rows=2)
    answer = engine.generate([5], 50, num_samples=3)
    next(answer)
    assert engine.has_work
    answer.close()
    assert not engine.has_work


def test_two_iterators_take_turns() -> None:
    model = noisy_model("A")
    engine = Engine(model, [])
    one, two = engine.generate([5], 10, Sampling(seed=1)), engine.generate([6, 7], 10, Sampling(seed=2), num_samples=2)
    mixed = [[next(one)], [next(two), next(two)]]
    for _ in range(9):
        mixed[0].append(next(one))
        mixed[1] += [next(two), next(two)]
    assert [list(one), list(two)] == [[], []]
    assert mixed[0] == list(Engine(model, []).generate([5], 10, Sampling(seed=1)))
    both = list(Engine(model, []).generate([6, 7], 10, Sampling(seed=2), num_samples=2))
    assert [sorted(mixed[1], key=lambda token: token.row)] == [sorted(both, key=lambda token: token.row)]


@pytest.mark.parametrize("length", [1, 2, 40, PREFILL_CHUNK, PREFILL_CHUNK + 1, PREFILL_CHUNK + 60])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_given_text_is_scored_under_the_models_own_distribution(pattern: str, length: int) -> None:
    model = noisy_model(pattern)
    ids = [i * 7 % VOCAB for i in range(length)]
    told = Engine(model, []).score(ids, top_logprobs=3)
    expected = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert [token.token_id for token in told] == ids and told[0] == Token(0, ids[0], is_forced=True)
    for place, token in enumerate(told[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.token_id]), abs=EXACT)
        best = expected[place].topk(3)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=EXACT)


def test_a_written_text_has_the_log_probabilities_that_it_scores() -> None:
    engine = Engine(noisy_model("AR"), [])
    sampling = Sampling(temperature=3.0, top_k=20, repetition_penalty=2.0, top_logprobs=2)
    answer = list(engine.generate([9, 8, 7], 30, sampling))
    scored = engine.score([9, 8, 7, *(token.token_id for token in answer)], top_logprobs=2)[3:]
    for ours, theirs in zip(answer, scored):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=EXACT)
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]


@pytest.mark.parametrize("ids", [[], [1] * (CONTEXT + 1)])
def test_a_text_that_cannot_be_scored_is_refused_in_words(ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"context of {CONTEXT}"):
        Engine(noisy_model("A"), []).score(ids)


def test_a_limit_of_no_token_is_refused_in_words() -> None:
    with pytest.raises(UserError, match="max_tokens=0: must be at least 1"):
        Engine(noisy_model("A"), []).add([1], 0)


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_ends_where_the_context_ends_whatever_is_beside_it(pattern: str, room: int) -> None:
    engine = Engine(noisy_model(pattern), [])
    long, short = engine.add([3] * (CONTEXT - room), 10**6, GREEDY), engine.add([4], 30, GREEDY)
    run_all(engine)
    assert (long.finish, len(long.tokens)) == ("length", room) and (short.finish, len(short.tokens)) == ("length", 30)
