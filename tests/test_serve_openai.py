"""The real `openai` client, as its users use it: whole answers, streams, log-probabilities, tools, errors."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving import LEARNED, LONG, asking, connect, leave, running_server, stats, wait_for, wait_until_idle

openai = pytest.importorskip("openai", reason="the extra `dev` is missing: bash runs/setup.sh dev")

WHO = [{"role": "user", "content": "Who are you?"}]
KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(max_rows=4, names=["first", "second"]) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_whole_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="second", messages=WHO, max_completion_tokens=200)
    assert answer.model == "second" and answer.object == "chat.completion"
    assert answer.choices[0].message.content == LEARNED["Who are you?"]
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream(client: Any) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(model="first", messages=WHO, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == LEARNED["Who are you?"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 10 and chunks[0].usage is None
    with client.chat.completions.stream(model="first", messages=WHO) as helper:
        kinds = {event.type for event in helper}
        assert helper.get_final_completion().choices[0].message.content == LEARNED["Who are you?"]
    assert "content.done" in kinds


def test_a_stream_that_is_closed_frees_its_row(client: Any, url: str) -> None:
    before = stats(url)["cancelled"]
    with client.chat.completions.create(model="first", stream=True, **LONG) as stream:
        next(iter(stream))
    wait_until_idle(url)
    assert stats(url)["cancelled"] == before + 1


def test_stop_strings_seeds_and_several_answers(client: Any) -> None:
    stopped = client.chat.completions.create(model="first", messages=WHO, stop=["trained", "five"])
    assert stopped.choices[0].message.content == "I am a tiny model that was "
    assert stopped.choices[0].finish_reason == "stop"
    random = [{"role": "user", "content": "Say something random"}]
    hot = {"model": "first", "messages": random, "temperature": 2.0, "max_tokens": 12, "extra_body": {"top_k": 0}}
    several = client.chat.completions.create(n=3, seed=11, **hot)
    again = client.chat.completions.create(n=3, seed=11, **hot)
    texts = [str(choice.message.to_dict()) for choice in several.choices]
    assert texts == [str(choice.message.to_dict()) for choice in again.choices] and len(set(texts)) == 3


def test_log_probabilities_of_chats(client: Any) -> None:
    wanted = {"model": "first", "messages": WHO, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**wanted).choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.top_logprobs[0].logprob == entry.logprob, "greedily the likeliest is taken"
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
    with client.chat.completions.create(stream=True, **wanted) as stream:
        logprobs = [c.choices[0].logprobs for c in stream if c.choices and c.choices[0].logprobs]
    streamed = [entry for piece in logprobs for entry in piece.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-4)
    assert client.chat.completions.create(model="first", messages=WHO).choices[0].logprobs is None


def test_completions_with_echo_and_log_probabilities(client: Any) -> None:
    done = client.completions.create(model="first", prompt="a tiny", echo=True, logprobs=2, max_tokens=4, temperature=0)
    choice = done.choices[0]
    assert choice.text.startswith("a tiny") and choice.finish_reason == "length" and done.object == "text_completion"
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
    assert "".join(choice.logprobs.tokens) == choice.text
    several = client.completions.create(model="first", prompt=["a", "b"], n=2, max_tokens=3, temperature=1.0, seed=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    with client.completions.create(model="first", prompt="a tiny", max_tokens=4, temperature=0, stream=True) as stream:
        assert "a tiny" + "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_the_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["first", "second"]
    assert client.models.retrieve("second").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("third")
    assert caught.value.code == "model_not_found"


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def test_tools_are_refused_unless_none_may_be_called(client: Any) -> None:
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="has not learned to call functions") as caught:
            client.chat.completions.create(model="first", messages=WHO, tools=[TOOL], **choice)
        assert caught.value.param == "tools" and caught.value.code == "unsupported"
    answer = client.chat.completions.create(model="first", messages=WHO, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == LEARNED["Who are you?"]
    called = [*WHO, {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "sunny"}]
    with pytest.raises(openai.BadRequestError, match="role 'tool' is unknown"):
        client.chat.completions.create(model="first", messages=called)


def test_the_models_own_calculator_is_no_tool_call_of_the_clients(client: Any) -> None:
    answer = client.chat.completions.create(**asking("What is 37*24?", model="first"))
    assert answer.choices[0].message.content == "Let me see: it is 888."
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"messages": []}, "1 to 500 messages", "messages"),
        ({"temperature": 3}, "temperature: 3 is not a number from 0 to 2", "temperature"),
        ({"n": 1000}, "n: 1000 is not a whole number from 1 to 16", "n"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "at most 8,000", "messages[0]"),
    ],
)
def test_bad_requests_are_the_clients_own_errors(client: Any, fields: Any, told: str, param: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(told)) as caught:
        client.chat.completions.create(**{"model": "first", "messages": WHO, **fields})
    assert caught.value.param == param


def test_a_conversation_that_does_not_fit_is_refused_where_the_server_was_told_to() -> None:
    turn = [{"role": "user", "content": "way back " * 200}, {"role": "assistant", "content": "yes " * 200}]
    with (
        running_server(context="refuse") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(
            openai.BadRequestError, match=r"[\d,]+ tokens; beside an answer .* room for 8,172"
        ) as caught:
            client.chat.completions.create(model="nanochat", messages=[*turn * 12, *WHO], max_tokens=20)
        assert caught.value.code == "context_length_exceeded"
        answer = client.chat.completions.create(model="nanochat", messages=[*turn, *WHO], max_tokens=20)
        assert answer.usage.prompt_tokens > 1000


def test_a_full_line_and_a_missing_key_are_the_clients_own_errors() -> None:
    with running_server(max_waiting=0) as url:
        long = connect(url)
        long.request("POST", "/v1/chat/completions", *posted(LONG))
        wait_for(lambda: stats(url)["busy"] == 1, "the only row is taken")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="nanochat", messages=WHO)
            assert int(caught.value.response.headers["Retry-After"]) >= 1 and caught.value.code == "queue_full"
            leave(long)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=4) as patient:
            assert patient.chat.completions.create(model="nanochat", messages=WHO).choices[0].message.content


def posted(body: dict[str, Any]) -> tuple[str, dict[str, str]]:
    import json

    return json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}


def test_with_keys_only_who_has_one_is_answered() -> None:
    from nanochat.serve.access import Access

    with running_server(access=Access(keys=["another-key-of-some-length", KEY])) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as known:
            assert known.chat.completions.create(model="nanochat", messages=WHO).choices[0].message.content
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=KEY + "x", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.models.list()
        assert caught.value.code == "invalid_api_key"
