"""Log-probabilities in the three shapes they are asked for: OpenAI's chat, OpenAI's completions, and our page's.

A token's text is what its bytes decode to; one that holds only a part of a character is spelled `bytes:\\xf0\\x9f`, as
OpenAI does it, so that no two tokens look alike.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.chat import TextStream
from nanochat.engine import Token
from nanochat.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have; OpenAI's number


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """What a token looks like alone."""
    data = tokenizer.bytes_of(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)


def shown_token(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """For the page's view of tokens."""
    top = [[token_text(tokenizer, token_id), finite(logprob)] for token_id, logprob in token.top]
    text = token_text(tokenizer, token.token_id)
    return {"text": text, "logprob": finite(token.logprob), "top": top, "forced": token.is_forced}


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token]) -> dict[str, Any]:
    """OpenAI's shape for chats. Tokens that a tool has put there have none."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(tokenizer, token_id), list(tokenizer.bytes_of(token_id))
        return {"token": text, "logprob": finite(logprob), "bytes": data}

    chosen = [(token, token.logprob) for token in tokens if token.logprob is not None]
    content = [
        {**entry(token.token_id, logprob), "top_logprobs": [entry(*other) for other in token.top]}
        for token, logprob in chosen
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """OpenAI's shape for completions; offsets count on through the pieces of one answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._stream, self._offset = tokenizer, TextStream(tokenizer), 0

    def __call__(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Of the tokens that come next. The first of a text has neither a probability nor rivals."""
        return {
            "tokens": [token_text(self._tokenizer, token.token_id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._rivals(token) for token in tokens],
            "text_offset": [self._place(token.token_id) for token in tokens],
        }

    def _rivals(self, token: Token) -> dict[str, float | None]:
        """The likeliest tokens, and the token itself, which need not be one of them."""
        assert token.logprob is not None
        likeliest = {token_text(self._tokenizer, token_id): finite(logprob) for token_id, logprob in token.top}
        return {**likeliest, token_text(self._tokenizer, token.token_id): finite(token.logprob)}

    def _place(self, token_id: int) -> int:
        place = self._offset
        self._offset += len(self._stream.push(token_id))
        return place
