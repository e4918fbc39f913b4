"""What was read before is not read again, and nothing but the time tells the difference."""

import random

import pytest
from engines import CONTEXT, GREEDY, PATTERNS, VOCAB, Recorder, noisy_model, run_all, told_alike

from nanochat.engine import Engine, Sampling, Sequence
from nanochat.engine.cache import PrefixCache, Saved
from nanochat.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("recurrent")
TOLD = Sampling(temperature=0.0, top_logprobs=3)


def answer(engine: Engine, prompt: list[int], max_tokens: int = 12) -> Sequence:
    sequence = engine.add(prompt, max_tokens, TOLD)
    run_all(engine)
    return sequence


def fresh_answer(model: GPT, prompt: list[int], max_tokens: int = 12) -> Sequence:
    return answer(Engine(model, [], prefix_cache_bytes=0), prompt, max_tokens)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_next_turn_of_a_conversation_reads_only_what_is_new(pattern: str) -> None:
    model = noisy_model(pattern)
    recorder = Recorder(model)
    engine, text = Engine(recorder, []), list(range(1, 40))
    for turn in range(4):
        known = len(text)
        sequence = answer(engine, text)
        told_alike(sequence, fresh_answer(model, text))
        assert sequence.num_cached == (0 if turn == 0 else known - 4)  # the last token was written and never read
        text += [token.token_id for token in sequence.tokens] + [7, 8, 9]
    assert [length for _, length in recorder.forwards if length > 1] == [39, 4, 4, 4]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_edited_turn_keeps_what_stands_before_it_where_the_layers_can_go_back(pattern: str) -> None:
    model = noisy_model(pattern)
    engine, text = Engine(model, []), [i * 5 % VOCAB for i in range(100)]
    answer(engine, text)
    for edited, known, as_a_whole in (([*text[:60], 3, 2, 1], 60, 0), (text[:50], 49, 0), (text, 99, 50)):
        sequence = answer(engine, edited)
        told_alike(sequence, fresh_answer(model, edited))
        assert sequence.num_cached == (known if pattern == "A" else as_a_whole)


@pytest.mark.parametrize("pattern", ["R", "AR"])
def test_layers_that_cannot_go_back_keep_the_end_of_the_prompt_too(pattern: str) -> None:
    model = noisy_model(pattern)
    engine, text = Engine(model, []), list(range(1, 40))
    answer(engine, text)
    other = [*text, 90, 91, 92, 93]  # another answer than the model's
    sequence = answer(engine, other)
    assert sequence.num_cached == len(text)
    told_alike(sequence, fresh_answer(model, other))


def test_a_ring_that_has_moved_on_is_not_taken_for_what_it_held() -> None:
    model = noisy_model("A", context=2000)  # a window of 512, a ring of 1,024
    engine = Engine(model, [])
    text = [i * i % VOCAB for i in range(1500)]
    answer(engine, text, max_tokens=3)
    for length, cached in ((1490, 1489), (991, 990), (990, 0), (980, 979), (470, 469), (20, 19)):
        sequence = answer(engine, [*text[:length]], max_tokens=3)
        told_alike(sequence, fresh_answer(model, text[:length], max_tokens=3))
        assert sequence.num_cached == cached
    assert answer(engine, text[:20]).num_cached == 19


@pytest.mark.parametrize("pattern", PATTERNS)
def test_conversations_that_branch_at_random_are_answered_as_without_a_cache(pattern: str) -> None:
    rng, model = random.Random(1), noisy_model(pattern)
    engine = Engine(model, stop_ids=[0], max_rows=3, prefix_cache_bytes=200_000)
    texts: list[list[int]] = [[1]]
    pending: list[Sequence] = []
    num_cached = num_undecided = 0
    for _ in range(60):
        text = rng.choice(texts)
        prompt = [*text[: rng.randint(1, len(text))], *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 60)))]
        if len(prompt) < CONTEXT - 40:
            pending.append(engine.add(prompt, rng.randint(1, 30), TOLD))
        for _ in range(rng.randint(0, 40)):
            engine.step()
        for sequence in [sequence for sequence in pending if sequence.finish]:
            pending.remove(sequence)
            alone = Engine(model, stop_ids=[0], max_rows=1, prefix_cache_bytes=0)
            same = alone.add(sequence.prompt, sequence.limit, TOLD)
            run_all(alone)
            num_undecided += told_alike(sequence, same)
            texts.append(list(sequence.ids))
            num_cached += sequence.num_cached
        assert engine.prefixes.num_bytes <= 200_000
    assert num_cached > 300 and num_undecided <= 2


def test_a_stopped_answer_is_known_too() -> None:
    engine = Engine(noisy_model("AR"), [])
    sequence = engine.add([5] * 30, 50, GREEDY)
    for _ in range(10):
        engine.step()
    engine.remove(sequence)
    assert answer(engine, [*sequence.ids, 4]).num_cached == 39


def test_the_least_recently_used_go_when_the_bytes_are_spent() -> None:
    model = noisy_model("R")
    saved = [Saved((i, i), model.new_state(1, 1, 1), shortest=2) for i in range(4)]
    cache = PrefixCache(3 * saved[0].state.num_bytes())
    for i in range(3):
        cache.keep(saved[i])
    assert cache.find((0, 0, 5)) == (saved[0], 2)
    cache.keep(saved[3])
    assert len(cache) == 3 and cache.num_bytes == cache.max_bytes
    assert cache.find((1, 1, 5)) is None
    assert all(cache.find((i, i, 5)) == (saved[i], 2) for i in (0, 2, 3))
    cache.keep(saved[3])
    assert len(cache) == 3 and cache.num_bytes == cache.max_bytes


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    engine = Engine(noisy_model("A"), [], prefix_cache_bytes=1000)
    answer(engine, [5] * 30)
    assert len(engine.prefixes) == 0 and engine.prefixes.num_bytes == 0
