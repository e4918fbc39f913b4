"""What devices can do and cost, by name: the one table that MFU, plans and forecasts read.

Peaks and memory are the vendors' data sheets. Prices are what GPU clouds listed for an hour on demand, one
card, rounded, as remembered in `PRICES_AS_OF` and not looked up since: they differ by tens of percent between sellers
and months, so `scripts.plan` says their date and takes another with --price. What has no market price has none here.

This module never imports torch.
"""

import difflib
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

PRICES_AS_OF = "autumn 2025"


@dataclass(frozen=True)
class Hardware:
    """One GPU.

    words: all of them stand in its name. flops: dense bf16 FLOP/s. memory_gb: as sold, which is in 2^30 bytes,
    nearly. price: US dollars per hour, or None. has_fp8: eight-bit products in hardware.
    """

    words: str
    flops: float
    memory_gb: float
    price: float | None = None
    has_fp8: bool = True

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 2**30)

    @property
    def name(self) -> str:
        """As a flag takes it: H100-PCIE, RTX4090."""
        return f"RTX{self.words}" if self.words.isdigit() else self.words.upper().replace(" ", "-")


# The first entry whose words are all among the words of the device name wins, so special cases come first. Whole words
# only: an L40 is no L4, and an RTX A4000 no A40. Of a card that is sold with several sizes of memory the larger stands
# here, of the GH200 the usual one; a name that tells a smaller one is believed. A card whose two dies are two devices
# counts as one die.
GPUS: tuple[Hardware, ...] = (
    Hardware("gb200", 2.5e15, 186),
    Hardware("grace blackwell", 2.5e15, 186),
    Hardware("b200", 2.25e15, 180, 5.00),
    Hardware("b100", 1.8e15, 192),
    Hardware("h200 nvl", 836e12, 141, 3.50),
    Hardware("h200 pcie", 836e12, 141, 3.50),
    Hardware("h200", 989e12, 141, 3.50),
    Hardware("gh200", 989e12, 96, 1.50),
    Hardware("h100 nvl", 835e12, 94, 2.80),
    Hardware("h100 pcie", 756e12, 80, 2.40),
    Hardware("h100", 989e12, 80, 3.00),
    Hardware("h800 nvl", 989e12, 94),
    Hardware("h800", 756e12, 80),
    Hardware("a100", 312e12, 80, 1.79, has_fp8=False),
    Hardware("a800", 312e12, 80, has_fp8=False),
    Hardware("a40", 149.7e12, 48, 0.40, has_fp8=False),
    Hardware("a30", 165e12, 24, has_fp8=False),
    Hardware("l40s", 362e12, 48, 0.85),
    Hardware("l40", 181e12, 48, 0.90),
    Hardware("l4", 121e12, 24, 0.45),
    Hardware("mi355x", 2.5e15, 288),
    Hardware("mi325x", 1.3074e15, 256),
    Hardware("mi300a", 980.6e12, 128),
    Hardware("mi300x", 1.3074e15, 192, 2.50),
    Hardware("mi250x", 191.5e12, 64, has_fp8=False),
    Hardware("mi250", 181e12, 64, has_fp8=False),
    Hardware("5090", 209.5e12, 32, 0.80),
    Hardware("4090", 165.2e12, 24, 0.50),
    Hardware("3090", 71e12, 24, 0.30, has_fp8=False),
)

CPU = "cpu"


@dataclass(frozen=True)
class Devices:
    """Devices of one kind. gpu: None: the CPU of this machine, all its cores."""

    count: int
    gpu: Hardware | None

    def __str__(self) -> str:
        """As a flag takes it."""
        return f"{self.count}x{self.gpu.name}" if self.gpu else CPU


# What training is expected to do before anything was timed, in FLOP/s. Under a time budget the batch is fitted to it,
# except on a CPU, where a run times a pass instead (nanochat/train/pace.py).
EXPECTED_UTILISATION = 0.4  # of a GPU's bf16 peak
UNKNOWN_FLOPS = 5e10  # of a device that the table does not have, such as a Mac's

# Of a GPU's bf16 peak: products in float32 are made of TF32. Tests' float64 has no figure.
PEAK_SHARES = {"bfloat16": 1.0, "float16": 1.0, "float32": 0.5}

# Of each core of a CPU: 120 and 124 GFLOP/s were measured at depths 4 and 6 in fp32 on two cores with AVX-512, which is
# 55 to 57 % of what they can; in bfloat16, with AVX512_BF16, a step of depth 4 took half as long (dev/LOG.md).
CORE_FLOPS = {"float32": 6e10, "bfloat16": 1.2e11}


def find_gpu(device_name: str) -> Hardware | None:
    """A GPU by the name that its driver tells, or None where unknown."""
    given = set(re.findall("[a-z0-9]+", device_name.lower()))
    if "laptop" in given:  # same name as the desktop's card, about half its speed
        return None
    gpu = next((gpu for gpu in GPUS if given.issuperset(gpu.words.split())), None)
    told = re.search(r"(\d+)\s*gb\b", device_name.lower())
    return replace(gpu, memory_gb=min(gpu.memory_gb, float(told[1]))) if gpu and told else gpu


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None where unknown: no MFU is reported."""
    gpu = find_gpu(device_name)
    return gpu.flops if gpu else None


def expected_flops(peak: float | None) -> float:
    """A guess at the training FLOP/s of one device by its peak, or of one whose peak is unknown."""
    return EXPECTED_UTILISATION * peak if peak else UNKNOWN_FLOPS


def core_flops(dtype: str) -> float:
    """A guess at the training FLOP/s of a CPU's core; dtypes that were never measured count as fp32."""
    return CORE_FLOPS.get(dtype, CORE_FLOPS["float32"])


def usable_cores() -> float:
    """Cores that this process may use: of its affinity, and of its control group's quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    path = Path("/sys/fs/cgroup/cpu.max")
    return min(cores, cores_of_quota(path.read_text(encoding="ascii")) if path.is_file() else cores)


def cores_of_quota(text: str) -> float:
    """What Linux's cpu.max grants.

    >>> cores_of_quota("150000 100000"), cores_of_quota("max 100000")
    (1.5, inf)
    """
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def devices(text: str) -> Devices:
    """What `8xH100`, `H100` or `cpu` names. Raises ValueError, which tells the known names, where it is none of them.

    >>> str(devices("2 x RTX 4090")), str(devices("cpu"))
    ('2xRTX4090', 'cpu')
    """
    match = re.fullmatch(r"(?:(\d{1,6})\s*[xX*]\s*)?(.+)", text.strip(), re.DOTALL)
    count, name = (int(match[1] or 1), match[2]) if match else (1, "")
    if name.lower() == CPU:
        if count != 1:
            raise ValueError("cpu is this machine with all its cores; there is one of it")
        return Devices(1, None)
    gpu = find_gpu(_spaced(name)) if name.isprintable() else None
    if gpu is None:
        known = [CPU, *dict.fromkeys(gpu.name for gpu in GPUS)]
        close = difflib.get_close_matches(name.upper(), known, n=1)
        meant = f"did you mean {close[0]}? Known are" if close else "give NAME or 8xNAME of"
        raise ValueError(f"not a machine that is known; {meant} {', '.join(known)}")
    if count < 1:
        raise ValueError("the number of devices must be at least 1")
    return Devices(count, gpu)


def _spaced(name: str) -> str:
    """RTX4090 is what the driver calls an RTX 4090."""
    return re.sub(r"(?i)\b(rtx|geforce|nvidia)(?=[0-9])", r"\1 ", name)
