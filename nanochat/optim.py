"""MuonAdamW: one optimizer for all parameters, by role.

Matrices inside blocks are stepped by Muon: momentum, orthogonalised by five Polar Express iterations, so that every
direction of a matrix learns at the same speed. Tables, head and scalars are stepped by AdamW. Which parameter belongs
where is its role's business (`ROLE_SETTINGS`); learning rates come from `scaling.BaseRates`.
Laws: pretraining spec 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AdamSettings:
    beta1: float
    beta2: float
    weight_decay: float
    eps: float = 1e-10


# None: Muon. The decay of AdamW roles is constant, Muon's is scheduled (pretraining spec 6.1).
ROLE_SETTINGS: dict[str, AdamSettings | None] = {
    "matrix": None,
    "lm_head": AdamSettings(0.8, 0.96, 0.01),
    "wte": AdamSettings(0.8, 0.995, 0.001),
    "value_embedding": AdamSettings(0.8, 0.995, 0.01),
    "resid_scalar": AdamSettings(0.8, 0.95, 0.05),
    "x0_scalar": AdamSettings(0.96, 0.95, 0.0),
    "smear": AdamSettings(0.8, 0.95, 0.0),
}

SECOND_MOMENT_DECAY = 0.9  # of NorMuon's variance estimate

# (a, b, c) per iteration, generated for five iterations with safety 2e-2 and cushion 2 (arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonAdamW:
    """Steps named parameters in place.

    roles: parameter name -> role; rates: role -> learning rate before the schedule. orthogonalize_dtype: bfloat16 on
    GPUs that multiply in it; None keeps the parameter's dtype.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        roles: Mapping[str, str],
        rates: Mapping[str, float],
        orthogonalize_dtype: torch.dtype | None = None,
    ) -> None:
        assert parameters.keys() == roles.keys(), "every parameter needs exactly one role"
        adam = {name: settings for name, role in roles.items() if (settings := ROLE_SETTINGS[role]) is not None}
        self.parameters = dict(parameters)
        self.adam = {name: AdamParameter(parameters[name], rates[roles[name]], adam[name]) for name in adam}
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(parameters.keys() - adam.keys()):
            by_shape.setdefault(tuple(parameters[name].shape), []).append(name)
        self.muon = {
            f"muon.{'x'.join(map(str, shape))}": MuonGroup(
                [self.parameters[name] for name in names], rates["matrix"], orthogonalize_dtype
            )
            for shape, names in sorted(by_shape.items())
        }

    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Update every parameter that has a gradient.

        lr: factor on every role's rate. momentum, weight_decay: Muon's, as scheduled; AdamW roles have their own.
        """
        for adam in self.adam.values():
            adam.step(lr)
        for muon in self.muon.values():
            muon.step(lr, momentum, weight_decay)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All state as flat named tensors (the tensors themselves, not copies)."""
        stepped: dict[str, AdamParameter | MuonGroup] = {**self.adam, **self.muon}
        return {f"{owner}.{name}": t for owner, item in stepped.items() for name, t in item.state.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take over the state of an optimizer of the same parameters."""
        state = self.state_dict()
        assert saved.keys() == state.keys(), f"optimizer states differ: {sorted(saved.keys() ^ state.keys())[:4]}"
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(saved[name])


class AdamParameter:
    """One parameter stepped by AdamW; arithmetic and moments in fp32 or better."""

    def __init__(self, parameter: nn.Parameter, rate: float, settings: AdamSettings) -> None:
        self.parameter, self.rate, self.settings = parameter, rate, settings
        exact = torch.promote_types(parameter.dtype, torch.float32)
        self.state = {
            "mean": torch.zeros_like(parameter, dtype=exact, requires_grad=False),
            "square": torch.zeros_like(parameter, dtype=exact, requires_grad=False),
            "steps": torch.zeros((), dtype=torch.int64),  # stays on the host: it only makes bias corrections
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self.parameter.grad is None:
            return
        s, mean, square = self.settings, self.state["mean"], self.state["square"]
        steps = int(self.state["steps"].add_(1))
        rate = self.rate * lr
        grad = self.parameter.grad.to(mean.dtype)
        mean.lerp_(grad, 1 - s.beta1)
        square.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
        denominator = (square / (1 - s.beta2**steps)).sqrt_().add_(s.eps)
        if s.weight_decay:
            self.parameter.mul_(1 - rate * s.weight_decay)
        self.parameter.addcdiv_(mean, denominator, value=-rate / (1 - s.beta1**steps))


class MuonGroup:
    """Matrices of one shape (m, n), stepped together as a stack (K, m, n)."""

    def __init__(self, parameters: list[nn.Parameter], rate: float, dtype: torch.dtype | None) -> None:
        self.parameters, self.dtype = parameters, dtype
        like = parameters[0]
        rows, columns = like.shape
        self.rate = rate * max(1.0, rows / columns) ** 0.5
        self.reduced_dim = -1 if rows >= columns else -2
        second = (len(parameters), rows, 1) if rows >= columns else (len(parameters), 1, columns)
        self.state = {
            "momentum": torch.zeros(len(parameters), rows, columns, device=like.device, dtype=like.dtype),
            "square": torch.zeros(second, device=like.device, dtype=like.dtype),
        }

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        given = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not given:
            return
        assert len(given) == len(self.parameters), "matrices of one shape are stepped together or not at all"
        grads = torch.stack(given)
        average = self.state["momentum"]
        average.lerp_(grads, 1 - momentum)
        update = torch.lerp(grads, average, momentum)  # Nesterov
        update = orthogonalize(update, self.dtype or update.dtype)
        update = self._equalize_variance(update)
        rate = self.rate * lr
        weights = torch.stack([parameter.detach() for parameter in self.parameters])
        decays = update * weights >= 0  # cautious: only where the update shrinks the weight as well
        weights -= rate * update + rate * weight_decay * weights * decays
        for parameter, weight in zip(self.parameters, weights.unbind()):
            parameter.copy_(weight)

    def _equalize_variance(self, update: Tensor) -> Tensor:
        """NorMuon (arXiv 2510.05491): divide each row (or column) by its running rms, keep the matrix norm."""
        norm = update.norm(dim=(-2, -1), keepdim=True)
        square = self.state["square"]
        square.lerp_(update.square().mean(dim=self.reduced_dim, keepdim=True), 1 - SECOND_MOMENT_DECAY)
        update = update * square.clamp_min(1e-10).rsqrt()
        return update * (norm / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrices with equal singular values, at Frobenius norm sqrt(min(m, n)). matrices: (K, m, n).

    dtype: of the iterations; the result has that of the matrices.

    Rows are first equalised to their rms norm (MuonEq, arXiv 2603.28254); the final norm is Muon+ (arXiv 2602.21545).
    """
    x = matrices.to(dtype)
    rows, columns = x.shape[-2:]
    row_norms = x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    x = x / row_norms * (x.norm(dim=(-2, -1), keepdim=True) / rows**0.5)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    is_tall = rows > columns
    x = x.mT if is_tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = (x.mT if is_tall else x).to(matrices.dtype)
    return x * (min(rows, columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6))
