"""What devices can do and cost, by name: the one table that MFU, plans and forecasts read.

Peaks, memory and bandwidth are the vendors' data sheets. Prices are what GPU clouds listed for an hour on demand, one
card, rounded, as remembered in `PRICES_AS_OF` and not looked up since: they differ by tens of percent between sellers
and months, so `scripts.plan` says their date and takes another with --price. What has no market price has none here.

This module never imports torch.
"""

import re
from dataclasses import dataclass, replace

from nanochat.common import UserError, printable

PRICES_AS_OF = "autumn 2025"


@dataclass(frozen=True)
class Hardware:
    """One device.

    words: all of them stand in its name. flops: dense bf16 FLOP/s. memory_gb: as sold, which is in 2^30 bytes,
    nearly. bandwidth_tbs: of the memory, 10^12 bytes/s. price: US dollars per hour, or None.
    """

    words: str
    flops: float
    memory_gb: float
    bandwidth_tbs: float
    price: float | None = None

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 2**30)

    @property
    def is_cpu(self) -> bool:
        return self.words == CPU

    @property
    def name(self) -> str:
        """As a flag takes it: H100-PCIE, RTX4090."""
        if self.is_cpu:
            return self.words
        return f"RTX{self.words}" if self.words.isdigit() else self.words.upper().replace(" ", "-")


# The first entry whose words are all among the words of the device name wins, so special cases come first. Whole words
# only: an L40 is no L4, and an RTX A4000 no A40. Of a card that is sold with several sizes of memory the larger stands
# here; a name that tells a smaller one is believed.
GPUS: tuple[Hardware, ...] = (
    Hardware("gb200", 2.5e15, 186, 8.0),
    Hardware("grace blackwell", 2.5e15, 186, 8.0),
    Hardware("b200", 2.25e15, 180, 8.0, 5.00),
    Hardware("b100", 1.8e15, 192, 8.0),
    Hardware("h200 nvl", 836e12, 141, 4.8, 3.50),
    Hardware("h200 pcie", 836e12, 141, 4.8, 3.50),
    Hardware("h200", 989e12, 141, 4.8, 3.50),
    Hardware("gh200", 989e12, 96, 4.0, 1.50),
    Hardware("h100 nvl", 835e12, 94, 3.9, 2.80),
    Hardware("h100 pcie", 756e12, 80, 2.0, 2.40),
    Hardware("h100", 989e12, 80, 3.35, 3.00),
    Hardware("h800 nvl", 989e12, 94, 3.9),
    Hardware("h800", 756e12, 80, 2.0),
    Hardware("a100", 312e12, 80, 2.0, 1.79),
    Hardware("a800", 312e12, 80, 2.0),
    Hardware("a40", 149.7e12, 48, 0.696, 0.40),
    Hardware("a30", 165e12, 24, 0.933),
    Hardware("l40s", 362e12, 48, 0.864, 0.85),
    Hardware("l40", 181e12, 48, 0.864, 0.90),
    Hardware("l4", 121e12, 24, 0.3, 0.45),
    Hardware("mi355x", 2.5e15, 288, 8.0),
    Hardware("mi325x", 1.3074e15, 256, 6.0),
    Hardware("mi300a", 980.6e12, 128, 5.3),
    Hardware("mi300x", 1.3074e15, 192, 5.3, 2.50),
    Hardware("mi250x", 383e12, 128, 3.28),
    Hardware("mi250", 362.1e12, 128, 3.28),
    Hardware("5090", 209.5e12, 32, 1.79, 0.80),
    Hardware("4090", 165.2e12, 24, 1.01, 0.50),
    Hardware("3090", 71e12, 24, 0.936, 0.30),
)

# Training FLOP/s that a plan expects before anything was timed: the batch is fitted to them under a time budget.
EXPECTED_UTILISATION = 0.4  # of a GPU's bf16 peak
EXPECTED_CPU_FLOPS = 5e10

# What a core of a CPU did in training at depths 4 and 6: 120 and 124 GFLOP/s on two cores with AVX-512, fp32, which is
# 55 to 57 % of what they can (dev/LOG.md, the table of scripts.bench).
MEASURED_CORE_FLOPS = 6e10
CPU = "cpu"


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
    """A guess at the training FLOP/s of one device whose peak is known, or that has none."""
    return EXPECTED_UTILISATION * peak if peak else EXPECTED_CPU_FLOPS


def parse_machine(text: str) -> tuple[int, str]:
    """(number of devices, name) of `8xH100`, `H100` or `cpu`. Raises UserError where the name is none that is known."""
    match = re.fullmatch(r"(?:(\d{1,6})\s*[xX*]\s*)?(.+)", text.strip(), re.DOTALL)
    count, name = (int(match[1] or 1), match[2]) if match else (1, "")
    if count < 1 or not name.isprintable() or (name.lower() != CPU and find_gpu(_spaced(name)) is None):
        known = ", ".join([CPU, *dict.fromkeys(gpu.name for gpu in GPUS)])
        raise UserError(f"--gpus={printable(text[:60])}: not a machine that is known; give NAME or 8xNAME of {known}")
    if count > 1 and name.lower() == CPU:
        raise UserError(f"--gpus={printable(text[:60])}: cpu is this machine with all its cores; there is one of it")
    return count, name


def find_hardware(name: str, cpu_cores: int, cpu_memory_gb: float) -> Hardware:
    """A device that `parse_machine` took. cpu_cores, cpu_memory_gb: of the machine that `cpu` stands for."""
    if name.lower() == CPU:
        return Hardware(CPU, cpu_cores * MEASURED_CORE_FLOPS, cpu_memory_gb, 0.0)
    gpu = find_gpu(_spaced(name))
    assert gpu is not None, f"{name} has not gone through parse_machine"
    return gpu


def _spaced(name: str) -> str:
    """RTX4090 is what the driver calls an RTX 4090."""
    return re.sub(r"(?i)\b(rtx|geforce|nvidia)(?=[0-9])", r"\1 ", name)
