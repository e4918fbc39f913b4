"""What a client may ask: the body of /v1/chat/completions, checked before it reaches the model.

The numbers are in `serve.limits`. Every refusal is a `RequestError` that says in one sentence what was given and what
is allowed. Settings of the OpenAI interface that this server does not have are refused too, unless their value asks for
nothing: an answer that silently ignored `stop` or `tools` would be a wrong answer.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from nanochat.chat import Message, check_conversation
from nanochat.common import UserError
from nanochat.engine import Sampling
from nanochat.serve.limits import (
    MAX_MESSAGE_CHARS,
    MAX_MESSAGES,
    MAX_TEMPERATURE,
    MAX_TOKENS,
    MAX_TOP_K,
    MAX_TOTAL_CHARS,
    Defaults,
)

# Settings we do not have, and the values (besides null) that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
_NOT_OURS = {"user", "metadata", "store"}  # notes for the provider's own books; they never change an answer
_KNOWN = {"model", "messages", "stream", "stream_options", "temperature", "top_k", "seed"}
_KNOWN |= {"max_tokens", "max_completion_tokens"}


class RequestError(Exception):
    """A refusal: HTTP status, a sentence for a person, and for programs the field at fault and a fixed code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    messages: list[Message]
    max_tokens: int
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False


def parse_chat_request(body: bytes, defaults: Defaults, seed: int = 0) -> ChatRequest:
    """Read a body; `seed` is for a request that has none. Raises RequestError for whatever is wrong with it."""
    fields = _read_object(body)
    _check_fields(fields, defaults.model)
    messages = _read_messages(fields.get("messages"))
    temperature = _number(fields, "temperature", 0, MAX_TEMPERATURE, defaults.temperature)
    top_k = int(_number(fields, "top_k", 0, MAX_TOP_K, defaults.top_k, whole=True))
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = int(_number(fields, name, 1, MAX_TOKENS, defaults.max_tokens, whole=True))
    seed = int(_number(fields, "seed", -(2**63), 2**63 - 1, seed, whole=True))
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError('stream_options: must be {"include_usage": true or false}', "stream_options")
    stream, include_usage = _switch(fields, "stream"), _switch(options, "include_usage")
    return ChatRequest(messages, max_tokens, Sampling(temperature, top_k, seed), stream, include_usage)


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of absurd length
        raise RequestError("the body is not valid JSON in UTF-8, or is nested too deeply") from error
    if not isinstance(fields, dict):
        raise RequestError('the body must be a JSON object such as {"messages": [...]}')
    return fields


def _check_fields(fields: dict[str, Any], model: str) -> None:
    """Refuse unknown names, settings we do not have, and models we do not serve."""
    for name, value in fields.items():
        if name in _WITHOUT_EFFECT:
            if value is not None and value not in _WITHOUT_EFFECT[name]:
                raise RequestError(f"{name}: this server does not support it; leave it out", name, code="unsupported")
        elif name not in _KNOWN and name not in _NOT_OURS:
            param = _shorten(name.encode(errors="replace").decode(), 40)  # half a character could not be sent back
            raise RequestError(f"{_shown(name)}: unknown field; known are {', '.join(sorted(_KNOWN))}", param)
    asked = fields.get("model")
    if asked not in (None, model):
        message = f"model {_shown(asked)} is not served here; leave it out or use {model!r}"
        raise RequestError(message, "model", status=404, code="model_not_found")


def _read_messages(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        given = f"{len(messages):,}" if isinstance(messages, list) else "no list"
        raise RequestError(f"messages: {given}; must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    messages = [_plain_text(message) for message in messages]
    try:
        check_conversation({"messages": messages}, "conversation")
    except UserError as error:
        raise RequestError(_shorten(str(error)), "messages") from error
    lengths = [_checked_length(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if (total := sum(lengths)) > MAX_TOTAL_CHARS:
        message = f"the messages together have {total:,} characters; at most {MAX_TOTAL_CHARS:,} are allowed"
        raise RequestError(message, "messages", code="context_length_exceeded")
    if messages[-1]["role"] != "user":
        raise RequestError("messages: the last message must be the user's", "messages")
    return cast(list[Message], messages)


def _plain_text(message: object) -> Any:
    """The message with OpenAI's list of text parts, where there is one, joined to a string.

    An assistant's list stays: its parts may be tool calls, and the model must see again what it wrote.
    """
    if not isinstance(message, dict) or message.get("role") == "assistant":
        return message
    content = message.get("content")
    if not isinstance(content, list) or not all(_is_text_part(part) for part in content):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _checked_length(message: dict[str, Any], where: str) -> int:
    """Characters of a message. Raises RequestError for an empty or long question and for broken characters."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if message["role"] != "assistant" and not text.strip():
        raise RequestError("a message is empty; write something", where)
    if message["role"] != "assistant" and len(text) > MAX_MESSAGE_CHARS:
        raise RequestError(f"a message has {len(text):,} characters; at most {MAX_MESSAGE_CHARS:,} are allowed", where)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError("a message holds half of a character (an unpaired surrogate)", where)
    return len(text)


def _number(
    fields: dict[str, Any], name: str, low: float, high: float, default: float, whole: bool = False
) -> float | int:
    value = fields.get(name)
    if value is None:
        return default
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name}: {_shown(value)} is not {kind} from {low:g} to {high:g}", name)
    return value


def _switch(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name}: must be true or false", name)
    return bool(value)


def _shown(value: object) -> str:
    """A client's value as it may stand in a sentence."""
    return _shorten(json.dumps(value), 40)


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
