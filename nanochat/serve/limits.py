"""The numbers of the interface: what a request may ask for, what it gets where it does not say, what it is told beyond.

`LIMITS` is the one table of them: the server refuses by it (`refusal`), /v1/models tells its numbers, docs/server.md
shows it, and recipes' flags read the constants. So this module never imports torch.
"""

from dataclasses import dataclass

MAX_BODY_BYTES = 1 << 20  # the largest allowed conversation, were every character written as an escape, is half of it
MAX_BODY_SECONDS = 30  # for all of it to arrive
MAX_HEADER_BYTES = 32 << 10
MAX_HEADER_SECONDS = 30  # for the first request of a connection to arrive
MAX_STALL_SECONDS = 60  # in which a client takes none of what waits for it
MAX_UNREAD_EVENTS = 10_000  # of one answer, beyond what the network's own buffers hold
MAX_CONNECTIONS = 1_000
MAX_WAITING = 64  # answers in the line of a model; the next one is told to come back
MAX_JSON_DEPTH = 32
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000  # of one system or user message; an answer of the model may be longer
MAX_TOTAL_CHARS = 32_000
MAX_PROMPTS = 32
MAX_N = 16
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 200
MAX_TOP_P = 1.0
MAX_MIN_P = 1.0
MAX_REPETITION_PENALTY = 2.0
MAX_TOKENS = 4_096
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_STOP = 16
MAX_STOP_CHARS = 100
MAX_CODE_CHARS = 20_000
DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Limit:
    """A number, and what a client hears that is beyond it. status None: no reply, its connection is closed."""

    value: float
    status: int | None
    message: str  # {given} of {limit}
    code: str | None = None  # for programs


_IN_RANGE = "{name}: {given} is not {kind} from {low} to {limit}"
TOO_LONG = "context_length_exceeded"

LIMITS = {
    "max_body_bytes": Limit(MAX_BODY_BYTES, 413, "the body is larger than {limit} bytes"),
    "max_body_seconds": Limit(MAX_BODY_SECONDS, 408, "the body did not arrive within {limit} s"),
    "max_header_bytes": Limit(MAX_HEADER_BYTES, 400, "Invalid HTTP request received."),  # the HTTP library's words
    "max_header_seconds": Limit(MAX_HEADER_SECONDS, None, "the connection is closed"),
    "max_stall_seconds": Limit(MAX_STALL_SECONDS, None, "the connection is closed"),
    "max_unread_events": Limit(MAX_UNREAD_EVENTS, 200, "this answer was broken off: its client did not read it"),
    "max_connections": Limit(MAX_CONNECTIONS, 503, "Service Unavailable"),  # the HTTP library's words
    "max_waiting": Limit(
        MAX_WAITING, 429, "the model is busy and its waiting line is full; try again in {given} s", "queue_full"
    ),
    "max_json_depth": Limit(MAX_JSON_DEPTH, 400, "the body is nested too deeply; at most {limit} levels are allowed"),
    "max_messages": Limit(MAX_MESSAGES, 400, "messages: {given}; must be a list of 1 to {limit} messages"),
    "max_message_chars": Limit(MAX_MESSAGE_CHARS, 400, "a message has {given} characters; at most {limit} are allowed"),
    "max_total_chars": Limit(
        MAX_TOTAL_CHARS, 400, "the text has {given} characters in all; at most {limit} are allowed", TOO_LONG
    ),
    "max_prompts": Limit(MAX_PROMPTS, 400, "prompt: {given} prompts; at most {limit} are allowed"),
    "max_n": Limit(MAX_N, 400, _IN_RANGE),
    "max_temperature": Limit(MAX_TEMPERATURE, 400, _IN_RANGE),
    "max_top_k": Limit(MAX_TOP_K, 400, _IN_RANGE),
    "max_top_p": Limit(MAX_TOP_P, 400, _IN_RANGE),
    "max_min_p": Limit(MAX_MIN_P, 400, _IN_RANGE),
    "max_repetition_penalty": Limit(MAX_REPETITION_PENALTY, 400, _IN_RANGE),
    "max_tokens": Limit(MAX_TOKENS, 400, _IN_RANGE),
    "max_top_logprobs": Limit(MAX_TOP_LOGPROBS, 400, _IN_RANGE),
    "max_seed": Limit(MAX_SEED, 400, _IN_RANGE),
    "max_stop": Limit(MAX_STOP, 400, "stop: {given} strings; at most {limit} are allowed"),
    "max_stop_chars": Limit(MAX_STOP_CHARS, 400, "stop: a string has {given} characters; 1 to {limit} are allowed"),
    "max_code_chars": Limit(MAX_CODE_CHARS, 413, "code: {given} characters; at most {limit} are coloured"),
}


class RequestError(Exception):
    """A refusal: HTTP status, a sentence for a person, and for programs the field at fault and a fixed code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


def told(name: str, /, **given: object) -> str:
    """What a client hears that is beyond this limit.

    >>> told("max_stop", given=17)
    'stop: 17 strings; at most 16 are allowed'
    """
    limit = LIMITS[name]
    return limit.message.format(limit=spelled(limit.value), **given)


def spelled(value: float) -> str:
    """A number as it stands in a sentence.

    >>> spelled(2.0), spelled(4096), spelled(0.5)
    ('2', '4,096', '0.5')
    """
    return f"{int(value) if value == int(value) else value:,}"


def refusal(name: str, param: str | None = None, /, **given: object) -> RequestError:
    """The refusal of a request that is beyond this limit."""
    limit = LIMITS[name]
    assert limit.status is not None, "no request is refused by it"
    return RequestError(told(name, **given), param, limit.status, limit.code)


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say otherwise. seed: requests without one draw theirs from it, each another."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    seed: int = 42

    def sampling(self) -> dict[str, float]:
        """By the names of a request's fields; what cannot be set for the server changes nothing."""
        given = {"temperature": self.temperature, "top_k": self.top_k, "max_tokens": self.max_tokens}
        return {**given, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
