"""Writing one token on a CPU: products of a few rows with large matrices, in C (decode.c), and whether they can be had.

torch's own product of one row reaches a third of what the memory could deliver, one of int8 weights less, and the many
tiny operators around them cost as much again. So a token goes through one call for the attention of a layer, one for
its MLP and one for the head, if there is a C compiler to make them; everything else stays with torch, and without a
compiler all of it. Figures: dev/LOG.md 2026-11-22.

`find_decoder` compiles the source once per machine and source, loads it beside torch's own threads, and compares each
product with torch's on a small case before anybody uses it.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import base_dir

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("gcc", "cc")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
LANES = 16
MAX_ROWS = 64  # of an input: beyond it torch's products are as fast
WORK_PER_THREAD = 2**22  # bytes read or products: waking another thread costs as much as a million or two


class Matrix(ctypes.Structure):
    """A weight as decode.c reads it, of numbers or of bytes with a scale for each row; keeps its tensors alive."""

    _fields_: ClassVar = [("weight", c_void_p), ("scales", c_void_p), ("rows", c_int64), ("cols", c_int64)]

    @classmethod
    def of(cls, weight: Tensor | None, is_int8: bool = False) -> "Matrix":
        """weight: (rows, cols) fp32, contiguous, on the CPU; None for an absent one."""
        if weight is None:
            return cls(None, None, 0, 0)
        weight, scales = quantised(weight) if is_int8 else (weight.detach(), None)
        matrix = cls(weight.data_ptr(), None if scales is None else scales.data_ptr(), *weight.shape)
        matrix.tensors = (weight, scales)
        return matrix

    def threads(self, count: int) -> int:
        """For a product with `count` rows."""
        work = self.rows * self.cols * max(count, 1 if self.scales else 4)
        return min(torch.get_num_threads(), 1 + work // WORK_PER_THREAD)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, cols) int8 and (rows,) fp32 whose product is close to weight: a row's largest number becomes 127.

    >>> quantised(torch.tensor([[1.0, -2.0]]))
    (tensor([[  64, -127]], dtype=torch.int8), tensor([0.0157]))
    """
    scales = weight.detach().abs().amax(dim=1).clamp_min(1e-30) / 127
    return (weight.detach() / scales[:, None]).round().to(torch.int8), scales


class AttentionCall(ctypes.Structure):
    """`attention` of decode.c."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("q", "k", "v", "proj", "gate")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "window")),
        ("qk_scale", c_float),
        ("gate_scale", c_float),
        ("has_offset", c_int),
    ]


class Decoder:
    """The functions of the compiled decode.c. All tensors are fp32, contiguous and on the CPU.

    They let other threads run meanwhile, and change nothing but the tensors of their own call.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        sizes = [c_int64, c_int]
        self._linear, self._mlp, self._attend = (
            _declared(library, f"nanochat_{name}", arguments)
            for name, arguments in (
                ("linear", [c_void_p] * 3 + [c_float] + sizes),
                ("mlp", [c_void_p] * 2 + [c_int] + [c_void_p] * 3 + sizes),
                ("attend", [c_void_p] * 11 + [c_int64] + sizes),
            )
        )

    def linear(self, matrix: Matrix, x: Tensor, softcap: float = 0.0) -> Tensor:
        """x: (..., cols). Returns (..., rows), with a softcap as `cross_entropy.softcapped`."""
        x = x.contiguous()  # the last token of several is not
        y = x.new_empty(*x.shape[:-1], matrix.rows)
        count = x.numel() // matrix.cols
        threads = matrix.threads(count)
        self._linear(ctypes.addressof(matrix), x.data_ptr(), y.data_ptr(), softcap, count, threads)
        return y

    def mlp(self, fc: Matrix, proj: Matrix, activation: str, x: Tensor) -> Tensor:
        """proj(activation(fc(x))). x: (..., C), and so is what returns."""
        y, count = torch.empty_like(x), x.numel() // fc.cols
        hidden = x.new_empty(count, fc.rows)
        self._mlp(
            ctypes.addressof(fc), ctypes.addressof(proj), ("relu2", "gelu").index(activation),
            x.data_ptr(), hidden.data_ptr(), y.data_ptr(), count, fc.threads(count),
        )  # fmt: skip
        return y

    def attend(
        self, call: AttentionCall, x: Tensor, embedded: Tensor | None, angles: tuple[Tensor, Tensor],
        positions: Tensor, keys: Tensor, values: Tensor, last_key: Tensor,
    ) -> Tensor:  # fmt: skip
        """`Attention.forward` for one token of each row: extends keys, values (B, R, H_kv, D) and last_key in place.

        x: (B, 1, C), and so is what returns. embedded: (B, 1, H_kv * D), of the value embedding. angles: cos and sin
        (B, 1, 1, D / 2).
        """
        out, count = torch.empty_like(x), x.size(0)
        threads = call.q.threads(4 * count)
        work = x.new_empty(2 * count * (call.q.rows + call.k.rows) + threads * (keys.size(1) + LANES))
        self._attend(
            ctypes.addressof(call), x.data_ptr(), None if embedded is None else embedded.data_ptr(),
            angles[0].data_ptr(), angles[1].data_ptr(), positions.data_ptr(), keys.data_ptr(), values.data_ptr(),
            last_key.data_ptr(), work.data_ptr(), out.data_ptr(), keys.size(1), count, threads,
        )  # fmt: skip
        return out


def _declared(library: ctypes.CDLL, name: str, arguments: list[Any]) -> Callable[..., None]:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    return function


# Whether there is one ---------------------------------------------------------------------------------------------


@functools.cache
def find_decoder() -> tuple[Decoder | None, str]:
    """The compiled functions, or None and why there are none."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, f"there is no C compiler ({', '.join(COMPILERS)})"
    try:
        decoder = Decoder(ctypes.CDLL(str(compiled(compiler))))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return None, f"decode.c cannot be compiled and loaded: {error}"
    return (decoder, "") if agrees(decoder) else (None, "decode.c computes something else than torch here")


def compiled(compiler: str) -> Path:
    """The library, compiled now or earlier. Raises OSError or CalledProcessError.

    It is linked without a library of threads, so that it finds the one which torch has loaded, and its threads.
    """
    about = SOURCE.read_bytes() + " ".join((compiler, *FLAGS, platform.processor(), platform.machine())).encode()
    cpu = Path("/proc/cpuinfo")
    about += cpu.read_bytes().partition(b"flags")[2].partition(b"\n")[0] if cpu.exists() else b""
    library = base_dir() / "kernels" / f"decode-{hashlib.sha256(about).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            done = os.path.join(folder, "decode")
            for command in (
                [compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{done}.o"],
                [compiler, "-shared", f"{done}.o", "-o", f"{done}.so", "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(f"{done}.so", library)
    return library


def agrees(decoder: Decoder) -> bool:
    """Whether products of numbers and of bytes are torch's, for every number of rows that is done differently."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * LANES, 2 * LANES, generator=rng)
    for count in (1, 2, 3, 4, 7):
        x = torch.randn(count, 2 * LANES, generator=rng)
        for is_int8 in (False, True):
            matrix = Matrix.of(weight, is_int8)
            numbers, scales = quantised(weight)
            exact = F.linear(x, numbers * scales[:, None] if is_int8 else weight)
            capped = 5 * torch.tanh(exact / 5)
            for cap, expected in ((0.0, exact), (5.0, capped)):
                if not torch.allclose(decoder.linear(matrix, x, cap), expected, atol=1e-4):
                    return False
    return True
