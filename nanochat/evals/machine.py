"""Clocks for scripts.bench, and what the machine can do, so that a speed can be read as a share of its peak."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice

import torch

from nanochat.common import print0
from nanochat.engine import Engine, Sampling

# (M, K, N) of matrix products that are fast: like a small model's MLP, and square. A GPU needs larger ones.
CPU_SHAPES = ((4096, 384, 1536), (2048, 512, 2048), (1024, 1024, 1024))
GPU_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))
AT_LEAST_RUNS = 2


def matmul_peak_flops(
    device: torch.device, dtype: torch.dtype = torch.float32, seconds_per_shape: float = 0.3
) -> float:
    """The most FLOP/s of a matrix product in `dtype` with the threads in use: the best single run over some shapes."""
    return max(_best_flops(shape, device, dtype, seconds_per_shape) for shape in shapes_for(device))


def shapes_for(device: torch.device) -> tuple[tuple[int, int, int], ...]:
    """The shapes that are tried on a device."""
    return CPU_SHAPES if device.type == "cpu" else GPU_SHAPES


def _best_flops(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    m, k, n = shape
    a, b = torch.ones(m, k, device=device, dtype=dtype), torch.ones(k, n, device=device, dtype=dtype)
    out = a @ b  # touches the memory and wakes the threads
    best_s, runs, ends = float("inf"), 0, time.perf_counter() + seconds
    while runs < AT_LEAST_RUNS or time.perf_counter() < ends:
        _wait(out)
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(out)
        best_s = min(best_s, time.perf_counter() - began)
        runs += 1
    return 2 * m * k * n / best_s


def _wait(tensor: torch.Tensor) -> None:
    """Until the device has computed `tensor`."""
    if tensor.device.type != "cpu":
        tensor[0, 0].item()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Repeated measurements as a reader wants them.

    >>> spread([3, 1, 2])
    {'median': 2, 'min': 1, 'max': 3}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(name: str, work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of `work`, first once to warm up and then `repeats` times."""
    seconds = []
    for turn in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
        print0(f"{name} {f'{turn}/{repeats}' if turn else 'warm-up'}: {seconds[-1]:.4g} s")
    return seconds


def decode_seconds(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling) -> float:
    """Seconds from the first new token of every prompt to the last: decoding without the prefill.

    The engine must have no stop token, so that every row has its full length.
    """
    tokens = engine.generate_each(prompts, new_tokens, sampling)
    first = list(islice(tokens, len(prompts)))
    began = time.perf_counter()
    rest = sum(1 for _ in tokens)
    assert len(first) + rest == len(prompts) * new_tokens
    return time.perf_counter() - began
