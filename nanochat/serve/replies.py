"""What the server says: OpenAI's objects, and server-sent events.

An OpenAI client understands all of it. Beyond that interface every answer tells its typed parts (text, a tool call, the
tool's output) in a field named `nanochat`, which other clients skip:

    data: {..., "choices": [{..., "delta": {"content": "It is "},
                             "nanochat": {"index": 0, "type": "text", "text": "It is "}}]}
    data: {..., "choices": [{..., "delta": {}, "nanochat": {"index": 1, "type": "python", "text": "37*24"}}]}
    data: [DONE]

`delta.content` (and `message.content` of a whole answer) carries text parts only. `nanochat.index` numbers the parts of
the answer. Sent back as the content of an assistant message, the parts give the model the same text and the same tool
calls again, and as a rule the same tokens. Other tokens come back where it spelled a text in another way than the
tokenizer does, where it broke a character (shown as U+FFFD), and where it wrote a special token that has no place in an
answer (shown by its name, which is then plain text).
"""

import json
import secrets
import time
from typing import Any

from nanochat.chat import Part
from nanochat.serve.workers import Delta, Finish

DONE = b"data: [DONE]\n\n"
UNFINISHED = {
    "error": "the model failed while it wrote this answer; the server's log says why",
    "cancelled": "the server is stopping; this answer is incomplete",  # the only canceller whose client still listens
}


class Reply:
    """One answer: its id and time, the parts that have come, and their shapes on the wire."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.parts: list[Part] = []
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def add(self, delta: Delta) -> None:
        """Note what came."""
        if delta.index == len(self.parts):
            self.parts.append({"type": delta.type, "text": ""})
        self.parts[delta.index]["text"] += delta.text

    def opening(self) -> bytes:
        """The first event of a stream."""
        return self._event(self._choice({"role": "assistant", "content": ""}))

    def event(self, delta: Delta) -> bytes:
        """The event for a piece of a part."""
        part = {"index": delta.index, "type": delta.type, "text": delta.text}
        return self._event(self._choice({"content": delta.text} if delta.type == "text" else {}) | {"nanochat": part})

    def closing(self, finish: Finish, include_usage: bool) -> bytes:
        """The last events: why it ended, what it took if asked for, and the end mark."""
        if finish.reason in UNFINISHED:
            return sse(error_object(UNFINISHED[finish.reason], kind="server_error")) + DONE
        end = self._event(self._choice({}) | {"finish_reason": finish.reason})
        return end + (self._event(usage=usage(finish)) if include_usage else b"") + DONE

    def whole(self, finish: Finish) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        text = "".join(part["text"] for part in self.parts if part["type"] == "text")
        message = {"role": "assistant", "content": text, "nanochat": {"parts": self.parts}}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(finish)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}

    def _event(self, choice: dict[str, Any] | None = None, **more: Any) -> bytes:
        return sse({**self._head("chat.completion.chunk"), "choices": [choice] if choice else [], **more})

    @staticmethod
    def _choice(delta: dict[str, str]) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}


def sse(content: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no line breaks of its own, so one data line always holds it."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def usage(finish: Finish) -> dict[str, int]:
    total = finish.prompt_tokens + finish.completion_tokens
    counts = {"prompt_tokens": finish.prompt_tokens, "completion_tokens": finish.completion_tokens}
    return {**counts, "total_tokens": total}


def error_object(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
