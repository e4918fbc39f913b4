"""What numbers a run computes in: the compute dtype, and the loss scale that float16 needs.

Weights, gradients and the optimizer's state are float32 whatever is chosen here; the compute dtype is that of the
activations and of the matrix products. By default it is the fastest that loses nothing that training would notice:
bfloat16 where the device has fast instructions for it, else float32. `$NANOCHAT_DTYPE` decides otherwise. No clock is
asked: a run that goes on must compute as it began, however busy the machine is by then. What a device cannot do is an
error that names the next best; what it only emulates works, with a warning.

float16 holds nothing below 6e-8, where most gradients lie. So the loss is multiplied by a scale that lifts them, and
the gradients are divided by it again once they are float32. The right scale is found by trying (`LossScaler`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import UserError, print0, requested_dtype

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,  # for tests: exact enough to compare two orders of summation
}
NEXT_BEST = {torch.bfloat16: "float16", torch.float16: "float32", torch.float64: "float32"}

# Instruction sets that multiply matrices of a type, as torch and /proc/cpuinfo call them.
CPU_FEATURES = {
    torch.bfloat16: {"amx_bf16", "avx512_bf16", "bf16"},
    torch.float16: {"amx_fp16", "avx512_fp16", "fp16_arith", "asimdhp"},
}
FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16"}  # 2 times as fast at depth 4; ARM's depend on how torch was built

FIRST_SCALE, LAST_SCALE, LARGEST_SCALE = 2.0**16, 1.0, 2.0**24
GROWTH_STEPS = 2000  # without an overflow, until a larger scale is tried


# The compute dtype ---------------------------------------------------------------------------------------------------


def choose_dtype(device: torch.device, in_batches: bool = False) -> torch.dtype:
    """Compute dtype: the environment's wish, else what the device is fast at.

    in_batches: many tokens at a time, as training and evaluation have them. In decoding every token casts all weights,
    which a CPU does not win back (1.7 times slower at depth 8).
    Raises UserError for what the device cannot do; warns of what it emulates.
    """
    wish = requested_dtype()
    if wish is None:
        return fastest_dtype(device, in_batches)
    dtype = find_dtype(wish)
    if not can_compute(device, dtype):
        raise UserError(f"NANOCHAT_DTYPE={wish}: {device.type} here cannot do it; the next best is {NEXT_BEST[dtype]}")
    if is_emulated(device, dtype):
        slowdown = 1 / speedup(device, dtype, 128)
        print0(
            f"warning: NANOCHAT_DTYPE={wish}: this CPU has no instructions for it and emulates them; matrix products "
            f"take {slowdown:.0f} times as long as in float32, or longer"
        )
    return dtype


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a CPU computes in it without having instructions for it."""
    return device.type == "cpu" and dtype in CPU_FEATURES and not cpu_features() & CPU_FEATURES[dtype]


def find_dtype(wish: str) -> torch.dtype:
    """The dtype that `$NANOCHAT_DTYPE` names. Raises UserError where it names none."""
    if wish not in DTYPES:
        raise UserError(f"NANOCHAT_DTYPE={wish}: choose one of {', '.join(DTYPES)}")
    return DTYPES[wish]


def dtype_name(dtype: torch.dtype) -> str:
    """As `$NANOCHAT_DTYPE` has it: bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def fastest_dtype(device: torch.device, in_batches: bool) -> torch.dtype:
    """bfloat16 where it is in hardware and fast, else float32."""
    if device.type == "cpu":
        is_fast = in_batches and bool(cpu_features() & FAST_BFLOAT16)
    else:
        is_fast = device.type in ("cuda", "xpu") and can_compute(device, torch.bfloat16)
    return torch.bfloat16 if is_fast else torch.float32


def can_compute(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of this type. Older GPUs only emulate bfloat16: that is a no."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        return bool((ones @ ones).sum().item() == 16**3)
    except (RuntimeError, TypeError):  # TypeError: float64 on mps
        return False


def cpu_features() -> set[str]:
    """Instruction sets of this CPU, by the names of torch and of Linux."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # not in every version
    told = {name for name, there in ask().items() if there is True} if ask else set()
    cpuinfo = Path("/proc/cpuinfo")
    return told | (features_in(cpuinfo.read_text(encoding="utf-8", errors="replace")) if cpuinfo.is_file() else set())


def features_in(cpuinfo: str) -> set[str]:
    """The instruction sets that /proc/cpuinfo lists: `flags` on x86, `Features` on ARM."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    return {word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()}


def speedup(device: torch.device, dtype: torch.dtype, size: int = 512) -> float:
    """How many times faster than in float32 a linear layer is in `dtype`: taken in turns, the best of seven of each."""
    best_s = {dtype: float("inf"), torch.float32: float("inf")}
    for kind in [*best_s] * 7:
        best_s[kind] = min(best_s[kind], linear_s(device, kind, size))
    return best_s[torch.float32] / best_s[dtype]


def linear_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Seconds of a linear layer's three products of (size, size) matrices, forward and backward."""
    x, weight, gradient = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    synchronize(device)
    began = time.perf_counter()
    x @ weight.t(), gradient @ weight, gradient.t() @ x
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked, so that clocks tell the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# The loss scale ------------------------------------------------------------------------------------------------------


@dataclass
class LossScaler:
    """The factor on the loss, a power of two, so that scaling never rounds.

    It is halved when a gradient overflows, and that step is skipped; it is doubled after `GROWTH_STEPS` steps without.
    """

    scale: float = FIRST_SCALE
    good_steps: int = 0

    def update(self, overflowed: bool) -> None:
        """Note how a step has gone."""
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale = max(LAST_SCALE, self.scale / 2)
        elif self.good_steps == GROWTH_STEPS:
            self.scale, self.good_steps = min(LARGEST_SCALE, self.scale * 2), 0

    def state(self) -> dict[str, Tensor]:
        return {
            "loss_scaler.scale": torch.tensor(self.scale, dtype=torch.float64),
            "loss_scaler.good_steps": torch.tensor(self.good_steps),
        }

    def load(self, saved: dict[str, Tensor]) -> None:
        """Take a state over; nothing where there is none: the run began in another dtype."""
        if saved:
            self.scale = float(saved["loss_scaler.scale"])
            self.good_steps = int(saved["loss_scaler.good_steps"])
