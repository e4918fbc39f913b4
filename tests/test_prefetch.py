"""Batches drawn ahead: the same stream, its state exact at every moment, errors in their place, no thread left."""

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from loading import assert_same_state, equal, joined, some_texts, write_shards

from nanochat.chat import Conversation
from nanochat.common import UserError
from nanochat.dataset import open_corpus
from nanochat.loader import Batch, ConversationLoader, PretrainLoader
from nanochat.prefetch import Prefetcher
from nanochat.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(some_texts(50, seed=0), 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"), some_texts(300, seed=1), some_texts(300, seed=2), ["val"])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """None that is left after a test, whatever the test did."""
    yield
    gc.collect()
    deadline = time.monotonic() + 30
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def conversations() -> list[Conversation]:
    texts = some_texts(120, seed=3, longest=30)
    pairs = zip(texts[::2], texts[1::2])
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def pretrain(folder: Path, tokenizer: Tokenizer, rows: int = 4, rank: int = 0, world_size: int = 1) -> PretrainLoader:
    return PretrainLoader(open_corpus(folder).train, tokenizer, rows, 64, rank, world_size)


def loaders(folder: Path, tokenizer: Tokenizer) -> list[Any]:
    return [pretrain(folder, tokenizer), ConversationLoader(conversations(), tokenizer, 4, 128)]


class Counting:
    """A loader whose n-th batch is full of n. Those in `faults` cannot be drawn."""

    def __init__(self, faults: dict[int, Exception] | None = None, delay_s: float = 0.0) -> None:
        self.at, self.drawn, self.faults, self.delay_s = 0, 0, faults or {}, delay_s

    def __next__(self) -> Batch:
        time.sleep(self.delay_s)
        self.at += 1
        if self.at - 1 in self.faults:
            raise self.faults[self.at - 1]
        self.drawn += 1
        rows = torch.full((64, 1024), self.at - 1)
        return Batch(rows, rows.clone(), torch.zeros(64, 1024, dtype=torch.int32))

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["at"] < 0:
            raise UserError("no such place")
        self.at = state["at"]


def numbers(batches: Iterator[Batch], how_many: int) -> list[int]:
    return [int(next(batches).inputs[0, 0]) for _ in range(how_many)]


@pytest.mark.parametrize("ahead", [1, 4, 9])
def test_the_stream_is_the_loaders_bit_by_bit(folder: Path, tokenizer: Tokenizer, ahead: int) -> None:
    for plain, drawn in zip(loaders(folder, tokenizer), loaders(folder, tokenizer)):
        with Prefetcher(drawn, "cpu", ahead) as batches:
            while plain.epoch < 2:
                here, there = next(plain), next(batches)
                assert equal(here, there) and there.target_count == here.num_targets()


def test_the_state_is_that_of_the_last_batch_handed_out_at_every_moment(folder: Path, tokenizer: Tokenizer) -> None:
    random = Random(7)
    for plain, drawn in zip(loaders(folder, tokenizer), loaders(folder, tokenizer)):
        with Prefetcher(drawn, "cpu", 4) as batches:
            states = []
            for _ in range(60):
                assert_same_state(batches.state(), plain.state())
                states.append((batches.state(), plain.state()))
                time.sleep(random.choice((0, 0, 0.002)))
                assert_same_state(batches.state(), plain.state())
                assert equal(next(batches), next(plain))
            for ours, theirs in states:  # and none is changed by what came after it
                assert_same_state(ours, theirs)


def test_a_run_goes_on_from_any_state_and_from_a_state_just_loaded(folder: Path, tokenizer: Tokenizer) -> None:
    for plain, drawn in zip(loaders(folder, tokenizer), loaders(folder, tokenizer)):
        states, stream = [], []
        for _ in range(40):
            states.append(plain.state())
            stream.append(next(plain))
        with Prefetcher(drawn, "cpu", 4) as batches:
            for start in (0, 33, 1, 17, 17, 2):
                batches.load_state(states[start])
                assert_same_state(batches.state(), states[start])
                assert all(equal(next(batches), stream[start + i]) for i in range(5))


def test_a_state_goes_on_with_another_number_of_ranks(folder: Path, tokenizer: Tokenizer) -> None:
    plain = pretrain(folder, tokenizer, rows=4)
    with Prefetcher(pretrain(folder, tokenizer, rows=4), "cpu", 4) as one:
        for _ in range(7):
            next(one), next(plain)
        state = one.state()
    ranks = [Prefetcher(pretrain(folder, tokenizer, 2, rank, 2), "cpu", 4) for rank in range(2)]
    for rank in ranks:
        rank.load_state(state)
    for _ in range(20):
        assert equal(joined([next(rank) for rank in ranks]), next(plain))
    assert_same_state(ranks[0].state(), plain.state())
    for rank in ranks:
        rank.close()


def test_as_many_are_drawn_ahead_as_asked_for_and_no_more() -> None:
    loader = Counting()
    with Prefetcher(loader, "cpu", ahead=3) as batches:
        for handed_out in range(5):
            deadline = time.monotonic() + 30
            while loader.drawn < handed_out + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert loader.drawn == handed_out + 3
            next(batches)


def test_an_error_comes_in_place_of_its_batch_and_the_next_try_begins_there() -> None:
    loader = Counting({5: UserError("batch 5 is broken")})
    with Prefetcher(loader, "cpu", 4) as batches:
        assert numbers(batches, 5) == [0, 1, 2, 3, 4]
        for _ in range(2):
            with pytest.raises(UserError, match="batch 5 is broken"):
                next(batches)
            assert batches.state() == {"at": 5}
        loader.faults.clear()
        assert numbers(batches, 4) == [5, 6, 7, 8]


def test_any_error_of_the_thread_is_raised_and_not_only_the_users() -> None:
    with Prefetcher(Counting({1: ZeroDivisionError("a bug")}), "cpu", 4) as batches:
        assert numbers(batches, 1) == [0]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(batches)


def test_a_corrupt_shard_is_told_after_all_rows_before_it_and_a_mended_one_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.loader.WINDOW_TOKENS", 3000)  # several windows before the fault
    shards = [some_texts(1024, seed=4), some_texts(1024, seed=5), some_texts(1024, seed=6), ["val"]]
    corpus = write_shards(tmp_path / "corpus", *shards)
    plain, loader = pretrain(corpus, tokenizer), pretrain(corpus, tokenizer)
    last = "1.jsonl"  # in the order of seed 0
    good = (corpus / last).read_bytes()
    (corpus / last).write_bytes(b"{" + good[1:].replace(b"}", b"]", 1))
    with Prefetcher(loader, "cpu", 4) as batches:
        handed_out, states = [], []
        with pytest.raises(UserError, match=f"{last}, line .*not JSON"):
            for _ in count():
                states.append(batches.state())
                handed_out.append(next(batches))
        (corpus / last).write_bytes(good)
        rows_of_window = 47  # 3,000 tokens; the window before the fault is used up
        assert len(handed_out) > 20 * rows_of_window / 4 and states[-1]["row"] + 4 >= rows_of_window
        assert all(equal(batch, next(plain)) for batch in handed_out)
        assert_same_state(batches.state(), plain.state())
        assert all(equal(next(batches), next(plain)) for _ in range(100))


def test_a_state_that_is_refused_changes_nothing() -> None:
    with Prefetcher(Counting(), "cpu", 4) as batches:
        assert numbers(batches, 3) == [0, 1, 2]
        with pytest.raises(UserError, match="no such place"):
            batches.load_state({"at": -1})
        assert batches.state() == {"at": 3}
        assert numbers(batches, 3) == [3, 4, 5]


def test_an_interrupt_while_it_waits_loses_no_batch() -> None:
    loader = Counting(delay_s=0.3)
    with Prefetcher(loader, "cpu", 4) as batches:
        threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert batches.state() == {"at": 0}
        assert numbers(batches, 2) == [0, 1]


def test_close_ends_the_thread_drops_what_waits_and_leaves_the_state() -> None:
    loader = Counting(delay_s=0.05)
    batches = Prefetcher(loader, "cpu", ahead=50)
    assert numbers(batches, 2) == [0, 1] and threads() != []
    batches.close()
    batches.close()
    assert threads() == [] and loader.drawn < 10
    assert batches.state() == {"at": 2}


def test_an_error_in_the_recipe_ends_the_thread_too() -> None:
    with pytest.raises(ZeroDivisionError), Prefetcher(Counting(), "cpu", 4) as batches:
        next(batches)
        raise ZeroDivisionError
    assert threads() == []


def test_one_that_is_forgotten_ends_its_thread() -> None:
    batches = Prefetcher(Counting(), "cpu", 4)
    next(batches)
    assert threads() != []
    del batches  # the fixture waits for the thread's end


FORGETFUL = """
import sys, time
from pathlib import Path
from nanochat.dataset import open_corpus
from nanochat.loader import PretrainLoader
from nanochat.prefetch import Prefetcher
from nanochat.tokenizer import Tokenizer

tokenizer = Tokenizer.load(Path(sys.argv[1]))
loader = PretrainLoader(open_corpus(Path(sys.argv[2])).train, tokenizer, 4, 64)
batches = Prefetcher(loader, "cpu", ahead=1000)
next(batches)
print("leaving")
if sys.argv[3] == "error":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("error", 3)])
def test_a_process_that_never_closes_it_leaves_in_peace(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, how: str, code: int
) -> None:
    tokenizer.save(tmp_path)
    command = [sys.executable, "-c", FORGETFUL, str(tmp_path), str(folder), how]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "leaving\n", "")


SLOW_CYCLES = 20_000_000  # about 10 ms of the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [1, 4])
def test_staging_buffers_are_not_rewritten_before_their_copies_have_run(ahead: int) -> None:
    """The GPU is kept busy before every copy: the thread is a whole round ahead of what is copied."""
    with Prefetcher(Counting(), "cuda", ahead) as batches:
        arrived = []
        for _ in range(40):
            torch.cuda._sleep(SLOW_CYCLES)
            arrived.append(next(batches))
        assert all(batch.inputs.is_cuda for batch in arrived)
        for number, batch in enumerate(arrived):
            assert (batch.inputs == number).all() and (batch.targets == number).all()


@pytest.mark.gpu
def test_nobody_waits_for_a_copy_to_a_gpu_that_is_busy() -> None:
    with Prefetcher(Counting(), "cuda", ahead=4) as batches:
        next(batches)
        torch.cuda.synchronize()
        torch.cuda._sleep(100 * SLOW_CYCLES)
        behind = torch.cuda.Event()
        behind.record()
        batch = next(batches)
        assert batch.num_targets() == batch.targets.numel() and batch.to("cuda").inputs is batch.inputs
        assert not behind.query()  # we are back, and the GPU has not even come to the copy
        assert (batch.inputs == 1).all()


@pytest.mark.gpu
def test_the_stream_on_a_gpu_is_the_loaders(folder: Path, tokenizer: Tokenizer) -> None:
    plain = pretrain(folder, tokenizer)
    with Prefetcher(pretrain(folder, tokenizer), torch.device("cuda", 0), 4) as batches:
        for _ in range(50):
            assert equal(next(batches).to("cpu"), next(plain))
            assert_same_state(batches.state(), plain.state())
