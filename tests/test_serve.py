"""The server: OpenAI's protocol, every limit, a line that is bounded, clients that leave, and who may ask at all."""

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import HOSTILE, LEARNED, SUM, UNICODE, running_server, trained

from nanochat.checkpoint import run_folder, write_checkpoint
from nanochat.common import UserError
from nanochat.serve import requests as limits
from nanochat.serve.requests import Defaults, RequestError, parse_chat_request
from nanochat.serve.workers import Busy, Delta, Finish, Stopped, Workers
from scripts import chat_web

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as url:
        yield url


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


def events_of(text: str) -> list[Any]:
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def parts_of(events: list[Any]) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for event in events:
        for piece in (choice["nanochat"] for choice in event["choices"] if "nanochat" in choice):
            if piece["index"] == len(parts):
                parts.append({"type": piece["type"], "text": ""})
            parts[piece["index"]]["text"] += piece["text"]
    return parts


def stats(url: str) -> dict[str, int]:
    return fetch(url, "/stats").json


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.01)


def leave(connection: http.client.HTTPConnection) -> None:
    """Close at once and without a goodbye, as a killed browser does."""
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sock.close()
    connection.close()


# Answers -------------------------------------------------------------------------------------------------------


def test_a_whole_answer_has_openais_shape(server: str) -> None:
    reply = fetch(server, CHAT, asking("Who are you?", model="nanochat"))
    assert reply.status == 200
    body = reply.json
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "nanochat"
    assert abs(body["created"] - time.time()) < 60
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == LEARNED["Who are you?"]
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    usage = body["usage"]
    assert usage["prompt_tokens"] > 5 and usage["completion_tokens"] > 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_has_openais_shape(server: str) -> None:
    reply = fetch(server, CHAT, asking("Who are you?", stream=True, stream_options={"include_usage": True}))
    assert reply.headers.get_content_type() == "text/event-stream" and reply.headers["Cache-Control"] == "no-store"
    events = events_of(reply.text)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]] == [None] * (len(events) - 2)
    assert events[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == len(events) - 3
    text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert text == LEARNED["Who are you?"]


@pytest.mark.parametrize("question", LEARNED)
def test_a_stream_says_what_the_whole_answer_says(server: str, question: str) -> None:
    choices = {"temperature": 0.9, "top_k": 20, "seed": 7, "max_tokens": 60}
    whole = fetch(server, CHAT, asking(question, **choices)).json["choices"][0]
    events = events_of(fetch(server, CHAT, asking(question, stream=True, **choices)).text)
    assert parts_of(events) == whole["message"]["nanochat"]["parts"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_the_seed_decides_and_without_one_answers_differ(server: str) -> None:
    def answer(**fields: Any) -> str:
        reply = fetch(server, CHAT, asking("Say something random", temperature=2, top_k=0, max_tokens=20, **fields))
        return json.dumps(reply.json["choices"][0]["message"])

    assert answer(seed=1) == answer(seed=1) != answer(seed=2)
    assert len({answer() for _ in range(4)}) > 1


def test_characters_of_many_bytes_arrive_whole(server: str) -> None:
    reply = fetch(server, CHAT, asking("Say hello in many scripts", stream=True))
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events_of(reply.text)]
    assert "".join(pieces) == UNICODE and len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_tool_call_and_its_output_are_parts_of_their_own(server: str) -> None:
    events = events_of(fetch(server, CHAT, asking("What is 37*24?", stream=True)).text)
    assert parts_of(events) == SUM
    content = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert content == "Let me see: it is 888."
    message = fetch(server, CHAT, asking("What is 37*24?")).json["choices"][0]["message"]
    assert message == {"role": "assistant", "content": content, "nanochat": {"parts": SUM}}


def test_parts_can_be_sent_back_and_the_model_reads_the_tokens_it_wrote(server: str) -> None:
    first = fetch(server, CHAT, asking("What is 37*24?")).json
    written = first["usage"]["total_tokens"]
    follow_up: list[Any] = [{"role": "user", "content": "What is 37*24?"}, {"role": "assistant", "content": SUM}]
    follow_up.append(
        {"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]}
    )
    second = fetch(server, CHAT, {"messages": follow_up}).json
    alone = fetch(server, CHAT, asking("Who are you?")).json["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens"] == written + 1 + alone - 1  # the end of the first answer; one bos


def test_the_length_limit_is_told(server: str) -> None:
    body = fetch(server, CHAT, asking("Never stop", max_completion_tokens=9)).json
    assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 9


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(server: str) -> None:
    turn = [{"role": "user", "content": "way back " * 200}, {"role": "assistant", "content": "yes " * 200}]
    messages = turn * 12 + [{"role": "user", "content": "Who are you?"}]
    body = fetch(server, CHAT, {"messages": messages, "max_tokens": 20}).json
    assert 4096 < body["usage"]["prompt_tokens"] <= 8192 - 20 and body["choices"][0]["finish_reason"] in (
        "stop",
        "length",
    )


def test_models_health_and_figures(server: str) -> None:
    [model] = fetch(server, "/v1/models").json["data"]
    assert model["id"] == "nanochat" and model["object"] == "model"
    assert model["nanochat"]["limits"]["max_message_chars"] == limits.MAX_MESSAGE_CHARS
    assert model["nanochat"]["context_tokens"] == 8192
    assert fetch(server, "/health").json == {"status": "ok", "ready": True, "model": "nanochat"}
    now = stats(server)
    assert (now["workers"], now["busy"], now["waiting"]) == (1, 0, 0)


# Refusals ------------------------------------------------------------------------------------------------------

HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
BAD: list[tuple[object, int, str]] = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b'{"messages": "\xff"}', 400, "UTF-8"),
    (b"[" * 50_000, 400, "nested"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "number|JSON"),
    ([1], 400, "JSON object"),
    ({}, 400, "messages: no list"),
    ({"messages": "hi"}, 400, "messages: no list"),
    ({"messages": []}, 400, "1 to 500"),
    ({"messages": [HI, YES] * 250 + [HI]}, 400, "501; must be a list of 1 to 500"),
    ({"messages": ["hi"]}, 400, r"messages\[0\]"),
    ({"messages": [{"role": "user"}]}, 400, r"messages\[0\]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role 'tool' is unknown; use system, user or assistant"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, 400, "is unknown"),
    ({"messages": [{"role": "x" * 10_000, "content": "x"}]}, 400, "is unknown|…"),
    ({"messages": [HI, HI]}, 400, r"messages\[1\] has role 'user' where 'assistant' is due"),
    ({"messages": [YES]}, 400, "where 'user' is due"),
    ({"messages": [HI, YES]}, 400, "last message must be the user's"),
    ({"messages": [{"role": "system", "content": "be nice"}]}, 400, "user message must follow"),
    ({"messages": [HI, {"role": "system", "content": "x"}]}, 400, "'assistant' is due"),
    ({"messages": [{"role": "user", "content": " \n"}]}, 400, "message is empty"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "must be a string"),
    ({"messages": [HI, {"role": "assistant", "content": [{"type": "x", "text": ""}]}, HI]}, 400, "type 'x'"),
    ({"messages": [{"role": "user", "content": "x" * 8001}]}, 400, "8,001 characters.* at most 8,000"),
    ({"messages": [HI, {"role": "assistant", "content": "x" * 32_000}, HI]}, 400, "32,004 characters.*32,000"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "unpaired surrogate"),
    (asking("hi", temperature=2.1), 400, "temperature: 2.1 is not a number from 0 to 2"),
    (asking("hi", temperature=-1), 400, "temperature"),
    (asking("hi", temperature="hot"), 400, 'temperature: "hot"'),
    (asking("hi", temperature=True), 400, "temperature: true"),
    (asking("hi", temperature=float("nan")), 400, "temperature: NaN"),
    (asking("hi", top_k=201), 400, "top_k: 201 is not a whole number from 0 to 200"),
    (asking("hi", top_k=1.5), 400, "top_k"),
    (asking("hi", max_tokens=0), 400, "max_tokens: 0 is not a whole number from 1 to 4096"),
    (asking("hi", max_tokens=4097), 400, "max_tokens"),
    (asking("hi", max_completion_tokens=[]), 400, "max_completion_tokens"),
    (asking("hi", seed="x"), 400, "seed"),
    (asking("hi", stream=1), 400, "stream: must be true or false"),
    (asking("hi", stream_options=[1]), 400, "stream_options"),
    (asking("hi", n=2), 400, "n: this server does not support it"),
    (asking("hi", tools=[{"type": "function"}]), 400, "tools: this server does not support it"),
    (asking("hi", stop=["x"]), 400, "stop: this server does not support it"),
    (asking("hi", tempreature=1), 400, '"tempreature": unknown field; known are'),
    (asking("hi", model="gpt-5"), 404, 'model "gpt-5" is not served here'),
]


@pytest.mark.parametrize(("body", "status", "told"), BAD, ids=range(len(BAD)))
def test_every_bad_request_is_told_in_openais_shape(server: str, body: object, status: int, told: str) -> None:
    before = stats(server)
    reply = fetch(server, CHAT, body)
    error = reply.json["error"]
    assert reply.status == status and error["type"] == "invalid_request_error" and error.keys() >= {"param", "code"}
    assert re.search(told, error["message"]), error["message"]
    assert len(error["message"]) < 400
    assert stats(server) == before, "a refused request must not reach the worker"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [
    "messages",
    "model",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "max_tokens",
    "seed",
    "n",
    "stop",
    "x",
]


@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON), st.lists(ANY_JSON))
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_is_a_request_or_a_refusal(fields: dict[str, Any], messages: list[Any]) -> None:
    for body in (fields, {**fields, "messages": messages}, {**asking("hi"), **fields}):
        try:
            parse_chat_request(json.dumps(body).encode(), Defaults())
        except RequestError as refusal:
            json.dumps(refusal.message, ensure_ascii=False).encode("utf-8")  # can itself be sent


def test_settings_that_ask_for_nothing_are_accepted(server: str) -> None:
    harmless = {"n": 1, "top_p": 1.0, "stop": None, "tools": [], "user": "me", "presence_penalty": 0, "logprobs": False}
    assert fetch(server, CHAT, asking("Who are you?", **harmless)).status == 200


def test_paths_methods_and_content_types_that_do_not_exist_are_told(server: str) -> None:
    assert fetch(server, "/nothing").status == 404 and fetch(server, "/nothing").json["error"]["message"]
    wrong_method = fetch(server, CHAT)
    assert wrong_method.status == 405 and wrong_method.json["error"] and "POST" in wrong_method.headers["Allow"]
    plain = fetch(server, CHAT, asking("hi"), headers={"Content-Type": "text/plain"})
    assert plain.status == 415 and "application/json" in plain.json["error"]["message"]


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_large_body_is_refused_before_it_has_been_read(server: str, is_declared: bool) -> None:
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        size = b"Content-Length: 999999999" if is_declared else b"Transfer-Encoding: chunked"
        head = [
            b"POST /v1/chat/completions HTTP/1.1",
            b"Host: " + host.encode(),
            b"Content-Type: application/json",
            size,
        ]
        raw.sendall(b"\r\n".join([*head, b"", b""]))
        for _ in range(0 if is_declared else 17):  # 17 chunks of 64 KiB: just above the limit of 1 MiB
            raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        reply = b""
        while b"larger than 1,048,576 bytes" not in reply:
            received = raw.recv(65536)
            assert received, reply
            reply += received
    assert reply.startswith(b"HTTP/1.1 413")


# Clients that leave, and the line --------------------------------------------------------------------------------

LONG = asking("Never stop", max_tokens=4096)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker_at_once(server: str, stream: bool) -> None:
    before = stats(server)
    connection = connect(server)
    connection.request("POST", CHAT, json.dumps({**LONG, "stream": stream}), JSON)
    wait_for(lambda: stats(server)["busy"] == 1, "the answer begins")
    if stream:
        assert connection.getresponse().read(2000)
    leave(connection)
    left = time.monotonic()
    wait_for(lambda: stats(server)["busy"] == 0, "the worker is free")
    assert time.monotonic() - left < 0.5
    after = stats(server)
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["tokens"] - before["tokens"] < 4000, "it went on to the end"
    assert (
        fetch(server, CHAT, asking("Who are you?")).json["choices"][0]["message"]["content"] == LEARNED["Who are you?"]
    )


def test_others_are_answered_while_an_answer_is_written(server: str) -> None:
    connection = connect(server)
    connection.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
    assert connection.getresponse().read(100)
    slowest = 0.0
    for _ in range(20):
        started = time.monotonic()
        assert fetch(server, "/health").status == 200
        slowest = max(slowest, time.monotonic() - started)
    assert stats(server)["busy"] == 1, "the long answer ended too soon to show anything"
    assert slowest < 0.3
    leave(connection)
    wait_for(lambda: stats(server)["busy"] == 0, "the worker is free")


def test_a_full_line_says_when_to_come_back_and_loses_nobody() -> None:
    with running_server(max_waiting=2) as url:
        connections = [connect(url) for _ in range(3)]
        for number, connection in enumerate(connections):
            connection.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
            wait_for(lambda n=number: sum(stats(url)[name] for name in ("busy", "waiting")) == n + 1, "it is queued")
        wait_for(lambda: stats(url)["busy"] == 1, "the first is at work")
        started = time.monotonic()
        reply = fetch(url, CHAT, asking("hi"))
        assert reply.status == 429 and int(reply.headers["Retry-After"]) >= 1 and time.monotonic() - started < 1
        assert reply.json["error"]["code"] == "queue_full"
        leave(connections[1])  # one that waits: its place is free at once, though the first is still at work
        wait_for(lambda: stats(url)["waiting"] == 1, "the waiting one is taken out of the line")
        assert stats(url)["cancelled"] == 1 and stats(url)["refused"] == 1
        leave(connections[0])
        assert connections[2].getresponse().read(500)
        leave(connections[2])
        wait_for(lambda: stats(url)["busy"] == 0, "the worker is free")
        assert fetch(url, CHAT, asking("Who are you?")).status == 200


def test_hundreds_of_aborted_requests_leave_no_place_taken(server: str) -> None:
    before = stats(server)
    for number in range(200):
        connection = connect(server)
        connection.request("POST", CHAT, json.dumps({**LONG, "stream": bool(number % 2)}), JSON)
        leave(connection)
    wait_for(lambda: stats(server)["busy"] + stats(server)["waiting"] == 0, "all are gone")
    after = stats(server)
    assert after["tokens"] - before["tokens"] < 200 * 100 and after["error"] == before["error"]
    assert fetch(server, CHAT, asking("Who are you?")).status == 200


def test_a_slow_reader_holds_nobody_up(server: str) -> None:
    slow = connect(server)
    slow.request("POST", CHAT, json.dumps({**asking("Never stop", max_tokens=1500), "stream": True}), JSON)
    wait_for(lambda: stats(server)["busy"] == 1, "the slow reader's answer begins")
    assert fetch(server, CHAT, asking("Who are you?")).status == 200  # behind it in the line, and it reads nothing
    assert len(parts_of(events_of(slow.getresponse().read().decode()))[0]["text"]) > 1000
    slow.close()


# Workers on their own ---------------------------------------------------------------------------------------------


def request(question: str = "Who are you?", **fields: Any) -> Any:
    return parse_chat_request(json.dumps(asking(question, **fields)).encode(), Defaults(temperature=0))


def test_workers_end_every_generation_exactly_once_when_they_close() -> None:
    engine, tokenizer = trained(together=False)
    workers = Workers([engine, engine], tokenizer)
    with pytest.raises(Stopped):
        workers.submit(request(), print)
    workers.start()
    seen: list[list[Delta | Finish]] = [[] for _ in range(5)]
    for events in seen:
        workers.submit(request("Never stop", max_tokens=4096), events.append)
    wait_for(lambda: workers.stats()["busy"] == 2, "both workers are at work")
    workers.close()
    assert [[event for event in events if isinstance(event, Finish)] for events in seen] == [
        [events[-1]] for events in seen
    ]
    assert {events[-1].reason for events in seen if isinstance(events[-1], Finish)} == {"cancelled"}
    assert workers.stats()["workers"] == 0
    with pytest.raises(Stopped):
        workers.submit(request(), print)


@pytest.mark.parametrize(("drain_s", "told"), [(20.0, 'finish_reason": "length'), (0.0, "the server is stopping")])
def test_a_running_answer_may_go_on_for_a_while_when_the_server_stops(drain_s: float, told: str) -> None:
    with running_server(drain_s=drain_s) as url:
        connection = connect(url)
        connection.request("POST", CHAT, json.dumps({**asking("Never stop", max_tokens=900), "stream": True}), JSON)
        answer = connection.getresponse()
        assert answer.read(100)
    assert told in answer.read().decode()
    connection.close()


def test_a_failed_generation_is_told_and_the_worker_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine, tokenizer = trained(together=False)
    workers = Workers([engine], tokenizer, max_waiting=0)
    workers.start()
    seen: list[Delta | Finish] = []

    def emit(event: Delta | Finish) -> None:
        if isinstance(event, Delta) and not seen:
            seen.append(event)
            raise RuntimeError("CUDA out of memory")
        seen.append(event)

    workers.submit(request(), emit)
    wait_for(lambda: bool(seen) and isinstance(seen[-1], Finish), "the failure is told")
    assert seen[-1] == Finish("error") and "out of memory" in caplog.text
    assert "Who are you" not in caplog.text and "tiny model" not in caplog.text
    again: list[Delta | Finish] = []
    wait_for(lambda: workers.stats()["busy"] == 0, "the worker is free")
    workers.submit(request(), again.append)
    with pytest.raises(Busy):
        for _ in range(50):
            workers.submit(request("Never stop"), seen.append)
    wait_for(lambda: bool(again) and isinstance(again[-1], Finish), "the next answer")
    assert isinstance(again[-1], Finish) and again[-1].reason == "stop"
    workers.close()


# Who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/ui/main.js", "/health", "/nothing", "/v1/chat/completions"])
def test_every_reply_carries_the_security_headers(server: str, path: str) -> None:
    headers = fetch(server, path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


def test_the_page_has_no_inline_code_and_nothing_from_elsewhere(server: str) -> None:
    page = fetch(server, "/")
    assert page.status == 200 and page.headers.get_content_type() == "text/html"
    assert "style=" not in page.text and "onclick" not in page.text and "<style" not in page.text
    assert page.text.count("<script") == page.text.count('<script type="module" src=')
    for name in (ROOT / "nanochat" / "serve" / "ui").iterdir():
        served = fetch(server, f"/ui/{name.name}")
        assert served.status == 200 and served.text == name.read_text(encoding="utf-8")
        foreign = served.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in foreign and "https://" not in foreign
        for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert unsafe not in foreign


@pytest.mark.parametrize(
    "path",
    ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/..%2fapp.py", "/ui//etc/passwd", "/ui/%2fetc/passwd", "/ui/", "/ui",
     "/ui/..\\app.py", "/ui/%00", "/../../etc/passwd"],
)  # fmt: skip
def test_static_files_stay_in_their_folder(server: str, path: str) -> None:
    reply = fetch(server, path)
    assert reply.status in (307, 404) and "import" not in reply.text and "root:" not in reply.text


def test_a_foreign_name_that_leads_here_is_refused(server: str) -> None:
    assert fetch(server, "/health", headers={"Host": "evil.example"}).status == 421
    assert fetch(server, CHAT, asking("hi"), headers={**JSON, "Host": "evil.example:8000"}).status == 421
    for name in ("localhost:1234", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert fetch(server, "/health", headers={"Host": name}).status == 200
    with running_server(hosts=()) as url:
        assert fetch(url, "/health", headers={"Host": "my.machine"}).status == 200


def test_a_foreign_page_gets_no_permission(server: str) -> None:
    origin = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = fetch(server, CHAT, headers=origin, method="OPTIONS")
    assert preflight.status == 405 and not [name for name in preflight.headers if name.startswith("Access-Control")]


# The recipe ---------------------------------------------------------------------------------------------------


@pytest.fixture
def saved_model(base_dir: Path) -> Path:
    engine, tokenizer = trained(together=False)
    model: Any = engine.model
    meta = {"step": 3, "model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    tensors: Any = {"model": dict(model.named_parameters()), "optimizer": {}}
    write_checkpoint(run_folder("sft", "d2") / "step_000003", tensors, {}, meta, tokenizer)
    return base_dir


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_recipe_serves_and_stops_gracefully(saved_model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "scripts.chat_web", "--port=0", "-t", "0", "--device-type=cpu"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(saved_model)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout and process.stderr
            printed = []
            while "http://" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
                printed.append(line)
            url = line[line.index("http://") :].split("/  ")[0]
            assert "sft-d2, step 3" in "".join(printed)
            assert fetch(url, CHAT, asking("What is 37*24?")).json["choices"][0]["message"]["content"].endswith("888.")
            long = connect(url)
            long.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
            answer = long.getresponse()
            assert answer.read(100)
            process.send_signal(number)
            assert answer.read().decode().endswith("data: [DONE]\n\n"), "the running answer is ended properly"
            rest, errors = process.communicate(timeout=20)
            long.close()
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert rest.splitlines()[-1] == "stopped" and "Traceback" not in errors
    assert "37*24" not in rest + errors and "888" not in rest + errors, "conversations are not logged"


def test_a_port_in_use_is_told_in_one_line_before_a_model_is_looked_for(base_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            chat_web.main([f"--port={port}"])
    told = str(caught.value)
    assert f"--port={port}: already in use" in told and "--port=0" in told and "\n" not in told


def test_a_bad_host_and_a_missing_model_are_told_in_one_line(base_dir: Path) -> None:
    for host in ("no.such.host.invalid", "203.0.113.7", "x" * 70):
        with pytest.raises(UserError, match="--host=") as caught:
            chat_web.main([f"--host={host}", "--port=0"])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no sft model"):
        chat_web.main(["--port=0"])


def test_a_missing_extra_is_told_with_the_command_that_installs_it(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_web, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs starlette and uvicorn: bash runs/setup.sh serve"):
        chat_web.main(["--port=0"])


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://localhost:")])
def test_the_address_can_be_typed_into_a_browser(host: str, shown: str) -> None:
    with chat_web.listen(host, 0) as listener:
        assert chat_web.address(host, listener) == f"{shown}{listener.getsockname()[1]}/"


def test_hostile_text_is_passed_on_as_it_is(server: str) -> None:
    assert fetch(server, CHAT, asking("Show me some HTML")).json["choices"][0]["message"]["content"] == HOSTILE
