"""What every mixer must keep, whatever it is: exact decoding, independent rows and forks, causality, documents."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanochat import config
from nanochat.common import UserError
from nanochat.config import ModelConfig
from nanochat.model.attention import offset, rotate
from nanochat.model.gpt import GPT, build_model, flops_per_token, predict_parameters
from nanochat.model.layers import ACTIVATIONS, shifted
from nanochat.model.mixer import LayerContext, Mixer
from nanochat.model.residual import RESIDUALS
from nanochat.model.state import KVState

pytestmark = pytest.mark.usefixtures("recurrent")
PATTERNS = ["A", "R", "AR"]
EXACT = 1e-4  # on fp32 logits


def small_config(pattern: str, **changes: object) -> ModelConfig:
    """Four layers, windows of 128 of 200 positions, so that windows matter."""
    shape = {"sequence_len": 200, "vocab_size": 97, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    shape["key_offset"] = True
    return ModelConfig(layer_pattern=pattern, **{**shape, **changes})  # type: ignore[arg-type]


def noisy_model(config: ModelConfig) -> GPT:
    """Fresh weights plus noise: at initialisation the output projections are zero and would hide every mistake."""
    model = build_model(config, torch.device("cpu"), torch.float32)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode_logits(model: GPT, ids: Tensor, borders: list[int]) -> Tensor:
    """Logits (B, T, V) of `ids` fed through a decode state in chunks that end at `borders`."""
    state = model.new_state(ids.size(0), ids.size(1))
    chunks = zip([0, *borders], [*borders, ids.size(1)])
    return torch.cat([model.head(model.hidden(ids[:, start:end], state=state)) for start, end in chunks], dim=1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_token_by_token_equals_the_full_forward(pattern: str) -> None:
    model, ids = noisy_model(small_config(pattern)), random_ids(2, 180)
    with torch.no_grad():
        torch.testing.assert_close(decode_logits(model, ids, list(range(1, 180))), model(ids), atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("borders", [[1], [150], [64, 128, 129], [7, 100, 101, 170]])
def test_chunked_prefill_equals_whole_prefill(pattern: str, borders: list[int]) -> None:
    model, ids = noisy_model(small_config(pattern)), random_ids(2, 180)
    torch.testing.assert_close(decode_logits(model, ids, borders), decode_logits(model, ids, []), atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chunk", [1, 7, 20])
@torch.no_grad()
def test_windows_remember_little_more_than_they_show_and_read_the_same(pattern: str, chunk: int) -> None:
    config = small_config(pattern, sequence_len=400)  # windows of 128, 128, 128 and 400
    model, ids = noisy_model(config), random_ids(2, 400)
    whole, state = model(ids), model.new_state(2, 400, max_chunk=chunk)
    logits = [model.all_logits(ids[:, start : start + chunk], state) for start in range(0, 400, chunk)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=EXACT, rtol=0)
    slots = [layer.num_slots for layer in state.layers if isinstance(layer, KVState)]
    assert set(slots[:-1]) <= {128 + chunk} and (pattern != "A" or slots[-1] == 400)


@torch.no_grad()
def test_a_text_can_be_cut_as_far_back_as_its_windows_reach_and_not_further() -> None:
    model, ids, other = noisy_model(small_config("A", sequence_len=400)), random_ids(1, 400), random_ids(1, 30, seed=1)
    for length in (30, 140, 148, 149, 300, 400):
        state = model.new_state(1, 400, max_chunk=20)
        for start in range(0, length, 20):
            model.next_logits(ids[:, start : min(start + 20, length)], state)
        shortest = state.shortest(length)
        assert shortest == (0 if length <= 148 else length - 20)
        for cut in {max(1, shortest), (max(1, shortest) + length) // 2, length - 1}:
            row = model.new_state(1, 400, max_chunk=20)
            row.load(0, state.save(0, length))
            row.cut(0, cut, int(ids[0, cut - 1]))
            row.past = length
            more = other[:, : min(20, 400 - cut)]
            logits = model.all_logits(more, row)
            whole = model(torch.cat([ids[:, :cut], more], dim=1))[:, cut:]
            torch.testing.assert_close(logits, whole, atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_forks_are_independent_of_each_other_and_of_their_origin(pattern: str) -> None:
    model, prompt = noisy_model(small_config(pattern)), random_ids(1, 40)
    state = model.new_state(4, 60)
    origin, continuations = state.rows(0, 1, 0), random_ids(3, 10, seed=1)
    model.next_logits(prompt, origin)
    for row in (1, 2, 3):
        state.load(row, state.row(0, 40))
    forks = state.rows(1, 4, 40)
    forked = [model.next_logits(continuations[:, t : t + 1], forks) for t in range(10)]
    alone = [model.next_logits(continuations[:1, t : t + 1], origin) for t in range(10)]  # the origin, afterwards
    whole = model(torch.cat([prompt.expand(3, -1), continuations], dim=1))[:, 40:]
    torch.testing.assert_close(torch.stack(forked, 1), whole, atol=EXACT, rtol=0)
    torch.testing.assert_close(torch.stack(alone, 1), whole[:1], atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_rows_that_leave_the_batch_do_not_disturb_the_rest(pattern: str) -> None:
    model, ids = noisy_model(small_config(pattern)), random_ids(3, 30)
    state = model.new_state(3, 30)
    model.next_logits(ids[:, :20], state)
    state.load(1, state.row(2, 20))  # the last row takes the place of one that is done
    rest = model.next_logits(ids[[0, 2], 20:], state.rows(0, 2, 20))
    torch.testing.assert_close(rest, model(ids[[0, 2]])[:, -1], atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_row_that_starts_anew_knows_nothing_of_the_text_before(pattern: str) -> None:
    model, ids = noisy_model(small_config(pattern)), random_ids(2, 150)
    state = model.new_state(2, 200)
    model.next_logits(ids, state)
    state.start(1)
    for layer in state.layers:
        assert isinstance(layer, KVState) or all(not tensor[1].any() for tensor in layer.tensors().values())
    anew = random_ids(1, 20, seed=5)
    first = state.rows(1, 2, 0)
    model.next_logits(anew[:, :19], first)
    state.load(0, state.row(1, 19))
    both = model.next_logits(anew[:, 19:].expand(2, -1), state.rows(0, 2, 150))  # as if a long row were beside it
    torch.testing.assert_close(both, model(anew)[:, -1].expand(2, -1), atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_prompts_of_different_lengths_decode_side_by_side_as_each_alone(pattern: str) -> None:
    model, lengths = noisy_model(small_config(pattern)), (3, 150, 40)
    prompts = [random_ids(1, length, seed=length) for length in lengths]
    state, continuations = model.new_state(3, 160), random_ids(3, 10, seed=1)
    for row, prompt in enumerate(prompts):
        model.next_logits(prompt, state.rows(row, row + 1, 0))
    together = state.rows(0, 3, 150)
    logits = torch.stack([model.next_logits(continuations[:, t : t + 1], together) for t in range(10)], 1)
    for row, prompt in enumerate(prompts):
        whole = model(torch.cat([prompt, continuations[row : row + 1]], dim=1))[:, prompt.size(1) :]
        torch.testing.assert_close(logits[row : row + 1], whole, atol=EXACT, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_row_has_the_same_logits_alone_and_in_a_batch(pattern: str) -> None:
    model, ids = noisy_model(small_config(pattern)), random_ids(5, 150)
    together = model(ids)
    for row in range(5):
        torch.testing.assert_close(model(ids[row : row + 1])[0], together[row], atol=EXACT, rtol=0)


@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_token_changes_no_logits_before_it_and_some_at_it(pattern: str, doc_mask: bool) -> None:
    model, ids = noisy_model(small_config(pattern, doc_mask=doc_mask)), random_ids(1, 150)
    documents = (torch.arange(150) // 60)[None]
    before = model(ids, documents)
    changed = ids.clone()
    changed[0, 100] = (changed[0, 100] + 1) % 97
    after = model(changed, documents)
    torch.testing.assert_close(after[:, :100], before[:, :100], atol=EXACT, rtol=0)
    assert (after[:, 100:] - before[:, 100:]).abs().amax() > 0.01


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_with_document_masks_a_document_reads_the_same_alone_and_packed(pattern: str) -> None:
    model = noisy_model(small_config(pattern, doc_mask=True))
    pieces = [random_ids(1, length, seed=length) for length in (70, 1, 90, 30)]
    documents = torch.cat([torch.full((1, piece.size(1)), i) for i, piece in enumerate(pieces)], dim=1)
    packed = model(torch.cat(pieces, dim=1), documents).split([piece.size(1) for piece in pieces], dim=1)
    for piece, logits in zip(pieces, packed):
        torch.testing.assert_close(logits, model(piece, torch.zeros_like(piece)), atol=EXACT, rtol=0)


@torch.no_grad()
def test_without_document_masks_a_document_reads_its_predecessor() -> None:
    model, ids = noisy_model(small_config("A")), random_ids(1, 100)
    documents = (torch.arange(100) // 50)[None]
    alone = model(ids[:, 50:], documents[:, 50:])
    assert (model(ids, documents)[:, 50:] - alone).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"value_embeddings": False, "smear": False},
        {"residual": "plain", "tied_head": True},
        {"backout": False, "n_kv_head": 1},
        {"n_layer": 1, "vocab_size": 64},
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_predicted_parameter_counts_equal_built_ones(pattern: str, changes: dict[str, object]) -> None:
    config = small_config(pattern, **changes)
    model = noisy_model(config)
    assert predict_parameters(config) == model.parameter_counts()
    assert sum(predict_parameters(config).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_flops_are_six_per_matrix_weight_plus_the_mixing(pattern: str) -> None:
    model = noisy_model(small_config(pattern))
    linear = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    mixing = {"A": lambda window: 12 * 32 * window, "R": lambda window: 6 * 32}
    expected = sum(mixing[letter](window) for letter, window in zip((pattern * 4)[:4], (128, 128, 128, 200)))
    assert flops_per_token(model.config) == 6 * linear + expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_tensor_parallel_plan_names_every_projection_once(pattern: str) -> None:
    for block in noisy_model(small_config(pattern)).blocks:
        mixer = block.mixer
        assert isinstance(mixer, Mixer)
        assert mixer.tp_plan().keys() == dict(mixer.named_children()).keys()
        assert set(mixer.tp_plan().values()) <= {"colwise", "rowwise", "replicate"}


def test_flags_know_the_schemes_and_activations_that_there_are() -> None:
    assert tuple(RESIDUALS) == config.RESIDUALS and tuple(ACTIVATIONS) == config.ACTIVATIONS


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"layer_pattern": "AX"}, "A, R"),
        ({"residual": "x"}, "plain, lambdas"),
        ({"mlp_activation": "x"}, "relu2, gelu"),
    ],
)
def test_unknown_letters_schemes_and_activations_name_the_known_ones(changes: dict[str, str], known: str) -> None:
    with pytest.raises(UserError, match=known):
        GPT(replace(small_config("A"), **changes))


def test_the_slower_half_of_each_keys_pairs_is_the_previous_positions() -> None:
    keys = torch.arange(3.0).view(1, 3, 1, 1) + torch.zeros(1, 3, 2, 16)  # each channel says its position
    mixed = offset(keys, shifted(keys, torch.arange(3)[None], None))
    frequencies = 10.0 ** -torch.arange(8.0).repeat(2)  # of the pairs (i, i + 8)
    assert (mixed[0, 2][:, frequencies > frequencies.median()] == 2).all()
    assert (mixed[0, 2][:, frequencies <= frequencies.median()] == 1).all()
    assert (mixed[0, 0] == 0).all()


def test_rotation_keeps_lengths_turns_by_minus_the_angle_and_makes_scores_depend_on_distance_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=rng, dtype=torch.float64).expand(1, 30, 1, 8) for _ in range(2))
    ctx = LayerContext(torch.zeros(1, 30), torch.arange(30)[None], None, (30,))
    cos, sin = ctx.rotary(8, 100.0, torch.float64)
    turned_q, turned_k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q[0, :, 0].norm(dim=-1))
    scores = turned_q @ turned_k.mT
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1
    unit = rotate(torch.eye(8, dtype=torch.float64)[0].expand(1, 30, 1, 8), cos, sin)[0, :, 0]
    positions = torch.arange(30, dtype=torch.float64)
    torch.testing.assert_close(unit[:, 0], positions.cos())
    torch.testing.assert_close(unit[:, 4], -positions.sin())  # the transpose of the textbook's rotation
