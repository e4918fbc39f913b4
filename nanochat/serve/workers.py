"""Who does the work: a bounded waiting line, and one thread per engine that takes from it.

A request becomes a `Generation`, which waits, runs and ends with exactly one `Finish`, whatever happens:

    submit ──> waiting line ──> a worker's thread: prompt, tokens ──> emit(Delta), emit(Delta), ..., emit(Finish)
       └─ Busy when the line is full       └─ looks before every step whether it was cancelled

Nobody holds a worker but the worker's own thread, so none can be lost: a client that leaves only sets a mark
(`cancel`), and the thread is free one step of the model later, which is one token or one chunk of a long prompt; a
client that still waits leaves the line at once. A generation that fails takes nobody else down: its client is told, the
log says why, and the thread goes on. `emit` is called from the worker's thread and must not block. The text of
conversations is never logged.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from nanochat.chat import Part, PartType, ReplyReader, prompt_room, render_for_completion
from nanochat.common import printable
from nanochat.engine import Engine
from nanochat.serve.requests import ChatRequest
from nanochat.tokenizer import Tokenizer
from nanochat.tools import CalculatorHook

MAX_WAITING = 16  # requests in the line; the next one is told to come back

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delta:
    """Text that was added to part number `index` of an answer; a new index begins a new part."""

    index: int
    type: PartType
    text: str


@dataclass(frozen=True)
class Finish:
    """The end of an answer."""

    reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int = 0
    completion_tokens: int = 0


Emit = Callable[[Delta | Finish], None]


class Busy(Exception):
    """The line is full. retry_after_s: when a place may be free."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the model is busy and its waiting line is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Stopped(Exception):
    """No worker is running (any more)."""


class Generation:
    """One answer on its way."""

    def __init__(self, request: ChatRequest, emit: Emit) -> None:
        self.request, self.emit = request, emit
        self.is_cancelled = threading.Event()


class Workers:
    """One thread per engine and the line before them. `start` it, and `close` it in the end."""

    def __init__(self, engines: Sequence[Engine], tokenizer: Tokenizer, max_waiting: int = MAX_WAITING) -> None:
        self.tokenizer, self.max_waiting = tokenizer, max_waiting
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[Generation] = deque()
        self._running: set[Generation] = set()
        self._counts = {"stop": 0, "length": 0, "cancelled": 0, "error": 0, "refused": 0, "tokens": 0}
        self._mean_s = 1.0  # of a generation, the recent ones counting most
        self._is_open = False
        self._num_alive = 0  # threads that have begun and not left
        self._engines = list(engines)
        self._threads = [threading.Thread(target=self._work, args=(engine,), daemon=True) for engine in engines]

    def start(self) -> None:
        with self._changed:
            self._is_open, self._num_alive = True, len(self._threads)
        for thread in self._threads:
            thread.start()

    def close(self, drain_s: float = 0.0) -> None:
        """Take nothing new and send the line away; what runs may go on for `drain_s`. The threads have ended then."""
        with self._changed:
            self._is_open = False
            waiting = list(self._waiting)
            self._changed.notify_all()
        for generation in waiting:
            self.cancel(generation)
        deadline = time.monotonic() + drain_s
        for thread in self._started:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            running = list(self._running)
        for generation in running:
            self.cancel(generation)
        for thread in self._started:
            thread.join()

    @property
    def context_tokens(self) -> int:
        """The longest prompt and answer together."""
        return min(engine.model.config.sequence_len for engine in self._engines)

    @property
    def _started(self) -> list[threading.Thread]:
        return [thread for thread in self._threads if thread.ident is not None]

    @property
    def num_ready(self) -> int:
        """Threads that take requests."""
        with self._changed:
            return self._num_alive if self._is_open else 0

    def submit(self, request: ChatRequest, emit: Emit) -> Generation:
        """Put a request in the line. Raises Busy when it is full, Stopped when nobody works on it."""
        with self._changed:
            if not self.num_ready:
                raise Stopped
            idle = self.num_ready - len(self._running)
            if len(self._waiting) >= self.max_waiting + max(0, idle):
                self._counts["refused"] += 1
                raise Busy(max(1, math.ceil(self._mean_s * (len(self._waiting) + 1) / self.num_ready)))
            generation = Generation(request, emit)
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a generation: at once if it waits, after the model's next step if it runs. Harmless when it is over."""
        generation.is_cancelled.set()
        with self._changed:
            was_waiting = generation in self._waiting
            if was_waiting:
                self._waiting.remove(generation)
        if was_waiting:
            self._end(generation, Finish("cancelled"))

    def stats(self) -> dict[str, int]:
        """Workers, those at work, the line, and how all generations so far have ended."""
        with self._changed:
            now = {"workers": self.num_ready, "busy": len(self._running), "waiting": len(self._waiting)}
            return {**now, "max_waiting": self.max_waiting, **self._counts}

    # In the worker's thread ----------------------------------------------------------------------------------------

    def _work(self, engine: Engine) -> None:
        try:
            while (generation := self._next()) is not None:
                self._run(engine, generation)
        finally:
            self._leave()

    def _next(self) -> Generation | None:
        """The first in the line, as soon as there is one; None when the workers close."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._is_open)
            if not self._is_open:
                return None
            generation = self._waiting.popleft()
            self._running.add(generation)
            return generation

    def _run(self, engine: Engine, generation: Generation) -> None:
        started = time.monotonic()
        finish = Finish("error")
        try:
            finish = self._generate(engine, generation)
        except Exception as error:  # as broad as can be: whatever went wrong here, the next generation may do
            logger.exception("a generation failed: %s", printable(f"{type(error).__name__}: {error}")[:300])
        finally:
            with self._changed:
                self._running.discard(generation)
                self._mean_s += 0.2 * (time.monotonic() - started - self._mean_s)
            self._end(generation, finish)

    def _generate(self, engine: Engine, generation: Generation) -> Finish:
        """Answer, emitting each token's text. The oldest turns are forgotten where the context is too short."""
        request, is_cancelled = generation.request, generation.is_cancelled.is_set
        if is_cancelled():
            return Finish("cancelled")
        context = engine.model.config.sequence_len
        room = prompt_room(context, request.max_tokens)
        prompt = render_for_completion(self.tokenizer, {"messages": request.messages}, room)
        limit = min(request.max_tokens, context - len(prompt))
        reader = ReplyReader(self.tokenizer)
        num_tokens = 0
        hooks = [CalculatorHook(self.tokenizer)]
        for token in engine.generate(prompt, limit, request.sampling, hooks=hooks, should_stop=is_cancelled):
            num_tokens += 1
            _emit_parts(generation, reader, reader.push(token.token_id))
        if is_cancelled():
            return Finish("cancelled", len(prompt), num_tokens)
        _emit_parts(generation, reader, reader.flush())
        return Finish("stop" if num_tokens < limit else "length", len(prompt), num_tokens)

    def _end(self, generation: Generation, finish: Finish) -> None:
        with self._changed:
            self._counts[finish.reason] += 1
            self._counts["tokens"] += finish.completion_tokens
        generation.emit(finish)

    def _leave(self) -> None:
        """The thread ends. Whoever waits for the last one need not wait for ever."""
        with self._changed:
            self._num_alive -= 1
            if self._num_alive and self._is_open:
                return
            self._is_open = False
            left, self._waiting = list(self._waiting), deque()
        for generation in left:
            self._end(generation, Finish("error"))


def _emit_parts(generation: Generation, reader: ReplyReader, new: Sequence[Part]) -> None:
    """Emit what the reader just returned; the last of it belongs to its last part."""
    first = len(reader.parts) - len(new)
    for index, part in enumerate(new, start=first):
        generation.emit(Delta(index, part["type"], part["text"]))
