"""What the server says: OpenAI's objects, and server-sent events.

An OpenAI client understands all of it. Beyond that interface every chat answer tells its typed parts (text, a tool
call, the tool's output) in a field named `nanochat`, which other clients skip, and what it took in that of its end:

    data: {..., "choices": [{..., "delta": {"content": "It is "},
                             "nanochat": {"index": 0, "type": "text", "text": "It is "}}]}
    data: {..., "choices": [{..., "delta": {}, "nanochat": {"index": 1, "type": "python", "text": "37*24"}}]}
    data: {..., "choices": [{..., "finish_reason": "stop", "nanochat": {"context_used": 88, "tokens_per_s": 41.5}}]}
    data: [DONE]

`delta.content` (and `message.content` of a whole answer) carries text parts only. `nanochat.index` numbers the parts of
the answer. Sent back as the content of an assistant message, the parts give the model the same text and the same tool
calls again, and as a rule the same tokens. Other tokens come back where it spelled a text in another way than the
tokenizer does, where it broke a character (shown as U+FFFD), and where it wrote a special token that has no place in an
answer (shown by its name, which is then plain text).

With log-probabilities asked for, a piece also has `tokens`: text, log-probability, the likeliest others, and whether a
tool put the token there.
"""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nanochat.chat import Part
from nanochat.serve.limits import told
from nanochat.serve.logprobs import chat_logprobs, shown_token
from nanochat.serve.requests import Options
from nanochat.serve.writing import Delta, Finish
from nanochat.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
UNFINISHED = {
    "error": "the model failed while it wrote this answer; the server's log says why",
    "cancelled": "the server is stopping; this answer is incomplete",  # the only canceller whose client still listens
    "unread": told("max_unread_events"),
}

Event = Delta | Finish


class Stream(Protocol):
    """The shapes of one request's answers as events."""

    def opening(self) -> bytes:
        """The first events."""
        ...

    def event(self, event: Event) -> bytes:
        """The event for a piece of an answer, or for the end of one."""
        ...

    def closing(self, failure: str = "") -> bytes:
        """The last events: what all answers took, or why they broke off, and the end mark."""
        ...


class Head:
    """What every object of a reply begins with: id, kind, time and model."""

    def __init__(self, prefix: str, model: str) -> None:
        self._id, self._created, self._model = f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model

    def __call__(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}


class ChatReply:
    """/v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, options: Options) -> None:
        self._head, self._tokenizer, self._n = Head("chatcmpl", model), tokenizer, options.n
        self._tells_usage, self._tells_logprobs = options.include_usage, options.sampling.top_logprobs is not None
        self._finishes: list[Finish] = []

    def opening(self) -> bytes:
        start = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(choice, start) for choice in range(self._n))

    def event(self, event: Event) -> bytes:
        if isinstance(event, Finish):
            self._finishes.append(event)
            return self._chunk(event.choice, {}, finish_reason=event.reason, nanochat=figures(event))
        is_text = event.type == "text"
        piece: dict[str, Any] = {"index": event.index, "type": event.type, "text": event.text}
        if self._tells_logprobs:
            piece["tokens"] = [shown_token(self._tokenizer, token) for token in event.tokens]
        logprobs = chat_logprobs(self._tokenizer, event.tokens) if is_text and self._tells_logprobs else None
        delta = {"content": event.text} if is_text else {}
        return self._chunk(event.choice, delta, logprobs=logprobs, nanochat=piece)

    def closing(self, failure: str = "") -> bytes:
        if failure:
            return sse(error_object(failure, kind="server_error")) + DONE
        head = self._head("chat.completion.chunk")
        total = sse({**head, "choices": [], "usage": usage(self._finishes)}) if self._tells_usage else b""
        return total + DONE

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """All answers at once."""
        finishes = ends_of(events)
        choices = []
        for finish in finishes:
            deltas = [e for e in events if isinstance(e, Delta) and e.choice == finish.choice]
            parts, texts = parts_of(deltas), [delta for delta in deltas if delta.type == "text"]
            content = "".join(delta.text for delta in texts)
            message = {"role": "assistant", "content": content, "refusal": None, "nanochat": {"parts": parts}}
            tokens = [token for delta in texts for token in delta.tokens]
            logprobs = chat_logprobs(self._tokenizer, tokens) if self._tells_logprobs else None
            choice = {"index": finish.choice, "message": message, "logprobs": logprobs, "finish_reason": finish.reason}
            choices.append({**choice, "nanochat": figures(finish)})
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(finishes)}

    def _chunk(self, choice: int, delta: dict[str, str], logprobs: Any = None, **more: Any) -> bytes:
        only = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": None, **more}
        total = {"usage": None} if self._tells_usage else {}
        return sse({**self._head("chat.completion.chunk"), "choices": [only], **total})


class AncestorReply:
    """/chat/completions, as the ancestor's page reads it: tokens' text, then `done`. Always a stream; `gpu` is 0."""

    def opening(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        is_text = isinstance(event, Delta) and event.type == "text"
        return sse({"token": event.text, "gpu": 0}) if is_text and isinstance(event, Delta) else b""

    def closing(self, failure: str = "") -> bytes:
        return (sse({"error": failure}) if failure else b"") + sse({"done": True})


def parts_of(deltas: Iterable[Delta]) -> list[Part]:
    """The parts that the pieces of one answer make."""
    parts: list[Part] = []
    for delta in deltas:
        if delta.index == len(parts):
            parts.append({"type": delta.type, "text": ""})
        parts[delta.index]["text"] += delta.text
    return parts


def ends_of(events: Iterable[Event]) -> list[Finish]:
    """The ends of all answers, in their order."""
    return sorted((e for e in events if isinstance(e, Finish)), key=lambda finish: finish.choice)


def sse(content: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no line breaks of its own, so one data line always holds it."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def usage(finishes: Sequence[Finish], n: int = 0) -> dict[str, Any]:
    """What answers took. n: answers to each prompt, which is counted once; 0: all are to the same one."""
    firsts = [finish for finish in finishes if finish.choice % (n or len(finishes)) == 0]
    prompt, cached = sum(f.prompt_tokens for f in firsts), sum(f.cached_tokens for f in firsts)
    written = sum(finish.completion_tokens for finish in finishes)
    counts = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def figures(finish: Finish) -> dict[str, Any]:
    """For the page: tokens of the context that are taken now, and how fast the answer was written."""
    speed = (finish.completion_tokens - 1) / finish.seconds if finish.seconds else 0.0
    return {"context_used": finish.prompt_tokens + finish.completion_tokens, "tokens_per_s": round(speed, 1)}


def error_object(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
