"""Tools that a model may call in the middle of its answer, on token ids.

A call of the calculator is written between `<|python_start|>` and `<|python_end|>`. `CalculatorHook` watches what one
row of generation samples, and when a call closes it returns the ids that must come next: the result, between
`<|output_start|>` and `<|output_end|>`.
"""

from nanochat.calculator import calculate
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

MAX_TOKENS = 256  # of one call; a longer expression is not even decoded


class CalculatorHook:
    """Watches the ids that one row of generation samples, and answers every closed call.

        hook.push(id)  ->  []                                             nothing to do
                       ->  [output_start, ...result..., output_end]       these ids must come next

    The ids that it asks for are not pushed back.

    Any other special token inside a call (the end of the answer, say) abandons it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._expression: list[int] | None = None  # ids of the open call, None outside of one
        self._special = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
        self._special_ids = frozenset(self._special.values())

    def push(self, token_id: int) -> list[int]:
        """Take the row's next sampled id; returns the ids to force after it."""
        if token_id == self._special["<|python_start|>"]:
            self._expression = []
        elif token_id == self._special["<|python_end|>"] and self._expression is not None:
            expression, self._expression = self._expression, None
            return [self._special["<|output_start|>"], *self._answer(expression), self._special["<|output_end|>"]]
        elif token_id in self._special_ids:
            self._expression = None
        elif self._expression is not None and len(self._expression) <= MAX_TOKENS:
            self._expression.append(token_id)
        return []

    def _answer(self, expression: list[int]) -> list[int]:
        too_long = len(expression) > MAX_TOKENS
        result = f"error: more than {MAX_TOKENS} tokens" if too_long else calculate(self._tokenizer.decode(expression))
        return self._tokenizer.encode(result)
