"""Texts that go on: /v1/completions, as lm-eval asks it, and lm-eval itself; the tokenizer's routes; the ancestor's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from serving import LEARNED, ROOT, asking, fetch, new_engine, running_server, stats, trained

from nanochat.engine import Engine
from nanochat.tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"
TEXT = LEARNED["Who are you?"]
CASES = [
    ("I am a tiny", " model"),
    ("I am a tiny", " giant"),
    ("I know five", " answers"),
    ("Let me", " see: it is 888."),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server(max_rows=4) as url:
        yield url


@pytest.fixture(scope="module")
def model() -> tuple[Engine, Tokenizer]:
    return new_engine(), trained(together=False)[1]


def completed(url: str, **fields: Any) -> Any:
    reply = fetch(url, COMPLETIONS, fields)
    assert reply.status == 200, reply.text
    return reply.json


def scored(model: tuple[Engine, Tokenizer], context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether a greedy model would write it."""
    engine, tokenizer = model
    tokens = engine.score([tokenizer.bos, *context, *continuation], 1)[1 + len(context) :]
    return sum(t.logprob or 0.0 for t in tokens), all(t.top[0][0] == t.token_id for t in tokens)


# As lm-eval asks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_ids", [True, False])
def test_log_probabilities_of_given_texts_are_the_models_own(
    server: str, model: tuple[Engine, Tokenizer], as_ids: bool
) -> None:
    _, tokenizer = model
    whole = [tokenizer.encode(context + continuation) for context, continuation in CASES]
    sizes = [len(tokenizer.encode(context)) for context, _ in CASES]
    prompt: Any = whole if as_ids else ["".join(case) for case in CASES]
    body = completed(server, prompt=prompt, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(len(CASES)))
    for choice, ids, size in zip(body["choices"], whole, sizes):
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(ids) + 1, "the text's tokens and one more"
        own, tops = told["token_logprobs"][size:-1], told["top_logprobs"][size:-1]
        assert all(token in top for token, top in zip(told["tokens"], told["top_logprobs"]))
        is_greedy = all(logprob == max(top.values()) for logprob, top in zip(own, tops))
        expected = scored(model, ids[:size], ids[size:])
        assert (sum(own), is_greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_a_text_that_ends_by_itself_has_the_token_that_ended_it(server: str, model: tuple[Engine, Tokenizer]) -> None:
    _, tokenizer = model
    start, end = tokenizer.special("<|assistant_start|>"), "<|assistant_end|>"
    question = [tokenizer.bos, tokenizer.special("<|user_start|>"), *tokenizer.encode("Who are you?")]
    ids = [*question, tokenizer.special("<|user_end|>"), start, *tokenizer.encode(TEXT)]
    [choice] = completed(server, prompt=ids, temperature=0, max_tokens=1, logprobs=1, echo=True)["choices"]
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == len(ids) + 1
    assert choice["logprobs"]["tokens"][-1] == end and choice["logprobs"]["token_logprobs"][-1] > -0.5
    assert choice["text"].endswith(TEXT) and choice["logprobs"]["token_logprobs"][0] is None
    without_echo = completed(server, prompt=ids, temperature=0, max_tokens=5, logprobs=1)["choices"][0]
    assert without_echo["text"] == "" and without_echo["logprobs"]["tokens"] == []


def test_an_echo_alone_needs_no_new_token(server: str) -> None:
    [choice] = completed(server, prompt="I am a tiny", echo=True, max_tokens=0, logprobs=0)["choices"]
    assert choice["text"] == "I am a tiny" and choice["finish_reason"] == "length"
    assert "".join(choice["logprobs"]["tokens"]) == "I am a tiny"
    assert None not in choice["logprobs"]["token_logprobs"], "the text begins where a document does"
    assert fetch(server, COMPLETIONS, {"prompt": "x", "max_tokens": 0}).status == 400


def test_offsets_find_each_token_in_the_text_also_in_a_stream(server: str) -> None:
    asked = {"prompt": "Grüße, 你好 I am a", "echo": True, "logprobs": 0, "max_tokens": 12, "temperature": 0}
    [choice] = completed(server, **asked)["choices"]
    told = choice["logprobs"]
    for token, start in zip(told["tokens"], told["text_offset"]):
        assert token.startswith("bytes:") or choice["text"].startswith(token, start)
    text = fetch(server, COMPLETIONS, {**asked, "stream": True}).text
    events = [json.loads(block.removeprefix("data: ")) for block in text.split("\n\n")[:-2]]
    pieces = [event["choices"][0] for event in events]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    for name in ("tokens", "text_offset"):
        assert [value for piece in pieces for value in piece["logprobs"][name]] == told[name]
    assert pieces[-1]["finish_reason"] == "length"


def test_stop_strings_end_a_text_and_its_tokens(server: str) -> None:
    asked = {"prompt": "I am a tiny", "max_tokens": 50, "temperature": 0, "logprobs": 0}
    [free] = completed(server, **asked)["choices"]
    stop = "".join(free["logprobs"]["tokens"][3:5])
    [choice] = completed(server, **asked, stop=[stop, "xyz"])["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == free["text"][: free["text"].index(stop)]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_prompts_and_answers_are_counted_once(server: str) -> None:
    one = completed(server, prompt="I am", max_tokens=3, temperature=0)["usage"]
    many = completed(server, prompt=["I am", "I am"], n=3, max_tokens=3, temperature=0)
    assert many["usage"]["prompt_tokens"] == 2 * one["prompt_tokens"]
    assert many["usage"]["completion_tokens"] == 6 * one["completion_tokens"]
    assert len(many["choices"]) == 6


HUGE = 10**30
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [[]]}, "prompt: must be a text, a list of texts"),
    ({"prompt": []}, "prompt: must be a text"),
    ({"prompt": [1, "x"]}, "prompt: must be a text"),
    ({"prompt": [True]}, "prompt: must be a text"),
    ({"prompt": [-1]}, "prompt: must be a text"),
    ({"prompt": [400 * 2]}, "there is no token 800; this model has the ids 0 to"),
    ({"prompt": [HUGE]}, "there is no token huge"),
    ({"prompt": ["x"] * 33}, "prompt: 33 prompts; at most 32"),
    ({"prompt": "x" * 32_001}, "32,001 characters in all; at most 32,000"),
    ({"prompt": [1] * 8192}, "the prompt has 8,193 tokens; beside an answer this model's context has room for 8,191"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens: 0 is not a whole number from 1"),
    ({"prompt": "x", "logprobs": 21}, "logprobs: 21 is not a whole number from 0 to 20"),
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix: this server does not support it"),
    ({"prompt": "x", "messages": []}, "unknown field"),
]


@pytest.mark.parametrize(("body", "told"), BAD, ids=range(len(BAD)))
def test_every_bad_completion_is_told(server: str, body: dict[str, Any], told: str) -> None:
    before = stats(server)
    reply = fetch(server, COMPLETIONS, body)
    assert reply.status == 400 and told in reply.json["error"]["message"], reply.text
    assert stats(server) == before


# The tokenizer, the ancestor's route, figures ----------------------------------------------------------------------


def test_the_tokenizer_can_be_asked(server: str, model: tuple[Engine, Tokenizer]) -> None:
    _, tokenizer = model
    about = fetch(server, "/tokenizer_info").json
    assert fetch(server, "/tokenize", {"prompt": about["bos_token"]}).json["tokens"] == [tokenizer.bos]
    reply = fetch(server, "/tokenize", {"prompt": "Grüße <|bos|>", "add_special_tokens": False}).json
    assert reply["tokens"] == tokenizer.encode("Grüße <|bos|>") and reply["count"] == len(reply["tokens"])
    assert fetch(server, "/detokenize", {"tokens": reply["tokens"]}).json == {"prompt": "Grüße <|bos|>"}
    for path, body in (("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [10**6]}), ("/detokenize", {})):
        assert fetch(server, path, body).status == 400


def test_the_ancestors_route_streams_as_it_did(server: str) -> None:
    body = {**asking("What is 37*24?"), "temperature": 0.0, "top_k": 50, "max_tokens": 100}
    reply = fetch(server, "/chat/completions", body)
    assert reply.headers.get_content_type() == "text/event-stream"
    events = [json.loads(block.removeprefix("data: ")) for block in reply.text.split("\n\n") if block]
    assert events[-1] == {"done": True} and all(event.keys() == {"token", "gpu"} for event in events[:-1])
    assert "".join(event["token"] for event in events[:-1]) == "Let me see: it is 888."
    refused = fetch(server, "/chat/completions", {"messages": []})
    assert refused.status == 400 and "1 to 500" in refused.json["detail"]


def test_figures_are_told_in_prometheus_text(server: str) -> None:
    fetch(server, COMPLETIONS, {"prompt": "I am", "max_tokens": 3})
    reply = fetch(server, "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = reply.text.splitlines()
    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    told = stats(server)
    assert int(samples['nanochat_tokens_total{model="nanochat"}']) == told["tokens"] > 0
    assert int(samples['nanochat_answers_total{model="nanochat",end="length"}']) == told["length"] > 0
    assert samples['nanochat_rows{model="nanochat"}'] == "4"
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {name.partition("{")[0] for name in samples} == typed


# lm-eval itself --------------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, url = sys.argv[1:]
manager = TaskManager(include_path=folder, include_defaults=False)
settings = {"base_url": url + "/v1/completions", "model": "nanochat", "max_length": 8192, "num_concurrent": 3}
done = lm_eval.simple_evaluate(model="local-completions", model_args=settings, tasks=["choice", "goes_on", "rolling"],
                               task_manager=manager, log_samples=True, bootstrap_iters=0)
samples = {task: sorted(found, key=lambda s: s["doc_id"]) for task, found in done["samples"].items()}
print(json.dumps({task: [[list(r) if isinstance(r, (list, tuple)) else r for r in s["resps"]] for s in found]
                  for task, found in samples.items()}))
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: "{target}"
target_delimiter: ""
{more}
"""


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the extra `lm-eval` is missing: bash runs/setup.sh dev lm-eval"
)
def test_lm_eval_itself_gets_the_models_own_numbers(
    server: str, model: tuple[Engine, Tokenizer], tmp_path: Path
) -> None:
    docs = [
        {"context": context, "choices": [" model", " giant", " answers", " see: it is 888."], "label": 0}
        for context in dict.fromkeys(context for context, _ in CASES)
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    until = 'generation_kwargs: {until: ["that", "\\n"], max_gen_toks: 20}\nmetric_list: [{metric: bypass}]'
    kinds = {
        "choice": ("multiple_choice", "label", 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'),
        "goes_on": ("generate_until", "label", until),
        "rolling": ("loglikelihood_rolling", "{{context}}", "metric_list: [{metric: byte_perplexity}]"),
    }
    for name, (kind, target, more) in kinds.items():
        text = TASK.format(name=name, data=data, kind=kind, target=target, more=more)
        (tmp_path / f"{name}.yaml").write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", DRIVER, str(tmp_path), server]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    _, tokenizer = model
    for doc, resps in zip(docs, found["choice"]):
        context = str(doc["context"])
        for choice, [told] in zip(doc["choices"], resps):
            size = len(tokenizer.encode(context))
            ids = tokenizer.encode(context + choice)
            logprob, is_greedy = scored(model, ids[:size], ids[size:])
            assert (float(told[0]), str(told[1])) == (pytest.approx(logprob, abs=1e-3), str(is_greedy))
    for doc, [[told]] in zip(docs, found["goes_on"]):
        asked = {"prompt": doc["context"], "stop": ["that", "\n"], "max_tokens": 20, "temperature": 0}
        assert told == completed(server, **asked)["choices"][0]["text"]
    for doc, [told] in zip(docs, found["rolling"]):
        logprob, _ = scored(model, [], tokenizer.encode(str(doc["context"])))
        assert float(told[0] if isinstance(told, list) else told) == pytest.approx(logprob, abs=1e-3)
