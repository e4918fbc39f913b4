"""From logits to tokens, each row by its own `Sampling` and with random numbers of its own.

A row's number depends on (seed, row, position) alone, and nothing here is computed across rows. So the same request
gives the same text alone and beside any others, as far as the model gives the same logits.
"""

from collections import defaultdict
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from nanochat.engine.sequence import Sampling, Sequence, Token

MASK64 = (1 << 64) - 1
BLOCK = 64  # logits whose largest is found first, see `largest`

Top = tuple[tuple[int, float], ...]


def pick(logits: Tensor, sequences: Several[Sequence]) -> list[Token]:
    """The next token of each sequence from its row of logits (B, V): what is forced, else a sample."""
    forced = [sequence.forced.popleft() if sequence.forced else None for sequence in sequences]
    ids = [chosen if given is None else given for given, chosen in zip(forced, sample(logits, sequences))]
    told = logprobs(logits, ids, [sequence.sampling.top_logprobs for sequence in sequences])
    return [
        Token(sequence.row, token_id, given is not None, *of_it)
        for sequence, token_id, given, of_it in zip(sequences, ids, forced, told)
    ]


def sample(logits: Tensor, sequences: Several[Sequence]) -> list[int]:
    """One id per row of logits (B, V): the next token of each sequence."""
    alike: dict[Sampling, list[int]] = defaultdict(list)
    for place, sequence in enumerate(sequences):
        alike[sequence.sampling].append(place)
    if len(alike) == 1:
        return _sample_alike(logits, sequences)
    ids = [0] * len(sequences)
    for places in alike.values():
        rows = logits[torch.tensor(places, device=logits.device)]
        for place, token_id in zip(places, _sample_alike(rows, [sequences[place] for place in places])):
            ids[place] = token_id
    return ids


def _sample_alike(logits: Tensor, sequences: Several[Sequence]) -> list[int]:
    """One id per row of logits (B, V), all with the same sampling but for their numbers."""
    sampling = sequences[0].sampling
    if sampling.repetition_penalty != 1:
        logits = penalised(logits, sequences)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    is_sorted = sampling.top_p < 1 or 0 < sampling.top_k < logits.size(-1)
    values, ids = largest(logits, sampling.top_k or logits.size(-1)) if is_sorted else (logits, None)  # (B, K)
    values = values.cpu().double()  # on the CPU, for MPS has no f64
    below = values - values.amax(dim=-1, keepdim=True)  # at most 0: divided by a tiny temperature, none becomes inf
    weights = kept((below / sampling.temperature).softmax(dim=-1), sampling)
    cumulative = weights.cumsum(dim=-1)
    draws = [uniform(sampling.seed, sequence.row, sequence.position) for sequence in sequences]
    u = torch.tensor(draws, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    last = (weights > 0).cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # the last one that may be chosen
    places = torch.searchsorted(cumulative, u, right=True).minimum(last)  # (B, 1)
    return (places if ids is None else ids.cpu().gather(1, places)).squeeze(1).tolist()


def kept(weights: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, K) with 0 for those that top_p and min_p rule out; for top_p they must come sorted."""
    if sampling.top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        weights = weights.masked_fill(before >= sampling.top_p, 0)
    if sampling.min_p > 0:
        weights = weights.masked_fill(weights < sampling.min_p * weights.amax(dim=-1, keepdim=True), 0)
    return weights


def penalised(logits: Tensor, sequences: Several[Sequence]) -> Tensor:
    """Logits (B, V) with what has occurred made less likely."""
    logits = logits.clone()
    for row, sequence in zip(logits, sequences):
        seen = torch.tensor(sorted(set(sequence.ids)), device=logits.device)
        values, penalty = row[seen], sequence.sampling.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of logits (B, V), and where they are, as topk.

    Each of them is in one of the k blocks with the largest maxima; to look for those first and then only there is many
    times faster than topk of a large vocabulary on a CPU.
    """
    num_blocks = logits.size(-1) // BLOCK
    if num_blocks <= 2 * k or logits.size(-1) % BLOCK:
        return logits.topk(min(k, logits.size(-1)), dim=-1)
    blocks = logits.unflatten(-1, (num_blocks, BLOCK))
    chosen = blocks.amax(dim=-1).topk(k, dim=-1).indices  # (B, k)
    rows = torch.arange(len(chosen), device=chosen.device)[:, None]
    candidates = blocks[rows, chosen].flatten(1)  # (B, k * BLOCK)
    values, places = candidates.topk(k, dim=-1)
    return values, chosen.gather(1, places // BLOCK) * BLOCK + places % BLOCK


def logprobs(logits: Tensor, ids: Several[int], wanted: Several[int | None]) -> list[tuple[float | None, Top]]:
    """Per row of logits (B, V): the log-probability of its id and those of the likeliest, where any are wanted."""
    told: list[tuple[float | None, Top]] = [(None, ())] * len(ids)
    asking = [place for place, n in enumerate(wanted) if n is not None]
    if not asking:
        return told
    rows = logits[torch.tensor(asking, device=logits.device)]
    own = torch.tensor([[ids[place]] for place in asking], device=logits.device)
    total = rows.double().logsumexp(-1) if rows.device.type != "mps" else rows.logsumexp(-1)  # (B,)
    chosen = (rows.gather(1, own).squeeze(1) - total).tolist()
    values, top_ids = largest(rows, max(1, *(wanted[place] or 0 for place in asking)))
    tops = [list(zip(*row)) for row in zip(top_ids.tolist(), (values - total[:, None]).tolist())]
    for place, logprob, top in zip(asking, chosen, tops):
        told[place] = (min(0.0, logprob), tuple((i, min(0.0, value)) for i, value in top[: wanted[place]]))
    return told


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments only (SplitMix64's finaliser over a counter)."""
    x = seed & MASK64
    for counter in (row, position):
        x = (x + (counter + 1) * 0x9E3779B97F4A7C15) & MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        x ^= x >> 31
    return (x >> 11) / (1 << 53)
