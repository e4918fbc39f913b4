"""What a training step really holds: tensors, counted as they are made and freed, and the process's resident memory.

`LiveBytes` stands between torch's operators and whoever calls them. Every storage that an operator returns is counted
once, whatever views share it, until the last of them is gone; the peak of that is what the forecast foretells
(nanochat/forecast.py). What an operator takes for itself while it works is not seen here; the process's memory has it.
"""

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import scaling
from nanochat.common import print0
from nanochat.evals.speed import optimizer_step
from nanochat.forecast import Setup, forecast
from nanochat.kernels.fp8 import find_recipe
from nanochat.loader import Batch
from nanochat.memory import high_water_bytes, keep_freed_memory
from nanochat.parallel import Runtime
from nanochat.precision import DTYPES


class LiveBytes(TorchDispatchMode):
    """Counts the storages that live: those that were made in the block, or that `add` was told of.

    now, peak: bytes; largest: of a single one; `restart_peak` begins a new peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._sizes: dict[int, int] = {}  # by the storage's address

    def add(self, tensor: Tensor) -> None:
        """Count what the tensor lies in, if it is not counted yet."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._forget, key)

    def restart_peak(self) -> None:
        self.peak = self.now

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {part.untyped_storage()._cdata for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        made = func(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, Tensor) and part.untyped_storage()._cdata not in given:
                self.add(part)
        return made


@dataclass(frozen=True)
class Shape:
    """A training step to measure: a model of these dials, and how many rows a pass takes. fp8: a recipe, emulated."""

    depth: int
    vocab_size: int
    sequence_len: int
    rows: int
    aspect_ratio: int = 64
    head_dim: int = 64
    passes: int = 1
    dtype: str = "float32"
    fp8: str | None = None

    def setup(self) -> Setup:
        config = scaling.model_config(
            self.depth, self.vocab_size, self.sequence_len, self.aspect_ratio, min(self.head_dim, 64 * self.depth)
        )
        return Setup(config, self.rows, passes=self.passes, dtype=self.dtype, fp8_recipe=self.fp8, is_run=False)


# Each is a few seconds on one core: depth, width, vocabulary, rows, length and dtype all differ somewhere. The first
# has tensors of 64 MiB, more than malloc would put into its heap if it were not told to keep what is freed.
SHAPES = (
    Shape(depth=2, vocab_size=2048, sequence_len=256, rows=128),
    Shape(depth=4, vocab_size=4096, sequence_len=512, rows=8, head_dim=128),
    Shape(depth=2, vocab_size=32768, sequence_len=512, rows=4),
    Shape(depth=6, vocab_size=1024, sequence_len=1024, rows=2),
    Shape(depth=3, vocab_size=8192, sequence_len=128, rows=32, aspect_ratio=128, dtype="bfloat16"),
    Shape(depth=4, vocab_size=512, sequence_len=512, rows=4, passes=2),
)


def measure(shape: Shape) -> dict[str, int]:
    """One optimizer step of the shape in this process: `live_bytes` at its peak, `rss_bytes` of the whole process."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    setup, rt = shape.setup(), Runtime(torch.device("cpu"), DTYPES[shape.dtype])
    with LiveBytes() as live:
        model, step = optimizer_step(setup.config, rt, passes=shape.passes)
        if shape.fp8:
            model.use_fp8(find_recipe(shape.fp8, rt.device, emulate=True))
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (shape.rows, shape.sequence_len + 1), generator=rng)
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(ids[:, :-1], dtype=torch.int32))
        live.restart_peak()
        step(repeat(batch))
    return {"live_bytes": live.peak, "rss_bytes": high_water_bytes()}


def measure_alone(shape: Shape) -> dict[str, int]:
    """`measure` in a process of its own, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, shape).result()


def compare(shapes: Sequence[Shape] = SHAPES) -> list[dict[str, Any]]:
    """Foretold and measured bytes of each shape."""
    rows = []
    for shape in shapes:
        foretold, measured = forecast(shape.setup()), measure_alone(shape)
        expected = {"live_bytes": foretold.live_bytes, "rss_bytes": foretold.total_bytes}
        ratios = {name.removesuffix("_bytes"): expected[name] / measured[name] for name in expected}
        told = ", ".join(f"{name} {measured[f'{name}_bytes'] / 1e6:,.0f} MB x {r:.3f}" for name, r in ratios.items())
        size = f"depth {shape.depth}, vocabulary {shape.vocab_size}, {shape.rows} x {shape.sequence_len}, {shape.dtype}"
        print0(f"{size}: {told}")
        rows.append({**asdict(shape), "forecast": expected, "measured": measured, "forecast_to_measured": ratios})
    return rows
