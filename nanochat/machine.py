"""The machine: what it is, what it can do, and clocks for what is done on it.

A speed means little without the machine, the commit and the share of the machine's peak: scripts.bench and the report
say all three.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.common import print0
from nanochat.memory import machine_memory_bytes
from nanochat.parallel import Runtime

# (M, K, N) of matrix products that are fast: like a small model's MLP, and square. A GPU needs larger ones.
CPU_SHAPES = ((4096, 384, 1536), (2048, 512, 2048), (1024, 1024, 1024))
GPU_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))
AT_LEAST_RUNS = 2


# What it is ----------------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, and the versions that matter."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_bytes": machine_memory_bytes(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def git_commit() -> str | None:
    """The commit of the sources, with `+changes` if the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if changes.stdout.strip() else "")


# What it can do ------------------------------------------------------------------------------------------------


def matmul_peak_flops(rt: Runtime, dtype: torch.dtype, seconds_per_shape: float = 0.3) -> float:
    """The most FLOP/s of a matrix product with the threads in use: the best single run over some shapes."""
    shapes = CPU_SHAPES if rt.device.type == "cpu" else GPU_SHAPES
    return max(_best_flops(shape, rt, dtype, seconds_per_shape) for shape in shapes)


def _best_flops(shape: tuple[int, int, int], rt: Runtime, dtype: torch.dtype, seconds: float) -> float:
    m, k, n = shape
    a, b = (torch.ones(size, device=rt.device, dtype=dtype) for size in ((m, k), (k, n)))
    out = a @ b  # touches the memory and wakes the threads
    best_s, runs, ends = float("inf"), 0, time.perf_counter() + seconds
    while runs < AT_LEAST_RUNS or time.perf_counter() < ends:
        rt.synchronize()
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        rt.synchronize()
        best_s = min(best_s, time.perf_counter() - began)
        runs += 1
    return 2 * m * k * n / best_s


# Clocks --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Repeated measurements as a reader wants them.

    >>> spread([3, 1, 2])
    {'median': 2, 'min': 1, 'max': 3}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(name: str, work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of `work`, first once to warm up and then `repeats` times."""

    def seconds() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return repeated(name, seconds, repeats)


def repeated(name: str, seconds_of: Callable[[], float], repeats: int) -> list[float]:
    """What `seconds_of`, which has a clock of its own, tells: first once to warm up and then `repeats` times."""
    seconds = []
    for turn in range(repeats + 1):
        seconds.append(seconds_of())
        print0(f"{name} {f'{turn}/{repeats}' if turn else 'warm-up'}: {seconds[-1]:.4g} s")
    return seconds


def cpu_seconds() -> float:
    """Processor time so far of this process and of those that it has waited for."""
    return sum(os.times()[:4])
