"""Every attention kernel computes what the textbook does, and one that does not is never used."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import product

import pytest
import torch
from torch import Tensor

from nanochat.config import ModelConfig
from nanochat.evals.memory import LiveBytes
from nanochat.kernels.attention_ladder import (
    LADDER,
    AttentionCase,
    Kernel,
    try_rung,
)
from nanochat.kernels.flash_attention import CPU_BLOCK, Visibility, attention, attention_reference
from nanochat.kernels.flex_attention import BLOCK, FlexAttention, block_mask, blocks_in_sight, padded_documents
from nanochat.kernels.tolerance import tolerance
from nanochat.model.gpt import build_model

CPU = torch.device("cpu")
LENGTH = 3 * CPU_BLOCK + 20


def row(length: int, window: int, borders: list[list[int]] | None = None) -> Visibility:
    """A row that looks at itself; borders: per row of the batch, where new documents begin."""
    positions = torch.arange(length)[None]
    documents = None
    if borders is not None:
        documents = torch.stack([sum((torch.arange(length) >= b).long() for b in row) for row in borders])
        starts = [torch.tensor([0, *row]) for row in borders]
        positions = torch.stack([torch.arange(length) - start[ids] for start, ids in zip(starts, documents)])
    return Visibility(positions, positions, window, documents, is_row=True)


BORDERS = [[30, 150, 151], [CPU_BLOCK, 390, 400]]
ROWS: dict[str, Callable[[], Visibility]] = {
    "full": lambda: row(LENGTH, LENGTH),
    "windowed": lambda: row(LENGTH, 50),
    "a window longer than a block": lambda: row(LENGTH, CPU_BLOCK + 60),
    "a window of the position before": lambda: row(LENGTH, 1),
    "all but one key": lambda: row(LENGTH, LENGTH - 2),
    "documents": lambda: row(LENGTH, LENGTH, BORDERS),
    "windowed documents": lambda: row(LENGTH, 50, BORDERS),
    "shorter than a block": lambda: row(40, 7),
    "as long as a block": lambda: row(CPU_BLOCK, 7),
    "one token": lambda: row(1, 7),
}


def tensors(visibility: Visibility, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    rng, length = torch.Generator().manual_seed(0), visibility.query_positions.size(1)
    heads = (4, kv_heads, kv_heads, 4)
    return [torch.randn(2, length, h, head_dim, generator=rng, dtype=torch.float64).to(dtype) for h in heads]


def with_gradients(kernel: Kernel, visibility: Visibility, given: list[Tensor]) -> list[Tensor]:
    q, k, v = (t.clone().requires_grad_() for t in given[:3])
    out = kernel(q, k, v, visibility)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ROWS)
def test_sdpa_equals_the_textbook_forward_and_backward(kind: str, kv_heads: int) -> None:
    given = tensors(ROWS[kind](), kv_heads, 8, torch.float64)
    found, wanted = (with_gradients(kernel, ROWS[kind](), given) for kernel in (attention, attention_reference))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sdpa_equals_the_textbook_in_every_dtype_and_width(dtype: torch.dtype, head_dim: int) -> None:
    for kind in ("full", "windowed", "windowed documents"):
        given = tensors(ROWS[kind](), 2, head_dim, dtype)
        found = with_gradients(attention, ROWS[kind](), given)
        wanted = with_gradients(attention_reference, ROWS[kind](), [t.double() for t in given])
        for a, b in zip(found, wanted):
            assert a.dtype == dtype
            assert (a.double() - b).norm() < tolerance(CPU, dtype) * b.norm()


# FlexAttention: its rule and its lists of blocks, which a CPU can check; its gradients need a GPU -------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kind", ROWS)
@torch.no_grad()
def test_flex_attentions_rule_equals_the_textbook(kind: str, kv_heads: int) -> None:
    flex = FlexAttention()
    flex.compiled = flex.traced  # as plain Python: what is compiled from it is the GPU tests' affair
    q, k, v, _ = tensors(ROWS[kind](), kv_heads, 16, torch.float32)
    found, wanted = flex(q, k, v, ROWS[kind]()), attention_reference(q, k, v, ROWS[kind]())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*ROWS, "a window of three blocks"])
def test_flex_attention_asks_in_every_block_where_it_must_and_in_none_where_all_or_nothing_is_visible(
    kind: str,
) -> None:
    visibility = row(6 * BLOCK, 3 * BLOCK) if kind not in ROWS else ROWS[kind]()
    length, documents = visibility.query_positions.size(1), visibility.documents
    some, every = blocks_in_sight(visibility.window, padded_documents(visibility, length), length, CPU)
    padded = torch.nn.functional.pad(visibility.mask()[:, 0], (0, -length % BLOCK, 0, -length % BLOCK))
    tiles = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)  # (B, N, N, 128, 128)
    visible = tiles.any(dim=-1).any(dim=-1)
    assert not (visible & ~some).any(), "a block is left out in which there is something to see"
    whole = length // BLOCK  # blocks without padding
    all_visible = tiles.all(dim=-1).all(dim=-1)
    assert not (every & ~all_visible)[:, :whole, :whole].any(), "a block is not asked in which something is hidden"
    if documents is None:
        assert torch.equal(some, visible) and torch.equal(every[:, :whole, :whole], all_visible[:, :whole, :whole])
    lists = block_mask(visibility, length)
    assert torch.equal(lists.to_dense()[:, 0].bool(), some)


# A window never costs T x T -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_memory_of_a_window_grows_with_the_window_not_with_the_square_of_the_row(packed: bool) -> None:
    length, window, heads, head_dim = 8192, 256, 1, 16
    q, k, v = (torch.randn(1, length, heads, head_dim, requires_grad=True) for _ in range(3))
    borders = [[100, 5000]] if packed else None
    visibility = row(length, window, borders)
    with LiveBytes() as live:
        attention(q, k, v, visibility).sum().backward()
    scores = length * (window + CPU_BLOCK) * q.element_size() * heads
    assert live.peak < 3 * scores + 20 * q.nbytes < length**2
    with LiveBytes() as live:  # the test of the test
        visibility.mask()
    assert live.peak > length**2


# On a GPU -----------------------------------------------------------------------------------------------------------


def refused_or_not(name: str, case: AttentionCase) -> AbstractContextManager[None]:
    """Skips where the rung says beforehand that it is not made for this."""
    obstacle = next(rung for rung in LADDER if rung.name == name).obstacle(case)
    if obstacle is not None:
        pytest.skip(f"{name}: {obstacle}")
    return nullcontext()


QUICK_RUNG_CASES = [
    (torch.bfloat16, False, 1, 128),
    (torch.bfloat16, True, 2, 64),
    (torch.float16, False, 2, 128),
    (torch.float32, True, 1, 64),
]
RUNG_CASES = [
    pytest.param(*case, marks=[] if case in QUICK_RUNG_CASES else [pytest.mark.slow])  # FlexAttention compiles each
    for case in product((torch.bfloat16, torch.float16, torch.float32), (False, True), (1, 2), (16, 64, 128))
]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("dtype", "documents", "groups", "head_dim"), RUNG_CASES)
@pytest.mark.parametrize("name", ["FlashAttention 3", "FlexAttention", "SDPA"])
def test_every_rung_passes_its_check_on_a_gpu(
    name: str, dtype: torch.dtype, documents: bool, groups: int, head_dim: int
) -> None:
    case = AttentionCase(torch.device("cuda"), dtype, head_dim, groups, documents=documents)
    refused_or_not(name, case)
    fault = try_rung(next(rung for rung in LADDER if rung.name == name), case)[1]
    if "neither flash_attn_interface is installed" in fault:
        pytest.skip(fault)
    assert fault == ""


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ROWS)
def test_flex_attention_outside_of_a_compiled_model_equals_the_textbook(kind: str) -> None:
    given = tensors(ROWS[kind](), 2, 64, torch.bfloat16)
    visibility = ROWS[kind]()
    on_gpu = Visibility(
        visibility.query_positions.cuda(),
        visibility.key_positions.cuda(),
        visibility.window,
        None if visibility.documents is None else visibility.documents.cuda(),
        is_row=True,
    )
    found = with_gradients(FlexAttention(), on_gpu, [t.cuda() for t in given])
    wanted = with_gradients(attention_reference, visibility, [t.double() for t in given])
    for a, b in zip(found, wanted):
        assert (a.cpu().double() - b).norm() < tolerance(a.device, torch.bfloat16) * b.norm()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["FlashAttention 3", "FlexAttention", "SDPA"])
def test_a_window_of_a_long_row_takes_little_memory_on_a_gpu(name: str) -> None:
    case = AttentionCase(torch.device("cuda"), torch.bfloat16, 64)
    refused_or_not(name, case)
    kernel, fault = try_rung(next(rung for rung in LADDER if rung.name == name), case)
    if kernel is None:
        pytest.skip(fault)
    length, window = 32768, 1024
    positions = torch.arange(length, device="cuda")[None]
    q, k, v = (torch.randn(1, length, 1, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    for _ in range(2):  # the first one compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernel(q, k, v, Visibility(positions, positions, window, is_row=True)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < length**2 / 4


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("doc_mask", [False, True])
def test_a_compiled_model_with_the_chosen_kernel_has_the_gradients_of_the_textbook(doc_mask: bool) -> None:
    device = torch.device("cuda")
    config = ModelConfig(1024, 1000, 4, 4, 4, 256, doc_mask=doc_mask)
    ids = torch.randint(0, 1000, (2, 1025), generator=torch.Generator().manual_seed(0)).to(device)
    documents = (torch.arange(1024, device=device) // 300).expand(2, -1)
    gradients = []
    for kernel in (None, attention_reference):
        model = build_model(config, device, torch.bfloat16, attention=kernel)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02)
        loss_fn = torch.compile(model.loss, dynamic=False) if kernel is None else model.loss
        loss_fn(ids[:, :-1], ids[:, 1:], documents).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-4, name
