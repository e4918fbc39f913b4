"""Single tokens through the C products: the same numbers as torch's, for every switch of the model."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from engines import EXACT, GREEDY, noisy_model, run_all, told_alike

from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.engine import Engine
from nanochat.kernels import decode
from nanochat.kernels.decode import Decoder, Matrix, find_decoder, quantised
from nanochat.model.gpt import GPT, build_model

CONFIG = ModelConfig(600, 97, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL", key_offset=True)
SWITCHES = [
    {},
    {"key_offset": False, "smear": False},
    {"n_kv_head": 4, "value_embeddings": False},
    {"n_kv_head": 1, "mlp_activation": "gelu", "softcap": 0.0},
    {"qk_norm": False, "residual": "plain", "tied_head": True},
    {"n_head": 2, "n_kv_head": 2, "vocab_size": 130},
]


def noisy(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    model = build_model(config, torch.device("cpu"), dtype)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


@torch.no_grad()
def decoded(model: GPT, ids: torch.Tensor, read: int) -> torch.Tensor:
    """Logits (B, T - read, V) of ids (B, T), of which the first `read` are read at once and the rest one by one."""
    state = model.new_state(*ids.shape, max_chunk=100)
    for start in range(0, read, 100):
        model.next_logits(ids[:, start : min(start + 100, read)], state)
    return torch.stack([model.next_logits(ids[:, t : t + 1], state) for t in range(read, ids.size(1))], dim=1)


@pytest.fixture(autouse=True)
def needs_a_compiler(request: pytest.FixtureRequest) -> None:
    if "broken" not in request.fixturenames and find_decoder()[0] is None:
        pytest.skip(find_decoder()[1])


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17])
def test_single_tokens_are_computed_as_by_torch(switches: dict, rows: int) -> None:
    config = replace(CONFIG, **switches)
    ids = torch.randint(0, 97, (rows, 450), generator=torch.Generator().manual_seed(1))
    for read in (400, 0):  # beyond the window of 256 and its ring of 356, and from the very beginning
        some = ids[:, : read + 50]
        ours, plain = decoded(noisy(config).for_decoding(), some, read), decoded(noisy(config), some, read)
        torch.testing.assert_close(ours, plain, atol=EXACT, rtol=0)


@torch.no_grad()
def test_the_logits_behind_prompts_of_several_rows_are_their_own() -> None:
    ids = torch.randint(0, 97, (5, 30), generator=torch.Generator().manual_seed(1))
    ours, plain = (
        model.next_logits(ids, model.new_state(5, 30)) for model in (noisy(CONFIG).for_decoding(), noisy(CONFIG))
    )
    torch.testing.assert_close(ours, plain, atol=EXACT, rtol=0)


def test_threads_of_one_model_with_memories_of_different_sizes_do_not_meet() -> None:
    model, ids = noisy(CONFIG).for_decoding(), torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    expected = {length: decoded(model, ids[:, :length], 1) for length in (40, 60)}
    with ThreadPoolExecutor(4) as pool:
        lengths = [40, 60] * 10
        found = pool.map(lambda length: decoded(model, ids[:, :length], 1), lengths)
        for length, logits in zip(lengths, found):
            torch.testing.assert_close(logits, expected[length], atol=EXACT, rtol=0)


def test_the_quick_products_are_used_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = noisy(CONFIG).for_decoding(), []
    for name in ("linear", "mlp", "attend"):
        whole = getattr(Decoder, name)
        monkeypatch.setattr(Decoder, name, lambda *a, name=name, whole=whole: used.append(name) or whole(*a))
    decoded(model, torch.zeros(2, 11, dtype=torch.long), 10)
    assert used == ["linear", *["attend", "mlp"] * 3, "linear"]  # reading needs only the head of a single token


def test_rows_do_not_change_each_other_by_a_bit() -> None:
    decoder, _ = find_decoder()
    assert decoder is not None
    x, weight = torch.randn(23, 48), torch.randn(96, 48)
    for matrix in (Matrix.of(weight), Matrix.of(weight, is_int8=True)):
        together = decoder.linear(matrix, x, 15.0)
        for row in range(23):
            assert torch.equal(decoder.linear(matrix, x[row : row + 1], 15.0)[0], together[row])


def test_weights_of_a_byte_are_close_and_only_single_tokens_use_them() -> None:
    ids = torch.randint(0, 97, (3, 60), generator=torch.Generator().manual_seed(1))
    plain, small = noisy(CONFIG), noisy(CONFIG).for_decoding(is_int8=True)
    exact, close = decoded(plain, ids, 20), decoded(small, ids, 20)
    assert 0 < (exact - close).abs().max() < 0.05 * exact.std() + 0.05
    with torch.no_grad():
        torch.testing.assert_close(small(ids), plain(ids), atol=EXACT, rtol=0)


def test_int8_is_within_half_a_step_of_a_rows_scale() -> None:
    weight = torch.randn(33, 48)
    weight[5] = 0
    numbers, scales = quantised(weight)
    error = (numbers * scales[:, None] - weight).abs()
    assert (error <= 0.5001 * scales[:, None]).all() and numbers.abs().max() == 127


def test_logits_up_to_the_largest_are_capped_as_by_torch() -> None:
    decoder, _ = find_decoder()
    assert decoder is not None
    x = torch.zeros(1, 16)
    x[0, 0] = 1
    values = torch.cat([torch.linspace(-40, 40, 4000), torch.tensor([1e-6, -1e-6, 0.0, 1e4, -1e4, 3e38])])
    weight = torch.zeros(4016, 16)
    weight[: len(values), 0] = values
    capped = decoder.linear(Matrix.of(weight), x, 15.0)[0, : len(values)]
    torch.testing.assert_close(capped, 15 * torch.tanh(values / 15), atol=1e-5, rtol=0)
    assert (capped[1:4000] >= capped[:3999]).all()  # no two change places


def test_casting_weights_once_changes_no_bit() -> None:
    ids = torch.randint(0, 97, (2, 30))
    once, each = noisy(CONFIG, torch.bfloat16).for_decoding(), noisy(CONFIG, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in once.parameters())
    assert torch.equal(decoded(once, ids, 10), decoded(each, ids, 10))


@pytest.mark.usefixtures("recurrent")
@pytest.mark.parametrize("pattern", ["A", "R", "AR"])
def test_an_engine_writes_the_same_with_and_without(pattern: str) -> None:
    prompts = [[5], list(range(60)), [9] * 300]
    for model in (noisy_model(pattern), noisy_model(pattern).for_decoding()):
        engine = Engine(model, [])
        sequences = [engine.add(prompt, 30, replace(GREEDY, top_logprobs=2)) for prompt in prompts]
        run_all(engine)
        if model.quick_head is None:
            plain = sequences
    assert model.quick_head is not None
    for ours, theirs in zip(sequences, plain):
        told_alike(ours, theirs)


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine on which the products cannot be had; what is told about it."""
    find_decoder.cache_clear()
    request.addfinalizer(find_decoder.cache_clear)
    how, told = request.param
    how(monkeypatch)
    return told


def wrong_linear(self: Decoder, matrix: Matrix, x: torch.Tensor, softcap: float = 0.0) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], matrix.rows)


@pytest.mark.parametrize(
    "broken",
    [
        (lambda m: m.setattr(decode, "COMPILERS", ("no-such-compiler",)), "there is no C compiler"),
        (lambda m: m.setattr(decode, "FLAGS", ("--no-such-flag",)), "decode.c cannot be compiled"),
        (lambda m: m.setattr(decode.ctypes, "CDLL", lambda path: ctypes.CDLL), "cannot be compiled and loaded"),
        (lambda m: m.setattr(Decoder, "linear", wrong_linear), "computes something else than torch"),
    ],
    indirect=True,
)
def test_where_the_products_cannot_be_had_torch_goes_on_after_a_warning(
    broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, plain = torch.randint(0, 97, (2, 12)), noisy(CONFIG)
    assert torch.equal(decoded(noisy(CONFIG).for_decoding(), ids, 10), decoded(plain, ids, 10))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: single tokens take longer, for ") and broken in told[0]
    with pytest.raises(UserError, match="int8 weights: .*" + broken):
        noisy(CONFIG).for_decoding(is_int8=True)


def test_int8_is_refused_in_words_where_the_dtype_is_not_float32() -> None:
    with pytest.raises(UserError, match="bfloat16 on cpu"):
        noisy(CONFIG, torch.bfloat16).for_decoding(is_int8=True)
