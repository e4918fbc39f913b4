"""Clients that leave, the waiting line, and the workers behind it: no place is ever lost, every answer has one end."""

import json
import threading
import time
from collections.abc import Callable, Iterator
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
from nanochat.serve.limits import Defaults
from nanochat.serve.requests import parse_chat_request
from nanochat.serve.workers import Busy, Delta, Finish, Stopped, Workers


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
    left = time.monotonic()
    wait_until_idle(server)
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
    wait_until_idle(server)


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
        wait_until_idle(url)
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


@pytest.mark.parametrize("failure", [RuntimeError, KeyError, AssertionError, OSError, MemoryError])
def test_a_failed_generation_is_told_and_the_worker_goes_on(
    caplog: pytest.LogCaptureFixture, failure: type[Exception]
) -> None:
    engine, tokenizer = trained(together=False)
    workers = Workers([engine], tokenizer, max_waiting=0)
    workers.start()
    seen: list[Delta | Finish] = []

    def emit(event: Delta | Finish) -> None:
        if isinstance(event, Delta) and not seen:
            seen.append(event)
            raise failure("CUDA out of memory")
        seen.append(event)

    workers.submit(request(), emit)
    wait_for(lambda: bool(seen) and isinstance(seen[-1], Finish), "the failure is told")
    assert seen[-1] == Finish("error")
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "Traceback" in caplog.text
    assert f"a generation failed: {failure.__name__}: " in caplog.messages[0] and "out of memory" in caplog.messages[0]
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


def test_a_failure_is_answered_with_status_500_and_the_next_question_as_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server() as url:
        with monkeypatch.context() as broken:
            broken.setattr("nanochat.serve.workers.render_for_completion", lambda *_: {}["missing"])
            whole = fetch(url, CHAT, asking("Who are you?"))
            assert whole.status == 500 and whole.json["error"]["type"] == "server_error"
            streamed = events_of(fetch(url, CHAT, asking("Who are you?", stream=True)).text)
            assert (
                streamed[-1]["error"]["type"] == "server_error" and "log says why" in streamed[-1]["error"]["message"]
            )
        assert fetch(url, "/health").status == 200 and stats(url)["error"] == 2
        assert fetch(url, CHAT, asking("Who are you?")).status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_line_whose_last_worker_dies_is_sent_away_and_nothing_new_is_taken() -> None:
    engine, tokenizer = trained(together=False)
    workers = Workers([engine, engine], tokenizer)
    workers.start()

    def die(event: Delta | Finish) -> None:
        raise SystemExit  # ends the thread, which no generation's own failure does

    workers.submit(request("Never stop"), die)
    wait_for(lambda: workers.num_ready == 1, "one worker is left")
    seen: list[list[Delta | Finish]] = [[] for _ in range(3)]
    busy = workers.submit(request("Never stop", max_tokens=4096), seen[0].append)
    wait_for(lambda: bool(seen[0]), "the last worker is at work")
    workers.submit(request(), die)
    for events in seen[1:]:
        workers.submit(request(), events.append)
    workers.cancel(busy)
    wait_for(lambda: workers.num_ready == 0, "no worker is left")
    assert [events[-1] for events in seen[1:]] == [Finish("error")] * 2
    with pytest.raises(Stopped):
        workers.submit(request(), print)
    workers.close()


class WatchedModel:
    """A model that tells before every forward how many tokens it is about to read."""

    def __init__(self, model: Any, before: Callable[[int], None]) -> None:
        self.config, self.new_state, self._model, self._before = model.config, model.new_state, model, before

    def next_logits(self, token_ids: Tensor, state: DecodeState) -> Tensor:
        self._before(token_ids.size(1))
        return self._model.next_logits(token_ids, state)


def test_a_client_that_leaves_while_its_long_prompt_is_read_frees_the_worker_after_one_chunk() -> None:
    engine, tokenizer = trained(together=False)
    is_known = threading.Event()
    read: list[int] = []
    seen: list[Delta | Finish] = []

    def cancel_first(num_tokens: int) -> None:
        read.append(num_tokens)
        assert is_known.wait(10)
        workers.cancel(generation)

    workers = Workers([Engine(WatchedModel(engine.model, cancel_first), engine.stop_ids)], tokenizer)
    workers.start()
    generation = workers.submit(request("word " * 1500), seen.append)
    is_known.set()
    wait_for(lambda: bool(seen), "it has ended")
    assert read == [PREFILL_CHUNK] and [event.reason for event in seen if isinstance(event, Finish)] == ["cancelled"]
    workers.close()
