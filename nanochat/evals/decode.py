"""How fast a model writes, against what the memory allows, with weights of a byte, and beside a peer.

All that is compared takes turns within one run: on a machine with other programs only ratios of one run mean anything.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanochat.common import UserError, print0
from nanochat.config import ModelConfig
from nanochat.engine import PREFILL_CHUNK, Engine, Sampling
from nanochat.evals.peer import Peer, has_peer
from nanochat.evals.speed import (
    decode_tokens_per_s,
    first_token_s,
    read_bytes_per_s,
    step_seconds,
    weight_bytes_per_token,
)
from nanochat.machine import spread
from nanochat.model.gpt import GPT, build_model
from nanochat.parallel import Runtime

SAMPLING = Sampling(temperature=1.0, top_k=50)


@dataclass(frozen=True)
class DecodeShape:
    """What is measured: tokens of the prompts that are continued, of their answers and of the long prompt; batches."""

    prompt_tokens: int
    new_tokens: int
    long_prompt_tokens: int
    batches: tuple[int, ...]


def decode_speed(config: ModelConfig, rt: Runtime, shape: DecodeShape, repeats: int, seed: int) -> dict[str, Any]:
    """Tokens/s per batch size and seconds to the first token of a long prompt, each a median of `repeats`."""
    models = decoding_models(config, rt, seed)
    engines = {name: Engine(model, [], max(shape.batches), prefix_cache_bytes=0) for name, model in models.items()}
    peer = Peer(config, rt.device, rt.dtype, seed) if has_peer() else None
    if peer is None:
        print0("transformers is not installed (pip install 'nanochat[compare]'): there is nothing to compare with")
    rng = torch.Generator().manual_seed(seed)

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(config.vocab_size, (count, length), generator=rng).tolist()

    def rates(batch: int) -> dict[str, float]:
        asked = prompts(batch, shape.prompt_tokens)
        found = {name: decode_tokens_per_s(e, asked, shape.new_tokens, SAMPLING) for name, e in engines.items()}
        if peer is not None:
            found["transformers"] = peer.tokens_per_s(asked, shape.new_tokens, SAMPLING.temperature, SAMPLING.top_k)
        if batch == shape.batches[0]:
            found["memory"] = read_bytes_per_s(rt.device, rt.synchronize)
        return found

    def first_s() -> dict[str, float]:
        asked = prompts(1, shape.long_prompt_tokens)
        found = {"ours": first_token_s(engines["ours"], asked[0], SAMPLING)}
        if peer is not None:
            found["transformers"] = peer.stamps(asked, 1, SAMPLING.temperature, SAMPLING.top_k)[0]
        return found

    by_batch = {str(n): turns(f"batch {n}", "tokens/s", partial(rates, n), repeats) for n in shape.batches}
    first = turns("first token", "s", first_s, repeats)
    alone = by_batch[str(shape.batches[0])]
    num_bytes = {name: weight_bytes_per_token(models[name], name == "int8") for name in engines}
    figures: dict[str, Any] = {
        "tokens_per_s": {batch: spread(found["ours"]) for batch, found in by_batch.items()},
        "first_token_s": spread(first["ours"]),
        "prefill_tokens_per_s": spread([shape.long_prompt_tokens / s for s in first["ours"]]),
        "read_bytes_per_s": spread(alone["memory"]),
        "weight_bytes_per_token": num_bytes,
        "memory_bound_frac": {
            name: spread([rate * num_bytes[name] / read for rate, read in zip(alone[name], alone["memory"])])
            for name in engines
        },
        "parameters": sum(models["ours"].parameter_counts().values()),
        "sequence_len": config.sequence_len,
    }
    if "int8" in engines:
        figures["int8_tokens_per_s"] = {batch: spread(found["int8"]) for batch, found in by_batch.items()}
        figures["int8_logits_error"] = logits_error(models["ours"], models["int8"], prompts(1, shape.prompt_tokens))
    if peer is not None:
        figures |= compared(peer.version, by_batch, first)
    return figures


def static_card(model: GPT, rt: Runtime, memory_bytes: int) -> dict[str, Any]:
    """What follows from a model's shape and the memory, before anything is written.

    At batch 1 no token can be faster than reading the weights and, in the middle of the context, the keys and values.
    """
    context, read = model.config.sequence_len, read_bytes_per_s(rt.device, rt.synchronize)
    row_bytes = model.new_state(1, context, PREFILL_CHUNK).num_bytes()
    weights, past = weight_bytes_per_token(model), past_bytes_per_token(model, context // 2)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "parameters": sum(model.parameter_counts().values()),
        "stored_weight_bytes": stored,
        "weight_bytes_per_token": weights,
        "kv_bytes_per_position": past_bytes_per_token(model, 1),
        "kv_bytes_read_per_token_mid_context": past,
        "row_bytes": row_bytes,
        "max_full_context_rows": max(0, memory_bytes - stored) // row_bytes,
        "read_bytes_per_s": read,
        "ceiling_tokens_per_s": read / (weights + past),
    }


def past_bytes_per_token(model: GPT, length: int) -> int:
    """Of the keys and values that a token behind `length` others looks at: a window's no further than it reaches."""
    config = model.config
    seen = sum(min(length, window) for window in config.windows)
    return 2 * config.n_kv_head * config.head_dim * model.dtype.itemsize * seen


def sweep(
    model: GPT, rt: Runtime, card: dict[str, Any], batches: Sequence[int], shape: DecodeShape, seed: int
) -> list[dict[str, Any]]:
    """For each batch size: seconds to the first token of a prompt, then of each step of so many answers to it."""
    rng, rows = torch.Generator().manual_seed(seed), []
    past = past_bytes_per_token(model, shape.prompt_tokens + shape.new_tokens // 2)
    flops = 2 * card["weight_bytes_per_token"] // model.dtype.itemsize
    for batch in batches:
        asked = torch.randint(model.config.vocab_size, (1, shape.prompt_tokens), generator=rng).tolist() * batch
        engine = Engine(model, [], batch, prefix_cache_bytes=0)
        first = [first_token_s(engine, asked[0], SAMPLING) for _ in range(3)][1:]
        if rt.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(rt.device)
        seconds = step_seconds(engine, asked, shape.new_tokens, SAMPLING)
        step_s = statistics.median(seconds)
        rows.append(
            {
                "batch": batch,
                "first_token_s": min(first),
                "step_s": step_s,
                "tokens_per_s": batch * len(seconds) / sum(seconds),
                "memory_bound_frac": (card["weight_bytes_per_token"] + batch * past)
                / step_s
                / card["read_bytes_per_s"],
                "mfu": batch * flops / step_s / rt.peak_flops if rt.peak_flops else None,
                "peak_device_bytes": torch.cuda.max_memory_allocated(rt.device) if rt.device.type == "cuda" else None,
                "steps": len(seconds),
            }
        )
        print0(f"batch {batch}: {rows[-1]['tokens_per_s']:,.1f} tokens/s, {1e3 * step_s:.2f} ms a step")
    return rows


def decoding_models(config: ModelConfig, rt: Runtime, seed: int) -> dict[str, GPT]:
    """The same model with the weights that it has, and where they can be had with int8 weights for writing."""
    models = {"ours": build_model(config, rt.device, rt.dtype, seed).for_decoding()}
    try:
        models["int8"] = build_model(config, rt.device, rt.dtype, seed).for_decoding(is_int8=True)
    except UserError as error:
        print0(f"not measured: {error}")
    return models


def turns(name: str, unit: str, measure: Callable[[], dict[str, float]], repeats: int) -> dict[str, list[float]]:
    """All that `measure` compares, `repeats` times in turns, after one time that does not count."""
    found: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        now = measure()
        shown = ", ".join(f"{who} {value:.4g}" for who, value in now.items())
        print0(f"{name} {f'{turn}/{repeats}' if turn else 'warm-up'}: {shown} ({unit})")
        for who, value in now.items() if turn else ():
            found.setdefault(who, []).append(value)
    return found


def compared(
    version: str, by_batch: dict[str, dict[str, list[float]]], first: dict[str, list[float]]
) -> dict[str, Any]:
    """Ratios turn by turn: how many times as fast as the peer, and its time to the first token over ours."""

    def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
        return spread([our / their for our, their in zip(ours, theirs)])

    names = [name for name in ("ours", "int8") if all(name in found for found in by_batch.values())]
    return {
        "transformers": version,
        "transformers_tokens_per_s": {batch: spread(found["transformers"]) for batch, found in by_batch.items()},
        "transformers_first_token_s": spread(first["transformers"]),
        "times_transformers": {
            name: {batch: ratios(found[name], found["transformers"]) for batch, found in by_batch.items()}
            for name in names
        },
        "first_token_times_transformers": ratios(first["transformers"], first["ours"]),
    }


@torch.inference_mode()
def logits_error(model: GPT, other: GPT, prompts: list[list[int]]) -> dict[str, float]:
    """The largest difference of single tokens' logits, and the standard deviation of the logits themselves."""
    ids = torch.tensor(prompts, device=model.wte.weight.device)
    logits = []
    for each in (model, other):
        state = each.new_state(len(prompts), ids.size(1))
        logits.append(torch.stack([each.next_logits(ids[:, t : t + 1], state) for t in range(ids.size(1))]))
    return {"max": float((logits[0] - logits[1]).abs().max()), "logits_std": float(logits[0].std())}
