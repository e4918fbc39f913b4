"""The numbers of the interface: what a request may ask for, and what it gets where it does not say.

The server checks requests against them and recipes' flags read them, so this module never imports torch.
"""

from dataclasses import dataclass

MAX_BODY_BYTES = 1 << 20  # the largest allowed conversation, were every character written as an escape, is half of it
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000  # of one system or user message; an answer of the model may be longer
MAX_TOTAL_CHARS = 32_000
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 200
MAX_TOKENS = 4_096
DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise.

    model: the name clients see. seed: requests without a seed draw theirs from it, each another one.
    """

    model: str = "nanochat"
    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    seed: int = 42
