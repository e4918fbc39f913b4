"""The device: what it is, which numbers it computes in, how fast, and whether its threads help each other.

Everything is asked of matrix products, since training is made of them. torch is imported by the checks and not by this
file: where it does not load, that is a finding.
"""

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError
from nanochat.doctor.result import Request, Result
from nanochat.hardware import usable_cores

if TYPE_CHECKING:
    import torch

GOOD_SHARE = 0.5  # of a GPU's expected peak; large products reach 0.7 to 0.9
GOOD_CORE_FLOPS = 1e10  # fp32, of one core: with AVX2 or NEON any core of the last ten years does twice that
HELPING = 1.15  # times as fast by a second thread: two threads of one core gain about that much
MUCH_STOLEN = 0.1  # of all processor time


def chosen(request: Request) -> "tuple[torch.device, torch.dtype]":
    """The device that training would take, and the compute dtype, or float32 where `dtypes` has a fault to tell."""
    import torch

    from nanochat.parallel import find_device
    from nanochat.precision import choose_dtype

    where = find_device(request.device_type, 0)
    try:
        return where, choose_dtype(where, in_batches=True)
    except UserError:
        return where, torch.float32


# The device ------------------------------------------------------------------------------------------------------


def device(request: Request) -> Result:
    """A product on the device: the right result, at about the rate that is expected of it."""
    import torch

    from nanochat.kernels.tolerance import tolerance
    from nanochat.machine import describe_machine, matmul_peak_flops
    from nanochat.parallel import Runtime
    from nanochat.precision import dtype_name

    where, dtype = chosen(request)
    if where.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as training has it
    rt = Runtime(where, dtype)
    count = torch.accelerator.device_count() if where.type != "cpu" else torch.get_num_threads()
    name = rt.describe().partition(",")[0] if where.type == "cuda" else describe_machine()["processor"]
    error, allowed = product_error(where, dtype), tolerance(where, dtype)
    rate = matmul_peak_flops(rt, rt.dtype, seconds_per_shape=0.2)
    expected = rt.peak_flops if dtype.itemsize == 2 else None
    numbers = {"device": where.type, "name": name, "count": count, "flops_per_s": rate, "expected": expected}
    what = f"{count} thread{'s' if count > 1 else ''} of" if where.type == "cpu" else f"{count} x"
    seen = f"{where.type}, {what} {name}: {in_flops(rate)} in {dtype_name(dtype)}"
    seen += f", {rate / expected:.0%} of the expected {in_flops(expected)}" if expected else ""
    seen += f"; a product is off by {error:.1g}"
    numbers["error"] = error
    if not error <= allowed:  # NaN is not
        return Result("failed", f"{seen}, where {allowed:.1g} is allowed", WRONG_NUMBERS, numbers)
    if where.type == "cpu" and (unseen := unseen_gpu(request)):
        return Result("slow", f"{seen}; {unseen}, which this torch {torch.__version__} cannot use", GPU_TORCH, numbers)
    least = GOOD_SHARE * expected if expected else GOOD_CORE_FLOPS * count * (where.type == "cpu")
    return Result("ok" if rate >= least else "slow", seen, "" if rate >= least else BUSY, numbers)


WRONG_NUMBERS = "do not train on this device: another torch, driver or machine; NANOCHAT_DTYPE=float32 may be exact"
GPU_TORCH = (
    "install a torch that is built for this GPU (bash runs/setup.sh --help), a newer driver, or --device-type=cpu"
)
BUSY = "look whether other programs use it, whether it is too hot or limited in power, and run this again"


def product_error(where: "torch.device", dtype: "torch.dtype", size: int = 256) -> float:
    """How far a (size, size) product of random numbers is from the float64 one, relative to its norm."""
    import torch

    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=rng).to(dtype) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a.to(where) @ b.to(where)).cpu().double() - exact).norm() / exact.norm())


def unseen_gpu(request: Request) -> str | None:
    """An NVIDIA or AMD GPU that the system shows, though torch does not."""
    found = [path for path in ("/dev/nvidia0", "/dev/kfd") if os.path.exists(path)]
    return f"{found[0]} shows a GPU" if found and request.device_type != "cpu" else None


def in_flops(rate: float) -> str:
    """
    >>> in_flops(1.7e11), in_flops(7.89e14)
    ('170 GFLOP/s', '789 TFLOP/s')
    """
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


# Dtypes ----------------------------------------------------------------------------------------------------------


def dtypes(request: Request) -> Result:
    """A product in each dtype; and the one that training would compute in."""
    import torch

    from nanochat.common import requested_dtype
    from nanochat.kernels.tolerance import tolerance
    from nanochat.parallel import find_device
    from nanochat.precision import DTYPES, choose_dtype, dtype_name

    where = find_device(request.device_type, 0)
    rates, tried = dict[str, float | None](), []
    for name, dtype in DTYPES.items():
        try:
            error, rates[name] = product_error(where, dtype), product_rate(where, dtype)
            right = error <= tolerance(where, dtype)
            tried.append(f"{name} {in_flops(rates[name] or 0)}" + ("" if right else f" but wrong by {error:.1g}"))
            rates[name] = rates[name] if right else None
        except (RuntimeError, TypeError) as problem:  # TypeError: float64 on mps
            rates[name] = None
            tried.append(f"{name} not at all ({type(problem).__name__})")
    taken = dtype_name(choose_dtype(where, in_batches=True))
    numbers = {"chosen": taken, "flops_per_s": rates}
    rate, exact = rates[taken], rates[dtype_name(torch.float32)]
    why = "NANOCHAT_DTYPE asks for it" if requested_dtype() else "this device's default"
    seen = f"{taken} is taken ({why}); products run in {', '.join(tried)}"
    if rate is None:
        return Result("failed", seen, "choose another with NANOCHAT_DTYPE", numbers)
    if exact and rate < 0.8 * exact:
        return Result("slow", seen, "unset NANOCHAT_DTYPE, or NANOCHAT_DTYPE=float32: faster here, and exact", numbers)
    return Result("ok", seen, "", numbers)


def product_rate(where: "torch.device", dtype: "torch.dtype", least_s: float = 0.05) -> float:
    """FLOP/s of square products of one size, the best of at least two."""
    import torch

    from nanochat.parallel import Runtime

    size = 256 if where.type == "cpu" else 4096
    rt, ones = Runtime(where, dtype), torch.ones(size, size, dtype=dtype, device=where)
    best_s, runs, ends = math.inf, 0, time.perf_counter() + least_s
    ones @ ones
    while runs < 2 or time.perf_counter() < ends:
        rt.synchronize()
        began = time.perf_counter()
        ones @ ones
        rt.synchronize()
        best_s, runs = min(best_s, time.perf_counter() - began), runs + 1
    return 2 * size**3 / best_s


# Threads ---------------------------------------------------------------------------------------------------------


def threads(request: Request) -> Result:
    """The same product on one, two and all cores, in turns; and who else has used them meanwhile."""
    import torch

    configured, cores = torch.get_num_threads(), usable_cores()
    counts = sorted({count for count in (1, 2, math.ceil(cores)) if count <= math.ceil(cores)})
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    best_s = dict.fromkeys(counts, math.inf)
    before, own_before = processor_ticks(), sum(os.times()[:2])
    for _ in range(8):
        for count in counts:
            torch.set_num_threads(count)
            began = time.perf_counter()
            a @ b
            best_s[count] = min(best_s[count], time.perf_counter() - began)
    gains = {str(count): best_s[1] / best_s[count] for count in counts}
    shares = taken_by_others(before, processor_ticks(), sum(os.times()[:2]) - own_before)
    numbers: dict[str, Any] = {"configured": configured, "cores": cores, "speedup": gains, **shares}
    told = [f"{count} threads are {gain:.2f} times as fast as one" for count, gain in gains.items() if count != "1"]
    seen = f"{cores:g} cores, torch takes {configured} thread{'s' if configured > 1 else ''}; "
    seen += ", ".join(told) or "one core only"
    if shares:
        seen += f"; other programs take {shares['others_frac']:.0%} of the cores, the host {shares['stolen_frac']:.0%}"
    advice = thread_advice(configured, math.ceil(cores), gains, shares)
    return Result("slow" if advice else "ok", seen, advice, numbers)


def thread_advice(configured: int, cores: int, gains: dict[str, float], shares: dict[str, float]) -> str:
    """What to do about threads, or nothing. gains: times as fast by so many threads; shares: `taken_by_others`."""
    if configured > cores:
        return f"set OMP_NUM_THREADS={cores}: threads without a core of their own only wait"
    if max(shares.values(), default=0) > MUCH_STOLEN:
        fewer = ", or train with OMP_NUM_THREADS=1: threads that wait for a lost core cost more"
        return f"stop what else runs{fewer if configured > 1 else ''}"
    if configured > 1 and gains.get("2", math.inf) < HELPING:
        return "a second thread does not help here: OMP_NUM_THREADS=1 is as fast"
    return ""


def processor_ticks() -> dict[str, float]:
    """Seconds that all cores together have spent so far, by Linux's own count; elsewhere nothing."""
    path = Path("/proc/stat")
    if not path.is_file():
        return {}
    fields = [
        int(word) / os.sysconf("SC_CLK_TCK") for word in path.read_text(encoding="ascii").split("\n")[0].split()[1:]
    ]
    return {"total": sum(fields[:8]), "idle": fields[3] + fields[4], "stolen": fields[7]}


def taken_by_others(before: dict[str, float], after: dict[str, float], own_s: float) -> dict[str, float]:
    """Shares of all cores' time that went to other programs, and to other machines of the same host."""
    if not before or after["total"] <= before["total"]:
        return {}
    total, idle, stolen = (after[name] - before[name] for name in ("total", "idle", "stolen"))
    return {"others_frac": max(0.0, total - idle - stolen - own_s) / total, "stolen_frac": stolen / total}
