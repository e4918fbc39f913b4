"""Many clients at once, and what no client should send: nobody gets another's text, no row is lost, nothing is a 500.

NANOCHAT_LOAD_SECONDS is how long the slow form of the load test goes on (60).
"""

import http.client
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import CHAT, JSON, LEARNED, ROOT, asking, connect, events_of, fetch, leave, running_server, stats, trained
from serving import wait_for as wait_until

from nanochat import scaling
from nanochat.checkpoint import run_folder, write_checkpoint
from nanochat.model.gpt import build_model
from nanochat.serve.limits import Defaults

# What no client should send --------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
SCALARS |= st.sampled_from(["user", "assistant", "text", "python", 10**400, -1, 1e308, "\ud800", "x" * 9000])
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=4)
    ),
    max_leaves=10,
)
NAMES = ["messages", "model", "stream", "stream_options", "temperature", "top_k", "top_p", "min_p", "seed", "n", "stop"]
NAMES += ["repetition_penalty", "logprobs", "top_logprobs", "tools", "tool_choice", "prompt", "echo", "best_of"]
NAMES += ["max_tokens", "tokens", "response_format", "logit_bias", "größe"]
VALID: dict[str, dict[str, Any]] = {
    CHAT: asking("hi", max_tokens=2),
    "/chat/completions": asking("hi", max_tokens=2),
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1, 2]},
}
ROUTES = st.sampled_from(sorted(VALID))
FIELDS = st.dictionaries(st.sampled_from(NAMES), ANY_JSON, max_size=2)
NONSENSE = st.one_of(
    st.binary(max_size=60),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    st.integers(1, 60).map(lambda depth: b'{"messages":' + b"[" * depth + b"]" * depth + b"}"),
)
REQUESTS = st.one_of(
    st.tuples(ROUTES, NONSENSE),
    st.tuples(ROUTES, FIELDS).map(lambda both: (both[0], json.dumps({**VALID[both[0]], **both[1]}).encode())),
    st.tuples(ROUTES, st.integers(0, 80)).map(lambda cut: (cut[0], json.dumps(VALID[cut[0]]).encode()[: cut[1]])),
)


@pytest.mark.parametrize("count", [120, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_bodies_are_refused_and_never_an_error_of_the_server(count: int) -> None:
    seen: Counter[int] = Counter()
    with running_server(max_rows=16, max_waiting=600, defaults=Defaults(temperature=0.0, max_tokens=4)) as url:
        connection = connect(url)

        @given(REQUESTS)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def send(request: tuple[str, bytes]) -> None:
            path, body = request
            connection.request("POST", path, body, JSON)
            reply = connection.getresponse()
            content = reply.read()
            seen[reply.status] += 1
            assert reply.status in (200, 400, 404), (path, body, content)
            if reply.status != 200:
                error = json.loads(content)["error"]
                assert 0 < len(error["message"]) < 1000 and error["type"] == "invalid_request_error"

        send()
        connection.close()
        wait_until(lambda: stats(url)["busy"] == 0, "nothing is left")
        assert stats(url)["error"] == 0
        assert fetch(url, CHAT, asking("Who are you?")).status == 200
    assert seen[400] > count // 3 and seen[200] > count // 100, seen


# Many at once ----------------------------------------------------------------------------------------------------

Tokens = list[dict[str, Any]]


class Load:
    """Clients who each ask one question after another until time is up; some leave in the middle of an answer."""

    def __init__(self, url: str, questions: list[str], max_tokens: int) -> None:
        self.url, self.questions, self.max_tokens = url, questions, max_tokens
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.alone = {question: self.stream(question)[0] for question in questions}

    def stream(self, question: str, stop_after: int = 0) -> tuple[Tokens, bool]:
        """The tokens of an answer, and whether it was read to its end."""
        connection = connect(self.url, timeout=120)
        body = asking(question, stream=True, max_tokens=self.max_tokens, logprobs=True, top_logprobs=2, temperature=0)
        connection.request("POST", CHAT, json.dumps(body), JSON)
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        if stop_after:
            reply.read(stop_after)
            leave(connection)
            return [], False
        events = events_of(reply.read().decode())
        connection.close()
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length"), events[-1]
        pieces = [choice["nanochat"].get("tokens", []) for event in events[1:] for choice in event["choices"]]
        return [token for tokens in pieces for token in tokens], True

    def client(self, number: int, deadline: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < deadline:
            question = rng.choice(self.questions)
            try:
                tokens, is_whole = self.stream(question, rng.choice([0, 0, 0, 0, rng.randrange(1, 4000)]))
            except (AssertionError, OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}"[:500])
                return
            self.counts["whole" if is_whole else "left"] += 1
            if is_whole:
                self.compare(question, tokens)

    def compare(self, question: str, tokens: Tokens) -> None:
        """Equal, or first different where the two best were as good as equal."""
        alone = self.alone[question]
        for expected, token in zip(alone, tokens):
            if expected["text"] != token["text"]:
                best, second = (logprob for _, logprob in expected["top"])
                self.counts["ties"] += 1
                if best - second >= 1e-4:
                    self.wrong.append(f"{question}: {expected} alone, {token} in company")
                return
        if len(alone) != len(tokens):
            self.wrong.append(f"{question}: {len(alone)} tokens alone, {len(tokens)} in company")

    def run(self, num_clients: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(i, deadline)) for i in range(num_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: stats(self.url)["busy"] + stats(self.url)["waiting"] == 0, "all rows are free")


def test_many_clients_each_get_their_own_text_and_leave_no_row_taken() -> None:
    with running_server(max_rows=8, max_waiting=64) as url:
        load = Load(url, list(LEARNED), max_tokens=40)
        load.run(num_clients=24, seconds=4)
        assert load.wrong == [] and load.counts["whole"] > 24 and load.counts["left"] > 0
        told = stats(url)
        assert told["error"] == told["refused"] == 0
        assert told["stop"] + told["length"] + told["cancelled"] == sum(load.counts.values()) - load.counts["ties"] + 5


@contextmanager
def depth_4_server(base: Path) -> Iterator[tuple[str, int]]:
    """Address and process of a server as users start it, with a model of depth 4 that has learned nothing."""
    _, tokenizer = trained(together=False)
    model = build_model(scaling.model_config(4, tokenizer.vocab_size, 2048), torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in model.named_parameters()}
    meta = {"step": 1, "model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        all_tensors: Any = {"model": tensors, "optimizer": {}}
        write_checkpoint(run_folder("sft", "d4") / "step_000001", all_tensors, {}, meta, tokenizer)
        command = [sys.executable, "-m", "scripts.chat_web", "--port=0", "--device-type=cpu"]
        with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                while "http://" not in (line := process.stdout.readline()):
                    assert line
                yield line[line.index("http://") :].split("/  ")[0], process.pid
            finally:
                process.terminate()


def resident_bytes(pid: int) -> int:
    [line] = [s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory as Linux has it")
def test_sixty_four_clients_for_minutes_get_their_own_texts_and_memory_does_not_grow(tmp_path: Path) -> None:
    seconds = float(os.environ.get("NANOCHAT_LOAD_SECONDS", "60"))
    questions = [f"{'word ' * (7 * i % 50)}question {i}" for i in range(40)]
    with depth_4_server(tmp_path) as (url, pid):
        load = Load(url, questions, max_tokens=64)
        load.run(num_clients=64, seconds=seconds / 4)
        before = resident_bytes(pid)
        load.run(num_clients=64, seconds=seconds)
        growth = resident_bytes(pid) / before - 1
        told = stats(url)
        print(f"{dict(load.counts)}, memory {before / 1e6:.0f} MB, grown by {100 * growth:.1f} %, {told}")
        assert load.wrong == [] and told["error"] == told["refused"] == 0
        assert load.counts["whole"] > 64 and growth < 0.05
