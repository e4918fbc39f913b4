"""What may be sampled, and how often, against the definitions written out for one row."""

import math

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.engine import Sampling, Sequence
from nanochat.engine.sampler import largest, logprobs, sample

VOCAB, DRAWS = 40, 6000
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
SEEN = (3, 4, 4, 7)


def expected(sampling: Sampling) -> list[float]:
    """Probabilities by the definitions, one id after the other."""
    logits = [float(value) for value in LOGITS]
    for i in set(SEEN):
        logits[i] = (
            logits[i] / sampling.repetition_penalty if logits[i] > 0 else logits[i] * sampling.repetition_penalty
        )
    weights = [math.exp(value / sampling.temperature) for value in logits]
    ranked = sorted(range(VOCAB), key=lambda i: -weights[i])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    total, before, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if before < sampling.top_p and weights[i] >= sampling.min_p * weights[ranked[0]]:
            kept.append(i)
        before += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(VOCAB)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6, top_k=5),
        Sampling(top_p=0.7),
        Sampling(temperature=1.5, top_p=0.01),
        Sampling(temperature=2.0, min_p=0.2),
        Sampling(repetition_penalty=1.8),
        Sampling(temperature=1.4, top_k=12, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    ],
)
def test_ids_are_drawn_as_often_as_the_definitions_say(sampling: Sampling) -> None:
    sequences = [Sequence(SEEN, 1, sampling, row=row) for row in range(DRAWS)]
    counts = torch.bincount(torch.tensor(sample(LOGITS.expand(DRAWS, -1), sequences)), minlength=VOCAB) / DRAWS
    for share, probability in zip(counts.tolist(), expected(sampling)):
        assert abs(share - probability) <= 5 * (probability * (1 - probability) / DRAWS) ** 0.5


def test_a_penalty_also_turns_greedy_choices() -> None:
    best = int(LOGITS.argmax())
    penalised = Sampling(temperature=0.0, repetition_penalty=50.0)
    assert sample(LOGITS[None], [Sequence((1,), 1, Sampling(temperature=0.0))]) == [best]
    assert sample(LOGITS[None], [Sequence((best,), 1, penalised)]) != [best]


def test_rows_of_different_sampling_are_chosen_as_each_alone() -> None:
    kinds = [Sampling(temperature=0.0), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.3), Sampling()]
    rows = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1))
    sequences = [Sequence(SEEN, 1, kinds[i % 5], row=i) for i in range(50)]
    alone = [sample(rows[i : i + 1], [sequences[i]])[0] for i in range(50)]
    assert sample(rows, sequences) == alone and len(set(alone)) > 10


@pytest.mark.parametrize("k", [1, 5, 50])
@pytest.mark.parametrize("vocab", [97, 640, 6400, 6401])
def test_the_largest_are_found_block_by_block_as_by_topk(k: int, vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(2))
    logits[1] = logits[1].sort().values  # all of them in the last blocks
    values, ids = largest(logits, k)
    exact = logits.topk(k)
    assert torch.equal(values, exact.values) and torch.equal(ids, exact.indices)


def test_log_probabilities_are_told_only_to_those_who_ask() -> None:
    rows = torch.stack([LOGITS, LOGITS, LOGITS])
    exact: Tensor = LOGITS.double().log_softmax(-1)
    told = logprobs(rows, [3, 4, 5], [None, 0, 2])
    assert told[0] == (None, ())
    assert told[1] == (pytest.approx(float(exact[4])), ())
    assert told[2][0] == pytest.approx(float(exact[5]))
    assert [i for i, _ in told[2][1]] == exact.topk(2).indices.tolist()


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"top_logprobs": -1},
    ],
)
def test_sampling_that_means_nothing_is_refused_in_words(field: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(field))}="):
        Sampling(**field)
