"""The engine: prefill once, sample many, each row on its own."""

import pytest
import torch
from engines import GREEDY, PATTERNS, noisy_model

from nanochat.common import UserError
from nanochat.engine import PREFILL_CHUNK, Engine, Sampling, Token, uniform
from nanochat.model.gpt import GPT


@pytest.fixture
def model(request: pytest.FixtureRequest, recurrent: str) -> GPT:
    return noisy_model(getattr(request, "param", "A"))


def rows_of(tokens: list[Token], num_rows: int) -> list[list[int]]:
    return [[token.token_id for token in tokens if token.row == row] for row in range(num_rows)]


@torch.no_grad()
def greedy_without_cache(model: GPT, prompt: list[int], length: int) -> list[int]:
    """The slow reference: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("model", PATTERNS, indirect=True)
def test_greedy_generation_equals_the_cacheless_reference(model: GPT) -> None:
    prompt = list(range(1, 40))
    tokens = list(Engine(model, stop_ids=[]).generate(prompt, 30, GREEDY))
    assert rows_of(tokens, 1) == [greedy_without_cache(model, prompt, 30)]


def test_a_prompt_longer_than_a_prefill_chunk_reads_the_same(model: GPT) -> None:
    prompt = [i * 7 % 97 for i in range(600)]
    tokens = list(Engine(model, stop_ids=[]).generate(prompt, 5, GREEDY))
    assert rows_of(tokens, 1) == [greedy_without_cache(model, prompt, 5)]


@pytest.mark.parametrize("model", PATTERNS, indirect=True)
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_rows_text_does_not_depend_on_its_neighbours(model: GPT, top_k: int) -> None:
    engine, sampling = Engine(model, stop_ids=[0, 1, 2]), Sampling(1.0, top_k, seed=5)
    few = rows_of(list(engine.generate([5, 6, 7], 20, sampling, num_samples=2)), 2)
    many = rows_of(list(engine.generate([5, 6, 7], 20, sampling, num_samples=6)), 6)
    assert few == many[:2]
    assert len({tuple(row) for row in many}) > 1


@pytest.mark.parametrize("model", PATTERNS, indirect=True)
def test_different_prompts_are_answered_side_by_side_as_each_alone(model: GPT) -> None:
    engine, prompts = Engine(model, stop_ids=[0, 1, 2]), [[5, 6, 7], list(range(10, 80)), [9] * 695, [4]]
    together = rows_of(list(engine.generate_each(prompts, 20, GREEDY)), 4)
    alone = [rows_of(list(engine.generate(prompt, 20, GREEDY)), 1)[0] for prompt in prompts]
    assert together == alone
    assert len(alone[2]) <= 5


def test_the_seed_decides_the_text(model: GPT) -> None:
    def text(seed: int) -> list[int]:
        return [t.token_id for t in Engine(model, []).generate([5], 20, Sampling(seed=seed))]

    assert text(1) == text(1) != text(2)


def test_every_position_has_a_draw_of_its_own(model: GPT) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    tokens = [token.token_id for token in Engine(model, []).generate([5], 60, Sampling(seed=3))]
    assert len(set(tokens)) > 25


def test_sampling_follows_the_models_distribution(model: GPT) -> None:
    engine, draws = Engine(model, stop_ids=[]), 4000
    ids = [token.token_id for token in engine.generate([5, 6], 1, Sampling(1.3, seed=9), num_samples=draws)]
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6]]))[0, -1] / 1.3).softmax(-1)
    counts = torch.bincount(torch.tensor(ids), minlength=97) / draws
    assert (counts - expected).abs().max() < 5 * (0.25 / draws) ** 0.5


def test_top_k_never_leaves_the_k_likeliest(model: GPT) -> None:
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[5, 6]]))[0, -1].topk(3).indices.tolist())
    ids = {t.token_id for t in Engine(model, []).generate([5, 6], 1, Sampling(2.0, 3), num_samples=300)}
    assert ids == likeliest


def test_a_row_ends_at_a_stop_token_which_is_not_part_of_it(model: GPT) -> None:
    whole = greedy_without_cache(model, [9, 8, 7], 30)
    stop = whole[4]
    tokens = list(Engine(model, stop_ids=[stop]).generate([9, 8, 7], 30, GREEDY, num_samples=2))
    assert rows_of(tokens, 2) == [whole[: whole.index(stop)]] * 2


def test_generation_ends_where_the_context_ends(model: GPT) -> None:
    tokens = list(Engine(model, []).generate([1] * 690, 100, GREEDY))
    assert len(tokens) == 10


@pytest.mark.parametrize("prompt", [[], [1] * 700, [1] * 2000])
def test_a_prompt_that_cannot_be_continued_is_refused_in_words(model: GPT, prompt: list[int]) -> None:
    with pytest.raises(UserError, match="context of 700"):
        list(Engine(model, []).generate(prompt, 5))


def test_a_stop_test_ends_a_long_prompt_between_its_chunks_and_an_answer_between_its_tokens(model: GPT) -> None:
    engine, prompt = Engine(model, []), [5] * (PREFILL_CHUNK + 1)
    for num_asked in range(4):  # before and after a chunk, before and after the next one
        answers = iter([False] * num_asked + [True])
        assert list(engine.generate(prompt, 5, should_stop=lambda answers=answers: next(answers))) == []
        assert not engine.has_work
    said: list[Token] = []
    for token in engine.generate([5], 50, GREEDY, num_samples=2, should_stop=lambda: len(said) >= 6):
        said.append(token)
    assert rows_of(said, 2) == [greedy_without_cache(model, [5], 3)] * 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
def test_the_colder_the_sampling_the_nearer_to_greedy_down_to_the_smallest_number(
    model: GPT, temperature: float
) -> None:
    for top_k in (0, 5):
        cold = list(Engine(model, []).generate([5, 6], 10, Sampling(temperature, top_k)))
        assert rows_of(cold, 1) == [greedy_without_cache(model, [5, 6], 10)]


class EchoHook:
    """After the second token it sees, it forces 11 and 12."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def push(self, token_id: int) -> list[int]:
        self.seen.append(token_id)
        return [11, 12] if len(self.seen) == 2 else []


@torch.no_grad()
def test_forced_tokens_enter_the_text_and_the_model_reads_them(model: GPT) -> None:
    free = greedy_without_cache(model, [20, 21], 2)
    hooks = [EchoHook(), EchoHook()]
    tokens = list(Engine(model, []).generate([20, 21], 8, GREEDY, num_samples=2, hooks=hooks))
    expected = [*free, 11, 12]
    expected += greedy_without_cache(model, [20, 21, *expected], 4)
    assert rows_of(tokens, 2) == [expected, expected]
    assert [token.is_forced for token in tokens if token.row == 0] == [False] * 2 + [True] * 2 + [False] * 4
    assert hooks[0].seen == free + expected[4:]


def test_draws_are_uniform_and_differ_by_seed_row_and_position() -> None:
    draws = [uniform(s, r, p) for s in range(10) for r in range(10) for p in range(100)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 1 for draw in draws)
    histogram = [sum(i / 10 <= draw < (i + 1) / 10 for draw in draws) for i in range(10)]
    assert all(850 < count < 1150 for count in histogram)
