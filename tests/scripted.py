"""A server that says what a test tells it, in the protocol of the real one: the page's own tests need no model.

The page, its files, its policy (`Guard`) and the colours of code are the real ones. What a model says is in `SCRIPT`,
or "You said: ..."; a piece that is `WAIT` holds the answer until the test says `go_on.set()`, one that is `BREAK`
breaks the connection. `refusals` are given out before anything else; `requests` are the bodies that came.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nanochat.serve.guard import Guard
from nanochat.serve.highlight import Highlighter

WAIT = {"wait": True}
BREAK = {"break": True}
CONTEXT_TOKENS = 2048
LIMITS = {
    "max_messages": 500,
    "max_message_chars": 8000,
    "max_total_chars": 32000,
    "max_temperature": 2.0,
    "max_top_k": 200,
    "max_top_p": 1.0,
    "max_min_p": 1.0,
    "max_repetition_penalty": 2.0,
    "max_tokens": 4096,
    "max_top_logprobs": 20,
    "max_stop": 16,
}
MARKDOWN = """## Counting words

Here is a **small program** that counts the words of a text, *without* any library but its own:

```python
from collections import Counter

def most_common(text: str, num: int = 3) -> list[tuple[str, int]]:
    \"\"\"The most common words.\"\"\"
    words = text.lower().split()  # spaces only
    return Counter(words).most_common(num)
```

It works in three steps:

1. The text becomes lower case, so that `The` and `the` are one word.
2. It is split at spaces:
   - punctuation stays with its word
   - numbers are words too
3. A `Counter` does the rest.

| Input | Words | Most common |
|:------|------:|-------------|
| a b a | 3 | `a` |
| one | 1 | `one` |

> Simple things first. See [the documentation](https://docs.python.org/3/library/collections.html).
"""
SCRIPT: dict[str, list[dict[str, Any]]] = {
    "Count words": [{"type": "text", "text": MARKDOWN}],
    "What is 37*24?": [
        {"type": "text", "text": "Let me see: "},
        {"type": "python", "text": "37*24"},
        {"type": "python_output", "text": "888"},
        {"type": "text", "text": "it is 888."},
    ],
    "Wait": [{"type": "text", "text": "First half, "}, WAIT, {"type": "text", "text": "second half."}],
    "Say nothing": [],
}


class Scripted:
    """The server's state, which a test reads and sets."""

    def __init__(self, models: tuple[str, ...] = ("small",)) -> None:
        self.models = models
        self.limits = dict(LIMITS)
        self.script = dict(SCRIPT)
        self.requests: list[dict[str, Any]] = []
        self.refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = []
        self.go_on = threading.Event()
        self.context_used = 123
        self.finish = "stop"
        self.num_left = 0  # clients that left in the middle of an answer
        self.url = ""

    def refuse(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        """What the next question gets."""
        self.refusals.append((status, {"error": {"message": message, "code": code}}, headers))

    def cards(self) -> dict[str, Any]:
        defaults = {"temperature": 0.6, "top_k": 50, "max_tokens": 512}
        about = {"context_tokens": CONTEXT_TOKENS, "defaults": defaults, "limits": self.limits}
        return {"object": "list", "data": [{"id": name, "object": "model", "nanochat": about} for name in self.models]}

    async def answer(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        question, model = asked["messages"][-1]["content"], asked.get("model") or self.models[0]
        said = f"You said: {question}" + (f" (to {model}, seed {asked['seed']})" if len(self.models) > 1 else "")
        pieces = self.script.get(question, [{"type": "text", "text": said}])
        index, is_over = -1, False
        try:
            yield sse({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            kind = ""
            for piece in pieces:
                if piece is WAIT:
                    while not self.go_on.is_set():
                        await asyncio.sleep(0.01)
                    continue
                if piece is BREAK:
                    raise ConnectionError("as the script says")
                index, kind = index + (piece["type"] != kind), piece["type"]
                for start in range(0, max(1, len(piece["text"])), 7):
                    yield sse(choice(asked, index, kind, piece["text"][start : start + 7]))
                    await asyncio.sleep(0.001)
            end = {"context_used": self.context_used, "tokens_per_s": 41.5}
            yield sse({"index": 0, "delta": {}, "finish_reason": self.finish, "nanochat": end}) + b"data: [DONE]\n\n"
            is_over = True
        finally:
            self.num_left += not is_over


def choice(asked: dict[str, Any], index: int, kind: str, text: str) -> dict[str, Any]:
    """A piece of an answer; a token is three characters long, each less likely than the one before."""
    piece: dict[str, Any] = {"index": index, "type": kind, "text": text}
    if asked.get("logprobs"):
        parts = [text[at : at + 3] for at in range(0, len(text), 3)]
        likely = [-0.05, -0.7, -2.5]
        piece["tokens"] = [
            {"text": part, "logprob": likely[at], "top": [[part, likely[at]], ["other", -3.0]], "forced": False}
            for at, part in enumerate(parts)
        ]
    return {"index": 0, "delta": {}, "finish_reason": None, "nanochat": piece}


def sse(choice: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()


def create_app(script: Scripted) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    from nanochat.serve.routes import UI

    highlighter = Highlighter()

    async def page(request: Any) -> Any:
        return FileResponse(UI / "index.html")

    async def models(request: Any) -> Any:
        return JSONResponse(script.cards())

    async def highlight(request: Any) -> Any:
        return JSONResponse(await highlighter.answer(await request.body()))

    async def chat(request: Any) -> Any:
        if script.refusals:
            status, content, headers = script.refusals.pop(0)
            return JSONResponse(content, status, headers)
        script.requests.append(await request.json())
        return StreamingResponse(script.answer(script.requests[-1]), media_type="text/event-stream")

    posts = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/highlight", highlight, methods=["POST"]),
    ]
    pages = [Route("/", page), Route("/v1/models", models), Mount("/ui", StaticFiles(directory=UI))]
    return Guard(Starlette(routes=[*pages, *posts]))


@contextmanager
def scripted_server(*models: str, port: int = 0) -> Iterator[Scripted]:
    """Runs it on 127.0.0.1; its address is `url`."""
    for extra in ("starlette", "uvicorn"):
        pytest.importorskip(extra, reason="the server's extra is missing: bash runs/setup.sh dev")
    import uvicorn

    script = Scripted(models or ("small",))
    config = uvicorn.Config(create_app(script), log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listener:
        script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield script
        finally:
            script.go_on.set()
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive(), "the server did not stop"
