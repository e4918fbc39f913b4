"""The server's answers and its refusals: OpenAI's protocol, whole and streamed, and every limit told in words."""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import (
    CHAT,
    HOSTILE,
    LEARNED,
    ROOT,
    SUM,
    UNICODE,
    asking,
    events_of,
    fetch,
    parts_of,
    running_server,
    stats,
)

from nanochat.serve import highlight, limits
from nanochat.serve.limits import Defaults, RequestError
from nanochat.serve.requests import parse_chat_request, parse_completion_request


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as url:
        yield url


# Answers -------------------------------------------------------------------------------------------------------


def test_a_whole_answer_has_openais_shape(server: str) -> None:
    reply = fetch(server, CHAT, asking("Who are you?", model="nanochat"))
    assert reply.status == 200
    body = reply.json
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "nanochat"
    assert abs(body["created"] - time.time()) < 60
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] == LEARNED["Who are you?"]
    assert choice["finish_reason"] == "stop" and choice["index"] == 0 and choice["logprobs"] is None
    usage = body["usage"]
    assert choice["nanochat"]["context_used"] == usage["total_tokens"] and choice["nanochat"]["tokens_per_s"] > 0
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
    end = events[-2]["choices"][0]
    assert (end["delta"], end["logprobs"], end["finish_reason"]) == ({}, None, "stop")
    assert end["nanochat"].keys() == {"context_used", "tokens_per_s"}
    assert end["nanochat"]["context_used"] == events[-1]["usage"]["total_tokens"]
    assert {event["usage"] for event in events[:-1]} == {None}
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
    assert message == {"role": "assistant", "content": content, "refusal": None, "nanochat": {"parts": SUM}}


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
    told = model["nanochat"]["limits"]
    assert set(told) == {name.lower() for name in dir(limits) if name.startswith("MAX_")}
    assert told["max_message_chars"] == limits.MAX_MESSAGE_CHARS and told["max_waiting"] == 16
    assert model["nanochat"]["defaults"].keys() >= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    assert fetch(server, "/v1/models/nanochat").json == model
    assert fetch(server, "/v1/models/other").status == 404
    assert model["nanochat"]["context_tokens"] == 8192
    assert fetch(server, "/health").json == {"status": "ok", "ready": True, "model": "nanochat"}
    now = stats(server)
    assert (now["workers"], now["busy"], now["waiting"]) == (1, 0, 0)


def test_the_page_of_the_server_shows_every_limit_as_it_is() -> None:
    rows = []
    for name, limit in limits.LIMITS.items():
        code = f" (`{limit.code}`)" if limit.code else ""
        rows.append(f"| `{name}` | {limits.spelled(limit.value)} | {limit.status or ''} | {limit.message}{code} |")
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith("| `max_")]
    assert shown == rows, "write into docs/server.md:\n" + "\n".join(rows)
    constants = {name.lower(): getattr(limits, name) for name in dir(limits) if name.startswith("MAX_")}
    assert constants == {name: limit.value for name, limit in limits.LIMITS.items()}
    assert limits.MAX_CODE_CHARS == highlight.MAX_CODE_CHARS


def test_hostile_text_is_passed_on_as_it_is(server: str) -> None:
    assert fetch(server, CHAT, asking("Show me some HTML")).json["choices"][0]["message"]["content"] == HOSTILE


# Refusals ------------------------------------------------------------------------------------------------------

HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
BAD: list[tuple[object, int, str]] = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b'{"messages": "\xff"}', 400, "UTF-8"),
    (b"[" * 50_000, 400, "nested"),
    (b'{"messages": ' + b"[" * 32 + b"]" * 32 + b"}", 400, "nested too deeply; at most 32 levels"),
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
    (asking("hi", max_tokens=0), 400, "max_tokens: 0 is not a whole number from 1 to 4,096"),
    (asking("hi", max_tokens=4097), 400, "max_tokens"),
    (asking("hi", top_p=1.01), 400, "top_p: 1.01 is not a number from 0 to 1"),
    (asking("hi", min_p=-0.1), 400, "min_p"),
    (asking("hi", repetition_penalty=0.9), 400, "repetition_penalty: 0.9 is not a number from 1 to 2"),
    (asking("hi", max_completion_tokens=[]), 400, "max_completion_tokens"),
    (asking("hi", seed="x"), 400, "seed"),
    (asking("hi", stream=1), 400, "stream: must be true or false"),
    (asking("hi", stream_options=[1]), 400, "stream_options"),
    (asking("hi", seed=2**63), 400, "seed: .* is not a whole number from -9,223,372,036,854,775,807 to"),
    (asking("hi", n=17), 400, "n: 17 is not a whole number from 1 to 16"),
    (asking("hi", n=10**400), 400, "n: 1000.*… is not"),
    (asking("hi", n=2.0), 400, "n: 2.0 is not a whole number"),
    (asking("hi", logprobs=5), 400, "logprobs: must be true or false"),
    (asking("hi", top_logprobs=3), 400, "top_logprobs: only together with logprobs: true"),
    (asking("hi", logprobs=True, top_logprobs=21), 400, "top_logprobs: 21 is not a whole number from 0 to 20"),
    (asking("hi", logit_bias={"5": 1}), 400, "logit_bias: this server does not support it"),
    (asking("hi", response_format={"type": "json_object"}), 400, "response_format: this server does not"),
    (asking("hi", tools=[{"type": "function"}]), 400, "tools: this model has not learned to call functions"),
    (asking("hi", tools=[{"type": "function"}], tool_choice="auto"), 400, 'send tool_choice: "none"'),
    (asking("hi", tool_choice="required"), 400, "tool_choice: this server does not support it"),
    (asking("hi", stop=[""]), 400, "stop: a string has 0 characters; 1 to 100 are allowed"),
    (asking("hi", stop="x" * 101), 400, "stop: a string has 101 characters"),
    (asking("hi", stop=["x"] * 17), 400, "stop: 17 strings; at most 16 are allowed"),
    (asking("hi", stop=5), 400, "stop: must be a string or a list of strings"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "stop": "\\ud800"}', 400, "unpaired surrogate"),
    (asking("hi", tempreature=1), 400, '"tempreature": unknown field; known are'),
    (asking("hi", model="gpt-5"), 404, "model 'gpt-5' is not served here; leave it out or use one of nanochat"),
    (asking("hi", model=["nanochat"]), 400, "is no name of a model"),
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


@pytest.mark.parametrize(
    ("name", "param"), [("tempreature", "tempreature"), ("größe", "größe"), ("\ud800", "?"), ("x" * 99, "x" * 40 + "…")]
)
def test_the_field_at_fault_is_named_as_it_was_sent(server: str, name: str, param: str) -> None:
    reply = fetch(server, CHAT, asking("hi", **{name: 1}))
    assert reply.status == 400 and reply.json["error"]["param"] == param
    assert fetch(server, CHAT, asking("hi", top_k=-1)).json["error"]["param"] == "top_k"


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
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "logit_bias",
    "prompt",
    "echo",
    "best_of",
    "x",
]


@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON), st.lists(ANY_JSON))
@settings(max_examples=300, deadline=None)
def test_whatever_is_sent_is_a_request_or_a_refusal(fields: dict[str, Any], messages: list[Any]) -> None:
    for body in (fields, {**fields, "messages": messages}, {**asking("hi"), **fields}, {"prompt": messages, **fields}):
        for parse in (parse_chat_request, parse_completion_request):
            try:
                parse(json.dumps(body).encode(), Defaults())
            except RequestError as refusal:
                json.dumps([refusal.message, refusal.param], ensure_ascii=False).encode("utf-8")  # can itself be sent


def test_settings_that_ask_for_nothing_are_accepted(server: str) -> None:
    harmless = {"n": 1, "top_p": 1.0, "stop": None, "tools": [], "user": "me", "presence_penalty": 0, "logprobs": False}
    assert fetch(server, CHAT, asking("Who are you?", **harmless)).status == 200
    unused = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none", "logit_bias": {}}
    message = fetch(server, CHAT, asking("Who are you?", **unused)).json["choices"][0]["message"]
    assert message["content"] == LEARNED["Who are you?"] and "tool_calls" not in message


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
