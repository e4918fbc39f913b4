"""Who does the work for one model: a bounded waiting line, and one thread per engine that writes many answers at once.

An answer is a `Generation`, which waits, runs and ends with exactly one `Finish`, whatever happens:

    submit ──> waiting line ──> a row of an engine, stepped by its thread ──> emit(Delta), ..., emit(Finish)
       └─ Busy when the line is full       └─ looked at between two steps: cancelled? stopped? done?

A thread's life is a loop: take from the line what there are rows for, drop what was cancelled, let the engine do one
step (a token for every row, or a chunk of a prompt), pass on what came. Nobody holds a row but that thread, so none can
be lost: a client that leaves only sets a mark (`cancel`), and its row is free one step later; a client that still waits
leaves the line at once. A generation that fails takes nobody else down, a step that fails takes down those that ran in
it: their clients are told, the log says why, and the thread goes on. `emit` is called from the engine's thread and must
not block. The text of conversations is never logged.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nanochat.common import printable
from nanochat.engine import Engine, Sampling, Token, ToolHook
from nanochat.engine import Sequence as Row
from nanochat.serve.limits import MAX_WAITING, told
from nanochat.serve.writing import Delta, Finish, Reason, Writer
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Emit = Callable[[Delta | Finish], None]


class Busy(Exception):
    """The line is full. retry_after_s: when a place may be free."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(told("max_waiting", given=retry_after_s))
        self.retry_after_s = retry_after_s


class Stopped(Exception):
    """No worker is running (any more)."""


@dataclass(frozen=True)
class Task:
    """An answer to be written: number `choice` of its request, sample number `sample` of its prompt.

    echo_from: where in the prompt its echo begins, None for no echo.
    """

    choice: int
    sample: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    writer: Writer
    hook: ToolHook | None = None
    echo_from: int | None = None

    @property
    def tells_echo(self) -> bool:
        """Whether the echo comes with log-probabilities."""
        return self.echo_from is not None and self.sampling.top_logprobs is not None


class Generation:
    """One answer on its way."""

    def __init__(self, task: Task, emit: Emit) -> None:
        self.task, self.emit = task, emit
        self.is_cancelled = threading.Event()
        self.row: Row | None = None  # once it runs
        self.is_over = False
        self.num_tokens = 0
        self.began = self.first = self.last = 0.0  # of running, and of the first and last token

    def write(self, token: Token) -> None:
        """Take a token and emit what it lets out."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.num_tokens += 1
        for delta in self.task.writer.push(token):
            self.emit(delta)

    def flush(self) -> None:
        """Emit what was held back until the end."""
        for delta in self.task.writer.flush():
            self.emit(delta)

    def finish(self) -> Finish | None:
        """How it has ended, or None where it goes on."""
        assert self.row is not None
        if self.is_cancelled.is_set():
            return self.ended("cancelled")
        if self.task.writer.is_stopped:
            return self.ended("stop")
        return self.ended(self.row.finish) if self.row.finish else None

    def ended(self, reason: Reason) -> Finish:
        cached = self.row.num_cached if self.row else 0
        seconds = self.last - self.first
        return Finish(self.task.choice, reason, len(self.task.prompt), self.num_tokens, cached, seconds)


class Workers:
    """A model's engines, one thread for each, and the line before them. `start` it, and `close` it in the end.

    name: what clients call the model.
    """

    def __init__(
        self, engines: Sequence[Engine], tokenizer: Tokenizer, name: str = "nanochat", max_waiting: int = MAX_WAITING
    ) -> None:
        self.tokenizer, self.name, self.max_waiting = tokenizer, name, max_waiting
        self.context_tokens = min(engine.model.config.sequence_len for engine in engines)  # prompt and answer together
        self._rows_each = min(engine.max_rows for engine in engines)
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[Generation] = deque()
        self._running: set[Generation] = set()
        self._counts = {"stop": 0, "length": 0, "cancelled": 0, "error": 0, "refused": 0, "tokens": 0}
        self._mean_s = 1.0  # of a generation, the recent ones counting most
        self._is_open = False
        self._num_alive = 0  # threads that have begun and not left
        self._threads = [threading.Thread(target=self._work, args=(engine,), daemon=True) for engine in engines]

    def start(self) -> None:
        with self._changed:
            self._is_open, self._num_alive = True, len(self._threads)
        for thread in self._threads:
            thread.start()

    def stop_taking(self) -> None:
        """Take nothing new and send the line away; what runs goes on."""
        with self._changed:
            self._is_open = False
            waiting = list(self._waiting)
            self._changed.notify_all()
        for generation in waiting:
            self.cancel(generation)

    def close(self) -> None:
        """End what runs, and the threads."""
        self.stop_taking()
        with self._changed:
            running = list(self._running)
        for generation in running:
            self.cancel(generation)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @property
    def capacity(self) -> int:
        """Answers that can be written and waited for at once."""
        return self.max_waiting + self._rows_each * len(self._threads)

    @property
    def num_ready(self) -> int:
        """Threads that take requests."""
        with self._changed:
            return self._num_alive if self._is_open else 0

    @property
    def num_running(self) -> int:
        """Answers that have a row."""
        with self._changed:
            return len(self._running)

    def check_room(self, count: int = 1) -> None:
        """Raise Busy where the line has no room for `count` answers, Stopped where nobody works on it."""
        with self._changed:
            if not self.num_ready:
                raise Stopped
            num_rows = self._rows_each * self._num_alive
            free = max(0, num_rows - len(self._running))
            if len(self._waiting) + count > self.max_waiting + free:
                self._counts["refused"] += 1
                raise Busy(max(1, math.ceil(self._mean_s * (len(self._waiting) + count) / num_rows)))

    def submit(self, tasks: Sequence[Task], emit: Emit) -> list[Generation]:
        """Put all answers of a request in the line, or none: raises what `check_room` does."""
        with self._changed:
            self.check_room(len(tasks))
            generations = [Generation(task, emit) for task in tasks]
            self._waiting.extend(generations)
            self._changed.notify_all()
        return generations

    def cancel(self, generation: Generation) -> None:
        """End a generation: at once if it waits, after the model's next step if it runs. Harmless when it is over."""
        generation.is_cancelled.set()
        with self._changed:
            was_waiting = generation in self._waiting
            if was_waiting:
                self._waiting.remove(generation)
        if was_waiting:
            self._end(generation, generation.ended("cancelled"))

    def stats(self) -> dict[str, int]:
        """Workers and their rows, those at work, the line, and how all generations so far have ended."""
        with self._changed:
            rows = self._rows_each * self.num_ready
            now = {"workers": self.num_ready, "rows": rows, "busy": len(self._running), "waiting": len(self._waiting)}
            return {**now, "max_waiting": self.max_waiting, **self._counts}

    # In an engine's thread -----------------------------------------------------------------------------------------

    def _work(self, engine: Engine) -> None:
        running: dict[Row, Generation] = {}
        try:
            while self._admit(engine, running):
                self._step(engine, running)
                self._settle(engine, running)
        finally:
            self._leave(running)

    def _admit(self, engine: Engine, running: dict[Row, Generation]) -> bool:
        """Give rows to the first in the line; wait while there is nothing to do. False when the workers close."""
        with self._changed:
            self._changed.wait_for(lambda: running or self._waiting or not self._is_open)
            share = math.ceil(len(self._waiting) / self._num_alive)  # the other engines have rows too
            admitted = [self._waiting.popleft() for _ in range(min(share, engine.max_rows - len(running)))]
            self._running.update(admitted)
            is_needed = bool(running or admitted or self._is_open)
        for generation in admitted:
            with self._telling(engine, running, [generation]):
                self._begin(engine, running, generation)
        return is_needed

    def _begin(self, engine: Engine, running: dict[Row, Generation], generation: Generation) -> None:
        """The prompt's echo, if asked for, and a row. Who has left meanwhile, or wants nothing more, gets no row."""
        task, generation.began = generation.task, time.monotonic()
        if generation.is_cancelled.is_set():
            self._end(generation, generation.ended("cancelled"))
            return
        if task.echo_from is not None:
            generation.emit(self._echo(engine, task, task.echo_from))
        if task.max_tokens:
            generation.row = engine.add(task.prompt, task.max_tokens, task.sampling, task.hook, row=task.sample)
            running[generation.row] = generation
        else:
            self._end(generation, generation.ended("length"))

    def _step(self, engine: Engine, running: dict[Row, Generation]) -> None:
        """A token for every row, or a piece of a prompt."""
        stepped: list[tuple[Row, Token]] = []
        with self._telling(engine, running, list(running.values())):
            stepped += engine.step() if running else []
        for row, token in stepped:
            if generation := running.get(row):
                with self._telling(engine, running, [generation]):
                    generation.write(token)

    def _settle(self, engine: Engine, running: dict[Row, Generation]) -> None:
        """Take leave of those that have ended."""
        for row, generation in list(running.items()):
            with self._telling(engine, running, [generation]):
                finish = generation.finish()
                if finish is None:
                    continue
                del running[row]
                if row.finish is None:
                    engine.remove(row)
                if finish.reason != "cancelled":
                    generation.flush()
                if row.finish == "stop" and generation.task.tells_echo:
                    generation.emit(Delta(finish.choice, 0, "text", "", (self._ending(engine, row),)))
                self._end(generation, finish)

    @contextmanager
    def _telling(
        self, engine: Engine, running: dict[Row, Generation], concerned: Sequence[Generation]
    ) -> Iterator[None]:
        """What goes wrong inside ends the generations it concerns, and nobody else."""
        try:
            yield
        except Exception as error:  # as broad as can be: whatever went wrong here, the next generation may do
            logger.exception("a generation failed: %s", printable(f"{type(error).__name__}: {error}")[:300])
            for generation in concerned:
                if generation.row is not None and running.pop(generation.row, None) is not None:
                    engine.remove(generation.row)
                self._end(generation, generation.ended("error"))

    def _echo(self, engine: Engine, task: Task, start: int) -> Delta:
        """The prompt itself, with what the model thinks of its tokens where that is asked for."""
        tokens = engine.score(task.prompt, task.sampling.top_logprobs or 0)[start:] if task.tells_echo else []
        return Delta(task.choice, 0, "text", self.tokenizer.decode(task.prompt[start:]), tuple(tokens))

    @staticmethod
    def _ending(engine: Engine, row: Row) -> Token:
        """The token that ended a text. Who asks for a text's tokens counts on it: one more than the prompt's at least.

        The engine does not say which of its stop tokens it was: the likeliest, unless it was sampled.
        """
        ends = [engine.score([*row.ids, stop], row.sampling.top_logprobs or 0)[-1] for stop in engine.stop_ids]
        return max(ends, key=lambda token: token.logprob or 0.0)

    def _end(self, generation: Generation, finish: Finish) -> None:
        with self._changed:
            if generation.is_over:
                return
            generation.is_over = True
            if generation in self._running:
                self._running.remove(generation)
                self._mean_s += 0.1 * (time.monotonic() - generation.began - self._mean_s)
            self._counts[finish.reason] += 1
            self._counts["tokens"] += finish.completion_tokens
        generation.emit(finish)

    def _leave(self, running: dict[Row, Generation]) -> None:
        """The thread ends, and with it what it ran. The last one sends the line away: nobody need wait for ever."""
        with self._changed:
            self._num_alive -= 1
            left = list(running.values())
            if not self._num_alive or not self._is_open:
                self._is_open = False
                left += self._waiting
                self._waiting.clear()
        for generation in left:
            self._end(generation, generation.ended("error"))
