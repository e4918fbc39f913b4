"""Who steps what: the optimizer's work and state are shared out over the ranks (ZeRO-2).

Every rank computes gradients for all weights, from its own rows of the batch. Then, bucket by bucket:

    reduce-scatter   the sum over ranks of each gradient, every rank receiving only the slices that it owns
    step             the owner updates its slices, with the state that it alone keeps
    all-gather       the new slices go to everybody

A bucket is a tensor that is cut along dim 0: a table into rows, a stack of equal matrices into whole matrices. Any
number of ranks works, since the last ones may own less, or nothing. The sum of a bucket begins as soon as the last
backward has made all its gradients (`Reduction`), so most of it travels while that backward still computes.

With one rank nothing is copied that need not be, and nothing is sent.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from nanochat.parallel import BUCKET_BYTES, Runtime

ONE_PROCESS = Runtime(torch.device("cpu"), torch.float32)


class Work(Protocol):
    """A transfer on its way."""

    def wait(self) -> object: ...


class Bucket:
    """Parameters that are reduced, stepped by their owners, and gathered together.

    is_stack: the slices are the parameters themselves, all of one shape. Else there is one parameter, and its slices
    are its rows (a scalar is one row). Of n slices over W ranks, rank r owns slices r * ceil(n / W) and following.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rt: Runtime, is_stack: bool) -> None:
        assert is_stack or len(parameters) == 1
        self.parameters, self.rt, self.is_stack = list(parameters), rt, is_stack
        like = parameters[0]
        self.num_slices = len(parameters) if is_stack else like.shape[0] if like.dim() else 1
        self.slice_shape = tuple(like.shape) if is_stack else tuple(like.shape[1:])
        self._share = -(-self.num_slices // rt.world_size)
        self.own = slice(min(rt.rank * self._share, self.num_slices), min((rt.rank + 1) * self._share, self.num_slices))
        self._gradient: Tensor | None = None
        self._gathered: Tensor | None = None
        self._work: Work | None = None

    @property
    def num_own(self) -> int:
        """Slices that this rank steps; 0 on the last ranks where there are fewer slices than ranks."""
        return self.own.stop - self.own.start

    def own_weights(self) -> Tensor:
        """(num_own, ...): of a table a view, of a stack a copy."""
        if self.is_stack:
            mine = [parameter.detach() for parameter in self.parameters[self.own]]
            return torch.stack(mine) if mine else self.parameters[0].detach().new_empty(0, *self.slice_shape)
        return self.parameters[0].detach().view(self.num_slices, *self.slice_shape)[self.own]

    def reduce(self, dtype: torch.dtype | None) -> None:
        """Begin to sum the gradients over ranks, in `dtype`. The parameters' own are given up if there are several.

        Either all of the parameters have a gradient or none has, on every rank alike.
        """
        given = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not given:
            return
        assert len(given) == len(self.parameters), "parameters of a bucket are stepped together or not at all"
        whole = torch.stack(given) if self.is_stack else given[0].view(self.num_slices, *self.slice_shape)
        if self.rt.world_size == 1:
            self._gradient = whole
            return
        for parameter in self.parameters:
            parameter.grad = None
        whole = self._padded(whole.to(dtype or whole.dtype))
        self._gradient = whole.new_empty(self._share, *self.slice_shape)
        self._work = self.rt.reduce_scatter(self._gradient, whole)

    def unscale(self, scale: float) -> Tensor | None:
        """Divide this rank's part of the summed gradient by the loss scale, in fp32 or better.

        Returns whether all of it is finite, a scalar; None if no parameter had a gradient.
        """
        self._wait()
        if self._gradient is None:
            return None
        exact = torch.promote_types(self.parameters[0].dtype, torch.float32)
        self._gradient = self._gradient.to(exact).div_(scale)
        return self._gradient.isfinite().all()

    def own_gradient(self, dtype: torch.dtype) -> Tensor | None:
        """(num_own, ...): the sum over ranks, once it is there; None if no parameter had a gradient."""
        self._wait()
        gradient, self._gradient = self._gradient, None
        return None if gradient is None else gradient[: self.num_own].to(dtype)

    def publish(self, own: Tensor) -> None:
        """Begin to give this rank's new slices to all ranks. own: (num_own, ...), of a table `own_weights()` itself."""
        if self.rt.world_size == 1:
            self._gathered = own
        else:
            self._gathered, self._work = self._gather(own)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the published slices of all ranks into the parameters."""
        self._wait()
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return
        if self.is_stack:
            for parameter, new in zip(self.parameters, gathered):
                parameter.copy_(new)
        elif self.rt.world_size > 1:
            self.parameters[0].copy_(gathered[: self.num_slices].view_as(self.parameters[0]))

    def gather(self, own: Tensor) -> Tensor | None:
        """All slices (num_slices, ...) of a state of which each rank has its own, on the host of rank 0; else None."""
        if self.rt.world_size == 1:
            return own
        whole, work = self._gather(own)
        work.wait()
        return whole[: self.num_slices].cpu() if self.rt.is_main else None

    def drop(self) -> None:
        """Wait for what is on its way and forget it."""
        self._wait()
        self._gradient = self._gathered = None

    def _gather(self, own: Tensor) -> tuple[Tensor, Work]:
        """Begin to collect all ranks' (num_own, ...) in a tensor (ranks * share, ...), its tail padding."""
        shape = own.shape[1:]
        mine = own.new_zeros(self._share, *shape)
        mine[: len(own)] = own
        whole = own.new_empty(self._share * self.rt.world_size, *shape)
        return whole, self.rt.all_gather(whole, mine)

    def _padded(self, whole: Tensor) -> Tensor:
        """(num_slices, ...) with zeros behind: (ranks * share, ...)."""
        missing = self._share * self.rt.world_size - self.num_slices
        return torch.cat([whole, whole.new_zeros(missing, *self.slice_shape)]) if missing else whole.contiguous()

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


def stack_buckets(matrices: Sequence[nn.Parameter], rt: Runtime) -> list[Bucket]:
    """Matrices of one shape, in order, as stacks of about `BUCKET_BYTES` that every rank has a share of.

    One rank sends nothing and takes them all at once.
    """
    size = matrices[0].numel() * matrices[0].element_size()
    count = max(1, BUCKET_BYTES // (size * rt.world_size)) * rt.world_size if rt.world_size > 1 else len(matrices)
    return [Bucket(matrices[i : i + count], rt, is_stack=True) for i in range(0, len(matrices), count)]


class Reduction:
    """Sums buckets over ranks in one order for all, each as soon as its gradients are there.

    That order is the one in which the first step's backward made them on rank 0.
    """

    def __init__(self, buckets: Sequence[Bucket], rt: Runtime, dtype: torch.dtype | None) -> None:
        self.buckets, self.rt, self.dtype = list(buckets), rt, dtype
        self._order: list[int] | None = None
        self._arrived: list[int] = []  # buckets whose gradients are complete, in the first step
        self._missing = [0] * len(buckets)  # gradients that the running backward still owes
        self._is_last = False  # the running backward is the step's last
        self.num_begun = 0  # buckets on their way
        if rt.world_size > 1:
            for i, bucket in enumerate(buckets):
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(lambda _, i=i: self._note(i))

    def begin(self) -> None:
        """The next backward is the last of the step."""
        self._missing = [len(bucket.parameters) for bucket in self.buckets]
        self._arrived = []
        self._is_last = True

    def complete(self) -> None:
        """Begin whatever has not begun yet."""
        order = self._order or range(len(self.buckets))
        for i in order[self.num_begun :]:
            self.buckets[i].reduce(self.dtype)
        self.num_begun = 0
        self._is_last = False
        if self._order is None and len(self._arrived) > 0:
            self._order = self._agree(self._arrived)

    def unscale(self, scale: float) -> bool:
        """Divide all sums by the loss scale. Whether they are finite, every one on every rank."""
        finite = [told for bucket in self.buckets if (told := bucket.unscale(scale)) is not None]
        overflowed = bool(finite) and not bool(torch.stack(finite).all())
        return self.rt.max_number(float(overflowed)) == 0.0

    def finish(self) -> None:
        """Put what the owners have published in place."""
        for bucket in self.buckets:
            bucket.finish()

    def drop(self) -> None:
        """Forget the step's gradients."""
        for bucket in self.buckets:
            bucket.drop()
        self.num_begun = 0
        self._is_last = False

    def _note(self, i: int) -> None:
        """A gradient of bucket `i` is final, if this is the last backward."""
        if not self._is_last:
            return
        self._missing[i] -= 1
        if self._order is None:
            if self._missing[i] == 0:
                self._arrived.append(i)
            return
        while self.num_begun < len(self._order) and self._missing[self._order[self.num_begun]] == 0:
            self.buckets[self._order[self.num_begun]].reduce(self.dtype)
            self.num_begun += 1

    def _agree(self, arrived: list[int]) -> list[int]:
        """Rank 0's order on all ranks; what never arrives comes last."""
        mine = arrived + [i for i in range(len(self.buckets)) if i not in arrived]
        order = torch.tensor(mine, device=self.rt.device)
        return [int(i) for i in self.rt.broadcast(order)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one behind the other along dim 0."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
