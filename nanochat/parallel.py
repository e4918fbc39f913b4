"""Where a process runs: device, compute dtype, ranks and mesh, and the sums over ranks.

    with runtime(args.device_type) as rt:
        model = build_model(config, rt.device, rt.dtype)

A plain process is rank 0 of 1. Under torchrun the ranks form a process group, nccl on GPUs and gloo elsewhere, so that
W ranks never train W different models by mistake.
"""

import ctypes
import hashlib
import os
import re
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

from nanochat.common import PARENT, LostRank, Stopped, UserError, launch_ranks, print0
from nanochat.hardware import expected_flops, peak_flops
from nanochat.memory import keep_freed_memory
from nanochat.precision import DTYPES, choose_dtype, dtype_name, synchronize

Function = TypeVar("Function", bound=Callable[..., Any])


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
        return peak_flops(device_name(self.device))

    @property
    def orthogonalize_dtype(self) -> torch.dtype | None:
        """What Muon's iterations compute in: bfloat16 where the model does, else the parameter's own dtype."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else None

    @property
    def expected_flops(self) -> float:
        """A guess at the training FLOP/s of all ranks, for plans that are made before anything was timed."""
        return self.world_size * expected_flops(self.peak_flops)

    def describe(self) -> str:
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{device_name(self.device)}, {dtype_name(self.dtype)}{ranks}"

    def compile(
        self, function: Function, mode: str = "auto", backend: "str | Callable[..., Any]" = "inductor"
    ) -> Function:
        """`function` through torch.compile. mode: on, off, or auto: on GPUs, where it always pays.

        On a CPU compilation takes a minute. Where it fails the function runs as it is, after one warning. With several
        ranks the graph is cut where a bucket of parameters ends, as PyTorch's DDP has it: of one uncut graph all
        gradients come at once, at the end of the backward, and none could travel meanwhile.
        """
        if not is_compiled(mode, is_cpu=self.device.type == "cpu"):
            return function
        if self.world_size > 1:
            from torch._dynamo.backends.distributed import DDPOptimizer  # imports the compiler
            from torch._dynamo.backends.registry import lookup_backend

            cut = DDPOptimizer(BUCKET_BYTES, lookup_backend(backend), first_bucket_cap=min(BUCKET_BYTES, 2**20))
            backend = cut.compile_fn
        return cast(Function, Compiled(function, torch.compile(function, dynamic=False, backend=backend)))

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
        synchronize(self.device)


def is_compiled(mode: str, is_cpu: bool) -> bool:
    """What --compile means."""
    return mode == "on" or (mode == "auto" and not is_cpu)


class Compiled:
    """A function that is compiled when it is first called, or runs as it is where that fails.

    An error of the function itself is no such failure: it comes up again where the function runs as it is.
    """

    def __init__(self, function: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = compiled

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            return self._function(*args)
        from torch._dynamo.exc import TorchDynamoException  # imports the compiler
        from torch._functorch import config

        try:
            # The backward as well: it would fail in the middle of a step otherwise, when nothing can be taken back.
            at_once = {name: True for name in ("force_non_lazy_backward_lowering",) if hasattr(config, name)}
            with config.patch(at_once):
                return self._compiled(*args)
        except TorchDynamoException as error:
            self._compiled = None
            result = self._function(*args)
            reason = " ".join(str(error).partition("Set TORCHDYNAMO")[0].split())
            print0(
                f"warning: torch.compile failed ({type(error).__name__}: {reason:.300}); the run goes on without it, "
                "up to 1.6 times slower and with up to twice the memory; --compile=off asks for just that"
            )
            return result


@contextmanager
def runtime(device_type: str = "", in_batches: bool = False) -> Iterator[Runtime]:
    """Set the process up, and take the process group down again at the end.

    device_type: cuda, mps, xpu or cpu; empty picks the best there is. in_batches: for training or evaluation, not for
    decoding. The compute dtype is `$NANOCHAT_DTYPE`, else what the device is fast at (`precision.choose_dtype`). Raises
    UserError for what this machine does not have.
    """
    rank, world_size, local_rank = launch_ranks()
    device = find_device(device_type, local_rank)
    if world_size > 1 and device.type not in ("cuda", "cpu"):
        raise UserError(f"--device-type={device.type}: several ranks work on cuda and cpu only; start one process")
    if device.type == "cuda" and local_rank >= torch.accelerator.device_count():
        raise UserError(
            f"--nproc_per_node: there are only {torch.accelerator.device_count()} GPUs for rank {local_rank}"
        )
    dtype = choose_dtype(device, in_batches)
    if in_batches and device.type == "cpu":
        keep_freed_memory()
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        if world_size > 1:
            join_ranks(device)
            dtype = agreed_dtype(dtype, device)
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
    # Its functions have the group of this moment as a default and would hold it to the end of the process, if the
    # compiler imported them later: gloo's threads then outlive the group, and one that wakes while Python ends aborts.
    import torch.distributed.nn.functional  # noqa: F401

    end_with_launcher()
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo", timeout=timedelta(minutes=30), device_id=device if is_cuda else None
    )
    dist.barrier()  # whoever fails from here on finds the others where they can be told


def agreed_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """One dtype for all ranks: their machines may differ, and float32 suits everybody."""
    order = list(DTYPES.values())
    first = torch.tensor(order.index(dtype), device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return order[int(first)]


def from_all_ranks(text: str) -> list[str]:
    """What each rank has to say, in their order. Every rank must call this; a process alone is the only rank."""
    if not dist.is_initialized():
        return [text]
    texts: list[Any] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def leave_ranks(world_size: int) -> None:
    """Take the process group down, with all other ranks."""
    if world_size > 1:
        dist.destroy_process_group()


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when torchrun dies: ranks that outlive it would train on, unseen by a second start.

    Of a torchrun that has died since `common` was imported, nobody would tell us any more: another process is our
    parent by now, the system's first one or whoever else collects orphans.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # started by other means, which may well end before we do
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != PARENT:
        print("torchrun has died; this rank ends, too", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)


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
    present = [*filter(None, [accelerator_type()]), "cpu"]
    kind = device_type or present[0]
    if kind not in present:
        raise UserError(f"--device-type={kind}: not present here; this machine has {', '.join(present)}")
    return torch.device(kind, local_rank) if kind in ("cuda", "xpu") else torch.device(kind)


def accelerator_type() -> str | None:
    """The kind of accelerator that this torch was built for, if one is there and we know it."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in ("cuda", "xpu", "mps") else None


def device_name(device: torch.device) -> str:
    """The model's name where the driver tells it, else the kind."""
    return str(getattr(torch, device.type).get_device_name(device)) if device.type in ("cuda", "xpu") else device.type
