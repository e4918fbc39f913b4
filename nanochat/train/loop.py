"""The training loop as an iterator: it counts, times and records; what happens in a step stays in the recipe.

    for step in Loop(...):
        if step.due(args.eval_every, at_start=True):
            with step.paused():
                step.log(val_bpb=...)
        if step.over:
            break
        step.log(loss=train_step(...))
    loop.check_completed()      # the last record, and what a signal asked for

Steps are numbered from 0; the step with index == total comes after the last update, so evaluation and saving stand
once, at the top. Paused time is not training time. A time budget holds start-up and training; under it the total is
re-estimated from the pace so far.
When the process is asked to stop (train/stop.py), the loop ends at the next step on all ranks, where a save is due.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from nanochat.loggers import Logger, Record
from nanochat.parallel import Runtime
from nanochat.train.step import Skipped
from nanochat.train.stop import StopRequest, stopped

SMOOTHING = 0.9  # of the reported loss


@dataclass
class Progress:
    """What a resumed loop must know; saved with every checkpoint."""

    steps: int = 0
    startup_s: float = 0.0  # of all processes of the run, until their first step
    train_s: float = 0.0
    elapsed_s: float = 0.0
    tokens: int = 0
    smooth_loss: float = 0.0
    smooth_weight: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add_loss(self, loss: float) -> float:
        """The debiased moving average after one more loss."""
        self.smooth_loss = SMOOTHING * self.smooth_loss + (1 - SMOOTHING) * loss
        self.smooth_weight = SMOOTHING * self.smooth_weight + (1 - SMOOTHING)
        return self.smooth_loss / self.smooth_weight


class Step:
    """One turn of the loop."""

    def __init__(self, index: int, total: int, progress: Progress, rt: Runtime) -> None:
        self.index, self.total, self.progress = index, total, progress
        self.last = index >= total
        self.stopping = False  # asked to end here; true on all ranks alike
        self.record: Record = {}
        self.paused_s = 0.0
        self._rt = rt

    def due(self, every: int, at_start: bool = False) -> bool:
        """Every `every` steps and at the end; at step 0 only if asked for. -1: never."""
        if every < 1:
            return False
        return self.last or (self.index % every == 0 and (self.index > 0 or at_start))

    def save_due(self, every: int) -> bool:
        """As `due`; and where the run is asked to stop, unless nothing has been learned yet."""
        return self.last or self.due(every) or (self.stopping and self.index > 0)

    @property
    def over(self) -> bool:
        """No update follows."""
        return self.last or self.stopping

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is not training time."""
        self._rt.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused_s += time.perf_counter() - start

    def log(self, **values: Any) -> None:
        """Add values to this step's record. A `loss` that is `Skipped` is recorded as that."""
        if "loss" in values:
            loss = values.pop("loss")
            if isinstance(loss, Skipped):
                values |= {"skipped": loss.reason}
            else:
                values |= {"loss_raw": loss, "loss": self.progress.add_loss(loss)}
        self.record |= values


class Loop:
    """Iterates over steps start..total. tokens_per_step and flops_per_token count what one update costs on all ranks.

    time_budget_s: stop when start-up and training have used this up, instead of after num_steps. began: when start-up
    did, a time of `time.perf_counter`; default now. grace_s: seconds that a signal leaves for the running step and a
    save; None: signals are not looked at.
    """

    def __init__(
        self,
        num_steps: int,
        start: int,
        rt: Runtime,
        loggers: Iterable[Logger] = (),
        progress: Progress | None = None,
        tokens_per_step: int = 0,
        flops_per_token: int = 0,
        time_budget_s: float | None = None,
        began: float | None = None,
        grace_s: float | None = None,
    ) -> None:
        self.num_steps, self.start, self.rt = num_steps, start, rt
        self.progress = progress or Progress()
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.time_budget_s = time_budget_s
        self._began = began
        self.loggers = list(loggers)
        self._durations: deque[float] = deque(maxlen=20)
        self._stop = StopRequest(grace_s, rt.is_main)
        self._signal = 0  # that the ranks agree on
        self._left_at: tuple[Step, float] | None = None  # the last step, and when it began
        self._has_ended = False

    def __iter__(self) -> Iterator[Step]:
        index = self.start
        if self._began is not None:
            self.progress.startup_s += time.perf_counter() - self._began
        self._stop.watch()
        try:
            while True:
                began = time.perf_counter()
                step = Step(index, self._total(index), self.progress, self.rt)
                step.stopping = self._must_stop(step)
                try:
                    yield step
                except GeneratorExit:  # the recipe broke out, as it does at the end, or has failed
                    self._left_at = (step, began) if step.over else None
                    raise
                if step.over:
                    self._left_at = (step, began)
                    self.check_completed()
                    return
                self._finish(step, began)
                index += 1
        finally:
            # What goes wrong in here is lost where a `break` came before, so the end is check_completed's.
            if self._left_at is None:
                self._close_loggers()
                if self.rt.world_size == 1:  # else torchrun's SIGTERM would cut short what is still to be told
                    self._stop.release()

    def _must_stop(self, step: Step) -> bool:
        """Whether any rank was asked to stop; a run at its last step ends as if it was not."""
        if not self._stop.is_watching:
            return False
        self._signal = int(self.rt.max_number(self._stop.received))
        return bool(self._signal) and not step.last

    def check_completed(self) -> None:
        """End the loop that the recipe has left: the last record, loggers. Raise Stopped if a signal has ended it."""
        if self._left_at is None or self._has_ended:
            return
        self._has_ended = True
        step, began = self._left_at
        if step.last:
            self._finish(step, began)
        self._close_loggers()
        self._stop.release()
        if step.stopping:
            raise stopped(self._signal, step.index)

    def _close_loggers(self) -> None:
        for logger in self.loggers:
            logger.close()

    def summary(self) -> Record:
        """What the run came to, for its report."""
        p = self.progress
        speed = p.tokens / p.train_s if p.train_s else None
        flops = p.tokens * self.flops_per_token
        clocks = {"startup_s": p.startup_s, "train_s": p.train_s, "tokens_per_s": speed}
        return {"steps": p.steps, "tokens": p.tokens, "flops": flops, **clocks}

    def _total(self, index: int) -> int:
        """Steps in all; under a time budget what the pace so far allows, the same on every rank."""
        if self.time_budget_s is None:
            return self.num_steps
        if self.progress.steps == 0:
            return max(index + 1, self.num_steps)  # the plan's guess
        recent_s = (
            statistics.median(self._durations) if self._durations else self.progress.train_s / self.progress.steps
        )
        used_s = self.progress.startup_s + self.progress.train_s
        left_s = self.rt.sum_number(self.time_budget_s - used_s) / self.rt.world_size
        pace_s = self.rt.sum_number(recent_s) / self.rt.world_size
        return index + max(0, round(left_s / pace_s))

    def _finish(self, step: Step, began: float) -> None:
        self.rt.synchronize()
        elapsed_s = time.perf_counter() - began
        train_s = elapsed_s - step.paused_s
        progress = self.progress
        progress.elapsed_s += elapsed_s
        if not step.last:
            progress.steps += 1
            progress.train_s += train_s
            progress.tokens += self.tokens_per_step
            self._durations.append(train_s)
        step.record = {"step": step.index, "num_steps": step.total, **step.record, **self._speed(step, train_s)}
        for logger in self.loggers:
            logger.log(step.record)

    def _speed(self, step: Step, train_s: float) -> Record:
        progress = self.progress
        speed: Record = {"tokens": progress.tokens, "train_s": progress.train_s, "elapsed_s": progress.elapsed_s}
        if step.last:
            return speed
        tokens_per_s = self.tokens_per_step / train_s
        speed |= {"step_s": train_s, "tokens_per_s": tokens_per_s, "flops": progress.tokens * self.flops_per_token}
        if self.rt.peak_flops:
            speed["mfu"] = tokens_per_s * self.flops_per_token / (self.rt.peak_flops * self.rt.world_size)
        if len(self._durations) > 1:  # the first step is far slower than the others
            speed["eta_s"] = (step.total - step.index - 1) * statistics.median(self._durations)
        return speed
