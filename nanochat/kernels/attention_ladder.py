"""Which attention kernel a model uses: the fastest one that was seen to work here.

    FlashAttention 3 -> FlexAttention -> SDPA -> the reference

A kernel that is installed may still not load, crash when it runs, or compute wrong numbers on a device it was not made
for. So its name decides nothing: `choose_attention` goes down the ladder and runs each rung on small cases of what the
model will ask for (its dtype, head_dim, groups, windows, documents), forward and backward, and compares with the
textbook in float64. The first one that agrees is taken, and why each one above it was refused is kept for `doctor` to
print. The last rung is the textbook itself, so there always is one.

The choice is made when a model is built (model/gpt.py `empty_model`), outside of whatever is compiled later, and is an
object that is passed on. Nothing is loaded before that, and nothing is ever downloaded. Several ranks go down together:
a rung that one of them cannot do is taken by none, else they would compute and compile different things. What no check
from inside survives is a kernel that kills its process, or leaves the device in a state in which nothing runs any more.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import print0
from nanochat.kernels.flash_attention import Visibility, attention, attention_reference
from nanochat.kernels.flex_attention import FlexAttention
from nanochat.kernels.tolerance import tolerance
from nanochat.memory import is_out_of_memory
from nanochat.parallel import from_all_ranks
from nanochat.precision import dtype_name

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
    inside of a compiled model in one piece; torch's own operators always do. is_fallback: works everywhere, but a GPU
    can do better, above all with windows.
    """

    name: str
    load: Callable[[], Kernel]
    obstacle: Callable[[AttentionCase], str | None] = lambda case: None
    is_traced: bool = False
    is_fallback: bool = False


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
    """Of a kernel that was fetched before, through the package `kernels`, in any of its versions 0.7 to 0.17.

    Up to 0.13 it must be told the name of the package inside, which is the repository's.
    """
    name, folder = cached_kernel()
    if folder is None:
        raise ImportError(f"neither flash_attn_interface is installed, nor is one of {', '.join(HUB_KERNELS)} cached")
    load = getattr(importlib.import_module("kernels"), "get_local_kernel", None)
    if load is None:
        raise ImportError(f"{name} is cached, but this version of the package kernels cannot load it; 0.7 or later can")
    is_named = "package_name" in inspect.signature(load).parameters
    with without_downloads():
        module = load(folder, name.rpartition("/")[2].replace("-", "_")) if is_named else load(folder)
    return getattr(module, "flash_attn_interface", module).flash_attn_func


def cached_kernel() -> tuple[str, Path | None]:
    """The first of `HUB_KERNELS` that the hub's cache has, and the newest folder of it."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return "", None
    for name in HUB_KERNELS:  # one may be there twice: since 0.14 kernels are a kind of repository of their own
        revisions = [revision for repo in repos if repo.repo_id == name for revision in repo.revisions]
        if revisions:
            return name, max(revisions, key=lambda revision: revision.last_modified).snapshot_path
    return "", None


@contextmanager
def without_downloads() -> Iterator[None]:
    """The hub's own switch is off meanwhile: later versions of `kernels` fetch what a kernel depends on."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def flash_attention_3_obstacle(case: AttentionCase) -> str | None:
    if case.device.type != "cuda" or torch.version.cuda is None:
        return f"made for NVIDIA GPUs, not for {case.device.type}"
    major, minor = torch.cuda.get_device_capability(case.device)
    if major != 9:
        return f"made for compute capability 9.x, this GPU has {major}.{minor}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"made for bfloat16 and float16, not for {dtype_name(case.dtype)}"
    return "not asked for document masks" if case.documents else None


def flex_obstacle(case: AttentionCase) -> str | None:
    if case.device.type in ("cpu", "mps"):
        return f"PyTorch has no backward of it on {case.device.type}"
    if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"made for 16 and 32 bits, not for {dtype_name(case.dtype)}"
    return f"made for heads of at least 16, these have {case.head_dim}" if case.head_dim < 16 else None


LADDER = (
    Rung("FlashAttention 3", FlashAttention3, flash_attention_3_obstacle, is_traced=True),
    Rung("FlexAttention", FlexAttention, flex_obstacle, is_traced=True),
    Rung("SDPA", lambda: attention, is_fallback=True),
    Rung("reference", lambda: attention_reference, is_fallback=True),
)


# The check ------------------------------------------------------------------------------------------------------------


@functools.cache
def choose_attention(case: AttentionCase, ladder: tuple[Rung, ...] = LADDER) -> AttentionChoice:
    """The first rung in which no rank finds a fault; the last one is not asked. Ranks wait for each other here.

    Warns where a GPU is left with what every device has: on a CPU, or on Apple's chips, that is the best there is.
    """
    rung, kernel, refused = first_without_fault(case, ladder)
    choice = AttentionChoice(rung.name, kernel, refused)
    if rung.is_fallback and case.device.type in ("cuda", "xpu"):
        print0(
            f"warning: {choice.describe()}; the run goes on, slower than this GPU could; "
            "python -m scripts.doctor --only=attention tries each kernel"
        )
    return choice


def first_without_fault(
    case: AttentionCase, ladder: tuple[Rung, ...]
) -> tuple[Rung, Kernel, tuple[tuple[str, str], ...]]:
    """The rung, its kernel, and (name, reason) of those above."""
    refused: list[tuple[str, str]] = []
    for rung in ladder[:-1]:
        kernel, fault = try_rung(rung, case)
        faults = from_all_ranks(fault)
        if kernel is not None and not any(faults):
            return rung, kernel, tuple(refused)
        refused.append((rung.name, told_once(faults)))
    return ladder[-1], ladder[-1].load(), tuple(refused)


def told_once(faults: list[str]) -> str:
    """The first rank's fault among those of all ranks, of which at least one has any.

    >>> told_once(["", "no driver"]), told_once(["no driver", "no driver"])
    ('on rank 1: no driver', 'no driver')
    """
    rank = next(rank for rank, fault in enumerate(faults) if fault)
    return faults[rank] if len(set(faults)) == 1 else f"on rank {rank}: {faults[rank]}"


def try_rung(rung: Rung, case: AttentionCase) -> tuple[Kernel | None, str]:
    """The kernel if it works, else None and the reason."""
    obstacle = rung.obstacle(case)
    if obstacle is not None:
        return None, obstacle
    doing, allowed = "loads", tolerance(case.device, case.dtype)
    try:
        kernel = rung.load()
        for window, packed in small_cases(case):
            doing = f"runs, {'full' if window == LENGTH else 'windowed'}{', documents' if packed else ''}"
            error = worst_error(kernel, case, window, packed, rung.is_traced)
            if not error <= allowed:  # NaN is not
                return None, f"wrong numbers when it {doing}: off by {error:.2g}, {allowed:.2g} is allowed"
    except Exception as problem:  # others' code on others' devices: what it may raise is nowhere listed
        if is_out_of_memory(problem):  # says nothing about the kernel
            raise
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
