"""Which sequences stand in the rows of the model's memory, and what the next forward does for them.

    waiting ──> reading: one at a time, its prompt in chunks ──> running: one token each forward ──> finished

The running ones stand in rows 0 to n - 1, so that they are a batch without any gap, and the one that is reading stands
in row n. Whoever leaves is replaced by the last one: that copies one row and leaves the others where they are. Between
two tokens of those that run, prompts of at most PREFILL_CHUNK tokens are read, or one chunk: a long prompt never holds
up the others for longer.
"""

from collections import deque
from collections.abc import Callable

from nanochat.engine.sequence import Sequence

PREFILL_CHUNK = 512  # prompt tokens per forward: bounds what it holds up, and the memory of a long prompt's attention


class Scheduler:
    """The sequences of an engine with `max_rows` rows. move: copies a row, with so many tokens, onto another one."""

    def __init__(self, max_rows: int, move: Callable[[int, int, int], None]) -> None:
        self.max_rows, self._move = max_rows, move
        self.waiting: deque[Sequence] = deque()
        self.reading: Sequence | None = None
        self.running: list[Sequence] = []
        self._num_read = 0  # prompt tokens since the last token of the running ones

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    def take(self) -> Sequence | None:
        """The sequence that begins to read now, in row len(running), if one waits and a row is free."""
        if self.reading is not None or not self.waiting or len(self.running) >= self.max_rows:
            return None
        self.reading = self.waiting.popleft()
        return self.reading

    def next_chunk(self) -> tuple[int, ...]:
        """The ids that are read by the next forward; none if it is to write."""
        if self.reading is None:
            return ()
        chunk = self.reading.prompt[self.reading.num_read :][:PREFILL_CHUNK]
        if self.running and self._num_read and self._num_read + len(chunk) > PREFILL_CHUNK:
            return ()
        return chunk

    def note_read(self, num_tokens: int) -> None:
        """So many tokens of a prompt were read."""
        assert self.reading is not None
        self.reading.num_read += num_tokens
        self._num_read += num_tokens

    def note_written(self) -> None:
        """Every running sequence's newest token was read, and its next one is about to come."""
        for sequence in self.running:
            sequence.num_read += 1
        self._num_read = 0

    def run(self) -> list[Sequence]:
        """The one that has read its prompt runs, and so do those next in line that ask the same, for which its row is
        copied. Returns them."""
        first, self.reading = self.reading, None
        assert first is not None
        start = len(self.running)
        self.running.append(first)
        while self.waiting and len(self.running) < self.max_rows and self.waiting[0].prompt == first.prompt:
            twin = self.waiting.popleft()
            twin.num_read, twin.num_cached, twin.shortest = first.num_read, first.num_cached, first.shortest
            self._move(start, len(self.running), first.num_read)
            self.running.append(twin)
        return self.running[start:]

    def leave(self, sequence: Sequence) -> None:
        """A sequence gives up its place in the line or its row."""
        if sequence is self.reading:
            self.reading = None
        elif sequence in self.running:
            place, last = self.running.index(sequence), len(self.running) - 1
            if place != last:
                self._move(last, place, self.running[last].num_read)
                self.running[place] = self.running[last]
            self.running.pop()
            if self.reading is not None:
                self._move(last + 1, last, self.reading.num_read)
        else:
            self.waiting.remove(sequence)
