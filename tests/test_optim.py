"""The optimizer: every parameter stepped once, by the law of its role."""

import pytest
import torch
from torch import nn

from nanochat.config import ModelConfig
from nanochat.model.gpt import build_model
from nanochat.optim import ROLE_SETTINGS, MuonAdamW, MuonGroup, orthogonalize
from nanochat.scaling import BaseRates

RATES = BaseRates().by_role()


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def step_with_gradient(optimizer: MuonAdamW, seed: int, lr: float = 1.0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters.values():
        p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype)
    optimizer.step(lr, 0.9, 0.1)


@pytest.mark.parametrize("pattern", ["A", "AR"])
def test_roles_cover_each_parameter_exactly_once_and_every_step_moves_it(pattern: str, recurrent: str) -> None:
    config = ModelConfig(64, 97, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, layer_pattern=pattern)
    model = build_model(config, torch.device("cpu"), torch.float32)
    roles, parameters = model.parameter_roles(), dict(model.named_parameters())
    assert set(roles.values()) <= set(ROLE_SETTINGS)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = MuonAdamW(parameters, roles, RATES)
    stepped = [id(item.parameter) for item in optimizer.adam.values()]
    stepped += [id(p) for group in optimizer.muon for bucket in group.buckets for p in bucket.parameters]
    assert sorted(stepped) == sorted(id(p) for p in parameters.values())
    step_with_gradient(optimizer, seed=0)
    assert [name for name, p in parameters.items() if torch.equal(p, before[name])] == []


def test_a_parameter_without_a_role_is_refused() -> None:
    with pytest.raises(AssertionError, match="exactly one role"):
        MuonAdamW({"a": parameter(2, 2)}, {}, RATES)


def test_adam_roles_step_like_torchs_adamw() -> None:
    ours, theirs = parameter(5, 3), parameter(5, 3)
    settings = ROLE_SETTINGS["wte"]
    assert settings is not None
    optimizer = MuonAdamW({"w": ours}, {"w": "wte"}, RATES)
    betas = (settings.beta1, settings.beta2)
    reference = torch.optim.AdamW([theirs], RATES["wte"], betas, settings.eps, settings.weight_decay)
    for seed in range(20):
        step_with_gradient(optimizer, seed)
        theirs.grad = ours.grad
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 20), (64, 16), (16, 64), (2, 12)])
def test_orthogonalising_makes_all_singular_values_alike_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    matrices = parameter(3, *shape, dtype=torch.float64).detach()
    result = orthogonalize(matrices, torch.float64)
    for before, after in zip(matrices, result):
        values = torch.linalg.svdvals(after)
        assert values.max() / values.min() < 1.4
        assert after.norm().item() == pytest.approx(min(shape) ** 0.5, rel=1e-6)
        rows = before / before.norm(dim=-1, keepdim=True)  # rows are equalised first
        u, _, v = torch.linalg.svd(rows, full_matrices=False)
        torch.testing.assert_close(u.mT @ after @ v.mT, torch.eye(min(shape), dtype=torch.float64), atol=0.2, rtol=0)


def test_a_stack_of_matrices_is_stepped_like_each_alone() -> None:
    together = {name: parameter(8, 4, seed=seed) for seed, name in enumerate("abc")}
    alone = {name: nn.Parameter(p.detach().clone()) for name, p in together.items()}
    stacked = MuonAdamW(together, dict.fromkeys(together, "matrix"), RATES)
    single = [MuonAdamW({name: p}, {name: "matrix"}, RATES) for name, p in alone.items()]
    for seed in range(3):
        step_with_gradient(stacked, seed)
        for optimizer in single:
            for name, p in optimizer.parameters.items():
                p.grad = together[name].grad
            optimizer.step(1.0, 0.9, 0.1)
    for name in together:
        torch.testing.assert_close(together[name], alone[name])


def test_decay_acts_only_where_the_update_shrinks_the_weight_too() -> None:
    decayed, plain = parameter(6, 6), parameter(6, 6)
    gradient = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    for p, decay in ((decayed, 0.5), (plain, 0.0)):
        p.grad = gradient.clone()
        MuonAdamW({"m": p}, {"m": "matrix"}, RATES).step(1.0, 0.9, decay)
    start = parameter(6, 6)
    shrinks = (start - plain) * start > 0
    assert torch.equal(shrinks, decayed != plain)
    torch.testing.assert_close((plain - decayed)[shrinks], (0.02 * 0.5 * start)[shrinks], rtol=1e-3, atol=1e-6)


def test_tall_matrices_take_larger_steps_by_the_root_of_their_shape() -> None:
    tall, square = MuonGroup({"m": parameter(64, 16)}, 0.02), MuonGroup({"m": parameter(16, 16)}, 0.02)
    assert tall.rate == pytest.approx(2 * square.rate)


def test_a_saved_state_continues_bit_exactly() -> None:
    roles = {"m": "matrix", "n": "matrix", "w": "wte", "s": "x0_scalar"}
    shapes = {"m": (8, 4), "n": (4, 4), "w": (5, 3), "s": (7,)}
    through = {name: parameter(*shape) for name, shape in shapes.items()}
    optimizer = MuonAdamW(through, roles, RATES)
    for seed in range(3):
        step_with_gradient(optimizer, seed)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in through.items()}
    second = MuonAdamW(resumed, roles, RATES)
    second.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for seed in range(3, 6):
        step_with_gradient(optimizer, seed)
        step_with_gradient(second, seed)
    for name in through:
        assert torch.equal(through[name], resumed[name])


def test_a_parameter_without_a_gradient_stays_where_it_is() -> None:
    parameters = {"w": parameter(5, 3), "m": parameter(4, 4)}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    MuonAdamW(parameters, {"w": "wte", "m": "matrix"}, RATES).step(1.0, 0.9, 0.1)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


@pytest.mark.parametrize("role", ["wte", "value_embedding", "lm_head"])
def test_weights_and_moments_are_fp32_when_computing_in_bf16_so_that_weak_decay_is_real(role: str) -> None:
    config = ModelConfig(64, 97, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = build_model(config, torch.device("cpu"), torch.bfloat16)
    parameters = dict(model.named_parameters())
    optimizer = MuonAdamW(parameters, model.parameter_roles(), RATES)
    name = next(name for name, given in model.parameter_roles().items() if given == role)
    parameters[name].grad = torch.zeros_like(parameters[name])
    with torch.no_grad():
        parameters[name].add_(0.3)
    before = parameters[name].detach().clone()
    optimizer.step(1.0, 0.9, 0.0)
    moved = (parameters[name] - before) / before  # by rate * decay, 8e-5 to 1.5e-3: below half a step of bfloat16
    settings = ROLE_SETTINGS[role]
    assert settings is not None and RATES[role] * settings.weight_decay < 2**-9
    torch.testing.assert_close(moved, torch.full_like(moved, -RATES[role] * settings.weight_decay), rtol=0.1, atol=0)
    assert {t.dtype for t in optimizer.state_dict().values() if t.is_floating_point()} == {torch.float32}
