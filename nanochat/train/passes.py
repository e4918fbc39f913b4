"""The passes of a step: how many rows the device takes at once, and what happens when they turn out to be too many.

    passes = Passes(loader, rt, rows, rows_per_step, sequence_len)
    passes.rehearse(loss_fn, optimizer)
    loss = passes.train(loss_fn, optimizer, plan.at(step.index), step.index)

The rows come from a forecast or a flag, and both can be wrong. So whatever a process alone finds no memory for before
its first step is done is begun again with half the rows, as often as it takes. A step stays the same rows in the same
order, in more passes: the run is from its first step one that was started with the smaller number. Once a step has gone
through, a later one that finds no memory is an error, since something else has taken it.

Ranks must not part ways: one that has no memory leaves its step at a place where the others wait for it. Therefore
several ranks rehearse before the first evaluation and step, each for itself with made-up tokens, ask each other
afterwards, and halve together. The rehearsal holds what the passes of a step hold: two where there are several, the
second on top of the first one's gradients. For what only comes later, such as the optimizer's update, several ranks
that find no memory end with an error.
"""

import gc
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from nanochat.common import LostRank, plural, print0
from nanochat.config import ModelConfig
from nanochat.forecast import AHEAD, USABLE, Setup, in_passes
from nanochat.loader import Batch
from nanochat.memory import free_memory_bytes, is_out_of_memory, resident_bytes
from nanochat.optim import MuonAdamW
from nanochat.parallel import Compiled, Runtime
from nanochat.planning import derived_rows
from nanochat.precision import dtype_name
from nanochat.prefetch import Prefetcher
from nanochat.scaling import Multipliers, device_batch_rows
from nanochat.train.step import NO_TARGETS, LossFn, Skipped, train_step

Result = TypeVar("Result")

CPU_USABLE = 0.8  # of what is free: other programs have a right to some, and the forecast may be wrong


class SizedLoader(Protocol):
    """A stream of batches whose rows per batch can be changed."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def resize(self, batch_size: int) -> None: ...


class Passes:
    """The batches of a run, as `loader` gives them from now on. rows: of a pass, at present; count: passes of a step.

    To be closed.
    """

    def __init__(
        self, loader: SizedLoader, rt: Runtime, rows: int, rows_per_step: int, sequence_len: int, is_given: bool = False
    ) -> None:
        assert rows_per_step % rows == 0
        self.rows = rows
        self._loader, self._rt, self._rows_per_step, self._sequence_len = loader, rt, rows_per_step, sequence_len
        self._asked = f" (--device-batch-size={rows})" if is_given else ""
        self._is_proven = False  # a step has gone through
        loader.resize(rows)
        self._batches = self._drawn_ahead()

    @property
    def count(self) -> int:
        return self._rows_per_step // self.rows

    def describe(self) -> str:
        """For people."""
        return f"{plural(self.rows, 'row')} x {plural(self.count, 'pass')}"

    def rehearse(self, loss_fn: LossFn, optimizer: MuonAdamW) -> None:
        """Halve the rows on all ranks until passes of them fit on each. One rank alone finds that out as it goes."""
        while self._rt.world_size > 1:
            lack = self._lack(loss_fn)
            optimizer.zero_grad()
            if not self._rt.max_number(lack is not None):
                return
            if self.rows == 1:
                raise LostRank("") if lack is None else self._refusal(lack) from lack
            self._halve(self._batches.state())

    def train(self, loss_fn: LossFn, optimizer: MuonAdamW, multipliers: Multipliers, index: int) -> float | Skipped:
        """The optimizer step of this number (`train_step`), in passes that fit."""

        def step() -> float | Skipped:
            return train_step(loss_fn, self._batches, optimizer, multipliers, self._rt, self.count, index)

        loss = self.fit(step, optimizer)
        self._is_proven = self._is_proven or loss != NO_TARGETS
        return loss

    def fit(self, work: Callable[[], Result], optimizer: MuonAdamW | None = None) -> Result:
        """What `work` returns, which looks at `rows` when it is called: it may be called again, with fewer.

        Raises MemoryError where it finds no memory and fewer rows are no way out.
        """
        while True:
            before = self._batches.state()
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                is_torn = optimizer is not None and optimizer.is_stepping  # it holds no activations, but new weights
                if self._is_proven or is_torn or self._rt.world_size > 1 or self.rows == 1:
                    raise self._refusal(error, is_torn) from error
            # Behind the handler: the error held the frames that held the activations.
            if optimizer is not None:
                optimizer.zero_grad()
            self._halve(before)

    def state(self) -> dict[str, Any]:
        """Position of the next batch."""
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._batches.load_state(state)

    def close(self) -> None:
        self._batches.close()

    def _drawn_ahead(self) -> Prefetcher:
        return Prefetcher(self._loader, self._rt.device, ahead=AHEAD + self.count)

    def _halve(self, position: dict[str, Any]) -> None:
        """Half the rows, or the next number below that divides them; the stream goes on from `position`."""
        gc.collect()
        before, self.rows = self.rows, device_batch_rows(self.rows, at_most=self.rows // 2)
        print0(
            f"out of memory with {before} rows a pass{self._asked}: going on with {self.rows}, {self.count} passes a "
            "step; the batch and what is learned stay the same"
        )
        self._batches.close()
        self._loader.resize(self.rows)
        self._loader.load_state(position)
        self._batches = self._drawn_ahead()

    def _lack(self, loss_fn: LossFn) -> BaseException | None:
        """The error where passes of made-up tokens find no memory here. Says nothing to the other ranks.

        Inputs and targets are two tensors, as in training: the compiler would make a graph of its own for one twice.
        """
        shape = (self.rows, self._sequence_len)
        ids, targets = (torch.zeros(shape, dtype=torch.int64, device=self._rt.device) for _ in range(2))
        documents = torch.zeros(shape, dtype=torch.int32, device=self._rt.device)
        try:
            for _ in range(min(2, self.count)):
                loss_fn(ids, targets, documents).backward()
            self._rt.synchronize()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return error.with_traceback(None)  # which holds the activations
        return None

    def _refusal(self, cause: BaseException | None = None, is_torn: bool = False) -> MemoryError:
        told = " ".join(str(cause or "").split())
        where = f"rank {self._rt.rank}: {self._rt.device} is out of memory" + (f" ({told:.100})" if told else "")
        if is_torn:
            return MemoryError(
                f"{where} in the optimizer's update, which needs as much whatever the rows: lower --depth"
            )
        if self.rows == 1:
            return MemoryError(f"{where} with one row a pass; lower --max-seq-len or --depth, or use more memory")
        return MemoryError(f"{where} with {self.rows} rows a pass; go on with a lower --device-batch-size")


def choose_rows(
    config: ModelConfig,
    rows_per_step: int,
    rt: Runtime,
    loss_fn: LossFn,
    fp8_recipe: str | None = None,
    given: int | None = None,
) -> int:
    """Rows of a pass: `given` by a flag, else as `planning.derived_rows` has it, the same on all ranks.

    loss_fn: shows whether the model is compiled. Prints a line where memory is what decides, or is too small.
    """
    setup = Setup(
        config,
        rows=1,
        ranks=rt.world_size,
        dtype=dtype_name(rt.dtype),
        is_gpu=rt.device.type != "cpu",
        is_compiled=isinstance(loss_fn, Compiled),
        fp8_recipe=fp8_recipe,
    )
    usable = least_usable_bytes(rt)
    if given:
        needed = in_passes(setup, given, rows_per_step).total_bytes
        if usable is not None and needed > usable:
            print0(
                f"warning: --device-batch-size={given} needs about {needed / 1e9:.1f} GB, and {usable / 1e9:.1f} GB "
                "may be used; without the flag the run takes as many rows as fit"
            )
        return given
    rows = derived_rows(setup, rows_per_step, usable)
    if usable is not None and rows < (wanted := derived_rows(setup, rows_per_step, math.inf)):
        needed_gb, wanted_gb = (in_passes(setup, many, rows_per_step).total_bytes / 1e9 for many in (rows, wanted))
        print0(
            f"memory decides the rows of a pass: {rows}, which need about {needed_gb:.2f} GB, where {usable / 1e9:.2f} "
            f"GB may be used; {wanted} would need {wanted_gb:.2f} GB (--device-batch-size decides otherwise)"
        )
    return rows


def least_usable_bytes(rt: Runtime) -> float | None:
    """What every rank may hold on its device; None where unknown."""
    own = usable_bytes(rt)
    least = -rt.max_number(-math.inf if own is None else -own)
    return None if least == math.inf else least


def usable_bytes(rt: Runtime) -> float | None:
    """What this process may hold on its device, what it holds already included; None where unknown."""
    if rt.device.type in ("cuda", "xpu"):
        free, _ = getattr(torch, rt.device.type).mem_get_info(rt.device)
        return USABLE * (free + torch.accelerator.memory_reserved(rt.device))
    free_here = free_memory_bytes() if rt.device.type == "cpu" else None
    return None if free_here is None else CPU_USABLE * free_here / rt.world_size + resident_bytes()
