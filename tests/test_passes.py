"""Out of memory before the first step is done halves the rows of a pass, on all ranks, and changes no number."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import some_texts, write_shards
from test_ranks import CONFIG, PLAN, free_port, on_ranks, training
from torch import Tensor

from nanochat.checkpoint import run_folder
from nanochat.common import read_record, record_path
from nanochat.dataset import open_corpus
from nanochat.loader import Batch, PretrainLoader
from nanochat.memory import is_out_of_memory
from nanochat.model.gpt import GPT
from nanochat.parallel import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.train.passes import Passes
from nanochat.train.step import NO_TARGETS
from scripts import base_train

REPO = Path(__file__).resolve().parents[1]
RT = Runtime(torch.device("cpu"), torch.float32)
ROWS_PER_STEP = 8  # of each rank


def no_memory() -> Tensor:
    """The real allocator's refusal of more than a process can address."""
    return torch.empty(2**46)


def failing_above(rows: int, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss_fn`, which finds no memory for more rows than that."""

    def loss(inputs: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        return no_memory().sum() if len(inputs) > rows else loss_fn(inputs, targets, document_ids)

    return loss


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"), some_texts(200, 1), some_texts(50, 2))


def loader_of(folder: Path, rows: int, rt: Runtime = RT, kind: type[PretrainLoader] = PretrainLoader) -> PretrainLoader:
    train = open_corpus(folder).train
    tokenizer = Tokenizer.train(train.documents(), 290)
    assert tokenizer.vocab_size > 97  # the model's ids are taken modulo its vocabulary
    return kind(train, tokenizer, rows, CONFIG.sequence_len, rt.rank, rt.world_size)


def losses_of(
    folder: Path, rt: Runtime, rows: int, most: int, rows_per_step: int = ROWS_PER_STEP
) -> tuple[list[float | None], Passes]:
    """Losses of four steps of a run that begins with `rows` rows a pass on a device that has room for `most`."""
    model, optimizer = training(rt, torch.float64)
    loss_fn = failing_above(most, lambda i, t, d: model.loss(i % 97, t.clamp_min(0) % 97, d))
    passes = Passes(loader_of(folder, rows, rt), rt, rows, rows_per_step, CONFIG.sequence_len, is_given=True)
    passes.rehearse(loss_fn, optimizer)
    losses = [passes.train(loss_fn, optimizer, PLAN.at(step), step) for step in range(4)]
    passes.close()
    return losses, passes


@pytest.mark.parametrize(("most", "left", "told"), [(8, 8, 0), (4, 4, 1), (3, 2, 2), (1, 1, 3)])
def test_rows_are_halved_until_they_fit_and_the_run_is_the_one_with_fewer_rows(
    most: int, left: int, told: int, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, passes = losses_of(corpus, RT, rows=8, most=most)
    assert (passes.rows, passes.count) == (left, ROWS_PER_STEP // left)
    out = capsys.readouterr().out
    assert out.count("\n") == out.count("out of memory with") == told
    assert told == 0 or "out of memory with 8 rows a pass (--device-batch-size=8): going on with 4, 2 passes" in out
    expected, other = losses_of(corpus, RT, rows=left, most=8)
    assert losses == expected
    assert str(passes.state()) == str(other.state())


def test_a_number_that_has_no_half_goes_to_the_next_that_divides_it(corpus: Path) -> None:
    model, optimizer = training(RT, torch.float64)
    loss_fn = failing_above(4, lambda i, t, d: model.loss(i % 97, t.clamp_min(0) % 97, d))
    passes = Passes(loader_of(corpus, 9), RT, 9, 18, CONFIG.sequence_len)
    passes.train(loss_fn, optimizer, PLAN.at(0), 0)
    assert (passes.rows, passes.count) == (3, 6)
    passes.close()


def test_a_loader_of_other_batches_gives_as_many_rows_as_a_pass_takes(corpus: Path) -> None:
    model, optimizer = training(RT, torch.float64)
    passes, seen = Passes(loader_of(corpus, 1), RT, 4, ROWS_PER_STEP, CONFIG.sequence_len), []

    def loss(i: Tensor, t: Tensor, d: Tensor) -> Tensor:
        seen.append(len(i))
        return model.loss(i % 97, t.clamp_min(0) % 97, d)

    passes.train(loss, optimizer, PLAN.at(0), 0)
    passes.close()
    assert seen == [4, 4]


def test_the_gradients_of_the_passes_before_the_one_that_failed_are_dropped(corpus: Path) -> None:
    model, optimizer = training(RT, torch.float64)
    passes = Passes(loader_of(corpus, 4), RT, 4, ROWS_PER_STEP, CONFIG.sequence_len)
    calls = []

    def loss(i: Tensor, t: Tensor, d: Tensor) -> Tensor:
        calls.append(len(i))
        return no_memory().sum() if calls == [4, 4] else model.loss(i % 97, t.clamp_min(0) % 97, d)

    found = [passes.train(loss, optimizer, PLAN.at(step), step) for step in range(4)]
    passes.close()
    assert calls == [4, 4, *[2] * 16]
    assert found == losses_of(corpus, RT, rows=2, most=8)[0]


def test_where_one_row_is_too_much_the_error_says_so(corpus: Path) -> None:
    with pytest.raises(MemoryError, match=r"^rank 0: cpu is out of memory \(.*\) with one row a pass; lower --max"):
        losses_of(corpus, RT, rows=4, most=0)


def test_after_the_first_step_no_memory_is_an_error(corpus: Path) -> None:
    model, optimizer = training(RT, torch.float64)
    room = [8]
    passes = Passes(loader_of(corpus, 8), RT, 8, ROWS_PER_STEP, CONFIG.sequence_len)

    def loss(i: Tensor, t: Tensor, d: Tensor) -> Tensor:
        return failing_above(room[0], model.loss)(i % 97, t.clamp_min(0) % 97, d)

    passes.train(loss, optimizer, PLAN.at(0), 0)
    room[0] = 4
    with pytest.raises(MemoryError, match=r"with 8 rows a pass; go on with a lower --device-batch-size$"):
        passes.train(loss, optimizer, PLAN.at(1), 1)
    passes.close()


class FirstUntaught(PretrainLoader):
    """A loader whose first batch has no targets."""

    is_first = True

    def __next__(self) -> Batch:
        batch, is_first = super().__next__(), self.is_first
        self.is_first = False
        return replace(batch, targets=torch.full_like(batch.targets, -1)) if is_first else batch


def test_a_step_without_targets_has_not_shown_that_the_rows_fit(corpus: Path) -> None:
    model, optimizer = training(RT, torch.float64)
    loss_fn = failing_above(4, lambda i, t, d: model.loss(i % 97, t.clamp_min(0) % 97, d))
    loader = loader_of(corpus, 8, kind=FirstUntaught)
    passes = Passes(loader, RT, 8, ROWS_PER_STEP, CONFIG.sequence_len)
    assert passes.train(loss_fn, optimizer, PLAN.at(0), 0) == NO_TARGETS
    assert isinstance(passes.train(loss_fn, optimizer, PLAN.at(1), 1), float)
    assert passes.rows == 4
    passes.close()


def test_a_step_that_has_changed_weights_is_not_done_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = training(RT, torch.float64)
    monkeypatch.setattr(optimizer.muon[-1], "step", lambda *given: no_memory())
    passes = Passes(loader_of(corpus, 8), RT, 8, ROWS_PER_STEP, CONFIG.sequence_len)
    with pytest.raises(MemoryError, match=r"in the optimizer's update, which needs as much whatever the rows"):
        passes.train(lambda i, t, d: model.loss(i % 97, t.clamp_min(0) % 97, d), optimizer, PLAN.at(0), 0)
    assert passes.rows == 8 and "going on" not in capsys.readouterr().out
    passes.close()


def test_other_errors_are_not_taken_for_missing_memory(corpus: Path) -> None:
    _, optimizer = training(RT, torch.float64)
    passes = Passes(loader_of(corpus, 8), RT, 8, ROWS_PER_STEP, CONFIG.sequence_len)

    def loss(*batch: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        passes.train(loss, optimizer, PLAN.at(0), 0)
    passes.close()
    with pytest.raises(RuntimeError) as caught:
        no_memory()
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_the_rehearsal_compiles_is_what_training_runs(corpus: Path) -> None:
    model, optimizer = training(RT, torch.float32)
    compiled: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    loss_fn = RT.compile(model.loss, "on", backend=lambda graph, inputs: compiled.append(graph) or graph)
    passes = Passes(loader_of(corpus, 4), RT, 4, ROWS_PER_STEP, CONFIG.sequence_len)
    assert passes._lack(loss_fn) is None
    count = len(compiled)
    passes.train(lambda i, t, d: loss_fn(i % 97, t.clamp_min(0) % 97, d), optimizer, PLAN.at(0), 0)
    assert len(compiled) == count > 0
    passes.close()


# Ranks


def one_rank_has_less_room(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """Four steps where rank 1 alone has room for two rows only."""
    losses, passes = losses_of(folder / "corpus", rt, rows=8, most=8 if rt.rank == 0 else 2)
    return {"losses": torch.tensor(losses, dtype=torch.float64), "rows": torch.tensor(passes.rows)}


def test_all_ranks_halve_where_one_finds_no_memory(tmp_path: Path) -> None:
    corpus = write_shards(tmp_path / "corpus", some_texts(200, 1), some_texts(50, 2))
    expected, _ = losses_of(corpus, RT, rows=4, most=8, rows_per_step=2 * ROWS_PER_STEP)
    for found in on_ranks(2, one_rank_has_less_room, tmp_path):
        assert found["rows"] == 2
        torch.testing.assert_close(found["losses"], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def refusing(hidden: Callable[..., Tensor], most: int) -> Callable[..., Tensor]:
    """A model's forward, which finds no memory for more rows than that."""

    def limited(model: GPT, token_ids: Tensor, *rest: Any, **options: Any) -> Tensor:
        return no_memory() if len(token_ids) > most else hidden(model, token_ids, *rest, **options)

    return limited


def recipe_rank(rank: int, port: int, recipe: str, flags: list[str]) -> None:
    """One of two ranks of a recipe, the second of which has no room for more than two rows."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if rank == 1:
        GPT.hidden = refusing(GPT.hidden, most=2)  # type: ignore[method-assign]
    importlib.import_module(f"scripts.{recipe}").main(flags)


@pytest.mark.usefixtures("tokenizer")
def test_in_both_stages_ranks_agree_on_rows_before_the_validation_that_comes_first(text: Path, chats: Path) -> None:
    run = ["--num-iterations=1", "--eval-every=1", "--eval-tokens=2000", "--device-batch-size=8"]
    run += ["--total-batch-size=512", "--device-type=cpu", "--logger=none"]
    base = ["--depth=2", "--max-seq-len=32", "--aspect-ratio=32", "--head-dim=32", f"--data-dir={text}"]
    for recipe, flags in (("base_train", base), ("chat_sft", [f"--data={chats}"])):
        torch.multiprocessing.spawn(recipe_rank, (free_port(), recipe, [*run, *flags]), nprocs=2)
        assert read_record(record_path(recipe))["device_batch_size"] == 2


# The real thing: base training in a process that may not have more


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library takes of the address space for bfloat16 is nothing to rely on."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


TRAIN = ["--depth=2", "--max-seq-len=128", "--total-batch-size=65536", "--num-iterations=1", "--eval-every=1"]
TRAIN += ["--eval-tokens=5000", "--compile=off", "--device-type=cpu", "--logger=none"]


def trained_within(megabytes: int, *flags: str) -> str:
    command = [sys.executable, str(REPO / "tests" / "limited.py"), str(megabytes), *TRAIN, *flags]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(tag: str) -> list[float]:
    records = [json.loads(line) for line in (run_folder("base", tag) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    return [value for record in records for name in ("loss_raw", "val_bpb") if (value := record.get(name)) is not None]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
@pytest.mark.usefixtures("tokenizer", "float32")
def test_a_run_whose_allocator_refuses_completes_with_fewer_rows_and_the_same_losses(text: Path) -> None:
    out = trained_within(1200, f"--data-dir={text}", "--device-batch-size=512", "--model-tag=refused")
    assert "out of memory with 512 rows a pass (--device-batch-size=512): going on with 256, 2 passes a step" in out
    rows = read_record(record_path("base_train"))["device_batch_size"]
    assert 1 <= rows <= 256
    base_train.main([*TRAIN, f"--data-dir={text}", f"--device-batch-size={rows}", "--model-tag=small"])
    assert losses("refused") == pytest.approx(losses("small"), rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
@pytest.mark.usefixtures("tokenizer", "float32")
def test_without_a_flag_a_run_takes_as_many_rows_as_its_limit_allows(text: Path) -> None:
    out = trained_within(1200, f"--data-dir={text}", "--max-seq-len=2048")
    assert "out of memory" not in out and "memory decides the rows of a pass" in out
    assert 1 <= read_record(record_path("base_train"))["device_batch_size"] < 32
