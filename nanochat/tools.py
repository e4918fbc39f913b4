"""Tools that a model may call in the middle of its answer, on token ids.

A call is written between `<|python_start|>` and `<|python_end|>`. `CalculatorHook` watches what one row of generation
samples, and when a call closes it returns the ids that must come next: the output, between `<|output_start|>` and
`<|output_end|>`. What the calculator cannot read goes to the Python tool, where there is one: any function from a
program to its output. Whatever is wrong with a call, it gets an output that says so, in text.

One answer has a budget of calls and of output tokens, so that a model that calls for ever costs little. A call beyond
it is answered too, but nothing is run for it.
"""

from collections.abc import Callable

from nanochat.calculator import calculate, is_expression
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

MAX_TOKENS = 1024  # of one call; a longer one is not even decoded
MAX_CALLS = 16  # of one answer that are run
MAX_OUTPUT_TOKENS = 256  # of one output; the rest is cut off, and dots stand for it
MAX_OUTPUT_CHARS = 16 * MAX_OUTPUT_TOKENS  # of one output that are made tokens of
MAX_FORCED_TOKENS = 1024  # of all outputs of one answer: while a whole one may still come, calls are run
USED_UP = "error: this answer has used up its tool calls"


class CalculatorHook:
    """Watches the ids that one row of generation samples, and answers every closed call.

        hook.push(id)  ->  []                                             nothing to do
                       ->  [output_start, ...result..., output_end]       these ids must come next

    The ids that it asks for are not pushed back. python: answers the calls that are no expression of the calculator; it
    takes its own time, and raises nothing.

    Any other special token inside a call (the end of the answer, say) abandons it.
    """

    def __init__(self, tokenizer: Tokenizer, python: Callable[[str], str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._python = python
        self._call: list[int] | None = None  # ids of the open call, None outside of one
        self._calls_left = MAX_CALLS
        self._tokens_left = MAX_FORCED_TOKENS
        self._special = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
        self._special_ids = frozenset(self._special.values())

    def push(self, token_id: int) -> list[int]:
        """Take the row's next sampled id; returns the ids to force after it."""
        if token_id == self._special["<|python_start|>"]:
            self._call = []
        elif token_id == self._special["<|python_end|>"] and self._call is not None:
            call, self._call = self._call, None
            return [self._special["<|output_start|>"], *self._answer(call), self._special["<|output_end|>"]]
        elif token_id in self._special_ids:
            self._call = None
        elif self._call is not None and len(self._call) <= MAX_TOKENS:
            self._call.append(token_id)
        return []

    def _answer(self, call: list[int]) -> list[int]:
        """The ids of the output, after what they take has gone off the budget."""
        if not self._calls_left or self._tokens_left < MAX_OUTPUT_TOKENS:
            return self._tokenizer.encode(USED_UP)
        output = self._shortened(self._run(call))
        self._calls_left -= 1
        self._tokens_left -= len(output)
        return output

    def _run(self, call: list[int]) -> str:
        if len(call) > MAX_TOKENS:
            return f"error: more than {MAX_TOKENS} tokens"
        text = self._tokenizer.decode(call)
        return calculate(text) if self._python is None or is_expression(text) else self._python(text)

    def _shortened(self, output: str) -> list[int]:
        """Its ids if they are few enough, else those of its beginning and of three dots; no character is halved."""
        ids = self._tokenizer.encode(output[:MAX_OUTPUT_CHARS])
        if len(ids) <= MAX_OUTPUT_TOKENS and len(output) <= MAX_OUTPUT_CHARS:
            return ids
        dots = self._tokenizer.encode("...")
        ids = ids[: MAX_OUTPUT_TOKENS - len(dots)]
        while ids and self._tokenizer.decode(ids).endswith("\ufffd"):
            ids.pop()
        return ids + dots
