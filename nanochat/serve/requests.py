"""What a client may ask: the bodies of /v1/chat/completions and /v1/completions, checked before they reach a model.

The numbers are in `serve.limits`. Every refusal is a `RequestError` that says in one sentence what was given and what
is allowed. Settings of the OpenAI interface that this server does not have are refused too, unless their value asks for
nothing: an answer that silently ignored `logit_bias` would be a wrong answer.

`tools` is one of them. The model has a calculator of its own, which it calls without being told to, and has not learned
to call functions of others. So `tools` is refused with one exception: with `tool_choice: "none"`, which says that none
may be called, they are accepted, and change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from nanochat.chat import Message, check_conversation
from nanochat.common import UserError
from nanochat.engine import Sampling
from nanochat.serve.fields import (
    check_characters,
    check_names,
    number,
    read_object,
    shorten,
    shown,
    strings,
    switch,
    whole_number,
)
from nanochat.serve.limits import (
    MAX_MESSAGE_CHARS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_SEED,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_TOTAL_CHARS,
    Defaults,
    RequestError,
    refusal,
)

COMPLETION_TOKENS = 16  # of /v1/completions where a request does not say; OpenAI's number

# Settings we do not have, and the values (besides null) that ask for nothing.
_WITHOUT_EFFECT: dict[str, Sequence[object]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
}
# Notes for the provider's own books, and how tools we do not have would be called: they never change an answer.
_NOT_OURS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
_SHARED = {"model", "stream", "stream_options", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_SHARED |= {"seed", "stop", "n", "max_tokens", "logprobs"} | _NOT_OURS
_CHAT = frozenset(_SHARED | {"messages", "max_completion_tokens", "top_logprobs"})
_COMPLETION = frozenset(_SHARED | {"prompt", "echo", "best_of"})


@dataclass(frozen=True)
class Options:
    """What both kinds of request can say. model: None for the server's first."""

    model: str | None
    n: int
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """The next message of a conversation."""

    messages: list[Message]
    options: Options

    @property
    def asked(self) -> object:
        """For the log of conversations."""
        return self.messages


@dataclass(frozen=True)
class CompletionRequest:
    """The continuation of texts or of token ids. echo: of the prompt before its continuation."""

    prompts: list[str] | list[list[int]]
    echo: bool
    options: Options

    @property
    def asked(self) -> object:
        """For the log of conversations."""
        return self.prompts


def parse_chat_request(body: bytes, defaults: Defaults, seed: int = 0) -> ChatRequest:
    """Read a body; `seed` is for a request that has none. Raises RequestError for whatever is wrong with it."""
    fields = read_object(body)
    _check_tools(fields)
    check_names(fields, _CHAT, _WITHOUT_EFFECT)
    messages = _read_messages(fields.get("messages"))
    name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = whole_number(fields, name, 1, "max_tokens", defaults.max_tokens)
    top_logprobs = whole_number(fields, "top_logprobs", 0, "max_top_logprobs", 0)
    if top_logprobs and not switch(fields, "logprobs"):
        raise RequestError("top_logprobs: only together with logprobs: true", "top_logprobs")
    wanted = top_logprobs if switch(fields, "logprobs") else None
    return ChatRequest(messages, _read_options(fields, defaults, seed, max_tokens, wanted))


def parse_completion_request(body: bytes, defaults: Defaults, seed: int = 0) -> CompletionRequest:
    """The same for a text to go on with."""
    fields = read_object(body)
    check_names(fields, _COMPLETION, _WITHOUT_EFFECT)
    prompts, echo = _read_prompts(fields.get("prompt")), switch(fields, "echo")
    max_tokens = whole_number(fields, "max_tokens", 0 if echo else 1, "max_tokens", COMPLETION_TOKENS)
    has_logprobs = fields.get("logprobs") is not None and fields["logprobs"] is not False  # 0 asks for them
    wanted = whole_number(fields, "logprobs", 0, "max_top_logprobs", 0) if has_logprobs else None
    options = _read_options(fields, defaults, seed, max_tokens, wanted)
    if fields.get("best_of") not in (None, options.n):
        raise RequestError("best_of: this server gives every answer it makes; use n", "best_of", code="unsupported")
    return CompletionRequest(prompts, echo, options)


def parse_tokenize_request(body: bytes) -> tuple[str | None, str]:
    """Of /tokenize: which model's tokenizer, and the text. There is nothing special to add or to leave out."""
    fields = read_object(body)
    check_names(fields, frozenset({"model", "prompt", "add_special_tokens"}), {})
    if not isinstance(fields.get("prompt"), str):
        raise RequestError("prompt: must be a text", "prompt")
    return read_model(fields), fields["prompt"]


def parse_detokenize_request(body: bytes) -> tuple[str | None, list[int]]:
    """Of /detokenize: which model's tokenizer, and the ids."""
    fields = read_object(body)
    check_names(fields, frozenset({"model", "tokens"}), {})
    ids = fields.get("tokens")
    if not isinstance(ids, list) or not all(_is_id(token_id) for token_id in ids):
        raise RequestError("tokens: must be a list of token ids", "tokens")
    return read_model(fields), ids


def read_model(fields: dict[str, Any]) -> str | None:
    """The name of a model, if the request has one."""
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"model: {shown(model)} is no name of a model", "model")
    return model


def _read_options(
    fields: dict[str, Any], defaults: Defaults, seed: int, max_tokens: int, top_logprobs: int | None
) -> Options:
    sampling = Sampling(
        temperature=number(fields, "temperature", 0, "max_temperature", defaults.temperature),
        top_k=whole_number(fields, "top_k", 0, "max_top_k", defaults.top_k),
        top_p=max(1e-9, number(fields, "top_p", 0, "max_top_p", 1.0)),  # OpenAI's 0: the likeliest alone
        min_p=number(fields, "min_p", 0, "max_min_p", 0.0),
        repetition_penalty=number(fields, "repetition_penalty", 1, "max_repetition_penalty", 1.0),
        seed=whole_number(fields, "seed", -MAX_SEED, "max_seed", seed),
        top_logprobs=top_logprobs,
    )
    stream_options = fields.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise RequestError('stream_options: must be {"include_usage": true or false}', "stream_options")
    include_usage = switch(stream_options, "include_usage")
    n, stop = whole_number(fields, "n", 1, "max_n", 1), _read_stop(fields)
    return Options(read_model(fields), n, max_tokens, sampling, stop, switch(fields, "stream"), include_usage)


def _read_stop(fields: dict[str, Any]) -> tuple[str, ...]:
    found = strings(fields, "stop")
    if len(found) > MAX_STOP:
        raise refusal("max_stop", "stop", given=len(found))
    for text in found:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise refusal("max_stop_chars", "stop", given=f"{len(text):,}")
    return tuple(found)


def _check_tools(fields: dict[str, Any]) -> None:
    """Tools that must not be called are no tools; any others are refused, and told why."""
    if not fields.get("tools"):
        return
    if fields.get("tool_choice") != "none":
        told = 'this model has not learned to call functions; leave tools out, or send tool_choice: "none"'
        raise RequestError(f"tools: {told} (its own calculator needs neither)", "tools", code="unsupported")
    del fields["tools"]


def _read_messages(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        given = f"{len(messages):,}" if isinstance(messages, list) else "no list"
        raise refusal("max_messages", "messages", given=given)
    messages = [_in_our_words(message) for message in messages]
    try:
        check_conversation({"messages": messages}, "conversation")
    except UserError as error:
        raise RequestError(shorten(str(error)), "messages") from error
    lengths = [_checked_length(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if (total := sum(lengths)) > MAX_TOTAL_CHARS:
        raise refusal("max_total_chars", "messages", given=f"{total:,}")
    if messages[-1]["role"] != "user":
        raise RequestError("messages: the last message must be the user's", "messages")
    return cast(list[Message], messages)


def _in_our_words(message: object) -> Any:
    """The message with OpenAI's list of text parts, where there is one, joined to a string, and its `developer` called
    system.

    An assistant's list stays: its parts may be tool calls, and the model must see again what it wrote.
    """
    if not isinstance(message, dict) or message.get("role") == "assistant":
        return message
    ours, content = dict(message), message.get("content")
    if ours.get("role") == "developer":
        ours["role"] = "system"
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        ours["content"] = "".join(part["text"] for part in content)
    return ours


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _checked_length(message: dict[str, Any], where: str) -> int:
    """Characters of a message. Raises RequestError for an empty or long question and for broken characters."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if message["role"] != "assistant" and not text.strip():
        raise RequestError("a message is empty; write something", where)
    if message["role"] != "assistant" and len(text) > MAX_MESSAGE_CHARS:
        raise refusal("max_message_chars", where, given=f"{len(text):,}")
    check_characters(text, where)
    return len(text)


def _read_prompts(prompt: object) -> list[str] | list[list[int]]:
    """OpenAI's four forms: a text, texts, the ids of one prompt, ids of several. None means an empty text."""
    listed: list[Any] = prompt if isinstance(prompt, list) else ["" if prompt is None else prompt]
    if listed and all(_is_id(token_id) for token_id in listed):
        listed = [listed]
    if len(listed) > MAX_PROMPTS:
        raise refusal("max_prompts", "prompt", given=f"{len(listed):,}")
    if listed and all(isinstance(text, str) for text in listed):
        if (total := sum(len(text) for text in listed)) > MAX_TOTAL_CHARS:
            raise refusal("max_total_chars", "prompt", given=f"{total:,}")
        for text in listed:
            check_characters(text, "prompt")
        return listed
    if listed and all(isinstance(ids, list) and ids and all(_is_id(i) for i in ids) for ids in listed):
        return listed
    raise RequestError("prompt: must be a text, a list of texts, or one or several lists of token ids", "prompt")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
