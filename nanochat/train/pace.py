"""How fast a model trains here, for plans that are made before the first step."""

import time

import torch

from nanochat.model.gpt import GPT
from nanochat.parallel import Runtime

TOKENS = 2048  # of a pass: enough for the pace of longer ones, a tenth of a second at depth 2


def expected_flops(model: GPT, rt: Runtime) -> float:
    """FLOP/s of all ranks: on a CPU, of which there are all kinds, those of a pass; else the guess of `Runtime`."""
    if rt.device.type != "cpu":
        return rt.expected_flops
    length = model.config.sequence_len
    rows = max(1, TOKENS // length)
    ids = (torch.arange(rows * length) % model.config.vocab_size).view(rows, length)
    documents = torch.zeros_like(ids, dtype=torch.int32)
    for _ in range(2):  # the first finds cold caches
        began = time.perf_counter()
        model.loss(ids, ids, documents).backward()
        pass_s = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return rt.sum_number(ids.numel() * model.flops_per_token() / pass_s)
