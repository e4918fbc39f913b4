"""Bits per byte: how many bits the model needs per byte of text, whatever its vocabulary.

bpb = nats over scored targets / (ln 2 * bytes they stand for). Special tokens stand for no bytes and ignored targets
are not scored, so neither counts on either side (pretraining spec 9.1).
"""

import math
from collections.abc import Iterable

import numpy as np
import torch

from nanochat.loader import Batch
from nanochat.model.gpt import GPT
from nanochat.parallel import Runtime


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterable[Batch], token_bytes: np.ndarray, rt: Runtime) -> float:
    """Bits per byte of the batches of all ranks together; infinity where they hold no byte.

    token_bytes: (V,) raw bytes of each token, 0 for special tokens.
    """
    lengths = torch.tensor(token_bytes, device=rt.device)
    nats, num_bytes = 0.0, 0
    for batch in (some.to(rt.device) for some in batches):
        losses = model.token_losses(batch.inputs, batch.targets, batch.document_ids)
        target_bytes = lengths[batch.targets.clamp_min(0)] * (batch.targets >= 0)
        nats += (losses * (target_bytes > 0)).sum(dim=1).cpu().double().sum().item()
        num_bytes += int(target_bytes.sum())
    nats, total_bytes = rt.sum_number(nats), rt.sum_number(num_bytes)
    return nats / (math.log(2) * total_bytes) if total_bytes else math.inf
