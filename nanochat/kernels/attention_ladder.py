"""Which attention kernel a model uses: the fastest one that was seen to work here.

    FlashAttention 3 -> FlexAttention -> SDPA -> the reference

A kernel that is installed may still not load, crash when it runs, or compute wrong numbers on a device it was not made
for. So its name decides nothing: `choose_attention` goes down the ladder and runs each rung on small cases of what the
model will ask for (its dtype, head_dim, groups, windows, documents), forward and backward, and compares with the
textbook in float64. The first one that agrees is taken, and why each one above it was refused is kept for `doctor` to
print. The last rung is the textbook itself, so there always is one.

The choice is made when a model is built (model/gpt.py `empty_model`), outside of whatever is compiled later, and is an
object that is passed on. Nothing is loaded before that, and nothing is ever downloaded. What no check from inside can
survive is a kernel that kills its process or leaves the device in a state in which nothing runs any more.
"""

import functools
import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat.kernels.flash_attention import Visibility, attention, attention_reference
from nanochat.kernels.flex_attention import FlexAttention

# q (B, T, H, D), k and v (B, T, H_kv, D), and who sees whom in a row; returns as q
Kernel = Callable[[Tensor, Tensor, Tensor, Visibility], Tensor]

HUB_KERNELS = ("kernels-community/flash-attn3", "varunneal/flash-attention-3")  # used where they were fetched before
ROWS, LENGTH, WINDOW = 2, 200, 40  # of a small case: more than one block, a window that ends inside of one


@dataclass(frozen=True)
class AttentionCase:
    """What a model asks of its kernel. groups: query heads per key head. windows, documents: whether it has any."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    groups: int = 1
    windows: bool = True
    documents: bool = False


@dataclass(frozen=True)
class Rung:
    """A kernel that may or may not work here.

    load: makes it, or raises. obstacle: why it need not even be tried, or None. is_traced: whether it must also work
    inside of a compiled model in one piece; torch's own operators always do.
    """

    name: str
    load: Callable[[], Kernel]
    obstacle: Callable[[AttentionCase], str | None] = lambda case: None
    is_traced: bool = False


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that is used, and (name, reason) of each one above it."""

    name: str
    kernel: Kernel
    refused: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """One line for people."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused)
        return f"attention by {self.name}" + (f" ({reasons})" if reasons else "")


# The rungs ------------------------------------------------------------------------------------------------------------


class FlashAttention3:
    """The package `flash_attn_interface`, or a build of it in the hub's cache. Raises ImportError without either."""

    def __init__(self) -> None:
        self.function = installed_function() or cached_function()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
        window = (-1, -1) if visibility.is_full_causal else (visibility.window, 0)
        out = self.function(q, k, v, causal=True, window_size=window)
        return out[0] if isinstance(out, tuple) else out  # earlier versions also return the log-sums


def installed_function() -> Callable | None:
    """Of the package, if it is installed."""
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    except ModuleNotFoundError as error:
        if error.name != "flash_attn_interface":
            raise
        return None


def cached_function() -> Callable:
    """Of a kernel that was fetched before, through the package `kernels`."""
    folder = cached_kernel()
    if folder is None:
        raise ImportError(f"neither flash_attn_interface is installed, nor is one of {', '.join(HUB_KERNELS)} cached")
    return importlib.import_module("kernels").get_local_kernel(folder).flash_attn_func


def cached_kernel() -> Path | None:
    """The newest folder in the hub's cache of the first of `HUB_KERNELS` that it has."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = {repo.repo_id: repo for repo in scan_cache_dir().repos}
    except CacheNotFound:
        return None
    folders = [
        max(repos[name].revisions, key=lambda revision: revision.last_modified).snapshot_path
        for name in HUB_KERNELS
        if name in repos and repos[name].revisions
    ]
    return folders[0] if folders else None


def flash_attention_3_obstacle(case: AttentionCase) -> str | None:
    if case.device.type != "cuda" or torch.version.cuda is None:
        return f"made for NVIDIA GPUs, not for {case.device.type}"
    major, minor = torch.cuda.get_device_capability(case.device)
    if major != 9:
        return f"made for compute capability 9.x, this GPU has {major}.{minor}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"made for bfloat16 and float16, not for {plain(case.dtype)}"
    return "not asked for document masks" if case.documents else None


def flex_obstacle(case: AttentionCase) -> str | None:
    if case.device.type in ("cpu", "mps"):
        return f"PyTorch has no backward of it on {case.device.type}"
    if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"made for 16 and 32 bits, not for {plain(case.dtype)}"
    return f"made for heads of at least 16, these have {case.head_dim}" if case.head_dim < 16 else None


LADDER = (
    Rung("FlashAttention 3", FlashAttention3, flash_attention_3_obstacle, is_traced=True),
    Rung("FlexAttention", FlexAttention, flex_obstacle, is_traced=True),
    Rung("SDPA", lambda: attention),
    Rung("reference", lambda: attention_reference),
)


# The check ------------------------------------------------------------------------------------------------------------


@functools.cache
def choose_attention(case: AttentionCase, ladder: tuple[Rung, ...] = LADDER) -> AttentionChoice:
    """The first rung without a fault; the last one is not asked."""
    refused: list[tuple[str, str]] = []
    for rung in ladder[:-1]:
        kernel, fault = try_rung(rung, case)
        if kernel is not None:
            return AttentionChoice(rung.name, kernel, tuple(refused))
        refused.append((rung.name, fault))
    return AttentionChoice(ladder[-1].name, ladder[-1].load(), tuple(refused))


def try_rung(rung: Rung, case: AttentionCase) -> tuple[Kernel | None, str]:
    """The kernel if it works, else None and the reason."""
    obstacle = rung.obstacle(case)
    if obstacle is not None:
        return None, obstacle
    doing = "loads"
    try:
        kernel = rung.load()
        for window, packed in small_cases(case):
            doing = f"runs, {'full' if window == LENGTH else 'windowed'}{', documents' if packed else ''}"
            error = worst_error(kernel, case, window, packed, rung.is_traced)
            if not error <= tolerance(case):  # NaN is not
                return None, f"wrong numbers when it {doing}: off by {error:.2g}, {tolerance(case):.2g} is allowed"
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except Exception as problem:  # others' code on others' devices: what it may raise is nowhere listed
        return None, f"{type(problem).__name__} when it {doing}: {' '.join(str(problem).split()):.200}"
    return kernel, ""


def small_cases(case: AttentionCase) -> list[tuple[int, bool]]:
    """(window, whether there are documents) of every kind of row that the model has."""
    windows = (LENGTH, WINDOW) if case.windows else (LENGTH,)
    return [(window, packed) for window in windows for packed in ((False, True) if case.documents else (False,))]


def worst_error(kernel: Kernel, case: AttentionCase, window: int, packed: bool, is_traced: bool) -> float:
    """The largest error of output and gradients, against float64 on the CPU, relative to their norm."""
    rng = torch.Generator().manual_seed(0)
    heads = (2 * case.groups, 2, 2, 2 * case.groups)  # of q, k, v, and of the gradient that comes back
    tensors = [torch.randn(ROWS, LENGTH, h, case.head_dim, generator=rng).to(case.dtype) for h in heads]
    borders = torch.tensor([[70, 150], [130, 131]])  # per row, where its second and third document begin
    documents = (torch.arange(LENGTH)[None, :, None] >= borders[:, None]).sum(dim=-1) if packed else None
    there = None if documents is None else documents.to(case.device)
    found = with_gradients(kernel, [t.to(case.device) for t in tensors], window, there, is_traced)
    wanted = with_gradients(attention_reference, [t.double() for t in tensors], window, documents)
    errors = [(a.cpu().double() - b).norm() / b.norm() for a, b in zip(found, wanted)]
    return float(torch.stack(errors).max())


def with_gradients(
    kernel: Kernel, tensors: list[Tensor], window: int, documents: Tensor | None, is_traced: bool = False
) -> list[Tensor]:
    """The output and the gradients of q, k, v; tensors: these and the output's gradient."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(LENGTH, device=q.device)[None]
        return kernel(q, k, v, Visibility(positions, positions, window, documents, is_row=True))

    q, k, v = (t.requires_grad_() for t in tensors[:3])
    out = traced(attend)(q, k, v) if is_traced else attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def traced(function: Callable[..., Tensor], backend: str = "inductor") -> Callable[..., Tensor]:
    """`function` compiled in one piece, as if it was the first: the compiler counts how often it has compiled the same
    code, gives up at the ninth time, and cases are not told apart by it."""
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    return torch.compile(own, dynamic=False, fullgraph=True, backend=backend)


def tolerance(case: AttentionCase) -> float:
    """The relative error that a right kernel stays well below: 0.6 of a rounding in 16 bits and 6 in more were seen.

    A window that ends one key too early is off by 0.1 here. Products in float32 may be made of TF32 on GPUs.
    """
    if case.dtype == torch.float32 and case.device.type != "cpu":
        return 4 * 2.0**-10
    return torch.finfo(case.dtype).eps * (4 if case.dtype.itemsize == 2 else 64)


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
