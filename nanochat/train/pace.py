"""How fast a model trains here, for plans that are made before the first step."""

import time

import torch

from nanochat.memory import is_out_of_memory
from nanochat.model.gpt import GPT
from nanochat.parallel import Runtime

TOKENS = 2048  # of a pass: enough for the pace of longer ones, a tenth of a second at depth 2


def timed_flops(model: GPT, rt: Runtime) -> float:
    """FLOP/s of all ranks: on a CPU, of which there are all kinds, those of a pass, uncompiled; else `Runtime`'s guess.

    Where any rank has no memory for the pass it is the guess, too: rows that fit are found later.
    """
    if rt.device.type != "cpu":
        return rt.expected_flops
    try:
        own = pass_flops(model)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        own = 0.0
    model.zero_grad(set_to_none=True)
    is_known = not rt.max_number(own == 0)
    return rt.sum_number(own) if is_known else rt.expected_flops


def pass_flops(model: GPT) -> float:
    """FLOP/s of the second of two passes, since the first finds cold caches."""
    length = model.config.sequence_len
    rows = max(1, TOKENS // length)
    ids = (torch.arange(rows * length) % model.config.vocab_size).view(rows, length)
    documents = torch.zeros_like(ids, dtype=torch.int32)
    for _ in range(2):
        began = time.perf_counter()
        model.loss(ids, ids, documents).backward()
        pass_s = time.perf_counter() - began
    return ids.numel() * model.flops_per_token() / pass_s
