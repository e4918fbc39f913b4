"""A real server for the tests: a tiny model that has learned a few conversations by heart; and clients."""

import functools
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.chat import Conversation, render_conversation
from nanochat.config import ModelConfig
from nanochat.engine import Engine
from nanochat.model.gpt import build_model
from nanochat.serve.app import create_server
from nanochat.serve.limits import Defaults
from nanochat.serve.routes import House
from nanochat.serve.workers import Workers
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
UNICODE = "Grüße, 你好, привет und 🙂!"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SUM: list[Any] = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "37*24"},
    {"type": "python_output", "text": "888"},
    {"type": "text", "text": "it is 888."},
]
LEARNED: dict[str, Any] = {
    "Say hello in many scripts": UNICODE,
    "What is 37*24?": SUM,
    "Show me some HTML": HOSTILE,
    "Who are you?": "I am a tiny model that was trained inside a test. I know five answers, and this is one of them.",
    "Never stop": "la " * 100,
}


TOGETHER = ["Who are you?", "What is 37*24?", "Say hello in many scripts", "Show me some HTML"]  # one conversation


@functools.cache
def trained(together: bool) -> tuple[Engine, Tokenizer]:
    """An engine whose model answers LEARNED word by word (and `Never stop` for ever) when sampled greedily.

    Each as the first question; with `together`, which takes longer to learn, also in the order of TOGETHER.
    """
    torch.manual_seed(0)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/test_e*.py")))
    tokenizer = Tokenizer.train([text], vocab_size=400)
    config = ModelConfig(8192, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")
    model = build_model(config, torch.device("cpu"), torch.float32)
    rows = [_row(tokenizer, [question], 288 if together else 128) for question in LEARNED]
    rows += [_row(tokenizer, TOGETHER, 288)] if together else []
    inputs, targets = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(600):
        loss = model.loss(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.05, "the test's model did not learn its conversations"
    return Engine(model, [tokenizer.bos, tokenizer.special("<|assistant_end|>")]), tokenizer


def _row(tokenizer: Tokenizer, questions: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (T,) of one conversation; targets are -1 where nothing is to be learned."""
    turns: Any = [({"role": "user", "content": q}, {"role": "assistant", "content": LEARNED[q]}) for q in questions]
    conversation: Conversation = {"messages": [message for turn in turns for message in turn]}
    ids, mask = render_conversation(tokenizer, conversation, length + 1)
    targets = [token if learned else -1 for token, learned in zip(ids[1:], mask[1:])]
    padding = length - len(targets)
    return torch.tensor(ids[:-1] + [0] * padding), torch.tensor(targets + [-1] * padding)


def new_engine(together: bool = False, max_rows: int = 1) -> Engine:
    """Another engine around the trained model."""
    engine, _ = trained(together)
    return Engine(engine.model, list(engine.stop_ids), max_rows=max_rows)


@contextmanager
def running_server(
    max_waiting: int = 16,
    together: bool = False,
    max_rows: int = 1,
    names: Sequence[str] = ("nanochat",),
    drain_s: float = 0.0,
    **settings: Any,
) -> Iterator[str]:
    """The base address of a server around the trained model, once under each of `names`; settings are House's.

    Greedy by default, and one answer at a time, so that a test can fill it.
    """
    for extra in ("starlette", "uvicorn"):
        pytest.importorskip(extra, reason="the server's extra is missing: bash runs/setup.sh dev")
    _, tokenizer = trained(together=together)
    models = [Workers([new_engine(together, max_rows)], tokenizer, name, max_waiting) for name in names]
    server = create_server(House(models, **{"defaults": Defaults(temperature=0.0), **settings}), drain_s)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive(), "the server did not stop"


# Clients -------------------------------------------------------------------------------------------------------


def connect(url: str, timeout: float = 20) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(url.removeprefix("http://"), timeout=timeout)


def fetch(
    url: str, path: str, body: object = None, headers: dict[str, str] | None = None, method: str = ""
) -> SimpleNamespace:
    """One request; body: bytes as they are, anything else as JSON."""
    connection = connect(url)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(
        method or ("GET" if body is None else "POST"), path, content, JSON if headers is None else headers
    )
    response = connection.getresponse()
    text = response.read().decode("utf-8")
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return SimpleNamespace(
        status=response.status, headers=response.headers, text=text, json=json.loads(text) if is_json else None
    )


def asking(question: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **fields}


LONG = asking("Never stop", max_tokens=4096)


def events_of(text: str) -> list[Any]:
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def parts_of(events: list[Any]) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for event in events:
        pieces = [choice["nanochat"] for choice in event["choices"] if "nanochat" in choice]
        for piece in (piece for piece in pieces if "text" in piece):
            if piece["index"] == len(parts):
                parts.append({"type": piece["type"], "text": ""})
            parts[piece["index"]]["text"] += piece["text"]
    return parts


def stats(url: str) -> dict[str, int]:
    return fetch(url, "/stats").json


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10) -> float:
    """Wait until it is true; returns the seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"timed out: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


def wait_until_idle(url: str) -> float:
    """Wait until no generation runs; returns the seconds that took."""
    return wait_for(lambda: stats(url)["busy"] == 0, "the worker is free")


def leave(connection: http.client.HTTPConnection) -> None:
    """Close at once and without a goodbye, as a killed browser does."""
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sock.close()
    connection.close()
