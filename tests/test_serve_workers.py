"""Clients that leave, the waiting line, and the workers behind it: no place is ever lost, every answer has one end."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from serving import (
    CHAT,
    JSON,
    LEARNED,
    LONG,
    asking,
    connect,
    events_of,
    fetch,
    leave,
    new_engine,
    parts_of,
    running_server,
    stats,
    trained,
    wait_for,
    wait_until_idle,
)
from torch import Tensor

from nanochat.engine import PREFILL_CHUNK, Engine
from nanochat.model.state import DecodeState
from nanochat.serve import answers
from nanochat.serve.limits import Defaults
from nanochat.serve.prompts import chat_tasks
from nanochat.serve.requests import parse_chat_request
from nanochat.serve.workers import Busy, Stopped, Task, Workers
from nanochat.serve.writing import Delta, Finish


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as url:
        yield url


# Clients that leave, and the line --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker_at_once(server: str, stream: bool) -> None:
    before = stats(server)
    connection = connect(server)
    connection.request("POST", CHAT, json.dumps({**LONG, "stream": stream}), JSON)
    wait_for(lambda: stats(server)["busy"] == 1, "the answer begins")
    if stream:
        assert connection.getresponse().read(2000)
    leave(connection)
    wait_until_idle(server)
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
    for _ in range(20):
        assert fetch(server, "/health").status == 200
    assert stats(server)["busy"] == 1, "the long answer ended before the others were answered"
    leave(connection)
    wait_until_idle(server)


def test_a_full_line_says_when_to_come_back_and_loses_nobody() -> None:
    with running_server(max_waiting=2) as url:
        connections = [connect(url) for _ in range(3)]
        for number, connection in enumerate(connections):
            connection.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
            wait_for(lambda n=number: sum(stats(url)[name] for name in ("busy", "waiting")) == n + 1, "it is queued")
        wait_for(lambda: stats(url)["busy"] == 1, "the first is at work")
        reply = fetch(url, CHAT, asking("hi"))
        assert reply.status == 429 and int(reply.headers["Retry-After"]) >= 1
        assert reply.json["error"]["code"] == "queue_full"
        leave(connections[1])  # one that waits: its place is free at once, though the first is still at work
        wait_for(lambda: stats(url)["waiting"] == 1, "the waiting one is taken out of the line")
        assert stats(url)["cancelled"] == 1 and stats(url)["refused"] == 1
        leave(connections[0])
        assert connections[2].getresponse().read(500)
        leave(connections[2])
        wait_until_idle(url)
        assert fetch(url, CHAT, asking("Who are you?")).status == 200


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_aborted_requests_leave_no_place_taken(server: str, count: int) -> None:
    before = stats(server)
    for number in range(count):
        connection = connect(server)
        connection.request("POST", CHAT, json.dumps({**LONG, "stream": bool(number % 2)}), JSON)
        leave(connection)
    wait_for(lambda: stats(server)["busy"] + stats(server)["waiting"] == 0, "all are gone")
    after = stats(server)
    assert after["tokens"] - before["tokens"] < count * 100 and after["error"] == before["error"]
    assert fetch(server, CHAT, asking("Who are you?")).status == 200


def test_a_slow_reader_holds_nobody_up(server: str) -> None:
    slow = connect(server)
    slow.request("POST", CHAT, json.dumps({**asking("Never stop", max_tokens=1500), "stream": True}), JSON)
    wait_for(lambda: stats(server)["busy"] == 1, "the slow reader's answer begins")
    assert fetch(server, CHAT, asking("Who are you?")).status == 200  # behind it in the line, and it reads nothing
    assert len(parts_of(events_of(slow.getresponse().read().decode()))[0]["text"]) > 1000
    slow.close()


# Side by side ----------------------------------------------------------------------------------------------------


def test_many_conversations_are_written_side_by_side_each_as_if_it_were_alone() -> None:
    with running_server(max_rows=5) as url:
        alone = {question: fetch(url, CHAT, asking(question, max_tokens=60)).json for question in LEARNED}
        connections = {question: connect(url) for question in LEARNED}
        for question, connection in connections.items():
            connection.request("POST", CHAT, json.dumps(asking(question, stream=True, max_tokens=60)), JSON)
        for question, connection in connections.items():
            events = events_of(connection.getresponse().read().decode())
            assert parts_of(events) == alone[question]["choices"][0]["message"]["nanochat"]["parts"]
            connection.close()


def test_a_new_question_is_answered_while_a_long_answer_is_written() -> None:
    with running_server(max_rows=2) as url:
        long = connect(url)
        long.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
        assert long.getresponse().read(100)
        assert fetch(url, CHAT, asking("Who are you?")).json["choices"][0]["finish_reason"] == "stop"
        assert stats(url)["busy"] == 1, "the long answer ended too soon to show anything"
        leave(long)
        wait_until_idle(url)


def test_several_answers_to_one_question_are_different_samples_of_one_seed() -> None:
    with running_server(max_rows=3) as url:
        body = asking("Say something random", temperature=2, top_k=0, max_tokens=20, seed=5, n=3)
        reply = fetch(url, CHAT, body).json
        texts = [json.dumps(choice["message"]) for choice in reply["choices"]]
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2] and len(set(texts)) == 3
        assert json.dumps(fetch(url, CHAT, {**body, "n": 1}).json["choices"][0]["message"]) == texts[0]
        one = fetch(url, CHAT, {**body, "n": 1}).json["usage"]
        assert reply["usage"]["prompt_tokens"] == one["prompt_tokens"]
        assert 20 < reply["usage"]["completion_tokens"] <= 60
        events = events_of(fetch(url, CHAT, {**body, "stream": True}).text)
        for index, choice in enumerate(reply["choices"]):
            own = [{**e, "choices": [c for c in e["choices"] if c["index"] == index]} for e in events]
            assert parts_of(own) == choice["message"]["nanochat"]["parts"]


def test_a_conversation_that_goes_on_is_not_read_anew(server: str) -> None:
    first = fetch(server, CHAT, asking("Show me some HTML, " * 40)).json
    turns = asking("Show me some HTML, " * 40)["messages"]
    turns += [{"role": "assistant", "content": first["choices"][0]["message"]["nanochat"]["parts"]}]
    second = fetch(server, CHAT, {"messages": [*turns, {"role": "user", "content": "Who are you?"}]}).json["usage"]
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] // 2 < cached < second["prompt_tokens"]


def test_a_request_for_more_answers_than_there_can_ever_be_places_is_told_so() -> None:
    with running_server(max_rows=2, max_waiting=1) as url:
        reply = fetch(url, CHAT, asking("hi", n=4))
        assert reply.status == 400 and "rows and places in its line for 3" in reply.json["error"]["message"]
        assert fetch(url, CHAT, asking("Who are you?", n=3, max_tokens=3)).status == 200


# Slow readers, half-closed and silent sockets ------------------------------------------------------------------------


def raw(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(20)
    made.connect((host, int(port)))
    return made


def posted(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def test_what_a_client_does_not_read_is_kept_up_to_a_limit_and_then_the_client_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "MAX_UNREAD_EVENTS", 50)
    with running_server(max_rows=2) as url, raw(url) as slow:
        slow.sendall(posted({**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}))
        wait_for(lambda: stats(url)["cancelled"] == 1, "the slow reader is given up", timeout_s=60)
        assert stats(url)["busy"] == 0
        received = b""
        while b"[DONE]" not in received[-100:]:
            received += slow.recv(65536)
        assert b"its client did not read it" in received[-300:]


def test_a_client_that_reads_nothing_at_all_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.serve.connections.MAX_STALL_SECONDS", 0.3)
    with running_server() as url, raw(url) as slow:
        slow.sendall(posted({**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}))
        wait_for(lambda: stats(url)["cancelled"] == 1, "the connection is closed, and the row free", timeout_s=60)


def test_a_connection_that_never_asks_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.serve.connections.MAX_HEADER_SECONDS", 0.2)
    with running_server() as url:
        for beginning in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"):
            with raw(url) as silent:
                silent.sendall(beginning)
                with suppress(ConnectionResetError):
                    assert silent.recv(100) == b""
        assert fetch(url, "/health").status == 200


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_BODY_SECONDS", 0.2)
    with running_server() as url, raw(url) as slow:
        slow.sendall(posted(asking("Who are you?"))[:-5])
        assert slow.recv(4096).startswith(b"HTTP/1.1 408") and stats(url)["busy"] == 0


def test_a_client_that_closes_its_half_of_the_connection_has_left(server: str) -> None:
    before = stats(server)["cancelled"]
    with raw(server) as half:
        half.sendall(posted({**LONG, "stream": True}))
        wait_for(lambda: stats(server)["busy"] == 1, "the answer begins")
        half.shutdown(socket.SHUT_WR)
        wait_until_idle(server)
    assert stats(server)["cancelled"] == before + 1


def test_a_flood_of_headers_is_an_error_for_its_client_alone(server: str) -> None:
    with raw(server) as flood:
        flood.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        reply = b""
        try:
            for number in range(4000):
                flood.sendall(f"X-Header-{number}: {'x' * 50}\r\n".encode())
            reply = flood.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            reply = b"HTTP/1.1 400"  # told and closed while we were still talking
    assert reply.startswith(b"HTTP/1.1 400")
    assert fetch(server, "/health").status == 200


NONSENSE = [b"\x16\x03\x01\x02\x00", b"\xff\xfe\r\n\r\n", b"GET\r\n\r\n", b"\x00" * 5000]
NONSENSE += [b"GET /\xff HTTP/1.1\r\nHost: localhost", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5"]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=range(len(NONSENSE)))
def test_what_is_no_request_is_an_error_for_its_client_alone(server: str, nonsense: bytes) -> None:
    with raw(server) as strange:
        strange.sendall(nonsense + b"\r\n\r\n")
        assert strange.recv(4096).startswith(b"HTTP/1.1 400")
    assert fetch(server, "/health").status == 200


# Workers on their own ---------------------------------------------------------------------------------------------


def task(question: str = "Who are you?", **fields: Any) -> list[Task]:
    _, tokenizer = trained(together=False)
    request = parse_chat_request(json.dumps(asking(question, **fields)).encode(), Defaults(temperature=0))
    return chat_tasks(request, tokenizer, 8192, "truncate")


def new_workers(count: int = 1, max_waiting: int = 16, max_rows: int = 1) -> Workers:
    _, tokenizer = trained(together=False)
    return Workers([new_engine(max_rows=max_rows) for _ in range(count)], tokenizer, max_waiting=max_waiting)


def test_workers_end_every_generation_exactly_once_when_they_close() -> None:
    workers = new_workers(2)
    with pytest.raises(Stopped):
        workers.submit(task(), print)
    workers.start()
    seen: list[list[Delta | Finish]] = [[] for _ in range(5)]
    for events in seen:
        workers.submit(task("Never stop", max_tokens=4096), events.append)
    wait_for(lambda: workers.stats()["busy"] == 2, "both workers are at work")
    workers.close()
    assert [[event for event in events if isinstance(event, Finish)] for events in seen] == [
        [events[-1]] for events in seen
    ]
    assert {events[-1].reason for events in seen if isinstance(events[-1], Finish)} == {"cancelled"}
    assert workers.stats()["workers"] == 0
    with pytest.raises(Stopped):
        workers.submit(task(), print)


@pytest.mark.parametrize(("drain_s", "told"), [(20.0, 'finish_reason": "length'), (0.0, "the server is stopping")])
def test_a_running_answer_may_go_on_for_a_while_when_the_server_stops(drain_s: float, told: str) -> None:
    with running_server(drain_s=drain_s) as url:
        connection = connect(url)
        connection.request("POST", CHAT, json.dumps({**asking("Never stop", max_tokens=900), "stream": True}), JSON)
        answer = connection.getresponse()
        assert answer.read(100)
    assert told in answer.read().decode()
    connection.close()


def test_a_draining_server_takes_no_new_question_and_sends_the_line_away() -> None:
    with running_server(drain_s=20.0) as url:
        running, waiting = connect(url), connect(url)
        running.request("POST", CHAT, json.dumps({**LONG, "stream": True}), JSON)
        answer = running.getresponse()
        assert answer.read(100)
        waiting.request("POST", CHAT, json.dumps(asking("Who are you?")), JSON)
        wait_for(lambda: stats(url)["waiting"] == 1, "one waits")
        late = connect(url)
        late.connect()

        def ask_late() -> None:
            sent = waiting.getresponse()  # the server has begun to stop
            told.append((sent.status, json.loads(sent.read())["error"]["message"]))
            late.request("POST", CHAT, json.dumps(asking("Who are you?")), JSON)
            refused = late.getresponse()
            told.append((refused.status, refused.headers["Retry-After"]))
            refused.read()
            late.request("GET", "/health")
            told.append((late.getresponse().status,))
            for connection in (running, waiting, late):
                connection.close()

        told: list[Any] = []
        thread = threading.Thread(target=ask_late)
        thread.start()
    thread.join(20)
    assert told == [(503, "the server is stopping; this answer is incomplete"), (503, "10"), (503,)]


@pytest.mark.parametrize("failure", [RuntimeError, KeyError, AssertionError, OSError, MemoryError])
def test_a_failed_generation_is_told_and_those_beside_it_go_on(
    caplog: pytest.LogCaptureFixture, failure: type[Exception]
) -> None:
    workers = new_workers(max_rows=2, max_waiting=0)
    workers.start()
    seen: list[Delta | Finish] = []
    beside: list[Delta | Finish] = []

    def emit(event: Delta | Finish) -> None:
        if isinstance(event, Delta) and not seen:
            seen.append(event)
            raise failure("CUDA out of memory")
        seen.append(event)

    workers.submit(task("What is 37*24?"), beside.append)
    workers.submit(task(), emit)
    wait_for(lambda: bool(seen) and isinstance(seen[-1], Finish), "the failure is told")
    assert isinstance(seen[-1], Finish) and seen[-1].reason == "error"
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "Traceback" in caplog.text
    assert f"a generation failed: {failure.__name__}: " in caplog.messages[0] and "out of memory" in caplog.messages[0]
    assert "Who are you" not in caplog.text and "tiny model" not in caplog.text
    wait_for(lambda: bool(beside) and isinstance(beside[-1], Finish), "the one beside it ends")
    assert isinstance(beside[-1], Finish) and beside[-1].reason == "stop"
    again: list[Delta | Finish] = []
    wait_for(lambda: workers.stats()["busy"] == 0, "the rows are free")
    workers.submit(task(), again.append)
    with pytest.raises(Busy):
        for _ in range(50):
            workers.submit(task("Never stop"), seen.append)
    wait_for(lambda: bool(again) and isinstance(again[-1], Finish), "the next answer")
    assert isinstance(again[-1], Finish) and again[-1].reason == "stop"
    workers.close()


def test_a_failed_step_ends_those_it_was_made_for_and_the_worker_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(max_rows=2) as url:
        with monkeypatch.context() as broken:
            broken.setattr(Engine, "step", lambda self: {}["missing"])
            whole = fetch(url, CHAT, asking("Who are you?"))
            assert whole.status == 500 and whole.json["error"]["type"] == "server_error"
            streamed = events_of(fetch(url, CHAT, asking("Who are you?", stream=True)).text)
            assert (
                streamed[-1]["error"]["type"] == "server_error" and "log says why" in streamed[-1]["error"]["message"]
            )
        assert fetch(url, "/health").status == 200 and stats(url)["error"] == 2 and stats(url)["busy"] == 0
        reply = fetch(url, CHAT, asking("Who are you?"))
        assert reply.json["choices"][0]["message"]["content"] == LEARNED["Who are you?"]


def test_a_failure_before_the_line_is_answered_with_status_500_and_the_next_question_as_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server() as url:
        with monkeypatch.context() as broken:
            broken.setattr("nanochat.serve.prompts.render_for_completion", lambda *_: {}["missing"])
            assert fetch(url, CHAT, asking("Who are you?")).status == 500
        assert fetch(url, CHAT, asking("Who are you?")).status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_line_whose_last_worker_dies_is_sent_away_and_nothing_new_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = new_workers(2)
    workers.start()
    seen: list[list[Delta | Finish]] = [[] for _ in range(4)]
    for events in seen:
        workers.submit(task("Never stop", max_tokens=4096), events.append)
    wait_for(lambda: all(seen[:2]), "both workers are at work")

    def die(self: Engine) -> None:
        raise SystemExit  # ends the thread, which no generation's own failure does

    monkeypatch.setattr(Engine, "step", die)
    wait_for(lambda: workers.num_ready == 0, "no worker is left")
    wait_for(lambda: all(isinstance(events[-1], Finish) for events in seen if events), "all are told")
    assert [events[-1].reason for events in seen if isinstance(events[-1], Finish)] == ["error"] * 4
    with pytest.raises(Stopped):
        workers.submit(task(), print)
    workers.close()


class WatchedModel:
    """A model that tells before every forward how many tokens it is about to read."""

    def __init__(self, model: Any, before: Callable[[int], None]) -> None:
        self.config, self.new_state, self._model, self._before = model.config, model.new_state, model, before

    def next_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor:
        self._before(token_ids.size(1))
        return self._model.next_logits(token_ids, state)

    def all_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor:
        return self._model.all_logits(token_ids, state)


@pytest.mark.parametrize(("num_forwards", "question"), [(1, "word " * 1500), (5, "Never stop")])
def test_a_client_that_leaves_frees_its_row_after_one_step(num_forwards: int, question: str) -> None:
    engine, tokenizer = trained(together=False)
    is_known = threading.Event()
    read: list[int] = []
    seen: list[Delta | Finish] = []

    def cancel(num_tokens: int) -> None:
        read.append(num_tokens)
        assert is_known.wait(10)
        if len(read) == num_forwards:
            workers.cancel(generation)

    watched = Engine(WatchedModel(engine.model, cancel), list(engine.stop_ids), max_rows=1)
    workers = Workers([watched], tokenizer)
    workers.start()
    [generation] = workers.submit(task(question, max_tokens=100), seen.append)
    is_known.set()
    wait_for(lambda: bool(seen) and isinstance(seen[-1], Finish), "it has ended")
    assert len(read) == num_forwards and (num_forwards > 1 or read == [PREFILL_CHUNK])
    assert [event.reason for event in seen if isinstance(event, Finish)] == ["cancelled"]
    assert not watched.has_work
    workers.close()
