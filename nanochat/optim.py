"""MuonAdamW: one optimizer for all parameters, by role.

Matrices inside blocks are stepped by Muon: momentum, orthogonalised by five Polar Express iterations, so that every
direction of a matrix learns at the same speed. Tables, head and scalars are stepped by AdamW. Which parameter belongs
where is its role's business (`ROLE_SETTINGS`); learning rates come from `scaling.BaseRates`. The laws below act on the
slices that a rank owns and know nothing of the other ranks; those are the business of `sharding`.
Laws: pretraining spec 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.parallel import Runtime
from nanochat.precision import LossScaler
from nanochat.sharding import ONE_PROCESS, Bucket, Reduction, joined, stack_buckets


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
    """Steps named parameters in place, on one rank or many.

    roles: parameter name -> role; rates: role -> learning rate before the schedule. reduce_dtype: what gradients travel
    between ranks in; None: their own dtype. Every rank holds all weights, but state only for the slices it steps
    (`sharding.Bucket`), and a gradient is summed over ranks as soon as the last backward has made it
    (`begin_reduction`). Gradients are to be those of the loss times `loss_scale`, 1 unless the runtime computes in
    float16. With several ranks `step`, `state_dict` and `load_state_dict` must be called on all.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        roles: Mapping[str, str],
        rates: Mapping[str, float],
        rt: Runtime = ONE_PROCESS,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        assert parameters.keys() == roles.keys(), "every parameter needs exactly one role"
        self.parameters, self._rt = dict(parameters), rt
        self.adam: dict[str, AdamParameter] = {}
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, parameter in parameters.items():
            settings = ROLE_SETTINGS[roles[name]]
            if settings is None:
                by_shape.setdefault(tuple(parameter.shape), []).append(name)
            else:
                self.adam[name] = AdamParameter(parameter, rates[roles[name]], settings, rt)
        self.muon = [
            MuonGroup({name: parameters[name] for name in names}, rates["matrix"], rt)
            for _, names in sorted(by_shape.items())
        ]
        buckets = [adam.bucket for adam in self.adam.values()]
        buckets += [bucket for group in self.muon for bucket in group.buckets]
        self._reduction = Reduction(buckets, rt, reduce_dtype)
        self.is_stepping = False  # still True where a step has failed: some weights are new, others not
        self.loss_scaler = LossScaler() if rt.dtype == torch.float16 else None

    @property
    def loss_scale(self) -> float:
        """What the loss is to be multiplied by before the backward; the same for all passes and ranks of a step."""
        return self.loss_scaler.scale if self.loss_scaler else 1.0

    def begin_reduction(self) -> None:
        """Say that the next backward is the step's last, so that gradients are summed over ranks while it goes on."""
        self._reduction.begin()

    def step(self, lr: float, momentum: float, weight_decay: float) -> bool:
        """Update every parameter that has a gradient, and return True; False where they overflowed: nothing is updated.

        lr: factor on every role's rate. momentum, weight_decay: Muon's, as scheduled; AdamW roles have their own.
        """
        self._reduction.complete()
        if self.loss_scaler is not None:
            is_finite = self._reduction.unscale(self.loss_scale)
            self.loss_scaler.update(overflowed=not is_finite)
            if not is_finite:
                return False
        self.is_stepping = True
        for adam in self.adam.values():
            adam.step(lr)
        for group in self.muon:
            group.step(lr, momentum, weight_decay)
        self._reduction.finish()
        self.is_stepping = False
        return True

    def zero_grad(self) -> None:
        """Drop all gradients, also those that are on their way."""
        self._reduction.drop()
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def own_state_bytes(self) -> int:
        """Of this rank's share of the state."""
        states = [adam.state for adam in self.adam.values()] + [group.state for group in self.muon]
        own = [tensor for state in states for tensor in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    @property
    def state_bytes(self) -> int:
        """Of the whole state, over all ranks, as this rank's share lets expect."""
        return self._rt.world_size * self.own_state_bytes

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as named tensors, `<parameter>.<what>`, whatever the number of ranks; empty but on rank 0."""
        whole: dict[str, Tensor] = {}
        for name, adam in self.adam.items():
            whole |= {f"{name}.{what}": tensor for what, tensor in adam.whole_state().items()}
        for group in self.muon:
            whole |= group.whole_state()
        return whole | self.loss_scaler.state() if self.loss_scaler and self._rt.is_main else whole

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take over the state of an optimizer of the same parameters, saved on any number of ranks.

        Raises UserError where the names are not those of this optimizer's state.
        """
        names = {f"{name}.{what}" for name, adam in self.adam.items() for what in adam.state}
        names |= {f"{name}.{what}" for group in self.muon for name in group.names for what in group.state}
        scaling = set(saved) & LossScaler().state().keys()  # where the run was in float16 when it was saved
        if differing := sorted((set(saved) - scaling) ^ names):
            raise UserError(
                f"the saved optimizer state is not this model's ({', '.join(differing[:3])}, ...): an earlier version "
                "saved it; finish that run with the version that began it, or start anew with --overwrite"
            )
        for name, adam in self.adam.items():
            adam.load({what: saved[f"{name}.{what}"] for what in adam.state})
        for group in self.muon:
            group.load(saved)
        if self.loss_scaler is not None:
            self.loss_scaler.load({name: saved[name] for name in scaling})


class AdamParameter:
    """One parameter stepped by AdamW; arithmetic and moments in fp32 or better, for the rows that this rank owns."""

    def __init__(self, parameter: nn.Parameter, rate: float, settings: AdamSettings, rt: Runtime = ONE_PROCESS) -> None:
        self.parameter, self.rate, self.settings = parameter, rate, settings
        self.bucket = Bucket([parameter], rt, is_stack=False)
        own = self.bucket.own_weights()
        exact = torch.promote_types(parameter.dtype, torch.float32)
        self.state = {
            "mean": torch.zeros_like(own, dtype=exact),
            "square": torch.zeros_like(own, dtype=exact),
            "steps": torch.zeros((), dtype=torch.int64),  # stays on the host: it only makes bias corrections
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        mean, square = self.state["mean"], self.state["square"]
        grad = self.bucket.own_gradient(mean.dtype)
        if grad is None:
            return
        s = self.settings
        steps = int(self.state["steps"].add_(1))
        rate = self.rate * lr
        weights = self.bucket.own_weights()
        mean.lerp_(grad, 1 - s.beta1)
        square.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)
        denominator = (square / (1 - s.beta2**steps)).sqrt_().add_(s.eps)
        if s.weight_decay:
            weights.mul_(1 - rate * s.weight_decay)
        weights.addcdiv_(mean, denominator, value=-rate / (1 - s.beta1**steps))
        self.bucket.publish(weights)

    def whole_state(self) -> dict[str, Tensor]:
        """The state of all rows, on rank 0."""
        shape = self.parameter.shape
        moments = {what: self.bucket.gather(self.state[what]) for what in ("mean", "square")}
        whole = {what: tensor.reshape(shape) for what, tensor in moments.items() if tensor is not None}
        return whole | {"steps": self.state["steps"]} if whole else {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self.state["steps"].copy_(saved["steps"])
        for what in ("mean", "square"):
            rows = saved[what].reshape(self.bucket.num_slices, *self.bucket.slice_shape)
            self.state[what].copy_(rows[self.bucket.own])


class MuonGroup:
    """Matrices of one shape (m, n); those that this rank owns are stepped together as a stack (K, m, n)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: float, rt: Runtime = ONE_PROCESS) -> None:
        self.names, matrices = list(parameters), list(parameters.values())
        self.dtype = rt.orthogonalize_dtype
        like = matrices[0]
        rows, columns = like.shape
        self.rate = rate * max(1.0, rows / columns) ** 0.5
        self.reduced_dim = -1 if rows >= columns else -2
        self.buckets = stack_buckets(matrices, rt)
        self._counts = [bucket.num_own for bucket in self.buckets]
        own = sum(self._counts)
        second = (own, rows, 1) if rows >= columns else (own, 1, columns)
        self.state = {
            "momentum": torch.zeros(own, rows, columns, device=like.device, dtype=like.dtype),
            "square": torch.zeros(second, device=like.device, dtype=like.dtype),
        }

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float) -> None:
        average = self.state["momentum"]
        given = [grad for bucket in self.buckets if (grad := bucket.own_gradient(average.dtype)) is not None]
        if not given:
            return
        assert len(given) == len(self.buckets), "matrices of one shape are stepped together or not at all"
        weights = joined([bucket.own_weights() for bucket in self.buckets])
        if len(weights):
            grads = joined(given)
            average.lerp_(grads, 1 - momentum)
            update = torch.lerp(grads, average, momentum)  # Nesterov
            update = orthogonalize(update, self.dtype or update.dtype)
            update = self._equalize_variance(update)
            rate = self.rate * lr
            decays = update * weights >= 0  # cautious: only where the update shrinks the weight as well
            weights -= rate * update + rate * weight_decay * weights * decays
        for bucket, own in zip(self.buckets, weights.split(self._counts)):
            bucket.publish(own)

    def whole_state(self) -> dict[str, Tensor]:
        """The state of all matrices by `<parameter>.<what>`, on rank 0."""
        whole: dict[str, Tensor] = {}
        for what, own in self.state.items():
            gathered = [bucket.gather(part) for bucket, part in zip(self.buckets, own.split(self._counts))]
            matrices = [matrix for stack in gathered if stack is not None for matrix in stack.unbind()]
            whole |= {f"{name}.{what}": matrix for name, matrix in zip(self.names, matrices)}
        return whole

    def load(self, saved: Mapping[str, Tensor]) -> None:
        firsts = range(0, len(self.names), self.buckets[0].num_slices)  # buckets follow each other in order of names
        own = [name for first, b in zip(firsts, self.buckets) for name in self.names[first:][: b.num_slices][b.own]]
        for what, state in self.state.items():
            for matrix, name in zip(state, own):
                matrix.copy_(saved[f"{name}.{what}"])

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
