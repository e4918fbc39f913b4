"""A small model for the tests of the engine, and what they look at."""

import pytest
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.engine import Engine, Sampling, Sequence, Token
from nanochat.model.gpt import GPT, build_model
from nanochat.model.state import DecodeState

CONTEXT, VOCAB = 700, 97
GREEDY = Sampling(temperature=0.0)
EXACT = 1e-4  # on fp32 logits
PATTERNS = ["A", "R", "AR"]


def noisy_model(pattern: str, context: int = CONTEXT) -> GPT:
    """Two layers, the first with a window of a quarter of the context, and logits far apart.

    Noise on all weights, for fresh output projections are zero and would hide every mistake.
    """
    config = ModelConfig(
        context, VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, layer_pattern=pattern, key_offset=True
    )
    model = build_model(config, torch.device("cpu"), torch.float32)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
        model.lm_head.weight.mul_(5)  # decided enough that no rounding flips a choice
    return model


class Recorder:
    """A model that keeps every row of logits it gives, by the text it belongs to."""

    def __init__(self, model: GPT) -> None:
        self.config, self.new_state, self.all_logits = model.config, model.new_state, model.all_logits
        self._model, self.logits, self.forwards = model, [], []

    def next_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor:
        self.forwards.append(tuple(token_ids.shape))
        logits = self._model.next_logits(token_ids, state)
        self.logits.append(logits)
        return logits


def run_all(engine: Engine) -> list[tuple[Sequence, Token]]:
    tokens = []
    while engine.has_work:
        tokens += engine.step()
    return tokens


def told_alike(ours: Sequence, theirs: Sequence) -> int:
    """The same text, and the same log-probabilities but for rounding.

    Greedy text may differ from the first position on whose two best logits are closer than EXACT: returns 1 where there
    is such a position, which ends the comparison, else 0.
    """
    for our, their in zip(ours.tokens, theirs.tokens):
        assert [p for _, p in our.top] == pytest.approx([p for _, p in their.top], abs=EXACT)
        if ours.sampling.temperature == 0 and len(our.top) > 1 and our.top[0][1] - our.top[1][1] < EXACT:
            return 1
        assert (our.token_id, our.row, our.is_forced) == (their.token_id, their.row, their.is_forced)
        assert (our.logprob is None) == (their.logprob is None) == (ours.sampling.top_logprobs is None)
        assert our.logprob == pytest.approx(their.logprob, abs=EXACT)
        assert our.top == () or our.top[0][0] == their.top[0][0]
    assert (ours.finish, len(ours.tokens)) == (theirs.finish, len(theirs.tokens))
    return 0
