"""A base run before it begins: its flags, and all that follows from them and from the number of devices.

`scripts.base_train` does what `base_plan` says, and `scripts.plan` shows it. So a plan and the run that follows it
cannot differ in model, steps and batch: both read the same flags and call the same function. Rows of a pass also follow
from the memory that is free when each of them asks.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from nanochat import cli, scaling
from nanochat.config import ModelConfig
from nanochat.forecast import Setup, largest_rows

HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio", "time_budget")


def add_base_flags(parser: cli.Parser) -> None:
    """Every flag of base training."""
    schedule = scaling.Schedule()
    parser.flag("--depth", cli.depth, 20, "layers: the dial")
    parser.flag("--max-seq-len", cli.sequence_length, 2048, "context in tokens")
    ratio = f"tokens per scaling parameter; {scaling.DEFAULT_RATIO:g} unless another horizon is given"
    parser.flag("--target-param-data-ratio", cli.unless_minus_one(cli.number_between(1e-3, 1e6)), None, ratio)
    parser.flag("--target-flops", cli.unless_minus_one(cli.flops), None, "training FLOPs")
    parser.flag("--time-budget", cli.positive_float, None, "seconds of start-up and training, evaluations not counted")
    cli.add_plan_flags(parser, eval_every=250, save_every=250)
    parser.flag("--weight-decay", cli.non_negative_float, scaling.BASE_WEIGHT_DECAY, "Muon's, before scaling")
    parser.flag("--warmup-steps", cli.non_negative_int, schedule.warmup_steps, "learning-rate warm-up")
    parser.flag("--warmdown-ratio", cli.fraction, schedule.warmdown_frac, "share of the run in which the rate falls")
    parser.flag("--final-lr-frac", cli.fraction, schedule.final_lr_frac, "learning rate at the end")
    parser.flag("--laws", cli.one_of(*scaling.LAWS), "nanochat", "scaling laws; reference: the ancestor's")
    parser.flag("--aspect-ratio", cli.positive_int, scaling.ASPECT_RATIO, "width per layer")
    parser.flag("--head-dim", cli.head_dim, scaling.HEAD_DIM, "width per attention head")
    cli.add_data_flags(parser)
    cli.add_architecture_flags(parser)
    cli.add_run_flags(parser)
    cli.add_precision_flags(parser)
    parser.check(lambda args: cli.at_most_one(args, HORIZONS))
    parser.check(lambda args: cli.problem_of(scaling.model_config, args.depth, **model_shape(args)))


def batch_problem(args: Namespace, world_size: int) -> str | None:
    """The rule that a given batch is whole passes over all ranks."""
    micro_batch = scaling.MicroBatch(args.max_seq_len, world_size, args.device_batch_size or 1)
    return cli.problem_of(micro_batch.check, args.total_batch_size) if args.total_batch_size else None


def model_shape(args: Namespace) -> dict[str, Any]:
    """What `scaling.model_config` takes besides depth and vocabulary."""
    given = {"sequence_len": args.max_seq_len, "aspect_ratio": args.aspect_ratio, "head_dim": args.head_dim}
    return given | {"laws": args.laws} | cli.architecture_switches(args)


@dataclass(frozen=True)
class Request:
    """What a base run is asked for, as far as its plan follows from it. None: to be derived.

    model_shape: as `scaling.model_config` takes it. time_budget_s: in place of a horizon. device_batch_rows: of a pass.
    """

    depth: int
    model_shape: dict[str, Any]
    horizon: scaling.Horizon
    time_budget_s: float | None
    device_batch_rows: int | None
    total_batch_tokens: int | None
    weight_decay: float
    schedule: scaling.Schedule
    laws: str


def request_of(args: Namespace) -> Request:
    """What the flags of `add_base_flags` ask for."""
    ratio = args.target_param_data_ratio or scaling.DEFAULT_RATIO
    return Request(
        depth=args.depth,
        model_shape=model_shape(args),
        horizon=scaling.Horizon(args.num_iterations, args.target_flops, ratio),
        time_budget_s=args.time_budget,
        device_batch_rows=args.device_batch_size,
        total_batch_tokens=args.total_batch_size,
        weight_decay=args.weight_decay,
        schedule=scaling.Schedule(args.warmup_steps, args.warmdown_ratio, args.final_lr_frac),
        laws=args.laws,
    )


# The plan ------------------------------------------------------------------------------------------------------


def base_config(asked: Request, vocab_size: int) -> ModelConfig:
    """The model that is asked for."""
    return scaling.model_config(asked.depth, vocab_size, **asked.model_shape)


@dataclass(frozen=True)
class BasePlan:
    """A model, how it is trained, and how many rows each device has of a step."""

    config: ModelConfig
    training: scaling.TrainingPlan
    rows_per_step: int


def base_plan(
    asked: Request, vocab_size: int, world_size: int, expected_flops: float, begun_batch: int | None = None
) -> BasePlan:
    """What it comes to. Raises UserError where a batch, given or begun, cannot be shared by the ranks.

    expected_flops: FLOP/s of all ranks, for time budgets. begun_batch: tokens a step of a run that goes on.
    """
    from nanochat.model.gpt import flops_per_token, scaling_parameters  # need torch, which takes seconds

    config = base_config(asked, vocab_size)
    reference = scaling.model_config(scaling.REFERENCE_DEPTH, vocab_size, **asked.model_shape)
    micro_batch = scaling.MicroBatch(config.sequence_len, world_size, asked.device_batch_rows or 1)
    if begun_batch:
        micro_batch.check(begun_batch, is_given=False)
    horizon = asked.horizon
    if asked.time_budget_s:
        horizon = replace(horizon, target_flops=asked.time_budget_s * expected_flops)
    training = scaling.training_plan(
        scaling_parameters(config),
        scaling_parameters(reference),
        flops_per_token(config),
        config.n_embd,
        horizon,
        micro_batch,
        total_batch_tokens=begun_batch or asked.total_batch_tokens,
        weight_decay=asked.weight_decay,
        schedule=asked.schedule,
        laws=asked.laws,
    )
    return BasePlan(config, training, training.total_batch_tokens // (config.sequence_len * world_size))


def derived_rows(setup: Setup, rows_per_step: int, free_bytes: float | None) -> int:
    """Rows of a pass where no flag says so: on a GPU as many as the forecast lets fit, else 32, or fewer to fit.

    free_bytes: what the process may hold; None: unknown.
    """
    at_most = rows_per_step if setup.is_gpu and free_bytes is not None else min(rows_per_step, cli.DEVICE_BATCH_SIZE)
    return largest_rows(setup, math.inf if free_bytes is None else free_bytes, rows_per_step, at_most) or 1
