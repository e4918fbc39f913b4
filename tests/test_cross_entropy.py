"""The loss in chunks is the loss by way of all logits: its value, its gradients, and without the memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.evals.memory import LiveBytes
from nanochat.kernels import cross_entropy
from nanochat.kernels.cross_entropy import (
    CPU,
    GPU,
    IGNORED,
    Chunking,
    headroom,
    summed_loss,
    summed_loss_reference,
    token_losses,
    token_losses_reference,
)
from nanochat.model.gpt import GPT, build_model
from nanochat.model.layers import Linear

POSITIONS, CHANNELS, VOCAB, PADDED = 50, 12, 90, 96


def chunks_of(positions: int, block: int) -> Chunking:
    """Chunks of so many positions, worked on in blocks of so many."""
    return Chunking(least=0, chunk=positions * VOCAB, block=block * VOCAB)


def head_and_inputs(dtype: torch.dtype, std: float = 4.0) -> tuple[Linear, Tensor, Tensor]:
    """A head whose logits go well beyond a softcap of 15, hidden states (N, C) and targets (N,), some ignored.

    std: of its weight; 0.001 is a new model's.
    """
    rng = torch.Generator().manual_seed(0)
    head = Linear(CHANNELS, PADDED)
    torch.nn.init.normal_(head.weight, std=std, generator=rng)
    head.to(torch.promote_types(dtype, torch.float32))
    hidden = torch.randn(POSITIONS, CHANNELS, generator=rng).to(dtype)
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=rng)
    targets[::7] = IGNORED
    return head, hidden, targets


def loss_and_gradients(
    function: Callable[..., Tensor],
    dtype: torch.dtype,
    softcap: float,
    scale: float = 1.0,
    std: float = 4.0,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and `scale` times its gradients of hidden states and weight."""
    head, hidden, targets = head_and_inputs(dtype, std)
    loss = function(hidden.requires_grad_(), targets, head, VOCAB, softcap, **options)
    (loss * scale).backward()
    assert hidden.grad is not None and head.weight.grad is not None
    return loss.detach(), hidden.grad, head.weight.grad


SIZES = [(1, 1), (3, 1), (3, 2), (16, 16), (16, 5), (49, 7), (50, 50), (64, 64)]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize(("chunk", "block"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_loss_and_gradients_in_chunks_equal_the_reference(
    dtype: torch.dtype, tolerance: float, chunk: int, block: int, softcap: float
) -> None:
    wanted = loss_and_gradients(summed_loss_reference, dtype, softcap, scale=0.3)
    found = loss_and_gradients(summed_loss, dtype, softcap, scale=0.3, chunking=chunks_of(chunk, block))
    for a, b in zip(found, wanted):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= tolerance * b.norm()
    assert not found[2][VOCAB:].any() and found[2][:VOCAB].any()  # padding learns nothing
    assert not found[1][::7].any()  # nor does an ignored target teach


@pytest.mark.parametrize("std", [4.0, 0.001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_chunks_are_as_close_to_exact_numbers_as_all_logits_are(dtype: torch.dtype, std: float) -> None:
    exact = loss_and_gradients(summed_loss_reference, torch.float64, 15.0, std=std)
    plain = loss_and_gradients(summed_loss_reference, dtype, 15.0, std=std)
    found = loss_and_gradients(summed_loss, dtype, 15.0, std=std, chunking=chunks_of(16, 8))
    for a, b, c in zip(found, plain, exact):
        assert a.dtype == b.dtype
        assert (a.double() - c).norm() <= 1.2 * (b.double() - c).norm() + torch.finfo(dtype).eps * c.norm()


def test_a_loss_scale_saves_fp16_gradients_that_would_be_0_without_it() -> None:
    """A mean over many targets is tiny: its gradients must not be rounded to fp16 before the scale is in them."""
    small = 2.0**-24
    exact = loss_and_gradients(summed_loss_reference, torch.float64, 15.0)[1]
    without, scaled = (
        loss_and_gradients(summed_loss, torch.float16, 15.0, scale=scale, chunking=chunks_of(16, 8))[1]
        for scale in (small, 2.0**20 * small)
    )
    assert (without == 0).float().mean() > 0.3
    assert (scaled.double() / (2.0**20 * small) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("chunk", [30_000, 7_000])
def test_the_gradient_of_a_frequent_token_does_not_overflow_fp16_within_a_chunk(chunk: int) -> None:
    """27,000 of 30,000 targets are one token, in hidden states that share a direction: its row is four times 65,504."""
    rng, scale, positions = torch.Generator().manual_seed(0), 1 / 16, 30_000
    states = 0.5 * torch.randn(positions, CHANNELS, generator=rng)
    states[:, 3] = 10.0
    targets = torch.randint(0, VOCAB, (positions,), generator=rng)
    targets[: positions * 9 // 10] = 7
    weight = 0.001 * torch.randn(PADDED, CHANNELS, generator=rng)

    def gradients(dtype: torch.dtype, function: Callable[..., Tensor], **options: object) -> tuple[Tensor, Tensor]:
        head = Linear(CHANNELS, PADDED).to(torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            head.weight.copy_(weight)
        hidden = states.half().to(dtype).requires_grad_()
        (function(hidden, targets, head, VOCAB, 15.0, **options) * scale).backward()
        assert hidden.grad is not None and head.weight.grad is not None
        return hidden.grad, head.weight.grad

    exact = gradients(torch.float64, summed_loss_reference)
    plain = gradients(torch.float16, summed_loss_reference)
    found = gradients(torch.float16, summed_loss, chunking=chunks_of(chunk, 500))
    assert exact[1].abs().max() / scale > 4 * 65_504 > 4 * exact[1].abs().max()
    for a, b, c in zip(found, plain, exact):
        assert (a.double() - c).norm() <= torch.finfo(torch.float16).eps * c.norm()
        assert (b.double() - c).norm() <= torch.finfo(torch.float16).eps * c.norm()  # nor does it by way of all logits


def test_slopes_are_made_smaller_only_where_a_sum_could_overflow() -> None:
    ones = torch.ones(2**12, 3, dtype=torch.float16)
    assert [headroom(ones * size).item() for size in (0, 1, 8, 9, 16, 1000)] == [1, 1, 1, 1 / 2, 1 / 2, 1 / 128]


@pytest.mark.parametrize("targets", [torch.full((50,), IGNORED), torch.arange(50)])
def test_all_or_no_targets_may_be_ignored(targets: Tensor) -> None:
    head, hidden, _ = head_and_inputs(torch.float64)
    loss = summed_loss(hidden.requires_grad_(), targets, head, VOCAB, 15.0, chunks_of(16, 4))
    loss.backward()
    torch.testing.assert_close(loss, summed_loss_reference(hidden, targets, head, VOCAB, 15.0))
    assert bool(hidden.grad.any()) == bool((targets >= 0).any())  # type: ignore[union-attr]


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize(("chunk", "block"), SIZES)
def test_token_losses_in_chunks_equal_the_reference(chunk: int, block: int, softcap: float) -> None:
    head, hidden, targets = head_and_inputs(torch.float64)
    wanted = token_losses_reference(hidden, targets, head, VOCAB, softcap)
    with torch.no_grad():
        found = token_losses(hidden, targets, head, VOCAB, softcap, chunks_of(chunk, block))
        whole = summed_loss(hidden, targets, head, VOCAB, softcap, chunks_of(chunk, block))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(whole, wanted.sum())
    assert not found[::7].any()


def test_token_losses_with_a_gradient_can_be_weighed_one_by_one() -> None:
    head, hidden, targets = head_and_inputs(torch.float64)
    weights = torch.linspace(-1, 1, POSITIONS, dtype=torch.float64)
    gradients = []
    for function, options in ((token_losses_reference, {}), (token_losses, {"chunking": chunks_of(16, 4)})):
        hidden.requires_grad_().grad = None
        (function(hidden, targets, head, VOCAB, 15.0, **options) * weights).sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)


def test_a_second_backward_is_refused_instead_of_scaling_twice() -> None:
    head, hidden, targets = head_and_inputs(torch.float64)
    loss = summed_loss(hidden.requires_grad_(), targets, head, VOCAB, 15.0, chunks_of(16, 4))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_whatever_the_head_does_with_its_weight_is_differentiated() -> None:
    """The head is called as a module: a rounded weight, as fp8 has it, is its own affair."""

    class Coarse(Linear):
        def forward(self, x: Tensor) -> Tensor:
            coarse = self.weight + (self.weight.to(torch.float8_e4m3fn).to(self.weight.dtype) - self.weight).detach()
            return torch.nn.functional.linear(2 * x, coarse)

    _, hidden, targets = head_and_inputs(torch.float64)
    head = Coarse(CHANNELS, PADDED).double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function, options in ((summed_loss_reference, {}), (summed_loss, {"chunking": chunks_of(16, 4)})):
        head.weight.grad = None
        function(hidden.requires_grad_(), targets, head, VOCAB, 15.0, **options).backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients)


# Memory -------------------------------------------------------------------------------------------------------------


def test_all_logits_never_exist() -> None:
    positions, vocab, channels = 4096, 8192, 8
    head, rng = Linear(channels, vocab), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(head.weight, generator=rng)
    hidden = torch.randn(positions, channels, generator=rng).requires_grad_()
    targets = torch.randint(0, vocab, (positions,), generator=rng)
    all_logits = 4 * positions * vocab
    for chunk, block in ((128, 8), (512, 32), (512, 512)):
        chunking = Chunking(0, chunk * vocab, block * vocab)
        fixed = 4 * (head.weight.nbytes + hidden.nbytes)
        logits = 4 * vocab * (chunk + 4 * block)
        with LiveBytes() as training:
            summed_loss(hidden, targets, head, vocab, 15.0, chunking).backward()
        with LiveBytes() as evaluation, torch.no_grad():
            token_losses(hidden, targets, head, vocab, 15.0, chunking)
        for live in (training, evaluation):
            assert live.largest <= 4 * chunk * vocab < all_logits
            assert live.peak <= logits + fixed < all_logits
    with LiveBytes() as plain:  # the test of the test
        summed_loss_reference(hidden, targets, head, vocab, 15.0).backward()
    assert plain.peak > 3 * all_logits


# The choice, and the model ------------------------------------------------------------------------------------------


def test_chunks_are_for_many_logits_and_hold_as_many_positions_as_fit() -> None:
    assert CPU.pays(512, 32768) and CPU.pays(4096, 4096) and not CPU.pays(2048, 512)
    assert CPU.positions(32768) == (512, 8)
    assert CPU.positions(2**30) == (1, 1)
    assert GPU.pays(32 * 2048, 32768) and not GPU.pays(2048, 32768)
    assert cross_entropy.chunking_for(torch.device("cpu")) is CPU
    assert cross_entropy.chunking_for(torch.device("meta")) is GPU


def noisy_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    model = build_model(config, torch.device("cpu"), dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def batch(vocab: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocab, (4, 33), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:, :5] = IGNORED
    return ids[:, :-1], targets


def gradients_of(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_trains_alike_with_and_without_chunks(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, targets) = noisy_model(ModelConfig(32, 97, 3, 2, 2, 16, tied_head=tied), torch.float64), batch(97)
    wanted = gradients_of(model, model.loss(inputs, targets))
    monkeypatch.setattr(cross_entropy, "CPU", Chunking(0, 10 * 97, 3 * 97))
    found = gradients_of(model, model.loss(inputs, targets))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # the compiler looks there, and hides it otherwise
def test_a_compiled_model_ends_its_graph_before_the_chunks_and_has_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(cross_entropy, "CPU", Chunking(0, 50 * 97, 10 * 97))
    counter, block = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    compiled_block = torch.compile(cross_entropy.block_losses_and_slopes, backend=block)
    monkeypatch.setattr(cross_entropy, "compiled_block", lambda: compiled_block)
    model, (inputs, targets) = noisy_model(ModelConfig(32, 97, 2, 2, 2, 16)), batch(97)
    wanted = gradients_of(model, model.loss(inputs, targets))
    assert block.frame_count == 0
    compiled = torch.compile(model.loss, dynamic=False, backend=counter)
    found = gradients_of(model, compiled(inputs, targets))
    assert counter.frame_count == 1 and block.frame_count > 0
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_on_a_gpu_chunks_take_less_memory_and_give_the_same_gradients(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    model = build_model(ModelConfig(1024, 32768, 2, 2, 2, 128), device, torch.bfloat16)
    inputs, targets = (t.repeat(4, 32).to(device) for t in batch(32768))
    results = []
    for chunking in (replace(GPU, least=2**62), replace(GPU, least=0, chunk=2**24)):
        monkeypatch.setattr(cross_entropy, "GPU", chunking)
        loss_fn = torch.compile(model.loss, dynamic=False) if is_compiled else model.loss
        loss_fn(inputs, targets).backward()
        torch.cuda.reset_peak_memory_stats()
        gradients = gradients_of(model, loss_fn(inputs, targets))
        results.append((gradients, torch.cuda.max_memory_allocated()))
        torch._dynamo.reset()
    assert results[1][1] < 0.5 * results[0][1]
    for name, gradient in results[0][0].items():
        assert (results[1][0][name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-6, name
