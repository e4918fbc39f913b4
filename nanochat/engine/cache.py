"""What was read before and may be asked again: the next turn of a conversation begins with all the earlier ones.

When a sequence ends, a copy of its row stays here together with its ids. A new prompt takes the copy that shares the
longest beginning with it. Where the copy goes on differently it is cut there, which a layer may or may not be able to
do (model/state.py): keys and values of the whole text always can, a ring of a window's can go back a little, and what
cannot go back at all serves only prompts that begin with all of it. The least recently used copies go when there are
too many bytes of them.
"""

from collections import OrderedDict
from collections.abc import Sequence as Several
from dataclasses import dataclass

from nanochat.model.state import DecodeState


@dataclass(frozen=True)
class Saved:
    """The state of a row that has read `ids` and can be cut to any number of them that is at least `shortest`."""

    ids: tuple[int, ...]
    state: DecodeState
    shortest: int

    def usable(self, prompt: Several[int]) -> int:
        """How many of the ids begin `prompt` and can be kept; 0 where none. Something is left to read."""
        length = min(common_length(self.ids, prompt), len(prompt) - 1)
        return length if length == len(self.ids) or length >= self.shortest else 0


class PrefixCache:
    """Rows by the ids that they have read; at most `max_bytes` of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._saved: OrderedDict[tuple[int, ...], Saved] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._saved)

    def find(self, prompt: Several[int]) -> tuple[Saved, int] | None:
        """The row of which the most can be kept for `prompt`, and how much."""
        best = max(self._saved.values(), key=lambda saved: saved.usable(prompt), default=None)
        if best is None or best.usable(prompt) == 0:
            return None
        self._saved.move_to_end(best.ids)
        return best, best.usable(prompt)

    def keep(self, new: Saved) -> None:
        """Keep a row, in place of those that it can be cut to."""
        num_bytes = new.state.num_bytes()
        if num_bytes > self.max_bytes:
            return
        for known in list(self._saved):
            if known == new.ids or (len(known) >= new.shortest and common_length(known, new.ids) == len(known)):
                self._drop(known)
        while self.num_bytes + num_bytes > self.max_bytes:
            self._drop(next(iter(self._saved)))
        self._saved[new.ids] = new
        self.num_bytes += num_bytes

    def _drop(self, ids: tuple[int, ...]) -> None:
        self.num_bytes -= self._saved.pop(ids).state.num_bytes()


def common_length(one: Several[int], other: Several[int]) -> int:
    """Of the longest common beginning.

    >>> common_length((1, 2, 3), (1, 2, 4, 5))
    2
    """
    length = min(len(one), len(other))
    if one[:length] == other[:length]:  # the usual case, and fast
        return length
    return next(place for place in range(length) if one[place] != other[place])
