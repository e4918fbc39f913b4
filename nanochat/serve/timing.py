"""How long a server takes: to the first token, to notice that a client has left, and to say that it is busy.

Measured from outside, over real connections to a server in a thread of this process. Its model never stops by itself,
so that answers last as long as they are needed.
"""

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat import scaling
from nanochat.common import print0
from nanochat.engine import Engine
from nanochat.machine import spread
from nanochat.model.gpt import build_model
from nanochat.parallel import Runtime
from nanochat.serve.app import create_server
from nanochat.serve.limits import MAX_TOKENS, Defaults
from nanochat.serve.routes import House
from nanochat.serve.workers import Workers
from nanochat.tokenizer import Tokenizer

BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": MAX_TOKENS, "stream": True}


@contextmanager
def serving(workers: Workers) -> Iterator[int]:
    """The port of a server in front of one model."""
    server = create_server(House([workers], Defaults(temperature=0.0)), drain_s=0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def wait_until(is_true: Callable[[], bool]) -> float:
    """The seconds until it is."""
    began = time.perf_counter()
    while not is_true():
        time.sleep(0.0005)
    return time.perf_counter() - began


def ask(port: int) -> http.client.HTTPConnection:
    """A question, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY), {"Content-Type": "application/json"})
    return connection


def leave(connection: http.client.HTTPConnection) -> None:
    """Close at once, as a killed browser does."""
    assert isinstance(connection.sock, socket.socket)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sock.close()
    connection.close()


def first_token_and_abort(port: int, workers: Workers) -> tuple[float, float]:
    """Seconds from the question to its first token, and from the client's leaving to the row that is free again."""
    running, began = workers.num_running, time.perf_counter()
    connection = ask(port)
    reply = connection.getresponse()
    while b'"content": ""' in (line := reply.readline()) or not line.strip():
        pass  # the opening
    first = time.perf_counter() - began
    reply.close()
    leave(connection)
    return first, wait_until(lambda: workers.num_running <= running)


def refusal(port: int) -> float:
    """Seconds from a question to its 429."""
    began = time.perf_counter()
    connection = ask(port)
    reply = connection.getresponse()
    reply.read()
    took = time.perf_counter() - began
    assert reply.status == 429, reply.status
    connection.close()
    return took


def figures(depth: int, rt: Runtime, seed: int, repeats: int) -> dict[str, Any]:
    """Seconds of each kind, in front of a model with random weights and no stop token."""
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 512)
    config = scaling.model_config(depth, tokenizer.vocab_size, 2 * MAX_TOKENS)
    engine = Engine(build_model(config, rt.device, rt.dtype, seed).for_decoding(), stop_ids=[])
    found = measure(Workers([engine], tokenizer), repeats)
    refusals = found.pop("refusal_s")
    told = {"p50": refusals[len(refusals) // 2], "p99": refusals[int(0.99 * len(refusals))], "max": refusals[-1]}
    for name, seconds in {**found, "refusal_s": list(told.values())}.items():
        print0(f"{name}: {', '.join(f'{1000 * s:.1f}' for s in seconds)} ms")
    return {**{name: spread(seconds) for name, seconds in found.items()}, "refusal_s": told}


def measure(workers: Workers, repeats: int, num_refusals: int = 300) -> dict[str, list[float]]:
    """Seconds of each kind: on a server that does nothing else, one that has a single row left, and a full one."""
    with serving(workers) as port:
        num_rows = workers.stats()["rows"]
        idle = [first_token_and_abort(port, workers) for _ in range(repeats + 1)][1:]
        others = [ask(port) for _ in range(num_rows - 1)]
        wait_until(lambda: workers.num_running == num_rows - 1)
        busy = [first_token_and_abort(port, workers) for _ in range(repeats)]
        others += [ask(port) for _ in range(1 + workers.max_waiting)]
        wait_until(lambda: workers.stats()["waiting"] == workers.max_waiting)
        refusals = [refusal(port) for _ in range(num_refusals)]
        for connection in others:
            leave(connection)
        wait_until(lambda: workers.num_running == 0)
    found: dict[str, Any] = {"refusal_s": sorted(refusals)}
    for name, pairs in (("idle", idle), ("busy", busy)):
        found[f"first_token_{name}_s"], found[f"abort_{name}_s"] = ([pair[i] for pair in pairs] for i in (0, 1))
    return found
