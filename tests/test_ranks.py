"""Training on several ranks is training on one: same losses, same weights, and a state that fits any other number."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import add_noise, batches
from torch import Tensor

from nanochat import parallel, sharding
from nanochat.config import ModelConfig
from nanochat.loader import Batch
from nanochat.model.gpt import GPT, build_model
from nanochat.optim import MuonAdamW
from nanochat.parallel import Runtime, runtime
from nanochat.scaling import BaseRates, TrainingPlan
from nanochat.train.step import train_step

ROWS = 24  # of a step, over all ranks and micro-batches
STEPS = 50
PLAN = TrainingPlan(STEPS, ROWS * 32, 0.1, 1.0, 0.1)
ALONE = Runtime(torch.device("cpu"), torch.float32)
# 97 tokens padded to 128 rows; matrices of three shapes in fours; 5 scalars per layer: not all divide by 3 or 4 ranks.
CONFIG = ModelConfig(32, 97, n_layer=3, n_head=2, n_kv_head=2, n_embd=16)


def training(rt: Runtime, dtype: torch.dtype, reduce_dtype: torch.dtype | None = None) -> tuple[GPT, MuonAdamW]:
    model = build_model(CONFIG, rt.device, dtype)
    add_noise(model)
    rates = BaseRates().by_role()
    return model, MuonAdamW(dict(model.named_parameters()), model.parameter_roles(), rates, rt, reduce_dtype)


def my_batches(rt: Runtime, micro_batches: int = 2) -> Iterator[Batch]:
    """This rank's part of each micro-batch."""
    rows = ROWS // micro_batches
    for batch in batches(rows):
        yield batch.map(lambda tensor: tensor.chunk(rt.world_size)[rt.rank])


def train(rt: Runtime, model: GPT, optimizer: MuonAdamW, start: int = 0, stop: int = STEPS) -> Tensor:
    """Losses of steps start..stop."""
    stream = my_batches(rt)
    for _ in range(2 * start):
        next(stream)
    losses = [train_step(model.loss, stream, optimizer, PLAN.at(i), rt, 2) for i in range(start, stop)]
    return torch.tensor(losses, dtype=torch.float64)


def weights_of(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.clone() for name, tensor in tensors.items()}


def exact_and_single(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """Fifty steps in float64; then in float32 one step and fifty; then with gradients that travel in bfloat16."""
    model, optimizer = training(rt, torch.float64)
    found = {"losses64": train(rt, model, optimizer), **prefixed("weights64", weights_of(model))}
    model, optimizer = training(rt, torch.float32)
    first = train(rt, model, optimizer, stop=1)
    found |= prefixed("first32", optimizer.state_dict())
    found["losses32"] = torch.cat([first, train(rt, model, optimizer, start=1)])
    model, optimizer = training(rt, torch.float32, torch.bfloat16)
    found["losses16"] = train(rt, model, optimizer, stop=5)
    return found


def continued(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """Steps 10 to 20 in float64, from what one rank saved after ten."""
    model, optimizer = training(rt, torch.float64)
    with torch.no_grad():
        for name, weight in load_file(folder / "weights").items():
            model.get_parameter(name).copy_(weight)
    optimizer.load_state_dict(load_file(folder / "state"))
    found = {"losses": train(rt, model, optimizer, 10, 20)}
    return found | prefixed("weights", weights_of(model)) | prefixed("state", optimizer.state_dict())


def overlapping(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """How many buckets are on their way when the last backward of each of three steps returns, and before it."""
    model, optimizer = training(rt, torch.float32)
    reduction = optimizer._reduction
    counts = []
    for step in range(3):
        first, last = (next(my_batches(rt)) for _ in range(2))
        model.loss(first.inputs, first.targets, first.document_ids).backward()
        before = reduction.num_begun
        optimizer.begin_reduction()
        model.loss(last.inputs, last.targets, last.document_ids).backward()
        counts.append([before, reduction.num_begun, len(reduction.buckets)])
        optimizer.step(**vars(PLAN.at(step)))
        optimizer.zero_grad()
    return {"counts": torch.tensor(counts)}


def compiled(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """Losses of three steps through the compiler, and into how many pieces it has cut the backward."""
    model, optimizer = training(rt, torch.float32)
    loss_fn = rt.compile(model.loss, "on", backend="aot_eager")
    batch = next(my_batches(rt))
    waiting, seen = [loss_fn(batch.inputs, batch.targets, batch.document_ids).grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    pieces = sum("CompiledFunction" in type(node).__name__ for node in seen)
    stream = my_batches(rt)
    losses = [train_step(loss_fn, stream, optimizer, PLAN.at(i), rt, 2) for i in range(3)]
    return {"pieces": torch.tensor(pieces), "losses": torch.tensor(losses, dtype=torch.float64)}


def refused(rt: Runtime, folder: Path) -> dict[str, Tensor]:
    """A step whose loss is not finite, and one after it."""
    model, optimizer = training(rt, torch.float32)
    losses = train(rt, model, optimizer, stop=2)
    before = weights_of(model)
    with pytest.raises(FloatingPointError):
        train_step(lambda *batch: model.loss(*batch) * float("nan"), my_batches(rt), optimizer, PLAN.at(2), rt, 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return {"losses": torch.cat([losses, train(rt, model, optimizer, 2, 4)])}


Program = Callable[[Runtime, Path], dict[str, Tensor]]


def run_rank(rank: int, world_size: int, port: int, program: Program, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    parallel.BUCKET_BYTES = sharding.BUCKET_BYTES = 4096  # many buckets, as large models have
    with runtime("cpu") as rt:
        save_file(program(rt, folder), folder / f"rank{rank}")
    assert not [name for name in thread_names() if "gloo" in name], "one that outlives its group can abort the process"


def thread_names() -> Iterator[str]:
    """Of this process's threads, on Linux; elsewhere none."""
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended
            yield thread.joinpath("comm").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(world_size: int, program: Program, folder: Path) -> list[dict[str, Tensor]]:
    """What the program returns on each rank, every rank a process of its own."""
    torch.multiprocessing.spawn(run_rank, (world_size, free_port(), program, folder), nprocs=world_size)
    return [load_file(folder / f"rank{rank}") for rank in range(world_size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return exact_and_single(ALONE, tmp_path_factory.mktemp("alone"))


def part(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in found.items() if name.startswith(f"{prefix}/")}


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_trains_the_same_model(world_size: int, alone: dict[str, Tensor], tmp_path: Path) -> None:
    ranks = on_ranks(world_size, exact_and_single, tmp_path)
    for found in ranks:
        torch.testing.assert_close(found["losses64"], alone["losses64"], rtol=1e-9, atol=0)
        for name, weight in part(alone, "weights64").items():
            other = found[f"weights64/{name}"]
            assert (other - weight).norm() <= 1e-7 * weight.norm(), name
            assert torch.equal(other, ranks[0][f"weights64/{name}"]), "all ranks hold the same weights"
        torch.testing.assert_close(found["losses32"], alone["losses32"], rtol=1e-3, atol=0)
        torch.testing.assert_close(found["losses16"], alone["losses32"][:5], rtol=1e-3, atol=0)
        assert not torch.equal(found["losses16"], found["losses32"][:5]), "bfloat16 rounds"
    # After the first step the averages are the gradients times a constant, so they compare the gradients.
    ours, theirs = part(alone, "first32"), part(ranks[0], "first32")
    averages = [name for name in ours if name.endswith((".mean", ".momentum"))]
    assert ours.keys() == theirs.keys() and len(averages) == len(list(training(ALONE, torch.float32)[0].parameters()))
    flat, other = (torch.cat([state[name].flatten() for name in averages]) for state in (ours, theirs))
    assert (other - flat).norm() <= 1e-6 * flat.norm()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_state_saved_on_one_rank_continues_on_several_and_back(world_size: int, tmp_path: Path) -> None:
    model, optimizer = training(ALONE, torch.float64)
    train(ALONE, model, optimizer, stop=10)
    save_file(weights_of(model), tmp_path / "weights")
    save_file({name: t.clone() for name, t in optimizer.state_dict().items()}, tmp_path / "state")
    losses = train(ALONE, model, optimizer, 10, 20)
    expected = weights_of(model)
    found = on_ranks(world_size, continued, tmp_path)[0]
    torch.testing.assert_close(found["losses"], losses, rtol=1e-9, atol=0)
    back, optimizer_back = training(ALONE, torch.float64)
    with torch.no_grad():
        for name, weight in part(found, "weights").items():
            back.get_parameter(name).copy_(weight)
    optimizer_back.load_state_dict(part(found, "state"))
    ends = [train(ALONE, m, o, 20, 30) for m, o in ((model, optimizer), (back, optimizer_back))]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=0)
    for name, weight in weights_of(model).items():
        assert (back.get_parameter(name) - weight).norm() <= 1e-7 * weight.norm(), name
        assert not torch.equal(weight, expected[name])


def test_from_the_second_step_on_gradients_travel_while_the_last_backward_computes(tmp_path: Path) -> None:
    for found in on_ranks(2, overlapping, tmp_path):
        (_, first, total), (before, second, _), third = found["counts"].tolist()
        assert first == 0 and before == 0  # the first step finds out in which order gradients are made
        assert total > 12 and second == total and third == [0, total, total]


def test_a_compiled_backward_comes_in_pieces_so_that_gradients_can_travel_meanwhile(
    alone: dict[str, Tensor], tmp_path: Path
) -> None:
    for found in on_ranks(2, compiled, tmp_path):
        assert found["pieces"] > CONFIG.n_layer  # one alone gives all gradients at its end
        torch.testing.assert_close(found["losses"], alone["losses32"][:3], rtol=1e-4, atol=0)


def test_a_loss_that_is_not_finite_leaves_all_ranks_ready_for_the_next_step(tmp_path: Path) -> None:
    model, optimizer = training(ALONE, torch.float32)
    losses = train(ALONE, model, optimizer, stop=4)
    for found in on_ranks(2, refused, tmp_path):
        torch.testing.assert_close(found["losses"], losses, rtol=1e-4, atol=0)
