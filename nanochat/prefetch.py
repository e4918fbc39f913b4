"""Batches are drawn ahead of the training step, by a thread, and reach a GPU without making anybody wait.

    with Prefetcher(loader, rt.device) as batches:
        loss = train_step(loss_fn, batches, ...)
        run.save(step, model, optimizer, batches, ...)

The stream is the loader's, bit by bit. `ahead` batches are drawn or being drawn at any time, each with the loader's
state after it. Handing one out makes its state ours, so `state()` knows nothing of what was drawn ahead, and a run that
stops at any moment goes on exactly; what it had drawn ahead is drawn again.

To a GPU a batch goes through a ring of ahead + 1 page-locked staging buffers: from such memory a copy runs while the
processor goes on. It is only queued when the training step asks for it, so the buffer may be needed long after that,
and whoever writes the next batch into it too early changes what the step learns from. Hence an event behind each copy
in the GPU's queue, and the thread waits for it before it writes there again: mostly not at all, since the buffer comes
round only after all others. On other devices there is no ring.

An error reaches the training step in place of the batch it concerns, when those before it have been handed out. It
leaves the position where it was: who asks again starts from there.

Why a thread, not a process: tokenising (tiktoken) leaves the interpreter to others, and the rest copies arrays. A main
thread that never pauses waits 16 to 39 ns per token for the loader's, 2 to 4 % at a million tokens a second; with
tokens as Python numbers it was 49 to 176 ns. A process would cost memory, a second start and a way across for errors,
states and tokens.

Every rank draws the stream of all ranks and makes tensors of its own rows only. So each of eight ranks spends what one
alone does per token of the stream, and more ranks do not make it faster: 7.9 million tokens/s (two cores, vocabulary
4,096, rows of 2,048) is the ceiling of a whole run.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import cycle
from types import TracebackType
from typing import Any, Protocol

import torch

from nanochat.loader import Batch


class Loader(Protocol):
    """An endless stream of batches with a position. A state stays true whatever is drawn after it was taken."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Prefetcher:
    """A loader whose batches are drawn ahead and come on `device`. From now on nobody else may draw from `loader`.

    ahead: at least as many as a step asks for at once. To be closed; one that is forgotten ends its thread as well.
    """

    def __init__(self, loader: Loader, device: torch.device | str, ahead: int) -> None:
        assert ahead > 0
        self._loader = loader
        self._ahead = ahead
        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._ring = cycle([_Staging(self._device) for _ in range(ahead + 1)] if is_cuda else [None])
        self._drawn: deque[Future[_Drawn]] = deque()  # oldest first, drawn or on the way
        self._state = loader.state()  # after the last batch that was handed out
        self._is_loader_there = True  # where self._state is, when nothing is drawn ahead
        # Its future carries an error to whom it concerns, and the interpreter waits for it at exit: a daemon thread
        # would be cut off in the middle of a copy.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._draw_ahead()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        self._draw_ahead()
        future = self._drawn[0]  # and stays there while we wait, so that Ctrl-C loses nothing
        if future.exception() is not None:
            self._forget_drawn()
        drawn = future.result()
        self._drawn.popleft()
        self._state = drawn.state
        batch = drawn.batch.to(self._device) if drawn.staging is None else drawn.staging.send(drawn.batch)
        self._draw_ahead()
        return batch

    def state(self) -> dict[str, Any]:
        """The loader's, as if no batch had been drawn that was not handed out."""
        return dict(self._state)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state()` was taken. A state that the loader refuses changes nothing."""
        self._forget_drawn()
        self._loader.load_state(state)
        self._state = self._loader.state()
        self._is_loader_there = True
        self._draw_ahead()

    def close(self) -> None:
        """End the thread, after the batch it is drawing. `state()` still answers."""
        self._forget_drawn()
        self._thread.shutdown()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _draw_ahead(self) -> None:
        if not self._drawn and not self._is_loader_there:
            self._loader.load_state(self._state)
            self._is_loader_there = True
        while len(self._drawn) < self._ahead:
            self._drawn.append(self._thread.submit(_draw, self._loader, next(self._ring)))

    def _forget_drawn(self) -> None:
        """The thread rests, and the loader stands somewhere else than the stream."""
        for future in self._drawn:
            future.cancel()
        wait(self._drawn)
        self._drawn.clear()
        self._is_loader_there = False


class _Staging:
    """Page-locked memory of one batch on its way to a GPU. `fill` by the thread and `send` by its user take turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied = torch.cuda.Event(blocking=True)  # behind the last copy from here
        self._memory: Batch | None = None

    def fill(self, batch: Batch) -> Batch:
        """The batch in this memory, once nothing is copied from it any more."""
        self._copied.synchronize()
        if self._memory is None or self._memory.inputs.shape != batch.inputs.shape:
            with torch.cuda.device(self._device):  # a new thread stands on the first GPU, whatever the rank
                self._memory = batch.map(lambda tensor: torch.empty_like(tensor, pin_memory=True))
        self._memory.inputs.copy_(batch.inputs)
        self._memory.targets.copy_(batch.targets)
        self._memory.document_ids.copy_(batch.document_ids)
        return replace(self._memory, target_count=batch.target_count)

    def send(self, batch: Batch) -> Batch:
        """The batch on the GPU, for what is queued there from now on."""
        sent = batch.map(lambda tensor: tensor.to(self._device, non_blocking=True))
        self._copied.record(torch.cuda.current_stream(self._device))
        return sent


@dataclass(frozen=True)
class _Drawn:
    batch: Batch
    state: dict[str, Any]  # the loader's after it
    staging: _Staging | None  # where the batch lies


def _draw(loader: Loader, staging: _Staging | None) -> _Drawn:
    """In the thread: the next batch, its targets counted, and where the loader stands then."""
    batch = next(loader)
    batch = replace(batch, target_count=batch.num_targets())
    return _Drawn(batch if staging is None else staging.fill(batch), loader.state(), staging)
