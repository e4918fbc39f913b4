"""Rows of an epoch in shuffled windows, drawn row by row.

The parts of a long document are consecutive rows, and would fill a batch of their own. So rows are shuffled among some
million tokens of their neighbours: a window. Its rows depend on the position before it alone, and to draw it again from
there is how a run goes on in the middle of one.

A window drawn at once keeps a training step waiting for most of a second. So the next one grows by a row (`draw_row`)
with each row of this one that is handed out, and is ready when its turn comes (`take`). Only an epoch's last window is
shorter than the one after it, which then has to catch up.
"""

from array import array
from collections import deque
from random import Random
from typing import Any

from nanochat.common import UserError
from nanochat.dataset import Split
from nanochat.packing import BestFitPacker, Row
from nanochat.tokenizer import Tokenizer

TOKENIZE_DOCUMENTS = 128  # documents tokenised at a time


class Windows:
    """Endless windows over a split's documents; each epoch shuffles them anew."""

    def __init__(self, split: Split, tokenizer: Tokenizer, capacity: int, seed: int, window_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._seed = seed
        self._window_tokens = window_tokens
        self._blocks = split.blocks()
        self._where = ", ".join(source.path.name for source in split.sources[:3])
        self._packer = BestFitPacker(capacity, "cut", bos=tokenizer.bos)
        self._texts: list[str] | None = None  # the current block's, shuffled; None: not read yet
        self._tokenized: deque[array[int]] = deque()  # of them, those from _document on that are tokenised
        self._start: dict[str, Any] | None = None  # position before the window that is being drawn; None: not begun
        self._rows: list[Row] = []  # of that window
        self._go_to(epoch=0, block=0, document=0)

    def position(self) -> dict[str, Any]:
        """Where the next document is taken from, and those that wait in the packer."""
        return {"epoch": self._epoch, "block": self._block, "document": self._document, **self._packer.state()}

    def go_back(self, position: dict[str, Any]) -> None:
        """Draw next what was drawn next at `position`."""
        self._packer.load_state(position)
        self._go_to(int(position["epoch"]), int(position["block"]), int(position["document"]))

    def draw_row(self) -> bool:
        """One more row for the window; False where it has all. After an error it can be called again."""
        if self._start is None:
            if not self._fill():
                self._go_to(self._epoch + 1, 0, 0)
            if not self._fill():
                raise UserError(f"{self._where}: no documents on the train side; give more text")
            self._start = self.position()
        if len(self._rows) * self._capacity >= self._window_tokens or not self._fill():
            return False
        self._rows.append(self._packer.next_row())
        return True

    def take(self) -> tuple[dict[str, Any], list[Row]]:
        """The window and the position before it; what is missing of it is drawn now."""
        while self.draw_row():
            pass
        assert self._start is not None
        start, rows = self._start, self._rows
        where = (start[name] for name in ("epoch", "block", "document"))
        Random(" ".join(map(str, (self._seed, *where)))).shuffle(rows)
        self._start, self._rows = None, []
        return start, rows

    def _go_to(self, epoch: int, block: int, document: int) -> None:
        """Stand before a document: its place in its shuffled block, and the block's place in the shuffled epoch."""
        self._epoch = epoch
        self._block = block
        self._document = document
        self._order = list(range(len(self._blocks)))
        Random(f"{self._seed} {epoch}").shuffle(self._order)
        self._texts, self._start = None, None
        self._tokenized, self._rows = deque(), []

    def _fill(self) -> bool:
        """Fill the packer up, from this epoch only; False once the epoch is used up."""
        while not self._packer.is_full and (ids := self._next_document()) is not None:
            self._packer.push(ids)
        return len(self._packer) > 0

    def _next_document(self) -> "array[int] | None":
        """The tokens of this epoch's next document; None at its end."""
        while not self._tokenized:
            if self._block == len(self._order):
                return None
            texts = self._block_texts()
            some = texts[self._document : self._document + TOKENIZE_DOCUMENTS]
            self._tokenized.extend(self._tokenizer.encode_arrays(some, prepend=self._tokenizer.bos))
            if not some:
                self._block += 1
                self._document = 0
                self._texts = None
        self._document += 1
        return self._tokenized.popleft()

    def _block_texts(self) -> list[str]:
        if self._texts is None:
            index = self._order[self._block]
            texts = self._blocks[index].read()
            Random(f"{self._seed} {self._epoch} {index}").shuffle(texts)
            self._texts = texts
        return self._texts
