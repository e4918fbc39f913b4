"""Parts of the project made ready for the clock of scripts.bench: what to time, and what went through meanwhile."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.engine import Engine, Sampling
from nanochat.loader import Batch, PretrainLoader
from nanochat.machine import spread, timed
from nanochat.model.gpt import GPT, build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime
from nanochat.scaling import BaseRates, Multipliers
from nanochat.tokenizer import Tokenizer
from nanochat.train.step import train_step


def first_window(loader: PretrainLoader) -> tuple[int, int, dict[str, Any]]:
    """(batches, their targets) that lie in a fresh loader's first window, and its state when the next one began.

    Raises UserError where not even one batch lies in it.
    """
    num_batches = targets = 0
    batch, state = next(loader), loader.state()
    while state["packer_tokens_kept"] == 0:  # when the window began, before its rows were made
        num_batches, targets = num_batches + 1, targets + batch.num_targets()
        batch, state = next(loader), loader.state()
    if num_batches == 0:
        raise UserError(f"the text holds less than a batch of {len(batch.inputs)} rows; give more text or fewer rows")
    return num_batches, targets, state


def kept_frac(state: dict[str, Any]) -> float:
    """Of the tokens that had left a loader's buffer when its window of rows began, the share that went into rows.

    state: the loader's, in its second window or later; before the first nothing has left.
    """
    waiting = int(state["packer_lengths"].sum() - state["packer_is_part"].sum())  # a part begins with an added BOS
    return int(state["packer_tokens_kept"]) / (int(state["packer_tokens_in"]) - waiting)


def optimizer_step(
    config: ModelConfig, rt: Runtime, seed: int = 0, compile_mode: str = "auto", passes: int = 1
) -> tuple[GPT, Callable[[Iterator[Batch]], None]]:
    """A model with random weights, and one step of it on the next `passes` batches: forward, backward, update."""
    model = build_model(config, rt.device, rt.dtype, seed)
    rates = BaseRates().by_role()
    optimizer = MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), rates, rt)
    loss_fn = rt.compile(model.loss, compile_mode)

    def step(batches: Iterator[Batch]) -> None:
        train_step(loss_fn, batches, optimizer, Multipliers(0.01, 0.95, 0.0), rt, passes)
        rt.synchronize()

    return model, step


def step_waits(step: Callable[[Iterator[Batch]], None], batches: Iterator[Batch], repeats: int) -> list[float]:
    """The share of each optimizer step that passes until its batch is there; the first step does not count."""
    waited_s = 0.0

    def clocked() -> Iterator[Batch]:
        nonlocal waited_s
        while True:
            began = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - began
            yield batch

    stream, shares = clocked(), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        step(stream)
        shares.append(waited_s / (time.perf_counter() - began))
    return shares[1:]


def decode_tokens_per_s(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling) -> float:
    """Tokens a second while all rows run."""
    seconds = step_seconds(engine, prompts, new_tokens, sampling)
    return len(prompts) * len(seconds) / sum(seconds)


def step_seconds(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling) -> list[float]:
    """Seconds of each step from when the last row has begun until the first one ends: new_tokens - 1 of them.

    The engine must have no stop token and a row for every prompt.
    """
    sequences = [engine.add(prompt, new_tokens + len(prompts), sampling) for prompt in prompts]
    while not all(sequence.tokens for sequence in sequences):
        engine.step()
    seconds = []
    for _ in range(new_tokens - 1):
        began = time.perf_counter()
        tokens = engine.step()  # which ends with the tokens' ids, so no device is still at work
        seconds.append(time.perf_counter() - began)
        assert len(tokens) == len(prompts)
    for sequence in sequences:
        engine.remove(sequence)
    return seconds


def first_token_s(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> float:
    """Seconds from the prompt to its first token."""
    began = time.perf_counter()
    next(iter(engine.generate(prompt, 1, sampling)))
    return time.perf_counter() - began


def read_bytes_per_s(device: torch.device, synchronize: Callable[[], None], num_bytes: int = 2**28) -> float:
    """What the memory delivers when one large tensor is read, with the threads in use: the best of ten."""
    stream, best_s = torch.ones(num_bytes // 4, device=device), float("inf")
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        stream.sum()
        synchronize()
        best_s = min(best_s, time.perf_counter() - began)
    return num_bytes / best_s


def weight_bytes_per_token(model: GPT, is_int8: bool = False) -> int:
    """Of the weights that every token needs whole: the blocks' matrices and the head."""
    counts = model.parameter_counts()
    if model.config.tied_head:
        counts["lm_head"] = model.lm_head.weight.numel()
    return (counts["matrix"] + counts["lm_head"]) * (1 if is_int8 else model.dtype.itemsize)


def tokenizer_speed(
    train: Sequence[str], val: Sequence[str], vocab_size: int, repeats: int, encode_threads: Sequence[int]
) -> dict[str, Any]:
    """Learning a vocabulary from the texts of one side; encoding and decoding those of the other."""
    train_mb, val_mb = (sum(len(text.encode()) for text in texts) / 1e6 for texts in (train, val))
    trained: list[Tokenizer] = []
    train_s = timed("training", lambda: trained.append(Tokenizer.train(train, vocab_size)), repeats)[1:]
    tokenizer = trained[-1]
    encode_mb_per_s = {}
    for threads in encode_threads:
        name, encode = f"encoding, {threads} threads", lambda n=threads: tokenizer.encode_batch(val, num_threads=n)
        encode_mb_per_s[str(threads)] = spread([val_mb / s for s in timed(name, encode, repeats)[1:]])
    ids = tokenizer.encode_batch(val)
    num_tokens = sum(map(len, ids))
    decode_s = timed("decoding", lambda: [tokenizer.decode(document) for document in ids], repeats)[1:]
    return {
        "train_mb_per_s": spread([train_mb / s for s in train_s]),
        "encode_mb_per_s": encode_mb_per_s,
        "decode_tokens_per_s": spread([num_tokens / s for s in decode_s]),
        "bytes_per_token": val_mb * 1e6 / num_tokens,
        "train_mb": train_mb,
        "val_mb": val_mb,
        "round_trip": [tokenizer.decode(document) for document in ids] == val,
    }
