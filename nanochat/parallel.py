"""Where a process runs: device, compute dtype, ranks and mesh, and the sums over ranks.

    with runtime(args.device_type) as rt:
        model = build_model(config, rt.device, rt.dtype)

A plain process is rank 0 of 1. Under torchrun the ranks form a process group, nccl on GPUs and gloo elsewhere, so that
W ranks never train W different models by mistake.
"""

import ctypes
import hashlib
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import LostRank, Stopped, UserError, launch_ranks, peak_flops, requested_dtype

Function = TypeVar("Function", bound=Callable[..., Any])

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,  # for tests: exact enough to compare two orders of summation
}


def reduce_dtype(name: str) -> torch.dtype | None:
    """What --reduce-dtype means."""
    return DTYPES[name] if name else None


BUCKET_BYTES = 2**25  # of gradients that travel together: enough for full bandwidth, few enough to begin early

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>

# How gloo and nccl say that a peer is no longer there.
LOST_PEER = re.compile("(closed|reset) by peer|broken pipe|gloo/transport|remote process exited|ncclRemoteError", re.I)

# New names since torch 2.13, where the old ones warn.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid: `dp` splits the batch, `tp` splits the weights."""

    dp: int = 1
    tp: int = 1


@dataclass(frozen=True)
class Runtime:
    """The process's place among its peers, fixed for its life."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    mesh: Mesh = Mesh()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of one device, or None where unknown."""
        return peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    @property
    def orthogonalize_dtype(self) -> torch.dtype | None:
        """What Muon's iterations compute in: bfloat16 where the model does, else the parameter's own dtype."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else None

    def check_can_train(self) -> None:
        """Raise UserError for a compute dtype that can only run a model."""
        if self.dtype == torch.float16:
            raise UserError("NANOCHAT_DTYPE=float16: gradients would underflow; train in bfloat16 or float32")

    @property
    def expected_flops(self) -> float:
        """A guess at the training FLOP/s of all ranks, for plans that are made before anything was timed."""
        return self.world_size * (0.4 * self.peak_flops if self.peak_flops else 5e10)

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{name}, {str(self.dtype).removeprefix('torch.')}{ranks}"

    def compile(self, function: Function, mode: str = "auto", backend: str = "inductor") -> Function:
        """`function` through torch.compile. mode: on, off, or auto: on GPUs, where it always pays.

        On a CPU compilation takes a minute and needs a C++ compiler; without one this is a UserError. With several
        ranks the graph is cut where a bucket of parameters ends, as PyTorch's DDP has it: of one uncut graph all
        gradients come at once, at the end of the backward, and none could travel meanwhile.
        """
        if mode == "off" or (mode == "auto" and self.device.type == "cpu"):
            return function
        if self.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError("--compile=on: needs a C++ compiler (g++ or clang++) on a CPU; install one or leave it off")
        if self.world_size == 1:
            return cast(Function, torch.compile(function, dynamic=False, backend=backend))
        from torch._dynamo.backends.distributed import DDPOptimizer  # imports the compiler
        from torch._dynamo.backends.registry import lookup_backend

        cut = DDPOptimizer(BUCKET_BYTES, lookup_backend(backend), first_bucket_cap=min(BUCKET_BYTES, 2**20))
        return cast(Function, torch.compile(function, dynamic=False, backend=cut.compile_fn))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_number(self, value: float) -> float:
        """The sum of a Python number over ranks."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return self.sum(torch.tensor(float(value), dtype=exact, device=self.device)).item()

    def max_number(self, value: float) -> float:
        """The largest of a Python number over ranks."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def agrees_on(self, text: str) -> bool:
        """Whether all ranks have the same text here."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")  # 48 bits: exact as a float
        return self.max_number(number) == -self.max_number(-number)

    def reduce_scatter(self, own: Tensor, whole: Tensor) -> dist.Work:
        """Begin to put the sum over ranks of `whole` (W * n, ...) into `own` (n, ...), rank r getting its r-th part."""
        return cast(dist.Work, REDUCE_SCATTER(own, whole, async_op=True))

    def all_gather(self, whole: Tensor, own: Tensor) -> dist.Work:
        """Begin to put `own` (n, ...) of all ranks, one behind the other, into `whole` (W * n, ...)."""
        return cast(dist.Work, ALL_GATHER(whole, own, async_op=True))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's `tensor` on all ranks, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked, so that clocks tell the truth."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@contextmanager
def runtime(device_type: str = "") -> Iterator[Runtime]:
    """Set the process up, and take the process group down again at the end.

    device_type: cuda, mps, xpu or cpu; empty picks the best there is. The compute dtype is `$NANOCHAT_DTYPE`, else
    bfloat16 on GPUs that have it in hardware, else float32. Raises UserError for what this machine does not have.
    """
    rank, world_size, local_rank = launch_ranks()
    device = find_device(device_type, local_rank)
    if world_size > 1 and device.type not in ("cuda", "cpu"):
        raise UserError(f"--device-type={device.type}: several ranks work on cuda and cpu only; start one process")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs for rank {local_rank}")
    dtype = choose_dtype(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    try:
        if world_size > 1:
            join_ranks(device)
        yield Runtime(device, dtype, rank, world_size, Mesh(dp=world_size))
    except Stopped:  # all ranks alike
        leave_ranks(world_size)
        raise
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"rank {rank}: {device} is out of memory; lower --device-batch-size") from error
    except (UserError, FloatingPointError, RuntimeError) as error:
        if world_size > 1:
            raise tell_once(error, rank) from error
        raise
    leave_ranks(world_size)  # not on errors: it would wait for ranks that wait for this one


def join_ranks(device: torch.device) -> None:
    """Make this process one of the job's ranks."""
    end_with_launcher()
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo", timeout=timedelta(minutes=30), device_id=device if is_cuda else None
    )
    dist.barrier()  # whoever fails from here on finds the others where they can be told


def leave_ranks(world_size: int) -> None:
    """Take the process group down, with all other ranks."""
    if world_size > 1:
        dist.destroy_process_group()


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when torchrun dies: ranks that outlive it would train on, unseen by a second start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def tell_once(error: Exception, rank: int) -> Exception:
    """What a rank ends with where `error` came up: one rank of the job tells, the others go down in silence.

    When a rank dies, all others fail in their next sum over ranks; each of them would have the same to say.
    """
    is_symptom = isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))
    if not (is_symptom or isinstance(error, (UserError, FloatingPointError))):
        return error
    try:
        is_first = dist.distributed_c10d._get_default_store().add("nanochat/told", 1) == 1
    except (RuntimeError, ValueError):  # the store is gone, too, or there never was one
        is_first = rank <= 1
    if not is_first:
        return LostRank("")
    if not is_symptom:
        return error
    reason = str(error).splitlines()[0]
    return LostRank(
        f"rank {rank}: another rank of this job has died (its own message, if it could give one, stands above); go on "
        f"from the last checkpoint with --resume=auto ({reason:.200})"
    )


def find_device(device_type: str, local_rank: int) -> torch.device:
    """The device asked for, or the best one present."""
    present = [kind for kind in ("cuda", "xpu", "mps") if is_present(kind)] + ["cpu"]
    kind = device_type or present[0]
    if kind not in present:
        raise UserError(f"--device-type={kind}: not present here; this machine has {', '.join(present)}")
    return torch.device(kind, local_rank) if kind in ("cuda", "xpu") else torch.device(kind)


def is_present(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    return bool(getattr(torch, kind).is_available())


def choose_dtype(device: torch.device) -> torch.dtype:
    """Compute dtype: the environment's wish, else what the device is fast at."""
    wish = requested_dtype()
    if wish is not None:
        if wish not in DTYPES:
            raise UserError(f"NANOCHAT_DTYPE={wish}: choose one of {', '.join(DTYPES)}")
        return DTYPES[wish]
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float32
