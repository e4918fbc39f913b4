"""The dial: every number that follows from `--depth` or from the training horizon, and the law it comes from.

    depth -> ModelConfig          `model_config`
    counts -> TrainingPlan        `training_plan`
    step -> Multipliers           `TrainingPlan.at`

Two sets of laws. `reference` is the ancestor's, number for number (pretraining spec 5). `nanochat`, the default,
differs where the reference contradicts itself (batch size and weight decay follow the real horizon, the batch does not
jump between depths, short runs get a complete schedule, small models get a small vocabulary) and offsets keys. All
constants of the dial stand in this file alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from nanochat.common import UserError
from nanochat.config import ModelConfig

ASPECT_RATIO = 64  # width per layer; 64 beat 128 at 1e18 FLOPs (pretraining spec 11.2)
HEAD_DIM = 128
DEFAULT_RATIO = 12.0  # tokens per scaling parameter
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19  # tuned at depth 12
REFERENCE_WIDTH = 768
BATCH_EXPONENT = 0.383  # B ~ D^0.383, arXiv 2505.13738
BASE_WEIGHT_DECAY = 0.28  # Muon, at depth 12
MAX_WEIGHT_DECAY = 2.0  # about the reference's depth 4 (1.89), the strongest decay anybody has tuned
MAX_VOCAB_SIZE = 2**15
MIN_STEPS = 400  # a horizon too short for the power law is cut into this many steps: 13 big ones learn next to nothing


@dataclass(frozen=True)
class Laws:
    """One consistent set of choices.

    scale_vocab: vocabulary grows with depth. follow_horizon: batch and decay use the real number of tokens.
    fit_short_runs: warm-ups are at most a fraction of the run. flat_lr_tokens: learning rates are the same for all
    batches from this one up to the reference's; the square root all the way costs 0.27 bits per byte at 4,096 tokens
    (dev/LOG.md 2026-11-21; measured at depths 2 and 4, batches of 1,024 to 4,096 tokens). key_offset: models have
    `ModelConfig.key_offset`. sft_batch_exponent: in fine-tuning, rates go with this power of a batch below the
    reference's. sft_weight_decay: Muon's in fine-tuning; without it the matrices grew to four times their size in 3,000
    steps, and of 0, 1, 3 and 8 it is 3 that answers best (dev/LOG.md 2026-11-22). backout_min_depth: shallower models
    do without backout. At depth 2 the middle layer is the last: what is taken out is the state itself, its share drifts
    past 1, and the state flips its sign (the loss jumped from 5.9 to 12).
    """

    scale_vocab: bool
    follow_horizon: bool
    fit_short_runs: bool
    flat_lr_tokens: int
    key_offset: bool
    sft_batch_exponent: float
    sft_weight_decay: float
    backout_min_depth: int

    def lr_scale(self, batch_tokens: int) -> float:
        """Factor on all learning rates: the square root of the batch outside of the flat part."""
        return max(batch_tokens / REFERENCE_BATCH_TOKENS, min(1.0, batch_tokens / self.flat_lr_tokens)) ** 0.5

    def sft_lr_scale(self, batch_tokens: int) -> float:
        """The same in fine-tuning."""
        ratio = batch_tokens / REFERENCE_BATCH_TOKENS
        return ratio ** (0.5 if ratio >= 1 else self.sft_batch_exponent)


LAWS = {
    "nanochat": Laws(
        scale_vocab=True,
        follow_horizon=True,
        fit_short_runs=True,
        flat_lr_tokens=2**11,
        key_offset=True,
        sft_batch_exponent=0.1,
        sft_weight_decay=3.0,
        backout_min_depth=3,
    ),
    "reference": Laws(
        scale_vocab=False,
        follow_horizon=False,
        fit_short_runs=False,
        flat_lr_tokens=REFERENCE_BATCH_TOKENS,
        key_offset=False,
        sft_batch_exponent=0.5,
        sft_weight_decay=0.0,
        backout_min_depth=0,
    ),
}


def vocab_size_for(depth: int, laws: str = "nanochat") -> int:
    """Vocabulary of a tokenizer for this depth, special tokens included.

    Reference: 32,768 always. Ours doubles every two layers up to that: 2,048 at depth 2, 4,096 at 4, 32,768 from 10.
    At depth 4 the head is 73 % of the matmul parameters with 32,768 entries, and 4,096 gave 3.1 times the bytes per
    CPU-second.
    """
    return min(MAX_VOCAB_SIZE, 2 ** (10 + depth // 2)) if LAWS[laws].scale_vocab else MAX_VOCAB_SIZE


def model_config(
    depth: int,
    vocab_size: int | None = None,
    sequence_len: int = 2048,
    aspect_ratio: int = ASPECT_RATIO,
    head_dim: int = HEAD_DIM,
    laws: str = "nanochat",
    **switches: object,
) -> ModelConfig:
    """The model of a depth: width is depth * aspect_ratio, up to whole heads. `switches` are ModelConfig fields."""
    switches.setdefault("key_offset", LAWS[laws].key_offset)
    switches.setdefault("backout", depth >= LAWS[laws].backout_min_depth)
    heads = -(-depth * aspect_ratio // head_dim)
    return ModelConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size or vocab_size_for(depth, laws),
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * head_dim,
        **switches,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Schedule:
    """How learning rate, momentum and weight decay move over a run (pretraining spec 5.2)."""

    warmup_steps: int = 40
    warmdown_frac: float = 0.65
    final_lr_frac: float = 0.05
    peak_lr_frac: float = 1.0
    momentum_warmup_steps: int = 400
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.90

    def fit(self, num_steps: int) -> "Schedule":
        """The same schedule with warm-ups that a run of `num_steps` can afford."""
        return replace(
            self,
            warmup_steps=min(self.warmup_steps, num_steps // 10),
            momentum_warmup_steps=min(self.momentum_warmup_steps, num_steps // 4),
        )

    def lr(self, step: int, num_steps: int) -> float:
        """Learning-rate multiplier."""
        warmdown = round(self.warmdown_frac * num_steps)
        if step < self.warmup_steps:
            return self.peak_lr_frac * (step + 1) / self.warmup_steps
        if step <= num_steps - warmdown:
            return self.peak_lr_frac
        left = max(0.0, (num_steps - step) / warmdown)
        return self.peak_lr_frac * (left + (1 - left) * self.final_lr_frac)

    def momentum(self, step: int, num_steps: int) -> float:
        """Muon's momentum."""
        if step < self.momentum_warmup_steps:
            done = step / self.momentum_warmup_steps
            return self.momentum_start + done * (self.momentum_peak - self.momentum_start)
        warmdown = round(self.warmdown_frac * num_steps)
        if step < num_steps - warmdown:
            return self.momentum_peak
        done = min(1.0, (step - (num_steps - warmdown)) / max(warmdown, 1))
        return self.momentum_peak + done * (self.momentum_end - self.momentum_peak)


# Fine-tuning on conversations: post-training spec 2.4.
SFT_SCHEDULE = Schedule(
    warmup_steps=0,
    warmdown_frac=0.5,
    final_lr_frac=0.0,
    peak_lr_frac=0.8,
    momentum_warmup_steps=300,
    momentum_peak=0.95,
    momentum_end=0.95,
)


@dataclass(frozen=True)
class Multipliers:
    """What the optimizer needs at one step: a factor on every learning rate, Muon's momentum and weight decay."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class TrainingPlan:
    """A run's horizon and scales. lr_scale multiplies all rates, width_scale those of tables and head."""

    num_steps: int
    total_batch_tokens: int
    lr_scale: float
    width_scale: float
    weight_decay: float
    schedule: Schedule = Schedule()
    fit_short_runs: bool = True

    def at(self, step: int, num_steps: int | None = None) -> Multipliers:
        """Multipliers of a step. num_steps: a newer estimate of the run's length (under a time budget)."""
        total = num_steps or self.num_steps
        schedule = self.schedule.fit(total) if self.fit_short_runs else self.schedule
        decay = self.weight_decay * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return Multipliers(schedule.lr(step, total), schedule.momentum(step, total), decay)


@dataclass(frozen=True)
class Horizon:
    """How long to train: a number of steps, or of FLOPs, or tokens per scaling parameter; the first given counts.

    Under a time budget target_flops is what the devices are expected to do in that time: the batch is fitted to it, and
    the loop finds out how many steps it really is.
    """

    num_steps: int | None = None
    target_flops: float | None = None
    ratio: float = DEFAULT_RATIO


@dataclass(frozen=True)
class MicroBatch:
    """What all ranks take at once: `rows` rows of `sequence_len` tokens each. A step is a whole number of them."""

    sequence_len: int
    world_size: int = 1
    rows: int = 1

    @property
    def tokens(self) -> int:
        return self.sequence_len * self.world_size * self.rows

    def check(self, batch_tokens: int, is_given: bool = True) -> None:
        """Raise UserError, naming what would do, unless a step of `batch_tokens` is whole micro-batches.

        is_given: by a flag, so that it can be changed; else the batch is that of a run which goes on.
        """
        if batch_tokens % self.tokens == 0:
            return
        lower, upper = batch_tokens // self.tokens * self.tokens, -(-batch_tokens // self.tokens) * self.tokens
        advice = f"the nearest totals are {lower} and {upper}" if lower else f"the nearest total is {upper}"
        if batch_tokens % (self.sequence_len * self.rows) == 0:
            shares = batch_tokens // (self.sequence_len * self.rows)
            able = [ranks for ranks in range(1, shares + 1) if shares % ranks == 0]
            near = [*[w for w in able if w < self.world_size][-1:], *[w for w in able if w > self.world_size][:1]]
            split = f"it can be split over {' or '.join(map(str, near))} ranks"
            advice = f"{advice}; {split}" if is_given else split
        name = "--total-batch-size:" if is_given else "the run's batch:"
        smaller = ", or give a smaller --device-batch-size" if self.rows > 1 else ""
        raise UserError(
            f"{name} {batch_tokens} must be a multiple of {self.tokens} tokens, which is sequence length "
            f"{self.sequence_len} x {self.world_size} ranks x --device-batch-size {self.rows}; {advice}{smaller}"
        )

    def nearest(self, batch_tokens: float, rounded: Callable[[float], int] = round) -> int:
        """The batch that a law's ideal becomes: rows with a mantissa of four bits.

        So the batch is within 6 % of the ideal, the same for 1, 2, 4, 8 ranks unless it is tiny, and made of passes of
        equal size. Rounding to a power of two, as the reference does, moves learning rates by up to a fifth.
        """
        rows = four_bits(batch_tokens / self.sequence_len, rounded)
        per_rank = four_bits(math.ceil(rows / (self.world_size * self.rows)), math.ceil)
        return per_rank * self.tokens


def four_bits(number: float, rounded: Callable[[float], int] = round) -> int:
    """A whole number near `number`, at least 1, of the form m * 2^k with m at most 16.

    >>> [four_bits(n) for n in (0.2, 7, 17, 35, 103, 256)]
    [1, 7, 16, 36, 104, 256]
    """
    unit = 2.0 ** max(0, math.floor(math.log2(max(number, 1))) - 3)
    return max(1, int(rounded(number / unit) * unit))


def training_plan(
    scaling_params: int,
    reference_scaling_params: int,
    flops_per_token: int,
    width: int,
    horizon: Horizon,
    micro_batch: MicroBatch,
    total_batch_tokens: int | None = None,
    weight_decay: float = BASE_WEIGHT_DECAY,
    schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
    laws: str = "nanochat",
) -> TrainingPlan:
    """The plan of a run from its counts.

    scaling_params: N, block matrices plus head; reference_scaling_params: N of depth 12. micro_batch: the smallest
    that the step may be made of; the derived batch is a multiple of it. Raises UserError where a given batch is not.
    """
    law = LAWS[laws]
    reference_tokens = (horizon.ratio if not law.follow_horizon else DEFAULT_RATIO) * reference_scaling_params
    tokens = horizon_tokens(scaling_params, reference_tokens, flops_per_token, horizon, total_batch_tokens, law)
    batch = total_batch_tokens or derived_batch(tokens / reference_tokens, micro_batch, law)
    if law.fit_short_runs and total_batch_tokens is None and horizon.num_steps is None:
        batch = min(batch, micro_batch.nearest(tokens / MIN_STEPS, math.floor))
    micro_batch.check(batch)
    num_steps = max(1, horizon_steps(tokens, flops_per_token, horizon, batch))
    real_tokens = num_steps * batch if law.follow_horizon else tokens
    scaled_decay = (
        weight_decay * math.sqrt(batch / REFERENCE_BATCH_TOKENS) * reference_tokens / real_tokens
    )  # arXiv 2405.13698
    return TrainingPlan(
        num_steps=num_steps,
        total_batch_tokens=batch,
        lr_scale=law.lr_scale(batch),
        width_scale=(width / REFERENCE_WIDTH) ** -0.5,
        weight_decay=min(MAX_WEIGHT_DECAY, scaled_decay) if law.fit_short_runs else scaled_decay,
        schedule=schedule,
        fit_short_runs=law.fit_short_runs,
    )


def horizon_tokens(
    scaling_params: int, reference_tokens: float, flops_per_token: int, horizon: Horizon, batch: int | None, law: Laws
) -> float:
    """Tokens D that batch size and weight decay should be fitted to."""
    if law.follow_horizon and horizon.num_steps is not None:
        if batch is not None:
            return horizon.num_steps * batch
        # D = steps * B and B = B_ref * (D / D_ref)^e together: B^(1 - e) = B_ref * (steps / D_ref)^e
        per_step = REFERENCE_BATCH_TOKENS * (horizon.num_steps / reference_tokens) ** BATCH_EXPONENT
        return horizon.num_steps * per_step ** (1 / (1 - BATCH_EXPONENT))
    if law.follow_horizon and horizon.target_flops is not None:
        return horizon.target_flops / flops_per_token
    return int(horizon.ratio * scaling_params)


def derived_batch(token_ratio: float, micro_batch: MicroBatch, law: Laws) -> int:
    """Batch in tokens for a horizon of `token_ratio` times the reference's, whole micro-batches.

    Reference: a power of two, so that the learning rates of neighbouring depths jump by up to sqrt(2) (pretraining
    spec 12, item 23). Ours follows the law as closely as rows allow.
    """
    ideal = REFERENCE_BATCH_TOKENS * token_ratio**BATCH_EXPONENT
    if law.follow_horizon:
        return micro_batch.nearest(ideal)
    return max(1, round(2 ** round(math.log2(ideal)) / micro_batch.tokens)) * micro_batch.tokens


def horizon_steps(tokens: float, flops_per_token: int, horizon: Horizon, batch: int) -> int:
    if horizon.num_steps is not None:
        return horizon.num_steps
    if horizon.target_flops is not None:
        return round(horizon.target_flops / (flops_per_token * batch))
    return int(tokens) // batch


def sft_plan(num_steps: int, total_batch_tokens: int, width: int, laws: str = "nanochat") -> TrainingPlan:
    """The plan of fine-tuning on conversations: the base run's scales, decay and schedule of its own."""
    return TrainingPlan(
        num_steps=num_steps,
        total_batch_tokens=total_batch_tokens,
        lr_scale=LAWS[laws].sft_lr_scale(total_batch_tokens),
        width_scale=(width / REFERENCE_WIDTH) ** -0.5,
        weight_decay=LAWS[laws].sft_weight_decay,
        schedule=SFT_SCHEDULE,
        fit_short_runs=LAWS[laws].fit_short_runs,
    )


@dataclass(frozen=True)
class BaseRates:
    """Learning rates at depth 12 and a batch of 2^19 tokens (pretraining spec 6.1)."""

    embedding: float = 0.3
    unembedding: float = 0.008
    matrix: float = 0.02
    scalar: float = 0.5

    def by_role(self, lr_scale: float = 1.0, width_scale: float = 1.0) -> dict[str, float]:
        """Learning rate of each parameter role, before the schedule."""
        return {
            "wte": self.embedding * lr_scale * width_scale,
            "value_embedding": 0.5 * self.embedding * lr_scale * width_scale,
            "lm_head": self.unembedding * lr_scale * width_scale,
            "matrix": self.matrix * lr_scale,
            "resid_scalar": 0.01 * self.scalar * lr_scale,
            "x0_scalar": self.scalar * lr_scale,
            "smear": 0.2,
        }


def device_batch_rows(rows_per_step: int, at_most: int) -> int:
    """The largest number of rows per pass, not above `at_most`, of which whole passes make up a device's step."""
    return next(rows for rows in range(min(at_most, rows_per_step), 0, -1) if rows_per_step % rows == 0)
